r"""Byte-pair encoding on bytes: the tokenizer of GPT-2, GPT-4, Llama 3 and most models since.

PAPERS
  [1] Neural Machine Translation of Rare Words with Subword Units, Sennrich, Haddow and Birch, 2016,
      arXiv:1508.07909
  [2] Language Models are Unsupervised Multitask Learners, Radford et al., 2019 (GPT-2)
  [3] Neural Machine Translation with Byte-Level Subwords, Wang, Cho and Gu, 2019, arXiv:1909.03341
  [4] A Formal Perspective on Byte-Pair Encoding, Zouhar et al., 2023, arXiv:2306.16837
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from typing import Self

from phase1_foundation.project2_tokenizer.bpe_train import (
    BYTES,
    Merge,
    count_chunks,
    count_chunks_parallel,
    incremental,
    naive,
)
from phase1_foundation.project2_tokenizer.patterns import PATTERNS
from phase1_foundation.project2_tokenizer.tokenizer import (
    ChunkCache,
    Tokenizer,
    as_bytes,
    as_text,
    choose_special,
    join_tokens,
    split_special,
)

TRAINERS = {"naive": naive, "incremental": incremental, "parallel": incremental}
LARGEST = 0x110000  # tokens that the incremental trainer can tell apart: one character each
LONGEST = 1 << 20  # characters that encode_iterable holds back while it waits for a safe place to cut


class BPETokenizer(Tokenizer):
    """Byte-level BPE: the bytes are tokens, and each merge makes one more of two others.

    PAPER: [1] Sec. 3.2; of bytes instead of letters: [2] Sec. 2.2 and [3]; as mathematics: [4] Sec. 2.
    PAPER CONTEXT: When tokens are made of letters, as in [1], a vocabulary holds all letters of Unicode or
        knows no token for some. There are only 256 bytes, and every text is made of them.
    INTUITION: Encoding replays the training on a new chunk: of the pairs that stand side by side it merges
        the one that was learned first, until there is none that was learned.
    IMPLEMENTATION: The ids of a chunk are found once (merge_ranked) and remembered (ChunkCache). Ids may
        be in any order. Two habits of other libraries: a byte that is no token is left out (SmolLM2 has 235
        of the 256); with ignore_merges, a chunk that is a token needs no merges (some of Llama 3's have
        none).
    WHY: No text is unknown and none is changed: decode_bytes(encode(data)) == data for all bytes that are
        tokens, unless the pattern normalizes.
    """

    def __init__(
        self,
        vocab: dict[int, bytes],
        merges: list[Merge],
        special_tokens: dict[str, int] | None = None,
        pattern: str = "gpt4",
        ignore_merges: bool = False,
    ) -> None:
        if pattern not in PATTERNS:
            raise ValueError(f"pattern ({pattern!r}) must be one of {', '.join(PATTERNS)}")
        self.vocab, self.merges, self.pattern, self.ignore_merges = vocab, merges, pattern, ignore_merges
        self.special_tokens = special_tokens or {}
        self._tokens = vocab | {i: name.encode() for name, i in self.special_tokens.items()}
        self._ids = {token: i for i, token in vocab.items()}
        self._byte_ids = {token[0]: i for i, token in vocab.items() if len(token) == 1}
        self._ranks = {(left, right): rank for rank, (left, right, _) in enumerate(merges)}
        self._cache = ChunkCache(self._encode_chunk)

    @property
    def vocab_size(self) -> int:
        return max(self._tokens, default=-1) + 1

    @classmethod
    def train_from_iterator(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        pattern: str = "gpt4",
        special_tokens: Collection[str] = (),
        algorithm: str = "incremental",
        workers: int = 2,
        on_merge: Callable[[bytes, bytes, int], object] | None = None,
    ) -> Self:
        """Learn a vocabulary: the 256 bytes, what the merges make, and last the special tokens.

        It is smaller than vocab_size if the text has no more pairs. Special tokens in the text separate
        chunks and are not learned from. `workers` is the number of processes that count chunks for the
        parallel algorithm; on_merge(left, right, count) is called after each merge.
        """
        special = list(dict.fromkeys(special_tokens))
        if algorithm not in TRAINERS:
            raise ValueError(f"algorithm ({algorithm!r}) must be one of {', '.join(TRAINERS)}")
        if pattern not in PATTERNS:
            raise ValueError(f"pattern ({pattern!r}) must be one of {', '.join(PATTERNS)}")
        if not len(BYTES) + len(special) <= vocab_size <= LARGEST:
            least = f"{len(BYTES)} + {len(special)} special tokens" if special else len(BYTES)
            raise ValueError(f"vocab_size ({vocab_size}) must be from {least} to {LARGEST}")
        if "" in special:
            raise ValueError("special_tokens ('') must not be empty")
        vocab = {i: bytes([b]) for i, b in enumerate(BYTES)}

        def keep(merge: Merge, count: int) -> None:
            left, right, new = merge
            vocab[new] = vocab[left] + vocab[right]
            if on_merge:
                on_merge(vocab[left], vocab[right], count)

        if algorithm == "parallel":
            counts = count_chunks_parallel(texts, pattern, special, workers)
        else:
            counts = count_chunks(texts, pattern, special)
        merges = TRAINERS[algorithm](counts, vocab_size - len(BYTES) - len(special), keep)
        return cls(vocab, merges, {name: len(vocab) + i for i, name in enumerate(special)}, pattern)

    def encode(self, text: str | bytes, allowed_special: Collection[str] = ()) -> list[int]:
        return list(chain.from_iterable(self._encode([as_text(text)], allowed_special)))

    def encode_iterable(
        self, texts: Iterable[str | bytes], allowed_special: Collection[str] = (), longest: int = LONGEST
    ) -> Iterator[int]:
        """Yield the ids of a text that comes in pieces, of which it holds only the last ones.

        They are those of the whole text, unless there are `longest` characters without a safe place to cut,
        such as letters without a space. There the text is cut anyway, because memory is not endless.
        """
        return chain.from_iterable(self._encode(map(as_text, texts), allowed_special, longest))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return join_tokens(self._tokens, ids)

    def _encode(
        self, texts: Iterable[str], allowed_special: Collection[str], longest: int = sys.maxsize
    ) -> Iterator[Iterable[int]]:
        """Yield the ids of one block after the other."""
        special = choose_special(self.special_tokens, allowed_special)
        pattern = PATTERNS[self.pattern]
        for block in pattern.blocks(texts, special, longest=longest):
            for part, is_special in split_special(block, special):
                if is_special:
                    yield (special[part],)
                else:
                    yield chain.from_iterable(map(self._cache.__getitem__, pattern.split(part)))

    def _encode_chunk(self, chunk: str) -> tuple[int, ...]:
        token = as_bytes(chunk)
        if self.ignore_merges and token in self._ids:
            return (self._ids[token],)
        ids = [self._byte_ids[b] for b in token if b in self._byte_ids]
        return tuple(merge_ranked(ids, self._ranks, self.merges))


def merge_ranked(ids: list[int], ranks: Mapping[tuple[int, int], int], merges: list[Merge]) -> list[int]:
    """Merge the pair of the lowest rank, the leftmost first, until no pair has a rank.

    PAPER: [1] Sec. 3.2 applies the merges in the order in which they were learned.
    PAPER CONTEXT: The published code of [1] and of [2] looks at all pairs again after each merge. In a word
        nobody minds, but that is quadratic: a megabyte without a space would take hours.
    INTUITION: As in training, a heap knows the best pair, and a merge changes only the pairs on its two
        sides.
    IMPLEMENTATION: A token stays at the place of its first byte, and -1 marks the places it swallowed;
        `following` and `preceding` lead from a token to its neighbours. A heap entry is rank * size +
        place. It is out of date if the tokens at its place are no longer the two that its rank merges.
    WHY: Each merge costs one removal from the heap and at most two additions: n log n in all, for any text.
    """
    size = len(ids)
    ids = [*ids, -1]  # a neighbour for the last token, with which it has no rank
    following = list(range(1, size + 1))
    preceding = list(range(-1, size))
    heap = [ranks[pair] * size + place for place, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapify(heap)
    while heap:
        rank, place = divmod(heappop(heap), size)
        left, right, new = merges[rank]
        swallowed = following[place]
        if ids[place] != left or ids[swallowed] != right:
            continue
        ids[place], ids[swallowed] = new, -1
        after = following[place] = following[swallowed]
        preceding[after] = place
        if (pair := (new, ids[after])) in ranks:
            heappush(heap, ranks[pair] * size + place)
        before = preceding[place]
        if before >= 0 and (pair := (ids[before], new)) in ranks:
            heappush(heap, ranks[pair] * size + before)
    return [i for i in ids if i >= 0]
