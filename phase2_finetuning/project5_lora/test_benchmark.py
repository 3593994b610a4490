"""Checks of benchmark.py and visualize.py: tables and pictures of a small model, and errors in one line."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from common.script import run_validation
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project5_lora import benchmark, visualize
from phase2_finetuning.project5_lora.benchmark import BenchmarkConfig, measure_way, print_ledgers
from phase2_finetuning.project5_lora.ledger import WAYS, Ledger
from phase2_finetuning.project5_lora.visualize import VisualizeConfig, code_shares, entropy, four_bit_types

SHAPE = DecoderConfig(vocab_size=300, block_size=64, n_layer=2, n_embd=96, n_head=6, n_kv_head=2)


@pytest.mark.slow
def test_a_way_is_measured_in_a_process_of_its_own():
    row = benchmark.measure_alone(BenchmarkConfig(SHAPE, length=32), "QLoRA")
    assert benchmark.ratio(row, "total") == pytest.approx(1, rel=0.01)


def test_the_ledger_of_each_way_is_printed_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_alone", measure_way)
    config = BenchmarkConfig(SHAPE, length=32, ways=["QLoRA"], repeats=0, out=tmp_path)
    (row,) = benchmark.run(config)
    for column in fields(Ledger):
        assert benchmark.ratio(row, column.name) == pytest.approx(1, rel=0.01)
    assert row.peak >= row.measured.total
    said = capsys.readouterr().out
    assert "QLoRA" in said
    assert (tmp_path / "ledger.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_three_lines_for_each_way(capsys):
    config = BenchmarkConfig(SHAPE, length=16)
    print_ledgers([measure_way(config, way) for way in ("full", "LoRA")])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 + 2 * 3 + 2
    assert lines[1].split()[:2] == ["full", "predicted"]
    assert lines[3].split()[0] == "ratio"


def test_four_and_eight_bits_are_timed_beside_bitsandbytes(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "MATRIX", (128, 64))
    benchmark.time_bits(1)
    said = capsys.readouterr().out
    assert said.count("bitsandbytes") == 4
    assert "floor" in said


def test_pictures_are_drawn_of_any_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(visualize, "load_model", lambda name: (Decoder(SHAPE), None))
    paths = visualize.run(VisualizeConfig(out=tmp_path))
    assert [path.name for path in paths] == ["levels.png", "weights.png", "errors.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert "NF4" in capsys.readouterr().out


def test_normal_weights_use_the_codes_of_nf4_more_evenly_than_those_of_other_types():
    weights = [torch.randn(512, 128, generator=torch.Generator().manual_seed(0))]
    bits = {name: entropy(code_shares(weights, levels)) for name, levels in four_bit_types().items()}
    assert bits["NF4"] == max(bits.values())
    assert bits["NF4"] > 3.85


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ways", "dora"], r"ways \(dora\) must be among full, "),
        (["--length", "0"], r"length \(0\) must be at least 1"),
        (["--n_embd", "7"], r"n_embd \(7\) must be divisible by n_head \(9\)"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(flags, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig.from_cli(flags)


def test_what_the_formulas_do_not_cover_is_said_before_anything_is_measured(tmp_path):
    config = BenchmarkConfig(SHAPE, length=65, out=tmp_path)
    with pytest.raises(ValueError, match=r"T \(65\) must be at least 1 and at most 64"):
        benchmark.run(config)
    assert list(WAYS) == config.ways


def test_a_missing_model_is_an_error_that_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.py"):
        visualize.run(VisualizeConfig(model=str(Path("nowhere.pt")), out=tmp_path))


if __name__ == "__main__":
    run_validation(__file__)
