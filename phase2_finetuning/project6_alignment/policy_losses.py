r"""From answers and their advantages to a step: PPO's loss and what became of it, as switches of one formula.

PAPERS
  [1] Proximal Policy Optimization Algorithms, Schulman et al., 2017, arXiv:1707.06347 (PPO)
  [2] DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, Shao et al., 2024,
      arXiv:2402.03300 (GRPO)
  [3] Understanding R1-Zero-Like Training: A Critical Perspective, Liu et al., 2025, arXiv:2503.20783
      (Dr. GRPO)
  [4] DAPO: An Open-Source LLM Reinforcement Learning System at Scale, Yu et al., 2025, arXiv:2503.14476
  [5] Group Sequence Policy Optimization, Zheng et al., 2025, arXiv:2507.18071 (GSPO)
  [6] MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention, MiniMax, 2025,
      arXiv:2506.13585 (CISPO)
  [7] Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs,
      Ahmadian et al., 2024, arXiv:2402.14740 (RLOO)
  [8] Implementation Matters in Deep Policy Gradients: A Case Study on PPO and TRPO, Engstrom et al., 2020,
      arXiv:2005.12729

SYMBOLS (code = paper)
  ratio = r(theta), s(theta)  odds of what was written, now over then [1] [5]    advantages = A-hat [1]
  clip_low, clip_high = epsilon_low, epsilon_high [4]                            longest = max_new_tokens

SHAPES
  B  answers    T  tokens of the longest row    what is one number per answer is (B, 1)
"""

import torch
from torch import Tensor

from phase2_finetuning.project6_alignment.config import PolicyLossConfig
from phase2_finetuning.project6_alignment.kl import kl_estimate

Sums = tuple[Tensor, Tensor]  # a sum and what it is to be divided by, so that parts of a batch add up


def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: PolicyLossConfig,
    *,
    longest: int,
    reference: Tensor | None = None,
    entropy: Tensor | None = None,
) -> Sums:
    r"""Return the loss of answers as (sum, count); advantages are (B,), or (B, T), the rest (B, T).

    PAPER: clip "ppo", [1] Eq. 7; the same with a KL in it, [2] Eq. 3; two bounds, [4] Sec. 3.1; a ratio per
        answer, [5] Eq. 5; clip "cispo", [6] Eq. 4; neither, [7].
    PAPER CONTEXT: A policy gradient is right for answers of the policy as it is. [1] reuses them for a few
        updates: it weighs each by the ratio of its odds and takes away the reason to move it further than by
        epsilon. All others are answers to: which ratio, what beyond the bound, and what mean.
    INTUITION: Do more of what went well, less of what went badly, and stop when it is no longer what you
        were judged for.
    IMPLEMENTATION: The ratio is each token's, one per answer ("sequence": the geometric mean over its
        tokens), or the whole answer's ("product"). "ppo" takes the worse of ratio * A and bounded ratio * A,
        "cispo" the bounded ratio as a fixed weight of A * log pi, so that every token keeps its gradient.
        KL and entropy bonus join each token before the mean.
    WHY: On the first update after writing all ratios are 1 and no bound holds: every variant's gradient is
        that of REINFORCE with a baseline, up to the mean (a test takes each apart).
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    ratio = policy_ratio(logprobs, old, mask, config.ratio)  # (B, T) or (B, 1)
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.clip == "ppo":
        gain = torch.minimum(ratio * advantages, bounded * advantages)
    elif config.clip == "cispo":
        gain = bounded.detach() * advantages * logprobs
    else:
        gain = ratio * advantages
    loss = -gain.expand_as(mask)
    if config.kl_weight and config.kl_in == "loss":
        if reference is None:
            raise ValueError(
                f"kl_weight ({config.kl_weight}) must come with the reference's log-probabilities"
            )
        loss = loss + config.kl_weight * kl_estimate(logprobs, reference, config.kl_estimator)
    if config.entropy_bonus:
        if entropy is None:
            raise ValueError(f"entropy_bonus ({config.entropy_bonus}) must come with the entropies")
        loss = loss - config.entropy_bonus * entropy
    return add_up(loss, mask, config.mean, longest)


def policy_ratio(logprobs: Tensor, old: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Return the odds now over the odds then, of each token (B, T) or of each answer (B, 1)."""
    gap = (logprobs - old) * mask
    if kind == "sequence":
        gap = gap.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    elif kind == "product":
        gap = gap.sum(dim=1, keepdim=True)
    return gap.exp()


def add_up(values: Tensor, mask: Tensor, mean: str, longest: int) -> Sums:
    r"""Return the sum of values (B, T) over the mask, and the count, for one of three means.

    PAPER: "sequence", [2] Eq. 3: over each answer's tokens, then over answers. "token", [4] Sec. 3.3: over
        all tokens. "constant", [3]: as "token", but divided by a number that no answer can change.
    PAPER CONTEXT: [3] found that [2] divides a wrong answer's blame by its length: rambling is cheaper.
    INTUITION: Does a jury of words have one vote per speaker or one per word?
    IMPLEMENTATION: The count is of answers ("sequence", "constant") or of tokens ("token"); the caller
        divides once, so the parts of a batch add up.
    WHY: A wrong answer of 10 tokens and one of 100: a token of the long one weighs a tenth under "sequence",
        as much under the others (a test).
    """
    kept = values * mask
    if mean == "token":
        return kept.sum(), mask.sum()
    lengths = mask.sum(dim=1).clamp(min=1) if mean == "sequence" else longest
    return (kept.sum(dim=1) / lengths).sum(), torch.tensor(len(mask), device=mask.device)


@torch.no_grad()
def clipped_share(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, config: PolicyLossConfig
) -> Tensor:
    """Return the share of tokens at which a bound holds: under "ppo" they have no gradient."""
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    ratio = policy_ratio(logprobs, old, mask, config.ratio)
    high, low = ratio > 1 + config.clip_high, ratio < 1 - config.clip_low
    if config.clip == "ppo":
        high, low = high & (advantages > 0), low & (advantages < 0)
    held = (high | low) & (config.clip != "none")
    return (held.expand_as(mask) & mask).sum() / mask.sum().clamp(min=1)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.0) -> Sums:
    r"""Return half the squared error of values (B, T) over the mask, as (sum, count).

    PAPER: [1] Eq. 9 has the squared error; the bound on how far a value may move is in the authors' code and
        was found there by [8].
    PAPER CONTEXT: Values are learned from the same few answers, several times, and can overfit as the policy.
    INTUITION: Whoever has already moved far enough this round gets no credit for moving on.
    IMPLEMENTATION: The worse of the two errors, with and without the bound around the old value.
    WHY: [8] found no gain from it; --value_clip 0 leaves it out.
    """
    error = (values - returns).square()
    if clip:
        bounded = old + (values - old).clamp(-clip, clip)
        error = torch.maximum(error, (bounded - returns).square())
    return (error * mask).sum() / 2, mask.sum()
