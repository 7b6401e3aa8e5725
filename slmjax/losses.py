"""Losses on final hidden states and a `Head`: chunked over tokens, masked, sharded; no [B, T, V] array exists.

    loss_sum, metrics = cross_entropy(hidden, head, targets, weights, z_loss=1e-4)          # tokens in one dim
    loss_sum, metrics = sharded_cross_entropy(hidden, head, targets, weights, z_loss=1e-4)  # [B, T], any mesh

On a mesh each device walks over its own tokens with the whole table, or over those of its group with its part of the table: that
by which less is sent is chosen. Everything returned is a sum; the caller divides by global counts. `chunked_sum` is what any further
loss on logits builds on: it walks over tokens in chunks and takes the gradient of a chunk in the same pass that computes its value,
so the logits of one chunk are all that ever exists. Matrix products run in the dtype of the hidden states and give float32 (float64 for
float64); soft-cap, softmax and sums are float32.

Dims: B batch, T time, N tokens, C tokens of a chunk, D model, V rows of the table (padding included); `*B` any leading dims.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slmjax import kernels, sharding

# Logits of the padding columns: finite, so that no product with a zero probability is NaN.
PADDING_LOGIT = -1e30
# Bytes of one chunk's logits when no chunk size is asked for. Smaller chunks save memory; but each reads and writes the
# gradient of the whole table once, which takes longer than the products themselves when a chunk has few tokens.
CHUNK_BYTES = 64 * 2**20
MIN_CHUNK_SIZE = 128

Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """What turns hidden states into logits: `softcap(scale * (hidden @ weight.T + bias))` on the first `vocab_size` rows.

    The arrays are typed `Any` because a Head is a pytree: it may hold shapes, shardings or gradients of another form.
    """

    weight: Any  # Float[Array, "V D"]
    bias: Any = None  # Float[Array, "V"] or None
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})  # cap * tanh(x / cap)
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    vocab_size: int = dataclasses.field(metadata={"static": True})  # real rows of the table; those after them are padding


def logits(hidden: Float[Array, "*B D"], head: Head) -> Float[Array, "*B V"]:
    """Logits in float32 over every row of the table; padding columns are `PADDING_LOGIT`, and no gradient goes there."""
    return _local_logits(hidden, head, sharding.Shards())


def _local_logits(hidden: Array, head: Head, shards: sharding.Shards) -> Array:
    """Logits over the shard of the table that a device holds."""
    num_rows = head.weight.shape[0] * shards.count
    assert 0 < head.vocab_size <= num_rows, f"a head of {num_rows} rows has no {head.vocab_size} real ones"
    x = _project(hidden, head.weight)
    if head.bias is not None:
        x = x + jnp.broadcast_to(head.bias.astype(x.dtype), x.shape)
    if head.scale != 1.0:
        x = x * head.scale
    if head.softcap is not None:
        x = head.softcap * jnp.tanh(x / head.softcap)
    return jnp.where(_columns(x, shards) < head.vocab_size, x, PADDING_LOGIT) if head.vocab_size < num_rows else x


def _columns(x: Array, shards: sharding.Shards) -> Array:
    """The row of the whole table that each logit belongs to."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) + shards.index() * x.shape[-1]


