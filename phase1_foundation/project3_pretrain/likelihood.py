r"""What a model thinks of a text, a choice, a last word: the numbers by which language models are compared.

PAPERS
  [1] The Pile: An 800GB Dataset of Diverse Text for Language Modeling, Gao et al., 2020, arXiv:2101.00027
  [2] Shortformer: Better Language Modeling using Shorter Inputs, Press, Smith & Lewis, 2020, arXiv:2012.15832
  [3] Language Models are Few-Shot Learners, Brown et al., 2020, arXiv:2005.14165 (GPT-3)
  [4] The LAMBADA dataset: Word prediction requiring a broad discourse context, Paperno et al., 2016,
      arXiv:1606.06031
  [5] Lessons from the Trenches on Reproducible Evaluation of Language Models, Biderman et al., 2024,
      arXiv:2405.14782

SHAPES
  B  windows    T  tokens per window, the context    C  n_embd    N  tokens to predict
"""

import bz2
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.script import progress
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.loss import CHUNK_LOGITS, NO_LOSS
from phase1_foundation.project3_pretrain.model import Decoder

STARTS = ("<|endoftext|>", "<|begin_of_text|>", "<s>")  # special tokens before the first word of a document
BATCH_TOKENS = 8192  # computed at once


def start_token(tokenizer: Tokenizer) -> int | None:
    """Return the special token that stands before a document, if there is one."""
    return next((tokenizer.special_tokens[name] for name in STARTS if name in tokenizer.special_tokens), None)


