"""Checks of the schedules: exact values, and what the papers promise of them."""

import math

import pytest

from common.script import ask, run_validation
from phase1_foundation.project1_minimal_gpt.optimizer import lr_factor
from phase1_foundation.project3_pretrain.config import TrainConfig
from phase1_foundation.project3_pretrain.schedules import lr_share


def wsd(max_steps: int = 100, **settings) -> list[float]:
    config = TrainConfig(**{"schedule": "wsd", "max_steps": max_steps, "warmup_steps": 4} | settings)
    return [lr_share(step, config) for step in range(max_steps)]


def test_wsd_has_exactly_these_values():
    shares = wsd(decay_fraction=0.2)
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[4:81] == [1.0] * 77  # the fall begins after step 80
    assert shares[80:] == pytest.approx([1 - math.sqrt(i / 20) for i in range(20)], abs=1e-15)
    assert shares[85] == 0.5
    assert shares[99] == pytest.approx(0.025320565519103666, abs=1e-15)  # 1 - sqrt(19 / 20)


def test_wsd_falls_to_the_lowest_share_and_no_further():
    config = TrainConfig(schedule="wsd", max_steps=100, warmup_steps=0, min_lr_fraction=0.1)
    assert lr_share(85, config) == pytest.approx(0.1 + 0.9 * 0.5)
    assert lr_share(100, config) == lr_share(1000, config) == pytest.approx(0.1)


def test_runs_of_other_lengths_are_the_same_until_the_fall():
    short, long = wsd(100, decay_fraction=0.2), wsd(400, decay_fraction=0.05)
    assert short[:81] == long[:81]
    cosine = [[lr_share(step, TrainConfig(max_steps=steps)) for step in range(81)] for steps in (100, 400)]
    assert cosine[0] != cosine[1]  # which is what a cosine cannot do


def test_the_first_step_of_the_fall_takes_off_more_than_a_line_would():
    shares = wsd(decay_fraction=0.2)
    assert 1 - shares[81] == pytest.approx(1 / math.sqrt(20))
    assert 1 - shares[81] > 4 * (1 / 20)


@pytest.mark.parametrize("decay_fraction", [0.0, 0.5, 1.0])
def test_wsd_stays_between_nothing_and_the_peak(decay_fraction: float):
    shares = wsd(10, decay_fraction=decay_fraction, warmup_steps=8)
    assert all(0 <= share <= 1 for share in shares)
    assert shares[0] == 1 / 8
    assert max(shares) > 0.4


def test_cosine_is_that_of_the_first_project():
    config = TrainConfig(max_steps=50, warmup_steps=5, min_lr_fraction=0.1)
    assert [lr_share(step, config) for step in range(60)] == [lr_factor(step, config) for step in range(60)]
    assert lr_share(5, config) == 1.0
    assert lr_share(50, config) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "value"), [("decay_fraction", 1.5), ("decay_fraction", math.nan), ("keep", -1)]
)
def test_settings_that_cannot_be_are_refused(name: str, value: float):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value}).validate_config()


def interact() -> None:
    """Draw both schedules for a number of steps."""
    for text in ask("steps> "):
        for schedule in ("cosine", "wsd"):
            config = TrainConfig(schedule=schedule, max_steps=int(text))
            for step in range(0, config.max_steps, max(1, config.max_steps // 20)):
                share = lr_share(step, config)
                print(f"{schedule:7} step {step:6,} {share:6.3f} {'#' * round(60 * share)}")


if __name__ == "__main__":
    run_validation(__file__, interact)
