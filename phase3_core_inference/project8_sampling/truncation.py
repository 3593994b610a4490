r"""Which tokens may be drawn at all: top-k, top-p and their relatives, all of them an interval of logits.

PAPERS
  [1] Hierarchical Neural Story Generation, Fan, Lewis & Dauphin, 2018, arXiv:1805.04833 (top-k)
  [2] The Curious Case of Neural Text Degeneration, Holtzman et al., 2019, arXiv:1904.09751 (top-p)
  [3] Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs, Nguyen et al., 2024,
      arXiv:2407.01082
  [4] Locally Typical Sampling, Meister et al., 2022, arXiv:2202.00666
  [5] Truncation Sampling as Language Model Desmoothing, Hewitt, Manning & Liang, 2022, arXiv:2210.15191
      (epsilon and eta)
  [6] Top-nσ: Not All Logits Are You Need, Tang et al., 2024, arXiv:2411.07641

SYMBOLS
  surprise  -ln p, in nats: what a token tells      entropy  the surprise that is to be expected

SHAPES
  R  rows, one request each    V  vocab_size    K  tokens ranked, K <= V
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from phase3_core_inference.project8_sampling.config import NEUTRAL
from phase3_core_inference.project8_sampling.mirostat import mirostat

Array = np.ndarray[Any, Any]


@dataclass
class Ranked:
    """The K likeliest tokens of each row, from the likeliest down, and what must be known of the others.

    PAPER: none; every rule of [1] to [6] needs this and no more.
    PAPER CONTEXT: Written down one by one, each rule sorts or sums the whole vocabulary again.
    INTUITION: To cut the tail off, look at the head, and know what the tail weighs.
    IMPLEMENTATION: `weights` are exp(logit - largest logit), 0 once a rule has cut the token; `mass` is the
        weight of all that is still in. A row is `whole` while nothing is cut, so that unranked tokens are
        in as well; its mass and entropy must then be given, if a rule asks. float64, in NumPy: on so few
        numbers it is faster than torch.
    WHY: Sorting 49152 logits takes longer than all rules together on the first 64 of them.
    """

    values: Array  # (R, K) logits, falling
    weights: Array  # (R, K)
    mass: Array  # (R, 1)
    given_entropy: Array  # (R, 1) nats, of whole rows
    sigma: Array  # (R, 1) standard deviation of the finite logits
    whole: Array  # (R, 1) bool

    @classmethod
    def of(cls, values: Array, mass: Array, entropy: Array, sigma: Array) -> Self:
        """Start with whole rows."""
        whole = np.ones((len(values), 1), dtype=bool)
        return cls(values, np.exp(values - values[:, :1]), mass, entropy, sigma, whole)

    @classmethod
    def all_of(cls, logits: Tensor) -> Self:
        """Rank all tokens of rows (R, V)."""
        values = falling(logits)
        sigma = spread(logits).double().cpu().numpy()
        ranked = cls.of(values, np.zeros_like(sigma), np.zeros_like(sigma), sigma)
        ranked.mass = ranked.weights.sum(axis=1, keepdims=True)
        ranked.given_entropy = entropy_of(ranked.weights, ranked.mass)
        return ranked

    def take(self, rows: Array) -> Self:
        """Return some of the rows."""
        columns = self.values, self.weights, self.mass, self.given_entropy, self.sigma, self.whole
        return type(self)(*(column[rows] for column in columns))

    def surprise(self) -> Array:
        """Return -ln p (R, K) among the tokens that are still in."""
        return np.log(self.mass) - (self.values - self.values[:, :1])

    def odds(self) -> Array:
        """Return p (R, K) among the tokens that are still in."""
        return self.weights / self.mass

    def entropy(self) -> Array:
        """Return the entropy (R, 1) in nats of the tokens that are still in."""
        return np.where(self.whole, self.given_entropy, entropy_of(self.weights, self.mass))


def entropy_of(weights: Array, mass: Array) -> Array:
    """Return the entropy (R, 1), in nats, of odds in proportion to weights."""
    logs = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
    return np.log(mass) - (weights * logs).sum(axis=1, keepdims=True) / mass


def falling(logits: Tensor) -> Array:
    """Return the logits of each row from the largest down, as float64."""
    if not logits.is_cpu:
        return logits.sort(dim=1, descending=True).values.double().cpu().numpy()
    # without their places NumPy sorts numbers twenty times as fast as torch does with them
    return np.sort(logits.numpy(), axis=1)[:, ::-1].astype(np.float64)


def spread(logits: Tensor) -> Tensor:
    """Return the standard deviation (R, 1) of the logits that are finite."""
    mean = logits.mean(dim=1, keepdim=True)
    if mean.isfinite().all():
        return torch.linalg.vector_norm(logits - mean, dim=1, keepdim=True) / math.sqrt(logits.shape[1])
    finite = logits > -math.inf
    number = finite.sum(dim=1, keepdim=True)
    mean = logits.where(finite, 0).sum(dim=1, keepdim=True) / number
    return torch.linalg.vector_norm((logits - mean).where(finite, 0), dim=1, keepdim=True) / number.sqrt()


def top_n_sigma(ranked: Ranked, n: Array) -> Array:
    """Keep logits within n standard deviations of the largest: the rest is noise, and noise is normal. [6]"""
    return ranked.values >= ranked.values[:, :1] - n * ranked.sigma


def top_k(ranked: Ranked, k: Array) -> Array:
    """Keep the k likeliest tokens, and those as likely as the last of them. [1]"""
    last = np.minimum(k.astype(np.int64), ranked.values.shape[1]) - 1
    return ranked.values >= np.take_along_axis(ranked.values, last, axis=1)


def top_p(ranked: Ranked, p: Array) -> Array:
    """Keep tokens as long as those before weigh less than the share p: the nucleus. [2]"""
    before = ranked.weights.cumsum(axis=1) - ranked.weights
    return before < p * ranked.mass


def min_p(ranked: Ranked, p: Array) -> Array:
    """Keep tokens with at least the share p of the likeliest one's odds. [3]"""
    return ranked.weights >= p * ranked.weights.max(axis=1, keepdims=True)


