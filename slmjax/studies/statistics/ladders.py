"""A question at several sizes: verdict and gap at each, the trend of the gap, and effective speed-ups.

    ladder = judge_ladder("width", results, lower_is_better=True)      # SizeResults, smallest size first
    ladder.arms[0].trend, ladder.arms[0].gaps[1].speedup

Verdicts are those of the study of each size. The trends of all arms are one family, corrected by Holm. The
compute of a size is the training FLOPs of a run of the baseline, as counted. Speed-ups translate the loss of
an arm into compute by the baseline's losses at the ends of its runs: a loss on the way, before the learning
rate has decayed, is above that of a run that ends there, and would make every arm look faster.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from slmjax.studies.statistics.samples import Interval, Summary, holm, summarize
from slmjax.studies.statistics.speedup import (
    Coverage,
    Direction,
    PowerLaw,
    Speedup,
    Trend,
    effective_speedup,
    fit_power_law,
    gap_trend,
    interpolated_speedup,
)
from slmjax.studies.statistics.verdicts import Judgement, Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeResults:
    """The results of the study of one size."""

    size: str
    study: str
    baseline: str
    compute: Mapping[str, float]  # training FLOPs of a run of each arm, where they are known
    losses: Mapping[str, tuple[float, ...]]  # of each arm, by seed
    # arm, the arm that it is compared with, the verdict, and what it was drawn from
    comparisons: tuple[tuple[str, str, Verdict, Judgement | None], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderSize:
    """One size of a ladder."""

    size: str
    study: str
    compute: float | None  # training FLOPs of a run of the baseline; None where they are not known
    baseline: Summary | None  # metric of the baseline


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeGap:
    """An arm and the one that it is compared with at one size."""

    size: str
    verdict: Verdict
    difference: float | None  # None with fewer than two seeds in common
    standard_error: float | None
    interval: Interval | None
    compute: float | None  # training FLOPs of a run of the arm
    # over the baseline, by the power law of its sizes, whose lack of fit the interval has
    speedup: Speedup | None
    interpolated: Speedup | None  # over the baseline, between its sizes and without a law


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderArm:
    """An arm over the sizes."""

    arm: str
    against: str
    gaps: tuple[SizeGap, ...]
    trend: Trend | None  # of the gap over log10(FLOPs); None without two sizes of known gap and FLOPs
    adjusted_p: float | None  # that the gap has no trend, over all trends of the ladder, by Holm
    direction: Direction  # by this p
    note: str  # what is missing or left out; empty if nothing is


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderFindings:
    """A question at several sizes."""

    name: str
    sizes: tuple[LadderSize, ...]  # as the study has them
    arms: tuple[LadderArm, ...]
    curve: PowerLaw | None  # of the baseline
    confidence: float
    notes: tuple[str, ...] = ()


def judge_ladder(
    name: str,
    results: Sequence[SizeResults],
    *,
    lower_is_better: bool,
    confidence: float = 0.95,
    asymptote: float = 0.0,
) -> LadderFindings:
    """Return the verdict at each size, the trend of each gap, and the speed-ups over the baseline.

    Args:
      name: of the question.
      results: of each size; sizes that have not begun are left out.
      lower_is_better: whether the metric is a loss. There are no speed-ups of other metrics.
      confidence: of intervals; the probability that any trend is reported falsely is at most 1 - confidence.
      asymptote: of the baseline's loss over compute.
    """
    known = [each for each in results if each.baseline in each.compute and each.losses.get(each.baseline)]
    points = [(each.compute[each.baseline], each.losses[each.baseline]) for each in known]
    notes = []
    if unknown := [each.size for each in results if each not in known]:
        notes.append(f"The FLOPs or the baseline of {', '.join(unknown)} are not known: left out of trends.")
    curve = None
    if not lower_is_better:
        notes.append("Speed-ups are of losses, and a higher value of this metric is better.")
        points = []
    elif len({compute for compute, _ in points}) > 1:
        try:
            curve = fit_power_law(*map(list, zip(*points, strict=True)), asymptote=asymptote)
        except ValueError as error:
            notes.append(f"No power law: {error}.")
    pairs = dict.fromkeys((arm, against) for each in results for arm, against, _, _ in each.comparisons)
    arms = [
        _ladder_arm(arm, against, results, points=points, curve=curve, confidence=confidence)
        for arm, against in pairs
    ]
    return LadderFindings(
        name=name,
        sizes=tuple(_size(each) for each in results),
        arms=_corrected(arms, level=1 - confidence),
        curve=curve,
        confidence=confidence,
        notes=tuple(notes),
    )


Points = Sequence[tuple[float, tuple[float, ...]]]  # compute of the baseline, and its losses


def _size(results: SizeResults) -> LadderSize:
    losses = results.losses.get(results.baseline)
    return LadderSize(
        size=results.size,
        study=results.study,
        compute=results.compute.get(results.baseline),
        baseline=summarize(losses) if losses else None,
    )


def _ladder_arm(
    arm: str,
    against: str,
    results: Sequence[SizeResults],
    *,
    points: Points,
    curve: PowerLaw | None,
    confidence: float,
) -> LadderArm:
    gaps = []
    used = []
    left_out = []
    for each in results:
        judged = {(first, second): (verdict, item) for first, second, verdict, item in each.comparisons}
        verdict, judgement = judged.get((arm, against), (Verdict.NOT_RESOLVED, None))
        is_baseline = against == each.baseline
        gaps.append(
            SizeGap(
                size=each.size,
                verdict=verdict,
                difference=None if judgement is None else judgement.difference,
                standard_error=None if judgement is None else judgement.standard_error,
                interval=None if judgement is None else judgement.interval,
                compute=each.compute.get(arm),
                speedup=_by_law(each, arm, curve, confidence) if is_baseline else None,
                interpolated=_by_points(each, arm, points, confidence) if is_baseline else None,
            )
        )
        compute = each.compute.get(each.baseline)
        # The value that stands for a diverged run is no measurement of the gap.
        if judgement is None or judgement.standard_error == 0 or judgement.imputed or compute is None:
            left_out.append(each.size)
        else:
            used.append((compute, judgement.difference, judgement.standard_error))
    trend = None
    note = f"without {', '.join(left_out)}, whose gap or FLOPs are not known" if left_out else ""
    if len({compute for compute, _, _ in used}) > 1:
        compute, differences, errors = map(list, zip(*used, strict=True))
        trend = gap_trend(compute, gaps=differences, errors=errors, confidence=confidence)
        if trend.slope_interval is None:
            note = f"{note}; " * bool(note) + "two sizes have no interval: a third one gives it"
    return LadderArm(
        arm=arm,
        against=against,
        gaps=tuple(gaps),
        trend=trend,
        adjusted_p=None,
        direction=Direction.NOT_RESOLVED,
        note=note,
    )


def _by_law(results: SizeResults, arm: str, curve: PowerLaw | None, confidence: float) -> Speedup | None:
    losses = results.losses.get(arm)
    compute = results.compute.get(arm)
    if curve is None or not losses or compute is None or min(losses) <= curve.asymptote:
        return None
    speedup = effective_speedup(curve, compute=compute, losses=losses, confidence=confidence)
    return None if speedup.factor is None else speedup


def _by_points(results: SizeResults, arm: str, points: Points, confidence: float) -> Speedup | None:
    losses = results.losses.get(arm)
    compute = results.compute.get(arm)
    if len({at for at, _ in points}) < 2 or not losses or compute is None:
        return None
    return interpolated_speedup(
        [at for at, _ in points],
        [each for _, each in points],
        arm_compute=compute,
        arm_losses=losses,
        confidence=confidence,
    )


def _corrected(arms: Sequence[LadderArm], *, level: float) -> tuple[LadderArm, ...]:
    """Return the arms with the p values of their trends corrected, and the directions that follow."""
    tested = [arm for arm in arms if arm.trend is not None and arm.trend.p_value is not None]
    adjusted = dict(
        zip(
            [(arm.arm, arm.against) for arm in tested],
            holm([arm.trend.p_value for arm in tested if arm.trend and arm.trend.p_value is not None]),
            strict=True,
        )
    )
    return tuple(
        dataclasses.replace(
            arm,
            adjusted_p=p,
            direction=Direction.NOT_RESOLVED if arm.trend is None or p > level else arm.trend.direction,
        )
        if (p := adjusted.get((arm.arm, arm.against))) is not None
        else arm
        for arm in arms
    )


# Text -------------------------------------------------------------------------------------------------------
def ladder_lines(ladder: LadderFindings) -> list[str]:
    """Return sentences on the sizes: verdicts, trends and speed-ups."""
    lines = [f"Ladder {ladder.name} over {', '.join(each.size for each in ladder.sizes)}."]
    for arm in ladder.arms:
        verdicts = "; ".join(
            f"{gap.size} {gap.verdict.value}"
            + ("" if gap.difference is None else f" ({_signed(gap.difference)})")
            for gap in arm.gaps
        )
        lines.append(f"{arm.arm} − {arm.against}: {verdicts}. {trend_text(arm)}")
        speedups = [f"{gap.size} {text}" for gap in arm.gaps if (text := speedup_text(gap))]
        if speedups:
            lines.append(f"Compute that {arm.against} needs to match {arm.arm}: {'; '.join(speedups)}.")
    if (curve := ladder.curve) is not None:
        fit = "" if curve.lack_of_fit_p is None else f" (lack of fit: p {curve.lack_of_fit_p:.2g})"
        above = f" above {curve.asymptote:g}" if curve.asymptote else ""
        lines.append(f"The baseline's loss{above} falls as FLOPs to the power −{curve.exponent:.3g}{fit}.")
    return [*lines, *ladder.notes]


def trend_text(arm: LadderArm) -> str:
    """Return a sentence on the trend of a gap."""
    note = f" ({arm.note})" if arm.note else ""
    if (trend := arm.trend) is None:
        return f"No trend of the gap is known{note}."
    interval = "" if trend.slope_interval is None else f" {_interval(trend.slope_interval)}"
    p = "" if arm.adjusted_p is None else f", p (Holm) {arm.adjusted_p:.2g}"
    is_resolved = arm.direction is not Direction.NOT_RESOLVED
    verdict = f"The gap {arm.direction.value}" if is_resolved else "The trend of the gap is not resolved"
    return f"{verdict}: {_signed(trend.slope)}{interval} for ten times the FLOPs{p}{note}."


def speedup_text(gap: SizeGap) -> str:
    """Return how much more compute the baseline needs, in words; empty if that is not known.

    An interval is that of the power law where there are three sizes or more, otherwise that of the seeds.
    """
    points = gap.interpolated
    law = gap.speedup
    if points is None:
        return "" if law is None else f"{_times(law)} by a power law"
    if points.coverage is Coverage.WITHIN:
        return _times(points if law is None or law.interval is None else law)
    limit = points.limits[1] if points.coverage is Coverage.BEYOND else points.limits[0]
    text = f"{points.coverage.value} {limit:.3g} times, which its sizes do not reach"
    end = None if points.interval is None else points.interval[0 if points.coverage is Coverage.BEYOND else 1]
    if end is None:
        text += ", by its mean"
    elif not math.isclose(end, limit, rel_tol=1e-9):
        text += (
            f", by its mean, and {'at least' if points.coverage is Coverage.BEYOND else 'at most'} {end:.3g}"
        )
    return text if law is None else f"{text} ({_times(law)} by a power law)"


def _times(speedup: Speedup) -> str:
    assert speedup.factor is not None
    text = f"{speedup.factor:.3g} times"
    if speedup.interval is None:
        return text
    # An end that is open lies beyond the sizes.
    low, high = speedup.interval
    ends = (
        f"less than {speedup.limits[0]:.3g}" if low is None else f"{low:.3g}",
        f"more than {speedup.limits[1]:.3g}" if high is None else f"{high:.3g}",
    )
    return f"{text} [{', '.join(ends)}]"


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def _interval(interval: Interval) -> str:
    return f"[{', '.join(_signed(end) for end in interval)}]"
