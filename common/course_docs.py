"""The rules about what the course tells its readers to click and to type; test_course.py applies them.

A documented command is rehearsed: a child process runs its script until that has parsed its flags.
The children are forked from one server that has imported torch, so that each costs a fraction of a second.
"""

import ast
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from itertools import takewhile
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest.mock import patch
from urllib.parse import unquote

from common.config import BaseConfig
from common.course_rules import modules, projects, used_names

SECONDS_TO_START = 5.0  # of processor time that --help may take, beyond the import of torch
SECONDS_TO_END = 60.0  # of wall time that a rehearsal may take before it is stopped
FORKS: Any = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
LINK = re.compile(
    r"""\]\(<?([^\s)>]+) | ^\[[^]\n]+\]:\s*(\S+) | <(?:a|img|source)\b[^>]*?\b(?:href|src)=["']([^"']+)""",
    re.VERBOSE | re.MULTILINE,
)
CODE = re.compile(r"^ *(```|~~~).*?^ *\1|`[^`\n]*`", re.DOTALL | re.MULTILINE)
MODULE = re.compile(r"-m ((?:common|phase\d\w*)(?:\.\w+)+)")  # python -m phase1.project1.train is train.py
COMMAND = re.compile(
    r"""\buv[ ]run[ ](?P<words>(?:\\\n|(?!uv[ ]run)[^\n`])*)  # up to the end of the line, which \ continues
    (?=(?P<printed>(?:\n(?!.*uv[ ]run|```).*)*))  # and what a code block shows below it""",
    re.VERBOSE,
)
LAUNCHERS = {"python", "torchrun", "accelerate", "pytest"}  # of scripts; ruff and mypy only read them
PATTERN = re.compile(r"\.\.\.|phaseN|projectM|[$<{*]")  # marks a pattern for commands, not a command


def documents(root: Path) -> list[Path]:
    """Return the README files of the course and CLAUDE.md."""
    first = [root / "README.md", root / "CLAUDE.md", root / "data/README.md"]
    return [path for path in [*first, *sorted(root.glob("phase*/**/README.md"))] if path.is_file()]


def readme_lists_projects(root: Path) -> Iterator[str]:
    """Each project is named in a row of the table in the root README."""
    lines = (root / "README.md").read_text(encoding="utf-8").splitlines()
    table = " ".join(line for line in lines if line.startswith("|"))
    for project in projects(root):
        if not re.search(rf"\b{project.name}\b", table):
            yield f"README.md:1 project ({project.name}) must be in the table of projects"


def links_lead_somewhere(root: Path) -> Iterator[str]:
    """Each relative link and image points to a file or folder of the course."""
    for path in documents(root):
        text = CODE.sub(lambda code: "\n" * code[0].count("\n"), path.read_text(encoding="utf-8"))
        for match in LINK.finditer(text):
            target = next(filter(None, match.groups()))
            file = (path.parent / unquote(target.split("#")[0])).resolve()
            elsewhere = re.match(r"[a-z][a-z+.-]*:|#|//", target)
            if not elsewhere and not (file.exists() and file.is_relative_to(root.resolve())):
                where = f"{path.relative_to(root).as_posix()}:{1 + text.count(chr(10), 0, match.start())}"
                yield f"{where} link ({target}) must point to a file of the course"


class Command(NamedTuple):
    """A documented command: where it stands, its words after `uv run`, and the script that it starts."""

    where: str  # file:line
    words: list[str]
    script: str  # the first word that ends in .py, or ""
    exact: bool  # a reader can type these words; in the source's strings a sentence may go on behind them

    @property
    def arguments(self) -> list[str]:
        """Return the words behind the script."""
        return self.words[self.words.index(self.script) + 1 :] if self.script else self.words

    @property
    def is_test(self) -> bool:
        """Say whether pytest takes the arguments."""
        return "pytest" in self.words or Path(self.script).name.startswith("test_")

    def says(self, what: str) -> str:
        """Return a complaint about this command."""
        return f"{self.where} command (uv run {shlex.join(self.words)}) {what}"


