"""A mixer in a train step: rounded weights, a teacher, accumulated gradients, and a stop in between.

Dims: B rows, T time, D model.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import losses
from slmjax.data.batch import Batch
from slmjax.distill.config import DistillConfig, TeacherConfig
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.quantization.fake_quantization import define_quantized
from slmjax.quantization.rules import quant_of
from slmjax.testing.properties import FORMAT
from slmjax.testing.report import Check, count_not_finite, largest_tree_error
from slmjax.testing.subject import ROWS, VOCAB, Rows, Subject
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.optim import OptimConfig, make_optimizer
from slmjax.training.state import TrainState, state_shapes
from slmjax.training.step import make_train_step

STEPS = 3
CLOSE = 1e-3  # of parameters after a few steps of Adam, which divides by small numbers


class Trained:
    """The compiled train step of a subject, with rounded weights, a teacher and accumulation if asked for."""

    def __init__(self, subject: Subject, *, is_quantized: bool, accumulation_steps: int) -> None:
        phases = quant_of(FORMAT).phases if is_quantized else ()
        self.definition = define_quantized(subject.config, phases)
        self.subject = subject
        # The large eps keeps rounding from growing where a gradient is tiny.
        optim = OptimConfig(lr=1e-2, warmup_steps=0, eps=1e-3, accumulation_steps=accumulation_steps)
        objective = ObjectiveConfig(distill=DistillConfig(teachers=(TeacherConfig(path="."),)))
        optimizer = make_optimizer(
            optim, self.definition.params, total_steps=STEPS, scaling=subject.config.scaling
        )
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        self.shapes = state_shapes(
            self.definition, optimizer, with_ema=False, mesh=self.mesh, objective=objective
        )
        self._step = make_train_step(
            self.definition,
            optimizer,
            objective=objective,
            optim=optim,
            shapes=self.shapes,
            total_steps=STEPS,
        )

    def start(self) -> TrainState:
        """Return the state before the first step, with the subject's parameters."""
        # Moments and counters begin at 0, which spares a program that initialises them.
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self.shapes)
        return dataclasses.replace(zeros, params={path: self.subject.params[path] for path in zeros.params})

    def run(self, state: TrainState, rows: Rows, *, num_steps: int) -> tuple[TrainState, dict[str, Any]]:
        """Return the state after some steps on these rows, and the metrics of the last; `state` stays."""
        # On the host: the step would take arrays of a device for its own.
        state = jax.tree.map(np.asarray, state)
        metrics: dict[str, Any] = {}
        with jax.set_mesh(self.mesh):
            teacher = self._teacher(rows)
            for _ in range(num_steps):
                state, metrics = self._step(state, batch_of(rows), (teacher,))
        return state, metrics

    def _teacher(self, rows: Rows) -> losses.TeacherOutput:
        dim = self.subject.config.embed_dim
        draws = np.random.default_rng(11)
        hidden = draws.standard_normal((*rows.tokens.shape, dim)).astype(np.float32)
        table = draws.standard_normal((VOCAB, dim)).astype(np.float32)
        return losses.TeacherOutput(
            hidden=jnp.asarray(hidden), head=losses.Head(weight=jnp.asarray(table), vocab_size=VOCAB)
        )


def batch_of(rows: Rows) -> Batch:
    """Return the rows as a batch of training, each token with its next as target."""
    has_next = np.roll(rows.segment_ids, -1, axis=1) == rows.segment_ids
    has_next[:, -1] = False
    mask = has_next & rows.is_real
    return Batch(
        tokens=rows.tokens,
        targets=np.where(mask, np.roll(rows.tokens, -1, axis=1), 0),
        loss_mask=mask.astype(np.float32),
        segment_ids=rows.segment_ids,
        positions=rows.positions,
        row_ids=np.arange(ROWS, dtype=np.int32),
        num_bytes=np.sum(mask, axis=1).astype(np.int32),
    )


def check_training(subject: Subject, rows: Rows) -> list[Check]:
    """Steps with rounded weights and a teacher are finite, and a stopped run continues with the same bits."""
    trained = Trained(subject, is_quantized=True, accumulation_steps=1)
    # A state of one step, from which the run continues in two ways.
    half, metrics = trained.run(trained.start(), rows, num_steps=1)
    whole, _ = trained.run(half, rows, num_steps=1)
    # As a checkpoint stores the state: by item, on the host.
    stored = TrainState.from_items(jax.tree.map(np.asarray, half.items()))
    resumed, _ = trained.run(stored, rows, num_steps=1)
    different = _differing(resumed, whole)
    bad = count_not_finite([metrics["loss"], whole.params]) + int(whole.skipped)
    return [
        Check(
            name="training with rounded weights and a teacher is finite",
            error=float(bad),
            bound=0.0,
            detail=f"{int(whole.skipped)} of 2 steps skipped",
        ),
        Check(
            name="a run that stops and continues has the same bits",
            error=float(len(different)),
            bound=0.0,
            detail=", ".join(different),
        ),
    ]


def check_accumulation(subject: Subject, rows: Rows) -> list[Check]:
    """Gradients accumulated over two parts of a batch give the parameters that the whole batch gives."""
    states = [
        trained.run(trained.start(), rows, num_steps=1)[0]
        for trained in (Trained(subject, is_quantized=False, accumulation_steps=count) for count in (1, 2))
    ]
    error, where = largest_tree_error(states[1].params, states[0].params)
    return [
        Check(name="accumulated gradients equal those of the batch", error=error, bound=CLOSE, detail=where)
    ]


def _differing(state: TrainState, other: TrainState) -> list[str]:
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    return [
        jax.tree_util.keystr(path)
        for (path, leaf), value in zip(paths, jax.tree.leaves(other), strict=True)
        if not np.array_equal(np.asarray(leaf), np.asarray(value), equal_nan=True)
    ]
