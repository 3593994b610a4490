"""Checks of packing and of the shuffled order. --interactive then packs the lengths you type."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.script import ask, run_validation
from phase1_foundation.project3_pretrain.packing import BestFit, Concatenation, Permutation, best_fit

S = 99  # the separator

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=40)


def shard(lengths: list[int]) -> np.ndarray:
    """Documents of these lengths, as a shard has them; document i is all tokens i + 100."""
    parts = [part for i, n in enumerate(lengths) for part in ([S], [i + 100] * n)]
    return np.array([token for part in [*parts, [S]] for token in part], np.uint16)


def fills(lengths: list[int], room: int, rows: np.ndarray) -> list[int]:
    """How full each row is."""
    return np.bincount(rows, weights=lengths).astype(int).tolist() if lengths else []


# Packing


@given(LENGTHS, st.integers(1, 12))
@pytest.mark.parametrize("packing", [Concatenation, BestFit])
def test_each_token_is_predicted_once(packing: type, lengths: list[int], block_size: int) -> None:
    tokens = shard(lengths)
    packed = packing(tokens, block_size, S)
    seen: Counter[int] = Counter()
    for row in range(len(packed)):
        assert 0 < sum(length for _, length in packed[row]) <= block_size
        for start, length in packed[row]:
            seen.update(range(start + 1, start + length + 1))  # the places of the targets
    assert seen == Counter(range(1, len(tokens)))


@given(LENGTHS, st.integers(1, 12))
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths: list[int], block_size: int) -> None:
    tokens = shard(lengths)
    packed = BestFit(tokens, block_size, S)
    pieces = sorted(piece for row in range(len(packed)) for piece in packed[row])
    begins = {start for start, _ in pieces if tokens[start] == S}
    assert begins == set(np.flatnonzero(tokens[:-1] == S).tolist())  # each document begins a piece
    assert len(pieces) == sum(-(-(n + 1) // block_size) for n in lengths)  # and has no more than it needs


def test_concatenation_cuts_documents_that_best_fit_keeps_whole() -> None:
    tokens = shard([5] * 20)  # with separators six tokens each, in rows of eight
    sawn, packed = Concatenation(tokens, 8, S), BestFit(tokens, 8, S)
    assert sum(tokens[sawn[row][0][0]] != S for row in range(len(sawn))) == 10  # of 15 rows
    assert all(tokens[start] == S for row in range(len(packed)) for start, _ in packed[row])


def best_fit_by_definition(lengths: list[int], room: int) -> int:
    """Return how many rows best-fit-decreasing takes, looking at all rows for each piece."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, gap in enumerate(left) if gap >= length]
        if not fitting:
            left.append(room)
            fitting = [len(left) - 1]
        left[min(fitting, key=lambda i: left[i])] -= length
    return len(left)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_the_sorted_list_of_gaps_packs_as_the_textbook_does(lengths: list[int]) -> None:
    rows = best_fit(np.array(lengths, np.int64), 20)
    assert max(fills(lengths, 20, rows), default=0) <= 20
    assert len(set(rows.tolist())) == rows.max(initial=-1) + 1 == best_fit_by_definition(lengths, 20)


def test_the_textbooks_example_is_packed_as_there() -> None:
    rows = best_fit(np.array([8, 6, 7, 5, 2, 3]), 8)  # figure 1 of Ding et al.: 14 = 8 + 6, 7, 5, 2, 3
    assert rows.tolist() == [0, 2, 1, 3, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_at_most_eleven_ninths_of_the_fewest_and_four(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fewest, room = 200, 1000  # rows that were full, cut into pieces at random places: so 200 are the fewest
    cuts = [np.sort(rng.choice(np.arange(1, room), rng.integers(0, 6), replace=False)) for _ in range(fewest)]
    lengths = np.concatenate([np.diff(cut, prepend=0, append=room) for cut in cuts])
    assert fewest <= best_fit(rng.permutation(lengths), room).max() + 1 <= 11 / 9 * fewest + 4


def test_real_lengths_leave_hardly_any_room() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6.5, 1.2, 2000).astype(int)  # a few hundred tokens, now and then some thousands
    packed = BestFit(shard_of(lengths), 512, S)
    assert (lengths + 1).sum() / (len(packed) * 512) > 0.99


def shard_of(lengths: np.ndarray) -> np.ndarray:
    """A shard with documents of these lengths, all of token 0."""
    tokens = np.zeros((lengths + 1).sum() + 1, np.uint16)
    tokens[np.cumsum(lengths + 1)] = tokens[0] = S
    return tokens


# Order


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097])
def test_an_order_has_each_row_once(size: int) -> None:
    order = Permutation(size, seed=1, epoch=0)(np.arange(size))
    assert sorted(order.tolist()) == list(range(size))


def test_an_order_is_a_function_of_place_seed_and_epoch() -> None:
    size = 10**12  # far more than could be stored
    places = np.array([0, 5, size - 1])
    order = Permutation(size, seed=3, epoch=2)
    assert order(places).tolist() == Permutation(size, seed=3, epoch=2)(places).tolist()
    assert order(places[1:2]).tolist() == order(places)[1:2].tolist()
    assert (order(places) < size).all()
    assert (order(places) != Permutation(size, seed=4, epoch=2)(places)).all()
    assert (order(places) != Permutation(size, seed=3, epoch=3)(places)).all()


@pytest.mark.parametrize("size", [5, 16, 1000])
def test_each_row_is_as_likely_at_each_place(size: int) -> None:
    trials, place = 2000, np.array([0, size // 2])
    rows = np.array([Permutation(size, seed, 0)(place) for seed in range(trials)])  # (trials, 2)
    bins = size if size < 100 else 10
    for column in rows.T:
        counts = np.bincount(column * bins // size, minlength=bins)
        chi_square = float(((counts - trials / bins) ** 2 / (trials / bins)).sum())
        assert chi_square < 45  # with at most 15 degrees of freedom one in 10,000 is above 45


def test_neighbours_do_not_stay_neighbours() -> None:
    order = Permutation(10_000, seed=0, epoch=0)(np.arange(10_000))
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.04  # four standard deviations
    assert np.mean(np.abs(np.diff(order)) < 100) < 0.03  # of a random order 2%


def interact() -> None:
    for line in ask("lengths, and last the room> "):
        *lengths, room = map(int, line.split())
        rows = best_fit(np.array(lengths), room)
        for row in range(rows.max() + 1):
            print(f"row {row}: {[n for n, r in zip(lengths, rows, strict=True) if r == row]}")


if __name__ == "__main__":
    run_validation(__file__, interact)
