"""The training state: everything that a step changes, and all that a checkpoint holds."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from slmjax.models.definition import Definition, Params
from slmjax.parallel.rules import like_parameters, parameter_shardings, shapes_with_shardings
from slmjax.training.objective import CROSS_ENTROPY, ObjectiveConfig

# Of the type in the comment, not checked: trees that jax makes of a TrainState hold shapes, shardings or
# nothing in its place.
ArrayLeaf = Any
Tree = Any


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
    # Int32 "2": scored targets trained on, those of undone steps left out: millions, and the rest
    tokens: ArrayLeaf
    skipped: ArrayLeaf  # Int32 "": steps undone, in all: not finite, or without a scored target
    # Int32 "": of those that are not finite; one without a target neither ends nor lengthens the row
    skipped_in_a_row: ArrayLeaf

    def items(self) -> dict[str, Any]:
        """The state as a checkpoint stores it: `model` alone suffices to evaluate and sample."""
        names = ("rng", "step", "tokens", "skipped", "skipped_in_a_row")
        progress = {name: getattr(self, name) for name in names}
        items = {
            "model": {"params": self.trainable, "buffers": self.frozen},
            "optimizer": self.optimizer,
            "progress": progress,
        }
        optional = {"ema": self.ema, "objective": self.objective}
        return items | {name: tree for name, tree in optional.items() if tree}

    @classmethod
    def from_items(cls, items: Mapping[str, Any]) -> "TrainState":
        """The inverse of `items`."""
        model = items["model"]
        return cls(
            trainable=model["params"],
            frozen=model["buffers"],
            optimizer=items["optimizer"],
            ema=items.get("ema"),
            objective=items.get("objective", {}),
            **items["progress"],
        )

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
    objective: ObjectiveConfig = CROSS_ENTROPY,
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without computing anything."""
    fresh = functools.partial(_fresh, definition, optimizer, objective, with_ema)
    shapes = jax.eval_shape(fresh, jax.random.key_data(jax.random.key(0)))
    params = definition.params
    replicated = functools.partial(jax.tree.map, lambda _: NamedSharding(mesh, PartitionSpec()))
    shardings = dataclasses.replace(
        replicated(shapes),
        trainable=parameter_shardings(params, mesh),
        optimizer=like_parameters(shapes.optimizer, params, mesh),
        ema=parameter_shardings(params, mesh) if with_ema else None,
    )
    return shapes_with_shardings(shapes, shardings)


def init_state(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    *,
    shapes: TrainState,
    seed: int,
    objective: ObjectiveConfig = CROSS_ENTROPY,
) -> TrainState:
    """A fresh state, every array created where it lives."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    fresh = functools.partial(_fresh, definition, optimizer, objective, shapes.ema is not None)
    return jax.jit(fresh, out_shardings=shardings)(jax.random.key_data(jax.random.key(seed)))


def _fresh(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    objective: ObjectiveConfig,
    with_ema: bool,
    rng: Array,
) -> TrainState:
    params, buffers = definition.init(jax.random.wrap_key_data(rng))
    # Distinct zeros: the state is donated, and one buffer must not be donated twice.
    zero = functools.partial(jnp.zeros, (), jnp.int32)
    return TrainState(
        trainable=params,
        frozen=buffers,
        optimizer=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if with_ema else None,
        objective={} if objective.distill is None else objective.distill.divergence.initial_state(),
        rng=rng,
        step=zero(),
        tokens=jnp.zeros((2,), jnp.int32),
        skipped=zero(),
        skipped_in_a_row=zero(),
    )


MILLION = 1_000_000


def tokens_seen(state: TrainState) -> int:
    """Scored targets that the state has been trained on."""
    millions, rest = (int(count) for count in jax.device_get(state.tokens))
    return millions * MILLION + rest
