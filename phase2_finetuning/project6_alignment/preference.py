r"""Learning from a better and a worse answer without reinforcement learning: five losses in one table.

PAPERS
  [1] Direct Preference Optimization: Your Language Model is Secretly a Reward Model, Rafailov et al., 2023,
      arXiv:2305.18290 (DPO)
  [2] A General Theoretical Paradigm to Understand Learning from Human Preferences, Azar et al., 2023,
      arXiv:2310.12036 (IPO)
  [3] KTO: Model Alignment as Prospect Theoretic Optimization, Ethayarajh et al., 2024, arXiv:2402.01306
  [4] ORPO: Monolithic Preference Optimization without Reference Model, Hong, Lee & Thorne, 2024,
      arXiv:2403.07691
  [5] SimPO: Simple Preference Optimization with a Reference-Free Reward, Meng, Xia & Chen, 2024,
      arXiv:2405.14734
  [6] Iterative Reasoning Preference Optimization, Pang et al., 2024, arXiv:2404.19733
  [7] Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization, Razin et al.,
      2024, arXiv:2410.08847

SYMBOLS (code = paper)
  chosen, rejected = y_w, y_l          the better and the worse answer
  beta = beta [1] [3] [5], tau [2], lambda [4]    stranger = y'  another prompt's answer [3]

SHAPES
  B  pairs    K  answers per pair: chosen, rejected and, for KTO, a stranger    T  tokens of the longest row
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from phase1_foundation.project3_pretrain.accumulation import to_device
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project6_alignment.config import PreferenceLossConfig
from phase2_finetuning.project6_alignment.logprobs import answer_logprobs


@dataclass
class PairBatch:
    """Pairs of answers: what a step learns from.

    PAPER: a prompt, y_w and y_l, [1] Sec. 3; y' of another prompt, [3] Sec. 4.
    PAPER CONTEXT: The reference never changes, so what it thinks of a pair is computed once, beforehand.
    INTUITION: Two essays on one question, and what last year's teacher would have said of them.
    IMPLEMENTATION: Rows begin together and are filled up behind; `mask` names the answers' tokens.
    WHY: With the reference's numbers in the batch, no second model is in memory while training.
    """

    tokens: Tensor  # (B, K, T) int64: prompt, answer, filling
    mask: Tensor  # (B, K, T) bool: the answer's tokens
    reference: Tensor  # (B, K) float: log-probability of each answer under the reference; 0 where not needed

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on a device."""
        return to_device(self, device)


class Odds(NamedTuple):
    """What a policy and its reference think of pairs.

    PAPER: log pi(y | x) and log pi_ref(y | x) of [1] Eq. 7; per token, [5] Eq. 4.
    PAPER CONTEXT: All five losses are functions of these numbers and of nothing else.
    INTUITION: The marks of two examiners, before anybody argues about them.
    IMPLEMENTATION: Sums over an answer's tokens; `gaps` and `means` are the two ways to compare them.
    WHY: So a loss is one line, and a test can hold it to trl's on numbers without any model.
    """

    policy: Tensor  # (B, K) log-probabilities of the answers
    reference: Tensor  # (B, K) the same, before any training
    lengths: Tensor  # (B, K) tokens

    @property
    def gaps(self) -> Tensor:
        """How much likelier than to the reference each answer is to the policy, (B, K) in nats."""
        return self.policy - self.reference

    @property
    def means(self) -> Tensor:
        """Log-probability per token, (B, K)."""
        return self.policy / self.lengths


def dpo(odds: Odds, beta: float, config: PreferenceLossConfig) -> Tensor:
    r"""Return DPO's loss of each pair, (B,).

    PAPER: [1] Eq. 7; a share of labels that are wrong, as trl's label_smoothing.
    PAPER CONTEXT: RLHF learns a reward from pairs, then a policy from the reward, by PPO. [1] solves the
        second step on paper: the best policy's log-ratio to the reference is the reward, over beta, up to a
        number that depends on the prompt alone, and that number cancels within a pair.
    INTUITION: Say the better answer more often than you used to, compared with the worse one.
    IMPLEMENTATION: -log sigmoid(beta * (gap of the chosen - gap of the rejected)): logistic regression.
    WHY: Before the first step all gaps are 0 and the loss is ln 2, whatever the model (a test).
    """
    margin = beta * (odds.gaps[:, 0] - odds.gaps[:, 1])
    smooth = config.label_smoothing
    return -(1 - smooth) * F.logsigmoid(margin) - smooth * F.logsigmoid(-margin)


def ipo(odds: Odds, beta: float, config: PreferenceLossConfig) -> Tensor:
    r"""Return IPO's loss of each pair, (B,).

    PAPER: [2] Eq. 17.
    PAPER CONTEXT: Where one answer always wins, DPO's best margin is infinite, and its KL bounds nothing.
    INTUITION: Aim at a margin, and turn back when beyond it.
    IMPLEMENTATION: (margin - 1 / (2 beta))^2, the margin in nats per token: a sum over tokens would make long
        answers' squares huge. trl says that the authors did so, too.
    WHY: The gradient turns round at the margin 1 / (2 beta), where DPO's only fades (a test).
    """
    gaps = odds.gaps / odds.lengths
    return (gaps[:, 0] - gaps[:, 1] - 1 / (2 * beta)).square()


