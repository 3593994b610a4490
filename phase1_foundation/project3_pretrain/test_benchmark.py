"""Checks that the benchmark compares like with like; its speeds are no test's business."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.script import run_validation
from phase1_foundation.project3_pretrain import benchmark
from phase1_foundation.project3_pretrain.benchmark import (
    PEER,
    hugging_face,
    our_step,
    print_race,
    race,
    run,
    their_generation,
    their_step,
)
from phase1_foundation.project3_pretrain.config import BenchmarkConfig, DecoderConfig
from phase1_foundation.project3_pretrain.families import parts_of
from phase1_foundation.project3_pretrain.generate import generate
from phase1_foundation.project3_pretrain.model import Decoder

SHAPE = DecoderConfig(vocab_size=31, block_size=16, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)


def twins() -> tuple[Decoder, torch.nn.Module]:
    """Our model and theirs, with the same weights."""
    torch.manual_seed(0)
    ours, theirs = Decoder(SHAPE).eval(), hugging_face(SHAPE).eval()
    for weight in ours.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    state = theirs.state_dict()
    for name, parts in parts_of(SHAPE, "hf"):
        pieces = ours.state_dict()[name].split([part.shape[0] for part in parts])
        for part, piece in zip(parts, pieces, strict=True):
            state[part.name].copy_(part.back(piece))
    return ours, theirs


def test_both_have_the_same_weights_and_write_the_same_text():
    ours, theirs = twins()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    prompt = [3, 1, 4, 1, 5]
    assert their_generation(theirs, prompt, 8) == list(generate(ours, prompt, 8, temperature=0))


def test_both_steps_learn_the_same_text():
    ours, theirs = twins()
    tokens = torch.tensor([[1, 2, 3, 4] * 4 + [1]])

    def losses() -> list[float]:
        found = []
        for model in (ours, theirs):
            out = model(tokens[:, :-1])
            logits = out if isinstance(out, torch.Tensor) else out.logits
            found.append(torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]).item())
        return found

    before = losses()
    assert before[0] == pytest.approx(before[1], rel=1e-4)
    steps = [make(model, tokens, torch.float32) for make, model in ((our_step, ours), (their_step, theirs))]
    for step in steps:
        for _ in range(5):
            step()
    after = losses()
    assert after[0] == pytest.approx(after[1], abs=0.05 * before[0])  # theirs does not see the last target
    assert after[0] < before[0]


def test_the_whole_benchmark_runs_and_prints_every_row(capsys):
    config = BenchmarkConfig(
        SHAPE, batch_size=2, new_tokens=3, prompt_tokens=4, repeats=1, race_steps=0, device="cpu"
    )
    rows = run(config)
    printed = capsys.readouterr().out
    precisions = {row.precision for row in rows}
    assert len([row for row in rows if row.task == "training step"]) == 2 * len(precisions)
    assert len([row for row in rows if row.task == "generation"]) == 2
    assert all(row.seconds > 0 for row in rows)
    assert (
        sum(PEER in line and line.rstrip().endswith("1.00") for line in printed.splitlines())
        == len(rows) // 2
    )


def test_the_race_is_run_on_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    file = tmp_path / "text.txt"
    file.write_text("All work and no play makes Jack a dull boy. " * 60, encoding="utf-8")
    monkeypatch.setattr(benchmark, "load_corpus", lambda name: file)
    curves = race(6)
    assert [len(curve) for curve in curves.values()] == [6] * 4
    assert all(curve[-1][1] < math.log(256) for curve in curves.values())
    assert race(6) == curves
    print_race(curves)
    assert "muon" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("muon", "message"),
    [
        ([3.0, 2.0, 1.0], "after 20 steps, 67% of AdamW's"),
        ([3.0, 2.9, 2.8], "does not reach the best AdamW's 2.0000"),
    ],
)
def test_the_race_says_when_muon_passes(muon: list[float], message: str, capsys):
    steps = (10, 20, 30)
    curves = {
        "adamw, lr 1": [(10, 4.0), (20, 3.0), (30, 2.5)],
        "adamw, lr 2": [(10, 4.0), (20, 3.0), (30, 2.0)],
    }
    print_race(curves | {"muon": list(zip(steps, muon, strict=True))})
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--repeats 0", "repeats (0) must be at least 1"),
        ("--vocab_size 0", "vocab_size (0) must be at least 1"),
        ("--block_size 64", "prompt_tokens + new_tokens (96) must be at most 64"),
    ],
)
def test_a_bad_input_gets_one_line_and_status_2(flags: str, message: str, refusal: Callable):
    assert message in refusal(benchmark.main, *flags.split()).err


if __name__ == "__main__":
    run_validation(__file__)
