"""The arrays of one checkpoint: read into any grouping of layers and any mesh, and checked for NaN.

read_arrays(orbax, path, like, leaves=leaves, model=model, whole=True)
first_not_finite(items)                     # "optimizer 0 mu embed/table", or ""
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from slmjax.models.architecture import ModelConfig
from slmjax.models.definition import restack, stored_shapes
from slmjax.quantization.quantizer_params import is_sign

Items = Mapping[str, Any]  # named trees of arrays: "model", "optimizer", "ema", "progress", "codes"


class CheckpointError(ValueError):
    """No checkpoint can be restored, or it belongs to another model."""


# Reading ----------------------------------------------------------------------------------------------------
def read_arrays(
    orbax: ocp.AsyncCheckpointer,
    path: Path,
    like: Items,
    *,
    leaves: Mapping[str, Mapping[str, str]],
    model: ModelConfig,
    whole: bool,
) -> dict[str, Any]:
    """Read the arrays of a checkpoint.

    Args:
      like: trees of arrays or shapes, whose shardings the result has.
      leaves: shape and dtype of each stored array, by item and logical path (`describe`).
      whole: False to read only the leaves in `like`, by logical path.

    Raises:
      CheckpointError: parameters, shapes or dtypes are those of another model.
    """
    shapes = {name: stored_shapes(model, tree) for name, tree in like.items()}
    signs: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}  # that an older version did not keep
    for name, tree_shapes in shapes.items():
        stored = leaves.get(name, {})
        stored = stored if whole else {leaf: stored[leaf] for leaf in tree_shapes if leaf in stored}
        signs[name] = {
            leaf: tree_shapes.pop(leaf) for leaf in [*tree_shapes] if is_sign(leaf) and leaf not in stored
        }
        _check_leaves(name, stored=stored, expected=describe(tree_shapes), path=path)
    if not whole:
        some = {name: read_some(path / name, tree) | _positive(signs[name]) for name, tree in shapes.items()}
        return {name: restack(model, some[name], like=tree) for name, tree in like.items()}
    read = orbax.restore(
        path,
        args=ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}),
    )
    # Layers are stacked in one program, whose outputs have the requested shardings.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)

    def build(stored: dict[str, Any]) -> dict[str, Any]:
        whole = {name: {**arrays, **_positive(signs[name])} for name, arrays in stored.items()}
        return {name: restack(model, whole[name], like=tree) for name, tree in like.items()}

    return jax.jit(build, out_shardings=shardings)({name: read[name] for name in like})


def read_some(path: Path, tree_shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Read some of an item's arrays; the handler that wrote them reads all or none."""
    if not tree_shapes:
        return {}
    restore_args = ocp.checkpoint_utils.construct_restore_args(tree_shapes)
    # The two handlers share their layout of files.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(
            path, args=ocp.args.PyTreeRestore(tree_shapes, restore_args=restore_args, partial_restore=True)
        )


def describe(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return dtype and shape of each array as text, as checkpoints store them."""
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in tree.items()}


def _check_leaves(item: str, *, stored: Mapping[str, str], expected: Mapping[str, str], path: Path) -> None:
    """Refuse a checkpoint of another model: Orbax would cast a dtype silently."""
    names = stored.keys() | expected.keys()
    differing = sorted(name for name in names if stored.get(name) != expected.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{path} does not fit this experiment: {item} {name} is {stored.get(name, 'absent')} in the "
            f"checkpoint and {expected.get(name, 'absent')} in the model ({len(differing)} differ). Use the "
            "model and optimizer it was trained with"
        )


def _positive(signs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    return {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in signs.items()}


# Values that are not finite ---------------------------------------------------------------------------------
def first_not_finite(items: Items) -> str:
    """Return the name of the first array that holds NaN or an infinity, or nothing."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(items))
    floats = [(path, leaf) for path, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if not floats:
        return ""
    # One array, so that there is one transfer from the device.
    finite = np.asarray(_are_finite([leaf for _, leaf in floats]))
    names = (jax.tree_util.keystr(path, simple=True, separator=" ") for path, _ in floats)
    return next((name for name, is_finite in zip(names, finite, strict=True) if not is_finite), "")


@jax.jit
def _are_finite(leaves: list[Any]) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])
