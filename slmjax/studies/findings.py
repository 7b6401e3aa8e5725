"""Findings of a study: each arm over its seeds, paired differences with intervals, verdicts, and caveats.

    findings = analyze(study, members, further=(("from layers", "from scratch"),))
    findings.comparisons[0].verdict                  # Verdict.BETTER

Every arm is compared with the baseline, in addition to further pairs. All comparisons are one family for
Holm's correction, with p = 1 for those that could not be made. `layout.py` formats findings as tables.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from slmjax.config import fingerprint, near_names
from slmjax.data import provenance
from slmjax.data.lost_text import lost_note
from slmjax.runner import trainer
from slmjax.studies.arms import Arm, Derived
from slmjax.studies.statistics.samples import PairedDifference, Summary, holm, paired_difference, summarize
from slmjax.studies.statistics.verdicts import Verdict, decide
from slmjax.studies.study import FINISHED, Member, Study, member_experiment

COMPLETIONS = f"the completions of {trainer.ALL}"  # as in `EvalResult.measured_on`
FEW_PAIRS = 6  # with fewer, bootstrap intervals are much too narrow


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One arm over its seeds."""

    arm: str
    seeds: tuple[int, ...]  # that finished with a finite metric
    metric: Summary | None  # None while no seed has finished
    further_metrics: dict[str, Summary | None]
    budget: Summary | None  # of the metric that should be equal for all arms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm minus another."""

    arm: str
    against: str
    seeds: tuple[int, ...]  # that both finished
    difference: PairedDifference | None  # of the metric; None with fewer than two pairs
    adjusted_p: float | None  # by Holm, over all comparisons of the study
    verdict: Verdict  # on `arm`
    further_metrics: dict[str, PairedDifference | None]  # without a verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """All results of a study."""

    study: str
    metric: str
    lower_is_better: bool
    confidence: float
    baseline: str
    seeds: tuple[int, ...]
    arms: tuple[ArmSummary, ...]
    comparisons: tuple[Comparison, ...]  # those with the baseline, then the further ones
    budget: str  # the metric that should be equal
    is_matched: bool | None  # whether it is; None if no two arms have finished a seed
    notes: tuple[str, ...]  # caveats: what was left out, or does not compare


def analyze(study: Study, members: Sequence[Member], *, further: Sequence[tuple[str, str]] = ()) -> Findings:
    """Analyze a study, which need not be complete.

    Args:
      study: arms, seeds and metric.
      members: as returned by `run_study` and `read_members`.
      further: pairs (arm, the arm it is compared with) in addition to each arm and the baseline.

    Raises:
      ValueError: a pair names no arms or is given twice, or no run has a metric of a requested name.
    """
    by_key = {(member.arm, member.seed): member for member in members}
    pairs = _pairs(study, further)
    # A metric that no run has is a mistake in its name; one that some runs lack is a note.
    _check_metrics(study, members)
    differences = [_differences(study, by_key, pair, study.metric) for pair in pairs]
    # Comparisons without enough pairs stay in the family, so that the correction does not depend on failures.
    adjusted = holm([1.0 if difference is None else difference.p_value for difference in differences])
    comparisons = tuple(
        Comparison(
            arm=pair[0],
            against=pair[1],
            seeds=_paired_seeds(study, by_key, pair, study.metric),
            difference=difference,
            adjusted_p=None if difference is None else p,
            # The interval is still shown for arms that do not compare, but no verdict is drawn from it.
            verdict=Verdict.NOT_RESOLVED
            if difference is None or not _is_comparable(study, by_key, pair)
            else decide(
                difference.mean, p, lower_is_better=study.lower_is_better, level=1 - study.confidence
            ),
            # Without a verdict: further tests would have to join the family of Holm's correction.
            further_metrics={name: _differences(study, by_key, pair, name) for name in study.further_metrics},
        )
        for pair, difference, p in zip(pairs, differences, adjusted, strict=True)
    )
    # Caveats of a report are collected here, so that no layout can leave them out.
    is_matched, budget_notes = _budget(study, by_key)
    notes = (
        *_notes_of_members(study, by_key),
        *budget_notes,
        *_notes_of_data(study, members),
        *_notes_of_changed_text(study, members),
        *_notes_of_lost_text(study, by_key),
        *_notes_of_noise(study, comparisons),
        *_notes_of_commits(members),
    )
    return Findings(
        study=study.name,
        metric=study.metric,
        lower_is_better=study.lower_is_better,
        confidence=study.confidence,
        baseline=study.baseline,
        seeds=study.seeds,
        arms=tuple(_arm_summary(study, by_key, arm) for arm in study.arms),
        comparisons=comparisons,
        budget=study.budget.metric,
        is_matched=is_matched,
        notes=notes,
    )


# Pairs ------------------------------------------------------------------------------------------------------
Members = dict[tuple[str, int], Member]  # by arm and seed
Pair = tuple[str, str]


