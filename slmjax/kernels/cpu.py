"""What is particular to CPUs: products in the layouts for which XLA's CPU compiler has a fast routine.

These are rows times columns and rows times rows. The third layout, columns times columns, which every
gradient of a weight has, is slower: in float32 by a quarter, in bfloat16 by more than half, for it is then
computed in float32. So gradients are written out here, and a matrix is transposed first, behind a fence, as
the compiler would fold the transposition into the product. In bfloat16 that costs as much as it saves, so
that the transposition is a product with the identity there, which stays bfloat16 and is exact for finite
values. `benchmarks/train_step.py` measures what it is worth.

Dims: M rows, D in, F out; B batch, T query time, S key time, N heads, K kv heads, G heads per kv head, H head
dim.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from slmjax.parallel import communication

MASKED_SCORE = -1e30  # finite, so that a row without any visible key has finite gradients
TRANSPOSED_COLUMNS = 64  # at a time: the identity is that wide


def product(a: Array, b: Array, contracted: tuple[int, int]) -> Float[Array, "..."]:
    """Float32 product of two matrices, or of two stacks of them, over the contracted dims, counted from the
    end.
    """
    batch = tuple(range(a.ndim - 2))
    dims = ((a.ndim + contracted[0],), (b.ndim + contracted[1],))
    return jax.lax.dot_general(a, b, (dims, (batch, batch)), preferred_element_type=jnp.float32)


def transposed(x: Float[Array, "*B M D"]) -> Float[Array, "*B D M"]:
    """The last two dims exchanged, in memory too; bfloat16 by products with the identity."""
    width = math.gcd(x.shape[-1], TRANSPOSED_COLUMNS)
    if x.dtype != jnp.bfloat16 or width < 16:
        return jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2))
    identity = jnp.broadcast_to(jnp.eye(width, dtype=x.dtype), (*x.shape[:-2], width, width))
    # Slices rather than one product over a dim of slices: that would be copied into another layout first.
    columns = [x[..., start : start + width] for start in range(0, x.shape[-1], width)]
    return jnp.concatenate([product(identity, part, (-1, -1)).astype(x.dtype) for part in columns], axis=-2)


def matmul(x: Float[Array, "M D"], weight: Float[Array, "D F"]) -> Float[Array, "M F"]:
    """`x @ weight` in the dtype of `x` with float32 sums; the gradient of the weight stays float32."""
    return _matmul(*communication.match_varying(x, weight))


@jax.custom_vjp
def _matmul(x: Array, weight: Array) -> Array:
    return product(x, weight.astype(x.dtype), (-1, -2)).astype(x.dtype)


def _matmul_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array, Any]]:
    narrow = weight.astype(x.dtype)
    return product(x, narrow, (-1, -2)).astype(x.dtype), (x, narrow, jnp.zeros((0,), weight.dtype))


def _matmul_backward(saved: tuple[Array, Array, Any], dy: Array) -> tuple[Array, Array]:
    x, narrow, like = saved
    dy = dy.astype(x.dtype)
    return product(dy, narrow, (-1, -1)).astype(x.dtype), product(transposed(x), dy, (-1, -2)).astype(
        like.dtype
    )


_matmul.defvjp(_matmul_forward, _matmul_backward)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Softmax attention under a mask, products in the dtype of `q`; scores, softmax and sums are float32."""
    batch, length, num_heads, head_dim = q.shape
    groups = num_heads // k.shape[2]
    # Heads that share keys and values are rows of one product.
    q_BKGTH = q.reshape(batch, length, -1, groups, head_dim).transpose(0, 2, 3, 1, 4)
    rows = q_BKGTH.reshape(batch, -1, groups * length, head_dim)
    seen = jnp.tile(mask, (1, groups, 1))[:, None]
    out: Array = _attend(
        *communication.match_varying(rows, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)), seen, scale
    )
    return out.reshape(batch, -1, groups, length, head_dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    return _attend_forward(q, k, v, mask, scale)[0]


def _attend_forward(
    q: Array, k: Array, v: Array, mask: Array, scale: float
) -> tuple[Array, tuple[Array, ...]]:
    """q [B K GT H], k and v [B K S H], mask [B 1 GT S]."""
    scores = product(q, k, (-1, -1)) * scale
    seen = jnp.broadcast_to(mask, scores.shape)
    scores = jnp.where(seen, scores, MASKED_SCORE)
    powers = jnp.where(seen, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    weights = (powers / jnp.maximum(jnp.sum(powers, axis=-1, keepdims=True), 1e-30)).astype(q.dtype)
    out = product(weights, v, (-1, -2))
    return out.astype(q.dtype), (q, k, v, weights, out)


def _attend_backward(scale: float, saved: tuple[Array, ...], dout: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, weights, out = saved
    mean = jnp.sum(dout.astype(jnp.float32) * out, axis=-1, keepdims=True)
    dweights = product(dout, v, (-1, -1))
    dscores = (weights.astype(jnp.float32) * (dweights - mean) * scale).astype(q.dtype)
    dq = product(dscores, k, (-1, -2))
    dk = product(transposed(dscores), q, (-1, -2))
    return (
        dq.astype(q.dtype),
        dk.astype(k.dtype),
        product(transposed(weights), dout, (-1, -2)).astype(v.dtype),
        None,
    )


_attend.defvjp(_attend_forward, _attend_backward)


def materialised(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` itself, computed once: the compiler would compute it anew in every fusion that reads it, cosines
    per head and dim.

    A product with the identity is a fence that it does not see through; it is exact for finite values.
    """
    return jax.lax.dot_general(
        x, jnp.eye(x.shape[-1], dtype=x.dtype), (((x.ndim - 1,), (0,)), ((), ())), precision="highest"
    )
