"""The loss of a model with an exit gate: the expected cross entropy, and the entropy of the exits.

Dims: L loops, B batch, T time, D model.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax import losses
from slmjax.data.batch import Batch
from slmjax.models.decoder import Output
from slmjax.models.loops import exit_entropy

Terms = dict[str, tuple[Float[Array, ""], str]]


def exit_loss(
    output: Output,
    batch: Batch,
    *,
    entropy_weight: float,
    z_loss: float | Float[Array, ""],
    chunk_size: int | None,
) -> tuple[Terms, losses.Metrics]:
    """Return the sums of the loss with the name of their count, and sums that are only reported.

    A token adds `sum over loops of p_t * CE_t - entropy_weight * H(p)`, p_t being the probability that it
    stops after loop t. Reported are the expected values of what `losses.cross_entropy` reports, the entropy,
    and the expected number of loops.
    """
    log_probs = output.loops.log_probs
    num_loops, batch_size, length = log_probs.shape
    probs = jnp.exp(log_probs)

    def as_rows(x: Array) -> Array:
        # Loops become rows next to each other, so that a device keeps those of its part of the batch.
        return jnp.moveaxis(x, 0, 1).reshape(num_loops * batch_size, length, *x.shape[3:])

    def repeated(x: Array) -> Array:
        return jnp.repeat(x, num_loops, axis=0)

    value, sums = losses.cross_entropy(
        as_rows(output.loops.hidden),
        output.head,
        repeated(batch.targets),
        repeated(batch.loss_mask),
        factors=as_rows(probs),
        z_loss=z_loss,
        chunk_size=chunk_size,
    )
    entropy = jnp.sum(batch.loss_mask * exit_entropy(log_probs))
    loops = jnp.arange(1.0, num_loops + 1.0)[:, None, None]
    expected_loops = jnp.sum(batch.loss_mask[None] * loops * probs)
    reported = {"exit_entropy": entropy, "expected_loops": expected_loops}
    terms: Terms = {
        "cross_entropy": (value, "targets"),
        "exit_entropy": (-entropy_weight * entropy, "targets"),
    }
    return terms, sums | {name: jax.lax.stop_gradient(x) for name, x in reported.items()}
