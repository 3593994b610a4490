r"""A discrete-event simulator: the engine itself, with a clock that jumps and a model that only costs time.

PAPERS
  [1] Vidur: A Large-Scale Simulation Framework For LLM Inference, Agrawal et al., 2024, arXiv:2405.05465
  [2] SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills, Agrawal et al., 2023,
      arXiv:2308.16369

SYMBOLS
  N  tokens of a step                          R  rows drawn from
  K  keys read: by a piece of a prompt, for    C  calls of attention, one for each piece and for each
     each token those up to itself; by texts      group of neighbouring texts
     that share a call, the longest one's
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from common.files import atomic_write
from phase3_core_inference.project7_kv_cache.slots import neighbours
from phase3_core_inference.project9_continuous_batching.config import EngineConfig
from phase3_core_inference.project9_continuous_batching.engine import Engine
from phase3_core_inference.project9_continuous_batching.loads import Arrival, drive
from phase3_core_inference.project9_continuous_batching.request import Job, Request, Work
from phase3_core_inference.project9_continuous_batching.runner import Drawn

KNOTS = (4, 8, 16, 32, 64, 128)  # tokens of a step at which the cost of one more changes
PASSES = 4  # of the fit: the first one does not know what to expect
# Prices that cannot be below 0; a change of one can.
NEVER_NEGATIVE = np.array([True, True, *(False for _ in KNOTS), True, True, True])


class Sizes(NamedTuple):
    """What a step computes."""

    tokens: int  # N
    rows: int  # R
    keys: int  # K
    calls: int  # C


class Sample(NamedTuple):
    """What a step computed, and how long it took."""

    sizes: Sizes
    seconds: float


@dataclass(frozen=True)
class CostModel:
    """The seconds of a step, as a function of what it computes.

    PAPER: [1] Sec. 4 predicts the time of each operator from its sizes, learned from a few measurements.
    PAPER CONTEXT: Which settings suit a load is a question of days on real machines. [1] answers it on a
        desk: schedulers are cheap to run, and only the model has to be replaced by its cost.
    INTUITION: A timetable: to plan a journey nobody has to drive the train.
    IMPLEMENTATION: A constant; a price per token that changes at KNOTS, because few tokens cost the reading
        of the weights and many the arithmetic ([2] Sec. 3); a price per row drawn from, per key read, and
        per call of attention. Least squares on errors in parts of the expected seconds, so that short steps
        count as much as long ones; in parts of the measured ones, steps that were lucky would count most.
    WHY: benchmark.py holds the simulated time of a whole load against the measured one.
    """

    seconds_at: tuple[float, ...]  # constant, tokens, tokens beyond each knot, rows, keys, calls

    @classmethod
    def fit(cls, samples: Sequence[Sample]) -> Self:
        """Return the costs of measured steps; ValueError for fewer than there are prices."""
        prices = len(NEVER_NEGATIVE)
        if len(samples) < prices:
            raise ValueError(f"samples ({len(samples)}) must be at least {prices}")
        table = np.array([_columns(sample.sizes) for sample in samples])
        scale = np.abs(table).max(axis=0).clip(1e-12)  # columns of one size keep the fit well-conditioned
        table, seconds = table / scale, np.array([sample.seconds for sample in samples])
        expected = seconds
        for _ in range(PASSES):
            costs = _prices(table / expected[:, None], seconds / expected)
            expected = (table @ costs).clip(1e-6)
        return cls(tuple((costs / scale).tolist()))

    def seconds(self, sizes: Sizes) -> float:
        """Return what a step costs; never less than a microsecond."""
        return max(1e-6, float(np.dot(self.seconds_at, _columns(sizes))))

    def save(self, path: Path) -> None:
        """Write the costs as JSON."""
        with atomic_write(path) as file:
            json.dump(asdict(self) | {"knots": KNOTS}, file, indent=1)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read costs; ValueError for a file that holds others."""
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            costs = tuple(float(cost) for cost in entries["seconds_at"])
            fits = tuple(entries["knots"]) == KNOTS and len(costs) == len(NEVER_NEGATIVE)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"costs ({path}) must be a file that benchmark.py wrote: {error}") from None
        if not fits or not np.isfinite(costs).all():
            raise ValueError(f"costs ({path}) must be {len(NEVER_NEGATIVE)} numbers for the knots {KNOTS}")
        return cls(costs)


