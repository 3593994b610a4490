"""Batching policies under one load, with a real model; the engine's own share; the simulator beside them.

uv run python phase3_core_inference/project9_continuous_batching/benchmark.py
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from common.device import pick_device, pick_dtype, seed_everything
from common.files import make_folder, shown
from common.script import progress, script
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model
from phase3_core_inference.project8_sampling.config import SamplingParams
from phase3_core_inference.project9_continuous_batching.config import BenchmarkConfig, EngineConfig, Policy
from phase3_core_inference.project9_continuous_batching.engine import Engine
from phase3_core_inference.project9_continuous_batching.loads import (
    Arrival,
    RealClock,
    Service,
    drive,
    make_load,
    service,
)
from phase3_core_inference.project9_continuous_batching.request import Job, Request, Work
from phase3_core_inference.project9_continuous_batching.runner import Drawn, ModelRunner
from phase3_core_inference.project9_continuous_batching.simulator import CostModel, Sample, simulate, sizes_of

POLICIES: tuple[Policy, ...] = ("continuous", "dynamic", "static")
# What calibration lets be written: (texts, typical length of their prompts).
CALIBRATION = [(1, 1), (1, 100), (4, 16), (8, 50), (8, 200), (16, 16), (32, 4), (32, 50), (32, 200)]
SPREAD = 0.8  # of the prompts' lengths in calibration: standard deviation of the logarithm
WRITTEN = 8  # steps that calibration takes when all texts are being written


class TimedRunner(ModelRunner):
    """A runner that notes what each step computed and how long it took."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.samples: list[Sample] = []

    def run(self, work: Sequence[Work]) -> list[Drawn | None]:
        """Compute and take the time."""
        sizes, began = sizes_of(work), time.perf_counter()
        drawn = super().run(work)
        self.samples.append(Sample(sizes, time.perf_counter() - began))
        return drawn


@dataclass(frozen=True)
class Overhead:
    """Milliseconds of a step with all slots writing."""

    step: float
    model: float
    sampler: float
    engine: float  # all the rest: scheduler, bookkeeping, outputs

    @property
    def share(self) -> float:
        """What the engine takes, in parts of the model's time."""
        return self.engine / self.model


def run(config: BenchmarkConfig) -> dict[str, Service]:
    """Measure everything, print the tables, write the costs; return how each policy served."""
    device = pick_device(config.device)
    seed_everything(0)
    model, _ = load_model(config.model, pick_dtype(config.precision, device))
    if config.random:
        model.initialize()
    model.to(device)
    shape = config.engine
    kind = f"{model.count_parameters():,} parameters in {str(model.head.weight.dtype)[6:]} on {device}"
    print(f"model       {config.model}, {kind}")
    overhead = measure_overhead(model, shape, config.steady_steps)
    parts = f"model {overhead.model:.1f}, sampler {overhead.sampler:.2f}, engine {overhead.engine:.2f} ms"
    print(f"a step      {overhead.step:.1f} ms with {shape.slots} texts being written: {parts}")
    print(f"            the engine takes {overhead.share:.1%} of the model's time")
    calibration = [time_steps(model, config)]
    load = make_load(config.load, shape.length, model.config.vocab_size)
    tokens = sum(arrival.request.params.max_new_tokens for arrival in load)
    read = sum(len(arrival.request.prompt) for arrival in load)
    sizes = f"{read:,} tokens of prompts, {tokens:,} to write"
    print(f"\nload        {len(load)} requests, {config.load.arrivals}, {sizes}")
    rounds: dict[str, list[Service]] = {policy: [] for policy in POLICIES}
    for _ in progress(range(config.repeats), desc="rounds", leave=False):
        for policy in POLICIES:
            runner = ModelRunner(model, shape)
            rounds[policy].append(service(serve(runner, replace(shape, policy=policy), load)))
    calibration.append(time_steps(model, config))  # again: the machine may be slower by now
    costs = CostModel.fit(middle_samples(calibration))
    costs.save(make_folder(config.out) / "costs.json")
    found: dict[str, Service] = {policy: middle(each) for policy, each in rounds.items()}
    guesses: dict[str, Service] = {
        policy: service(simulate(load, replace(shape, policy=policy), costs)) for policy in POLICIES
    }
    print_services(found, guesses)
    print(f"medians of {config.repeats} rounds, policies in turn")
    print(f"written to {shown(config.out)}: costs.json, for simulate.py")
    return found


def serve(runner: ModelRunner, config: EngineConfig, load: Sequence[Arrival]) -> list[Job]:
    """Serve a load in real time."""
    clock = RealClock()
    return drive(Engine(runner, config, clock), load, clock)


