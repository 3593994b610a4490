"""Checks of the Decoder and its parts. --interactive shows how SmolLM2 bets on the token after your text."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.script import ask, run_validation
from phase1_foundation.project3_pretrain import cpu_kernels
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.cpu_kernels import Linear, blocked_attention, rms_norm
from phase1_foundation.project3_pretrain.families import config_to_hf, parts_of
from phase1_foundation.project3_pretrain.generate import GrowingCache
from phase1_foundation.project3_pretrain.layers import (
    DocumentAttention,
    GroupedCausalAttention,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
    rotate,
)
from phase1_foundation.project3_pretrain.model import Decoder

V, T = 53, 24
GPT2 = DecoderConfig.gpt2(vocab_size=V, block_size=T, n_layer=3, n_head=4, n_embd=32)
LLAMA = DecoderConfig.llama(
    vocab_size=V, block_size=T, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, mlp_hidden=80, rope_theta=500.0
)
SHAPES = {
    "gpt2": GPT2,
    "gpt2, untied": DecoderConfig(**vars(GPT2) | {"tied": False}),
    "llama, tied": LLAMA,
    "llama, untied": DecoderConfig(**vars(LLAMA) | {"tied": False, "rope_theta": 10_000.0}),
    "llama, a head for each": DecoderConfig(**vars(LLAMA) | {"n_kv_head": 4}),
    "llama, one head for all": DecoderConfig(**vars(LLAMA) | {"n_kv_head": 1}),
    "llama, wide heads, biases": DecoderConfig(**vars(LLAMA) | {"head_dim": 10, "bias": True}),
    "qwen3": DecoderConfig(**vars(LLAMA) | {"qk_norm": True, "head_dim": 16}),
}
each_shape = pytest.mark.parametrize("shape", SHAPES)


def small_decoder(config: DecoderConfig = LLAMA, seed: int = 0, **changes: object) -> Decoder:
    """A float64 model whose every weight, biases and gains too, has a value at which a mistake would show."""
    torch.manual_seed(seed)
    model = Decoder(DecoderConfig(**vars(config) | changes)).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3).add_(0.5 * (weight.dim() == 1))
    return model


def random_tokens(batch: int = 3, length: int = T, seed: int = 2) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    """Equal but for rounding: float64 has 2e-16, and a sum of a few thousand terms loses at most 1e-12."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda text: f"{what}: {text}")


# Hugging Face's models are the oracle


class ExactTorch:
    """torch, but float32 means float64: transformers rounds norms and angles to float32 in any model."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def hugging_face(config: DecoderConfig, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """transformers' model of this shape, made from the config.json that we write, in float64 throughout."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen3 import modeling_qwen3

    for module in (modeling_llama, modeling_qwen3):
        monkeypatch.setattr(module, "torch", ExactTorch())
    facts = config_to_hf(config) | {"bos_token_id": None, "eos_token_id": None}
    return (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(facts.pop("model_type"), **facts))
        .double()
        .eval()
    )


@each_shape
def test_logits_and_gradients_equal_those_of_hugging_face(shape: str, monkeypatch: pytest.MonkeyPatch):
    config = SHAPES[shape]
    ours, theirs = small_decoder(config), hugging_face(config, monkeypatch)
    their_weights, seen = dict(theirs.named_parameters()), set()
    with torch.no_grad():
        for name, parts in parts_of(config, "hf"):
            rows = ours.get_parameter(name).split([part.rows for part in parts])
            for part, piece in zip(parts, rows, strict=True):
                their_weights[part.name].copy_(part.back(piece))
                seen.add(part.name)
    assert seen == their_weights.keys()
    x, y = random_tokens(seed=3), random_tokens(seed=4)
    logits = ours(x)
    assert logits.std() > 0.5  # or any two models would agree
    assert_same(logits, theirs(x, use_cache=False).logits)
    for _model, output in ((ours, logits), (theirs, theirs(x, use_cache=False).logits)):
        assert output.dtype == torch.float64
        F.cross_entropy(output.flatten(0, 1), y.flatten()).backward()
    grads = gradients(ours)
    for name, parts in parts_of(config, "hf"):
        expected = torch.cat([part.turn(their_weights[part.name].grad) for part in parts])
        assert expected.abs().max() > 1e-6
        assert_same(grads[name], expected, name)


