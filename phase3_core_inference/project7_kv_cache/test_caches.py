"""Checks that each cache gives the logits of its own definition without a cache, however the tokens come."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.script import ask, run_validation
from phase1_foundation.project1_minimal_gpt.attention import AttentionBackend
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.generate import GrowingCache
from phase1_foundation.project3_pretrain.layers import rotate
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project7_kv_cache.conftest import LONGEST, SHAPES, V, small_decoder
from phase3_core_inference.project7_kv_cache.heavy_hitter import HeavyHitterCache
from phase3_core_inference.project7_kv_cache.quantized import Codes, QuantizedCache, pack, unpack
from phase3_core_inference.project7_kv_cache.ring import RingCache
from phase3_core_inference.project7_kv_cache.slots import SlotCache
from phase3_core_inference.project7_kv_cache.static import StaticCache

TEXT = torch.randint(V, (2, LONGEST), generator=torch.Generator().manual_seed(1))
cuts = st.lists(st.sampled_from([1, 1, 1, 2, 3, 5, 8, 13, 21, LONGEST]), min_size=LONGEST).map(
    lambda sizes: [
        size for size, end in zip(sizes, torch.tensor(sizes).cumsum(0), strict=True) if end <= LONGEST
    ]
)  # the sizes of pieces that are at most LONGEST together


class Reference:
    """Attention without a cache: look(t, q, k, v) gives the scores (B, H, t + 1) of query t, and values."""

    def __init__(self, look: Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.look = look

    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        mixed = []
        for t in range(q.shape[2]):
            scores, values = self.look(t, q[:, :, t], k[:, :, : t + 1], v[:, :, : t + 1])
            mixed.append(torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), values))
        return torch.stack(mixed, dim=2)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhd,bhsd->bhs", q, k) / q.shape[-1] ** 0.5


def check(
    model: Decoder, cache: AttentionBackend, reference: AttentionBackend | None, sizes: list[int]
) -> None:
    """The logits of all pieces equal those of the whole text at once, to rounding."""
    text = TEXT[:, : sum(sizes)]
    parts = [model(piece, cache) for piece in text.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(text, reference), atol=1e-11, rtol=1e-11)


class Reserving:
    """A StaticCache whose room is reserved as pieces come, as a loop that decodes would do."""

    def __init__(self, config: DecoderConfig) -> None:
        self.cache = StaticCache(SlotCache(config, 2, LONGEST, torch.float64))
        self.attend = self.cache.attend

    def positions(self, tokens: Tensor) -> Tensor:
        self.cache.reserve(tokens.shape[1])
        return self.cache.positions(tokens)


# Caches that forget nothing


@pytest.mark.parametrize("make", [lambda config: GrowingCache(), Reserving])
@pytest.mark.parametrize("sizes", [[LONGEST], [1] * 20, [7, 1, 1, 9, 1, 21]])
def test_a_full_cache_changes_no_logit(model: Decoder, make, sizes):
    check(model, make(model.config), None, sizes)


@settings(max_examples=12, deadline=None)
@given(cuts)
def test_a_static_cache_changes_no_logit_however_tokens_come(llama, sizes):
    check(llama, Reserving(llama.config), None, sizes)


def test_a_static_cache_goes_on_where_prompts_of_unequal_length_end(model: Decoder):
    memory = SlotCache(model.config, 2, LONGEST, torch.float64)
    lengths = [3, 17]
    memory.plan(list(enumerate(lengths)))
    model(torch.cat([TEXT[row, :length] for row, length in enumerate(lengths)])[None], memory)
    cache = StaticCache(memory)
    for _ in range(3):
        cache.reserve()
        new = torch.stack([TEXT[row, length : length + 1] for row, length in enumerate(lengths)])
        logits = model(new, cache)[:, -1]
        lengths = [length + 1 for length in lengths]
        for row, length in enumerate(lengths):
            torch.testing.assert_close(
                logits[row], model(TEXT[row : row + 1, :length])[0, -1], atol=1e-11, rtol=1e-11
            )
    assert memory.lengths == cache.lengths.tolist() == lengths


def test_a_recorded_step_looks_at_powers_of_two_and_what_does_not_fit_is_refused():
    config = DecoderConfig(vocab_size=V, block_size=600, n_layer=1, n_head=2, n_embd=8)
    cache = StaticCache(SlotCache(config, 1, 600))
    cache.on_cpu = False  # as if it were a GPU's
    extents = [cache.reserve(tokens) for tokens in (1, 127, 1, 300, 171)]
    assert extents == [128, 128, 256, 512, 600]
    with pytest.raises(ValueError, match=r"tokens \(601\) must be at most length \(600\)"):
        cache.reserve()
    assert cache.memory.lengths == [600]


# Ring


def windowed(window: int, sinks: int) -> Reference:
    """The first `sinks` and the newest `window` tokens; the sinks as near as they are in the cache."""

    def look(t: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(t + 1)
        scores = scores_of(q, k)
        if t >= window + sinks and sinks and look_config.positions == "rope":
            away = t - (window + sinks - 1)  # so much nearer are they than in the text
            half = q.shape[-1] // 2
            angle = away * look_config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
            cos, sin = angle.cos().repeat(2)[None, None], torch.cat([-angle.sin(), angle.sin()])[None, None]
            near = rotate(k[:, :, :sinks].transpose(1, 2), (cos, sin)).transpose(1, 2)
            scores = torch.cat([scores_of(q, near), scores[:, :, sinks:]], dim=-1)
        seen = (place > t - window) | (place < sinks)
        return scores.masked_fill(~seen, float("-inf")), v

    return Reference(look)


look_config = SHAPES["grouped queries"]


@pytest.mark.parametrize("sizes", [[LONGEST], [1] * LONGEST, [7, 1, 1, 9, 1, 21]])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 0), (5, 2), (9, 4), (30, 9), (39, 0)])
def test_a_ring_is_a_windowed_mask(llama, window, sinks, sizes):
    check(llama, RingCache(llama.config, window, sinks), windowed(window, sinks), sizes)


@settings(max_examples=15, deadline=None)
@given(cuts, st.integers(1, 20), st.integers(0, 6))
def test_a_ring_is_a_windowed_mask_however_tokens_come(llama, sizes, window, sinks):
    check(llama, RingCache(llama.config, window, sinks), windowed(window, sinks), sizes)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.sampled_from([1, 1, 2, 7, 19]), min_size=30, max_size=60),
    st.integers(1, 15),
    st.integers(0, 4),
)
def test_a_stream_goes_on_beyond_the_longest_context(llama, sizes, window, sinks):
    total = sum(sizes)
    wide = Decoder(DecoderConfig(**vars(llama.config) | {"block_size": total})).double()
    wide.load_state_dict(llama.state_dict())
    text = TEXT[:1].repeat(1, total // LONGEST + 1)[:, :total]
    cache = RingCache(llama.config, window, sinks)
    parts = [llama(piece, cache) for piece in text.split(sizes, dim=1)]
    torch.testing.assert_close(
        torch.cat(parts, dim=1), wide(text, windowed(window, sinks)), atol=1e-9, rtol=1e-9
    )


def test_learned_positions_end_at_the_longest_context():
    model = small_decoder(SHAPES["gpt2"])
    cache = RingCache(model.config, 8)
    check(model, cache, windowed(8, 0), [30, 10])
    with pytest.raises(ValueError, match=r"tokens \(1\) must be at most 0 at once: block_size is 40"):
        model(TEXT[:, :1], cache)


def test_a_ring_takes_the_memory_of_its_window_however_long_the_text(llama):
    cache = RingCache(llama.config, 6, 2)
    for _ in range(90):
        llama(TEXT[:, :1], cache)
    assert cache.length == 90
    assert {tensor.shape for pair in cache.past.values() for tensor in pair} == {(2, 2, 8, 8)}


# Quantized


def rounded(bits: int, group: int, residual: int) -> Reference:
    """Keys and values rounded one group after another, as far as the query finds them in codes."""

    def nearest(x: Tensor) -> Tensor:  # one group: (B, H, numbers)
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        return (low + ((x - low) / scale).round() * scale).where(scale > 0, x)

    def look(t: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v, done = k.clone(), v.clone(), max(0, t + 1 - residual) // group * group
        for begin in range(0, done, group):
            for channel in range(k.shape[-1]):
                k[:, :, begin : begin + group, channel] = nearest(k[:, :, begin : begin + group, channel])
        for token in range(done):
            v[:, :, token] = nearest(v[:, :, token])
        return scores_of(q, k), v

    return Reference(look)


@pytest.mark.parametrize("sizes", [[LONGEST], [1] * LONGEST, [7, 1, 1, 9, 1, 21]])
@pytest.mark.parametrize(("bits", "group", "residual"), [(8, 4, 4), (4, 8, 3), (2, 3, 1), (4, 1, 50)])
def test_a_quantized_cache_attends_to_rounded_numbers(llama, bits, group, residual, sizes):
    cache = QuantizedCache(llama.config, bits, group, residual)
    check(llama, cache, rounded(bits, group, residual), sizes)


@settings(max_examples=8, deadline=None)
@given(cuts, st.sampled_from([8, 4, 2]), st.integers(1, 9), st.integers(1, 9))
def test_a_quantized_cache_does_not_care_how_tokens_come(llama, sizes, bits, group, residual):
    cache = QuantizedCache(llama.config, bits, group, residual)
    check(llama, cache, rounded(bits, group, residual), sizes)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([8, 4, 2]),
    st.integers(0, 10_000),
    st.sampled_from([1e-3, 1.0, 300.0]),
    st.sampled_from([0.0, 7.0]),
)
def test_no_number_is_off_by_more_than_half_a_scale(bits, seed, size, shift):
    x = torch.randn(2, 3, 5, 8, 16, generator=torch.Generator().manual_seed(seed)) * size + shift * size
    for dtype, lost in ((torch.float64, 2.0**-52), (torch.float32, 2.0**-11)):  # what storing a number loses
        numbers = x.to(dtype)
        for dim in (-1, -2):
            codes = Codes.of(numbers, bits, dim)
            low, high = numbers.amin(dim, keepdim=True), numbers.amax(dim, keepdim=True)
            ends = lost * (low.abs() + high - low) + 2.0**-24 * 2**bits  # scale and zero are rounded
            bound = codes.scale.to(dtype) / 2 + 1.01 * ends
            error = (codes.numbers(dtype) - numbers).abs()
            assert (error <= bound).all()
            assert error.max() > 0.3 * codes.scale.max()  # the bound is no loose one


def test_the_error_of_attention_is_bounded_as_derived(llama):
    """README: |o' - o| <= (e^(2 eps) - 1) max |v| + max |v' - v|, eps the largest error of a score."""
    torch.manual_seed(0)
    S, D = 64, llama.config.head_width
    q, k, v = (torch.randn(1, heads, S, D, dtype=torch.float64) for heads in (4, 2, 2))
    exact, gap = GrowingCache(), {}
    for bits in (8, 4, 2):
        cache = QuantizedCache(llama.config, bits, group=8, residual=8)
        exact.past.clear()
        for backend in (exact, cache):
            backend.length = S
        full, less = exact.attend(0, q, k, v)[:, :, -1], cache.attend(0, q, k, v)[:, :, -1]  # the last token
        keys, values = cache.codes[0]
        n = cache.in_codes(S)
        half = (
            (keys.scale / 2).expand(-1, -1, -1, 8, -1).flatten(2, 3).repeat_interleave(2, 1)
        )  # (1, H, n, D)
        eps = (q[:, :, -1:].abs() * half).sum(-1).amax(-1) / D**0.5  # (1, H)
        off = (
            (values.numbers(torch.float64).flatten(2, 3) - v[:, :, :n]).abs().amax(2).repeat_interleave(2, 1)
        )
        bound = torch.expm1(2 * eps)[..., None] * v.abs().amax(2).repeat_interleave(2, 1) + off
        assert ((less - full).abs() <= bound).all()
        gap[bits] = (less - full).abs().max()
    assert 0 < 8 * gap[8] < gap[4] < gap[2]


@given(st.sampled_from([8, 4, 2]), st.integers(0, 1000))
def test_codes_come_back_out_of_their_bytes(bits, seed):
    codes = torch.randint(2**bits, (3, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (3, 16 * bits // 8)
    assert unpack(packed, bits).equal(codes)


def test_numbers_that_are_all_alike_come_back_as_they_are():
    x = torch.full((1, 1, 1, 4, 8), 0.3, dtype=torch.float64)
    assert Codes.of(x, 4, -1).numbers(torch.float64).equal(x)


# Heavy hitters


class Greedy(Reference):
    """[H2O, Algorithm 1] on full attention: each head forgets a token by no longer seeing it."""

    def __init__(self, config: DecoderConfig, budget: int) -> None:
        super().__init__(self.remember)
        self.config, self.budget = config, budget

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.kept = [[[] for _ in range(k.shape[1])] for _ in range(q.shape[0])]
        self.drawn = torch.zeros(q.shape[0], k.shape[1], q.shape[2], dtype=torch.float64)
        return super().attend(layer, q, k, v)

    def remember(self, t: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores, group = scores_of(q, k), q.shape[1] // len(self.kept[0])
        for b, heads in enumerate(self.kept):
            for head, kept in enumerate(heads):
                if len(kept) > self.budget:
                    newest = self.budget - self.budget // 2
                    kept.remove(min(kept[:-newest], key=lambda s: self.drawn[b, head, s].item()))
                kept.append(t)
                for h in range(head * group, (head + 1) * group):
                    gone = torch.ones(t + 1, dtype=torch.bool)
                    gone[kept] = False
                    scores[b, h, gone] = float("-inf")
                    self.drawn[b, head, : t + 1] += scores[b, h].softmax(-1)
        return scores, v


@pytest.mark.parametrize("sizes", [[LONGEST], [1] * LONGEST, [7, 1, 1, 9, 1, 21]])
@pytest.mark.parametrize("budget", [2, 7, 16])
def test_heavy_hitters_are_kept_as_the_rule_says(llama, budget, sizes):
    check(llama, HeavyHitterCache(llama.config, budget), Greedy(llama.config, budget), sizes)


def test_a_budget_for_all_tokens_forgets_none(model: Decoder):
    check(model, HeavyHitterCache(model.config, LONGEST), None, [9, 1, 1, 20])


# Misuse


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: RingCache(c, 0), r"window \(0\) must be at least 1"),
        (
            lambda c: RingCache(c, 30, 10),
            r"sinks \(10\) must be at least 0 and below block_size - window \(10\)",
        ),
        (lambda c: QuantizedCache(c, 3), r"bits \(3\) must be one of 8, 4, 2"),
        (lambda c: QuantizedCache(c, 4, group=0), r"group \(0\) must be at least 1"),
        (lambda c: QuantizedCache(c, 4, residual=0), r"residual \(0\) must be at least 1"),
        (lambda c: HeavyHitterCache(c, 1), r"budget \(1\) must be at least 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(SHAPES["grouped queries"])


def interact() -> None:
    """Show which tokens a ring remembers."""
    cache = RingCache(SHAPES["grouped queries"], window=6, sinks=2)
    print(
        "a window of 6 and 2 sinks; type how many tokens come next, and see where each remembered one is kept"
    )
    for line in ask("tokens> "):
        try:
            cache.positions(torch.zeros(1, int(line)))
        except ValueError as error:
            print(f"error: {error}")
            continue
        print("  " + " ".join(str(place) for place in cache._places(cache.length).tolist()))


if __name__ == "__main__":
    run_validation(__file__, interact)
