r"""What was written changes what may come: repetition, presence and frequency penalties, n-grams, logit bias.

PAPERS
  [1] CTRL: A Conditional Transformer Language Model for Controllable Generation, Keskar et al., 2019,
      arXiv:1909.05858
  [2] A Deep Reinforced Model for Abstractive Summarization, Paulus, Xiong & Socher, 2017, arXiv:1705.04304

SHAPES
  R  rows, one request each    V  vocab_size
"""

import math
from array import array
from collections import defaultdict
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from phase3_core_inference.project8_sampling.config import SamplingParams

Edit = tuple[np.ndarray, np.ndarray]  # token ids without repeats; a number for each


class History:
    """The tokens of one request, counted as they come, and what they do to the logits of the next.

    PAPER: repetition, [1] Sec. 4.1 (penalized sampling); no trigram twice, [2] Sec. 2.5.
    PAPER CONTEXT: A model that was trained on one right next word has never seen its own repetitions, and a
        likely phrase makes itself likelier. [2] forbids what was there; [1] only makes it dearer.
    INTUITION: An editor who strikes the word that you have just used.
    IMPLEMENTATION: Repetition counts prompt and text; presence and frequency (which come from OpenAI's API)
        the text alone. [1] divides the logit, which would favour a negative one; as transformers we
        multiply there. Everything is kept per token that occurred, so it costs nothing per vocabulary.
    WHY: A table of counts for each request would be another pass over R x V numbers at each step.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self.params = params
        self.ids = array("q")  # every token that occurred, once, in the order of first sight
        self.counts = array("q")  # how often each was written; 0 for those of the prompt alone
        self.places: dict[int, int] = {}  # where a token stands in ids
        self.tail: tuple[int, ...] = ()  # the last n - 1 tokens
        self.followers: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # of each n - 1 tokens
        bias = params.logit_bias
        self.bias: Edit = np.fromiter(bias, np.int64), np.fromiter(bias.values(), np.float64)
        self.penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self.penalizes = self.penalties != (1, 0, 0)
        for token in prompt:
            self.append(token, written=0)

    def append(self, token: int, written: int = 1) -> None:
        """Note a token, of the prompt (written=0) or of the text."""
        if self.penalizes:
            if token not in self.places:
                self.places[token] = len(self.ids)
                self.ids.append(token)
                self.counts.append(0)
            self.counts[self.places[token]] += written
        if n := self.params.no_repeat_ngram:
            if len(self.tail) == n - 1:
                self.followers[self.tail].append(token)
            self.tail = (*self.tail, token)[-(n - 1) :] if n > 1 else ()

    def forbidden(self) -> Sequence[int]:
        """Return the tokens that would complete an n-gram that occurred."""
        return self.followers.get(self.tail, ()) if len(self.tail) == self.params.no_repeat_ngram - 1 else ()

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Return every token that occurred, and how often it was written."""
        return np.array(self.ids, dtype=np.int64), np.array(self.counts, dtype=np.float64)


def apply_penalties(
    scaled: Tensor,
    vocab_size: int,
    histories: Sequence[History],
    scales: np.ndarray,
    banned: Sequence[Collection[int]],
) -> None:
    """Change logits (R, at least V) in place, which have been multiplied by `scales` already.

    In this order, which is transformers': bias, repetition, presence and frequency, forbidden tokens.
    `banned` are tokens that a row must not take for reasons of its own. Ids beyond the vocabulary do nothing.
    """
    flat, width = scaled.view(-1), scaled.stride(0)
    add, ban = _Edits(flat), _Edits(flat)
    for row, (history, scale) in enumerate(zip(histories, scales, strict=True)):
        start = row * width
        if len(history.bias[0]):
            inside = history.bias[0] < vocab_size
            add.note(history.bias[0][inside] + start, history.bias[1][inside] * scale)
        forbidden = [token for token in (*banned[row], *history.forbidden()) if token < vocab_size]
        if forbidden:
            ban.note(np.array(forbidden) + start)
    if add:
        index, bias = add.tensors()
        flat.index_add_(0, index, bias)
    if rows := [row for row, history in enumerate(histories) if history.penalizes]:
        _penalize(flat, [histories[row] for row in rows], np.array(rows) * width, scales[rows])
    if ban:
        flat[ban.tensors()[0]] = -math.inf


def _penalize(flat: Tensor, histories: Sequence[History], starts: np.ndarray, scales: np.ndarray) -> None:
    """Make what occurred dearer, in the rows of logits that begin at `starts`."""
    seen = [history.seen() for history in histories]
    sizes = [len(ids) for ids, _ in seen]
    ids, counts = (np.concatenate(part) for part in zip(*seen, strict=True))
    penalties = np.array([history.penalties for history in histories])
    penalties[:, 1:] *= scales[:, None]  # what is subtracted; the first is a factor
    factor, presence, frequency = np.repeat(penalties, sizes, axis=0).T
    subtract = presence * (counts > 0) + frequency * counts
    index, factor, subtract = (
        torch.from_numpy(each).to(flat.device, kind)
        for each, kind in (
            (ids + np.repeat(starts, sizes), torch.int64), (factor, flat.dtype), (subtract, flat.dtype),
        )
    )  # fmt: skip
    value = flat[index]
    flat[index] = torch.where(value < 0, value * factor, value / factor) - subtract


class _Edits:
    """Places in the logits of a batch, and numbers for each, gathered row by row."""

    def __init__(self, flat: Tensor) -> None:
        self.flat, self.parts = flat, list[tuple[np.ndarray, ...]]()

    def __len__(self) -> int:
        return len(self.parts)

    def note(self, places: np.ndarray, *numbers: np.ndarray) -> None:
        self.parts.append((places, *numbers))

    def tensors(self) -> list[Tensor]:
        places, *numbers = (
            torch.from_numpy(np.concatenate(part)).to(self.flat.device)
            for part in zip(*self.parts, strict=True)
        )
        return [places, *(number.to(self.flat.dtype) for number in numbers)]
