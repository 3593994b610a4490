"""Checks of SlotCache: flat batches of many sequences. --interactive shows how a batch you type is run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.script import ask, run_validation
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project7_kv_cache import slots as module
from phase3_core_inference.project7_kv_cache.conftest import LONGEST, SHAPES, V
from phase3_core_inference.project7_kv_cache.slots import SlotCache

TEXTS = torch.randint(V, (5, LONGEST), generator=torch.Generator().manual_seed(1))


def feed(model, cache, batch, texts=TEXTS):
    """Run the next tokens of each slot's text; return the logits of each slot's new tokens."""
    begins = {slot: cache.length(slot) for slot, _ in batch}
    tokens = torch.cat([texts[slot, begins[slot] : begins[slot] + new] for slot, new in batch])[None]
    cache.plan(batch)
    logits = model(tokens, cache)[0].split([new for _, new in batch])
    return {slot: (begins[slot], part) for (slot, _), part in zip(batch, logits, strict=True)}


def check(model, results, texts=TEXTS):
    """Logits in company equal those of the sequence alone, without any cache."""
    for slot, (begin, part) in results.items():
        alone = model(texts[slot : slot + 1, : begin + len(part)])[0, begin:]
        torch.testing.assert_close(part, alone, atol=1e-11, rtol=1e-11)


batches = st.lists(
    st.dictionaries(st.integers(0, 4), st.sampled_from([1, 1, 1, 2, 3, 7, 20]), min_size=1).flatmap(
        lambda batch: st.permutations(list(batch.items()))
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(batches, st.sampled_from([0, 3, 10_000]), st.sets(st.integers(0, 11)))
def test_any_pieces_in_any_company_give_the_logits_of_each_sequence_alone(llama, plans, call, freed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CALL", call)  # 0: a call for each; 10,000: one call for all
        cache = SlotCache(llama.config, 5, LONGEST, torch.float64)
        for number, batch in enumerate(plans):
            if number in freed:
                cache.free(batch[0][0])
            fits = [(slot, new) for slot, new in batch if cache.length(slot) + new <= LONGEST]
            if fits:
                check(llama, feed(llama, cache, fits))


def test_every_kind_of_attention_works_in_flat_batches(model: Decoder):
    cache = SlotCache(model.config, 5, LONGEST, torch.float64)
    for batch in ([(3, 9), (0, 4)], [(3, 1), (1, 6), (0, 1)], [(0, 1), (3, 1), (1, 1)], [(4, 1), (1, 5)]):
        check(model, feed(model, cache, batch))
    assert [cache.length(slot) for slot in range(5)] == [6, 12, 0, 11, 1]


@pytest.mark.parametrize("n", [1, 5, 9])
def test_a_copied_prefix_is_as_good_as_a_computed_one(llama, n):
    texts = TEXTS.clone()
    texts[2, :n] = texts[0, :n]
    cache = SlotCache(llama.config, 4, LONGEST, torch.float64)
    feed(llama, cache, [(0, 9)], texts)
    cache.copy_prefix(0, 2, n)
    check(llama, feed(llama, cache, [(2, 4), (0, 1)], texts), texts)
    check(llama, feed(llama, cache, [(0, 1), (2, 1)], texts), texts)


def test_a_truncated_sequence_goes_on_from_there(llama):
    cache = SlotCache(llama.config, 4, LONGEST, torch.float64)
    feed(llama, cache, [(0, 9), (1, 3)])
    cache.truncate(0, 4)
    check(llama, feed(llama, cache, [(1, 1), (0, 1)]))
    check(llama, feed(llama, cache, [(0, 3), (1, 2)]))


def test_what_a_broken_sequence_leaves_behind_hurts_nobody(llama):
    cache = SlotCache(llama.config, 3, LONGEST, torch.float64)
    feed(llama, cache, [(0, 20), (1, 30), (2, 2)])
    for store in (*cache.keys, *cache.values):
        store[0, :, 5:20] = float("nan")
    cache.free(0)
    feed(llama, cache, [(0, 1)])
    check(llama, feed(llama, cache, [(0, 1), (1, 1), (2, 1)]))  # one call, as long as the longest
    assert len(cache.runs) == 1


def test_neighbours_of_like_length_share_a_call_and_unlike_ones_do_not():
    cache = SlotCache(SHAPES["grouped queries"], 8, LONGEST)
    cache.lengths = [10] * 8
    cache.plan([(slot, 1) for slot in (6, 1, 0, 3)])
    (run,) = cache.runs
    assert (run.slots, run.end) == (slice(0, 7), 11)
    assert run.asked.tolist() == [0, 1, 3, 6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CALL", 10)
        cache.lengths = [4, 5, 35, 35, 5, 0, 0, 5]
        cache.plan([(slot, 1) for slot in range(5)] + [(7, 1)])
    assert [run.slots for run in cache.runs] == [slice(0, 2), slice(2, 4), slice(4, 5), slice(7, 8)]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], r"batch \(\) must hold at least one slot"),
        ([(0, 1), (0, 2)], r"slots \(\[0, 0\]\) must be named once each"),
        ([(3, 1)], r"slot \(3\) must be from 0 to 2"),
        ([(-1, 1)], r"slot \(-1\) must be from 0 to 2"),
        ([(1, 0)], r"tokens \(0\) of slot 1 must be at least 1"),
        ([(1, 2), (0, 37)], r"tokens \(41\) of slot 0 must be at most length \(40\)"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_and_changes_nothing(llama, batch, message):
    cache = SlotCache(llama.config, 3, LONGEST, torch.float64)
    feed(llama, cache, [(0, 4)])
    with pytest.raises(ValueError, match=message):
        cache.plan(batch)
    assert cache.lengths == [4, 0, 0]
    check(llama, feed(llama, cache, [(0, 1), (1, 2)]))


def test_a_token_that_is_computed_once_more_takes_its_own_place(llama):
    cache = SlotCache(llama.config, 2, LONGEST, torch.float64)
    feed(llama, cache, [(0, 6), (1, 9)])
    for _ in range(2):
        cache.redo(1)
        check(llama, feed(llama, cache, [(1, 1), (0, 1)]))
    assert cache.lengths == [8, 9]
    with pytest.raises(ValueError, match=r"slot \(0\) must hold a token to compute once more"):
        SlotCache(llama.config, 2, 8).redo(0)


def test_misuse_is_named(llama):
    cache = SlotCache(llama.config, 2, 8)
    with pytest.raises(ValueError, match=r"tokens \(1, 3\) must be \(1, 0\), as planned"):
        cache.positions(TEXTS[:1, :3])
    cache.plan([(0, 3)])
    with pytest.raises(ValueError, match=r"tokens \(2, 3\) must be \(1, 3\), as planned"):
        cache.positions(TEXTS[:2, :3])
    cache.positions(TEXTS[:1, :3])
    with pytest.raises(ValueError, match=r"must be \(1, 0\), as planned"):  # one plan, one forward
        cache.positions(TEXTS[:1, :3])
    with pytest.raises(ValueError, match=r"n \(4\) must be from 0 to the 3 tokens of slot 0"):
        cache.truncate(0, 4)
    with pytest.raises(ValueError, match=r"n \(4\) must be from 0 to the 3 tokens of slot 0"):
        cache.copy_prefix(0, 1, 4)
    with pytest.raises(ValueError, match=r"dst \(0\) must be free, not hold 3 tokens"):
        cache.copy_prefix(1, 0, 0)
    with pytest.raises(ValueError, match=r"length \(41\) must be at most block_size \(40\)"):
        SlotCache(llama.config, 2, 41)
    with pytest.raises(ValueError, match=r"slots \(0\) must be at least 1"):
        SlotCache(llama.config, 0, 8)


def interact() -> None:
    """Show which calls a batch is run with."""
    cache = SlotCache(SHAPES["grouped queries"], 8, LONGEST)
    print("8 slots; type pairs slot:tokens, such as 0:9 3:1 4:1, and see who is served together")
    for line in ask("batch> "):
        try:
            batch = [(int(slot), int(new)) for slot, new in (pair.split(":") for pair in line.split())]
            cache.plan(batch)
        except ValueError as error:
            print(f"error: {error}")
            continue
        for piece in cache.pieces:
            print(
                f"  slot {piece.slot}: {piece.tokens.stop - piece.tokens.start} tokens in a call of their own"
            )
        for run in cache.runs:
            print(f"  slots {run.slots.start} to {run.slots.stop - 1}: one token each, {run.end} long")
        cache.positions(torch.zeros(1, sum(new for _, new in batch)))
        print(f"  lengths {cache.lengths}")


if __name__ == "__main__":
    run_validation(__file__, interact)
