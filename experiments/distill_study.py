"""Does a student learn more from a teacher than from the text alone, and from which divergence?

    python experiments/distill_study.py                                          # the teacher, then all arms
    python experiments/distill_study.py --directory runs/distill-study --report  # a report; no training
    slmjax train experiments/distill_study.py                                    # the teacher alone

The first command trains every arm with 3 seeds; started again, it resumes where it was stopped. The text is
Python's standard library, as in `nano`. The teacher has 8 layers of width 128, the students have 2, and all
arms see the same batches of the same number of tokens with the same seed. The metric is bits per byte of
held-out documents.
"""

import argparse
import dataclasses
from pathlib import Path

import slmjax
from slmjax.models import AttentionConfig, BlockConfig, LayerGroup, MlpConfig, ModelConfig, QkNorm
from slmjax.studies import Arm, Study, analyze, print_findings, read_members, run_study, write_findings
from slmjax.training import (
    BpeTokenizer,
    DistillConfig,
    Divergence,
    Experiment,
    ForwardKl,
    FromTeacherLayers,
    Jsd,
    Ramp,
    ReverseKl,
    Taid,
    TeacherConfig,
)

TEACHER_LAYERS = 8
STUDENT_LAYERS = 2
TEACHER_STEPS = 1000
STUDENT_STEPS = 300
SEEDS = (0, 1, 2)


def model(num_layers: int) -> ModelConfig:
    """`nano`'s layers at half their width."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=QkNorm.PER_HEAD)
    block = BlockConfig(mixer=attention, ffn=MlpConfig(hidden_dim=320))
    return ModelConfig(
        embed_dim=128, stack=(LayerGroup(pattern=(block,), repeats=num_layers),), context_length=256
    )


def of_depth(num_layers: int, *, name: str, steps: int) -> Experiment:
    """Return an experiment that learns from the text alone."""
    nano = slmjax.load_experiment("nano")
    return dataclasses.replace(
        nano,
        model=model(num_layers),
        tokenizer=BpeTokenizer(vocab_size=2048),
        eval=dataclasses.replace(nano.eval, every=steps, sample=False),
        run=dataclasses.replace(nano.run, name=name, steps=steps, sample_prompts=()),
    )


def experiment() -> Experiment:
    """Return the teacher."""
    return of_depth(TEACHER_LAYERS, name="teacher", steps=TEACHER_STEPS)


def taught_student(
    teacher: Path,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
    hard: float = 0.0,
    from_layers: bool = False,
) -> Experiment:
    """Return a student that learns from the teacher, with weight `hard` for the text."""
    student = text_alone(teacher, from_layers=from_layers)
    distill = DistillConfig(
        teachers=(TeacherConfig(path=str(teacher)),),
        divergence=divergence,
        weight=Ramp(start=1.0 - hard),
        hard_weight=Ramp(start=hard),
        temperature=Ramp(start=temperature),
    )
    return dataclasses.replace(student, objective=dataclasses.replace(student.objective, distill=distill))


def text_alone(teacher: Path, *, from_layers: bool = False) -> Experiment:
    """Return a student that learns from the text, from scratch or starting as layers of the teacher."""
    student = of_depth(STUDENT_LAYERS, name="student", steps=STUDENT_STEPS)
    return dataclasses.replace(student, init=FromTeacherLayers(path=str(teacher))) if from_layers else student


def study(teacher: Path, seeds: tuple[int, ...] = SEEDS) -> Study:
    """Return the study with all arms."""
    arms = {
        "cross entropy": text_alone(teacher),
        "forward KL": taught_student(teacher, ForwardKl()),
        "reverse KL": taught_student(teacher, ReverseKl()),
        "JSD": taught_student(teacher, Jsd()),
        "TAID": taught_student(teacher, Taid()),
        "forward KL, T=2": taught_student(teacher, ForwardKl(), temperature=2.0),
        "half forward KL": taught_student(teacher, ForwardKl(), hard=0.5),
        "cross entropy, teacher's layers": text_alone(teacher, from_layers=True),
        "forward KL, teacher's layers": taught_student(teacher, ForwardKl(), from_layers=True),
    }
    return Study(
        name="distillation",
        arms=tuple(Arm(name=name, experiment=arm) for name, arm in arms.items()),
        seeds=seeds,
        baseline="cross entropy",
        further_metrics=("calibration_error", "teacher_kl", "teacher_agreement"),
    )


# Comparisons in addition to those with cross entropy: the first arm with the second.
FURTHER = (
    ("forward KL, T=2", "forward KL"),
    ("forward KL, teacher's layers", "forward KL"),
    ("forward KL, teacher's layers", "cross entropy, teacher's layers"),
    ("half forward KL", "forward KL"),
)


def trained_teacher(directory: Path, *, is_report: bool) -> Path:
    """Return the teacher's run, a study of one arm; train or resume it, except for a report."""
    teacher = Study(
        name="teacher", arms=(Arm(name="teacher", experiment=experiment()),), seeds=(0,), baseline="teacher"
    )
    members = read_members(teacher, directory) if is_report else run_study(teacher, directory)
    if not members or members[0].status != "finished":
        raise SystemExit(
            f"there is no trained teacher in {directory}: train it first, with "
            f"python experiments/distill_study.py --directory {directory}"
        )
    return Path(members[0].result["run_dir"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("runs/distill-study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--report", action="store_true", help="report on finished members; train nothing")
    arguments = parser.parse_args()
    teacher = trained_teacher(arguments.directory.absolute() / "teacher", is_report=arguments.report)
    distillation = study(teacher, tuple(arguments.seeds))
    members = (
        read_members(distillation, arguments.directory)
        if arguments.report
        else run_study(distillation, arguments.directory)
    )
    findings = analyze(distillation, members, further=FURTHER)
    write_findings(findings, arguments.directory)
    print_findings(findings)


if __name__ == "__main__":
    main()
