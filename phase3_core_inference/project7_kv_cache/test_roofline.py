"""Checks that predicted bytes and operations are those that caches hold and models compute."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.script import ask, run_validation
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.generate import GrowingCache
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project7_kv_cache.conftest import SHAPES, V
from phase3_core_inference.project7_kv_cache.generate import remembered_bytes
from phase3_core_inference.project7_kv_cache.quantized import QuantizedCache
from phase3_core_inference.project7_kv_cache.ring import RingCache
from phase3_core_inference.project7_kv_cache.roofline import (
    Machine,
    Work,
    cache_bytes,
    decode_work,
    measure_machine,
    prefill_work,
    quantized_bytes,
    weight_count,
)
from phase3_core_inference.project7_kv_cache.slots import SlotCache


@pytest.mark.parametrize("shape", SHAPES)
def test_caches_hold_as_many_bytes_as_predicted(shape):
    config = SHAPES[shape]
    model = Decoder(config).bfloat16().eval()
    text = torch.randint(V, (1, 37))
    growing, ring = GrowingCache(), RingCache(config, 8, 2)
    for cache in (growing, ring):
        model(text, cache)
    assert remembered_bytes(growing) == cache_bytes(config, 37)
    assert remembered_bytes(ring) == cache_bytes(config, 10)
    assert remembered_bytes(SlotCache(config, 3, 20)) == 3 * cache_bytes(config, 20, 4)
    for bits in (8, 4, 2):
        quantized = QuantizedCache(config, bits, group=4, residual=7)
        model(text, quantized)
        assert remembered_bytes(quantized) == quantized_bytes(config, 37, bits, 4, 7)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_matrices_but_the_embeddings_are_counted(shape):
    model = Decoder(SHAPES[shape])
    matrices = [weight for name, weight in model.named_parameters() if weight.dim() == 2]
    tables = [
        table.weight for table in (model.token_embedding, model.position_embedding) if table is not None
    ]
    assert weight_count(model.config) == sum(
        matrix.numel() for matrix in matrices if not any(matrix is table for table in tables)
    ) + (model.head.weight.numel() if model.config.tied else 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_computes_as_many_operations_as_predicted(shape):
    model = Decoder(SHAPES[shape]).double().eval()
    cache = GrowingCache()
    model(torch.randint(V, (1, 20)), cache)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(V, (1, 1)), cache)
    assert counter.get_total_flops() == pytest.approx(decode_work(model.config, [21]).operations, rel=1e-12)


def test_smollm2s_numbers_are_those_of_the_readme():
    config = DecoderConfig.llama()
    assert cache_bytes(config, 1) == 23_040
    assert weight_count(config) * 2 == 268_959_744
    assert decode_work(config, [512]).intensity == pytest.approx(1.08, abs=0.01)
    assert 500 < prefill_work(config, 1000).intensity < 1000
    share = quantized_bytes(config, 3232, 4, 32, 32) / cache_bytes(config, 3232)
    assert share == pytest.approx(0.30, abs=0.01)


def test_the_lower_roof_counts():
    machine = Machine(bandwidth=10.0, rate=1000.0)
    assert machine.ridge == 100
    assert machine.seconds(Work(50, 100)) == 5
    assert machine.seconds(Work(1, 10_000)) == 10


def test_a_machine_can_be_measured():
    machine = measure_machine(torch.device("cpu"), torch.float32, megabytes=8)
    assert 1e8 < machine.bandwidth < 1e13
    assert machine.rate > 1e8


def interact() -> None:
    """Say what a context of SmolLM2 takes."""
    config = DecoderConfig.llama()
    for line in ask("context> "):
        tokens = int(line)
        coded = quantized_bytes(config, tokens, 4, 32, 32) / 1e6
        reads = decode_work(config, [tokens]).bytes / 1e6
        print(f"  cache {cache_bytes(config, tokens) / 1e6:.1f} MB, in 4 bits {coded:.1f} MB")
        print(f"  a step reads {reads:.0f} MB")


if __name__ == "__main__":
    run_validation(__file__, interact)
