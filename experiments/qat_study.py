"""How much of the cost of rounding does quantization-aware training recover, and when should it begin?

    python experiments/qat_study.py                                      # trains all members with 3 seeds
    python experiments/qat_study.py --sweep                              # with a sweep of learning rates
    python experiments/qat_study.py --directory runs/qat-study --report  # reports on finished members
    slmjax formats report experiments/qat_study.py                       # the recovery report with its page
    slmjax train experiments/qat_study.py                                # the model in full precision

The text is Python's standard library, as in `nano`; the model has 2 layers of width 128. Started again, the
first command resumes where it was stopped. All members of one seed see the same batches. There are two
studies:

- when: from scratch, in full precision for a fraction of the steps and in q4_0 for the rest;
- what: each seed's model in full precision from the first study continues for some more steps, in full
  precision or in a format. The result in full precision is also rounded to each format without training, with
  the format's own scales and with those that have the smallest squared error.

With --sweep, each trained arm of `what` first trains at the learning rates RATES with the seed SWEEP_SEED,
and then at its best one. `--report` finds a sweep in the directory.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import slmjax
from slmjax.models import AttentionConfig, BlockConfig, LayerGroup, MlpConfig, ModelConfig, QkNorm
from slmjax.studies import (
    MEMBERS,
    Arm,
    ChosenRate,
    Clip,
    Derived,
    RateSweep,
    Recovery,
    RoundToNearest,
    Study,
    analyze,
    at_rates,
    best_rates,
    measure,
    print_findings,
    print_recovery,
    read_members,
    report_recovery,
    run_study,
    write_findings,
    write_recovery,
)
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
SWEEP_SEED = 1000  # chooses learning rates; none of SEEDS
RATES = (0.25, 0.5, 1.0, 2.0)  # of the arms of `what`, as multiples of the experiment's learning rate
FRACTIONS = (0.0, 0.5, 0.9)  # of the steps, in full precision before those in q4_0
FULL = "full precision"
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
        name="when QAT begins", arms=arms, seeds=seeds, baseline=FULL, further_metrics=("calibration_error",)
    )


# What: the second study -------------------------------------------------------------------------------------
def bases(directory: Path, seeds: tuple[int, ...], *, study: Study | None = None) -> dict[int, Path]:
    """Return the runs in full precision of a study (None: the first one), by seed."""
    members = {
        member.seed: member for member in read_members(study or when(seeds), directory) if member.arm == FULL
    }
    if missing := [seed for seed in seeds if seed not in members or members[seed].status != "finished"]:
        raise SystemExit(
            f"{directory} has no finished run in full precision of seeds {missing}: train them first, with "
            f"python experiments/qat_study.py --directory {directory.parent}"
        )
    return {seed: Path(member.result["run_dir"]) for seed, member in members.items()}


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


def trained_arms(base_of: dict[int, Path]) -> tuple[Arm, ...]:
    """Return the trained arms of `what`, each starting from the base of its seed."""

    def arm(name: str, make: Callable[[Path], Experiment]) -> Arm:
        return Arm(name=name, experiment=lambda seed: make(base_of[seed]))

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


def what(
    base_of: dict[int, Path],
    seeds: tuple[int, ...] = SEEDS,
    rates: Mapping[str, ChosenRate] = MappingProxyType({}),
) -> Study:
    """Return the study of formats, trained and rounded, and other ways to q4_0; `rates` by arm, if chosen."""
    reference, *others = at_rates(trained_arms(base_of), rates)
    arms = (
        reference,
        *(arm for name, spec in FORMATS.items() for arm in both_rounded(name, spec)),
        *others,
        rounded("QAT, other grid, then q4_0", FORMATS[Q4_0], source="QAT, other grid"),
    )
    return Study(
        name="what QAT recovers",
        arms=arms,
        seeds=seeds,
        baseline=FULL,
        further_metrics=("calibration_error",),
    )


# Learning rates of the second study -------------------------------------------------------------------------
def sweep_base() -> Study:
    """Return the study of the model in full precision with the seed of the sweep."""
    return Study(
        name="base of the sweep",
        arms=(Arm(name=FULL, experiment=experiment()),),
        seeds=(SWEEP_SEED,),
        baseline=FULL,
    )


def sweep(directory: Path) -> RateSweep:
    """Return the sweep of each trained arm of `what` at each of RATES."""
    base_of = bases(directory / "sweep-base", (SWEEP_SEED,), study=sweep_base())
    rates = tuple(multiple * experiment().optim.lr for multiple in RATES)
    return RateSweep(name="learning rates", arms=trained_arms(base_of), rates=rates, seed=SWEEP_SEED)


def run_sweep(directory: Path) -> None:
    """Train the members of the sweep."""
    run_study(sweep_base(), directory / "sweep-base")
    run_study(sweep(directory).study(), directory / "sweep")


def chosen_rates(directory: Path) -> dict[str, ChosenRate]:
    """Return the rates that a sweep in this directory chose; none without a sweep."""
    if not (directory / "sweep" / MEMBERS).is_file():
        return {}
    swept = sweep(directory)
    return best_rates(swept, read_members(swept.study(), directory / "sweep"))


# Comparisons in addition to those with full precision: the first arm with the second.
FURTHER = (
    *((f"QAT, {name}", over) for name in FORMATS for over in rounded_names(name)),
    ("QAT, other grid, then q4_0", "rounded, q4_0"),
    ("QAT, other grid, then q4_0", "QAT, q4_0"),
    ("QAD, q4_0", "QAT, q4_0"),
    ("QAT, q4_0, last quarter", "rounded, q4_0"),
    ("QAT, q4_0, last quarter", "QAT, q4_0"),
)


def recoveries(directory: Path, seeds: tuple[int, ...] = SEEDS) -> tuple[Recovery, ...]:
    """Return the reference and the rounded arms of both studies."""
    first = when(seeds)
    over = rounded_names(Q4_0)
    of_first = {arm.name: over for arm in first.arms if arm.name.startswith("QAT")}
    of_second = {f"QAT, {name}": rounded_names(name) for name in FORMATS} | dict.fromkeys(
        ("QAT, q4_0, last quarter", "QAT, other grid, then q4_0", "QAD, q4_0"), over
    )
    rates = chosen_rates(directory)
    second = what(bases(directory / "when", seeds), seeds, rates)
    return (
        Recovery(study=second, reference=FULL, rounded=of_second, rates=rates, directory="what"),
        Recovery(study=first, reference=FULL, rounded=of_first, directory="when"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("runs/qat-study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="train each arm of the second study at its own best learning rate",
    )
    parser.add_argument("--report", action="store_true", help="report on finished members; train nothing")
    arguments = parser.parse_args()
    seeds = tuple(arguments.seeds)
    directory = arguments.directory.absolute()
    if not arguments.report:
        run_study(when(seeds), directory / "when")
        if arguments.sweep:
            run_sweep(directory)
        run_study(what(bases(directory / "when", seeds), seeds, chosen_rates(directory)), directory / "what")
    reports = []
    for recovery in recoveries(directory, seeds):
        place = directory / recovery.directory
        members = read_members(recovery.study, place)
        findings = analyze(recovery.study, members, further=FURTHER if recovery.directory == "what" else ())
        write_findings(findings, place)
        reports.append(report_recovery(recovery, members, measure(recovery, members, place)))
        print_findings(findings)
        print_recovery(reports[-1])
    print(write_recovery(reports, directory))


if __name__ == "__main__":
    main()
