"""Padding on the right, for mixers whose decoding state is that after the last token of a document.

    documents = fill_padding(segment_ids, last)                          # padding belongs to what precedes it
    history = last_real(jnp.concatenate([history, x], 1), segment_ids, size=history.shape[1])

Prompts of different lengths are padded on the right with segment id 0, and a whole call may be padding for
some rows: those of finished prompts, and of short ones when a long one is read in parts. Padding must leave a
state as it is: with a recurrence, a decay of one and no input.

Dims: B batch, T time, W entries of the history, S = W + T.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def fill_padding(segment_ids: Int[Array, "B T"], last: Int[Array, " B"]) -> Int[Array, "B T"]:
    """Return segment ids in which padding has the id of the last real token before it.

    Ids of a row count up. Those of the last column belong into the next state.

    Args:
      segment_ids: 0 marks padding.
      last: the id of the last real token of earlier calls; 0 if there is none.

    >>> fill_padding(jnp.array([[0, 1, 1, 0, 2, 0]]), jnp.array([0])).tolist()
    [[0, 1, 1, 1, 2, 2]]
    """
    with_last = jnp.concatenate([last[:, None].astype(segment_ids.dtype), segment_ids], axis=1)
    return jax.lax.cummax(with_last, axis=1)[:, 1:]


def last_real(
    values: Shaped[Array, "B S *D"], segment_ids: Int[Array, "B T"], *, size: int
) -> Shaped[Array, "B W *D"]:
    """Return the entries of the last `size` real tokens, of those before this call and of its own.

    Args:
      values: entries of the state, W = `size` of them, then those of the T tokens of this call, of which
        padding is last.
      segment_ids: of the tokens of this call; 0 marks padding.

    >>> last_real(jnp.array([[7, 8, 1, 2, 0]]), jnp.array([[1, 1, 0]]), size=2).tolist()
    [[1, 2]]
    """
    # The last real token is at index W - 1 + their number.
    last = jnp.sum(segment_ids > 0, axis=1)[:, None] + jnp.arange(size)[None, :]
    return jnp.take_along_axis(values, last.reshape(*last.shape, *(1,) * (values.ndim - 2)), axis=1)
