"""Checks of AdamW, Muon, schedule and clipping. --interactive shows what Muon makes of singular values."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from common.script import ask, run_validation
from phase1_foundation.project1_minimal_gpt.config import GPTConfig, TrainConfig
from phase1_foundation.project1_minimal_gpt.model import GPT
from phase1_foundation.project1_minimal_gpt.optimizer import (
    AdamW,
    Muon,
    clip_gradients,
    lr_factor,
    make_optimizers,
    orthogonalize,
)

A, B, C = 3.4445, -4.7750, 2.0315  # Newton-Schulz coefficients of Muon


def twins(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """The same random weights twice, one set for us and one for the reference."""
    draw = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype)) for shape in shapes]
    return ours, [nn.Parameter(weight.detach().clone()) for weight in ours]


def drive(steps: int, pairs: list[tuple[torch.optim.Optimizer, list[Tensor]]]) -> None:
    """Take steps with all optimizers along the same random gradients, of sizes from 1e-3 to 1e3."""
    draw = torch.Generator().manual_seed(1)
    for step in range(steps):
        size = 10 ** (3 * math.cos(step))
        grads = [torch.randn(w.shape, generator=draw, dtype=w.dtype) * size for w in pairs[0][1]]
        for optimizer, weights in pairs:
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad.clone()
            optimizer.step()


# AdamW


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_is_that_of_torch_over_many_steps(weight_decay: float, fused: bool):
    ours, theirs = twins((4, 5), (7,), (2, 3, 4))
    lr, betas = 3e-3, (0.9, 0.95)
    groups = [{"params": ours, "weight_decay": weight_decay}]
    reference = torch.optim.AdamW(theirs, lr=lr, betas=betas, eps=1e-8, weight_decay=weight_decay)
    drive(300, [(AdamW(groups, lr=lr, betas=betas, fused=fused), ours), (reference, theirs)])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # 300 roundings of 1e-16, and room


def test_adamw_leaves_weights_without_a_gradient_alone():
    ours, _ = twins((3,), (3,))
    before = ours[1].detach().clone()
    ours[0].grad = torch.ones_like(ours[0])
    AdamW([{"params": ours, "weight_decay": 0.5}], lr=0.1).step()
    assert torch.equal(ours[1], before)


def test_the_first_step_is_lr_whatever_the_gradient_and_would_not_be_without_the_correction():
    for size in (1e-4, 1.0, 1e4):
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        weight.grad = torch.full_like(weight, size)
        optimizer = AdamW([{"params": [weight]}], lr=0.1)
        optimizer.step()
        assert weight.item() == pytest.approx(-0.1, rel=1e-3)  # eps is 1e-4 of the smallest gradient
        state = optimizer.state[weight]
        assert (state["mean"] / state["square"].sqrt()).item() == pytest.approx(
            0.45, abs=0.005
        )  # uncorrected


# Muon


def test_muon_is_that_of_torch_around_the_orthogonalization():
    """Without Newton-Schulz steps both take the normalized gradient in bf16: all the rest must be equal."""
    ours, theirs = twins((6, 4), (4, 6), (4, 6), (5, 5), dtype=torch.float32)
    groups = [{"params": ours, "weight_decay": 0.2}]
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.2, momentum=0.95, ns_steps=0)
    drive(200, [(Muon(groups, lr=0.02, momentum=0.95, ns_steps=0), ours), (reference, theirs)])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # 200 fp32 roundings of numbers near 1


def test_muon_is_that_of_torch_over_many_steps():
    ours, theirs = twins((16, 16), (24, 8), (8, 24), (8, 24), (16, 16), dtype=torch.float32)
    steps, lr = 100, 0.02
    reference = torch.optim.Muon(theirs, lr=lr, weight_decay=0.1)
    drive(steps, [(Muon([{"params": ours, "weight_decay": 0.1}], lr=lr), ours), (reference, theirs)])
    # The same operations in the same order. Were another kernel to round every bf16 step the other way, each
    # entry (below 1, times sqrt(3) for the tall one) would be off by 2**-8 of lr a step.
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=steps * lr * math.sqrt(3) * 2**-8)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 8), (1, 8, 24)])
def test_orthogonalize_keeps_the_directions_and_bends_only_the_singular_values(shape: tuple[int, ...]):
    matrices = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / (matrices.flatten(1).norm(dim=1, keepdim=True) + 1e-7)
    for _ in range(5):
        s = A * s + B * s**3 + C * s**5
    torch.testing.assert_close(orthogonalize(matrices, dtype=None), u * s[:, None] @ vh, rtol=1e-9, atol=1e-9)


def test_five_steps_bring_singular_values_from_a_five_hundredth_to_one_near_one():
    values = torch.logspace(math.log10(0.002), 0, 4000, dtype=torch.float64)
    for _ in range(5):
        values = A * values + B * values**3 + C * values**5
    assert 0.68 < values.min() < 0.69
    assert 1.20 < values.max() < 1.21
    near, far = torch.zeros(2, 2, 8, 8, dtype=torch.float64)
    near[0], far[0] = torch.diag(torch.logspace(-2, 0, 8)), torch.diag(torch.logspace(-6, 0, 8))
    assert torch.linalg.svdvals(orthogonalize(near, dtype=None))[0].min() > 0.6  # after division by the norm
    assert torch.linalg.svdvals(orthogonalize(far, dtype=None))[0].min() < 0.1  # a limit: five steps are five


def test_muon_treats_fused_q_k_v_as_three_matrices():
    fused = nn.Parameter(torch.randn(12, 4))
    parts = [nn.Parameter(part.detach().clone()) for part in fused.chunk(3)]
    together = Muon([{"params": [fused], "split": (4, 4, 4), "weight_decay": 0.1}], lr=0.02)
    apart = Muon([{"params": parts, "weight_decay": 0.1}], lr=0.02)
    for _ in range(20):
        grad = torch.randn(12, 4)
        fused.grad = grad.clone()
        for part, piece in zip(parts, grad.chunk(3), strict=True):
            part.grad = piece.clone()
        together.step()
        apart.step()
    assert torch.equal(fused, torch.cat(parts))
    as_one = orthogonalize(grad[None])[0]
    as_three = orthogonalize(torch.stack(grad.chunk(3))).flatten(0, 1)
    assert (as_one - as_three).norm() > 0.1 * as_three.norm()  # so it makes a difference


# Groups


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_in_exactly_one_group(optimizer: str, tied: bool):
    model = GPT(GPTConfig(vocab_size=11, n_layer=2, n_head=2, n_embd=8, block_size=4, tied=tied))
    config = TrainConfig(optimizer=optimizer, lr=0.1, muon_lr=0.2, weight_decay=0.3, beta2=0.97)
    optimizers = make_optimizers(model, config)
    groups = [(kind, group) for kind in optimizers for group in kind.param_groups]
    placed = [id(weight) for _, group in groups for weight in group["params"]]
    assert sorted(placed) == sorted(id(weight) for weight in model.parameters())
    of = {id(weight): (kind, group) for kind, group in groups for weight in group["params"]}
    for name, weight in model.named_parameters():
        kind, group = of[id(weight)]
        matrix_of_a_block = name.startswith("blocks.") and weight.dim() == 2
        assert isinstance(kind, Muon if matrix_of_a_block and optimizer == "muon" else AdamW), name
        assert group["weight_decay"] == (0.3 if weight.dim() == 2 else 0.0), name
        assert group["peak_lr"] == group["lr"] == (0.2 if isinstance(kind, Muon) else 0.1), name
        fused = "qkv.weight" in name and isinstance(kind, Muon)
        assert group.get("split") == ((8, 8, 8) if fused else None), name
    assert optimizers[0].param_groups[0]["betas"] == (0.9, 0.97)


@pytest.mark.parametrize(
    "make", [lambda w: AdamW([{"params": w}], lr=0.1), lambda w: Muon([{"params": w}], lr=0.1)]
)
def test_an_optimizer_goes_on_from_its_saved_state(make: Callable[[list[Tensor]], torch.optim.Optimizer]):
    ours, others = twins((4, 3), dtype=torch.float32)
    whole, first = make(ours), make(others)
    drive(6, [(whole, ours), (first, others)])
    second = make(others)
    second.load_state_dict(first.state_dict())
    drive(6, [(whole, ours), (second, others)])
    assert torch.equal(ours[0], others[0])


# Schedule and clipping


def test_the_learning_rate_rises_straight_then_falls_as_half_a_cosine():
    config = TrainConfig(warmup_steps=4, max_steps=12, min_lr_fraction=0.0)
    assert [lr_factor(step, config) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lr_factor(8, config) == pytest.approx(0.5)
    assert lr_factor(6, config) == pytest.approx(0.5 + math.sqrt(2) / 4)
    assert 0 < lr_factor(11, config) < 0.04  # the last step still moves
    floor = replace(config, min_lr_fraction=0.1)
    assert lr_factor(8, floor) == pytest.approx(0.55)
    assert lr_factor(12, floor) == lr_factor(100, floor) == pytest.approx(0.1)
    assert lr_factor(0, replace(config, warmup_steps=0)) == 1.0
    assert lr_factor(5, replace(config, warmup_steps=50)) == 0.12  # a warm-up longer than the run


@pytest.mark.parametrize("longest", [0.5, 1.0, 1000.0])
def test_clipping_keeps_the_direction_and_equals_that_of_torch(longest: float):
    ours, theirs = twins((5, 4), (3,), (2,))
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a.grad = None if number == 2 else torch.randn_like(a) * 10**number
        b.grad = None if number == 2 else a.grad.clone()
    before = torch.cat([w.grad.flatten() for w in theirs[:2]])
    length = clip_gradients(ours, longest)
    assert length == pytest.approx(before.norm().item())
    assert torch.nn.utils.clip_grad_norm_(theirs, longest) == pytest.approx(length.item())
    after = torch.cat([w.grad.flatten() for w in ours[:2]])
    torch.testing.assert_close(after, torch.cat([w.grad.flatten() for w in theirs[:2]]), rtol=1e-12, atol=0)
    assert torch.cosine_similarity(before, after, dim=0) == pytest.approx(1.0)
    assert after.norm().item() == pytest.approx(min(longest, length.item()), rel=1e-5)


def interact() -> None:
    """Show what five steps of Newton-Schulz make of the singular values that you type."""
    for line in ask("singular values, such as 1 0.1 0.01> "):
        values = torch.tensor([float(word) for word in line.split()], dtype=torch.float64)
        turned = torch.linalg.qr(torch.randn(2, len(values), len(values), dtype=torch.float64)).Q
        bent = orthogonalize((turned[0] * values @ turned[1])[None], dtype=None)[0]
        after = (turned[0].T @ bent @ turned[1].T).diagonal()
        print("become " + "  ".join(f"{value:.3f}" for value in after.tolist()))


if __name__ == "__main__":
    run_validation(__file__, interact)
