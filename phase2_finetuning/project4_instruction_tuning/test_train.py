"""Checks of train.py: from data to a model that answers, resumed runs, ablations, and what it refuses."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoints import load_checkpoint
from common.script import run_validation
from phase1_foundation.project3_pretrain.config import MODEL as BASE_MODEL
from phase1_foundation.project3_pretrain.trainer import checkpoints
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning.config import Config, DataConfig, TuneConfig
from phase2_finetuning.project4_instruction_tuning.conversations import Message
from phase2_finetuning.project4_instruction_tuning.scoring import ALL
from phase2_finetuning.project4_instruction_tuning.sft import Count
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES
from phase2_finetuning.project4_instruction_tuning.templates import CHATML, PLAIN, TEXT, template_for
from phase2_finetuning.project4_instruction_tuning.train import (
    FILES,
    answer,
    as_conversations,
    base_template,
    choose_template,
    load_data,
    make_tasks,
    opening,
    operations_per_answer_token,
    run,
)


def small(checkpoint: Path, out: Path, train: dict[str, Any] | None = None, **data: Any) -> Config:
    """Return settings that tune the tests' model in a second or two."""
    how = {"families": ["count"], "train_tasks": 60, "test_tasks": 6, "turns": 1, "batch_size": 4}
    settings: dict[str, Any] = {"max_steps": 6, "eval_interval": 3, "device": "cpu", "precision": "fp32"}
    return Config(
        str(checkpoint),
        DataConfig(**how | data),
        TuneConfig(out=out, **settings | (train or {})),
    )


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    """A file of conversations, in Alpaca's form."""
    colors = {"sky": "blue", "grass": "green", "fox": "red", "snow": "white"}
    records = [
        {"instruction": f"color of {thing}?", "output": f"{color} {n}"}
        for n in range(10)
        for thing, color in colors.items()
    ]
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_a_model_learns_what_it_is_told(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "talk.json"
    talk = [{"instruction": "sky?", "output": "blue"}, {"instruction": "fox?", "output": "red"}] * 30
    path.write_text(json.dumps(talk), encoding="utf-8")
    train = {"max_steps": 60, "eval_interval": 30, "lr": 1e-2, "optimizer": "adamw", "warmup_steps": 5}
    config = small(checkpoint, tmp_path / "out", train, data=[str(path)], validation_share=0.1)
    result = run(config)
    assert result.losses[0] > 3
    assert result.after[FILES].loss < 0.1 < result.before[FILES].loss
    model, tokenizer = load_model(tmp_path / "out" / "model.pt")
    assert template_for(tokenizer) is CHATML  # the tests' tokenizer has its marks
    said = answer(model, tokenizer, CHATML, [[Message("user", "fox?"), Message("assistant", "")]])
    assert said == ["red"]
    shown = capsys.readouterr().out
    for text in ("60 conversations", "of them learned", "before", "after", "reference  'blue'"):
        assert text in shown or text.replace("60", "54") in shown


def test_tasks_are_scored_before_and_after_by_family(checkpoint: Path, tmp_path: Path):
    result = run(small(checkpoint, tmp_path, families=["count", "add"], test_tasks=8))
    assert set(result.before) == set(result.after) == {"count", "add", ALL}
    assert result.after[ALL].answers == 8
    assert result.after[ALL].loss < result.before[ALL].loss
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = {row["family"]: row for row in csv.DictReader(file)}
    assert float(rows["count"]["loss_after"]) == pytest.approx(result.after["count"].loss)


def test_new_marks_are_learned_and_saved(checkpoint: Path, tmp_path: Path):
    run(small(checkpoint, tmp_path, template="plain"))
    model, tokenizer = load_model(tmp_path / "model.pt")
    assert tokenizer.special_tokens.keys() >= set(PLAIN.specials)
    assert model.config.vocab_size == tokenizer.vocab_size
    new = [model.head.weight[tokenizer.special_tokens[name]] for name in ("<|assistant|>", "<|end|>")]
    assert not torch.equal(*new)  # they began equal
    assert (tmp_path / "tokenizer.json").is_file()


def test_a_run_in_two_parts_is_the_run_in_one(checkpoint: Path, tmp_path: Path):
    train = {"schedule": "wsd", "decay_fraction": 0.0, "neftune_alpha": 5.0}
    whole = run(small(checkpoint, tmp_path / "whole", train))
    first = run(small(checkpoint, tmp_path / "parts", train | {"max_steps": 3}))
    second = run(small(checkpoint, tmp_path / "parts", train | {"resume": True}))
    assert first.losses + second.losses == whole.losses
    one, other = (load_checkpoint(tmp_path / name / "model.pt", "-") for name in ("whole", "parts"))
    for name, weight in one["model_state_dict"].items():
        assert torch.equal(weight, other["model_state_dict"][name])
    with pytest.raises(ValueError, match=r"sha256_of_examples|train_tasks \(50\) must be 60 to resume"):
        run(small(checkpoint, tmp_path / "parts", train | {"resume": True}, train_tasks=50))


def test_noise_is_there_from_the_first_step(checkpoint: Path, tmp_path: Path):
    # A model comes from its file ready to write (eval), and NEFTune and dropout would wait for an evaluation.
    plain, noisy = (
        run(small(checkpoint, tmp_path / str(alpha), {"neftune_alpha": alpha, "max_steps": 1})).losses[0]
        for alpha in (0.0, 50.0)
    )
    assert plain != noisy


def test_a_run_whose_data_changed_is_not_resumed(checkpoint: Path, facts: Path, tmp_path: Path):
    run(small(checkpoint, tmp_path / "out", {"max_steps": 2}, data=[str(facts)]))
    facts.write_text(facts.read_text(encoding="utf-8").replace("blue", "grey"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"sha256_of_examples \(\w+\) must be \w+ to resume"):
        run(small(checkpoint, tmp_path / "out", {"resume": True}, data=[str(facts)]))


def test_a_run_ends_early_where_the_validation_loss_only_rises(checkpoint: Path, facts: Path, tmp_path: Path):
    train = {"max_steps": 60, "eval_interval": 2, "patience": 2, "lr": 1.0, "optimizer": "adamw"}
    train |= {"spike_sigmas": 0.0, "warmup_steps": 0}
    result = run(small(checkpoint, tmp_path / "out", train, data=[str(facts)], validation_share=0.2))
    assert len(result.losses) < 60
    assert len(checkpoints(tmp_path / "out")) == 2


@pytest.mark.parametrize("change", [{"learn": "everything"}, {"packing": False}, {"turns": 3}])
def test_the_ablations_run(checkpoint: Path, tmp_path: Path, change: dict[str, Any]):
    result = run(small(checkpoint, tmp_path, **change))
    assert len(result.losses) == 6
    assert all(loss == loss for loss in result.losses)


def test_what_is_learned_from_never_judges(facts: Path):
    data = load_data(DataConfig(data=["tasks", str(facts)], train_tasks=1300, test_tasks=130), seed=0)

    def questions(conversations):
        return {
            m.content for talk in conversations for m in talk if m.role == "user" and "color" not in m.content
        }

    learned, held_out = questions(data.train), questions(data.validation)
    asked = {task.prompt for task in data.tasks}
    assert not learned & held_out
    assert not learned & asked
    assert not held_out & asked
    assert (len(held_out), len(asked)) == (130, 130)
    assert len(data.files) == 2
    assert not [talk for talk in data.files if talk in data.train]
    assert data.validation[-2:] == data.files


def test_tasks_become_conversations_of_several_turns():
    tasks = make_tasks(list(FAMILIES), 100, 0)
    talks = as_conversations(tasks, 3, seed=0)
    assert {len(talk) for talk in talks} == {2, 4, 6}
    told = [(talk[i].content, talk[i + 1].content) for talk in talks for i in range(0, len(talk), 2)]
    assert told == [(task.prompt, task.answer) for task in tasks]
    assert all(
        message.role == ("user", "assistant")[i % 2] for talk in talks for i, message in enumerate(talk)
    )
    assert as_conversations(tasks, 3, seed=0) == talks


def test_operations_are_those_of_rows_as_long_as_ours(checkpoint: Path, tokenizer):
    model, _ = load_model(checkpoint)
    size = sum(weight.numel() for weight in model.blocks.parameters() if weight.dim() == 2)
    attention = 2 * 4 * 40 * 32  # layers, products of two numbers, tokens, width
    head = 6 * model.head.weight.numel()
    found = operations_per_answer_token(model, 40, Count(tokens=300, learned=100))
    assert found == pytest.approx(3 * 3 * (2 * size + attention) + head)


def test_the_opening_ends_where_the_assistant_first_answers():
    greeting = [Message("assistant", "Hello!"), Message("user", "a?"), Message("assistant", "b")]
    assert opening([*greeting, Message("user", "c?")]) == (greeting[:2], "b")


def test_which_template_is_taken(tokenizer):
    assert choose_template("auto", tokenizer) is CHATML
    assert choose_template("plain", tokenizer) is PLAIN
    assert base_template(CHATML, tokenizer) is CHATML
    assert base_template(PLAIN, tokenizer) is TEXT  # its marks are new

    class Bare:
        special_tokens = {"<|endoftext|>": 1}  # noqa: RUF012

    assert choose_template("auto", Bare()) is PLAIN  # and not TEXT, in which a user can forge a turn


def test_missing_models_and_data_are_told(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"project3_pretrain/train\.py"):
        run(Config(str(tmp_path / "none.pt")))
    with pytest.raises(ValueError, match=r"data \(\) must name tasks or a file"):
        DataConfig(data=[]).validate_config()
    with pytest.raises(ValueError, match=r"validation_share \(0.9\) must be between 0 and 0.5"):
        DataConfig(validation_share=0.9).validate_config()


@pytest.mark.slow
@pytest.mark.skipif(not BASE_MODEL.is_file(), reason="project 3's checkpoint is not there")
def test_the_default_run_goes_from_below_5_to_above_60_percent(tmp_path: Path):
    config = Config()
    config.train.out = tmp_path
    result = run(config)
    assert result.before[ALL].accuracy < 0.05
    assert result.after[ALL].accuracy > 0.6


@pytest.mark.gpu
def test_a_gpu_tunes_as_a_cpu_does(checkpoint: Path, tmp_path: Path):
    on_cpu = run(small(checkpoint, tmp_path / "cpu"))
    on_gpu = run(small(checkpoint, tmp_path / "gpu", {"device": "cuda"}))
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=1e-3)


if __name__ == "__main__":
    run_validation(__file__)
