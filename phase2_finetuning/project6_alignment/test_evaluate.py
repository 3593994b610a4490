"""Checks of the tables and the pictures of what was trained."""

from pathlib import Path

import pytest
import torch

from common.script import run_validation
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES, LONGER
from phase2_finetuning.project6_alignment import evaluate, visualize
from phase2_finetuning.project6_alignment.config import EvaluateConfig, PolicyLossConfig, VisualizeConfig
from phase2_finetuning.project6_alignment.test_rounds import grpo_config, ppo_config
from phase2_finetuning.project6_alignment.train_grpo import run as run_grpo
from phase2_finetuning.project6_alignment.train_ppo import run as run_ppo
from phase2_finetuning.project6_alignment.visualize import BOUNDS, slope


@pytest.fixture(scope="module")
def folder(policy_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs as the scripts leave them, one of them of a model that learned to say nothing."""
    folder = tmp_path_factory.mktemp("runs")
    short = {"max_steps": 2, "eval_interval": 1, "test_tasks": 2}
    for name in ("grpo", "grpo_kl", "exploit"):
        run_grpo(grpo_config(policy_file, folder / name, **short))
    run_ppo(ppo_config(policy_file, folder / "ppo", **short))
    return folder


def test_a_model_against_itself_wins_half_and_all_numbers_are_equal(policy_file: Path, folder: Path, capsys):
    numbers = evaluate.run(
        EvaluateConfig([str(policy_file)], str(policy_file), test_tasks=17, max_new_tokens=8, device="cpu")
    )
    assert list(numbers) == ["reference"]
    assert numbers["reference"]["win_rate"] == 0.5
    printed = capsys.readouterr().out
    assert all(f"\n{family} " in printed for family in [*FAMILIES, *LONGER])


def test_all_policies_of_the_project_are_found_and_measured(
    policy_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(evaluate, "FOLDER", folder)
    numbers = evaluate.run(
        EvaluateConfig([], str(policy_file), ["add"], test_tasks=4, max_new_tokens=8, device="cpu")
    )
    assert list(numbers) == ["reference", "exploit", "grpo", "grpo_kl", "ppo"]
    assert set(numbers["ppo"]) == {
        "right", "error", "win_rate", "tokens", "exact", "contains", "format", "brevity",
    }  # fmt: skip
    assert all(row["right"] == row["exact"] for row in numbers.values())
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["model", *numbers["ppo"]]
    assert len({len(line) for line in printed[:6]}) == 1  # columns stand below each other


def test_without_models_the_error_names_the_command(policy_file: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(evaluate, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"make one with: uv run python .*train_grpo\.py"):
        evaluate.run(EvaluateConfig(reference=str(policy_file)))


def test_there_is_a_picture_for_each_question(folder: Path, tmp_path: Path):
    drawn = visualize.run(VisualizeConfig(folder, tmp_path))
    assert [path.name for path in drawn] == ["bounds.png", "kl.png", "exploit.png", "algorithms.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_without_runs_only_the_losses_are_drawn(tmp_path: Path, capsys):
    assert len(visualize.run(VisualizeConfig(tmp_path, tmp_path / "out"))) == 1
    assert "make one with: uv run python" in capsys.readouterr().out


def test_beyond_its_bound_a_loss_pushes_as_its_paper_says():
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.25, 1.5])

    def pushes(name: str, advantage: float) -> list[float]:
        return [round(push, 4) for push in slope(ratio, advantage, BOUNDS[name]).tolist()]

    assert pushes("PPO, GRPO", 1.0) == [0.5, 0.9, 1.0, 1.1, 0.0, 0.0]
    assert pushes("PPO, GRPO", -1.0) == [0.0, -0.9, -1.0, -1.1, -1.25, -1.5]
    assert pushes("DAPO: higher upper bound", 1.0) == [0.5, 0.9, 1.0, 1.1, 1.25, 0.0]
    assert pushes("CISPO: bounded weight", 1.0) == [0.5, 0.9, 1.0, 1.1, 1.25, 1.28]
    assert pushes("no bound", 1.0) == [0.5, 0.9, 1.0, 1.1, 1.25, 1.5]


def test_column_skips_what_was_not_measured():
    rows = [{"round": "0", "x": ""}, {"round": "2", "x": "0.5"}]
    assert visualize.column(rows, "x") == ([2.0], [0.5])
    assert visualize.column(rows, "y") == ([], [])


def test_the_bounds_are_those_of_the_presets():
    from phase2_finetuning.project6_alignment.config import GRPOConfig

    for name, preset in (("DAPO: higher upper bound", "dapo"), ("CISPO: bounded weight", "cispo")):
        given: PolicyLossConfig = GRPOConfig.from_cli(["--config", preset]).policy
        drawn = BOUNDS[name]
        assert (given.clip, given.clip_low, given.clip_high) == (drawn.clip, drawn.clip_low, drawn.clip_high)


if __name__ == "__main__":
    run_validation(__file__)
