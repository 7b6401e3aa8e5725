"""Runs in distillation: their logs, their evaluations, what is resumed, and teachers that are called only
where they are used.
"""

import dataclasses
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

import slmjax
from slmjax import cli
from slmjax.checkpoints.run_checkpoints import CheckpointConfig
from slmjax.distill.config import DistillConfig, Ramp, RampShape, TeacherConfig
from slmjax.distill.teachers import Teachers
from slmjax.losses import Divergence, ForwardKl, ReverseKl, Taid
from slmjax.parallel.mesh import make_mesh
from slmjax.runner import setup as run_setup
from slmjax.runner.initial_state import fresh_state
from slmjax.runner.trainer import Result
from slmjax.telemetry.run_directory import read_log
from slmjax.training.experiment import EvalConfig, Experiment, FromModel
from slmjax.training.objective import ObjectiveConfig
from tests.distill.lessons import STUDENT, dense_logits, forward_kl, log_softmax, write_teacher
from tests.one_layer import one_layer

NUM_STEPS = 4


def train(experiment: Experiment, **how: Any) -> Result:
    return slmjax.train(experiment, console=Console(file=io.StringIO(), width=200), **how)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes are its tokens, and its table has rows that the student's has not."""
    config = dataclasses.replace(STUDENT, vocab_size=258, vocab_multiple=20, context_length=64)
    return write_teacher(tmp_path_factory.mktemp("runs") / "teacher", config, scale=0.2, embed=4.0)


def taught(
    workplace: Path, directory: Path, teacher: Path, *, num_steps: int = NUM_STEPS, **distill: Any
) -> Experiment:
    """Some steps of a student of one layer, without dropout; checkpoints at 2 and 4, one evaluation at the
    end.
    """
    experiment = one_layer(workplace, directory, steps=num_steps)
    settings = DistillConfig(teachers=(TeacherConfig(path=str(teacher)),), **distill)
    data = dataclasses.replace(experiment.data, heldout_fraction=0.02)
    return dataclasses.replace(
        experiment,
        data=data,
        objective=ObjectiveConfig(distill=settings),
        checkpoint=CheckpointConfig(every=2),
        model=dataclasses.replace(experiment.model, dropout=0.0),
        eval=EvalConfig(every=100, overlap=8),
    )


def records(run_dir: str | Path, kind: str = "train") -> list[dict[str, Any]]:
    return read_log(Path(run_dir) / "log.jsonl", kind=kind)


# A run whose every amount changes ---------------------------------------------------------------------------
RAMPS = {
    "divergence": Taid(start=0.3, rate=0.2, momentum=0.5),
    "weight": Ramp(start=0.8, end=0.2, steps=3),
    "hard_weight": Ramp(start=0.1, end=0.5),
    "temperature": Ramp(start=1.0, end=3.0, steps=2, shape=RampShape.COSINE),
}


@pytest.fixture(scope="module")
def straight(
    workplace: Path, tmp_path_factory: pytest.TempPathFactory, teacher: Path
) -> tuple[Experiment, Result]:
    experiment = taught(workplace, tmp_path_factory.mktemp("straight"), teacher, **RAMPS)
    return experiment, train(experiment)


def test_the_log_has_the_amounts(straight: tuple[Experiment, Result]) -> None:
    found = records(straight[1].run_dir)
    wanted = {
        "soft_weight": (0.8, 0.6, 0.4, 0.2),
        "hard_weight": (0.1, 0.2, 0.3, 0.4),
        "temperature": (1.0, 2.0, 3.0, 3.0),
    }
    for name, values in wanted.items():
        assert [record[name] for record in found] == pytest.approx(values, rel=1e-6), name
    for record in found:
        assert record["objective"] == pytest.approx(
            record["soft_weight"] * record["divergence"] + record["hard_weight"] * record["loss"]
        )
    shares = [record["divergence_share"] for record in found]
    assert shares[:2] == pytest.approx([0.3, 0.3]) and shares[1] < shares[2] < shares[3]


