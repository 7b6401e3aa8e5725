"""Attention: the reference, and the form that a whole sequence runs in.

`reference_attention` is the definition, and what decoding with a cache calls; `self_attention` is what a whole sequence
calls, and picks a form by platform and shape. Every form equals the reference, by test.

Dims: B batch, T query time, S key time, N heads, K kv heads, G heads per kv head (N = K G), H head dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slmjax.kernels import cpu
from slmjax.kernels.choice import announce

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
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, cpu.MASKED_SCORE), axis=-1), 0.0)
    return jnp.einsum("bkgts,bskh->btkgh", weights.astype(q.dtype), v).reshape(q.shape)


def _cpu_attention(q: Array, k: Array, v: Array, *, scale: float, softcap: None = None, **visible) -> Array:
    """`reference_attention` with the gradient that is written out for CPUs."""
    return cpu.attend(q, k, v, attention_mask(**visible), scale=scale)


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
    form = choose_attention(q.shape[1], window=window, platform=jax.default_backend(), softcap=softcap)
    return form(q, k, v, segment_ids=segment_ids, positions=positions, window=window, scale=scale, softcap=softcap)


def choose_attention(length: int, *, window: int | None, platform: str, softcap: float | None = None) -> Callable[..., Array]:
    """The form of self-attention for sequences of `length` tokens: a function of `self_attention`'s arguments."""
    own = platform == "cpu" and softcap is None
    attend = _cpu_attention if own else reference_attention
    # Rows of a product that keeps the machine busy, with keys of a window and with all keys before them.
    window_rows, causal_rows = (64, 128) if platform == "cpu" else (256, 256)
    name = f"attention over {length} tokens, window {window}, on {platform}{', gradient written out' if own else ''}"
    if window is not None:
        block = max(window_rows, _round_up(window // 4, 8))
        if 2 * (block + _round_up(window - 1, block)) <= length:
            announce(f"{name}: blocks of {block}, linear in length")
            return functools.partial(_window_blocks, attend=attend, block=block)
    if length < 2 * causal_rows:
        announce(f"{name}: one block")
        return functools.partial(_whole, attend=attend)
    block = max(causal_rows, _round_up(-(-length // MAX_CAUSAL_BLOCKS), 8))
    announce(f"{name}: causal blocks of {block}")
    return functools.partial(_causal_blocks, attend=attend, block=block)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _whole(q: Array, k: Array, v: Array, *, segment_ids: Array, positions: Array, attend: Callable[..., Array], **settings) -> Array:
    return attend(q, k, v, q_segments=segment_ids, k_segments=segment_ids, q_positions=positions, k_positions=positions, **settings)


def _causal_blocks(
    q: Array,
    k: Array,
    v: Array,
    *,
    segment_ids: Array,
    positions: Array,
    window: int | None,
    attend: Callable[..., Array],
    block: int,
    **settings,
) -> Array:
    """Blocks of queries, unrolled, each over the keys it may see: from its start less the window to its own end."""
    outputs = []
    for start in range(0, q.shape[1], block):
        rows = slice(start, start + block)
        seen = slice(0 if window is None else max(0, start - window + 1), start + block)
        outputs.append(
            attend(
                *(q[:, rows], k[:, seen], v[:, seen]),
                **{"q_segments": segment_ids[:, rows], "k_segments": segment_ids[:, seen]},
                **{"q_positions": positions[:, rows], "k_positions": positions[:, seen]},
                window=window,
                **settings,
            )
        )
    return jnp.concatenate(outputs, axis=1)


def _window_blocks(
    q: Array, k: Array, v: Array, *, segment_ids: Array, positions: Array, window: int, attend: Callable[..., Array], block: int, **settings
) -> Array:
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

    out = attend(
        *(blocks(q, 0), blocks(k, num_before), blocks(v, num_before)),
        **{"q_segments": blocks(segment_ids, 0), "k_segments": blocks(segment_ids, num_before)},
        **{"q_positions": blocks(positions, 0), "k_positions": blocks(positions, num_before)},
        window=window,
        **settings,
    )
    return out.reshape(batch, num_blocks * block, *q.shape[2:])[:, :length]
