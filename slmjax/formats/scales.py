"""Scales and zero points of groups: their computation, and their rounding for storage.

Dims: G groups, S elements of a group; reduced axes stay, with size 1.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.formats.bits import as_bits, from_bits, magnitude_bits
from slmjax.formats.division import divide
from slmjax.formats.rounding import nearest_float, with_mantissa
from slmjax.formats.spec import LARGEST, CodeGrid, QuantSpec, ScaleType, Statistic

_PAIRED_ROUNDS = 4
_LARGEST_FLOAT16 = 65504.0
_INFINITY = 0x7F800000  # the bits of a float32 infinity, which are also the mask of the exponent


def computed_scale(
    groups: Float[Array, "..."], axes: tuple[int, ...], spec: QuantSpec
) -> tuple[Array, Array | None]:
    """Return the scale before it is rounded, and the zero point of an asymmetric format, an integral float32.

    Args:
      groups: float32 [..., G, S, ...].
      axes: the axes that share a scale, that of S last.
      spec: the format.

    Raises:
      ValueError: statistic SIGNED_MAX with PER_TENSOR granularity.
    """
    if spec.statistic is Statistic.MIN_MAX:
        return _affine(groups, axes, spec)
    if spec.statistic is Statistic.SIGNED_MAX:
        statistic = -_signed_max(groups, axes)
    elif spec.statistic is Statistic.FAR_END:
        lowest = jnp.min(groups, axis=axes, keepdims=True)
        highest = jnp.max(groups, axis=axes, keepdims=True)
        statistic = _or_nan(jnp.where(highest > -lowest, -highest, -lowest), groups, axes)
    elif spec.statistic is Statistic.ABSMEAN:
        count = math.prod(groups.shape[i] for i in axes)
        statistic = divide(jnp.sum(jnp.abs(groups), axis=axes, keepdims=True), float(count))
    else:
        statistic = _largest_magnitude(groups, axes)
    return _at_least(divide(statistic, spec.divisor), spec.smallest_scale), None


def _largest_magnitude(groups: Array, axes: tuple[int, ...]) -> Array:
    """Return the largest magnitude, compared by bits: the maximum of floats may drop a NaN, this keeps it."""
    return from_bits(jnp.max(magnitude_bits(groups), axis=axes, keepdims=True))


def _or_nan(statistic: Array, groups: Array, axes: tuple[int, ...]) -> Array:
    """Return the statistic, but NaN for a group with a NaN: minima and maxima of floats may drop it."""
    return jnp.where(jnp.isnan(_largest_magnitude(groups, axes)), jnp.nan, statistic)


def _at_least(scale: Array, smallest: float) -> Array:
    return jnp.where(scale < smallest, smallest, scale) if smallest else scale


def _affine(groups: Array, axes: tuple[int, ...], spec: QuantSpec) -> tuple[Array, Array]:
    """Return scale and zero point of the range from the smallest to the largest value, extended to 0.

    0 must be a level, so that zeros, such as those of padding, stay exactly 0.
    """
    lowest = jnp.minimum(jnp.min(groups, axis=axes, keepdims=True), 0.0)
    highest = jnp.maximum(jnp.max(groups, axis=axes, keepdims=True), 0.0)
    width = _or_nan(highest - lowest, groups, axes)
    scale = _at_least(divide(width, float(spec.highest_code - spec.lowest_code)), spec.smallest_scale)
    return scale, _zero_point(lowest, scale, spec)


def zero_of(groups: Float[Array, "..."], axes: tuple[int, ...], spec: QuantSpec, scale: Array) -> Array:
    """Return the zero point of an asymmetric format for a scale from the caller, an integral float32."""
    return _zero_point(jnp.minimum(jnp.min(groups, axis=axes, keepdims=True), 0.0), scale, spec)


def _zero_point(lowest: Array, scale: Array, spec: QuantSpec) -> Array:
    zero = spec.lowest_code - jnp.round(divide(lowest, jnp.where(scale == 0, 1.0, scale)))
    return jnp.clip(zero, spec.lowest_code, spec.highest_code)


def _signed_max(groups: Array, axes: tuple[int, ...]) -> Array:
    """Return the first value of largest magnitude of each group."""
    *others, axis = axes
    if others:
        raise ValueError(
            "statistic SIGNED_MAX is for groups and channels: choose another one with granularity per_tensor"
        )
    # A few rounds over pairs of neighbours, which keep their order, are several times faster than the
    # custom reduction over all elements.
    for _ in range(_PAIRED_ROUNDS):
        if groups.shape[axis] % 2 or groups.shape[axis] == 2:
            break
        first, second = (jax.lax.slice_in_dim(groups, start, None, 2, axis=axis) for start in (0, 1))
        groups = jnp.where(magnitude_bits(second) > magnitude_bits(first), second, first)
    # The rest is a reduction: XLA does not fuse one into its users, and so computes it once.
    index = jax.lax.broadcasted_iota(jnp.int32, groups.shape, axis)
    start = (jnp.float32(0), jnp.int32(groups.shape[axis]))
    return jnp.expand_dims(jax.lax.reduce((groups, index), start, _larger_or_earlier, (axis,))[0], axis)


def _larger_or_earlier(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return the (value, index) of larger magnitude, of equal ones the one with the smaller index."""
    x, i = first
    y, j = second
    takes_second = (magnitude_bits(y) > magnitude_bits(x)) | (
        (magnitude_bits(y) == magnitude_bits(x)) & (j < i)
    )
    return jnp.where(takes_second, y, x), jnp.where(takes_second, j, i)


