r"""The sampler: from the logits of a batch, whose rows may want entirely different things, to one token each.

PAPERS
  [1] The Curious Case of Neural Text Degeneration, Holtzman et al., 2019, arXiv:1904.09751

SHAPES
  R  rows, one request each    V  vocab_size
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from phase3_core_inference.project8_sampling.batch_odds import BatchOdds, space_for
from phase3_core_inference.project8_sampling.mirostat import next_mu
from phase3_core_inference.project8_sampling.randomness import uniform
from phase3_core_inference.project8_sampling.state import RequestState

NOTHING_LEFT = "logits (a row) must leave a token to choose: all are forbidden, or one is NaN or infinite"


class LogProbs(NamedTuple):
    """What the model itself thought of a token, before any setting, in nats."""

    token: float
    top: list[tuple[int, float]]  # the likeliest tokens


@dataclass(frozen=True)
class Sampled:
    """What a call of the sampler chose, row by row."""

    tokens: list[int]  # -1 for a row whose request has failed
    logprobs: list[LogProbs | None]  # for the rows that ask for them
    shown: list[str]  # text that can be shown now


class Sampler:
    """Choose a token for each row by the settings of its own request.

    PAPER: that one draws at all, and from what is left of the odds, [1]; each rule in its own file.
    PAPER CONTEXT: Libraries make a list of processors for a batch, so all rows share their settings. An
        engine mixes requests of many people, each with settings, a seed and a text of their own.
    INTUITION: A kitchen that cooks each order to its own recipe, but fries all of them in one pan.
    IMPLEMENTATION: In this order: logit bias, repetition, presence and frequency, forbidden n-grams,
        watermark, constraint; temperature; the rules of truncation.py or mirostat; one random number of the
        request's own, at the place of the token. Rows are vectorized; what is sparse stays sparse.
    WHY: A request draws the same tokens alone and in any batch, which a test checks for mixed settings.
    """

    def __init__(self) -> None:
        self.space: Tensor | None = None  # memory to work in, kept from step to step

    @torch.no_grad()
    def __call__(self, logits: Tensor, states: Sequence[RequestState]) -> Sampled:
        """Choose the next token of each request from its row of logits (R, V), and append it to the request.

        A row that leaves no token to choose fails its own request, and no other.
        """
        self.space = space_for(logits, self.space)
        batch = BatchOdds(logits, states, self.space)
        tokens = batch.draw([uniform(state.seed, len(state.output)) for state in states])
        chosen, shown = tokens.tolist(), []
        logprobs = model_logprobs(logits, states, chosen)
        for row, (state, token) in enumerate(zip(states, chosen, strict=True)):
            if token < 0:
                state.fail(batch.problems.get(row, NOTHING_LEFT))
                shown.append("")
                continue
            if (params := state.params).mirostat:
                surprise = batch.surprise(row, token)
                state.mu = next_mu(state.mu, params.mirostat_tau, params.mirostat_rate, surprise)
            try:
                shown.append(state.append(token))
            except ValueError as error:  # of this request; its neighbours go on
                state.fail(str(error))
                shown.append("")
        return Sampled(chosen, logprobs, shown)

    @torch.no_grad()
    def odds(self, logits: Tensor, states: Sequence[RequestState]) -> Tensor:
        """Return the odds (R, V) by which the next tokens would be drawn, and change nothing.

        A row that leaves no token to choose is all zeros.
        """
        return BatchOdds(logits, states).odds()[:, : logits.shape[1]]


def model_logprobs(
    logits: Tensor, states: Sequence[RequestState], tokens: Sequence[int]
) -> list[LogProbs | None]:
    """Return the log-probabilities of the tokens for the rows that ask for them."""
    found: list[LogProbs | None] = [None] * len(states)
    rows = [row for row, state in enumerate(states) if state.params.logprobs is not None and tokens[row] >= 0]
    if not rows:
        return found
    index = torch.tensor(rows, device=logits.device)
    logprobs = logits[index].float().log_softmax(dim=1)
    of_tokens = [float(values[tokens[row]]) for row, values in zip(rows, logprobs, strict=True)]
    number = min(max(states[row].params.logprobs or 0 for row in rows), logits.shape[1])
    best = logprobs.topk(number)
    for row, own, values, ids in zip(
        rows, of_tokens, best.values.tolist(), best.indices.tolist(), strict=True
    ):
        n = states[row].params.logprobs or 0
        found[row] = LogProbs(own, list(zip(ids[:n], values[:n], strict=True)))
    return found
