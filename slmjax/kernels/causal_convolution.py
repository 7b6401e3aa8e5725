"""Causal depthwise convolution over the tokens of each document, and the token shift of RWKV.

Taps are ordered from the oldest token to the newest. A tap counts only if its token is of the same segment,
so that documents packed into a row do not see each other. Decoding needs a history: the last W - 1 inputs of
real tokens, with their segments. Padding, segment 0, follows the real tokens of a row.

Dims: B batch, T time, C channels, W taps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slmjax.parallel import communication, mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvolutionHistory:
    """The inputs that the next tokens may see. The fields are typed `Any` because this is a pytree."""

    inputs: Any  # Float[Array, "B W-1 C"], oldest first
    segments: Any  # Int[Array, "B W-1"]; 0 where there was no token yet


def empty_history(batch_size: int, *, width: int, channels: int, dtype: Any) -> ConvolutionHistory:
    """Return the history before the first token, for a convolution of `width` taps (2 for `token_shift`)."""
    return ConvolutionHistory(
        inputs=jnp.zeros((batch_size, width - 1, channels), dtype),
        segments=jnp.zeros((batch_size, width - 1), jnp.int32),
    )


def depthwise_convolution(
    x: Float[Array, "B T C"],
    taps: Float[Array, "W C"],
    *,
    segment_ids: Int[Array, "B T"],
    bias: Float[Array, " C"] | None = None,
    history: ConvolutionHistory | None = None,
    channel_dim: str | None = "ffn",
) -> tuple[Float[Array, "B T C"], ConvolutionHistory | None]:
    """Return each token's weighted sum of itself and the W - 1 tokens before it in its document.

    Sums are float32; the result has the dtype of `x`. A sequence may be sharded over devices: each receives
    the W - 1 inputs before its own.

    Args:
      segment_ids: 0 is padding, which follows the real tokens.
      history: tokens before the first one, which are also seen; None for complete rows.
      channel_dim: logical dim of the channels on a mesh; None if they are replicated.

    Returns:
      The sums, and the history after the last real token of each row; None if `history` is None.

    >>> taps = jnp.asarray([[10.0], [1.0]])
    >>> y, _ = depthwise_convolution(
    ...     jnp.asarray([[[1.0], [2.0], [3.0]]]), taps, segment_ids=jnp.asarray([[1, 1, 2]])
    ... )
    >>> y.ravel().tolist()  # the third token begins a document
    [1.0, 12.0, 3.0]
    """
    before = history or _no_history(x, width=taps.shape[0])

    def convolve(x: Array, segments: Array, history: Array, history_segments: Array, taps: Array) -> Array:
        extended = _extended(x, segments, history, history_segments)
        total = jnp.zeros(x.shape, jnp.float32)
        for tap in range(taps.shape[0]):
            total += _seen_from(extended, tap, segments) * taps[tap][None, None, :].astype(jnp.float32)
        return total

    total = _on_shards(convolve, channel_dim, x, segment_ids, before, taps)
    if bias is not None:
        total += bias[None, None, :].astype(jnp.float32)
    return total.astype(x.dtype), _next_history(x, segment_ids, history)


def convolve_token(
    x: Float[Array, "B C"],
    taps: Float[Array, "W C"],
    *,
    segment_ids: Int[Array, " B"],
    history: ConvolutionHistory,
    bias: Float[Array, " C"] | None = None,
) -> tuple[Float[Array, "B C"], ConvolutionHistory]:
    """Return `depthwise_convolution` of a token per row, and the next history; padding does not change it."""
    inputs = jnp.concatenate([history.inputs, x[:, None]], axis=1)
    segments = jnp.concatenate([history.segments, segment_ids[:, None]], axis=1)
    in_document = (segments == segment_ids[:, None])[..., None]
    terms = jnp.where(in_document, inputs, 0).astype(jnp.float32) * taps[None].astype(jnp.float32)
    total = jnp.sum(terms, axis=1)
    if bias is not None:
        total += bias[None, :].astype(jnp.float32)
    is_real = segment_ids > 0
    new_history = ConvolutionHistory(
        inputs=jnp.where(is_real[:, None, None], inputs[:, 1:], history.inputs),
        segments=jnp.where(is_real[:, None], segments[:, 1:], history.segments),
    )
    return total.astype(x.dtype), new_history


def token_shift(
    x: Float[Array, "B T C"],
    *,
    segment_ids: Int[Array, "B T"],
    history: ConvolutionHistory | None = None,
    channel_dim: str | None = None,
) -> tuple[Float[Array, "B T C"], ConvolutionHistory | None]:
    """Return the token before each one in its document, zeros for the first (RWKV; Peng et al. 2023).

    Arguments and history are those of a `depthwise_convolution` of width 2.

    >>> x = jnp.asarray([[[1.0], [2.0], [3.0]]])
    >>> token_shift(x, segment_ids=jnp.asarray([[1, 1, 2]]))[0].ravel().tolist()
    [0.0, 1.0, 0.0]
    """

    def shift(x: Array, segments: Array, history: Array, history_segments: Array) -> Array:
        return _seen_from(_extended(x, segments, history, history_segments), 0, segments)

    before = history or _no_history(x, width=2)
    previous = _on_shards(shift, channel_dim, x, segment_ids, before)
    return previous, _next_history(x, segment_ids, history)


def _no_history(x: Array, *, width: int) -> ConvolutionHistory:
    return empty_history(x.shape[0], width=width, channels=x.shape[2], dtype=x.dtype)


def _seen_from(extended: tuple[Array, Array], tap: int, segments: Array) -> Array:
    """Return the input of each token that a tap multiplies: 0 if it is of another document."""
    inputs, input_segments = extended
    window = slice(tap, tap + segments.shape[1])
    return jnp.where((input_segments[:, window] == segments)[..., None], inputs[:, window], 0)


def _extended(x: Array, segments: Array, history: Array, history_segments: Array) -> tuple[Array, Array]:
    """Return inputs and segments with the W - 1 entries before them: of the history, or of other shards."""
    count = history.shape[1]
    # Index in the whole row of each entry before this shard; negative ones are in the history.
    first = communication.index_along("time") * x.shape[1]
    index = first - count + jnp.arange(count)

    def extended(x: Array, history: Array) -> Array:
        if not communication.is_sharded("time"):
            return jnp.concatenate([history, x], axis=1)
        halo = communication.halo(x, "time", size=count, axis=1)[:, : -x.shape[1]]
        # Fewer than W - 1 entries arrive where all shards together are shorter.
        halo = jnp.pad(halo, [(0, 0), (count - halo.shape[1], 0)] + [(0, 0)] * (x.ndim - 2))
        in_history = (index < 0).reshape(1, -1, *(1,) * (x.ndim - 2))
        history = jnp.take(history, jnp.clip(index + count, 0, count - 1), axis=1)
        return jnp.concatenate([jnp.where(in_history, history, halo), x], axis=1)

    return extended(x, history.astype(x.dtype)), extended(segments, history_segments)


def _on_shards(
    fn: Callable[..., Array],
    channel_dim: str | None,
    x: Array,
    segment_ids: Array,
    before: ConvolutionHistory,
    *taps: Array,
) -> Array:
    """Return `fn` of the arrays, by shard_map where the sequence is sharded."""
    arrays = (x, segment_ids, before.inputs, before.segments, *taps)
    # Slices of an array that is sharded along another dim need no communication.
    if mesh.num_devices("time") == 1:
        return fn(*arrays)
    rows = ("batch", "time", channel_dim)
    in_dims = (
        rows,
        rows[:2],
        ("batch", None, channel_dim),
        ("batch", None),
        *((None, channel_dim),) * len(taps),
    )
    return communication.shard_mapped(fn, in_dims=in_dims, out_dims=rows)(*arrays)


def _next_history(
    x: Array, segment_ids: Array, history: ConvolutionHistory | None
) -> ConvolutionHistory | None:
    if history is None:
        return None
    inputs = jnp.concatenate([history.inputs, x.astype(history.inputs.dtype)], axis=1)
    segments = jnp.concatenate([history.segments, segment_ids], axis=1)
    # Padding follows the real tokens: the history is of the last real ones.
    num_real = jnp.sum(segment_ids > 0, axis=1)
    last = num_real[:, None] + jnp.arange(history.segments.shape[1])[None, :]
    return ConvolutionHistory(
        inputs=jnp.take_along_axis(inputs, last[..., None], axis=1),
        segments=jnp.take_along_axis(segments, last, axis=1),
    )
