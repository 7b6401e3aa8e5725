"""float32 numbers as their bits, and back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def as_bits(x: Float[Array, "..."]) -> Int32[Array, "..."]:
    """The bits of float32 numbers."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def from_bits(bits: Int32[Array, "..."]) -> Float[Array, "..."]:
    """The float32 numbers that have these bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def magnitude_bits(x: Float[Array, "..."]) -> Int32[Array, "..."]:
    """Integers in the order of `abs(x)`; those of NaN are above all."""
    return as_bits(x) & 0x7FFFFFFF
