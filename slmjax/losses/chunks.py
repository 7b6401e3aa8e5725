"""Sums over tokens in chunks: what every loss on logits builds on.

`chunked_sum` walks over tokens and takes the gradient of a chunk in the same pass that computes its value, so
that the logits of one chunk are all that ever exists.

Dims: N tokens, C tokens of a chunk, D model.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.losses.heads import Head, accumulation_dtype
from slmjax.parallel import communication

# Bytes of one chunk's logits when no chunk size is asked for. Smaller chunks save memory; but each reads and
# writes the gradient of the whole table once, which takes longer than the products themselves when a chunk
# has few tokens.
CHUNK_BYTES = 256 * 2**20
MIN_CHUNK_SIZE = 128

ChunkFn = Callable[[Array, Any, Any, Any], tuple[Array, Any]]


def default_chunk_size(num_tokens: int, vocab_rows: int) -> int:
    """Tokens per chunk whose float32 logits take about `CHUNK_BYTES`; all tokens when they fit into one
    chunk.
    """
    largest = max(MIN_CHUNK_SIZE, CHUNK_BYTES // (4 * vocab_rows))
    if num_tokens <= largest:
        return max(num_tokens, 1)
    # Chunks of equal size, so that the last one is not mostly padding.
    even = math.ceil(num_tokens / math.ceil(num_tokens / largest))
    return math.ceil(even / MIN_CHUNK_SIZE) * MIN_CHUNK_SIZE


def chosen_chunk_size(chunk_size: int | None, hidden: Float[Array, "N D"], head: Head) -> int:
    """The chunk size that was asked for, or the default for these tokens and this table."""
    return default_chunk_size(hidden.shape[0], head.weight.shape[0]) if chunk_size is None else chunk_size


def chunked_sum(
    fn: ChunkFn,
    hidden: Float[Array, "N D"],
    params: Any,
    *,
    tokens: Any,
    constants: Any = (),
    chunk_size: int,
) -> tuple[Float[Array, ""], Any]:
    """`fn` summed over chunks of tokens; gradients of `hidden` and `params` are computed along with the
    value.

    Differentiated, the forward pass computes the gradient chunk by chunk (that of `params` summed in float32)
    and the backward pass only multiplies it by the cotangent. Not differentiated, no gradient is computed.
    The last chunk is filled
    up with zeros: a token whose `tokens` are all zero must add nothing (its weight is 0).

    Args:
      fn: `fn(hidden [C, D], params, tokens, constants) -> (scalar sum, pytree of sums)`. A function of a
        module or a cached one, not one made per call; it may close over no array.
      hidden: the hidden states of all tokens.
      params: pytree of arrays that every chunk uses whole, with a gradient: heads.
      tokens: pytree of arrays [N, ...] that are cut along with `hidden`, without a gradient: targets,
        weights, ...
      constants: pytree of arrays that every chunk uses whole, without a gradient: coefficients, a teacher's
        head.
      chunk_size: tokens per chunk; there is no loop when all tokens fit into one.

    Returns:
      The sum, and the sums of the second results of `fn`, which carry no gradient.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: give at least 1, or None to have it chosen")
    # Each differs between the devices that the other differs between: the gradient of a replicated head is
    # then one sum over devices, after the loop, and so is that of hidden states which several devices
    # multiply with parts of a head.
    parts, structure = jax.tree.flatten(params)
    hidden, *parts = communication.match_varying(hidden, *parts)
    return _chunked_sum(fn, chunk_size, hidden, jax.tree.unflatten(structure, parts), tokens, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_sum(
    fn: ChunkFn, chunk_size: int, hidden: Array, params: Any, tokens: Any, constants: Any
) -> tuple[Array, Any]:
    def step(carry: None, chunk: tuple[Array, Any]) -> tuple[None, Any]:
        return carry, fn(chunk[0], params, chunk[1], constants)

    _, sums = over_chunks(step, None, (hidden, tokens), chunk_size)
    return jax.tree.map(lambda x: x.sum(0), sums)


def _chunked_sum_forward(
    fn: ChunkFn, chunk_size: int, hidden: Array, params: Any, tokens: Any, constants: Any
) -> tuple[tuple[Array, Any], tuple[Array, Any, Any]]:
    # In float32 from here on: `fn` rounds to its own dtype, and gradients arrive in float32 whatever the
    # dtype of params.
    wide = jax.tree.map(lambda p: p.astype(accumulation_dtype(p.dtype)), params)
    value_and_grad = jax.value_and_grad(fn, argnums=(0, 1), has_aux=True)

    def step(params_gradient: Any, chunk: tuple[Array, Any]) -> tuple[Any, Any]:
        sums, (hidden_gradient, gradient) = value_and_grad(chunk[0], wide, chunk[1], constants)
        return jax.tree.map(jnp.add, params_gradient, gradient), (sums, hidden_gradient)

    zeros = jax.tree.map(lambda p: communication.match_varying(jnp.zeros_like(p), p)[0], wide)
    params_gradient, (sums, hidden_gradient) = over_chunks(step, zeros, (hidden, tokens), chunk_size)
    hidden_gradient = hidden_gradient.reshape(-1, *hidden.shape[1:])[: hidden.shape[0]]
    # Scalars of the right dtype stand for params, whose dtypes the backward pass needs and whose values it
    # does not.
    dtypes = jax.tree.map(lambda p: jnp.zeros((), p.dtype), params)
    return jax.tree.map(lambda x: x.sum(0), sums), (hidden_gradient, params_gradient, dtypes)


def _chunked_sum_backward(
    fn: ChunkFn, chunk_size: int, saved: tuple[Array, Any, Any], cotangents: tuple[Array, Any]
) -> tuple[Array, Any, None, None]:
    del fn, chunk_size
    hidden_gradient, params_gradient, dtypes = saved
    cotangent, _ = cotangents
    return (
        (hidden_gradient * cotangent).astype(hidden_gradient.dtype),
        jax.tree.map(
            lambda gradient, like: (gradient * cotangent).astype(like.dtype), params_gradient, dtypes
        ),
        None,
        None,
    )


_chunked_sum.defvjp(_chunked_sum_forward, _chunked_sum_backward)


def weighted_sum(weights: Float[Array, "C"], values: Float[Array, "C"]) -> Float[Array, ""]:
    """Return the sum of weight times value, in the dtype of the values.

    A token of weight 0 adds 0 and gets no gradient whatever its value, also an infinite one: its target may
    be a masked column.
    """
    weights = weights.astype(values.dtype)
    return jnp.sum(weights * jnp.where(weights == 0.0, 0.0, values))


def over_chunks(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, data: Any, chunk_size: int
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `step` over chunks of the leading dim of `data`; results are stacked, also when there
    is one chunk.
    """
    num_tokens = jax.tree.leaves(data)[0].shape[0]
    if num_tokens <= chunk_size:
        carry, result = step(carry, data)
        return carry, jax.tree.map(lambda x: x[None], result)
    num_chunks = math.ceil(num_tokens / chunk_size)

    def cut(x: Array) -> Array:
        padding = ((0, num_chunks * chunk_size - num_tokens),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(num_chunks, chunk_size, *x.shape[1:])

    return jax.lax.scan(step, carry, jax.tree.map(cut, data))
