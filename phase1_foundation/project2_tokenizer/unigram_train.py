r"""Train a unigram vocabulary: begin with too many pieces, see how often each is used, drop the least useful.

PAPERS
  [1] Subword Regularization: Improving Neural Network Translation Models with Multiple Subword Candidates,
      Kudo, 2018, arXiv:1804.10959
  [2] SentencePiece: A simple and language independent subword tokenizer and detokenizer for Neural Text
      Processing, Kudo and Richardson, 2018, arXiv:1808.06226
  [3] Maximum Likelihood from Incomplete Data via the EM Algorithm, Dempster, Laird and Rubin, 1977

SYMBOLS (code = paper)                              SHAPES
  log_p       = log p(x)  of each piece               N  bytes in all distinct chunks
  likelihood  = L         log of the corpus's          E  edges: places where a piece fits
  loss        = loss_i    what L loses without x_i     P  pieces
  KEEP        = eta       share kept by a pruning      D  nodes: the gaps between bytes
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[Any]  # float64; numpy's types do not say what bincount returns

KEEP = 0.8  # share of the pieces that survives a pruning; [1] suggests 80%
EM_STEPS = 2  # EM steps between two prunings
SEEDS = 5  # seed pieces for each piece of the final vocabulary
TINY = 1e-200  # instead of probability zero, whose logarithm is minus infinity


@dataclass
class Corpus:
    """The distinct chunks of a text side by side, each with the number of times that it occurs."""

    data: Ints  # (N,) bytes
    chunk: Ints  # (N,) which chunk a byte is in
    end: Ints  # (N,) where that chunk ends
    weight: Floats  # (N,) how often that chunk occurs
    border: NDArray[np.bool_]  # (N + 1,) False inside a UTF-8 character
    count: Floats  # of each chunk


def lay_out(counts: Mapping[bytes, int]) -> Corpus:
    """Put the chunks side by side."""
    lengths = np.array([len(chunk) for chunk in counts], np.int64)
    data = np.frombuffer(b"".join(counts), np.uint8).astype(np.int64)
    chunk = np.repeat(np.arange(len(lengths)), lengths)
    count = np.array(list(counts.values()), np.float64)
    border = np.append((data & 0xC0) != 0x80, True)
    return Corpus(data, chunk, np.cumsum(lengths)[chunk], count[chunk], border, count)


@dataclass
class Matches:
    """Every place where a piece fits: pieces[piece[e]] is data[start[e] : start[e] + length[e]]."""

    pieces: list[bytes]
    total: Floats  # (P,) occurrences of each piece in the whole corpus
    piece: Ints  # (E,)
    start: Ints  # (E,)
    length: Ints  # (E,)


def repeated_substrings(corpus: Corpus, max_length: int) -> Iterator[tuple[int, Ints, Ints, Ints, Floats]]:
    r"""Yield, for every length, the substrings of whole characters that occur twice or more.

    PAPER: [1] Section 3.2 seeds the vocabulary with the characters and the most frequent substrings.
    PAPER CONTEXT: [1] enumerates them with an enhanced suffix array, a subtle piece of C++.
    INTUITION: A substring can be frequent only if it is frequent without its last byte. So climb a ladder:
        from the frequent ones of one length, one more byte gives the candidates of the next.
    IMPLEMENTATION: A substring is known by its number among those of its length; with the next byte that is
        one integer, so np.unique counts a whole rung at once. Yields (length, start and number of every
        occurrence, first start of every number, its count; 0 if it ends inside a character).
    WHY: A suffix array orders suffixes of any length, but pieces are short; for them the ladder needs one
        sort a rung and no tree, and it leaves behind every occurrence, which the lattice needs anyway.
    """
    start = np.flatnonzero(corpus.border[:-1])
    number = corpus.data[start]
    for length in range(2, max_length + 1):
        fits = start + length <= corpus.end[start]
        start, number = start[fits], number[fits]
        key = number * 256 + corpus.data[start + length - 1]
        _, first, number = np.unique(key, return_index=True, return_inverse=True)
        total = np.bincount(number, corpus.weight[start])
        frequent = total >= 2
        first, total = start[first[frequent]], total[frequent]
        renumbered, survives = np.cumsum(frequent) - 1, frequent[number]
        start, number = start[survives], renumbered[number[survives]]
        if not len(start):
            return
        yield length, start, number, first, np.where(corpus.border[first + length], total, 0)


def seed_matches(corpus: Corpus, size: int, max_length: int) -> Matches:
    """Return the 256 bytes and the `size` substrings that cover most of the corpus (count times length)."""
    rungs = list(repeated_substrings(corpus, max_length))
    coverage = np.concatenate([np.zeros(0), *(length * total for length, *_, total in rungs)])
    chosen = np.argsort(-coverage, kind="stable")[:size]
    chosen = np.sort(chosen[coverage[chosen] > 0])
    piece_of = np.full(len(coverage), -1)
    piece_of[chosen] = 256 + np.arange(len(chosen))

    pieces = [bytes([b]) for b in range(256)]
    totals = [np.bincount(corpus.data, corpus.weight, 256)]
    places = [(corpus.data, np.arange(len(corpus.data)), np.ones_like(corpus.data))]  # a byte fits everywhere
    base = 0
    for length, start, number, first, total in rungs:
        here = piece_of[base : base + len(first)]
        base += len(first)
        pieces += [corpus.data[i : i + length].astype(np.uint8).tobytes() for i in first[here >= 0]]
        totals.append(total[here >= 0])
        piece = here[number]
        fits = piece >= 0
        places.append((piece[fits], start[fits], np.full(fits.sum(), length)))
    return Matches(pieces, np.concatenate(totals), *map(np.concatenate, zip(*places, strict=True)))


class Lattice:
    r"""All segmentations of all chunks at once, as one graph, and the sums over them.

    PAPER: [1] Section 3.2: the likelihood sums the probability of every segmentation; EM of [3] climbs it.
    PAPER CONTEXT: The same sums train hidden Markov models, there called forward-backward (Baum and Welch).
    INTUITION: A node is a gap between two bytes, an edge a piece that leads from gap to gap, a segmentation a
        path. All paths into a node share what comes before, so one number per node replaces them all.
    IMPLEMENTATION: Chunks are independent, so numpy handles the nodes of equal depth of all chunks in one
        call: as many calls as the longest chunk has bytes, whatever the number of chunks. Logarithms, as a
        chunk of 1000 bytes has a probability below the smallest float64.
    WHY: A chunk of n bytes can have 2^(n-1) segmentations. Forward-backward needs n times the longest piece.
    """

    def __init__(self, corpus: Corpus, matches: Matches) -> None:
        source = matches.start + corpus.chunk[matches.start]  # a chunk of n bytes has n + 1 nodes
        self.source, self.target, self.piece = source, source + matches.length, matches.piece
        self.weight = corpus.weight[matches.start]  # (E,)
        self.count = corpus.count
        sizes = np.bincount(corpus.chunk) + 1
        self.last = np.cumsum(sizes) - 1  # the last node of each chunk
        self.depth = np.arange(sizes.sum()) - np.repeat(self.last + 1 - sizes, sizes)  # (D,)
        self._arrange()

    def _arrange(self) -> None:
        """Sort the edges by depth and node of arrival, and note where each depth and each node begins."""
        order = np.lexsort((self.target, self.depth[self.target]))
        for name in ("source", "target", "piece", "weight"):
            setattr(self, name, getattr(self, name)[order])
        depth = self.depth[self.target]
        bounds = np.searchsorted(depth, np.arange(1, self.depth.max() + 2))
        self.layers = []  # per depth: its edges, the first edge of each node among them, the nodes
        for begin, end in pairwise(bounds):
            target = self.target[begin:end]
            first = np.flatnonzero(np.diff(target, prepend=-1))
            self.layers.append((slice(begin, end), first, target[first]))

    def forward_backward(self, log_p: Floats) -> tuple[float, Floats]:
        """Return log P(corpus), and for every edge (E,) the share of its chunk's probability that uses it."""
        score = log_p[self.piece]
        forward = np.zeros(len(self.depth))  # log of the summed probability of all paths into each node
        for edges, first, nodes in self.layers:
            forward[nodes] = np.logaddexp.reduceat(forward[self.source[edges]] + score[edges], first)
        # Of the paths that reach an edge's target, the share that comes over this edge:
        posterior = np.exp(forward[self.source] + score - forward[self.target])
        through = np.zeros(len(self.depth))  # the share of all paths that passes each node
        through[self.last] = 1
        for edges, _, _ in reversed(self.layers):
            posterior[edges] *= through[self.target[edges]]
            np.add.at(through, self.source[edges], posterior[edges])
        return float(self.count @ forward[self.last]), posterior

    def expected_counts(self, posterior: Floats, n_pieces: int) -> Floats:
        """Return how often each piece is used, averaged over all segmentations: dL / dlog_p."""
        return np.bincount(self.piece, posterior * self.weight, n_pieces)

    def losses(self, posterior: Floats, n_pieces: int) -> Floats:
        r"""Return what the likelihood loses when a piece alone is removed.

        PAPER: [1] Section 3.2, step 2(b): loss_i is the reduction of L when subword x_i is removed.
        PAPER CONTEXT: SentencePiece's trainer approximates it ("the exact computation of loss is difficult"):
            it replaces the piece by its own second best segmentation wherever the best path uses it.
        INTUITION: Without the piece, a chunk keeps just those of its segmentations that did not use it. If
            these had 30% of the chunk's probability, the chunk's log-probability falls by -log 0.3.
        IMPLEMENTATION: So -log(1 - posterior), summed over the edges. Exact, with the other probabilities as
            they are, if no chunk has room for the piece twice; there the two edges count as independent.
        WHY: A frequent piece may be worthless, if another path is as good; a count does not see that.
        """
        return np.bincount(self.piece, -self.weight * np.log1p(-np.minimum(posterior, 1 - 1e-16)), n_pieces)

    def restrict(self, kept: NDArray[np.bool_]) -> None:
        """Remove the edges of the pieces that are not kept, and renumber the others."""
        stays, renumbered = kept[self.piece], np.cumsum(kept) - 1
        self.source, self.target, self.weight = self.source[stays], self.target[stays], self.weight[stays]
        self.piece = renumbered[self.piece[stays]]
        self._arrange()