def kto(odds: Odds, beta: float, config: PreferenceLossConfig) -> Tensor:
    r"""Return KTO's loss of each pair, the mean of its two answers', (B,).

    PAPER: [3] Sec. 4: value function, reference point and loss.
    PAPER CONTEXT: Pairs are dear, thumbs up or down are cheap. [3] needs no pairs: it asks of each answer
        whether it is better than usual, and weighs losses and gains as people do.
    INTUITION: A gain or a loss is felt from where one stands.
    IMPLEMENTATION: Where one stands is the KL to the reference, estimated from a batch's answers to other
        prompts (the strangers), at least 0, without a gradient. So this loss alone depends on how a batch is
        cut up. Our answers come in pairs, but no formula here uses that.
    WHY: The gradient fades for an answer that is already far above or below the rest, so one mislabelled
        answer cannot pull without end: at a margin of 10 its pull is 1 / 5500 of that at 0 (a test).
    """
    stand = (odds.gaps[:, 2]).mean().clamp(min=0).detach()
    up = config.desirable_weight * (1 - torch.sigmoid(beta * (odds.gaps[:, 0] - stand)))
    down = config.undesirable_weight * (1 - torch.sigmoid(beta * (stand - odds.gaps[:, 1])))
    return (up + down) / 2


def orpo(odds: Odds, beta: float, config: PreferenceLossConfig) -> Tensor:
    r"""Return ORPO's loss of each pair, (B,).

    PAPER: [4] Eq. 6 (the sum) and Eq. 7 (the odds ratio).
    PAPER CONTEXT: Tuning on good answers alone makes bad ones likelier as well, says [4], Fig. 3; so one
        tunes, then aligns, with a second model in memory. [4] does both at once, with none.
    INTUITION: Learn the good answer by heart, and be slightly repelled by the bad one.
    IMPLEMENTATION: Loss of the chosen per token, plus beta * -log sigmoid(log odds ratio), where the odds of
        p are p / (1 - p), and p an answer's probability per token (geometric mean). At p = 1 the odds are
        infinite; p stops short of it by 1e-6.
    WHY: It is the only loss here whose minimum needs no start from a tuned model.
    """
    means = odds.means[:, :2].clamp(max=-1e-6)
    log_odds = means - torch.log(-torch.expm1(means))
    return -odds.means[:, 0] - beta * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])


def simpo(odds: Odds, beta: float, config: PreferenceLossConfig) -> Tensor:
    r"""Return SimPO's loss of each pair, (B,).

    PAPER: [5] Eq. 6.
    PAPER CONTEXT: DPO's reward is a ratio to the reference, but what decides in writing is the policy's own
        odds; [5] finds that the two rank half of the pairs differently.
    INTUITION: Prefer in training what you would prefer in writing, and by a clear lead.
    IMPLEMENTATION: Like DPO, with log-probability per token in place of the log-ratio, and gamma to lead by.
    WHY: Per token: as a sum, long answers would be the worse ones by their length alone.
    """
    return -F.logsigmoid(beta * (odds.means[:, 0] - odds.means[:, 1]) - config.gamma)


class Entry(NamedTuple):
    """A row of the table of losses."""

    loss: Callable[[Odds, float, PreferenceLossConfig], Tensor]
    beta: float  # the usual one
    uses_reference: bool


LOSSES = {
    "dpo": Entry(dpo, 0.1, True),
    "ipo": Entry(ipo, 0.5, True),
    "kto": Entry(kto, 0.1, True),
    "orpo": Entry(orpo, 0.1, False),
    "simpo": Entry(simpo, 2.0, False),
}


def strength(config: PreferenceLossConfig) -> float:
    """Return beta: the one that was asked for, or the loss's usual one."""
    return LOSSES[config.loss].beta if config.beta is None else config.beta


def implicit_rewards(odds: Odds, config: PreferenceLossConfig) -> Tensor:
    """Return the rewards that a policy's odds amount to, (B, K): what the loss makes the chosen lead by."""
    told = odds.gaps if LOSSES[config.loss].uses_reference else odds.means
    return strength(config) * told


def pair_odds(model: Decoder, batch: PairBatch) -> Odds:
    """Return what a model thinks of the answers of a batch."""
    logprobs = answer_logprobs(model, batch.tokens.flatten(0, 1), batch.mask.flatten(0, 1))
    return Odds(
        logprobs.sum(dim=1).view(batch.reference.shape), batch.reference, batch.mask.sum(dim=2).clamp(min=1)
    )


def preference_loss(model: Decoder, batch: PairBatch, config: PreferenceLossConfig) -> tuple[Tensor, int]:
    """Return the sum of the losses of pairs, and how many they are: what project 3's trainer asks for.

    `sft_weight` adds the chosen answer's loss per token ([6]; ORPO has it in it). DPO widens the gap between
    two answers even where both become less likely ([7]); this holds the better one up.
    """
    odds = pair_odds(model, batch)
    losses = LOSSES[config.loss].loss(odds, strength(config), config)
    if config.sft_weight and config.loss != "orpo":
        losses = losses - config.sft_weight * odds.means[:, 0]
    return losses.sum(), len(losses)
