"""Checks of the policy's losses: against trl's, and against REINFORCE where nothing has changed yet."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.script import run_validation
from phase2_finetuning.project6_alignment.advantages import gae
from phase2_finetuning.project6_alignment.config import GRPOConfig, PolicyLossConfig
from phase2_finetuning.project6_alignment.policy_losses import (
    add_up,
    clipped_share,
    policy_loss,
    policy_ratio,
    value_loss,
)

B, T, LONGEST = 6, 10, 12
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"mean": "sequence"},
    "dr_grpo": {"mean": "constant"},
    "dapo": {"mean": "token", "clip_high": 0.28},
    "gspo": {"mean": "sequence", "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"mean": "token", "clip": "cispo", "clip_low": 1.0, "clip_high": 0.28},
    "rloo": {"mean": "sequence", "ratio": "product", "clip": "none"},
}


def answers(distance: float = 0.4) -> dict[str, Tensor]:
    """Return log-probabilities now, then and under a reference, advantages, entropies and the mask."""
    draw = torch.Generator().manual_seed(0)
    now = -2 * torch.rand(B, T, generator=draw, dtype=torch.float64)
    gaps = distance * torch.randn(2, B, T, generator=draw, dtype=torch.float64)
    begin, length = torch.arange(B)[:, None] % 3 + 1, torch.tensor([1, 2, 7, 5, 4, 6])[:, None]
    place = torch.arange(T)
    mask = (place >= begin) & (place < begin + length)
    advantages = torch.randn(B, generator=draw, dtype=torch.float64)
    entropy = torch.rand(B, T, generator=draw, dtype=torch.float64)
    return {
        "logprobs": now, "old": now + gaps[0], "reference": now + gaps[1], "advantages": advantages,
        "mask": mask, "entropy": entropy,
    }  # fmt: skip


def variant(name: str, **changes: Any) -> PolicyLossConfig:
    return PolicyLossConfig(**VARIANTS[name] | changes)


def loss_and_grad(config: PolicyLossConfig, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    now = given["logprobs"].clone().requires_grad_()
    total, count = policy_loss(
        now, given["old"], given["advantages"], given["mask"], config,
        longest=LONGEST, reference=given["reference"], entropy=given["entropy"],
    )  # fmt: skip
    return total.detach() / count, torch.autograd.grad(total / count, now)[0]


class Alone:
    """What trl asks of accelerate: here there is one process."""

    device, num_processes, sync_gradients = torch.device("cpu"), 1, True

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


def trl_grpo(config: PolicyLossConfig, given: dict[str, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of trl's GRPOTrainer, given what a model would have found."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    now = given["logprobs"].clone().requires_grad_()
    cispo = kind == "cispo"  # there trl's epsilon_high is the largest weight itself
    settings = SimpleNamespace(
        accelerator=Alone(), model=SimpleNamespace(training=False), _metrics={"eval": defaultdict(list)},
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1,
        use_adaptive_entropy=False, max_completion_length=LONGEST, loss_type=kind, beta=config.kl_weight,
        importance_sampling_level=config.ratio, epsilon_low=config.clip_low,
        epsilon_high=config.clip_high + cispo, _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (now, given["entropy"], None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1), "completion_ids": torch.zeros(B, T),
        "completion_mask": given["mask"].long(), "advantages": given["advantages"],
        "old_per_token_logps": given["old"], "ref_per_token_logps": given["reference"],
        "num_items_in_batch": given["mask"].sum(),
    }  # fmt: skip
    loss = grpo_trainer.GRPOTrainer._compute_loss(settings, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, now)[0]


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("grpo", "grpo"), ("dr_grpo", "dr_grpo"), ("dapo", "dapo"), ("gspo", "grpo"), ("cispo", "cispo")],
)
def test_loss_and_gradient_equal_trls(name, kind, kl_weight):
    config, given = variant(name, kl_weight=kl_weight), answers()
    ours, theirs = loss_and_grad(config, given), trl_grpo(config, given, kind)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    if name != "gspo":  # whose bounds are so near that with these odds every answer is beyond
        assert ours[1].abs().max() > 1e-3


def test_rloo_with_the_bound_that_trl_gives_it_equals_trls():
    rloo_trainer = pytest.importorskip("trl.trainer.rloo_trainer")
    config, given = variant("rloo", clip="ppo"), answers(0.05)
    now = given["logprobs"].clone().requires_grad_()
    settings = SimpleNamespace(
        accelerator=Alone(), model=SimpleNamespace(training=False), _metrics={"eval": defaultdict(list)},
        aux_loss_enabled=False, epsilon_low=0.2, epsilon_high=0.2,
        _get_per_token_logps_and_entropies=lambda *_, **__: (now, given["entropy"], None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1), "completion_ids": torch.zeros(B, T),
        "completion_mask": given["mask"].long(), "advantages": given["advantages"],
        "old_logps": (given["old"] * given["mask"]).sum(1),
    }  # fmt: skip
    loss = rloo_trainer.RLOOTrainer._compute_loss(settings, None, inputs)
    theirs = loss.detach(), torch.autograd.grad(loss, now)[0]
    ours = loss_and_grad(config, given)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-14)


def test_gspo_within_its_bounds_equals_trls():
    config, given = variant("gspo", clip_low=0.5, clip_high=0.5), answers()
    ours, theirs = loss_and_grad(config, given), trl_grpo(config, given, "grpo")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert ours[1].abs().max() > 1e-2


# The first step after writing


def on_policy() -> dict[str, Tensor]:
    given = answers()
    return given | {"old": given["logprobs"].clone()}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_preset_of_a_variant_has_its_switches(name):
    preset = GRPOConfig.from_cli(["--config", name]).policy
    for key, value in VARIANTS[name].items():
        if not (name == "gspo" and key.startswith("clip_")):  # our steps are larger, and so are its bounds
            assert getattr(preset, key) == value, key


@pytest.mark.parametrize("name", VARIANTS)
def test_on_the_first_step_every_variant_is_reinforce_with_a_baseline(name):
    config, given = variant(name), on_policy()
    mask, lengths = given["mask"], given["mask"].sum(1, keepdim=True).double()
    weight = {  # of a token's A * gradient of log pi
        "grpo": 1 / (B * lengths), "gspo": 1 / (B * lengths), "rloo": 1 / B,
        "dr_grpo": 1 / (B * LONGEST), "dapo": 1 / lengths.sum(), "cispo": 1 / lengths.sum(),
    }[name]  # fmt: skip
    _, grad = loss_and_grad(config, given)
    torch.testing.assert_close(grad, -given["advantages"][:, None] * mask * weight, rtol=0, atol=1e-15)
    assert clipped_share(given["logprobs"], given["old"], given["advantages"], mask, config) == 0


def test_on_the_first_step_ppo_with_gae_is_reinforce_with_its_advantages():
    given = on_policy()
    rewards, values = torch.randn(2, B, T, dtype=torch.float64)
    advantages, _ = gae(rewards, values, given["mask"])
    _, grad = loss_and_grad(PolicyLossConfig(mean="token"), given | {"advantages": advantages})
    torch.testing.assert_close(grad, -advantages / given["mask"].sum().double(), rtol=0, atol=1e-15)


# The switches


def test_a_mean_over_answers_blames_a_token_of_a_long_wrong_answer_less():
    mask = torch.arange(101) >= torch.tensor([[91], [1]])  # answers of 10 and of 100 tokens
    weights = {}
    for mean in ("sequence", "token", "constant"):
        values = torch.ones(2, 101, requires_grad=True)
        total, count = add_up(values, mask, mean, 100)
        (grad,) = torch.autograd.grad(total / count, values)
        weights[mean] = (grad[1, -1] / grad[0, -1]).item()
        assert not grad[~mask].any()
    assert weights == pytest.approx({"sequence": 0.1, "token": 1, "constant": 1})


def test_beyond_the_bound_ppo_stops_and_cispo_goes_on():
    # rows: ratio too high and good, too high and bad, too low and good, too low and bad
    ratio = torch.tensor([[1.5], [1.5], [0.5], [0.5]], dtype=torch.float64)
    advantages, mask = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64), torch.ones(4, 1, dtype=torch.bool)
    old = torch.full((4, 1), -1.0, dtype=torch.float64)
    given = {"logprobs": old + ratio.log(), "old": old, "advantages": advantages, "mask": mask}
    given |= {"reference": old, "entropy": old}
    moves = {
        clip: (loss_and_grad(PolicyLossConfig(clip=clip), given)[1] != 0)[:, 0].tolist()  # type: ignore[arg-type]
        for clip in ("ppo", "cispo", "none")
    }
    assert moves == {"ppo": [False, True, True, False], "cispo": [True] * 4, "none": [True] * 4}
    for clip, share in (("ppo", 0.5), ("cispo", 1.0), ("none", 0.0)):
        config = PolicyLossConfig(clip=clip)  # type: ignore[arg-type]
        assert clipped_share(given["logprobs"], old, advantages, mask, config).item() == share


def test_a_higher_upper_bound_lets_a_rare_token_rise_further():
    # Yu et al. 2025, Sec. 3.1: from odds of 0.01 a bound of 0.2 allows 0.012
    for clip_high, moves in ((0.2, False), (0.28, True)):
        given = on_policy() | {"advantages": torch.ones(B, dtype=torch.float64)}
        given["old"] = given["logprobs"] - torch.tensor(1.25).log()
        _, grad = loss_and_grad(PolicyLossConfig(clip_high=clip_high), given)
        assert bool(grad.any()) == moves


def test_ratios_are_of_tokens_of_their_mean_and_of_the_whole_answer():
    given = answers()
    now, old, mask = (given[name] for name in ("logprobs", "old", "mask"))
    for row in range(B):
        gaps = (now - old)[row, mask[row]]
        whole = policy_ratio(now, old, mask, "product")[row]
        assert whole.item() == pytest.approx(gaps.sum().exp().item())
        assert policy_ratio(now, old, mask, "sequence")[row].item() == pytest.approx(gaps.mean().exp().item())
        torch.testing.assert_close(policy_ratio(now, old, mask, "token")[row, mask[row]], gaps.exp())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_parts_of_a_batch_add_up(name):
    config, given = variant(name), answers()

    def sums(rows: slice) -> Tensor:
        part = {key: value[rows] for key, value in given.items()}
        how: dict[str, Any] = {key: part[key] for key in ("reference", "entropy")}
        found = policy_loss(
            part["logprobs"], part["old"], part["advantages"], part["mask"], config, longest=LONGEST, **how
        )
        return torch.stack([found[0], found[1].double()])

    torch.testing.assert_close(sums(slice(0, 2)) + sums(slice(2, B)), sums(slice(0, B)))


def test_an_entropy_bonus_pays_for_undecided_odds():
    given = answers()
    plain, _ = loss_and_grad(PolicyLossConfig(mean="token"), given)
    paid, _ = loss_and_grad(PolicyLossConfig(mean="token", entropy_bonus=0.3), given)
    torch.testing.assert_close(plain - paid, 0.3 * given["entropy"][given["mask"]].mean())


def test_what_is_missing_is_named():
    given = answers()
    args = given["logprobs"], given["old"], given["advantages"], given["mask"]
    with pytest.raises(ValueError, match=r"^kl_weight \(0.1\) must come with the reference's log-prob"):
        policy_loss(*args, PolicyLossConfig(kl_weight=0.1), longest=LONGEST)
    with pytest.raises(ValueError, match=r"^entropy_bonus \(0.1\) must come with the entropies$"):
        policy_loss(*args, PolicyLossConfig(entropy_bonus=0.1), longest=LONGEST)


# Values


def test_the_value_loss_is_half_the_squared_error_of_the_answers_tokens():
    given = answers()
    values, returns = given["logprobs"], given["old"]
    total, count = value_loss(values, values, returns, given["mask"])
    error = (values - returns)[given["mask"]]
    assert (total / count).item() == pytest.approx(error.square().mean().item() / 2)


def test_a_value_that_moved_far_enough_this_round_gets_no_credit_for_moving_on():
    old, returns = torch.zeros(1, 4), torch.full((1, 4), 3.0)
    values = torch.tensor([[-0.5, 0.1, 0.3, 4.0]], requires_grad=True)
    total, _ = value_loss(values, old, returns, torch.ones(1, 4, dtype=torch.bool), clip=0.2)
    (grad,) = torch.autograd.grad(total, values)
    # wrong way: pulled back; within: pulled on; beyond: not; past the goal: the bounded error is the worse
    torch.testing.assert_close(grad, torch.tensor([[-3.5, -2.9, 0.0, 0.0]]))


if __name__ == "__main__":
    run_validation(__file__)
