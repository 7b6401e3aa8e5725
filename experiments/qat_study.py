"""How much of the cost of rounding does quantization-aware training recover, and when should it begin?

    slmjax ablate experiments/qat_study.py                   # trains all members with 3 seeds
    slmjax ablate experiments/qat_study.py --budget large    # arms of `what` at their own best rates, 5 seeds
    slmjax formats report experiments/qat_study.py           # the recovery reports with their page
    slmjax train experiments/qat_study.py                    # the model in full precision

The text is Python's standard library, as in `nano`; the model has 2 layers of width 128. All members of one
seed see the same batches. There are two studies:

- when: from scratch, in full precision for a fraction of the steps and in q4_0 for the rest;
- what: each seed's model in full precision from the first study continues for some more steps, in full
  precision or in a format. The result in full precision is also rounded to each format without training, with
  the format's own scales and with those that have the smallest squared error.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import slmjax
from slmjax.models import AttentionConfig, BlockConfig, LayerGroup, MlpConfig, ModelConfig, QkNorm
from slmjax.studies import Arm, Clip, Derived, LearningRates, Recovery, RoundToNearest, Study
from slmjax.training import (
    BpeTokenizer,
    DistillConfig,
    Experiment,
    FileTokenizer,
    FromModel,
    QuantConfig,
    QuantPhase,
    QuantRule,
    QuantSpec,
    Ramp,
    ScaleType,
    TeacherConfig,
    preset,
)

STEPS = 300
FURTHER_STEPS = 120
SEEDS = (0, 1, 2)
MORE_SEEDS = (0, 1, 2, 3, 4)  # of the large study
RATES = (0.25, 0.5, 1.0, 2.0)  # that arms of `what` are tuned over, as multiples of the experiment's rate
FRACTIONS = (0.0, 0.5, 0.9)  # of the steps, in full precision before those in q4_0
FULL = "full precision"
WHEN = "when QAT begins"
Q4_0 = "q4_0"

# The formats by their names in tables. Groups of 256 do not fit the model's widths, so the format of three
# levels has one scale for each row.
FORMATS = {
    "8 bits": preset("q8_0"),
    Q4_0: preset("q4_0"),
    "3 bits": preset("int3_g32"),
    "2 bits": preset("stretched2_g32"),
    "1.58 bits": preset("stretched_ternary_row"),
}
# torchao's 4 bits with scales that a q4_0 block could hold: another grid on the same codes.
OTHER_GRID = dataclasses.replace(preset("torchao_int4"), scale_type=ScaleType.FLOAT16)


def experiment() -> Experiment:
    """Return the model in full precision."""
    nano = slmjax.load_experiment("nano")
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=QkNorm.PER_HEAD)
    block = BlockConfig(mixer=attention, ffn=MlpConfig(hidden_dim=320))
    return dataclasses.replace(
        nano,
        model=ModelConfig(
            embed_dim=128, stack=(LayerGroup(pattern=(block,), repeats=2),), context_length=256
        ),
        tokenizer=BpeTokenizer(vocab_size=2048),
        eval=dataclasses.replace(nano.eval, every=STEPS, sample=False, unrounded=True),
        run=dataclasses.replace(nano.run, name="qat", steps=STEPS, sample_prompts=(), log_flips=True),
    )


def everywhere(spec: QuantSpec) -> tuple[QuantRule, ...]:
    """Return rules for every matrix, including the embedding, which is also the head."""
    return (QuantRule(paths=".", weight=spec),)


def trained_for(base: Experiment, spec: QuantSpec, *, start_step: int = 0) -> Experiment:
    """Return an experiment that trains in a format from a step on."""
    return dataclasses.replace(
        base, quant=QuantConfig(phases=(QuantPhase(rules=everywhere(spec)),), start_step=start_step)
    )


def rounded(name: str, spec: QuantSpec, *, source: str = FULL, clip: Clip = Clip.NONE) -> Derived:
    """Return an arm: the models of another one, rounded to nearest."""
    return Derived(name=name, source=source, derivation=RoundToNearest(rules=everywhere(spec), clip=clip))


def both_rounded(name: str, spec: QuantSpec) -> tuple[Derived, Derived]:
    """Return the reference rounded to nearest, with the format's own scales and with searched ones."""
    plain, searched = rounded_names(name)
    return rounded(plain, spec), rounded(searched, spec, clip=Clip.SEARCH)


def rounded_names(name: str) -> tuple[str, str]:
    """Return the names of the two rounded arms of a format."""
    return f"rounded, {name}", f"rounded with clip search, {name}"