def typical_p(ranked: Ranked, p: Array) -> Array:
    """Keep the tokens whose surprise is nearest to the entropy, until they weigh the share p. [4]

    So the likeliest token may have to go: where much is open, it would tell too little.
    """
    distance = np.where(ranked.weights > 0, np.abs(ranked.surprise() - ranked.entropy()), math.inf)
    order = distance.argsort(axis=1)
    weighed = np.take_along_axis(ranked.weights, order, axis=1).cumsum(axis=1)
    needed = (weighed < p * ranked.mass).sum(axis=1, keepdims=True).clip(max=order.shape[1] - 1)
    return distance <= np.take_along_axis(distance, np.take_along_axis(order, needed, axis=1), axis=1)


def epsilon(ranked: Ranked, least: Array) -> Array:
    """Keep tokens with at least these odds, or the likeliest. [5]"""
    return (ranked.odds() >= least) | likeliest(ranked)


def eta(ranked: Ranked, least: Array) -> Array:
    """Keep tokens with odds of at least min(eta, sqrt(eta) exp(-entropy)), or the likeliest. [5]"""
    least = np.minimum(least, np.sqrt(least) * np.exp(-ranked.entropy()))
    return (ranked.odds() >= least) | likeliest(ranked)


def likeliest(ranked: Ranked) -> Array:
    """Mark the likeliest token that is still in: there must always be one."""
    return ranked.weights == ranked.weights.max(axis=1, keepdims=True)


Rule = Callable[[Ranked, Array], Array]  # ranked tokens, the setting (R, 1) -> which to keep (R, K)
RULES: dict[str, Rule] = {
    "top_n_sigma": top_n_sigma,
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
    "typical_p": typical_p,
    "epsilon": epsilon,
    "eta": eta,
    "mirostat": mirostat,
}


def truncate(ranked: Ranked, settings: Mapping[str, Array]) -> Array:
    """Apply every rule that a row asks for, one after the other, each to what the one before has left.

    PAPER: [1] to [6]; the order is that of transformers' warpers, with top_n_sigma before them.
    PAPER CONTEXT: The papers compare rules; libraries let them be combined, in orders of their own.
    INTUITION: A row of sieves; after each, what is left is all there is.
    IMPLEMENTATION: `settings` are columns, neutral where a row does not use a rule. All rules keep an
        interval of the ranking, so one that ends before the last ranked token has no unranked one in it,
        and the answer is exact. Rows for which it does not are returned as True (R,): rank more for them.
        Changes `ranked`, whose weights are 0 where cut.
    WHY: Tests hold each rule, and combinations, to transformers' warpers, and any K to the whole ranking.
    """
    unsure = np.zeros((len(ranked.values), 1), dtype=bool)
    more = ranked.values[:, -1:] > -math.inf  # else whatever is in is ranked
    for name, rule in RULES.items():
        on = (settings[name] != NEUTRAL[name])[:, 0].nonzero()[0]
        if not len(on):
            continue
        part = ranked.take(on)
        keep = rule(part, settings[name][on])
        unsure[on] |= part.whole & more[on] & keep[:, -1:]
        ranked.weights[on] = weights = part.weights * keep
        ranked.mass[on] = weights.sum(axis=1, keepdims=True)
        ranked.whole[on] = False
    ranked.whole &= more
    return unsure[:, 0]


def kept_interval(ranked: Ranked) -> tuple[Array, Array]:
    """Return the least and the largest logit (R, 1) that is in; of whole rows all are."""
    kept = ranked.weights > 0
    low = np.where(kept, ranked.values, math.inf).min(axis=1, keepdims=True)
    high = np.where(kept, ranked.values, -math.inf).max(axis=1, keepdims=True)
    return np.where(ranked.whole, -math.inf, low), high


def warp(logits: Tensor, **settings: float) -> Tensor:
    """Return logits (R, V) with -inf for the tokens that the settings cut, each by its name.

    The plain way, which ranks the whole vocabulary. `temperature` divides first, as everywhere here.
    """
    logits = logits / settings.pop("temperature", 1.0)
    if unknown := settings.keys() - NEUTRAL.keys():
        raise ValueError(f"setting ({min(unknown)}) must be one of temperature, {', '.join(NEUTRAL)}")
    ranked = Ranked.all_of(logits)
    truncate(
        ranked, {name: np.full_like(ranked.mass, settings.get(name, off)) for name, off in NEUTRAL.items()}
    )
    low, high = (torch.from_numpy(bound).to(logits.device) for bound in kept_interval(ranked))
    return logits.masked_fill(~((logits >= low) & (logits <= high)), -math.inf)
