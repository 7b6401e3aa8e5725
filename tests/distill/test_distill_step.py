"""A step of distillation: what may not change it (masks, padding, accumulation, meshes), and what it comes
to, densely computed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slmjax
from slmjax.data.batch import Batch
from slmjax.data.windows import evaluation_batches
from slmjax.distill.config import DistillConfig, Ramp, TeacherConfig
from slmjax.losses import ForwardKl, Sampled, Taid
from slmjax.models.architecture import Precision
from slmjax.parallel.mesh import MeshConfig
from tests.data.in_memory import InMemoryDocuments
from tests.distill.lessons import (
    LENGTH,
    ROWS,
    Lesson,
    build,
    dense_logits,
    forward_kl,
    log_softmax,
    make_batch,
    mean_over,
    write_teacher,
)
from tests.training.test_step import MIXED, assert_bits_equal

TEMPERATURE = 2.0
WEIGHT = 0.7
HARD_WEIGHT = 0.5


@functools.cache
def settings(path: str, **changes: Any) -> DistillConfig:
    """Forward KL at temperature 2 beside the cross entropy, all of it constant."""
    return dataclasses.replace(
        DistillConfig(
            teachers=(TeacherConfig(path=path),),
            divergence=ForwardKl(),
            weight=Ramp(start=WEIGHT),
            hard_weight=Ramp(start=HARD_WEIGHT),
            temperature=Ramp(start=TEMPERATURE),
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_teacher(tmp_path_factory.mktemp("lesson") / "teacher"))


BATCHES = make_batch(0), make_batch(1)


@functools.cache
def result(lesson: Lesson) -> tuple[Any, dict[str, Any]]:
    """The state and the metrics after two batches."""
    return lesson.run(*BATCHES)


def assert_same_training(found: Lesson, expected: Lesson, *, rtol: float = 2e-4, atol: float = 2e-6) -> None:
    """To the rounding of another order of summation."""
    (state, metrics) = result(found)
    (wanted_state, wanted_metrics) = result(expected)
    assert metrics.keys() == wanted_metrics.keys() and jax.tree.structure(state) == jax.tree.structure(
        wanted_state
    )
    for name, value in wanted_metrics.items():
        np.testing.assert_allclose(
            jax.tree.leaves(metrics[name]), jax.tree.leaves(value), rtol=rtol, atol=1e-6, err_msg=name
        )
    for (path, value), wanted in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(wanted_state), strict=True
    ):
        np.testing.assert_allclose(value, wanted, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


# Meshes and microbatches ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "num_microbatches", [pytest.param(2, marks=pytest.mark.nightly), 4]
)  # further tests have 2 parts
def test_accumulation_changes_nothing(teacher: str, num_microbatches: int) -> None:
    distill = settings(teacher)
    assert_same_training(build(distill, num_microbatches=num_microbatches), build(distill))


@pytest.mark.parametrize(
    "num_devices", [2, pytest.param(8, marks=pytest.mark.nightly)]
)  # further tests have 4 and 8 devices
def test_devices_change_nothing(teacher: str, num_devices: int) -> None:
    distill = settings(teacher)
    assert_same_training(build(distill, num_devices=num_devices), build(distill))


def test_a_teacher_with_a_mesh_of_its_own(teacher: str) -> None:
    """Over the same devices: its heads are divided, and the student's parameters."""
    distill = settings(teacher, mesh=MeshConfig(data=1, tensor=8))
    lesson = build(distill, mesh=MeshConfig(data=1, fsdp=8), num_devices=8)
    assert lesson.teachers is not None
    (plan,) = lesson.teachers.plans
    assert dict(plan.mesh.shape)["tensor"] == dict(plan.student_mesh.shape)["fsdp"] == 8
    assert_same_training(lesson, build(settings(teacher)))


def test_a_teacher_with_devices_of_its_own(teacher: str) -> None:
    """The last four are the teacher's, the first four the student's, and nothing else is different."""
    distill = settings(teacher, mesh=MeshConfig(data=2, tensor=2), devices=4)
    lesson = build(distill, mesh=MeshConfig(data=2, fsdp=2), num_devices=4, num_microbatches=2)
    assert lesson.teachers is not None
    (plan,) = lesson.teachers.plans
    places = [[device.id for device in mesh.devices.flat] for mesh in (plan.student_mesh, plan.mesh)]
    assert [sorted(ids) for ids in places] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    (said,) = lesson.teachers(lesson.place(make_batch(0)))
    shapes = plan.output_shapes(ROWS, LENGTH)
    for found, wanted in zip(jax.tree.leaves(said), jax.tree.leaves(shapes), strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim) and {
            device.id for device in found.devices()
        } <= {0, 1, 2, 3}
    assert_same_training(lesson, build(settings(teacher)))


def test_what_is_drawn_does_not_depend_on_how_a_batch_is_divided(teacher: str) -> None:
    """Three draws a token: other ones would be another loss altogether."""
    distill = settings(teacher, divergence=Sampled(draws=3))
    lesson = build(distill)
    divided = build(distill, mesh=MeshConfig(data=1, fsdp=4, tensor=2), num_devices=8, num_microbatches=2)
    assert_same_training(divided, lesson)
    renamed = make_batch(0)
    renamed.row_ids[:] += 1
    first, other = (lesson.run(batch)[1]["divergence"] for batch in (make_batch(0), renamed))
    assert abs(first - other) > 1e-3


