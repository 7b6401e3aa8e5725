"""Settings of distillation: from the command line, through JSON, refused where they mean nothing; and ramps
by hand.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from slmjax import cli, config
from slmjax.data.tokenizers import FileTokenizer
from slmjax.distill.config import DistillConfig, Ramp, RampShape, ShortContext, TeacherConfig, divergence_of
from slmjax.losses import ForwardKl, Jsd, SkewKl, SkewReverseKl, TeacherMean
from slmjax.models.architecture import Precision
from slmjax.parallel.mesh import MeshConfig
from slmjax.runner import trainer
from slmjax.training.experiment import Experiment, FromModel, FromTeacherLayers, taught_by, with_divergence
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.recipes import load_experiment
from tests.distill.lessons import write_teacher

TEACHERS = (
    TeacherConfig(path="/runs/large", weight=2.0, step=40, precision=Precision.BFLOAT16),
    TeacherConfig(path="/imported/other"),
)
FULL = DistillConfig(
    teachers=TEACHERS,
    divergence=Jsd(beta=0.9),
    weight=Ramp(start=0.2, end=1.0, steps=30, shape=RampShape.COSINE),
    hard_weight=Ramp(start=0.5),
    temperature=Ramp(start=4.0, end=1.0),
    scales_by_square=False,
    mean=TeacherMean.PROBABILITIES,
    short_context=ShortContext.WINDOW,
    overlap=16,
    mesh=MeshConfig(data=1, tensor=-1),
    devices=4,
)


def test_through_json() -> None:
    experiment = dataclasses.replace(
        load_experiment("nano"), objective=ObjectiveConfig(distill=FULL, z_loss=1e-4)
    )
    assert config.loads(Experiment, config.dumps(experiment)) == experiment
    assert FULL.loss_config.teacher_weights == (2.0, 1.0)
    assert FULL.loss_config.normalised_weights(2) == pytest.approx((2 / 3, 1 / 3))


@pytest.mark.parametrize("kind", [SkewKl, SkewReverseKl])
def test_the_skew_coefficient_is_read_under_its_former_name(kind: type[SkewKl]) -> None:
    distill = DistillConfig(teachers=TEACHERS, divergence=kind(alpha=0.25))
    fields = config.to_json(distill)
    former = {name: value for name, value in fields["divergence"].items() if name != "alpha"}
    fields["divergence"] = former | {"share": 0.25}
    assert config.from_json(DistillConfig, fields) == distill


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`parsed(*arguments)`: the experiment that `slmjax train nano --teacher DIR` would train with these
    arguments.
    """
    write_teacher(tmp_path / "teacher")
    found: list[Experiment] = []

    def record(experiment: Experiment, **_: Any) -> Any:
        found.append(experiment)
        raise ValueError("enough")

    monkeypatch.setattr(trainer, "train", record)

    def run(*arguments: str) -> Experiment:
        with pytest.raises(SystemExit):
            cli.main(["train", "nano", "--teacher", str(tmp_path / "teacher"), *arguments])
        return found.pop()

    return run


def test_on_the_command_line(parsed: Any, tmp_path: Path) -> None:
    plain = load_experiment("nano")
    teacher = TeacherConfig(path=str(tmp_path / "teacher"))
    expected = dataclasses.replace(
        plain,
        tokenizer=FileTokenizer(path=str(tmp_path / "teacher" / "tokenizer")),
        objective=ObjectiveConfig(distill=DistillConfig(teachers=(teacher,))),
    )
    assert parsed() == expected
    found = parsed(
        "--objective.distill.weight.start",
        "0.5",
        "--objective.distill.weight.end",
        "0.1",
        "--objective.distill.weight.steps",
        "20",
        "--objective.distill.hard-weight.start",
        "0.5",
        "--objective.distill.temperature.start",
        "2",
        "--objective.distill.mean",
        "probabilities",
        "--objective.distill.short-context",
        "window",
        "--objective.distill.no-scales-by-square",
    )
    assert found.objective.distill == DistillConfig(
        teachers=(teacher,),
        weight=Ramp(start=0.5, end=0.1, steps=20),
        hard_weight=Ramp(start=0.5),
        temperature=Ramp(start=2.0),
        mean=TeacherMean.PROBABILITIES,
        short_context=ShortContext.WINDOW,
        scales_by_square=False,
    )
    assert dataclasses.replace(found, objective=plain.objective, tokenizer=plain.tokenizer) == plain


def test_another_divergence_on_the_command_line(parsed: Any) -> None:
    assert parsed(
        "--divergence", "jsd", "--objective.distill.divergence.beta", "0.9"
    ).objective.distill.divergence == Jsd(beta=0.9)
    with pytest.raises(ValueError, match=r"there is no divergence 'jds'.*jsd"):
        divergence_of("jds")


