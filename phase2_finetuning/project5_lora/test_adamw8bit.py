"""Checks of AdamW with 8-bit averages, held to bitsandbytes and to AdamW."""

import copy

import bitsandbytes
import pytest
import torch
from bitsandbytes.backends.cpu import ops
from torch import Tensor, nn

from common.checkpoints import load_checkpoint, save_checkpoint
from common.script import run_validation
from phase1_foundation.project1_minimal_gpt.optimizer import AdamW
from phase2_finetuning.project5_lora.adamw8bit import AdamW8bit

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    """Gradients none of which is near zero, so that no square is lost beside its block's largest."""
    draw = torch.Generator().manual_seed(1)
    return [
        (0.05 + torch.rand(shape, generator=draw)) * torch.randn(shape, generator=draw).sign()
        for _ in range(steps)
    ]


def uneven_gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    """Gradients whose columns differ in size a thousandfold."""
    draw, sizes = torch.Generator().manual_seed(1), torch.logspace(-3, 0, shape[-1])
    return [torch.randn(shape, generator=draw) * sizes for _ in range(steps)]


def make_weight(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def train(optimizer: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> None:
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()


@pytest.fixture
def exact_bitsandbytes(monkeypatch):
    """bitsandbytes with its own nearest-level quantization in the place of its fast one for CPUs.

    The fast one asks a table, and misses the nearest level by up to 2**-15 of the scale (bitsandbytes
    0.50.2, measured in test_nf4.py). Given fp64 it compares with all levels.
    """

    def quantize(x: Tensor, code: Tensor, absmax: Tensor, out: Tensor, block: int) -> None:
        codes, scales = torch.ops.bitsandbytes.quantize_blockwise(x.double(), code, block)
        out.copy_(codes)
        absmax.copy_(scales)

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", quantize)


@pytest.mark.parametrize("shape", [(64, 96), (50, 97)])
def test_weights_and_averages_equal_those_of_bitsandbytes(shape, exact_bitsandbytes):
    mine, theirs = make_weight(shape), make_weight(shape)
    ours = AdamW8bit([{"params": [mine], "weight_decay": 0.1}], **SETTINGS)
    peer = bitsandbytes.optim.AdamW8bit([theirs], weight_decay=0.1, **SETTINGS)
    grads = gradients(shape, 20)
    train(ours, mine, grads)
    train(peer, theirs, grads)
    assert torch.equal(mine, theirs)
    for name, number in (("mean", 1), ("square", 2)):
        assert torch.equal(ours.state[mine][name].view(shape), peer.state[theirs][f"state{number}"])
        assert torch.equal(ours.state[mine][f"{name}_scales"], peer.state[theirs][f"absmax{number}"])


def test_it_stays_near_bitsandbytes_as_it_is():
    mine, theirs = make_weight((64, 96)), make_weight((64, 96))
    grads = gradients((64, 96), 20)
    train(AdamW8bit([mine], **SETTINGS), mine, grads)
    train(bitsandbytes.optim.AdamW8bit([theirs], weight_decay=0, **SETTINGS), theirs, grads)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0.5 * SETTINGS["lr"])


def longest_step(optimizer: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> float:
    """Return the longest way that a number went in a step, in learning rates."""
    longest = 0.0
    for grad in grads:
        before = weight.detach().clone()
        train(optimizer, weight, [grad])
        longest = max(longest, (weight - before).abs().max().item() / SETTINGS["lr"])
    return longest


def test_a_small_square_does_not_become_zero_and_the_next_step_enormous(exact_bitsandbytes):
    grads = uneven_gradients((64, 96), 5)
    mine, theirs, exact = (make_weight((64, 96)) for _ in range(3))
    peer = bitsandbytes.optim.AdamW8bit([theirs], weight_decay=0, **SETTINGS)
    assert longest_step(torch.optim.AdamW([exact], weight_decay=0, **SETTINGS), exact, grads) < 3
    assert longest_step(AdamW8bit([mine], **SETTINGS), mine, grads) < 3
    assert longest_step(peer, theirs, grads) > 100


def test_small_weights_take_the_steps_of_adamw():
    mine, theirs = make_weight((8, 96)), make_weight((8, 96))
    grads = gradients((8, 96), 20)
    train(AdamW8bit([{"params": [mine], "weight_decay": 0.1}], **SETTINGS), mine, grads)
    train(torch.optim.AdamW([theirs], weight_decay=0.1, **SETTINGS), theirs, grads)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_it_learns_as_fast_as_adamw():
    torch.manual_seed(0)
    x, target = torch.randn(256, 64), torch.randn(256, 80)
    losses = {}
    for kind in (AdamW8bit, AdamW):
        torch.manual_seed(1)
        model = nn.Linear(64, 80)
        optimizer = kind([{"params": list(model.parameters())}], lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
    assert losses[AdamW8bit] == pytest.approx(losses[AdamW], rel=0.01)


def test_the_averages_take_two_bytes_per_weight():
    weight = make_weight((256, 256))
    optimizer = AdamW8bit([weight], **SETTINGS)
    train(optimizer, weight, gradients((256, 256), 1))
    state = [t for t in optimizer.state[weight].values() if isinstance(t, Tensor)]
    assert sum(t.numel() * t.element_size() for t in state) / weight.numel() == 2 + 2 * 4 / 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path, dtype):
    # torch.optim.Optimizer.load_state_dict casts states to the weight's dtype: bytes became floats, and
    # scales lost digits in bf16. bitsandbytes overrides it for that reason.
    grads = [grad.to(dtype) for grad in gradients((64, 96), 8)]
    weight = nn.Parameter(make_weight((64, 96)).detach().to(dtype))
    other = nn.Parameter(weight.detach().clone())
    train(AdamW8bit([weight], **SETTINGS), weight, grads)
    first = AdamW8bit([other], **SETTINGS)
    train(first, other, grads[:4])
    save_checkpoint(tmp_path / "state.pt", state=first.state_dict())
    second = AdamW8bit([other], **SETTINGS)
    second.load_state_dict(load_checkpoint(tmp_path / "state.pt", "", needs=("state",))["state"])
    train(second, other, grads[4:])
    assert torch.equal(weight, other)


def test_a_loaded_state_shares_no_memory_with_what_it_came_from():
    weight = make_weight((8, 8))
    optimizer = AdamW8bit([weight], **SETTINGS)
    train(optimizer, weight, gradients((8, 8), 1))
    state = optimizer.state_dict()
    before = copy.deepcopy(state["state"][0]["mean"])
    other = AdamW8bit([make_weight((8, 8))], **SETTINGS)
    other.load_state_dict(state)
    train(other, other.param_groups[0]["params"][0], gradients((8, 8), 2))
    assert torch.equal(state["state"][0]["mean"], before)


def test_weights_without_a_gradient_stay_as_they_are():
    weight = make_weight((8, 8))
    before = weight.detach().clone()
    AdamW8bit([{"params": [weight], "weight_decay": 0.1}], **SETTINGS).step()
    assert torch.equal(weight, before)


if __name__ == "__main__":
    run_validation(__file__)
