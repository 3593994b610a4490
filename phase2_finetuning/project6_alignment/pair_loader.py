r"""From pairs of answers to batches, and what the reference thinks of them.

PAPERS
  [1] Direct Preference Optimization: Your Language Model is Secretly a Reward Model, Rafailov et al., 2023,
      arXiv:2305.18290 (DPO)
  [2] KTO: Model Alignment as Prospect Theoretic Optimization, Ethayarajh et al., 2024, arXiv:2402.01306

SHAPES
  B  pairs    K  answers per pair: chosen, rejected and, for KTO, a stranger    T  tokens of the longest row
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from common.script import progress
from phase1_foundation.project3_pretrain.distributed import World
from phase1_foundation.project3_pretrain.packing import Permutation
from phase2_finetuning.project6_alignment.config import PairsConfig
from phase2_finetuning.project6_alignment.pairs import Pair
from phase2_finetuning.project6_alignment.preference import PairBatch
from phase2_finetuning.project6_alignment.rollouts import PAD


class PairLoader:
    r"""Batches of pairs; which ones come at a step is a function of the step.

    PAPER: the reference of [1] Eq. 7 stays as it was; strangers, [2] Sec. 4.
    PAPER CONTEXT: A run that is interrupted must go on with the pairs that it has not seen.
    INTUITION: Pairs have numbers, and each epoch an order of the numbers.
    IMPLEMENTATION: Rows are prompt, answer, filling, cut to the longest of the batch. With `strangers` each
        pair has a third row: its prompt with an answer of the pair after it. `measure` notes once what the
        reference thinks of every row: afterwards no second model is needed, in memory or in time.
    WHY: The reference never changes, so asking it again every epoch would be a third of all work.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        batch_size: int,
        seed: int = 0,
        strangers: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size or len(pairs) < batch_size:
            rule = f"must be divisible by the processes ({world_size}) and at most the {len(pairs)} pairs"
            raise ValueError(f"batch_size ({batch_size}) {rule}")
        self.pairs, self.batch_size, self.seed = pairs, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.answers = 3 if strangers else 2
        self.reference = torch.zeros(len(pairs), self.answers)
        self.longest = max(len(prompt) + max(map(len, answers)) for prompt, *answers in pairs)

    @property
    def batches(self) -> int:
        """Whole batches of an epoch."""
        return len(self.pairs) // self.batch_size

    def batch(self, step: int) -> PairBatch:
        """Return this process's pairs of the batch of a step."""
        epoch, place = divmod(step, self.batches)
        each = self.batch_size // self.world_size
        first = place * self.batch_size + self.rank * each
        order = Permutation(len(self.pairs), self.seed, epoch)
        return self.rows(order(np.arange(first, first + each)).tolist())

    def rows(self, numbers: Sequence[int]) -> PairBatch:
        """Return the pairs with these numbers."""
        tokens, mask = fill_rows([row for number in numbers for row in self._rows(number)])
        shape = (len(numbers), self.answers, -1)
        return PairBatch(tokens.view(shape), mask.view(shape), self.reference[list(numbers)])

    def _rows(self, number: int) -> list[tuple[list[int], list[int]]]:
        """Return prompt and answer of each row of a pair."""
        prompt, *answers = self.pairs[number]
        if self.answers == 3:
            other = self.pairs[(number + 1) % len(self.pairs)]
            stranger = other.chosen if number % 2 else other.rejected
            answers.append(
                stranger[: self.longest - len(prompt)]
            )  # a long prompt and a long answer: too long
        return [(prompt, answer) for answer in answers]

    def in_order(self) -> Iterator[PairBatch]:
        """Yield all pairs once, to every process, in batches of which the last may be smaller."""
        for first in range(0, len(self.pairs), self.batch_size):
            yield self.rows(range(first, min(first + self.batch_size, len(self.pairs))))

    def measure(self, judge: Callable[[PairBatch], Tensor]) -> None:
        """Note what judge(batch) -> (B, K) says of every pair."""
        batches = -(-len(self.pairs) // self.batch_size)
        bar = progress(self.in_order(), total=batches, desc="reference", leave=False, delay=2)
        self.reference = torch.cat([judge(batch).float().cpu() for batch in bar])


def fill_rows(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Return prompts and answers as tokens (B, T), filled up behind, and a mask (B, T) of the answers."""
    T = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.full((len(rows), T), PAD)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens[i, :end] = torch.tensor(prompt + answer)
        mask[i, len(prompt) : end] = True
    return tokens, mask


def make_loaders(
    pairs: Sequence[Pair], config: PairsConfig, seed: int, world: World, strangers: bool = False
) -> tuple[PairLoader, PairLoader]:
    """Return this process's loaders of the pairs to train on, and of those held back."""
    train, held = split_pairs(pairs, config.validation_share, config.batch_size)
    world.print(f"            {len(train):,} to train on, {len(held):,} of other prompts held back")
    how = (config.batch_size, seed, strangers, world.rank, world.size)
    return PairLoader(train, *how), PairLoader(held, *how)


def split_pairs(pairs: Sequence[Pair], share: float, batch_size: int) -> tuple[list[Pair], list[Pair]]:
    """Return pairs to train on and pairs to validate on, of other prompts; the latter are whole batches."""
    prompts = list(dict.fromkeys(tuple(pair.prompt) for pair in pairs))
    kept = set(prompts[: max(1, round(share * len(prompts)))])
    held, train = (
        [pair for pair in pairs if (tuple(pair.prompt) in kept) == wanted] for wanted in (True, False)
    )
    held = held[: max(1, len(held) // batch_size) * batch_size]
    if min(len(held), len(train)) < batch_size:
        rule = f"must give at least batch_size ({batch_size}) pairs to validate and to train on"
        raise ValueError(f"pairs ({len(pairs)}) {rule}; ask for more --tasks or --samples")
    return train, held
