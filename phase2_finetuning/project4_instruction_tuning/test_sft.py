"""Checks of fine-tuning: what is learned, packing, counts, and bugs that others shipped.

--interactive shows which tokens of what you type would be learned.
"""

from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.script import ask, run_validation
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project3_pretrain.accumulation import split_rows
from phase1_foundation.project3_pretrain.config import DecoderConfig, TrainConfig
from phase1_foundation.project3_pretrain.loss import NO_LOSS, Batch, language_model_loss
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.trainer import Trainer
from phase2_finetuning.project4_instruction_tuning.conftest import answers_of
from phase2_finetuning.project4_instruction_tuning.conversations import Message
from phase2_finetuning.project4_instruction_tuning.sft import (
    ConversationBatches,
    Example,
    answer_loss,
    describe,
    make_examples,
)
from phase2_finetuning.project4_instruction_tuning.templates import CHATML, PLAIN

T = 48  # the test model's block_size


def random_examples(number: int, longest: int = T + 1, seed: int = 0) -> list[Example]:
    """Return examples of random tokens, lengths and masks, with something to learn in each."""
    draw = np.random.default_rng(seed)
    examples = []
    for size in draw.integers(2, longest + 1, number):
        learned = draw.random(size) < draw.random()
        learned[-1] = True
        examples.append(Example(draw.integers(1, 17, size).tolist(), learned.tolist()))
    return examples


def small_model(**settings) -> Decoder:
    torch.manual_seed(0)
    shape = {"vocab_size": 17, "block_size": T, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 8}
    model = Decoder(DecoderConfig(**shape | settings))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)  # far enough from 0 for tokens to matter to each other
    return model


def alone(model: Decoder, example: Example, everything: bool = False) -> tuple[Tensor, int]:
    """Return sum of losses and targets of one example by itself, with torch's own cross-entropy."""
    ids = torch.tensor(example.ids)
    targets = torch.where(torch.tensor(example.learned) | everything, ids, NO_LOSS)[1:]
    logits = model(ids[None, :-1])[0]
    total = torch.nn.functional.cross_entropy(logits, targets, ignore_index=NO_LOSS, reduction="sum")
    return total, int((targets != NO_LOSS).sum())


# What is learned


@pytest.mark.parametrize("template", [CHATML, PLAIN])
def test_targets_are_the_answers_and_their_end_marks_and_nothing_else(marked, conversations, template):
    # nanochat#582: the mask got lost between the tokenizer and the batch, and training went on without it.
    _, tokenizer = marked
    examples, count = make_examples(conversations, template, tokenizer, 400)
    batches = ConversationBatches(examples, 400, 4)
    end, learned = tokenizer.special_tokens[template.end], []
    for step in range(batches.batches):
        batch = batches.batch(step)
        first = step * 4
        for line in range(min(4, len(batches.contents) - first)):
            targets = batch.targets[line]
            learned.append(targets[targets != NO_LOSS].tolist())
    said = Counter(chain.from_iterable(map(answers_of, conversations)))
    texts: Counter[str] = Counter()
    for row in learned:
        assert row[-1] == end
        for piece in np.split(np.array(row), np.flatnonzero(np.array(row) == end) + 1)[:-1]:
            texts[tokenizer.decode(piece[:-1].tolist())] += 1
    assert texts == said
    assert count.learned == sum(map(len, learned))


def test_a_prompt_is_learned_only_when_asked_for(marked, conversations):
    _, tokenizer = marked
    some, count = make_examples(conversations, PLAIN, tokenizer, 400)
    everything, whole = make_examples(conversations, PLAIN, tokenizer, 400, everything=True)
    assert [one.ids for one in some] == [one.ids for one in everything]
    assert whole.learned == whole.tokens - len(conversations)  # the first token has nothing before it
    assert count.learned < whole.learned / 2


def test_what_comes_next_is_the_target_of_a_token():
    example = Example([5, 6, 7, 8], [False, False, True, True])
    batch = ConversationBatches([example], 6, 1).batch(0)
    assert batch.tokens.tolist() == [[5, 6, 7, 0, 0, 0]]
    assert batch.targets.tolist() == [[NO_LOSS, 7, 8, NO_LOSS, NO_LOSS, NO_LOSS]]
    assert batch.documents.tolist() == [[1, 1, 1, 0, 0, 0]]


def test_long_conversations_are_cut_and_those_without_an_answer_left_out(marked):
    _, tokenizer = marked
    long = [Message("user", "sea"), Message("assistant", "fox " * 300)]
    late = [Message("user", "sea " * 300), Message("assistant", "fox")]
    mute = [Message("user", "sea")]
    fine = [Message("user", "sea"), Message("assistant", "fox")]
    examples, count = make_examples([long, late, mute, fine], PLAIN, tokenizer, T)
    assert [len(example.ids) for example in examples] == [T + 1, len(PLAIN.encode(tokenizer, fine)[0])]
    assert (count.conversations, count.cut, count.empty) == (4, 1, 2)
    assert count.tokens == sum(len(example.ids) for example in examples)
    for text in ("4 conversations", "1 were too long and lost their end", "2 left out"):
        assert text in describe(count)
    ConversationBatches(examples, T, 2)  # they fit


