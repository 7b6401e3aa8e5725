"""Losses on final hidden states and a `Head`: chunked over tokens, masked, sharded; no [B, T, V] array exists.

    loss_sum, metrics = cross_entropy(hidden, head, targets, weights, z_loss=1e-4)          # tokens in one dim
    loss_sum, metrics = sharded_cross_entropy(hidden, head, targets, weights, z_loss=1e-4)  # [B, T], any mesh

Everything returned is a sum; the caller divides by global counts. `chunked_sum` is what any further loss on logits builds
on: it walks over tokens in chunks and takes the gradient of a chunk in the same pass that computes its value, so the logits
of one chunk are all that ever exists. Matrix products run in the dtype of the hidden states and give float32 (float64 for
float64); soft-cap, softmax and sums are float32.

Dims: B batch, T time, N tokens, C tokens of a chunk, D model, V rows of the table (padding included); `*B` any leading dims.
"""

import dataclasses
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
    num_rows = head.weight.shape[0]
    assert 0 < head.vocab_size <= num_rows, f"a head of {num_rows} rows has no {head.vocab_size} real ones"
    x = _project(hidden, head.weight)
    if head.bias is not None:
        x = x + jnp.broadcast_to(head.bias.astype(x.dtype), x.shape)
    if head.scale != 1.0:
        x = x * head.scale
    if head.softcap is not None:
        x = head.softcap * jnp.tanh(x / head.softcap)
    if head.vocab_size < num_rows:
        x = jnp.where(_columns(x) < head.vocab_size, x, PADDING_LOGIT)
    return x


def _columns(x: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


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
    return _chunked_sum(fn, chunk_size, hidden, _vary_like(params, hidden), tokens, constants)


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

    zeros = _vary_like(jax.tree.map(jnp.zeros_like, wide), hidden)
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


def _vary_like(tree: Any, like: Array) -> Any:
    """Inside `sharding.local`: declares that `tree` differs between the devices that `like` differs between.

    The gradient of a replicated head is then one sum over these devices, after the loop. Outside, the identity.
    """

    def vary(x: Array) -> Array:
        axes = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x

    return jax.tree.map(vary, tree)


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
    if chunk_size is None:
        chunk_size = default_chunk_size(hidden.shape[0], head.weight.shape[0])
    coefficient = jnp.asarray(z_loss, _accumulation_dtype(hidden.dtype))
    return chunked_sum(_cross_entropy_terms, hidden, head, tokens=(targets, weights), constants=coefficient, chunk_size=chunk_size)


def _cross_entropy_terms(hidden: Array, head: Head, tokens: tuple[Array, Array], z_loss: Array) -> tuple[Float[Array, ""], Metrics]:
    targets, weights = tokens
    logits_CV = logits(hidden, head)
    columns = _columns(logits_CV)
    normaliser = jax.nn.logsumexp(logits_CV, axis=-1)
    # A masked sum instead of a gather: its gradient is elementwise and not a scatter into [C, V].
    target_logit = jnp.sum(jnp.where(columns == targets[:, None], logits_CV, 0.0), axis=-1)
    nll, z = normaliser - target_logit, jnp.square(normaliser)
    # Against the maximum, which logsumexp needs as well: argmax would be another pass over all logits, and a slow one on CPU.
    correct = (target_logit >= jnp.max(logits_CV, axis=-1)).astype(nll.dtype)
    weights = weights.astype(nll.dtype)
    metrics = {"nll": nll, "z": z, "correct": correct}
    metrics = {name: jax.lax.stop_gradient(jnp.sum(weights * value)) for name, value in metrics.items()}
    return jnp.sum(weights * (nll + z_loss * z)), metrics


def sharded_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    z_loss: float | Float[Array, ""] = 0.0,
    chunk_size: int | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`cross_entropy` of a whole batch on the current mesh: every device walks over the tokens it holds.

    The head is gathered once, before the loop, and its gradient is reduced once, after it. `chunk_size` counts a device's
    own tokens. The sums are over the global batch, the same on every device.
    """

    def on_device(hidden: Array, weight: Array, bias: Array | None, *tokens_and_z: Array) -> tuple[Array, Metrics]:
        targets, weights, coefficient = tokens_and_z
        own_head = dataclasses.replace(head, weight=weight, bias=bias)
        flat_hidden = hidden.reshape(-1, hidden.shape[-1])
        sums = cross_entropy(flat_hidden, own_head, targets.reshape(-1), weights.reshape(-1), z_loss=coefficient, chunk_size=chunk_size)
        return sharding.sum_over(sums, "batch", "tokens")

    per_token = ("batch", "tokens")
    in_dims = ((*per_token, None), (None, None), (None,), per_token, per_token, ())
    coefficient = jnp.asarray(z_loss, _accumulation_dtype(hidden.dtype))
    return sharding.local(on_device, in_dims=in_dims, out_dims=())(hidden, head.weight, head.bias, targets, weights, coefficient)
