"""Recurrences of independent channels: Mamba's selective scan, Griffin's RG-LRU, and the attention of RWKV-4.

A row is cut into chunks. A loop runs over chunks and carries the state; inside a chunk all tokens are
computed by an associative scan (Blelloch 1990). The backward pass computes each chunk again from the state at
its start: what a chunk expands to, [B, C, N] per token for Mamba, never exists for the whole row.

A document begins with an empty state: the transition of its first token is exactly 0. Padding, segment 0,
leaves the state as it is. A sequence may be sharded over devices: each computes what its tokens add to the
state and by which factor they multiply it, and the shards before it give its first state. States are float32.

Dims: B batch, T time, C channels, N state of a channel, L tokens of a chunk.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slmjax.kernels.padding import filled_segment_ids
from slmjax.parallel import communication, mesh

# Small on CPU, where what a chunk expands to should stay in the cache of a core.
CHUNK_SIZES = {"cpu": 16, "gpu": 64, "tpu": 64}
# Logarithm of zero: finite, so that differences of two are numbers.
LOG_ZERO = -1e38
# Bound of the derivative of the root in RG-LRU's input scale, infinite where nothing decays (as in Griffin).
LARGEST_SLOPE = 1000.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanState:
    """The state after the last real token of each row. Typed `Any` because this is a pytree."""

    values: Any  # float32 arrays, batch first: one [B, N, C] or [B, C], or RWKV-4's three [B, C]
    segments: Any  # Int[Array, " B"]: segment of the last real token, 0 before the first


def selective_scan_state(batch_size: int, *, channels: int, state_dim: int) -> ScanState:
    """Return the state before the first token of `selective_scan`: zeros [B, N, C]."""
    return _state(jnp.zeros((batch_size, state_dim, channels), jnp.float32))


def rg_lru_state(batch_size: int, *, channels: int) -> ScanState:
    """Return the state before the first token of `rg_lru`: zeros [B, C]."""
    return _state(jnp.zeros((batch_size, channels), jnp.float32))


def wkv4_state(batch_size: int, *, channels: int) -> ScanState:
    """Return the state before the first token of `wkv4`: numerator, denominator, log of their scale."""
    zeros = jnp.zeros((batch_size, channels), jnp.float32)
    return _state((zeros, zeros, jnp.full_like(zeros, LOG_ZERO)))


def _state(values: Any) -> ScanState:
    return ScanState(values=values, segments=jnp.zeros(jax.tree.leaves(values)[0].shape[0], jnp.int32))


# The three recurrences --------------------------------------------------------------------------------------
def selective_scan(
    x: Float[Array, "B T C"],
    dt: Float[Array, "B T C"],
    *,
    a: Float[Array, "C N"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    d: Float[Array, " C"],
    segment_ids: Int[Array, "B T"],
    state: ScanState | None = None,
    chunk_size: int | None = None,
    channel_dim: str | None = "ffn",
) -> tuple[Float[Array, "B T C"], ScanState | None]:
    """Return the selective scan of Mamba (Gu & Dao 2023): `h = exp(dt a) h + dt b x`, `y = c h + d x`.

    Computed in float32; the result has the dtype of `x`.

    Args:
      x: input of each channel.
      dt: step sizes, at least 0, float32.
      a: rates of the states, negative.
      b: what each token writes to the states, the same for all channels.
      c: what each token reads from the states.
      d: factor of the input that goes to the output directly.
      segment_ids: the document of each token; 0 is padding, which follows the real tokens.
      state: of earlier tokens, from `selective_scan_state` or an earlier call; None for complete rows.
      chunk_size: tokens of a chunk; None for the platform's.
      channel_dim: logical dim of the channels on a mesh; None if they are replicated.

    Returns:
      The outputs, and the state after the last real token of each row; None if `state` is None.
    """

    def elements(tokens: "_Tokens", weights: dict[str, Array]) -> tuple[Array, Array]:
        dt = _per_token(tokens.real, tokens.channels["dt"].astype(jnp.float32), 0.0)
        decay = jnp.exp(dt[:, :, None, :] * weights["a"].T[None, None])
        written = (dt * tokens.channels["x"])[:, :, None, :] * tokens.shared["b"][..., None]
        return _per_token(tokens.starts, 0.0, decay), written.astype(jnp.float32)

    def read(h: Array, h_before: Array, tokens: "_Tokens", weights: dict[str, Array]) -> Array:
        c = tokens.shared["c"].astype(jnp.float32)
        x = tokens.channels["x"].astype(jnp.float32)
        return jnp.sum(h * c[..., None], axis=2) + weights["d"][None, None, :] * x

    return _run(
        _Recurrence(elements=elements, read=read, join=jnp.multiply, advance=_advance_linear),
        {"x": x, "dt": dt},
        {"b": b, "c": c},
        {"a": a.astype(jnp.float32), "d": d.astype(jnp.float32)},
        segment_ids=segment_ids,
        state=state,
        empty=selective_scan_state(x.shape[0], channels=x.shape[2], state_dim=a.shape[1]),
        chunk_size=chunk_size,
        channel_dim=channel_dim,
    )


def rg_lru(
    x: Float[Array, "B T C"],
    log_decay: Float[Array, "B T C"],
    *,
    segment_ids: Int[Array, "B T"],
    state: ScanState | None = None,
    chunk_size: int | None = None,
    channel_dim: str | None = "ffn",
) -> tuple[Float[Array, "B T C"], ScanState | None]:
    """Return the states of a real-gated linear recurrent unit: `h = a h + sqrt(1 - a^2) x` (De et al. 2024).

    For the first token of a document `h = x`. Computed in float32; the result has the dtype of `x`.

    Args:
      x: gated input of each channel.
      log_decay: log a, at most 0, float32.

    The other arguments and the result are those of `selective_scan`.
    """

    def elements(tokens: "_Tokens", weights: dict[str, Array]) -> tuple[Array, Array]:
        log_decay = _per_token(tokens.real, tokens.channels["log_decay"].astype(jnp.float32), 0.0)
        # 1 - a^2 itself would lose all digits where a is near 1.
        scale = _per_token(tokens.starts, 1.0, _bounded_sqrt(-jnp.expm1(2 * log_decay)))
        written = _per_token(tokens.real, scale * tokens.channels["x"].astype(jnp.float32), 0.0)
        return _per_token(tokens.starts, 0.0, jnp.exp(log_decay)), written

    return _run(
        _Recurrence(
            elements=elements,
            read=lambda h, h_before, tokens, weights: h,
            join=jnp.multiply,
            advance=_advance_linear,
        ),
        {"x": x, "log_decay": log_decay},
        {},
        {},
        segment_ids=segment_ids,
        state=state,
        empty=rg_lru_state(x.shape[0], channels=x.shape[2]),
        chunk_size=chunk_size,
        channel_dim=channel_dim,
    )


def wkv4(
    key: Float[Array, "B T C"],
    value: Float[Array, "B T C"],
    *,
    log_decay: Float[Array, " C"],
    bonus: Float[Array, " C"],
    segment_ids: Int[Array, "B T"],
    state: ScanState | None = None,
    chunk_size: int | None = None,
    channel_dim: str | None = "ffn",
) -> tuple[Float[Array, "B T C"], ScanState | None]:
    """Return the weighted means of values of RWKV-4 (Peng et al. 2023), channel by channel.

    The weight of an earlier token is `exp(key + distance * log_decay)`, with distance 0 for the token just
    before, and that of the token itself `exp(key + bonus)`. Sums are stored divided by the exponential of
    their largest logarithm, so that keys of any size are exact. Computed in float32; the result has the dtype
    of `value`.

    Args:
      log_decay: at most 0.
      bonus: added to the key of the token itself.

    The other arguments and the result are those of `selective_scan`.
    """

    def elements(tokens: "_Tokens", weights: dict[str, Array]) -> tuple[Array, tuple[Array, Array, Array]]:
        key = _per_token(tokens.real, tokens.channels["key"].astype(jnp.float32), LOG_ZERO)
        scale = jax.lax.stop_gradient(key)
        # The scale is bookkeeping, without a gradient; this factor is 1 and has the gradient of the key.
        weight = _per_token(tokens.real, jnp.exp(key - scale), 0.0)
        log_decay = jnp.broadcast_to(weights["log_decay"][None, None], key.shape)
        log_decay = _per_token(tokens.real, log_decay, 0.0)
        own = (weight * tokens.channels["x"].astype(jnp.float32), weight, scale)
        return _per_token(tokens.starts, LOG_ZERO, log_decay), own

    def read(h: Any, h_before: Any, tokens: "_Tokens", weights: dict[str, Array]) -> Array:
        numerator, denominator, scale = h_before
        scale = _per_token(tokens.starts, LOG_ZERO, scale)
        key = tokens.channels["key"].astype(jnp.float32) + weights["bonus"][None, None]
        largest = jax.lax.stop_gradient(jnp.maximum(scale, key))
        earlier = jnp.exp(scale - largest)
        own = jnp.exp(key - largest)
        value = tokens.channels["x"].astype(jnp.float32)
        return (earlier * numerator + own * value) / (earlier * denominator + own)

    return _run(
        _Recurrence(elements=elements, read=read, join=_join_logarithms, advance=_advance_scaled),
        {"x": value, "key": key},
        {},
        {"log_decay": log_decay.astype(jnp.float32), "bonus": bonus.astype(jnp.float32)},
        segment_ids=segment_ids,
        state=state,
        empty=wkv4_state(key.shape[0], channels=key.shape[2]),
        chunk_size=chunk_size,
        channel_dim=channel_dim,
    )


@jax.custom_jvp
def _bounded_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.sqrt(x)


@_bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root = jnp.sqrt(primals[0])
    return root, tangents[0] / jnp.maximum(2 * root, 1 / LARGEST_SLOPE)


def _advance_linear(decay: Array, before: Array, own: Array) -> Array:
    return decay * before + own


def _join_logarithms(earlier: Array, later: Array) -> Array:
    return jnp.maximum(earlier + later, LOG_ZERO)


def _advance_scaled(log_decay: Array, before: Any, own: Any) -> Any:
    decayed = before[2] + log_decay
    scale = jax.lax.stop_gradient(jnp.maximum(decayed, own[2]))
    earlier = jnp.exp(decayed - scale)
    later = jnp.exp(own[2] - scale)
    return earlier * before[0] + later * own[0], earlier * before[1] + later * own[1], scale


# Chunks and shards ------------------------------------------------------------------------------------------
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tokens:
    """The tokens of a row, or of a chunk. Typed `Any` because this is a pytree."""

    channels: dict[str, Any]  # inputs by name, [B, T, C]
    shared: dict[str, Any]  # inputs that all channels share, [B, T, N]
    starts: Any  # Bool[Array, "B T"]: the first token of a document
    real: Any  # Bool[Array, "B T"]: not padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recurrence:
    """A recurrence by what it does to spans of tokens: `state = advance(transition, state before, own)`.

    `own` is the state after the span if the state before it is empty. Padding has the transition that changes
    nothing, and an empty state of its own.
    """

    elements: Callable[..., Any]  # of tokens and weights: the transition and own state of each token
    read: Callable[..., Array]  # of the states after and before each token, tokens, weights: the output
    join: Callable[..., Array]  # the transition of two spans from those of the earlier and the later one
    advance: Callable[..., Any]

    def combine(self, earlier: Any, later: Any) -> Any:
        """Return transition and own state of two neighbouring spans: associative."""
        return self.join(earlier[0], later[0]), self.advance(later[0], earlier[1], later[1])


def _per_token(condition: Bool[Array, "B T"], yes: Any, no: Any) -> Array:
    """`jnp.where` with a condition per token, for values with further dims."""
    ndim = max(jnp.ndim(yes), jnp.ndim(no))
    return jnp.where(jnp.expand_dims(condition, tuple(range(2, ndim))), yes, no)


def _run(
    recurrence: _Recurrence,
    channels: dict[str, Array],
    shared: dict[str, Array],
    weights: dict[str, Array],
    *,
    segment_ids: Int[Array, "B T"],
    state: ScanState | None,
    empty: ScanState,
    chunk_size: int | None,
    channel_dim: str | None,
) -> tuple[Float[Array, "B T C"], ScanState | None]:
    """Run a recurrence over rows of documents; each of `weights` begins with the dim of channels."""
    if chunk_size is None:
        chunk_size = CHUNK_SIZES.get(mesh.platform(), CHUNK_SIZES["tpu"])
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: set at least 1, or None for the platform's")
    before = empty if state is None else state
    filled = filled_segment_ids(segment_ids, before.segments)
    real = segment_ids > 0
    starts = real & (segment_ids != jnp.concatenate([before.segments[:, None], filled[:, :-1]], axis=1))

    def on_device(
        ids: tuple[Array, Array],
        channels: dict[str, Array],
        shared: dict[str, Array],
        values: Any,
        weights: dict[str, Array],
    ) -> tuple[Array, Any]:
        tokens = _Tokens(channels=channels, shared=shared, starts=ids[0], real=ids[1])
        return _rows(recurrence, tokens, values, weights, chunk_size=chunk_size)

    rows = ("batch", "time")
    value_dims = ("batch", *[None] * (jax.tree.leaves(before.values)[0].ndim - 2), channel_dim)
    # Only a sharded sequence needs communication; the compiler partitions batch and channels.
    if mesh.num_devices("time") > 1:
        row_dims = ((*rows, channel_dim), jax.tree.map(lambda leaf: value_dims, before.values))
        on_device = communication.shard_mapped(
            on_device,
            in_dims=(rows, (*rows, channel_dim), (*rows, None), value_dims, (channel_dim,)),
            out_dims=row_dims,
        )
    y, values = on_device((starts, real), channels, shared, before.values, weights)
    return y, None if state is None else ScanState(values=values, segments=filled[:, -1])


def _rows(
    recurrence: _Recurrence, tokens: _Tokens, values: Any, weights: dict[str, Array], *, chunk_size: int
) -> tuple[Float[Array, "B T C"], Any]:
    """Run a recurrence over this device's tokens; the state is that at the end of the whole rows."""
    length = tokens.starts.shape[1]
    chunks = _cut(tokens, min(chunk_size, length))
    leaves, structure = jax.tree.flatten(values)
    # The loop's state varies over the same devices as what is added to it.
    *leaves, _ = communication.match_varying(*leaves, tokens.channels["x"])
    values = structure.unflatten(leaves)
    if communication.is_sharded("time"):
        values = _state_before_shard(recurrence, chunks, values, weights)

    def chunk(values: Any, tokens: _Tokens) -> tuple[Any, Array]:
        transition, own = jax.lax.associative_scan(
            recurrence.combine, recurrence.elements(tokens, weights), axis=1
        )
        first = jax.tree.map(lambda x: x[:, None], values)
        after = recurrence.advance(transition, first, own)
        before = jax.tree.map(lambda x, y: jnp.concatenate([x, y[:, :-1]], axis=1), first, after)
        y = recurrence.read(after, before, tokens, weights)
        return jax.tree.map(lambda x: x[:, -1], after), y.astype(tokens.channels["x"].dtype)

    values, y = _loop(chunk, values, chunks)
    y = jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, y.shape[3])[:, :length]
    if communication.is_sharded("time"):
        is_last = communication.index_along("time") == communication.num_shards("time") - 1
        values = jax.tree.map(lambda x: communication.sum_over(jnp.where(is_last, x, 0), "time"), values)
    return y, values


