"""Checks of prefix reuse. --interactive shows how much of what you type was read before."""

import random

import pytest
import torch

from common.script import ask, run_validation
from phase3_core_inference.project7_kv_cache.conftest import LONGEST, SHAPES, V
from phase3_core_inference.project7_kv_cache.decoding import prefill
from phase3_core_inference.project7_kv_cache.prefix import PrefixMemory, common_prefix
from phase3_core_inference.project7_kv_cache.slots import SlotCache


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ([], [], 0),
        ([1], [], 0),
        ([1, 2], [1, 2], 2),
        ([1, 2, 3], [1, 2, 4, 5], 2),
        ([2], [1], 0),
        ([1], [1, 9], 1),
    ],
)
def test_the_common_beginning_of_two_texts(one, other, alike):
    assert common_prefix(one, other) == common_prefix(other, one) == alike


def read(model, memory, prompt):
    slot, reused = memory.begin(prompt)
    logits = prefill(model, memory.cache, [(slot, prompt[reused:])])[0]
    torch.testing.assert_close(logits, model(torch.tensor([prompt]))[0, -1], atol=1e-11, rtol=1e-11)
    return slot, reused


@pytest.mark.parametrize("seed", range(8))
def test_conversations_at_random_are_read_as_from_the_start(llama, seed):
    draw = random.Random(seed)
    memory = PrefixMemory(SlotCache(llama.config, 3, LONGEST, torch.float64))
    texts, running = [[0]], {}
    for _ in range(40):
        if running and (len(running) == 3 or draw.random() < 0.5):
            slot = draw.choice(list(running))
            texts.append(running.pop(slot))
            memory.end(slot, texts[-1])
            continue
        old = draw.choice(texts)
        prompt = old[: draw.randint(1, len(old))] + [draw.randrange(3) for _ in range(draw.randint(0, 4))]
        prompt = prompt[: LONGEST - 1]
        slot, reused = read(llama, memory, prompt)
        assert reused <= len(prompt) - 1
        assert slot not in running
        new = draw.randrange(V)  # a token that was written, and read again to write the next
        prefill(llama, memory.cache, [(slot, [new])])
        running[slot] = [*prompt, new]


def test_a_later_turn_goes_on_in_its_slot(llama):
    memory = PrefixMemory(SlotCache(llama.config, 2, LONGEST, torch.float64))
    first = [1, 2, 3, 4, 5]
    slot, reused = read(llama, memory, first)
    assert reused == 0
    memory.end(slot, [*first, 6])  # 6 was written last, and never read
    assert read(llama, memory, [*first, 6, 7, 8]) == (slot, 5)


def test_a_prompt_that_is_known_whole_computes_its_last_token(llama):
    memory = PrefixMemory(SlotCache(llama.config, 2, LONGEST, torch.float64))
    slot, _ = read(llama, memory, [1, 2, 3, 4])
    memory.end(slot, [1, 2, 3, 4])
    assert read(llama, memory, [1, 2, 3, 4])[1] == 3


def test_what_others_still_need_is_copied_and_the_least_recently_used_goes(llama):
    memory = PrefixMemory(SlotCache(llama.config, 2, LONGEST, torch.float64))
    a, _ = read(llama, memory, [1, 2, 3, 4, 5, 6])
    b, reused = read(llama, memory, [1, 2, 3, 9])  # while the first is being written
    assert (b != a, reused) == (True, 3)
    with pytest.raises(ValueError, match=r"slots \(2\) must not all be busy"):
        memory.begin([1])
    memory.end(b, [1, 2, 3, 9])
    memory.end(a, [1, 2, 3, 4, 5, 6])
    slot, reused = read(llama, memory, [1, 2, 8, 8])
    assert (slot, reused) == (b, 2)  # the older one went, after it had been of use
    with pytest.raises(ValueError, match=r"prompt \(0 tokens\) must have at least 1 token"):
        memory.begin([])


def interact() -> None:
    """Show which slot takes a text, and what it holds of it."""
    memory = PrefixMemory(SlotCache(SHAPES["grouped queries"], 3, LONGEST))
    print("3 slots; each letter is a token")
    for line in ask("text> "):
        prompt = [ord(letter) for letter in line[:LONGEST]]
        slot, reused = memory.begin(prompt)
        memory.cache.plan([(slot, len(prompt) - reused)])
        memory.cache.positions(torch.zeros(1, len(prompt) - reused))
        memory.end(slot, prompt)
        print(f"  slot {slot} holds {line[:reused]!r}; still to read: {line[reused:]!r}")


if __name__ == "__main__":
    run_validation(__file__, interact)
