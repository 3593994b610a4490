r"""The scheduler: which tokens of which requests the next step computes.

PAPERS
  [1] Orca: A Distributed Serving System for Transformer-Based Generative Models, Yu et al., 2022 (OSDI)
  [2] SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills, Agrawal et al., 2023,
      arXiv:2308.16369
  [3] Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve, Agrawal et al., 2024,
      arXiv:2403.02310
  [4] Efficient Memory Management for Large Language Model Serving with PagedAttention, Kwon et al., 2023,
      arXiv:2309.06180
  [5] Clipper: A Low-Latency Online Prediction Serving System, Crankshaw et al., 2016, arXiv:1612.03079

SYMBOLS
  slots         sequences in the cache at once    capacity  tokens in it, of all sequences
  token_budget  tokens computed in a step
"""

import heapq

from phase3_core_inference.project9_continuous_batching.config import EngineConfig
from phase3_core_inference.project9_continuous_batching.fairness import VirtualTokenCounter
from phase3_core_inference.project9_continuous_batching.request import Job, Work


class Scheduler:
    """Decide, before each step, who computes what; no tensor and no clock is in here.

    PAPER: "continuous", [1] Sec. 3 (S1) and Algorithm 1: a decision for each iteration; the budget and its
        order, [3] Algorithm 3 (stall-free batching); chunks of prompts, [2] Sec. 4; who loses his memory, [4]
        Sec. 4.5. "dynamic", [5] Sec. 4.3.
    PAPER CONTEXT: A batch of requests used to be one unit of work: what was done waited for the longest, and
        who came too late waited for all. [1] takes the decision after each token. Then a long prompt stalls
        everybody's next token, and [2] and [3] cut it up.
    INTUITION: A bus that lets people on and off at every stop, instead of a coach that is booked as a whole;
        and big luggage comes in pieces, so that the bus is never late.
    IMPLEMENTATION: Who writes goes first, a token each. What is left of the budget reads prompts, those
        begun before new ones. `reserved` counts what all running texts have or will need for their prompts;
        when they have grown beyond the capacity, the youngest loses its memory and waits again.
        "static" and "dynamic" admit a batch when the one before is over, and compute each of its rows until
        the last is done, as a rectangle of tensors does.
    WHY: The most senior text never loses its memory, and a budget above the number of slots always has a
        token left for prompts; so all texts are finished, which a state machine tests.
    """

    def __init__(self, config: EngineConfig) -> None:
        config.validate_config()
        self.config = config
        self.waiting: list[Job] = []
        self.running: list[Job] = []  # in the order of admission; of a static batch also those that are done
        self.free_slots = list(range(config.slots))  # a heap: low numbers first keep neighbours together
        self.freed: list[int] = []  # slots whose memory is to be forgotten before the next step
        self.fairness = VirtualTokenCounter(config.prompt_weight, config.output_weight)

    @property
    def reserved(self) -> int:
        """Tokens of the cache that the running texts fill, or will fill with what is known of them."""
        return sum(job.known for job in self.running)

    @property
    def has_work(self) -> bool:
        """Whether any request is not done."""
        return bool(self.waiting) or any(not job.done for job in self.running)

    def add(self, job: Job) -> None:
        """Let a request wait."""
        self.fairness.arrive(job.request.client, {other.request.client for other in self.waiting})
        self.waiting.append(job)

    def remove(self, job: Job) -> None:
        """Forget a request, wherever it is; its slot is free."""
        if job in self.waiting:
            self.waiting.remove(job)
        else:
            self._release(job)

    def wake_at(self, now: float) -> float | None:
        """Return until when a dynamic batch waits for company, if it does."""
        if self.config.policy != "dynamic" or self.running or not self.waiting:
            return None
        if len(self.waiting) >= self.config.slots:
            return None
        due = min(job.arrival for job in self.waiting) + self.config.max_wait
        return due if due > now else None

    def plan(self, now: float) -> list[Work]:
        """Return the work of the next step: nothing, if there is none or company is waited for."""
        if self.config.policy == "continuous":
            self._release_done()
            self._make_room()
            self._overtake()
            return self._fill()
        if all(job.done for job in self.running):
            self._release_done()
            if self.wake_at(now) is None:
                while self._admit_next():
                    pass
        self._make_room()
        return [Work(job, 1, idle=True) if job.done else Work(job, job.pending) for job in self.running]

    def _fill(self) -> list[Work]:
        """Spend the budget: a token for each text being written, the rest for prompts."""
        work = [Work(job, 1) for job in self.running if job.writes]
        left = self.config.token_budget - len(work)
        reading = [job for job in self.running if not job.writes]
        while left > 0 and (job := reading.pop(0) if reading else self._admit_next()):
            tokens = min(job.pending, left) if self.config.chunked else job.pending
            work.append(Work(job, tokens))
            left -= tokens
        return work

    def _admit_next(self) -> Job | None:
        """Take the first in rank of those who wait into the cache, if there is room for its text."""
        if not self.waiting or not self.free_slots:
            return None
        job = min(self.waiting, key=self._rank)
        growth = len(self.running)  # a token for each, or it would lose its memory in the next step
        if self.running and self.reserved + job.known + growth > self.config.capacity:
            return None
        self.waiting.remove(job)
        job.slot = heapq.heappop(self.free_slots)
        self.running.append(job)
        if not job.admitted:
            self.fairness.admit(job.request.client, len(job.request.prompt))
        job.admitted = True
        return job

    def _rank(self, job: Job) -> tuple[float, int]:
        """Return what those who wait are sorted by, the first to be admitted first."""
        if self.config.order == "fair":
            return self.fairness.counters[job.request.client], job.id
        return self._seniority(job)

    def _seniority(self, job: Job) -> tuple[float, int]:
        """Return a place in an order that time does not change: waiting counts for everybody."""
        if self.config.order != "priority":
            return 0.0, job.id
        age = job.arrival / self.config.aging if self.config.aging else 0.0
        return age - job.request.priority, job.id

    def _make_room(self) -> None:
        """Let texts lose their memory, the least senior first, until what is known of the others fits."""
        if self.reserved > self.config.capacity:
            self._release_done()  # rows of a static batch that are only kept for company
        while self.reserved > self.config.capacity:
            self._preempt(max(self.running, key=self._seniority))

    def _overtake(self) -> None:
        """Let a request of higher priority have the place of the last in seniority, where none is left."""
        if self.config.order != "priority" or self.free_slots or not self.waiting:
            return
        first, last = min(self.waiting, key=self._seniority), max(self.running, key=self._seniority)
        if first.request.priority > last.request.priority and self._seniority(first) < self._seniority(last):
            self._preempt(last)

    def _preempt(self, job: Job) -> None:
        """Take a text's memory; it waits again, and will be computed again."""
        self._release(job)
        job.preempted += 1
        self.waiting.append(job)

    def _release_done(self) -> None:
        for job in [job for job in self.running if job.done]:
            self._release(job)

    def _release(self, job: Job) -> None:
        self.running.remove(job)
        heapq.heappush(self.free_slots, job.slot)
        self.freed.append(job.slot)
        job.slot, job.computed = -1, 0
