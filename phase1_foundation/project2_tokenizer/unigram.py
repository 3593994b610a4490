r"""The unigram tokenizer: of all ways to cut a text into known pieces, take the most probable, or draw one.

PAPERS
  [1] Subword Regularization: Improving Neural Network Translation Models with Multiple Subword Candidates,
      Kudo, 2018, arXiv:1804.10959
  [2] SentencePiece: A simple and language independent subword tokenizer and detokenizer for Neural Text
      Processing, Kudo and Richardson, 2018, arXiv:1808.06226

SYMBOLS (code = paper)
  scores[id]  = log p(x_i)   of a piece             chunk   what the pattern cuts off; pieces stay inside
  ids         = x            a segmentation          place   a gap between two bytes, 0 to len(chunk)
  alpha       = alpha        smoothing in sampling
"""

import heapq
import itertools
import math
import random
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Self

from phase1_foundation.project2_tokenizer.bpe import LONGEST
from phase1_foundation.project2_tokenizer.bpe_train import count_chunks
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
from phase1_foundation.project2_tokenizer.unigram_train import train_unigram

Edges = list[tuple[int, int]]  # (place at the other end, id of the piece between)
HERE = -1  # bytes are 0 to 255: in a node of the trie, the key of the id of the piece that ends there


class UnigramTokenizer(Tokenizer):
    r"""A vocabulary in which each piece has a probability, and a segmentation the product of its pieces'.

    PAPER: [1] Section 3.2 (the model and its best segmentation) and 3.3 (n-best and sampling).
    PAPER CONTEXT: BPE merges greedily and knows one segmentation of a word. A model that has always seen the
        same one does not know that "hug" and "hu", "g" are the same word, as a typo beside it may have it.
    INTUITION: Give each piece a price, minus its log-probability. Encoding is the cheapest way through the
        text; and as the other ways have prices too, near-ties can be drawn at random as training noise.
    IMPLEMENTATION: Pieces are bytes, and all 256 single bytes are pieces. So there is no unknown token, and
        any bytes survive the round trip. SentencePiece marks spaces with U+2581 and falls back to bytes by a
        separate rule; here a space is the byte 0x20, and a byte is a piece like any other.
    WHY: A greedy merge can spoil a word, and nothing later mends it; here whole segmentations compete, and
        the best is found as fast. SentencePiece and HF `tokenizers` find the same one (tests).
    """

    def __init__(
        self,
        vocab: dict[int, bytes],
        scores: dict[int, float],
        special_tokens: dict[str, int] | None = None,
        pattern: str = "gpt4",
    ) -> None:
        if pattern not in PATTERNS:
            raise ValueError(f"pattern ({pattern!r}) must be one of {', '.join(PATTERNS)}")
        if vocab.keys() != scores.keys():
            raise ValueError(f"scores ({len(scores)} ids) must have the ids of vocab ({len(vocab)} ids)")
        for i, score in scores.items():
            if not math.isfinite(score):
                raise ValueError(f"scores[{i}] ({score}) must be finite")
        self.vocab, self.scores, self.pattern = vocab, scores, pattern
        self.special_tokens = special_tokens or {}
        self._trie = build_trie(vocab)
        if missing := sum(HERE not in self._trie.get(b, {}) for b in range(256)):
            raise ValueError(f"vocab ({len(vocab)} pieces) must have all 256 bytes; {missing} are missing")
        self._bytes = vocab | {i: name.encode() for name, i in self.special_tokens.items()}
        self._cache = ChunkCache(self._best)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._bytes) + 1

    @classmethod
    def train_from_iterator(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        pattern: str = "gpt4",
        special_tokens: Collection[str] = (),
        on_step: Callable[[int, float], None] | None = None,
    ) -> Self:
        """Learn a vocabulary of the bytes, then pieces by falling probability, then the special tokens."""
        special = list(dict.fromkeys(special_tokens))
        if vocab_size < 256 + len(special):
            raise ValueError(
                f"vocab_size ({vocab_size}) must be at least 256 + {len(special)} special tokens"
            )
        if pattern not in PATTERNS:
            raise ValueError(f"pattern ({pattern!r}) must be one of {', '.join(PATTERNS)}")
        counts = {chunk.encode(): n for chunk, n in count_chunks(texts, pattern, special).items()}
        learned = train_unigram(counts, vocab_size - len(special), on_step=on_step)
        pieces = [bytes([b]) for b in range(256)]
        pieces += sorted((p for p in learned if len(p) > 1), key=lambda piece: (-learned[piece], piece))
        scores = {i: learned[piece] for i, piece in enumerate(pieces)}
        names = {name: len(pieces) + i for i, name in enumerate(special)}
        return cls(dict(enumerate(pieces)), scores, names, pattern)

    def encode(self, text: str | bytes, allowed_special: Collection[str] = ()) -> list[int]:
        """Return the most probable segmentation; the allowed special tokens (or "all") count as such."""
        return list(self.encode_iterable([text], allowed_special, sys.maxsize))

    def encode_iterable(
        self, texts: Iterable[str | bytes], allowed_special: Collection[str] = (), longest: int = LONGEST
    ) -> Iterator[int]:
        """Yield the ids of a text that comes in pieces, in little memory: those of the pieces joined.

        Only a stretch of `longest` characters without a safe place to cut is cut anywhere.
        """
        special = choose_special(self.special_tokens, allowed_special)
        pattern = PATTERNS[self.pattern]
        for block in pattern.blocks(map(as_text, texts), special, longest=longest):
            for part, is_special in split_special(block, special):
                if is_special:
                    yield special[part]
                else:
                    for chunk in pattern.split(part):
                        yield from self._cache[chunk]

    def _edges(self, data: bytes) -> Iterator[Edges]:
        """For each place, yield the pieces that begin there: (place where it ends, id)."""
        for begin in range(len(data)):
            edges, node = [], self._trie
            for end in range(begin, len(data)):
                if data[end] not in node:
                    break
                node = node[data[end]]
                if HERE in node:
                    edges.append((end + 1, node[HERE]))
            yield edges

    def _best(self, chunk: str) -> tuple[int, ...]:
        """Viterbi: the best way to a place ends with some piece, and is the best way to where that begins."""
        data = as_bytes(chunk)
        scores = self.scores
        best = [0.0] + [-math.inf] * len(data)
        arrived = [-1] * (len(data) + 1)  # the id of the best way's last piece
        for begin, edges in enumerate(self._edges(data)):
            here = best[begin]
            for end, i in edges:
                if (score := here + scores[i]) > best[end]:
                    best[end], arrived[end] = score, i
        ids, place = [], len(data)
        while place:
            ids.append(arrived[place])
            place -= len(self.vocab[ids[-1]])
        return tuple(reversed(ids))

    def _lattice(self, text: str | bytes) -> list[Edges]:
        """For each place of the text, return the pieces that end there: (place where it begins, id)."""
        arriving: list[Edges] = [[]]
        for chunk in PATTERNS[self.pattern].split(as_text(text)):
            data = as_bytes(chunk)
            base = len(arriving) - 1
            arriving += [[] for _ in data]
            for begin, edges in enumerate(self._edges(data)):
                for end, i in edges:
                    arriving[base + end].append((base + begin, i))
        return arriving

    def nbest(self, text: str | bytes, n: int) -> list[tuple[list[int], float]]:
        r"""Return the n most probable segmentations, or all if there are fewer, with their log-probabilities.

        PAPER: [1] Section 3.3, which names the forward-DP backward-A* algorithm of Nagata, 1994.
        PAPER CONTEXT: The first of two ways of [1] to sample: from the n best, in proportion to P(x)^alpha.
        INTUITION: Walk backwards from the end. Viterbi knows the best score up to every place, so of every
            piece on the walk it is known how much it loses against the best way. Always extend the walk that
            has lost least: the first to arrive is the best segmentation, the next the second best.
        IMPLEMENTATION: Adding up losses, not scores, keeps them exactly 0 along the best way; sums of rounded
            scores would not, and among equal walks the search would then try all combinations. Of two equal
            losses the walk that is nearer to the start goes first. Ids are a linked list: walks share tails.
        WHY: The loss is exact, not an estimate: only beginnings of the n best and their equals are extended,
            of up to 2^places segmentations. The tests compare with all of them.
        """
        if n < 1:
            raise ValueError(f"n ({n}) must be at least 1")
        arriving = self._lattice(text)
        best = [0.0]
        for edges in arriving[1:]:
            best.append(max(best[begin] + self.scores[i] for begin, i in edges))
        ticket = itertools.count()  # makes the entries of the heap differ before the ids are compared
        walks: list[tuple[float, int, int, Any]] = [(0.0, len(best) - 1, next(ticket), None)]
        found: list[tuple[list[int], float]] = []
        while walks and len(found) < n:
            loss, place, _, tail = heapq.heappop(walks)
            if place == 0:
                found.append((list(unlink(tail)), best[-1] - loss))
            for begin, i in arriving[place]:
                lost = loss + (best[place] - (best[begin] + self.scores[i]))
                heapq.heappush(walks, (lost, begin, next(ticket), (i, tail)))
        return found

    def sample(self, text: str | bytes, alpha: float = 1.0, rng: random.Random | None = None) -> list[int]:
        r"""Draw a segmentation with probability proportional to P(segmentation)^alpha.

        PAPER: [1] Section 3.3, forward filtering and backward sampling, over all segmentations.
        PAPER CONTEXT: Subword regularization: train on another segmentation of the same text at every pass.
        INTUITION: Sum over all ways to each place, from the left. Then walk back from the end and choose each
            piece by its share of the sum; that is the same sum that the E step of training uses.
        IMPLEMENTATION: alpha 0 makes all segmentations equally likely; large alpha is `encode`. Chunks are
            independent, so the whole text is one walk.
        WHY: Without smoothing there is little to see: at alpha 1 more than 90 of 100 English words come out
            as `encode` cuts them, at alpha 0.1 fewer than 60.
        """
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha ({alpha}) must be zero or a positive number")
        rng = rng or random.Random()
        arriving = self._lattice(text)
        forward = [0.0]  # log of the sum, over all ways to a place, of P(way)^alpha
        for edges in arriving[1:]:
            terms = [forward[begin] + alpha * self.scores[i] for begin, i in edges]
            top = max(terms)
            forward.append(top + math.log(sum(math.exp(term - top) for term in terms)))
        ids, place = [], len(forward) - 1
        while place:
            edges = arriving[place]
            shares = [math.exp(forward[b] + alpha * self.scores[i] - forward[place]) for b, i in edges]
            place, i = rng.choices(edges, shares)[0]
            ids.append(i)
        return ids[::-1]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that the ids stand for; ValueError if there is no such id."""
        return join_tokens(self._bytes, ids)


def build_trie(vocab: Mapping[int, bytes]) -> dict[int, Any]:
    """Return nested dictionaries that spell each piece byte by byte, its id at the end under HERE."""
    trie: dict[int, Any] = {}
    for i, piece in vocab.items():
        node = trie
        for byte in piece:
            node = node.setdefault(byte, {})
        if HERE in node or not piece:
            raise ValueError(f"vocab[{i}] ({piece!r}) must be a piece of its own, and not empty")
        node[HERE] = i
    return trie


def unlink(chain: Any) -> Iterator[int]:
    """Yield the ids of a linked list (id, rest)."""
    while chain is not None:
        i, chain = chain
        yield i
