"""The training state: everything that a step changes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from slmjax.models.definition import Definition
from slmjax.parallel.rules import like_parameters, parameter_shardings, shapes_with_shardings
from slmjax.training.objective import CROSS_ENTROPY, ObjectiveConfig

# Types are those of the comments, unchecked: trees that JAX makes of a TrainState hold shapes, shardings or
# nothing in place of arrays.
ArrayLeaf = Any
Tree = Any


# Fields that a checkpoint keeps as its item "progress".
PROGRESS = ("rng", "step", "skipped", "skipped_in_a_row")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step changes.

    A checkpoint adds the number of trained targets and, of a quantized model, checksums of its codes
    (`Setup.checkpoint_items`).
    """

    params: Tree  # Params: float32 parameters by stack path
    buffers: Tree  # Params: state that the optimizer does not touch, such as router biases
    optimizer: Tree  # optax state
    ema: Tree  # Params | None: averaged parameters, where asked for
    divergence: Tree  # dict[str, scalar]: what a divergence keeps from step to step
    rng: ArrayLeaf  # UInt32 "2": key data of the run's randomness; a step's key is folded from it
    step: ArrayLeaf  # Int32 "": steps taken, skipped ones included
    skipped: ArrayLeaf  # Int32 "": steps skipped, in all: not finite, or without a scored target
    # Int32 "": the latest steps that were not finite; one without a target neither ends nor lengthens the row
    skipped_in_a_row: ArrayLeaf

    def items(self) -> dict[str, Any]:
        """Return the state as a checkpoint stores it: `model` alone suffices to evaluate and sample."""
        items = {
            "model": {"params": self.params, "buffers": self.buffers},
            "optimizer": self.optimizer,
            "progress": {name: getattr(self, name) for name in PROGRESS},
        }
        optional = {"ema": self.ema, "objective": self.divergence}
        return items | {name: tree for name, tree in optional.items() if tree}

    @classmethod
    def from_items(cls, items: Mapping[str, Any]) -> "TrainState":
        """Return the state of a checkpoint's items: the inverse of `items`, which may hold more."""
        model = items["model"]
        progress = items["progress"]
        return cls(
            params=model["params"],
            buffers=model["buffers"],
            optimizer=items["optimizer"],
            ema=items.get("ema"),
            divergence=items.get("objective", {}),
            **{name: progress[name] for name in PROGRESS},
        )

    @property
    def eval_params(self) -> Tree:
        """Parameters for evaluation and sampling: the average where there is one."""
        return self.params if self.ema is None else self.ema


def state_shapes(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    *,
    with_ema: bool,
    mesh: Mesh,
    objective: ObjectiveConfig = CROSS_ENTROPY,
) -> TrainState:
    """Return shapes, dtypes and shardings of the state, without computing anything."""
    fresh = functools.partial(_fresh, definition, optimizer, objective, with_ema)
    # Shapes alone, so that a model larger than one device can be planned and restored into its shards.
    shapes = jax.eval_shape(fresh, jax.random.key_data(jax.random.key(0)))
    params = definition.params
    # Moments are sharded like their parameters, which divides the memory of the optimizer by the fsdp axis
    # (ZeRO, https://arxiv.org/abs/1910.02054). Counters are replicated.
    replicated = functools.partial(jax.tree.map, lambda _: NamedSharding(mesh, PartitionSpec()))
    shardings = dataclasses.replace(
        replicated(shapes),
        params=parameter_shardings(params, mesh),
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
    """Return a fresh state, every array created with its sharding."""
    return make_init(definition, optimizer, shapes=shapes, objective=objective)(seed)


def make_init(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    *,
    shapes: TrainState,
    objective: ObjectiveConfig = CROSS_ENTROPY,
) -> Callable[[int], TrainState]:
    """Return a function from a seed to a fresh state, which compiles once for all seeds."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    fresh = functools.partial(_fresh, definition, optimizer, objective, shapes.ema is not None)
    # Made under jit with shardings, so that a device computes and stores only its shards.
    init = jax.jit(fresh, out_shardings=shardings)
    return lambda seed: init(jax.random.key_data(jax.random.key(seed)))


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
        params=params,
        buffers=buffers,
        optimizer=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if with_ema else None,
        divergence={} if objective.distill is None else objective.distill.divergence.initial_state(),
        rng=rng,
        step=zero(),
        skipped=zero(),
        skipped_in_a_row=zero(),
    )


def not_finite(state: TrainState) -> TrainState:
    """Return the state with parameters of NaN, for an injected fault."""
    params = {
        path: leaf * jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for path, leaf in state.params.items()
    }
    return dataclasses.replace(state, params=params)
