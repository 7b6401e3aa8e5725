"""Rounding to the numbers of a grid, and the codes of those.

Compilers may round a product and the sum it goes into once together, which would change bits: they cannot
where the product is clipped in between.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slmjax.formats.bits import as_bits, from_bits
from slmjax.formats.spec import LARGEST, CodeGrid, QuantSpec, Rounding

# Exponents and mantissas of the float grids: mantissa bits, and the smallest normal number.
_FLOATS = {CodeGrid.E2M1: (1, 1.0), CodeGrid.E4M3: (3, 2.0**-6), CodeGrid.E5M2: (2, 2.0**-14)}
_FLOAT8 = {CodeGrid.E4M3: jnp.float8_e4m3fn, CodeGrid.E5M2: jnp.float8_e5m2}
_EXPONENT = 0x7F800000  # the exponent's place in a float32
_ONE_OVER = 0x7F000000  # the bits of 2**-e are these less those of 2**e


def nearest(scaled: Float[Array, "..."], spec: QuantSpec) -> Float[Array, "..."]:
    """The grid's number nearest to each, as float32: of `scaled`, which is x over its scale, without a zero
    point.
    """
    if spec.grid is CodeGrid.INTEGER:
        return _nearest_integer(scaled, spec)
    if spec.grid is CodeGrid.ODD:
        low = float(spec.lowest_code)
        high = float(spec.highest_code)
        if spec.bits == 1:
            return jnp.where(scaled < 0, -1.0, jnp.where(scaled >= 0, 1.0, jnp.nan))
        return 2 * jnp.round(jnp.clip(scaled, low, high) * 0.5 - 0.5) + 1
    return nearest_float(scaled, spec.grid, spec.rounding)


def _nearest_integer(scaled: Array, spec: QuantSpec) -> Array:
    low = float(spec.lowest_code)
    high = float(spec.highest_code)
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


def nearest_to_zero_point(
    scaled: Float[Array, "..."], zero: Float[Array, "..."], spec: QuantSpec
) -> Float[Array, "..."]:
    """The same for an asymmetric format: the code, whose zero point is added once `scaled` is rounded."""
    low = float(spec.lowest_code)
    high = float(spec.highest_code)
    # No zero point brings into range what is clipped first.
    return jnp.clip(jnp.round(jnp.clip(scaled, low - high, high - low)) + zero, low, high)


def nearest_float(
    scaled: Float[Array, "..."], grid: CodeGrid, rounding: Rounding = Rounding.HALF_EVEN
) -> Float[Array, "..."]:
    """The nearest number of a float grid, the largest of it for what is larger; HALF_EVEN or HALF_DOWN, where
    -0 becomes 0.
    """
    mantissa_bits, smallest_normal = _FLOATS[grid]
    scaled = jnp.clip(scaled, -LARGEST[grid], LARGEST[grid])
    # The power of two below the magnitude, by its bits; its neighbours are that far apart, over
    # 2**mantissa_bits.
    exponent = as_bits(jnp.maximum(jnp.abs(scaled), smallest_normal)) & _EXPONENT
    steps = scaled * from_bits(_ONE_OVER - exponent) * 2.0**mantissa_bits
    if rounding is Rounding.HALF_EVEN:
        whole = jnp.round(steps)
    else:
        magnitude = jnp.abs(steps)
        below = jnp.floor(magnitude)
        whole = jnp.where(steps < 0, -1.0, 1.0) * (below + (magnitude - below > 0.5).astype(jnp.float32))
        whole = jnp.where(whole == 0, 0.0, whole)
    return whole * (from_bits(exponent) * 2.0**-mantissa_bits)


def with_mantissa(x: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """The nearest number with so many bits of mantissa, ties to even; the exponent may be any that float32
    has.
    """
    last = 23 - bits
    kept = as_bits(x) + (2 ** (last - 1) - 1) + ((as_bits(x) >> last) & 1) & -(2**last)
    return jnp.where(jnp.isnan(x), x, from_bits(kept))


def codes_of(values: Float[Array, "..."], grid: CodeGrid) -> Int[Array, "..."]:
    """int8 codes of numbers that the grid has: whole numbers themselves, and the bit patterns of floats."""
    if grid in _FLOAT8:
        return jax.lax.bitcast_convert_type(values.astype(_FLOAT8[grid]), jnp.int8)
    if grid is not CodeGrid.E2M1:
        return values.astype(jnp.int8)
    magnitude = jnp.abs(values)
    # From 1 on the last exponent bits and the first of the mantissa count up as the codes do.
    code = jnp.where(magnitude < 1, (2 * magnitude).astype(jnp.int32), (as_bits(magnitude) >> 22) - 252)
    return jnp.where(jnp.signbit(values), code + 8, code).astype(jnp.int8)


def values_of(codes: Int[Array, "..."], grid: CodeGrid) -> Float[Array, "..."]:
    """The inverse of `codes_of`: float32."""
    if grid in _FLOAT8:
        return jax.lax.bitcast_convert_type(codes, _FLOAT8[grid]).astype(jnp.float32)
    if grid is not CodeGrid.E2M1:
        return codes.astype(jnp.float32)
    code = codes.astype(jnp.int32)
    place = code & 7
    magnitude = jnp.where(place < 2, 0.5 * place.astype(jnp.float32), from_bits((place + 252) << 22))
    return jnp.where(code > 7, -magnitude, magnitude)
