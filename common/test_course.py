"""The course keeps its rules; each rule is seen to notice what breaks it, in a toy course of two projects."""

from pathlib import Path

import pytest

from common import course_docs, course_rules
from common.files import ROOT
from common.script import run_validation

QUICK_RULES = [
    course_rules.standard_files,
    course_rules.imports_point_down,
    course_rules.names_hide_nothing,
    course_rules.docstrings_exist,
    course_rules.ideas_are_explained,
    course_rules.papers_are_listed,
    course_rules.text_is_clean,
    course_rules.nothing_runs_on_import,
    course_rules.nothing_is_unsafe,
    course_rules.tests_are_scripts,
    course_docs.readme_lists_projects,
    course_docs.links_lead_somewhere,
    course_docs.commands_lead_somewhere,
]
RULES = [*QUICK_RULES, course_docs.scripts_take_their_commands]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_course_keeps_the_rule(rule):
    complaints = list(rule(ROOT))
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


ONE = "phase1_toy/project1_one"
TWO = "phase1_toy/project2_two"
TOOLS = r'''r"""Tools for \nabla."""

from pickle import UnpicklingError

try:
    import torch
except ImportError:
    torch = None
'''
CONFIG = '''"""Settings."""

from dataclasses import dataclass
from typing import Literal

from common.config import BaseConfig


@dataclass
class Config(BaseConfig):
    """A toy."""

    max_steps: int = 3  # steps
    attention: Literal["explicit", "sdpa"] = "sdpa"
    resume: bool = True
'''
MODEL = '''"""A model.

PAPERS
  [1] Attention Is All You Need, Vaswani et al., 2017, arXiv:1706.03762
  [2] Decoupled Weight Decay Regularization, Loshchilov and Hutter,
      2017

SYMBOLS
  n = N
"""

from typing import NamedTuple, Protocol


class Batch(NamedTuple):
    """A record."""

    x: int


class Backend(Protocol):
    """An interface."""

    def attend(self, x: int) -> int:
        """Return x[1] of [128, 64].

        >>> attend(7)
        [7]
        """


class Model(Backend):
    """Do it.

    PAPER: [1] Eq. 1, and [2].
    PAPER CONTEXT: There was nothing.
    INTUITION: It is simple.
    IMPLEMENTATION: As in the paper.
    WHY: Else it is not done.
    """

    def __init__(self) -> None:
        self.x = 1

    def attend(self, x: int) -> int:
        return x
'''
SAMPLING = '''"""An idea without a class.

PAPERS
  [1] Information Theory, Shannon, 1948
"""

import re

from phase1_toy.project1_one.model import Model

DIGITS = re.compile("[0-9]+")


def sample(model: Model) -> int:
    """Sample.

    PAPER: [1].
    PAPER CONTEXT: Telephones.
    INTUITION: Dice.
    IMPLEMENTATION: By hand.
    WHY: It is fair.
    """
    return model.attend(4)


def other() -> None:
    """Do less."""
'''
SCRIPT = '''"""Train: uv run python phase1_toy/project1_one/train.py --max_steps 5 and so on"""

from pathlib import Path

from common.script import script
from phase1_toy.project1_one.config import Config


@script
def main() -> None:
    config = Config.from_cli()
    Path("it_ran").write_text(f"uv run python {'phase1_toy'}/train.py --max_steps {config.max_steps}")


if __name__ == "__main__":
    main()
'''
PLAIN_SCRIPT = '''"""A script with a parser of its own."""

import sys


def main() -> None:
    print("usage: [--a_b X]" if "--help" in sys.argv else sys.argv)


if __name__ == "__main__":
    main()
'''
TEST = '''"""Checks."""

import pytest

from common.script import run_validation

torch = pytest.importorskip("torch"); pytest.importorskip("numpy")


def test_it():
    assert True


def interact() -> None:
    pass


if __name__ == "__main__":
    run_validation(__file__, interact)
'''
README = """# The course

| phase | projects |
|---|---|
| toy | [project1_one](phase1_toy/project1_one) · [two](phase1_toy/project2_two/README.md#top) |

```bash
git clone X && cd course
LLM=1 uv run python phase1_toy/project1_one/train.py --max-steps 5 \\
    --no-resume --attention=explicit 2>&1 | tee "log.txt"  # a comment
uv run --no-sync torchrun --nproc_per_node 2 phase1_toy/project1_one/train.py --max_steps 5
uv run pytest phase1_toy/project1_one -q --maxfail 1
uv run pytest
uv run python -m phase1_toy.project1_one.plain --a-b 1
uv run python -m http.server
uv run mypy common/tools.py
```

Use `uv run python ...` with [a link](https://example.org/x) and `[no](link)`.
"""
README_ONE = """# One

<img src="../../README.md"> ![figure](config.py) [here](#one)

`uv run python phase1_toy/project1_one/train.py
--resume` and `uv run python phase1_toy/project1_one/test_model.py --interactive` and
`uv run python phase1_toy/project1_one/plain.py --a-b 3`, after
`uv run python phaseN_name/projectM_name/train.py --lr 1`.

    $ uv run python phase1_toy/project1_one/train.py --config quick

```
$ uv run python phase1_toy/project1_one/train.py --max_steps many
error: invalid choice
```
"""
FILES = {
    "README.md": README,
    "common/__init__.py": "",
    "common/tools.py": TOOLS,
    "phase1_toy/__init__.py": "",
    f"{ONE}/__init__.py": "",
    f"{ONE}/README.md": README_ONE,
    f"{ONE}/config.py": CONFIG,
    f"{ONE}/configs/quick.yaml": "max_steps: 1\n",
    f"{ONE}/model.py": MODEL,
    f"{ONE}/train.py": SCRIPT,
    f"{ONE}/plain.py": PLAIN_SCRIPT,
    f"{ONE}/test_model.py": TEST,
    f"{TWO}/__init__.py": "",
    f"{TWO}/README.md": "# Two\n",
    f"{TWO}/config.py": CONFIG,
    f"{TWO}/sampling.py": SAMPLING,
    f"{TWO}/test_sampling.py": TEST,
}


