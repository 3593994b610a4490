"""Checks of the frozen NF4 layer: gradients through it, adapters beside it, memory, exactness on the move."""

import copy

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.script import run_validation
from phase1_foundation.project3_pretrain.loss import Batch, language_model_loss
from phase2_finetuning.project5_lora.adapters import add_adapter, unload
from phase2_finetuning.project5_lora.conftest import make_model
from phase2_finetuning.project5_lora.lora import Recipe
from phase2_finetuning.project5_lora.qlora import NF4Linear, quantize_linears


def make_layer(bias: bool = True, double: bool = True) -> NF4Linear:
    torch.manual_seed(0)
    return NF4Linear(nn.Linear(96, 160, bias=bias), double)


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_is_that_through_the_dequantized_matrix(bias):
    layer, x = make_layer(bias), torch.randn(2, 5, 96, requires_grad=True)
    y = layer(x)
    out = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, out)
    expected = F.linear(x, layer.dequantize(), layer.bias)
    (expected_grad,) = torch.autograd.grad(expected, x, out)
    torch.testing.assert_close(
        y, expected, rtol=1e-5, atol=1e-5
    )  # products by another library round otherwise
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_the_gradient_in_float64_passes_finite_differences():
    layer, x = make_layer(), torch.randn(2, 96, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_outputs_and_gradients_equal_those_of_bitsandbytes():
    torch.manual_seed(0)
    linear = nn.Linear(128, 160)
    how = {"compute_dtype": torch.float32, "compress_statistics": False, "quant_type": "nf4"}
    peer = bitsandbytes.nn.Linear4bit(128, 160, **how)
    peer.load_state_dict(linear.state_dict())
    peer.to("cpu")  # which quantizes
    ours = NF4Linear(linear, double=False)
    grads = []
    x = torch.randn(7, 128)
    for layer in (ours, peer):
        each = x.clone().requires_grad_()
        y = layer(each)
        y.square().sum().backward()
        grads.append((y, each.grad))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_nothing_is_remembered_in_fp32_between_forward_and_backward():
    layer, x = make_layer(), torch.randn(50, 96, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert not [t for t in saved if t.is_floating_point()]


def test_a_layer_takes_an_eighth_of_its_memory():
    layer = make_layer(bias=False)
    taken = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert taken < 4 * 96 * 160 * (4.127 / 32) + 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moving_a_model_to_another_dtype_leaves_the_weights_as_they_were(dtype):
    layer = make_layer()
    before = layer.dequantize()
    layer.to(dtype)
    assert torch.equal(layer.dequantize(), before)
    y = layer(torch.randn(3, 96, dtype=dtype))
    assert y.dtype == dtype


def test_autocast_decides_the_dtype_of_the_product():
    layer, x = make_layer(), torch.randn(3, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    weight = layer.dequantize().bfloat16()
    assert torch.equal(x.grad, (torch.ones(3, 160).bfloat16() @ weight).float())


def test_a_state_dict_brings_the_same_weights_back():
    layer, other = make_layer(), NF4Linear(nn.Linear(96, 160))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), layer.dequantize())
    assert torch.equal(other.bias, layer.bias)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_linear_layer_of_the_blocks_is_packed_and_no_other(family, tokens):
    model = make_model(family, torch.float32)
    names = quantize_linears(model)
    assert len(names) == 4 * model.config.n_layer
    assert not [name for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)]
    assert isinstance(model.head, nn.Linear)
    assert model.token_embedding.weight is model.head.weight


@pytest.mark.parametrize("recipe", [Recipe(2), Recipe(2, dora=True), Recipe(2, rslora=True)])
def test_qlora_equals_lora_on_the_dequantized_model(recipe, tokens):
    packed = make_model("llama", torch.float32)
    quantize_linears(packed)
    plain = make_model("llama", torch.float32)
    for name, layer in packed.named_modules():
        if isinstance(layer, NF4Linear):
            plain.get_submodule(name).weight.data = layer.dequantize()
    gradients = []
    for model in (packed, plain):
        torch.manual_seed(1)
        add_adapter(model, recipe)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += 0.1 * torch.randn_like(weight)
        loss, _ = language_model_loss(model, Batch(tokens, tokens))
        loss.backward()
        gradients.append([loss] + [weight.grad for weight in model.parameters() if weight.requires_grad])
        assert all(weight.grad is None for weight in model.parameters() if not weight.requires_grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_merging_into_packed_weights_gives_plain_ones(tokens):
    model = make_model("llama", torch.float32)
    quantize_linears(model)
    add_adapter(model, Recipe(2))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
        before = model(tokens)
        unload(model, merge=True)
        torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-4)
    assert not [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]


def test_adapters_train_on_a_packed_model_that_does_not_change(tokens):
    model = make_model("llama", torch.float32)
    quantize_linears(model)
    add_adapter(model, Recipe(4))
    frozen = copy.deepcopy({n: t for n, t in model.state_dict().items() if "adapters" not in n})
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss, count = language_model_loss(model, Batch(tokens[:, :-1], tokens[:, 1:]))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / int(count))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())


if __name__ == "__main__":
    run_validation(__file__)
