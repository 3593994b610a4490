"""Checks of the sampler: odds, draws, penalties, batch mates. --interactive draws from odds that you type."""

import collections
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from common.script import ask, run_validation
from phase3_core_inference.project8_sampling.config import SamplingParams
from phase3_core_inference.project8_sampling.randomness import (
    GOLDEN,
    gumbel_max,
    gumbel_noise,
    inverse_draw,
    mix,
    uniform,
    uniforms,
)
from phase3_core_inference.project8_sampling.sampler import Sampler
from phase3_core_inference.project8_sampling.state import RequestState
from phase3_core_inference.project8_sampling.truncation import warp

V = 1000
STOP = 3


def random_settings(draw: random.Random) -> dict:
    """Settings such as a stranger might send."""
    kinds = {
        "temperature": lambda: draw.choice([0.0, 0.5, 0.8, 1.0, 1.5]),
        "top_k": lambda: draw.choice([1, 20, 64, 300, 5000]),
        "top_p": lambda: draw.uniform(0.1, 0.999),
        "min_p": lambda: draw.uniform(0.001, 0.3),
        "typical_p": lambda: draw.uniform(0.1, 0.99),
        "epsilon": lambda: 10 ** draw.uniform(-4, -1),
        "eta": lambda: 10 ** draw.uniform(-4, -1),
        "top_n_sigma": lambda: draw.uniform(0.5, 3),
        "repetition_penalty": lambda: draw.uniform(0.8, 1.5),
        "presence_penalty": lambda: draw.uniform(-1, 1),
        "frequency_penalty": lambda: draw.uniform(-1, 1),
        "no_repeat_ngram": lambda: draw.choice([1, 2, 3]),
        "logit_bias": lambda: {draw.randrange(V): draw.choice([-math.inf, -2.0, 3.0]) for _ in range(5)},
        "watermark": lambda: draw.uniform(0.5, 4),
        "min_new_tokens": lambda: draw.randrange(10),
        "logprobs": lambda: draw.randrange(4),
    }
    return {name: make() for name, make in kinds.items() if draw.random() < 0.25}


def requests(number: int, seed: int = 0) -> list[RequestState]:
    draw = random.Random(seed)
    found = []
    for i in range(number):
        settings = random_settings(draw)
        if draw.random() < 0.15:
            settings = {"mirostat": draw.choice([1, 2]), "mirostat_tau": draw.uniform(2, 6)}
        prompt = [draw.randrange(V) for _ in range(draw.randrange(30))]
        found.append(RequestState(SamplingParams(**settings, seed=i), prompt, stop_tokens=[STOP]))
    return found


def random_logits(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, V, generator=generator)).to(dtype)


# The odds


def processed_by_transformers(logits: Tensor, state: RequestState) -> Tensor:
    """Return one row of logits after transformers' processors for the penalties of a request."""
    import transformers.generation.logits_process as hf

    params, ids = state.params, torch.tensor([state.prompt + state.output])
    made = hf.LogitsProcessorList()
    if params.logit_bias:
        made.append(hf.SequenceBiasLogitsProcessor([[[i], bias] for i, bias in params.logit_bias.items()]))
    if params.repetition_penalty != 1:
        made.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.no_repeat_ngram:
        made.append(hf.NoRepeatNGramLogitsProcessor(params.no_repeat_ngram))
    if params.min_new_tokens:
        made.append(hf.MinNewTokensLengthLogitsProcessor(len(state.prompt), params.min_new_tokens, STOP))
    return made(ids, logits[None])[0]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"no_repeat_ngram": 1},
        {"no_repeat_ngram": 2},
        {"no_repeat_ngram": 3},
        {"logit_bias": {5: 4.0, 9: -2.5}},
        {"min_new_tokens": 40},
        {
            "logit_bias": {5: 4.0, 9: -2.5},
            "repetition_penalty": 1.2,
            "no_repeat_ngram": 2,
            "min_new_tokens": 50,
        },
    ],
)
def test_penalties_are_those_of_transformers(settings: dict, seed: int):
    draw = random.Random(seed)
    prompt = [draw.randrange(12) for _ in range(20)]  # few tokens, so that n-grams come back
    state = RequestState(SamplingParams(**settings), prompt, stop_tokens=[STOP])
    for _ in range(draw.randrange(30)):
        state.append(draw.choice([token for token in range(12) if token != STOP]))
    logits = random_logits(1, seed)
    theirs = processed_by_transformers(logits[0].double(), state).softmax(0)
    torch.testing.assert_close(Sampler().odds(logits, [state])[0].double(), theirs, atol=1e-6, rtol=1e-5)


