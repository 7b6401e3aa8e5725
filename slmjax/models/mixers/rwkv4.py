"""The time mix of RWKV-4 (Peng et al. 2023): means of values, weighted by keys and by distance.

Each channel decays at a rate of its own, which no token changes. Keys, values and receptances are computed
from each token mixed with the one before it, the token shift.

Dims: B batch, T time, D model, C channels.
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
from slmjax.models.ffn.channel_mix import shifted
from slmjax.models.layers import Linear, ModelDims
from slmjax.models.protocols import Mixer, MixerConfig, StateSize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rwkv4Config(MixerConfig):
    """The time mix of RWKV-4; its channel mix is `ChannelMixConfig`."""

    inner_dim: int  # channels of keys, values and receptances, C; usually the model's width
    chunk_size: int | None = None  # tokens of a chunk of the scan (none: the platform's)

    def __post_init__(self) -> None:
        for name in ("inner_dim", "chunk_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "Rwkv4":
        """Build the module, with freshly initialised parameters."""
        return Rwkv4(self, dims, rngs=rngs)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return the FLOPs per token of token shift and recurrence."""
        # Three mixed inputs, of a difference, a product and a sum each; then numerator and denominator of
        # output and state, with four exponentials.
        return 9 * dims.embed_dim + 20 * self.inner_dim

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the size of the sums and of the last token, which do not grow with length."""
        return StateSize(history=dims.embed_dim, recurrent=3 * self.inner_dim)

    def layer_constants(
        self, dims: ModelDims, *, index: int, num_layers: int
    ) -> Mapping[str, np.ndarray | np.generic | float]:
        """Return the initial decays, bonuses and mixes of the layer: later layers look further back."""
        depth = index / max(num_layers - 1, 1)
        channel = np.arange(self.inner_dim) / max(self.inner_dim - 1, 1)
        zigzag = (np.arange(self.inner_dim) + 1) % 3 - 1
        return {
            "decay": np.float32(-5 + 8 * channel ** (0.7 + 1.3 * depth)),
            "bonus": np.float32(np.log(0.3) + 0.5 * zigzag),
            **shift_mixes(dims.embed_dim, index=index, num_layers=num_layers),
        }


def shift_mixes(dim: int, *, index: int, num_layers: int) -> dict[str, np.ndarray]:
    """Return initial weights of the token itself against the one before, for keys, values, receptances."""
    left = 1 - index / num_layers  # from 1 in the first layer to near 0
    depth = index / max(num_layers - 1, 1)
    channel = np.arange(dim) / dim
    return {
        "key_mix": np.asarray(channel**left, np.float32),
        "value_mix": np.asarray(channel**left + 0.3 * depth, np.float32),
        "receptance_mix": np.asarray(channel ** (0.5 * left), np.float32),
    }


class Rwkv4(Mixer):
    """`output(sigmoid(receptance) * wkv(key, value))`, all of tokens mixed with the one before."""

    def __init__(self, config: Rwkv4Config, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dim = dims.embed_dim
        self.dtype = dims.dtype
        channels = config.inner_dim
        self.receptance = Linear(dims.embed_dim, channels, std=dims.init_std, rngs=rngs)
        self.key = Linear(dims.embed_dim, channels, std=dims.init_std, rngs=rngs)
        self.value = Linear(dims.embed_dim, channels, std=dims.init_std, rngs=rngs)
        self.output = Linear(channels, dims.embed_dim, std=dims.output_std, rngs=rngs)
        self.receptance_mix = nnx.Param(jnp.asarray(dims.constants["receptance_mix"]))
        self.key_mix = nnx.Param(jnp.asarray(dims.constants["key_mix"]))
        self.value_mix = nnx.Param(jnp.asarray(dims.constants["value_mix"]))
        self.log_decay_rates = nnx.Param(jnp.asarray(dims.constants["decay"]))
        self.bonus = nnx.Param(jnp.asarray(dims.constants["bonus"]))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: dict[str, Any] | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any] | None]:
        previous, history = kernels.token_shift(
            x, segment_ids=segment_ids, history=None if state is None else state["history"]
        )
        mixed, scan = kernels.wkv4(
            self.key(shifted(x, previous, self.key_mix[...])),
            self.value(shifted(x, previous, self.value_mix[...])),
            log_decay=-jnp.exp(self.log_decay_rates[...]),
            bonus=self.bonus[...],
            segment_ids=segment_ids,
            state=None if state is None else state["scan"],
            chunk_size=self.config.chunk_size,
        )
        receptance = jax.nn.sigmoid(self.receptance(shifted(x, previous, self.receptance_mix[...])))
        state = None if state is None else {"history": history, "scan": scan}
        return self.output(receptance * mixed), state

    def init_state(self, batch_size: int, *, max_length: int) -> dict[str, Any]:
        """Return the state before the first token; its size does not depend on `max_length`."""
        return {
            "history": kernels.empty_history(batch_size, width=2, channels=self.dim, dtype=self.dtype),
            "scan": kernels.wkv4_state(batch_size, channels=self.config.inner_dim),
        }
