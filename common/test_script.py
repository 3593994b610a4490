"""Checks of what surrounds every main(): one-line errors, typed lines, stopping between two steps."""

import os
import signal
import subprocess
import sys
import time

import pytest

from common.files import ROOT
from common.script import StopRequest, ask, one_line, progress, run_validation, script


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("n (1)\nmust be 2"), 2, "error: n (1) must be 2\n"),
        (FileNotFoundError("make it with: x"), 2, "error: make it with: x\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied\n"),
        (BrokenPipeError(32, "Broken pipe"), 2, "error: Broken pipe\n"),  # of a worker, as stdout is whole
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_expected_error_becomes_one_line_and_a_status(error, status, line, capsys):
    @script
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == status
    assert capsys.readouterr().err == line


def test_a_bug_still_shows_its_traceback():
    @script
    def main() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        main()


def test_the_traceback_of_an_expected_error_can_be_asked_for(monkeypatch):
    @script
    def main() -> None:
        raise ValueError("x")

    monkeypatch.setenv("LLM_COURSE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="x"):
        main()


def test_an_error_without_words_still_says_what_it_is():
    assert one_line(ValueError()) == "ValueError"


def run_code(code: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from common.script import *\n" + code]
    return subprocess.run(command, cwd=ROOT, input=typed, capture_output=True, text=True, check=False)


def test_a_closed_pipe_is_no_error():
    code = "from common.script import script\n@script\ndef main():\n  for i in range(10**5): print(i)\nmain()"
    piped = subprocess.run(
        f"{sys.executable} -c '{code}' | head -n 1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (piped.stdout, piped.stderr) == ("0\n", "")


@pytest.mark.parametrize(("typed", "heard"), [("a\nb\n\nc\n", ["a", "b"]), ("a\n", ["a"]), ("", [])])
def test_asking_ends_at_an_empty_line_or_the_end_of_input(typed, heard):
    assert run_code("print(list(ask('')))", typed).stdout.splitlines()[-1] == str(heard)


def test_ctrl_c_ends_asking(monkeypatch):
    def interrupt(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert list(ask("> ")) == []


def test_progress_hands_the_items_on():
    assert list(progress([1, 2, 3], disable=True)) == [1, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop_and_the_second_insists(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # the signal may arrive a moment after the call
            os.kill(os.getpid(), number)
            time.sleep(0.1)
    assert signal.getsignal(number) is before


TEST_FILE = """
from common.script import run_validation
def test_right(): pass
def test_wrong(): raise ValueError
def interact(): print("hello")
if __name__ == "__main__": run_validation(__file__, interact)
"""


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["-k", "right"], 0, "1 passed"),
        ([], 1, "1 failed"),
        (["--interactive"], 0, "hello"),
        (["--help"], 0, "-k"),
    ],
)
def test_a_test_file_is_also_a_script(tmp_path, flags, status, words):
    (tmp_path / "test_sample.py").write_text(TEST_FILE)
    command = [sys.executable, "test_sample.py", *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert words in done.stdout


if __name__ == "__main__":
    run_validation(__file__)
