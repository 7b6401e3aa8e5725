"""Effective speed-up and trends, against statsmodels, known curves and by simulation."""

import math

import numpy as np
import pytest
from scipy import optimize, stats
from statsmodels.regression.linear_model import OLS, WLS

from slmjax.studies.statistics.speedup import (
    Coverage,
    Direction,
    Speedup,
    Trend,
    effective_speedup,
    fit_power_law,
    gap_trend,
    interpolated_speedup,
)

COMPUTE = [1e15, 3e15, 1e16, 3e16]


def law(compute: float, *, asymptote: float = 0.5) -> float:
    return asymptote + 30 * compute**-0.1


def test_an_exact_curve_is_recovered() -> None:
    losses = [[law(compute)] * 2 for compute in COMPUTE]
    curve = fit_power_law(COMPUTE, losses, asymptote=0.5)
    assert curve.exponent == pytest.approx(0.1) and curve.loss(1e17) == pytest.approx(law(1e17))
    speedup = effective_speedup(curve, compute=4e15, losses=[law(8e15)])
    assert speedup.factor == pytest.approx(2) and speedup.coverage is Coverage.WITHIN
    assert speedup.limits == pytest.approx((0.25, 7.5))
    assert effective_speedup(curve, compute=3e16, losses=[law(4e16)]).coverage is Coverage.BEYOND
    assert effective_speedup(curve, compute=1e15, losses=[law(9e14)]).coverage is Coverage.BELOW
    assert speedup.interval is not None and speedup.interval == pytest.approx((2, 2), rel=1e-5)


def test_intervals_are_where_predictions_hold_the_loss() -> None:
    """Against prediction intervals of statsmodels: at both ends, one end of the prediction is the loss."""
    draws = np.random.default_rng(0)
    losses = [[law(compute) + 0.004 * draws.normal() for _ in range(3)] for compute in COMPUTE]
    curve = fit_power_law(COMPUTE, losses, asymptote=0.4)
    y = np.array([np.mean(np.log(np.array(values) - 0.4)) for values in losses])
    design = np.stack([np.ones(4), np.log(COMPUTE)], axis=1)
    fit = OLS(y, design).fit()
    assert [curve.intercept, -curve.exponent] == pytest.approx(fit.params.tolist())
    within = np.mean([np.var(np.log(np.array(values) - 0.4), ddof=1) for values in losses]) / 3
    assert curve.residual_variance == pytest.approx(max(fit.scale, within))
    assert curve.lack_of_fit_p == pytest.approx(stats.f.sf(fit.scale / within, 2, 8))
    # Means that deviate by far more than seeds do, so that the error is that of the line.
    shifted = [
        [value + shift for value in values]
        for values, shift in zip(losses, (0, 0.03, 0.01, -0.02), strict=True)
    ]
    curve = fit_power_law(COMPUTE, shifted, asymptote=0.4)
    fit = OLS([np.mean(np.log(np.array(values) - 0.4)) for values in shifted], design).fit()
    speedup = effective_speedup(curve, compute=5e15, losses=[1.2, 1.21], confidence=0.8)
    target = np.mean(np.log(np.array([1.2, 1.21]) - 0.4))

    def excess(at: float, side: str) -> float:
        frame = fit.get_prediction([[1.0, at]]).summary_frame(alpha=0.2)
        return float(frame[f"obs_ci_{side}"].iloc[0]) - float(target)

    assert speedup.factor is not None
    center = math.log(speedup.factor * 5e15)
    ends = [
        optimize.brentq(excess, center - 20, center, args=("lower",)),
        optimize.brentq(excess, center, center + 20, args=("upper",)),
    ]
    assert speedup.interval == pytest.approx([math.exp(end) / 5e15 for end in ends], rel=1e-6)


def test_an_uncertain_curve_has_no_interval() -> None:
    curve = fit_power_law([1e15, 2e15, 4e15], [[1.5], [1.3], [1.45]])
    assert effective_speedup(curve, compute=1e15, losses=[1.4]).interval is None
    # Two sizes have no degrees of freedom for a lack of fit.
    curve = fit_power_law([1e15, 4e15], [[1.5, 1.51], [1.3, 1.32]])
    assert curve.residual_variance is None and curve.lack_of_fit_p is None
    assert effective_speedup(curve, compute=1e15, losses=[1.4]).interval is None