def test_a_teacher_takes_the_place_of_an_experiments_own(tmp_path: Path) -> None:
    experiment = dataclasses.replace(load_experiment("nano"), objective=ObjectiveConfig(distill=FULL))
    taught = taught_by(write_teacher(tmp_path), experiment).objective.distill
    assert taught == dataclasses.replace(FULL, teachers=(TeacherConfig(path=str(tmp_path)),))
    with pytest.raises(ValueError, match="neither a run directory nor an imported model"):
        taught_by(tmp_path / "nowhere", experiment)
    with pytest.raises(ValueError, match=r"has no tokenizer.*import it again with --tokenizer FILE"):
        taught_by(write_teacher(tmp_path / "silent", tokenizer=None), experiment)


# Ramps ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (Ramp(start=0.3), (0.3, 0.3, 0.3, 0.3)),
        (Ramp(start=1.0, end=0.0), (1.0, 0.75, 0.5, 0.25)),
        (Ramp(start=1.0, end=0.0, steps=2), (1.0, 0.5, 0.0, 0.0)),
        (Ramp(start=1.0, end=3.0, steps=3, shape=RampShape.COSINE), (1.0, 1.5, 2.5, 3.0)),
    ],
)
def test_ramps(ramp: Ramp, expected: tuple[float, ...]) -> None:
    """At steps 0 to 3 of 4, told by the host and on the device alike; a constant is a number and is compiled
    in.
    """
    for step, value in enumerate(expected):
        assert ramp.at(step, total_steps=4) == pytest.approx(value)
        on_device = ramp.at(jnp.asarray(step, jnp.int32), total_steps=4)
        assert (
            float(on_device) == pytest.approx(value, abs=1e-6)
            and isinstance(on_device, float) == ramp.is_constant
        )
        uses = DistillConfig(teachers=TEACHERS, weight=ramp, hard_weight=Ramp()).uses_teachers(
            step, total_steps=4
        )
        assert uses == (value > 0)


# What means nothing -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistillConfig(teachers=()), "distillation needs a teacher"),
        (
            lambda: DistillConfig(teachers=TEACHERS, weight=Ramp(start=0.0)),
            "weight and hard_weight are both 0 at the end of the run",
        ),
        (
            lambda: DistillConfig(teachers=TEACHERS, weight=Ramp(end=0.0, steps=5)),
            "both 0 at the end of the run.*: keep one of them above 0",
        ),
        (
            lambda: DistillConfig(teachers=TEACHERS, temperature=Ramp(start=1.0, end=0.0)),
            "temperature divides logits and must be above 0",
        ),
        (
            lambda: DistillConfig(teachers=TEACHERS, devices=4),
            "devices=4 is for teachers with a mesh of their own",
        ),
        (lambda: DistillConfig(teachers=TEACHERS, mesh=MeshConfig(), devices=0), "devices=0"),
        (lambda: Ramp(start=-1.0), "between numbers of at least 0, got -1.0"),
        (lambda: Ramp(end=math.inf), "between numbers of at least 0"),
        (lambda: Ramp(steps=0), "at least 1 step, got 0"),
        (
            lambda: TeacherConfig(path="x", weight=0.0),
            "weight must be above 0, got 0.0: leave the teacher out",
        ),
        (lambda: TeacherConfig(path="x", weight=math.nan), "weight must be above 0"),
    ],
)
def test_settings_that_mean_nothing(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_default_is_forward_kl_alone() -> None:
    plain = DistillConfig(teachers=TEACHERS[1:])
    assert (
        plain.divergence == ForwardKl()
        and plain.uses_teachers(0, total_steps=1)
        and plain.hard_weight.is_zero
    )
    assert plain.temperature.is_constant and plain.scales_by_square and ObjectiveConfig().distill is None


def test_a_teacher_of_a_student_that_begins_as_another_model(tmp_path: Path) -> None:
    """Its tokenizer stays that of its first model; layers of a teacher are those of the new one."""
    teacher = write_teacher(tmp_path / "teacher")
    nano = load_experiment("nano")
    begun = dataclasses.replace(
        nano, init=FromModel(path="first"), tokenizer=FileTokenizer(path="first/tokenizer")
    )
    assert (
        taught_by(teacher, begun).tokenizer == begun.tokenizer
        and taught_by(teacher, begun).init == begun.init
    )
    layers = taught_by(teacher, dataclasses.replace(nano, init=FromTeacherLayers(path="other", every=2)))
    assert layers.init == FromTeacherLayers(path=str(teacher), every=2) and layers.tokenizer == FileTokenizer(
        path=str(teacher / "tokenizer")
    )


def test_settings_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"objective.z_loss=0.0001 is part of the cross entropy, which has no weight here"
    ):
        ObjectiveConfig(z_loss=1e-4, distill=DistillConfig(teachers=TEACHERS))
    with pytest.raises(ValueError, match="a divergence is one from a teacher: name a model with --teacher"):
        with_divergence(load_experiment("nano"), Jsd())
