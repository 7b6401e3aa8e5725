"""The report of a study from its findings, its members and their run directories.

    report = gather("studies/width", findings)
    report = report_of(findings)                       # without runs, as for results from elsewhere

What is not there is left out of the report: a run directory that was deleted, the settings of a foreign run.
"""

import dataclasses
import datetime
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax.studies.findings import COULD_NOT_ANSWER, ArmSummary, Comparison, Findings
from slmjax.studies.layout import budget_line
from slmjax.studies.report.counting import read_costs
from slmjax.studies.report.curves import curve_charts
from slmjax.studies.report.data import (
    ArmReport,
    ComparisonReport,
    Estimate,
    LadderReport,
    LadderRow,
    MemberReport,
    NoiseReport,
    SettingReport,
    StudyReport,
    TextNoise,
    printable,
)
from slmjax.studies.report.planned import Planned, read_planned
from slmjax.studies.report.records import directory_of_run, recorded_members
from slmjax.studies.report.reproducing import reproducing_commands
from slmjax.studies.statistics.ladders import LadderFindings, ladder_lines, speedup_text, trend_text
from slmjax.studies.statistics.samples import Interval, PairedDifference, Summary
from slmjax.studies.study import DIVERGED, FAILED, FINISHED, MEMBERS, STOPPED, Member
from slmjax.telemetry.report.comparison import shown_differences
from slmjax.telemetry.report.reading import RunRecords, read_run
from slmjax.telemetry.run_directory import read_log

# Costs that results have; those that are counted beforehand come with the plan.
_MEASURED = ("tokens", "seconds", "tokens_per_second", "parameters", "memory_bytes", "deployed_bytes")
_VARYING = ("training_seconds", "seconds", "tokens_per_second", "memory_bytes")  # between runs of one arm
_NOT_SETTINGS = ("run.name", "run.directory", "run.seed", "data.seed", "data.cache_dir")
_PACKAGES = ("slmjax", "jax", "jaxlib", "flax", "optax", "numpy")


def report_of(findings: Findings, members: Sequence[Member] = ()) -> StudyReport:
    """Return the report of findings alone: without curves, settings and environment."""
    costs = {arm.arm: {**_found_costs(arm), **_cost_values(arm.arm, members)} for arm in findings.arms}
    power = findings.power
    report = StudyReport(
        study=findings.study,
        question=findings.question,
        metric=findings.metric,
        lower_is_better=findings.rules.lower_is_better,
        confidence=findings.rules.confidence,
        equal_within=findings.rules.equal_within,
        smallest_effect=findings.rules.smallest_effect,
        baseline=findings.baseline,
        seeds=findings.seeds,
        date=datetime.date.today().isoformat(),
        look=_look_text(findings),
        arms=tuple(_arm_report(findings, i, members, costs) for i in range(len(findings.arms))),
        comparisons=tuple(_comparison_report(findings, item) for item in findings.comparisons),
        members=_member_reports(findings, members),
        expected_runs=len(findings.arms) * len(findings.seeds),
        budget=budget_line(findings),
        noise=NoiseReport(
            deviation=findings.noise.deviation,
            degrees_of_freedom=findings.noise.degrees_of_freedom,
            own=dict(findings.noise.own),
            noisy=findings.noise.noisy,
            apart=findings.noise.apart,
            equality_p=findings.noise.equality_p,
            smallest_resolved=findings.smallest_resolved,
        ),
        text=tuple(
            TextNoise(
                arm=item.arm,
                against=item.against,
                seeds_error=item.sources.seed_error,
                text_error=item.sources.text_error,
                documents=item.num_documents,
                advice=item.sources.advice.value,
            )
            for item in findings.text
        ),
        changes=findings.changes,
        # The report says it first, and not among the notes again.
        notes=tuple(note for note in findings.notes if not note.startswith(COULD_NOT_ANSWER)),
        correction=findings.correction.value,
        could_answer=_could_answer(findings) if power is None else power.could_answer,
        smallest_effect_power=None if power is None else power.power,
        smallest_effect_seeds=None if power is None else power.seeds_needed,
        ladder=None if findings.ladder is None else _ladder_report(findings.ladder),
    )
    return printable(report)


