"""Checks that a sweep spends its budgets, goes on where it was killed, and says what it found."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch

from common.script import run_validation
from phase1_foundation.project1_minimal_gpt.data import TextData
from phase1_foundation.project3_pretrain import scaling
from phase1_foundation.project3_pretrain.config import ScalingConfig
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.scaling import (
    Result,
    conclude,
    digest,
    read_bytes,
    read_results,
    run,
    shapes_for,
    verdict,
)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let three steps count as training."""
    monkeypatch.setattr(scaling, "FEWEST_STEPS", 3)


def tiny(tmp_path: Path, **changes) -> ScalingConfig:
    """A sweep of six runs that takes a second."""
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    how = {"budgets": [1e7, 2e7], "widths": [8, 16, 24], "sizes": 3, "block_size": 8, "batch_size": 2}
    how |= {"data": str(file), "out": tmp_path / "out", "eval_windows": 16}
    return ScalingConfig(**how | changes)


def law_of(exponent: float, budgets=(1e13, 1e14, 1e15)) -> list[Result]:
    """Results whose minima grow with the budget as asked for."""
    rows = []
    for flops in budgets:
        best = 0.1 * flops**exponent
        for factor in (0.25, 0.5, 1, 2, 4):
            size = round(best * factor)
            loss = 2 + 0.1 * math.log(size / best) ** 2
            rows.append(Result(flops, 2, size, size, round(flops / 6 / size), 10, loss, 1.0, "x"))
    return rows


def test_a_sweep_runs_and_writes_its_table_and_picture(tmp_path: Path, capsys):
    findings = run(tiny(tmp_path))
    assert len(findings.results) == 6
    assert read_results(tmp_path / "out" / "scaling.csv") == findings.results
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "6 runs, 0 of them done" in capsys.readouterr().out
    assert all(0 < result.bits_per_byte < 8 for result in findings.results)


def test_every_run_of_a_budget_costs_the_budget(tmp_path: Path):
    config = tiny(tmp_path)
    for result in run(config).results:
        shape = next(s for s in shapes_for(result.flops, config) if s.n_embd == result.n_embd)
        model = Decoder(shape)
        assert model.count_parameters() == result.parameters
        step = model.flops_per_token() * 16
        assert abs(result.tokens * model.flops_per_token() - result.flops) <= step / 2


def test_a_killed_sweep_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch, capsys):
    whole = run(tiny(tmp_path, out=tmp_path / "whole")).results
    train, calls = scaling.train, []

    def killed(*job):
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*job)

    monkeypatch.setattr(scaling, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(tmp_path))
    results = run(tiny(tmp_path)).results
    assert len(calls) == 3 + 4  # two were done
    assert "6 runs, 2 of them done" in capsys.readouterr().out
    assert [(r.n_embd, r.bits_per_byte) for r in results] == [(r.n_embd, r.bits_per_byte) for r in whole]


def test_results_under_other_settings_are_kept_but_not_used(tmp_path: Path, capsys):
    run(tiny(tmp_path))
    assert len(run(tiny(tmp_path, seed=1)).results) == 6
    assert "6 runs, 0 of them done" in capsys.readouterr().out.split("written")[-2]
    assert len(read_results(tmp_path / "out" / "scaling.csv")) == 12
    text = read_bytes(tmp_path / "text.txt")
    assert digest(tiny(tmp_path), text) != digest(tiny(tmp_path, seed=1), text)
    assert digest(tiny(tmp_path), text) != digest(tiny(tmp_path), text[:-1])


def test_documents_are_shuffled_so_that_both_parts_are_alike(tmp_path: Path):
    file = tmp_path / "texts.docs.txt"
    file.write_text("".join(f"{letter * 50}\n" for letter in "abcdefghijklmnopqrst"), encoding="utf-8")
    read = bytes(read_bytes(file).tolist())
    assert sorted(read.split(b"\n")) == [letter.encode() * 50 for letter in "abcdefghijklmnopqrst"]
    assert read[-50:] != b"t" * 50


def test_the_loss_is_measured_on_the_validation_part(tmp_path: Path):
    config = tiny(tmp_path)
    data = TextData(read_bytes(Path(config.data)), 8, 2, 0)
    (shape, *_) = shapes_for(1e7, config)
    model = Decoder(shape)
    torch.nn.init.zeros_(model.head.weight)  # all 256 bytes alike
    assert scaling.measure(model, data, 16) == pytest.approx(math.log(256))


@pytest.mark.parametrize("exponent", [0.3, 0.5, 0.73])
def test_known_exponents_are_found(exponent: float):
    findings = conclude(law_of(exponent))
    assert findings.parameters.exponent == pytest.approx(exponent, abs=0.01)
    assert findings.tokens.exponent == pytest.approx(1 - exponent, abs=0.01)


def test_budgets_without_a_minimum_are_left_out_and_named(capsys):
    outside = [
        Result(1e12, 2, n, n, 10**6, 10, (math.log(n) - math.log(1e6)) ** 2, 1.0, "x") for n in (10, 20, 30)
    ]
    findings = conclude(law_of(0.5) + outside)
    assert findings.parameters == conclude(law_of(0.5)).parameters
    scaling.report(findings)
    assert "outside of the sizes tried" in capsys.readouterr().out
    flat = [Result(1e12, 2, n, n, 1, 10, loss, 1.0, "x") for n, loss in ((10, 1.0), (20, 2.0), (30, 1.0))]
    scaling.report(conclude(flat))
    printed = capsys.readouterr().out
    assert "no minimum: the losses do not curve upwards" in printed
    assert "too few minima for a power law" in printed


def test_the_verdict_says_how_much_it_means():
    assert "nearer to Hoffmann's: 0.01 away, the other 0.23" in verdict(0.5, 0.48, 0.52)
    assert "makes it Hoffmann's" in verdict(0.5, 0.48, 0.52)
    assert "nearer to Kaplan's" in verdict(0.7, 0.6, 0.8)
    assert "does not change that much" in verdict(0.6, 0.59, 0.61)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budgets": [1.0]},
            "budgets (1) must buy at least 3 steps for three of the widths; 0 can have them",
        ),
        ({"budgets": []}, "budgets ([]) must be above 0"),
        ({"widths": [8, 16, 8]}, "widths ([8, 16, 8]) must be at least three multiples of 8"),
        ({"muon_lr": 0.0}, "muon_lr (0.0) must be above 0"),
        ({"sizes": 2}, "sizes (2) must be at least 3"),
    ],
)
def test_an_impossible_sweep_is_refused(changes: dict, message: str, tmp_path: Path):
    config = tiny(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        config.validate_config() or run(config)


def test_a_foreign_table_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    config = tiny(tmp_path)
    config.out.mkdir()
    (config.out / "scaling.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--data", config.data, "--out", str(config.out)])
    with pytest.raises(SystemExit):
        scaling.main()
    assert "must be a table that scaling.py wrote; delete it to begin anew" in capsys.readouterr().err
    assert (config.out / "scaling.csv").read_text(encoding="utf-8") == "a,b\n1,2\n"


if __name__ == "__main__":
    run_validation(__file__)
