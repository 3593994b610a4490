r"""From runs of equal cost to the best size of a model, and how that size grows with the cost.

PAPERS
  [1] Scaling Laws for Neural Language Models, Kaplan et al., 2020, arXiv:2001.08361
  [2] Training Compute-Optimal Large Language Models, Hoffmann et al., 2022, arXiv:2203.15556 (Chinchilla)
  [3] Resolving Discrepancies in Compute-Optimal Scaling of Language Models, Porian et al., 2024,
      arXiv:2406.19146

SYMBOLS (code = paper)
  flops      = C  operations of a training run       parameters = N    weights of the model
  tokens     = D  tokens that it is trained on       exponent   = a    of N_opt ~ C^a [2]
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

KAPLAN, HOFFMANN = 0.73, 0.49  # exponents a of [1], as [2] Table 2 has it, and of [2]'s isoFLOP profiles


class Minimum(NamedTuple):
    """The bottom of a parabola in log(parameters) through the losses of one budget."""

    flops: float
    parameters: float
    loss: float
    inside: bool  # of the sizes that were tried; else it is a guess at what was not measured
    curve: tuple[float, float, float]  # loss = a x^2 + b x + c, x = ln parameters


class PowerLaw(NamedTuple):
    """y = factor * x ^ exponent."""

    exponent: float
    factor: float


def isoflop_minimum(flops: float, parameters: Sequence[float], losses: Sequence[float]) -> Minimum | None:
    r"""Return the size of the lowest loss for a budget, or None if the losses do not curve upwards.

    PAPER: [2] Sec. 3.2 (approach 2, "IsoFLOP profiles"): fit a parabola to each profile.
    PAPER CONTEXT: [1] had said: spend most of a larger budget on a larger model. [2] asked again, with the
        learning rate's fall fitted to each run, and trained 70 billion weights on 1.4 trillion tokens: better
        than 280 billion at the same cost.
    INTUITION: With the same number of operations a large model sees little text and a small one cannot take
        in what it sees. In between is the best buy, and near a minimum every smooth curve is a parabola.
    IMPLEMENTATION: Least squares over x = ln N; the bottom is at -b / 2a. If that, or the lowest loss,
        is not inside of the sizes tried, `inside` says so: the power law should do without it.
    WHY: On losses made by [2]'s own formula, E + A / N^0.34 + B / D^0.28, the minima of the parabolas follow
        C^0.45 as calculus says; a test holds the exponent to within 0.01.
    """
    x = np.log(np.asarray(parameters, dtype=float))
    if len(set(x.tolist())) < 3:
        raise ValueError(
            f"parameters ({len(set(x.tolist()))} sizes) must be at least three to fit a parabola"
        )
    middle = x.mean()  # numbers around 0 keep the fit well-conditioned
    a, b, c = np.polyfit(x - middle, np.asarray(losses, dtype=float), 2)
    if a * np.ptp(x) ** 2 < 1e-9:  # flat, but for rounding, or bent downwards
        return None
    bottom = -b / (2 * a)
    lowest = x[int(np.argmin(losses))]  # at an end of the sizes tried, the next one could be lower still
    inside = bool(x.min() < lowest < x.max() and x.min() <= bottom + middle <= x.max())
    curve = (float(a), float(b - 2 * a * middle), float(c - b * middle + a * middle**2))
    return Minimum(flops, math.exp(bottom + middle), float(c - b**2 / (4 * a)), inside, curve)


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    r"""Return the power law through points: a straight line through their logarithms.

    PAPER: [1] Sec. 6 (N_opt ~ C^0.73); [2] Sec. 3.2 and Table 2 (N_opt ~ C^0.49, D_opt ~ C^0.51).
    PAPER CONTEXT: The two disagree because of details: [3] traces it to the operations of the last layer,
        which [1] left out, to the warm-up of small runs, and to the optimizer's settings at each size.
    INTUITION: If ten times the budget always wants the model so many times larger, the points lie on a line.
    IMPLEMENTATION: Least squares in logarithms, all points alike.
    WHY: The exponent is all that a small sweep can say about a large run. How sure it is shows
        `leave_one_out`.
    """
    if len(x) < 2:
        raise ValueError(f"points ({len(x)}) must be at least two to fit a power law")
    exponent, factor = np.polyfit(np.log(np.asarray(x)), np.log(np.asarray(y)), 1)
    return PowerLaw(float(exponent), float(math.exp(factor)))


def value_at(law: PowerLaw, x: float) -> float:
    """Return y at x."""
    return law.factor * x**law.exponent


def leave_one_out(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return the smallest and the largest exponent that is found when one of the points is missing."""
    if len(x) < 3:
        exponent = fit_power_law(x, y).exponent
        return exponent, exponent
    left = [[*range(i), *range(i + 1, len(x))] for i in range(len(x))]
    found = [fit_power_law([x[i] for i in kept], [y[i] for i in kept]).exponent for kept in left]
    return min(found), max(found)
