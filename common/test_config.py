"""Checks of the settings: defaults < YAML < flags, and every mistake answered in one line."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common.config import BaseConfig
from common.files import ROOT
from common.script import run_validation


@dataclass
class ModelConfig(BaseConfig):
    """Shape."""

    n_head: int = 4  # heads
    n_embd: int = 64  # width; must be divisible by n_head

    def validate_config(self) -> None:
        """Check."""
        self.require_at_least(1, "n_head", "n_embd")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")


@dataclass
class Settings(BaseConfig):
    """Some settings."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lr: float = 1e-3  # learning rate
    name: str = "default"  # any text
    top_k: int | None = None  # none: all
    resume: bool = False  # go on
    kind: Literal["a", "b"] = "a"  # which
    files: tuple[str, ...] = ()  # several
    out: Path = Path("out")  # a folder


def parse(*argv: str) -> Settings:
    return Settings.from_cli(list(argv))


def test_defaults_then_file_then_flags_and_the_later_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("n_embd: 32\nlr: 3e-4\nresume: true\n")
    config = parse("--config", str(file), "--n_embd", "16")
    assert (config.model.n_embd, config.lr, config.resume, config.name) == (16, 3e-4, True, "default")


def test_the_order_of_config_and_flags_does_not_matter(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("n_embd: 32\n")
    assert parse("--n_embd", "16", f"--config={file}").model.n_embd == 16


def test_a_file_inherits_and_overrides(tmp_path):
    (tmp_path / "base.yaml").write_text("n_embd: 32\nlr: 0.5\n")
    (tmp_path / "child.yaml").write_text("inherits: base.yaml\nlr: 0.25\n")
    config = parse("--config", str(tmp_path / "child.yaml"))
    assert (config.model.n_embd, config.lr) == (32, 0.25)


def test_files_that_inherit_from_each_other_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("inherits: b.yaml\n")
    (tmp_path / "b.yaml").write_text("inherits: a.yaml\n")
    with pytest.raises(ValueError, match=r"inherits \(a.yaml\) must not lead back"):
        parse("--config", str(tmp_path / "a.yaml"))


def test_hyphens_equals_signs_and_no_switches_are_accepted():
    config = parse(
        "--n-embd=8", "--top-k", "3", "--resume", "--no-resume", "--files", "x", "y", "--name=--odd"
    )
    assert (config.model.n_embd, config.top_k, config.resume) == (8, 3, False)
    assert (config.files, config.name) == (("x", "y"), "--odd")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n_embed", "3"], r"flag --n_embed is unknown; did you mean n_embd\?"),
        (["--zzz"], r"flag --zzz is unknown; --help lists what there is"),
        (["--no_lr"], r"flag --no_lr is unknown"),
        (["--lr", "abc"], r"--lr.*'abc'"),
        (["--n_head", "1.5"], r"--n.head.*'1.5'"),
        (["--kind", "c"], r"'c'.*\('a', 'b'\)"),
        (["--n_embd"], r"--n.embd"),
        (["--n_embd", "10"], r"^n_embd \(10\) must be divisible by n_head \(4\)$"),
        (["--n_head", "0"], r"^n_head \(0\) must be at least 1$"),
        (["--config"], r"--config must be followed by a value"),
        (["--config", "missing.yaml"], r"config \(missing.yaml\) must be a YAML file"),
        (["stray"], r"stray"),
    ],
)
def test_a_mistake_is_one_line_that_names_value_and_rule(argv, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)
    assert "│" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n_embed: 3", r"run.yaml: setting n_embed is unknown; did you mean n_embd\?"),
        ("n_embd: [1, [2]]", r"n_embd .* must be one value or a flat list"),
        ("n_embd: {a: 1}", r"n_embd .* must be one value"),
        ("resume: perhaps", r"resume \(perhaps\) must be true or false"),
        ("- a\n- b", r"must be a list of `name: value` lines"),
        ("a: [", r"must be YAML"),
        ("lr: abc", r"'abc'"),
        ("!!python/object/apply:os.system ['true']", r"must be"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse("--config", str(file))


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    assert parse("--config", str(tmp_path / "run.yaml")) == Settings()


@given(
    st.builds(
        Settings,
        model=st.builds(ModelConfig, n_head=st.just(2), n_embd=st.integers(1, 99).map(lambda n: 2 * n)),
        lr=st.floats(allow_nan=False, allow_infinity=False),
        name=st.text(st.characters(blacklist_categories=["Cs", "Cc"])),
        top_k=st.none() | st.integers(-5, 5),
        resume=st.booleans(),
        kind=st.sampled_from(["a", "b"]),
        files=st.lists(st.sampled_from(["x", "y z", "ü.txt"])).map(tuple),
        out=st.sampled_from([Path("a/b"), Path("c d")]),
    )
)
def test_what_print_config_prints_is_read_back_as_it_was(config):
    path = ROOT / "checkpoints" / "test_config.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(config.to_yaml(), encoding="utf-8")
    try:
        assert parse("--config", str(path)) == config
    finally:
        path.unlink()


def test_print_config_prints_flat_yaml(capsys):
    Settings().print_config()
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["n_embd"] == 64
    assert printed["out"] == "out"


def test_help_shows_each_setting_with_its_comment_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert not caught.value.code
    printed = capsys.readouterr().out
    for words in ("--n_embd", "width; must be divisible by n_head", "--config FILE.yaml"):
        assert words in printed


SCRIPT = """
from common.script import script
from common.test_config import Settings
@script
def main():
    Settings.from_cli().print_config()
main()
"""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_script_ends_with_one_line_and_status_2_in_any_encoding(encoding):
    command = [sys.executable, "-c", SCRIPT, "--n_head", "1.5"]
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: Error parsing --n_head: invalid literal for int() with base 10: '1.5'\n"


TERMINAL = "import pty, sys; sys.exit(pty.spawn([sys.executable, '-c', sys.argv[1], '--lr', 'abc']) >> 8)"


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a Unix thing")
def test_a_terminal_sees_one_line_too_without_boxes_or_colours():
    command = [sys.executable, "-c", TERMINAL, SCRIPT]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stdout.strip() == b"error: Error parsing --lr: could not convert string to float: 'abc'"


if __name__ == "__main__":
    run_validation(__file__)
