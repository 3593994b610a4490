"""Checks of the GPT. --interactive shows how the trained model bets on the character after your text."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.script import ask, run_validation
from phase1_foundation.project1_minimal_gpt.benchmark import hugging_face_gpt2
from phase1_foundation.project1_minimal_gpt.config import CHECKPOINT, GPTConfig, TrainConfig
from phase1_foundation.project1_minimal_gpt.generate import load_gpt, next_token_odds
from phase1_foundation.project1_minimal_gpt.model import GPT, FeedForward, LayerNorm
from phase1_foundation.project1_minimal_gpt.optimizer import make_optimizers
from phase1_foundation.project1_minimal_gpt.train import train_step

V, T = 31, 16


def small_config(**changes: object) -> GPTConfig:
    return GPTConfig(**{"block_size": T, "vocab_size": V, "n_layer": 2, "n_head": 4, "n_embd": 32} | changes)


def small_gpt(seed: int = 0, **changes: object) -> GPT:
    torch.manual_seed(seed)
    return GPT(small_config(**changes))


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Give every weight, biases and gains too, a value at which a mistake would show."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.2 + (weight.dim() == 1) * 0.5)


def random_tokens(batch: int = 3, length: int = T, seed: int = 2) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


# Shapes and sizes


@pytest.mark.parametrize("length", [1, 7, T])
def test_every_token_gets_one_logit_per_entry_of_the_vocabulary(length: int):
    assert small_gpt()(random_tokens(3, length)).shape == (3, length, V)


def test_more_tokens_than_block_size_are_refused_in_words():
    with pytest.raises(ValueError, match=rf"tokens \({T + 1}\) must be at most block_size \({T}\)"):
        small_gpt()(random_tokens(1, T + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 5}, r"n_embd \(32\) must be divisible by n_head \(5\)"),
        ({"n_layer": 0}, r"n_layer \(0\) must be at least 1"),
        ({"dropout": 1.0}, r"dropout \(1.0\) must be at least 0 and below 1"),
        ({"dropout": float("nan")}, r"dropout \(nan\)"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused_in_words(change: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        small_config(**change).validate_config()


def test_parameters_are_counted_once_each():
    C, n_layer = 32, 2
    block = 12 * C * C + 13 * C  # qkv 3C^2 + 3C, proj C^2 + C, up 4C^2 + 4C, down 4C^2 + C, two norms 4C
    body = T * C + n_layer * block + 2 * C
    assert small_gpt().count_parameters() == body + V * C
    assert small_gpt(tied=False).count_parameters() == body + 2 * V * C
    assert small_gpt(bias=False).count_parameters() == T * C + n_layer * (12 * C * C + 2 * C) + C + V * C


def test_two_thirds_of_the_weights_of_a_block_are_in_its_feed_forward():
    block = small_gpt(bias=False).blocks[0]
    inside, all_of_it = (
        sum(w.numel() for w in part.parameters() if w.dim() == 2) for part in (block.feed_forward, block)
    )
    assert inside * 3 == all_of_it * 2


def test_operations_per_token_are_those_that_torch_counts():
    for tied in (True, False):
        model = small_gpt(tied=tied, attention="explicit")
        with FlopCounterMode(display=False) as counter:
            model(random_tokens(3)).sum().backward()
        assert counter.get_total_flops() == 3 * T * model.flops_per_token()


# The parts


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_the_formula(bias: bool):
    norm = LayerNorm(12, bias).double()
    randomize(norm)
    x = torch.randn(4, 5, 12, dtype=torch.float64) * 3 + 2
    variance = ((x - x.mean(-1, keepdim=True)) ** 2).sum(-1, keepdim=True) / 12
    expected = (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected + (norm.bias if bias else 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_feed_forward_is_two_matrices_around_gelu(gelu: str):
    layer = FeedForward(small_config(gelu=gelu)).double()
    randomize(layer)
    x = torch.randn(4, 5, 32, dtype=torch.float64)
    h = x @ layer.up.weight.T + layer.up.bias
    active = {"exact": exact_gelu, "tanh": tanh_gelu}[gelu](h)
    expected = active @ layer.down.weight.T + layer.down.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def exact_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))  # x * Phi(x)


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_the_two_forms_of_gelu_differ_by_less_than_a_thousandth():
    x = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    assert 1e-4 < (tanh_gelu(x) - exact_gelu(x)).abs().max() < 1e-3


def test_dropout_acts_in_training_only():
    model, tokens = small_gpt(dropout=0.5), random_tokens()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), small_gpt(dropout=0.0)(tokens))


# Causality


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
def test_a_later_token_cannot_change_an_earlier_output(attention: str):
    model = small_gpt(attention=attention)
    randomize(model)
    tokens = random_tokens(1)
    logits = model(tokens)
    for t in range(1, T):
        other = tokens.clone()
        other[0, t:] = (other[0, t:] + 1) % V
        changed = model(other)
        assert torch.equal(changed[0, :t], logits[0, :t])  # to the bit: the future is multiplied by exact 0
        assert not torch.equal(changed[0, t], logits[0, t])


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
def test_no_gradient_flows_from_an_output_to_a_later_token(attention: str):
    model = small_gpt(attention=attention, tied=False)
    randomize(model)
    tokens = torch.randperm(V)[None, :T]  # each token once, so its embedding's gradient is its place's
    for t in range(T):
        model.zero_grad()
        model(tokens)[0, t].square().sum().backward()
        reached = model.token_embedding.weight.grad[tokens[0]].abs().amax(dim=1) > 0
        assert reached.tolist() == [place <= t for place in range(T)]


# Initialization


def test_weights_start_with_the_spread_that_gpt2_gives_them():
    model = small_gpt(n_layer=3, n_embd=64, tied=False)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            expected = 0.02 / math.sqrt(6) if name.endswith(("proj.weight", "down.weight")) else 0.02
            # a spread estimated from n normal numbers is off by 1 / sqrt(2n) of itself
            assert abs(weight.std() / expected - 1) < 5 / math.sqrt(2 * weight.numel()), name
        else:
            assert torch.equal(weight, torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0)), name


def test_the_head_is_the_token_embedding_if_tied():
    for tied in (True, False):
        model = small_gpt(tied=tied)
        assert (model.head.weight is model.token_embedding.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_loss_is_that_of_knowing_nothing(tied: bool):
    r"""The bound, for V = 65 logits of width C = 64 and N = 2048 random targets.

    Each logit sums C products of a feature of variance 1 (the last norm) and a weight of spread 0.02, so it
    has spread s = 0.02 sqrt(C) = 0.16. The loss is ln V + ln(mean of exp(logit)) - (the target's logit).
    The middle term is half the variance of V such logits, s^2 / 2, give or take sqrt(2 / V) of it; the last
    has mean 0 and spread s / sqrt(N). A tied head also sees the token's own embedding in its features: at
    most (all of them) that one logit is 0.02 sqrt(C) times its length sqrt(C), and raises the mean of exp.
    """
    C, N, size = 64, 2048, 65
    model = small_gpt(n_embd=C, vocab_size=size, tied=tied)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randint(size, (2, N // T, T), generator=draw)
    s = 0.02 * math.sqrt(C)
    noise = 5 * s / math.sqrt(N)
    above = s**2 / 2 * (1 + 5 * math.sqrt(2 / size)) + (
        math.log(1 + math.exp(s * math.sqrt(C)) / size) if tied else 0
    )
    first = loss_of(model, x, y).item()
    assert -noise < first - math.log(size) < above + noise
    model.head.weight.data *= 10  # the bound is one that a wrong initialization breaks
    assert loss_of(model, x, y).item() - math.log(size) > above + noise


# Learning


def test_every_parameter_gets_a_gradient():
    model = small_gpt(tied=False, bias=True)
    tokens = torch.arange(2 * T).view(2, T) % V  # every token and every position
    loss_of(model, tokens, (tokens + 1) % V).backward()
    for name, weight in model.named_parameters():
        grad = weight.grad
        if name.endswith("qkv.bias"):  # a bias on the keys adds the same to all scores of a row: no effect
            query, key, value = grad.chunk(3)
            assert key.abs().max() < 1e-3 * query.abs().max(), name
            grad = torch.cat([query, value])
        assert grad.count_nonzero() == grad.numel(), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_one_batch_is_learned_by_heart(optimizer: str):
    model, steps = small_gpt(), 80
    x = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:T] for i in range(4)])
    x[:, 0] = torch.arange(4)  # rows that differ from the start, or their second tokens could not be known
    y = x.roll(-1, dims=1)
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer, lr=1e-2, weight_decay=0.0))
    losses = [train_step(model, optimizers, x, y, lr_share=1 - i / steps).item() for i in range(steps)]
    assert abs(losses[0] - math.log(V)) < 0.2
    assert losses[-1] < 0.02
    assert torch.equal(model(x).argmax(dim=-1), y)


# The oracle


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("attention", "gelu"), [("explicit", "tanh"), ("sdpa", "exact")])
def test_logits_and_gradients_equal_those_of_hugging_face(tied: bool, attention: str, gelu: str):
    ours = small_gpt(tied=tied, attention=attention, gelu=gelu).double()
    randomize(ours)
    theirs = hugging_face_gpt2(ours.config).double()
    pairs = as_in_hugging_face(ours)
    assert {name for name, _ in theirs.named_parameters()} == pairs.keys()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.copy_(pairs[name])
    x, y = random_tokens(seed=3), random_tokens(seed=4)
    logits = ours(x)
    torch.testing.assert_close(logits, theirs(x).logits, rtol=1e-10, atol=1e-10)
    F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).backward()
    grads = as_in_hugging_face(ours, of_grads=True)
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(grads[name], weight.grad, rtol=1e-8, atol=1e-10, msg=name)


def as_in_hugging_face(model: GPT, of_grads: bool = False) -> dict[str, Tensor]:
    """Our weights (or their gradients) by Hugging Face's names; its Conv1D keeps matrices transposed."""
    names = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attention.qkv": "attn.c_attn",
        "attention.proj": "attn.c_proj",
    }
    names |= {"feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj", "blocks.": "transformer.h."}
    names |= {"token_embedding": "transformer.wte", "position_embedding": "transformer.wpe"}
    renamed = {}
    for name, weight in model.named_parameters():
        transposed = name.startswith("blocks.") and weight.dim() == 2
        for mine, other in names.items():
            name = name.replace(mine, other)
        name = name.replace("head.", "lm_head.") if name.startswith("head") else name
        name = f"transformer.ln_f.{name[5:]}" if name.startswith("norm.") else name
        value = weight.grad if of_grads else weight.detach()
        renamed[name] = value.T if transposed else value
    return renamed


def interact() -> None:
    """Show the ten likeliest next characters of the typed text."""
    model, tokenizer = load_gpt(CHECKPOINT)
    for text in ask("text> "):
        ids = torch.tensor([tokenizer.encode(text)[-model.config.block_size :]])
        with torch.no_grad():
            odds = next_token_odds(model(ids)[0, -1]).sort(descending=True)
        for odd, i in list(zip(odds.values.tolist(), odds.indices.tolist(), strict=True))[:10]:
            print(f"{tokenizer.decode([i])!r:6} {odd:6.1%} {'#' * round(40 * odd)}")


if __name__ == "__main__":
    run_validation(__file__, interact)
