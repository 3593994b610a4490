"""Checks of generate.py, evaluate.py, visualize.py and benchmark.py. --interactive chats with SmolLM2."""

import csv
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from common.checkpoints import save_checkpoint
from common.script import run_validation
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project7_kv_cache import benchmark, evaluate, generate, visualize
from phase3_core_inference.project7_kv_cache.benchmark import HF, NONE, OURS
from phase3_core_inference.project7_kv_cache.config import (
    BenchmarkConfig,
    CacheConfig,
    EvaluateConfig,
    GenerateConfig,
    VisualizeConfig,
)

TEXT = "The sky over the sea is blue. The grass on the hill is green. Die Straße führt über die Brücke 🙂. "
WIDE = CacheConfig(window=60, sinks=2, group=2, residual=64, budget=64)  # as much as block_size: all is kept


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small model with random weights, as project 3 would save it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = BPETokenizer.train_from_iterator([TEXT] * 3, 290, special_tokens=special)
    torch.manual_seed(0)
    shape = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    model = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, **shape))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    tokenizer.save(folder / "tokenizer.json")
    entries = {"config": asdict(model.config), "model_state_dict": model.state_dict()}
    save_checkpoint(
        folder / "model.pt", **entries, tokenizer=(folder / "tokenizer.json").read_text(encoding="utf-8")
    )
    return folder / "model.pt"


def settings(checkpoint, cache, **changes):
    how = {"chat": "no", "max_new_tokens": 12, "precision": "fp32", "device": "cpu", "memory": WIDE}
    return GenerateConfig(str(checkpoint), "The sea", cache=cache, **how | changes)


@pytest.mark.parametrize("cache", ["growing", "slots", "ring", "quantized", "heavy"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_cache_that_keeps_all_writes_what_none_does(checkpoint, cache, temperature, capsys):
    expected = generate.run(settings(checkpoint, "none", temperature=temperature))
    assert generate.run(settings(checkpoint, cache, temperature=temperature)) == expected
    assert "MB remembered" in capsys.readouterr().err


def test_a_ring_writes_beyond_the_longest_context_and_others_say_no(checkpoint):
    small = CacheConfig(window=20, sinks=2)
    (text,) = generate.run(settings(checkpoint, "ring", memory=small, max_new_tokens=150))
    assert len(text) > 100
    with pytest.raises(
        ValueError, match=r"prompt and answer \(15\d tokens\) must be at most block_size \(64\)"
    ):
        generate.run(settings(checkpoint, "slots", max_new_tokens=150))


def test_a_chat_reads_only_what_is_new(checkpoint, monkeypatch, capsys):
    lines = iter(["Hi", "Ho"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, ""))
    how = {"chat": "yes", "system": "", "max_new_tokens": 4, "interactive": True, "temperature": 0.0}
    with_slots = generate.run(settings(checkpoint, "slots", **how))
    said = capsys.readouterr().err
    assert "; 0 of the prompt's" in said
    known = int(said.split("; ")[-2].split()[0])
    assert known > 4  # the first turn's question, at least
    lines = iter(["Hi", "Ho"])
    assert generate.run(settings(checkpoint, "none", **how)) == with_slots


def test_an_evaluation_writes_its_table(checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20, encoding="utf-8")
    memory = CacheConfig(window=6, sinks=2, group=4, residual=4, budget=8)
    how = {"tokens": 60, "texts": 1, "device": "cpu", "out": tmp_path}
    rows = evaluate.run(EvaluateConfig(str(checkpoint), str(text), memory=memory, **how))
    by_name = {row.name: row for row in rows}
    assert abs(by_name["8 bits"].nats - rows[0].nats) < 0.05
    assert (
        by_name["window 8"].bytes
        == by_name["window 6, 2 sinks"].bytes
        < by_name["2 bits"].bytes
        < rows[0].bytes
    )
    with open(tmp_path / "evaluate.csv", encoding="utf-8") as file:
        assert [row["cache"] for row in csv.DictReader(file)] == list(by_name)
    assert "everything" in capsys.readouterr().out


def test_an_evaluation_in_which_nothing_is_forgotten_is_refused(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20, encoding="utf-8")
    config = EvaluateConfig(str(checkpoint), str(text), tokens=60, texts=1, device="cpu", out=tmp_path)
    with pytest.raises(ValueError, match=r"tokens \(60\) must be above 65: all caches would hold everything"):
        evaluate.run(config)
    config.tokens = 65
    with pytest.raises(ValueError, match=r"tokens \(65\) must be at most block_size \(64\)"):
        evaluate.run(config)


def test_pictures_are_drawn(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40, encoding="utf-8")
    how = {"tokens": 300, "window": 14, "sinks": 2, "device": "cpu", "out": tmp_path}
    paths = visualize.run(VisualizeConfig(model=str(checkpoint), data=str(text), **how))
    assert [path.name for path in paths] == ["memory.png", "stream.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_a_benchmark_compares_like_with_like(capsys):
    shape = DecoderConfig(vocab_size=50, block_size=128, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
    sizes = {"prompt_tokens": 8, "new_tokens": 4, "prefill_tokens": 40, "context": 40, "batch": 2}
    how = {"gguf": "none", "repeats": 1, "compile": False, "device": "cpu", "precision": "fp32"}
    rows = benchmark.run(BenchmarkConfig(shape, **sizes, **how))
    pairs = {(row.task, row.name) for row in rows}
    assert {
        ("write 4 tokens", OURS),
        ("write 4 tokens", HF),
        ("read 40 tokens", HF),
        ("a step at 40", NONE),
    } <= pairs
    assert all(row.seconds > 0 for row in rows)
    assert "operations per byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (generate, "--cache heap", "invalid choice 'heap' for argument '--cache'"),
        (generate, "--window 0", "window (0) must be at least 1"),
        (generate, "--bits 3", "invalid choice '3' for argument '--bits'"),
        (generate, "--model nowhere.gguf", "model (nowhere.gguf) must be"),
        (evaluate, "--tokens 1", "tokens (1) must be at least 2"),
        (visualize, "--tokens 100", "tokens (100) must be above 256"),
        (benchmark, "--context 9000", "block_size (8192) must be at least 9064"),
    ],
)
def test_a_bad_input_gets_one_line_and_status_2(module, flags, message, refusal):
    assert message in refusal(module.main, *flags.split()).err


def interact() -> None:
    """Chat with SmolLM2, and see what is remembered."""
    generate.run(GenerateConfig(model="smollm2-135m", interactive=True))


if __name__ == "__main__":
    run_validation(__file__, interact)
