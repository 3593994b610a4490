"""Checks of the KL estimators, with sums over a whole vocabulary in place of samples."""

import pytest
import torch
from torch import Tensor

from common.script import run_validation
from phase2_finetuning.project6_alignment.kl import kl_estimate

V = 11


def distributions(distance: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the policy's parameters and log-odds, and the log-odds of a reference."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(V, generator=draw, dtype=torch.float64)
    other = logits + distance * torch.randn(V, generator=draw, dtype=torch.float64)
    logits.requires_grad_()
    return logits, logits.log_softmax(0), other.log_softmax(0)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p, q) of two distributions in log-odds."""
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_have_the_mean_kl(kind):
    _, policy, reference = distributions()
    mean = (policy.exp() * kl_estimate(policy, reference, kind)).sum()
    torch.testing.assert_close(mean, kl(policy, reference), rtol=0, atol=1e-14)


def test_the_mean_of_k2_is_nearly_kl_where_policies_are_near():
    errors = []
    for distance in (0.1, 2.0):
        _, policy, reference = distributions(distance)
        mean = (policy.exp() * kl_estimate(policy, reference, "k2")).sum()
        errors.append(abs(mean / kl(policy, reference) - 1).item())
    assert errors[0] < 0.01
    assert errors[1] > 0.1


def test_k2_and_k3_are_never_negative_and_k3_scatters_less_than_k1():
    _, policy, reference = distributions(0.5)
    odds = policy.exp()
    values = {kind: kl_estimate(policy, reference, kind) for kind in ("k1", "k2", "k3")}
    assert (values["k2"] >= 0).all()
    assert (values["k3"] >= 0).all()
    assert (values["k1"] < 0).any()
    spread = {k: (odds * (v - (odds * v).sum()).square()).sum() for k, v in values.items()}
    assert spread["k3"] < spread["k1"] / 2


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_mean_gradient_is_none_that_of_kl_or_that_of_the_other_kl(kind):
    logits, policy, reference = distributions()
    drawn = policy.exp().detach()  # the samples come from the policy, and no gradient passes through drawing
    (found,) = torch.autograd.grad((drawn * kl_estimate(policy, reference, kind)).sum(), logits)
    logits, policy, reference = distributions()
    meant = {"k1": 0 * logits.sum(), "k2": kl(policy, reference), "k3": kl(reference, policy)}[kind]
    (expected,) = torch.autograd.grad(meant, logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_k1_as_a_reward_has_the_gradient_of_kl():
    logits, policy, reference = distributions()
    reward = -kl_estimate(policy, reference, "k1").detach()
    (found,) = torch.autograd.grad(-(policy.exp().detach() * reward * policy).sum(), logits)  # REINFORCE
    logits, policy, _ = distributions()
    (expected,) = torch.autograd.grad(kl(policy, reference), logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match=r"^kl_estimator \(k4\) must be k1, k2 or k3$"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


if __name__ == "__main__":
    run_validation(__file__)
