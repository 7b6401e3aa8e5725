"""The one train step: forward pass, loss, gradient and update, compiled as one function.

Everything that a batch contributes is a sum. Counts come from the batch alone, and sums are divided by the
counts of the global batch, so that accumulation, padding and the number of devices never change the
loss. A step whose loss, gradient or new state is not finite, or whose global batch has no scored target, is
skipped on the device: parameters, moments, averages and buffers keep their old values, the learning rate
schedule does not advance, and the skip is counted.

Dims: B batch, T time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from slmjax import losses
from slmjax.data.batch import Batch
from slmjax.distill import objective as distillation
from slmjax.models import nested_ffn
from slmjax.models.architecture import ModelConfig
from slmjax.models.definition import Definition, Params
from slmjax.models.ffn import moe
from slmjax.models.paths import block_at
from slmjax.parallel import communication
from slmjax.quantization.fake_quantization import fake_quantize, weight_formats
from slmjax.quantization.schedule import QuantSchedule
from slmjax.training import multi_token
from slmjax.training.expected_loss import exit_loss
from slmjax.training.hyperparameters import Hyperparameters
from slmjax.training.metrics import GradientGroups, gradient_groups, gradient_norms, step_metrics
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.optim import OptimConfig, learning_rate
from slmjax.training.state import TrainState

# (state, batch) or (state, batch, teacher outputs)
TrainStep = Callable[..., tuple[TrainState, dict[str, Any]]]
TeacherOutputs = tuple[losses.TeacherOutput, ...]
# Of the global batch: examples, and each teacher's hidden states of them.
Part = tuple[Batch, tuple[Array, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Everything about a train step that is known before it is compiled."""

    definition: Definition
    optimizer: optax.GradientTransformation
    objective: ObjectiveConfig
    optim: OptimConfig
    total_steps: int
    quant_schedule: QuantSchedule | None  # None in floating point
    gradient_groups: GradientGroups
    is_quantized: bool  # the model computes with other parameters than those that are trained
    forward: Definition  # computes with fake-quantized parameters as they are, without another transform
    hyperparameters: Hyperparameters | None = None  # in place of numbers of `optim` and `objective`

    def learning_rate(self, step: Array) -> Float[Array, ""]:
        """Return the learning rate of an update; the first has number 0."""
        if self.hyperparameters is not None:
            return self.hyperparameters.learning_rate(step)
        return learning_rate(self.optim, step, total_steps=self.total_steps)

    @property
    def z_loss(self) -> Any:
        """Coefficient of the squared log-normaliser."""
        return (self.hyperparameters or self.objective).z_loss

    @property
    def ema_decay(self) -> Any:
        """Decay of the averaged parameters; None without them."""
        return (self.hyperparameters or self.optim).ema_decay


