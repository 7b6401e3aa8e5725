"""From numbers to codes and scales, and back.

    encoded = encode(x, spec, axis=-2)          # codes and scales, as they are stored
    decode(encoded, spec, axis=-2)              # what an engine makes of them, float32
    fake_quant(x, spec, axis=-2)                # the same in one go, without the integers between

All of it is elementwise but for one or two reductions over a group: nothing is sorted or gathered, and arrays
that are divided over devices stay so. It is computed in float32, and gives what the engines' own quantizers
do, bit for bit, on every platform (see formats/division.py). Numbers below 1.2e-38, the smallest normal
float32, count as zero, as XLA has it on CPU. A stack of weights is one tensor to a TENSOR's scale and to the
second scale of a two-level format: `jax.vmap` gives each its own.

Dims: W numbers along the axis, G groups, S numbers of a group. The axis is anywhere: "*B W *C" -> "*B G S
*C".
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.formats.division import divided, reciprocal
from slmjax.formats.presets import name_of
from slmjax.formats.rounding import codes_of, nearest, nearest_to_zero_point, values_of
from slmjax.formats.scales import computed_scale, stored_scale, tensor_scale_of, zero_of
from slmjax.formats.spec import CodesFrom, Granularity, QuantSpec, Scaling, check_width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """An array as it is stored. Where groups run along an axis, that axis of `scale` and `zero` counts
    groups; the rest is alike.
    """

    # int8, the shape of the array
    codes: Any
    # float32, what the stored scale stands for; of a TENSOR all dims are 1
    scale: Any
    # int32, the code that stands for 0, of an asymmetric format; else None
    zero: Any = None
    # float32 scalar, the second scale of a two-level format; else None
    tensor_scale: Any = None


def encode(
    x: Float[Array, "..."],
    spec: QuantSpec,
    *,
    axis: int = -1,
    scale: Float[Array, "..."] | None = None,
    tensor_scale: Float[Array, ""] | None = None,
) -> Encoded:
    """Codes and scales of `x`.

    Args:
      x: any float dtype; computed in float32.
      spec: the format.
      axis: the one that groups, or rows, run along: for a weight the one that is summed over.
      scale: one number a group, in the shape that `scale_of` has: learned, calibrated or searched. It is
        rounded to what is stored, and codes are computed on that. None: the format's own rule; where that
        computes codes on a scale not yet rounded, so does this. An asymmetric format keeps the zero point of
        its rule, at the given scale.
      tensor_scale: the second scale of a two-level format, calibrated; None: from the largest of all of `x`.

    Raises ValueError where the width is no multiple of the group size. A NaN or infinity makes its group's
    scale NaN, so that it is not hidden by a code.
    """
    groups, axes = _grouped(x, spec, axis)
    parts = _quantized(groups, axes, spec, scale, tensor_scale)
    kept = parts.scale
    if scale is not None:
        kept = jnp.where(jnp.any(~jnp.isfinite(groups), axis=axes, keepdims=True), jnp.nan, kept)
    return Encoded(
        codes=codes_of(parts.values, spec.grid).reshape(x.shape),
        scale=jnp.squeeze(kept, axes[-1]),
        zero=None if parts.zero is None else jnp.squeeze(parts.zero, axes[-1]).astype(jnp.int32),
        tensor_scale=parts.tensor_scale,
    )


def decode(encoded: Encoded, spec: QuantSpec, *, axis: int = -1) -> Float[Array, "..."]:
    """The numbers that codes and scales stand for: float32, the shape of the codes."""
    encoded = jax.tree.map(jnp.asarray, encoded)
    groups, axes = _grouped(encoded.codes, spec, axis)
    zero = None if encoded.zero is None else jnp.expand_dims(encoded.zero, axes[-1]).astype(jnp.float32)
    scale = jnp.expand_dims(encoded.scale, axes[-1])
    parts = _Parts(
        values=values_of(groups, spec.grid), scale=scale, zero=zero, tensor_scale=encoded.tensor_scale
    )
    return _restored(parts).reshape(encoded.codes.shape)


def fake_quant(
    x: Float[Array, "..."],
    spec: QuantSpec,
    *,
    axis: int = -1,
    scale: Float[Array, "..."] | None = None,
    tensor_scale: Float[Array, ""] | None = None,
) -> Float[Array, "..."]:
    """`decode(encode(x))`: what is left of `x`, float32. Arguments are those of `encode`.

    A zero may have the other sign; under given scales a NaN stays the only one, and an infinity becomes the
    largest number there is.
    """
    groups, axes = _grouped(x, spec, axis)
    return _restored(_quantized(groups, axes, spec, scale, tensor_scale)).reshape(x.shape)


def scale_of(x: Float[Array, "..."], spec: QuantSpec, *, axis: int = -1) -> Float[Array, "..."]:
    """The scales that `encode` computes, as they are stored: float32, the shape of `x` with the axis counting
    groups.

    Of a two-level format both scales together: what codes are multiplied with.
    """
    groups, axes = _grouped(x, spec, axis)
    tensor_scale = tensor_scale_of(x, spec) if spec.is_two_level else None
    scale = stored_scale(computed_scale(groups, axes, spec)[0], spec, tensor_scale)
    return jnp.squeeze(scale if tensor_scale is None else tensor_scale * scale, axes[-1])


def expanded(scale: Float[Array, "..."], width: int, *, axis: int = -1) -> Float[Array, "..."]:
    """Each group's scale for each of its numbers: the axis that counts groups becomes `width`. Dims of a
    TENSOR's scale stay 1.
    """
    axis = axis % scale.ndim
    num_groups = scale.shape[axis]
    shape = (*scale.shape[: axis + 1], width // num_groups, *scale.shape[axis + 1 :])
    return jnp.broadcast_to(jnp.expand_dims(scale, axis + 1), shape).reshape(
        *scale.shape[:axis], width, *scale.shape[axis + 1 :]
    )


def _grouped(x: Array, spec: QuantSpec, axis: int) -> tuple[Array, tuple[int, ...]]:
    """`x` [*B, G, S, *C] and the axes that are reduced, that of S the last of them."""
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis}, but the array has {x.ndim} dims")
    axis = axis % x.ndim
    width = x.shape[axis]
    check_width(spec, width, what=f"axis {axis} of an array of shape {x.shape}", name=name_of(spec))
    num_groups = spec.groups(width)
    groups = x.reshape(*x.shape[:axis], num_groups, width // num_groups, *x.shape[axis + 1 :])
    if jnp.issubdtype(x.dtype, jnp.floating):
        groups = jax.lax.stop_gradient(groups.astype(jnp.float32))
    if spec.granularity is not Granularity.PER_TENSOR:
        return groups, (axis + 1,)
    return groups, (*(i for i in range(groups.ndim) if i != axis + 1), axis + 1)


# Both ways, in groups ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """What `Encoded` has, in groups: `values` are the grid's numbers, and all is float32."""

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
        raise ValueError("a tensor_scale was given for a format that has no second scale")
    zero = None
    if scale is None:
        exact, zero = computed_scale(groups, axes, spec)
        kept = stored_scale(exact, spec, tensor_scale)
        divisor = exact if spec.codes_from is CodesFrom.EXACT else kept
    else:
        divisor = kept = stored_scale(
            jnp.expand_dims(scale, axes[-1]).astype(jnp.float32), spec, tensor_scale
        )
        zero = zero_of(groups, axes, spec, kept) if spec.is_asymmetric else None
    if tensor_scale is not None:
        scaled = groups * divided(reciprocal(tensor_scale), divisor)
    elif spec.scaling is Scaling.RECIPROCAL:
        scaled = groups * reciprocal(divisor)
    else:
        scaled = divided(groups, jnp.where(divisor == 0, 1.0, divisor))
    values = nearest(scaled, spec) if zero is None else nearest_to_zero_point(scaled, zero, spec)
    return _Parts(values=values, scale=kept, zero=zero, tensor_scale=tensor_scale)


def _restored(parts: _Parts) -> Array:
    values = parts.values if parts.zero is None else parts.values - parts.zero
    return values * (parts.scale if parts.tensor_scale is None else parts.tensor_scale * parts.scale)