def test_a_curve_that_hardly_falls_has_no_number() -> None:
    curve = fit_power_law([1e15, 1e16, 1e17], [[1.5], [1.49995], [1.4999]])
    speedup = effective_speedup(curve, compute=1e15, losses=[1.2])
    assert (speedup.factor, speedup.coverage) == (None, Coverage.BEYOND)


def test_intervals_hold_the_true_speed_up() -> None:
    """Sizes deviate from the law, as the base itself does at the compute that matches the arm."""
    draws = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        deviations = 0.01 * draws.normal(size=5)
        losses = [
            [0.5 + (law(compute) - 0.5) * math.exp(deviation) + 0.001 * draws.normal() for _ in range(2)]
            for compute, deviation in zip(COMPUTE, deviations[:4], strict=True)
        ]
        arm = [0.5 + (law(8e15) - 0.5) * math.exp(deviations[4]) + 0.001 * draws.normal() for _ in range(2)]
        curve = fit_power_law(COMPUTE, losses, asymptote=0.5)
        interval = effective_speedup(curve, compute=4e15, losses=arm, confidence=0.9).interval
        low, high = (None, None) if interval is None else interval
        held += (low is None or low <= 2) and (high is None or high >= 2)
    assert 0.86 < held / 300 < 0.97


def test_interpolation_needs_no_law() -> None:
    losses = [[1.6, 1.62], [1.5, 1.5], [1.3, 1.3], [1.32, 1.28]]
    speedup = interpolated_speedup(COMPUTE, losses, arm_compute=1e15, arm_losses=[1.4, 1.4])
    assert speedup.coverage is Coverage.WITHIN
    # Halfway between 1.5 and 1.3, in the logarithm of compute.
    assert speedup.factor == pytest.approx(math.sqrt(3 * 10))
    assert speedup.interval is not None
    low, high = speedup.interval
    # 1.3 is where the curve ends: the arm may be better than all of it.
    assert speedup.factor is not None
    assert low is not None and low < speedup.factor and (high is None or high > speedup.factor)
    # Means that rise are averaged, here to 1.4.
    rising = interpolated_speedup([1, 2, 4], [[1.6], [1.3], [1.5]], arm_compute=1, arm_losses=[1.5])
    assert rising.factor == pytest.approx(math.sqrt(2)) and rising.interval is None


def test_where_the_base_does_not_reach_the_loss_only_a_limit_is_known() -> None:
    losses = [[1.6, 1.61], [1.5, 1.51], [1.4, 1.41], [1.3, 1.31]]

    def speedup(*arm: float) -> Speedup:
        return interpolated_speedup(COMPUTE, losses, arm_compute=1e16, arm_losses=arm)

    beyond = speedup(1.1, 1.1)
    assert (beyond.factor, beyond.coverage) == (None, Coverage.BEYOND) and beyond.limits == pytest.approx(
        (0.1, 3)
    )
    # More than three times for certain, and without an upper end.
    assert beyond.interval is not None and beyond.interval[0] == pytest.approx(3)
    assert beyond.interval[1] is None
    # Beyond the largest size by less than its noise: the lower end is within the sizes.
    hardly = speedup(1.304, 1.304)
    assert hardly.coverage is Coverage.BEYOND and hardly.interval is not None
    assert hardly.interval[0] is not None and 1 < hardly.interval[0] < 3 and hardly.interval[1] is None
    below = speedup(1.9, 1.9)
    assert (below.factor, below.coverage) == (None, Coverage.BELOW) and below.interval is not None
    assert below.interval[0] is None and below.interval[1] == pytest.approx(0.1)


def trend(gaps: list[float]) -> Trend:
    return gap_trend(COMPUTE, gaps=gaps, errors=[0.004, 0.002, 0.002, 0.003])


