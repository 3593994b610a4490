r"""What moves a policy after a round: one update, of answers that were written, judged and credited.

PAPERS
  [1] Proximal Policy Optimization Algorithms, Schulman et al., 2017, arXiv:1707.06347
  [2] Training language models to follow instructions with human feedback, Ouyang et al., 2022,
      arXiv:2203.02155 (InstructGPT)
  [3] Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, Yao et al., 2025,
      fengyao.notion.site/off-policy-rl

SYMBOLS
  old        log-odds of what was written, before the first update of the round
  reference  the same under the model that training began with

SHAPES
  B  answers    T  tokens of the longest row
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.device import pick_dtype
from phase1_foundation.project1_minimal_gpt.optimizer import clip_gradients, make_optimizers
from phase1_foundation.project1_minimal_gpt.train import autocast
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project6_alignment.config import PolicyLossConfig, RLConfig
from phase2_finetuning.project6_alignment.logprobs import answer_logprobs, answer_odds
from phase2_finetuning.project6_alignment.policy_losses import Sums, add_up, clipped_share, policy_loss
from phase2_finetuning.project6_alignment.rollouts import Rollout, off_policy_weights

ROWS = 64  # answers that are read at once where no gradient is wanted
WATCHED = 8  # one answer in so many is looked at, if the distance from the reference has no price
Numbers = dict[str, float]


class PolicyLearner:
    r"""A policy, the frozen copy of what it was, and how it moves: all that GRPO and PPO share.

    PAPER: [1] Algorithm 1: several epochs of minibatches after each round; the reference, [2] Sec. 3.5.
    PAPER CONTEXT: Answers are dear, so each is learned from more than once; from the second update on the
        policy is no longer the one that wrote them, which is what the ratio in the loss is for.
    INTUITION: Go over the exam once more, but not until the answers are known by heart.
    IMPLEMENTATION: The odds noted while writing are the `old` ones: writer and trainer agree, so nothing is
        computed twice. Only with `off_policy_cap` are they computed again, and what was written weighed by
        the difference ([3]). Rows are cut to the longest answer of an update, parts add up as sums.
    WHY: One update per round, with nothing clipped, is REINFORCE; micro-batches of one give the same weights
        as the whole (tests).
    """

    columns: tuple[str, ...] = ("kl", "entropy", "clipped", "gradient")

    def __init__(self, rl: RLConfig, loss: PolicyLossConfig, policy: Decoder) -> None:
        self.rl, self.loss, self.policy = rl, loss, policy
        self.reference = copy.deepcopy(policy).eval().requires_grad_(False)
        self.device = next(policy.parameters()).device
        self.dtype = pick_dtype(rl.precision, self.device)
        if self.dtype == torch.float16:
            raise ValueError("precision (fp16) must be fp32 or bf16: here nothing scales gradients up")
        self.modules: dict[str, nn.Module] = {"policy": policy}
        self.policy_optimizers = make_optimizers(policy, rl)
        self.optimizers = list(self.policy_optimizers)

    @torch.no_grad()
    def logprobs(self, model: Decoder, rollout: Rollout) -> Tensor:
        """Return what a model thinks of the answers, (B, T), in parts of similar length."""
        found = torch.zeros_like(rollout.logprobs)
        ends = rollout.mask.long().argmax(dim=1) + rollout.mask.sum(dim=1)
        for rows in ends.argsort().split(ROWS):
            part = rollout.take(rows)
            with autocast(self.device, self.dtype):
                odds = answer_logprobs(model, part.tokens, part.mask, self.rl.temperature)
            found[rows, : odds.shape[1]] = odds.to(found.dtype)
        return found

    def before(self, rollout: Rollout) -> "Before":
        """Return what is known of a round's answers before the first update."""
        old, weights = rollout.logprobs, rollout.mask.to(rollout.logprobs.dtype)
        if self.rl.off_policy_cap:
            old = self.logprobs(self.policy, rollout)
            weights = off_policy_weights(old, rollout.logprobs, rollout.mask, self.rl.off_policy_cap)
        watched = torch.arange(0, len(old), 1 if self.loss.kl_weight else WATCHED, device=self.device)
        part = rollout.take(watched)
        known, T = self.logprobs(self.reference, part), part.mask.shape[1]
        reference = torch.zeros_like(old)
        reference[watched, :T] = known
        kl = ((old[watched, :T] - known) * part.mask).sum(dim=1).mean()
        entropy = -(old * rollout.mask).sum() / rollout.mask.sum()
        return Before(old, reference, weights, {"kl": kl.item(), "entropy": entropy.item()})

    def learn_from(
        self, rollout: Rollout, before: "Before", advantages: Tensor, rows: Tensor, share: float
    ) -> Numbers:
        """Move the policy once, along the answers in `rows`; advantages are (B, T)."""
        seen = [torch.zeros(2, dtype=advantages.dtype, device=self.device)]  # clipped tokens, tokens
        losses = self._losses(rollout, before, advantages, rows, seen)
        weights = list(self.policy.parameters())
        length = update(weights, self.policy_optimizers, losses, self.rl.grad_clip, share)
        clipped, tokens = torch.stack(seen).sum(dim=0).tolist()
        return {"clipped": clipped / max(1, tokens), "gradient": length}

    def _losses(
        self, rollout: Rollout, before: "Before", advantages: Tensor, rows: Tensor, seen: list[Tensor]
    ) -> Iterator[Sums]:
        longest = self.rl.max_new_tokens
        if not (self.loss.kl_weight or self.loss.entropy_bonus):  # then only an advantage makes a gradient
            useful = advantages[rows].any(dim=1)
            idle, rows = rows[~useful], rows[useful]
            yield add_up(torch.zeros_like(advantages[idle]), rollout.mask[idle], self.loss.mean, longest)
        for part in rows.split(self.rl.micro_batch_size or len(rows)) if len(rows) else ():
            piece = rollout.take(part)
            mask, T = piece.mask, piece.mask.shape[1]
            old, reference, gains = (each[part, :T] for each in (before.old, before.reference, advantages))
            with autocast(self.device, self.dtype):
                odds, entropy = answer_odds(self.policy, piece.tokens, mask, self.rl.temperature)
            clipped = clipped_share(odds, old, gains, mask, self.loss)
            seen.append(torch.stack([clipped * mask.sum(), mask.sum()]).to(seen[0]))
            known = {"reference": reference, "entropy": entropy}
            yield policy_loss(odds, old, gains, mask, self.loss, longest=longest, **known)


