r"""BPE-dropout: forget some merges at random, and BPE cuts the same text in another way every time.

PAPERS
  [1] BPE-Dropout: Simple and Effective Subword Regularization, Provilkov, Emelianenko and Voita, 2020,
      arXiv:1910.13267
  [2] Distributional Properties of Subword Regularization, Cognetta, Zouhar and Okazaki, 2024,
      arXiv:2408.11443
"""

import heapq
import random

from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.tokenizer import ChunkCache, as_bytes


class BPEDropout(BPETokenizer):
    r"""A trained BPE tokenizer whose merges are each refused with probability p whenever they are due.

    PAPER: [1] Algorithm 1.
    PAPER CONTEXT: Subword regularization (Kudo 2018) needs a unigram model. [1] gets the same training noise
        from the BPE tokenizer that a model already has; its vocabulary and decoding stay as they are.
    INTUITION: A model that always sees " token" as one id never learns how it is spelled. Refuse the last
        merge now and then and it sees " tok", "en" in the same place, with the same meaning.
    IMPLEMENTATION: In every step [1] drops each merge that is possible now with probability p, and applies
        the best of the others; among equals we take the leftmost. The coins are independent, so it is the
        same to go through the merges from the best on and toss until one survives; a heap does that without
        looking at the rest. ignore_merges is not heeded: a chunk that is a token would never be cut.
    WHY: p = 0 is BPE and p = 1 leaves bytes; [1] trains with 0.1. Not all segmentations come up alike: [2]
        shows that a few dominate. Unigram sampling has every segmentation, with a known probability.
    """

    def __init__(self, tokenizer: BPETokenizer, p: float = 0.1, seed: int | None = None) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p ({p}) must be between 0 and 1")
        super().__init__(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, tokenizer.pattern)
        self.p, self.rng = p, random.Random(seed)
        self._cache = ChunkCache(self._encode_chunk, length=-1)  # remembers nothing: every time is new

    def _encode_chunk(self, chunk: str) -> tuple[int, ...]:
        """Merge until every merge that is possible has been refused in the same step."""
        # A token stays at the place of its first byte; -1 marks places that it swallowed.
        ids = [self._byte_ids[b] for b in as_bytes(chunk) if b in self._byte_ids]
        size = len(ids)
        following, preceding = list(range(1, size + 1)), list(range(-1, size - 1))
        due: list[tuple[int, int]] = []  # (rank, place), a heap: the best first
        refused: list[tuple[int, int]] = []  # in this step

        def rank_at(place: int) -> int | None:
            right = following[place] if place >= 0 else size
            return self._ranks.get((ids[place], ids[right])) if right < size else None

        def offer(place: int) -> None:
            if (rank := rank_at(place)) is not None:
                heapq.heappush(due, (rank, place))

        for place in range(size):
            offer(place)
        while due:
            rank, place = heapq.heappop(due)
            if rank_at(place) != rank:
                continue  # another merge has changed this pair since it was offered
            if self.rng.random() < self.p:
                refused.append((rank, place))
                continue
            right = following[place]
            ids[place], ids[right] = self.merges[rank][2], -1
            following[place] = following[right]
            if following[place] < size:
                preceding[following[place]] = place
            while refused:  # a new step: what was refused is possible again
                heapq.heappush(due, refused.pop())
            offer(preceding[place])
            offer(place)
        return tuple(i for i in ids if i >= 0)
