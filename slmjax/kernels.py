"""Attention and grouped matrix products: the reference of each, and which form runs where.

`reference_attention` is the definition, and what decoding with a cache calls; `self_attention` is what a whole sequence
calls, and picks a form by platform and shape. `grouped_matmul` multiplies each row with the matrix of its group, the inner
product of a mixture of experts. Every form equals its reference, by test; what was picked is logged once.

Dims: B batch, T query time, S key time, N heads, K kv heads, G heads per kv head (N = K G), H head dim;
M rows, D in, F out, E groups.
"""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slmjax import sharding

logger = logging.getLogger(__name__)

MASKED_SCORE = -1e30  # finite, so that a row without any visible key has finite gradients
MAX_CAUSAL_BLOCKS = 8  # unrolled in the program: 8 of them compute 56% of the square, 16 would compute 53%


def attention_mask(
    *,
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """True where a query may see a key: same document (not padding), not later, and less than `window` positions back."""
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    allowed = (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments[:, :, None] != 0) & (distance >= 0)
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
) -> Float[Array, "B T N H"]:
    """Softmax attention of queries over keys of their own segment at their own or earlier positions.

    Segment 0 is padding, or an empty slot of a cache: it sees nothing and is seen by nothing. A query that may see nothing
    gives 0, with gradients 0. Scores and softmax are float32; the result has the dtype of `q`.

    Args:
      window: a query sees the `window` latest positions, its own included; None for all.
      scale: multiplies the scores.
      softcap: scores are bounded by `softcap * tanh(scores / softcap)` (Gemma 2); None for unbounded.
    """
    num_kv_heads = k.shape[2]
    q_BTKGH = q.reshape(*q.shape[:2], num_kv_heads, -1, q.shape[3])
    scores = scale * jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = attention_mask(q_segments=q_segments, k_segments=k_segments, q_positions=q_positions, k_positions=k_positions, window=window)
    mask = mask[:, None, None, :, :]
    # Masked again after the softmax: a row that sees nothing would otherwise be the mean of all values.
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, MASKED_SCORE), axis=-1), 0.0)
    return jnp.einsum("bkgts,bskh->btkgh", weights.astype(q.dtype), v).reshape(q.shape)


def self_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    window: int | None,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """`reference_attention` of a sequence over itself, in the form that suits platform and shape.

    Segments must be contiguous and positions count up by one within each, as packed batches have them: then only keys
    close by in the row can be visible, and the others are not computed.
    """
    attend = choose_attention(q.shape[1], window=window, platform=jax.default_backend())
    return attend(q, k, v, segment_ids=segment_ids, positions=positions, window=window, scale=scale, softcap=softcap)


