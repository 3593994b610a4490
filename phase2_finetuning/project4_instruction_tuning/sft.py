r"""Supervised fine-tuning: which tokens of a conversation are learned, and how conversations fill a batch.

PAPERS
  [1] Training language models to follow instructions with human feedback, Ouyang et al., 2022,
      arXiv:2203.02155 (InstructGPT)
  [2] LIMA: Less Is More for Alignment, Zhou et al., 2023, arXiv:2305.11206
  [3] Efficient Sequence Packing without Cross-contamination: Accelerating Large Language Models without
      Impacting Performance, Krell et al., 2021, arXiv:2107.02027
  [4] Instruction Tuning With Loss Over Instructions, Shi et al., 2024, arXiv:2405.14394

SHAPES
  B  rows of a batch    T  tokens of a row, block_size    C  n_embd
  N  tokens to learn from, of all rows together
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.loss import NO_LOSS, Batch, chunked_cross_entropy, hidden_states
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.packing import Permutation, best_fit
from phase2_finetuning.project4_instruction_tuning.conversations import Conversation

PAD = 0  # token behind the last text of a row, which nobody learns or attends to


class Encoder(Protocol):
    """What is needed of a chat template."""

    def encode(
        self, tokenizer: Tokenizer, conversation: Conversation, answer: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Return the tokens of a conversation, and which of them are the assistant's to say."""
        ...


class Example(NamedTuple):
    """A conversation in tokens."""

    ids: list[int]
    learned: list[bool]  # whether each token is a target


@dataclass
class Count:
    """What became of a set of conversations."""

    conversations: int = 0
    cut: int = 0  # too long for a row; what fits is learned
    empty: int = 0  # left out: there is nothing in them to learn
    tokens: int = 0
    learned: int = 0  # tokens that are targets


def describe(count: Count) -> str:
    """Return a line about what became of the conversations."""
    share = count.learned / max(1, count.tokens)
    line = f"{count.conversations:,} conversations, {count.tokens:,} tokens, {share:.0%} of them learned"
    if count.cut:
        line += f"; {count.cut:,} were too long and lost their end"
    if count.empty:
        line += f"; {count.empty:,} left out: no answer in them, or none that fits"
    return line


def make_examples(
    conversations: Iterable[Conversation],
    template: Encoder,
    tokenizer: Tokenizer,
    block_size: int,
    everything: bool = False,
) -> tuple[list[Example], Count]:
    r"""Return conversations in tokens, with what is to be learned from each, and count what did not fit.

    PAPER: [1] Sec. 3.5 tunes on demonstrations, as do all since; learning prompts as well is [4]'s proposal.
    PAPER CONTEXT: A language model goes on with any text, so it answers a question with more questions. Shown
        some thousand good answers it answers ([2]: a thousand can do), as it is them that it has to predict.
    INTUITION: An actor learns the lines of one role. The other's lines are cues: heard, not spoken.
    IMPLEMENTATION: The template says which tokens are the assistant's, the end mark included: a model that
        never learns it never stops. A conversation of more than block_size + 1 tokens loses its end; one in
        which nothing is left to learn is left out here and counted, so no batch is ever made of such only.
    WHY: With `everything`, questions are most of the loss: 71% of the tokens of the default run. A mask that
        got lost on the way would look just so, and fail nowhere; tests count the targets of whole epochs.
    """
    examples, count = [], Count()
    for conversation in conversations:
        ids, learned = template.encode(tokenizer, conversation)
        if everything:
            learned = [True] * len(ids)
        if len(ids) != len(learned):
            raise ValueError(f"mask ({len(learned)}) must have one entry for each of {len(ids)} tokens")
        count.conversations += 1
        if not any(learned[1 : block_size + 1]):  # the first token is never a target
            count.empty += 1
            continue
        count.cut += len(ids) > block_size + 1
        examples.append(Example(ids[: block_size + 1], learned[: block_size + 1]))
        count.tokens += len(examples[-1].ids)
        count.learned += sum(examples[-1].learned[1:])
    return examples, count


