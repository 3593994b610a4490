"""Checks of the ladder. --interactive shows what the counted bigram expects after your last character."""

import csv
import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from common.script import ask, run_validation
from phase1_foundation.project1_minimal_gpt import ladder
from phase1_foundation.project1_minimal_gpt.attention import explicit_attention
from phase1_foundation.project1_minimal_gpt.config import GPTConfig, LadderConfig
from phase1_foundation.project1_minimal_gpt.conftest import random_words
from phase1_foundation.project1_minimal_gpt.ladder import (
    AverageOfThePast,
    CountedBigram,
    LearnedBigram,
    make_rungs,
    run,
)
from phase1_foundation.project1_minimal_gpt.tokenizer import CharTokenizer


def test_the_counted_bigram_holds_the_frequencies_of_pairs_and_one_more_of_each():
    ids = [0, 1, 1, 2, 1, 1, 0]
    odds = CountedBigram(torch.tensor(ids), 3)(torch.arange(3)[None])[0].exp()
    pairs = Counter(pairwise(ids))
    for a in range(3):
        total = sum(pairs[a, b] + 1 for b in range(3))
        assert odds[a].tolist() == pytest.approx([(pairs[a, b] + 1) / total for b in range(3)])


def test_the_learned_bigram_can_become_the_counted_one():
    ids = torch.randint(5, (400,), generator=torch.Generator().manual_seed(0)) ** 2 % 5
    counted, learned = CountedBigram(ids, 5), LearnedBigram(GPTConfig(vocab_size=5))
    optimizer = torch.optim.LBFGS(learned.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    every = torch.cartesian_prod(torch.arange(5), torch.arange(5))  # each pair once more, as counting has it
    pairs = torch.cat([torch.stack([ids[:-1], ids[1:]], dim=1), every])

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(learned(pairs[None, :, 0])[0], pairs[:, 1])
        value.backward()
        return value

    optimizer.step(loss)
    tokens = torch.arange(5)[None]
    torch.testing.assert_close(learned(tokens).log_softmax(-1), counted(tokens), rtol=1e-2, atol=1e-2)


def test_the_average_of_the_past_is_attention_that_cannot_tell_its_keys_apart():
    q, k, v = torch.randn(3, 2, 3, 7, 4)
    expected = explicit_attention(torch.zeros_like(q), k, v)
    torch.testing.assert_close(AverageOfThePast().attend(0, q, k, v), expected)


def test_no_rung_sees_the_future():
    torch.manual_seed(0)
    tokens = torch.randint(9, (1, 8))
    rungs = make_rungs(GPTConfig(block_size=8, vocab_size=9, n_layer=2, n_head=4, n_embd=16), torch.arange(9))
    assert len(rungs) == 9
    for rung in rungs:
        model = rung.build().eval()
        logits = model(tokens)
        other = tokens.clone()
        other[0, 5:] = (other[0, 5:] + 1) % 9
        assert logits.shape == (1, 8, 9)
        assert torch.equal(model(other)[0, :5], logits[0, :5]), rung.name


def test_climbing_fills_in_every_rung_and_writes_table_and_picture(text_file: Path, tmp_path: Path, capsys):
    shape = {"block_size": 16, "n_embd": 16, "batch_size": 8, "steps": 30}
    rungs = run(LadderConfig(data=str(text_file), out=tmp_path, device="cpu", **shape))
    text = text_file.read_text(encoding="utf-8")
    V = len(set(text))
    assert all(0 < rung.val_loss < math.log(V) for rung in rungs)
    assert [rung.parameters for rung in rungs[:2]] == [0, V * V]
    assert rungs[-1].parameters > rungs[5].parameters > rungs[4].parameters == rungs[3].parameters
    with open(tmp_path / "ladder.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["rung"], row["val_loss"]) for row in table] == [(r.name, f"{r.val_loss:.4f}") for r in rungs]
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"{number}  {rung.name}" in printed for number, rung in enumerate(rungs, start=1))
    ids = torch.tensor(CharTokenizer.train(text).encode(text))
    cut = len(ids) - len(ids) // 10
    pairs = CountedBigram(ids[:cut], V)(ids[None, cut:-1])[0]
    n = (len(ids) - cut - 1) // 16 * 16  # whole windows only
    assert rungs[0].val_loss == pytest.approx(
        -pairs[torch.arange(n), ids[cut + 1 : cut + 1 + n]].mean().item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--n_embd 6", "n_embd (6) must be divisible by the ladder's 4 heads"),
        ("--steps 0", "steps (0) must be at least 1"),
        ("--lr 0", "lr (0.0) must be above 0"),
        ("--data nowhere.txt", "data (nowhere.txt) must be a text file or a corpus by name"),
    ],
)
def test_a_bad_input_gets_one_line_and_status_2(flags: str, message: str, tmp_path: Path, refusal: Callable):
    assert message in refusal(ladder.main, "--out", str(tmp_path), *flags.split()).err
    assert list(tmp_path.iterdir()) == []


def interact() -> None:
    """Show the odds of the counted bigram, from the words of one sentence, after the typed text."""
    text = random_words()
    tokenizer = CharTokenizer.train(text)
    model = CountedBigram(torch.tensor(tokenizer.encode(text)), tokenizer.vocab_size)
    for typed in ask("text> "):
        odds = model(torch.tensor([tokenizer.encode(typed)]))[0, -1].exp().sort(descending=True)
        pairs = list(zip(odds.indices.tolist(), odds.values.tolist(), strict=True))[:8]
        print("  ".join(f"{tokenizer.decode([i])!r} {odd:.0%}" for i, odd in pairs))


if __name__ == "__main__":
    run_validation(__file__, interact)
