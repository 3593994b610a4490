"""Checks of train.py: from a text to a model and its samples, and what it says when something is missing."""

import random
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import pytest
import torch

from common.script import run_validation
from phase1_foundation.project1_minimal_gpt.generate import generate
from phase1_foundation.project3_pretrain import preprocess, train
from phase1_foundation.project3_pretrain.config import (
    Config,
    DataConfig,
    DecoderConfig,
    PreprocessConfig,
    TrainConfig,
)
from phase1_foundation.project3_pretrain.train import run
from phase1_foundation.project3_pretrain.weights import load_model


def write_text(path: Path, seed: int = 0) -> Path:
    """Write documents of a small language: a verb takes one noun only."""
    draw = random.Random(seed)
    verbs = {"eats": "bread", "drinks": "water", "reads": "books", "rides": "horses"}
    lines = []
    for _ in range(400):
        pairs = draw.choices(list(verbs.items()), k=12)
        lines.append(" ".join(f"{draw.choice(['she', 'he', 'who'])} {verb} {noun}." for verb, noun in pairs))
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


CHEAP = {"quality": "none", "near_duplicates": 0, "vocab_size": 300, "workers": 1, "validation_share": 0.1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text = write_text(folder / "text.txt")
    preprocess.run(PreprocessConfig(data=[str(text)], out=folder / "shards", **CHEAP))
    return folder / "shards"


def tiny(shards: Path, out: Path, corpus: str | None = None, **train) -> Config:
    model = DecoderConfig(block_size=32, n_layer=1, n_head=2, n_embd=32)
    data = DataConfig(shards=shards, batch_size=8, sample_tokens=20, prompt="she drinks", corpus=corpus)
    settings = {
        "max_steps": 60,
        "eval_interval": 30,
        "eval_batches": 4,
        "device": "cpu",
        "lr": 1e-2,
        "warmup_steps": 5,
    }
    return Config(model, data, TrainConfig(out=out, **settings | train))


def test_a_text_becomes_a_model_that_has_learned_it(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    losses = run(tiny(shards, tmp_path))
    said = capsys.readouterr()
    assert losses[0] > 5  # of ln 300 = 5.7
    assert sum(losses[-10:]) / 10 < 1.5
    assert "she drinks water" in said.out + said.err
    assert "bits per byte" in said.out + said.err
    model, tokenizer = load_model(tmp_path / "model.pt")
    prompt = [tokenizer.special_tokens["<|endoftext|>"], *tokenizer.encode("she reads")]
    assert tokenizer.decode(generate(model, prompt, 3, temperature=0)).startswith(" books.")


def test_a_run_in_two_parts_is_the_run_in_one(shards: Path, tmp_path: Path):
    settings = {"eval_interval": 4, "schedule": "wsd", "decay_fraction": 0.0}
    whole = run(tiny(shards, tmp_path / "whole", max_steps=8, **settings))
    first = run(tiny(shards, tmp_path / "parts", max_steps=4, **settings))
    assert first + run(tiny(shards, tmp_path / "parts", max_steps=8, resume=True, **settings)) == whole


def test_what_cannot_go_together_is_refused(shards: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"corpus \(kjv\) must be \['.*text.txt'\], as in"):
        run(tiny(shards, tmp_path, corpus="kjv"))
    config = tiny(shards, tmp_path)
    config.model.vocab_size = 200
    with pytest.raises(ValueError, match=r"vocab_size \(200\) must be at least \d+, as in the shards"):
        run(config)
    run(tiny(shards, tmp_path, max_steps=1))
    other = tmp_path / "other"
    text = write_text(tmp_path / "text.txt", seed=1)
    preprocess.run(PreprocessConfig(data=[str(text)], out=other, **CHEAP))
    with pytest.raises(ValueError, match=r"sha256_of_shards \(\w+\) must be \w+ to resume"):
        run(tiny(other, tmp_path, max_steps=2, resume=True))


def test_a_full_gpu_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, refusal: Callable):
    def fill(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "run", fill)
    assert (
        "error: micro_batch_size (0) must fit into the GPU's memory; or use"
        in refusal(train.main, "--device", "cpu").err
    )


@pytest.mark.slow
def test_shards_that_are_not_there_are_made_first(tmp_path: Path):
    text = tmp_path / "help.txt"
    text.write_text("\n\n".join(topics.topics.values()), encoding="utf-8")
    config = tiny(tmp_path / "shards", tmp_path / "out", corpus=str(text), max_steps=2)
    assert len(run(config)) == 2
    assert (tmp_path / "shards" / "manifest.json").is_file()


@pytest.mark.gpu
def test_a_gpu_learns_what_a_cpu_learns(shards: Path, tmp_path: Path):
    on_cpu = run(tiny(shards, tmp_path / "cpu", max_steps=10, precision="fp32"))
    assert run(
        tiny(shards, tmp_path / "gpu", max_steps=10, precision="fp32", device="cuda")
    ) == pytest.approx(on_cpu, rel=1e-3)
    half = run(tiny(shards, tmp_path / "half", max_steps=10, device="cuda", compile=True))
    assert half == pytest.approx(on_cpu, rel=0.03)
    assert torch.cuda.max_memory_allocated() > 0


if __name__ == "__main__":
    run_validation(__file__)