def stored_scale(
    scale: Float[Array, "..."], spec: QuantSpec, tensor_scale: Array | None = None
) -> Float[Array, "..."]:
    """Return a scale rounded to the type it is stored in, as float32; infinite if too large for float16.

    In a two-level format the result is the block scale, relative to `tensor_scale`, as it is stored.
    """
    if tensor_scale is not None:
        relative = divide(scale, jnp.where(tensor_scale == 0, 1.0, tensor_scale))
        scale = nearest_float(jnp.maximum(relative, spec.smallest_block_scale), CodeGrid.E4M3)
    if spec.scale_type in (ScaleType.BFLOAT16, ScaleType.BFLOAT16_IN_FLOAT16):
        scale = with_mantissa(scale, 7)
    if spec.scale_type in (ScaleType.FLOAT16, ScaleType.BFLOAT16_IN_FLOAT16):
        # Below the normal values float16 has steps of 2**-24.
        scale = jnp.where(
            jnp.abs(scale) < 2.0**-14, jnp.round(scale * 2.0**24) * 2.0**-24, with_mantissa(scale, 10)
        )
        scale = jnp.where(jnp.abs(scale) > _LARGEST_FLOAT16, jnp.copysign(jnp.inf, scale), scale)
    if spec.scale_type is ScaleType.E8M0:
        bits = as_bits(scale) & _INFINITY
        # The smallest scale, 2**-127, is a subnormal float32, 0x00400000. Values that are not finite become
        # NaN, because E8M0 has no infinity.
        bits = jnp.where(bits == 0, 0x00400000, jnp.where(bits == _INFINITY, _INFINITY + 1, bits))
        scale = from_bits(bits)
    return jnp.where(scale == 0, spec.scale_of_zeros, scale) if spec.scale_of_zeros else scale


def tensor_scale_of(x: Float[Array, "..."], spec: QuantSpec) -> Float[Array, ""]:
    """Return the second scale of a two-level format, which makes the largest block scale the largest E4M3."""
    x = x.astype(jnp.float32)
    return divide(
        _largest_magnitude(x, tuple(range(x.ndim))).reshape(()), LARGEST[CodeGrid.E4M3] * LARGEST[spec.grid]
    )
