"""Checks of what an answer is worth. --interactive marks what you type."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from common.checkpoints import save_checkpoint
from common.script import ask, run_validation
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES, LONGER, Task, make_tasks
from phase2_finetuning.project6_alignment.reward_model import RewardModel
from phase2_finetuning.project6_alignment.rewards import (
    RULES,
    Grader,
    Written,
    brevity,
    contains,
    exact,
    has_format,
    outline,
    split_weight,
)
from phase2_finetuning.project6_alignment.rollouts import Rollout

SUM = Task("add", "What is 3 + 4?", "7")
UNITS = Task("convert", "Convert 3000 m to km.", "3 km")


def rollout_of(tokenizer: BPETokenizer, answers: list[str], prompt: str = "What?") -> Rollout:
    """Return answers as a policy would have written them, each with its mark at the end."""
    first, end = tokenizer.encode(prompt), tokenizer.special_tokens["<|end|>"]
    rows = [[*first, *tokenizer.encode(answer), end] for answer in answers]
    T = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows])
    place, ends = torch.arange(T), torch.tensor([len(row) for row in rows])
    mask = (place >= len(first)) & (place < ends[:, None])
    return Rollout(tokens, mask, torch.zeros(mask.shape), torch.ones(len(rows), dtype=torch.bool))


@pytest.mark.parametrize(
    ("text", "ended", "marks"),
    [
        ("7", True, (1, 1, 1)),
        (" 7\n", True, (1, 1, 1)),
        ("7", False, (0, 1, 0)),  # cut off: who knows what would have come
        ("8", True, (0, 0, 1)),
        ("1 2 3 4 5 6 7 8 9", True, (0, 1, 0)),
        ("seven", True, (0, 0, 0)),
        ("", True, (0, 0, 0)),
    ],
)
def test_rules_mark_a_sum(text: str, ended: bool, marks: tuple[int, int, int]):
    written = Written(text, 0.5, ended)
    assert (exact(SUM, written), contains(SUM, written), has_format(SUM, written)) == marks


def test_brevity_falls_from_one_to_zero():
    assert [brevity(SUM, Written("x", share, True)) for share in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]


@pytest.mark.parametrize(
    ("text", "outlined"),
    [
        ("7 km", "0 a"),
        ("123", "0"),
        ("Ab3-", "Aa0-"),
        ("- sun\n- moon", "- a\n- a"),
        ('{"a": 12}', '{"a": 0}'),
    ],
)
def test_an_outline_forgets_which_digits_and_letters(text: str, outlined: str):
    assert outline(text) == outlined


@pytest.mark.parametrize("family", [*FAMILIES, *LONGER])
def test_the_right_answer_gets_all_there_is_to_get(family: str):
    for task in make_tasks([family], 20, 3):
        written = Written(task.answer, 0.0, True)
        assert [rule(task, written) for rule in RULES.values()] == [1, 1, 1, 1]


def test_the_exploitable_checker_is_exploited_by_a_list_of_all_numbers():
    everything = Written(" ".join(map(str, range(200))), 1.0, True)
    tasks = make_tasks(["add", "subtract", "count"], 60, 0)
    assert all(contains(task, everything) for task in tasks)
    assert not any(exact(task, everything) for task in tasks)


@pytest.mark.parametrize(
    ("entry", "pair"),
    [
        ("exact", ("exact", 1.0)),
        ("exact:0.5", ("exact", 0.5)),
        ("format:-1", ("format", -1.0)),
        ("C:/models/model.pt", ("C:/models/model.pt", 1.0)),
        ("runs/model.pt:2", ("runs/model.pt", 2.0)),
    ],
)
def test_a_reward_may_have_a_weight(entry: str, pair: tuple[str, float]):
    assert split_weight(entry) == pair


def test_rewards_are_added_up_with_their_weights(tokenizer: BPETokenizer):
    grader = Grader(["exact", "format:0.25", "brevity:0.5"], tokenizer, longest=8)
    rollout = rollout_of(tokenizer, ["7", "9", "so: 7"])
    written = grader.answers(rollout)
    assert [each.text for each in written] == ["7", "9", "so: 7"]
    shares = rollout.mask.sum(dim=1) / 8
    assert [each.share for each in written] == shares.tolist()
    marks = grader.mark([SUM] * 3, rollout, written)
    torch.testing.assert_close(marks, torch.tensor([1.25, 0.25, 0.0]) + 0.5 * (1 - shares))


@pytest.fixture
def reward_model(tokenizer: BPETokenizer, tmp_path: Path) -> tuple[Path, RewardModel]:
    """A reward model's file, and the model."""
    torch.manual_seed(1)
    model = RewardModel(
        Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=1, n_head=2, n_embd=16))
    )
    tokenizer.save(tmp_path / "tokenizer.json")
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    entries = {"config": asdict(model.config), "model_state_dict": model.state_dict(), "tokenizer": text}
    save_checkpoint(tmp_path / "model.pt", **entries)
    return tmp_path / "model.pt", model.eval()


def test_a_reward_models_marks_are_added_to_those_of_the_rules(tokenizer: BPETokenizer, reward_model):
    path, model = reward_model
    rollout = rollout_of(tokenizer, ["7", "9 or so", "17"])
    grader = Grader(["exact", f"{path}:0.5"], tokenizer, longest=8)
    marks = grader.mark([SUM] * 3, rollout, grader.answers(rollout))
    with torch.no_grad():
        expected = torch.tensor([1.0, 0.0, 0.0]) + 0.5 * model(rollout.tokens, rollout.mask)
    torch.testing.assert_close(marks, expected)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        ("exat", ValueError, r"reward \(exat\) must be a reward model's file or one of exact, contains"),
        (
            "nowhere/model.pt",
            FileNotFoundError,
            r"no checkpoint nowhere/model\.pt; make it with: uv run",
        ),
    ],
)
def test_an_unknown_reward_is_refused(reward: str, error: type, message: str, tokenizer: BPETokenizer):
    with pytest.raises(error, match=message):
        Grader([reward], tokenizer, 8)


def test_a_reward_model_with_another_tokenizer_is_refused(reward_model, tokenizer: BPETokenizer):
    path, _ = reward_model
    other = BPETokenizer.train_from_iterator(["abc"], 256)
    with pytest.raises(ValueError, match=r"of 300 tokens\) must know the 256 tokens of the policy's"):
        Grader([str(path)], other, 8)


def interact() -> None:
    """Mark answers to a task by all rules."""
    (task,) = make_tasks(["convert"], 1, 0)
    print(task.prompt)
    for text in ask("answer> "):
        print({name: rule(task, Written(text, 0.5, True)) for name, rule in RULES.items()})


if __name__ == "__main__":
    run_validation(__file__, interact)
