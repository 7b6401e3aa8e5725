"""The cost of quantization for each arm of a study, and the fraction of it that training recovers.

    recovery = Recovery(reference="full precision", rounded={"QAT, q4_0": "rounded, q4_0"})
    study = Study(recovery=recovery, ...)
    measurements = measure(study, members, directory)
    report = report_recovery(study, members, measurements)
    report.arms[2].recoveries[0].recovered.fraction  # R = 1 - (L_qat - L_full) / (L_rounded - L_full)

L_full is the reference: full precision, trained for as many steps as the others, so that the effect of more
training is not taken for recovery. L_rounded is the same model rounded to nearest in the arm's format, with
the format's own scales or with searched ones: an arm may be compared with both. All three have the same seed;
`ratios.py` averages over seeds.
"""

import dataclasses
import enum
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from slmjax.checkpoints.loading import load_model
from slmjax.config import fingerprint
from slmjax.distill.teachers import load_teacher
from slmjax.models.architecture import ModelConfig
from slmjax.quantization.assignment import CACHE
from slmjax.quantization.plan import assignment_lines
from slmjax.quantization.rules import QuantPhase
from slmjax.studies.derived import evaluate_member
from slmjax.studies.design import Recovery
from slmjax.studies.statistics.ratios import RecoveredFraction, recovered_fraction
from slmjax.studies.statistics.samples import PairedDifference, Summary, holm, paired_difference, summarize
from slmjax.studies.study import FINISHED, Member, Study, member_experiment
from slmjax.studies.tuning import Tuned, check_tuned
from slmjax.telemetry.run_directory import RunLog, read_log

log = logging.getLogger(__name__)

MEASUREMENTS = "measurements.jsonl"
FEW_SEEDS = 3  # with fewer, a report has a note

Metrics = dict[str, float]


# Measuring --------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Metrics of a member in addition to those of its training: a line of measurements.jsonl."""

    arm: str
    seed: int
    fingerprint: str  # of the member and of the reference that it was compared with
    metrics: Metrics


def measure(study: Study, members: Sequence[Member], directory: str | Path) -> tuple[Measurement, ...]:
    """Compare each finished member with the reference of its seed, on all held-out text.

    Earlier measurements are read from the directory.

    Returns:
      measurements with the metrics "kl": KL(reference, member) in nats per token; "agreement": how often both
      have the same most likely token; "bytes" and "bits_per_number": of all parameters as stored.
    """
    recovery = _roles(study)
    path = Path(directory) / MEASUREMENTS
    before = {
        record["fingerprint"]: record["figures"]
        for record in (read_log(path, kind="measurement") if path.is_file() else [])
    }
    # Members that diverged have no model to evaluate.
    finished = {(member.arm, member.seed): member for member in members if member.status == FINISHED}
    measurements = []
    with RunLog(path) as records:
        for (arm, seed), member in finished.items():
            if (reference := finished.get((recovery.reference, seed))) is None:
                continue
            run_dirs = [run.result["run_dir"] for run in (member, reference)]
            # The directories are part of the key, since a member that is trained again keeps its fingerprint.
            key = fingerprint({"members": [member.fingerprint, reference.fingerprint], "places": run_dirs})
            # Evaluating a member takes minutes: earlier measurements of the same models are reused.
            if key not in before:
                log.info("%s: comparing %s, seed %d, with %s", study.name, arm, seed, recovery.reference)
                before[key] = _metrics(study, member, reference)
                records.write("measurement", arm=arm, seed=seed, fingerprint=key, figures=before[key])
            measurements.append(Measurement(arm=arm, seed=seed, fingerprint=key, metrics=before[key]))
    return tuple(measurements)


def _metrics(study: Study, member: Member, reference: Member) -> Metrics:
    loaded = load_model(member.result["run_dir"])
    total, numbers = stored_size(loaded.config, loaded.quant_phases)
    # Divergence and agreement are those of the reference with itself, which other members replace below.
    metrics = {"bytes": float(total), "bits_per_number": 8 * total / numbers, "kl": 0.0, "agreement": 1.0}
    # The reference does not differ from itself: no evaluation is needed.
    if member.arm != reference.arm:
        experiment = member_experiment(study, member.arm, member.seed)
        evaluation = evaluate_member(
            # The reference acts as the teacher: its divergence is computed like that of distillation.
            loaded,
            experiment,
            teachers=load_teacher(Path(reference.result["run_dir"]), loaded),
        )
        assert evaluation.teacher_kl is not None and evaluation.teacher_agreement is not None
        metrics |= {"kl": evaluation.teacher_kl, "agreement": evaluation.teacher_agreement}
    return metrics


