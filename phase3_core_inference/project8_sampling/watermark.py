r"""A watermark: a text that reads like any other, but in which who knows the key finds too many green tokens.

PAPERS
  [1] A Watermark for Large Language Models, Kirchenbauer et al., 2023, arXiv:2301.10226

SYMBOLS (code = paper)
  share = γ   of the vocabulary that is green after a token      T  tokens scored
  delta = δ   added to the logits of green tokens                green = |s|_G   green tokens among them
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


@lru_cache(maxsize=4096)
def green_tokens(previous: int, vocab_size: int, share: float, key: int) -> Tensor:
    """Return the ids of the tokens that are green after the token `previous`.

    PAPER: [1] Alg. 2: hash the previous token, seed a generator, split the vocabulary at random.
    PAPER CONTEXT: To tell by its style who wrote a text is guessing. [1] marks it where it is made, with no
        change to the model, and in a way that statistics can prove.
    INTUITION: At each word a coin, which only the owner of the key can repeat, dyes half of the dictionary.
    IMPLEMENTATION: The same generator, seed and permutation as in transformers (its "lefthash"), so that its
        detector reads our texts and ours reads its; a test has both do so. Lists are kept, since a
        permutation of 49152 takes a tenth of a millisecond and common tokens come back.
    WHY: The list must follow from the text alone: the detector has neither the model nor the prompt.
    """
    generator = torch.Generator().manual_seed(key * previous % (2**64 - 1))
    return torch.randperm(vocab_size, generator=generator)[: int(vocab_size * share)].clone()


@dataclass(frozen=True)
class Detection:
    """What a detector found."""

    scored: int  # tokens whose colour is known: all but the first
    green: int  # green ones among them
    z: float  # standard deviations above what a text without the mark has
    p_value: float  # how often such a text would have as many


def detect(
    tokens: Sequence[int], vocab_size: int, share: float, key: int, repeats: bool = False
) -> Detection:
    """Count green tokens and say how unlikely so many are by chance.

    PAPER: the z statistic, [1] Eq. 3; counting a pair of tokens once only, as transformers can.
    PAPER CONTEXT: Nobody who writes without the key can know the colours, so each token is green with
        probability share, whatever the language.
    INTUITION: A hundred throws, ninety heads: the coin was not fair.
    IMPLEMENTATION: Tokens that follow the same token with the same result are one observation, not many:
        with `repeats` they are counted all the same. ValueError for fewer than two tokens.
    WHY: A repeated phrase would otherwise repeat its luck: a test gives the detector unmarked loops and
        finds z far beyond 4 with repeats, and not without.
    """
    if len(tokens) < 2:
        raise ValueError(f"tokens ({len(tokens)}) must be at least 2 to look for a watermark")
    pairs = list(pairwise(tokens))
    if not repeats:
        pairs = list(dict.fromkeys(pairs))
    green = sum(
        bool((green_tokens(previous, vocab_size, share, key) == token).any()) for previous, token in pairs
    )
    z = (green - share * len(pairs)) / math.sqrt(len(pairs) * share * (1 - share))
    return Detection(len(pairs), green, z, 0.5 * math.erfc(z / math.sqrt(2)))


def green_share(odds: Tensor, share: float, delta: float) -> float:
    """Return a lower bound of the expected share of green tokens drawn by these odds (V,), of random colours.

    It is reached where the odds are uniform ([1] Theorem 4.2: the spike entropy takes the odds' shape in).
    """
    alpha = math.exp(delta)
    modulus = (1 - share) * (alpha - 1) / (1 + (alpha - 1) * share)
    spike_entropy = float((odds / (1 + modulus * odds)).sum())
    return share * alpha / (1 + (alpha - 1) * share) * spike_entropy


def expected_z(green: float, share: float, scored: float) -> float:
    """Return the z that a share `green` of green tokens gives after so many tokens ([1] Eq. 3)."""
    return (green - share) * math.sqrt(scored / (share * (1 - share)))