# The step ---------------------------------------------------------------------------------------------------
def train_step(
    settings: StepSettings, state: TrainState, batch: Batch, teacher_outputs: TeacherOutputs = ()
) -> tuple[TrainState, dict[str, Any]]:
    """Return the next state and the metrics of one optimizer step; branches are taken when it is compiled."""
    # Folded from the step, so that a resumed run draws what an uninterrupted one would have drawn.
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    # The loss is a mean over the global batch, so its counts are taken before the batch is split.
    totals = count_targets(batch, settings.definition.config)
    weights = None
    if settings.objective.distill is not None:
        weights = distill_weights(settings, state, key)
    value_and_grads = functools.partial(
        loss_and_grads,
        settings,
        buffers=state.buffers,
        batch=batch,
        totals=totals,
        key=key,
        teacher_outputs=teacher_outputs,
        weights=weights,
    )
    if settings.is_quantized:
        # Once a step, outside the loop over microbatches: the weights are the same for all of them.
        quantize = functools.partial(
            fake_quantize, settings.definition, schedule=settings.quant_schedule, step=state.step, key=key
        )
        (params, damping_loss), vjp_fn = jax.vjp(quantize, state.params)
        loss, sums, grads = value_and_grads(params)
        # The optimizer updates the parameters before rounding, so the gradient goes back through it. That of
        # the damping loss, which is not weighted any further, is added.
        (grads,) = vjp_fn((grads, jnp.ones(())))
        loss = loss + damping_loss
    else:
        # The plain case: the model computes with the parameters that are trained.
        loss, sums, grads = value_and_grads(state.params)
    # Before clipping, which would hide a spike.
    grad_norm = optax.tree.norm(grads)
    updated = apply_gradients(settings, state, grads)
    if state.buffers:
        # Router biases move by the loads of the global batch: once a step, whatever the accumulation.
        updated = dataclasses.replace(updated, buffers=update_buffers(settings, state.buffers, sums))
    if settings.objective.distill is not None:
        # A divergence may go by its own value on the global batch, as TAID does.
        updated = dataclasses.replace(updated, divergence=update_divergence(settings, state, sums, totals))
    # The host waits for no step, so the device itself decides whether an update counts. Loss and gradient do
    # not suffice: the update overflows too where the rate or a moment is too large.
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & is_finite_state(updated)
    new_state = keep_if_finite(updated, state, is_finite=is_finite, num_targets=totals["targets"])
    metrics = step_metrics(
        new_state,
        state,
        batch,
        sums=sums,
        totals=totals,
        objective=loss,
        grad_norm=grad_norm,
        grad_norms=gradient_norms(grads, settings.gradient_groups),
        learning_rate=settings.learning_rate(state.step - state.skipped),
    )
    metrics |= multi_token.further_metrics(sums, totals, settings.definition.config)
    if (granularity := nested_ffn.drawn(settings.definition.config, key)) is not None:
        metrics["granularity"] = granularity
    if weights is not None:
        metrics |= distillation.weight_metrics(weights)
    return new_state, metrics


def make_train_step(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    *,
    objective: ObjectiveConfig,
    optim: OptimConfig,
    shapes: TrainState,
    total_steps: int,
    quant_schedule: QuantSchedule | None = None,
) -> TrainStep:
    """Return the train step of these settings, compiled: see `compiled_step`."""
    settings = step_settings(
        definition,
        optimizer,
        objective=objective,
        optim=optim,
        total_steps=total_steps,
        quant_schedule=quant_schedule,
    )
    return compiled_step(settings, shapes)


def step_settings(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    *,
    objective: ObjectiveConfig,
    optim: OptimConfig,
    total_steps: int,
    quant_schedule: QuantSchedule | None = None,
) -> StepSettings:
    """Return the settings of a train step, with what follows from the definition."""
    return StepSettings(
        definition=definition,
        optimizer=optimizer,
        objective=objective,
        optim=optim,
        total_steps=total_steps,
        quant_schedule=quant_schedule,
        gradient_groups=gradient_groups(definition.config, definition.params),
        is_quantized=definition.is_transformed,
        forward=definition.transformed(),
    )


