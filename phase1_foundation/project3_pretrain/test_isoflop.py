"""Checks of the fits on losses whose minima are known."""

import math

import numpy as np
import pytest

from common.script import run_validation
from phase1_foundation.project3_pretrain.isoflop import (
    fit_power_law,
    isoflop_minimum,
    leave_one_out,
    value_at,
)

E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28  # Hoffmann et al. 2022, Eq. 10


def chinchilla_loss(flops: float, parameters: float) -> float:
    return E + A / parameters**ALPHA + B / (flops / (6 * parameters)) ** BETA


def test_the_bottom_of_a_parabola_is_found_exactly():
    sizes = np.geomspace(1e4, 1e7, 6)
    losses = [0.3 * (math.log(size) - math.log(2e5)) ** 2 + 1.5 for size in sizes]
    minimum = isoflop_minimum(1e12, sizes, losses)
    assert minimum.parameters == pytest.approx(2e5)
    assert minimum.loss == pytest.approx(1.5)
    assert minimum.inside
    a, b, c = minimum.curve
    for size, loss in zip(sizes, losses, strict=True):
        assert a * math.log(size) ** 2 + b * math.log(size) + c == pytest.approx(loss)


def test_the_minima_of_hoffmanns_law_grow_as_calculus_says():
    budgets, best = np.geomspace(1e18, 1e22, 5), []
    exact = BETA / (ALPHA + BETA)  # 0.4516: where dL / dN = 0 at 6 N D = C
    for flops in budgets:
        centre = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (flops / 6) ** exact
        sizes = centre * np.geomspace(0.3, 3, 7)
        minimum = isoflop_minimum(flops, sizes, [chinchilla_loss(flops, size) for size in sizes])
        assert minimum.parameters == pytest.approx(centre, rel=0.05)
        best.append(minimum.parameters)
    assert fit_power_law(budgets, best).exponent == pytest.approx(exact, abs=0.01)


def test_a_minimum_beyond_the_sizes_tried_says_so():
    sizes = [1e4, 2e4, 4e4]
    falling = isoflop_minimum(1e12, sizes, [(math.log(size) - math.log(1e6)) ** 2 for size in sizes])
    assert falling.parameters == pytest.approx(1e6)
    assert not falling.inside
    edge = isoflop_minimum(1e12, [1e4, 2e4, 4e4, 8e4], [1.0, 1.01, 1.2, 1.6])
    assert 1e4 < edge.parameters < 2e4
    assert not edge.inside  # the lowest loss that was measured is the first


def test_losses_that_do_not_curve_upwards_have_no_minimum():
    assert isoflop_minimum(1e12, [1e4, 1e5, 1e6], [1.0, 2.0, 1.0]) is None
    assert isoflop_minimum(1e12, [1e4, 1e5, 1e6], [1.0, 1.0, 1.0]) is None


def test_power_laws_are_found_exactly():
    law = fit_power_law([1, 10, 100], [3, 3 * 10**0.5, 30])
    assert (law.exponent, law.factor) == (pytest.approx(0.5), pytest.approx(3))
    assert value_at(law, 1e4) == pytest.approx(300)


def test_leaving_points_out_shows_how_sure_an_exponent_is():
    x = [1.0, 10.0, 100.0, 1000.0]
    low, high = leave_one_out(x, [v**0.5 for v in x])
    assert (low, high) == (pytest.approx(0.5), pytest.approx(0.5))
    low, high = leave_one_out(x, [1, 10**0.5, 10, 100])  # the last one off
    assert low == pytest.approx(0.5)
    assert high > fit_power_law(x, [1, 10**0.5, 10, 100]).exponent > 0.6
    assert leave_one_out(x[:2], [1, 10]) == (pytest.approx(1), pytest.approx(1))


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match=r"parameters \(2 sizes\) must be at least three"):
        isoflop_minimum(1e12, [1e4, 1e5, 1e5], [1, 2, 3])
    with pytest.raises(ValueError, match=r"points \(1\) must be at least two"):
        fit_power_law([1], [1])


if __name__ == "__main__":
    run_validation(__file__)
