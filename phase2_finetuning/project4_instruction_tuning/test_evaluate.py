"""Checks of scoring and of evaluate.py. --interactive answers what you ask, with train.py's model."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.checkpoints import save_checkpoint
from common.script import ask, run_validation
from phase1_foundation.project1_minimal_gpt.config import OptimizerConfig
from phase1_foundation.project1_minimal_gpt.optimizer import make_optimizers
from phase1_foundation.project1_minimal_gpt.train import train_step
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.generate import generate
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning import evaluate
from phase2_finetuning.project4_instruction_tuning.config import MODEL, EvaluateConfig
from phase2_finetuning.project4_instruction_tuning.conversations import Conversation, Message
from phase2_finetuning.project4_instruction_tuning.scoring import (
    ALL,
    Score,
    answer_pairs,
    score_dialogues,
    score_tasks,
    write_answers,
)
from phase2_finetuning.project4_instruction_tuning.tasks import Task
from phase2_finetuning.project4_instruction_tuning.templates import PLAIN, template_for

LEARNED = [
    Task("sum", "What is 1 + 1?", "2"),
    Task("spell", "Spell sun.", "s u n"),
    Task("sum", "And 2 + 2?", "4"),
]
OTHER = [Task("sum", "What is 5 + 9?", "14"), Task("spell", "Spell the word moon.", "m o o n")]


def dialogue(task: Task) -> Conversation:
    return [Message("user", task.prompt), Message("assistant", task.answer)]


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    text = "".join(task.prompt + task.answer for task in LEARNED + OTHER) * 3
    return BPETokenizer.train(text, 280, special_tokens=["<|endoftext|>", *PLAIN.specials])


@pytest.fixture(scope="module")
def model(tokenizer: BPETokenizer) -> Decoder:
    """A model that knows the answers to LEARNED by heart."""
    torch.manual_seed(0)
    shape = {"block_size": 48, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, **shape))
    (optimizer,) = make_optimizers(model, OptimizerConfig(optimizer="adamw", lr=1e-2))
    rows = [PLAIN.encode(tokenizer, dialogue(task))[0] for task in LEARNED]
    longest = max(map(len, rows))
    x = torch.tensor([(row * longest)[:longest] for row in rows])
    for _ in range(60):
        train_step(model, [optimizer], x[:, :-1], x[:, 1:])
    return model.eval()


@pytest.fixture
def checkpoint(model: Decoder, tokenizer: BPETokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path / "tokenizer.json")
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    weights = {"config": asdict(model.config), "model_state_dict": model.state_dict(), "tokenizer": text}
    save_checkpoint(tmp_path / "model.pt", **weights)
    return tmp_path / "model.pt"


def log_odds(model: Decoder, ids: list[int]) -> Tensor:
    """The log-probability of each token after the first, all logits at once: (T - 1,)."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, :-1].double()
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_what_was_learned_is_right_and_likely_and_what_was_not_is_neither(model, tokenizer):
    scores, answers = score_tasks(model, tokenizer, PLAIN, LEARNED + OTHER, max_new_tokens=12)
    assert answers[:3] == ["2", "s u n", "4"]
    assert (scores["sum"].right, scores["sum"].answers) == (2, 3)
    assert (scores["spell"].right, scores["spell"].answers) == (1, 2)
    assert scores[ALL] == scores["sum"] + scores["spell"]
    assert scores[ALL].accuracy == 3 / 5
    (known, unknown) = (score_tasks(model, tokenizer, PLAIN, tasks, 12)[0][ALL] for tasks in (LEARNED, OTHER))
    assert known.loss < 0.1
    assert unknown.loss > 1
    assert (known.accuracy, unknown.accuracy) == (1.0, 0.0)


def test_the_likelihood_is_that_of_the_masked_tokens(model, tokenizer):
    chats = [dialogue(task) for task in LEARNED + OTHER]
    chats.append([*dialogue(LEARNED[0]), *dialogue(OTHER[0])])  # two answers in one
    for chat, score in zip(chats, score_dialogues(model, tokenizer, PLAIN, chats), strict=True):
        ids, mask = PLAIN.encode(tokenizer, chat)
        expected = -log_odds(model, ids)[torch.tensor(mask[1:])].sum().item()
        assert score.nats == pytest.approx(expected, rel=1e-4)
        assert score.tokens == sum(mask)
        assert score.answers == sum(message.role == "assistant" for message in chat)
        assert score.bits_per_byte == pytest.approx(
            expected / math.log(2) / sum(len(m.content.encode()) for m in chat if m.role == "assistant"),
            rel=1e-4,
        )