@pytest.mark.parametrize(
    ("config", "weights"), [(DecoderConfig.gpt2(), 124_439_808), (DecoderConfig.llama(), 134_515_008)]
)
def test_the_presets_have_as_many_weights_as_gpt2_and_smollm2(config: DecoderConfig, weights: int):
    with torch.device("meta"):
        assert Decoder(config).count_parameters() == weights


# What a decoder promises


@each_shape
def test_a_later_token_cannot_change_an_earlier_output(shape: str):
    model, tokens = small_decoder(SHAPES[shape]), random_tokens(1)
    changed = tokens.clone()
    changed[0, 10] = (tokens[0, 10] + 1) % V
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:10], after[:10])
    assert (before[10:] - after[10:]).abs().amax(dim=1).min() > 1e-6


def test_shared_heads_equal_as_many_heads_with_equal_weights():
    few, many = small_decoder(n_kv_head=2), small_decoder(n_kv_head=4)
    state = few.state_dict()
    for layer in range(3):
        name = f"blocks.{layer}.attention.qkv.weight"
        q, k, v = state[name].split([32, 16, 16])
        k, v = (x.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for x in (k, v))
        state[name] = torch.cat([q, k, v])
    many.load_state_dict(state)
    assert_same(many(random_tokens()), few(random_tokens()))


@each_shape
def test_weights_start_with_the_spread_that_gpt2_gives_them(shape: str):
    config = DecoderConfig(**vars(SHAPES[shape]) | {"n_embd": 64, "vocab_size": 211})
    for name, weight in Decoder(config).named_parameters():
        if weight.dim() == 2:
            expected = 0.02 / math.sqrt(2 * 3) if name.endswith(("proj.weight", "down.weight")) else 0.02
            # a spread estimated from n normal numbers is off by 1 / sqrt(2n) of itself
            assert abs(weight.std() / expected - 1) < 5 / math.sqrt(2 * weight.numel()), name
        else:
            assert torch.equal(weight, torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0)), name


@each_shape
def test_the_first_loss_is_that_of_knowing_nothing(shape: str):
    """A logit sums n_embd = 32 products of a feature of size 1 and a weight of 0.02: its spread is 0.11."""
    torch.manual_seed(0)
    x, y = random_tokens(16), random_tokens(16, seed=5)
    loss = F.cross_entropy(Decoder(SHAPES[shape])(x).flatten(0, 1), y.flatten())
    assert abs(loss.item() - math.log(V)) < 5 * 0.11 / math.sqrt(y.numel()) + 0.11**2


@each_shape
def test_operations_per_token_are_those_that_torch_counts(shape: str):
    model = small_decoder(SHAPES[shape])
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # the fused kernel computes twice
        model(random_tokens(3)).sum().backward()
    assert counter.get_total_flops() == 3 * T * model.flops_per_token()