def in_half_precision(teacher: str, **changes: Any) -> DistillConfig:
    return settings(teacher, teachers=(TeacherConfig(path=teacher, precision=Precision.BFLOAT16),), **changes)


@pytest.mark.composes("mesh", "experts", "accumulation", "distillation")
def test_experts_accumulation_and_every_axis_at_once(teacher: str) -> None:
    """Mixtures of experts learn from a teacher in bfloat16, with a mesh of its own: its sums, in one order,
    round alike.
    """
    distill = in_half_precision(teacher, mesh=MeshConfig(data=8))
    lesson = build(
        distill, MIXED, mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2), num_devices=8, num_microbatches=2
    )
    assert_same_training(lesson, build(in_half_precision(teacher), MIXED))
    _, metrics = result(lesson)
    assert metrics["dropped"] > 0 and metrics["divergence"] > 0.1 and metrics["objective"] > 0.5


# Masks and padding ------------------------------------------------------------------------------------------
def changed(batch: Batch, where: np.ndarray, *names: str) -> Batch:
    """The batch with other ids in these places."""
    fields = {name: np.where(where, (getattr(batch, name) + 17) % 61, getattr(batch, name)) for name in names}
    return dataclasses.replace(batch, **fields)


def test_masked_targets_and_padding_change_nothing(teacher: str) -> None:
    """Bit for bit: loss, gradient norms, the new parameters, what experts are told; what is scored and read
    does matter.
    """
    lesson = build(in_half_precision(teacher), MIXED)
    batch = make_batch(0)
    expected = lesson.run(batch)
    is_padding = batch.segment_ids == 0
    is_scored = batch.loss_mask > 0
    assert (~is_scored & ~is_padding).sum() > 10 and is_padding.sum() > 10 and is_scored.sum() > 10
    assert_bits_equal(lesson.run(changed(batch, ~is_scored, "targets")), expected)
    assert_bits_equal(lesson.run(changed(batch, is_padding, "tokens", "targets")), expected)
    for other in (changed(batch, is_scored, "targets"), changed(batch, ~is_padding, "tokens")):
        assert abs(lesson.run(other)[1]["grad_norm"] - expected[1]["grad_norm"]) > 1e-4


def test_the_end_of_a_text_counts_where_it_has_the_id_of_padding(teacher: str) -> None:
    """Token 0 fills rows up and here ends documents too: only the mask tells them apart, and all is as in the
    dense formula.
    """
    draws = np.random.default_rng(5)
    documents = [[1, *draws.integers(2, 61, size=size), 0] for size in (3, 9, 30, 1, 6)]
    data = InMemoryDocuments(documents, num_bytes=[len(document) - 2 for document in documents])
    (batch,) = evaluation_batches([data], sequence_length=LENGTH, batch_size=ROWS, overlap=4)
    assert ((batch.targets == 0) & (batch.loss_mask > 0)).sum() == len(documents)
    lesson = build(settings(teacher))
    start = lesson.start()
    _, metrics = lesson.run(batch, state=start)
    assert metrics["targets"] == sum(map(len, documents)) - len(documents) == batch.loss_mask.sum()

    student = lesson.programs.definition.merge(start.params, start.buffers)
    ours, theirs = (dense_logits(model, batch) for model in (student, slmjax.load_model(teacher).model))
    divergence = mean_over(
        TEMPERATURE**2 * forward_kl(theirs, ours, temperature=TEMPERATURE), batch.loss_mask
    )
    nll = mean_over(
        -np.take_along_axis(log_softmax(ours), batch.targets[..., None], axis=-1)[..., 0], batch.loss_mask
    )
    assert metrics["divergence"] == pytest.approx(divergence, rel=1e-5) and metrics["loss"] == pytest.approx(
        nll, rel=1e-5
    )
    assert metrics["objective"] == pytest.approx(WEIGHT * divergence + HARD_WEIGHT * nll, rel=1e-5)


# What is remembered -----------------------------------------------------------------------------------------
def test_a_skipped_step_leaves_what_the_divergence_remembers(teacher: str) -> None:
    lesson = build(settings(teacher, divergence=Taid(start=0.3, rate=0.1, momentum=0.5)))
    first, _ = lesson.run(make_batch(0))
    before, metrics = lesson.run(make_batch(1), state=first)
    assert float(first.divergence["share"]) == pytest.approx(0.3) and float(before.divergence["share"]) > 0.3
    assert metrics["divergence_share"] == pytest.approx(0.3), "the one that the step used"
    bad = make_batch(2)
    bad.loss_mask[2, 1] = np.nan
    after, metrics = lesson.run(bad, state=before)
    assert metrics["skipped"] == 1 and metrics["divergence_share"] == pytest.approx(
        float(before.divergence["share"])
    )
    assert_bits_equal(after.divergence, before.divergence)
    assert_bits_equal(after.params, before.params)
    nothing = dataclasses.replace(make_batch(2), loss_mask=np.zeros((ROWS, LENGTH), np.float32))
    assert_bits_equal(
        lesson.run(nothing, state=before)[0].divergence, before.divergence
    )  # a mean of nothing is no value
    recovered = lesson.run(make_batch(3), state=after)[0]
    at_once = lesson.run(make_batch(3), state=before)[0]
    assert (
        float(recovered.divergence["previous"])
        == float(at_once.divergence["previous"])
        != float(before.divergence["previous"])
    )
    assert all(bool(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(recovered.divergence))
