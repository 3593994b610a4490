"""Checks of attention. --interactive draws what the trained heads attend to in the text you type."""

import math
import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.script import ask, run_validation
from phase1_foundation.project1_minimal_gpt.attention import (
    CausalAttention,
    CausalSelfAttention,
    explicit_attention,
)
from phase1_foundation.project1_minimal_gpt.config import CHECKPOINT, GPTConfig
from phase1_foundation.project1_minimal_gpt.generate import load_gpt
from phase1_foundation.project1_minimal_gpt.model import GPT

SHAPE = (2, 3, 16, 8)  # B, H, T, D


def random_qkv(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(3)]


def small_gpt(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=24, vocab_size=31, n_layer=3, n_head=4, n_embd=32, **changes)).double()


class TinyCache:
    """A backend that remembers: the new tokens attend to themselves and to all that came in earlier calls."""

    def __init__(self) -> None:
        self.past: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0  # tokens seen in earlier calls

    def positions(self, tokens: Tensor) -> Tensor:
        first, self.length = self.length, self.length + tokens.shape[1]
        return torch.arange(first, self.length)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self.past:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.past[layer], (k, v), strict=True))
        self.past[layer] = k, v
        new, all_tokens = q.shape[2], k.shape[2]
        allowed = torch.ones(new, all_tokens, dtype=torch.bool).tril(all_tokens - new)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def test_attention_is_the_formula_token_by_token():
    q, k, v = random_qkv()
    mixed = explicit_attention(q, k, v)
    B, H, T, D = SHAPE
    for b, h, t in [(0, 0, 0), (0, 2, 7), (1, 1, T - 1)]:
        odds = [math.exp(float(q[b, h, t] @ k[b, h, s]) / math.sqrt(D)) for s in range(t + 1)]
        expected = sum(odd / sum(odds) * v[b, h, s] for s, odd in enumerate(odds))
        assert torch.allclose(mixed[b, h, t], expected, rtol=0, atol=1e-14 * T)  # sums of T terms below 10


def test_explicit_attention_equals_the_fused_kernel_with_its_gradients():
    results = []
    for kind in ("explicit", "sdpa"):
        inputs = [x.requires_grad_() for x in random_qkv()]
        mixed = CausalAttention(kind).attend(0, *inputs)
        mixed.square().sum().backward()
        results.append([mixed, *(x.grad for x in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_every_row_of_weights_sums_to_one_and_none_reaches_ahead():
    q, k, _ = random_qkv()
    T = SHAPE[2]
    weights = explicit_attention(q, k, torch.eye(T, dtype=q.dtype).expand(*SHAPE[:2], T, T))
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(SHAPE[:3], dtype=q.dtype))


@pytest.mark.parametrize("D", [16, 64, 256])
def test_the_spread_of_q_dot_k_grows_as_the_root_of_head_dim(D: int):
    draw = torch.Generator().manual_seed(D)
    q, k = (torch.randn(50_000, D, generator=draw) for _ in range(2))
    spread = (q * k).sum(dim=1).std()
    # The estimate of a spread from N numbers of kurtosis 3 + 6/D is off by sqrt((2 + 6/D) / 4N) of itself.
    bound = 5 * math.sqrt((2 + 6 / D) / (4 * 50_000))
    assert abs(spread / math.sqrt(D) - 1) < bound
    assert abs((q * D**-0.5 * k).sum(dim=1).std() - 1) < bound


def test_without_the_division_softmax_starts_near_one_hot_and_its_gradient_vanishes():
    D, T = 256, 64
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, 4, T, D, generator=draw) for _ in range(2))
    eye = torch.eye(T).expand(8, 4, T, T)
    last = {scale: explicit_attention(q * scale, k, eye)[..., -1, :] for scale in (1.0, math.sqrt(D))}
    largest = {scale: weights.max(dim=-1).values.mean() for scale, weights in last.items()}
    slope = {scale: (w * (1 - w)).sum(dim=-1).mean() for scale, w in last.items()}  # softmax's own, summed
    assert largest[1.0] < 0.2
    assert largest[math.sqrt(D)] > 0.8
    assert slope[math.sqrt(D)] < slope[1.0] / 3


def test_dropout_falls_on_the_weights_and_keeps_their_mean():
    q, k, v = random_qkv(shape=(1, 1, 8, 4))
    q, k, v = (x.expand(20_000, 1, 8, 4) for x in (q, k, v))
    torch.manual_seed(0)
    dropped = explicit_attention(q, k, v, dropout=0.25)
    whole = explicit_attention(q[:1], k[:1], v[:1])[0]
    off = (dropped.mean(dim=0) - whole).abs() / (dropped.std(dim=0) / math.sqrt(20_000))
    assert off.max() < 5  # in standard errors of a mean of 20,000
    alone = dropped[:, 0, 0] / v[0, 0, 0]  # token 0 attends only to itself: its weight is 0 or 1 / 0.75
    assert set(alone.round(decimals=9).unique().tolist()) == {0.0, round(1 / 0.75, 9)}


def test_one_matrix_for_all_heads_is_three_small_ones_per_head():
    torch.manual_seed(0)
    layer = CausalSelfAttention(GPTConfig(n_embd=12, n_head=3)).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    rows = layer.qkv.weight.view(3, 3, 4, 12)  # (q k v, head, D, C)
    offsets = layer.qkv.bias.view(3, 3, 4)
    heads = []
    for h in range(3):
        q, k, v = (x @ rows[part, h].T + offsets[part, h] for part in range(3))
        heads.append(explicit_attention(q, k, v))
    expected = torch.cat(heads, dim=-1) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x, explicit_attention), expected, rtol=1e-12, atol=1e-12)


def test_explicit_and_fused_models_and_one_with_a_backend_agree():
    tokens = torch.randint(31, (2, 24))
    explicit, fused = small_gpt(attention="explicit"), small_gpt(attention="sdpa")
    logits = explicit(tokens)
    torch.testing.assert_close(fused(tokens), logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(explicit(tokens, CausalAttention("sdpa")), logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(explicit(tokens, TinyCache()), logits, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_cache_fed_in_chunks_of_any_sizes_gives_the_logits_of_the_whole(seed: int):
    choice = random.Random(seed)
    model = small_gpt()
    tokens = torch.tensor([[choice.randrange(31) for _ in range(24)] for _ in range(2)])
    cuts = [0, *sorted(choice.sample(range(1, 24), choice.randrange(24))), 24]
    cache = TinyCache()
    with torch.no_grad():
        chunks = [model(tokens[:, a:b], cache) for a, b in pairwise(cuts)]
        torch.testing.assert_close(torch.cat(chunks, dim=1), model(tokens), rtol=1e-10, atol=1e-12)


def interact() -> None:
    """Show, for the last character of the typed text, where each head of the last layer looks."""
    from phase1_foundation.project1_minimal_gpt.visualize import attention_weights

    model, tokenizer = load_gpt(CHECKPOINT)
    for text in ask("text> "):
        ids = tokenizer.encode(text)[-model.config.block_size :]
        for head, weights in enumerate(attention_weights(model, ids)[-1, :, -1], start=1):
            best = weights.topk(min(5, len(ids)))
            looks = [f"{tokenizer.decode([ids[i]])!r} at {i} {w:.0%}" for w, i in zip(*best, strict=True)]
            print(f"head {head}: {', '.join(looks)}")


if __name__ == "__main__":
    run_validation(__file__, interact)
