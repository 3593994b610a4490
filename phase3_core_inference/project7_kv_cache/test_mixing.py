"""Checks of attention over a past. --interactive shows the scores of a query, with and without a bias."""

import pytest
import torch

from common.script import ask, run_validation
from phase3_core_inference.project7_kv_cache.mixing import length_bias, mix, mix_causally


def random_past(heads: int, kv_heads: int, T: int, S: int, dtype=torch.float64, B: int = 2):
    draw = torch.Generator().manual_seed(T * 1000 + S)
    shapes = (B, heads, T, 8), (B, kv_heads, S, 8), (B, kv_heads, S, 8)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def written_out(q, k, v, bias):
    """Softmax of the scores with a key head for each query head, in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT / q.shape[-1] ** 0.5
    scores[..., k.shape[2] - bias.shape[-1] :] += bias.double()
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("T", "S", "W"), [(1, 9, 9), (3, 9, 9), (3, 9, 3), (4, 4, 2)])
def test_heads_that_share_keys_get_what_heads_of_their_own_would(heads, kv_heads, T, S, W):
    q, k, v = random_past(heads, kv_heads, T, S)
    bias = torch.randn(2, 1, T, W, dtype=torch.float64)
    torch.testing.assert_close(mix(q, k, v, bias), written_out(q, k, v, bias), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("S", [100, 700])  # torch's kernel, and the formula
def test_in_16_bits_only_rounding_is_lost(S):
    q, k, v = random_past(4, 2, 1, S, torch.bfloat16)
    bias = length_bias(torch.tensor([S, S - 60]), S, torch.bfloat16)
    exact = written_out(q, k, v, bias)
    assert (mix(q, k, v, bias) - exact).abs().max() < 4 * 2.0**-8 * v.abs().max()
    assert (exact[1] - written_out(q, k, v, 0 * bias.nan_to_num(neginf=0))[1]).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 50), (50, 50), (50, 300), (300, 300), (129, 700)])
def test_the_newest_tokens_see_all_that_came_before_each(T, S, dtype):
    q, k, v = random_past(4, 2, T, S, dtype)
    future = torch.arange(S) > torch.arange(S - T, S)[:, None]
    bias = torch.zeros(T, S, dtype=torch.float64).masked_fill(future, float("-inf"))[None, None]
    tolerance = 1e-12 if dtype == torch.float64 else 4 * 2.0**-8 * v.abs().max()
    assert (mix_causally(q, k, v) - written_out(q, k, v, bias)).abs().max() < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "S"), [(50, 50), (50, 300)])
def test_a_gpu_puts_the_triangle_where_the_cpu_does(T, S):
    q, k, v = random_past(4, 2, T, S, torch.float32)
    on_gpu = mix_causally(q.cuda(), k.cuda(), v.cuda()).cpu()
    torch.testing.assert_close(on_gpu, mix_causally(q, k, v), atol=1e-4, rtol=1e-4)


def interact() -> None:
    """Show what the newest token takes from each of the last ones."""
    q, k, _ = random_past(1, 1, 1, 6, B=1)
    for line in ask("how many of six keys are there? "):
        bias = length_bias(torch.tensor([int(line)]), 6, torch.float64)
        weights = mix(q, k, torch.eye(6, 8, dtype=torch.float64)[None, None], bias)
        print("  " + " ".join(f"{weight:.2f}" for weight in weights[0, 0, 0, :6]))


if __name__ == "__main__":
    run_validation(__file__, interact)