@pytest.mark.composes("distillation", "resume")
def test_resumed_bit_for_bit(straight: tuple[Experiment, Result], tmp_path: Path) -> None:
    """From the checkpoint of step 2, without that of step 4: the same steps 3 and 4, and the same state of
    TAID with them.
    """
    experiment, result = straight
    run_dir = Path(shutil.copytree(result.run_dir, tmp_path / "again"))
    shutil.rmtree(run_dir / "checkpoints" / "4")
    (run_dir / "result.json").unlink()
    again = train(experiment, resume=run_dir)
    assert (again.step, again.loss, again.bits_per_byte) == (result.step, result.loss, result.bits_per_byte)
    first = records(result.run_dir)
    log = records(run_dir)
    assert [record["step"] for record in log] == [1, 2, 3, 4, 3, 4]
    timed = {"time", "tokens_per_second", "mfu", "data_wait_share"}
    assert [{name: one[name] for name in one.keys() - timed} for one in log[4:]] == [
        {name: one[name] for name in one.keys() - timed} for one in first[2:]
    ]
    for item in ("model", "optimizer", "ema", "objective", "progress"):
        found, expected = (
            ocp.StandardCheckpointer().restore(run / "checkpoints" / "4" / item)
            for run in (run_dir, Path(result.run_dir))
        )
        assert found.keys() == expected.keys() and found
        for name, value in expected.items():
            np.testing.assert_array_equal(
                np.asarray(found[name]), np.asarray(value), err_msg=f"{item} {name}"
            )
    state = ocp.StandardCheckpointer().restore(run_dir / "checkpoints" / "2" / "objective")
    assert state.keys() == {"share", "momentum", "previous"} and float(state["share"]) == pytest.approx(
        log[2]["divergence_share"]
    )


@pytest.mark.parametrize("other", [ForwardKl(), None])
def test_another_divergence_does_not_resume(
    straight: tuple[Experiment, Result], other: Divergence | None
) -> None:
    experiment, result = straight
    distill = experiment.objective.distill
    assert distill is not None
    objective = ObjectiveConfig(
        distill=None if other is None else dataclasses.replace(distill, divergence=other)
    )
    with pytest.raises(
        ValueError,
        match=(
            "keeps momentum, previous, share of its objective from step to step, and this experiment nothing"
        ),
    ):
        train(dataclasses.replace(experiment, objective=objective), resume=result.run_dir)


# Teachers that are not used ---------------------------------------------------------------------------------
@dataclasses.dataclass
class Calls:
    """How often teachers were loaded, called with a training batch, and called with held-out text."""

    loaded: int = 0
    training: int = 0
    evaluation: int = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted = Calls()
    load = Teachers.__init__
    call = Teachers.__call__

    def counted_load(self: Teachers, *args: Any, **kwargs: Any) -> None:
        counted.loaded += 1
        load(self, *args, **kwargs)

    def counted_call(self: Teachers, batch: Any, *, in_microbatches: bool = True) -> Any:
        counted.training += in_microbatches
        counted.evaluation += not in_microbatches
        return call(self, batch, in_microbatches=in_microbatches)

    monkeypatch.setattr(Teachers, "__init__", counted_load)
    monkeypatch.setattr(Teachers, "__call__", counted_call)
    return counted


def test_a_weight_that_reaches_zero(workplace: Path, tmp_path: Path, calls: Calls) -> None:
    """The teacher is called while it counts and no longer; the student then learns from the text alone, and
    needs no teacher ever after.
    """
    moved = write_teacher(
        tmp_path / "teacher", dataclasses.replace(STUDENT, vocab_size=258, context_length=64)
    )
    experiment = taught(
        workplace,
        tmp_path,
        moved,
        weight=Ramp(end=0.0, steps=2),
        hard_weight=Ramp(start=0.5),
        divergence=ReverseKl(),
    )
    result = train(experiment)
    assert (calls.loaded, calls.training) == (1, 2) and calls.evaluation > 1
    found = records(result.run_dir)
    assert [record["soft_weight"] for record in found] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert ["divergence" in record for record in found] == [True, True, False, False]
    assert [record["objective"] for record in found[2:]] == pytest.approx(
        [0.5 * record["loss"] for record in found[2:]]
    )
    assert found[3]["loss"] < found[0]["loss"] and result.skipped == 0
    (evaluated,) = records(result.run_dir, "eval")
    shutil.rmtree(moved)
    alone = slmjax.evaluate(slmjax.load_model(result.run_dir))
    assert (
        alone.bits_per_byte == pytest.approx(evaluated["bits_per_byte"], rel=1e-6)
        and alone.teacher_kl is None
    )
    assert "teacher" not in alone.text() and not {name for name in alone.metrics() if "teacher" in name}