def test_more_tokens_than_block_size_are_refused_in_words():
    with pytest.raises(ValueError, match=rf"tokens \({T + 1}\) must be at most block_size \({T}\)"):
        small_decoder()(random_tokens(1, T + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 5}, r"n_embd \(32\) must be divisible by n_head \(5\)"),
        ({"n_kv_head": 3}, r"n_head \(4\) must be divisible by n_kv_head \(3\)"),
        ({"head_dim": 9}, r"head_dim \(9\) must be even"),
        ({"rope_theta": 0.0}, r"rope_theta \(0.0\) must be above 0"),
        ({"norm_eps": float("nan")}, r"norm_eps \(nan\) must be above 0"),
        ({"dropout": 1.0}, r"dropout \(1.0\) must be at least 0 and below 1"),
        ({"n_layer": 0}, r"n_layer \(0\) must be at least 1"),
        ({"mlp_hidden": -1}, r"mlp_hidden \(-1\) must be at least 0"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused_in_words(change: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**vars(LLAMA) | change).validate_config()


def test_widths_that_are_not_given_are_those_of_the_family():
    assert DecoderConfig.gpt2().mlp_width == 3072
    assert DecoderConfig(n_embd=576).mlp_width == 1536  # SmolLM2's
    assert DecoderConfig(n_embd=256).mlp_width == 704  # 8/3 of 256 is 683
    assert (DecoderConfig(n_embd=64, n_head=4).head_width, DecoderConfig(n_head=4).kv_heads) == (16, 4)


# Memory: checkpointing, weights without a second copy


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_checkpointing_changes_no_gradient_and_keeps_less(family: str, dropout: float):
    kept = {}

    def loss_and_grads(checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model, sizes = small_decoder(SHAPES[family], checkpointing=checkpointing, dropout=dropout), []
        torch.manual_seed(7)  # of dropout
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = model(random_tokens()).square().mean()
        loss.backward()
        kept[checkpointing] = sum(sizes)
        return loss, gradients(model)

    plain, recomputed = loss_and_grads(False), loss_and_grads(True)
    assert torch.equal(plain[0], recomputed[0])
    assert all(torch.equal(grad, recomputed[1][name]) for name, grad in plain[1].items())
    assert kept[True] < kept[False] / 4


@each_shape
def test_a_model_around_given_weights_is_the_model(shape: str):
    model = small_decoder(SHAPES[shape])
    state = {
        name: weight
        for name, weight in model.state_dict().items()
        if name != "head.weight" or "untied" in shape
    }
    again = Decoder.from_weights(model.config, state)
    assert (again.head.weight is again.token_embedding.weight) == model.config.tied
    assert again.token_embedding.weight.data_ptr() == model.token_embedding.weight.data_ptr()  # not copied
    assert_same(again.double()(random_tokens()), model(random_tokens()))


# The seam: attention backends


@each_shape
def test_a_cache_fed_in_chunks_of_any_sizes_gives_the_logits_of_the_whole(shape: str):
    model, tokens = small_decoder(SHAPES[shape]), random_tokens()
    choice = random.Random(shape)
    with torch.no_grad():
        whole = model(tokens)
        for _ in range(5):
            cuts = [0, *sorted(choice.sample(range(1, T), choice.randrange(T))), T]
            cache = GrowingCache()
            chunks = [model(tokens[:, begin:end], cache) for begin, end in itertools.pairwise(cuts)]
            assert_same(torch.cat(chunks, dim=1), whole)


@each_shape
def test_documents_in_one_row_are_as_if_each_were_alone(shape: str):
    model, tokens = small_decoder(SHAPES[shape]), random_tokens(2)
    lengths = [[5, 1, 11, 7], [24]]
    numbers = [
        torch.repeat_interleave(torch.tensor([3, 4, 5, 9][: len(row)]), torch.tensor(row)) for row in lengths
    ]
    packed = model(tokens, DocumentAttention(torch.stack(numbers).int()))
    for row, pieces in enumerate(lengths):
        for piece, logits in zip(tokens[row].split(pieces), packed[row].split(pieces), strict=True):
            assert_same(logits, model(piece[None])[0])


def test_nothing_flows_from_one_document_to_another():
    model, tokens = small_decoder(), torch.randperm(V)[None, :T]  # each token once
    documents = (torch.arange(T) >= 9).int()[None]
    model(tokens, DocumentAttention(documents))[0, 15].square().sum().backward()
    hidden = model.token_embedding.weight.grad.clone()
    model.zero_grad()
    model.head(model.hidden(tokens, DocumentAttention(documents)).detach())[0, 15].square().sum().backward()
    reached = (hidden - model.token_embedding.weight.grad)[tokens[0]].abs().amax(
        dim=1
    ) > 0  # less the tied head's
    assert reached.tolist() == [9 <= place <= 15 for place in range(T)]


# The parts


@pytest.mark.parametrize("learn", [True, False])
def test_rms_norm_is_the_formula_with_its_gradients(learn: bool):
    norm = RMSNorm(12, eps=0.1).double()
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(4, 5, 12, dtype=torch.float64) * 3 + 2).requires_grad_(learn)
    with torch.set_grad_enabled(learn):
        y = norm(x)
    assert_same(y, x / (x.square().mean(dim=-1, keepdim=True) + 0.1).sqrt() * norm.weight)
    if learn:
        assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 0.1), (x, norm.weight))
        assert_same(y, F.rms_norm(x, (12,), norm.weight, 0.1))


