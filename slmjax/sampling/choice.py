"""From logits to the next token: penalty, temperature, top-k, top-p, min-p, draw.

Dims: B prompts, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Number = float | Float[Array, ""]


def next_tokens(
    logits: Float[Array, "B V"],
    keys: Any,
    *,
    temperature: Number | None,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
) -> Int[Array, " B"]:
    """Return one token for each row of logits, drawn with the key of the row.

    Without a temperature it is the most likely token.
    """
    # Greedy decoding needs no random numbers.
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    filtered = filtered_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)


def penalised(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], *, penalty: Number
) -> Float[Array, "B V"]:
    """Return logits with tokens of the text so far made less likely by a factor.

    Source: https://arxiv.org/abs/1909.05858, section 4.1.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered_logits(
    logits: Float[Array, "B V"],
    *,
    temperature: Number,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
) -> Float[Array, "B V"]:
    """Return logits divided by the temperature, with -inf for tokens that are never drawn.

    Of equal logits the lower id counts as the more likely, as in `argmax`, so that exactly k remain. Top-p
    (https://arxiv.org/abs/1904.09751) uses the probabilities that top-k has left, and keeps at least one
    token. Min-p (https://arxiv.org/abs/2407.01082) compares with the most likely token, which both keep.
    """
    # Subtracting the maximum first keeps a low temperature from overflowing.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    # The most likely token has the scaled logit 0: probabilities relative to it need no sum.
    # Min-p is independent of the sorting that top-k and top-p need.
    if min_p is not None:
        logits = jnp.where(scaled >= jnp.log(min_p), scaled, -jnp.inf)
    else:
        logits = scaled
    if top_k is None and top_p is None:
        return logits
    # A stable sort, so that ties go to the lower id.
    order = jnp.argsort(scaled, axis=-1, descending=True, stable=True)
    ranks = jnp.argsort(order, axis=-1)
    is_kept = ranks < (scaled.shape[-1] if top_k is None else top_k)
    if top_p is not None:
        probabilities = jax.nn.softmax(jnp.where(is_kept, scaled, -jnp.inf), axis=-1)
        by_rank = jnp.take_along_axis(probabilities, order, axis=-1)
        # The probability before each token: the token that crosses the limit is kept.
        before = jnp.cumsum(by_rank, axis=-1) - by_rank
        is_kept &= jnp.take_along_axis(before, ranks, axis=-1) < top_p
    return jnp.where(is_kept, logits, -jnp.inf)
