"""Teachers with a short context: sequences are read in overlapping windows, whose hidden states are joined.

    hidden = windowed(run_teacher, tokens, segment_ids, positions, context_length=2048, overlap=512)

With a context of 4 and an overlap of 2, a row of seven tokens is read in three windows (`.` is padding; the
hidden states in brackets are used):

    window 0   [t0 t1 t2 t3]
    window 1         t2 t3 [t4 t5]
    window 2               t4 t5 [t6 .]

All states of the first window are used, and of each further window those of the tokens that are new. Every
state is then the one with the most context that any window gives it: at least `overlap` tokens, or all of its
document before it. The cost is W / (W - overlap) times the tokens.

Dims: B rows, T tokens of a row, N windows of a row, W the teacher's context, M rows of windows, D width of
the teacher.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def num_windows(length: int, *, context_length: int, overlap: int) -> int:
    """Return the number of windows for a row of `length` tokens.

    Raises:
      ValueError: the overlap leaves no new token in a window.
    """
    if not 0 <= overlap < context_length:
        raise ValueError(
            f"an overlap of {overlap} tokens does not fit the teacher's context of {context_length}: choose "
            f"one from 0 to {context_length - 1}; a quarter of the context is usual"
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
    """Return hidden states from a model that reads at most `context_length` tokens at a time.

    Rows that fit are passed on unchanged. In longer ones, positions start at 0 with each piece of a document
    in a window; beyond the end of a row there is padding, token 0 of segment 0.

    Args:
      fn: maps tokens, segment ids and positions, [B * N, W] each, to hidden states [B * N, W, D].
      tokens: ids.
      segment_ids: number of the document of each token within its row; 0 is padding.
      positions: position of each token in its document.
      context_length: context of the model, W.
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
    window_tokens, window_segments, window_positions = (
        jnp.pad(x, padding)[:, index].reshape(num_rows * count, context_length)
        for x in (tokens, segment_ids, positions)
    )
    # The model knows positions up to its context length: those of a long document go beyond it.
    window_positions = restarted(window_positions, segment_ids=window_segments)
    hidden = fn(window_tokens, window_segments, window_positions)
    hidden = hidden.reshape(num_rows, count, context_length, hidden.shape[-1])
    rest = hidden[:, 1:, overlap:].reshape(num_rows, (count - 1) * stride, hidden.shape[-1])
    return jnp.concatenate([hidden[:, 0], rest], axis=1)[:, :length]


def restarted(positions: Int[Array, "M W"], *, segment_ids: Int[Array, "M W"]) -> Int[Array, "M W"]:
    """Return positions that start at 0 with each segment of a window, with unchanged differences."""
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(starts, jnp.arange(positions.shape[1])[None, :], 0), axis=1)
    return positions - jnp.take_along_axis(positions, first, axis=1)
