r"""How documents of any length become rows of T tokens, and in which order the rows come.

PAPERS
  [1] Language Models are Few-Shot Learners (GPT-3), Brown et al., 2020, arXiv:2005.14165
  [2] Fewer Truncations Improve Language Modeling, Ding et al., 2024, arXiv:2404.10830
  [3] Worst-Case Performance Bounds for Simple One-Dimensional Packing Algorithms, Johnson, Demers, Ullman,
      Garey and Graham, 1974 (SIAM Journal on Computing 3(4))
  [4] How to Construct Pseudorandom Permutations from Pseudorandom Functions, Luby and Rackoff, 1988
      (SIAM Journal on Computing 17(2))
  [5] Ciphers with Arbitrary Finite Domains, Black and Rogaway, 2002 (CT-RSA)

SHAPES
  T  tokens in a row, block_size;  N  rows of an epoch
"""

from bisect import bisect_left, insort
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from phase1_foundation.project3_pretrain.dedup import mix
from phase1_foundation.project3_pretrain.shards import Tokens

Slices = list[tuple[int, int]]  # (first token, tokens) of each piece of a row
ROUNDS = 6


class Packing(Protocol):
    """The rows of one shard."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, row: int) -> Slices:
        """Return the pieces of the shard that fill a row, together at most T tokens."""
        ...


class Concatenation:
    r"""The shard cut every T tokens, wherever that is.

    PAPER: [1] Appendix B: whole documents side by side in a sequence, divided by a special token, no masks.
    PAPER CONTEXT: With one document to a row, padded to T, most of what is computed would be padding.
    INTUITION: Saw the tape into pieces of equal length.
    IMPLEMENTATION: Row i begins at token i T and learns T targets, so its last target is the first token of
        row i + 1. The last row of a shard is shorter.
    WHY: No token is lost and nothing is kept in memory. But rows begin in the middle of documents, and
        tokens see the end of one that has nothing to do with them.
    """

    def __init__(self, tokens: Tokens, block_size: int, separator: int) -> None:
        self.targets, self.block_size = len(tokens) - 1, block_size

    def __len__(self) -> int:
        return -(-self.targets // self.block_size)

    def __getitem__(self, row: int) -> Slices:
        start = row * self.block_size
        return [(start, min(self.block_size, self.targets - start))]


class BestFit:
    r"""Whole documents in a row, chosen so that hardly any room is left; only what is longer than T is cut.

    PAPER: [2] Sec. 2: cut documents to at most T, then pack the pieces by best-fit-decreasing.
    PAPER CONTEXT: Concatenation cuts documents that would have fitted. [2] trained on whole ones and found
        better reading, fewer names used before they are defined in code, and as many rows as before.
    INTUITION: Packing a car: the large pieces first, each into the smallest gap that it fits.
    IMPLEMENTATION: [2] finds the gap in a segment tree; here a sorted list of the at most T sizes of gaps
        does. A piece is its separator and its tokens. 16 bytes for a piece stay in memory.
    WHY: Best-fit-decreasing needs at most 11/9 of the fewest rows possible, and 4 [3]. On real documents it
        is much better: 99.9% of the room is full.
    """

    def __init__(self, tokens: Tokens, block_size: int, separator: int) -> None:
        places = np.flatnonzero(tokens == separator)
        pieces = -(-np.diff(places) // block_size)  # of each document
        number = np.arange(pieces.sum()) - np.repeat(
            np.cumsum(pieces) - pieces, pieces
        )  # within its document
        starts = np.repeat(places[:-1], pieces) + number * block_size
        lengths = np.minimum(block_size, np.repeat(places[1:], pieces) - starts)
        rows = best_fit(lengths, block_size)
        order = np.argsort(rows, kind="stable")
        self.starts, self.lengths = starts[order], lengths[order].astype(np.int32)
        self.firsts = np.searchsorted(rows[order], np.arange(rows.max(initial=-1) + 2)).astype(np.int32)

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def __getitem__(self, row: int) -> Slices:
        pieces = slice(self.firsts[row], self.firsts[row + 1])
        return list(zip(self.starts[pieces].tolist(), self.lengths[pieces].tolist(), strict=True))


def best_fit(lengths: NDArray[np.int64], room: int) -> NDArray[np.int32]:
    """Return each piece's row: the longest pieces first, each into the fullest row that it fits."""
    rows = np.zeros(len(lengths), np.int32)
    open_rows: list[list[int]] = [[] for _ in range(room + 1)]  # by the room that is left in them
    gaps: list[int] = []  # the sizes of gaps that there are, sorted
    opened = 0
    sizes = lengths.tolist()
    for piece in np.argsort(-lengths, kind="stable").tolist():
        fitting = bisect_left(gaps, sizes[piece])
        if fitting == len(gaps):
            row, left, opened = opened, room, opened + 1
        else:
            left = gaps[fitting]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del gaps[fitting]
        rows[piece] = row
        left -= sizes[piece]
        if left and not open_rows[left]:
            insort(gaps, left)
        open_rows[left].append(row)
    return rows


PACKINGS: dict[str, type[Concatenation] | type[BestFit]] = {"concat": Concatenation, "best_fit": BestFit}


class Permutation:
    r"""A shuffled order of N rows of which any place is found at once: nothing is stored.

    PAPER: [4] builds a permutation of 2h-bit numbers out of any function on h bits (Feistel's network); [5]
        Sec. 3 restricts it to fewer than 2^(2h) numbers by "cycle walking".
    PAPER CONTEXT: A shuffled list of 10 billion rows has 80 GB, and every process would need one, for each
        epoch.
    INTUITION: A lock that scrambles a number in steps which can each be undone: so no two numbers become one.
    IMPLEMENTATION: Cut a number into halves; add a hash of one to the other, swap, six times. A result that
        is N or more is scrambled again, until it is below: the cycle it walks on leads back into the range.
        Up to 4 N numbers are scrambled to order N.
    WHY: The batch of a step is a function of seed and step, so a resumed run needs no position but the step.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size = size
        self.bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))  # of a half
        keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)
        self.keys = keys.astype(np.uint64)

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows at these places of the order."""
        numbers = self._scramble(places.astype(np.uint64))
        while (outside := numbers >= self.size).any():
            numbers[outside] = self._scramble(numbers[outside])
        return numbers.astype(np.int64)

    def _scramble(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        mask = (np.uint64(1) << self.bits) - np.uint64(1)
        left, right = numbers >> self.bits, numbers & mask
        for key in self.keys:
            left, right = right, left ^ (mix(right + key) & mask)
        return left << self.bits | right
