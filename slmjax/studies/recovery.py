"""What quantization costs each arm of a study, and how much of the cost of rounding its training recovers.

    recovery = Recovery(study=study, reference="full precision", rounded={"QAT, q4_0": "rounded, q4_0"})
    measurements = measure(recovery, members, directory)
    report = report_recovery(recovery, members, measurements)
    report.arms[2].recoveries[0].recovered.share     # R = 1 - (L_qat - L_full) / (L_rounded - L_full)

L_full is the reference: full precision, trained on for as many steps as the others, so that what more
training brings is not taken for recovery. L_rounded is that very model rounded to nearest in the arm's
format, with the format's own scales or with searched ones: an arm may be measured against both. All are of
one seed, over which `ratios.py` then goes.
"""

import dataclasses
import enum
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from slmjax.checkpoints.loading import load_model
from slmjax.config import fingerprint, near_names
from slmjax.distill.teachers import load_teacher
from slmjax.models.architecture import ModelConfig
from slmjax.quantization.assignment import CACHE
from slmjax.quantization.plan import assignment_lines
from slmjax.quantization.rules import QuantPhase
from slmjax.studies.derived import evaluate_member
from slmjax.studies.ratios import RecoveredShare, recovered_share
from slmjax.studies.statistics import PairedDifference, Summary, holm, paired_difference, summarize
from slmjax.studies.study import FINISHED, Member, Study, member_experiment
from slmjax.studies.sweeps import ChosenRate, check_chosen
from slmjax.telemetry.run_directory import RunLog, read_log

log = logging.getLogger(__name__)

MEASUREMENTS = "measurements.jsonl"
FEW_SEEDS = 3  # below, a report says that it has too few

Measured = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """What parts the arms of a study play."""

    study: Study
    reference: str  # the arm in full precision that was trained as long as the others
    rounded: Mapping[
        str, str | tuple[str, ...]
    ]  # for each arm that may recover something: the reference rounded to its format, in ways
    # of arms that were swept over learning rates (`sweeps.best_rates`)
    rates: Mapping[str, ChosenRate] = dataclasses.field(default_factory=dict)
    directory: str = "."  # of the study, within that of the report

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.study.arms]
        for name in (self.reference, *self.rounded, *(rounded for _, rounded in self.pairs), *self.rates):
            if name not in names:
                raise ValueError(
                    f"{name!r} is no arm of the study.{near_names(name, names)} Arms are {', '.join(names)}"
                )
        for arm, rounded in self.pairs:
            if len({arm, rounded, self.reference}) < 3:
                raise ValueError(
                    f"the recovery of {arm!r} over {rounded!r} with {self.reference!r} needs three different "
                    "arms"
                )
        for arm, chosen in self.rates.items():
            check_chosen(self.study, arm, chosen)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Each arm with each rounded one that it is measured against."""
        return tuple(
            (arm, name)
            for arm, names in self.rounded.items()
            for name in ((names,) if isinstance(names, str) else names)
        )


# Measuring --------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Figures of a member that its training did not leave: a line of measurements.jsonl."""

    arm: str
    seed: int
    fingerprint: str  # of the member and of the reference that it was compared with
    figures: Measured


def measure(
    recovery: Recovery,
    members: Sequence[Member],
    directory: str | Path,
) -> tuple[Measurement, ...]:
    """Compares each finished member with the reference of its seed, on all held-out text, and reads what it
    takes to store.

    What was measured before is read back. Figures: "kl", KL(reference, member) in nats per token;
    "agreement", how often both find the same token the likeliest; "bytes" and "bits_per_number", of all
    parameters as they are stored.
    """
    path = Path(directory) / MEASUREMENTS
    before = {
        record["fingerprint"]: record["figures"]
        for record in (read_log(path, kind="measurement") if path.is_file() else [])
    }
    finished = {(member.arm, member.seed): member for member in members if member.status == FINISHED}
    found = []
    with RunLog(path) as records:
        for (arm, seed), member in finished.items():
            if (reference := finished.get((recovery.reference, seed))) is None:
                continue
            places = [one.result["run_dir"] for one in (member, reference)]
            key = fingerprint({"members": [member.fingerprint, reference.fingerprint], "places": places})
            if key not in before:
                log.info(
                    "%s: comparing %s, seed %d, with %s", recovery.study.name, arm, seed, recovery.reference
                )
                before[key] = _figures(recovery, member, reference)
                records.write("measurement", arm=arm, seed=seed, fingerprint=key, figures=before[key])
            found.append(Measurement(arm=arm, seed=seed, fingerprint=key, figures=before[key]))
    return tuple(found)


