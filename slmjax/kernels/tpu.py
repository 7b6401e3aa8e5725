"""Attention on TPU: JAX's splash attention kernel, on packed rows.

It supports grouped heads, windows, soft-caps, sinks and any head dim. The kernel compares indices in the row
where the reference compares positions; for contiguous documents, and with segment ids, the results are equal.
It computes blocks of 128 or more rows, so lengths are rounded up, and it skips blocks that no query sees. The
compiler does not partition Mosaic kernels: call this inside `shard_mapped`, on the arrays of one device.

Dims: B batch, T query time, S key time, N heads, K kv heads, H head dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Sizes of a block of queries or keys; the largest that divides the length is used. TPUs have 128 lanes.
BLOCKS = (512, 256, 128)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    window: int | None,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    shard: Array | int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Return `reference_attention` of T queries over S keys of the same rows.

    Args:
      shard: the index of the queries' shard among the S / T shards of a row; None if the queries are the last
        T tokens of the keys.
      interpret: run the kernel without a TPU, slowly, for tests.

    Raises:
      ValueError: sharded queries are not a multiple of 128.
    """
    # A slow import that only TPUs need.
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    length = q.shape[1]
    num_keys = k.shape[1]
    if shard is not None and length % BLOCKS[-1]:
        raise ValueError(
            f"sequences of {num_keys} tokens over {num_keys // length} devices leave {length} to each: on "
            f"TPU that must be a multiple of {BLOCKS[-1]} for layers without a window. Change "
            "data.sequence_length or mesh.context"
        )
    # Keys are padded at the start, so that the last queries still match the last keys. The added keys have
    # segment id 0, which the mask treats as padding.
    more_queries = -length % BLOCKS[-1]
    more_keys = -(num_keys + -length % BLOCKS[-1]) % BLOCKS[-1]
    before, after = (0, 0) if shard is not None else (more_keys, more_queries)
    # The kernel has no argument for the scale.
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, q_ids = (_padded(x, 0, after) for x in (q, q_segments))
    k, v, k_ids = (_padded(x, before, after) for x in (k, v, k_segments))
    kernel = _kernel(
        q.shape[1] if shard is None else num_keys,
        k.shape[1],
        num_heads=q.shape[2],
        window=window,
        softcap=softcap,
        num_shards=1 if shard is None else num_keys // length,
        interpret=interpret,
    )
    if shard is not None:
        kernel = _of_shard(kernel, shard, num_keys // length)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    mixed = jax.vmap(functools.partial(kernel, sinks=sinks))(
        *heads_first, segment_ids=SegmentIds(q=q_ids, kv=k_ids)
    )
    mixed = jnp.swapaxes(mixed, 1, 2)[:, :length]
    # To the kernel, segment 0 is a document like others.
    return jnp.where((q_segments != 0)[:, :, None, None], mixed, 0)


def _padded(x: Array, before: int, after: int) -> Array:
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2)) if before or after else x


def _kernel(
    num_queries: int,
    num_keys: int,
    *,
    num_heads: int,
    window: int | None,
    softcap: float | None,
    num_shards: int,
    interpret: bool,
) -> Any:
    """Build the kernel for queries that are the last of the keys, with its tables of blocks to visit."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    # Causal masks count from equal starts; the offset aligns the ends.
    offset = num_keys - num_queries
    mask = splash.LocalMask((num_queries, num_keys), (None if window is None else window - 1, 0), offset)
    rows = _block(num_queries // num_shards)
    columns = _block(num_keys)
    blocks = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=num_shards,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )


def _block(length: int) -> int:
    return next(block for block in BLOCKS if length % block == 0)


def _of_shard(kernel: Any, shard: Array | int, num_shards: int) -> Any:
    """Return the kernel with only the tables that one shard of the queries needs."""

    def take(table: Any, axis: int) -> Any:
        size = 0 if table is None else table.shape[axis] // num_shards
        return None if table is None else jax.lax.dynamic_slice_in_dim(table, shard * size, size, axis)

    def shard_info(info: Any) -> Any:
        tables = {name: take(getattr(info, name), 1) for name in ("data_next", "mask_next", "block_mask")}
        return info._replace(q_sequence=take(info.q_sequence, 0), **tables)

    mask_infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return type(kernel)(*(shard_info(info) for info in mask_infos), **kernel.kwargs)
