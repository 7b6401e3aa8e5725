"""Division that gives the same bits everywhere: the float32 nearest to the quotient.

Compilers multiply with the reciprocal of a divisor that is one number, which rounds twice, and make one
division of two: what is written here leaves them nothing to see that by. And on accelerators division itself
may be off by an ulp or two, as it is on NVIDIA GPUs, which moves a number at a tie to another code. There the
quotient is put right by what it leaves over, which is found exactly.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.formats.bits import as_bits, from_bits, magnitude_bits

_LAST = 2.0**-23  # the last bit of a float32 in [1, 2)
_SMALLEST = 2.0**-126  # of the normal numbers
_CORRECTIONS = 2  # of one ulp each
_ONE = 0x3F800000  # as bits


def divided(x: Float[Array, "..."], divisor: Array | float) -> Float[Array, "..."]:
    """`x / divisor`, rounded once; shapes broadcast. Without a gradient: estimators state those."""
    # Both depend on whether `x` is NaN, which changes no result.
    unknown = jnp.isnan(x)
    x, divisor = jnp.broadcast_arrays(x, jnp.where(unknown, jnp.nan, divisor))
    return jnp.where(unknown, x, _quotient(x, divisor))


def reciprocal(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`1 / x`, rounded once; 0 of 0."""
    is_zero = x == 0
    return jnp.where(is_zero, 0.0, _quotient(jnp.ones_like(x), jnp.where(is_zero, 1.0, x)))


def _quotient(x: Array, divisor: Array) -> Array:
    def exact(x: Array, divisor: Array) -> Array:
        return corrected(x / divisor, x, divisor)

    return jax.lax.platform_dependent(x, divisor, cuda=exact, tpu=exact, default=jax.lax.div)


def corrected(
    quotient: Float[Array, "..."], x: Float[Array, "..."], divisor: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`x / divisor`, rounded once, from a quotient that is at most 2 ulp off.

    Only where numbers and quotient are in the range of normal float32: elsewhere it is as given. Every
    product here is of 12 by 12 bits and every difference is a float32, so it does not matter whether a
    compiler fuses the two.
    """
    m = _mantissa(x)
    n = _mantissa(divisor)
    m = jnp.where(m < n, 2 * m, m)  # the quotient of the two is in [1, 2)
    exponent = _exponent(x) - _exponent(divisor) - (_mantissa(x) < n)
    q = jnp.clip(from_bits(magnitude_bits(quotient) - (exponent << 23)), 1.0, 2.0 - _LAST)
    (q_high, q_low) = _halves(q)
    (n_high, n_low) = _halves(n)
    rest = ((m - q_high * n_high) - q_high * n_low - q_low * n_high) - q_low * n_low
    half_a_step = (0.5 * _LAST) * n
    for _ in range(_CORRECTIONS):
        step = jnp.where(rest > half_a_step, _LAST, jnp.where(rest < -half_a_step, -_LAST, 0.0))
        q = q + step
        rest = rest - step * n
    sign = (as_bits(x) ^ as_bits(divisor)) & jnp.int32(-(2**31))
    is_normal = (
        jnp.isfinite(x) & jnp.isfinite(divisor) & (jnp.abs(x) >= _SMALLEST) & (jnp.abs(divisor) >= _SMALLEST)
    )
    is_normal &= (exponent >= -126) & (exponent <= 127)
    return jnp.where(is_normal, from_bits((as_bits(q) + (exponent << 23)) | sign), quotient)


def _mantissa(x: Array) -> Array:
    """In [1, 2)."""
    return from_bits((as_bits(x) & 0x7FFFFF) | _ONE)


def _exponent(x: Array) -> Array:
    return (as_bits(x) >> 23) & 0xFF


def _halves(x: Array) -> tuple[Array, Array]:
    """The first 12 bits and the last 12, whose sum is `x`."""
    high = from_bits(as_bits(x) & ~0xFFF)
    return high, x - high