def _cut(tokens: _Tokens, chunk_size: int) -> _Tokens:
    """Return tokens cut into chunks, [B, T, ...] -> [chunks, B, L, ...], with padding at the end."""

    def cut(x: Array) -> Array:
        num_chunks = -(-x.shape[1] // chunk_size)
        missing = num_chunks * chunk_size - x.shape[1]
        x = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, chunk_size, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, tokens)


def _loop(chunk: Callable[..., Any], carry: Any, chunks: _Tokens) -> tuple[Any, Any]:
    """Scan `chunk` over the chunks, computed again in the backward pass; one chunk needs no loop."""
    if chunks.starts.shape[0] == 1:
        carry, y = chunk(carry, jax.tree.map(lambda x: x[0], chunks))
        return carry, jax.tree.map(lambda x: x[None], y)
    return jax.lax.scan(jax.checkpoint(chunk, prevent_cse=False), carry, chunks)


def _state_before_shard(
    recurrence: _Recurrence, chunks: _Tokens, values: Any, weights: dict[str, Array]
) -> Any:
    """Return the state before this device's tokens: `values`, that before the rows, after earlier shards."""

    def chunk(total: Any, tokens: _Tokens) -> tuple[Any, None]:
        spans = jax.lax.associative_scan(recurrence.combine, recurrence.elements(tokens, weights), axis=1)
        return recurrence.combine(total, jax.tree.map(lambda x: x[:, -1], spans)), None

    # One token of padding: it changes nothing.
    nothing = jax.tree.map(lambda x: jnp.zeros_like(x[0, :, :1]), chunks)
    neutral = jax.tree.map(lambda x: x[:, 0], recurrence.elements(nothing, weights))
    total, _ = _loop(chunk, neutral, chunks)
    totals = jax.tree.map(lambda x: communication.gather(x[None], "time", axis=0), total)
    index = communication.index_along("time")
    # A state is small, and the shards are few: every device folds those before it.
    for shard in range(communication.num_shards("time") - 1):
        transition, own = jax.tree.map(lambda x, shard=shard: x[shard], totals)
        following = recurrence.advance(transition, values, own)
        values = jax.tree.map(lambda x, y, shard=shard: jnp.where(shard < index, x, y), following, values)
    return values
