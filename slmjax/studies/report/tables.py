"""The tables of a report, as text: the same for the page, Markdown and LaTeX."""

import dataclasses
from collections.abc import Callable

from slmjax.studies.report.data import ComparisonReport, StudyReport
from slmjax.studies.report.sentences import (
    bytes_text,
    comparison_name,
    confidence_text,
    count_text,
    difference_text,
    estimate_texts,
    freedom_text,
    interval_of,
    metric_words,
    p_text,
    runs_text,
    seconds_text,
    signed_estimate,
    verdict_text,
)
from slmjax.studies.text_tables import (
    ABSENT,
    TextTable,
    in_words,
    interval_text,
    listed,
    num_decimals,
    signed,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run of an arm costs."""

    title: str
    text: Callable[[float], str]
    axis: str = ""  # title of its axis where quality is shown against it; empty where that is no question


# By name in `ArmReport.costs`, in the order of the table.
COSTS = {
    "parameters": Cost(title="parameters", text=count_text, axis="parameters"),
    "non_embedding_parameters": Cost(title="without embedding", text=count_text),
    "active_parameters": Cost(title="active", text=count_text),
    "flops": Cost(title="training FLOPs", text=lambda value: f"{value:.4g}", axis="training FLOPs"),
    "tokens": Cost(title="tokens", text=count_text, axis="tokens"),
    "training_seconds": Cost(title="training time", text=seconds_text, axis="seconds of training"),
    "seconds": Cost(title="wall time", text=seconds_text, axis="seconds of wall time"),
    "tokens_per_second": Cost(title="tokens/s", text=count_text),
    "memory_bytes": Cost(title="peak memory", text=bytes_text),
    "deployed_bytes": Cost(title="deployed", text=bytes_text, axis="deployed bytes"),
    "cache_bytes": Cost(title="cache", text=bytes_text),
}


def verdicts_table(report: StudyReport) -> TextTable:
    """Return a row for each comparison, with its verdict."""
    has_margin = report.equal_within is not None
    rows = tuple(
        (
            comparison_name(report, item),
            verdict_text(report, item),
            difference_text(item),
            interval_of(item),
            p_text(item.adjusted_p),
            *([p_text(item.adjusted_equal_p)] if has_margin else []),
            _seeds_text(item),
        )
        for item in report.comparisons
    )
    head = (
        "arm",
        "verdict",
        f"difference to {report.baseline}",
        f"{confidence_text(report)} interval",
        f"p ({report.correction})",
        *(["p of equality"] if has_margin else []),
        "seeds",
    )
    return TextTable(title=f"Verdicts: {metric_words(report)}", head=head, rows=rows)


def short_table(report: StudyReport) -> TextTable:
    """Return the verdicts in four columns, for a README: the arms with their metric, the baseline first."""
    names = [arm.name for arm in report.arms]
    means = dict(zip(names, estimate_texts([arm.metric for arm in report.arms]), strict=True))
    rows = [(report.baseline, means[report.baseline], "", "baseline")] if report.baseline in means else []
    for item in report.comparisons:
        interval = interval_of(item)
        difference = f"{difference_text(item)}{'' if interval == ABSENT else f' {interval}'}"
        # Of a pair of other arms the difference alone says something.
        mean = means.get(item.arm, ABSENT) if item.against == report.baseline else ""
        rows.append((comparison_name(report, item), mean, difference, verdict_text(report, item)))
    head = (
        "arm",
        in_words(report.metric),
        f"difference ({confidence_text(report)} interval)",
        "verdict",
    )
    return TextTable(title=f"Verdicts: {metric_words(report)}", head=head, rows=tuple(rows))


def log_table(report: StudyReport) -> TextTable:
    """Return a row for each arm and comparison: metric, difference, p and verdict; with costs that differ."""
    short = short_table(report)
    compared = {comparison_name(report, item): item for item in report.comparisons}
    costs = {arm.name: arm.costs for arm in report.arms}
    names = [name for name in _LOGGED if name in _shown_costs(report) and name not in shared_costs(report)]
    rows = []
    for arm, mean, difference, verdict in short.rows:
        p = p_text(compared[arm].adjusted_p) if arm in compared else ""
        known = costs.get(arm, {})
        texts = [COSTS[name].text(known[name]) if name in known else "" for name in names]
        rows.append((arm, mean, difference, p, verdict, *texts))
    head = (*short.head[:3], f"p ({report.correction})", "verdict", *(COSTS[name].title for name in names))
    return TextTable(title="", head=head, rows=tuple(rows))


# Of the costs, those that an entry of a log has.
_LOGGED = ("parameters", "flops", "tokens", "deployed_bytes", "cache_bytes")


def shared_costs(report: StudyReport) -> dict[str, float]:
    """Return the costs that are the same for all arms, up to a thousandth, with the first arm's value."""
    shared = {}
    for name in _LOGGED:
        values = [arm.costs[name] for arm in report.arms if name in arm.costs]
        if len(values) == len(report.arms) and max(values) <= 1.001 * min(values):
            shared[name] = values[0]
    return shared


def _seeds_text(comparison: ComparisonReport) -> str:
    count = str(len(comparison.seeds))
    return f"{count} ({len(comparison.imputed)} imputed)" if comparison.imputed else count


def arms_table(report: StudyReport) -> TextTable:
    """Return a row for each arm: its metric and its runs."""
    metric = in_words(report.metric)
    means = estimate_texts([arm.metric for arm in report.arms])
    columns: dict[str, list[str]] = {
        f"{metric}, mean ± sd": means,
        f"{confidence_text(report)} interval": [_mean_interval(report, i) for i in range(len(report.arms))],
        "runs": [runs_text(arm) for arm in report.arms],
    }
    # An interval needs two seeds: of a study with one, the column would be empty.
    columns = {name: cells for name, cells in columns.items() if any(cell != ABSENT for cell in cells)}
    names = [f"{arm.name} ({arm.about})" if arm.about else arm.name for arm in report.arms]
    rows = tuple((name, *cells) for name, *cells in zip(names, *columns.values(), strict=True))
    title = f"Arms: {metric_words(report)}; seeds {listed(report.seeds)}"
    return TextTable(title=title, head=("arm", *columns), rows=rows)


def _mean_interval(report: StudyReport, index: int) -> str:
    estimate = report.arms[index].metric
    if estimate is None or estimate.interval is None:
        return ABSENT
    decimals = num_decimals(estimate.error, estimate.mean)
    return f"[{', '.join(f'{end:,.{decimals}f}' for end in estimate.interval)}]"


def costs_table(report: StudyReport) -> TextTable | None:
    """Return a row for each arm: its size, and what its runs cost; None where that is not known."""
    names = _shown_costs(report)
    if not names:
        return None
    rows = tuple(
        (arm.name, *(COSTS[name].text(arm.costs[name]) if name in arm.costs else ABSENT for name in names))
        for arm in report.arms
    )
    head = ("arm", *(COSTS[name].title for name in names))
    return TextTable(title="Size and cost of a run, mean over seeds", head=head, rows=rows)


def time_note(report: StudyReport) -> str:
    """Return a sentence on the two times in the table of costs; empty if it has not both."""
    if not {"training_seconds", "seconds"} <= set(_shown_costs(report)):
        return ""
    return "Training time is that of the steps; wall time has compilation, evaluations and saving, too."


def _shown_costs(report: StudyReport) -> list[str]:
    names = [name for name in COSTS if any(name in arm.costs for arm in report.arms)]
    # Parameters that a token uses are a question of experts alone.
    has_experts = any(
        arm.costs.get("active_parameters") not in (None, arm.costs.get("parameters")) for arm in report.arms
    )
    return [name for name in names if name != "active_parameters" or has_experts]


def further_table(report: StudyReport) -> TextTable | None:
    """Return further metrics, which have no verdict; None if there are none."""
    names = list(dict.fromkeys(name for arm in report.arms for name in arm.further_metrics))
    if not names:
        return None
    by_arm = {item.arm: item for item in report.comparisons if item.against == report.baseline}
    columns: dict[str, list[str]] = {}
    for name in names:
        columns[in_words(name)] = estimate_texts([arm.further_metrics.get(name) for arm in report.arms])
        differences = [
            signed_estimate(by_arm[arm.name].further_metrics.get(name)) if arm.name in by_arm else ""
            for arm in report.arms
        ]
        # Without pairs of seeds there is no difference.
        if any(cell not in ("", ABSENT) for cell in differences):
            columns[f"difference, {in_words(name)}"] = differences
    rows = tuple((arm.name, *cells) for arm, *cells in zip(report.arms, *columns.values(), strict=True))
    return TextTable(title="Further metrics, without a verdict", head=("arm", *columns), rows=rows)


def statistics_table(report: StudyReport) -> TextTable:
    """Return the statistics of each comparison, for those who check them."""
    rows = []
    for item in report.comparisons:
        decimals = num_decimals(item.error, item.difference or 0.0)
        bootstrap = (
            ABSENT
            if item.bootstrap_interval is None or not item.error
            else interval_text(item.bootstrap_interval, decimals)
        )
        freedom = ABSENT if item.degrees_of_freedom is None else f"{item.degrees_of_freedom:.3g}"
        rows.append(
            (
                comparison_name(report, item),
                ABSENT if item.error is None else f"{item.error:.3g}",
                freedom,
                item.variance or ABSENT,
                bootstrap,
                p_text(item.p_value),
                p_text(item.adjusted_p),
                p_text(item.adjusted_equal_p),
            )
        )
    head = (
        "arm",
        "standard error",
        "degrees of freedom",
        "variance",
        "bootstrap interval",
        "p",
        f"p ({report.correction})",
        f"p of equality ({report.correction})",
    )
    return TextTable(title="Statistics of the comparisons", head=head, rows=tuple(rows))


def ladder_table(report: StudyReport) -> TextTable | None:
    """Return a row for each comparison at each size of a ladder; None without one."""
    if report.ladder is None or not report.ladder.rows:
        return None
    rows = []
    for item in report.ladder.rows:
        decimals = num_decimals(item.error, item.difference or 0.0)
        has_interval = item.interval is not None and item.error
        rows.append(
            (
                item.arm if item.against == report.baseline else f"{item.arm} − {item.against}",
                item.size,
                ABSENT if item.flops is None else f"{item.flops:.4g}",
                item.verdict,
                ABSENT if item.difference is None else signed(item.difference, decimals),
                interval_text(item.interval, decimals) if item.interval and has_interval else ABSENT,
                item.speedup or ABSENT,
            )
        )
    head = (
        "arm",
        "size",
        "training FLOPs",
        "verdict",
        f"difference to {report.baseline}",
        f"{confidence_text(report)} interval",
        f"compute that {report.baseline} needs to match",
    )
    return TextTable(title=f"Sizes of the ladder {report.ladder.name}", head=head, rows=tuple(rows))


def noise_table(report: StudyReport) -> TextTable | None:
    """Return the standard deviation between seeds of each arm; None where it is not known."""
    noise = report.noise
    if noise is None or not noise.own:
        return None
    judged = dict.fromkeys(noise.apart, "its own differences: may be noisier than the others")
    judged |= dict.fromkeys(noise.noisy, "its own differences: noisier than the others")
    rows = [(name, f"{deviation:.3g}", judged.get(name, "pooled")) for name, deviation in noise.own.items()]
    if noise.deviation is not None:
        freedom = freedom_text(noise.degrees_of_freedom)
        rows.append(("all, pooled", f"{noise.deviation:.3g}", freedom))
    head = ("arm", f"standard deviation of {in_words(report.metric)}", "judged by")
    return TextTable(title="Noise between seeds", head=head, rows=tuple(rows))


def text_table(report: StudyReport) -> TextTable | None:
    """Return the uncertainty by seeds next to that by held-out text; None where it is not known."""
    if not report.text:
        return None
    rows = tuple(
        (
            item.arm if item.against == report.baseline else f"{item.arm} − {item.against}",
            ABSENT if item.seeds_error is None else f"{item.seeds_error:.3g}",
            ABSENT if item.text_error is None else f"{item.text_error:.3g}",
            ABSENT if item.documents is None else f"{item.documents:,}",
            item.advice or ABSENT,
        )
        for item in report.text
    )
    head = ("arm", "standard error by seeds", "by held-out text", "documents", "what would help more")
    return TextTable(title="Uncertainty of the held-out text", head=head, rows=rows)


def matching_table(report: StudyReport) -> TextTable | None:
    """Return what was made equal, and how; None if nothing was."""
    if not report.matched:
        return None
    rows = tuple(
        (
            item.arm,
            in_words(item.quantity),
            ABSENT if item.target is None else count_text(item.target),
            ABSENT if item.before is None else count_text(item.before),
            ABSENT if item.after is None else count_text(item.after),
            item.changed or ABSENT,
            "yes" if item.is_met else "no",
        )
        for item in report.matched
    )
    head = ("arm", "quantity", "target", "before", "after", "changed", "equal")
    return TextTable(title="Quantities made equal", head=head, rows=rows)


def tuning_table(report: StudyReport) -> TextTable | None:
    """Return the learning rate of each arm, and how it was chosen; None if rates were not tuned."""
    if not report.tuned:
        return None
    rows = tuple(
        (
            item.arm,
            f"{item.rate:.3g}",
            "yes" if item.is_resolved else "no: widen the range",
            ", ".join(
                f"{rate:.3g}: {'did not finish' if value is None else f'{value:.4f}'}"
                for rate, value in item.tried
            ),
            ABSENT if item.sensitivity is None else f"{item.sensitivity:.3g}",
            listed(item.seeds),
        )
        for item in report.tuned
    )
    head = (
        "arm",
        "rate",
        "optimum inside the range",
        f"tried, with {in_words(report.metric)}",
        "sensitivity",
        "tuning seeds",
    )
    return TextTable(title="Learning rates", head=head, rows=rows)


def sensitivity_note(report: StudyReport) -> str:
    """Return a sentence on the sensitivity in the table of learning rates; empty without one."""
    if all(item.sensitivity is None for item in report.tuned):
        return ""
    return (
        "Sensitivity: by how much the mean over the rates that were tried is worse than the best, in "
        f"{in_words(report.metric)}."
    )


def settings_table(report: StudyReport) -> TextTable | None:
    """Return the settings that differ between arms; None if none is known."""
    if not report.settings:
        return None
    rows = tuple((item.path, *item.values) for item in report.settings)
    return TextTable(title="Settings that differ", head=("setting", *report.settings_of), rows=rows)


def report_tables(report: StudyReport) -> list[TextTable]:
    """Return all tables in the order of a reader's questions."""
    tables = [
        verdicts_table(report) if report.comparisons else None,
        arms_table(report) if report.arms else None,
        costs_table(report),
        further_table(report),
        ladder_table(report),
        noise_table(report),
        text_table(report),
        matching_table(report),
        tuning_table(report),
        settings_table(report),
        statistics_table(report) if report.comparisons else None,
    ]
    return [table for table in tables if table is not None]
