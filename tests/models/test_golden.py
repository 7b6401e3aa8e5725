"""Lists of every parameter of every named architecture, in tests/models/golden: a change shows as a diff.

After an intended change, write the lists again and check the diff:

    python -m tests.models.test_golden

One line per parameter: stacked path, shape (layers first), initialisation, optimizer with Muon, weight decay,
and the PartitionSpec on a mesh of fsdp=2, tensor=2.
"""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from slmjax.models import paths
from slmjax.models.architecture import ModelConfig
from slmjax.models.definition import Definition, define
from slmjax.models.zoo import ARCHITECTURES
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import partition_spec
from slmjax.training.optim import OptimConfig, Optimizer, parameter_groups

GOLDEN = Path(__file__).parent / "golden"
OPTIM = OptimConfig(kind=Optimizer.MUON)
HOW_TO_UPDATE = "if the change is intended, run `python -m tests.models.test_golden` and check the diff"


def golden_text(config: ModelConfig) -> str:
    definition = define(config)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    initial = initialisations(definition)
    groups = parameter_groups(OPTIM, definition.params)
    rows = [("# path", "shape", "init", "optimizer", "decay", "fsdp=2 tensor=2")]
    for path, leaf in sorted({**definition.params, **definition.buffers}.items()):
        optimizer, decay = (
            ("none", "")
            if path in definition.buffers
            else (groups[path].optimizer.value, f"{groups[path].weight_decay:g}")
        )
        axes = (
            axis if axis is None or isinstance(axis, str) else "+".join(axis)
            for axis in partition_spec(path, leaf.shape, mesh)
        )
        spec = ", ".join(map(str, axes))
        rows.append((path, str(list(leaf.shape)), initial[path], optimizer, decay, spec))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([*layer_lines(config), *lines, ""])


def layer_lines(config: ModelConfig) -> Iterator[str]:
    """Yield for each stacked block the layers that its slices belong to."""
    for index, group in enumerate(config.stack):
        for offset in range(len(group.pattern)):
            stack = f"segments/{index}/blocks/{offset}"
            yield f"# {stack}: layers {' '.join(map(str, paths.layer_indices(config, stack + '/any') or ()))}"


def initialisations(definition: Definition) -> dict[str, str]:
    """Describe the initialisation of each parameter, by running it with constants in place of draws."""

    @jax.jit
    def first_elements(draw: jax.Array) -> dict[str, jax.Array]:
        def constant(
            key: jax.Array, lower: float, upper: float, shape: tuple[int, ...], dtype: jnp.dtype
        ) -> jax.Array:
            return jnp.full(shape, draw, dtype)

        with mock.patch.object(jax.random, "truncated_normal", constant):
            params, buffers = definition.init(jax.random.key(0))
        return {path: leaf[(0,) * leaf.ndim] for path, leaf in {**params, **buffers}.items()}

    zero, one = jax.device_get((first_elements(0.0), first_elements(1.0)))
    return {
        path: f"constant {zero[path]:g}" if zero[path] == one[path] else f"normal {one[path]:.4g}"
        for path in one
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_equal_the_golden_list(name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    assert path.is_file(), f"there is no {path}: run `python -m tests.models.test_golden`"
    actual = golden_text(ARCHITECTURES[name]()).splitlines()
    expected = path.read_text().splitlines()
    assert actual == expected, f"{name}: {HOW_TO_UPDATE}"


def test_every_list_is_of_an_architecture() -> None:
    assert {path.stem for path in GOLDEN.glob("*")} == set(ARCHITECTURES), (
        f"{GOLDEN} has other lists than the zoo has architectures"
    )


def write_all() -> None:
    """Write the lists of all architectures, and delete others."""
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*.txt"):
        path.unlink()
    for name, build in ARCHITECTURES.items():
        (GOLDEN / f"{name}.txt").write_text(golden_text(build()))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    write_all()