def test_answers_written_together_are_those_written_alone(model, tokenizer):
    prompts = [PLAIN.encode(tokenizer, dialogue(task)[:1], answer=True)[0] for task in (LEARNED + OTHER) * 2]
    assert len({len(prompt) for prompt in prompts}) > 2
    stop = PLAIN.stop(tokenizer)
    alone = [list(generate(model, prompt, 12, temperature=0, stop=stop)) for prompt in prompts]
    assert write_answers(model, prompts, 12, stop) == alone
    assert any(len(answer) == 12 for answer in write_answers(model, prompts, 12))  # no stop, no end


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_is_skipped(model, tokenizer):
    prompt = PLAIN.encode(tokenizer, [Message("user", "What is " * 40)], answer=True)[0]
    assert len(prompt) > model.config.block_size
    assert write_answers(model, [prompt], 8) == write_answers(model, [prompt[-40:]], 8)
    long = [
        Message("user", "Hi."),
        Message("assistant", "word " * 60),
        Message("user", "?"),
        Message("assistant", "2"),
    ]
    (score,) = score_dialogues(model, tokenizer, PLAIN, [long])
    assert (score.answers, score.skipped, score.tokens) == (1, 1, 2)


def test_errors_name_what_is_wrong(model, tokenizer):
    with pytest.raises(ValueError, match=r"max_new_tokens \(48\) must be below 48, the context"):
        write_answers(model, [[1]], 48)
    with pytest.raises(ValueError, match=r"prompt \(0 tokens\) must have at least 1"):
        write_answers(model, [[]], 4)


def test_pairs_of_a_conversation_are_each_answer_with_all_before_it(tokenizer):
    chat = [*dialogue(LEARNED[0]), *dialogue(LEARNED[1])]
    ids, _ = PLAIN.encode(tokenizer, chat)
    pairs = answer_pairs(PLAIN, tokenizer, chat)
    assert [tokenizer.decode(answer) for _, answer in pairs] == ["2<|end|>", "s u n<|end|>"]
    assert all(context + answer == ids[: len(context) + len(answer)] for context, answer in pairs)


def test_a_task_whose_answer_does_not_fit_counts_as_wrong(model, tokenizer):
    long = Task("sum", "Count.", "one " * 60)
    scores, _ = score_tasks(model, tokenizer, PLAIN, [LEARNED[0], long], 12)
    assert (scores["sum"].answers, scores["sum"].right, scores["sum"].skipped) == (2, 1, 1)


def test_a_score_of_nothing_is_zero():
    assert (Score().accuracy, Score().loss, Score().bits_per_byte) == (0, 0, 0)


# The script


def test_models_stand_side_by_side_and_the_table_is_what_is_returned(
    checkpoint: Path, tmp_path: Path, capsys
):
    file = tmp_path / "chats.json"
    records = [[message._asdict() for message in dialogue(task)] for task in LEARNED]
    file.write_text(json.dumps(records), encoding="utf-8")
    config = EvaluateConfig(
        models=[str(checkpoint)] * 2,
        data=["tasks", str(file)],
        families=["add", "upper"],
        test_tasks=4,
        max_new_tokens=8,
        samples=2,
        device="cpu",
    )
    first, second = evaluate.run(config)
    assert first == second
    assert list(first) == ["add", "upper", ALL, str(file)]
    assert first[str(file)].loss < 0.1
    printed = capsys.readouterr().out
    assert printed.count(f"{checkpoint}: ") == 2
    assert printed.count(" wrong: ") == 4
    assert f"{first['add'].loss:8.3f} {second['add'].loss:8.3f}" in printed
    assert f"model 2  {first[str(file)].loss:.3f} nats per token, " in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--models nowhere.pt", "model (nowhere.pt) must be"),
        ("--models MODEL --families divide", "family (divide) must be"),
        ("--models MODEL --template chatml", "special tokens (<|endoftext|>, <|system|>"),
        ("--models MODEL --data nowhere.json", "data (nowhere.json) must be a file"),
        ("--models MODEL --max_new_tokens 48", "max_new_tokens (48) must be below 48"),
        ("--models MODEL --test_tasks 99999 --families multiply", "number (99999) must be smaller"),
    ],
)
def test_a_bad_input_gets_one_line_and_status_2(
    flags: str, message: str, checkpoint: Path, refusal: Callable
):
    words = [str(checkpoint) if word == "MODEL" else word for word in flags.split()]
    with torch.inference_mode(False):
        assert message in refusal(evaluate.main, "--device", "cpu", *words).err


def interact() -> None:
    model, tokenizer = load_model(MODEL)
    template = template_for(tokenizer)
    for line in ask("you> "):
        ids, _ = template.encode(tokenizer, [Message("user", line)], answer=True)
        (answer,) = write_answers(model, [ids], 48, template.stop(tokenizer))
        print(tokenizer.decode(answer))


if __name__ == "__main__":
    run_validation(__file__, interact)