def _could_answer(findings: Findings) -> bool | None:
    """Return whether findings of earlier versions would have resolved the smallest effect worth having."""
    effect = findings.rules.smallest_effect
    resolved = findings.smallest_resolved
    return None if effect is None or resolved is None else resolved <= effect


def gather(directory: str | Path, findings: Findings) -> StudyReport:
    """Return the report of a study's directory.

    Args:
      directory: with members.jsonl and the run directories, as `run_study` leaves it.
      findings: the results.
    """
    directory = Path(directory)
    arms = tuple(arm.arm for arm in findings.arms)
    members = recorded_members(directory, arms=arms, seeds=findings.seeds)
    report = report_of(findings, members)
    runs, notes = _read_runs(directory, members)
    statuses = {(member.arm, member.seed): member.status for member in members}
    planned = read_planned(directory)
    counted = read_costs(directory)
    settings_of, settings = _settings(findings, runs, planned)
    report = dataclasses.replace(
        report,
        date=_newest_date(directory),
        arms=tuple(_with_plan(arm, planned, counted.get(arm.name, {})) for arm in report.arms),
        matched=planned.matched,
        tuned=planned.tuned,
        curves=curve_charts(runs, statuses=statuses, metric=findings.metric),
        settings_of=settings_of,
        settings=settings,
        environment=_environment(list(runs.values())),
        commands=reproducing_commands(directory, list(runs.values()), size=planned.size),
        notes=(*report.notes, *notes),
    )
    # Reports are sent around: they name no directories of this machine.
    here = directory.resolve()
    places = {here: "", Path.cwd(): "", Path.home(): "~/"}
    hidden = {f"{path}/": instead for path, instead in places.items() if path != Path(path.anchor)}
    hidden[str(here)] = here.name
    return printable(report, hidden=hidden)


# Findings ---------------------------------------------------------------------------------------------------
def _arm_report(
    findings: Findings,
    index: int,
    members: Sequence[Member],
    costs: Mapping[str, Mapping[str, Sequence[float]]],
) -> ArmReport:
    arm = findings.arms[index]
    own = [member for member in members if member.arm == arm.arm]
    failed = sum(member.status == FAILED for member in own)
    stopped = sum(member.status == STOPPED for member in own)
    finished = sum(member.status == FINISHED for member in own) or len(arm.seeds)
    return ArmReport(
        name=arm.arm,
        seeds=arm.seeds,
        metric=_estimate(arm.metric, arm.interval),
        further_metrics={name: _estimate(item) for name, item in arm.further_metrics.items()},
        costs={name: statistics.fmean(values) for name, values in costs[arm.arm].items()},
        cost_errors=_cost_errors(costs[arm.arm]),
        ended=finished + failed + stopped + len(arm.diverged),
        diverged=len(arm.diverged),
        failed=failed,
        stopped_early=stopped,
        diverged_interval=None if arm.divergence is None else arm.divergence.interval,
    )


def _estimate(summary: Summary | None, interval: Interval | None = None) -> Estimate | None:
    if summary is None:
        return None
    return Estimate(
        num_values=summary.num_values,
        mean=summary.mean,
        deviation=summary.standard_deviation,
        error=summary.standard_error,
        interval=interval,
    )


def _difference_estimate(difference: PairedDifference | None) -> Estimate | None:
    if difference is None:
        return None
    return Estimate(
        num_values=difference.num_pairs,
        mean=difference.mean,
        deviation=difference.standard_deviation,
        error=difference.standard_error,
        interval=difference.t_interval,
    )


