"""Checks of the scripts that learn from pairs: they end, they improve, and they go on where they were."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from common.plots import read_csv
from common.script import run_validation
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning.tasks import WORDS
from phase2_finetuning.project6_alignment import pair_training, train_preference, train_reward
from phase2_finetuning.project6_alignment.config import PreferenceConfig, RewardConfig
from phase2_finetuning.project6_alignment.reward_model import load_reward_model
from phase2_finetuning.project6_alignment.train_reward import pick_best

SMALL = [
    "--families",
    "count",
    "--tasks",
    "60",
    "--max_new_tokens",
    "8",
    "--batch_size",
    "8",
    "--warmup_steps",
    "1",
    "--test_tasks",
    "20",
    "--precision",
    "fp32",
    "--validation_share",
    "0.2",
]


def settings(model: Path, out: Path, *words: str) -> list[str]:
    return ["--model", str(model), "--out", str(out), *SMALL, *words]


def preference(model: Path, out: Path, *words: str) -> PreferenceConfig:
    return PreferenceConfig.from_cli(settings(model, out, *words))


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> list[str]:
    """The flag of a file of people's pairs: they like words better than numbers."""
    lines = [
        json.dumps({"prompt": f"Say something about {word}", "chosen": word, "rejected": str(i)})
        for i, word in enumerate(WORDS)
    ]
    path = tmp_path_factory.mktemp("people") / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return ["--data", str(path)]


@pytest.fixture(scope="module")
def trained(taught_file, people, tmp_path_factory) -> tuple[Path, dict[str, dict[str, float]]]:
    """The folder and the numbers of a run of 12 steps."""
    out = tmp_path_factory.mktemp("preference")
    words = ["--max_steps", "12", "--eval_interval", "6", "--lr", "3e-3", *people]
    return out, train_preference.run(preference(taught_file, out, *words))


def test_dpo_moves_the_margin_of_pairs_that_it_has_not_seen(trained):
    out, numbers = trained
    assert numbers["before"]["margin"] == pytest.approx(0, abs=1e-5)
    assert numbers["before"]["win_rate"] == 0.5
    assert numbers["after"]["margin"] > 0.1
    assert numbers["after"]["ranked"] == 1
    rows = read_csv(out / "preference.csv")
    assert [row["step"] for row in rows] == ["0", "6", "12"]
    for name in ("preference.png", "loss.png", "pairs.json", "tokenizer.json", "model.pt"):
        assert (out / name).is_file(), name


def test_the_first_loss_is_ln_2_whatever_the_model_and_is_told_per_pair(taught_file, tmp_path, capsys):
    config = preference(taught_file, tmp_path, "--max_steps", "1", "--sft_weight", "0")
    train_preference.run(config)
    (row,) = read_csv(tmp_path / "losses.csv")
    assert float(row["train_loss"]) == pytest.approx(math.log(2), abs=1e-5)
    assert row["tokens_per_second"] == row["utilization"] == ""  # pairs were counted, not tokens
    told = capsys.readouterr().out
    assert re.search(r"validation \d\.\d{4} per pair  ", told)
    assert re.search(r"1 steps in .* s; [\d,]+ pairs/s; peak memory", told)
    assert "nats per token" not in told


def test_the_result_is_a_model_like_any_other(trained):
    out, _ = trained
    model, tokenizer = load_model(out / "model.pt")
    assert model(torch.tensor([tokenizer.encode("How many")])).isfinite().all()


def test_a_run_that_was_interrupted_goes_on_to_the_bit(trained, taught_file, people, tmp_path, monkeypatch):
    out, _ = trained
    words = ["--eval_interval", "6", "--lr", "3e-3", *people]
    first = preference(taught_file, tmp_path, "--max_steps", "12", *words)
    trainer = pair_training.Trainer

    class Stopped(trainer):  # type: ignore[misc, valid-type]
        def save(self, *given: Any) -> None:
            super().save(*given)
            if self.done == 6:
                raise KeyboardInterrupt

    monkeypatch.setattr(pair_training, "Trainer", Stopped)
    with pytest.raises(KeyboardInterrupt):
        train_preference.run(first)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="--resume goes on with it"):
        train_preference.run(first)
    train_preference.run(preference(taught_file, tmp_path, "--max_steps", "12", *words, "--resume"))
    ours, theirs = (torch.load(f / "step_00000012.pt", weights_only=True) for f in (tmp_path, out))
    for name, weight in theirs["model_state_dict"].items():
        assert torch.equal(ours["model_state_dict"][name], weight), name
    assert read_csv(tmp_path / "preference.csv")[-1] == read_csv(out / "preference.csv")[-1]


def test_going_on_from_another_model_is_refused(trained, taught_file, people, tmp_path):
    out, _ = trained
    other = torch.load(taught_file, weights_only=True)
    other["model_state_dict"]["norm.weight"] *= 1.01
    torch.save(other, tmp_path / "model.pt")
    words = ["--max_steps", "14", "--eval_interval", "6", "--lr", "3e-3", *people, "--resume"]
    with pytest.raises(ValueError, match=r"^(model|start) \(.*\) must be .* to resume"):
        train_preference.run(preference(tmp_path / "model.pt", out, *words))


@pytest.mark.parametrize("loss", ["ipo", "kto", "orpo", "simpo"])
def test_every_loss_moves_the_margin(loss, taught_file, people, tmp_path):
    words = ["--loss", loss, "--max_steps", "6", "--lr", "3e-3", *people]
    numbers = train_preference.run(preference(taught_file, tmp_path, *words))
    assert numbers["after"]["margin"] > numbers["before"]["margin"]


def test_pairs_come_from_tasks_as_well(taught_file, tmp_path):
    numbers = train_preference.run(preference(taught_file, tmp_path, "--max_steps", "2"))
    assert numbers["after"].keys() == train_preference.LABELS.keys()
    told = json.loads((tmp_path / "pairs.json").read_text())["told"]
    assert told.startswith("60 tasks, 4 answers each, ")


def test_a_reward_model_learns_to_rank_and_picks_the_best_of_several(taught_file, tmp_path, capsys):
    words = ["--max_steps", "16", "--eval_interval", "16", "--lr", "3e-3", "--best_of", "4"]
    numbers = train_reward.run(RewardConfig.from_cli(settings(taught_file, tmp_path, *words)))
    assert list(numbers["best_of"]) == [1, 2, 4]
    assert numbers["after"]["level"] == pytest.approx(0, abs=1e-4)
    rows = read_csv(tmp_path / "losses.csv")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    model, _ = load_reward_model(tmp_path / "model.pt")
    assert model.score.bias.item() != 0  # stored with its level
    assert (tmp_path / "reward.png").is_file()
    assert "right, n = 4" in capsys.readouterr().out


def test_best_of_n_counts_what_is_picked_and_what_could_have_been():
    right = torch.tensor([[True, False, False, True], [False, False, False, False]])
    scores = torch.tensor([[3.0, 9, 1, 2], [0, 0, 0, 1]])
    picks = pick_best(scores, right)
    assert picks[1] == (2 / 8, 2 / 8)
    assert picks[2] == (1 / 4, 2 / 4)  # of (3, 9) the wrong one, of (1, 2) the right one
    assert picks[4] == (0, 1 / 2)


if __name__ == "__main__":
    run_validation(__file__)
