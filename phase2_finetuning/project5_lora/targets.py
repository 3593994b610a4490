r"""Which matrices get an adapter, and what others call them.

PAPERS
  [1] LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., 2021, arXiv:2106.09685
  [2] QLoRA: Efficient Finetuning of Quantized LLMs, Dettmers et al., 2023, arXiv:2305.14314
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.families import parts_of

ALL = "all-linear"  # every matrix of the blocks


@dataclass(frozen=True)
class Slot:
    """Some rows of one of our linear layers that are a layer of its own in transformers' model."""

    name: str  # there: model.layers.0.self_attn.q_proj
    rows: int
    rank: int = 0  # of the adapter; 0: none
    alpha: float = 0.0


def slots_of(config: DecoderConfig) -> dict[str, list[Slot]]:
    """Return each linear layer of a Decoder's blocks by our name, and its slots from top to bottom."""
    return {
        name.removesuffix(".weight"): [Slot(part.name.removesuffix(".weight"), part.rows) for part in parts]
        for name, parts in parts_of(config, "hf")
        if name.startswith("blocks.") and name.endswith(".weight") and len(parts[0].shape) == 2
    }


def choose_slots(
    config: DecoderConfig, targets: Sequence[str], rank: int, alpha: float
) -> dict[str, list[Slot]]:
    """Give the slots that `targets` names a rank; return the layers that have one.

    PAPER: [1] Sec. 7.1 (Table 5) compares which matrices of attention to adapt; [2] Sec. 4 adapts all.
    PAPER CONTEXT: [1] put its budget into the queries and values of attention and left the feed-forward
        alone. [2] found that only adapters on all linear layers of a block match full fine-tuning, whatever
        their rank.
    INTUITION: Many small levers, spread over the whole machine, rather than one long one.
    IMPLEMENTATION: A target is the last part of a name in transformers' model (q_proj, down_proj; c_attn for
        GPT-2), or more of it (layers.0.self_attn.q_proj), or all-linear. Our q, k and v come out of one
        matrix, but each gets an adapter of its own, as over there; so an adapter moves between the two.
    WHY: One adapter over the fused matrix would have other ranks, other gradients, and no place in their
        files; the tests hold forward, gradients and files to peft's.
    """
    layers = slots_of(config)
    names = [slot.name for slots in layers.values() for slot in slots]
    for target in targets:
        if target != ALL and not any(fits(name, target) for name in names):
            there = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
            raise ValueError(f"targets ({target}) must be {ALL} or among {there}")

    def ranked(slot: Slot) -> Slot:
        chosen = any(target == ALL or fits(slot.name, target) for target in targets)
        return Slot(slot.name, slot.rows, rank, alpha) if chosen else slot

    plan = {name: [ranked(slot) for slot in slots] for name, slots in layers.items()}
    return {name: slots for name, slots in plan.items() if any(slot.rank for slot in slots)}


def fits(name: str, target: str) -> bool:
    """Say whether a target is a module's name or the end of it, whole words between dots."""
    return f".{name}".endswith(f".{target}")


def shortest(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the last parts of the chosen names if they fit no other one of `names`, else the whole names."""
    ends = sorted({re.split(r"\.", name)[-1] for name in chosen})
    fit = {name for name in names if any(fits(name, end) for end in ends)}
    return ends if fit == set(chosen) else sorted(chosen)
