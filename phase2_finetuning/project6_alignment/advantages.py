r"""Was this answer, or this token, better than was to be expected?

PAPERS
  [1] High-Dimensional Continuous Control Using Generalized Advantage Estimation, Schulman et al., 2015,
      arXiv:1506.02438 (GAE)
  [2] DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, Shao et al., 2024,
      arXiv:2402.03300 (GRPO)
  [3] Understanding R1-Zero-Like Training: A Critical Perspective, Liu et al., 2025, arXiv:2503.20783
      (Dr. GRPO)
  [4] Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs,
      Ahmadian et al., 2024, arXiv:2402.14740 (RLOO)
  [5] DAPO: An Open-Source LLM Reinforcement Learning System at Scale, Yu et al., 2025, arXiv:2503.14476
  [6] Training language models to follow instructions with human feedback, Ouyang et al., 2022,
      arXiv:2203.02155 (InstructGPT)

SYMBOLS (code = paper)
  gamma, lam = lambda  discount and trust in rewards [1]    surprise = delta  one step's TD error [1]
  group = G            answers to one prompt [2]            rewards = r, R    of whole answers [2] [4]

SHAPES
  B  answers, those to one prompt adjacent    T  tokens of the longest row
"""

import torch
from torch import Tensor

TINY = 1e-4  # added to a standard deviation, as trl does


def group_advantages(rewards: Tensor, group: int, kind: str = "normalized") -> Tensor:
    r"""Map rewards (B,) to advantages (B,): how much better each answer was than its group.

    PAPER: "normalized", [2] Sec. 4.1.2; "centered", [3], whose authors name two biases of [2] and drop the
        division; "leave_one_out", [4].
    PAPER CONTEXT: PPO learns a second network to say what reward was to be expected. For a language model,
        asking the same question several times says it, too.
    INTUITION: Grade on a curve: the class shows how hard the exam was.
    IMPLEMENTATION: Centered is r - mean. Leave-one-out is r minus the mean of the others: the same times
        G / (G - 1). Normalized divides by the sample standard deviation, plus 1e-4.
    WHY: Any baseline that the answer itself has no part in leaves the gradient's mean as it is; centered
        shrinks it by (G - 1) / G, and normalized makes nearly solved and nearly hopeless questions count
        more (with 1 of 8 right, its advantage is 2.5; with 4 of 8, 0.9). Tests hold all three sentences.
    """
    if group < 2 or len(rewards) % group:
        raise ValueError(f"group ({group}) must be at least 2 and divide the {len(rewards)} answers")
    table = rewards.view(-1, group)
    centered = table - table.mean(dim=1, keepdim=True)
    if kind == "leave_one_out":
        centered = centered * group / (group - 1)
    elif kind == "normalized":
        centered = centered / (table.std(dim=1, keepdim=True) + TINY)
    elif kind != "centered":
        raise ValueError(f"advantage ({kind}) must be normalized, centered or leave_one_out")
    return centered.flatten()


def has_signal(rewards: Tensor, group: int) -> Tensor:
    """Say of each group (B / group,) if its rewards differ: else its advantages are 0 ([5] Sec. 3.2)."""
    table = rewards.view(-1, group)
    return (table != table[:, :1]).any(dim=1)


def overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    r"""Return what is added to the rewards of answers of these lengths: 0, then down to -1 ([5] Eq. 13).

    It falls in a straight line over the last `buffer` tokens before `longest`; with buffer 0 there is none.
    """
    over = lengths - (longest - buffer)
    return -(over / max(buffer, 1)).clamp(0, 1) if buffer else torch.zeros_like(over, dtype=torch.float32)


def token_rewards(rewards: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """Return rewards (B, T): minus each token's penalty, and the answer's own reward (B,) at its last token.

    So [6] and PPO before it: the price of each token's KL is paid where it arises.
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    last = (place * mask).argmax(dim=1)
    paid = -penalties * mask
    return paid.scatter_add(1, last[:, None], (rewards * mask.any(dim=1)).to(paid.dtype)[:, None])


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    r"""Map rewards and values of an answer's tokens, (B, T), to advantages and returns, (B, T); 0 elsewhere.

    PAPER: [1] Eq. 16: the sum over l of (gamma lam)^l times the surprise l tokens later.
    PAPER CONTEXT: One reward comes after the last token. Which of the hundred before earned it? All, says
        REINFORCE, with much noise. The one at which the value model changed its mind, says a TD error, as
        far as that model is right. [1] mixes the two.
    INTUITION: A surprise is credited to the token at which it came, and ever less to those before it.
    IMPLEMENTATION: values[b, t] is what is expected before tokens[b, t] is written. From the end to the
        start, each advantage is the surprise plus gamma lam times the next one. Behind the last token of
        the answer there is nothing to expect. Returns are advantages + values: what the values should be.
    WHY: lam = 1 is the return minus the value, lam = 0 the surprise alone (tests), and this loop of T steps
        gives what Eq. 16, written out, adds up in T^2.
    """
    advantages, later = torch.zeros_like(values), values.new_zeros(len(values))
    following = later  # value of what comes next
    for t in reversed(range(values.shape[1])):
        surprise = rewards[:, t] + gamma * following - values[:, t]
        later = (surprise + gamma * lam * later).where(mask[:, t], 0)
        following = values[:, t].where(mask[:, t], 0)
        advantages[:, t] = later
    return advantages, (advantages + values) * mask


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Bring the entries that the mask names to mean 0 and deviation 1, over the whole batch."""
    kept = advantages[mask]
    return (advantages - kept.mean()) / (kept.std() + 1e-8) * mask
