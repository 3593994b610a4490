r"""How well a model answers: whether what it writes is right, and how likely it finds the right answer.

PAPERS
  [1] Finetuned Language Models Are Zero-Shot Learners, Wei et al., 2021, arXiv:2109.01652 (FLAN)
  [2] Are Emergent Abilities of Large Language Models a Mirage?, Schaeffer, Miranda & Koyejo, 2023,
      arXiv:2304.15004

SHAPES
  B  prompts of one length    T  tokens of each    V  vocab_size
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import groupby

import torch

from common.script import progress
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.generate import GrowingCache
from phase1_foundation.project3_pretrain.likelihood import score_continuations
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project4_instruction_tuning.conversations import Conversation, Message
from phase2_finetuning.project4_instruction_tuning.tasks import Task, is_right
from phase2_finetuning.project4_instruction_tuning.templates import ChatTemplate

ROWS = 64  # prompts answered at once
ALL = "all"  # the name of all families together
Pair = tuple[list[int], list[int]]  # what was said before; an answer and the mark that ends it


@dataclass
class Score:
    r"""What became of some answers: how many that a model wrote are right, how likely the right ones are.

    PAPER: [1] Sec. 3 scores what a tuned model answers to tasks that it was not tuned on; [2] Sec. 2, on what
        a metric makes of a model.
    PAPER CONTEXT: An answer of ten tokens is right if ten are. A model that learns steadily seems to learn
        nothing for long and then all at once; [2] shows that the likelihood of the answer rises all along.
    INTUITION: One asks whether the pupil has it right, the other how surprised he is by the solution.
    IMPLEMENTATION: Exact match of what is written, always taking the likeliest token; and nats per token of
        the reference answer with the mark that ends it. An answer in other words than the reference is wrong:
        is_right() allows no more than space around it and JSON's freedom.
    WHY: A base model scores 0% with any prompt that it does not understand; its likelihood tells how far
        away it is. A test trains on three answers and finds both numbers perfect for these alone.
    """

    answers: int = 0
    right: int = 0  # of those that the model wrote, as is_right() says
    nats: float = 0.0  # -log of the probability of those that it should have written
    tokens: int = 0  # of the latter, with the marks that end them
    text_bytes: int = 0  # of the latter
    skipped: int = 0  # too long for the model's context

    @property
    def accuracy(self) -> float:
        """The share of right answers: exact match."""
        return self.right / max(1, self.answers)

    @property
    def loss(self) -> float:
        """Nats per token of the reference answers."""
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """The same for their bytes, which compares models with different tokenizers."""
        return self.nats / math.log(2) / max(1, self.text_bytes)

    def __add__(self, other: "Score") -> "Score":
        return Score(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@torch.no_grad()
def write_answers(
    model: Decoder, prompts: Sequence[list[int]], max_new_tokens: int, stop: Collection[int] = ()
) -> list[list[int]]:
    """Return what a model writes after each prompt: always the likeliest token, up to one of `stop`.

    Prompts of one length are answered together, so no row has to be filled up. One that leaves no room for
    an answer loses its beginning. ValueError for an empty prompt, or where there is no room at all.
    """
    room, device = model.config.block_size - max_new_tokens, next(model.parameters()).device
    if room < 1:
        raise ValueError(
            f"max_new_tokens ({max_new_tokens}) must be below {model.config.block_size}, the context"
        )
    if not all(prompts):
        raise ValueError("prompt (0 tokens) must have at least 1")
    answers: list[list[int]] = [[] for _ in prompts]
    bar = progress(range(len(prompts)), desc="answering", leave=False, delay=2)
    for some in _groups([min(len(prompt), room) for prompt in prompts]):
        new, cache = torch.tensor([prompts[i][-room:] for i in some], device=device), GrowingCache()  # (B, T)
        writing = set(some)
        for _ in range(max_new_tokens):
            new = model.head(model.hidden(new, cache)[:, -1:]).argmax(dim=-1)  # (B, 1)
            for i, token in zip(some, new[:, 0].tolist(), strict=True):
                if token in stop:
                    writing.discard(i)
                if i in writing:
                    answers[i].append(token)
            if not writing:
                break
        bar.update(len(some))
    bar.close()
    return answers


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of things that have the same length, some at a time."""
    for _, group in groupby(sorted(range(len(lengths)), key=lengths.__getitem__), lengths.__getitem__):
        rows = list(group)
        yield from (rows[start : start + ROWS] for start in range(0, len(rows), ROWS))


def answer_pairs(template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation) -> list[Pair]:
    """Return each of the assistant's answers with all that was said before it, in tokens."""
    ids, mask = template.encode(tokenizer, conversation)
    pairs, end = [], 0
    for learned, group in groupby(mask):
        start, end = end, end + len(list(group))
        if learned:
            pairs.append((ids[:start], ids[start:end]))
    return pairs


def score_tasks(
    model: Decoder,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    tasks: Sequence[Task],
    max_new_tokens: int = 48,
) -> tuple[dict[str, Score], list[str]]:
    """Return the scores by family, those of all together last, and what the model answered to each task."""
    dialogues = [[Message("user", task.prompt), Message("assistant", task.answer)] for task in tasks]
    prompts = [template.encode(tokenizer, dialogue[:1], answer=True)[0] for dialogue in dialogues]
    written = write_answers(model, prompts, max_new_tokens, template.stop(tokenizer))
    answers = [tokenizer.decode(ids) for ids in written]
    scores: dict[str, Score] = defaultdict(Score)
    likelihoods = score_dialogues(model, tokenizer, template, dialogues)
    for task, answer, score in zip(tasks, answers, likelihoods, strict=True):
        scores[task.family] += replace(score, answers=1, right=int(is_right(task, answer)))
    return dict(scores) | {ALL: sum(scores.values(), Score())}, answers


def score_dialogues(
    model: Decoder, tokenizer: Tokenizer, template: ChatTemplate, dialogues: Sequence[Conversation]
) -> list[Score]:
    """Return how likely the model finds the assistant's answers in each conversation; it writes nothing.

    An answer that does not fit in the model's context behind one token is skipped.
    """
    scores = [Score() for _ in dialogues]
    kept: list[tuple[Score, Pair, int]] = []
    for dialogue, score in zip(dialogues, scores, strict=True):
        texts = [message.content for message in dialogue if message.role == "assistant"]
        for pair, text in zip(answer_pairs(template, tokenizer, dialogue), texts, strict=True):
            if len(pair[1]) <= model.config.block_size:
                kept.append((score, pair, len(text.encode())))
            else:
                score.skipped += 1
    found = score_continuations(model, [pair for _, pair, _ in kept])
    for (score, (_, answer), size), (nats, _) in zip(kept, found, strict=True):
        score.answers += 1
        score.nats += nats
        score.tokens += len(answer)
        score.text_bytes += size
    return scores
