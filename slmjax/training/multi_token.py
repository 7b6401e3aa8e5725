"""The loss of multi-token prediction: cross entropy of the tokens after the next one.

Module k, from 1, reads at position t of a document the token t + k and predicts the token t + 1 + k. Where
the document ends before, there is no target: no module predicts across the documents of a row. A target
counts where the batch scores it as the next token of another position.

Dims: B batch, T time.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from slmjax import losses
from slmjax.data.batch import Batch
from slmjax.models.architecture import ModelConfig
from slmjax.models.decoder import Decoder, Output


def num_modules(config: ModelConfig) -> int:
    """Return how many tokens after the next one the model predicts."""
    return 0 if config.multi_token is None else config.multi_token.num_tokens


def further_targets(batch: Batch, distance: int) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Return the targets that are `distance` tokens after those of the batch, and their weights."""
    segment_ids = _moved(batch.segment_ids, distance)
    is_same = (segment_ids == batch.segment_ids) & (batch.segment_ids > 0)
    return _moved(batch.targets, distance), jnp.where(is_same, _moved(batch.loss_mask, distance), 0.0)


def _moved(values: Shaped[Array, "B T"], distance: int) -> Shaped[Array, "B T"]:
    """Return at each position the value `distance` later; zeros, as in padding, at the end."""
    distance = min(distance, values.shape[1])
    return jnp.pad(values[:, distance:], ((0, 0), (0, distance)))


def further_counts(batch: Batch, config: ModelConfig) -> dict[str, Float[Array, ""]]:
    """Return the number of targets of each module, by the name under which the loss divides by it."""
    return {
        count_name(module): jnp.sum(further_targets(batch, module)[1])
        for module in range(1, num_modules(config) + 1)
    }


def count_name(module: int) -> str:
    """Return the name of the number of targets of a module, which are counted from 1."""
    return f"multi_token_targets_{module}"


def further_terms(
    model: Decoder,
    output: Output,
    batch: Batch,
    *,
    key: Array | None,
    z_loss: float | Float[Array, ""],
    chunk_size: int | None,
) -> tuple[dict[str, tuple[Float[Array, ""], str]], dict[str, Array]]:
    """Return the terms of the loss of all modules, each with its count's name, and sums for metrics.

    The sums are `multi_token_nll_K` and `multi_token_correct_K` of each module K, from 1.
    """
    config = model.config.multi_token
    assert config is not None
    hidden = output.hidden
    terms: dict[str, tuple[Float[Array, ""], str]] = {}
    sums: dict[str, Array] = {}
    auxiliary: dict[str, Array] = {}
    next_tokens = batch.targets
    for module in range(1, config.num_tokens + 1):
        hidden, aux, _ = model.further(
            module - 1,
            hidden,
            next_tokens,
            segment_ids=batch.segment_ids,
            positions=batch.positions,
            key=key,
        )
        targets, weights = further_targets(batch, module)
        value, metrics = losses.cross_entropy(
            hidden, output.head, targets, weights, z_loss=z_loss, chunk_size=chunk_size
        )
        # Each module's mean is over its own targets, and the loss has the mean of the modules.
        terms[f"multi_token_{module}"] = (value * (config.weight / config.num_tokens), count_name(module))
        sums |= {f"multi_token_{name}_{module}": metrics[name] for name in ("nll", "correct")}
        for name, loss in aux.losses.items():
            auxiliary[name] = auxiliary.get(name, jnp.zeros(())) + loss
        # The token that this module predicts is what the next one reads.
        next_tokens = targets
    return terms | {f"multi_token_{name}": (loss, "tokens") for name, loss in auxiliary.items()}, sums


def further_metrics(
    sums: Mapping[str, Array], totals: Mapping[str, Array], config: ModelConfig
) -> dict[str, Any]:
    """Return `multi_token_loss_K` (nats per target) and `multi_token_accuracy_K` of each module K, from 1.

    Both are NaN for a batch without a target of the module.
    """
    metrics = {}
    for module in range(1, num_modules(config) + 1):
        count = totals[count_name(module)]
        count = jnp.where(count == 0, jnp.nan, count)
        metrics[f"multi_token_loss_{module}"] = sums[f"multi_token_nll_{module}"] / count
        metrics[f"multi_token_accuracy_{module}"] = sums[f"multi_token_correct_{module}"] / count
    return metrics