def _pairs(study: Study, further: Sequence[Pair]) -> list[Pair]:
    # The order of the study, in which tables show the arms.
    pairs = [(arm.name, study.baseline) for arm in study.arms if arm.name != study.baseline]
    for arm, against in further:
        if study.arm(arm) is study.arm(against):
            raise ValueError(f"{arm!r} cannot be compared with itself: name two arms")
        # A pair that is tested twice would make Holm's correction stricter for nothing.
        if (arm, against) in pairs or (against, arm) in pairs:
            raise ValueError(
                f"{arm!r} is compared with {against!r} already (every arm is with the baseline): name the "
                "pair once"
            )
        pairs.append((arm, against))
    return pairs


def _check_metrics(study: Study, members: Sequence[Member]) -> None:
    # Before the first member has finished, no metric is known.
    known = {name for member in members for name in member.metric_names}
    for name in (study.metric, study.budget.metric, *study.further_metrics):
        if known and name not in known:
            raise ValueError(
                f"no run of the study has a metric {name!r}.{near_names(name, known)} There are "
                f"{', '.join(sorted(known))}"
            )


def _metric_value(by_key: Members, arm: str, seed: int, name: str) -> float | None:
    member = by_key.get((arm, seed))
    return None if member is None else member.metric_value(name)


def _paired_seeds(study: Study, by_key: Members, pair: Pair, name: str) -> tuple[int, ...]:
    return tuple(
        seed
        for seed in study.seeds
        if all(_metric_value(by_key, arm, seed, name) is not None for arm in pair)
    )


def _values(by_key: Members, arm: str, seeds: Sequence[int], name: str) -> list[float]:
    return [value for seed in seeds if (value := _metric_value(by_key, arm, seed, name)) is not None]


def _differences(study: Study, by_key: Members, pair: Pair, name: str) -> PairedDifference | None:
    # Seeds that only one arm has are left out: unpaired values would add the noise between seeds.
    seeds = _paired_seeds(study, by_key, pair, name)
    # A single difference has no noise to compare it with.
    if len(seeds) < 2:
        return None
    first, second = (_values(by_key, arm, seeds, name) for arm in pair)
    return paired_difference(first, second, confidence=study.confidence)


def _lost_text(by_key: Members, arm: str, seeds: Sequence[int]) -> set[float]:
    """Return the fractions of the text lost by the tokenizers of an arm; empty if no member has finished."""
    # Results without the field are of tokenizers that lose nothing.
    return {_metric_value(by_key, arm, seed, "lost_text") or 0.0 for seed in seeds if (arm, seed) in by_key}


def _is_comparable(study: Study, by_key: Members, pair: Pair) -> bool:
    """Return whether bits per byte compare: both arms' tokenizers lose the same fraction of the text."""
    # Text that a tokenizer loses costs nothing, so that bits per byte of two arms would differ for that
    # reason.
    first, second = (_lost_text(by_key, arm, study.seeds) for arm in pair)
    return study.metric != "bits_per_byte" or first == second


def _arm_summary(study: Study, by_key: Members, arm: Arm | Derived) -> ArmSummary:
    def summary(name: str) -> Summary | None:
        values = _values(by_key, arm.name, study.seeds, name)
        return summarize(values) if values else None

    # The seeds of the arm alone: more than those of its pairs, if the other arm lacks some.
    seeds = tuple(
        seed for seed in study.seeds if _metric_value(by_key, arm.name, seed, study.metric) is not None
    )
    return ArmSummary(
        arm=arm.name,
        seeds=seeds,
        metric=summary(study.metric),
        further_metrics={name: summary(name) for name in study.further_metrics},
        budget=summary(study.budget.metric),
    )


# Caveats ----------------------------------------------------------------------------------------------------
def _notes_of_members(study: Study, by_key: Members) -> list[str]:
    """Return notes on seeds that are left out: arms that lose their worst runs look better than they are."""
    notes = []
    for seed in study.seeds:
        for arm in study.arms:
            member = by_key.get((arm.name, seed))
            if member is None:
                notes.append(f"{arm.name}, seed {seed}: not trained yet, and left out of its pairs.")
            elif member.status != FINISHED:
                reason = f" ({member.error})" if member.error else f" after {member.result.get('step')} steps"
                notes.append(f"{arm.name}, seed {seed}: {member.status}{reason}, and left out of its pairs.")
            elif member.metric_value(study.metric) is None:
                notes.append(
                    f"{arm.name}, seed {seed}: has no finite {study.metric}, and is left out of its pairs."
                )
    return notes


def _budget(study: Study, by_key: Members) -> tuple[bool | None, list[str]]:
    """Return whether the arms of each seed had the same budget, and a note if not."""
    name = study.budget.metric
    apart = []
    checked = 0
    for seed in study.seeds:
        budgets = {
            arm.name: value
            for arm in study.arms
            if (value := _metric_value(by_key, arm.name, seed, name)) is not None
        }
        # An arm alone cannot differ; the seed is not counted as checked.
        if len(budgets) < 2:
            continue
        checked += 1
        # Compared within each seed, since a budget may depend on the seed, as wall time does.
        least = min(budgets, key=budgets.__getitem__)
        most = max(budgets, key=budgets.__getitem__)
        if budgets[most] - budgets[least] > study.budget.tolerance * abs(budgets[most]):
            apart.append(
                f"seed {seed}: {format_count(budgets[least])} ({least}) to {format_count(budgets[most])} "
                f"({most})"
            )
    if not checked:
        return None, []
    if not apart:
        return True, []
    return False, [
        f"The arms were not trained with the same {name}, {'; '.join(apart)}: their differences include that "
        "of the budget, and are no verdict on the method alone."
    ]


