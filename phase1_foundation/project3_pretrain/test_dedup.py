"""Checks of finding copies. --interactive then compares two texts that you type."""

import math
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.corpora import write_documents
from common.script import ask, run_validation
from phase1_foundation.project3_pretrain import plant_copies
from phase1_foundation.project3_pretrain.config import PlantConfig
from phase1_foundation.project3_pretrain.dedup import (
    PRIME,
    MinHash,
    SignatureFile,
    chance_to_meet,
    estimate,
    exact_duplicates,
    hash_words,
    jaccard,
    mix,
    near_duplicates,
    ngrams,
    shingles,
    text_hash,
)
from phase1_foundation.project3_pretrain.plant_copies import chance_to_pass

K, BANDS, ROWS = 128, 16, 8


def sets_of_similarity(
    share: float, rng: np.random.Generator, size: int = 300
) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of random shingles whose Jaccard similarity is `share`, as near as whole numbers allow."""
    common = round(share * size)
    numbers = rng.integers(1 << 64, size=size, dtype=np.uint64)
    return numbers[: (size + common) // 2], np.concatenate(
        [numbers[:common], numbers[(size + common) // 2 :]]
    )


def write_signatures(path: Path, signatures: list[np.ndarray]) -> SignatureFile:
    path.write_bytes(b"".join(signature.tobytes() for signature in signatures))
    return SignatureFile(path, K)


def find(tmp_path: Path, texts: list[str], threshold: float = 0.8) -> dict[int, int]:
    """Return which texts are near copies of which."""
    minhash = MinHash(K)
    file = write_signatures(tmp_path / "signatures", [minhash.signature(shingles(text)) for text in texts])
    found = near_duplicates(file, BANDS, threshold, np.ones(len(texts), bool))
    return {copy: original for copy, original, _ in found}


@pytest.fixture(scope="module")
def write() -> Callable[[int], str]:
    """A writer of documents of n words, in which some words are frequent, as in any language."""
    rng = random.Random(1)
    vocabulary = [f"w{rng.randrange(36**6):x}" for _ in range(3000)]
    weights = [1 / (i + 1) for i in range(len(vocabulary))]
    return lambda n: " ".join(rng.choices(vocabulary, weights, k=n))


def edit(text: str, share: float, rng: random.Random) -> str:
    """Return the text with this share of its words replaced."""
    return " ".join(f"x{rng.random()}" if rng.random() < share else word for word in text.split())


# Shingles


def test_case_spaces_and_punctuation_do_not_count() -> None:
    a = "The quick brown fox -- jumps over the lazy dog."
    assert jaccard(shingles(a), shingles("the quick,brown\nFOX jumps over\tthe lazy dog!")) == 1
    assert jaccard(shingles(a), shingles("the quick brown fox jumps over the lazy cat")) == pytest.approx(
        4 / 6
    )


@given(st.lists(st.sampled_from(["a", "b", "ab", "ü", "猫"]), min_size=1, max_size=40), st.integers(1, 6))
def test_two_ngrams_have_one_hash_if_and_only_if_they_are_the_same_words(words: list[str], n: int) -> None:
    hashes = ngrams(hash_words(words), n)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert len(hashes) == len(grams)
    assert len(set(hashes.tolist())) == len(set(grams))
    assert len(set(zip(hashes.tolist(), grams, strict=True))) == len(set(grams))


def test_texts_of_every_kind_have_shingles() -> None:
    assert len(shingles("one two")) == 1  # shorter than a shingle
    assert len(shingles("")) == len(shingles("***")) == 1
    assert jaccard(shingles("***"), shingles("---")) == 0
    assert len(shingles("東京は日本の首都です")) == 10 - 4  # no spaces: each character is a word
    assert len(shingles("Привет мир " * 3)) == 2


def test_hashes_are_the_same_in_every_run_and_on_every_machine() -> None:
    assert text_hash("The same text") == 0xCCFD8C4165D76276
    assert shingles("the same five words here").tolist() == [0x03C8FB32A3AA5FE8]
    assert mix(np.array([PRIME]))[0] == 0xE220A8397B1DCDAF  # what splitmix64 gives first when seeded with 0


def test_one_permutation_at_least() -> None:
    with pytest.raises(ValueError, match=r"^permutations \(0\) must be at least 1$"):
        MinHash(0)


# Signatures


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
def test_the_estimate_of_similarity_has_the_mean_and_the_spread_that_theory_says(share: float) -> None:
    rng = np.random.default_rng(int(100 * share))
    errors = []
    for trial in range(300):
        minhash = MinHash(K, seed=trial)
        a, b = sets_of_similarity(share, rng)
        errors.append(float(estimate(minhash.signature(a), minhash.signature(b))) - jaccard(a, b))
    deviation = math.sqrt(share * (1 - share) / K)
    assert abs(np.mean(errors)) <= 4 * deviation / math.sqrt(len(errors)) + 1e-9
    assert np.std(errors) == pytest.approx(deviation, rel=0.2)  # that of a deviation from 300 values is 4%


def test_the_estimate_is_rarely_far_off_as_hoeffding_bounds_it() -> None:
    rng, minhash = np.random.default_rng(0), MinHash(K)
    errors = []
    for _ in range(500):
        a, b = sets_of_similarity(float(rng.uniform()), rng)
        errors.append(abs(float(estimate(minhash.signature(a), minhash.signature(b))) - jaccard(a, b)))
    for far in (0.05, 0.1, 0.15):
        assert np.mean(np.array(errors) > far) <= 2 * math.exp(-2 * K * far**2)


def test_a_signature_does_not_depend_on_order_repeats_or_the_size_of_blocks() -> None:
    hashes = np.random.default_rng(0).integers(1 << 64, size=1500, dtype=np.uint64)
    minhash = MinHash(16)
    signature = minhash.signature(hashes)
    assert (signature == minhash.signature(np.concatenate([hashes[::-1], hashes[:7]]))).all()
    by_definition = [(int(a) * hashes.astype(object) + int(b)) % 2**64 for a, b in
                     zip(minhash.factors[:, 0], minhash.shifts[:, 0], strict=True)]  # fmt: skip
    assert signature.tolist() == [min(values) >> 32 for values in by_definition]


# Buckets


def test_the_chance_to_meet_is_the_s_curve_of_its_docstring() -> None:
    assert chance_to_meet(0.9, BANDS, ROWS) == pytest.approx(0.9999, abs=5e-5)
    assert chance_to_meet(0.8, BANDS, ROWS) == pytest.approx(0.95, abs=5e-3)
    assert chance_to_meet(0.3, BANDS, ROWS) == pytest.approx(1e-3, rel=0.1)
    assert chance_to_meet((1 / BANDS) ** (1 / ROWS), BANDS, ROWS) == pytest.approx(1 - 1 / math.e, abs=0.02)
    assert round((1 / BANDS) ** (1 / ROWS), 2) == 0.71


@pytest.mark.parametrize("share", [0.5, 0.7, 0.85])
def test_pairs_meet_as_often_as_the_formula_says(tmp_path: Path, share: float) -> None:
    rng, trials = np.random.default_rng(7), 300
    signatures = []
    for seed in range(trials):
        signatures += [MinHash(K, seed).signature(hashes) for hashes in sets_of_similarity(share, rng)]
    file = write_signatures(tmp_path / "signatures", signatures)
    keys = np.stack([file.band_keys(band, ROWS) for band in range(BANDS)])  # (bands, 2 trials)
    met = (keys[:, ::2] == keys[:, 1::2]).any(axis=0)
    chance = chance_to_meet(share, BANDS, ROWS)
    assert abs(met.mean() - chance) <= 4 * math.sqrt(chance * (1 - chance) / trials)


def test_keys_of_a_band_are_equal_if_and_only_if_its_rows_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    signatures = list(rng.integers(2, size=(400, K), dtype=np.uint32))
    file = write_signatures(tmp_path / "signatures", signatures)
    assert (file.read([5, 399, 5]) == np.stack(signatures)[[5, 399, 5]]).all()
    for band in (0, 7, 15):
        rows = [tuple(signature[band * ROWS : (band + 1) * ROWS]) for signature in signatures]
        keys = file.band_keys(band, ROWS).tolist()
        assert len(set(keys)) == len(set(rows)) == len(set(zip(keys, rows, strict=True)))


# Copies


@given(st.lists(st.integers(0, 5)))
def test_of_exact_copies_the_first_stays(numbers: list[int]) -> None:
    copies = exact_duplicates(np.array(numbers, np.uint64))
    assert copies.tolist() == [numbers.index(number) < i for i, number in enumerate(numbers)]


def test_planted_near_copies_are_found_and_nothing_else_is(
    tmp_path: Path, write: Callable[[int], str]
) -> None:
    rng = random.Random(5)
    originals = [write(200) for _ in range(300)]
    copies = [edit(text, rng.choice([0.005, 0.01, 0.02]), rng) for text in originals[:100]]
    found = find(tmp_path, originals + copies)
    sets = [shingles(text) for text in originals + copies]
    alike = [jaccard(sets[i], sets[300 + i]) for i in range(100)]
    close = [300 + i for i in range(100) if alike[i] >= 0.9]
    assert len(close) >= 40
    assert set(close) <= set(found)
    assert all(jaccard(sets[copy], sets[original]) > 0.7 for copy, original in found.items())
    assert {copy: original for copy, original in found.items() if copy - 300 != original} == {}


def test_the_share_of_planted_copies_that_is_found_is_what_theory_says(
    tmp_path: Path, write: Callable[[int], str]
) -> None:
    write_documents(tmp_path / "corpus.docs.txt", [write(150) for _ in range(250)])
    config = PlantConfig([str(tmp_path / "corpus.docs.txt")], documents=200, out=tmp_path / "copies.png")
    pairs, gone = plant_copies.run(config)
    assert len(pairs) == 200
    expected = [
        chance_to_pass(similarity, 0.8, K) for similarity, _ in pairs
    ]  # who passes has met, nearly always
    spread = math.sqrt(sum(chance * (1 - chance) for chance in expected))
    assert abs(sum(expected) - sum(pair.found for pair in pairs)) <= 4 * spread
    assert 20 < len(gone) < 180
    assert min(gone) > 0.65  # four standard deviations below the threshold
    assert (tmp_path / "copies.png").read_bytes().startswith(b"\x89PNG")


def test_the_chance_to_pass_is_that_of_coin_flips() -> None:
    assert chance_to_pass(0.3, 0.5, 1) == pytest.approx(0.3)
    assert chance_to_pass(0.5, 0.5, 2) == pytest.approx(0.75)
    assert chance_to_pass(0.8, 0.8, 128) == pytest.approx(0.5, abs=0.05)
    assert chance_to_pass(1.0, 1.0, 128) == 1


def test_who_goes_is_like_one_who_stays_and_chains_are_not_followed(
    tmp_path: Path, write: Callable[[int], str]
) -> None:
    words = write(400).split()
    chain = [" ".join(words[shift : shift + 300]) for shift in (0, 20, 40, 60)]  # each 0.87 like the next
    found = find(tmp_path, chain)
    assert found == {1: 0, 3: 2}
    assert not found.keys() & set(found.values())


def test_only_those_who_take_part_are_compared(tmp_path: Path, write: Callable[[int], str]) -> None:
    minhash, text = MinHash(K), write(100)
    file = write_signatures(tmp_path / "signatures", [minhash.signature(shingles(text))] * 4)
    taking_part = np.array([False, True, True, False])
    assert [(a, b) for a, b, _ in near_duplicates(file, BANDS, 0.8, taking_part)] == [(2, 1)]
    assert list(near_duplicates(file, BANDS, 0.8, np.zeros(4, bool))) == []


def test_no_documents_have_no_copies(tmp_path: Path) -> None:
    assert find(tmp_path, []) == {}
    assert find(tmp_path, ["alone"]) == {}
    assert len(exact_duplicates(np.zeros(0, np.uint64))) == 0


def test_a_document_costs_less_than_50_bytes_of_memory(tmp_path: Path) -> None:
    n = 100_000
    rng = np.random.default_rng(0)
    with open(tmp_path / "signatures", "wb") as file:
        for _ in range(0, n, 1000):
            file.write(rng.integers(1 << 32, size=(1000, K), dtype=np.uint32).tobytes())
    signatures, everyone = SignatureFile(tmp_path / "signatures", K), np.ones(n, bool)
    tracemalloc.start()
    assert not exact_duplicates(rng.integers(1 << 64, size=n, dtype=np.uint64)).any()
    assert list(near_duplicates(signatures, BANDS, 0.8, everyone)) == []
    peak = tracemalloc.get_traced_memory()[1] - 2 * (1 << 12) * 4 * K  # less the blocks that are read
    tracemalloc.stop()
    assert peak < 50 * n


def interact() -> None:
    minhash, before = MinHash(K), None
    print("type two texts, one after the other")
    for text in ask("text> "):
        if before is not None:
            a, b = shingles(before), shingles(text)
            guess = float(estimate(minhash.signature(a), minhash.signature(b)))
            chance = chance_to_meet(jaccard(a, b), BANDS, ROWS)
            print(f"similarity {jaccard(a, b):.3f}, estimate {guess:.3f}, chance to meet {chance:.4f}")
        before = text


if __name__ == "__main__":
    run_validation(__file__, interact)
