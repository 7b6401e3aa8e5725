"""Per-layer embeddings: a second table from which every layer reads a few numbers of each token.

    ModelConfig(stack=..., per_layer_embeddings=PerLayerEmbeddingConfig(dim=256), ...)

As in Gemma 3n and Gemma 4 (text models of Google DeepMind, 2025 and 2026). With x_0 the embedded tokens after
their multiplier, the input of layer l is

- e_l = (norm(W_l x_0 / sqrt(D)) + sqrt(P) * table[token, l]) / sqrt(2)

and at its end the layer adds `norm(W_out (act(W_gate x) * e_l))` to the residual stream x. One norm over P
dims serves all layers. The table has most of the parameters and no product: a token reads one row, so that
it may lie in slower memory than the weights. Gemma 3n itself adds the update to streams that other models do
not have (AltUp), and not to the one that the gate reads.

Dims: B batch, T time, D model, V vocabulary, N layers, P dims of a layer's input, C = N * P columns.
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from slmjax.models.ffn.mlp import ACTIVATIONS, Activation
from slmjax.models.layers import Linear, ModelDims
from slmjax.parallel import communication


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerLayerEmbeddingConfig:
    """A table of embeddings for the layers."""

    dim: int  # numbers of a token that each layer reads, P
    activation: Activation = Activation.GELU  # of the gate

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"per_layer_embeddings.dim must be at least 1, got {self.dim}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"per_layer_embeddings.activation={self.activation.value} is for gated feed-forward layers: "
                "choose another activation"
            )


class PerLayerInputs(nnx.Module):
    """The inputs of all layers, from the embedded tokens and their rows of the table."""

    def __init__(
        self, config: PerLayerEmbeddingConfig, dims: ModelDims, *, num_layers: int, rngs: nnx.Rngs
    ) -> None:
        self.projection = Linear(dims.embed_dim, num_layers * config.dim, std=dims.init_std, rngs=rngs)
        self.norm = dims.norm(config.dim)
        self.shape = (num_layers, config.dim)

    def __call__(self, x: Float[Array, "B T D"], rows: Float[Array, "B T C"]) -> Float[Array, "B T N P"]:
        projected = self.projection(x) * x.shape[-1] ** -0.5
        # The norm is over the dims of one layer.
        normed = self.norm(projected.reshape(*x.shape[:2], *self.shape))
        looked_up = rows.reshape(normed.shape) * math.sqrt(self.shape[1])
        return communication.constrain((normed + looked_up) * 0.5**0.5, ("batch", "time", None, None))


class PerLayerUpdate(nnx.Module):
    """What a layer adds to the residual stream."""

    def __init__(self, config: PerLayerEmbeddingConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        self.gate = Linear(dims.embed_dim, config.dim, std=dims.init_std, rngs=rngs)
        self.output = Linear(config.dim, dims.embed_dim, std=dims.output_std, rngs=rngs)
        self.norm = dims.norm(dims.embed_dim)

    def __call__(
        self, x: Float[Array, "B T D"], layer_inputs: Float[Array, "B T P"]
    ) -> Float[Array, "B T D"]:
        return self.norm(self.output(ACTIVATIONS[self.activation](self.gate(x)) * layer_inputs))


def by_layer(inputs: Float[Array, "B T N P"], layers: list[int]) -> Float[Array, "R B T P"]:
    """Return the inputs of these layers, layer dim first, as a scan takes them."""
    return jnp.moveaxis(inputs[:, :, jnp.asarray(layers)], 2, 0)