# When: the first study --------------------------------------------------------------------------------------
def when(seeds: tuple[int, ...] = SEEDS) -> Study:
    """Return the study of QAT after a fraction of the steps, all from scratch and equally long."""
    base = experiment()
    late = {
        fraction: trained_for(base, FORMATS[Q4_0], start_step=round(fraction * base.run.steps))
        for fraction in FRACTIONS
    }
    arms = (
        Arm(name=FULL, experiment=base),
        *both_rounded(Q4_0, FORMATS[Q4_0]),
        *(Arm(name=f"QAT after {fraction:.0%}", experiment=arm) for fraction, arm in late.items()),
    )
    return Study(
        name=WHEN,
        question="When should quantization-aware training begin?",
        arms=arms,
        seeds=seeds,
        baseline=FULL,
        further_metrics=("calibration_error",),
        recovery=Recovery(
            reference=FULL,
            rounded={arm.name: rounded_names(Q4_0) for arm in arms if arm.name.startswith("QAT")},
        ),
    )


# What: the second study -------------------------------------------------------------------------------------
def further(base: Path) -> Experiment:
    """Return further steps for a trained model, in full precision, from half of the learning rate to zero."""
    start = experiment()
    return dataclasses.replace(
        start,
        init=FromModel(path=str(base)),
        tokenizer=FileTokenizer(path=str(base / "tokenizer")),
        optim=dataclasses.replace(
            start.optim,
            lr=start.optim.lr / 2,
            muon_lr=start.optim.muon_lr / 2,
            warmup_steps=min(10, FURTHER_STEPS - 1),
        ),
        eval=dataclasses.replace(start.eval, every=FURTHER_STEPS),
        run=dataclasses.replace(start.run, name="further", steps=FURTHER_STEPS),
    )


def taught(base: Path) -> Experiment:
    """Return training for q4_0 from the outputs of the model in full precision, not from the text."""
    student = trained_for(further(base), FORMATS[Q4_0])
    distill = DistillConfig(
        teachers=(TeacherConfig(path=str(base)),), weight=Ramp(start=1.0), hard_weight=Ramp(start=0.0)
    )
    return dataclasses.replace(student, objective=dataclasses.replace(student.objective, distill=distill))


def trained_arms() -> tuple[Arm, ...]:
    """Return the trained arms of `what`, each starting from the model in full precision of its seed."""

    def arm(name: str, make: Callable[[Path], Experiment]) -> Arm:
        return Arm(name=name, after=(WHEN, FULL), experiment=lambda seed, base: make(base))

    def trained(name: str, spec: QuantSpec) -> Arm:
        return arm(name, lambda base: trained_for(further(base), spec))

    return (
        arm(FULL, further),
        *(trained(f"QAT, {name}", spec) for name, spec in FORMATS.items()),
        arm(
            "QAT, q4_0, last quarter",
            lambda base: trained_for(further(base), FORMATS[Q4_0], start_step=FURTHER_STEPS * 3 // 4),
        ),
        trained("QAT, other grid", OTHER_GRID),
        arm("QAD, q4_0", taught),
    )


def what(seeds: tuple[int, ...] = SEEDS, *, tune: LearningRates | None = None) -> Study:
    """Return the study of formats, trained and rounded, and other ways to q4_0."""
    reference, *others = trained_arms()
    arms = (
        reference,
        *(arm for name, spec in FORMATS.items() for arm in both_rounded(name, spec)),
        *others,
        rounded("QAT, other grid, then q4_0", FORMATS[Q4_0], source="QAT, other grid"),
    )
    other_ways = ("QAT, q4_0, last quarter", "QAT, other grid, then q4_0", "QAD, q4_0")
    recovered = {f"QAT, {name}": rounded_names(name) for name in FORMATS}
    return Study(
        name="what QAT recovers",
        question="How much of the cost of rounding does quantization-aware training recover?",
        earlier=(when(seeds),),
        arms=arms,
        seeds=seeds,
        baseline=FULL,
        further_metrics=("calibration_error",),
        comparisons=FURTHER,
        tune=tune,
        recovery=Recovery(reference=FULL, rounded=recovered | dict.fromkeys(other_ways, rounded_names(Q4_0))),
    )


# Comparisons in addition to those with full precision: the first arm with the second.
FURTHER = (
    *((f"QAT, {name}", over) for name in FORMATS for over in rounded_names(name)),
    ("QAT, other grid, then q4_0", "rounded, q4_0"),
    ("QAT, other grid, then q4_0", "QAT, q4_0"),
    ("QAD, q4_0", "QAT, q4_0"),
    ("QAT, q4_0, last quarter", "rounded, q4_0"),
    ("QAT, q4_0, last quarter", "QAT, q4_0"),
)


def study(size: str) -> tuple[Study, ...]:
    """Return both studies; each trained arm of the large second one has its own best learning rate."""
    if size == "small":
        return when(), what()
    rates = LearningRates(rates=tuple(multiple * experiment().optim.lr for multiple in RATES))
    return when(MORE_SEEDS), what(MORE_SEEDS, tune=rates)
