"""The training state and the one train step: forward, loss, gradient, update, compiled as one function.

Everything a batch contributes is a sum; counts come from the batch alone, and sums are divided by the counts of the whole
global batch, so that accumulation, padding and the number of devices never change the loss. A step whose loss or
gradient is not finite, or whose global batch has no scored target, is undone on the device: parameters, moments, averages and
buffers keep their old values, by `where`, the schedule does not advance, and the skip is counted.

Dims: A microbatches, T time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from slmjax import losses, moe, sharding
from slmjax.data.batch import Batch
from slmjax.distill import objective as distillation
from slmjax.distill.config import DistillConfig
from slmjax.easing import Easing
from slmjax.metrics import batch_figures, data_checksum, squares_by_layer
from slmjax.numerics.weights import damping, eased
from slmjax.optim import OptimConfig, learning_rate
from slmjax.parameters import Definition
from slmjax.paths import block_at

Params = dict[str, Array]
# Of the type in the comment, not checked: trees that jax makes of a TrainState hold shapes, shardings or nothing in its place.
ArrayLeaf = Any
Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised."""

    z_loss: float = 0.0  # coefficient of the squared log-normaliser of the logits (1e-4 keeps it near zero)
    chunk_size: int | None = None  # tokens whose logits exist at once on a device (none: about 256 MB of them)
    distill: DistillConfig | None = None  # what is learned from teachers (none: cross entropy on the text alone)

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise ValueError(f"objective.z_loss must not be negative, got {self.z_loss}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"objective.chunk_size must be at least 1, or none to have it chosen, got {self.chunk_size}")
        if self.z_loss > 0 and self.distill is not None and self.distill.hard_weight.is_zero:
            raise ValueError(
                f"objective.z_loss={self.z_loss} is part of the cross entropy, which has no weight here: set it to 0, or give "
                "objective.distill.hard-weight.start a weight"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that training changes, and all that a checkpoint holds."""

    trainable: Tree  # Params: float32 parameters by stack path
    frozen: Tree  # Params: what the optimizer does not touch, router biases
    optimizer: Tree  # optax state
    ema: Tree  # Params | None: averaged parameters, where asked for
    objective: Tree  # dict[str, scalar]: what a divergence remembers from step to step
    rng: ArrayLeaf  # UInt32 "2": key data of the run's randomness; a step's key is folded from it
    step: ArrayLeaf  # Int32 "": steps taken, undone ones included
    tokens: ArrayLeaf  # Int32 "2": scored targets trained on, those of undone steps left out: millions, and the rest
    skipped: ArrayLeaf  # Int32 "": steps undone, in all: not finite, or without a scored target
    skipped_in_a_row: ArrayLeaf  # Int32 "": of those that are not finite; one without a target neither ends nor lengthens the row

    def items(self) -> dict[str, Any]:
        """The state as a checkpoint stores it: `model` alone suffices to evaluate and sample."""
        names = ("rng", "step", "tokens", "skipped", "skipped_in_a_row")
        progress = {name: getattr(self, name) for name in names}
        items = {"model": {"params": self.trainable, "buffers": self.frozen}, "optimizer": self.optimizer, "progress": progress}
        optional = {"ema": self.ema, "objective": self.objective}
        return items | {name: tree for name, tree in optional.items() if tree}

    @classmethod
    def from_items(cls, items: Mapping[str, Any]) -> "TrainState":
        """The inverse of `items`."""
        model = items["model"]
        return cls(
            trainable=model["params"], frozen=model["buffers"], optimizer=items["optimizer"], ema=items.get("ema"),
            objective=items.get("objective", {}), **items["progress"],
        )  # fmt: skip

    @property
    def evaluated(self) -> Params:
        """The parameters that evaluation and sampling use: the average where there is one."""
        return self.trainable if self.ema is None else self.ema


def state_shapes(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    *,
    with_ema: bool,
    mesh: Mesh,
    objective: ObjectiveConfig = ObjectiveConfig(),
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without computing anything."""
    fresh = functools.partial(_fresh, definition, optimizer, objective, with_ema)
    shapes = jax.eval_shape(fresh, jax.random.key_data(jax.random.key(0)))
    params = definition.params
    replicated = functools.partial(jax.tree.map, lambda _: NamedSharding(mesh, PartitionSpec()))
    shardings = dataclasses.replace(
        replicated(shapes),
        trainable=sharding.parameter_shardings(params, mesh),
        optimizer=sharding.like_parameters(shapes.optimizer, params, mesh),
        ema=sharding.parameter_shardings(params, mesh) if with_ema else None,
    )
    return sharding.placed_shapes(shapes, shardings)


def init_state(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    *,
    shapes: TrainState,
    seed: int,
    objective: ObjectiveConfig = ObjectiveConfig(),
) -> TrainState:
    """A fresh state, every array created where it lives."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    fresh = functools.partial(_fresh, definition, optimizer, objective, shapes.ema is not None)
    return jax.jit(fresh, out_shardings=shardings)(jax.random.key_data(jax.random.key(seed)))


def _fresh(
    definition: Definition, optimizer: optax.GradientTransformation, objective: ObjectiveConfig, with_ema: bool, rng: Array
) -> TrainState:
    params, buffers = definition.init(jax.random.wrap_key_data(rng))
    # Distinct zeros: the state is donated, and one buffer must not be donated twice.
    zero = functools.partial(jnp.zeros, (), jnp.int32)
    return TrainState(
        trainable=params, frozen=buffers, optimizer=optimizer.init(params), ema=jax.tree.map(jnp.copy, params) if with_ema else None,
        objective={} if objective.distill is None else objective.distill.divergence.initial_state(),
        rng=rng, step=zero(), tokens=jnp.zeros((2,), jnp.int32), skipped=zero(), skipped_in_a_row=zero(),
    )  # fmt: skip


MILLION = 1_000_000


def _counted(tokens: Array, more: Array) -> Array:
    rest = tokens[1] + more.astype(jnp.int32)
    return jnp.stack([tokens[0] + rest // MILLION, rest % MILLION])


def tokens_seen(state: TrainState) -> int:
    """Scored targets that the state has been trained on."""
    millions, rest = (int(count) for count in jax.device_get(state.tokens))
    return millions * MILLION + rest


# The objective --------------------------------------------------------------------------------------------------------
def counts(batch: Batch) -> dict[str, Float[Array, ""]]:
    """Denominators, from the batch alone: scored targets, real tokens, UTF-8 bytes of the scored targets."""
    return {
        "targets": jnp.sum(batch.loss_mask),
        "tokens": jnp.sum(batch.segment_ids > 0).astype(jnp.float32),
        "bytes": jnp.sum(batch.num_bytes).astype(jnp.float32),
    }


def terms(
    definition: Definition,
    objective: ObjectiveConfig,
    params: Params,
    buffers: Params,
    batch: Batch,
    *,
    key: Array | None,
    teachers: Sequence[losses.TeacherOutput] = (),
    amounts: Mapping[str, Any] | None = None,
) -> tuple[dict[str, tuple[Float[Array, ""], str]], dict[str, Array]]:
    """Sums that make up the loss, each with the name of its count, and sums that are only reported.

    Args:
      params: as modules compute with them (`Definition.effective`).
      key: randomness of dropout; None where there is none.
      teachers: what they say of this batch; none where the divergence has no weight.
      amounts: of distillation, where there is any (`distill.objective.amounts_at`).
    """
    model = definition.merge_effective(params, buffers)
    output = model(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, key=key)
    given = (output.hidden, output.head)
    if objective.distill is not None and teachers and amounts is not None:
        value, metrics = distillation.soft_term(
            objective.distill, *given, batch, teachers, amounts=amounts, z_loss=objective.z_loss, chunk_size=objective.chunk_size
        )
        sums = {"distillation": (value, "targets")}
    else:
        value, metrics = losses.sharded_cross_entropy(
            *given, batch.targets, batch.loss_mask, z_loss=objective.z_loss, chunk_size=objective.chunk_size
        )
        sums = {"cross_entropy": (value if amounts is None else value * amounts["hard"], "targets")}
    return sums | {name: (auxiliary, "tokens") for name, auxiliary in output.losses.items()}, {**metrics, **output.metrics}


# The step -------------------------------------------------------------------------------------------------------------
TrainStep = Callable[..., tuple[TrainState, dict[str, Any]]]  # (state, batch) or (state, batch, what the teachers say of it)


def make_train_step(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    *,
    objective: ObjectiveConfig,
    optim: OptimConfig,
    shapes: TrainState,
    total_steps: int,
    easing: Easing | None = None,
) -> TrainStep:
    """The compiled step `(state, batch, teachers) -> (state, metrics)`; the state it is given is donated. Call it under the mesh.

    `teachers` is what they say of the batch; without it, which is a program of its own, there is no divergence in the loss.

    Metrics are float32 scalars of the whole batch: `loss` (nats per scored token, NaN without one), `objective` (with auxiliary terms),
    `grad_norm` (before clipping), `learning_rate`, `accuracy`, `nll`, `targets`, `bytes`, `tokens`, `skipped` (so far),
    `skipped_in_a_row`, and for mixtures of experts `dropped` and `expert_imbalance` (the busiest expert's load over the mean,
    averaged over layers), in distillation the mean `divergence` and its amounts; `data_checksum` is an integer; `grad_norms` and
    `expert_loads` are trees of arrays, which `named_metrics` puts into words. Every process can read them: they are whole everywhere.
    """
    grads_of = functools.partial(_gradients, definition.decoded(), objective, optim.accumulation_steps)
    remembered = functools.partial(_remembered, objective, total_steps)

    def train_step(state: TrainState, batch: Batch, teachers: tuple[losses.TeacherOutput, ...] = ()) -> tuple[TrainState, dict[str, Any]]:
        key, total = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step), counts(batch)
        amounts = distillation.amounts_at(objective.distill, state.step, total_steps=total_steps, state=state.objective, key=key)
        effective, pull = _effective(definition, easing, state, key)  # once, before the batch is taken apart
        value, sums, grads = grads_of(effective, state.frozen, batch, total, key, teachers, amounts)
        grads, distance = pull(grads)
        grad_norm = optax.tree.norm(grads)
        num_updates = state.step - state.skipped  # what schedules go by: a step that was undone is no update
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable)
        held = updates if easing is None else easing.held(updates, state.step, config=definition.config, paths=definition.formats)
        trainable: Params = jax.tree.map(jnp.add, state.trainable, held)
        changed = {
            "trainable": trainable, "frozen": _updated_buffers(definition, state.frozen, sums), "objective": remembered(state, sums, total),
            "optimizer": optimizer_state, "ema": _averaged(state.ema, trainable, decay=optim.ema_decay, num_updates=num_updates),
        }  # fmt: skip
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        new_state = _next_state(state, changed, finite=finite, num_targets=total["targets"])
        metrics = {
            "objective": value + distance, "grad_norm": grad_norm, "grad_norms": jnp.sqrt(squares_by_layer(definition.config, grads)),
            "learning_rate": jnp.asarray(learning_rate(optim, num_updates, total_steps=total_steps)),
            "skipped": new_state.skipped, "skipped_in_a_row": new_state.skipped_in_a_row, "data_checksum": data_checksum(batch.row_ids),
        }  # fmt: skip
        return new_state, metrics | distillation.reported(amounts) | total | batch_figures(sums, total)

    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, places.step))


def _remembered(
    objective: ObjectiveConfig, total_steps: int, state: TrainState, sums: Mapping[str, Array], total: Mapping[str, Array]
) -> Tree:
    """What the divergence from teachers keeps for the next step."""
    progress = state.step / total_steps
    return distillation.updated_state(objective.distill, state.objective, sums, num_targets=total["targets"], progress=progress)


def _effective(
    definition: Definition, easing: Easing | None, state: TrainState, key: Array
) -> tuple[Params, Callable[[Params], tuple[Params, Array]]]:
    """The parameters that the model computes with, and what makes of their gradient that of the trained ones.

    The second adds the gradient of the distance of weights to their codes, where that is damped, and gives its share of the loss.
    """
    if not definition.formats and not definition.learning:
        return state.trainable, lambda grads: (grads, jnp.zeros(()))
    share = None if easing is None else easing.share(state.step)

    def decode(params: Params) -> tuple[Params, Array]:
        decoded, given = definition.effective(params, key=key), definition.formats
        weight = 0.0 if easing is None else easing.damping
        distance = weight * damping(params, decoded, given) if weight else jnp.zeros(())
        return decoded if share is None else eased(params, decoded, given, share=share), distance

    (decoded, distance), pull = jax.vjp(decode, state.trainable)
    return decoded, lambda grads: (pull((grads, jnp.ones(())))[0], distance)


def _next_state(state: TrainState, changed: Mapping[str, Any], *, finite: Array, num_targets: Array) -> TrainState:
    """The state after a step: what it changed, or, where something was not finite or no target is scored, what it was before."""
    is_empty = num_targets == 0
    counts = finite & ~is_empty
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(counts, new, old))
    kept = {name: keep(new, getattr(state, name)) for name, new in changed.items()}
    in_a_row = jnp.where(finite, jnp.where(is_empty, state.skipped_in_a_row, 0), state.skipped_in_a_row + 1)
    return dataclasses.replace(
        state, **kept, step=state.step + 1, tokens=_counted(state.tokens, jnp.where(counts, num_targets, 0.0)),
        skipped=state.skipped + (1 - counts.astype(jnp.int32)), skipped_in_a_row=in_a_row,
    )  # fmt: skip


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
    amounts: Mapping[str, Any] | None,
) -> tuple[Array, dict[str, Array], Params]:
    """Loss, reported sums and gradient of the global batch, accumulated over microbatches."""

    def loss_of(params: Params, rows: Rows, part_key: Array) -> tuple[Array, dict[str, Array]]:
        part, states = rows
        said = tuple(dataclasses.replace(teacher, hidden=hidden) for teacher, hidden in zip(teachers, states, strict=True))
        dropout_key = part_key if definition.config.dropout > 0 else None
        sums, reported = terms(definition, objective, params, buffers, part, key=dropout_key, teachers=said, amounts=amounts)
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

    parts = jax.tree.map(functools.partial(sharding.split_rows, num_parts=num_microbatches), rows)
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(value_and_grad, params, first, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0][0], shapes[0][1], shapes[1]))
    return jax.lax.scan(accumulate, zeros, (parts, jnp.arange(num_microbatches)))[0]


def _averaged(ema: Params | None, params: Params, *, decay: float | None, num_updates: Array) -> Params | None:
    """The moving average; it forgets faster in the first updates, so that the initial weights do not linger in it."""
    if ema is None or decay is None:
        return None
    rate = 1.0 - jnp.minimum(decay, (1.0 + num_updates) / (10.0 + num_updates))
    return jax.tree.map(lambda old, new: old + rate * (new - old), ema, params)


def _updated_buffers(definition: Definition, buffers: Params, sums: Mapping[str, Array]) -> Params:
    """Router biases after this step's global loads: moved once per optimizer step, whatever the accumulation."""
    updated = dict(buffers)
    for path in buffers:
        if path.endswith("/router_bias") and isinstance(ffn := block_at(definition.config, path).ffn, moe.MoeConfig):
            load = sums[path.removesuffix("router_bias") + "expert_counts"]
            updated[path] = moe.updated_bias(buffers[path], load, rate=ffn.bias_rate)
    return updated
