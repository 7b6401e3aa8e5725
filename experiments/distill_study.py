"""Does a student learn more from a teacher than from the text alone, and from which divergence?

    slmjax ablate experiments/distill_study.py          # the teacher, then all arms with 3 seeds
    slmjax train experiments/distill_study.py           # the teacher alone

The text is Python's standard library, as in `nano`. The teacher has 8 layers of width 128, the students have
2, and all arms see the same batches of the same number of tokens with the same seed. The metric is bits per
byte of held-out documents.
"""

import dataclasses
from pathlib import Path

import slmjax
from slmjax.models import AttentionConfig, BlockConfig, LayerGroup, MlpConfig, ModelConfig, QkNorm
from slmjax.studies import Arm, Study
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


def text_alone() -> Experiment:
    """Return a student that learns from the text, from scratch."""
    return of_depth(STUDENT_LAYERS, name="student", steps=STUDENT_STEPS)


def student(
    name: str,
    divergence: Divergence | None = None,
    *,
    temperature: float = 1.0,
    hard: float = 0.0,
    from_layers: bool = False,
) -> Arm:
    """Return an arm that learns from the teacher, with weight `hard` for the text, or from the text alone."""

    def taught(seed: int, teacher: Path) -> Experiment:
        start = text_alone()
        if from_layers:
            start = dataclasses.replace(start, init=FromTeacherLayers(path=str(teacher)))
        if divergence is None:
            return start
        distill = DistillConfig(
            teachers=(TeacherConfig(path=str(teacher)),),
            divergence=divergence,
            weight=Ramp(start=1.0 - hard),
            hard_weight=Ramp(start=hard),
            temperature=Ramp(start=temperature),
        )
        return dataclasses.replace(start, objective=dataclasses.replace(start.objective, distill=distill))

    return Arm(name=name, after=("teacher", "teacher"), experiment=taught)


def study() -> Study:
    """Return the study with all arms. The teacher has one seed: all students have the same one."""
    teacher = Study(
        name="teacher", arms=(Arm(name="teacher", experiment=experiment()),), seeds=(0,), baseline="teacher"
    )
    return Study(
        name="distillation",
        question="Does a student learn more from a teacher than from the text alone?",
        earlier=(teacher,),
        arms=(
            Arm(name="cross entropy", experiment=text_alone()),
            student("forward KL", ForwardKl()),
            student("reverse KL", ReverseKl()),
            student("JSD", Jsd()),
            student("TAID", Taid()),
            student("forward KL, T=2", ForwardKl(), temperature=2.0),
            student("half forward KL", ForwardKl(), hard=0.5),
            student("cross entropy, teacher's layers", from_layers=True),
            student("forward KL, teacher's layers", ForwardKl(), from_layers=True),
        ),
        seeds=(0, 1, 2),
        baseline="cross entropy",
        comparisons=(
            ("forward KL, T=2", "forward KL"),
            ("forward KL, teacher's layers", "forward KL"),
            ("forward KL, teacher's layers", "cross entropy, teacher's layers"),
            ("half forward KL", "forward KL"),
        ),
        further_metrics=("calibration_error", "teacher_kl", "teacher_agreement"),
    )
