r"""Loads: requests as they come from the world, and what it takes to serve them.

PAPERS
  [1] Orca: A Distributed Serving System for Transformer-Based Generative Models, Yu et al., 2022 (OSDI)
  [2] BurstGPT: A Real-world Workload Dataset to Optimize LLM Serving Systems, Wang et al., 2024,
      arXiv:2401.17644
  [3] DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large Language Model Serving,
      Zhong et al., 2024, arXiv:2401.09670
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from phase3_core_inference.project8_sampling.config import SamplingParams
from phase3_core_inference.project9_continuous_batching.config import LoadConfig
from phase3_core_inference.project9_continuous_batching.engine import Engine
from phase3_core_inference.project9_continuous_batching.request import Job, Request


class Clock(Protocol):
    """Seconds, and a way to let them pass."""

    def __call__(self) -> float:
        """Return the time."""
        ...

    def wait_until(self, then: float) -> None:
        """Let time pass."""
        ...


class RealClock:
    """Seconds since it was made; waiting is sleeping.

    PAPER: none; the other clock is the simulator's.
    PAPER CONTEXT: Code that asks the system for the time can be measured, but not simulated.
    INTUITION: A watch that somebody else could wind.
    IMPLEMENTATION: time.perf_counter from its own beginning, so that loads begin at 0.
    WHY: drive() needs no switch between the real and the simulated.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self) -> float:
        """Return the time."""
        return time.perf_counter() - self.start

    def wait_until(self, then: float) -> None:
        """Sleep."""
        time.sleep(max(0.0, then - self()))


@dataclass(frozen=True)
class Arrival:
    """A request and when it comes."""

    time: float  # seconds
    request: Request


def make_load(config: LoadConfig, length: int, vocab_size: int) -> list[Arrival]:
    r"""Return requests of random tokens, times and lengths; each writes exactly as much as it was given.

    PAPER: Poisson arrivals, [1] Sec. 6.2; clusters of them as gamma-distributed pauses, [2].
    PAPER CONTEXT: Benchmarks send requests one after the other, or all at once. Real ones come when they
        come, in clusters, and their lengths differ by orders of magnitude ([2] measured months of it).
    INTUITION: Rain: the mean says how much falls, not when the gutter overflows.
    IMPLEMENTATION: Pauses have the mean 1 / rate; exponential ones are Poisson arrivals, and a gamma
        distribution with shape 1 / burstiness^2 has that coefficient of variation. Lengths are lognormal,
        cut so that prompt and answer fit into `length`.
    WHY: At one rate, clusters wait longer than Poisson arrivals do; the simulator shows how much.
    """
    draw = np.random.default_rng(config.seed)
    n = config.requests
    if config.arrivals == "at_once" or config.burstiness == 0:
        pauses = np.full(n, 0.0 if config.arrivals == "at_once" else 1 / config.rate)
    else:
        shape = 1.0 if config.arrivals == "poisson" else config.burstiness**-2
        pauses = draw.gamma(shape, 1 / (shape * config.rate), n)
    times = np.cumsum(pauses) - pauses[0]
    most = length // 2
    prompts, answers = (
        np.clip(np.rint(median * np.exp(config.spread * draw.standard_normal(n))), 1, most).astype(int)
        for median in (config.prompt_tokens, config.output_tokens)
    )
    return [
        Arrival(
            float(times[i]),
            Request(
                draw.integers(vocab_size, size=prompts[i]).tolist(),
                SamplingParams(temperature=0, max_new_tokens=int(answers[i]), seed=i),
                f"client {i % config.clients}",
            ),
        )
        for i in range(n)
    ]


def drive(engine: Engine, load: Sequence[Arrival], clock: Clock) -> list[Job]:
    """Hand in each request when it is due and step until all are done; return them in their order."""
    coming, jobs = deque(load), list[Job]()
    while coming or engine.has_work:
        while coming and coming[0].time <= clock():
            arrival = coming.popleft()
            jobs.append(engine.jobs[engine.add(arrival.request, arrival.time)])
        wake = engine.scheduler.wake_at(clock())
        if engine.has_work and wake is None:
            engine.step()
            continue
        times = [coming[0].time] if coming else []
        clock.wait_until(min(times if wake is None else [*times, wake]))
    return jobs


@dataclass(frozen=True)
class Service:
    """How a load was served; times in seconds.

    PAPER: time to first token, time per output token and goodput, [3] Sec. 1.
    PAPER CONTEXT: Tokens per second of the whole machine is what its owner sees; how long it takes until an
        answer begins, and whether it then flows, is what people see.
    INTUITION: A restaurant: covers a day, minutes to the first plate, and minutes between plates.
    IMPLEMENTATION: From the arrival of a request, though a step may have to end before it is let in, to each
        of its tokens. Goodput counts the requests, per second, that were served within both limits.
    WHY: A higher throughput can come with worse latency; only the pairs compare.
    """

    seconds: float  # from the first arrival to the last token
    tokens: int  # written
    first: np.ndarray  # time to first token of each request
    between: np.ndarray  # mean time between its tokens, of each request with two or more
    gaps: np.ndarray  # all times between two tokens
    preempted: int  # times that a text lost its memory

    @property
    def tokens_per_second(self) -> float:
        """Throughput."""
        return self.tokens / self.seconds

    def goodput(self, first: float, between: float) -> float:
        """Return the requests per second that began and flowed within these limits, in seconds."""
        flows = np.zeros(len(self.first))
        flows[: len(self.between)] = self.between  # of one token only: nothing to wait for
        return float(np.sum((self.first <= first) & (flows <= between)) / self.seconds)


def service(jobs: Sequence[Job]) -> Service:
    """Return how jobs that are done were served."""
    ordered = sorted(jobs, key=lambda job: len(job.times) < 2)  # those with one token last
    pauses = [np.diff(job.times) for job in ordered if len(job.times) > 1]
    return Service(
        max(job.times[-1] for job in jobs) - min(job.arrival for job in jobs),
        sum(len(job.times) for job in jobs),
        np.array([job.times[0] - job.arrival for job in ordered]),
        np.array([pause.mean() for pause in pauses]),
        np.concatenate(pauses) if pauses else np.array([]),
        sum(job.preempted for job in jobs),
    )
