"""Where things live, and how a file is written so that nobody ever sees half of it."""

import glob
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent  # the repository
DATA = ROOT / "data"  # corpora, made by download_data.py
CHECKPOINTS = ROOT / "checkpoints"  # what training writes, one folder per project


@contextmanager
def atomic_write(path: Path | str, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; rename it to `path` on success, remove it on failure.

    Text is UTF-8 with newlines kept as they are. Raises OSError as open() and write() do, naming `path`.
    """
    path = Path(path)
    make_folder(path.parent)
    _sweep(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with os.fdopen(handle, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the content does
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename:  # it says already what it is about
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what killed runs left of earlier attempts; an attempt that lives is not an hour old."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):  # another process swept it just now
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()


def make_folder(folder: Path | str) -> Path:
    """Make the folder with its parents.

    Raise OSError now, before any work, if nothing can be written in it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            error.errno, f"{error.strerror}, so nothing can be written there", str(folder)
        ) from error
    return folder


def shown(path: Path | str) -> str:
    """Return the path as people like to read it: relative, if it is below the folder that they are in."""
    path, here = Path(path).absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _umask() -> int:
    """Return the process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
