"""Learning the merges of byte-pair encoding: first as it is meant, then with a thousandth of the work.

PAPERS
  [1] A New Algorithm for Data Compression, Gage, 1994 (The C Users Journal 12(2))
  [2] Neural Machine Translation of Rare Words with Subword Units, Sennrich, Haddow and Birch, 2016,
      arXiv:1508.07909
  [3] Language Models are Unsupervised Multitask Learners, Radford et al., 2019 (GPT-2)
  [4] A Formal Perspective on Byte-Pair Encoding, Zouhar et al., 2023, arXiv:2306.16837

SYMBOLS (code = paper)
  n_merges = M of [4]     tokens of all words = N of [4]
  word     a chunk of the text as tokens, at first one per byte
  pair     two tokens side by side: left id, right id
"""

import multiprocessing
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from heapq import heapify, heappop, heappush, heapreplace
from itertools import pairwise
from operator import add

from phase1_foundation.project2_tokenizer.patterns import PATTERNS
from phase1_foundation.project2_tokenizer.tokenizer import as_text, split_special

Merge = tuple[int, int, int]  # left id, right id, id of the two together
Report = Callable[[Merge, int], object]  # told of each merge, and how often its pair occurs

# Token i is the byte BYTES[i]: in [3]'s order, first what can be seen on paper, then the rest. The ids decide
# which of two equally frequent pairs is merged first, so this order is a part of the algorithm.
BYTES = bytes([*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173])
_IDS = bytes(BYTES.index(b) for b in range(256))  # and back: byte b is token _IDS[b]

SHARE = 1 << 20  # characters that a process counts at a time


def count_chunks(texts: Iterable[str], pattern: str, special_tokens: Collection[str] = ()) -> Counter[str]:
    """Count the chunks of a text that comes in pieces; special tokens are cut out and not counted."""
    counts: Counter[str] = Counter()
    for block in PATTERNS[pattern].blocks(map(as_text, texts), special_tokens):
        for part, is_special in split_special(block, special_tokens):
            if not is_special:
                counts.update(PATTERNS[pattern].split(part))
    return counts


def count_chunks_parallel(
    texts: Iterable[str], pattern: str, special_tokens: Collection[str] = (), workers: int = 2
) -> Counter[str]:
    """Count as count_chunks does, in so many processes; only a few shares of the text wait in memory."""
    if workers < 1:
        raise ValueError(f"workers ({workers}) must be at least 1")
    counts: Counter[str] = Counter()
    pending: deque[Future[Counter[str]]] = deque()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for share in PATTERNS[pattern].blocks(map(as_text, texts), special_tokens, size=SHARE):
            pending.append(pool.submit(count_chunks, [share], pattern, special_tokens))
            if len(pending) > 3 * workers:
                counts.update(pending.popleft().result())
        for future in pending:
            counts.update(future.result())
    return counts


def naive(counts: Mapping[str, int], n_merges: int, report: Report | None = None) -> list[Merge]:
    """Learn merges: count all pairs, merge the most frequent one everywhere, and count again.

    PAPER: [2] Algorithm 1; before it [1], on the bytes of a file. [4] Sec. 3 bounds what greed costs.
    PAPER CONTEXT: [1] compresses a file: a frequent pair of bytes gets a byte that is not in use. [2] does
        so to the letters of words and keeps the list of merges, which cuts words never seen before into
        pieces.
    INTUITION: "t h e" is everywhere, so "t" and "h" become one token, then "th" and "e". After some
        thousand merges a frequent word is one token, and a rare word a few pieces that are frequent.
    IMPLEMENTATION: As in [2] Sec. 3.2 a word stands for all its occurrences, with their count. Of equally
        frequent pairs the smallest (left id, right id) is merged, as in Hugging Face's `tokenizers`.
    WHY: This is the definition that the fast trainer is tested against. It reads all N tokens for each of M
        merges, though a merge changes few of them.
    """
    words = [(list(map(ord, _tokens(chunk))), count) for chunk, count in counts.items()]
    merges: list[Merge] = []
    for new in range(len(BYTES), len(BYTES) + n_merges):
        pairs: Counter[tuple[int, int]] = Counter()
        for word, count in words:
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = [(_replace(word, best, new), count) for word, count in words]
        merges.append((*best, new))
        if report:
            report(merges[-1], pairs[best])
    return merges