def test_presence_counts_once_and_frequency_each_time_and_neither_the_prompt():
    state = RequestState(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), [7, 7, 8])
    for token in (8, 9, 9, 9):
        state.append(token)
    logits = random_logits(1)
    expected = logits.clone()
    expected[0, 8] -= 0.75
    expected[0, 9] -= 0.5 + 3 * 0.25
    torch.testing.assert_close(Sampler().odds(logits, [state]), expected.softmax(1))


@pytest.mark.parametrize("seed", range(8))
def test_odds_of_a_mixed_batch_are_those_of_the_plain_way(seed: int):
    states, logits = requests(24, seed), random_logits(24, seed)
    odds = Sampler().odds(logits, states)
    for row, state in enumerate(states):
        params = state.params
        if params.mirostat or params.watermark:
            continue
        plain = processed_by_transformers(logits[row].double(), state)
        assert odds[row].sum() == pytest.approx(1, abs=1e-5)
        if params.temperature == 0:
            assert odds[row].argmax() == plain.argmax()
            continue
        rules = ("temperature", "top_n_sigma", "top_k", "top_p", "min_p", "typical_p", "epsilon", "eta")
        plain = warp(plain[None], **{name: getattr(params, name) for name in rules}).softmax(1)[0]
        if ((odds[row] > 0) != (plain > 0)).sum() == 0:  # the edge of a cut may lie within rounding
            torch.testing.assert_close(odds[row].double(), plain, atol=2e-6, rtol=1e-4)
        else:
            assert (odds[row].double() - plain).abs().sum() < 1e-2


# The draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_a_draw_is_where_the_cumulative_odds_pass_the_random_number(seed: int, dtype: torch.dtype):
    states, logits = requests(32, seed), random_logits(32, seed, dtype)
    odds = Sampler().odds(logits, states)
    expected = [inverse_draw(row, uniform(state.seed, 0)) for row, state in zip(odds, states, strict=True)]
    found = Sampler()(logits, states).tokens
    wrong = [row for row in range(32) if found[row] != expected[row]]
    for row in wrong:  # only rounding, at the border of two tokens, may tell them apart
        gap = odds[row].double().cumsum(0)[min(found[row], expected[row])] - uniform(states[row].seed, 0)
        assert abs(gap) < 1e-5
    assert len(wrong) <= 1


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.7},
    {"temperature": 1.5, "top_k": 80, "top_p": 0.9},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_stated_distribution(settings: dict):
    """Pearson's chi-square; a right sampler fails with probability 1e-6."""
    number, logits = 5000, random_logits(1, seed=5)[:, :150] * 0.7
    states = [RequestState(SamplingParams(**settings, seed=seed)) for seed in range(number)]
    expected = Sampler().odds(logits, states[:1])[0].double().numpy()
    counts = np.bincount(Sampler()(logits.expand(number, -1), states).tokens, minlength=150)
    assert counts[expected == 0].sum() == 0
    assert chi_square_p(counts, expected * number) > 1e-6


def chi_square_p(counts: np.ndarray, expected: np.ndarray) -> float:
    """Return how often counts deviate so much; cells that expect fewer than 10 are pooled."""
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    freedom = torch.tensor(used.sum() - 1).double()
    return float(torch.special.gammaincc(freedom / 2, torch.tensor(statistic / 2)))


def test_the_steps_of_one_request_follow_the_distribution_and_do_not_hang_together():
    logits, number = torch.tensor([[0.0, 1.0, 2.0]]), 2000
    state = RequestState(SamplingParams(seed=11, max_new_tokens=number))
    for _ in range(number):
        Sampler()(logits, [state])
    odds = logits[0].double().softmax(0).numpy()
    pairs = collections.Counter(zip(state.output, state.output[1:], strict=False))
    counts = np.array([pairs[a, b] for a in range(3) for b in range(3)])
    assert chi_square_p(counts, np.outer(odds, odds).ravel() * (number - 1)) > 1e-6


# Batch mates


