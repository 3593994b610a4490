r"""SlotCache: keys and values of many sequences, fed by flat batches in which nothing is padding.

PAPERS
  [1] Orca: A Distributed Serving System for Transformer-Based Generative Models, Yu et al., 2022 (OSDI)
  [2] Efficiently Scaling Transformer Inference, Pope et al., 2022, arXiv:2211.05102

SHAPES
  N  tokens of a flat batch    R  rows: neighbouring slots that one call serves
  H, Hkv, D, S  as in mixing.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase3_core_inference.project7_kv_cache.mixing import length_bias, mix, mix_causally

CALL = 512  # a call of mix() takes about as long as it takes to read so many more tokens


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence, two or more, which attend to its past and causally to each other."""

    slot: int
    tokens: slice  # where they are in the flat batch
    end: int  # length of the sequence with them


@dataclass(frozen=True)
class Run:
    """Neighbouring slots with one new token each, for which one call mixes."""

    slots: slice
    tokens: Tensor  # (R,) where each slot's token is in the flat batch; of a slot in between, any
    asked: Tensor  # which of the R rows were asked for
    end: int  # length of the longest sequence
    bias: Tensor | None  # (R, 1, 1, end), where not all are as long


def neighbours(ends: Mapping[int, int]) -> list[list[int]]:
    """Return slots in groups, each for one call; `ends` are the lengths of their sequences.

    The next slot joins a group if that reads less than a call of its own.
    """
    groups: list[list[int]] = []
    longest = 0
    for slot in sorted(ends):
        if groups:
            group = groups[-1]
            together = (slot - group[0] + 1) * max(longest, ends[slot])
            if together <= (group[-1] - group[0] + 1) * longest + ends[slot] + CALL:
                group.append(slot)
                longest = max(longest, ends[slot])
                continue
        groups.append([slot])
        longest = ends[slot]
    return groups


