"""Checks of BPE-dropout. --interactive shows how a typed text is cut with more and more dropout."""

import functools
import itertools
import random
from collections import Counter
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.script import ask, run_validation
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.bpe_dropout import BPEDropout

ENGLISH = "".join(topics.values())[:100_000]  # Python's own manual, which every reader has


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train(ENGLISH, 600, special_tokens=["<|end|>"])


def tiny_tokenizer(*merges: str) -> BPETokenizer:
    """A tokenizer with these merges, each given as its two tokens."""
    vocab = {i: bytes([i]) for i in range(256)}
    ids = {token: i for i, token in vocab.items()}
    triples = []
    for merge in merges:
        left, right = (part.encode() for part in merge.split())
        ids.setdefault(left + right, len(ids))
        triples.append((ids[left], ids[right], ids[left + right]))
        vocab[ids[left + right]] = left + right
    return BPETokenizer(vocab, triples, pattern="none")


def distribution(tokenizer: BPETokenizer, text: str, p: float) -> dict[tuple[int, ...], float]:
    """The probability of each result: Algorithm 1 followed through every possible set of dropped merges."""
    rank = {(left, right): (rank, new) for rank, (left, right, new) in enumerate(tokenizer.merges)}

    @functools.cache
    def results(ids: tuple[int, ...]) -> dict[tuple[int, ...], float]:
        pairs = enumerate(itertools.pairwise(ids))
        possible = [(*rank[pair], place) for place, pair in pairs if pair in rank]
        total: dict[tuple[int, ...], float] = {}
        for coins in itertools.product([False, True], repeat=len(possible)):  # True: dropped
            probability = p ** sum(coins) * (1 - p) ** (len(coins) - sum(coins))
            drawn = zip(possible, coins, strict=True)
            left = [(r, place, new) for (r, new, place), dropped in drawn if not dropped]
            if not left:
                total[ids] = total.get(ids, 0) + probability
                continue
            _, place, new = min(left)
            for outcome, chance in results(ids[:place] + (new,) + ids[place + 2 :]).items():
                total[outcome] = total.get(outcome, 0) + probability * chance
        return total

    return results(tuple(text.encode()))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("text", ["unrelated", "banana", "aaaaa"])
def test_results_are_distributed_as_algorithm_1_says(p, text):
    tokenizer = tiny_tokenizer("r e", "a t", "e d", "at ed", "re l", "u n", "a n", "an a", "a a", "aa a")
    expected = distribution(tokenizer, text, p)
    assert sum(expected.values()) == pytest.approx(1)
    dropout, n = BPEDropout(tokenizer, p, seed=1), 5000
    drawn = Counter(tuple(dropout.encode(text)) for _ in range(n))
    assert drawn.keys() <= expected.keys()
    cells = [(drawn[ids], n * chance) for ids, chance in expected.items() if n * chance >= 5]
    cells.append((n - sum(o for o, _ in cells), n - sum(e for _, e in cells)))  # the rare ones together
    statistic = sum((o - e) ** 2 / e for o, e in cells if e > 1e-6)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    p_value = torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)).item()
    assert p_value > 1e-4


def test_without_dropout_it_is_bpe(tokenizer):
    text = ENGLISH[:20_000] + " 日本 🙂 <|end|>"
    assert BPEDropout(tokenizer, 0).encode(text) == tokenizer.encode(text)
    assert BPEDropout(tokenizer, 0).encode(text, "all") == tokenizer.encode(text, "all")


def test_with_everything_dropped_it_is_bytes(tokenizer):
    text = ENGLISH[:2000] + " 日本 🙂"
    ids = BPEDropout(tokenizer, 1).encode(text)
    assert [tokenizer.decode_bytes([i]) for i in ids] == [bytes([b]) for b in text.encode()]


@given(st.binary(), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_any_bytes_come_back_at_any_rate(tokenizer, data, p):
    assert tokenizer.decode_bytes(BPEDropout(tokenizer, p, seed=0).encode(data)) == data


def test_more_dropout_makes_more_tokens(tokenizer):
    lengths = [len(BPEDropout(tokenizer, p, seed=0).encode(ENGLISH[:20_000])) for p in (0, 0.1, 0.3, 0.6, 1)]
    assert lengths == sorted(set(lengths))


def test_the_seed_repeats_and_every_pass_differs(tokenizer):
    one, two = BPEDropout(tokenizer, 0.1, seed=4), BPEDropout(tokenizer, 0.1, seed=4)
    first = one.encode(ENGLISH[:2000])
    assert first == two.encode(ENGLISH[:2000])
    assert first != one.encode(ENGLISH[:2000])


def test_a_few_segmentations_dominate_as_cognetta_and_others_found():
    tokenizer = tiny_tokenizer("r e", "a t", "e d", "at ed", "re l", "u n", "rel ated", "un related")
    chances = sorted(distribution(tokenizer, "unrelated", 0.1).values(), reverse=True)
    assert len(chances) > 20
    assert sum(chances[:3]) > 0.75


def test_a_long_run_of_one_letter_is_not_quadratic():
    tokenizer = tiny_tokenizer("a a", "aa aa", "aaaa aaaa")
    ids = BPEDropout(tokenizer, 0.1, seed=0).encode("a" * 200_000)
    assert tokenizer.decode(ids) == "a" * 200_000


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_a_wrong_rate_gets_a_clear_error(tokenizer, p):
    with pytest.raises(ValueError, match=r"p \(.*\) must be between 0 and 1"):
        BPEDropout(tokenizer, p)


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match="must be without lone surrogates"):
        BPEDropout(tokenizer).encode("a\udc80")


def interact() -> None:
    """Cut each typed text with four rates of dropout."""
    tokenizer = BPETokenizer.train(ENGLISH, 2000)
    rng = random.Random(0)
    for text in ask("text> "):
        for p in (0, 0.1, 0.3, 1):
            ids = BPEDropout(tokenizer, p, rng.randrange(1 << 30)).encode(text)
            print(f"p = {p:3}  " + "|".join(tokenizer.decode([i]) for i in ids))


if __name__ == "__main__":
    run_validation(__file__, interact)
