r"""The model runner: one forward pass for whatever the scheduler planned, then one token for who is due.

PAPERS
  [1] Orca: A Distributed Serving System for Transformer-Based Generative Models, Yu et al., 2022 (OSDI)

SHAPES
  N  tokens of the flat batch    R  rows from which a token is drawn
  C  n_embd                      V  vocab_size
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project7_kv_cache.slots import SlotCache
from phase3_core_inference.project8_sampling.sampler import LogProbs, Sampler
from phase3_core_inference.project8_sampling.state import RequestState
from phase3_core_inference.project8_sampling.vocabulary import Vocabulary
from phase3_core_inference.project9_continuous_batching.config import EngineConfig
from phase3_core_inference.project9_continuous_batching.request import Request, State, Work


@dataclass(frozen=True)
class Drawn:
    """A token that a step drew."""

    token: int
    text: str
    logprobs: LogProbs | None = None


class Runner(Protocol):
    """What an engine needs of whoever computes; the simulator has another one."""

    def begin(self, request: Request) -> State:
        """Return the state of a new request; ValueError for one that cannot be served."""
        ...

    def run(self, work: Sequence[Work]) -> list[Drawn | None]:
        """Compute, and return what was drawn for each entry; None where nothing was due."""
        ...

    def free(self, slots: Sequence[int]) -> None:
        """Forget what these slots hold."""
        ...


class ModelRunner:
    """Run a real model: flat batch in, tokens out.

    PAPER: [1] Sec. 3 (S2), selective batching: all tokens side by side in every matrix, apart in attention.
    PAPER CONTEXT: Requests at different places in texts of different lengths do not make a rectangle. [1]
        observes that only attention knows about sequences at all.
    INTUITION: One conveyor belt through the factory; parcels are sorted at one station only.
    IMPLEMENTATION: Project 7's SlotCache is the station. The head, which costs as much as several blocks,
        sees the last token of each due row only; project 8's sampler draws for all rows at once.
    WHY: Text by text, the tokens are those of a request that is alone in the engine (a test, in float64).
    """

    def __init__(self, model: Decoder, config: EngineConfig, tokenizer: Tokenizer | None = None) -> None:
        weight = model.head.weight
        self.model, self.length = model.eval().requires_grad_(False), config.length
        self.cache = SlotCache(model.config, config.slots, config.length, weight.dtype, weight.device)
        self.sampler = Sampler()
        size = model.config.vocab_size
        self.vocabulary = Vocabulary.of(tokenizer, size) if tokenizer is not None else None
        self.model_seconds = 0.0  # spent in the model, with what it calls

    def begin(self, request: Request) -> RequestState:
        """Return the state of a request; ValueError, in one sentence, for one that cannot be served."""
        size, n = self.model.config.vocab_size, len(request.prompt)
        if not 1 <= n <= self.length:
            raise ValueError(f"prompt ({n} tokens) must have 1 to {self.length} tokens")
        for token in request.prompt:
            if type(token) is not int or not 0 <= token < size:
                raise ValueError(f"prompt (token {token}) must be of ids from 0 to {size - 1}")
        # The last token that is drawn need not fit into the cache: nothing comes after it.
        most = min(request.params.max_new_tokens, self.length - n + 1)
        params = replace(request.params, max_new_tokens=most)
        return RequestState(params, request.prompt, self.vocabulary, request.stop_tokens)

    @torch.inference_mode()
    def run(self, work: Sequence[Work]) -> list[Drawn | None]:
        """Compute the planned tokens and draw for every row that is due."""
        began, device = time.perf_counter(), self.cache.device
        ids: list[int] = []
        last: list[int] = []  # where in the flat batch each due row ends
        for item in work:
            job = item.job
            if item.idle:  # the last remembered token once more, in its own place
                self.cache.redo(job.slot)
                ids.append([*job.request.prompt, *job.state.output][job.computed - 1])
            else:
                ids += job.next_tokens(item.tokens)
            if item.draws:
                last.append(len(ids) - 1)
        self.cache.plan([(item.job.slot, item.tokens) for item in work])
        hidden = self.model.hidden(torch.tensor([ids], device=device), self.cache)[0]  # (N, C)
        drawn: list[Drawn | None] = [None] * len(work)
        if not last:
            self._count(began)
            return drawn
        rows = hidden if len(last) == len(ids) else hidden[torch.tensor(last, device=device)]
        logits = self.model.head(rows).float()  # (R, V)
        self._count(began)
        due = [number for number, item in enumerate(work) if item.draws]
        states = [work[number].job.state for number in due]
        found = self.sampler(logits, states)  # type: ignore[arg-type]  # begin() made RequestStates
        for row, number in enumerate(due):
            drawn[number] = Drawn(found.tokens[row], found.shown[row], found.logprobs[row])
        return drawn

    def free(self, slots: Sequence[int]) -> None:
        """Forget what these slots hold."""
        for slot in slots:
            self.cache.free(slot)

    def _count(self, began: float) -> None:
        if self.cache.device.type == "cuda":
            torch.cuda.synchronize()
        self.model_seconds += time.perf_counter() - began
