"""The recurrent block of Griffin (De et al. 2024): a gated linear recurrence after a short convolution.

The recurrence, RG-LRU, has one state for each channel. Two gates, which are linear in blocks of channels,
decide how fast it decays and how much of the input enters (`kernels.rg_lru`).

Dims: B batch, T time, D model, C channels of the recurrence, N blocks of channels, H channels of a block,
W taps.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.models.layers import Linear, ModelDims, truncated_normal
from slmjax.models.mixers.mamba import softplus
from slmjax.models.protocols import Mixer, MixerConfig, StateSize

# The decay of a channel is `exp(-DECAY_SCALE * softplus(decay))` where its gate is 1.
DECAY_SCALE = 8.0
# The range of these decays at initialisation, uniform in their squares.
DECAYS = (0.9, 0.999)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RgLruConfig(MixerConfig):
    """A real-gated linear recurrent unit with convolution and gate, as in Griffin and RecurrentGemma."""

    inner_dim: int  # channels of the recurrence, C
    num_blocks: int = 1  # blocks of channels whose gates read only their own block, N
    width: int = 4  # tokens that the convolution sees, itself included, W
    bias: bool = False  # biases of the projections of input, gate and output
    chunk_size: int | None = None  # tokens of a chunk of the scan (none: the platform's)

    def __post_init__(self) -> None:
        for name in ("inner_dim", "num_blocks", "chunk_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.inner_dim % self.num_blocks:
            raise ValueError(f"num_blocks={self.num_blocks} must divide inner_dim={self.inner_dim}")
        if self.width < 2:
            raise ValueError(f"width must be at least 2 for tokens to see each other, got {self.width}")

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "RgLru":
        """Build the module, with freshly initialised parameters."""
        return RgLru(self, dims, rngs=rngs)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return the FLOPs per token of the recurrence."""
        # Decay, root, input, product and sum. The convolution and the gates are products with parameters.
        return 8 * self.inner_dim

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the size of the states and of the convolution's history, which do not grow with length."""
        return StateSize(history=(self.width - 1) * self.inner_dim, recurrent=self.inner_dim)


def block_linear(
    x: Float[Array, "B T C"], blocks: Float[Array, "N H H"], bias: Float[Array, " C"]
) -> Float[Array, "B T C"]:
    """Return a linear map of each block of channels to itself, plus a bias, in float32."""
    parts = x.astype(jnp.float32).reshape(*x.shape[:2], blocks.shape[0], -1)
    mapped = jnp.einsum("btnh,nhk->btnk", parts, blocks)
    return mapped.reshape(x.shape) + bias[None, None]


class RgLru(Mixer):
    """`output(gelu(gate(x)) * recurrence(convolution(inner(x))))`."""

    def __init__(self, config: RgLruConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = dims.dtype
        channels = config.inner_dim
        self.inner = Linear(dims.embed_dim, channels, std=dims.init_std, bias=config.bias, rngs=rngs)
        self.gate = Linear(dims.embed_dim, channels, std=dims.init_std, bias=config.bias, rngs=rngs)
        # The variance of Griffin's taps.
        std = (0.01 / config.width) ** 0.5
        self.conv_taps = nnx.Param(truncated_normal(rngs.params(), (config.width, channels), std))
        self.conv_bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        shape = (config.num_blocks, channels // config.num_blocks, channels // config.num_blocks)
        self.input_blocks = nnx.Param(truncated_normal(rngs.params(), shape, shape[1] ** -0.5))
        self.input_bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.decay_blocks = nnx.Param(truncated_normal(rngs.params(), shape, shape[1] ** -0.5))
        self.decay_bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.decay_rates = nnx.Param(initial_decay_rates(rngs.params(), channels))
        self.output = Linear(channels, dims.embed_dim, std=dims.output_std, bias=config.bias, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: dict[str, Any] | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any] | None]:
        inner, history = kernels.depthwise_convolution(
            self.inner(x),
            self.conv_taps[...],
            segment_ids=segment_ids,
            bias=self.conv_bias[...],
            history=None if state is None else state["history"],
        )
        input_gate = jax.nn.sigmoid(block_linear(inner, self.input_blocks[...], self.input_bias[...]))
        decay_gate = jax.nn.sigmoid(block_linear(inner, self.decay_blocks[...], self.decay_bias[...]))
        # Decays stay float32: in bfloat16 1 - a^2 is a fifth wrong for a of 0.99.
        log_decay = -DECAY_SCALE * decay_gate * softplus(self.decay_rates[...])[None, None]
        mixed, scan = kernels.rg_lru(
            (input_gate * inner).astype(x.dtype),
            log_decay,
            segment_ids=segment_ids,
            state=None if state is None else state["scan"],
            chunk_size=self.config.chunk_size,
        )
        state = None if state is None else {"history": history, "scan": scan}
        return self.output(jax.nn.gelu(self.gate(x)) * mixed), state

    def init_state(self, batch_size: int, *, max_length: int) -> dict[str, Any]:
        """Return the state before the first token; its size does not depend on `max_length`."""
        channels = self.config.inner_dim
        return {
            "history": kernels.empty_history(
                batch_size, width=self.config.width, channels=channels, dtype=self.dtype
            ),
            "scan": kernels.rg_lru_state(batch_size, channels=channels),
        }


def initial_decay_rates(key: Array, channels: int) -> Float[Array, " C"]:
    """Draw decays of DECAYS, uniform in their squares, and return the parameter that gives them."""
    low, high = (decay**2 for decay in DECAYS)
    log_decay = 0.5 * jnp.log(jax.random.uniform(key, (channels,), jnp.float32, low, high))
    return jnp.log(jnp.expm1(-log_decay / DECAY_SCALE))
