"""Checks of the scripts, on a tiny model. --interactive writes with SmolLM2."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from common.checkpoints import save_checkpoint
from common.script import run_validation
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project8_sampling import benchmark, detect, search, visualize
from phase3_core_inference.project8_sampling.config import (
    BenchmarkConfig,
    DetectConfig,
    GenerateConfig,
    SamplingParams,
    SearchConfig,
    VisualizeConfig,
    WriterConfig,
)
from phase3_core_inference.project8_sampling.generate import Steps, run


@pytest.fixture(scope="session")
def checkpoint(tokenizer: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights as train.py would save it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    shape = {"block_size": 96, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, **shape))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
    tokenizer.save(folder / "tokenizer.json")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    weights = {"config": asdict(model.config), "model_state_dict": model.state_dict(), "tokenizer": text}
    save_checkpoint(folder / "model.pt", **weights)
    return folder / "model.pt"


def settings(checkpoint: Path, **changes: object) -> GenerateConfig:
    writer = WriterConfig(str(checkpoint), "The fox", device="cpu")
    params = SamplingParams(**{"max_new_tokens": 20, "seed": 5, "temperature": 1.2} | changes)
    return GenerateConfig(writer, params)


@pytest.mark.parametrize("context", [None, 3, 50])
def test_steps_give_the_logits_of_the_whole_text_or_of_its_last_tokens(context: int | None):
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocab_size=30, block_size=32, n_layer=2, n_head=2, n_embd=16)).double()
    steps, texts = Steps(model, [1, 2, 3, 4], 2, context), [[1, 2, 3, 4], [1, 2, 3, 4]]
    for tokens in ([5, 6], [7, 8], [9, 10]):
        steps.feed(tokens)
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        with torch.no_grad():
            expected = model(torch.tensor([text[-(context or 99) :] for text in texts]))[:, -1]
        torch.testing.assert_close(steps.logits, expected)


def test_the_same_seed_writes_the_same_text_alone_and_among_samples(checkpoint: Path):
    config = settings(checkpoint)
    three = run(replace(config, num_samples=3))
    alone = [run(replace(config, sampling=replace(config.sampling, seed=5 + i)))[0] for i in range(3)]
    assert three == alone
    assert len(set(three)) == 3


def test_a_schema_is_kept_to_from_its_text_or_its_file(checkpoint: Path, tmp_path: Path):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    for source in (json.dumps(schema), str(tmp_path / "schema.json")):
        (text,) = run(settings(checkpoint, json_schema=source))
        assert type(json.loads(text.removeprefix("The fox"))["a"]) is int
    with pytest.raises(FileNotFoundError, match="must be a schema as JSON text, or a file with one"):
        run(settings(checkpoint, json_schema="no.json"))


def test_contrastive_decoding_writes_with_itself_or_another_as_amateur(checkpoint: Path):
    plain = run(settings(checkpoint, temperature=0.0))
    config = replace(settings(checkpoint, temperature=0.0), contrast=0.01, amateur_context=2)
    assert run(config) != plain
    assert (
        run(replace(config, amateur=str(checkpoint), contrast=1.0)) == plain
    )  # only the likeliest is plausible


def test_a_conversation_goes_on_after_a_prompt_that_is_too_long(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    lines = iter(["fox " * 100, "The fox"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, ""))
    assert len(run(replace(settings(checkpoint), interactive=True))) == 1
    assert "error: prompt (" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"method": "contrastive"}, {"beams": 4}, {"beams": 4, "groups": 2}])
def test_searching_finds_texts(checkpoint: Path, changes: dict):
    writer = WriterConfig(str(checkpoint), "The fox", device="cpu")
    texts = search.run(SearchConfig(writer, max_new_tokens=10, **changes))
    assert len(texts) == changes.get("beams", 1)
    assert all(texts)


def test_a_marked_text_is_found_by_the_script(checkpoint: Path):
    texts = [
        run(settings(checkpoint, watermark=delta, max_new_tokens=60, min_new_tokens=60))[0]
        for delta in (0.0, 9.0)
    ]
    z = [detect.run(DetectConfig(text, str(checkpoint)))[0].z for text in texts]
    assert z[1] > z[0]


def test_the_pictures_are_drawn(checkpoint: Path, tmp_path: Path):
    config = VisualizeConfig(str(checkpoint), "The fox", watermark_tokens=24, watermark_texts=2, out=tmp_path)
    found = visualize.run(config)
    assert found["top_k 10"] < found["repetition_penalty 1.3"] <= 1.001
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("settings.png", "watermark.png"))


def test_the_benchmark_measures(checkpoint: Path):
    config = BenchmarkConfig(
        str(checkpoint), 16, context=8, repeats=2, schemas=12, max_new_tokens=60, device="cpu"
    )
    found = benchmark.run(config)
    assert found["valid"] + found["refused"] == 12
    assert min(found["sampler"], found["step"], found["compile"], found["mask"]) > 0


def test_settings_survive_a_file(tmp_path: Path):
    (tmp_path / "saved.yaml").write_text(GenerateConfig(sampling=SamplingParams(top_k=7)).to_yaml())
    assert GenerateConfig.from_cli(["--config", str(tmp_path / "saved.yaml")]).sampling.top_k == 7
    found = GenerateConfig.from_cli(["--logit_bias", "5", "-2.5", "9", "1", "--stop", "a", "b"]).sampling
    assert (found.logit_bias, found.stop) == ({5: -2.5, 9: 1.0}, ["a", "b"])


def interact() -> None:
    run(
        GenerateConfig(
            WriterConfig("smollm2-135m"), SamplingParams(temperature=0.7, top_p=0.9), interactive=True
        )
    )


if __name__ == "__main__":
    run_validation(__file__, interact)
