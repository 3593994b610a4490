r"""From shards to batches: shuffled, divided among processes, prepared while the step before is computed.

PAPERS
  [1] Language Models are Few-Shot Learners (GPT-3), Brown et al., 2020, arXiv:2005.14165
  [2] Fewer Truncations Improve Language Modeling, Ding et al., 2024, arXiv:2404.10830
  [3] tf.data: A Machine Learning Data Processing Framework, Murray et al., 2021, arXiv:2101.12127

SHAPES
  B  rows in the batch of all processes together;  T  tokens in a row, block_size
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from phase1_foundation.project3_pretrain.loss import NO_LOSS, Batch
from phase1_foundation.project3_pretrain.packing import PACKINGS, Packing, Permutation
from phase1_foundation.project3_pretrain.shards import load_manifest, open_shard


class Loader:
    r"""The batches of a folder of shards; which one comes at a step is a function of the step.

    PAPER: packing as in [1] Appendix B ("concat") or as in [2] ("best_fit").
    PAPER CONTEXT: Loaders with a position inside must save it; many skip through the data to find it again,
        or start over when the number of processes changes.
    INTUITION: All rows have a number, and each epoch an order of the numbers. Step s takes the places s B to
        (s + 1) B - 1 of it, and each process its part of these.
    IMPLEMENTATION: `batch_size` counts the rows of all processes. The training split repeats for ever in a
        new order; the validation split has one order and ends: from there on rows are empty, without
        targets. With best_fit, or mask_documents, the batch says which document each token is of.
    WHY: The step is all there is to save, and 1, 2 or 8 processes see the same batches.
    """

    def __init__(
        self,
        folder: Path | str,
        split: str,
        block_size: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        packing: str = "concat",
        mask_documents: bool = False,
        verify: bool = True,
    ) -> None:
        """Open the shards; `verify` reads them once to see that they are what they were.

        ValueError for a damaged shard, another tokenizer, and settings that do not fit; FileNotFoundError.
        """
        if packing not in PACKINGS:
            raise ValueError(f"packing ({packing}) must be one of {', '.join(PACKINGS)}")
        if min(block_size, batch_size) < 1:
            raise ValueError(f"block_size ({block_size}) and batch_size ({batch_size}) must be at least 1")
        if batch_size % world_size:
            raise ValueError(f"batch_size ({batch_size}) must be divisible by the processes ({world_size})")
        self.folder, self.split, self.seed, self.block_size = Path(folder), split, seed, block_size
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.mask_documents = mask_documents or packing == "best_fit"
        self.manifest = load_manifest(folder)
        self.entries = self.manifest.of(split)
        self.shards = [open_shard(folder, self.manifest, shard, verify) for shard in self.entries]
        separator = self.manifest.separator
        self.packings: list[Packing] = [
            PACKINGS[packing](shard, block_size, separator) for shard in self.shards
        ]
        self.ends = np.cumsum([len(packing) for packing in self.packings])  # rows up to and with each shard
        if not self.ends[-1]:
            raise ValueError(f"split ({split}) must hold documents")

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return int(self.ends[-1])

    @property
    def batches(self) -> int:
        """Batches of an epoch, the last one perhaps in part of the next epoch, or empty."""
        return -(-self.rows // self.batch_size)

    @property
    def targets(self) -> int:
        """Tokens of an epoch that are to be predicted: all but the first of each shard."""
        return sum(shard.tokens - 1 for shard in self.entries)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each target: nats per token / ln 2 / this are bits per byte."""
        return self.manifest.total(self.split, "text_bytes") / self.targets

    def batch(self, step: int) -> Batch:
        """Return this process's rows of the batch of a step: tokens and targets (B / world_size, T)."""
        B, T = self.batch_size // self.world_size, self.block_size
        tokens = np.full((B, T), self.manifest.separator, np.int64)
        targets = np.full((B, T), NO_LOSS, np.int64)
        documents = np.zeros((B, T), np.int32)
        first = step * self.batch_size + self.rank * B
        for i, row in enumerate(self._rows(np.arange(first, first + B)).tolist()):
            if row >= 0:
                self._fill(row, tokens[i], targets[i], documents[i])
        ids = torch.from_numpy(documents) if self.mask_documents else None
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), ids)

    def _rows(self, places: np.ndarray) -> np.ndarray:
        """Return which rows come at these places of all epochs in a row; -1 where there is none."""
        epochs, places = places // self.rows, places % self.rows
        rows = np.full(len(places), -1)
        for epoch in np.unique(epochs).tolist():
            if epoch == 0 or self.split == "train":
                order = Permutation(self.rows, self.seed, epoch)
                rows[epochs == epoch] = order(places[epochs == epoch])
        return rows

    def _fill(self, row: int, tokens: np.ndarray, targets: np.ndarray, documents: np.ndarray) -> None:
        """Write one row into three arrays (T,)."""
        number = int(np.searchsorted(self.ends, row, side="right"))
        shard, packing, place = self.shards[number], self.packings[number], 0
        begins = np.zeros(self.block_size, bool)
        for start, length in packing[row - int(self.ends[number]) + len(packing)]:
            begins[place] = True  # a piece from the middle of a long document has no separator
            piece = shard[start : start + length + 1]  # one more: the last target
            tokens[place : place + length], targets[place : place + length] = piece[:-1], piece[1:]
            place += length
        np.cumsum(begins | (tokens == self.manifest.separator), out=documents)
        if (largest := max(tokens.max(), targets.max())) >= self.manifest.vocab_size:
            path = self.folder / self.entries[number].file
            raise ValueError(f"shard ({path}) must hold ids below {self.manifest.vocab_size}, not {largest}")


class Prefetcher:
    r"""Prepare the batch of the next step in another thread while this one is computed.

    PAPER: [3] Sec. 2 and 3: overlap the work of input and model ("prefetch").
    PAPER CONTEXT: A GPU that waits for its data earns nothing; [3] found that in many jobs at Google it did.
    INTUITION: The cook chops for the next dish while this one is in the oven.
    IMPLEMENTATION: One thread, one batch ahead: step + 1 is asked for whenever step is. Another step than the
        expected one (after resuming) is made at once. What the thread raises is raised when its batch is due.
    WHY: numpy and torch release Python's lock while they compute, so a thread is enough; a process would
        have to send the batch over.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader, self.pool = loader, ThreadPoolExecutor(1, "prefetch")
        self.ahead: dict[int, Future[Batch]] = {}  # step: its batch

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, and begin with the next one."""
        due = self.ahead.get(step) or self.pool.submit(self.loader.batch, step)
        self.ahead = {step + 1: self.pool.submit(self.loader.batch, step + 1)}
        return due.result()

    def close(self) -> None:
        """Let the thread end."""
        self.pool.shutdown(cancel_futures=True)
