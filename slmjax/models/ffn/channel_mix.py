"""The channel mix of RWKV-4 (Peng et al. 2023): a gated feed-forward layer that also sees the token before.

Dims: B batch, T time, D model, F feed-forward.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.models.layers import Linear, ModelDims
from slmjax.models.protocols import FfnAux, FfnConfig, StatefulFfn, StateSize


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelMixConfig(FfnConfig):
    """The channel mix of RWKV-4: squared ReLU, token shift, and a gate on the output."""

    hidden_dim: int  # width of the hidden layer, F; usually four times the model's

    def __post_init__(self) -> None:
        if self.hidden_dim < 1:
            raise ValueError(f"ffn.hidden_dim must be at least 1, got {self.hidden_dim}")

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "ChannelMix":
        """Build the module, with freshly initialised parameters."""
        return ChannelMix(self, dims, rngs=rngs)

    def state_size(self, dims: ModelDims) -> StateSize:
        """Return the size of the last token."""
        return StateSize(history=dims.embed_dim)

    def layer_constants(
        self, dims: ModelDims, *, index: int, num_layers: int
    ) -> Mapping[str, np.ndarray | np.generic | float]:
        """Return the initial weights of the token itself, against the one before it."""
        channel = np.arange(dims.embed_dim) / dims.embed_dim
        return {"mix": np.float32(channel ** (1 - index / num_layers))}

    def active_fraction(self) -> float:
        """Return 1: there are no experts, and every parameter is used."""
        return 1.0

    def for_inference(self) -> "ChannelMixConfig":
        """Return the config as it is."""
        return self


class ChannelMix(StatefulFfn):
    """`sigmoid(receptance(.)) * down(relu(up(.))^2)`, of tokens mixed with the one before."""

    def __init__(self, config: ChannelMixConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        dim = dims.embed_dim
        self.dim = dim
        self.dtype = dims.dtype
        self.up = Linear(dim, config.hidden_dim, std=dims.init_std, rngs=rngs)
        self.down = Linear(config.hidden_dim, dim, std=dims.output_std, rngs=rngs)
        self.receptance = Linear(dim, dim, std=dims.init_std, rngs=rngs)
        self.up_mix = nnx.Param(jnp.asarray(dims.constants["mix"]))
        self.receptance_mix = nnx.Param(jnp.asarray(dims.constants["mix"]))

    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"], state: Any
    ) -> tuple[Float[Array, "B T D"], FfnAux, Any]:
        previous, state = kernels.token_shift(x, segment_ids=segment_ids, history=state)
        hidden = jnp.square(jax.nn.relu(self.up(shifted(x, previous, self.up_mix[...]))))
        gate = jax.nn.sigmoid(self.receptance(shifted(x, previous, self.receptance_mix[...])))
        return gate * self.down(hidden), FfnAux(losses={}, metrics={}), state

    def init_state(self, batch_size: int) -> kernels.ConvolutionHistory:
        """Return the history before the first token."""
        return kernels.empty_history(batch_size, width=2, channels=self.dim, dtype=self.dtype)


def shifted(
    x: Float[Array, "B T D"], previous: Float[Array, "B T D"], mix: Float[Array, " D"]
) -> Float[Array, "B T D"]:
    """Return `mix * x + (1 - mix) * previous` in the dtype of `x`."""
    return previous + (x - previous) * mix[None, None].astype(x.dtype)
