"""Checks of the watermark and its detector. --interactive looks for it in the text that you type."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from common.script import run_validation
from phase3_core_inference.project8_sampling.config import DetectConfig, SamplingParams
from phase3_core_inference.project8_sampling.detect import run
from phase3_core_inference.project8_sampling.sampler import Sampler
from phase3_core_inference.project8_sampling.state import RequestState
from phase3_core_inference.project8_sampling.watermark import detect, expected_z, green_share, green_tokens

V, KEY = 500, 15485863


def write(
    logits: Tensor, number: int, delta: float, share: float, seed: int = 0, key: int = KEY
) -> list[int]:
    settings = {"watermark": delta, "watermark_share": share, "watermark_key": key}
    state = RequestState(SamplingParams(**settings, seed=seed, max_new_tokens=number), [1])
    while state.finish_reason is None:
        Sampler()(logits, [state])
    return [1, *state.output]


@pytest.mark.parametrize(("share", "key"), [(0.25, KEY), (0.5, 42)])
def test_green_tokens_are_those_of_transformers(share: float, key: int):
    from transformers.generation.logits_process import WatermarkLogitsProcessor

    processor = WatermarkLogitsProcessor(V, "cpu", share, 2.0, key)
    for previous in (0, 1, 77, V - 1):
        logits = torch.zeros(1, V)
        theirs = processor(torch.tensor([[5, previous]]), logits)[0] > 0
        assert theirs.nonzero()[:, 0].tolist() == sorted(green_tokens(previous, V, share, key).tolist())


def test_our_texts_are_found_by_transformers_and_scored_alike():
    from transformers import GPT2Config, WatermarkDetector, WatermarkingConfig

    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    marked, plain = write(logits, 150, 2.0, 0.25), write(logits, 150, 0.0, 0.25)
    config = GPT2Config(vocab_size=V, bos_token_id=V - 1)
    detector = WatermarkDetector(config, "cpu", WatermarkingConfig(), ignore_repeated_ngrams=True)
    for tokens, is_marked in ((marked, True), (plain, False)):
        theirs = detector(torch.tensor([tokens]), z_threshold=4.0, return_dict=True)
        ours = detect(tokens, V, 0.25, KEY)
        assert bool(theirs.prediction[0]) == is_marked == (ours.z > 4)
        assert (ours.scored, ours.green) == (theirs.num_tokens_scored[0], theirs.num_green_tokens[0])
        assert ours.z == pytest.approx(theirs.z_score[0])
        assert ours.p_value == pytest.approx(float(theirs.p_value[0]), abs=1e-6)


@pytest.mark.parametrize(("share", "delta"), [(0.25, 1.0), (0.25, 2.0), (0.5, 2.0), (0.5, 4.0)])
def test_z_is_as_predicted_where_all_tokens_are_equally_likely(share: float, delta: float):
    """Theorem 4.2 is exact there; its bound on the variance gives the tolerance."""
    number, texts = 200, 24
    green = green_share(torch.full((V,), 1 / V), share, delta)
    alpha = math.exp(delta)
    assert green == pytest.approx(share * alpha / (1 + (alpha - 1) * share), rel=0.01)
    found = [
        detect(write(torch.zeros(1, V), number, delta, share, i), V, share, KEY, True).z for i in range(texts)
    ]
    predicted = expected_z(green, share, number)
    deviation = math.sqrt(green * (1 - green) / (share * (1 - share)))
    assert np.mean(found) == pytest.approx(predicted, abs=4 * deviation / math.sqrt(texts))


def test_where_less_is_open_z_is_smaller_and_the_theorems_bound_holds():
    """The theorem is about random colours, so every text has a key of its own."""
    means, share, delta, number, texts = [], 0.25, 2.0, 150, 24
    for spread in (0.0, 2.0, 5.0):
        logits = spread * torch.randn(1, V, generator=torch.Generator().manual_seed(1))
        bound = expected_z(green_share(logits[0].softmax(0), share, delta), share, number)
        marked = [(write(logits, number, delta, share, key, key), key) for key in range(100, 100 + texts)]
        z = [detect(text, V, share, key, repeats=True).z for text, key in marked]
        means.append(np.mean(z))
        assert means[-1] > bound - 4 * np.std(z) / math.sqrt(texts)
    assert means[0] > means[1] > means[2]


def test_texts_without_the_mark_or_with_another_key_have_z_near_0():
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    plain = [detect(write(logits, 150, 0.0, 0.25, seed), V, 0.25, KEY).z for seed in range(15)]
    other = [detect(write(logits, 150, 2.0, 0.25, seed, key=12345), V, 0.25, KEY).z for seed in range(15)]
    for found in (plain, other):
        assert abs(np.mean(found)) < 0.8
        assert np.max(np.abs(found)) < 4


def test_a_phrase_that_repeats_counts_once():
    loops = [[token, token + 1, token + 2] * 60 for token in range(0, V - 3, 3)]
    assert max(detect(loop, V, 0.25, KEY, repeats=True).z for loop in loops) > 15
    assert max(detect(loop, V, 0.25, KEY).z for loop in loops) < 4


def test_a_single_token_is_no_text_to_look_at():
    with pytest.raises(ValueError, match=r"tokens \(1\) must be at least 2 to look for a watermark"):
        detect([5], V, 0.25, KEY)


def interact() -> None:
    run(DetectConfig())


if __name__ == "__main__":
    run_validation(__file__, interact)
