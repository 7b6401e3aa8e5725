"""Sums of a loss over the tokens of a batch: each device takes its shard, and reads it in chunks.

    sharded_sum     batch -> shard: inside `shard_map`, every device sums over its own tokens
    chunked_sum     shard -> chunk: the logits of one chunk are all that exist at a time

A device has the whole table and a part of the tokens, or a part of the table and more tokens
(`Vocabulary`). Tables are gathered once, before the chunks, over the axes that shard their columns, and
their gradients are reduced once, after the chunks.

Dims: B batch, T time, N tokens of a device, C tokens of a chunk, D model, E another model's width, V rows of
the tables.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.losses.heads import UNSHARDED, Head, accumulation_dtype
from slmjax.parallel import communication
from slmjax.parallel.mesh import Dims, current_axis_sizes, num_devices

# Bytes of one chunk's logits when no chunk size is given. Smaller chunks save memory, but every chunk reads
# and writes the gradient of the whole table once, which takes longer than the matrix products themselves
# when a chunk has few tokens.
CHUNK_BYTES = 256 * 2**20
MIN_CHUNK_SIZE = 128

ChunkFn = Callable[[Array, Any, Any, Any], tuple[Array, Any]]


# Batch -> shard ---------------------------------------------------------------------------------------------
class Vocabulary(enum.Enum):
    """How the devices of the tensor axis split the work on the logits."""

    # Each computes all logits of its part of the tokens: the table is sent to it, and its gradient back.
    GATHERED = "gathered"
    # Each computes its part of the logits of all tokens: the gradient of the hidden states is summed.
    SHARDED = "sharded"


def choose_vocabulary(num_tokens: int, table_rows: int) -> Vocabulary:
    """Return the split that sends less: one sends the rows of the table, the other the hidden states.

    Args:
      num_tokens: tokens of the devices that share a table.
      table_rows: rows of the table, each as wide as a hidden state.
    """
    can_shard = table_rows % num_devices("vocab") == 0 and num_devices("vocab") > 1
    return Vocabulary.SHARDED if can_shard and num_tokens < table_rows else Vocabulary.GATHERED


def sharded_sum(
    chunk_fn_for: Callable[[communication.Shards], ChunkFn],
    hidden: Float[Array, "B T D"],
    head: Head,
    *,
    tokens: Any,
    factors: Float[Array, "B T"] | None = None,
    others: tuple[tuple[Array, Head], ...] = (),
    constants: Any = (),
    chunk_size: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[Float[Array, ""], Any]:
    """Return `chunked_sum` over the global batch on the current mesh, the same value on every device.

    Args:
      chunk_fn_for: maps the shards of the vocabulary to the function of a chunk, `fn(hidden [C, D], head,
        (tokens, other_hidden), (constants, other_heads))`, as `chunked_sum` takes it. It must return the
        same function for the same shards.
      hidden: final hidden states, with a gradient; `head` has one too.
      tokens: pytree of arrays [B, T, ...] without a gradient.
      factors: a number for each token, with a gradient; the function of a chunk then gets the pair of
        `hidden [C, D]` and `factors [C, 1]` in place of the former.
      others: final hidden states [B, T, E] and heads of other models, without a gradient.
      constants: pytree of scalars and small arrays.
      chunk_size: tokens of a device per chunk; None gives about 256 MB of logits.
      vocabulary: how the tensor axis splits the work; None for the split that sends less.

    Raises:
      ValueError: the tables do not have the same number of rows.
    """
    own: Any = hidden if factors is None else (hidden, factors[..., None])
    all_hidden = (own, *(other_hidden for other_hidden, _ in others))
    heads = (head, *(other_head for _, other_head in others))
    num_rows = head.weight.shape[0]
    table_rows = [each.weight.shape[0] for each in heads]
    if len(set(table_rows)) > 1:
        raise ValueError(f"tables of {table_rows} rows: all must have the same number, see losses.fit_rows")
    if math.prod(current_axis_sizes().values()) == 1:
        chunk_fn = chunk_fn_for(UNSHARDED)
        return _device_sum(chunk_fn, all_hidden, heads, tokens, constants, chunk_size)

    batch_size, length = hidden.shape[:2]
    if vocabulary is None:
        num_tokens = batch_size * length // (num_devices("batch") * num_devices("time"))
        vocabulary = choose_vocabulary(num_tokens, num_rows)
    is_gathered = vocabulary is Vocabulary.GATHERED
    # With a gathered table the tensor axis shards the tokens further; with a sharded one, its devices have
    # the same tokens.
    token_dim, bias_dim = ("tokens", None) if is_gathered else ("time", "vocab")

    def on_device(
        all_hidden: tuple[Any, ...], tables: tuple[Array, ...], biases: Any, tokens: Any, constants: Any
    ) -> Any:
        gathered = [communication.gathered_table(table, replicated=is_gathered) for table in tables]
        shards = gathered[0][1]
        local_heads = tuple(
            dataclasses.replace(each, weight=table, bias=bias)
            for each, (table, _), bias in zip(heads, gathered, biases, strict=True)
        )
        # The gradient of a replicated head is then one sum over devices, after the loop over chunks, and so
        # is that of hidden states which several devices multiply with their parts of a head.
        states = all_hidden[0] if factors is None else all_hidden[0][0]
        leaves, structure = jax.tree.flatten((states, local_heads[0]))
        own_hidden, own_head = jax.tree.unflatten(structure, communication.match_varying(*leaves))
        if factors is not None:
            # Their gradient is the loss of a token, which devices with the same tokens have in full.
            own_hidden = (own_hidden, all_hidden[0][1])
        sums = _device_sum(
            chunk_fn_for(shards),
            (own_hidden, *all_hidden[1:]),
            (own_head, *local_heads[1:]),
            tokens,
            constants,
            chunk_size,
        )
        # The one reduction of the values: over the devices that have different tokens.
        return communication.sum_over(sums, "batch", token_dim)

    table_dims = _table_dims(num_rows, batch_size=batch_size, length=length, is_gathered=is_gathered)
    in_dims = (("batch", token_dim, None), table_dims, (bias_dim,), ("batch", token_dim), ())
    weights = tuple(each.weight for each in heads)
    biases = tuple(each.bias for each in heads)
    run = communication.shard_mapped(on_device, in_dims=in_dims, out_dims=())
    return run(all_hidden, weights, biases, tokens, constants)


def _table_dims(num_rows: int, *, batch_size: int, length: int, is_gathered: bool) -> Dims:
    dims = communication.table_dims(num_rows, batch_size=batch_size)
    if is_gathered and (dims == ("vocab", None) or length % num_devices("tokens")):
        # Devices with the same tokens must have the same table: one that each of them has gathered counts
        # as different to the tracer.
        return (None, dims[1])
    return dims


def _device_sum(
    chunk_fn: ChunkFn,
    all_hidden: tuple[Any, ...],
    heads: tuple[Head, ...],
    tokens: Any,
    constants: Any,
    chunk_size: int | None,
) -> tuple[Float[Array, ""], Any]:
    """Return `chunked_sum` over the tokens [B, T] of one device; the first model has a gradient."""
    flat_hidden, flat_tokens = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (all_hidden, tokens))
    if chunk_size is None:
        num_tokens = jax.tree.leaves(flat_hidden)[0].shape[0]
        chunk_size = default_chunk_size(num_tokens, heads[0].weight.shape[0])
    return chunked_sum(
        chunk_fn,
        flat_hidden[0],
        heads[0],
        tokens=(flat_tokens, flat_hidden[1:]),
        constants=(constants, heads[1:]),
        chunk_size=chunk_size,
    )


# Shard -> chunk ---------------------------------------------------------------------------------------------
def default_chunk_size(num_tokens: int, vocab_rows: int) -> int:
    """Return tokens per chunk for `CHUNK_BYTES` of float32 logits; all tokens if they fit in one chunk."""
    largest = max(MIN_CHUNK_SIZE, CHUNK_BYTES // (4 * vocab_rows))
    if num_tokens <= largest:
        return max(num_tokens, 1)
    # Chunks of equal size, so that the last one is not mostly padding.
    even = math.ceil(num_tokens / math.ceil(num_tokens / largest))
    return math.ceil(even / MIN_CHUNK_SIZE) * MIN_CHUNK_SIZE


def chunked_sum(
    fn: ChunkFn,
    hidden: Any,
    params: Any,
    *,
    tokens: Any,
    constants: Any = (),
    chunk_size: int,
) -> tuple[Float[Array, ""], Any]:
    """Return the sum of `fn` over chunks of tokens, with the gradient of each chunk taken along the way.

    Under differentiation the forward pass computes the gradient chunk by chunk (that of `params` is summed
    in float32) and the backward pass only multiplies it by the cotangent: no logits are saved or computed
    again. Without differentiation no gradient is computed. The last chunk is padded with zeros: a token
    whose `tokens` are all zero must add nothing (its weight is 0).

    Args:
      fn: `fn(hidden [C, D], params, tokens, constants) -> (scalar sum, pytree of sums)`. It must be the same
        function in every call, and may not close over an array.
      hidden: the hidden states [N, D] of all tokens, or a pytree of arrays [N, ...], with a gradient.
      params: pytree of arrays that every chunk uses in full, with a gradient: heads.
      tokens: pytree of arrays [N, ...] that are cut along with `hidden`, without a gradient: targets,
        weights.
      constants: pytree of arrays that every chunk uses in full, without a gradient: coefficients, a
        teacher's head.
      chunk_size: tokens per chunk; there is no loop when all tokens fit into one.

    Returns:
      The sum, and the sums of the second results of `fn`, which carry no gradient.

    Raises:
      ValueError: the chunk size is below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: give at least 1, or None to have it chosen")
    return _chunked_sum(fn, chunk_size, hidden, params, tokens, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_sum(
    fn: ChunkFn, chunk_size: int, hidden: Any, params: Any, tokens: Any, constants: Any
) -> tuple[Array, Any]:
    def step(carry: None, chunk: tuple[Any, Any]) -> tuple[None, Any]:
        return carry, fn(chunk[0], params, chunk[1], constants)

    _, sums = _scan_chunks(step, None, (hidden, tokens), chunk_size)
    return jax.tree.map(lambda x: x.sum(0), sums)


def _chunked_sum_forward(
    fn: ChunkFn, chunk_size: int, hidden: Any, params: Any, tokens: Any, constants: Any
) -> tuple[tuple[Array, Any], tuple[Any, Any, Any]]:
    # In float32 from here on: `fn` casts to its own dtype, and gradients arrive in float32 whatever the dtype
    # of `params`. A sum of many chunks in bfloat16 would stop growing.
    params32 = jax.tree.map(lambda p: p.astype(accumulation_dtype(p.dtype)), params)
    value_and_grad = jax.value_and_grad(fn, argnums=(0, 1), has_aux=True)

    def step(params_gradient: Any, chunk: tuple[Any, Any]) -> tuple[Any, Any]:
        sums, (hidden_gradient, gradient) = value_and_grad(chunk[0], params32, chunk[1], constants)
        return jax.tree.map(jnp.add, params_gradient, gradient), (sums, hidden_gradient)

    zeros = jax.tree.map(jnp.zeros_like, params32)
    params_gradient, (sums, hidden_gradient) = _scan_chunks(step, zeros, (hidden, tokens), chunk_size)
    # Without the padding of the last chunk.
    hidden_gradient = jax.tree.map(
        lambda gradient, like: gradient.reshape(-1, *like.shape[1:])[: like.shape[0]], hidden_gradient, hidden
    )
    # The backward pass needs the dtypes of `params` but not their values: scalars carry them.
    dtypes = jax.tree.map(lambda p: jnp.zeros((), p.dtype), params)
    return jax.tree.map(lambda x: x.sum(0), sums), (hidden_gradient, params_gradient, dtypes)


def _chunked_sum_backward(
    fn: ChunkFn, chunk_size: int, saved: tuple[Any, Any, Any], cotangents: tuple[Array, Any]
) -> tuple[Any, Any, None, None]:
    del fn, chunk_size
    hidden_gradient, params_gradient, dtypes = saved
    cotangent, _ = cotangents
    params_gradient = jax.tree.map(
        lambda gradient, like: (gradient * cotangent).astype(like.dtype), params_gradient, dtypes
    )
    hidden_gradient = jax.tree.map(
        lambda gradient: (gradient * cotangent).astype(gradient.dtype), hidden_gradient
    )
    return hidden_gradient, params_gradient, None, None


_chunked_sum.defvjp(_chunked_sum_forward, _chunked_sum_backward)


def _scan_chunks(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, data: Any, chunk_size: int
) -> tuple[Any, Any]:
    """Scan over chunks of the leading dim of `data`; the result of a single chunk is stacked too."""
    num_tokens = jax.tree.leaves(data)[0].shape[0]
    if num_tokens <= chunk_size:
        carry, result = step(carry, data)
        return carry, jax.tree.map(lambda x: x[None], result)
    num_chunks = math.ceil(num_tokens / chunk_size)

    def cut(x: Array) -> Array:
        padding = ((0, num_chunks * chunk_size - num_tokens),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(num_chunks, chunk_size, *x.shape[1:])

    return jax.lax.scan(step, carry, jax.tree.map(cut, data))


def weighted_sum(weights: Float[Array, "C"], values: Float[Array, "C"]) -> Float[Array, ""]:
    """Return the sum of weight times value, in the dtype of the values.

    A token of weight 0 adds 0 and gets no gradient whatever its value, also an infinite one: its target may
    be a masked column.
    """
    weights = weights.astype(values.dtype)
    # Before the product: 0 times infinity is NaN, in the gradient as well.
    return jnp.sum(weights * jnp.where(weights == 0.0, 0.0, values))
