"""Checks of what may be drawn. --interactive shows what a setting leaves of a distribution that you type."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from common.script import ask, run_validation
from phase3_core_inference.project8_sampling.config import NEUTRAL
from phase3_core_inference.project8_sampling.mirostat import mirostat, zipf_exponent, zipf_k
from phase3_core_inference.project8_sampling.truncation import Ranked, kept_interval, truncate, warp

V = 200


def random_logits(seed: int = 0, rows: int = 16, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, V, generator=generator, dtype=torch.float64)


def theirs(**settings: float):
    """Return transformers' warpers for these settings, in its order."""
    import transformers.generation.logits_process as hf

    makers = {
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": lambda k: hf.TopKLogitsWarper(int(k)),
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
        "typical_p": hf.TypicalLogitsWarper,
        "epsilon": hf.EpsilonLogitsWarper,
        "eta": hf.EtaLogitsWarper,
    }
    return hf.LogitsProcessorList([make(settings[name]) for name, make in makers.items() if name in settings])


SETTINGS = {
    "temperature": (0.3, 0.7, 1.9),
    "top_k": (1, 7, 50, 1000),
    "top_p": (0.05, 0.5, 0.9, 0.999),
    "min_p": (0.01, 0.1, 0.9),
    "typical_p": (0.05, 0.2, 0.9, 0.99),
    "epsilon": (1e-4, 3e-3, 0.3),
    "eta": (1e-4, 3e-3, 0.3),
}


@pytest.mark.parametrize("spread", [0.3, 1.5, 6.0])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name in SETTINGS for value in SETTINGS[name]])
def test_every_warper_is_that_of_transformers(name: str, value: float, spread: float):
    logits = random_logits(spread=spread)
    assert torch.equal(warp(logits, **{name: value}), theirs(**{name: value})(None, logits))


@pytest.mark.parametrize("seed", range(60))
def test_warpers_combined_at_random_are_those_of_transformers(seed: int):
    draw = random.Random(seed)
    names = [name for name in SETTINGS if draw.random() < 0.5]
    settings = {name: draw.choice(SETTINGS[name]) for name in names}
    logits = random_logits(seed, spread=draw.choice([0.5, 2, 5]))
    assert torch.equal(warp(logits, **settings), theirs(**settings)(None, logits)), settings


def test_top_n_sigma_keeps_what_its_paper_says_and_at_any_temperature():
    logits = random_logits()
    for n in (0.5, 1.0, 2.0):
        least = logits.amax(1, keepdim=True) - n * logits.std(1, keepdim=True, correction=0)
        expected = logits.masked_fill(logits < least, -math.inf)
        assert torch.equal(warp(logits, top_n_sigma=n), expected)
        assert torch.equal(warp(logits, temperature=3.0, top_n_sigma=n) > -math.inf, expected > -math.inf)


def test_tokens_that_are_forbidden_do_not_count_in_the_deviation():
    logits = random_logits()
    forbidden = torch.cat([logits, torch.full((16, 100), -math.inf)], dim=1)
    assert torch.equal(warp(forbidden, top_n_sigma=1.0)[:, :V], warp(logits, top_n_sigma=1.0))


def test_tokens_as_likely_as_the_last_one_kept_are_kept():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    for settings in ({"top_k": 2}, {"top_p": 0.6}, {"epsilon": 0.15}):
        assert (warp(logits, **settings) > -math.inf).tolist() == [[True, False, True, True, True, False]]


def test_one_token_always_remains():
    flat = torch.zeros(1, 5000).double()
    flat[0, 7] = 1e-3
    for settings in ({"epsilon": 0.9}, {"top_p": 1e-9}, {"min_p": 0.9999}, {"top_n_sigma": 1e-3}):
        assert (warp(flat, **settings) > -math.inf).nonzero().tolist() == [[0, 7]]


