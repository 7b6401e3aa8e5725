"""What a study has shown: each arm over its seeds, paired differences with intervals, verdicts, and what a
reader must know beside them.

    findings = analyze(study, members, further=(("from layers", "from scratch"),))
    findings.comparisons[0].verdict                  # Verdict.BETTER

Every arm is compared with the baseline, and further pairs as they are named; all these comparisons are one
family for Holm's correction, those that could not be made counted as showing nothing. `layout.py` makes
tables of findings.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from slmjax.config import fingerprint, near_names
from slmjax.data import provenance
from slmjax.data.lost_text import lost_note
from slmjax.runner import trainer
from slmjax.studies.arms import Arm, Derived
from slmjax.studies.statistics import (
    PairedDifference,
    Summary,
    Verdict,
    decide,
    holm,
    paired_difference,
    summarize,
)
from slmjax.studies.study import FINISHED, Member, Study, member_experiment

COMPLETIONS = f"the completions of {trainer.ALL}"  # as `EvalResult.measured_on` says it
FEW_PAIRS = 6  # below, the bootstrap's interval is much too narrow


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One arm over its seeds."""

    arm: str
    seeds: tuple[int, ...]  # that finished with a figure for the metric
    metric: Summary | None  # None while no seed has finished
    figures: dict[str, Summary | None]  # of the further figures that were asked for
    budget: Summary | None  # of what all arms should have had alike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm minus another."""

    arm: str
    against: str
    seeds: tuple[int, ...]  # that both finished
    difference: PairedDifference | None  # of the metric; None with fewer than two pairs
    adjusted_p: float | None  # by Holm, over all comparisons of the study
    verdict: Verdict  # on `arm`
    figures: dict[
        str, PairedDifference | None
    ]  # of the further figures, by themselves: no verdict comes of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """All that a study has shown."""

    study: str
    metric: str
    lower_is_better: bool
    confidence: float
    baseline: str
    seeds: tuple[int, ...]
    arms: tuple[ArmSummary, ...]
    comparisons: tuple[Comparison, ...]  # with the baseline first, then the further ones
    budget: str  # the figure that should be alike
    is_matched: bool | None  # whether it is; None where no seed of two arms has finished
    notes: tuple[str, ...]  # what was left out or is not as it should be, and what that means


def analyze(study: Study, members: Sequence[Member], *, further: Sequence[tuple[str, str]] = ()) -> Findings:
    """The findings of a study, also of one that has not come to its end.

    Args:
      study: arms, seeds and metric.
      members: what was trained, as `run_study` and `read_members` return it.
      further: pairs of arms (arm, the arm it is compared with) beside each arm and the baseline.

    Raises:
      ValueError: a pair names no arms or stands there twice, or no run has a figure of a name that is asked
        for.
    """
    by_key = {(member.arm, member.seed): member for member in members}
    pairs = _pairs(study, further)
    _check_figures(study, members)
    differences = [_differences(study, by_key, pair, study.metric) for pair in pairs]
    adjusted = holm([1.0 if one is None else one.p_value for one in differences])
    comparisons = tuple(
        Comparison(
            arm=pair[0],
            against=pair[1],
            seeds=_paired_seeds(study, by_key, pair, study.metric),
            difference=difference,
            adjusted_p=None if difference is None else p,
            verdict=Verdict.NOT_RESOLVED
            if difference is None or not _is_comparable(study, by_key, pair)
            else decide(
                difference.mean, p, lower_is_better=study.lower_is_better, level=1 - study.confidence
            ),
            figures={name: _differences(study, by_key, pair, name) for name in study.figures},
        )
        for pair, difference, p in zip(pairs, differences, adjusted, strict=True)
    )
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
        budget=study.budget.figure,
        is_matched=is_matched,
        notes=notes,
    )


# Pairs ------------------------------------------------------------------------------------------------------
Members = dict[tuple[str, int], Member]  # by arm and seed
Pair = tuple[str, str]