class SlotCache:
    """Remember the keys and values of up to `slots` sequences of up to `length` tokens each.

    PAPER: [1] Sec. 3 (selective batching); what is stored and what it costs to read, [2] Sec. 2.
    PAPER CONTEXT: Batches were rectangles: short prompts were filled up, and a row that was done kept its
        place until the longest was. [1] flattens all tokens of all requests into one row for everything but
        attention, which alone must know whose token is whose.
    INTUITION: One conveyor belt for all parcels; only at the end somebody looks at the addresses.
    IMPLEMENTATION: `plan([(slot, tokens), ...])` announces a flat batch (1, N): pieces of prompts and
        single new tokens of other sequences, one after another. A piece attends by itself. Single tokens of
        neighbouring slots are mixed in one call, on a view of the memory, as long as that reads little more
        than it must (CALL); sequences shorter than the longest of such a run are masked.
    WHY: A test gives many sequences in pieces of any size, in any order and company, and each gets the
        logits that it gets alone. No product is spent on padding.
    """

    def __init__(
        self,
        config: DecoderConfig,
        slots: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("slots", slots), ("length", length)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if length > config.block_size:
            raise ValueError(f"length ({length}) must be at most block_size ({config.block_size})")
        self.slots, self.capacity, self.device = slots, length, torch.device(device)
        shape = (slots, config.kv_heads, length, config.head_width)
        # Zeros: what lies beyond a sequence's end is multiplied by 0, and 0 * NaN is no 0.
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)] for _ in range(2)
        )  # of each layer
        self.lengths = [0] * slots  # tokens remembered of each
        self.pieces: list[Piece] = []
        self.runs: list[Run] = []
        self.planned: list[tuple[int, int]] = []

    def length(self, slot: int) -> int:
        """Return how many tokens of a slot's sequence are remembered."""
        self._check_slot(slot)
        return self.lengths[slot]

    def plan(self, batch: Sequence[tuple[int, int]]) -> None:
        """Announce the next forward's flat batch as (slot, number of new tokens), one after another.

        Nothing changes when this raises ValueError: for no tokens, a slot named twice, or a full one.
        """
        self._check(batch)
        self.planned, self.pieces = list(batch), []
        single: dict[int, int] = {}  # slot: place of its only new token in the flat batch
        place, slots, places = 0, list[int](), list[int]()
        for slot, new in batch:
            begin = self.lengths[slot]
            if new == 1:
                single[slot] = place
            else:
                self.pieces.append(Piece(slot, slice(place, place + new), begin + new))
            slots += [slot] * new
            places += range(begin, begin + new)
            place += new
        ends = {slot: self.lengths[slot] + 1 for slot in single}
        self.runs = [self._run(group, single) for group in neighbours(ends)]
        # What comes often is worth a shorter way: one sequence alone; one run, its slots in order.
        self.only = (slots[0], places[0], places[-1] + 1) if len(batch) == 1 else None
        self.in_order = len(self.runs) == 1 and self._is_in_order(self.runs[0].slots, batch)
        index = torch.tensor([slots, places])
        self.slot_of, self.place_of = index.to(self.device)  # (N,) each

    def positions(self, tokens: Tensor) -> Tensor:
        """Return the place (1, N) of each new token in its sequence; from here on they count as remembered.

        Raises ValueError for tokens that were not planned.
        """
        new = sum(new for _, new in self.planned)
        if not self.planned or tokens.shape != (1, new):
            raise ValueError(f"tokens {tuple(tokens.shape)} must be (1, {new}), as planned for this forward")
        for slot, count in self.planned:
            self.lengths[slot] += count
        self.planned = []
        return self.place_of[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Remember k and v (1, Hkv, N, D) and mix for q (1, H, N, D), each within its own sequence."""
        keys, values = self.keys[layer], self.values[layer]  # (slots, Hkv, length, D)
        self._write(keys, k)
        self._write(values, v)
        if self.in_order:
            return self._mix_run(layer, self.runs[0], q[0].transpose(0, 1)).transpose(0, 1)[None]
        mixed = torch.empty_like(q.transpose(1, 2)[0])  # (N, H, D)
        for piece in self.pieces:
            k, v = (store[piece.slot, None, :, : piece.end].to(q.dtype) for store in (keys, values))
            part = mix_causally(q[:, :, piece.tokens], k, v)
            mixed[piece.tokens] = part[0].transpose(0, 1)
        for run in self.runs:
            part = self._mix_run(layer, run, q[0, :, run.tokens].transpose(0, 1))
            mixed[run.tokens[run.asked]] = part[run.asked]
        return mixed[None].transpose(1, 2)

    def _write(self, store: Tensor, new: Tensor) -> None:
        """Put new keys or values (1, Hkv, N, D) in their places."""
        if self.only is None:
            store[self.slot_of, :, self.place_of] = new[0].transpose(0, 1).to(store.dtype)
        else:
            slot, begin, end = self.only
            store[slot, :, begin:end] = new[0]

    def _mix_run(self, layer: int, run: Run, q: Tensor) -> Tensor:
        """Mix for the newest tokens (R, H, D) of a run's slots."""
        k, v = (store[layer][run.slots, :, : run.end].to(q.dtype) for store in (self.keys, self.values))
        bias = None if run.bias is None else run.bias.to(q.dtype)
        return mix(q[:, :, None], k, v, bias)[:, :, 0]

    def free(self, slot: int) -> None:
        """Forget a slot's sequence; the slot is ready for another one."""
        self.truncate(slot, 0)

    def truncate(self, slot: int, n: int) -> None:
        """Forget all but the first n tokens of a slot's sequence."""
        self._check_slot(slot)
        if not 0 <= n <= self.lengths[slot]:
            raise ValueError(f"n ({n}) must be from 0 to the {self.lengths[slot]} tokens of slot {slot}")
        # A sequence that went wrong may have left NaN, and a shorter neighbour is masked, not cut.
        for store in (*self.keys, *self.values):
            store[slot, :, n : self.lengths[slot]].zero_()
        self.lengths[slot] = n

    def redo(self, slot: int) -> None:
        """Let the next token of a slot take the place of its last one, which is computed once more."""
        self._check_slot(slot)
        if not self.lengths[slot]:
            raise ValueError(f"slot ({slot}) must hold a token to compute once more")
        self.lengths[slot] -= 1

    def copy_prefix(self, src: int, dst: int, n: int) -> None:
        """Let slot dst begin with the first n tokens of slot src: a prompt's beginning, computed once.

        Raises ValueError if src has not as many, or dst is not free.
        """
        self._check_slot(src)
        self._check_slot(dst)
        if not 0 <= n <= self.lengths[src]:
            raise ValueError(f"n ({n}) must be from 0 to the {self.lengths[src]} tokens of slot {src}")
        if self.lengths[dst]:
            raise ValueError(f"dst ({dst}) must be free, not hold {self.lengths[dst]} tokens")
        for store in (*self.keys, *self.values):
            store[dst, :, :n] = store[src, :, :n]
        self.lengths[dst] = n

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot ({slot}) must be from 0 to {self.slots - 1}")

    def _check(self, batch: Sequence[tuple[int, int]]) -> None:
        """Raise ValueError for a batch that cannot be."""
        if not batch:
            raise ValueError("batch () must hold at least one slot")
        if len({slot for slot, _ in batch}) < len(batch):
            raise ValueError(f"slots ({[slot for slot, _ in batch]}) must be named once each")
        for slot, new in batch:
            self._check_slot(slot)
            if new < 1:
                raise ValueError(f"tokens ({new}) of slot {slot} must be at least 1")
            if (end := self.lengths[slot] + new) > self.capacity:
                raise ValueError(f"tokens ({end}) of slot {slot} must be at most length ({self.capacity})")

    @staticmethod
    def _is_in_order(slots: slice, batch: Sequence[tuple[int, int]]) -> bool:
        """Say whether a batch is one new token for each of these slots, one slot after another."""
        return list(batch) == [(slot, 1) for slot in range(slots.start, slots.stop)]

    def _run(self, group: list[int], single: dict[int, int]) -> Run:
        """Return the run of a group of slots, some of which may have nothing new."""
        first, last = group[0], group[-1]
        rows = range(first, last + 1)
        lengths = [self.lengths[slot] + 1 if slot in single else 1 for slot in rows]
        tokens = torch.tensor([single.get(slot, 0) for slot in rows])
        asked = torch.tensor([row for row, slot in enumerate(rows) if slot in single])
        end, bias = max(lengths), None
        if min(lengths) < end:
            bias = length_bias(torch.tensor(lengths), end, self.keys[0].dtype).to(self.device)
        return Run(slice(first, last + 1), tokens.to(self.device), asked.to(self.device), end, bias)
