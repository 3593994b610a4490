"""Checks of prefill, decode and generate. --interactive completes what you type, several lines at once."""

import shutil
from typing import Any

import pytest
import torch

from common.files import DATA
from common.script import ask, run_validation
from phase1_foundation.project3_pretrain.benchmark import hugging_face
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.families import parts_of
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model
from phase3_core_inference.project7_kv_cache import decoding as module
from phase3_core_inference.project7_kv_cache.conftest import LONGEST, SHAPES, V, small_decoder
from phase3_core_inference.project7_kv_cache.decoding import Decoding, generate, make_step, prefill
from phase3_core_inference.project7_kv_cache.slots import SlotCache

PROMPTS = [[3], [1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]]


def twin(model: Decoder) -> Any:
    """transformers' model with our weights."""
    theirs = hugging_face(model.config).to(model.head.weight.dtype).eval()
    weights = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parts in parts_of(model.config, "hf"):
            rows = model.get_parameter(name).split([part.rows for part in parts])
            for part, piece in zip(parts, rows, strict=True):
                weights[part.name].copy_(part.back(piece))
    return theirs


def their_tokens(theirs: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy tokens of transformers, prompts filled up on the left."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    how = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new}
    return theirs.generate(tokens, attention_mask=mask, **how)[:, longest:].tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_transformers(shape):
    model = small_decoder(SHAPES[shape]).float()
    theirs = twin(model)
    for prompts in ([PROMPTS[0]], [PROMPTS[2]], PROMPTS):
        ours = generate(model, prompts, 20)
        assert ours == their_tokens(theirs, prompts, 20)
    assert len({tuple(row) for row in ours}) == 3  # or any answer would do


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_prompts_may_be_cut_anywhere(model: Decoder, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    cache = SlotCache(model.config, 4, LONGEST, torch.float64)
    prefill(model, cache, [(2, [7, 7])])
    logits = prefill(model, cache, [(3, PROMPTS[1]), (2, PROMPTS[2]), (0, PROMPTS[0])])
    for row, text in zip(logits, (PROMPTS[1], [7, 7, *PROMPTS[2]], PROMPTS[0]), strict=True):
        torch.testing.assert_close(row, model(torch.tensor([text]))[0, -1], atol=1e-11, rtol=1e-11)
    assert cache.lengths == [1, 0, 14, 5]


def test_each_text_of_a_batch_is_written_as_alone(model: Decoder):
    together = generate(model, PROMPTS, 12)
    assert together == [generate(model, [prompt], 12)[0] for prompt in PROMPTS]


def test_a_text_ends_before_its_stop_token_and_the_others_go_on(llama):
    full = generate(llama, PROMPTS, 12)
    stop = {full[0][4], full[1][7]}
    ends = [next((place for place, token in enumerate(row) if token in stop), 12) for row in full]
    assert generate(llama, PROMPTS, 12, stop=stop) == [row[:end] for row, end in zip(full, ends, strict=True)]
    assert min(ends) < max(ends)


def test_a_seed_gives_the_same_text_again_and_another_one_another(llama):
    how = {"temperature": 1.5, "top_k": 20, "top_p": 0.95}
    one, again, other = (generate(llama, PROMPTS, 12, seed=seed, **how) for seed in (1, 1, 2))
    assert one == again != other


def test_a_decoding_serves_one_text_after_another(llama):
    decoding = Decoding(llama, 3, LONGEST)
    for prompts in (PROMPTS, PROMPTS[::-1]):
        rows = list(zip(*decoding.write(prompts, 8), strict=True))
        assert [list(row) for row in rows] == generate(llama, prompts, 8)


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 1, r"slots \(0\) must be at least 1"),
        ([[1], []], 1, r"prompt \(0 tokens\) of slot 1 must have at least 1 token"),
        ([[1] * 30], 12, r"length \(41\) must be at most block_size \(40\)"),
    ],
)
def test_what_cannot_be_written_is_refused(llama, prompts, new, message):
    with pytest.raises(ValueError, match=message):
        generate(llama, prompts, new)


def test_a_decoding_refuses_what_does_not_fit(llama):
    decoding = Decoding(llama, 2, 10)
    with pytest.raises(ValueError, match=r"prompts \(1\) must be as many as slots \(2\)"):
        next(decoding.write([[1]], 2))
    with pytest.raises(ValueError, match=r"prompt and new tokens \(11\) must be at most length \(10\)"):
        next(decoding.write([[1], [2] * 10], 2))
    with pytest.raises(ValueError, match=r"device \(cpu\) must be cuda to record a step"):
        make_step(llama, decoding.memory, "recorded")


def test_a_compiled_step_asks_for_a_compiler(llama, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"step \(compiled\) must have a C\+\+ compiler"):
        Decoding(llama, 1, 10, "compiled")


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["grouped queries", "gpt2"])
def test_a_compiled_step_writes_what_an_eager_one_does(shape):
    model = small_decoder(SHAPES[shape]).float()
    other = (
        Decoder(model.config).eval().requires_grad_(False)
    )  # what was compiled for one must not serve both
    pairs = [[Decoding(each, 3, LONGEST, how) for how in ("compiled", "eager")] for each in (model, other)]
    for prompts in (PROMPTS, PROMPTS[::-1]):
        for compiled, eager in pairs:
            assert list(compiled.write(prompts, 20)) == list(eager.write(prompts, 20))


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "SmolLM2-135M-Instruct.Q4_1.gguf").is_file(), reason="SmolLM2 is not in data/"
)
def test_smollm2_writes_what_transformers_writes():
    model, tokenizer = load_model("smollm2-135m")
    prompts = [
        tokenizer.encode(text) for text in ("The capital of France is", "def area(width, height):\n", "1, 2,")
    ]
    assert generate(model, prompts, 40) == their_tokens(twin(model), prompts, 40)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["grouped queries", "gpt2"])
def test_a_recorded_step_writes_what_an_eager_one_does(shape):
    model = small_decoder(SHAPES[shape]).float().cuda()
    recorded, eager = (Decoding(model, 3, LONGEST, how) for how in ("recorded", "eager"))
    for prompts in (PROMPTS, PROMPTS[::-1]):
        assert list(recorded.write(prompts, 20)) == list(eager.write(prompts, 20))


@pytest.mark.gpu
def test_a_recording_is_made_anew_where_attention_looks_further():
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocab_size=V, block_size=400, n_layer=2, n_head=2, n_embd=32)).cuda().eval()
    recorded, eager = (Decoding(model, 2, 400, how) for how in ("recorded", "eager"))
    assert list(recorded.write(PROMPTS[:2], 300)) == list(eager.write(PROMPTS[:2], 300))
    assert sorted(recorded.step.recordings) == [128, 256, 400]


def interact() -> None:
    """Complete lines with SmolLM2, all at once."""
    model, tokenizer = load_model("smollm2-135m")
    print("texts, divided by |")
    for line in ask("texts> "):
        texts = [text.strip() for text in line.split("|")]
        for text, ids in zip(
            texts, generate(model, [tokenizer.encode(text) for text in texts], 20), strict=True
        ):
            print(f"  {text}{tokenizer.decode(ids)}")


if __name__ == "__main__":
    run_validation(__file__, interact)
