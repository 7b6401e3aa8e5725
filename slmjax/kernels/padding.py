"""Padding on the right of packed rows, for recurrences.

Dims: B batch, T time.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def filled_segment_ids(segment_ids: Int[Array, "B T"], last: Int[Array, " B"]) -> Int[Array, "B T"]:
    """Return segment ids in which padding has that of the real token before it, `last` if there is none."""
    # Ids need not count up, as those of `models.padding` do.
    index = jnp.where(segment_ids > 0, jnp.arange(segment_ids.shape[1])[None, :], -1)
    latest = jax.lax.cummax(index, axis=1)
    ids = jnp.take_along_axis(segment_ids, jnp.maximum(latest, 0), axis=1)
    return jnp.where(latest >= 0, ids, last[:, None]).astype(jnp.int32)
