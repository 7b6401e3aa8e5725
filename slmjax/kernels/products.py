"""Matrix products by platform, and the number of layers to unroll.

On CPU, XLA has a fast routine for rows times columns and for rows times rows. The third layout, columns times
columns, which the gradient of every weight has, is slower: by a quarter in float32, and by more than half in
bfloat16, which is then computed in float32. So on CPU gradients are hand-written, and one matrix is
transposed first. An optimization barrier keeps the compiler from folding the transposition back into the
product. In bfloat16 the barrier costs as much as it saves; there the transposition is a product with the
identity, which stays in bfloat16 and is exact for finite values. `benchmarks/train_step.py` measures the
gain.

Dims: M rows, D in, F out.
"""

import functools
import logging
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.parallel import communication, mesh

MAX_UNROLLED_LAYERS = {"cpu": 8, "gpu": 32}
TRANSPOSED_COLUMNS = 64  # columns per product with the identity

logger = logging.getLogger("slmjax.kernels")


# The choice of an implementation ----------------------------------------------------------------------------
@functools.cache
def log_choice(message: str) -> None:
    """Log which implementation was chosen, once for each message."""
    logger.debug(message)


def allows_fused() -> bool:
    """Return whether fused kernels may be chosen: unless SLMJAX_FUSED is off."""
    return os.environ.get("SLMJAX_FUSED", "on") != "off"


def unrolled_repeats(num_repeats: int, *, num_blocks: int) -> int:
    """Return how many repeats of a layer group of `num_blocks` blocks the program unrolls at a time.

    On CPU and GPU a loop copies weights, gradients and saved activations in and out of stacked arrays.
    Unrolling spares a shallow stack these copies; a deep one would take long to compile (on an H200 about a
    second for each layer, of which a step saves one millisecond).
    """
    return num_repeats if num_repeats * num_blocks <= MAX_UNROLLED_LAYERS.get(mesh.platform(), 0) else 1


# Products on any platform -----------------------------------------------------------------------------------
def matmul(x: Float[Array, "*B D"], weight: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """Return `x @ weight` in the dtype of `x`, to which the weight is cast.

    The implementation for CPUs sums in float32; otherwise `jnp.dot` decides.
    """
    # The CPU implementation merges all leading dims, for a faster gradient. If two of them are sharded,
    # merging would make the compiler gather the array, so sharded sequences take the plain product.
    if mesh.platform() == "cpu" and x.dtype in (jnp.bfloat16, jnp.float32) and mesh.num_devices("time") == 1:
        log_choice("products on cpu: hand-written gradients")
        rows = x.reshape(-1, x.shape[-1])
        return _matmul(*communication.match_varying(rows, weight)).reshape(*x.shape[:-1], -1)
    return jnp.dot(x, weight.astype(x.dtype))


def outer_sum(a: Float[Array, "M D"], b: Float[Array, "M F"]) -> Float[Array, "D F"]:
    """Return the sum over rows of the outer products of `a` and `b`, in float32: the gradient of a weight."""
    sum_dtype = jnp.promote_types(a.dtype, jnp.float32)
    if mesh.platform() == "cpu":
        return jax.lax.dot_general(
            transposed(a), b, (((1,), (0,)), ((), ())), preferred_element_type=sum_dtype
        )
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=sum_dtype)


def materialised(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `x`, computed once: on CPU the compiler would recompute it in every fusion that reads it.

    A product with the identity is a barrier that fusion does not cross; it is exact for finite values.
    """
    if mesh.platform() != "cpu":
        return x
    identity = jnp.eye(x.shape[-1], dtype=x.dtype)
    return jax.lax.dot_general(x, identity, (((x.ndim - 1,), (0,)), ((), ())), precision="highest")


# The implementation for CPUs --------------------------------------------------------------------------------
def product(a: Array, b: Array, contracted: tuple[int, int]) -> Float[Array, "..."]:
    """Return the float32 product of two matrices, or of two stacks of matrices.

    Args:
      contracted: the dim of `a` and the dim of `b` to contract, counted from the end: -1 or -2.
    """
    batch = tuple(range(a.ndim - 2))
    dims = ((a.ndim + contracted[0],), (b.ndim + contracted[1],))
    return jax.lax.dot_general(a, b, (dims, (batch, batch)), preferred_element_type=jnp.float32)


def transposed(x: Float[Array, "*B M D"]) -> Float[Array, "*B D M"]:
    """Return `x` with the last two dims exchanged in memory too; bfloat16 by products with the identity."""
    width = math.gcd(x.shape[-1], TRANSPOSED_COLUMNS)
    if x.dtype != jnp.bfloat16 or width < 16:
        return jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2))
    identity = jnp.broadcast_to(jnp.eye(width, dtype=x.dtype), (*x.shape[:-2], width, width))
    # Slices, not one product over a reshaped dim of slices: XLA would copy that into another layout first.
    columns = [x[..., start : start + width] for start in range(0, x.shape[-1], width)]
    return jnp.concatenate([product(identity, part, (-1, -1)).astype(x.dtype) for part in columns], axis=-2)


@jax.custom_vjp
def _matmul(x: Array, weight: Array) -> Array:
    return product(x, weight.astype(x.dtype), (-1, -2)).astype(x.dtype)


def _matmul_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array, Any]]:
    cast_weight = weight.astype(x.dtype)
    # The empty array carries the dtype of the weight to the backward pass.
    return product(x, cast_weight, (-1, -2)).astype(x.dtype), (x, cast_weight, jnp.zeros((0,), weight.dtype))


def _matmul_backward(saved: tuple[Array, Array, Any], dy: Array) -> tuple[Array, Array]:
    x, cast_weight, like = saved
    dy = dy.astype(x.dtype)
    dx = product(dy, cast_weight, (-1, -1)).astype(x.dtype)
    # A float32 weight gets a float32 gradient, never rounded to the dtype of the activations.
    dweight = product(transposed(x), dy, (-1, -2)).astype(like.dtype)
    return dx, dweight


_matmul.defvjp(_matmul_forward, _matmul_backward)
