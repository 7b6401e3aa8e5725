"""Division that gives the same bits on every platform: the float32 nearest to the quotient.

Compilers replace the division by a scalar with a product with its reciprocal, which rounds twice, and merge
two divisions into one; the code here hides from them that they could. On accelerators division itself may be
off by an ulp or two, as on NVIDIA GPUs, which moves a value at a tie to another code. There the quotient is
corrected by its remainder, which is computed exactly.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.formats.bits import as_bits, from_bits, magnitude_bits

_LAST = 2.0**-23  # the last bit of a float32 in [1, 2)
_SMALLEST = 2.0**-126  # the smallest normal float32
_CORRECTIONS = 2  # of one ulp each
_ONE = 0x3F800000  # the bits of 1.0


def divide(x: Float[Array, "..."], divisor: Array | float) -> Float[Array, "..."]:
    """Return `x / divisor`, rounded once; shapes broadcast. It has no gradient: estimators define theirs."""
    # The divisor is made to depend on `x`, which changes no result: the compiler no longer sees a scalar.
    is_nan = jnp.isnan(x)
    x, divisor = jnp.broadcast_arrays(x, jnp.where(is_nan, jnp.nan, divisor))
    return jnp.where(is_nan, x, _quotient(x, divisor))


def reciprocal(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `1 / x`, rounded once, and 0 for 0: a group of zeros has the scale 0."""
    is_zero = x == 0
    return jnp.where(is_zero, 0.0, _quotient(jnp.ones_like(x), jnp.where(is_zero, 1.0, x)))


def _quotient(x: Array, divisor: Array) -> Array:
    def exact(x: Array, divisor: Array) -> Array:
        return corrected_quotient(x / divisor, x, divisor)

    return jax.lax.platform_dependent(x, divisor, cuda=exact, tpu=exact, default=jax.lax.div)


def corrected_quotient(
    quotient: Float[Array, "..."], x: Float[Array, "..."], divisor: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Return `x / divisor`, rounded once, from a quotient that is at most 2 ulp off.

    Where the operands or the quotient are not normal float32 values, the quotient is returned as it is. Every
    product here is of 12 by 12 bits, and every difference is exactly a float32, so it does not matter whether
    a compiler fuses them into one operation.
    """
    # Reduce to mantissas m and n with a quotient q in [1, 2); powers of two are exact.
    m = _mantissa(x)
    n = _mantissa(divisor)
    m = jnp.where(m < n, 2 * m, m)
    exponent = _exponent(x) - _exponent(divisor) - (_mantissa(x) < n)
    q = jnp.clip(from_bits(magnitude_bits(quotient) - (exponent << 23)), 1.0, 2.0 - _LAST)
    # The remainder m - q * n, by halves whose products are exact (Dekker 1971).
    q_high, q_low = _halves(q)
    n_high, n_low = _halves(n)
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
    """Return the mantissa, in [1, 2)."""
    return from_bits((as_bits(x) & 0x7FFFFF) | _ONE)


def _exponent(x: Array) -> Array:
    return (as_bits(x) >> 23) & 0xFF


def _halves(x: Array) -> tuple[Array, Array]:
    """Split into the first 12 bits of the mantissa and the last 12; the sum is `x`."""
    high = from_bits(as_bits(x) & ~0xFFF)
    return high, x - high