def test_a_request_draws_alone_what_it_draws_in_any_company():
    """vLLM and others have had texts change with the batch, by a generator that all rows shared."""
    steps, number = 12, 24
    together, alone = requests(number, seed=3), requests(number, seed=3)
    left = [RequestState(SamplingParams(seed=99, temperature=1.3)) for _ in range(3)]
    for step in range(steps):
        logits = random_logits(number + 3, seed=step)
        order = random.Random(step).sample(range(number), number)
        rows = [row for row in order if together[row].finish_reason is None]
        company = left if step % 2 else []
        batch = torch.cat([logits[rows], logits[number : number + len(company)]])
        Sampler()(batch, [*(together[row] for row in rows), *company])
        for row in rows:
            Sampler()(logits[row : row + 1], [alone[row]])
    assert [state.output for state in together] == [state.output for state in alone]


def test_a_row_without_a_token_to_choose_fails_alone():
    logits = random_logits(5)
    logits[1, 7] = math.nan
    logits[2] = -math.inf
    logits[3, 9] = math.inf
    states = [RequestState(SamplingParams(seed=i, top_p=0.9)) for i in range(5)]
    sampled = Sampler()(logits, states)
    assert [token >= 0 for token in sampled.tokens] == [True, False, False, False, True]
    assert [state.finish_reason for state in states] == [None, "error", "error", "error", None]
    assert "must leave a token to choose" in states[1].error
    again = [RequestState(SamplingParams(seed=i, top_p=0.9)) for i in (0, 4)]
    assert Sampler()(logits[[0, 4]], again).tokens == [sampled.tokens[0], sampled.tokens[4]]


def test_settings_of_a_row_cannot_reach_its_neighbour():
    params = SamplingParams(seed=0, logit_bias={V + 5: 1e4, 2 * V: -math.inf})  # ids beyond the vocabulary
    states = [RequestState(params), RequestState(SamplingParams(seed=1))]
    logits = random_logits(2)
    torch.testing.assert_close(Sampler().odds(logits, states), logits.softmax(1))


def test_greedy_takes_the_first_of_the_likeliest():
    logits = torch.zeros(2, 100, dtype=torch.bfloat16)
    logits[0, [41, 97]] = logits[1, [64, 65, 99]] = 1
    states = [RequestState(SamplingParams(temperature=0)) for _ in range(2)]
    assert Sampler()(logits, states).tokens == [41, 64]


def test_the_model_is_asked_for_log_probabilities_before_any_setting():
    logits = random_logits(3)
    states = [RequestState(SamplingParams(seed=1, temperature=0.3, top_k=4, logprobs=n)) for n in (0, 3)]
    states.append(RequestState(SamplingParams(seed=1)))
    sampled = Sampler()(logits, states)
    expected = logits.log_softmax(1)
    for row, n in ((0, 0), (1, 3)):
        found = sampled.logprobs[row]
        assert found.token == pytest.approx(float(expected[row, sampled.tokens[row]]), abs=1e-5)
        best = expected[row].topk(n)
        assert [token for token, _ in found.top] == best.indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert sampled.logprobs[2] is None


