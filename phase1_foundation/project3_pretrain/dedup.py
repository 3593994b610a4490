r"""Finding copies: exact ones by a hash of the text, near ones by MinHash and locality-sensitive hashing.

PAPERS
  [1] On the Resemblance and Containment of Documents, Broder, 1997 (Compression and Complexity of Sequences)
  [2] Min-Wise Independent Permutations, Broder, Charikar, Frieze and Mitzenmacher, 1998 (STOC)
  [3] Approximate Nearest Neighbors: Towards Removing the Curse of Dimensionality, Indyk and Motwani, 1998
      (STOC)
  [4] Deduplicating Training Data Makes Language Models Better, Lee et al., 2021, arXiv:2107.06499
  [5] The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale, Penedo et al., 2024,
      arXiv:2406.17557

SYMBOLS (code = paper)                                       SHAPES
  similarity  = r(A, B) of [1], Jaccard's |A & B| / |A | B|    N  documents
  rows, bands = b and r of [4], in this order                  k  permutations
  permutations = rows * bands                                  n  shingles of a document
"""

import hashlib
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Signatures = NDArray[np.uint32]

WORDS_PER_SHINGLE = 5  # as in [4] and [5]
# Where words are not divided by spaces (Japanese, Chinese), each character counts as one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
BLOCK = 512  # shingles hashed at a time: with 128 permutations half a megabyte, which stays in the cache
DOCUMENTS = 1 << 12  # whose signatures are read at a time
PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd, of 64 bits


def text_hash(text: str) -> int:
    """Return 64 bits that differ for different texts; two of 10 million collide with probability 3e-6."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(x: Hashes) -> Hashes:
    """Scramble 64-bit numbers one to one, so that neighbours land far apart (the finalizer of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_words(words: list[str]) -> Hashes:
    """Return a number for each word, the same on every machine and in every run (Python's hash() is not)."""
    return np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))


def ngrams(hashes: Hashes, n: int) -> Hashes:
    """Return a hash for each n words in a row, all at once."""
    count = max(0, len(hashes) - n + 1)
    total = np.zeros(count, np.uint64)
    for i in range(n):
        total = total * PRIME + hashes[i : i + count]
    return mix(total)


def shingles(text: str, words_per_shingle: int = WORDS_PER_SHINGLE) -> Hashes:
    """Return the set that stands for a text, at least one hash: its runs of words; repeats do no harm.

    Case, spaces and punctuation do not count. A text shorter than a shingle is one shingle.
    """
    hashes = hash_words(WORD.findall(text.lower()))
    if not len(hashes):  # no words: like only to what is the same
        return np.array([text_hash(text)], np.uint64)
    return ngrams(hashes, min(words_per_shingle, len(hashes)))


def jaccard(a: Hashes, b: Hashes) -> float:
    """Return the true similarity of two sets of shingles: what they share over what they have together."""
    return len(np.intersect1d(a, b)) / len(np.union1d(a, b))


class MinHash:
    r"""Signatures: k numbers for a document; two agree in about the share of places in which texts are alike.

    PAPER: [1] for the resemblance and its estimate from random permutations; k of them and their minima: [2].
    PAPER CONTEXT: To compare all pairs of millions of pages, word by word, is out of the question. [1] came
        from AltaVista, which searched 30 million, and reduces a page to a sample of fixed size.
    INTUITION: Shuffle all shingles there are and look which shingle of A | B comes first. It is one of A &
        B with probability |A & B| / |A | B|, and exactly then A and B have the same first. Do it k times
        and count.
    IMPLEMENTATION: A shuffle is a * x + b modulo 2^64 with random odd a: not every permutation, but
        shingles are scrambled numbers already. The 32 high bits of the least value are kept, 4k bytes for a
        document.
    WHY: The estimate is a mean of k coin flips: its standard deviation is sqrt(s (1 - s) / k), 0.035 for
        similarity s = 0.8 and k = 128, however long the documents are.
    """

    def __init__(self, permutations: int = 128, seed: int = 0) -> None:
        if permutations < 1:
            raise ValueError(f"permutations ({permutations}) must be at least 1")
        a, b = np.random.default_rng(seed).integers(1 << 64, size=(2, permutations, 1), dtype=np.uint64)
        self.factors, self.shifts = a | np.uint64(1), b

    def signature(self, hashes: Hashes) -> Signatures:
        """Return the signature (k,) of a set of shingles."""
        least = np.full(len(self.factors), (1 << 64) - 1, np.uint64)
        for start in range(0, len(hashes), BLOCK):
            shuffled = self.factors * hashes[start : start + BLOCK] + self.shifts  # (k, BLOCK)
            np.minimum(least, shuffled.min(axis=1), out=least)
        return (least >> np.uint64(32)).astype(np.uint32)


def estimate(a: Signatures, b: Signatures) -> NDArray[np.float64]:
    """Return the estimated similarity of signatures (..., k): the share of places in which they agree."""
    return np.mean(a == b, axis=-1)


