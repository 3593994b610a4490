"""How many near copies are found? uv run python phase1_foundation/project3_pretrain/plant_copies.py

Takes documents of a corpus, plants a copy of each with some words replaced, looks for copies as preprocess.py
does, and holds what is found to the true similarity of each pair.
"""

import math
import random
import re
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.plots import new_figure, save_figure
from common.script import progress, script
from phase1_foundation.project3_pretrain.config import PlantConfig
from phase1_foundation.project3_pretrain.dedup import (
    MinHash,
    SignatureFile,
    chance_to_meet,
    jaccard,
    near_duplicates,
    shingles,
)
from phase1_foundation.project3_pretrain.download_data import read_documents
from phase1_foundation.project3_pretrain.preprocess import find_corpora

BIN = 0.05  # of similarity, in the table and the picture
LONGEST = 20_000  # characters of a document that are used
SHORTEST = 100  # words


class Pair(NamedTuple):
    """A document and its planted copy."""

    similarity: float  # the true one
    found: bool


def run(config: PlantConfig) -> tuple[list[Pair], list[float]]:
    """Return the pairs, and the true similarity of each document that went to the one that it went for."""
    rng = random.Random(config.seed)
    originals = list(islice(originals_of(config), config.documents))
    words = [word for text in originals for word in re.findall(r"\w+", text)]
    copies = [edit(text, rng.uniform(0, 0.12) ** 2 / 0.12, words, rng) for text in originals]
    sets = [shingles(text) for text in progress(originals + copies, desc="shingles")]
    gone = find(sets, config)
    similarities = [jaccard(sets[copy], sets[original]) for copy, original in gone.items()]
    count = len(originals)
    pairs = [Pair(jaccard(sets[i], sets[count + i]), count + i in gone) for i in range(count)]
    draw(pairs, config)
    return pairs, similarities


def originals_of(config: PlantConfig) -> Iterator[str]:
    """Yield documents of the corpus that are not like an earlier one by more than half."""
    texts = (
        text[:LONGEST] for path in find_corpora(config.data, config.source) for text in read_documents(path)
    )
    long = list(islice((text for text in texts if len(text.split()) >= SHORTEST), 2 * config.documents))
    like = find([shingles(text) for text in long], config, threshold=0.5)
    yield from (text for i, text in enumerate(long) if i not in like)


def edit(text: str, share: float, words: list[str], rng: random.Random) -> str:
    """Return the text with this share of its words replaced by others of the corpus."""
    return re.sub(r"\w+", lambda word: rng.choice(words) if rng.random() < share else word[0], text)


def find(sets: list[np.ndarray], config: PlantConfig, threshold: float = 0.0) -> dict[int, int]:
    """Return which documents go, and for which."""
    minhash = MinHash(config.permutations)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "signatures"
        path.write_bytes(b"".join(minhash.signature(each).tobytes() for each in sets))
        signatures, everyone = SignatureFile(path, config.permutations), np.ones(len(sets), bool)
        threshold = threshold or config.near_duplicates
        return {
            copy: kept for copy, kept, _ in near_duplicates(signatures, config.bands, threshold, everyone)
        }


def chance_to_pass(similarity: float, threshold: float, permutations: int) -> float:
    """Return the probability that the estimate, a mean of so many coin flips, reaches the threshold."""
    least = math.ceil(threshold * permutations - 1e-9)
    return sum(
        math.comb(permutations, heads) * similarity**heads * (1 - similarity) ** (permutations - heads)
        for heads in range(least, permutations + 1)
    )


def draw(pairs: list[Pair], config: PlantConfig) -> None:
    """Draw the share of the copies that was found by similarity, beside what theory says."""
    figure, axes = new_figure()
    xs = np.linspace(0, 1, 201).tolist()
    rows = config.permutations // config.bands
    meet = [chance_to_meet(x, config.bands, rows) for x in xs]
    pass_ = [chance_to_pass(x, config.near_duplicates, config.permutations) for x in xs]
    axes.plot(xs, meet, color="C1", label=f"chance to meet, {config.bands} bands of {rows} rows")
    axes.plot(xs, pass_, color="C3", label=f"chance that the estimate reaches {config.near_duplicates}")
    points = [(low + BIN / 2, found / count) for low, count, found in by_similarity(pairs)]
    axes.plot(*zip(*points, strict=True), "o", color="C0", label="share of the planted copies that was found")
    axes.set(title=f"{len(pairs):,} planted copies", xlabel="true similarity", ylabel="share")
    axes.legend(loc="upper left")
    save_figure(figure, config.out)


def by_similarity(pairs: list[Pair]) -> Iterator[tuple[float, int, int]]:
    """Yield lower end, number of pairs and number of those found of each bin that has any."""
    for number in range(round(1 / BIN)):
        inside = [
            pair.found for pair in pairs if min(int(pair.similarity / BIN), round(1 / BIN) - 1) == number
        ]
        if inside:
            yield number * BIN, len(inside), sum(inside)


@script
def main() -> None:
    config = PlantConfig.from_cli()
    pairs, gone = run(config)
    threshold = config.near_duplicates
    print(f"{'similarity':14}{'planted':>9}{'found':>9}{'share':>9}")
    for low, count, hits in by_similarity(pairs):
        print(f"{low:.2f} to {low + BIN:.2f}  {count:9,}{hits:9,}{hits / count:9.1%}")
    for least in (threshold, threshold + (1 - threshold) / 2):
        found = [pair.found for pair in pairs if pair.similarity >= least]
        print(f"recall: {sum(found):,} of {len(found):,} copies of similarity {least:.2f} or more were found")
    for least in (threshold, threshold - 0.1):
        alike = sum(similarity >= least for similarity in gone)
        print(f"precision: {alike:,} of {len(gone):,} that went are of similarity {least:.2f} or more")
    print(f"picture: {config.out}")


if __name__ == "__main__":
    main()