def _figures(recovery: Recovery, member: Member, reference: Member) -> Measured:
    loaded = load_model(member.result["run_dir"])
    total, numbers = stored_size(loaded.config, loaded.quant_phases)
    figures = {"bytes": float(total), "bits_per_number": 8 * total / numbers, "kl": 0.0, "agreement": 1.0}
    if member.arm != reference.arm:
        experiment = member_experiment(recovery.study, member.arm, member.seed)
        found = evaluate_member(
            loaded, experiment, teachers=load_teacher(Path(reference.result["run_dir"]), loaded)
        )
        assert found.teacher_kl is not None and found.teacher_agreement is not None
        figures |= {"kl": found.teacher_kl, "agreement": found.teacher_agreement}
    return figures


def stored_size(config: ModelConfig, phases: Sequence[QuantPhase]) -> tuple[int, int]:
    """Bytes of a model's parameters as they are deployed, and how many numbers they are.

    A weight with a format counts as its codes, packed without gaps, and its scales; all else as float32.
    """
    stored = [line for line in assignment_lines(config, phases) if not line.path.endswith(CACHE)]
    return sum(line.bytes for line in stored), sum(math.prod(line.shape) for line in stored)


# Reporting --------------------------------------------------------------------------------------------------
class Recovered(enum.Enum):
    """Where the interval of R lies. "Not resolved" is not "nothing": R may be as large as its interval
    allows.
    """

    ABOVE_ZERO = "above zero"
    BELOW_ZERO = "below zero"
    NOT_RESOLVED = "not resolved"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryOver:
    """The part that an arm recovers of the cost of one way of rounding."""

    rounded: str  # the arm that it is measured against
    pairs: tuple[int, ...]  # seeds of which all three arms finished
    recovered: RecoveredShare | None  # None with fewer than two pairs
    adjusted_p: float | None  # of the paired t test of R = 0, by Holm over the report
    verdict: Recovered


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmRecovery:
    """One arm over its seeds."""

    arm: str
    seeds: tuple[int, ...]  # that finished with a figure for the metric
    metric: Summary | None
    distance: (
        PairedDifference | None
    )  # from the reference, seed by seed; None for itself, and with fewer than two pairs
    kl: Summary | None  # from the reference, nats per token
    agreement: Summary | None  # same likeliest token as the reference
    stored_bytes: Summary | None
    bits_per_number: Summary | None
    tokens_per_second: Summary | None  # in training; None for what was not trained
    unrounded: Summary | None  # the metric of the weights before rounding; None where it was not evaluated
    rate: ChosenRate | None  # the learning rate, where the arm was swept over several
    recoveries: tuple[
        RecoveryOver, ...
    ]  # over each rounded arm that it is measured against; empty for what recovers nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryReport:
    """All arms, and what must be said beside them."""

    study: str
    metric: str
    lower_is_better: bool
    reference: str
    confidence: float
    seeds: tuple[int, ...]
    arms: tuple[ArmRecovery, ...]
    notes: tuple[str, ...]


def report_recovery(
    recovery: Recovery, members: Sequence[Member], measurements: Sequence[Measurement] = ()
) -> RecoveryReport:
    """The report, also on a study that has not come to its end."""
    study = recovery.study
    shares = [_share(recovery, members, *pair) for pair in recovery.pairs]
    adjusted = holm([1.0 if share is None else share.gain.p_value for _, share in shares])
    recoveries: dict[str, list[RecoveryOver]] = {}
    for (arm, rounded), (pairs, share), p in zip(recovery.pairs, shares, adjusted, strict=True):
        found = RecoveryOver(
            rounded=rounded,
            pairs=pairs,
            recovered=share,
            adjusted_p=None if share is None else p,
            verdict=_verdict(share),
        )
        recoveries.setdefault(arm, []).append(found)
    arms = tuple(
        _arm(recovery, members, measurements, arm.name, tuple(recoveries.get(arm.name, ())))
        for arm in study.arms
    )
    return RecoveryReport(
        study=study.name,
        metric=study.metric,
        lower_is_better=study.lower_is_better,
        reference=recovery.reference,
        confidence=study.confidence,
        seeds=study.seeds,
        arms=arms,
        notes=tuple(_notes(recovery, members, arms)),
    )


Share = tuple[tuple[int, ...], RecoveredShare | None]  # of which seeds, and what they come to


