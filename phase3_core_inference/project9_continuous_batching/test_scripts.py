"""Checks of the scripts: each runs from end to end on a tiny model, and says what it wrote."""

import pytest
import torch

from common.script import run_validation
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project9_continuous_batching import benchmark, generate, simulate, visualize
from phase3_core_inference.project9_continuous_batching.config import (
    BenchmarkConfig,
    EngineConfig,
    GenerateConfig,
    LoadConfig,
    SimulateConfig,
    VisualizeConfig,
)
from phase3_core_inference.project9_continuous_batching.loads import Service
from phase3_core_inference.project9_continuous_batching.simulator import CostModel


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tokenizer: BPETokenizer) -> Decoder:
    """A model with a tokenizer, in place of what load_model would find."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_embd=16)).eval()
    for module in (benchmark, generate):
        monkeypatch.setattr(module, "load_model", lambda *_: (model, tokenizer))
    return model


def test_prompts_are_answered_together_each_with_its_own_seed(tiny: Decoder, capsys):
    config = GenerateConfig(prompts=["one", "two", "one"], max_new_tokens=9, engine=EngineConfig(slots=2))
    answers = generate.run(config)
    printed = capsys.readouterr()
    assert len(answers) == 3
    assert answers[0] != answers[2]
    for number, prompt in enumerate(config.prompts, start=1):
        assert f"\n{number}  {prompt}\n" in printed.out
    assert "(27 tokens in " in printed.err
    assert generate.run(config) == answers


def test_typed_prompts_are_divided_by_bars_and_one_that_is_too_long_ends_nothing(tiny, monkeypatch, capsys):
    typed = iter([f"one | two |  | {'x' * 100}", "three", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    answers = generate.run(GenerateConfig(interactive=True, max_new_tokens=3, engine=EngineConfig(slots=2)))
    printed = capsys.readouterr().out
    assert "error: prompt (100 tokens) must have 1 to 64 tokens" in printed
    assert len(answers) == 1
    assert "1  three" in printed


def test_the_benchmark_measures_policies_costs_and_its_own_share(tiny: Decoder, tmp_path, capsys):
    load = LoadConfig(requests=5, arrivals="at_once", prompt_tokens=4, output_tokens=4)
    engine = EngineConfig(slots=4, length=64, token_budget=16)
    found = benchmark.run(BenchmarkConfig(repeats=1, steady_steps=3, out=tmp_path, load=load, engine=engine))
    printed = capsys.readouterr().out
    assert set(found) == {"continuous", "dynamic", "static"}
    assert len({each.tokens for each in found.values()}) == 1  # all write the same
    assert all(policy in printed for policy in found)
    assert "the engine takes" in printed
    CostModel.load(tmp_path / "costs.json")


def test_the_simulation_is_written_as_a_table_and_a_picture(tmp_path, capsys):
    config = SimulateConfig(
        costs=tmp_path / "none.json", rates=[1, 20], out=tmp_path, load=LoadConfig(requests=40)
    )
    results = simulate.run(config)
    printed = capsys.readouterr().out
    assert "costs       built in" in printed
    lines = (tmp_path / "simulation.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3
    assert (tmp_path / "simulation.png").stat().st_size > 10_000

    def waits(policy: str, point: int) -> float:
        service: Service = results[policy][point][1]
        return float(service.first.mean())

    assert waits("static", 1) > waits("static", 0)
    assert waits("continuous", 1) < waits("static", 1)


def test_every_picture_is_drawn(tmp_path):
    paths = visualize.run(
        VisualizeConfig(pictures=["slots", "stalls", "fairness"], costs=tmp_path / "none.json", out=tmp_path)
    )
    assert [path.name for path in paths] == ["slots.png", "stalls.png", "fairness.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (SimulateConfig(rates=[]), r"rates \(\[\]\) must be above 0"),
        (LoadConfig(rate=0), r"rate \(0\) must be above 0"),
        (LoadConfig(requests=0), r"requests \(0\) must be at least 1"),
        (GenerateConfig(prompts=[""]), r"prompts \(\) must each be a text"),
        (GenerateConfig(top_p=0), r"top_p \(0\) must be above 0 and at most 1"),
        (BenchmarkConfig(repeats=0), r"repeats \(0\) must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        config.validate_config()


if __name__ == "__main__":
    run_validation(__file__)
