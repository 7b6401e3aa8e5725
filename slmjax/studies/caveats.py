"""Caveats of a study's findings: what was left out, and what does not compare.

    notes = member_notes(outcomes) + data_notes(study, members)

They are collected with the findings, so that no report can leave them out.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from slmjax.config import fingerprint
from slmjax.data import provenance
from slmjax.data.lost_text import lost_note
from slmjax.runner import trainer
from slmjax.studies.questions import Outcomes
from slmjax.studies.statistics.verdicts import Judged
from slmjax.studies.study import DIVERGED, FINISHED, Member, Study, member_experiment

COMPLETIONS = f"the completions of {trainer.ALL}"  # as in `EvalResult.measured_on`
FEW_PAIRS = 6  # with fewer, bootstrap intervals are much too narrow


# Results ----------------------------------------------------------------------------------------------------
def member_notes(outcomes: Outcomes) -> list[str]:
    """Return notes on seeds that are left out: arms that lose their worst runs look better than they are."""
    metric = outcomes.question.metric
    notes = []
    for arm in outcomes.question.arms:
        missing = [seed for seed in outcomes.question.seeds if (arm, seed) not in outcomes.members]
        # Of a study that has just begun most seeds have none.
        if missing:
            seeds = f"seed{'' if len(missing) == 1 else 's'} {', '.join(map(str, missing))}"
            notes.append(f"{arm}, {seeds}: no result yet, and left out of its pairs.")
    for seed in outcomes.question.seeds:
        for arm in outcomes.question.arms:
            if (member := outcomes.members.get((arm, seed))) is None:
                continue
            if member.status == DIVERGED:
                steps = f" after {member.result['step']} steps" if "step" in member.result else ""
                # Of a member that builds on one that diverged.
                reason = f" ({member.error})" if member.error else ""
                notes.append(
                    f"{arm}, seed {seed}: diverged{steps}{reason}, and counts with the worst value of each "
                    "pair."
                )
            elif member.status != FINISHED:
                reason = f" ({member.error})" if member.error else ""
                notes.append(f"{arm}, seed {seed}: {member.status}{reason}, and left out of its pairs.")
            elif member.metric_value(metric) is None:
                notes.append(f"{arm}, seed {seed}: has no finite {metric}, and is left out of its pairs.")
    return notes


def budget_notes(outcomes: Outcomes) -> tuple[bool | None, list[str]]:
    """Return whether the arms of each seed had the same budget, and a note if not."""
    if (budget := outcomes.question.budget) is None:
        return None, []
    apart = []
    checked = 0
    for seed in outcomes.question.seeds:
        by_arm = {
            arm: value
            for arm in outcomes.question.arms
            if (value := outcomes.value(arm, seed, budget.metric)) is not None
        }
        # An arm alone cannot differ; the seed is not counted as checked.
        if len(by_arm) < 2:
            continue
        checked += 1
        # Compared within each seed, since a budget may depend on the seed, as wall time does.
        least = min(by_arm, key=by_arm.__getitem__)
        most = max(by_arm, key=by_arm.__getitem__)
        if by_arm[most] - by_arm[least] > budget.tolerance * abs(by_arm[most]):
            apart.append(
                f"seed {seed}: {format_count(by_arm[least])} ({least}) to {format_count(by_arm[most])} "
                f"({most})"
            )
    if not checked:
        return None, []
    if not apart:
        return True, []
    return False, [
        f"The arms were not trained with the same {budget.metric}, {'; '.join(apart)}: their differences "
        "include that of the budget, and are no verdict on the method alone."
    ]


def lost_text_notes(outcomes: Outcomes) -> list[str]:
    """Return notes on arms whose tokenizers lose text."""
    return [
        f"{arm}: {lost_note(max(fractions))}. It has no verdict against an arm that loses another fraction."
        for arm in outcomes.question.arms
        if max(fractions := outcomes.lost_text(arm), default=0.0) > 0
    ]


def noise_notes(outcomes: Outcomes, judged: Judged) -> list[str]:
    """Return notes on arms of unequal noise, and on comparisons whose noise is not known, or hardly."""
    metric = outcomes.question.metric
    notes = [
        f"{arm} is noisier than the other arms, apart from what seeds do to all arms (standard deviation "
        f"{judged.noise.own[arm]:.3g}): its comparisons are judged by their own differences alone."
        for arm in judged.noise.noisy
    ]
    notes += [
        f"{arm} may be noisier than the other arms, apart from what seeds do to all arms (standard deviation "
        f"{judged.noise.own[arm]:.3g}): its comparisons are judged by their own differences alone."
        for arm in judged.noise.apart
        if arm not in judged.noise.noisy
    ]
    for (arm, against), judgement in zip(outcomes.question.pairs, judged.comparisons, strict=True):
        if judgement is None:
            shared = len(outcomes.paired_seeds((arm, against), metric))
            notes.append(
                f"{arm} and {against} have {counted(shared, 'seed')} in common: a comparison needs 2."
            )
        elif judgement.standard_error == 0:
            notes.append(
                f"{arm} and {against} differ by the same {metric} with every seed: the seeds have no effect "
                "on it, so the noise is unknown and the difference not resolved."
            )
    # The smallest number of pairs decides: the note is about the weakest comparison.
    pairs = [len(judgement.seeds) for judgement in judged.comparisons if judgement is not None]
    if pairs and min(pairs) < FEW_PAIRS:
        notes.append(
            f"Bootstrap intervals of {min(pairs)} pairs are only indicative: with so few they are too narrow."
        )
    return notes


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an s in the plural: "1 seed", "2 degrees of freedom"."""
    first, *rest = noun.split(" ")
    return f"{number:,} {' '.join([first if number == 1 else f'{first}s', *rest])}"


def format_count(value: float) -> str:
    """Format a count or a duration; counts in full, so that two that differ look different."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


# Experiments ------------------------------------------------------------------------------------------------
def data_notes(study: Study, members: Sequence[Member]) -> list[str]:
    """Return notes on data, held-out text and code that differ between members."""
    return [
        *_notes_of_data(study, members),
        *_notes_of_changed_text(study, members),
        *_notes_of_commits(members),
    ]


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


def _notes_of_commits(members: Sequence[Member]) -> list[str]:
    # A change of the code between members is confounded with the arms.
    commits = sorted({str(member.result["commit"])[:12] for member in members if member.result.get("commit")})
    return (
        [f"Members were trained by {len(commits)} commits of the code: {', '.join(commits)}."]
        if len(commits) > 1
        else []
    )
