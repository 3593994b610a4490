"""A text as training material: split off the end for validation, cut windows, shift the targets by one.

PAPERS
  [1] A Neural Probabilistic Language Model, Bengio et al., 2003, JMLR 3

SHAPES
  B  windows in a batch;  T  tokens per window, block_size
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.corpora import ONE_PER_LINE, documents
from phase1_foundation.project1_minimal_gpt.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

VALIDATION_SHARE = 0.1  # the last tenth of the text, as in nanoGPT


class TextData:
    """The token ids of one text, and batches of windows from it.

    PAPER: [1] Sec. 2: learn P(next word | the words before it) from all windows of a running text.
    PAPER CONTEXT: [1] uses a window of a few words; a GPT's window is block_size tokens, and each of its T
        positions is a training example of its own, with a past of 1 to T tokens.
    INTUITION: x is what the model reads, y is the same text one character later: the answers.
    IMPLEMENTATION: Windows start anywhere (they overlap). The batch of a step is drawn by a generator
        seeded with (seed, step), so it is a function of the step: resuming repeats nothing and skips
        nothing.
    WHY: A generator that lives through the run would have to be saved, and nanoGPT's, which is not, resumes
        with other batches than an uninterrupted run.
    """

    def __init__(self, ids: Tensor, block_size: int, batch_size: int, seed: int) -> None:
        """Take (N,) token ids. Raises ValueError for a text too short for one window in each part."""
        cut = len(ids) - int(len(ids) * VALIDATION_SHARE)
        self.train, self.validation = ids[:cut], ids[cut:]
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        if len(self.validation) <= block_size:
            raise ValueError(
                f"block_size ({block_size}) must be below the validation part, the last tenth of the text: "
                f"{len(self.validation)} of {len(ids)} tokens"
            )

    def batch(self, step: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B, T) of a step."""
        choice = np.random.default_rng([self.seed, step])
        starts = torch.from_numpy(choice.integers(len(self.train) - self.block_size, size=self.batch_size))
        windows = self.train[starts[:, None] + torch.arange(self.block_size + 1)].to(device)  # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]

    def validation_batches(
        self, windows: int, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the whole validation part in consecutive windows, this many at a time.

        A remainder below T is left out.
        """
        T = self.block_size
        n = (len(self.validation) - 1) // T
        x, y = self.validation[: n * T].view(n, T), self.validation[1 : n * T + 1].view(n, T)
        for i in range(0, n, windows):
            yield x[i : i + windows].to(device), y[i : i + windows].to(device)


def read_ids(path: Path, kind: str) -> tuple[Tensor, Tokenizer]:
    """Return a file's token ids (N,) and the tokenizer, "char" (fit to the text) or "byte".

    Raises ValueError for an empty file, and for characters of one that is not UTF-8 text.
    """
    one_per_line = path.name.endswith(ONE_PER_LINE)  # a corpus of documents, its newlines escaped
    content = "\n".join(documents(path)).encode() if one_per_line else path.read_bytes()
    if not content:
        raise ValueError(f"data ({path}) must not be empty")
    if kind == "byte":
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).long(), ByteTokenizer()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is {content[error.start]:#04x}"
        raise ValueError(
            f"data ({path}) must be UTF-8 text, but {what}; --tokenizer byte reads any file"
        ) from error
    if "\0" in text:
        raise ValueError(
            f"data ({path}) must be text, but byte {content.index(0)} is 0; --tokenizer byte reads any file"
        )
    tokenizer = CharTokenizer.train(text)
    return torch.tensor(tokenizer.encode(text), dtype=torch.int64), tokenizer