def _pairs(study: Study, further: Sequence[Pair]) -> list[Pair]:
    pairs = [(arm.name, study.baseline) for arm in study.arms if arm.name != study.baseline]
    for arm, against in further:
        if study.arm(arm) is study.arm(against):
            raise ValueError(f"{arm!r} cannot be compared with itself: name two arms")
        if (arm, against) in pairs or (against, arm) in pairs:
            raise ValueError(
                f"{arm!r} is compared with {against!r} already (every arm is with the baseline): name the "
                "pair once"
            )
        pairs.append((arm, against))
    return pairs


def _check_figures(study: Study, members: Sequence[Member]) -> None:
    known = {name for member in members for name in member.figures}
    for name in (study.metric, study.budget.figure, *study.figures):
        if known and name not in known:
            raise ValueError(
                f"no run of the study has a figure {name!r}.{near_names(name, known)} There are "
                f"{', '.join(sorted(known))}"
            )


def _figure(by_key: Members, arm: str, seed: int, name: str) -> float | None:
    member = by_key.get((arm, seed))
    return None if member is None else member.figure(name)


def _paired_seeds(study: Study, by_key: Members, pair: Pair, name: str) -> tuple[int, ...]:
    return tuple(
        seed for seed in study.seeds if all(_figure(by_key, arm, seed, name) is not None for arm in pair)
    )


def _values(by_key: Members, arm: str, seeds: Sequence[int], name: str) -> list[float]:
    return [value for seed in seeds if (value := _figure(by_key, arm, seed, name)) is not None]


def _differences(study: Study, by_key: Members, pair: Pair, name: str) -> PairedDifference | None:
    seeds = _paired_seeds(study, by_key, pair, name)
    if len(seeds) < 2:
        return None
    first, second = (_values(by_key, arm, seeds, name) for arm in pair)
    return paired_difference(first, second, confidence=study.confidence)


def _lost_text(by_key: Members, arm: str, seeds: Sequence[int]) -> set[float]:
    """Shares of the text that the tokenizers of an arm lose; empty where no member has finished."""
    return {_figure(by_key, arm, seed, "lost_text") or 0.0 for seed in seeds if (arm, seed) in by_key}


def _is_comparable(study: Study, by_key: Members, pair: Pair) -> bool:
    """Return whether a metric of the text means the same for both arms: their tokenizers lose none of it, or
    both lose the same.
    """
    first, second = (_lost_text(by_key, arm, study.seeds) for arm in pair)
    return study.metric != "bits_per_byte" or first == second


def _arm_summary(study: Study, by_key: Members, arm: Arm | Derived) -> ArmSummary:
    def summary(name: str) -> Summary | None:
        values = _values(by_key, arm.name, study.seeds, name)
        return summarize(values) if values else None

    seeds = tuple(seed for seed in study.seeds if _figure(by_key, arm.name, seed, study.metric) is not None)
    return ArmSummary(
        arm=arm.name,
        seeds=seeds,
        metric=summary(study.metric),
        figures={name: summary(name) for name in study.figures},
        budget=summary(study.budget.figure),
    )


# What a reader must know ------------------------------------------------------------------------------------
def _notes_of_members(study: Study, by_key: Members) -> list[str]:
    """Seeds that are left out, and why: arms that lose their worst runs look better than they are."""
    notes = []
    for seed in study.seeds:
        for arm in study.arms:
            member = by_key.get((arm.name, seed))
            if member is None:
                notes.append(f"{arm.name}, seed {seed}: not trained yet, and left out of its pairs.")
            elif member.status != FINISHED:
                why = f" ({member.error})" if member.error else f" after {member.result.get('step')} steps"
                notes.append(f"{arm.name}, seed {seed}: {member.status}{why}, and left out of its pairs.")
            elif member.figure(study.metric) is None:
                notes.append(
                    f"{arm.name}, seed {seed}: has no finite {study.metric}, and is left out of its pairs."
                )
    return notes


