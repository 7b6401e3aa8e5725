"""From numbers to codes and scales, and back.

    encoded = encode(x, spec, axis=-2)          # codes and scales, as they are stored
    decode(encoded, spec, axis=-2)              # what an engine makes of them, float32
    fake_quant(x, spec, axis=-2)                # the same in one go, without the integers between

All of it is elementwise but for one or two reductions over a group: nothing is sorted or gathered, and arrays that are divided over
devices stay so. It is computed in float32, and it computes what the engines' own quantizers do, bit for bit. Two liberties that
compilers take would change bits, so that there is nothing here for them to take: a product is clipped before anything is added to
it (no fused multiply-add), and a constant divisor is hidden (no multiplication with its reciprocal instead).

Numbers below 1.2e-38, the smallest normal float32, count as zero, as XLA has it on every platform.

Dims: W numbers along the axis, G groups, S numbers of a group. The axis is anywhere: "*B W *C" -> "*B G S *C".
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.formats.spec import CodesFrom, Grid, QuantSpec, Rounding, ScaleType, Scaling, Share, Statistic, check_width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """An array as it is stored. Where groups run along an axis, that axis of `scale` and `zero` counts groups; the rest is alike."""

    # int8, the shape of the array
    codes: Any
    # float32, what the stored scale stands for; of a TENSOR all dims are 1
    scale: Any
    # int32, the code that stands for 0, of an asymmetric format; else None
    zero: Any = None
    # float32 scalar, the second scale of a two-level format; else None
    tensor_scale: Any = None


def encode(x: Float[Array, "..."], spec: QuantSpec, *, axis: int = -1, scale: Float[Array, "..."] | None = None) -> Encoded:
    """Codes and scales of `x`.

    Args:
      x: any float dtype; computed in float32.
      spec: the format.
      axis: the one that groups, or rows, run along: for a weight the one that is summed over.
      scale: one number a group, in the shape that `scale_of` has: learned, calibrated or searched. It is rounded to what is
        stored, and codes are computed on that. None: the format's own rule; where that computes codes on a scale not yet
        rounded, so does this.

    Raises ValueError where the width is no multiple of the group size. A NaN or infinity makes its group's scale NaN, so that it
    is not hidden by a code.
    """
    groups, axes = _grouped(x, spec, axis)
    if scale is None:
        exact, zero = _scale_and_zero(groups, axes, spec)
        kept = stored_scale(exact, spec)
    else:
        exact = kept = stored_scale(jnp.expand_dims(scale, axes[-1]).astype(jnp.float32), spec)
        bad = jnp.any(~jnp.isfinite(groups), axis=axes, keepdims=True)
        kept, zero = jnp.where(bad, jnp.nan, kept), None
    codes = _rounded(groups, exact if spec.codes_from is CodesFrom.EXACT else kept, zero, spec)
    return Encoded(
        codes=codes.reshape(x.shape).astype(jnp.int8),
        scale=jnp.squeeze(kept, axes[-1]),
        zero=None if zero is None else jnp.squeeze(zero, axes[-1]).astype(jnp.int32),
    )


def decode(encoded: Encoded, spec: QuantSpec, *, axis: int = -1) -> Float[Array, "..."]:
    """The numbers that codes and scales stand for: float32, the shape of the codes."""
    groups, axes = _grouped(encoded.codes, spec, axis)
    values = groups.astype(jnp.float32)
    if encoded.zero is not None:
        values = values - jnp.expand_dims(encoded.zero, axes[-1]).astype(jnp.float32)
    return (values * jnp.expand_dims(encoded.scale, axes[-1])).reshape(encoded.codes.shape)


def fake_quant(x: Float[Array, "..."], spec: QuantSpec, *, axis: int = -1, scale: Float[Array, "..."] | None = None) -> Float[Array, "..."]:
    """`decode(encode(x))`: what is left of `x`, float32. A zero may have the other sign, and a given scale keeps what is not finite."""
    groups, axes = _grouped(x, spec, axis)
    if scale is None:
        exact, zero = _scale_and_zero(groups, axes, spec)
        kept = stored_scale(exact, spec)
    else:
        exact = kept = stored_scale(jnp.expand_dims(scale, axes[-1]).astype(jnp.float32), spec)
        zero = None
    values = _rounded(groups, exact if spec.codes_from is CodesFrom.EXACT else kept, zero, spec)
    if zero is not None:
        values = values - zero
    return (values * kept).reshape(x.shape)


def scale_of(x: Float[Array, "..."], spec: QuantSpec, *, axis: int = -1) -> Float[Array, "..."]:
    """The scales that `encode` computes, as they are stored: float32, the shape of `x` with the axis counting groups."""
    groups, axes = _grouped(x, spec, axis)
    return jnp.squeeze(stored_scale(_scale_and_zero(groups, axes, spec)[0], spec), axes[-1])


def expanded(scale: Float[Array, "..."], width: int, *, axis: int = -1) -> Float[Array, "..."]:
    """Each group's scale for each of its numbers: the axis that counts groups becomes `width`. Dims of a TENSOR's scale stay 1."""
    axis = axis % scale.ndim
    num_groups = scale.shape[axis]
    shape = (*scale.shape[: axis + 1], width // num_groups, *scale.shape[axis + 1 :])
    return jnp.broadcast_to(jnp.expand_dims(scale, axis + 1), shape).reshape(*scale.shape[:axis], width, *scale.shape[axis + 1 :])


def _grouped(x: Array, spec: QuantSpec, axis: int) -> tuple[Array, tuple[int, ...]]:
    """`x` [*B, G, S, *C] and the axes that are reduced, that of S the last of them."""
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis}, but the array has {x.ndim} dims")
    axis = axis % x.ndim
    width = x.shape[axis]
    check_width(spec, width, what=f"axis {axis} of an array of shape {x.shape}")
    num_groups = spec.groups(width)
    groups = x.reshape(*x.shape[:axis], num_groups, width // num_groups, *x.shape[axis + 1 :])
    if jnp.issubdtype(x.dtype, jnp.floating):
        groups = groups.astype(jnp.float32)
    if spec.share is not Share.TENSOR:
        return groups, (axis + 1,)
    return groups, (*(i for i in range(groups.ndim) if i != axis + 1), axis + 1)


# --- Scales ----------------------------------------------------------------------------------------------------------------------


def divided(x: Float[Array, "..."], divisor: float) -> Float[Array, "..."]:
    """`x / divisor` as IEEE has it: a compiler that knew the divisor would multiply with its reciprocal, which rounds twice."""
    if math.frexp(divisor)[0] == 0.5:  # a power of two, whose reciprocal is exact
        return x / divisor
    return x / jax.lax.optimization_barrier(jnp.float32(divisor))


def _scale_and_zero(groups: Array, axes: tuple[int, ...], spec: QuantSpec) -> tuple[Array, Array | None]:
    """The scale before it is rounded, with the reduced axes kept; and the zero point, a whole float32, of an asymmetric format."""
    if spec.statistic is Statistic.MIN_MAX:
        return _affine(groups, axes, spec)
    if spec.statistic is Statistic.SIGNED_MAX:
        scale = divided(-_signed_max(groups, axes), spec.divisor)
    elif spec.statistic is Statistic.ABSMEAN:
        count = math.prod(groups.shape[i] for i in axes)
        scale = divided(divided(jnp.sum(jnp.abs(groups), axis=axes, keepdims=True), float(count)), spec.divisor)
    else:
        scale = divided(jnp.max(jnp.abs(groups), axis=axes, keepdims=True), spec.divisor)
    return (jnp.maximum(scale, spec.smallest_scale) if spec.smallest_scale else scale), None


def _signed_max(groups: Array, axes: tuple[int, ...]) -> Array:
    """The first number of largest magnitude of each group."""
    magnitude = jnp.abs(groups)
    largest = jnp.max(magnitude, axis=axes, keepdims=True)
    if len(axes) > 1:
        raise ValueError("statistic SIGNED_MAX is for groups and rows: give a TENSOR another")
    # One number says where and of which sign: the further ahead the larger, the sign in its last bit.
    axis = axes[0]
    size = groups.shape[axis]
    ahead = jax.lax.broadcasted_iota(jnp.int32, groups.shape, axis)
    place = 2 * (size - ahead) + jnp.signbit(groups).astype(jnp.int32)
    first = jnp.max(jnp.where(magnitude == largest, place, 0), axis=axes, keepdims=True)
    return jnp.where(first % 2 == 1, -largest, largest)


def _affine(groups: Array, axes: tuple[int, ...], spec: QuantSpec) -> tuple[Array, Array]:
    """Scale and zero point of the range from the smallest to the largest number, in which 0 always is."""
    lowest = jnp.minimum(jnp.min(groups, axis=axes, keepdims=True), 0.0)
    highest = jnp.maximum(jnp.max(groups, axis=axes, keepdims=True), 0.0)
    scale = divided(highest - lowest, float(spec.highest_code - spec.lowest_code))
    scale = jnp.maximum(scale, spec.smallest_scale) if spec.smallest_scale else scale
    zero = spec.lowest_code - jnp.round(lowest / jnp.where(scale == 0, 1.0, scale))
    return scale, jnp.clip(zero, spec.lowest_code, spec.highest_code)


def stored_scale(scale: Float[Array, "..."], spec: QuantSpec) -> Float[Array, "..."]:
    """A scale rounded to what is stored of it, as float32. Too large for float16, it is infinite."""
    if spec.scale_type in (ScaleType.BFLOAT16, ScaleType.BFLOAT16_IN_FLOAT16):
        scale = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
    if spec.scale_type in (ScaleType.FLOAT16, ScaleType.BFLOAT16_IN_FLOAT16):
        # Below the normal numbers float16 has steps of 2**-24, which reduce_precision does not know.
        small = jnp.round(scale * 2.0**24) * 2.0**-24
        scale = jnp.where(jnp.abs(scale) < 2.0**-14, small, jax.lax.reduce_precision(scale, exponent_bits=5, mantissa_bits=10))
    return scale


# --- Codes -----------------------------------------------------------------------------------------------------------------------


def _rounded(groups: Array, scale: Array, zero: Array | None, spec: QuantSpec) -> Array:
    """Codes of an INTEGER or ODD grid, still float32."""
    if spec.scaling is Scaling.RECIPROCAL:
        scaled = groups * jnp.where(scale == 0, 0.0, 1.0 / scale)
    else:
        scaled = groups / jnp.where(scale == 0, 1.0, scale)
    low, high = float(spec.lowest_code), float(spec.highest_code)
    if zero is not None:
        # Clipped to what any zero point leaves in range, and then again.
        return jnp.clip(jnp.round(jnp.clip(scaled, low - high, high - low)) + zero, low, high)
    if spec.grid is Grid.ODD:
        if spec.bits == 1:
            return jnp.where(scaled < 0, -1.0, jnp.where(scaled >= 0, 1.0, jnp.nan))
        return 2 * jnp.round(jnp.clip(scaled, low, high) * 0.5 - 0.5) + 1
    if spec.rounding is Rounding.HALF_UP:
        # Engines truncate a positive number; what is clipped beforehand comes out as if clipped afterwards.
        return jnp.floor(jnp.clip(scaled, low - 0.5, high + 0.25) + (0.5 - low)) + low
    scaled = jnp.clip(scaled, low, high)
    if spec.rounding is Rounding.HALF_EVEN:
        return jnp.round(scaled)
    magnitude = jnp.abs(scaled)
    below = jnp.floor(magnitude)
    over = (magnitude - below >= 0.5) if spec.rounding is Rounding.HALF_AWAY else (magnitude - below > 0.5)
    return jnp.copysign(below + over.astype(jnp.float32), scaled)
