"""What every script needs around its main().

Errors in one line, typed lines, progress bars, tests that run as scripts.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

from tqdm import tqdm

T = TypeVar("T")
BAD_INPUT = 2  # exit status
INTERRUPTED = 130  # exit status of a program that Ctrl-C ended: 128 + SIGINT


def script(main: Callable[[], None]) -> Callable[[], None]:
    """Turn what a reader can get wrong (ValueError, OSError) into one line and exit status 2.

    Ctrl-C exits with 130, a closed pipe (`| head`) quietly. LLM_COURSE_TRACEBACK=1 shows the whole traceback.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
            sys.stdout.flush()
        except BrokenPipeError as error:
            if _stdout_is_open():  # then it was another pipe that broke, such as one to a worker
                _end(error)
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # or the exit itself writes, and fails
            sys.exit(0)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except (ValueError, OSError) as error:
            _end(error)

    return wrapped


def _end(error: Exception) -> NoReturn:
    """Print the error as one line and exit; called while the error is being handled."""
    if os.environ.get("LLM_COURSE_TRACEBACK"):
        raise error
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def _stdout_is_open() -> bool:
    """Say whether somebody still reads what we print."""
    try:
        print(flush=True)  # only writing tells
    except BrokenPipeError:
        return False
    return True


def one_line(error: BaseException) -> str:
    """Return the error's message as one line; for the system's errors `path: what went wrong`."""
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        message = str(error) or type(error).__name__
    return " ".join(message.split())


def ask(prompt: str) -> Iterator[str]:
    """Yield the lines that are typed (or piped in) until an empty one, Ctrl-D or Ctrl-C."""
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            return
        yield line


def progress(items: Iterable[T], **settings: Any) -> "tqdm[T]":
    """Return a tqdm bar over `items`.

    Where nobody watches (no terminal) it speaks up every 10 seconds only.
    """
    watched = sys.stderr.isatty()
    house: dict[str, Any] = {"dynamic_ncols": watched, "mininterval": 0.1 if watched else 10}
    return tqdm(items, **(house | settings))


class StopRequest:
    """Turn Ctrl-C and SIGTERM into a flag, so that a loop can end between two steps and save.

    A second one ends at once.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        self._handlers = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step, to save; once more to stop at once", file=sys.stderr)


def run_validation(test_file: str, interact: Callable[[], None] | None = None) -> None:
    """Run a test module as a script: pytest on this file, or `interact()` when asked with --interactive.

    Other flags go to pytest (`-k causal -x`), whose status is the exit status. Ends the process.
    """
    import pytest  # here, so that a test module run by pytest does not import it twice under two names

    flags = sys.argv[1:]
    if {"-h", "--help"} & set(flags):
        ours = "[--interactive] " if interact else ""
        print(f"usage: {Path(test_file).name} {ours}[pytest's flags, such as -k NAME -x]")
        sys.exit(0)
    if "--interactive" in flags:
        if interact is None:
            print("error: --interactive: this test file has nothing to try by hand", file=sys.stderr)
            sys.exit(BAD_INPUT)
        script(interact)()
        sys.exit(0)
    sys.exit(pytest.main([test_file, *flags]))