@pytest.fixture
def course(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def change(course: Path, name: str, old: str, new: str | None) -> None:
    """Replace `old` by `new` in a file, write the file anew if `old` is empty, delete it if `new` is None."""
    path = course / name
    if new is None:
        path.unlink()
    elif old:
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} must have {old!r} once"
        path.write_bytes(text.replace(old, new).encode())
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(new.encode())


def test_a_course_in_order_has_no_complaints(course):
    assert [complaint for rule in RULES for complaint in rule(course)] == []
    assert not (course / "it_ran").exists(), "a rehearsal must stop before the script does its work"


# What is broken: a file, its old text, its new text (None: no file), and the complaint (FILE: that file).
MODEL_PY, IDEA_PY, TEST_PY = f"{ONE}/model.py", f"{TWO}/sampling.py", f"{ONE}/test_model.py"
TRAIN_PY, PLAIN_PY, DOC = f"{ONE}/train.py", f"{ONE}/plain.py", f"{ONE}/README.md"
BODY = "    assert True"
FIVE = "must have a first sentence and the five sections in order"
# fmt: off
BREAKS = {
    "project without README": (DOC, "", None, f"{ONE}:1 project (project1_one) must have README.md"),
    "project without config": (f"{TWO}/config.py", "", None,
        f"{TWO}:1 project (project2_two) must have config.py"),
    "project without idea": (IDEA_PY, "", None, f"{TWO}:1 project (project2_two) must have an idea file"),
    "project without test": (f"{TWO}/test_sampling.py", "", None,
        f"{TWO}:1 project (project2_two) must have a test_*.py"),
    "project no package": (f"{ONE}/__init__.py", "", None,
        f"{ONE}:1 folder (project1_one) must have __init__.py"),
    "phase no package": ("phase1_toy/__init__.py", "", None,
        "phase1_toy:1 folder (phase1_toy) must have __init__.py"),
    "common no package": ("common/__init__.py", "", None, "common:1 folder (common) must have __init__.py"),
    "folder no package": (f"{ONE}/parts/test_x.py", "", TEST,
        f"{ONE}/parts:1 folder (parts) must have __init__.py"),
    "relative import": (TEST_PY, "import pytest\n", "from .model import Model\n",
        "FILE:3 import (.model.Model) must be absolute, from the root of the course"),
    "import of a neighbour": (TEST_PY, "import pytest\n", "import model\n",
        "FILE:3 import (model) must be absolute, from the root of the course"),
    "import that points up": (TEST_PY, "import pytest\n", "from phase1_toy import project2_two\n",
        "FILE:3 import (phase1_toy.project2_two) must not point above project 1"),
    "late import that points up": (MODEL_PY, "        return x\n",
        "        import phase1_toy.project2_two.sampling as s\n",
        "FILE:46 import (phase1_toy.project2_two.sampling) must not point above project 1"),
    "common imports a project": ("common/tools.py", "import torch", "import phase1_toy.project1_one.model",
        "FILE:6 import (phase1_toy.project1_one.model) must not point above project 0"),
    "search path grows": (TEST_PY, BODY, "    sys.path.insert(0, '.')",
        "FILE:11 sys.path (sys.path.insert(0, '.')) must stay as it is"),
    "search path is set": (TEST_PY, BODY, "    sys.path[:0] = ['.']",
        "FILE:11 sys.path (sys.path[:0] = ['.']) must stay as it is"),
    "search path is added to": (TEST_PY, BODY, "    sys.path += ['.']",
        "FILE:11 sys.path (sys.path += ['.']) must stay as it is"),
    "file hides the standard library": (f"{ONE}/tokenize.py", "", PLAIN_SCRIPT,
        "FILE:1 module name (tokenize) must not hide another module"),
    "file hides an installed package": (f"{ONE}/datasets.py", "", PLAIN_SCRIPT,
        "FILE:1 module name (datasets) must not hide another module"),
    "file hides the course": (f"{ONE}/common.py", "", PLAIN_SCRIPT,
        "FILE:1 module name (common) must not hide another module"),
    "folder hides a package": (f"{ONE}/numpy/__init__.py", "", "",
        "FILE:1 module name (numpy) must not hide another module"),
    "module without docstring": (TRAIN_PY, SCRIPT.splitlines()[0], "",
        "FILE:1 module (train) must have a docstring"),
    "function without docstring": (IDEA_PY, '    """Do less."""', "    pass",
        "FILE:26 other (no docstring) must say what it is or does"),
    "record without docstring": (MODEL_PY, '    """A record."""\n', "",
        "FILE:15 Batch (no docstring) must say what it is or does"),
    "method without docstring": (MODEL_PY, "attend(self, x: int) -> int:\n        return x", "go(self): pass",
        "FILE:45 go (no docstring) must say what it is or does"),
    "section left out": (MODEL_PY, "    WHY: Else it is not done.\n", "", f"FILE:32 Model (no WHY) {FIVE}"),
    "section left empty": (MODEL_PY, "WHY: Else it is not done.", "WHY:", f"FILE:32 Model (no WHY) {FIVE}"),
    "sections out of order": (MODEL_PY, "PAPER: [1] Eq. 1, and [2].\n    PAPER CONTEXT: There was nothing.",
        "PAPER CONTEXT: Nothing.\n    PAPER: [1] Eq. 1, and [2].", f"FILE:32 Model (no order) {FIVE}"),
    "no first sentence": (MODEL_PY, "Do it.\n", "\n", f"FILE:32 Model (no first sentence) {FIVE}"),
    "no key function": (IDEA_PY, "    INTUITION: Dice.\n", "",
        f"FILE:1 idea file (sampling, no key function) {FIVE}"),
    "no papers": (IDEA_PY, "PAPERS\n  [1] Information Theory, Shannon, 1948\n", "\n",
        "FILE:1 PAPERS (sampling lists none) must name a paper\n"
        "FILE:14 citation ([1]) must be in the PAPERS of its module"),
    "paper without year": (IDEA_PY, "Shannon, 1948", "Shannon",
        "FILE:1 PAPERS ([1] Information Theory, Shannon) must give arXiv:NUMBER or a year"),
    "wrong arXiv number": (MODEL_PY, "Vaswani et al., 2017, arXiv:1706.03762", "arXiv:1706.037",
        "FILE:1 PAPERS ([1] Attention Is All You Need, arXiv:1706.037) must give arXiv:NUMBER or a year"),
    "citation of nothing": (MODEL_PY, "As in the paper", "As in [3]",
        "FILE:33 citation ([3]) must be in the PAPERS of its module"),
    "form feed": (TEST_PY, "    pass", "    pass\f",
        "FILE:15 character ('\\x0c') must be written as an escape"),
    "Windows line end": (TEST_PY, "    pass\n", "    pass\r\n",
        "FILE:15 character ('\\r') must be written as an escape"),
    "LaTeX in a docstring": (MODEL_PY, "It is simple", r"It is \nabla f",
        'FILE:33 docstring (with a backslash) must be raw: r"""'),
    "script prints on import": (TRAIN_PY, "@script", "print(3)\n\n\n@script",
        "FILE:9 statement (print(3)) must not run on import"),
    "script parses on import": (PLAIN_PY, "import sys\n", "import sys\n\nCONFIG = Config.from_cli()\n",
        "FILE:5 statement (CONFIG = Config.from_cli()) must not run on import"),
    "script computes on import": (PLAIN_PY, "import sys\n", "import sys\n\nif sys:\n    path = min('abc')\n",
        "FILE:6 statement (path = min('abc')) must not run on import"),
    "script loops on import": (PLAIN_PY, "import sys\n", "import sys\n\nfor path in sys.path:\n    pass\n",
        "FILE:5 statement (for path in sys.path:) must not run on import"),
    "test sets a seed on import": (TEST_PY, 'torch = pytest.importorskip("torch")', "torch.manual_seed(0)",
        "FILE:7 statement (torch.manual_seed(0)) must not run on import"),
    "pickle": ("common/tools.py", "import torch", "import pickle",
        "FILE:6 import (pickle) must not bring in pickles"),
    "torch.load": (TEST_PY, BODY, "    torch.load('x')",
        "FILE:11 torch.load (torch.load('x')) must say weights_only=True"),
    "torch.load of anything": (TEST_PY, BODY, "    torch.load('x', weights_only=False)",
        "FILE:11 torch.load (torch.load('x', weights_only=False)) must say weights_only=True"),
    "numpy.load of pickles": (TEST_PY, BODY, "    np.load('x', allow_pickle=True)",
        "FILE:11 allow_pickle (np.load('x', allow_pickle=True)) must not be True"),
    "bare except": (TEST_PY, BODY, "    try:\n        pass\n    except:\n        pass",
        "FILE:13 except (everything) must name what it catches"),
    "assert outside tests": (MODEL_PY, "        self.x = 1", "        assert self",
        "FILE:43 assert (self) must be a ValueError outside tests"),
    "exec": (TEST_PY, BODY, "    exec('')", "FILE:11 call (exec) must not run text as code"),
    "eval": (TEST_PY, BODY, "    eval('')", "FILE:11 call (eval) must not run text as code"),
    "test no script": (TEST_PY, "    run_validation(__file__, interact)", "    interact()",
        "FILE:1 test file (test_model.py) must call run_validation(__file__, ...) as a script\n"
        f"{DOC}:6 command (uv run python {TEST_PY} --interactive) must be a test file that gives "
        "run_validation something to try by hand"),
    "project not in the table": ("README.md", "| [project1_one](phase1_toy/project1_one) ·", "|",
        "FILE:1 project (project1_one) must be in the table of projects"),
    "link to nothing": ("README.md", "README.md#top", "README.txt#top",
        "FILE:5 link (phase1_toy/project2_two/README.txt#top) must point to a file of the course"),
    "image of nothing": (DOC, "figure](config.py)", "](figure.png)",
        "FILE:3 link (figure.png) must point to a file of the course"),
    "link out of the course": (DOC, "../../README.md", "../../../",
        "FILE:3 link (../../../) must point to a file of the course"),
    "command without script": (DOC, "train.py\n--resume", "tr.py --resume",
        f"FILE:5 command (uv run python {ONE}/tr.py --resume) must name what exists, unlike {ONE}/tr.py"),
    "refused command without script": (DOC, "train.py --max_steps many", "tr.py",
        f"FILE:13 command (uv run python {ONE}/tr.py) must name what exists, unlike {ONE}/tr.py"),
    "command without .py": ("README.md", "uv run pytest\n", "uv run python train\n",
        "FILE:13 command (uv run python train) must name what exists, unlike train"),
    "module that is not there": ("README.md", "-m phase1_toy.project1_one.plain --a-b 1", "-m common.tulz",
        "FILE:14 command (uv run python common/tulz.py) must name what exists, unlike common/tulz.py"),
    "module that is not installed": ("README.md", "http.server", "htpp.server",
        "FILE:15 command (uv run python -m htpp.server) must name what exists, unlike htpp.server"),
    "tests that are not there": ("README.md", "phase1_toy/project1_one -q --maxfail 1", "x/y.py::test_a",
        "FILE:12 command (uv run pytest x/y.py::test_a) must name what exists, unlike x/y.py"),
    "flag that pytest lacks": ("README.md", "-q --maxfail 1", "-q --max_failures 1",
        "FILE:12 command (uv run pytest phase1_toy/project1_one -q --max_failures 1) "
        "must have flags of pytest, unlike --max_failures"),
    "wrong command in a message": (IDEA_PY, "return model.attend(4)", "print(f'{1}: uv run python b.py.')",
        "FILE:23 command (uv run python b.py) must name what exists, unlike b.py"),
    "wrong command in the Makefile": ("Makefile", "", "train:\n\tuv run python train.py $(ARGS)\n",
        "FILE:2 command (uv run python train.py) must name what exists, unlike train.py"),
}
README_9 = f"FILE:9 command (uv run python {TRAIN_PY}"
ACCEPTS = "must be one that its script accepts:"
REFUSALS = {  # the same, but what a complaint begins with
    "unknown flag": ("README.md", "--max-steps 5 ", "--max-step 5 ",
        f"{README_9} --max-step 5 --no-resume --attention=explicit) {ACCEPTS} error: flag --max_step is"),
    "wrong type": ("README.md", "--max-steps 5 ", "--max-steps x ",
        f"{README_9} --max-steps x --no-resume --attention=explicit) {ACCEPTS} error: "),
    "wrong choice": ("README.md", "=explicit", "=flash",
        f"{README_9} --max-steps 5 --no-resume --attention=flash) {ACCEPTS} error: "),
    "word too many": ("README.md", "2>&1 |", "now |",
        f"{README_9} --max-steps 5 --no-resume --attention=explicit now) {ACCEPTS} error: "),
    "unknown flag behind torchrun": ("README.md", "train.py --max_steps 5", "train.py --steps 5",
        f"FILE:11 command (uv run --no-sync torchrun --nproc_per_node 2 {TRAIN_PY} --steps 5) {ACCEPTS}"),
    "unknown preset": (DOC, "--config quick", "--config slow",
        f"FILE:10 command (uv run python {TRAIN_PY} --config slow) {ACCEPTS} error: config (slow) must be"),
    "wrong value in a preset": (f"{ONE}/configs/quick.yaml", "1", "few",
        f"{DOC}:10 command (uv run python {TRAIN_PY} --config quick) {ACCEPTS} error: "),
    "unknown flag of another parser": (DOC, "--a-b 3", "--a-c 3",
        f"FILE:7 command (uv run python {PLAIN_PY} --a-c 3) must have flags of its script, unlike --a-c"),
    "unknown flag in a docstring": (TRAIN_PY, "--max_steps 5 and so on", "--steps 5",
        f"FILE:1 command (uv run python {TRAIN_PY} --steps 5) must have flags of its script, unlike --steps"),
    "idea file typed as a script": (DOC, "plain.py --a-b 3", "model.py",
        f"{MODEL_PY}:1 --help (status 0) must print the flags and exit with 0"),
    "import that fails": (PLAIN_PY, "import sys", "import sis",
        "FILE:1 --help (ModuleNotFoundError: No module named 'sis') must print the flags and exit with 0"),
    "script with a status": (PLAIN_PY, "    main()", "    sys.exit(3)",
        "FILE:1 --help (status 3) must print the flags and exit with 0"),
    "script that dies": (PLAIN_PY, "    main()", "    __import__('os')._exit(4)",
        "FILE:1 --help (the process died with status 4) must print the flags and exit with 0"),
    "script that starts slowly": (PLAIN_PY, "    main()",
        "    main()\n    while __import__('time').process_time() < 0.4:\n        pass",
        "FILE:1 --help (0.4 s) must start in"),
}
# fmt: on