@dataclass(frozen=True)
class TextScore:
    r"""How well a model predicts a text, in units of the tokens, of the words and of the bytes.

    PAPER: [1] proposes bits per byte; [5], on what makes scores comparable.
    PAPER CONTEXT: Perplexity is the number of equally likely tokens that a model hesitates between. But a
        tokenizer that cuts the text into fewer tokens makes each of them harder.
    INTUITION: The total surprise belongs to the text. What it is divided by is a matter of taste, and of
        what one wants to compare: bytes are the same for everybody.
    IMPLEMENTATION: perplexity = exp(nats / tokens); bits per byte = nats / ln 2 / bytes. Tokens count all
        that is predicted, the ends of documents too; bytes and words are the text's own.
    WHY: A model and an arithmetic coder compress the text to nats / ln 2 bits, so bits per byte can be held
        against bzip2's file. A test cuts a text into tokens of one and of two bytes and finds, for one and
        the same source, equal bits per byte and unequal perplexities.
    """

    nats: float  # the sum of all tokens' losses
    tokens: int
    text_bytes: int
    words: int  # between white space

    @property
    def perplexity(self) -> float:
        """Per token: comparable only between models of one tokenizer."""
        return math.exp(self.nats / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """Per word: comparable across tokenizers."""
        return math.exp(min(self.nats / max(self.words, 1), 700))

    @property
    def bits_per_byte(self) -> float:
        """Comparable across tokenizers, languages, and with compressors."""
        return self.nats / math.log(2) / self.text_bytes


def bzip2_bits_per_byte(text: bytes) -> float:
    """Return what bzip2 -9 needs for a text, its 900,000 byte blocks and headers included."""
    return 8 * len(bz2.compress(text, 9)) / len(text)


@torch.no_grad()
def score_text(
    model: Decoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    context: int = 0,
    stride: int = 0,
    limit_tokens: int = 0,
) -> tuple[TextScore, bytes]:
    """Return how well a model predicts documents, and the bytes that were predicted (`limit_tokens` of them).

    The documents stand one behind the other with a start token before each: S d1 S d2 S d3; all but the first
    token are predicted. ValueError if there is nothing to predict.
    """
    start = start_token(tokenizer)
    ids: list[int] = []
    for text in texts:
        ids += [] if start is None else [start]
        ids += tokenizer.encode(text)
        if limit_tokens and len(ids) > limit_tokens:
            ids = ids[: limit_tokens + 1]
            break
    told = tokenizer.decode_bytes(token for token in ids[start is None :] if token != start)
    if len(ids) < 2 or not told:
        raise ValueError(f"text ({len(told)} bytes) must have something to predict")
    losses = text_losses(model, torch.tensor(ids), context or model.config.block_size, stride)
    words = len(told.decode("utf-8", "replace").split())
    return TextScore(losses.sum(dtype=torch.float64).item(), len(losses), len(told), words), told


def text_losses(model: Decoder, ids: Tensor, context: int, stride: int = 0) -> Tensor:
    r"""Return the loss (N,), in nats, of each of ids (N + 1,) but the first.

    PAPER: [2] compares nonoverlapping windows with sliding ones, which see more and cost more.
    PAPER CONTEXT: A text is longer than the context. Cut into pieces, the first tokens of each are predicted
        from almost nothing ("the early token curse" of [2]), and the perplexity is worse than the model.
    INTUITION: Read on page by page; or turn back half a page before each new one.
    IMPLEMENTATION: Windows of T tokens begin every `stride` tokens. What an earlier window has predicted is
        not counted again, so each token counts once, with a past of at least T - stride tokens (if there are
        so many). stride = T, or 0, is consecutive windows.
    WHY: Two perplexities compare only with one context and one stride: state both. At stride 1 every token
        has its full context; a test holds that to a loop over the tokens.
    """
    stride, N = stride or context, len(ids) - 1
    if not 1 <= context <= model.config.block_size:
        raise ValueError(f"context ({context}) must be at least 1 and at most {model.config.block_size}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride ({stride}) must be at least 1 and at most context ({context})")
    device = next(model.parameters()).device
    begins = range(0, max(N - context, 0) + stride, stride)
    full = sum(begin + context <= N for begin in begins)
    rows = max(1, BATCH_TOKENS // context)
    groups = [begins[i : min(i + rows, full)] for i in range(0, full, rows)] + [begins[full:]]
    losses = torch.zeros(N)
    for group in progress([group for group in groups if group], desc="predicting", leave=False, delay=2):
        first = torch.tensor(group)[:, None]  # (B, 1)
        place = first + torch.arange(min(context, N - group[0]))  # (B, T)
        tokens, targets = ids[place].to(device), ids[place + 1].to(device)
        found, _ = judge(model, model.hidden(tokens).flatten(0, 1), targets.flatten())
        new = (first == 0) | (place >= first + context - stride)
        losses[place[new]] = found.view(place.shape).cpu().float()[new]
    return losses


def judge(model: Decoder, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Map (N, C) to the losses (N,) of targets (N,), and whether each was the model's first choice."""
    losses, hits = [], []
    rows = max(1, CHUNK_LOGITS // model.config.vocab_size)  # all logits at once could fill the memory
    for x, y in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = model.head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(logits, y, reduction="none"))
        hits.append(logits.argmax(dim=-1) == y)
    return torch.cat(losses), torch.cat(hits)


class Continued(NamedTuple):
    """What a model thinks of a continuation."""

    nats: float  # -log of its probability
    greedy: bool  # always taking the likeliest token writes it


@torch.no_grad()
def score_continuations(model: Decoder, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Continued]:
    """Return what a model thinks of each (context, continuation), both of token ids.

    The longest come first and pairs of like length are computed together, filled up on the right, where a
    causal model cannot see it. A context that is too long loses its beginning. ValueError for a continuation
    that does not fit.
    """
    block_size, device = model.config.block_size, next(model.parameters()).device
    rows = [(context + ids)[-(block_size + 1) :] for context, ids in pairs]
    for row, (context, ids) in zip(rows, pairs, strict=True):
        if not ids or not context or len(row) <= len(ids):
            rule = (
                f"must be at least 1 and at most block_size ({block_size}) tokens, behind a context of some"
            )
            raise ValueError(f"continuation ({len(ids)} tokens) {rule}")
    order = sorted(range(len(pairs)), key=lambda i: -len(rows[i]))
    results: dict[int, Continued] = {}
    bar = progress(order, desc="choosing", leave=False, delay=2)
    while len(results) < len(order):
        width = len(rows[order[len(results)]]) - 1
        group = order[len(results) : len(results) + max(1, BATCH_TOKENS // width)]
        tokens = torch.zeros(len(group), width, dtype=torch.long)
        targets = torch.full((len(group), width), NO_LOSS)
        for line, i in enumerate(group):
            end, count = len(rows[i]) - 1, len(pairs[i][1])
            tokens[line, :end] = torch.tensor(rows[i][:-1])
            targets[line, end - count : end] = torch.tensor(pairs[i][1])
        counted = (targets != NO_LOSS).to(device)
        losses, hits = judge(model, model.hidden(tokens.to(device))[counted], targets.to(device)[counted])
        counts = [len(pairs[i][1]) for i in group]
        for i, nats, hit in zip(group, losses.split(counts), hits.split(counts), strict=True):
            results[i] = Continued(
                nats.sum(dtype=torch.float64 if device.type != "mps" else None).item(), bool(hit.all())
            )
        bar.update(len(group))
    bar.close()
    return [results[i] for i in range(len(pairs))]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context, a start token before it, and of its continuation.

    Spaces at the end of the context go to the continuation, for tokenizers cut before spaces; and both are
    encoded together, as the text that the model would have read ([5]'s harness does so).
    """
    bare = context.rstrip(" ")
    start = start_token(tokenizer)
    before = tokenizer.encode(bare)
    whole = tokenizer.encode(context + continuation)
    head = [] if start is None else [start]
    return head + whole[: len(before)], whole[len(before) :]


@dataclass(frozen=True)
class Question:
    """A text to go on from, texts that could follow, and which one does."""

    context: str
    choices: tuple[str, ...]  # a single one: the word that LAMBADA asks for
    answer: int


@dataclass(frozen=True)
class TaskScore:
    """What share of questions was answered well."""

    questions: int
    accuracy: float  # by the likelihood of the whole choice; of a word: the likeliest token all along
    normalized: float | None = None  # by the likelihood per byte of the choice
    perplexity: float | None = None  # of a word: exp of its mean loss in nats
    chance: float = 0.0  # accuracy of guessing


def standard_error(share: float, count: int) -> float:
    """Return the standard error of a share of so many questions."""
    return math.sqrt(share * (1 - share) / count)


def answer_questions(model: Decoder, tokenizer: Tokenizer, questions: Sequence[Question]) -> TaskScore:
    r"""Let a model answer by likelihood: of all choices it takes the one that it would rather have written.

    PAPER: [3] Sec. 2.4: compare the likelihoods of the completions, normalized by length; the last word, [4].
    PAPER CONTEXT: A model without any tuning does not answer in letters A to D. But it gives every text a
        probability, so whether it knows the answer can be asked without its following instructions.
    INTUITION: Which ending would surprise you least?
    IMPLEMENTATION: A long choice has more to be surprised at, so [3] divides by its tokens; we divide by its
        bytes, which compares across tokenizers. LAMBADA has no choices: the last word counts if each of its
        tokens is the model's first choice.
    WHY: Raw and normalized accuracies differ by several points and neither is always the better one, so
        both are told, with their standard error: at 1,000 questions it is 1.6 points.
    """
    if not questions:
        raise ValueError("questions (0) must be at least one")
    pairs = [
        encode_pair(tokenizer, question.context, choice)
        for question in questions
        for choice in question.choices
    ]
    scores = iter(score_continuations(model, pairs))
    n, raw, normalized, greedy, nats = len(questions), 0, 0, 0, 0.0
    for question in questions:
        losses = [next(scores) for _ in question.choices]
        sizes = [max(1, len(choice.strip().encode())) for choice in question.choices]
        raw += min(range(len(losses)), key=lambda i: losses[i].nats) == question.answer
        normalized += min(range(len(losses)), key=lambda i: losses[i].nats / sizes[i]) == question.answer
        greedy += losses[0].greedy
        nats += losses[0].nats
    if all(len(question.choices) == 1 for question in questions):
        return TaskScore(n, greedy / n, perplexity=math.exp(min(nats / n, 700)))
    chance = sum(1 / len(question.choices) for question in questions) / n
    return TaskScore(n, raw / n, normalized / n, chance=chance)
