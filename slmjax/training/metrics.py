"""Metrics of a step, such as means of the batch and gradient norms by layer, and their names in the log.

Dims: B sequences of the global batch, G groups of parameters.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from slmjax.data.batch import Batch
from slmjax.models.architecture import HeadKind, ModelConfig
from slmjax.models.paths import layer_indices
from slmjax.training.state import TrainState


# On the device ----------------------------------------------------------------------------------------------
def step_metrics(
    new_state: TrainState,
    state: TrainState,
    batch: Batch,
    *,
    sums: Mapping[str, Array],
    totals: Mapping[str, Array],
    objective: Float[Array, ""],
    grad_norm: Float[Array, ""],
    grad_norms: Float[Array, " G"],
    learning_rate: Float[Array, ""],
) -> dict[str, Any]:
    """Return the metrics of a step: float32 scalars of the global batch where no other type is given.

    `loss` (nats per scored token, NaN without one), `objective` (with auxiliary terms), `grad_norm` (before
    clipping), `learning_rate`, `accuracy`, `nll`, `targets`, `bytes`, `tokens`; `trained_targets` (0 in a
    skipped step); `skipped` (so far, int32) and `skipped_in_a_row`; of mixtures of experts `dropped` and
    `expert_imbalance` (the busiest expert's load over the mean, averaged over layers); in distillation the
    mean `divergence`; with an exit gate `exit_entropy` (nats) and `expected_loops` of a scored token, and
    `loss` is an expectation. `data_checksum` is an integer. `grad_norms` and `expert_loads` are arrays, which
    `named_metrics` names.
    """
    # NaN, not 0, for a batch without a target: a loss of 0 would look like a perfect one.
    num_targets = jnp.where(totals["targets"] == 0, jnp.nan, totals["targets"])
    metrics: dict[str, Any] = {
        "loss": sums["nll"] / num_targets,
        "nll": sums["nll"],
        "objective": objective,
        "grad_norm": grad_norm,
        "grad_norms": grad_norms,
        "learning_rate": learning_rate,
        "trained_targets": jnp.where(new_state.skipped == state.skipped, totals["targets"], 0.0),
        "skipped": new_state.skipped,
        "skipped_in_a_row": new_state.skipped_in_a_row,
        "data_checksum": data_checksum(batch.row_ids),
        **{name: totals[name] for name in ("targets", "tokens", "bytes")},
    }
    keys = {"accuracy": "correct", "divergence": "divergence"}
    keys |= {name: name for name in ("exit_entropy", "expected_loops")}
    for name, key in keys.items():
        if key in sums:
            metrics[name] = sums[key] / num_targets
    loads = {name: value for name, value in sums.items() if name.endswith("/expert_counts")}
    # Layers are compared with themselves: one dead router must show where all others are balanced.
    if loads:
        imbalances = [
            jnp.mean(jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1e-9))
            for load in loads.values()
        ]
        dropped = [jnp.sum(value) for name, value in sums.items() if name.endswith("/dropped")]
        metrics["expert_loads"] = loads
        metrics["expert_imbalance"] = jnp.mean(jnp.stack(imbalances))
        metrics["dropped"] = jnp.sum(jnp.stack(dropped))
    return metrics


def data_checksum(row_ids: Int[Array, " B"]) -> UInt32[Array, ""]:
    """Return a checksum of which sequence has which position in the global batch.

    It is the sum of a hash of each pair, modulo 2**32. Integers add up to the same in any order, so it does
    not depend on how the batch is sharded. The hash is the finaliser of MurmurHash3 (Appleby, public domain).
    """
    positions = jnp.arange(row_ids.shape[0], dtype=jnp.uint32)
    bits = row_ids.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + positions * jnp.uint32(0x85EBCA77)
    # The position is part of the hash: the same sequences in another order are another batch.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)


@dataclasses.dataclass(frozen=True)
class GradientGroups:
    """Groups of parameters whose gradient norms are logged: every layer, and the modules around them."""

    names: tuple[str, ...]
    # of each parameter by stack path: the group, or for a stacked one the group of each of its layers
    indices: Mapping[str, int | tuple[int, ...]]


def gradient_groups(config: ModelConfig, paths: Iterable[str]) -> GradientGroups:
    """Return the groups of a model with these parameters, by stack path. Computed once, before the step."""
    names = group_names(config)
    indices: dict[str, int | tuple[int, ...]] = {}
    # Indices are found before the step is traced, so that the compiled program has constants.
    for path in paths:
        layers = layer_indices(config, path)
        if layers is None:
            name = path.split("/")[0]
            # The activation quantizer of the head reads what the final norm gives.
            indices[path] = names.index(name if name in names else "final_norm")
        else:
            indices[path] = tuple(layers)  # the first groups are the layers, in order
    return GradientGroups(names=names, indices=indices)


def group_names(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the groups in the log."""
    names = [f"layers/{layer}" for layer in range(config.num_layers)]
    names += ["embed", "final_norm"]
    names += ["head"] if config.head is HeadKind.UNTIED else []
    names += [] if config.learned_positions is None else ["positions"]
    names += [] if config.per_layer_embeddings is None else ["per_layer"]
    names += [] if config.exit_gate is None else ["exit_gate"]
    names += ["shared"] if config.shared_ffns else []
    names += [] if config.multi_token is None else ["multi_token"]
    return tuple(names)


def gradient_norms(grads: Mapping[str, Array], groups: GradientGroups) -> Float[Array, " G"]:
    """Return the norm of the gradient in each group."""
    squares = jnp.zeros((len(groups.names),))
    for path, grad in grads.items():
        index = jnp.asarray(groups.indices[path])
        # A stacked parameter has the layer dim first, and one sum for each layer.
        squares = squares.at[index].add(jnp.sum(jnp.square(grad), axis=range(index.ndim, grad.ndim)))
    return jnp.sqrt(squares)


# On the host ------------------------------------------------------------------------------------------------
def named_metrics(config: ModelConfig, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics that came from the device as plain numbers, under their names in the log.

    `grad_norms` become one per group (their squares add up to that of `grad_norm`); `expert_loads` become
    each layer's fractions, which add up to 1.
    """
    named: dict[str, Any] = {
        name: value.item() for name, value in metrics.items() if name not in ("grad_norms", "expert_loads")
    }
    named["grad_norms"] = dict(zip(group_names(config), metrics["grad_norms"].tolist(), strict=True))
    if "expert_loads" in metrics:
        named["expert_loads"] = {}
        for path, loads in metrics["expert_loads"].items():
            fractions = loads / np.maximum(loads.sum(axis=-1, keepdims=True), 1.0)
            layers = layer_indices(config, path) or ()
            for layer, fraction in zip(layers, fractions.tolist(), strict=True):
                named["expert_loads"][f"layers/{layer}"] = fraction
    return named
