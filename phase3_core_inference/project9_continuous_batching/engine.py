r"""The engine: requests in, tokens out, one step at a time.

PAPERS
  [1] Orca: A Distributed Serving System for Transformer-Based Generative Models, Yu et al., 2022 (OSDI)
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project9_continuous_batching.config import EngineConfig
from phase3_core_inference.project9_continuous_batching.request import Job, Output, Request
from phase3_core_inference.project9_continuous_batching.runner import ModelRunner, Runner
from phase3_core_inference.project9_continuous_batching.scheduler import Scheduler


class Engine:
    """Serve any number of requests with one model; whoever calls step() moves all of them on.

    PAPER: [1] Sec. 4: a pool of requests, a scheduler and an execution engine, which meet at each iteration.
    PAPER CONTEXT: A server that calls generate() per request leaves the machine idle between them; one that
        collects batches makes everybody wait. [1] puts a loop around a single iteration instead.
    INTUITION: A printing press that turns a page at a time; whoever has a page ready hands it in.
    IMPLEMENTATION: A request that cannot be served is refused by add() in one sentence; one that goes wrong
        on the way ends with an Output that says so. Nothing here knows what time costs: the clock is handed
        in, so the simulator is this same engine with another runner and another clock.
    WHY: A state machine of adding, stepping and cancelling in any order finds every text equal to what its
        request gets alone.
    """

    def __init__(
        self, runner: Runner, config: EngineConfig, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.runner, self.scheduler, self.clock = runner, Scheduler(config), clock
        self.jobs: dict[int, Job] = {}  # that are not done
        self.count = 0  # requests so far
        self.steps = 0
        self.tokens = 0  # computed so far, prompts included

    @classmethod
    def of(cls, model: Decoder, config: EngineConfig, tokenizer: Tokenizer | None = None) -> Self:
        """Return an engine around a model; with its tokenizer outputs have text, and stop texts work."""
        return cls(ModelRunner(model, config, tokenizer), config)

    @property
    def has_work(self) -> bool:
        """Whether any request is not done."""
        return bool(self.jobs)

    def add(self, request: Request, arrival: float | None = None) -> int:
        """Take a request and return its id; ValueError in one sentence for one that cannot be served.

        `arrival` is when it came, where that is not now: while a step runs nobody can be let in.
        """
        came = self.clock() if arrival is None else arrival
        job = Job(self.count, request, self.runner.begin(request), came)
        self.count += 1
        self.jobs[job.id] = job
        self.scheduler.add(job)
        return job.id

    def cancel(self, id: int) -> bool:
        """Forget a request, and its memory; False if it is done or was never there."""
        job = self.jobs.pop(id, None)
        if job is not None:
            self.scheduler.remove(job)
        return job is not None

    def step(self) -> list[Output]:
        """Compute once for all that are planned; return what was written, at most one output for each."""
        work = self.scheduler.plan(self.clock())
        freed, self.scheduler.freed = self.scheduler.freed, []
        self.runner.free(freed)
        if not work:
            return []
        drawn = self.runner.run(work)
        now = self.clock()
        self.steps += 1
        self.tokens += sum(item.tokens for item in work)
        outputs = []
        for item, found in zip(work, drawn, strict=True):
            job = item.job
            if item.idle:
                continue
            job.computed += item.tokens
            if found is None:
                continue
            job.times.append(now)
            self.scheduler.fairness.write(job.request.client)
            state = job.state
            outputs.append(
                Output(job.id, found.token, found.text, state.finish_reason, state.error, found.logprobs)
            )
            if job.done:
                del self.jobs[job.id]
        return outputs

    def stream(self, request: Request) -> Iterator[Output]:
        """Yield the outputs of one request as they come; others are moved on as well."""
        id = self.add(request)
        try:
            while id in self.jobs:
                yield from (output for output in self.step() if output.id == id)
        finally:
            self.cancel(id)  # where the caller lost interest

    def run(self, requests: Iterable[Request]) -> list[Job]:
        """Serve requests to their ends, and return them with their texts, in their order."""
        jobs = [self.jobs[self.add(request)] for request in requests]
        while any(not job.done for job in jobs):
            self.step()
        return jobs