def _comparison_report(findings: Findings, item: Comparison) -> ComparisonReport:
    by_seed = {
        seed: value for seed, value in zip(findings.seeds, item.differences, strict=True) if value is not None
    }
    about: dict[str, Any] = {
        "arm": item.arm,
        "against": item.against,
        "verdict": item.verdict.value,
        "reason": item.reason,
        "further_metrics": {name: _difference_estimate(each) for name, each in item.further_metrics.items()},
    }
    judgement = item.judgement
    # A single pair has a difference, but no interval.
    if judgement is None:
        mean = statistics.fmean(by_seed.values()) if by_seed else None
        return ComparisonReport(
            **about, seeds=tuple(by_seed), differences=tuple(by_seed.items()), difference=mean
        )
    return ComparisonReport(
        **about,
        seeds=judgement.seeds,
        imputed=judgement.imputed,
        # Without imputed ones, which are of worst values.
        differences=tuple(by_seed.items()),
        difference=judgement.difference,
        error=judgement.standard_error,
        degrees_of_freedom=judgement.degrees_of_freedom,
        variance=judgement.variance.value,
        interval=judgement.interval,
        bootstrap_interval=judgement.bootstrap_interval,
        p_value=judgement.p_value,
        adjusted_p=judgement.adjusted_p,
        adjusted_equal_p=judgement.adjusted_equal_p,
        seeds_needed=judgement.seeds_needed,
    )


def _ladder_report(ladder: LadderFindings) -> LadderReport:
    rows = [
        LadderRow(
            arm=arm.arm,
            against=arm.against,
            size=gap.size,
            flops=gap.compute,
            verdict=gap.verdict.value,
            difference=gap.difference,
            error=gap.standard_error,
            interval=gap.interval,
            speedup=speedup_text(gap),
        )
        for arm in ladder.arms
        for gap in arm.gaps
    ]
    # Without arms, only the sentences on the baseline are left after the first one.
    _, *notes = ladder_lines(dataclasses.replace(ladder, arms=()))
    trends = [f"{arm.arm} − {arm.against}: {trend_text(arm)}" for arm in ladder.arms]
    return LadderReport(name=ladder.name, rows=tuple(rows), trends=tuple(trends), notes=tuple(notes))


def _look_text(findings: Findings) -> str:
    if findings.look is None:
        return ""
    planned = ", ".join(map(str, findings.rules.looks))
    return (
        f"Look at {findings.look} seeds of those planned ({planned}): verdicts at level {findings.level:.3g}."
    )


def _member_reports(findings: Findings, members: Sequence[Member]) -> tuple[MemberReport, ...]:
    names = (
        findings.metric,
        *(name for arm in findings.arms[:1] for name in arm.further_metrics),
        *_MEASURED,
    )
    reports = [
        MemberReport(
            arm=member.arm,
            seed=member.seed,
            status=member.status,
            metrics={
                name: value
                for name in dict.fromkeys(names)
                if (value := member.metric_value(name)) is not None
            },
            error=member.error,
        )
        for member in members
    ]
    if reports:
        return tuple(reports)
    # Without records of members, the findings still have their values.
    return tuple(
        MemberReport(
            arm=arm.arm,
            seed=seed,
            status=DIVERGED if seed in arm.diverged else FINISHED,
            metrics={} if value is None else {findings.metric: value},
        )
        for arm in findings.arms
        for seed, value in zip(findings.seeds, arm.values, strict=True)
        if value is not None or seed in arm.diverged
    )


def _found_costs(arm: ArmSummary) -> dict[str, list[float]]:
    """Return the costs that findings have of an arm, also where its members are not at hand."""
    costs = {"flops": arm.flops, "memory_bytes": arm.peak_memory_bytes}
    return {name: [value] for name, value in costs.items() if value is not None}


def _cost_values(arm: str, members: Sequence[Member]) -> dict[str, list[float]]:
    """Return the costs of an arm's runs by name."""
    own = [member for member in members if member.arm == arm]
    values = {
        name: [value for member in own if (value := member.metric_value(name)) is not None]
        for name in _MEASURED
    }
    values["training_seconds"] = [seconds for member in own if (seconds := _training_seconds(member))]
    return {name: each for name, each in values.items() if each}


def _training_seconds(member: Member) -> float | None:
    """Return the seconds of all training steps, without compilation, evaluations and saving."""
    tokens = member.metric_value("tokens")
    rate = member.metric_value("tokens_per_second")
    # A run that was resumed knows the pace of its last session alone.
    return None if tokens is None or not rate else tokens / rate