def _replace(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Return the word with `new` in place of the pair, found from left to right."""
    merged: list[int] = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged


def incremental(counts: Mapping[str, int], n_merges: int, report: Report | None = None) -> list[Merge]:
    """Learn the same merges as `naive`, with counts that are kept up to date instead of made anew.

    PAPER: [2] Sec. 3.2 (all pairs indexed and updated incrementally); [4] Sec. 4, in N log M steps.
    PAPER CONTEXT: The code of [2] has such an index; Hugging Face's `tokenizers` and rustbpe, both in Rust,
        have the heap as well. The algorithm matters more than the language.
    INTUITION: To merge "t" and "h" one needs to know that it is the best pair (a heap), in which words it
        is (an index), and its neighbours: "a t h e" loses the pairs "a t" and "h e" and gains "a th" and
        "th e". All other counts stay as they are, so nothing else is looked at.
    IMPLEMENTATION: A word is a str, its tokens are the characters with their ids for numbers: str.split
        finds a pair and str.join merges it, in C, and pairs are in order of (left, right). A pair that lost
        occurrences keeps its place in the heap, too high, until it comes to the top; there it is put right.
    WHY: The work is the number of places that change, however many merges there are. For vocabulary 5000 on
        Shakespeare those are 74,821 places among 110,918 tokens, which `naive` reads through 4744 times.
    """
    words = [_tokens(chunk) for chunk in counts]
    weight = list(counts.values()).__getitem__  # how often the word of a number occurs
    places: dict[str, list[int]] = defaultdict(list)  # numbers of the words that hold a pair, or did once
    for number, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            places[pair].append(number)
    frequency = {pair: sum(map(weight, numbers)) for pair, numbers in places.items()}
    heap = [(-count, pair) for pair, count in frequency.items()]
    heapify(heap)
    merges: list[Merge] = []
    while heap and len(merges) < n_merges:
        count, pair = heap[0]
        if count != -frequency[pair]:  # other merges took some occurrences, or all
            if frequency[pair]:
                heapreplace(heap, (-frequency[pair], pair))
            else:
                heappop(heap)
            continue
        heappop(heap)
        new = chr(len(BYTES) + len(merges))
        # No other token has the same bytes: wherever they stand, merges inside them went the same way. So all
        # that is gained is new, and the pair never comes back.
        gained = _merge(pair, new, words, places.pop(pair), weight, frequency)
        for other, numbers in gained.items():
            frequency[other] = sum(map(weight, numbers))
            heappush(heap, (-frequency[other], other))
        places.update(gained)
        frequency[pair] = 0
        merges.append((ord(pair[0]), ord(pair[1]), ord(new)))
        if report:
            report(merges[-1], -count)
    return merges


def _merge(
    pair: str,
    new: str,
    words: list[str],
    numbers: list[int],
    weight: Callable[[int], int],
    frequency: dict[str, int],
) -> dict[str, list[int]]:
    """Merge the pair in the words of these numbers; return the pairs gained, with a number per occurrence."""
    left, right = pair[0], pair[1]
    gained: dict[str, list[int]] = defaultdict(list)
    for number in set(numbers):
        parts = words[number].split(pair)
        if len(parts) == 1:
            continue  # other merges took it
        words[number] = new.join(parts)
        for before, after in pairwise(parts):  # the two sides of one occurrence
            if before:
                frequency[before[-1] + left] -= weight(number)
                gained[before[-1] + new].append(number)
            if after:
                frequency[right + after[0]] -= weight(number)
                gained[new + after[0]].append(number)
        if len(parts) > 2:
            for _ in range(parts[1:-1].count("")):  # two occurrences with nothing between them
                frequency[right + left] -= weight(number)
                gained[new + new].append(number)
    return gained


def _tokens(chunk: str) -> str:
    """Return the bytes of a chunk as a word: one character per token, whose number is the token's id."""
    return chunk.encode().translate(_IDS).decode("latin-1")
