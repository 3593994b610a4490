r"""PrefixMemory: a prompt that begins like an earlier text is read from where the two part.

PAPERS
  [1] SGLang: Efficient Execution of Structured Language Model Programs, Zheng et al., 2023, arXiv:2312.07104
  [2] Efficient Memory Management for Large Language Model Serving with PagedAttention, Kwon et al., 2023,
      arXiv:2309.06180
"""

from collections.abc import Sequence

from phase3_core_inference.project7_kv_cache.slots import SlotCache


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two texts begin with alike."""
    pairs = enumerate(zip(one, other))  # noqa: B905  # the shorter one ends it
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


class PrefixMemory:
    """Leave finished texts in their slots, and begin new ones with what they have in common.

    PAPER: [1] Sec. 3 (reuse across requests, the least recently used one goes); [2] Sec. 4.4 (shared prefix).
    PAPER CONTEXT: Each turn of a chat sends the whole conversation again, and all conversations begin with
        the same instructions. Keys and values of a token depend on nothing after it, so they can be kept.
    INTUITION: A bookmark: go on reading where you stopped, not at the first page.
    IMPLEMENTATION: Slots are searched one by one for the longest common beginning; project 11 has a tree and
        shares memory, here a beginning is copied, or taken over where its text ends with it. The last token
        of a prompt is always computed: its logits are wanted, and they are not in the cache.
    WHY: A test plays conversations against it at random: tokens never differ from those read from the start.
        `benchmark.py` shows the time to the first token of a later turn.
    """

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        self.texts: list[list[int]] = [[] for _ in range(cache.slots)]  # what each slot reads or has read
        self.busy: set[int] = set()
        self.order = list(range(cache.slots))  # the least recently used first

    def begin(self, prompt: Sequence[int]) -> tuple[int, int]:
        """Return a slot for a text that begins with `prompt`, and how many of its tokens it holds already.

        Raises ValueError for an empty prompt, or when all slots are busy.
        """
        if not prompt:
            raise ValueError("prompt (0 tokens) must have at least 1 token")
        idle = [slot for slot in self.order if slot not in self.busy]
        if not idle:
            raise ValueError(f"slots ({self.cache.slots}) must not all be busy")
        alike = [
            min(common_prefix(text, prompt), len(prompt) - 1, self.cache.length(slot))
            for slot, text in enumerate(self.texts)
        ]
        best = max(range(self.cache.slots), key=alike.__getitem__)
        reused = alike[best]
        empty = next((slot for slot in idle if not self.texts[slot]), idle[0])
        slot = best if best in idle and self._is_spent(best, reused, empty) else empty
        if slot == best:
            self.cache.truncate(slot, reused)
        else:
            self.cache.free(slot)
            self.cache.copy_prefix(best, slot, reused)
        self.texts[slot] = list(prompt)  # of which others may use what has been read by then
        self.busy.add(slot)
        return slot, reused

    def end(self, slot: int, text: Sequence[int]) -> None:
        """Note that a slot's text is done; `text` are its tokens, of which the cache holds the first ones."""
        self.texts[slot] = list(text[: self.cache.length(slot)])
        self.busy.discard(slot)
        self.order.remove(slot)
        self.order.append(slot)

    def _is_spent(self, slot: int, reused: int, empty: int) -> bool:
        """Say whether a text may be taken over: nothing of it is lost, or it is the one to go anyway."""
        return reused >= len(self.texts[slot]) - 1 or slot == empty
