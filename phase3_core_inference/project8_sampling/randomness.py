r"""Random numbers as a function of (seed, step), and three ways to turn them into a token.

PAPERS
  [1] Fast Splittable Pseudorandom Number Generators, Steele, Lea & Flood, OOPSLA 2014 (SplitMix)
  [2] Parallel Random Numbers: As Easy as 1, 2, 3, Salmon et al., SC 2011
  [3] Statistical Theory of Extreme Values and Some Practical Applications, Gumbel, 1954
  [4] Stochastic Beams and Where to Find Them: The Gumbel-Top-k Trick for Sampling Sequences Without
      Replacement, Kool, van Hoof & Welling, 2019, arXiv:1903.06059

SHAPES
  V  vocab_size
"""

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, odd: its multiples are spread evenly
BITS = 2**64 - 1


def uniform(seed: int, step: int) -> float:
    """Return the random number in [0, 1) of a seed and a step.

    PAPER: the mixing function, [1] (with David Stafford's constants); numbers from a counter, [2].
    PAPER CONTEXT: A generator usually has a state that every draw changes. [2] replaces it by a good hash of
        a counter, so that any draw can be had without those before it.
    INTUITION: Not a dice that remembers, but a book of random digits: line `seed`, column `step`.
    IMPLEMENTATION: Hash the seed, go `step` golden strides from there, hash again; the upper 53 bits are the
        number.
    WHY: With one generator for a batch, a request's text depends on who else draws. Here it depends on its
        own seed and place alone; a request that is interrupted, or computed twice, draws the same again.
    """
    return (mix(mix(seed) + (step + 1) * GOLDEN) >> 11) * 2.0**-53


def mix(z: int) -> int:
    """Return 64 bits each of which depends on each of z's."""
    z &= BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & BITS
    return z ^ (z >> 31)


def uniforms(seed: int, step: int, n: int) -> np.ndarray:
    """Return n random numbers in (0, 1) of a seed and a step, none of them `uniform`'s."""
    start = mix(mix(seed ^ GOLDEN) + (step + 1) * GOLDEN)
    z = np.uint64(start) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN)  # wraps around
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def gumbel_noise(seed: int, step: int, n: int) -> Tensor:
    """Return n numbers of the Gumbel distribution: -ln(-ln u) of n uniform ones."""
    return torch.from_numpy(-np.log(-np.log(uniforms(seed, step, n))))


def gumbel_max(logits: Tensor, noise: Tensor, k: int = 1) -> Tensor:
    """Return the k tokens whose logit plus noise is largest: k draws without putting back.

    PAPER: [3] is the distribution; [4] has the argmax and the k largest.
    PAPER CONTEXT: The largest of many independent numbers tends to Gumbel's law, which is therefore closed
        under maxima: max_i (logit_i + G_i) is Gumbel again, and who attains it has the odds of a softmax.
    INTUITION: Each token runs a race with its logit as a head start. The noise is drawn before anybody
        knows the logits, so small changes of the logits rarely change who wins.
    IMPLEMENTATION: One number per token, where inverting the cumulative odds needs one in all; the sampler
        therefore inverts. This view is for where noise and logits come from different places.
    WHY: Softmax and its sum are never computed. And of two similar models that share the noise most choices
        are the same: in a test of 400 tokens more than twice as many as when both invert one number.
    """
    return (logits + noise).topk(k).indices


def inverse_draw(odds: Tensor, u: float) -> int:
    """Return the token at which the cumulative odds (V,), which need not add up to 1, pass u in [0, 1)."""
    cumulative = odds.double().cumsum(dim=0)
    below = cumulative <= u * cumulative[-1]
    return min(int(below.sum()), int(odds.nonzero()[-1]))  # rounding must not lead past the last token
