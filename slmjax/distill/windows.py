"""A teacher whose context is shorter than the rows: it reads them in overlapping windows, and its hidden
states are put together again.

    hidden = windowed(run_teacher, tokens, segment_ids, positions, context_length=2048, overlap=512)

With a context of 4 and an overlap of 2, a row of seven tokens is read in three windows (`.` is padding, and
in brackets are the states that are kept):

    window 0   [t0 t1 t2 t3]
    window 1         t2 t3 [t4 t5]
    window 2               t4 t5 [t6 .]

The first window is kept whole, and of each further one the part that no earlier window held: every state is
the one with the most context that any window gives it, which is at least `overlap` tokens, or the whole of
its document before it. It costs W / (W - overlap) times the tokens.

Dims: B rows, T tokens of a row, N windows of a row, W the teacher's context, D width of the teacher.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def num_windows(length: int, *, context_length: int, overlap: int) -> int:
    """How many windows a row of `length` tokens is read in.

    Raises:
      ValueError: the overlap leaves no new token in a window.
    """
    if not 0 <= overlap < context_length:
        raise ValueError(
            f"an overlap of {overlap} tokens does not fit the teacher's context of {context_length}: choose "
            "one from 0 to "
            f"{context_length - 1}; a quarter of the context is usual"
        )
    return 1 + max(0, -(-(length - context_length) // (context_length - overlap)))


def windowed(
    fn: Callable[[Array, Array, Array], Array],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    context_length: int,
    overlap: int,
) -> Float[Array, "B T D"]:
    """The hidden states of rows by a model that is never given more than `context_length` tokens at a time.

    Rows that fit are given to it as they are. Where they do not, positions begin at 0 with each piece of a
    document in a window; what lies beyond the end of a row is token 0 of segment 0, padding.

    Args:
      fn: tokens, segment ids and positions, [B * N, W] each, to hidden states [B * N, W, D].
      context_length: of the model, W.
      overlap: tokens of context that each further window repeats, fewer than W.

    Raises:
      ValueError: the overlap leaves no new token in a window.
    """
    num_rows, length = tokens.shape
    if length <= context_length:
        return fn(tokens, segment_ids, positions)
    count = num_windows(length, context_length=context_length, overlap=overlap)
    stride = context_length - overlap
    index = stride * np.arange(count)[:, None] + np.arange(context_length)  # [N, W], into the padded row
    padding = ((0, 0), (0, int(index[-1, -1]) + 1 - length))
    parts = [
        jnp.pad(rows, padding)[:, index].reshape(num_rows * count, context_length)
        for rows in (tokens, segment_ids, positions)
    ]
    hidden = fn(parts[0], parts[1], restarted(parts[2], segment_ids=parts[1]))
    hidden = hidden.reshape(num_rows, count, context_length, hidden.shape[-1])
    rest = hidden[:, 1:, overlap:].reshape(num_rows, (count - 1) * stride, hidden.shape[-1])
    return jnp.concatenate([hidden[:, 0], rest], axis=1)[:, :length]


def restarted(positions: Int[Array, "M W"], *, segment_ids: Int[Array, "M W"]) -> Int[Array, "M W"]:
    """Positions that begin at 0 where a segment begins in its window, with the steps that they had."""
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, jnp.arange(positions.shape[1])[None, :], 0), axis=1)
    return positions - jnp.take_along_axis(positions, first, axis=1)
