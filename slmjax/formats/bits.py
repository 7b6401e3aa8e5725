"""Bit patterns of float32 values."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def as_bits(x: Float[Array, "..."]) -> Int32[Array, "..."]:
    """Return the bits of float32 values."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def from_bits(bits: Int32[Array, "..."]) -> Float[Array, "..."]:
    """Return the float32 values with these bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def magnitude_bits(x: Float[Array, "..."]) -> Int32[Array, "..."]:
    """Return integers in the order of `abs(x)`; those of NaN are above all others."""
    return as_bits(x) & 0x7FFFFFFF
