"""Checks of the scheduler and of fairness: no model, no clock. --interactive draws a plan."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.script import ask, run_validation
from phase3_core_inference.project8_sampling.config import SamplingParams
from phase3_core_inference.project9_continuous_batching.config import EngineConfig
from phase3_core_inference.project9_continuous_batching.engine import Engine
from phase3_core_inference.project9_continuous_batching.fairness import VirtualTokenCounter
from phase3_core_inference.project9_continuous_batching.request import Job, Request
from phase3_core_inference.project9_continuous_batching.simulator import (
    CostModel,
    SimulatedRunner,
    VirtualClock,
)

SECOND = CostModel((1.0, *(0,) * 10))  # a step costs a second, whatever is in it


def engine(**changes: object) -> Engine:
    """An engine whose steps take a second and whose tokens are only counted."""
    shape = {"slots": 4, "length": 64, "token_budget": 12, "max_wait": 2.0}
    config, clock = EngineConfig(**shape | changes), VirtualClock()
    return Engine(SimulatedRunner(SECOND, clock, config.length), config, clock)


def ask_for(prompt: int, output: int, client: str = "", priority: int = 0) -> Request:
    return Request([0] * prompt, SamplingParams(max_new_tokens=output), client, priority)


def plan(serving: Engine) -> list[tuple[int, int]]:
    """Return (request, tokens) of the next step, and take it."""
    planned: list[tuple[int, int]] = []
    run = serving.runner.run

    def noted(work):
        planned.extend((item.job.id, item.tokens) for item in work)
        return run(work)

    serving.runner.run = noted
    serving.step()
    serving.runner.run = run
    return planned


def test_a_worked_example_of_chunked_prefill():
    serving = engine()
    serving.add(ask_for(5, 3))
    serving.add(ask_for(20, 2))
    assert plan(serving) == [(0, 5), (1, 7)]  # the first prompt, and what is left of 12 for the second
    serving.add(ask_for(3, 1))
    assert plan(serving) == [(0, 1), (1, 11)]  # who writes goes first
    assert plan(serving) == [(0, 1), (1, 2), (2, 3)]  # and who was begun before who was not
    assert plan(serving) == [(1, 1)]
    assert not serving.has_work


def test_without_chunks_a_prompt_is_computed_as_a_whole_and_all_wait_for_it():
    serving = engine(chunked=False)
    serving.add(ask_for(5, 3))
    serving.add(ask_for(20, 2))
    assert plan(serving) == [(0, 5), (1, 20)]
    assert plan(serving) == [(0, 1), (1, 1)]


def test_a_static_batch_is_computed_until_its_longest_row_is_done():
    serving = engine(policy="static", slots=2, token_budget=3)
    for output in (1, 4, 2):
        serving.add(ask_for(3, output))
    plans = []
    while serving.has_work:
        plans.append(plan(serving))
    assert plans[0] == [(0, 3), (1, 3)]
    assert plans[1:4] == [[(0, 1), (1, 1)]] * 3  # row 0 was done after the first step
    assert plans[4:] == [[(2, 3)], [(2, 1)]]


def test_a_dynamic_batch_waits_for_company_but_not_for_ever():
    serving = engine(policy="dynamic", slots=2, token_budget=3)
    serving.add(ask_for(3, 2))
    assert serving.step() == []
    assert serving.scheduler.wake_at(serving.clock()) == 2.0
    serving.add(ask_for(3, 2))
    assert plan(serving) == [(0, 3), (1, 3)]  # full
    while serving.has_work:
        serving.step()
    begin = serving.clock()
    serving.add(ask_for(3, 2))
    assert serving.step() == []
    serving.clock.wait_until(begin + 2)
    assert plan(serving) == [(2, 3)]  # waited long enough


def test_the_youngest_loses_its_memory_and_is_computed_again():
    serving = engine(slots=2, length=10, cache_tokens=12, token_budget=20)
    jobs = [serving.jobs[serving.add(ask_for(4, 6))] for _ in range(2)]
    plans = []
    while serving.has_work:
        plans.append(plan(serving))
    assert [job.preempted for job in jobs] == [0, 1]
    assert plans[:3] == [[(0, 4), (1, 4)], [(0, 1), (1, 1)], [(0, 1), (1, 1)]]  # 7 and 7 are known: over 12
    assert plans[3:6] == [[(0, 1)]] * 3  # the older one goes on alone
    assert plans[6] == [(1, 7)]  # prompt and what it had written, in one go
    assert [len(job.state.output) for job in jobs] == [6, 6]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(0, 3)), min_size=1, max_size=25),
    st.sampled_from(["fcfs", "priority", "fair"]),
    st.sampled_from(["continuous", "dynamic", "static"]),
    st.booleans(),
    st.integers(64, 150),
)
def test_whatever_comes_all_are_served_in_the_end(requests, order, policy, chunked, cache_tokens):
    serving = engine(order=order, policy=policy, chunked=chunked, cache_tokens=cache_tokens)
    for prompt, output, who in requests:
        serving.add(ask_for(prompt, output, f"client {who}", who))
    for _ in range(3000):
        if not serving.has_work:
            break
        serving.step()
        serving.clock.wait_until(serving.clock() + 0.1)
        assert serving.scheduler.reserved - len(serving.scheduler.running) <= cache_tokens
    assert not serving.has_work


def test_a_long_prompt_does_not_starve_behind_a_stream_of_short_ones():
    serving = engine()
    long = serving.jobs[serving.add(ask_for(60, 1))]
    for _ in range(60):
        serving.add(ask_for(1, 3))
        serving.step()
        if long.done:
            break
    assert long.done


# Fairness


def served(order: str) -> dict[str, int]:
    """A flood of requests from one client, and a few from another: tokens of each after 60 steps."""
    serving = engine(order=order)
    jobs = [serving.jobs[serving.add(ask_for(4, 8, "flood"))] for _ in range(100)]
    jobs += [serving.jobs[serving.add(ask_for(4, 8, "drop"))] for _ in range(40)]
    for _ in range(60):
        serving.step()
    return {
        who: sum(len(job.state.output) for job in jobs if job.request.client == who)
        for who in ("flood", "drop")
    }


def test_first_come_first_served_lets_a_flood_shut_others_out_and_fairness_does_not():
    first_come, fair = served("fcfs"), served("fair")
    assert first_come["drop"] == 0
    # service differs by at most what one client has in its slots at once: 4 requests of 4 + 2 * 8
    assert abs(fair["flood"] - fair["drop"]) <= 4 * 8
    assert sum(fair.values()) == sum(first_come.values())  # and nothing is wasted for it


def test_the_counter_charges_prompts_and_answers_and_gives_no_credit_for_absence():
    counter = VirtualTokenCounter(prompt_weight=1, output_weight=2)
    counter.arrive("a", [])
    counter.admit("a", 10)
    counter.write("a", 5)
    assert counter.counters == {"a": 20}
    counter.arrive("b", [])  # nobody waits: lifted to who left last
    assert counter.counters["b"] == 20
    counter.admit("b", 3)
    counter.arrive("c", ["a", "b"])  # lifted to the least of those who wait
    assert counter.counters["c"] == 20
    counter.arrive("c", ["a", "b", "c"])  # already there: not lifted again
    counter.write("a", 50)
    counter.arrive("c", ["a", "b", "c"])
    assert counter.counters["c"] == 20


def test_a_text_that_is_computed_again_is_not_charged_again():
    serving = engine(order="fair", slots=2, length=10, cache_tokens=12, token_budget=20)
    jobs = [serving.jobs[serving.add(ask_for(4, 6, who))] for who in ("a", "b")]
    while serving.has_work:
        serving.step()
    assert sum(job.preempted for job in jobs) == 1
    assert serving.scheduler.fairness.counters == {"a": 4 + 2 * 6, "b": 4 + 2 * 6}


def test_jobs_have_one_rule_for_prompts_texts_and_what_was_lost():
    state = SimulatedRunner(SECOND, VirtualClock(), 64).begin(ask_for(5, 9))
    job = Job(0, Request([10, 11, 12, 13, 14]), state, 0.0)
    assert (job.pending, job.writes) == (5, False)
    assert job.next_tokens(3) == [10, 11, 12]
    job.computed = 3
    assert job.next_tokens(2) == [13, 14]
    state.output += [20, 21]
    job.computed = 6
    assert (job.pending, job.writes, job.next_tokens(1)) == (1, True, [21])
    job.computed = 0  # it lost its memory
    assert (job.pending, job.next_tokens(7)) == (7, [10, 11, 12, 13, 14, 20, 21])
    job.computed = 4
    assert job.next_tokens(2) == [14, 20]


def test_a_budget_that_would_starve_prompts_is_refused():
    with pytest.raises(
        ValueError, match=r"token_budget \(4\) must be above slots \(4\), or prompts may starve"
    ):
        engine(token_budget=4)


def interact() -> None:
    """Draw who computes what, step by step, for requests typed as PROMPT,OUTPUT PROMPT,OUTPUT ..."""
    for line in ask("prompt,output ...> "):
        serving = engine()
        for pair in line.split():
            prompt, output = (int(number) for number in pair.split(","))
            serving.add(ask_for(prompt, output))
        while serving.has_work:
            row = dict(plan(serving))
            print(" ".join(f"{row.get(id, '.'):>3}" for id in range(serving.count)))


if __name__ == "__main__":
    run_validation(__file__, interact)