def test_trends_are_statsmodels() -> None:
    gaps = [-0.05, -0.03, -0.036, 0.01]
    found = trend(gaps)
    x = np.log10(COMPUTE)
    weights = 1 / np.square([0.004, 0.002, 0.002, 0.003])
    expected = WLS(gaps, np.stack([np.ones(4), x], axis=1), weights=weights).fit()
    # The gaps deviate by more than their errors, so that both use the scale of the residuals.
    assert found.scale > 1 and found.lack_of_fit_p is not None and found.lack_of_fit_p < 0.05
    assert found.slope == pytest.approx(expected.params[1])
    assert found.slope_interval == pytest.approx(tuple(expected.conf_int()[1]))
    assert found.p_value == pytest.approx(expected.pvalues[1])
    value, interval = found.gap(1e17)
    prediction = expected.get_prediction([[1.0, 17.0]]).summary_frame()
    assert value == pytest.approx(prediction["mean"].iloc[0])
    assert interval == pytest.approx(
        (prediction["mean_ci_lower"].iloc[0], prediction["mean_ci_upper"].iloc[0])
    )


def test_directions() -> None:
    assert trend([-0.08, -0.06, -0.04, -0.02]).direction is Direction.SHRINKS
    assert trend([-0.02, -0.04, -0.06, -0.08]).direction is Direction.GROWS
    assert trend([0.02, 0.04, 0.06, 0.08]).direction is Direction.GROWS
    assert trend([0.03, 0.031, 0.03, 0.029]).direction is Direction.NOT_RESOLVED
    # Gaps that agree better than their errors do not reduce these.
    assert trend([0.03, 0.03, 0.03, 0.03]).scale == 1
    two = gap_trend([1.0, 10.0], gaps=[0.1, 0.2], errors=[0.01, 0.01])
    assert two.slope == pytest.approx(0.1) and two.slope_interval is None and two.gap(100.0)[1] is None


def test_wrong_numbers_are_refused() -> None:
    curve = fit_power_law(COMPUTE, [[law(compute)] for compute in COMPUTE])
    for call, message in (
        (lambda: fit_power_law([1.0], [[1.0]]), "at least two sizes"),
        (lambda: fit_power_law([1.0, 2.0], [[1.0], []]), "at least one finite loss"),
        (lambda: fit_power_law([1.0, 2.0], [[1.0], [1.2]]), "does not fall with compute"),
        (lambda: fit_power_law([1.0, 2.0], [[1.1 + 0.2], [1.3]]), "does not fall with compute"),
        (lambda: fit_power_law([1.0, 2.0], [[1.2], [1.0]], asymptote=1.1), "asymptote is 1.1"),
        (lambda: effective_speedup(curve, compute=0.0, losses=[1.0]), "compute of the arm is 0"),
        (lambda: effective_speedup(curve, compute=1.0, losses=[]), "give at least one"),
        (lambda: gap_trend([1.0, 2.0], gaps=[0.1, 0.1], errors=[0.1, 0.0]), "standard error above 0"),
        (lambda: gap_trend([1.0, 2.0], gaps=[0.1, 0.1], errors=[0.1, math.inf]), "leave out sizes"),
        (lambda: gap_trend([1.0, 2.0], gaps=[0.1, 0.1], errors=[math.nan, 0.1]), "leave out sizes"),
        (lambda: gap_trend([1.0, math.inf], gaps=[0.1, 0.1], errors=[0.1, 0.1]), "give each a finite one"),
        (lambda: fit_power_law([math.nan, 2.0], [[1.2], [1.0]]), "give each a finite one"),
        (lambda: fit_power_law([1.0, 2.0], [[1.2], [1.0]], asymptote=math.nan), "asymptote is nan"),
        (lambda: effective_speedup(curve, compute=math.inf, losses=[1.0]), "compute of the arm is inf"),
        (lambda: effective_speedup(curve, compute=1.0, losses=[1.0, math.nan]), "all finite"),
        (
            lambda: interpolated_speedup([1, 2], [[2.0], [1.0]], arm_compute=1, arm_losses=[]),
            "give at least one",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