def format_count(value: float) -> str:
    """Format a count or a duration; counts in full, so that two that differ look different."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _notes_of_data(study: Study, members: Sequence[Member]) -> list[str]:
    notes: list[str] = []
    kinds: dict[tuple[str, str], list[str]] = {}
    for arm in study.arms:
        # The first seed stands for all: a seed should change only the order of the data.
        experiment = member_experiment(study, arm.name, study.seeds[0])
        # Without the fields that do not change which batches are read.
        data = dataclasses.replace(experiment.data, seed=0, cache_dir=None, read_threads=1, prefetch=1)
        kinds.setdefault((fingerprint(data), fingerprint(experiment.tokenizer)), []).append(arm.name)
    if len(kinds) > 1:
        groups = " | ".join(", ".join(names) for names in kinds.values())
        notes.append(
            f"Data or tokenizer differ between {groups}: pairs across these have the same seed, but not the "
            "same batches."
        )
    # A run may end without an evaluation on all text: its last result is then of a sample.
    measured_on = {
        (member.arm, str(member.result.get("measured_on"))) for member in members if member.status == FINISHED
    }
    for arm, text in sorted(measured_on):
        if text not in (trainer.ALL, COMPLETIONS):
            notes.append(f"{arm}: loss and bits per byte were measured on {text}, not on all held-out text.")
    if {trainer.ALL, COMPLETIONS} <= {text for _, text in measured_on}:
        notes.append(
            "Loss and bits per byte of some members are of all held-out text and those of others of its "
            "completions: they do not compare. Train the former again, or set the same eval.score."
        )
    return notes


def _notes_of_changed_text(study: Study, members: Sequence[Member]) -> list[str]:
    """Return notes on members with the settings of others whose sources had other text by their records."""
    # By fingerprint of the settings: the first member with them, which the later ones are compared with.
    first: dict[str, tuple[Member, provenance.Record]] = {}
    notes = []
    for member in members:
        record = (
            provenance.read_record(Path(member.result["run_dir"]))
            if member.status == FINISHED and "run_dir" in member.result
            else None
        )
        if record is None:
            continue
        experiment = member_experiment(study, member.arm, member.seed)
        # Without the fields that leave the text of the sources as it is.
        data = dataclasses.replace(
            experiment.data,
            seed=0,
            cache_dir=None,
            sequence_length=1,
            batch_size=1,
            read_threads=1,
            prefetch=1,
        )
        other, before = first.setdefault(
            f"{fingerprint(data)} {fingerprint(experiment.tokenizer)}", (member, record)
        )
        if changed := provenance.differences(before, record):
            notes.append(
                f"{member.arm}, seed {member.seed} has other text than {other.arm}, seed {other.seed}: "
                f"{'; '.join(changed)}. Their metrics do not compare: train one of them again."
            )
    return notes


def _notes_of_lost_text(study: Study, by_key: Members) -> list[str]:
    return [
        f"{arm.name}: {lost_note(max(fractions))}. It has no verdict against an arm that loses another "
        "fraction."
        for arm in study.arms
        if max(fractions := _lost_text(by_key, arm.name, study.seeds), default=0.0) > 0
    ]


def _notes_of_noise(study: Study, comparisons: Sequence[Comparison]) -> list[str]:
    notes = []
    for comparison in comparisons:
        if comparison.difference is None:
            notes.append(
                f"{comparison.arm} and {comparison.against} have {len(comparison.seeds)} seeds in common: a "
                "comparison needs 2."
            )
        elif not comparison.difference.has_noise:
            notes.append(
                f"{comparison.arm} and {comparison.against} differ by the same {study.metric} with every "
                "seed: the seeds have no effect on it, so the noise is unknown and the difference not "
                "resolved."
            )
    # The smallest number of pairs decides: the note is about the weakest comparison.
    pairs = [
        comparison.difference.num_pairs for comparison in comparisons if comparison.difference is not None
    ]
    if pairs and min(pairs) < FEW_PAIRS:
        notes.append(
            f"Bootstrap intervals of {min(pairs)} pairs are only indicative: with so few they are too narrow."
        )
    return notes


def _notes_of_commits(members: Sequence[Member]) -> list[str]:
    # A change of the code between members is confounded with the arms.
    commits = sorted({str(member.result["commit"])[:12] for member in members if member.result.get("commit")})
    return (
        [f"Members were trained by {len(commits)} commits of the code: {', '.join(commits)}."]
        if len(commits) > 1
        else []
    )