def _prices(table: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Solve table @ prices = goal as well as can be, with no price below 0 that must not be."""
    used = np.ones(table.shape[1], bool)
    while True:
        prices = np.zeros(len(used))
        prices[used] = np.linalg.lstsq(table[:, used], goal, rcond=1e-10)[0]
        if not (wrong := used & NEVER_NEGATIVE & (prices < 0)).any():
            return prices
        used[np.argmin(np.where(wrong, prices, 0))] = False  # noise: nothing gives time back


def _columns(sizes: Sizes) -> list[float]:
    tokens = sizes.tokens
    return [1.0, tokens, *(max(0, tokens - knot) for knot in KNOTS), sizes.rows, sizes.keys, sizes.calls]


def sizes_of(work: Sequence[Work]) -> Sizes:
    """Return what a step computes."""
    pieces = [(item.job.computed, item.tokens) for item in work if item.tokens > 1]
    ends = {item.job.slot: item.job.computed + (not item.idle) for item in work if item.tokens == 1}
    runs = neighbours(ends)
    keys = sum(before * new + new * (new + 1) // 2 for before, new in pieces)
    keys += sum((run[-1] - run[0] + 1) * max(ends[slot] for slot in run) for run in runs)
    tokens, rows = sum(item.tokens for item in work), sum(item.draws for item in work)
    return Sizes(tokens, rows, keys, len(pieces) + len(runs))


class VirtualClock:
    """Time that passes only when it is told to.

    PAPER: none; the clock of every discrete-event simulation.
    PAPER CONTEXT: An hour of load would take an hour, most of it waiting for the next request.
    INTUITION: A film, of which only the cuts are shown.
    IMPLEMENTATION: A number that never falls.
    WHY: Minutes of load take a second, and the same load takes the same steps each time.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def wait_until(self, then: float) -> None:
        """Jump there."""
        self.now = max(self.now, then)


@dataclass
class Counted:
    """The state of a text that is only counted."""

    most: int
    output: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str = ""


class SimulatedRunner:
    """Let the clock jump by what a step would cost, and write zeros.

    PAPER: [1] Sec. 4, at the level of whole steps.
    PAPER CONTEXT: A simulator with a scheduler of its own answers questions about that one.
    INTUITION: The real conductor with an orchestra that only counts bars.
    IMPLEMENTATION: Each text has as many tokens as its request may have: loads are made so.
    WHY: Engine and scheduler are the very classes that serve, so what is simulated is what would happen.
    """

    def __init__(self, costs: CostModel, clock: VirtualClock, length: int) -> None:
        self.costs, self.clock, self.length = costs, clock, length

    def begin(self, request: Request) -> Counted:
        """Return the state of a request; ValueError for one that is longer than the cache's sequences."""
        if not 1 <= len(request.prompt) <= self.length:
            raise ValueError(f"prompt ({len(request.prompt)} tokens) must have 1 to {self.length} tokens")
        return Counted(min(request.params.max_new_tokens, self.length - len(request.prompt) + 1))

    def run(self, work: Sequence[Work]) -> list[Drawn | None]:
        """Let time pass, and write one token for each row that is due."""
        self.clock.wait_until(self.clock() + self.costs.seconds(sizes_of(work)))
        drawn: list[Drawn | None] = [None] * len(work)
        for number, item in enumerate(work):
            if item.draws:  # no longer, once there is one more token
                drawn[number] = Drawn(0, "")
                state: Any = item.job.state  # a Counted, as begin() makes them
                state.output.append(0)
                if len(state.output) >= state.most:
                    state.finish_reason = "length"
        return drawn

    def free(self, slots: Sequence[int]) -> None:
        """Forget nothing, for nothing is remembered."""


def simulate(load: Sequence[Arrival], config: EngineConfig, costs: CostModel) -> list[Job]:
    """Return the requests of a load, with the times at which their tokens would come."""
    clock = VirtualClock()
    return drive(Engine(SimulatedRunner(costs, clock, config.length), config, clock), load, clock)
