"""Checks of block-wise quantization and NF4, held to bitsandbytes. --interactive quantizes what you type."""

import math

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from common.script import ask, run_validation
from phase2_finetuning.project5_lora.blockwise import dequantize, dynamic_levels, quantize
from phase2_finetuning.project5_lora.nf4 import BLOCK, LEVELS, NF4, SCALE_BLOCK, SCALE_LEVELS

# QLoRA, Appendix E
PAPER = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
SHAPES = [(64, 64), (96, 128), (96, 160), (300, 578), (7, 9), (1, 1), (3, 64), (1, 65)]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def error(x: Tensor, levels: Tensor, block: int) -> Tensor:
    codes, scales = quantize(x, levels, block)
    return (dequantize(codes, scales, levels, block) - x).abs()


def unpack(packed: Tensor, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Dequantize by the definition.

    For rows that are no whole blocks the CPU kernel of bitsandbytes 0.50.2 takes scales of other blocks, and
    for odd ones it compiles for seconds; for (300, 578) and whole blocks it is compared with directly.
    """
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
    n = math.prod(shape)
    return (LEVELS[codes[:n]] * scales.repeat_interleave(BLOCK)[:n]).view(shape)


def test_the_levels_are_those_of_the_paper_to_the_bit():
    assert LEVELS.tolist() == PAPER


def test_each_level_but_the_outermost_serves_nearly_equally_many_normal_weights():
    borders = (LEVELS[1:] + LEVELS[:-1]).double() / 2 * -torch.special.ndtri(torch.tensor(1 - 0.9677083))
    mass = torch.special.ndtr(borders).diff()  # between the borders of the 14 inner levels
    assert mass.min() > 0.9 / 16
    assert mass.max() < 1.1 / 15


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_levels_equal_those_of_bitsandbytes(signed):
    assert torch.equal(dynamic_levels(signed), bnb.create_dynamic_map(signed))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_equal_those_of_bitsandbytes(signed):
    x = randn(70_001) if signed else randn(70_001).abs()
    levels = dynamic_levels(signed)
    codes, scales = quantize(x, levels, 256)
    # Given fp64, bitsandbytes compares with all 256 levels; its fp32 kernel for CPUs asks a table first.
    theirs, their_scales = torch.ops.bitsandbytes.quantize_blockwise(x.double(), levels, 256)
    assert torch.equal(codes, theirs)
    assert torch.equal(scales, their_scales)
    state = bnb.QuantState(scales, code=levels, blocksize=256, dtype=torch.float32)
    assert torch.equal(dequantize(codes, scales, levels, 256), bnb.dequantize_blockwise(codes, state))


def test_where_the_fast_kernel_of_bitsandbytes_disagrees_it_is_not_nearer():
    x, levels = randn(100_000).abs(), dynamic_levels(signed=False)
    codes, scales = quantize(x, levels, 256)
    theirs, _ = bnb.quantize_blockwise(x, levels.clone(), blocksize=256)
    differ = (codes != theirs).nonzero()[:, 0]
    ratios = x[differ].double() / scales[differ // 256]
    ours, other = ((levels[each[differ].long()] - ratios).abs() for each in (codes, theirs))
    assert 0 < len(differ) < 0.01 * len(x)
    assert (ours <= other + 1e-8).all()
    assert (other - ours).max() < 2**-14


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_bytes_and_weights_equal_those_of_bitsandbytes(shape):
    weight = randn(*shape)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    ours = NF4.quantize(weight, double=False)
    assert torch.equal(ours.packed, packed.flatten())
    assert torch.equal(ours.scales, state.absmax)
    assert torch.equal(ours.dequantize(), unpack(packed, state.absmax, shape))
    if shape[1] % BLOCK == 0:
        assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantization_equals_that_of_bitsandbytes(shape):
    weight = randn(*shape)
    ours = NF4.quantize(weight)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.packed, packed.flatten())
    assert torch.equal(ours.fine_scales, state.state2.absmax)
    assert ours.offset == state.offset
    scales = NF4.quantize(weight, double=False).scales
    if len(scales) > 1:  # a single scale is its own mean, and any code times 0 is 0
        exact, _ = torch.ops.bitsandbytes.quantize_blockwise(
            (scales - ours.offset).double(), SCALE_LEVELS, SCALE_BLOCK
        )
        assert torch.equal(ours.scales, exact)
        assert (ours.scales.int() - state.absmax.int()).abs().max() <= 1
    their_scales = bnb.dequantize_blockwise(ours.scales, state.state2) + state.offset
    assert torch.equal(ours.dequantize(), unpack(packed, their_scales, shape))


@pytest.mark.parametrize("double", [True, False])
def test_what_bitsandbytes_quantized_is_dequantized_to_the_same_weights(double):
    weight = randn(300, 578)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    parts = (state.absmax, state.state2.absmax, state.offset) if double else (state.absmax,)
    ours = NF4((300, 578), packed.flatten(), *parts)
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state))


def test_quantizing_again_changes_nothing():
    once = NF4.quantize(randn(50, 64), double=False)
    twice = NF4.quantize(once.dequantize(), double=False)
    assert torch.equal(once.packed, twice.packed)
    assert torch.equal(once.scales, twice.scales)


def test_the_largest_weight_of_each_block_and_zeros_survive_exactly():
    weight = randn(8, BLOCK)
    weight[:, :5] = 0
    weight[3] = 0  # a block of nothing else
    back = NF4.quantize(weight, double=False).dequantize()
    assert torch.equal(back[:, :5], weight[:, :5])
    assert torch.equal(back[3], weight[3])
    largest = weight.abs().argmax(dim=1, keepdim=True)
    assert torch.equal(back.gather(1, largest).abs(), weight.gather(1, largest).abs())


def test_the_scales_take_half_a_bit_per_weight_and_quantized_an_eighth():
    n = 1024 * BLOCK * SCALE_BLOCK // 256
    bits = {}
    for double in (True, False):
        tensors = NF4.quantize(randn(n), double).tensors().values()
        bits[double] = 8 * sum(t.numel() * t.element_size() for t in tensors) / n
    assert bits[False] == 4.5
    assert bits[True] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)  # 4.127, Sec. 3 of QLoRA


def test_normal_weights_lose_less_than_in_four_bit_integers_and_floats():
    weights = randn(2**18)
    floats = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    four_bits = {
        "nf4": LEVELS,
        "integers": torch.arange(-7, 8) / 7,
        "floats": torch.cat([-floats[1:].flip(0), floats]),
    }
    errors = {name: error(weights, levels, BLOCK).square().mean() for name, levels in four_bits.items()}
    assert errors["nf4"] < 0.80 * errors["integers"]
    assert errors["nf4"] < 0.80 * errors["floats"]


def test_an_outlier_spoils_its_own_block_only():
    x, even = randn(2**14), torch.linspace(-1, 1, 255)
    spoiled = x.clone()
    spoiled[777] = 400
    elsewhere = torch.arange(len(x)) // 256 != 777 // 256
    assert torch.equal(error(spoiled, even, 256)[elsewhere], error(x, even, 256)[elsewhere])
    assert error(spoiled, even, len(x))[elsewhere].mean() > 50 * error(x, even, 256)[elsewhere].mean()
    zero = even.abs().argmin()
    assert (quantize(spoiled, even, len(x))[0] == zero).float().mean() > 7 / 8


def test_dynamic_levels_keep_small_numbers_that_even_ones_lose():
    x = 10 ** (-5 * torch.rand(2**14, generator=torch.Generator().manual_seed(0)))
    x[0] = 1
    even = torch.linspace(0, 1, 256)
    dynamic = dynamic_levels(signed=False)
    relative = {
        name: (error(x, levels, len(x)) / x).mean() for name, levels in (("dynamic", dynamic), ("even", even))
    }
    assert relative["dynamic"] < 0.04
    assert relative["even"] > 0.4
    assert (quantize(x, even, len(x))[0] == 0).float().mean() > 0.4  # zeros now
    assert (quantize(x, dynamic, len(x))[0] > 0).all()


def test_a_number_halfway_between_two_levels_goes_to_the_lower_one():
    codes, _ = quantize(torch.tensor([1.0, 0.5, -0.5]), torch.tensor([-1.0, 0.0, 1.0]), 3)
    assert codes.tolist() == [2, 1, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_finite_number_is_refused(bad):
    weight = randn(4, 64)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="must be finite"):
        NF4.quantize(weight)


def interact() -> None:
    print("numbers that share one scale, such as: 0.1 -0.2 3")
    for line in ask("numbers> "):
        try:
            x = torch.tensor([float(word) for word in line.split()])
            codes, scales = quantize(x, LEVELS, max(len(x), 1))
        except ValueError as error:
            print(f"error: {error}")
            continue
        print("scale", f"{scales[0]:g}", " codes", *codes.tolist())
        print("back ", *(f"{value:.4g}" for value in dequantize(codes, scales, LEVELS, len(x)).tolist()))


if __name__ == "__main__":
    run_validation(__file__, interact)