def _share(recovery: Recovery, members: Sequence[Member], arm: str, rounded: str) -> Share:
    study = recovery.study
    trio = [_by_seed(study.metric, members, name) for name in (arm, recovery.reference, rounded)]
    seeds = tuple(seed for seed in study.seeds if all(seed in values for values in trio))
    if len(seeds) < 2:
        return seeds, None
    own, full, nearest = ([values[seed] for seed in seeds] for values in trio)
    return seeds, recovered_share(
        own, full=full, rounded=nearest, lower_is_better=study.lower_is_better, confidence=study.confidence
    )


def _arm(
    recovery: Recovery,
    members: Sequence[Member],
    measurements: Sequence[Measurement],
    arm: str,
    recoveries: tuple[RecoveryOver, ...],
) -> ArmRecovery:
    study = recovery.study
    metric, whole = (_by_seed(study.metric, members, name) for name in (arm, recovery.reference))
    both = [] if arm == recovery.reference else [seed for seed in metric if seed in whole]
    speeds = [
        value for one in members if one.arm == arm and (value := one.figure("tokens_per_second")) is not None
    ]

    def measured(name: str) -> Summary | None:
        return _summary([one.figures[name] for one in measurements if one.arm == arm and name in one.figures])

    return ArmRecovery(
        arm=arm,
        seeds=tuple(seed for seed in study.seeds if seed in metric),
        metric=_summary(list(metric.values())),
        distance=_difference(recovery, [metric[seed] for seed in both], [whole[seed] for seed in both]),
        kl=measured("kl"),
        agreement=measured("agreement"),
        stored_bytes=measured("bytes"),
        bits_per_number=measured("bits_per_number"),
        tokens_per_second=_summary(speeds),
        unrounded=_summary([*_by_seed(f"unrounded_{study.metric}", members, arm).values()]),
        rate=recovery.rates.get(arm),
        recoveries=recoveries,
    )


def _by_seed(figure: str, members: Sequence[Member], arm: str) -> dict[int, float]:
    return {
        one.seed: value for one in members if one.arm == arm and (value := one.figure(figure)) is not None
    }


def _difference(
    recovery: Recovery, values: Sequence[float], others: Sequence[float]
) -> PairedDifference | None:
    return (
        paired_difference(values, others, confidence=recovery.study.confidence) if len(values) > 1 else None
    )


def _summary(values: Sequence[float]) -> Summary | None:
    return summarize(values) if values else None


def _verdict(share: RecoveredShare | None) -> Recovered:
    if share is None or not (share.is_above_zero or share.is_below_zero):
        return Recovered.NOT_RESOLVED
    return Recovered.ABOVE_ZERO if share.is_above_zero else Recovered.BELOW_ZERO


def _notes(recovery: Recovery, members: Sequence[Member], arms: Sequence[ArmRecovery]) -> list[str]:
    study = recovery.study
    notes = [
        f"{one.arm}, seed {one.seed}: {one.status}{f' ({one.error})' if one.error else ''}, and left out."
        for one in members
        if one.status != FINISHED
    ]
    for one in arms:
        if one.rate is not None:
            notes += [f"{one.arm}: {said}" for said in one.rate.notes(study.metric)]
        for over in one.recoveries:
            notes += [f"{one.arm}: {said}" for said in _notes_on(recovery, over)]
    return notes


def _notes_on(recovery: Recovery, over: RecoveryOver) -> Iterator[str]:
    """Yield the notes that weaken one recovery."""
    study = recovery.study
    if len(over.pairs) < FEW_SEEDS:
        yield f"{len(over.pairs)} seeds with all that its recovery needs are too few: train {FEW_SEEDS} or more."
    if (found := over.recovered) is None:
        return
    if found.share is None:
        yield f"{over.rounded} is no worse than {recovery.reference}, so that there is nothing to recover."
    elif found.standard_error is None:
        yield f"the seeds changed nothing that the {study.metric} depends on: the noise is unknown."
    elif found.fieller_interval is None:
        yield f"what {over.rounded} costs is not told from zero with these seeds, and any recovery would fit: train more."
    level = 1 - study.confidence
    if over.verdict is Recovered.ABOVE_ZERO and over.adjusted_p is not None and over.adjusted_p > level:
        yield (
            f"its own interval lies above zero, but corrected for all {len(recovery.pairs)} comparisons of "
            "the report the "
            f"difference from {over.rounded} is not resolved (p {over.adjusted_p:.3f})."
        )