@pytest.mark.parametrize(("name", "old", "new", "expected"), BREAKS.values(), ids=BREAKS)
def test_what_breaks_a_rule_gives_its_complaint_and_no_other(course, name, old, new, expected):
    change(course, name, old, new)
    complaints = [complaint for rule in QUICK_RULES for complaint in rule(course)]
    assert complaints == expected.replace("FILE", name).split("\n")


@pytest.mark.parametrize(("name", "old", "new", "expected"), REFUSALS.values(), ids=REFUSALS)
def test_a_script_that_refuses_gives_its_complaint_and_no_other(
    course, monkeypatch, name, old, new, expected
):
    monkeypatch.setattr(course_docs, "SECONDS_TO_START", 0.3)
    change(course, name, old, new)
    complaints = list(course_docs.scripts_take_their_commands(course))
    assert len(complaints) == 1, "\n".join(complaints)
    assert complaints[0].startswith(expected.replace("FILE", name))


def test_a_script_that_hangs_is_stopped(course, monkeypatch):
    monkeypatch.setattr(course_docs, "SECONDS_TO_END", 1.0)
    change(course, PLAIN_PY, "    main()", "    __import__('time').sleep(600)")
    assert [str(each) for each in course_docs.rehearsals(course, PLAIN_PY, [["--help"]])] == [
        "no answer in 1 s"
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("X=1 uv run python a.py --x 'b c' --y=\"#\" # why", [["python", "a.py", "--x", "b c", "--y=#"]]),
        ("uv run a.py 3 2>&1 > log; uv run b.py && uv run c.py|head", [["a.py", "3"], ["b.py"], ["c.py"]]),
        ("uv run a.py \\\n  --x 1\n  uv run b.py", [["a.py", "--x", "1"], ["b.py"]]),
        (
            "Don't: `uv run a.py\n--x 1`, (or uv run b.py), 'uv run c.py'.",
            [["a.py", "--x", "1"], ["b.py"], ["c.py"]],
        ),
        ("uv run python ..., uv run python phaseN_name/projectM_name/a.py, uv run python $(DIR)/a.py", []),
        ("uv run mypy a.py && uv run ruff check common", [["mypy", "a.py"], ["ruff", "check", "common"]]),
        ("\tuv run a.py --x 1 $(ARGS)", [["a.py", "--x", "1"]]),
    ],
)
def test_commands_are_read_as_a_shell_reads_them(text, words):
    assert [command.words for command in course_docs.commands_in(text, "README.md")] == words


if __name__ == "__main__":
    run_validation(__file__)
