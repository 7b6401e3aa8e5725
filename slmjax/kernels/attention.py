"""Attention: the reference, and the form that a whole sequence runs in.

`reference_attention` is the definition, and what decoding with a cache calls; `self_attention` is what a
whole sequence calls, and picks a form by platform and shape. Every form equals the reference, by test. A
sequence may be divided over devices: queries then stay where they are, and keys come to them, all of them or,
in a window, those just before a device's own.

Dims: B batch, T query time, S key time, N heads, K kv heads, G heads per kv head (N = K G), H head dim.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slmjax.kernels import cpu, gpu, tpu
from slmjax.kernels.choice import allows_fused, announce
from slmjax.parallel import communication, mesh

MAX_CAUSAL_BLOCKS = 8  # unrolled in the program: 8 of them compute 56% of the square, 16 would compute 53%


def attention_mask(
    *,
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """True where a query may see a key: same document (not padding), not later, and less than `window`
    positions back.
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    allowed = (
        (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments[:, :, None] != 0) & (distance >= 0)
    )
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
) -> Float[Array, "B T N H"]:
    """Softmax attention of queries over keys of their own segment at their own or earlier positions.

    Segment 0 is padding, or an empty slot of a cache: it sees nothing and is seen by nothing. A query that
    may see nothing gives 0, with gradients 0. Scores and softmax are float32; the result has the dtype of
    `q`.

    Args:
      window: a query sees the `window` latest positions, its own included; None for all.
      scale: multiplies the scores.
      softcap: scores are bounded by `softcap * tanh(scores / softcap)` (Gemma 2); None for unbounded.
      sinks: for each head a score that takes part in the softmax and has no value (GPT-OSS).
    """
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
    )
    mask = mask[:, None, None, :, :]
    # Masked again after the softmax: a row that sees nothing would otherwise be the mean of all values.
    scores = jnp.where(mask, scores, cpu.MASKED_SCORE)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sink = jnp.broadcast_to(
            sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1, 1), (*scores.shape[:-1], 1)
        )
        weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
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
    """`reference_attention` of a sequence over itself, in the form that suits platform and shape, on any
    mesh.

    Segments must be contiguous, as packed batches have them: distances are then those between places in the
    row, and only keys close by in the row can be visible.
    """
    target = mesh.platform()
    num_heads = q.shape[2]

    def on_device(q: Array, k: Array, v: Array, segments: Array, *sinks: Array) -> Array:
        if communication.is_sharded("heads") and not communication.is_sharded("kv_heads"):
            # These query heads need not be those of whole groups: each gets a key-value head of its own.
            here = communication.index_along("heads") * q.shape[2] + jnp.arange(q.shape[2])
            k, v = (jnp.take(x, here // (num_heads // k.shape[2]), axis=2) for x in (k, v))
        length = q.shape[1]
        shards = communication.num_shards("time")
        gathered = shards > 1 and (window is None or window > (shards - 1) * length)
        if gathered:
            keys = [communication.gather(x, "time", axis=1) for x in (k, v, segments)]
        else:
            keys = [communication.halo(x, "time", size=(window or 1) - 1, axis=1) for x in (k, v, segments)]
        form = choose_attention(
            length,
            window=window,
            platform=target,
            softcap=softcap,
            num_keys=keys[0].shape[1],
            gathered=gathered,
            head_dim=q.shape[3],
            dtype=q.dtype,
            has_sinks=bool(sinks),
        )
        form = functools.partial(form, sinks=sinks[0]) if sinks else form
        ids = {
            "q_segments": segments,
            "k_segments": keys[2],
            "shard": communication.index_along("time") if gathered else None,
        }
        return form(q, keys[0], keys[1], **ids, window=window, scale=scale, softcap=softcap)

    queries = ("batch", "time", "heads", None)
    pairs = ("batch", "time", "kv_heads", None)
    marks = ("batch", "time")
    in_dims = (queries, pairs, pairs, marks)
    arrays = (q, k, v, segment_ids)
    if sinks is not None:
        in_dims = (*in_dims, ("heads",))
        arrays = (*arrays, sinks)
    return communication.shard_mapped(on_device, in_dims=in_dims, out_dims=queries, checked=target == "cpu")(
        *arrays
    )


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
    """The form of attention of a device's `length` queries: a function of q, k, v, their segments, `shard`
    and the settings.

    Args:
      num_keys: of which the queries are the last, or, if `gathered`, one shard; as many as queries by
        default.
    """
    num_keys = length if num_keys is None else num_keys
    over = f"{length} tokens" if num_keys == length else f"{length} tokens and {num_keys} keys"
    name = (
        f"attention over {over}, window {window}, heads of {head_dim}, {jnp.dtype(dtype).name}, on {platform}"
    )
    fused = allows_fused()
    if fused and platform == "tpu" and min(length, num_keys) >= tpu.BLOCKS[-1]:
        announce(f"{name}: splash attention")
        return tpu.attend
    attend = reference_attention
    how = ""
    is_plain = softcap is None and not has_sinks
    if platform == "cpu" and is_plain:
        attend = _cpu_attention
        how = ", gradient written out"
    expressible = gpu.is_expressible(
        dtype=dtype, head_dim=head_dim, length=length, num_keys=num_keys, is_plain=is_plain
    )
    if fused and platform == "gpu" and expressible:
        attend = _gpu_attention
        how = ", cuDNN"
    # Rows of a product that keeps the machine busy, with keys of a window and with all keys before them.
    window_rows, causal_rows = (64, 128) if platform == "cpu" else (256, 256)
    block = max(causal_rows, _round_up(-(-length // MAX_CAUSAL_BLOCKS), 8))
    if gathered:
        announce(f"{name}: blocks of {block} queries over all keys{how}")
        return functools.partial(_query_blocks, attend=attend, block=block)
    if window is not None:
        window_block = max(window_rows, _round_up(window // 4, 8))
        if 2 * (window_block + _round_up(window - 1, window_block)) <= length:
            announce(f"{name}: blocks of {window_block}, linear in length{how}")
            return functools.partial(_window_blocks, attend=attend, block=window_block)
    if length < 2 * causal_rows or attend is _gpu_attention:
        announce(f"{name}: one block{how}")
        return functools.partial(_whole, attend=attend)
    announce(f"{name}: causal blocks of {block}{how}")
    return functools.partial(_causal_blocks, attend=attend, block=block)


# How one block is computed ----------------------------------------------------------------------------------
def _cpu_attention(q: Array, k: Array, v: Array, *, scale: float, softcap: None = None, **visible) -> Array:
    """`reference_attention` with the gradient that is written out for CPUs."""
    return cpu.attend(q, k, v, attention_mask(**visible), scale=scale)


def _gpu_attention(
    q: Array, k: Array, v: Array, *, scale: float, softcap: None = None, window: int | None, **ids
) -> Array:
    """`reference_attention` by cuDNN."""
    return gpu.attend(q, k, v, attention_mask(window=window, **ids), window=window, scale=scale)


# How a sequence is cut into blocks --------------------------------------------------------------------------
def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _ids(q_segments: Array, k_segments: Array, first: Array | int) -> dict[str, Array]:
    """Segments and places of keys, and of queries of which the first is at this place."""
    places = {
        "q_positions": jnp.broadcast_to(first + jnp.arange(q_segments.shape[1])[None], q_segments.shape),
        "k_positions": jnp.broadcast_to(jnp.arange(k_segments.shape[1])[None], k_segments.shape),
    }
    return {"q_segments": q_segments, "k_segments": k_segments, **places}


def _whole(
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
    return attend(q, k, v, **_ids(q_segments, k_segments, k.shape[1] - q.shape[1]), **settings)


def _block_by_block(
    q: Array,
    k: Array,
    v: Array,
    ids: dict[str, Array],
    *,
    attend: Callable[..., Array],
    block: int,
    seen: Callable[[int], slice],
) -> Array:
    """Blocks of queries, unrolled, each over the keys that `seen` gives for its first query."""
    outputs = []
    for start in range(0, q.shape[1], block):
        rows = slice(start, start + block)
        keys = seen(start)
        own = {name: x[:, rows if name.startswith("q_") else keys] for name, x in ids.items()}
        outputs.append(attend(q[:, rows], k[:, keys], v[:, keys], **own))
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
    """Each block over all keys; in the backward pass it is computed again, as all scores take much room."""
    attend = jax.checkpoint(functools.partial(attend, **settings))
    ids = _ids(q_segments, k_segments, shard * q.shape[1])
    return _block_by_block(q, k, v, ids, attend=attend, block=block, seen=lambda start: slice(None))


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
    """Each block over the keys it may see: from its start less the window to its own end."""
    first = k.shape[1] - q.shape[1]

    def seen(start: int) -> slice:
        return slice(0 if window is None else max(0, first + start - window + 1), first + start + block)

    attend = functools.partial(attend, window=window, **settings)
    return _block_by_block(
        q, k, v, _ids(q_segments, k_segments, first), attend=attend, block=block, seen=seen
    )


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
    """Uniform blocks, moved into the batch dim, each with its own keys and those of as many blocks before as
    the window spans.
    """
    batch, length = q.shape[:2]
    num_blocks = -(-length // block)
    num_before = -(-(window - 1) // block)

    def blocks(x: Array, before: int) -> Array:
        """[B, S, ...] to [B * num_blocks, (before + 1) * block, ...]; zeros, which are segment 0, outside the
        row.
        """
        missing = before * block - (x.shape[1] - length)
        x = jnp.pad(x, [(0, 0), (missing, num_blocks * block - length)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, num_blocks + before, block, *x.shape[2:])
        x = jnp.concatenate([x[:, shift : shift + num_blocks] for shift in range(before + 1)], axis=2)
        return x.reshape(batch * num_blocks, -1, *x.shape[3:])

    ids = _ids(q_segments, k_segments, k.shape[1] - length)
    own = {name: blocks(x, 0 if name.startswith("q_") else num_before) for name, x in ids.items()}
    out = attend(blocks(q, 0), blocks(k, num_before), blocks(v, num_before), **own, window=window, **settings)
    return out.reshape(batch, num_blocks * block, *q.shape[2:])[:, :length]