def compiled_step(settings: StepSettings, shapes: TrainState) -> TrainStep:
    """Return the jitted step `(state, batch, teacher_outputs) -> (state, metrics)`.

    Call it under the mesh; the first call compiles it. The state is donated: its buffers are reused for the
    new one.

    `teacher_outputs` are those of this batch. Without them, which is a program of its own, the loss has no
    divergence. Metrics are described at `metrics.step_metrics`; every process can read them, since they are
    replicated.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    step = functools.partial(train_step, settings)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step))


# Its stages, in order ---------------------------------------------------------------------------------------
def count_targets(batch: Batch, config: ModelConfig) -> dict[str, Float[Array, ""]]:
    """Return the denominators of a batch: scored targets, real tokens, UTF-8 bytes of the scored targets.

    To these come the targets of each module of `config.multi_token`.
    """
    return {
        "targets": jnp.sum(batch.loss_mask),
        "tokens": jnp.sum(batch.segment_ids > 0).astype(jnp.float32),
        "bytes": jnp.sum(batch.num_bytes).astype(jnp.float32),
        **multi_token.further_counts(batch, config),
    }


def distill_weights(settings: StepSettings, state: TrainState, key: Array) -> losses.DistillWeights | None:
    """Return the loss weights and the temperature of distillation, which are schedules of the step."""
    return distillation.distill_weights_at(
        settings.objective.distill,
        state.step,
        total_steps=settings.total_steps,
        state=state.divergence,
        key=key,
        z_loss=settings.z_loss,
    )


def loss_and_grads(
    settings: StepSettings,
    params: Params,
    *,
    buffers: Params,
    batch: Batch,
    totals: Mapping[str, Array],
    key: Array,
    teacher_outputs: TeacherOutputs,
    weights: losses.DistillWeights | None,
) -> tuple[Array, dict[str, Array], Params]:
    """Return loss, reported sums and gradient of the global batch, accumulated over microbatches.

    Args:
      params: as modules compute with them: fake-quantized where they have formats.
      totals: counts of the global batch, by which its sums are divided.
      key: of the step. Each microbatch folds its number into it.
      weights: of the losses in distillation, with the temperature.
    """
    num_microbatches = settings.optim.accumulation_steps
    # One granularity for the whole batch, however it is divided.
    granularity = nested_ffn.drawn(settings.definition.config, key)

    def loss_fn(params: Params, part: Part, part_key: Array) -> tuple[Array, dict[str, Array]]:
        examples, hidden = part
        teachers = tuple(
            dataclasses.replace(teacher, hidden=states)
            for teacher, states in zip(teacher_outputs, hidden, strict=True)
        )
        # After rounding to formats: a prefix of a rounded layer is the rounded prefix.
        terms, sums = loss_terms(
            settings.forward,
            settings.objective,
            nested_ffn.with_prefixes(params, settings.definition.config, granularity),
            buffers,
            examples,
            key=part_key if settings.definition.config.dropout > 0 else None,
            teacher_outputs=teachers,
            weights=weights,
            z_loss=settings.z_loss,
        )
        means = [value / jnp.maximum(totals[count], 1.0) for value, count in terms.values()]
        return jnp.sum(jnp.stack(means)), sums

    # Of teachers only the hidden states belong to sequences and are split; their heads are shared.
    full: Part = (batch, tuple(teacher.hidden for teacher in teacher_outputs))
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if num_microbatches == 1:
        (loss, sums), grads = value_and_grad(params, full, key)
        return loss, sums, grads

    def accumulate(carry: Any, xs: tuple[Part, Array]) -> tuple[Any, None]:
        part, index = xs
        (loss, sums), grads = value_and_grad(params, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, carry, (loss, sums, grads)), None

    split = functools.partial(communication.split_microbatches, num_microbatches=num_microbatches)
    parts = jax.tree.map(split, full)
    # The carry begins at zero, in the shapes of one microbatch's result.
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    (loss, sums), grads = jax.eval_shape(value_and_grad, params, first, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (loss, sums, grads))
    return jax.lax.scan(accumulate, zeros, (parts, jnp.arange(num_microbatches)))[0]


def loss_terms(
    definition: Definition,
    objective: ObjectiveConfig,
    params: Params,
    buffers: Params,
    batch: Batch,
    *,
    key: Array | None,
    teacher_outputs: Sequence[losses.TeacherOutput] = (),
    weights: losses.DistillWeights | None = None,
    z_loss: float | Float[Array, ""] | None = None,
) -> tuple[dict[str, tuple[Float[Array, ""], str]], dict[str, Array]]:
    """Return the sums that make up the loss, each with its count's name, and sums that are only reported.

    Args:
      params: as modules compute with them (`Definition.transform`).
      key: randomness of dropout; None where there is none.
      teacher_outputs: of this batch; none where the divergence has no weight.
      weights: loss weights of distillation (`distill.objective.distill_weights_at`); None without it.
      z_loss: coefficient within the cross entropy in place of the objective's.
    """
    model = definition.merge_transformed(params, buffers)
    output = model(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, key=key)
    # Load balancing of experts, and whatever else layers add to the loss, is a mean over all tokens.
    auxiliary = {name: (value, "tokens") for name, value in output.losses.items()}
    z_loss = objective.z_loss if z_loss is None else z_loss
    further_sums: dict[str, Array] = {}
    if model.config.multi_token is not None:
        # Learned from the text, also where the next token is learned from teachers.
        further, further_sums = multi_token.further_terms(
            model, output, batch, key=key, z_loss=z_loss, chunk_size=objective.chunk_size
        )
        auxiliary |= further
    if objective.distill is not None and teacher_outputs and weights is not None:
        value, sums = distillation.batch_loss(
            objective.distill,
            output.hidden,
            output.head,
            batch,
            teacher_outputs,
            weights=weights,
            chunk_size=objective.chunk_size,
        )
        terms = {"distillation": (value, "targets")}
    elif (gate := definition.config.exit_gate) is not None:
        terms, sums = exit_loss(
            output,
            batch,
            entropy_weight=gate.entropy_weight,
            z_loss=z_loss,
            chunk_size=objective.chunk_size,
        )
    else:
        value, sums = losses.cross_entropy(
            output.hidden,
            output.head,
            batch.targets,
            batch.loss_mask,
            z_loss=z_loss,
            chunk_size=objective.chunk_size,
        )
        if weights is not None:
            value = value * weights.hard
        terms = {"cross_entropy": (value, "targets")}
    return terms | auxiliary, {**sums, **further_sums, **output.metrics}


def apply_gradients(settings: StepSettings, state: TrainState, grads: Params) -> TrainState:
    """Return the state with new parameters, moments and average."""
    updates: Any
    updates, moments = settings.optimizer.update(grads, state.optimizer, state.params)
    schedule = settings.quant_schedule
    if schedule is not None and schedule.freeze_from is not None:
        definition = settings.definition
        updates = schedule.freeze_updates(
            updates, state.step, config=definition.config, paths=weight_formats(definition)
        )
    params = jax.tree.map(jnp.add, state.params, updates)
    ema = None
    if settings.ema_decay is not None:
        # The decay warms up as (1 + n) / (10 + n), so that the initial weights do not linger in the average.
        num_updates = state.step - state.skipped
        rate = 1.0 - jnp.minimum(settings.ema_decay, (1.0 + num_updates) / (10.0 + num_updates))
        ema = jax.tree.map(lambda old, new: old + rate * (new - old), state.ema, params)
    return dataclasses.replace(state, params=params, optimizer=moments, ema=ema)


def update_buffers(settings: StepSettings, buffers: Params, sums: Mapping[str, Array]) -> Params:
    """Return the buffers with router biases after this step's loads; other buffers stay."""
    updated = dict(buffers)
    for path in buffers:
        if not path.endswith("/router_bias"):
            continue
        ffn = block_at(settings.definition.config, path).ffn
        if isinstance(ffn, moe.MoeConfig):
            load = sums[path.removesuffix("router_bias") + "expert_counts"]
            updated[path] = moe.updated_bias(buffers[path], load, rate=ffn.bias_rate)
    return updated