def test_typical_sampling_may_cut_the_likeliest_token():
    odds = torch.tensor([[0.5] + [0.01] * 50])  # entropy 2.6 nats; the first token has 0.7, the others 4.6
    kept = warp(odds.log(), typical_p=0.3) > -math.inf
    assert not kept[0, 1:].any() or not kept[0, 0]
    odds = torch.tensor([[0.2] + [0.01] * 80])  # entropy 4.0 nats: nearer to the others' 4.6
    kept = warp(odds.log(), typical_p=0.3) > -math.inf
    assert not kept[0, 0]
    assert kept[0, 1:].all()


def test_an_unknown_setting_is_named():
    with pytest.raises(ValueError, match=r"setting \(top_q\) must be one of temperature, top_n_sigma, top_k"):
        warp(random_logits(), top_q=0.5)


# What is decided from a few ranked tokens is what all of them would decide, or it is said to be unsure


@pytest.mark.parametrize("K", [1, 2, 10, 64, V - 1, V])
@pytest.mark.parametrize("forbidden", [0, 150, V - 1])
def test_the_head_decides_as_the_whole_ranking_does_or_says_that_it_cannot(K: int, forbidden: int):
    sure_rows = 0
    for seed in range(40):
        draw = random.Random(seed)
        settings = {name: np.full((16, 1), neutral) for name, neutral in NEUTRAL.items()}
        for row, name in itertools.product(range(16), SETTINGS):
            if name != "temperature" and draw.random() < 0.3:
                settings[name][row] = draw.choice(SETTINGS[name])
        logits = random_logits(seed, spread=draw.choice([1.0, 3.0, 8.0]))
        logits[:, V - forbidden :] = -math.inf
        whole = Ranked.all_of(logits)
        head = Ranked.of(whole.values[:, :K], whole.mass.copy(), whole.given_entropy, whole.sigma)
        sure = ~truncate(head, settings)
        truncate(whole, settings)
        sure_rows += int(sure.sum())
        (low, high), (least, most) = kept_interval(head), kept_interval(whole)
        values, finite = whole.values, whole.values > -math.inf
        kept = (values >= low) & (values <= high) & finite
        np.testing.assert_array_equal(kept[sure], ((values >= least) & (values <= most) & finite)[sure])
    assert sure_rows > (0 if K == 1 and not forbidden else 40)


# Mirostat


def test_the_exponent_of_zipfs_law_is_found():
    ranks = np.arange(1, 1001)
    for s in (0.7, 1.1, 2.5):
        values = -s * np.log(ranks)[None]
        assert zipf_exponent(values)[0, 0] == pytest.approx(s, rel=1e-9)
        assert zipf_exponent(np.where(ranks < 50, values, -math.inf))[0, 0] == pytest.approx(s, rel=1e-9)


def test_k_is_that_of_the_papers_own_program():
    for s, mu, n in itertools.product((0.8, 1.05, 1.7), (2.0, 5.0, 9.0), (1000, 50257)):
        eps = s - 1  # compute_k of github.com/basusourya/mirostat
        k = ((eps * (2**mu)) / (1 - n ** (-eps))) ** (1 / s)
        found = zipf_k(np.array([[s]]), np.array([[mu]]), np.array([[float(n)]]))
        assert found[0, 0] == min(max(round(k), 1), n)


def test_version_2_keeps_what_surprises_less_than_mu():
    logits = random_logits(rows=1)
    ranked = Ranked.all_of(logits)
    kept = mirostat(ranked, np.array([[2.0, 4.0, V]]))
    bits = -(logits.log_softmax(1) / math.log(2)).sort().values.flip(1)
    assert kept.tolist() == (bits.sort().values <= 4.0).tolist()
    assert mirostat(ranked, np.array([[2.0, 0.0, V]])).sum() == 1  # the likeliest stays


def interact() -> None:
    for line in ask("odds, then a setting, such as 5 3 1 1 top_p=0.7> "):
        words = line.split()
        settings = {name: float(value) for name, value in (word.split("=") for word in words if "=" in word)}
        odds = torch.tensor([[float(word) for word in words if "=" not in word]])
        print(" ".join(f"{p:.3f}" for p in warp(odds.log(), **settings).softmax(1)[0].tolist()))


if __name__ == "__main__":
    run_validation(__file__, interact)
