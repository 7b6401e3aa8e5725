"""What a step tells of itself: figures of the batch, norms by layer, loads of experts, and the words that a
log has for them.

Dims: B rows of the global batch, G groups of parameters.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from slmjax.models.architecture import HeadKind, ModelConfig
from slmjax.models.paths import layer_indices

Params = Mapping[str, Array]


def data_checksum(row_ids: Int[Array, " B"]) -> UInt32[Array, ""]:
    """Which row stands at which place of the global batch, in 32 bits: the sum of a hash of each pair, modulo
    2**32.

    Integers add up to the same in any order, so that it does not depend on how the batch is divided. The hash
    is the finaliser of MurmurHash3 (Appleby, public domain).
    """
    bits = row_ids.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + jnp.arange(
        row_ids.shape[0], dtype=jnp.uint32
    ) * jnp.uint32(0x85EBCA77)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)


def named_metrics(config: ModelConfig, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics that came from the device as plain numbers, in the words of the log.

    `grad_norms` become one per layer, of the embedding, of the final norm (their squares add up to that of
    `grad_norm`); `expert_loads` become each layer's shares, which add up to 1.
    """
    named: dict[str, Any] = {
        name: value.item() for name, value in metrics.items() if name not in ("grad_norms", "expert_loads")
    }
    named["grad_norms"] = dict(zip(gradient_groups(config), metrics["grad_norms"].tolist(), strict=True))
    if "expert_loads" in metrics:
        named["expert_loads"] = {}
        for path, loads in metrics["expert_loads"].items():
            shares = loads / np.maximum(loads.sum(axis=-1, keepdims=True), 1.0)
            named["expert_loads"] |= {
                f"layers/{layer}": share
                for layer, share in zip(layer_indices(config, path) or (), shares.tolist(), strict=True)
            }
    return named


def gradient_groups(config: ModelConfig) -> list[str]:
    """What gradient norms are told of: every layer, and the modules around them."""
    around = ["embed", "final_norm"] + (["head"] if config.head is HeadKind.UNTIED else [])
    around += [] if config.learned_positions is None else ["positions"]
    return [f"layers/{layer}" for layer in range(config.num_layers)] + around


def squares_by_layer(config: ModelConfig, grads: Params) -> Float[Array, " G"]:
    """Sums of squares of the gradient, one for each of `gradient_groups`."""
    groups = gradient_groups(config)
    squares = jnp.zeros((len(groups),))
    for path, grad in grads.items():
        layers = layer_indices(config, path)
        if layers is None:
            name = path.split("/")[0]
            # The learned scale of the head's inputs is that of what the final norm gives.
            squares = squares.at[groups.index(name if name in groups else "final_norm")].add(
                jnp.sum(jnp.square(grad))
            )
        else:  # the first groups are the layers, in order
            squares = squares.at[jnp.asarray(layers)].add(jnp.sum(jnp.square(grad), axis=range(1, grad.ndim)))
    return squares


def batch_metrics(sums: Mapping[str, Array], total: Mapping[str, Array]) -> dict[str, Any]:
    """Means over the batch's scored targets, NaN where there is none, and loads of experts, from the sums and
    counts of a step.
    """
    num_targets = jnp.where(total["targets"] == 0, jnp.nan, total["targets"])
    report: dict[str, Any] = {"loss": sums["nll"] / num_targets, "nll": sums["nll"]}
    names = {"accuracy": "correct", "divergence": "divergence"}
    report |= {name: sums[key] / num_targets for name, key in names.items() if key in sums}
    loads = {name: value for name, value in sums.items() if name.endswith("/expert_counts")}
    if loads:
        report["expert_loads"] = loads
        imbalances = [
            jnp.mean(jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1e-9))
            for load in loads.values()
        ]
        report["expert_imbalance"] = jnp.mean(jnp.stack(imbalances))
        dropped = [jnp.sum(value) for name, value in sums.items() if name.endswith("/dropped")]
        report["dropped"] = jnp.sum(jnp.stack(dropped))
    return report