class ConversationBatches:
    r"""The batches of a set of examples; which one comes at a step is a function of the step.

    PAPER: [3] packs texts into rows, and shows how to keep those of a row from seeing each other.
    PAPER CONTEXT: Conversations are short and of all lengths. Padded to the longest, most of a batch is
        padding; glued together, the answer to one question is learned as if it followed from another's.
    INTUITION: Several letters in one envelope, each with its own sheet.
    IMPLEMENTATION: Project 3's best-fit packing and its order of rows, anew in each epoch. Of an example of n
        tokens n - 1 are read and n - 1 are targets. `documents` numbers the texts of a row; padding behind
        them has a number of its own, and its targets are NO_LOSS. The last, or only, epoch of a validation
        set ends in empty rows.
    WHY: A row's losses equal those of its conversations alone (a test), and all of them are learned once in
        an epoch (another).
    """

    def __init__(
        self,
        examples: Sequence[Example],
        block_size: int,
        batch_size: int,
        seed: int = 0,
        packing: bool = True,
        rank: int = 0,
        world_size: int = 1,
        endless: bool = True,
    ) -> None:
        """Pack the examples. ValueError if there is none, or one that is too long or has nothing to learn."""
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size ({batch_size}) must be divisible by the processes ({world_size})")
        if not examples:
            raise ValueError("examples (0) must be at least one")
        for number, (ids, learned) in enumerate(examples):
            if not (len(ids) == len(learned) <= block_size + 1 and any(learned[1:])):
                rule = f"must have a target in each and at most {block_size + 1} tokens"
                raise ValueError(f"examples[{number}] ({len(ids)} tokens, {sum(learned[1:])} targets) {rule}")
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.packing, self.endless, self.rank, self.world_size = packing, endless, rank, world_size
        sizes = [len(example.ids) for example in examples]
        self.ends = np.array(list(accumulate(sizes)))
        self.ids = np.fromiter(
            (token for example in examples for token in example.ids), np.int32, self.ends[-1]
        )
        self.learned = np.fromiter(
            (flag for example in examples for flag in example.learned), bool, self.ends[-1]
        )
        room = best_fit(np.array(sizes) - 1, block_size) if packing else np.arange(len(examples))
        order = np.argsort(room, kind="stable")
        self.contents = np.split(order, np.flatnonzero(np.diff(room[order])) + 1)  # the examples of each row

    @property
    def batches(self) -> int:
        """Batches of an epoch, the last one perhaps in part of the next epoch, or with empty rows."""
        return -(-len(self.contents) // self.batch_size)

    def batch(self, step: int) -> Batch:
        """Return this process's rows of a step's batch, (B / world_size, T)."""
        B = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * B
        rows = self._rows(np.arange(first, first + B))
        tokens = np.full((B, self.block_size), PAD, np.int64)
        targets = np.full((B, self.block_size), NO_LOSS, np.int64)
        documents = np.zeros((B, self.block_size), np.int32)  # 0: padding
        for line, row in enumerate(rows):
            place = 0
            for number, example in enumerate(row, start=1):
                end = self.ends[example]
                begin = self.ends[example - 1] if example else 0
                here = slice(place, place := place + end - begin - 1)
                tokens[line, here] = self.ids[begin : end - 1]
                kept = self.learned[begin + 1 : end]
                targets[line, here] = np.where(kept, self.ids[begin + 1 : end], NO_LOSS)
                documents[line, here] = number
        width = self.block_size if self.packing else max(1, int(documents.any(axis=0).sum()))
        return Batch(*(torch.from_numpy(each[:, :width]) for each in (tokens, targets, documents)))

    def _rows(self, places: np.ndarray) -> list[np.ndarray]:
        """Return what is in the rows at these places of all epochs one after the other."""
        size = len(self.contents)
        rows = []
        for epoch, place in zip(*divmod(places, size), strict=True):
            if self.endless or epoch == 0:
                order = Permutation(size, self.seed, int(epoch))
                rows.append(self.contents[int(order(np.array([place]))[0])])
            else:
                rows.append(np.array([], int))
        return rows


def answer_loss(model: Decoder, batch: Batch) -> tuple[Tensor, int]:
    """Return the sum of the losses of all targets, in nats, and how many there are.

    The same sum as language_model_loss, but the head makes logits only where there is a target. A head over
    49,152 tokens is a fifth of SmolLM2's products; over the small model's 4,100 nothing is gained (README).
    """
    hidden = hidden_states(model, batch).flatten(0, 1)
    targets = batch.targets.flatten()
    kept = (targets != NO_LOSS).nonzero().squeeze(1)  # (N,)
    return chunked_cross_entropy(hidden[kept], model.head.weight, targets[kept]), len(kept)
