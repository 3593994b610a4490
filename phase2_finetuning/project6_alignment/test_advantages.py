"""Checks of advantages. --interactive shows those of the rewards that you type."""

import numpy as np
import pytest
import torch
from torch import Tensor

from common.script import ask, run_validation
from phase2_finetuning.project6_alignment.advantages import (
    gae,
    group_advantages,
    has_signal,
    overlong_penalty,
    token_rewards,
    whiten,
)

KINDS = ("normalized", "centered", "leave_one_out")


def answers(B: int = 6, T: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards, values and mask of answers that begin and end at different tokens."""
    draw = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, B, T, generator=draw, dtype=torch.float64)
    place = torch.arange(T)
    begin, length = torch.arange(B)[:, None] % 3 + 1, torch.tensor([1, 2, 3, 5, 4, 6])[:B, None]
    return rewards, values, (place >= begin) & (place < begin + length)


# Groups


def test_normalized_advantages_have_mean_zero_and_deviation_one_in_each_group():
    rewards = torch.randn(12, dtype=torch.float64)
    found = group_advantages(rewards, 4, "normalized").view(3, 4)
    for group, row in zip(rewards.view(3, 4).numpy(), found.numpy(), strict=True):
        np.testing.assert_allclose(row, (group - group.mean()) / (group.std(ddof=1) + 1e-4), rtol=1e-13)


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others():
    rewards = torch.randn(10, dtype=torch.float64)
    found = group_advantages(rewards, 5, "leave_one_out")
    for i, reward in enumerate(rewards):
        first = i // 5 * 5
        others = [rewards[j] for j in range(first, first + 5) if j != i]
        assert found[i] == pytest.approx(float(reward - sum(others) / 4), abs=1e-14)


def test_leave_one_out_leaves_the_mean_gradient_as_it_is_and_centered_shrinks_it():
    # all outcomes of a group of 3 answers, each right with p = sigmoid(x): sums in place of samples
    x = torch.tensor(0.4, dtype=torch.float64)
    p, G = torch.sigmoid(x).item(), 3
    mean = dict.fromkeys(("centered", "leave_one_out"), 0.0)
    for outcome in range(2**G):
        rewards = torch.tensor([float(outcome >> i & 1) for i in range(G)], dtype=torch.float64)
        odds = np.prod([p if reward else 1 - p for reward in rewards])
        score = rewards - p  # derivative of log-odds of each outcome in x
        for kind in mean:
            mean[kind] += odds * (group_advantages(rewards, G, kind) * score).mean().item()
    true = p * (1 - p)  # derivative of the mean reward
    assert mean["leave_one_out"] == pytest.approx(true, rel=1e-12)
    assert mean["centered"] == pytest.approx(true * (G - 1) / G, rel=1e-12)


def test_normalizing_makes_rare_outcomes_count_more():
    one = group_advantages(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]), 8)
    half = group_advantages(torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]), 8)
    assert one[0].item() == pytest.approx(2.5, abs=0.03)
    assert half[0].item() == pytest.approx(0.9, abs=0.04)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_equal_rewards_teaches_nothing(kind):
    rewards = torch.tensor([1.0, 1, 1, 0, 1, 0, 0, 0, 0])
    assert has_signal(rewards, 3).tolist() == [False, True, False]
    found = group_advantages(rewards, 3, kind).view(3, 3)
    assert not found[0].any()
    assert not found[2].any()
    assert found[1].abs().min() > 0.1


@pytest.mark.parametrize(
    ("group", "kind", "message"),
    [
        (1, "centered", r"^group \(1\) must be at least 2 and divide the 6 answers$"),
        (4, "centered", r"^group \(4\) must be at least 2 and divide the 6 answers$"),
        (3, "median", r"^advantage \(median\) must be normalized, centered or leave_one_out$"),
    ],
)
def test_groups_that_cannot_be_are_refused(group, kind, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(6), group, kind)


def test_the_penalty_for_length_falls_from_0_to_minus_1_over_the_buffer():
    lengths = torch.tensor([1, 20, 24, 28, 32])
    assert overlong_penalty(lengths, 32, 8).tolist() == [0, 0, 0, -0.5, -1]
    assert overlong_penalty(lengths, 32, 0).tolist() == [0] * 5


# Tokens


def test_the_reward_of_an_answer_comes_at_its_last_token_and_penalties_at_theirs():
    _, penalties, mask = answers()
    scores = torch.arange(1.0, 7, dtype=torch.float64)
    found = token_rewards(scores, penalties, mask)
    assert not found[~mask].any()
    for row in range(6):
        places = mask[row].nonzero()[:, 0].tolist()
        expected = -penalties[row, places]
        expected[-1] += scores[row]
        torch.testing.assert_close(found[row, places], expected)
    torch.testing.assert_close(found.sum(), scores.sum() - penalties[mask].sum())


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_its_sum_written_out(gamma, lam):
    rewards, values, mask = answers()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = torch.zeros_like(values)
    for row in range(len(mask)):
        places = mask[row].nonzero()[:, 0].tolist()
        after = {t: values[row, t + 1] if t + 1 in places else 0.0 for t in places}
        surprise = {t: rewards[row, t] + gamma * after[t] - values[row, t] for t in places}
        for t in places:
            expected[row, t] = sum((gamma * lam) ** (s - t) * surprise[s] for s in places if s >= t)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(returns, (expected + values) * mask, rtol=0, atol=1e-13)


def test_with_lam_1_an_advantage_is_what_came_minus_what_was_expected():
    rewards, values, mask = answers()
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_come)
    torch.testing.assert_close(advantages, (to_come - values) * mask)


def test_what_stands_outside_of_the_answers_changes_nothing():
    rewards, values, mask = answers()
    noise = 100 * torch.randn_like(values) * ~mask
    for ours, theirs in zip(
        gae(rewards, values, mask), gae(rewards + noise, values + noise, mask), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_whitening_is_over_the_answers_tokens_only():
    _, values, mask = answers()
    found = whiten(values, mask)
    assert not found[~mask].any()
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-14)
    assert found[mask].std().item() == pytest.approx(1, abs=1e-7)


def interact() -> None:
    for line in ask("rewards of a group, such as 1 0 0 1> "):
        rewards = torch.tensor([float(word) for word in line.split()])
        for kind in KINDS:
            shown = " ".join(f"{x:7.3f}" for x in group_advantages(rewards, len(rewards), kind).tolist())
            print(f"{kind:>14}: {shown}")


if __name__ == "__main__":
    run_validation(__file__, interact)