class Before(NamedTuple):
    """What is known of a round's answers before the first update."""

    old: Tensor  # (B, T) the policy's log-odds
    reference: Tensor  # (B, T) the reference's; without a price on the distance only of some rows
    weights: Tensor  # (B, T) what each token counts
    numbers: Numbers  # nats per answer from the reference; entropy, nats per token


def minibatches(rl: RLConfig, rows: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the rows of each update of a round: every epoch is all rows in a new order, cut into parts.

    The order is drawn from torch's random generator, which each round seeds.
    """
    for _ in range(rl.epochs):
        yield from (part.to(device) for part in torch.randperm(rows).chunk(rl.minibatches))


def update(
    weights: Sequence[nn.Parameter],
    optimizers: Sequence[Optimizer],
    losses: Iterable[Sums],
    grad_clip: float,
    share: float,
) -> float:
    """Move weights once along the mean of losses, (sum, count) each, and return the gradient's length.

    Each loss is taken, and back through the model, before the next one is made.
    """
    for optimizer in optimizers:
        optimizer.zero_grad()
    count = torch.zeros((), dtype=weights[0].dtype, device=weights[0].device)
    for total, number in losses:
        if total.requires_grad:
            total.backward()
        count += number
    if all(weight.grad is None for weight in weights):
        return 0.0  # nothing to learn: no answer was better than another
    length = clip_gradients(weights, grad_clip, 1 / count.clamp(min=1))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        optimizer.step()
    return length.item()


def means(numbers: Sequence[Numbers]) -> Numbers:
    """Return the mean of each number over some updates."""
    return {name: sum(each[name] for each in numbers) / len(numbers) for name in numbers[0]}
