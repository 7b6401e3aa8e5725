"""Encode arrays as codes and scales, and decode them.

    encoded = encode(x, spec, axis=-2)          # codes and scales, as they are stored
    decode(encoded, spec, axis=-2)              # the values an engine reads from them, float32
    fake_quant(x, spec, axis=-2)                # the same values, without the integer codes between

All operations are elementwise, except one or two reductions over a group: nothing is sorted or gathered, and
sharded arrays stay sharded. The arithmetic is float32 and equals the engines' own quantizers, bit for bit, on
every platform (see formats/division.py). Values below 1.2e-38, the smallest normal float32, count as zero,
because XLA flushes them on CPU. A stack of weights counts as one tensor for a PER_TENSOR scale and for the
second scale of a two-level format; use `jax.vmap` for one scale per weight.

Dims: W elements along the axis, G groups, S elements of a group. The axis may be any: "*B W *C" -> "*B G S
*C".
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.formats.division import divide, reciprocal
from slmjax.formats.presets import name_of
from slmjax.formats.rounding import codes_of, nearest, nearest_to_zero_point, values_of
from slmjax.formats.scales import computed_scale, stored_scale, tensor_scale_of, zero_of
from slmjax.formats.spec import CodesFrom, Granularity, QuantSpec, Scaling, check_width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """An array as it is stored.

    `scale` and `zero` have the shape of the array, but with groups instead of elements along the group axis.
    """

    codes: Any  # int8, the shape of the array
    scale: Any  # float32, the value of the stored scale; all dims are 1 with PER_TENSOR granularity
    zero: Any = None  # int32, the code that represents 0 in an asymmetric format; else None
    tensor_scale: Any = None  # float32 scalar, the second scale of a two-level format; else None


def encode(
    x: Float[Array, "..."],
    spec: QuantSpec,
    *,
    axis: int = -1,
    scale: Float[Array, "..."] | None = None,
    tensor_scale: Float[Array, ""] | None = None,
) -> Encoded:
    """Return the codes and scales of `x`.

    A NaN or infinity makes its group's scale NaN, because a code would hide it.

    Args:
      x: any float dtype; computed in float32.
      spec: the format.
      axis: the axis that groups, or channels, run along: for a weight the one that is summed over.
      scale: one value a group, in the shape that `scale_of` returns: learned, calibrated or searched. It is
        rounded as it will be stored, and codes are computed with the rounded scale. None: the format's own
        rule, which may compute codes before it rounds the scale. An asymmetric format still computes the
        zero point by its own rule, at this scale.
      tensor_scale: the calibrated second scale of a two-level format; None: computed from the largest
        magnitude in `x`.

    Raises:
      ValueError: the width is not a multiple of the group size.
    """
    groups, axes = _grouped(x, spec, axis)
    parts = _quantized(groups, axes, spec, scale, tensor_scale)
    stored = parts.scale
    if scale is not None:
        # The format's own rule gives NaN already; a scale from the caller does not.
        stored = jnp.where(jnp.any(~jnp.isfinite(groups), axis=axes, keepdims=True), jnp.nan, stored)
    return Encoded(
        codes=codes_of(parts.values, spec.grid).reshape(x.shape),
        scale=jnp.squeeze(stored, axes[-1]),
        zero=None if parts.zero is None else jnp.squeeze(parts.zero, axes[-1]).astype(jnp.int32),
        tensor_scale=parts.tensor_scale,
    )


def decode(encoded: Encoded, spec: QuantSpec, *, axis: int = -1) -> Float[Array, "..."]:
    """Return the values that codes and scales represent: float32, in the shape of the codes."""
    encoded = jax.tree.map(jnp.asarray, encoded)
    groups, axes = _grouped(encoded.codes, spec, axis)
    zero = None if encoded.zero is None else jnp.expand_dims(encoded.zero, axes[-1]).astype(jnp.float32)
    scale = jnp.expand_dims(encoded.scale, axes[-1])
    parts = _Parts(
        values=values_of(groups, spec.grid), scale=scale, zero=zero, tensor_scale=encoded.tensor_scale
    )
    return _dequantized(parts).reshape(encoded.codes.shape)


def fake_quant(
    x: Float[Array, "..."],
    spec: QuantSpec,
    *,
    axis: int = -1,
    scale: Float[Array, "..."] | None = None,
    tensor_scale: Float[Array, ""] | None = None,
) -> Float[Array, "..."]:
    """Return `decode(encode(x))`, float32, without computing codes. The arguments are those of `encode`.

    There are two differences from `decode(encode(x))`. A zero may have the other sign. If `scale` is given, a
    NaN does not spread to its group, and an infinity becomes the largest value of the group's levels.
    """
    groups, axes = _grouped(x, spec, axis)
    return _dequantized(_quantized(groups, axes, spec, scale, tensor_scale)).reshape(x.shape)


def scale_of(x: Float[Array, "..."], spec: QuantSpec, *, axis: int = -1) -> Float[Array, "..."]:
    """Return the scales that `encode` computes, as they are stored.

    They are float32, in the shape of `x` with groups instead of elements along the axis. In a two-level
    format each is the product of both scales.
    """
    groups, axes = _grouped(x, spec, axis)
    tensor_scale = tensor_scale_of(x, spec) if spec.is_two_level else None
    scale = stored_scale(computed_scale(groups, axes, spec)[0], spec, tensor_scale)
    return jnp.squeeze(scale if tensor_scale is None else tensor_scale * scale, axes[-1])


def expanded(scale: Float[Array, "..."], width: int, *, axis: int = -1) -> Float[Array, "..."]:
    """Repeat each group's scale for its elements: the axis of groups becomes `width` long.

    The other dims of a PER_TENSOR scale stay 1.
    """
    axis = axis % scale.ndim
    num_groups = scale.shape[axis]
    shape = (*scale.shape[: axis + 1], width // num_groups, *scale.shape[axis + 1 :])
    return jnp.broadcast_to(jnp.expand_dims(scale, axis + 1), shape).reshape(
        *scale.shape[:axis], width, *scale.shape[axis + 1 :]
    )


def _grouped(x: Array, spec: QuantSpec, axis: int) -> tuple[Array, tuple[int, ...]]:
    """Reshape `x` to [*B, G, S, *C]; also return the axes that share a scale, that of S last."""
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis}, but the array has {x.ndim} dims")
    axis = axis % x.ndim
    width = x.shape[axis]
    check_width(spec, width, what=f"axis {axis} of an array of shape {x.shape}", name=name_of(spec))
    num_groups = spec.groups(width)
    groups = x.reshape(*x.shape[:axis], num_groups, width // num_groups, *x.shape[axis + 1 :])
    # Rounding has no useful gradient: estimators (quantization/) define one.
    if jnp.issubdtype(x.dtype, jnp.floating):
        groups = jax.lax.stop_gradient(groups.astype(jnp.float32))
    if spec.granularity is not Granularity.PER_TENSOR:
        return groups, (axis + 1,)
    return groups, (*(i for i in range(groups.ndim) if i != axis + 1), axis + 1)


# The computation, in groups ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """The fields of `Encoded`, in groups and in float32; `values` are levels of the grid."""

    values: Array
    scale: Array
    zero: Array | None
    tensor_scale: Array | None


def _quantized(
    groups: Array, axes: tuple[int, ...], spec: QuantSpec, scale: Array | None, tensor_scale: Array | None
) -> _Parts:
    if spec.is_two_level:
        tensor_scale = (
            tensor_scale_of(groups, spec) if tensor_scale is None else tensor_scale.astype(jnp.float32)
        )
    elif tensor_scale is not None:
        raise ValueError("got a tensor_scale for a format that has no second scale: leave it out")

    # The scale to store, and the scale that codes are computed with.
    zero = None
    if scale is None:
        exact, zero = computed_scale(groups, axes, spec)
        stored = stored_scale(exact, spec, tensor_scale)
        divisor = exact if spec.codes_from is CodesFrom.EXACT else stored
    else:
        scale = jnp.expand_dims(scale, axes[-1]).astype(jnp.float32)
        stored = stored_scale(scale, spec, tensor_scale)
        divisor = stored
        zero = zero_of(groups, axes, spec, stored) if spec.is_asymmetric else None

    # The two ways to divide differ in the last bit, which decides ties: each format does as its engine does.
    if tensor_scale is not None:
        scaled = groups * divide(reciprocal(tensor_scale), divisor)
    elif spec.scaling is Scaling.RECIPROCAL:
        scaled = groups * reciprocal(divisor)
    else:
        scaled = divide(groups, jnp.where(divisor == 0, 1.0, divisor))
    values = nearest(scaled, spec) if zero is None else nearest_to_zero_point(scaled, zero, spec)
    return _Parts(values=values, scale=stored, zero=zero, tensor_scale=tensor_scale)


def _dequantized(parts: _Parts) -> Array:
    values = parts.values if parts.zero is None else parts.values - parts.zero
    return values * (parts.scale if parts.tensor_scale is None else parts.tensor_scale * parts.scale)