def cut_long_chunks(counts: Mapping[bytes, int], longest: int = 1000) -> Counter[bytes]:
    """Cut chunks of more than `longest` bytes, if possible between characters; leave out empty ones."""
    short: Counter[bytes] = Counter()
    for chunk, count in counts.items():
        begin = 0
        while begin < len(chunk):
            end = begin + longest
            while begin + longest - 3 < end < len(chunk) and chunk[end] & 0xC0 == 0x80:
                end -= 1
            short[chunk[begin:end]] += count
            begin = end
    return short


def train_unigram(
    counts: Mapping[bytes, int],
    size: int,
    max_length: int = 16,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[bytes, float]:
    r"""Return `size` pieces, the 256 bytes among them, with their log-probabilities.

    PAPER: [1] Section 3.2: seed vocabulary; then EM, loss_i, keep the best 80%; until small enough.
    PAPER CONTEXT: BPE grows a vocabulary by merging, and keeps what it merged. This one shrinks: what is left
        has been weighed against all alternatives.
    INTUITION: Guess how often each piece is used; these guesses make some segmentations likelier, which makes
        better guesses. Then drop the pieces that the corpus would miss least.
    IMPLEMENTATION: Bytes stand in for the characters that [1] always keeps, so nothing is ever unknown. Plain
        EM; SentencePiece takes exp(digamma(count)) for the count, which favours few pieces and may lower L. A
        piece that the end finds unused (most bytes) gets half an occurrence. max_length is in bytes.
    WHY: Maximizing L directly over vocabularies is a search over sets; EM and pruning are both greedy, but
        every EM step is guaranteed not to lower L.
    """
    if size < 256:
        raise ValueError(f"size ({size}) must be at least 256: every byte is a piece")
    corpus = lay_out(cut_long_chunks(counts))
    matches = seed_matches(corpus, SEEDS * (size - 256), max_length)
    pieces, expected = np.array(matches.pieces, dtype=object), matches.total
    if len(corpus.data):
        lattice = Lattice(corpus, matches)
        expected, posterior = em_steps(lattice, expected, on_step)
        while len(pieces) > size:
            loss = lattice.losses(posterior, len(pieces))
            loss[:256] = np.inf
            kept = np.zeros(len(pieces), bool)
            kept[np.argsort(-loss, kind="stable")[: max(size, int(KEEP * len(pieces)))]] = True
            pieces, expected = pieces[kept], expected[kept]
            lattice.restrict(kept)
            expected, posterior = em_steps(lattice, expected, on_step)
    expected = np.maximum(expected, 0.5)
    return dict(zip(pieces.tolist(), np.log(expected / expected.sum()).tolist(), strict=True))


def em_steps(
    lattice: Lattice,
    expected: Floats,
    on_step: Callable[[int, float], None] | None = None,
    steps: int = EM_STEPS,
) -> tuple[Floats, Floats]:
    """Alternate M steps (counts to probabilities) and E steps (back); return the last E step's result."""
    for _ in range(steps):
        log_p = np.log(np.maximum(expected / expected.sum(), TINY))
        likelihood, posterior = lattice.forward_backward(log_p)
        expected = lattice.expected_counts(posterior, len(expected))
        if on_step:
            on_step(len(expected), likelihood)
    return expected, posterior
