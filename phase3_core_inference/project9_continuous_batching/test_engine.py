"""Checks of the engine. --interactive serves the prompts that you type, divided by |, with SmolLM2."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from common.script import run_validation
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project8_sampling.config import SamplingParams
from phase3_core_inference.project9_continuous_batching.config import EngineConfig
from phase3_core_inference.project9_continuous_batching.conftest import LENGTH, Alone, V, make_request
from phase3_core_inference.project9_continuous_batching.engine import Engine
from phase3_core_inference.project9_continuous_batching.request import Request

SHAPE = {"slots": 3, "length": LENGTH, "token_budget": 7, "max_wait": 0.0}


def engine(model: Decoder, tokenizer: BPETokenizer | None = None, **changes: object) -> Engine:
    return Engine.of(model, EngineConfig(**SHAPE | changes), tokenizer)


def results(engine: Engine, requests: list[Request]) -> list[list[int]]:
    return [job.state.output for job in engine.run(requests)]


MIXED = [make_request(seed, 1 + 5 * seed % 17, 1 + 7 * seed % 11) for seed in range(12)]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("policy", ["continuous", "dynamic", "static"])
def test_every_request_gets_what_it_gets_alone(policy: str, chunked: bool, model: Decoder, alone: Alone):
    assert results(engine(model, policy=policy, chunked=chunked), MIXED) == [alone(r) for r in MIXED]


@pytest.mark.parametrize("order", ["fcfs", "priority", "fair"])
def test_where_the_cache_is_full_texts_lose_their_memory_and_still_end_right(order, model, alone):
    full = engine(model, order=order, cache_tokens=LENGTH + 6, slots=5, token_budget=6)
    requests = [make_request(i, 1 + i % 4, 19, f"client {i % 2}", i % 3) for i in range(8)]
    jobs = full.run(requests)
    assert [job.state.output for job in jobs] == [alone(r) for r in requests]
    assert sum(job.preempted for job in jobs) > 0


class AnyOrder(RuleBasedStateMachine):
    """Requests come, go, and are computed in whatever order hypothesis thinks of."""

    model: Decoder
    alone: Alone

    def __init__(self) -> None:
        super().__init__()
        self.engine = engine(self.model, cache_tokens=LENGTH + 9, order="priority", aging=0.05)
        self.asked: dict[int, Request] = {}
        self.written: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}

    @rule(
        seed=st.integers(0, 5),
        prompt=st.integers(1, LENGTH),
        output=st.integers(1, 9),
        priority=st.integers(0, 2),
    )
    def add(self, seed: int, prompt: int, output: int, priority: int) -> None:
        request = make_request(seed, prompt, output, priority=priority)
        id = self.engine.add(request)
        self.asked[id], self.written[id] = request, []

    @rule(steps=st.integers(1, 5))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for output in self.engine.step():
                self.written[output.id].append(output.token)
                if output.finish_reason:
                    self.reasons[output.id] = output.finish_reason

    @precondition(lambda self: self.engine.jobs)
    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        id = sorted(self.engine.jobs)[which % len(self.engine.jobs)]
        assert self.engine.cancel(id)
        assert not self.engine.cancel(id)
        whole = self.alone(self.asked.pop(id))
        assert whole[: len(self.written[id])] == self.written[id]  # as far as it came

    @invariant()
    def memory_is_accounted_for(self) -> None:
        scheduler, cache = self.engine.scheduler, self.engine.runner.cache
        used = {job.slot: job.computed for job in scheduler.running}
        assert sorted([*used, *scheduler.free_slots]) == list(range(3))
        for slot, computed in used.items():
            if slot not in scheduler.freed:
                assert cache.length(slot) == computed
        assert sum(used.values()) <= scheduler.config.capacity

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.engine.has_work:
                break
            self.step(1)
        assert not self.engine.has_work  # nobody starves
        for id, request in self.asked.items():
            assert self.written[id] == self.alone(request)
            assert self.reasons[id] in ("stop", "length")


def test_in_any_order_of_adding_stepping_and_cancelling_each_text_is_its_own(model: Decoder, alone: Alone):
    machine = type("Machine", (AnyOrder,), {"model": model, "alone": alone})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=50, stateful_step_count=20, deadline=None)
    )


def test_the_budget_is_never_exceeded_and_every_writer_gets_a_token_each_step(model: Decoder):
    busy = engine(model)
    for request in MIXED:
        busy.add(request)
    while busy.has_work:
        writers = {job.id for job in busy.scheduler.running if job.writes and not job.done}
        before = busy.tokens
        outputs = {output.id for output in busy.step()}
        assert writers <= outputs
        assert busy.tokens - before <= 7


def test_a_request_that_comes_later_need_not_wait_for_those_before(model: Decoder):
    long, short = make_request(1, 2, 20), make_request(4, 2, 2)
    steps = {}
    for policy in ("continuous", "static"):
        serving = engine(model, policy=policy)
        serving.add(long)
        serving.step()
        last = serving.add(short)
        while last in serving.jobs:
            serving.step()
        steps[policy] = serving.steps
    assert steps["continuous"] == 3  # the one it missed, and one for each of its tokens
    assert steps["static"] > 20


def test_a_high_priority_takes_the_place_of_a_low_one_which_goes_on_later(model: Decoder, alone: Alone):
    serving = engine(model, slots=1, order="priority", aging=0)
    low, high = make_request(1, 3, 12, priority=0), make_request(2, 3, 4, priority=5)
    first = serving.jobs[serving.add(low)]
    for _ in range(5):
        serving.step()
    second = serving.jobs[serving.add(high)]
    while not second.done:
        serving.step()
    assert first.preempted == 1
    assert not first.done
    while not first.done:
        serving.step()
    assert (first.state.output, second.state.output) == (alone(low), alone(high))


def test_waiting_counts_as_priority_so_that_nobody_waits_for_ever(model: Decoder):
    serving = engine(model, slots=1, order="priority", aging=1.0)
    now = 0.0
    serving.clock = lambda: now
    low = serving.jobs[serving.add(make_request(1, 1, 1))]
    for _ in range(40):  # there is always somebody of priority 5
        serving.add(make_request(2, 1, 1, priority=5))
        serving.step()
        now += 0.5
        if low.done:
            break
    assert low.done
    assert now > 5  # seconds, as many as steps of priority


def test_what_cannot_be_served_is_refused_in_a_sentence_and_nobody_notices(model: Decoder, alone: Alone):
    serving = engine(model)
    good = serving.add(MIXED[4])
    for request, sentence in [
        (Request([]), r"prompt \(0 tokens\) must have 1 to 24 tokens"),
        (Request([1] * 25), r"prompt \(25 tokens\) must have 1 to 24 tokens"),
        (Request([V]), rf"prompt \(token {V}\) must be of ids from 0 to 30"),
        (Request([-1]), r"prompt \(token -1\) must be"),
        (Request(["a"]), r"prompt \(token a\) must be"),
        (Request([1], SamplingParams(temperature=-1)), r"temperature \(-1\) must be at least 0"),
        (Request([1], SamplingParams(stop=["x"])), r"vocabulary \(None\) must be given"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            serving.add(request)
    job = serving.jobs[good]
    while serving.has_work:
        serving.step()
    assert job.state.output == alone(MIXED[4])


def test_a_request_that_goes_wrong_ends_with_a_sentence_and_its_neighbours_go_on(
    model: Decoder, alone: Alone
):
    forbidden = SamplingParams(logit_bias=dict.fromkeys(range(V), float("-inf")))
    serving = engine(model)
    good = serving.jobs[serving.add(MIXED[4])]
    bad = serving.add(Request([1, 2], forbidden))
    outputs = []
    while serving.has_work:
        outputs += serving.step()
    (failed,) = (output for output in outputs if output.id == bad)
    assert failed.finish_reason == "error"
    assert "must leave a token to choose" in failed.error
    assert good.state.output == alone(MIXED[4])
    assert [serving.runner.cache.length(slot) for slot in range(3)].count(0) >= 1


def test_cancelling_gives_memory_back_at_once(model: Decoder):
    serving = engine(model)
    ids = [serving.add(make_request(seed, 6, 9)) for seed in (1, 2, 4, 5)]
    for _ in range(4):
        serving.step()
    waiting = ids[3]
    assert serving.jobs[waiting].slot == -1  # there are three slots
    serving.cancel(ids[0])
    serving.step()
    assert serving.jobs[waiting].slot >= 0


def test_a_stream_is_the_text_as_it_comes_and_closing_it_cancels(tokenizer: BPETokenizer):
    torch.manual_seed(0)
    small = Decoder(DecoderConfig(vocab_size=300, block_size=LENGTH, n_layer=1, n_head=2, n_embd=16))
    serving = engine(small, tokenizer)
    request = Request(tokenizer.encode("hello"), SamplingParams(max_new_tokens=12, seed=1))
    whole = serving.run([request])[0]
    streamed = list(serving.stream(request))
    assert "".join(output.text for output in streamed) == whole.state.text
    assert [output.token for output in streamed] == whole.state.output
    assert [output.finish_reason for output in streamed] == [None] * 11 + ["length"]
    begun = serving.stream(request)
    next(begun)
    begun.close()
    assert not serving.has_work


def test_a_text_ends_where_the_cache_does(model: Decoder):
    job = engine(model).run([Request([1] * LENGTH, SamplingParams(max_new_tokens=9, seed=1))])[0]
    assert len(job.state.output) == 1  # the token behind the last one that fits
    assert job.state.finish_reason == "length"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"token_budget": 3}, r"token_budget \(3\) must be above slots \(3\), or prompts may starve"),
        ({"cache_tokens": 23}, r"cache_tokens \(23\) must be at least length \(24\)"),
        ({"slots": 0}, r"slots \(0\) must be at least 1"),
    ],
)
def test_an_engine_in_which_somebody_could_wait_for_ever_is_refused(changes, sentence, model):
    with pytest.raises(ValueError, match=sentence):
        engine(model, **changes)


def interact() -> None:
    """Serve what is typed."""
    from phase3_core_inference.project9_continuous_batching.config import GenerateConfig
    from phase3_core_inference.project9_continuous_batching.generate import run

    run(GenerateConfig(interactive=True))


if __name__ == "__main__":
    run_validation(__file__, interact)
