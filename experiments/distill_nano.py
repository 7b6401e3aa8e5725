"""A student with half of `nano`'s layers that learns from a run of `nano`.

    slmjax train                                                  # the teacher
    slmjax train experiments/distill_nano.py                      # the student of its newest finished run
    slmjax train experiments/distill_nano.py --teacher DIR        # of another run or an imported model

The student starts as two of the teacher's layers and trains for half as many steps.
"""

import dataclasses
from pathlib import Path

import slmjax
from slmjax.models import LayerGroup
from slmjax.training import DistillConfig, Experiment, FileTokenizer, FromTeacherLayers, Ramp, TeacherConfig


def newest_teacher() -> Path:
    """Return the newest finished run of `nano` in runs/."""
    results = sorted(Path("runs").glob("nano-*/result.json"), key=lambda path: path.stat().st_mtime)
    return results[-1].parent if results else Path("runs/nano")


def experiment() -> Experiment:
    """Return the student."""
    nano = slmjax.load_experiment("nano")
    teacher = newest_teacher()
    (group,) = nano.model.stack
    distill = DistillConfig(teachers=(TeacherConfig(path=str(teacher)),), temperature=Ramp(start=2.0))
    return dataclasses.replace(
        nano,
        model=dataclasses.replace(nano.model, stack=(LayerGroup(pattern=group.pattern, repeats=2),)),
        init=FromTeacherLayers(path=str(teacher)),
        tokenizer=FileTokenizer(path=str(teacher / "tokenizer")),
        objective=dataclasses.replace(nano.objective, distill=distill),
        run=dataclasses.replace(nano.run, name="distilled", steps=nano.run.steps // 2),
    )