def choose_attention(length: int, *, window: int | None, platform: str) -> Callable[..., Array]:
    """The form of self-attention for sequences of `length` tokens: a function of `self_attention`'s arguments."""
    smallest = 64 if platform == "cpu" else 256  # rows of a product that keeps the machine busy
    if length < 2 * smallest:
        _announce(f"attention over {length} tokens on {platform}: one block")
        return _whole
    if window is not None:
        block = max(smallest, _round_up(window // 2, 8))
        if 2 * (block + _round_up(window - 1, block)) <= length:
            _announce(f"attention over {length} tokens, window {window}, on {platform}: blocks of {block}, linear in length")
            return functools.partial(_window_blocks, block=block)
    block = max(smallest, _round_up(-(-length // MAX_CAUSAL_BLOCKS), 8))
    _announce(f"attention over {length} tokens, window {window}, on {platform}: causal blocks of {block}")
    return functools.partial(_causal_blocks, block=block)


@functools.cache
def _announce(choice: str) -> None:
    logger.info(choice)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _whole(q: Array, k: Array, v: Array, *, segment_ids: Array, positions: Array, **settings) -> Array:
    return reference_attention(
        q, k, v, q_segments=segment_ids, k_segments=segment_ids, q_positions=positions, k_positions=positions, **settings
    )


def _causal_blocks(
    q: Array, k: Array, v: Array, *, segment_ids: Array, positions: Array, window: int | None, block: int, **settings
) -> Array:
    """Blocks of queries, unrolled, each over the keys it may see: from its start less the window to its own end."""
    outputs = []
    for start in range(0, q.shape[1], block):
        rows = slice(start, start + block)
        seen = slice(0 if window is None else max(0, start - window + 1), start + block)
        outputs.append(
            reference_attention(
                *(q[:, rows], k[:, seen], v[:, seen]),
                **{"q_segments": segment_ids[:, rows], "k_segments": segment_ids[:, seen]},
                **{"q_positions": positions[:, rows], "k_positions": positions[:, seen]},
                window=window,
                **settings,
            )
        )
    return jnp.concatenate(outputs, axis=1)


def _window_blocks(q: Array, k: Array, v: Array, *, segment_ids: Array, positions: Array, window: int, block: int, **settings) -> Array:
    """Uniform blocks, moved into the batch dim, each with its own keys and those of as many blocks before as the window spans."""
    batch, length = q.shape[:2]
    num_blocks = -(-length // block)
    num_before = -(-(window - 1) // block)

    def blocks(x: Array, before: int) -> Array:
        """[B, T, ...] to [B * num_blocks, (before + 1) * block, ...]; zeros, which are segment 0, outside the row."""
        x = jnp.pad(x, [(0, 0), (before * block, num_blocks * block - length)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, num_blocks + before, block, *x.shape[2:])
        x = jnp.concatenate([x[:, shift : shift + num_blocks] for shift in range(before + 1)], axis=2)
        return x.reshape(batch * num_blocks, -1, *x.shape[3:])

    out = reference_attention(
        *(blocks(q, 0), blocks(k, num_before), blocks(v, num_before)),
        **{"q_segments": blocks(segment_ids, 0), "k_segments": blocks(segment_ids, num_before)},
        **{"q_positions": blocks(positions, 0), "k_positions": blocks(positions, num_before)},
        window=window,
        **settings,
    )
    return out.reshape(batch, num_blocks * block, *q.shape[2:])[:, :length]


# Grouped products -----------------------------------------------------------------------------------------------------
def grouped_matmul(x: Float[Array, "M D"], weights: Float[Array, "E D F"], group_sizes: Int[Array, " E"]) -> Float[Array, "M F"]:
    """Each row times the matrix of its group, in the dtype of `x`; rows past the sum of `group_sizes` give 0.

    Args:
      x: rows sorted by group.
      group_sizes: int32, how many rows each group has; they sum to at most M.
    """
    # Both forms have gradients of their own: under `sharding.local` all arguments must enter as equally divided.
    return choose_grouped_matmul(jax.default_backend())(*sharding.alike(x, weights.astype(x.dtype), group_sizes))


def choose_grouped_matmul(platform: str) -> Callable[[Array, Array, Array], Array]:
    """The form of `grouped_matmul` for a platform.

    `jax.lax.ragged_dot` is one kernel on TPU and GPU. On CPU it multiplies every row with every group's matrix, so that
    blocks of rows are used instead.
    """
    _announce(f"grouped products on {platform}: " + ("blocks of rows" if platform == "cpu" else "jax.lax.ragged_dot"))
    return _blocked_groups if platform == "cpu" else _ragged_groups


def _ragged_groups(x: Array, weights: Array, group_sizes: Array) -> Array:
    # What a kernel leaves in the rows past the last group is not specified, in the product and in its gradient.
    grouped = (jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None]
    return jnp.where(grouped, jax.lax.ragged_dot(jnp.where(grouped, x, 0), weights, group_sizes), 0)


@jax.custom_vjp
def _blocked_groups(x: Array, weights: Array, group_sizes: Array) -> Array:
    """A loop over blocks of rows, each of one group. Rows are sorted, so that a block is a slice and nothing is gathered."""
    return _block_products(x, weights, group_sizes, contracted=0)


def _blocked_groups_forward(x: Array, weights: Array, group_sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _block_products(x, weights, group_sizes, contracted=0), (x, weights, group_sizes)


def _blocked_groups_backward(saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, weights, group_sizes = saved
    dx = _block_products(dy, weights, group_sizes, contracted=1)
    return dx, _block_outer_products(x, dy, group_sizes).astype(weights.dtype), None


_blocked_groups.defvjp(_blocked_groups_forward, _blocked_groups_backward)


def _block_layout(group_sizes: Array, num_rows: int) -> tuple[int, Array, Array, Array, Array]:
    """Rows per block; then group, first row and number of rows of each block, and how many of the blocks are in use."""
    num_groups = group_sizes.shape[0]
    block = min(128, max(8, _round_up(num_rows // num_groups, 8)))
    blocks = -(-group_sizes // block)
    ends = jnp.cumsum(blocks)
    index = jnp.arange(-(-num_rows // block) + num_groups)
    group = jnp.minimum(jnp.searchsorted(ends, index, side="right"), num_groups - 1)
    skipped = block * (index - (ends - blocks)[group])
    first = (jnp.cumsum(group_sizes) - group_sizes)[group] + skipped
    return block, group, first, jnp.clip(group_sizes[group] - skipped, 0, block), ends[-1]


def _block_products(x: Array, weights: Array, group_sizes: Array, *, contracted: int) -> Array:
    """Rows times their group's matrix, contracting this dim of it. A block overhangs into the next group's rows, which the
    next block then overwrites; the overhang of the last is zeros."""
    num_rows = x.shape[0]
    block, group, first, count, num_blocks = _block_layout(group_sizes, num_rows)
    padded = jnp.pad(x, [(0, block), (0, 0)])
    offset = jnp.arange(block)[:, None]

    def multiply(index: Array, out: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(padded, first[index], block)
        matrix = jax.lax.dynamic_index_in_dim(weights, group[index], keepdims=False)
        product = jax.lax.dot_general(rows, matrix, (((1,), (contracted,)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(offset < count[index], product, 0), first[index], axis=0)

    start, _ = sharding.alike(jnp.zeros((num_rows + block, weights.shape[2 - contracted]), x.dtype), x)
    return jax.lax.fori_loop(0, num_blocks, multiply, start)[:num_rows]


def _block_outer_products(x: Array, dy: Array, group_sizes: Array) -> Array:
    """For each group the sum over its rows of the outer product of `x` and `dy`, in float32: [E, D, F]."""
    block, group, first, count, num_blocks = _block_layout(group_sizes, x.shape[0])
    padded_x, padded_dy = jnp.pad(x, [(0, block), (0, 0)]), jnp.pad(dy, [(0, block), (0, 0)])
    offset = jnp.arange(block)[:, None]

    def accumulate(index: Array, total: Array) -> Array:
        rows = jnp.where(offset < count[index], jax.lax.dynamic_slice_in_dim(padded_x, first[index], block), 0)
        outputs = jax.lax.dynamic_slice_in_dim(padded_dy, first[index], block)
        product = jax.lax.dot_general(rows, outputs, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_index_in_dim(total, group[index], keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, before + product, group[index], axis=0)

    start, _ = sharding.alike(jnp.zeros((group_sizes.shape[0], x.shape[1], dy.shape[1]), jnp.float32), x)
    return jax.lax.fori_loop(0, num_blocks, accumulate, start)