@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_rms_norm_takes_weights_that_fsdp_rounded_and_inputs_that_autocast_did(types: tuple):
    x, weight = (torch.randn(shape, dtype=kind) for shape, kind in zip(((3, 12), (12,)), types, strict=True))
    ours, plain = ([each.clone().requires_grad_() for each in (x, weight)] for _ in range(2))
    y, expected = rms_norm(*ours, 0.1), F.rms_norm(plain[0].float(), (12,), plain[1].float(), 0.1)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_rms_norm_does_not_hear_how_loud_its_input_is():
    norm, x = RMSNorm(64, eps=1e-12).double(), torch.randn(8, 64, dtype=torch.float64)
    assert_same(norm(1000 * x), norm(x))
    assert_same(norm(x).square().mean(dim=-1), torch.ones(8, dtype=torch.float64))


def test_swiglu_is_three_matrices_and_a_gate():
    layer = SwiGLU(12, 20, bias=False).double()
    gate, up = layer.gate_up.weight.chunk(2)
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    opened = x @ gate.T
    assert_same(layer(x), (opened * torch.sigmoid(opened) * (x @ up.T)) @ layer.down.weight.T)


def test_rotary_scores_depend_on_the_distance_only():
    rope = RotaryEmbedding(16, 64, theta=100.0).double()
    q, k = torch.randn(2, 1, 64, 1, 16, dtype=torch.float64)
    at = torch.arange(64)
    scores = (
        (rotate(q[:, :1].expand(1, 64, 1, 16), rope(at))[0, :, 0])
        @ rotate(k[:, :1].expand(1, 64, 1, 16), rope(at))[0, :, 0].T
    )
    for distance in (-5, 0, 1, 30):
        diagonal = scores.diagonal(distance)
        assert_same(diagonal, diagonal[:1].expand_as(diagonal))
    assert (scores[0] - scores[0, 0])[1:].abs().min() > 1e-3  # and it does depend on it