def _accumulation_dtype(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


@jax.custom_vjp
def _project(hidden: Array, weight: Array) -> Array:
    """hidden [*B, D] times weight [V, D] transposed, in the dtype of `hidden` with float32 sums and result.

    The gradient is written out because the derived one multiplies a float32 cotangent with bfloat16 operands, that is, in
    float32, and rounds the gradient of the table to bfloat16 in every chunk.
    """
    dims = (((hidden.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(hidden, weight.astype(hidden.dtype), dims, preferred_element_type=_accumulation_dtype(hidden.dtype))


def _project_forward(hidden: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _project(hidden, weight), (hidden, weight)


def _project_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    hidden, weight = saved
    cotangent = cotangent.astype(hidden.dtype)
    product = functools.partial(jax.lax.dot_general, preferred_element_type=_accumulation_dtype(hidden.dtype))
    hidden_gradient = product(cotangent, weight.astype(hidden.dtype), (((cotangent.ndim - 1,), (0,)), ((), ())))
    weight_gradient = kernels.outer_sum(cotangent.reshape(-1, cotangent.shape[-1]), hidden.reshape(-1, hidden.shape[-1]))
    return hidden_gradient.astype(hidden.dtype), weight_gradient.astype(weight.dtype)


_project.defvjp(_project_forward, _project_backward)


# Sums over tokens in chunks -------------------------------------------------------------------------------------------
ChunkFn = Callable[[Array, Any, Any, Any], tuple[Array, Any]]


def default_chunk_size(num_tokens: int, vocab_rows: int) -> int:
    """Tokens per chunk whose float32 logits take about `CHUNK_BYTES`; all tokens when they fit into one chunk."""
    largest = max(MIN_CHUNK_SIZE, CHUNK_BYTES // (4 * vocab_rows))
    if num_tokens <= largest:
        return max(num_tokens, 1)
    # Chunks of equal size, so that the last one is not mostly padding.
    even = math.ceil(num_tokens / math.ceil(num_tokens / largest))
    return math.ceil(even / MIN_CHUNK_SIZE) * MIN_CHUNK_SIZE


def chunked_sum(
    fn: ChunkFn, hidden: Float[Array, "N D"], params: Any, *, tokens: Any, constants: Any = (), chunk_size: int
) -> tuple[Float[Array, ""], Any]:
    """`fn` summed over chunks of tokens; gradients of `hidden` and `params` are computed along with the value.

    Differentiated, the forward pass computes the gradient chunk by chunk (that of `params` summed in float32) and the
    backward pass only multiplies it by the cotangent. Not differentiated, no gradient is computed. The last chunk is filled
    up with zeros: a token whose `tokens` are all zero must add nothing (its weight is 0).

    Args:
      fn: `fn(hidden [C, D], params, tokens, constants) -> (scalar sum, pytree of sums)`. A function of a module or a cached
        one, not one made per call; it may close over no array.
      hidden: the hidden states of all tokens.
      params: pytree of arrays that every chunk uses whole, with a gradient: heads.
      tokens: pytree of arrays [N, ...] that are cut along with `hidden`, without a gradient: targets, weights, ...
      constants: pytree of arrays that every chunk uses whole, without a gradient: coefficients, a teacher's head.
      chunk_size: tokens per chunk; there is no loop when all tokens fit into one.

    Returns:
      The sum, and the sums of the second results of `fn`, which carry no gradient.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: give at least 1, or None to have it chosen")
    # Each differs between the devices that the other differs between: the gradient of a replicated head is then one sum over
    # devices, after the loop, and so is that of hidden states which several devices multiply with parts of a head.
    parts, structure = jax.tree.flatten(params)
    hidden, *parts = sharding.alike(hidden, *parts)
    return _chunked_sum(fn, chunk_size, hidden, jax.tree.unflatten(structure, parts), tokens, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_sum(fn: ChunkFn, chunk_size: int, hidden: Array, params: Any, tokens: Any, constants: Any) -> tuple[Array, Any]:
    def step(carry: None, chunk: tuple[Array, Any]) -> tuple[None, Any]:
        return carry, fn(chunk[0], params, chunk[1], constants)

    _, sums = _over_chunks(step, None, (hidden, tokens), chunk_size)
    return jax.tree.map(lambda x: x.sum(0), sums)


def _chunked_sum_forward(
    fn: ChunkFn, chunk_size: int, hidden: Array, params: Any, tokens: Any, constants: Any
) -> tuple[tuple[Array, Any], tuple[Array, Any, Any]]:
    # In float32 from here on: `fn` rounds to its own dtype, and gradients arrive in float32 whatever the dtype of params.
    wide = jax.tree.map(lambda p: p.astype(_accumulation_dtype(p.dtype)), params)
    value_and_grad = jax.value_and_grad(fn, argnums=(0, 1), has_aux=True)

    def step(params_gradient: Any, chunk: tuple[Array, Any]) -> tuple[Any, Any]:
        sums, (hidden_gradient, gradient) = value_and_grad(chunk[0], wide, chunk[1], constants)
        return jax.tree.map(jnp.add, params_gradient, gradient), (sums, hidden_gradient)

    zeros = jax.tree.map(lambda p: sharding.alike(jnp.zeros_like(p), p)[0], wide)
    params_gradient, (sums, hidden_gradient) = _over_chunks(step, zeros, (hidden, tokens), chunk_size)
    hidden_gradient = hidden_gradient.reshape(-1, *hidden.shape[1:])[: hidden.shape[0]]
    # Scalars of the right dtype stand for params, whose dtypes the backward pass needs and whose values it does not.
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
        jax.tree.map(lambda gradient, like: (gradient * cotangent).astype(like.dtype), params_gradient, dtypes),
        None,
        None,
    )


_chunked_sum.defvjp(_chunked_sum_forward, _chunked_sum_backward)


def _over_chunks(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, data: Any, chunk_size: int) -> tuple[Any, Any]:
    """`jax.lax.scan` of `step` over chunks of the leading dim of `data`; results are stacked, also when there is one chunk."""
    num_tokens = jax.tree.leaves(data)[0].shape[0]
    if num_tokens <= chunk_size:
        carry, result = step(carry, data)
        return carry, jax.tree.map(lambda x: x[None], result)
    num_chunks = math.ceil(num_tokens / chunk_size)

    def cut(x: Array) -> Array:
        padding = ((0, num_chunks * chunk_size - num_tokens),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(num_chunks, chunk_size, *x.shape[1:])

    return jax.lax.scan(step, carry, jax.tree.map(cut, data))


# Cross entropy --------------------------------------------------------------------------------------------------------
def cross_entropy(
    hidden: Float[Array, "N D"],
    head: Head,
    targets: Int[Array, "N"],
    weights: Float[Array, "N"],
    *,
    z_loss: float | Float[Array, ""] = 0.0,
    chunk_size: int | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Sum over tokens of `weight * (nll + z_loss * logsumexp(logits)**2)`, in nats, in chunks of tokens.

    Args:
      hidden: final hidden states; their dtype is that of the matrix products.
      head: the head; its gradient is summed in float32.
      targets: ids below `head.vocab_size`.
      weights: the loss mask, or any weights; no gradient goes through them.
      z_loss: coefficient that keeps the softmax normaliser near 1 (PaLM, https://arxiv.org/abs/2204.02311, section 5).
      chunk_size: tokens per chunk; None gives about 64 MB of logits.

    Returns:
      The sum, and weighted sums without a gradient: `nll`, `z` (squared logsumexp, without its coefficient) and `correct`
      (whether no logit is larger than the target's, so that equal ones count).
    """
    return _chunked_cross_entropy(hidden, head, targets, weights, z_loss=z_loss, chunk_size=chunk_size, shards=sharding.Shards())


def _chunked_cross_entropy(
    hidden: Array,
    head: Head,
    targets: Array,
    weights: Array,
    *,
    z_loss: float | Array,
    chunk_size: int | None,
    shards: sharding.Shards,
) -> tuple[Array, Metrics]:
    """`cross_entropy`, with a table of which each of some devices holds a part."""
    if chunk_size is None:
        chunk_size = default_chunk_size(hidden.shape[0], head.weight.shape[0])
    coefficient = jnp.asarray(z_loss, _accumulation_dtype(hidden.dtype))
    terms = _cross_entropy_terms(shards)
    return chunked_sum(terms, hidden, head, tokens=(targets, weights), constants=coefficient, chunk_size=chunk_size)


@functools.cache
def _cross_entropy_terms(shards: sharding.Shards) -> ChunkFn:
    """The terms of `cross_entropy` over the table that is divided into these shards; of each there is one function."""

    def terms(hidden: Array, head: Head, tokens: tuple[Array, Array], z_loss: Array) -> tuple[Float[Array, ""], Metrics]:
        targets, weights = tokens
        logits_CV = _local_logits(hidden, head, shards)
        largest = shards.max(jnp.max(logits_CV, axis=-1))
        normaliser = largest + jnp.log(shards.sum(jnp.sum(jnp.exp(logits_CV - largest[:, None]), axis=-1)))
        # A masked sum instead of a gather: its gradient is elementwise and not a scatter into [C, V].
        is_target = _columns(logits_CV, shards) == targets[:, None]
        target_logit = shards.sum(jnp.sum(jnp.where(is_target, logits_CV, 0.0), axis=-1))
        nll, z = normaliser - target_logit, jnp.square(normaliser)
        # Against the maximum, which is there: argmax would be another pass over all logits, and a slow one on CPU.
        correct = (target_logit >= largest).astype(nll.dtype)
        weights = weights.astype(nll.dtype)
        metrics = {"nll": nll, "z": z, "correct": correct}
        metrics = {name: jax.lax.stop_gradient(jnp.sum(weights * value)) for name, value in metrics.items()}
        return jnp.sum(weights * (nll + z_loss * z)), metrics

    return terms


class Vocabulary(enum.Enum):
    """What a device of the tensor axis does of a group's logits."""

    GATHERED = "gathered"  # all logits of its part of the tokens: the whole table is sent to it, and its gradient back
    DIVIDED = "divided"  # its part of the logits of all tokens: the gradient of the hidden states is summed over devices


def choose_vocabulary(num_tokens: int, table_rows: int) -> Vocabulary:
    """The way in which less is sent: rows as wide as hidden states are, of which one way sends the table's and the other the tokens'.

    Args:
      num_tokens: tokens of the devices that share a table.
      table_rows: rows of the table.
    """
    divides = table_rows % sharding.num_devices("vocab") == 0 and sharding.num_devices("vocab") > 1
    return Vocabulary.DIVIDED if divides and num_tokens < table_rows else Vocabulary.GATHERED


def sharded_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    z_loss: float | Float[Array, ""] = 0.0,
    chunk_size: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`cross_entropy` of a whole batch on the current mesh: every device walks over the tokens it holds.

    The table is gathered once, before the loop, over the axes that its columns are divided over, and its gradient is reduced
    once, after it. `chunk_size` counts a device's own tokens. The sums are over the global batch, the same on every device.

    Args:
      vocabulary: how the devices of the tensor axis share the work; None for what is sent less (`choose_vocabulary`).
    """
    if vocabulary is None:
        tokens_here = targets.size // (sharding.num_devices("batch") * sharding.num_devices("time"))
        vocabulary = choose_vocabulary(tokens_here, head.weight.shape[0])
    is_whole = vocabulary is Vocabulary.GATHERED
    tokens, bias_rows = ("tokens", None) if is_whole else ("time", "vocab")

    def on_device(hidden: Array, weight: Array, bias: Array | None, *tokens_and_z: Array) -> tuple[Array, Metrics]:
        targets, weights, coefficient = tokens_and_z
        weight, shards = sharding.gathered_table(weight, whole=is_whole)
        sums = _chunked_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), dataclasses.replace(head, weight=weight, bias=bias), targets.reshape(-1),
            weights.reshape(-1), z_loss=coefficient, chunk_size=chunk_size, shards=shards,
        )  # fmt: skip
        return sharding.sum_over(sums, "batch", tokens)

    per_token = ("batch", tokens)
    table = sharding.table_dims(head.weight.shape[0], batch_size=targets.shape[0])
    if is_whole and (table == ("vocab", None) or targets.shape[1] % sharding.num_devices("tokens")):
        table = (None, table[1])  # devices with the same tokens must have the same table, not one that each has gathered
    in_dims = ((*per_token, None), table, (bias_rows,), per_token, per_token, ())
    coefficient = jnp.asarray(z_loss, _accumulation_dtype(hidden.dtype))
    return sharding.local(on_device, in_dims=in_dims, out_dims=())(hidden, head.weight, head.bias, targets, weights, coefficient)