def chance_to_meet(similarity: float, bands: int, rows: int) -> float:
    r"""Return the probability that two documents of this similarity are compared at all.

    PAPER: [4] Sec. 4.2 and its appendix; the principle, hashing so that like meets like, is that of [3].
    PAPER CONTEXT: Even with signatures, all pairs are too many: 10 million documents have 5e13.
    INTUITION: Cut the signature into bands. Two documents that agree in all rows of one band meet in a
        bucket, and only who meets is compared. Rows are hard to agree in; many bands give many chances.
    IMPLEMENTATION: All rows of a band agree with probability s^rows, so no band does with (1 - s^rows)^bands.
        [4] takes 450 bands of 20 rows, [5] 14 of 8.
    WHY: The curve is an S, steep near (1 / bands)^(1 / rows), 0.71 for 16 bands of 8 rows: similarity 0.9
        is found with probability 0.9999, 0.8 with 0.95, and 0.3 is looked at once in 1,000 times.
    """
    return 1 - (1 - similarity**rows) ** bands


class SignatureFile:
    r"""The signatures of all documents, on disk one after the other: only what is asked for is in memory.

    PAPER: none; the pipeline that [5] published works from files of signatures in the same way.
    PAPER CONTEXT: A signature of 128 permutations has 512 bytes, as much as a short document.
    INTUITION: A card index in the cellar: one drawer is carried up at a time.
    IMPLEMENTATION: Plain reads, not a memory map, whose pages would count as memory of the process.
    WHY: A band's keys take 8 bytes of memory for each document, whole signatures 64 times that.
    """

    def __init__(self, path: Path, permutations: int) -> None:
        self.path, self.permutations = path, permutations
        self.count = path.stat().st_size // (4 * permutations)

    def band_keys(self, band: int, rows: int) -> Hashes:
        """Return one key for each document (N,) from its rows of this band; like rows have like keys."""
        keys = np.zeros(self.count, np.uint64)
        with open(self.path, "rb") as file:
            for start in range(0, self.count, DOCUMENTS):
                block = np.fromfile(file, np.uint32, DOCUMENTS * self.permutations).reshape(
                    -1, self.permutations
                )
                for column in block[:, band * rows : (band + 1) * rows].T:
                    keys[start : start + len(block)] = mix(keys[start : start + len(block)] * PRIME + column)
        return keys

    def read(self, numbers: list[int]) -> Signatures:
        """Return the signatures of these documents."""
        with open(self.path, "rb", buffering=0) as file:
            signatures = []
            for number in numbers:
                file.seek(number * 4 * self.permutations)
                signatures.append(np.frombuffer(file.read(4 * self.permutations), np.uint32))
        return np.stack(signatures)


def exact_duplicates(hashes: Hashes) -> NDArray[np.bool_]:
    """Return for each document (N,) whether an earlier one has the same hash."""
    copies = np.ones(len(hashes), bool)
    copies[np.unique(hashes, return_index=True)[1]] = False  # the first of each
    return copies


def near_duplicates(
    signatures: SignatureFile, bands: int, threshold: float, taking_part: NDArray[np.bool_]
) -> Iterator[tuple[int, int, float]]:
    r"""Yield (document, the kept one that it is like, estimate) for what LSH finds, in the documents' order.

    PAPER: [4] Sec. 4.2: candidates by MinHash and LSH, then a closer look at each.
    PAPER CONTEXT: [4] found that 3% of C4's documents are near-copies, and that models trained without them
        emit memorized text ten times less often and need fewer steps to the same loss.
    INTUITION: Who meets nobody in any bucket is unique. Of those who meet, the first to come stays, and a
        later one goes if it looks like one that stayed.
    IMPLEMENTATION: The look is at the signatures; [4] compares the texts by edit distance. [4] and [5] join
        chains, A like B like C, and keep one; here C goes only if it is like A itself. One band is in
        memory at a time; after it only documents that met somebody are remembered.
    WHY: A model trained on copies learns them by heart, and a copy in the validation part makes its loss a
        lie.
    """
    documents, buckets = _meetings(signatures, bands, taking_part)
    ends = np.flatnonzero(np.diff(documents, append=-1)) + 1  # of each document's run of buckets
    kept: dict[int, list[int]] = defaultdict(list)  # bucket: documents that stay
    for start, end in pairwise([0, *ends.tolist()]):
        document, mine = int(documents[start]), buckets[start:end].tolist()
        if met := sorted({other for bucket in mine for other in kept[bucket]}):
            alike = estimate(signatures.read(met), signatures.read([document]))
            best = int(alike.argmax())
            if alike[best] >= threshold:
                yield document, met[best], float(alike[best])
                continue
        for bucket in mine:
            kept[bucket].append(document)


def _meetings(
    signatures: SignatureFile, bands: int, taking_part: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return who meets where: documents, in order, once for each bucket they share, and these buckets."""
    numbers, total = np.flatnonzero(taking_part), 0
    documents, buckets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for band in range(bands):
        keys = signatures.band_keys(band, signatures.permutations // bands)[numbers]
        order = np.argsort(keys)
        repeats = np.diff(keys[order], prepend=0) == 0  # the key of the one before
        repeats[:1] = False
        shared = repeats | np.append(repeats[1:], False)
        documents.append(numbers[order[shared]])
        buckets.append(total + np.cumsum(~repeats[shared]))
        total += int((~repeats[shared]).sum())
    order = np.argsort(np.concatenate(documents), kind="stable")
    return np.concatenate(documents)[order], np.concatenate(buckets)[order]
