"""Checks of the ledger: what is predicted from shapes is what is measured."""

import weakref
from dataclasses import fields, replace

import pytest
import torch

from common.script import run_validation
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.loss import Batch
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project5_lora.ledger import (
    WAYS,
    Ledger,
    Way,
    adam_bytes,
    kept_numbers,
    nf4_bytes,
    predict,
    prepare,
)
from phase2_finetuning.project5_lora.meter import Meter, measure, size
from phase2_finetuning.project5_lora.nf4 import NF4

LLAMA = DecoderConfig(vocab_size=300, block_size=128, n_layer=2, n_embd=96, n_head=6, n_kv_head=2)
GPT2 = DecoderConfig.gpt2(vocab_size=300, block_size=128, n_layer=2, n_head=4, n_embd=96)


def compare(config: DecoderConfig, way: Way, B: int, T: int) -> tuple[Ledger, Ledger, int]:
    torch.manual_seed(0)
    model = Decoder(config)
    optimizer = prepare(model, way)
    tokens = torch.randint(config.vocab_size, (B, T))
    return predict(config, way, B, T), *measure(model, optimizer, Batch(tokens, tokens.clone()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_each_column_is_predicted_within_one_percent(config, way):
    predicted, measured, peak = compare(config, WAYS[way], 2, 100)
    for column in fields(Ledger):
        expected = getattr(measured, column.name)
        assert getattr(predicted, column.name) == pytest.approx(expected, rel=0.01), column.name
    assert measured.total <= peak


@pytest.mark.parametrize("config", [LLAMA, replace(LLAMA, tied=False), GPT2], ids=["llama", "untied", "gpt2"])
@pytest.mark.parametrize(("B", "T"), [(1, 100), (1, 64), (3, 31)])
def test_activations_of_any_batch_are_predicted_within_one_percent(config, B, T):
    predicted, measured, _ = compare(config, WAYS["LoRA"], B, T)
    assert predicted.activations == pytest.approx(measured.activations, rel=0.01)
    assert predicted.weights == pytest.approx(measured.weights, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_smollm2s_memory_is_predicted_within_ten_percent(way):
    predicted, measured, peak = compare(DecoderConfig.llama(block_size=512), WAYS[way], 2, 64)
    for column in fields(Ledger):
        expected = getattr(measured, column.name)
        assert getattr(predicted, column.name) == pytest.approx(expected, rel=0.1), column.name
    assert predicted.total == pytest.approx(peak, rel=0.3)


def test_in_full_fine_tuning_adam_takes_twice_what_gradients_take():
    full = predict(LLAMA, WAYS["full"], 2, 100)
    assert full.optimizer == 2 * full.gradients
    lora, qlora = (predict(LLAMA, WAYS[name], 2, 100) for name in ("LoRA", "QLoRA"))
    assert lora.gradients + lora.optimizer < 0.2 * (full.gradients + full.optimizer)
    assert qlora.weights < 0.5 * lora.weights
    assert qlora.activations == lora.activations  # which 4 bits do not shrink


def test_activations_grow_with_the_batch_and_faster_than_the_length():
    one = kept_numbers(LLAMA, 2, 64, frozen=True)
    rotations = 2 * 64 * LLAMA.head_width
    assert kept_numbers(LLAMA, 4, 64, frozen=True) - rotations == 2 * (one - rotations)
    assert kept_numbers(LLAMA, 2, 128, frozen=True) > 2 * one


@pytest.mark.parametrize("n", [1, 63, 64, 65, 64 * 256 + 1, 96 * 160])
def test_bytes_of_nf4_are_those_of_its_tensors(n):
    assert nf4_bytes(n) == size(NF4.quantize(torch.randn(n)).tensors().values())


def test_eight_bits_take_a_quarter_of_the_optimizers_memory():
    assert adam_bytes(10**6, True) / adam_bytes(10**6, False) == pytest.approx(2.03125 / 8, rel=1e-3)
    assert adam_bytes(100, True) == adam_bytes(100, False)


def test_the_meter_counts_what_is_made_and_what_goes():
    with Meter() as meter:
        a = torch.zeros(1000)
        b = a + 1
        view = b[:10]
        assert (meter.now, meter.peak) == (8000, 8000)
        del b  # the view still needs it
        assert meter.now == 8000
        del view
        assert (meter.now, meter.peak) == (4000, 8000)
        a.add_(1)
        assert meter.now == 4000


def test_the_meter_counts_what_only_autograd_holds():
    x = torch.zeros(1000, requires_grad=True)
    with Meter(x) as meter:
        y = x.exp().exp().sum()
        assert meter.now == 3 * 4000 + 4  # x and both results, which the backward pass needs
        y.backward()
        assert meter.now == 2 * 4000 + 4  # x, its gradient, and the sum


def test_the_meter_agrees_with_saved_tensors_hooks():
    model, saved = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 8)), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(50, 64)
    weights = list(model.parameters())
    with Meter(x, *weights) as meter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        before = meter.now
        loss = model(x).sum()
    known = {t.untyped_storage().data_ptr() for t in (x, *weights)}
    assert sum(size for pointer, size in saved.items() if pointer not in known) == meter.now - before - 4
    loss.backward()


def test_the_meter_keeps_nothing_alive():
    with Meter():
        x = torch.zeros(10)
        gone = weakref.ref(x)
        del x
        assert gone() is None


def test_what_the_formulas_do_not_cover_is_refused():
    with pytest.raises(ValueError, match=r"rank \(0\) must be at least 1 with four_bits"):
        predict(LLAMA, Way(four_bits=True), 1, 8)
    with pytest.raises(ValueError, match=r"T \(200\) must be at least 1 and at most 128"):
        predict(LLAMA, WAYS["full"], 1, 200)
    with pytest.raises(ValueError, match=r"B \(0\) must be at least 1"):
        predict(LLAMA, WAYS["full"], 0, 8)
    for name, value in (("dropout", 0.1), ("qk_norm", True), ("checkpointing", True)):
        with pytest.raises(ValueError, match=rf"{name} \({value}\) must be off"):
            predict(replace(LLAMA, **{name: value}), WAYS["full"], 1, 8)


if __name__ == "__main__":
    run_validation(__file__)