def _budget(study: Study, by_key: Members) -> tuple[bool | None, list[str]]:
    """Whether the arms of each seed had the same budget, and where they had not."""
    name = study.budget.figure
    apart = []
    checked = 0
    for seed in study.seeds:
        found = {
            arm.name: value
            for arm in study.arms
            if (value := _figure(by_key, arm.name, seed, name)) is not None
        }
        if len(found) < 2:
            continue
        checked += 1
        least = min(found, key=found.__getitem__)
        most = max(found, key=found.__getitem__)
        if found[most] - found[least] > study.budget.tolerance * abs(found[most]):
            apart.append(f"seed {seed}: {amount(found[least])} ({least}) to {amount(found[most])} ({most})")
    if not checked:
        return None, []
    if not apart:
        return True, []
    return False, [
        f"The arms were not trained with the same {name}, {'; '.join(apart)}: their differences are of the "
        "budget as well, and no verdict "
        "on the method alone."
    ]


def amount(value: float) -> str:
    """A count or a duration for people: counts to the last one, for two that differ must look different."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _notes_of_data(study: Study, members: Sequence[Member]) -> list[str]:
    notes: list[str] = []
    kinds: dict[tuple[str, str], list[str]] = {}
    for arm in study.arms:
        experiment = member_experiment(study, arm.name, study.seeds[0])
        data = dataclasses.replace(experiment.data, seed=0, cache_dir=None, read_threads=1, prefetch=1)
        kinds.setdefault((fingerprint(data), fingerprint(experiment.tokenizer)), []).append(arm.name)
    if len(kinds) > 1:
        groups = " | ".join(", ".join(names) for names in kinds.values())
        notes.append(
            f"Data or tokenizer differ between {groups}: pairs across these share a seed, and not their "
            "batches."
        )
    elsewhere = {
        (member.arm, str(member.result.get("measured_on"))) for member in members if member.status == FINISHED
    }
    for arm, place in sorted(elsewhere):
        if place not in (trainer.ALL, COMPLETIONS):
            notes.append(f"{arm}: loss and bits per byte were measured on {place}, not on all held-out text.")
    if {trainer.ALL, COMPLETIONS} <= {place for _, place in elsewhere}:
        notes.append(
            "Loss and bits per byte of some members are of all held-out text and those of others of its "
            "completions: they do not compare. "
            "Train the former again, or set eval.score alike."
        )
    return notes


def _notes_of_changed_text(study: Study, members: Sequence[Member]) -> list[str]:
    """Members with the settings of others, whose records say that their sources had other text."""
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
                f"{'; '.join(changed)}. Figures of the"
                " two do not compare: train one of them again."
            )
    return notes


def _notes_of_lost_text(study: Study, by_key: Members) -> list[str]:
    return [
        f"{arm.name}: {lost_note(max(shares))}. Beside an arm that loses another share it has no verdict."
        for arm in study.arms
        if max(shares := _lost_text(by_key, arm.name, study.seeds), default=0.0) > 0
    ]


def _notes_of_noise(study: Study, comparisons: Sequence[Comparison]) -> list[str]:
    notes = []
    for one in comparisons:
        if one.difference is None:
            notes.append(
                f"{one.arm} and {one.against} have {len(one.seeds)} seeds in common: a comparison needs 2."
            )
        elif not one.difference.has_noise:
            notes.append(
                f"{one.arm} and {one.against} differ by the same {study.metric} with every seed: the seeds "
                "changed nothing that it "
                "depends on, so the noise is unknown and the difference not resolved."
            )
    pairs = [one.difference.num_pairs for one in comparisons if one.difference is not None]
    if pairs and min(pairs) < FEW_PAIRS:
        notes.append(
            f"Bootstrap intervals of {min(pairs)} pairs are only indicative: with so few they are too narrow."
        )
    return notes


def _notes_of_commits(members: Sequence[Member]) -> list[str]:
    commits = sorted({str(member.result["commit"])[:12] for member in members if member.result.get("commit")})
    return (
        [f"Members were trained by {len(commits)} commits of the code: {', '.join(commits)}."]
        if len(commits) > 1
        else []
    )