def test_a_teacher_without_weight_is_not_even_looked_for(
    workplace: Path, tmp_path: Path, calls: Calls
) -> None:
    experiment = taught(
        workplace, tmp_path, tmp_path / "nowhere", num_steps=2, weight=Ramp(start=0.0), hard_weight=Ramp()
    )
    result = train(experiment)
    assert calls == Calls() and result.status == "finished"
    for record in records(result.run_dir):
        assert (
            record["objective"] == record["loss"]
            and record["soft_weight"] == 0.0
            and "divergence" not in record
        )


# Evaluation -------------------------------------------------------------------------------------------------
def set_up(experiment: Experiment) -> tuple[run_setup.Setup, Any]:
    """What is fixed before the first step, and the first state."""
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        setup = run_setup.set_up(experiment, tokenizer=experiment.tokenizer, mesh=mesh)
        return run_setup.with_teachers(setup), fresh_state(setup)


def test_an_evaluation_beside_the_teacher_is_the_dense_one(
    straight: tuple[Experiment, Result], teacher: Path, tmp_path: Path
) -> None:
    """Of a student that nobody trained, which like its teacher often repeats a token: every figure anew in
    float64, from all logits.
    """
    experiment, result = straight
    student = slmjax.load_model(
        write_teacher(tmp_path, dataclasses.replace(experiment.model, vocab_size=258), scale=0.2, embed=3.0)
    )
    setup, state = set_up(dataclasses.replace(experiment, init=FromModel(path=str(tmp_path))))
    batches = setup.heldout(None)
    assert batches is not None
    with jax.set_mesh(setup.mesh):
        found = setup.evaluate(state, None)
    assert found is not None
    metrics = found.metrics()
    (record,) = records(result.run_dir, "eval")
    assert metrics.keys() <= record.keys() and len(metrics) == 8
    ours = []
    theirs = []
    targets = []
    for batch in batches:
        is_scored = batch.loss_mask > 0
        for model, logits in ((student.model, ours), (slmjax.load_model(teacher).model, theirs)):
            logits.append(dense_logits(model, batch)[is_scored])
        targets.append(batch.targets[is_scored])
    log_q = log_softmax(np.concatenate(ours))
    log_p = log_softmax(np.concatenate(theirs))
    target = np.concatenate(targets)
    nll, teacher_nll = (
        -np.take_along_axis(values, target[:, None], axis=-1).sum() for values in (log_q, log_p)
    )
    best = log_q.argmax(axis=-1)
    confidence = np.exp(log_q.max(axis=-1))
    is_right = best == target
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((is_right[bins == index] - confidence[bins == index]).sum()) for index in range(15)]
    expected = {
        "loss": nll / len(target),
        "bits_per_byte": nll / math.log(2) / batches.num_bytes,
        "teacher_bits_per_byte": teacher_nll / math.log(2) / batches.num_bytes,
        "teacher_kl": forward_kl(log_p, log_q).mean(),
        "teacher_agreement": (best == log_p.argmax(axis=-1)).mean(),
        "calibration_error": sum(gaps) / len(target),
        "tokens": len(target),
        "total_tokens": len(target),
    }
    assert (
        len(target) > 500 and 0.05 < expected["teacher_agreement"] < 0.95 and sum(np.bincount(bins) > 0) > 5
    )
    assert metrics == pytest.approx(expected, rel=1e-4)


def test_a_student_that_is_its_own_teacher(
    straight: tuple[Experiment, Result], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is between them, whether an evaluation of training compares them or the command line's; both
    are the averages.
    """
    experiment, result = straight
    own = DistillConfig(teachers=(TeacherConfig(path=result.run_dir),))
    setup, state = set_up(
        dataclasses.replace(
            experiment, init=FromModel(path=result.run_dir), objective=ObjectiveConfig(distill=own)
        )
    )
    with jax.set_mesh(setup.mesh):
        found = setup.evaluate(state, None)
    assert found is not None and found.teacher_kl is not None and 0 <= found.teacher_kl < 1e-6
    assert found.teacher_agreement == pytest.approx(1.0) and found.teacher_bits_per_byte == pytest.approx(
        found.bits_per_byte, rel=1e-6
    )
    assert "same first choice 100.0%" in found.text() and all(map(math.isfinite, found.metrics().values()))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", result.run_dir, "--teacher", result.run_dir, "--json"])
    assert stopped.value.code == 0
    printed = json.loads(capsys.readouterr().out)["text"]
    assert printed["bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-5)
    assert abs(printed["teacher_kl"]) < 1e-6 and printed["teacher_agreement"] == pytest.approx(1.0)