def stored_size(config: ModelConfig, phases: Sequence[QuantPhase]) -> tuple[int, int]:
    """Return the bytes of a model's parameters as deployed, and their number of values.

    Quantized weights count as their codes, packed without gaps, and scales; all others as float32.
    """
    # Formats of the cache are about decoding, not about stored weights.
    stored = [line for line in assignment_lines(config, phases) if not line.path.endswith(CACHE)]
    return sum(line.bytes for line in stored), sum(math.prod(line.shape) for line in stored)


# Reporting --------------------------------------------------------------------------------------------------
class Recovered(enum.Enum):
    """Position of the interval of R. "Not resolved" is not "nothing": R may be as large as its interval."""

    ABOVE_ZERO = "above zero"
    BELOW_ZERO = "below zero"
    NOT_RESOLVED = "not resolved"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryOver:
    """Recovery of an arm over one way of rounding."""

    rounded: str  # the arm that it is compared with
    pairs: tuple[int, ...]  # seeds for which all three arms finished
    recovered: RecoveredFraction | None  # None with fewer than two pairs
    adjusted_p: float | None  # of the paired t test of R = 0, by Holm over the report
    verdict: Recovered


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmRecovery:
    """One arm over its seeds."""

    arm: str
    seeds: tuple[int, ...]  # that finished with a finite metric
    metric: Summary | None
    # from the reference, seed by seed; None for itself, and with fewer than two pairs
    distance: PairedDifference | None
    kl: Summary | None  # from the reference, nats per token
    agreement: Summary | None  # same most likely token as the reference
    stored_bytes: Summary | None
    bits_per_number: Summary | None
    tokens_per_second: Summary | None  # in training; None for derived arms
    unrounded: Summary | None  # the metric of the weights before rounding; None if not evaluated
    tuned: Tuned | None  # the learning rate, if it was tuned
    recoveries: tuple[RecoveryOver, ...]  # for each rounded arm that it is compared with


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryReport:
    """Results of all arms, and caveats."""

    study: str
    metric: str
    lower_is_better: bool
    reference: str
    confidence: float
    seeds: tuple[int, ...]
    arms: tuple[ArmRecovery, ...]
    notes: tuple[str, ...]


def report_recovery(
    study: Study,
    members: Sequence[Member],
    measurements: Sequence[Measurement] = (),
    *,
    tuned: Sequence[Tuned] = (),
) -> RecoveryReport:
    """Report on a study, which need not be complete.

    Args:
      study: with the roles of its arms, `Study.recovery`.
      members: as returned by `run_study` and `read_members`.
      measurements: as returned by `measure`.
      tuned: the learning rates of arms that were tuned, as `tune` returned them.
    """
    recovery = _roles(study)
    check_tuned(study, tuned)
    rates = {choice.arm: choice for choice in tuned}
    # All fractions first: Holm's correction needs every p value.
    fractions = [_fraction(study, members, *pair) for pair in recovery.pairs]
    # All recoveries of a report are one family of tests.
    adjusted = holm([1.0 if fraction is None else fraction.gain.p_value for _, fraction in fractions])
    recoveries: dict[str, list[RecoveryOver]] = {}
    for (arm, rounded), (seeds, fraction), p in zip(recovery.pairs, fractions, adjusted, strict=True):
        over = RecoveryOver(
            rounded=rounded,
            pairs=seeds,
            recovered=fraction,
            adjusted_p=None if fraction is None else p,
            verdict=_verdict(fraction),
        )
        recoveries.setdefault(arm, []).append(over)
    arms = tuple(
        _arm(
            study,
            members,
            measurements,
            arm.name,
            tuple(recoveries.get(arm.name, ())),
            tuned=rates.get(arm.name),
        )
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
        notes=tuple(_notes(study, members, arms)),
    )


def _roles(study: Study) -> Recovery:
    """Return the roles of a study's arms. Raises ValueError if it has none."""
    if study.recovery is None:
        raise ValueError(
            f"the study {study.name!r} has no recovery to report: give it "
            "recovery=Recovery(reference=ARM, rounded={ARM: ROUNDED_ARM}), as experiments/qat_study.py does"
        )
    return study.recovery