def test_states_must_fit_the_rows():
    with pytest.raises(ValueError, match=r"states \(1\) must be as many as the rows of logits \(2\)"):
        Sampler()(random_logits(2), [RequestState(SamplingParams())])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, r"temperature \(-1\) must be at least 0"),
        ({"temperature": math.nan}, r"temperature \(nan\) must be"),
        ({"temperature": 1e-9}, r"temperature \(1e-09\) must be 0 or at least 0.001"),
        ({"top_p": 0.0}, r"top_p \(0.0\) must be above 0 and at most 1"),
        ({"min_p": 1.0}, r"min_p \(1.0\) must be at least 0 and below 1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty \(0.0\) must be above 0"),
        ({"mirostat": 3}, r"mirostat \(3\) must be 0, 1 or 2"),
        ({"mirostat": 2, "top_k": 5}, r"mirostat \(2\) must be 0 beside top_k"),
        ({"mirostat": 2, "temperature": 0.0}, r"temperature \(0.0\) must be above 0 for mirostat"),
        ({"regex": "a", "json_schema": "{}"}, r"regex \(a\) must be none beside a json_schema"),
        ({"stop": [""]}, r"stop \(''\) must not be empty"),
        ({"logit_bias": {1: math.nan}}, r"logit_bias\[1\] \(nan\) must be of a token id"),
        ({"seed": -1}, r"seed \(-1\) must be at least 0"),
        ({"stop": ["x"]}, r"vocabulary \(None\) must be given for stop, regex and json_schema"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_a_sentence(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RequestState(SamplingParams(**settings))


# Mirostat


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [3.0, 6.0])
def test_mirostat_holds_the_surprise_at_tau(version: int, tau: float):
    """On Zipf's law with exponent 1.05; top-k would have to be tuned for each tau."""
    logits = -1.05 * torch.arange(1, 5001).double().log()[None].float()
    settings = {"mirostat": version, "mirostat_tau": tau, "mirostat_rate": 0.1}
    state = RequestState(SamplingParams(**settings, seed=0, max_new_tokens=3000))
    surprise = -logits.double().log_softmax(1)[0] / math.log(2)
    for _ in range(1000):
        Sampler()(logits, [state])
    assert float(surprise[state.output[100:]].mean()) == pytest.approx(tau, abs=0.15)


# Randomness


def test_the_mixing_function_is_that_of_splitmix():
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # the generator's outputs for seed 0
    assert [mix(step * GOLDEN) for step in (1, 2, 3)] == first


def test_numbers_are_uniform_along_steps_seeds_and_tokens():
    series = {
        "steps": np.array([uniform(7, step) for step in range(20_000)]),
        "seeds": np.array([uniform(seed, 3) for seed in range(20_000)]),
        "tokens": uniforms(7, 3, 20_000),
    }
    for name, numbers in series.items():
        counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
        assert chi_square_p(counts, np.full(100, 200.0)) > 1e-6, name
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 5 / math.sqrt(len(numbers)), name


def test_numbers_of_neighbouring_seeds_do_not_repeat_one_another():
    grid = np.array([[uniform(seed, step) for step in range(300)] for seed in range(300)])
    assert len(np.unique(grid)) == grid.size
    assert len(np.unique([uniform(0, 0), uniform(GOLDEN, 0), uniform(0, 1)])) == 3


# The Gumbel view


def test_the_largest_of_logits_plus_gumbel_noise_has_the_odds_of_softmax():
    logits, number = torch.tensor([0.0, 1.0, -1.0, 2.0]).double(), 5000
    tokens = [int(gumbel_max(logits, gumbel_noise(5, step, 4))) for step in range(number)]
    counts = np.bincount(tokens, minlength=4)
    assert chi_square_p(counts, logits.softmax(0).numpy() * number) > 1e-6


def test_the_k_largest_are_draws_without_putting_back():
    odds, number = torch.tensor([0.5, 0.3, 0.15, 0.05]).double(), 5000
    pairs = [tuple(gumbel_max(odds.log(), gumbel_noise(6, step, 4), 2).tolist()) for step in range(number)]
    counts = np.array([pairs.count((a, b)) for a in range(4) for b in range(4) if a != b])
    expected = [float(odds[a] * odds[b] / (1 - odds[a])) for a in range(4) for b in range(4) if a != b]
    assert chi_square_p(counts, np.array(expected) * number) > 1e-6


def test_shared_noise_lets_two_models_agree_where_inverse_draws_do_not():
    generator = torch.Generator().manual_seed(0)
    mine = torch.randn(400, generator=generator).double()
    yours = mine + 0.2 * torch.randn(400, generator=generator)
    a, b = mine.softmax(0), yours.softmax(0)
    bound = float(torch.minimum(a, b).sum() / torch.maximum(a, b).sum())  # the Jaccard weight
    number, together, apart = 1500, 0, 0
    for step in range(number):
        noise = gumbel_noise(1, step, 400)
        together += int(gumbel_max(mine, noise)) == int(gumbel_max(yours, noise))
        apart += inverse_draw(a, uniform(1, step)) == inverse_draw(b, uniform(1, step))
    assert together / number > bound - 0.04
    assert together > 2 * apart


def interact() -> None:
    for line in ask("odds of the tokens, such as 5 3 1 1> "):
        odds = torch.tensor([[float(word) for word in line.split()]])
        state = RequestState(SamplingParams(max_new_tokens=1000))
        for _ in range(1000):
            Sampler()(odds.log(), [state])
        print("1000 draws:", dict(sorted(collections.Counter(state.output).items())))


if __name__ == "__main__":
    run_validation(__file__, interact)
