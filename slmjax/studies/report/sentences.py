"""Findings in words and digits: verdicts, differences, costs.

summary(report)          # "Better than base: wide. Not resolved: deep (about 9 seeds would)."
verdict_text(report, comparison)                          # "equal within 0.005"
"""

from collections.abc import Sequence

from slmjax.studies.report.data import ArmReport, ComparisonReport, Estimate, StudyReport
from slmjax.studies.text_tables import ABSENT, in_words, interval_text, num_decimals, signed

BETTER = "better"
WORSE = "worse"
EQUAL = "equal"
NOT_RESOLVED = "not resolved"
NO_RESULT = "no result"  # of a comparison without a pair of runs
VERDICTS = (BETTER, EQUAL, NOT_RESOLVED, WORSE, NO_RESULT)

MOST_NAMES = 3  # arms that a heading names; more are counted


def metric_words(report: StudyReport) -> str:
    """Return the metric in words, with the direction that is better."""
    return f"{in_words(report.metric)}, {'lower' if report.lower_is_better else 'higher'} is better"


def confidence_text(report: StudyReport) -> str:
    """Return the confidence of intervals, such as "95%"."""
    return f"{100 * report.confidence:g}%"


# Verdicts ---------------------------------------------------------------------------------------------------
def verdict_text(report: StudyReport, comparison: ComparisonReport) -> str:
    """Return a verdict with its margin, with the seeds that would resolve it, or with why nothing would."""
    if comparison.difference is None:
        return NO_RESULT
    if comparison.verdict == EQUAL and report.equal_within is not None:
        return f"{EQUAL} within {report.equal_within:g}"
    if comparison.verdict == NOT_RESOLVED and comparison.seeds_needed is not None:
        return f"{NOT_RESOLVED} (about {comparison.seeds_needed:,} seeds would)"
    if comparison.verdict == NOT_RESOLVED and comparison.reason:
        return f"{NOT_RESOLVED}: {comparison.reason}"
    return comparison.verdict


def comparison_name(report: StudyReport, comparison: ComparisonReport) -> str:
    """Return the arm of a comparison with the baseline, and both arms of any other."""
    if comparison.against == report.baseline:
        return comparison.arm
    return f"{comparison.arm} − {comparison.against}"


def summary(report: StudyReport) -> str:
    """Return the verdicts as sentences, with the names of all arms."""
    if not report.comparisons:
        return "There is no comparison yet."
    of_baseline = [item for item in report.comparisons if item.against == report.baseline]
    sentences = []
    for verdict in VERDICTS:
        names = [_named(report, item) for item in of_baseline if _verdict(item) == verdict]
        if names:
            sentences.append(f"{_headline(report, verdict)}: {', '.join(names)}.")
    # Pairs without the baseline have a sentence each.
    for item in report.comparisons:
        if item.against != report.baseline:
            arm, against = (quoted(name) for name in (item.arm, item.against))
            sentences.append(f"{arm} against {against}: {verdict_text(report, item)}.")
    return " ".join(sentences)


def answer_text(report: StudyReport) -> str:
    """Return a sentence if the study could not have found the smallest difference worth having; else empty.

    A study whose comparisons are all resolved has its answer all the same.
    """
    unresolved = [item for item in report.comparisons if item.verdict == NOT_RESOLVED]
    if report.could_answer is not False or not unresolved or report.noise is None:
        return ""
    resolved = report.noise.smallest_resolved
    if resolved is None or report.smallest_effect is None:
        return ""
    ended = sum(arm.ended for arm in report.arms)
    is_complete = report.expected_runs is None or ended >= report.expected_runs
    subject = "This study could not have answered" if is_complete else "The runs so far cannot answer"
    its = "its" if is_complete else "the"
    names = ", ".join(comparison_name(report, item) for item in unresolved)
    about = f" for {names}" if len(unresolved) < len(report.comparisons) else ""
    return (
        f"{subject} {its} question{about}: a difference has to be {resolved:.2g} {in_words(report.metric)} "
        f"to be found 4 times in 5, and the smallest one worth having was set to {report.smallest_effect:g}."
    )


def short_summary(report: StudyReport) -> str:
    """Return the verdicts for a heading: names of few arms, else their number."""
    parts = []
    for verdict in VERDICTS:
        names = [_short_name(report, item) for item in report.comparisons if _verdict(item) == verdict]
        if names:
            parts.append(f"{verdict}: {', '.join(names) if len(names) <= MOST_NAMES else len(names)}")
    return "; ".join(parts) or "no verdict yet"


def _verdict(comparison: ComparisonReport) -> str:
    return NO_RESULT if comparison.difference is None else comparison.verdict


def _short_name(report: StudyReport, comparison: ComparisonReport) -> str:
    arm, against = (quoted(name) for name in (comparison.arm, comparison.against))
    return arm if comparison.against == report.baseline else f"{arm} against {against}"


def quoted(name: str) -> str:
    """Return a name in quotes if it has a comma, which would look like the end of the name in a sentence."""
    return f"“{name}”" if "," in name else name


def _named(report: StudyReport, comparison: ComparisonReport) -> str:
    name = quoted(comparison.arm)
    if comparison.verdict == NOT_RESOLVED and comparison.seeds_needed is not None:
        return f"{name} (about {comparison.seeds_needed:,} seeds would)"
    return name


def _headline(report: StudyReport, verdict: str) -> str:
    if verdict in (BETTER, WORSE):
        return f"{verdict.capitalize()} than {report.baseline}"
    if verdict == EQUAL and report.equal_within is not None:
        return f"Equal to {report.baseline} within {report.equal_within:g}"
    return verdict.capitalize()