def test_rotation_turns_pairs_by_angles_that_fall_from_1_to_one_over_theta():
    D, theta = 8, 100.0
    x = torch.randn(1, 5, 2, D, dtype=torch.float64)
    turned = rotate(x, RotaryEmbedding(D, 5, theta).double()(torch.arange(5)))
    pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    angles = torch.arange(5)[:, None] * torch.tensor(
        [theta ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64
    )
    expected = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    assert_same(turned, torch.cat([expected.real, expected.imag], dim=-1))
    assert_same(turned[:, 0], x[:, 0])


def test_the_table_of_rotations_survives_every_move():
    """Historic bug: Llama's wavelengths in a buffer that .half() rounded; far positions went wrong."""
    exact = RotaryEmbedding(16, 5000).double().table
    for move in (
        lambda m: m.half().float().double(),
        lambda m: m.bfloat16().double(),
        lambda m: m.to("meta").to_empty(device="cpu").double(),
    ):
        assert torch.equal(move(RotaryEmbedding(16, 5000)).table, exact)
    model = small_decoder().bfloat16()
    assert model.rope.table.dtype == torch.float32
    assert "rope.table" not in model.state_dict()


def test_fused_weights_say_where_their_matrices_end():
    for config in SHAPES.values():
        model = Decoder(config)
        for name, module in model.named_modules():
            for weight, rows in getattr(module, "fused", {}).items():
                assert sum(rows) == len(model.get_parameter(f"{name}.{weight}"))


# Kernels for CPUs


def test_the_fast_linear_layer_is_a_linear_layer(monkeypatch: pytest.MonkeyPatch):
    for least in ("LEARNING", "WRITING"):
        monkeypatch.setattr(cpu_kernels, least, 0)
    torch.manual_seed(0)
    fast, plain = Linear(48, 80), nn.Linear(48, 80).double()
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(3, 7, 48, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    for layer, inputs in ((fast, x), (plain, exact)):
        layer(inputs).square().sum().backward()
    pairs = [(fast(x), plain(exact)), (x.grad, exact.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(fast.parameters(), plain.parameters(), strict=True)]
    for ours, expected in pairs:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(fast(x), fast(x.detach()))


@pytest.mark.parametrize(("H", "Hkv"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 60, 130, 300])
def test_blocked_attention_is_attention_with_its_gradients(H: int, Hkv: int, length: int):
    q, k, v = (
        torch.randn(2, heads, length, 8, dtype=torch.float64, requires_grad=True) for heads in (H, Hkv, Hkv)
    )
    documents = DocumentAttention(torch.randint(2, (2, length)).sort(dim=1).values)
    for bias, allowed in (
        (None, torch.ones(length, length).tril().bool()),
        (documents.bias(q.dtype), documents.allowed),
    ):
        results = []
        for mixed in (
            blocked_attention(q, k, v, bias),
            F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True),
        ):
            results.append([mixed, *torch.autograd.grad(mixed.square().sum(), (q, k, v))])
        for ours, theirs in zip(*results, strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize("backend", [GroupedCausalAttention, lambda: DocumentAttention(torch.zeros(2, 40))])
def test_long_texts_and_dropout_are_left_to_the_fused_kernel(backend, monkeypatch: pytest.MonkeyPatch):
    q, k, v = torch.randn(2, 4, 40, 8), *torch.randn(2, 2, 2, 40, 8)
    blocked = backend().attend(0, q, k, v)
    monkeypatch.setattr(cpu_kernels, "LONGEST", 39)
    monkeypatch.setattr(cpu_kernels, "_BlockedAttention", None)
    torch.testing.assert_close(backend().attend(0, q, k, v), blocked)
    dropped = backend()
    dropped.dropout = 0.5
    assert not torch.allclose(dropped.attend(0, q, k, v), blocked)


@pytest.mark.parametrize("family", ["gpt2", "llama, tied", "qwen3"])
def test_training_in_bf16_finds_nearly_the_gradients_of_float64(family: str):
    """bf16 keeps 8 bits: each product is off by up to 1/256, gradients, which sum many, by a few percent."""
    exact = small_decoder(SHAPES[family])
    rough = Decoder(SHAPES[family])
    rough.load_state_dict(exact.state_dict())
    x, y = random_tokens(), random_tokens(seed=6)
    F.cross_entropy(exact(x).flatten(0, 1), y.flatten()).backward()
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(rough(x).float().flatten(0, 1), y.flatten()).backward()
    expected = gradients(exact)
    for name, grad in gradients(rough).items():
        assert (grad - expected[name]).norm() < 0.1 * expected[name].norm(), name


def interact() -> None:
    """Show the ten likeliest next tokens of the typed text."""
    from phase1_foundation.project3_pretrain.weights import load_model

    model, tokenizer = load_model("smollm2-135m")
    for text in ask("text> "):
        with torch.no_grad():
            odds = model(torch.tensor([tokenizer.encode(text)]))[0, -1].softmax(dim=0).sort(descending=True)
        for odd, i in list(zip(odds.values.tolist(), odds.indices.tolist(), strict=True))[:10]:
            print(f"{tokenizer.decode([i])!r:16} {odd:6.1%} {'#' * round(40 * odd)}")


if __name__ == "__main__":
    run_validation(__file__, interact)
