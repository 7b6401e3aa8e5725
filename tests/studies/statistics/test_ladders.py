"""Questions at several sizes: trends as one family, and speed-ups from the baseline's own sizes."""

import dataclasses
import math

import pytest

from slmjax.config import dumps, loads
from slmjax.studies.statistics.ladders import (
    LadderFindings,
    SizeResults,
    judge_ladder,
    ladder_lines,
    speedup_text,
)
from slmjax.studies.statistics.results_table import Rules
from slmjax.studies.statistics.samples import holm
from slmjax.studies.statistics.speedup import (
    Coverage,
    Direction,
    effective_speedup,
    fit_power_law,
    gap_trend,
)
from slmjax.studies.statistics.verdicts import Verdict, judge
from tests.studies.statistics.tables import table

SIZES = {"1M": 1e14, "4M": 1e15, "16M": 1e16, "64M": 1e17}
NOISE = ([0.0, 0.004, -0.003], [0.002, -0.004, 0.001], [0.003, 0.002, -0.002])


def loss(compute: float) -> float:
    return 12 * compute**-0.07


def results(size: str, *, gain: float, shrinking: float, diverged: bool = False) -> SizeResults:
    """A baseline a, an arm b as good as `gain` times the compute, and c, whose gap shrinks to zero."""
    compute = SIZES[size]
    gap = shrinking * (17 - math.log10(compute))
    levels = (loss(compute), loss(gain * compute), loss(compute) + gap)
    values = [[level + each for each in noise] for level, noise in zip(levels, NOISE, strict=True)]
    pairs = [("b", "a"), ("c", "a")]
    measured = table(values, diverged=[(1, 2)] if diverged else [])
    judged = judge(measured, pairs, Rules())
    return SizeResults(
        size=size,
        study=f"q, {size}",
        baseline="a",
        compute=dict.fromkeys("abc", compute),
        losses={
            arm: tuple(value for value in measured.row(arm).tolist() if math.isfinite(value)) for arm in "abc"
        },
        comparisons=tuple(
            (*pair, item.verdict, item)
            for pair, item in zip(pairs, judged.comparisons, strict=True)
            if item is not None
        ),
    )


def ladder(*sizes: str, **changes: bool) -> LadderFindings:
    return judge_ladder(
        "q",
        [results(size, gain=2.0, shrinking=0.05) for size in sizes or SIZES],
        **{"lower_is_better": True} | changes,
    )


def test_sizes_have_their_verdicts_and_gaps_a_trend() -> None:
    found = ladder()
    assert [(each.size, each.compute) for each in found.sizes] == list(SIZES.items())
    arm, shrinking = found.arms
    assert {gap.verdict for gap in arm.gaps} == {Verdict.BETTER}
    assert shrinking.direction is Direction.SHRINKS and arm.note == ""
    errors = [gap.standard_error for gap in shrinking.gaps if gap.standard_error is not None]
    gaps = [gap.difference for gap in shrinking.gaps if gap.difference is not None]
    assert shrinking.trend == gap_trend(list(SIZES.values()), gaps=gaps, errors=errors)
    # Both trends are one family.
    p_values = [each.trend.p_value for each in found.arms if each.trend and each.trend.p_value is not None]
    assert [each.adjusted_p for each in found.arms] == pytest.approx(holm(p_values))
    assert loads(LadderFindings, dumps(found)) == found


def test_speed_ups_are_from_the_sizes_of_the_baseline() -> None:
    found = ladder()
    losses = [[loss(compute) + each for each in NOISE[0]] for compute in SIZES.values()]
    curve = fit_power_law(list(SIZES.values()), losses)
    assert found.curve == curve and curve.exponent == pytest.approx(0.07, rel=0.01)
    gaps = found.arms[0].gaps
    for gap, compute in zip(gaps, SIZES.values(), strict=True):
        of_arm = [loss(2 * compute) + each for each in NOISE[1]]
        assert gap.speedup == effective_speedup(curve, compute=compute, losses=of_arm)
        assert gap.speedup.factor == pytest.approx(2, rel=0.02) and gap.speedup.interval is not None
    assert [gap.interpolated.coverage for gap in gaps if gap.interpolated] == [
        *[Coverage.WITHIN] * 3,
        Coverage.BEYOND,
    ]
    # Where there are three sizes or more, the interval has their lack of fit.
    assert speedup_text(gaps[0]).startswith(
        f"{gaps[0].speedup.factor:.3g} times [1.7" if gaps[0].speedup else "-"
    )
    # At the largest size nothing of the baseline is as good: only a limit is known without the law.
    text = speedup_text(gaps[-1])
    assert text.startswith("more than 1 times, which its sizes do not reach (")
    assert text.endswith("by a power law)")
    lines = ladder_lines(found)
    assert lines[0] == "Ladder q over 1M, 4M, 16M, 64M."
    assert any(line.startswith("Compute that a needs to match b: 1M ") for line in lines)
    assert any("c − a: 1M worse" in line and "The gap shrinks: −0.0" in line for line in lines)


def test_what_a_ladder_does_not_show_is_said() -> None:
    # Two sizes have a slope, but nothing that shows its error; a single one has none.
    two = ladder("1M", "16M").arms[0]
    assert two.trend is not None and two.adjusted_p is None and two.direction is Direction.NOT_RESOLVED
    assert two.note == "two sizes have no interval: a third one gives it"
    gap = two.gaps[0]
    assert gap.speedup is not None and gap.speedup.interval is None
    assert gap.interpolated is not None and gap.interpolated.interval is not None
    assert speedup_text(gap).startswith(f"{gap.interpolated.factor:.3g} times [")
    one = ladder("1M")
    assert one.arms[0].trend is None and one.curve is None and one.arms[0].gaps[0].speedup is None
    assert "No trend of the gap is known" in ladder_lines(one)[1]
    # A size without FLOPs, and one with a diverged run, whose gap has a value that stands for it.
    sizes = [results(size, gain=2.0, shrinking=0.05, diverged=size == "4M") for size in SIZES]
    sizes[0] = dataclasses.replace(sizes[0], compute={})
    partial = judge_ladder("q", sizes, lower_is_better=True)
    assert partial.sizes[0].compute is None and "baseline of 1M are not known" in partial.notes[0]
    arm, other = partial.arms
    assert arm.note == (
        "without 1M, 4M, whose gap or FLOPs are not known; two sizes have no interval: a third one gives it"
    )
    assert other.note == "without 1M, whose gap or FLOPs are not known" and other.adjusted_p is not None
    # Other metrics than losses, and a baseline that does not improve.
    higher = ladder(lower_is_better=False)
    assert higher.curve is None and higher.arms[0].gaps[0].interpolated is None
    assert "higher value of this metric is better" in higher.notes[0] and higher.arms[0].trend is not None
    rising = [dataclasses.replace(each, losses={"a": (1.0 + i,)}) for i, each in enumerate(sizes[1:])]
    (note,) = judge_ladder("q", rising, lower_is_better=True).notes
    assert note.startswith("No power law: the loss of the base does not fall")
