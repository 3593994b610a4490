r"""A request, what comes back for it, and what the engine remembers of it meanwhile.

PAPERS
  [1] Orca: A Distributed Serving System for Transformer-Based Generative Models, Yu et al., 2022 (OSDI)
  [2] Efficient Memory Management for Large Language Model Serving with PagedAttention, Kwon et al., 2023,
      arXiv:2309.06180
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from phase3_core_inference.project8_sampling.config import SamplingParams
from phase3_core_inference.project8_sampling.sampler import LogProbs


@dataclass(frozen=True)
class Request:
    """What somebody wants written."""

    prompt: Sequence[int]  # token ids
    params: SamplingParams = field(default_factory=SamplingParams)
    client: str = ""  # who asks, for fairness
    priority: int = 0  # the higher, the sooner, where the engine's order is "priority"
    stop_tokens: frozenset[int] = frozenset()  # ids that end the text


@dataclass(frozen=True)
class Output:
    """What a step wrote for one request."""

    id: int
    token: int  # -1 where the request failed
    text: str  # that can be shown now: whole characters, and nothing that a stop text may yet take
    finish_reason: str | None = None  # stop, length or error, with the last output of a request
    error: str = ""  # one sentence
    logprobs: LogProbs | None = None


class State(Protocol):
    """What scheduler and engine must know of a text being written; project 8's RequestState has it."""

    output: list[int]
    finish_reason: str | None
    error: str


@dataclass(eq=False)
class Job:
    """A request on its way: what is known of its text, and how much of that is in the cache.

    PAPER: [1] Sec. 4.2 keeps a state for each request; taking memory and computing it again, [2] Sec. 4.5.
    PAPER CONTEXT: Engines tell apart prompts to be read, texts being written, and texts that lost their
        memory, and each change of state was a place for bugs.
    INTUITION: A reader with a book and a bookmark. Reading aloud, catching up, and starting over differ only
        in how far behind the bookmark is.
    IMPLEMENTATION: `known` tokens are prompt and output; `computed` of them are remembered. What is between
        is to be computed: a whole prompt at first, then one token a step. A job that lost its memory has
        computed = 0, and its text so far is a prompt like any other.
    WHY: There is one rule (compute what is not computed; when nothing is left, draw), so a test finds the
        same tokens however a text was cut up, stopped and resumed.
    """

    id: int
    request: Request
    state: State
    arrival: float  # seconds, by the engine's clock
    slot: int = -1  # place in the cache; -1: none
    computed: int = 0
    preempted: int = 0  # times that it lost its memory
    admitted: bool = False  # at least once
    times: list[float] = field(default_factory=list)  # when each token of the output came

    @property
    def known(self) -> int:
        """Tokens of prompt and output."""
        return len(self.request.prompt) + len(self.state.output)

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be drawn; 1 for a text being written."""
        return self.known - self.computed

    @property
    def writes(self) -> bool:
        """Whether one token is all that is to be computed."""
        return self.pending == 1 and self.computed > 0

    @property
    def done(self) -> bool:
        """Whether its last token was written."""
        return self.state.finish_reason is not None

    def next_tokens(self, count: int) -> list[int]:
        """Return the next ids to compute."""
        prompt, output = self.request.prompt, self.state.output
        end, n = self.computed + count, len(prompt)
        return [*prompt[self.computed : end], *output[max(0, self.computed - n) : max(0, end - n)]]


@dataclass(frozen=True)
class Work:
    """How many tokens of a job the next step computes.

    PAPER: an entry of the batch of [1] Algorithm 1, with a number of tokens, as chunked prompts need it.
    PAPER CONTEXT: Batches of sequences have a row for each; flat batches have as many tokens as there are.
    INTUITION: One line of the day's plan: who, and how much.
    IMPLEMENTATION: `draws` is to be asked before the token is there: afterwards more is known than computed.
    WHY: Scheduler, runner and simulator share this one word, and so cannot disagree about a step.
    """

    job: Job
    tokens: int
    idle: bool = False  # a row that is done and computed all the same, as batches of fixed rows are

    @property
    def draws(self) -> bool:
        """Whether a token can be drawn after it."""
        return not self.idle and self.tokens == self.job.pending
