"""Attention: the reference implementation, and the choice of an implementation for whole sequences.

`reference_attention` is the definition; decoding with a cache calls it. `self_attention` is for a whole
sequence and chooses an implementation by platform and shape. Tests compare every implementation with the
reference. A sequence may be sharded over devices: queries then stay on their device and keys are sent to
them, either all keys or, with a window, those just before the device's own.

Dims: B batch, T query time, S key time, N heads, K kv heads, G heads per kv head (N = K G), H head dim.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slmjax.kernels import gpu, tpu
from slmjax.kernels.products import allows_fused, log_choice, product, transposed
from slmjax.parallel import communication, mesh

# The causal blocks are unrolled in the program: 8 of them compute 56% of the square, 16 would compute 53%.
MAX_CAUSAL_BLOCKS = 8
TWO_WAY_BLOCK = 256  # queries whose scores exist at once
# Finite, so that a query without any visible key has finite gradients.
MASKED_SCORE = -1e30


def attention_mask(
    *,
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    window: int | None,
    k_is_visible: Bool[Array, "B S"] | None = None,
) -> Bool[Array, "B T S"]:
    """Return True where a query may see a key.

    They must be in the same document (segment 0, padding, is none), and the key not later than the query and
    less than `window` positions before it.

    Args:
      k_is_visible: keys that earlier queries see too, within the window on their side; None for none.
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    is_before = distance >= 0
    if k_is_visible is not None:
        is_before |= k_is_visible[:, None, :]
        distance = jnp.abs(distance)
    allowed = (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments[:, :, None] != 0) & is_before
    return allowed if window is None else allowed & (distance < window)


def reference_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    window: int | None,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    k_is_visible: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of queries over keys of their own segment at their own or earlier positions.

    Segment 0 is padding, or an empty slot of a cache: it sees nothing and is seen by nothing. A query that
    may see nothing gives 0, with gradients 0. Scores and softmax are float32; the result has the dtype of
    `q`.

    Args:
      window: a query sees the `window` latest positions, its own included; None for all.
      scale: factor of the scores.
      softcap: bounds scores by `softcap * tanh(scores / softcap)` (Gemma 2); None for unbounded.
      sinks: for each head the score of an extra entry in the softmax that has no value (GPT-OSS).
      k_is_visible: keys that queries at earlier positions see as well; None for none.
    """
    # Grouped queries (Ainslie et al. 2023): query head n uses kv head n // G; keys are not repeated.
    num_kv_heads = k.shape[2]
    q_BTKGH = q.reshape(*q.shape[:2], num_kv_heads, -1, q.shape[3])
    scores = scale * jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = attention_mask(
        q_segments=q_segments,
        k_segments=k_segments,
        q_positions=q_positions,
        k_positions=k_positions,
        window=window,
        k_is_visible=k_is_visible,
    )
    mask = mask[:, None, None, :, :]
    scores = jnp.where(mask, scores, MASKED_SCORE)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sink = jnp.broadcast_to(
            sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1, 1), (*scores.shape[:-1], 1)
        )
        weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    # Masked again: a query that sees nothing would otherwise give the mean of all values.
    weights = jnp.where(mask, weights, 0.0)
    return jnp.einsum("bkgts,bskh->btkgh", weights.astype(q.dtype), v).reshape(q.shape)


def self_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"],
    window: int | None,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Return `reference_attention` of a sequence over itself, by the implementation for platform and shape.

    The segments of a row must be contiguous, as in packed batches: distances between positions are then
    distances between indices in the row, so that the implementations need no positions, and only keys at
    close indices can be visible in a window.
    """
    settings = {"window": window, "scale": scale, "softcap": softcap}
    if mesh.is_single_device():
        attend = choose_attention(
            q.shape[1],
            window=window,
            platform=mesh.platform(),
            softcap=softcap,
            head_dim=q.shape[3],
            dtype=q.dtype,
            has_sinks=sinks is not None,
        )
        if sinks is not None:
            attend = functools.partial(attend, sinks=sinks)
        return attend(q, k, v, q_segments=segment_ids, k_segments=segment_ids, shard=None, **settings)
    return _sharded_attention(q, k, v, segment_ids, sinks, **settings)


