"""Checks of loads and simulator: what is simulated is what the engine does, with other seconds."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from common.script import run_validation
from phase3_core_inference.project8_sampling.config import SamplingParams
from phase3_core_inference.project9_continuous_batching.config import EngineConfig, LoadConfig
from phase3_core_inference.project9_continuous_batching.conftest import LENGTH, V
from phase3_core_inference.project9_continuous_batching.engine import Engine
from phase3_core_inference.project9_continuous_batching.loads import Arrival, drive, make_load, service
from phase3_core_inference.project9_continuous_batching.request import Request
from phase3_core_inference.project9_continuous_batching.runner import ModelRunner
from phase3_core_inference.project9_continuous_batching.simulator import (
    KNOTS,
    CostModel,
    Sample,
    SimulatedRunner,
    Sizes,
    VirtualClock,
    simulate,
    sizes_of,
)

COSTS = CostModel((0.01, 0.001, 0.0004, 0.0005, -0.0002, 0.0001, 0.0003, -0.0001, 0.002, 1e-6, 0.003))
SHAPE = EngineConfig(slots=3, length=LENGTH, token_budget=9)


class Timed:
    """A real runner whose steps take what the cost model says: the one thing that a test can control."""

    def __init__(self, inner: ModelRunner, clock: VirtualClock) -> None:
        self.inner, self.clock = inner, clock
        self.begin, self.free = inner.begin, inner.free

    def run(self, work):
        sizes = sizes_of(work)
        drawn = self.inner.run(work)
        self.clock.wait_until(self.clock() + COSTS.seconds(sizes))
        return drawn


@pytest.mark.parametrize("policy", ["continuous", "dynamic", "static"])
@pytest.mark.parametrize("cache_tokens", [0, LENGTH + 4])
def test_the_simulated_engine_does_what_the_real_one_does_token_by_token(policy, cache_tokens, model):
    config = replace(SHAPE, policy=policy, cache_tokens=cache_tokens)
    load = make_load(LoadConfig(requests=14, rate=20, prompt_tokens=5, output_tokens=5), LENGTH, V)
    clock = VirtualClock()
    real = drive(Engine(Timed(ModelRunner(model, config), clock), config, clock), load, clock)
    simulated = simulate(load, config, COSTS)
    assert [job.times for job in simulated] == [job.times for job in real]
    assert [job.preempted for job in simulated] == [job.preempted for job in real]


def noisy_samples(noise: float) -> list[Sample]:
    """Return 400 steps of random sizes, whose seconds are off by a random factor of mean 1."""
    draw = np.random.default_rng(0)
    samples = []
    for _ in range(400):
        tokens = int(draw.integers(1, 300))
        rows, keys = int(draw.integers(0, min(tokens, 32) + 1)), int(tokens * draw.integers(1, 500))
        sizes = Sizes(tokens, rows, keys, int(draw.integers(1, 20)))
        factor = math.exp(noise * draw.standard_normal() - noise**2 / 2)
        samples.append(Sample(sizes, COSTS.seconds(sizes) * factor))
    return samples


def test_costs_are_found_again_from_samples_of_them():
    found = CostModel.fit(noisy_samples(0))
    assert found.seconds_at == pytest.approx(COSTS.seconds_at, rel=1e-6)
    with pytest.raises(ValueError, match=r"samples \(3\) must be at least 11"):
        CostModel.fit(noisy_samples(0)[:3])


def test_noise_makes_steps_neither_cheap_nor_dear():
    samples = noisy_samples(0.3)
    found = CostModel.fit(samples)
    expected, measured = sum(found.seconds(s.sizes) for s in samples), sum(s.seconds for s in samples)
    assert expected == pytest.approx(measured, rel=0.02)  # after one pass 15% less


def test_sizes_of_a_step_count_each_key_that_is_read():
    seen = []
    clock = VirtualClock()

    class Looking(SimulatedRunner):
        def run(self, work):
            seen.append(sizes_of(work))
            return super().run(work)

    engine = Engine(Looking(COSTS, clock, LENGTH), replace(SHAPE, token_budget=4), clock)
    engine.run([Request([0] * 6, SamplingParams(max_new_tokens=2))])
    assert seen == [(4, 0, 1 + 2 + 3 + 4, 1), (2, 1, 5 + 6, 1), (1, 1, 7, 1)]


def test_costs_survive_being_written_and_read(tmp_path):
    COSTS.save(tmp_path / "costs.json")
    assert CostModel.load(tmp_path / "costs.json") == COSTS


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"seconds_at": [1, 2], "knots": [4, 8, 16, 32, 64, 128]}',
        '{"seconds_at": "ab", "knots": 3}',
        json.dumps({"seconds_at": [float("nan")] * 11, "knots": KNOTS}),
    ],
)
def test_a_file_of_other_costs_is_refused(content, tmp_path):
    (tmp_path / "costs.json").write_text(content)
    with pytest.raises(ValueError, match=r"costs \(.*costs.json\) must be"):
        CostModel.load(tmp_path / "costs.json")


# Loads


def test_arrivals_have_the_rate_and_the_variation_that_were_asked_for():
    for arrivals, variation in (("poisson", 1.0), ("bursty", 3.0)):
        config = LoadConfig(requests=20_000, arrivals=arrivals, rate=5.0, prompt_tokens=1, output_tokens=1)
        pauses = np.diff([arrival.time for arrival in make_load(config, LENGTH, V)])
        off = variation / math.sqrt(len(pauses))  # standard error of the mean, in means
        assert abs(pauses.mean() * 5.0 - 1) < 4 * off
        assert pauses.std() / pauses.mean() == pytest.approx(variation, rel=0.1)


def test_lengths_have_their_medians_and_always_fit():
    load = make_load(LoadConfig(requests=5000, prompt_tokens=40, output_tokens=20), 512, V)
    prompts = np.array([len(arrival.request.prompt) for arrival in load])
    answers = np.array([arrival.request.params.max_new_tokens for arrival in load])
    assert abs(np.median(prompts) - 40) < 3
    assert abs(np.median(answers) - 20) < 2
    assert prompts.max() == answers.max() == 256  # cut: half the length each
    assert prompts.min() >= 1
    assert all(0 <= token < V for arrival in load[:50] for token in arrival.request.prompt)


def test_a_load_is_a_function_of_its_settings():
    config = LoadConfig(requests=5, clients=2)
    assert make_load(config, 64, V) == make_load(config, 64, V)
    assert [arrival.request.client for arrival in make_load(config, 64, V)] == [
        f"client {i % 2}" for i in range(5)
    ]


def test_a_worked_example_of_latencies():
    second = CostModel((1.0, *(0,) * 10))
    load = [
        Arrival(time, Request([0] * 4, SamplingParams(max_new_tokens=output)))
        for time, output in ((0.0, 3), (0.5, 1), (9.0, 2))
    ]
    found = service(simulate(load, EngineConfig(slots=3, length=LENGTH, token_budget=9), second))
    # tokens come at 1, 2, 3; at 2; and, after a pause, at 10, 11
    assert found.seconds == 11
    assert found.tokens == 6
    assert found.first.tolist() == [1.0, 1.0, 1.5]  # who has one token comes last
    assert found.between.tolist() == [1.0, 1.0]
    assert found.tokens_per_second == pytest.approx(6 / 11)
    assert found.goodput(first=1.2, between=1.0) == pytest.approx(2 / 11)
    assert found.goodput(first=2.0, between=0.5) == pytest.approx(1 / 11)


def test_at_one_rate_clusters_wait_longer_than_poisson_arrivals():
    waits = {}
    for arrivals in ("poisson", "bursty"):
        load = make_load(LoadConfig(requests=300, arrivals=arrivals, rate=2.0, spread=0.5), 512, V)
        waits[arrivals] = service(simulate(load, EngineConfig(slots=8, length=512), COSTS)).first.mean()
    assert waits["bursty"] > 1.5 * waits["poisson"]


if __name__ == "__main__":
    run_validation(__file__)