def test_an_answer_that_only_begins_at_the_cut_has_its_first_token_learned():
    class Fixed:
        def encode(self, tokenizer, conversation, answer=False):
            return list(range(20)), [False] * 8 + [True] * 12

    assert make_examples([[]], Fixed(), None, 8)[1].learned == 1
    assert make_examples([[]], Fixed(), None, 7) == ([], make_examples([[]], Fixed(), None, 7)[1])
    assert make_examples([[]], Fixed(), None, 7)[1].empty == 1


def test_a_template_whose_mask_does_not_fit_is_an_error():
    class Short:
        def encode(self, tokenizer, conversation, answer=False):
            return [1, 2, 3], [True, True]

    with pytest.raises(ValueError, match=r"mask \(2\) must have one entry for each of 3 tokens"):
        make_examples([[]], Short(), None, 8)


# Packing


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_learns_each_example_once(packing):
    examples = random_examples(60)
    batches = ConversationBatches(examples, T, 4, seed=3, packing=packing)
    expected = Counter(tuple(example.ids[:-1]) for example in examples)
    for epoch in range(2):
        seen: Counter[tuple[int, ...]] = Counter()
        targets = 0
        places = range(epoch * len(batches.contents), (epoch + 1) * len(batches.contents))
        for place in places:
            batch = batches.batch(place // 4)
            tokens, documents = batch.tokens[place % 4], batch.documents[place % 4]
            for number in range(1, int(documents.max()) + 1):
                seen[tuple(tokens[documents == number].tolist())] += 1
            targets += int((batch.targets[place % 4] != NO_LOSS).sum())
        assert seen == expected
        assert targets == sum(sum(example.learned[1:]) for example in examples)


def test_epochs_have_orders_of_their_own_and_a_step_always_the_same_batch():
    batches = ConversationBatches(random_examples(64, longest=9), 8, 1, packing=False)
    assert torch.equal(batches.batch(5).tokens, batches.batch(5).tokens)
    first, second = ([batches.batch(i).tokens.tolist() for i in range(n, n + 64)] for n in (0, 64))
    assert first != second
    assert sorted(map(str, first)) == sorted(map(str, second))


def test_processes_share_what_one_would_see():
    examples = random_examples(50)
    whole = ConversationBatches(examples, T, 4)
    parts = [ConversationBatches(examples, T, 4, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        shares = [part.batch(step) for part in parts]
        for name in ("tokens", "targets", "documents"):
            assert torch.equal(
                getattr(whole.batch(step), name), torch.cat([getattr(share, name) for share in shares])
            )


def test_a_packed_row_has_the_losses_of_its_conversations_alone():
    model, examples = small_model().double(), random_examples(40)
    batches = ConversationBatches(examples, T, 8, endless=False)
    assert len(batches.contents) < 36  # several share a row
    together = [answer_loss(model, batches.batch(step)) for step in range(batches.batches)]
    apart = [alone(model, example) for example in examples]
    assert sum(count for _, count in together) == sum(count for _, count in apart)
    total, expected = sum(loss for loss, _ in together), sum(loss for loss, _ in apart)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    glued = [answer_loss(model, replace(batches.batch(i), documents=None)) for i in range(batches.batches)]
    assert abs(sum(loss for loss, _ in glued) / expected - 1) > 1e-4  # what the mask is for


def test_rows_are_full():
    batches = ConversationBatches(random_examples(500), T, 1)
    used = sum(len(example.ids) - 1 for example in random_examples(500))
    assert used / (len(batches.contents) * T) > 0.9
    alone = ConversationBatches(random_examples(500), T, 1, packing=False)
    assert used / (len(alone.contents) * T) < 0.6


def test_unpacked_rows_are_as_long_as_the_longest():
    examples = [Example([1] * n, [False] + [True] * (n - 1)) for n in (3, 5, 9, 4)]
    batches = ConversationBatches(examples, T, 2, packing=False)
    widths = {batches.batch(step).tokens.shape[1] for step in range(2)}
    assert max(widths) == 8
    assert min(widths) < 8


def test_a_validation_set_ends_in_empty_rows():
    batches = ConversationBatches(random_examples(5), T, 4, packing=False, endless=False)
    last, beyond = batches.batch(1), batches.batch(2)
    assert (last.targets != NO_LOSS).any(dim=1).tolist() == [True, False, False, False]
    total, count = answer_loss(small_model(), beyond)
    assert (total.item(), count) == (0.0, 0)


@pytest.mark.parametrize(
    ("examples", "settings", "message"),
    [
        ([], {}, r"examples \(0\) must be at least one"),
        ([Example([1, 2], [True, False])], {}, r"examples\[0\] \(2 tokens, 0 targets\) must have a target"),
        (
            [Example([1] * 9, [True] * 9)],
            {},
            r"examples\[0\] \(9 tokens, 8 targets\) must .* at most 8 tokens",
        ),
        ([Example([1, 2], [True])], {}, r"examples\[0\] \(2 tokens"),
        (
            [Example([1, 2], [True, True])],
            {"batch_size": 3, "world_size": 2},
            r"batch_size \(3\) must be div",
        ),
    ],
)
def test_what_cannot_be_batched_is_an_error(examples, settings, message):
    with pytest.raises(ValueError, match=message):
        ConversationBatches(examples, 7, **{"batch_size": 1} | settings)


# The loss


def test_the_loss_and_its_gradient_are_those_of_all_logits():
    model, batch = small_model().double(), ConversationBatches(random_examples(20), T, 6).batch(0)
    assert 0 < int((batch.targets != NO_LOSS).sum()) < batch.targets.numel()
    ours, theirs = answer_loss(model, batch), language_model_loss(model, batch)
    assert ours[1] == int(theirs[1])
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=0)
    weights = list(model.parameters())
    pairs = zip(*(torch.autograd.grad(loss, weights) for loss, _ in (ours, theirs)), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_the_loss_is_that_of_transformers():
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    model = small_model().double()
    for example in random_examples(10):
        total, count = answer_loss(model, ConversationBatches([example], T, 1).batch(0))
        ids = torch.tensor([example.ids])
        labels = torch.where(torch.tensor(example.learned), ids, -100)
        logits = model(ids[:, :-1])
        logits = torch.cat([logits, logits[:, -1:]], dim=1)  # it shifts by itself, and drops the last
        expected = loss_utils.ForCausalLMLoss(logits, labels, 17, num_items_in_batch=count)
        # it rounds logits to float32 first
        torch.testing.assert_close((total / count).float(), expected.float(), rtol=1e-5, atol=0)


class OneBatch:
    """The same batch at every step."""

    def __init__(self, batch: Batch) -> None:
        self.one = batch

    def batch(self, step: int) -> Batch:
        return self.one


def trainer(out: Path, batch: Batch, model: Decoder, rows: int, **settings) -> Trainer:
    fixed = {"precision": "fp32", "device": "cpu", "grad_clip": 1e9, "max_steps": 2, "warmup_steps": 0}
    config = TrainConfig(out=out, micro_batch_size=rows, **fixed | settings)
    return Trainer(model, OneBatch(batch), config, answer_loss)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_accumulated_gradients_are_those_of_the_full_batch(tmp_path: Path, rows: int):
    # transformers#34191, trl#2175, LlamaFactory#7443: each micro-batch was divided by its own tokens.
    batch = ConversationBatches(random_examples(30), T, 7).batch(0)
    counts = [int((part.targets != NO_LOSS).sum()) for part in split_rows(batch, rows)]
    assert len(set(counts)) > 1  # so it matters how they are weighted
    model = small_model().double()
    total, count = answer_loss(model, batch)
    weights = list(model.parameters())
    expected = torch.autograd.grad(total / count, weights)
    means = [loss / n for loss, n in (answer_loss(model, part) for part in split_rows(batch, rows))]
    wrong = torch.autograd.grad(sum(means) / len(means), weights)
    assert trainer(tmp_path, batch, model, rows).step(0, batch).tokens == count
    distance = [(a - b).norm() / b.norm() for a, b in zip(wrong, expected, strict=True)]
    assert max(distance) > 0.01
    for weight, grad in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, grad, rtol=1e-10, atol=1e-13)


def test_a_micro_batch_without_targets_changes_nothing(tmp_path: Path):
    # nanochat#590, #618, #834 and minimind#369: 0 / 0 = NaN, and every weight was NaN from then on.
    full = ConversationBatches(random_examples(6), T, 3).batch(0)
    empty = replace(full, targets=torch.full_like(full.targets, NO_LOSS))
    both = Batch(
        *(torch.cat([getattr(full, n), getattr(empty, n)]) for n in ("tokens", "targets", "documents"))
    )
    assert torch.isnan(torch.nn.functional.cross_entropy(torch.zeros(2, 17), torch.tensor([NO_LOSS] * 2)))
    grads = []
    for number, batch in enumerate((full, both)):
        model = small_model().double()
        result = trainer(tmp_path / str(number), batch, model, 3).step(0, batch)
        assert not result.skipped
        grads.append([weight.grad for weight in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.isfinite(other).all()
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_a_whole_batch_without_targets_is_skipped(tmp_path: Path):
    full = ConversationBatches(random_examples(6), T, 3).batch(0)
    empty = replace(full, targets=torch.full_like(full.targets, NO_LOSS))
    model = small_model()
    before = [weight.clone() for weight in model.parameters()]
    result = trainer(tmp_path, empty, model, 0).step(0, empty)
    assert "there is no token to learn from" in result.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def interact() -> None:
    """Show what would be learned of a question and an answer."""
    marks = PLAIN.specials
    tokenizer = BPETokenizer.train("the question and the answer " * 9, 270 + len(marks), special_tokens=marks)
    for text in ask("question = answer> "):
        question, _, answer = text.partition("=")
        talk = [Message("user", question.strip()), Message("assistant", answer.strip())]
        for token, learned in zip(*PLAIN.encode(tokenizer, talk), strict=True):
            print(f"{tokenizer.decode([token])!r:16} {'learned' if learned else ''}")


if __name__ == "__main__":
    run_validation(__file__, interact)
