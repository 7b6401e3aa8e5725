"""The training state and the one train step: forward, loss, gradient, update, compiled as one function.

Everything a batch contributes is a sum; counts come from the batch alone, and sums are divided by the counts
of the whole global batch, so that accumulation, padding and the number of devices never change the loss. A
step whose loss or gradient is not finite, or whose global batch has no scored target, is undone on the
device: parameters, moments, averages and buffers keep their old values, by `where`, the schedule does not
advance, and the skip is counted.

Dims: A microbatches, T time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from slmjax import losses
from slmjax.data.batch import Batch
from slmjax.distill import objective as distillation
from slmjax.models.definition import Definition, Params
from slmjax.models.ffn import moe
from slmjax.models.paths import block_at
from slmjax.parallel import communication
from slmjax.quantization.fake_quantization import fake_quantize, weight_formats
from slmjax.quantization.schedule import QuantSchedule
from slmjax.training.metrics import batch_metrics, data_checksum, squares_by_layer
from slmjax.training.objective import ObjectiveConfig, counts, terms
from slmjax.training.optim import OptimConfig, learning_rate
from slmjax.training.state import MILLION, TrainState, Tree


def _counted(tokens: Array, more: Array) -> Array:
    rest = tokens[1] + more.astype(jnp.int32)
    return jnp.stack([tokens[0] + rest // MILLION, rest % MILLION])


# The step ---------------------------------------------------------------------------------------------------
TrainStep = Callable[
    ..., tuple[TrainState, dict[str, Any]]
]  # (state, batch) or (state, batch, what the teachers say of it)


def make_train_step(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    *,
    objective: ObjectiveConfig,
    optim: OptimConfig,
    shapes: TrainState,
    total_steps: int,
    easing: QuantSchedule | None = None,
) -> TrainStep:
    """The compiled step `(state, batch, teachers) -> (state, metrics)`; the state it is given is donated.
    Call it under the mesh.

    `teachers` is what they say of the batch; without it, which is a program of its own, there is no
    divergence in the loss.

    Metrics are float32 scalars of the whole batch: `loss` (nats per scored token, NaN without one),
    `objective` (with auxiliary terms), `grad_norm` (before clipping), `learning_rate`, `accuracy`, `nll`,
    `targets`, `bytes`, `tokens`, `skipped` (so far), `skipped_in_a_row`, and for mixtures of experts
    `dropped` and `expert_imbalance` (the busiest expert's load over the mean, averaged over layers), in
    distillation the mean `divergence` and its loss weights; `data_checksum` is an integer; `grad_norms` and
    `expert_loads` are trees of arrays, which `named_metrics` puts into words. Every process can read them:
    they are whole everywhere.
    """
    grads_of = functools.partial(_gradients, definition.transformed(), objective, optim.accumulation_steps)
    remembered = functools.partial(_remembered, objective, total_steps)

    def train_step(
        state: TrainState, batch: Batch, teachers: tuple[losses.TeacherOutput, ...] = ()
    ) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        total = counts(batch)
        weights = distillation.distill_weights_at(
            objective.distill,
            state.step,
            total_steps=total_steps,
            state=state.objective,
            key=key,
            z_loss=objective.z_loss,
        )
        effective, pull = _effective(definition, easing, state, key)  # once, before the batch is taken apart
        value, sums, grads = grads_of(effective, state.frozen, batch, total, key, teachers, weights)
        grads, distance = pull(grads)
        grad_norm = optax.tree.norm(grads)
        num_updates = state.step - state.skipped  # what schedules go by: a step that was undone is no update
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable)
        held = (
            updates
            if easing is None
            else easing.freeze_updates(
                updates, state.step, config=definition.config, paths=weight_formats(definition)
            )
        )
        trainable: Params = jax.tree.map(jnp.add, state.trainable, held)
        changed = {
            "trainable": trainable,
            "frozen": _updated_buffers(definition, state.frozen, sums),
            "objective": remembered(state, sums, total),
            "optimizer": optimizer_state,
            "ema": _averaged(state.ema, trainable, decay=optim.ema_decay, num_updates=num_updates),
        }
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        new_state = _next_state(state, changed, finite=finite, num_targets=total["targets"])
        metrics = {
            "objective": value + distance,
            "grad_norm": grad_norm,
            "grad_norms": jnp.sqrt(squares_by_layer(definition.config, grads)),
            "learning_rate": jnp.asarray(learning_rate(optim, num_updates, total_steps=total_steps)),
            "skipped": new_state.skipped,
            "skipped_in_a_row": new_state.skipped_in_a_row,
            "data_checksum": data_checksum(batch.row_ids),
        }
        return new_state, metrics | distillation.weight_metrics(weights) | total | batch_metrics(sums, total)

    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, places.step))


def _remembered(
    objective: ObjectiveConfig,
    total_steps: int,
    state: TrainState,
    sums: Mapping[str, Array],
    total: Mapping[str, Array],
) -> Tree:
    """What the divergence from teachers keeps for the next step."""
    progress = state.step / total_steps
    return distillation.updated_state(
        objective.distill, state.objective, sums, num_targets=total["targets"], progress=progress
    )


def _effective(
    definition: Definition, easing: QuantSchedule | None, state: TrainState, key: Array
) -> tuple[Params, Callable[[Params], tuple[Params, Array]]]:
    """The parameters that the model computes with, and what makes of their gradient that of the trained ones.

    The second adds the gradient of the distance of weights to their codes, where that is damped, and gives
    its share of the loss.
    """
    if not definition.is_transformed:
        return state.trainable, lambda grads: (grads, jnp.zeros(()))
    transform = functools.partial(fake_quantize, definition, schedule=easing, step=state.step, key=key)
    (layer_params, damping_loss), vjp_fn = jax.vjp(transform, state.trainable)
    return layer_params, lambda grads: (vjp_fn((grads, jnp.ones(())))[0], damping_loss)


def _next_state(
    state: TrainState, changed: Mapping[str, Any], *, finite: Array, num_targets: Array
) -> TrainState:
    """The state after a step: what it changed, or, where something was not finite or no target is scored,
    what it was before.
    """
    is_empty = num_targets == 0
    counts = finite & ~is_empty
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(counts, new, old))
    kept = {name: keep(new, getattr(state, name)) for name, new in changed.items()}
    in_a_row = jnp.where(finite, jnp.where(is_empty, state.skipped_in_a_row, 0), state.skipped_in_a_row + 1)
    return dataclasses.replace(
        state,
        **kept,
        step=state.step + 1,
        tokens=_counted(state.tokens, jnp.where(counts, num_targets, 0.0)),
        skipped=state.skipped + (1 - counts.astype(jnp.int32)),
        skipped_in_a_row=in_a_row,
    )


Rows = tuple[Batch, tuple[Array, ...]]  # a batch, and the hidden states of each teacher


def _gradients(
    definition: Definition,
    objective: ObjectiveConfig,
    num_microbatches: int,
    params: Params,
    buffers: Params,
    batch: Batch,
    total: dict[str, Array],
    key: Array,
    teachers: tuple[losses.TeacherOutput, ...],
    weights: losses.DistillWeights | None,
) -> tuple[Array, dict[str, Array], Params]:
    """Loss, reported sums and gradient of the global batch, accumulated over microbatches."""

    def loss_of(params: Params, rows: Rows, part_key: Array) -> tuple[Array, dict[str, Array]]:
        part, states = rows
        said = tuple(
            dataclasses.replace(teacher, hidden=hidden)
            for teacher, hidden in zip(teachers, states, strict=True)
        )
        dropout_key = part_key if definition.config.dropout > 0 else None
        sums, reported = terms(
            definition, objective, params, buffers, part, key=dropout_key, teachers=said, weights=weights
        )
        parts = [value / jnp.maximum(total[count], 1.0) for value, count in sums.values()]
        return jnp.sum(jnp.stack(parts)), reported

    rows: Rows = batch, tuple(teacher.hidden for teacher in teachers)
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if num_microbatches == 1:
        (value, reported), grads = value_and_grad(params, rows, key)
        return value, reported, grads

    def accumulate(carry: Any, xs: tuple[Rows, Array]) -> tuple[Any, None]:
        part, index = xs
        (value, reported), grads = value_and_grad(params, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, carry, (value, reported, grads)), None

    parts = jax.tree.map(
        functools.partial(communication.split_microbatches, num_microbatches=num_microbatches), rows
    )
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(value_and_grad, params, first, key)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0][0], shapes[0][1], shapes[1])
    )
    return jax.lax.scan(accumulate, zeros, (parts, jnp.arange(num_microbatches)))[0]


def _averaged(
    ema: Params | None, params: Params, *, decay: float | None, num_updates: Array
) -> Params | None:
    """The moving average; it forgets faster in the first updates, so that the initial weights do not linger
    in it.
    """
    if ema is None or decay is None:
        return None
    rate = 1.0 - jnp.minimum(decay, (1.0 + num_updates) / (10.0 + num_updates))
    return jax.tree.map(lambda old, new: old + rate * (new - old), ema, params)


def _updated_buffers(definition: Definition, buffers: Params, sums: Mapping[str, Array]) -> Params:
    """Router biases after this step's global loads: moved once per optimizer step, whatever the
    accumulation.
    """
    updated = dict(buffers)
    for path in buffers:
        if path.endswith("/router_bias") and isinstance(
            ffn := block_at(definition.config, path).ffn, moe.MoeConfig
        ):
            load = sums[path.removesuffix("router_bias") + "expert_counts"]
            updated[path] = moe.updated_bias(buffers[path], load, rate=ffn.bias_rate)
    return updated
