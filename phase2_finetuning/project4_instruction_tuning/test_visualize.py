"""Checks of the pictures: each is drawn, and says what it shows."""

from pathlib import Path

import pytest

from common.script import run_validation
from phase1_foundation.project3_pretrain.loss import NO_LOSS
from phase2_finetuning.project4_instruction_tuning.config import DataConfig, VisualizeConfig
from phase2_finetuning.project4_instruction_tuning.visualize import run, spell

SCORES = (
    "family,answers,right_before,right_after,loss_before,loss_after\nadd,4,0,3,5.0,0.5\nall,4,0,3,5.0,0.5\n"
)
LOSSES = "step,seconds,train_loss,val_loss\n1,1,5.0,\n2,2,4.0,4.5\n"


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """The folder of a run."""
    (tmp_path / "scores.csv").write_text(SCORES, encoding="utf-8")
    (tmp_path / "losses.csv").write_text(LOSSES, encoding="utf-8")
    return tmp_path


def test_all_pictures_are_drawn(checkpoint: Path, a_run: Path, capsys: pytest.CaptureFixture):
    data = DataConfig(families=["count"], train_tasks=40, test_tasks=2, block_size=120, batch_size=4)
    paths = run(VisualizeConfig(runs=[a_run], data=data, model=str(checkpoint), out=a_run / "out"))
    assert [path.name for path in paths] == ["rows.png", "losses.png", "scores.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert "4 rows of 120 tokens" in capsys.readouterr().out


def test_a_row_is_spelled_out(tokenizer):
    ids = tokenizer.encode("The fox")
    lines = spell(tokenizer, ids, [NO_LOSS] * (len(ids) - 1) + [tokenizer.special_tokens["<|im_end|>"]])
    assert lines.splitlines()[-1].endswith("'<|im_end|>'")
    assert len(lines.splitlines()) == len(ids) + 1


def test_runs_without_numbers_name_the_command(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no .*scores\.csv; make it with: uv run python .*train\.py"):
        run(VisualizeConfig(pictures=["scores"], runs=[tmp_path / "none"], out=tmp_path))
    (tmp_path / "scores.csv").write_text(SCORES.splitlines()[0] + "\nconversations,3,0,0,2.0,1.0\n")
    with pytest.raises(ValueError, match=r"runs \(.*\) must have learned tasks to have scores of families"):
        run(VisualizeConfig(pictures=["scores"], runs=[tmp_path], out=tmp_path))


if __name__ == "__main__":
    run_validation(__file__)
