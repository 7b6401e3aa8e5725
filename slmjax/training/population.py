"""The train step of several members at once: `jax.vmap` of the one train step over the axis `arm`.

    programs = population_programs(settings, experiments, shapes=shapes, mesh=mesh)
    state = programs.stack(states)                       # of the members' states
    state, metrics = programs.step(state, batch)         # batch: a batch of each member
    first = programs.member(state, 0)

Arrays have a leading dim over members, which the mesh's axis `arm` shards where it has more than one device.
Each member has its own counters, and skips its own steps that are not finite.

Dims: N members, S optimizer steps of a run.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from slmjax import losses
from slmjax.data.batch import Batch
from slmjax.parallel.mesh import ARM
from slmjax.training.experiment import Experiment
from slmjax.training.hyperparameters import Hyperparameters
from slmjax.training.optim import learning_rate, make_optimizer
from slmjax.training.state import TrainState
from slmjax.training.step import StepSettings, TeacherOutputs, train_step

# Numbers of the optimizer that members may differ in, next to those of the learning rate's schedule.
OPTIMIZER_NUMBERS = (
    "lr",
    "muon_lr",
    "scale_lr",
    "weight_decay",
    "betas",
    "eps",
    "muon_momentum",
    "grad_clip",
    "ema_decay",
)
SCHEDULE_SETTINGS = ("lr", "min_lr_ratio", "schedule", "warmup_steps", "decay_fraction")
# Without a value, the program has neither the state nor the arithmetic of these.
OPTIONAL_NUMBERS = ("scale_lr", "grad_clip", "ema_decay")

PopulationStep = Callable[..., tuple[TrainState, dict[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopulationPrograms:
    """The jitted functions of a population's state, in which every array has a dim over members."""

    mesh: Mesh
    # (state, batch, teacher outputs) to (state, metrics), as a train step; the state is donated
    step: PopulationStep
    stack: Callable[[Sequence[TrainState]], TrainState]
    member: Callable[[TrainState, int], TrainState]  # the state of one member, as its own program has it


def population_programs(
    settings: StepSettings, experiments: Sequence[Experiment], *, shapes: TrainState, mesh: Mesh
) -> PopulationPrograms:
    """Return the programs of a population.

    Args:
      settings: the train step of any member.
      experiments: of the members.
      shapes: the state of one member, with its shardings.
      mesh: that of the population (`parallel.mesh.population_mesh`).
    """
    member_shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    arm = ARM if mesh.shape.get(ARM, 1) > 1 else None
    shardings = jax.tree.map(
        lambda sharding: NamedSharding(mesh, PartitionSpec(arm, *sharding.spec)), member_shardings
    )
    arrays = differing_numbers(experiments, total_steps=settings.total_steps)
    placed = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(arm)))
    run = functools.partial(_population_step, with_decay(settings, experiments), experiments[0], arm)
    compiled = jax.jit(run, donate_argnums=1, out_shardings=(shardings, shardings.step))
    stack = jax.jit(
        lambda states: jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), out_shardings=shardings
    )
    member = jax.jit(
        lambda state, index: jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), state
        ),
        out_shardings=member_shardings,
    )

    # The mesh is part of what a program is traced for: members of their own are on another.
    def step(state: TrainState, batch: Batch, teacher_outputs: TeacherOutputs = ()) -> Any:
        hidden = tuple(teacher.hidden for teacher in teacher_outputs)
        heads = tuple(teacher.head for teacher in teacher_outputs)
        with jax.set_mesh(mesh):
            return compiled(placed, state, batch, hidden, heads)

    return PopulationPrograms(mesh=mesh, step=step, stack=stack, member=member)


def _population_step(
    settings: StepSettings,
    first: Experiment,
    arm: str | None,
    arrays: Mapping[str, Array],
    state: TrainState,
    batch: Batch,
    hidden: tuple[Array, ...],
    heads: tuple[losses.Head, ...],
) -> tuple[TrainState, dict[str, Any]]:
    def of_member(
        arrays: Mapping[str, Array], state: TrainState, batch: Batch, hidden: tuple[Array, ...]
    ) -> tuple[TrainState, dict[str, Any]]:
        outputs = tuple(
            losses.TeacherOutput(hidden=states, head=head) for states, head in zip(hidden, heads, strict=True)
        )
        return train_step(with_numbers(settings, first, arrays), state, batch, outputs)

    # Shardings within the step are given the axis too, or every device would have all members.
    return jax.vmap(of_member, spmd_axis_name=arm)(arrays, state, batch, hidden)


# Numbers of the members -------------------------------------------------------------------------------------
def differing_numbers(
    experiments: Sequence[Experiment], *, total_steps: int
) -> dict[str, Float[np.ndarray, "N ..."]]:
    """Return the numbers in which members differ, as arrays; what all have in common stays a constant.

    If there are any, the learning rates of every update are among them, so that schedules may differ in all.
    """
    optims = [experiment.optim for experiment in experiments]
    columns: dict[str, list[Any]] = {
        name: [getattr(optim, name) for optim in optims] for name in OPTIMIZER_NUMBERS
    }
    columns["z_loss"] = [experiment.objective.z_loss for experiment in experiments]
    arrays = {
        name: np.asarray(column, np.float32)
        for name, column in columns.items()
        if any(value != column[0] for value in column)
    }
    schedules = [tuple(getattr(optim, name) for name in SCHEDULE_SETTINGS) for optim in optims]
    if arrays or any(schedule != schedules[0] for schedule in schedules):
        steps = jnp.arange(total_steps)
        rates = [learning_rate(optim, steps, total_steps=total_steps) for optim in optims]
        arrays["learning_rates"] = np.stack([np.asarray(rate) for rate in rates])
    return arrays


def with_decay(settings: StepSettings, experiments: Sequence[Experiment]) -> StepSettings:
    """Return the settings with a weight decay above 0 if any member has one."""
    # A decay of 0 is left out of a program.
    weight_decay = max(experiment.optim.weight_decay for experiment in experiments)
    return dataclasses.replace(settings, optim=dataclasses.replace(settings.optim, weight_decay=weight_decay))


def with_numbers(settings: StepSettings, first: Experiment, arrays: Mapping[str, Array]) -> StepSettings:
    """Return the settings of a step with a member's numbers, and those of the first where all are equal."""
    if not arrays:
        return settings
    optim = first.optim
    values: dict[str, Any] = {name: getattr(optim, name) for name in OPTIMIZER_NUMBERS}
    values |= {"z_loss": first.objective.z_loss} | dict(arrays)
    if "betas" in arrays:
        values["betas"] = (arrays["betas"][0], arrays["betas"][1])
    hyperparameters = Hyperparameters(**values)
    optimizer = make_optimizer(
        settings.optim,
        settings.definition.params,
        total_steps=settings.total_steps,
        scaling=settings.definition.config.scaling,
        hyperparameters=hyperparameters,
    )
    return dataclasses.replace(settings, optimizer=optimizer, hyperparameters=hyperparameters)
