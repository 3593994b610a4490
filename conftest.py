"""What the tests of all projects share."""

import sys
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """A function that runs a main() which must end with status 2 and one line; returns what it printed."""

    def run(main: Callable[[], None], *words: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert ended.value.code == 2
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        return printed

    return run