def _cost_errors(values: Mapping[str, Sequence[float]]) -> tuple[tuple[str, float], ...]:
    return tuple(
        (name, statistics.stdev(values[name]) / math.sqrt(len(values[name])))
        for name in _VARYING
        if len(values.get(name, ())) > 1
    )


# Runs -------------------------------------------------------------------------------------------------------
def _read_runs(
    directory: Path, members: Sequence[Member]
) -> tuple[dict[tuple[str, int], RunRecords], list[str]]:
    """Return the runs whose directories are there, by arm and seed, and notes on those that are damaged."""
    runs = {}
    notes = []
    for member in members:
        path = directory_of_run(directory, member)
        if path is None:
            continue
        try:
            runs[member.arm, member.seed] = _for_curves(read_run(path))
        # One damaged run must not hide the others.
        except (ValueError, OSError) as error:
            notes.append(f"{member.arm}, seed {member.seed}: left out of curves and settings ({error}).")
    return runs, notes


def _for_curves(run: RunRecords) -> RunRecords:
    """Return a run without what no curve shows: the logs of many long runs would fill the memory."""
    train = [{"step": record["step"], "loss": record.get("loss")} for record in run.train]
    return dataclasses.replace(run, train=train, samples=[])


def _with_plan(arm: ArmReport, planned: Planned, counted: Mapping[str, float]) -> ArmReport:
    """Return an arm with the costs that were counted; those that were measured count more."""
    about = f"derived from {planned.derived_from[arm.name]}" if arm.name in planned.derived_from else ""
    return dataclasses.replace(arm, about=about, costs={**counted, **arm.costs})


def _settings(
    findings: Findings, runs: Mapping[tuple[str, int], RunRecords], planned: Planned
) -> tuple[tuple[str, ...], tuple[SettingReport, ...]]:
    """Return the arms whose settings are known, and the settings that differ between them."""
    # The first seed stands for all: seeds of an arm differ in the seed alone.
    trained = {arm: run for (arm, _), run in sorted(runs.items(), key=lambda item: -item[0][1])}
    first = {**planned.experiments, **trained}
    arms = [arm.arm for arm in findings.arms if arm.arm in first]
    if len(arms) < 2:
        return (), ()
    rows = shown_differences([first[arm] for arm in arms], most=None).rows
    return tuple(arms), tuple(
        SettingReport(path=path, values=tuple(values)) for path, *values in rows if path not in _NOT_SETTINGS
    )


def _environment(runs: Sequence[RunRecords]) -> tuple[tuple[str, str], ...]:
    """Return versions and devices that the runs had, each once."""
    values: dict[str, dict[str, None]] = {}
    for run in runs:
        recorded = run.environment
        packages = recorded.get("packages")
        packages = packages if isinstance(packages, dict) else {}
        devices = recorded.get("devices")
        entries = {
            "commit": str(recorded.get("commit") or (run.result or {}).get("commit") or "")[:12],
            "uncommitted changes": "yes" if recorded.get("dirty") else "",
            "python": recorded.get("python"),
            **{name: packages.get(name) for name in _PACKAGES},
            "machine": recorded.get("machine"),
            "processors": recorded.get("cpu_count"),
            "devices": _devices_text(devices) if isinstance(devices, list) else None,
        }
        for name, value in entries.items():
            if value not in (None, ""):
                values.setdefault(name, {})[str(value)] = None
    # Members of a study may have run on several machines.
    return tuple((name, "; ".join(each)) for name, each in values.items())


def _devices_text(devices: Sequence[Any]) -> str:
    kinds = dict.fromkeys(map(str, devices))
    return ", ".join(f"{devices.count(kind)} x {kind}" for kind in kinds)


def _newest_date(directory: Path) -> str:
    path = directory / MEMBERS
    times = [record.get("time") for record in read_log(path, kind="member")] if path.is_file() else []
    seconds = max((time for time in times if isinstance(time, int | float)), default=None)
    day = datetime.date.today() if seconds is None else datetime.date.fromtimestamp(seconds)
    return day.isoformat()