def progress_text(report: StudyReport) -> str:
    """Return how many runs ended, and how."""
    ended = sum(arm.ended for arm in report.arms)
    of_all = (
        f" of {report.expected_runs:,}"
        if report.expected_runs is not None and report.expected_runs > ended
        else ""
    )
    parts = [f"{ended:,}{of_all} runs ended" if of_all else f"{ended:,} runs"]
    for count, word in (
        (sum(arm.diverged for arm in report.arms), "diverged"),
        (sum(arm.failed for arm in report.arms), "failed"),
        (sum(arm.stopped_early for arm in report.arms), "stopped early"),
    ):
        if count:
            parts.append(f"{count:,} {word}")
    return ", ".join(parts)


def losers(report: StudyReport) -> list[str]:
    """Return a sentence for each arm that is worse than another, diverged or failed."""
    sentences = [
        f"{item.arm} is worse than {item.against}: {difference_text(item)} {in_words(report.metric)}, "
        f"{confidence_text(report)} interval {interval_of(item)}."
        for item in report.comparisons
        if item.verdict == WORSE
    ]
    # The other side of a verdict: the baseline loses, too.
    winners: dict[str, list[str]] = {}
    for item in report.comparisons:
        if item.verdict == BETTER:
            winners.setdefault(item.against, []).append(f"{item.arm} ({difference_text(item)})")
    sentences += [f"{arm} loses to {', '.join(names)}." for arm, names in winners.items()]
    for arm in report.arms:
        if arm.diverged or arm.failed or arm.stopped_early:
            parts = [f"{arm.diverged} diverged"] * bool(arm.diverged)
            parts += [f"{arm.failed} failed"] * bool(arm.failed)
            parts += [f"{arm.stopped_early} stopped early"] * bool(arm.stopped_early)
            sentences.append(f"{arm.name}: of {arm.ended} runs, {' and '.join(parts)}.")
    return sentences


def ladder_sentences(report: StudyReport) -> tuple[str, ...]:
    """Return the trends over the sizes of a ladder, and notes on them; empty without one."""
    return () if report.ladder is None else (*report.ladder.trends, *report.ladder.notes)


# Numbers ----------------------------------------------------------------------------------------------------
def comparison_decimals(comparison: ComparisonReport) -> int:
    """Return the decimals of a comparison's numbers: no more than its noise allows."""
    difference = comparison.difference or 0.0
    if comparison.error:
        return num_decimals(comparison.error, difference)
    # Of a single seed the noise is not known: more digits would suggest that it is small.
    return max(num_decimals(None, difference) - 2, 0)


def difference_text(comparison: ComparisonReport) -> str:
    """Return the mean difference with its sign."""
    if comparison.difference is None:
        return ABSENT
    return signed(comparison.difference, comparison_decimals(comparison))


def interval_of(comparison: ComparisonReport) -> str:
    """Return the interval of the difference."""
    # Without noise an interval has no width, and would look exact.
    if comparison.interval is None or not comparison.error:
        return ABSENT
    return interval_text(comparison.interval, comparison_decimals(comparison))


def p_text(value: float | None) -> str:
    """Return a p value; the tests of a few seeds do not support more digits."""
    if value is None:
        return ABSENT
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def estimate_texts(column: Sequence[Estimate | None]) -> list[str]:
    """Return means ± standard deviations, all with the decimals of the estimate with the least noise."""
    decimals = max((num_decimals(item.error, item.mean) for item in column if item is not None), default=0)
    return [
        ABSENT
        if item is None
        else f"{item.mean:,.{decimals}f}"
        + ("" if item.deviation is None else f" ± {item.deviation:,.{decimals}f}")
        for item in column
    ]


def signed_estimate(item: Estimate | None) -> str:
    """Return a mean difference with its interval."""
    if item is None:
        return ABSENT
    decimals = num_decimals(item.error, item.mean)
    interval = "" if item.interval is None or not item.error else f" {interval_text(item.interval, decimals)}"
    return f"{signed(item.mean, decimals)}{interval}"


def freedom_text(degrees: float) -> str:
    """Return a number of degrees of freedom, which are not whole where variances differ."""
    return f"{degrees:.3g} degree{'' if degrees == 1 else 's'} of freedom"


def runs_text(arm: ArmReport) -> str:
    """Return the runs of an arm: those with a metric, and those that diverged or failed."""
    is_complete = not arm.diverged and not arm.failed and not arm.stopped_early
    parts = [str(len(arm.seeds)) if is_complete else f"{len(arm.seeds)} finished"]
    if arm.diverged:
        interval = (
            ""
            if arm.diverged_interval is None
            else f" ({arm.diverged_interval[0]:.0%} to {arm.diverged_interval[1]:.0%})"
        )
        parts.append(f"{arm.diverged} diverged{interval}")
    if arm.failed:
        parts.append(f"{arm.failed} failed")
    if arm.stopped_early:
        parts.append(f"{arm.stopped_early} stopped early")
    return ", ".join(parts)


def count_text(value: float) -> str:
    """Return a count in full, so that two that differ look different; a very large one is rounded."""
    if value >= 1e12:
        return f"{value:.6g}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.4g}"


def bytes_text(value: float) -> str:
    """Return a number of bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.4g} {name}"
    return f"{value:.0f} B"


def seconds_text(value: float) -> str:
    """Return a duration."""
    if value < 100:
        return f"{value:.3g} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