def two_way_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"],
    is_visible: Bool[Array, "B T"],
    window: int | None,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Return `self_attention` in which some keys are seen by all queries of their document.

    All keys for encoders, those of a prefix for a prefix language model. The reference implementation runs in
    blocks of queries, whose scores the backward pass recomputes. On a mesh every device gets all keys.

    Args:
      is_visible: keys that earlier queries see as well.
      window: a query sees less than this many positions, on either side where keys are visible.
    """
    num_heads = q.shape[2]

    def on_device(q: Array, k: Array, v: Array, segments: Array, is_visible: Array, *sinks: Array) -> Array:
        k, v = _own_heads(k, v, num_local=q.shape[2], num_heads=num_heads)
        k, v, k_segments, k_is_visible = (
            communication.gather(x, "time", axis=1) for x in (k, v, segments, is_visible)
        )
        ids = _visibility_ids(segments, k_segments, communication.index_along("time") * q.shape[1])
        ids["k_is_visible"] = k_is_visible
        settings = {"window": window, "scale": scale, "softcap": softcap}
        attend = jax.checkpoint(
            functools.partial(reference_attention, sinks=sinks[0] if sinks else None, **settings)
        )
        return _block_by_block(
            q, k, v, ids, attend=attend, block=TWO_WAY_BLOCK, visible_keys=lambda start: slice(None)
        )

    key_dims = ("batch", "time", "kv_heads", None)
    in_dims = (("batch", "time", "heads", None), key_dims, key_dims, ("batch", "time"), ("batch", "time"))
    arrays = (q, k, v, segment_ids, is_visible)
    if sinks is not None:
        in_dims = (*in_dims, ("heads",))
        arrays = (*arrays, sinks)
    return communication.shard_mapped(on_device, in_dims=in_dims, out_dims=in_dims[0])(*arrays)


def _own_heads(k: Array, v: Array, *, num_local: int, num_heads: int) -> tuple[Array, Array]:
    """Inside `shard_mapped`: return a kv head for each query head, where only query heads are sharded."""
    if not communication.is_sharded("heads") or communication.is_sharded("kv_heads"):
        return k, v
    # A device's query heads need not form complete groups, so each gets a kv head of its own.
    heads = communication.index_along("heads") * num_local + jnp.arange(num_local)
    kv_heads = heads // (num_heads // k.shape[2])
    return jnp.take(k, kv_heads, axis=2), jnp.take(v, kv_heads, axis=2)


def _sharded_attention(
    q: Array, k: Array, v: Array, segment_ids: Array, sinks: Array | None, *, window: int | None, **settings
) -> Array:
    """`self_attention` on a mesh: sequences, heads and time sharded where they divide."""
    platform = mesh.platform()
    num_heads = q.shape[2]

    def on_device(q: Array, k: Array, v: Array, segments: Array, *sinks: Array) -> Array:
        k, v = _own_heads(k, v, num_local=q.shape[2], num_heads=num_heads)
        length = q.shape[1]
        shards = communication.num_shards("time")
        # A window that spans all shards needs every key; a shorter one only the halo before the queries.
        gathered = shards > 1 and (window is None or window > (shards - 1) * length)
        if gathered:
            keys = [communication.gather(x, "time", axis=1) for x in (k, v, segments)]
        else:
            keys = [communication.halo(x, "time", size=(window or 1) - 1, axis=1) for x in (k, v, segments)]
        attend = choose_attention(
            length,
            window=window,
            platform=platform,
            softcap=settings["softcap"],
            num_keys=keys[0].shape[1],
            gathered=gathered,
            head_dim=q.shape[3],
            dtype=q.dtype,
            has_sinks=bool(sinks),
        )
        attend = functools.partial(attend, sinks=sinks[0]) if sinks else attend
        ids = {
            "q_segments": segments,
            "k_segments": keys[2],
            "shard": communication.index_along("time") if gathered else None,
        }
        return attend(q, keys[0], keys[1], **ids, window=window, **settings)

    query_dims = ("batch", "time", "heads", None)
    key_dims = ("batch", "time", "kv_heads", None)
    in_dims = (query_dims, key_dims, key_dims, ("batch", "time"))
    arrays = (q, k, v, segment_ids)
    if sinks is not None:
        in_dims = (*in_dims, ("heads",))
        arrays = (*arrays, sinks)
    return communication.shard_mapped(
        on_device, in_dims=in_dims, out_dims=query_dims, checked=platform == "cpu"
    )(*arrays)


def choose_attention(
    length: int,
    *,
    window: int | None,
    platform: str,
    softcap: float | None = None,
    num_keys: int | None = None,
    gathered: bool = False,
    head_dim: int = 64,
    dtype: Any = jnp.float32,
    has_sinks: bool = False,
) -> Callable[..., Array]:
    """Return the implementation for `length` queries: a function of q, k, v, their segments and the settings.

    The function also takes `shard`: the index of the queries' shard if `gathered`, else None.

    Args:
      num_keys: number of keys, as many as queries by default. The queries are the last of them or, if
        `gathered`, one shard of them.
    """
    num_keys = length if num_keys is None else num_keys
    tokens = f"{length} tokens" if num_keys == length else f"{length} tokens and {num_keys} keys"
    dtype_name = jnp.dtype(dtype).name
    case = f"attention over {tokens}, window {window}, heads of {head_dim}, {dtype_name}, on {platform}"
    # Below the smallest block the kernel would mostly compute padding.
    fused = allows_fused()
    if fused and platform == "tpu" and min(length, num_keys) >= tpu.BLOCKS[-1]:
        log_choice(f"{case}: splash attention")
        return tpu.attend

    # The implementation of one block.
    attend = reference_attention
    suffix = ""
    is_plain = softcap is None and not has_sinks
    if platform == "cpu" and is_plain:
        attend = _cpu_attention
        suffix = ", hand-written gradient"
    elif (
        fused
        and platform == "gpu"
        and gpu.is_supported(
            dtype=dtype, head_dim=head_dim, length=length, num_keys=num_keys, is_plain=is_plain
        )
    ):
        attend = _gpu_attention
        suffix = ", cuDNN"

    # The division of the sequence into blocks: large enough for products that keep the machine busy, small
    # enough to skip many masked scores. A window has fewer keys per query, so smaller blocks are enough.
    window_rows, causal_rows = (64, 128) if platform == "cpu" else (256, 256)
    block = max(causal_rows, _round_up(-(-length // MAX_CAUSAL_BLOCKS), 8))
    if gathered:
        log_choice(f"{case}: blocks of {block} queries over all keys{suffix}")
        return functools.partial(_query_blocks, attend=attend, block=block)
    if window is not None:
        window_block = max(window_rows, _round_up(window // 4, 8))
        # Window blocks pay off once they cover less than half of the sequence at a time.
        if 2 * (window_block + _round_up(window - 1, window_block)) <= length:
            log_choice(f"{case}: blocks of {window_block}, linear in length{suffix}")
            return functools.partial(_window_blocks, attend=attend, block=window_block)
    # cuDNN skips masked blocks itself.
    if length < 2 * causal_rows or attend is _gpu_attention:
        log_choice(f"{case}: one block{suffix}")
        return functools.partial(_one_block, attend=attend)
    log_choice(f"{case}: causal blocks of {block}{suffix}")
    return functools.partial(_causal_blocks, attend=attend, block=block)


# One block on CPU and on GPU --------------------------------------------------------------------------------
def _cpu_attention(
    q: Array, k: Array, v: Array, *, scale: float, softcap: None = None, **visibility
) -> Array:
    """`reference_attention` with a hand-written gradient, in layouts that are fast on CPU (products.py)."""
    batch, length, num_heads, head_dim = q.shape
    groups = num_heads // k.shape[2]
    # Heads that share keys and values become rows of one product.
    q_BKGTH = q.reshape(batch, length, -1, groups, head_dim).transpose(0, 2, 3, 1, 4)
    rows = q_BKGTH.reshape(batch, -1, groups * length, head_dim)
    mask = jnp.tile(attention_mask(**visibility), (1, groups, 1))[:, None]
    arrays = communication.match_varying(rows, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    out: Array = _masked_softmax_attention(*arrays, mask, scale)
    return out.reshape(batch, -1, groups, length, head_dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _masked_softmax_attention(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    return _attention_forward(q, k, v, mask, scale)[0]


def _attention_forward(
    q: Array, k: Array, v: Array, mask: Array, scale: float
) -> tuple[Array, tuple[Array, ...]]:
    """Forward pass for q [B K GT H], k and v [B K S H], mask [B 1 GT S]; scores and sums are float32."""
    scores = product(q, k, (-1, -1)) * scale
    visible = jnp.broadcast_to(mask, scores.shape)
    scores = jnp.where(visible, scores, MASKED_SCORE)
    powers = jnp.where(visible, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    # The bound keeps the weights of a query without any visible key at 0 rather than NaN.
    weights = (powers / jnp.maximum(jnp.sum(powers, axis=-1, keepdims=True), 1e-30)).astype(q.dtype)
    out = product(weights, v, (-1, -2))
    return out.astype(q.dtype), (q, k, v, weights, out)


def _attention_backward(
    scale: float, saved: tuple[Array, ...], dout: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, weights, out = saved
    # The gradient of the softmax subtracts sum(weights * dweights), which equals sum(dout * out).
    mean = jnp.sum(dout.astype(jnp.float32) * out, axis=-1, keepdims=True)
    dweights = product(dout, v, (-1, -1))
    dscores = (weights.astype(jnp.float32) * (dweights - mean) * scale).astype(q.dtype)
    dq = product(dscores, k, (-1, -2))
    dk = product(transposed(dscores), q, (-1, -2))
    dv = product(transposed(weights), dout, (-1, -2))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_masked_softmax_attention.defvjp(_attention_forward, _attention_backward)


def _gpu_attention(
    q: Array, k: Array, v: Array, *, scale: float, softcap: None = None, window: int | None, **ids
) -> Array:
    """`reference_attention` by cuDNN."""
    return gpu.attend(q, k, v, attention_mask(window=window, **ids), window=window, scale=scale)


# Division of a sequence into blocks -------------------------------------------------------------------------
def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _visibility_ids(q_segments: Array, k_segments: Array, first: Array | int) -> dict[str, Array]:
    """Return segments and indices in the row, the first query at index `first` of the keys.

    Indices serve as positions: within a contiguous document they differ by a constant only.
    """
    return {
        "q_segments": q_segments,
        "k_segments": k_segments,
        "q_positions": jnp.broadcast_to(first + jnp.arange(q_segments.shape[1])[None], q_segments.shape),
        "k_positions": jnp.broadcast_to(jnp.arange(k_segments.shape[1])[None], k_segments.shape),
    }


def _one_block(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_segments: Array,
    k_segments: Array,
    shard: None,
    attend: Callable[..., Array],
    **settings,
) -> Array:
    ids = _visibility_ids(q_segments, k_segments, k.shape[1] - q.shape[1])
    return attend(q, k, v, **ids, **settings)


def _block_by_block(
    q: Array,
    k: Array,
    v: Array,
    ids: dict[str, Array],
    *,
    attend: Callable[..., Array],
    block: int,
    visible_keys: Callable[[int], slice],
) -> Array:
    """Unroll blocks of queries, each over the keys that `visible_keys` returns for its first query."""
    outputs = []
    for start in range(0, q.shape[1], block):
        queries = slice(start, start + block)
        keys = visible_keys(start)
        block_ids = {name: x[:, queries if name.startswith("q_") else keys] for name, x in ids.items()}
        outputs.append(attend(q[:, queries], k[:, keys], v[:, keys], **block_ids))
    return jnp.concatenate(outputs, axis=1)


def _query_blocks(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_segments: Array,
    k_segments: Array,
    shard: Array | int,
    attend: Callable[..., Array],
    block: int,
    **settings,
) -> Array:
    """Attention of each block over all keys, recomputed in the backward pass: all scores would not fit."""
    attend = jax.checkpoint(functools.partial(attend, **settings))
    ids = _visibility_ids(q_segments, k_segments, shard * q.shape[1])
    return _block_by_block(q, k, v, ids, attend=attend, block=block, visible_keys=lambda start: slice(None))


def _causal_blocks(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_segments: Array,
    k_segments: Array,
    shard: None,
    window: int | None,
    attend: Callable[..., Array],
    block: int,
    **settings,
) -> Array:
    """Attention of each block over the keys it may see: from its start less the window to its own end."""
    first = k.shape[1] - q.shape[1]

    def visible_keys(start: int) -> slice:
        return slice(0 if window is None else max(0, first + start - window + 1), first + start + block)

    attend = functools.partial(attend, window=window, **settings)
    ids = _visibility_ids(q_segments, k_segments, first)
    return _block_by_block(q, k, v, ids, attend=attend, block=block, visible_keys=visible_keys)


def _window_blocks(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_segments: Array,
    k_segments: Array,
    shard: None,
    window: int,
    attend: Callable[..., Array],
    block: int,
    **settings,
) -> Array:
    """Attention of uniform blocks, moved into the batch dim, over their own keys and those before.

    Each block of queries gets the keys of its own block and of as many blocks before as the window spans.
    """
    # Blocks in the batch dim make one batched product, of a size that does not depend on the length.
    batch, length = q.shape[:2]
    num_blocks = -(-length // block)
    num_before = -(-(window - 1) // block)

    def blocks(x: Array, before: int) -> Array:
        """Reshape [B, S, ...] to [B * num_blocks, (before + 1) * block, ...], with zeros outside the row."""
        # Zeros are segment 0, which the mask treats as padding.
        missing = before * block - (x.shape[1] - length)
        x = jnp.pad(x, [(0, 0), (missing, num_blocks * block - length)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, num_blocks + before, block, *x.shape[2:])
        x = jnp.concatenate([x[:, shift : shift + num_blocks] for shift in range(before + 1)], axis=2)
        return x.reshape(batch * num_blocks, -1, *x.shape[3:])

    ids = _visibility_ids(q_segments, k_segments, k.shape[1] - length)
    ids = {name: blocks(x, 0 if name.startswith("q_") else num_before) for name, x in ids.items()}
    out = attend(blocks(q, 0), blocks(k, num_before), blocks(v, num_before), **ids, window=window, **settings)
    return out.reshape(batch, num_blocks * block, *q.shape[2:])[:, :length]