def _fraction(
    study: Study, members: Sequence[Member], arm: str, rounded: str
) -> tuple[tuple[int, ...], RecoveredFraction | None]:
    """Return the seeds for which all three arms finished, and the recovered fraction."""
    # All three arms of a seed or none: its noise cancels only then.
    trio = [_by_seed(study.metric, members, name) for name in (arm, _roles(study).reference, rounded)]
    seeds = tuple(seed for seed in study.seeds if all(seed in by_seed for by_seed in trio))
    if len(seeds) < 2:
        return seeds, None
    values, full, nearest = ([by_seed[seed] for seed in seeds] for by_seed in trio)
    return seeds, recovered_fraction(
        values, full=full, rounded=nearest, lower_is_better=study.lower_is_better, confidence=study.confidence
    )


def _arm(
    study: Study,
    members: Sequence[Member],
    measurements: Sequence[Measurement],
    arm: str,
    recoveries: tuple[RecoveryOver, ...],
    *,
    tuned: Tuned | None,
) -> ArmRecovery:
    reference_arm = _roles(study).reference
    metric, reference = (_by_seed(study.metric, members, name) for name in (arm, reference_arm))
    # The difference of the reference to itself is no result.
    both = [] if arm == reference_arm else [seed for seed in metric if seed in reference]
    # Empty for derived arms, which were not trained.
    speeds = list(_by_seed("session_tokens_per_second", members, arm).values())

    def measured(name: str) -> Summary | None:
        return _summary(
            [
                measurement.metrics[name]
                for measurement in measurements
                if measurement.arm == arm and name in measurement.metrics
            ]
        )

    return ArmRecovery(
        arm=arm,
        seeds=tuple(seed for seed in study.seeds if seed in metric),
        metric=_summary(list(metric.values())),
        distance=_difference(study, [metric[seed] for seed in both], [reference[seed] for seed in both]),
        kl=measured("kl"),
        agreement=measured("agreement"),
        stored_bytes=measured("bytes"),
        bits_per_number=measured("bits_per_number"),
        tokens_per_second=_summary(speeds),
        unrounded=_summary([*_by_seed(f"unrounded_{study.metric}", members, arm).values()]),
        tuned=tuned,
        recoveries=recoveries,
    )


def _by_seed(metric: str, members: Sequence[Member], arm: str) -> dict[int, float]:
    return {
        member.seed: value
        for member in members
        if member.arm == arm and (value := member.metric_value(metric)) is not None
    }


def _difference(study: Study, values: Sequence[float], others: Sequence[float]) -> PairedDifference | None:
    return paired_difference(values, others, confidence=study.confidence) if len(values) > 1 else None


def _summary(values: Sequence[float]) -> Summary | None:
    return summarize(values) if values else None


def _verdict(fraction: RecoveredFraction | None) -> Recovered:
    if fraction is None or not (fraction.is_above_zero or fraction.is_below_zero):
        return Recovered.NOT_RESOLVED
    # By the interval of this recovery alone; `_notes_on` mentions it if the correction disagrees.
    return Recovered.ABOVE_ZERO if fraction.is_above_zero else Recovered.BELOW_ZERO


def _notes(study: Study, members: Sequence[Member], arms: Sequence[ArmRecovery]) -> list[str]:
    notes = []
    for member in members:
        if member.status != FINISHED:
            reason = f" ({member.error})" if member.error else ""
            notes.append(f"{member.arm}, seed {member.seed}: {member.status}{reason}, and left out.")
    for arm in arms:
        if arm.tuned is not None:
            notes += [f"{arm.arm}: {note}" for note in arm.tuned.notes()]
        for over in arm.recoveries:
            notes += [f"{arm.arm}: {note}" for note in _notes_on(study, over)]
    return notes


def _notes_on(study: Study, over: RecoveryOver) -> Iterator[str]:
    """Yield the notes that weaken one recovery."""
    recovery = _roles(study)
    if len(over.pairs) < FEW_SEEDS:
        yield f"only {len(over.pairs)} seeds have finished in all three arms: train {FEW_SEEDS} or more."
    if (recovered := over.recovered) is None:
        return
    if recovered.fraction is None:
        yield f"{over.rounded} is no worse than {recovery.reference}, so there is nothing to recover."
    elif recovered.standard_error is None:
        yield f"the seeds have no effect on the {study.metric}: the noise is unknown."
    elif recovered.fieller_interval is None:
        yield (
            f"the cost of {over.rounded} does not differ from zero significantly with these seeds, so any "
            "recovery is possible: train more."
        )
    level = 1 - study.confidence
    if over.verdict is Recovered.ABOVE_ZERO and over.adjusted_p is not None and over.adjusted_p > level:
        yield (
            f"its own interval lies above zero, but corrected for all {len(recovery.pairs)} comparisons of "
            f"the report the difference from {over.rounded} is not resolved (p {over.adjusted_p:.3f})."
        )