def update_divergence(
    settings: StepSettings, state: TrainState, sums: Mapping[str, Array], totals: Mapping[str, Array]
) -> dict[str, Array]:
    """Return the state of the divergence after this step."""
    return distillation.updated_state(
        settings.objective.distill,
        state.divergence,
        sums,
        num_targets=totals["targets"],
        progress=state.step / settings.total_steps,
    )


def is_finite_state(state: TrainState) -> Bool[Array, ""]:
    """Return whether all numbers of a state are finite."""
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))


def keep_if_finite(
    updated: TrainState, state: TrainState, *, is_finite: Bool[Array, ""], num_targets: Array
) -> TrainState:
    """Return the updated state, or the old one where the step is skipped, with the counters advanced.

    A step is skipped where its loss, gradient or new state is not finite, or where its batch has no target:
    the mean over no target is no loss. Only the first kind counts for `skipped_in_a_row`, by which a run that
    diverges ends.
    """
    is_empty = num_targets == 0
    is_kept = is_finite & ~is_empty
    selected = jax.tree.map(lambda new, old: jnp.where(is_kept, new, old), updated, state)
    failed_in_a_row = jnp.where(is_finite, 0, state.skipped_in_a_row + 1)
    return dataclasses.replace(
        selected,
        step=state.step + 1,
        skipped=state.skipped + (1 - is_kept.astype(jnp.int32)),
        skipped_in_a_row=jnp.where(is_finite & is_empty, state.skipped_in_a_row, failed_in_a_row),
    )