def split(command: str) -> list[str]:
    """Split what follows `uv run` as a shell does, up to the first operator (| && ; > ...) or comment."""
    plain = re.sub(r"(?<=\s)(\d(?=>)|\$\(\w+\)(?!\S))", "", command)  # the 2 of 2>&1, a Makefile's $(ARGS)
    lexer = shlex.shlex(plain, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        return list(takewhile(lambda word: not word or set(word) - set("();<>|&"), lexer))
    except ValueError:  # an apostrophe or closing quote in prose
        return [word.strip("\"'") for word in command.split()]


def commands_in(text: str, name: str, line: int = 1, exact: bool = True) -> Iterator[Command]:
    """Yield the commands of a text; of one that is shown to print `error: ...` only the script is checked."""
    text = re.sub(r"(?<!`)`[^`\n]+\n[^`\n]+`", lambda code: code[0].replace("\n", " ") + "\n", text)
    for match in COMMAND.finditer(text):
        plain = MODULE.sub(
            lambda name: name[1].replace(".", "/") + ".py", match["words"].replace("\\\n", " ")
        )
        words = split(plain)
        words[-1:] = [word.rstrip(".,:'") or word for word in words[-1:]]
        program = next((word for word in words if not word.startswith("-")), "")
        launched = LAUNCHERS & set(words) or program.endswith(".py")
        script = next((word for word in words if word.endswith(".py") and launched), "")
        if not PATTERN.search(script or " ".join(words)):
            refused = re.search(r"^error: ", match["printed"], flags=re.MULTILINE)
            where = f"{name}:{line + text.count(chr(10), 0, match.start())}"
            yield Command(where, words, script, exact and not refused)


def strings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield each string of a source and its line; a field of an f-string reads as {}."""
    inner: set[ast.AST] = set()
    for node in ast.walk(tree):  # a whole comes before its parts
        if isinstance(node, ast.JoinedStr):
            inner.update(node.values)
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield "".join(map(str, parts)), node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
            yield node.value, node.lineno


def commands(root: Path) -> Iterator[Command]:
    """Yield the commands that the documents, the Makefile and the strings of the source give to a reader."""
    for path in filter(Path.is_file, [*documents(root), root / "Makefile"]):
        yield from commands_in(path.read_text(encoding="utf-8"), path.relative_to(root).as_posix())
    for module in modules(root):
        for text, line in [] if module.is_test else strings(module.tree):
            yield from commands_in(text, module.name, line, exact=False)


def lost(root: Path, command: Command) -> str:
    """Return the word of a command that should name a file or module and does not, or nothing."""
    words = command.words
    if command.is_test:
        paths = [word.split("::")[0] for word in words if "/" in word or word.endswith(".py")]
        return next((path for path in paths if not path.startswith("-") and not (root / path).exists()), "")
    if command.script:
        return "" if (root / command.script).is_file() else command.script
    behind = words[words.index("python") + 1 :] if "python" in words else []
    if behind[:1] == ["-m"]:
        return "".join(name for name in behind[1:2] if name.split(".")[0] not in used_names())
    return "".join(word for word in behind[:1] if not word.startswith("-"))


def unknown_flags(arguments: list[str], help_text: str) -> list[str]:
    """Return the --flags that a help text does not name; hyphens and underscores are the same."""
    known = {flag.replace("_", "-") for flag in re.findall(r"--[A-Za-z][\w-]*", help_text)}
    flags = [word.split("=")[0] for word in arguments if re.match(r"--[A-Za-z]", word)]
    return [flag for flag in flags if flag.replace("_", "-") not in known]


@cache
def pytest_help() -> str:
    """Return the flags of pytest, which a test file run as a script hands on."""
    shown = subprocess.run(
        [sys.executable, "-m", "pytest", "--help"], capture_output=True, text=True, check=True
    )
    return shown.stdout


def commands_lead_somewhere(root: Path) -> Iterator[str]:
    """Each documented command names scripts, tests and modules that exist; a test takes flags of pytest."""
    for command in commands(root):
        if word := lost(root, command):
            yield command.says(f"must name what exists, unlike {word}")
        elif command.is_test and "--interactive" in command.arguments and "pytest" not in command.words:
            if "run_validation(__file__, " not in (root / command.script).read_text(encoding="utf-8"):
                yield command.says("must be a test file that gives run_validation something to try by hand")
        elif command.is_test and unknown_flags(command.arguments, ""):
            for flag in unknown_flags(command.arguments, pytest_help()):
                yield command.says(f"must have flags of pytest, unlike {flag}")


class Rehearsal(NamedTuple):
    """How a script took its arguments: exit status or exception, what it printed, processor time so far."""

    status: int | str | None
    output: str
    seconds: float

    def __str__(self) -> str:
        lines = self.status if isinstance(self.status, str) else self.output
        return next((line for line in reversed(lines.splitlines()) if line.strip()), f"status {self.status}")


def rehearse(root: str, script: str, arguments: list[list[str]], send: Connection) -> None:
    """In a child process: run a script once per list of arguments, up to where it has parsed its settings."""
    parse = BaseConfig.from_cli.__func__  # type: ignore[attr-defined]

    def parse_and_stop(config: type[BaseConfig], argv: list[str] | None = None) -> NoReturn:
        parse(config, argv)
        raise SystemExit

    os.chdir(root)
    search_path = [str(Path(root, script).parent), root, *sys.path]
    for words in arguments:
        printed = io.StringIO()
        with (
            patch.object(sys, "argv", [script, *words]),
            patch.object(sys, "path", search_path),
            patch.object(BaseConfig, "from_cli", classmethod(parse_and_stop)),
            redirect_stdout(printed),
            redirect_stderr(printed),
        ):
            status: int | str | None = 0
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as stop:
                status = stop.code
            except Exception as error:  # the complaint tells it
                status = f"{type(error).__name__}: {error}"
        send.send(Rehearsal(status, printed.getvalue(), time.process_time()))


def rehearsals(root: Path, script: str, arguments: list[list[str]]) -> list[Rehearsal]:
    """Return how a script takes each list of arguments, as far as the first that makes it hang or die."""
    receive, send = FORKS.Pipe(duplex=False)
    child = FORKS.Process(target=rehearse, args=(str(root), script, arguments, send))
    child.start()
    send.close()
    taken: list[Rehearsal] = []
    try:
        while len(taken) < len(arguments) and receive.poll(SECONDS_TO_END):
            taken.append(receive.recv())
        if len(taken) < len(arguments):
            taken.append(Rehearsal(f"no answer in {SECONDS_TO_END:.0f} s", "", 0.0))
    except EOFError:
        child.join()
        taken.append(Rehearsal(f"the process died with status {child.exitcode}", "", 0.0))
    finally:
        child.kill()
        child.join()
        receive.close()
    return taken


def script_takes(root: Path, script: str, given: list[Command]) -> list[str]:
    """Return the complaints about one script and about the commands that are documented for it."""
    parses = ".from_cli(" in (root / script).read_text(encoding="utf-8")  # else a rehearsal would not stop
    exact = [command for command in given if command.exact and parses]
    shown, *taken = rehearsals(root, script, [["--help"], *(command.arguments for command in exact)])
    if shown.status or not shown.output:
        return [f"{script}:1 --help ({shown}) must print the flags and exit with 0"]
    complaints = []
    if shown.seconds > SECONDS_TO_START:
        complaints.append(f"{script}:1 --help ({shown.seconds:.1f} s) must start in {SECONDS_TO_START:.0f} s")
    for command, result in zip(exact, taken, strict=False):
        if result.status:
            complaints.append(command.says(f"must be one that its script accepts: {result}"))
    for command in [command for command in given if command not in exact]:
        flags = unknown_flags(command.arguments, shown.output)
        complaints += [command.says(f"must have flags of its script, unlike {flag}") for flag in flags]
    return complaints


def scripts_take_their_commands(root: Path) -> Iterator[str]:
    """Each script prints --help within seconds, and its own parser accepts each command documented for it."""
    if hasattr(FORKS, "set_forkserver_preload"):
        FORKS.set_forkserver_preload(["torch", "pytest", __name__])  # what each child would import itself
    given = {module.name: list[Command]() for module in modules(root) if module.is_script}
    for command in commands(root):
        if command.script and not command.is_test and not lost(root, command):
            given.setdefault(command.script, []).append(command)
    with ThreadPoolExecutor(max_workers=2) as pool:
        for complaints in pool.map(lambda script: script_takes(root, script, given[script]), sorted(given)):
            yield from complaints