def middle(services: Sequence[Service]) -> Service:
    """Return the one of median length."""
    return sorted(services, key=lambda each: each.seconds)[len(services) // 2]


def busy_engine(
    config: EngineConfig, prompts: Sequence[int], runner: ModelRunner, params: SamplingParams
) -> Engine:
    """Return an engine in which texts with prompts of these lengths wait to be written."""
    engine = Engine(runner, config)
    draw = np.random.default_rng(0)
    for number, tokens in enumerate(prompts):
        ids = draw.integers(runner.model.config.vocab_size, size=tokens).tolist()
        own = replace(params, max_new_tokens=config.length, seed=number)  # longer than anybody will look
        engine.add(Request(ids, own))
    return engine


def measure_overhead(model: Decoder, config: EngineConfig, steps: int) -> Overhead:
    """Time steps in which every slot writes one token: what the model, the sampler and the engine take."""
    runner = ModelRunner(model, config)
    params = SamplingParams(temperature=0.8, top_p=0.95)
    engine = busy_engine(config, [8] * config.slots, runner, params)
    while any(not job.writes for job in engine.jobs.values()):
        engine.step()
    sampler_seconds = 0.0
    sample = runner.sampler

    def timed(logits: torch.Tensor, states: Any) -> Any:
        nonlocal sampler_seconds
        began = time.perf_counter()
        found = sample(logits, states)
        sampler_seconds += time.perf_counter() - began
        return found

    runner.sampler = timed  # type: ignore[assignment]
    parts = []
    for _ in range(steps):
        before = runner.model_seconds, sampler_seconds
        began = time.perf_counter()
        engine.step()
        step = time.perf_counter() - began
        in_model, in_sampler = runner.model_seconds - before[0], sampler_seconds - before[1]
        parts.append((step, in_model, in_sampler, step - in_model - in_sampler))
    return Overhead(*(1e3 * statistics.median(part) for part in zip(*parts, strict=True)))


def time_steps(model: Decoder, config: BenchmarkConfig) -> list[Sample]:
    """Time steps of many sizes: prompts that are read, texts that are written, a small load of this kind."""
    shape, load = config.engine, config.load
    draw = np.random.default_rng(load.seed + 1)
    most = max(1, shape.length // 2 - WRITTEN)
    runner = TimedRunner(model, shape)
    shapes = [(texts, prompt) for texts, prompt in CALIBRATION if texts <= shape.slots]
    for texts, prompt in progress(shapes, desc="costs", leave=False):
        lengths = np.rint(prompt * np.exp(SPREAD * draw.standard_normal(texts)))
        prompts = np.clip(lengths, 1, most).astype(int).tolist()
        engine = busy_engine(shape, prompts, runner, SamplingParams(temperature=0))
        left = WRITTEN
        while left:
            engine.step()
            left -= all(job.writes for job in engine.jobs.values())
        runner.free(range(shape.slots))
    other = replace(load, requests=2 * shape.slots, arrivals="at_once", seed=load.seed + 1)
    for policy in ("continuous", "static"):  # texts that end one by one, rows that are computed for nothing
        serve(runner, replace(shape, policy=policy), make_load(other, shape.length, model.config.vocab_size))
        runner.free(range(shape.slots))
    return runner.samples


def middle_samples(rounds: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Return each step of rounds that took the same steps, with its median time."""
    return [
        Sample(same[0].sizes, statistics.median(sample.seconds for sample in same))
        for same in zip(*rounds, strict=True)
    ]


def print_services(found: dict[str, Service], guesses: dict[str, Service]) -> None:
    """Print what was measured, and what the simulator says."""
    print(f"{'':12}{'seconds':>9}{'tokens/s':>10}{'to static':>11}{'first p50':>11}{'gap p99':>9}"
          f"{'simulated':>12}{'off by':>8}")  # fmt: skip
    for policy, each in found.items():
        first, gap = (float(v) for v in (sorted(each.first)[len(each.first) // 2], max_gap(each)))
        guess = guesses[policy].seconds
        print(f"{policy:12}{each.seconds:9.1f}{each.tokens_per_second:10.1f}"
              f"{found['static'].seconds / each.seconds:10.2f}x{first:11.2f}{gap:9.3f}"
              f"{guess:12.1f}{guess / each.seconds - 1:+8.1%}")  # fmt: skip


def max_gap(each: Service) -> float:
    """Return the time between two tokens that one in a hundred exceeds."""
    gaps = sorted(each.gaps)
    return float(gaps[int(0.99 * (len(gaps) - 1))]) if gaps else 0.0


@script
def main() -> None:
    """Parse and measure."""
    run(BenchmarkConfig.from_cli())


if __name__ == "__main__":
    main()
