"""Checks that the benchmark measures what it says; its speeds are no test's business."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.script import run_validation
from phase1_foundation.project1_minimal_gpt import benchmark
from phase1_foundation.project1_minimal_gpt.benchmark import PEER, Row, models, pairs, run, time_in_turn
from phase1_foundation.project1_minimal_gpt.config import BenchmarkConfig, GPTConfig


def test_contestants_run_in_turn_and_the_first_round_does_not_count():
    calls: list[str] = []
    contestants = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    times = time_in_turn(contestants, 3, torch.device("cpu"), "test")
    assert calls == ["a", "b"] * 4
    assert times.keys() == contestants.keys()


def test_all_four_models_have_the_same_shape():
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
    contestants = models(config, torch.device("cpu"))
    sizes = {
        name: sum(weight.numel() for weight in model.parameters()) for name, model in contestants.items()
    }
    assert len(sizes) == 4
    assert len(set(sizes.values())) == 1
    assert {model(torch.zeros(2, 8, dtype=torch.long)).shape for model in contestants.values()} == {
        (2, 8, 11)
    }


def test_the_whole_benchmark_runs_and_prints_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(benchmark, "CONTEXTS", (4, 8))
    monkeypatch.setattr(benchmark, "ATTENTION_TOKENS", 16)
    shape = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16)
    rows = run(BenchmarkConfig(model=shape, batch_size=2, repeats=1, out=tmp_path, device="cpu"))
    printed = capsys.readouterr().out
    precisions = {row.precision for row in rows}
    assert "fp32" in precisions
    assert len([row for row in rows if row.task == "training step"]) == 4 * len(precisions)
    assert len([row for row in rows if row.task == "generation"]) == 4
    assert len([row for row in rows if row.task.startswith("attention")]) == 2 * 2 * 2 * len(precisions)
    assert all(row.seconds > 0 for row in rows)
    assert sum(PEER in line and line.rstrip().endswith("1.00") for line in printed.splitlines()) >= 2
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_are_explicit_with_sdpa():
    rows = [Row("attention, context 8", "fp32", f"{kind}, forward", 1.0, 8) for kind in ("explicit", "sdpa")]
    assert pairs(rows) == [(rows[0], rows[1])]
    assert rows[0].speed == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--repeats 0", "repeats (0) must be at least 1"),
        ("--no_bias", "bias (False) must be on"),
        ("--vocab_size 0", "vocab_size (0) must be at least 1"),
        ("--n_embd 10 --n_head 4", "n_embd (10) must be divisible by n_head (4)"),
    ],
)
def test_a_bad_input_gets_one_line_and_status_2(flags: str, message: str, refusal: Callable):
    assert message in refusal(benchmark.main, *flags.split()).err


if __name__ == "__main__":
    run_validation(__file__)
