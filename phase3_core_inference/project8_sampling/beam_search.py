r"""Beam search, plain and diverse: not to draw a text but to look for the likeliest.

PAPERS
  [1] Google's Neural Machine Translation System, Wu et al., 2016, arXiv:1609.08144 (length penalty)
  [2] Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models, Vijayakumar et al., 2016,
      arXiv:1610.02424
  [3] The Curious Case of Neural Text Degeneration, Holtzman et al., 2019, arXiv:1904.09751

SHAPES
  N  beams    V  vocab_size    G  groups of beams
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from phase1_foundation.project3_pretrain.generate import GrowingCache
from phase1_foundation.project3_pretrain.model import Decoder

EarlyStopping = Literal["yes", "no", "never"]
OUT = -1e9  # a score that no text has


@dataclass(frozen=True)
class Hypothesis:
    """A finished text."""

    tokens: list[int]  # without the prompt, with the stop token if it has one
    score: float  # sum of log-probabilities over length ** length_penalty
    group: int = 0


@dataclass
class Beams:
    """Several unfinished texts of one search, and the best finished ones.

    PAPER: length normalization, [1] Sec. 7, in the simpler form length ** penalty that most libraries have.
    PAPER CONTEXT: Each further token makes a text less likely, so the likeliest text is short, and with a
        good model often empty. Dividing by a power of the length is the usual repair.
    INTUITION: Several hikers on the mountain, who call those who are lowest back to where the highest are.
    IMPLEMENTATION: As in transformers, to the token: twice as many candidates as beams, so that enough are
        left when some end; only candidates among the first N may end; early_stopping says when to stop
        looking: "yes" once N texts are finished; "no" when the best unfinished one, divided by its present
        length, is worse than all finished; "never" only when no length could make it better.
    WHY: A test has transformers search with random models and settings and finds the same texts and scores.
    """

    number: int  # N
    max_new_tokens: int
    stop: frozenset[int]
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = "no"
    group: int = 0
    finished: list[Hypothesis] = field(default_factory=list)  # best first
    done: bool = False

    def __post_init__(self) -> None:
        self.texts: list[list[int]] = [[] for _ in range(self.number)]
        self.scores = torch.tensor(
            [0.0] + [OUT] * (self.number - 1)
        )  # all begin alike: only the first counts

    def step(self, logprobs: Tensor) -> tuple[list[int], list[int]]:
        """Take log-probabilities (N, V); return which old beam each new one continues, and its token."""
        V = logprobs.shape[1]
        total = (logprobs + self.scores[:, None]).flatten()
        keep = min(max(2, 1 + len(self.stop)) * self.number, len(total))
        scores, places = total.topk(keep)
        length = len(self.texts[0]) + 1
        candidates = [(place // V, place % V) for place in places.tolist()]
        ends = torch.tensor([token in self.stop or length == self.max_new_tokens for _, token in candidates])
        if len(self.finished) < self.number or self.early_stopping != "yes":
            for i in ends[: self.number].nonzero()[:, 0].tolist():
                parent, token = candidates[i]
                score = float(scores[i]) / length**self.length_penalty
                self.finished.append(Hypothesis([*self.texts[parent], token], score, self.group))
            self.finished.sort(
                key=lambda hypothesis: -hypothesis.score
            )  # stable: of equals the earlier stays
            del self.finished[self.number :]
        running = scores.double() + ends * OUT  # in float32 they would all be -1e9 at the end
        order = running.topk(self.number).indices
        self.scores = running[order].float()
        chosen = [candidates[i] for i in order.tolist()]
        self.texts = [[*self.texts[parent], token] for parent, token in chosen]
        self.done = bool(ends.all()) or not self._hopeful(length)
        return [parent for parent, _ in chosen], [token for _, token in chosen]

    def _hopeful(self, length: int) -> bool:
        """Say whether an unfinished text may still become better than a finished one."""
        if len(self.finished) < self.number:
            return True
        longest = self.early_stopping == "never" and self.length_penalty > 0
        best = float(self.scores[0]) / (self.max_new_tokens if longest else length) ** self.length_penalty
        return self.early_stopping != "yes" and best > self.finished[-1].score


@torch.no_grad()
def beam_search(
    model: Decoder,
    prompt: list[int],
    max_new_tokens: int,
    beams: int = 4,
    stop: Collection[int] = (),
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = "no",
    groups: int = 1,
    diversity: float = 0.0,
) -> list[Hypothesis]:
    """Return the best texts that were found, the best first.

    PAPER: diverse beam search, [2] Alg. 1, with Hamming diversity.
    PAPER CONTEXT: The beams of one search end up nearly the same, a word changed here and there. And what a
        model finds likeliest is dull: [3] Fig. 1 has it repeat itself without end.
    INTUITION: Several parties climb one after the other, and each is told not to follow the others' tracks.
    IMPLEMENTATION: G groups of N / G beams, one after the other at each step: what an earlier group takes at
        this step costs a later one `diversity` per beam that took it. One forward pass serves all groups.
        The cache is that of project 3; its rows are moved as beams continue one another.
    WHY: With groups=1 equal to transformers; with more, to a search without cache written for a test.
    """
    _check(model, prompt, max_new_tokens, beams, groups)
    size, device = beams // groups, next(model.parameters()).device
    how = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    parties = [Beams(size, max_new_tokens, frozenset(stop), group=g, **how) for g in range(groups)]  # type: ignore[arg-type]
    cache = GrowingCache()
    logits = model.head(model.hidden(torch.tensor([prompt], device=device), cache)[:, -1])
    choose_rows(cache, [0] * beams)
    logits = logits.expand(beams, -1)
    while True:
        logprobs = logits.float().log_softmax(dim=1).cpu()
        parents, tokens = list(range(beams)), [0] * beams
        taken = torch.zeros(logprobs.shape[1])  # how often each token was taken at this step
        for party in parties:
            if party.done:
                continue
            first = party.group * size
            rows, new = party.step(logprobs[first : first + size] - diversity * taken)
            taken += torch.bincount(torch.tensor(new), minlength=len(taken))
            parents[first : first + size] = [first + row for row in rows]
            tokens[first : first + size] = new
        if all(party.done for party in parties):
            found = [hypothesis for party in parties for hypothesis in party.finished]
            return sorted(found, key=lambda hypothesis: -hypothesis.score)
        choose_rows(cache, parents)
        logits = model.head(model.hidden(torch.tensor(tokens, device=device)[:, None], cache)[:, -1])


def choose_rows(cache: GrowingCache, rows: list[int]) -> None:
    """Make row i of a cache what row rows[i] was."""
    for layer, (keys, values) in cache.past.items():
        index = torch.tensor(rows, device=keys.device)
        cache.past[layer] = keys[index], values[index]


def _check(model: Decoder, prompt: list[int], max_new_tokens: int, beams: int, groups: int) -> None:
    if beams < 1 or groups < 1 or beams % groups:
        raise ValueError(f"beams ({beams}) must be divisible by groups ({groups})")
    if beams > model.config.vocab_size:
        raise ValueError(
            f"beams ({beams}) must be at most the {model.config.vocab_size} tokens that there are"
        )
    check_length(model, prompt, max_new_tokens)


def check_length(model: Decoder, prompt: list[int], max_new_tokens: int) -> None:
    """Raise ValueError for a text that does not fit into the model's context."""
    if not prompt or max_new_tokens < 1 or len(prompt) + max_new_tokens > model.config.block_size:
        raise ValueError(
            f"prompt ({len(prompt)} tokens) must have at least 1 token, "
            f"and with the {max_new_tokens} new ones at most {model.config.block_size}"
        )


def score_of(logprobs: list[float], length_penalty: float) -> float:
    """Return the score of a text with these log-probabilities."""
    return math.fsum(logprobs) / len(logprobs) ** length_penalty
