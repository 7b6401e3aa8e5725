"""RWKV-7 (Peng et al. 2025): a decay per key dim, and a removal that is independent of what is written.

- S_t = diag(w_t) S_{t-1} - (u_t a_t) (S_{t-1}^T u_t)^T + k_t v_t^T,   o_t = S_t^T r_t
- y = output((group_norm(o) + (r k bonus) v) * gate)

The receptance `r` is the query, and `u` the removal key, of length 1. Each projection has its own mix of a
token and the one before it. Values are mixed with those of the first layer, which that layer shares.

Dims: B batch, T time, D model, N heads, H dims of a head.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.models.layers import Linear, ModelDims, along_last
from slmjax.models.mixers.recurrent_parts import MemoryState, check_positive, divided, parts_of, split_heads
from slmjax.models.protocols import NO_CONTEXT, ContextMixer, MixerConfig, MixerContext, StateSize

# w = exp(-exp(-0.5) sigmoid(.)): no decay is stronger.
STRONGEST_LOG_DECAY = -math.exp(-0.5)
GROUP_NORM_EPS = 64e-5  # 1e-5 for values that are divided by 8, the root of the original head dim
FIRST_VALUES = "first_values"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rwkv7Config(MixerConfig):
    """Time mixing of RWKV-7."""

    head_dim: int = 64  # dims per head, H
    decay_rank: int = 64  # width inside the projection of decays
    rate_rank: int = 64  # width inside the projection of removal rates
    value_rank: int = 32  # width inside the projection that mixes values with those of the first layer
    gate_rank: int = 128  # width inside the projection of gates
    # The first layer of a stack has a config of its own: `dataclasses.replace(config, is_first=True)`.
    is_first: bool = False  # share the values with later layers, which mix them into theirs
    chunk_size: int = kernels.CHUNK_SIZE  # tokens that are computed by matrix products in training

    def __post_init__(self) -> None:
        check_positive(self, "head_dim", "decay_rank", "rate_rank", "value_rank", "gate_rank", "chunk_size")

    def num_heads(self, dims: ModelDims) -> int:
        """Return the number of heads. Raises ValueError if `head_dim` does not divide the model's width."""
        return divided(dims.embed_dim, self.head_dim, names="embed_dim or head_dim")

    def reads(self) -> tuple[str, ...]:
        """Return the names of values of earlier layers."""
        return () if self.is_first else (FIRST_VALUES,)

    def writes(self) -> tuple[str, ...]:
        """Return the names of values for later layers."""
        return (FIRST_VALUES,) if self.is_first else ()

    def layer_constants(self, dims: ModelDims, *, index: int, num_layers: int) -> Mapping[str, np.float32]:
        """Return the layer's depth, from 0 to 1, and the share of layers from it on, from 1 to above 0."""
        return {
            "depth": np.float32(index / max(num_layers - 1, 1)),
            "remaining": np.float32(1 - index / num_layers),
        }

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "Rwkv7":
        """Build the module, with freshly initialised parameters."""
        return Rwkv7(self, dims, rngs=rngs)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return the FLOPs of the recurrence per token, in chunks."""
        return self.num_heads(dims) * kernels.recurrence_flops(
            key_dim=self.head_dim,
            value_dim=self.head_dim,
            chunk_size=min(self.chunk_size, length),
            has_channel_decay=True,
            has_removal=True,
            smallest_log_decay=STRONGEST_LOG_DECAY,
        )

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the size of the memory and of the last input, which do not depend on the length."""
        return StateSize(recurrent=dims.embed_dim * self.head_dim, history=dims.embed_dim)


def removed_and_written(
    k: Float[Array, "B T N H"],
    rate: Float[Array, "B T N H"],
    *,
    removal_scale: Float[Array, "N H"],
    rate_share: Float[Array, "N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"], Float[Array, "B T N H"]]:
    """Return the removal key, its write strength and the key, in float32.

    The removal key is `k * removal_scale` with length 1, its strength `rate` times that, and the key
    `k * (1 + (rate - 1) * rate_share)`.
    """
    k32 = k.astype(jnp.float32)
    scaled = k32 * removal_scale[None, None]
    # Not below the floor of the reference, so that a key of zeros removes nothing.
    squares = jnp.maximum(jnp.sum(jnp.square(scaled), axis=-1, keepdims=True), 1e-24)
    removal = scaled * jax.lax.rsqrt(squares)
    return removal, removal * rate, k32 * (1.0 + (rate - 1.0) * rate_share[None, None])


def head_layer_norm(
    x: Float[Array, "B T N H"], scale: Float[Array, "N H"], bias: Float[Array, "N H"]
) -> Float[Array, "B T N H"]:
    """Return the layer norm of each head, with scales of their own, in float32 (a group norm)."""
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + GROUP_NORM_EPS)
    return normed * scale[None, None] + bias[None, None]


class LowRank(nnx.Module):
    """`up(activation(down(x)))`, the bias of `up` alone at initialisation."""

    def __init__(
        self, dim: int, rank: int, *, bias: Float[Array, " D"] | None = None, rngs: nnx.Rngs
    ) -> None:
        self.rank_down = Linear(dim, rank, std=0.0, rngs=rngs)
        self.rank_up = Linear(rank, dim, std=0.0, bias=bias is not None, rngs=rngs)
        # Zeros before orthogonal rows: the output does not depend on `x` yet, but all weights get gradients.
        rows = jax.nn.initializers.orthogonal(0.1)(rngs.params(), (rank, dim), jnp.float32)
        self.rank_up.weight = nnx.Param(rows)
        if bias is not None:
            self.rank_up.bias = nnx.Param(bias)

    def __call__(
        self, x: Float[Array, "B T D"], activation: Callable[[Array], Array] = lambda x: x
    ) -> Float[Array, "B T D"]:
        return self.rank_up(activation(self.rank_down(x)))


def initial_vectors(
    dim: int, head_dim: int, *, depth: Float[Array, ""], remaining: Float[Array, ""]
) -> dict[str, Float[Array, " D"]]:
    """Return the initial mixes and biases of the reference code: they depend on the channel and the layer.

    Args:
      dim: D.
      head_dim: H.
      depth: the layer's index, from 0 in the first to 1 in the last layer.
      remaining: layers from this one on, as a share of all.
    """
    channel = jnp.arange(dim) / max(dim - 1, 1)
    linear = channel - 0.5
    # From -1 to 1 in each head, with most channels near 0.
    in_head = 2.0 * (jnp.arange(dim) % head_dim) / max(head_dim - 1, 1) - 1.0
    zigzag = in_head * jnp.abs(in_head)
    powers = {"receptance": 0.2, "decay": 0.9, "key": 0.7, "value": 0.7, "rate": 0.9, "gate": 0.2}
    share = jnp.arange(dim) / dim
    vectors = {f"{name}_mix": 1.0 - share ** (power * remaining) for name, power in powers.items()}
    return vectors | {
        "decay": -5.5 + 6.0 * channel ** (1.0 + depth**0.3) + 2.5 * zigzag,
        "rate": -0.19 + 0.3 * zigzag + 0.4 * linear,
        "value": 0.73 - 0.4 * linear,
        "removal_scale": 0.71 - 0.1 * linear,
    }


class Rwkv7(ContextMixer):
    """Time mixing of RWKV-7."""

    def __init__(self, config: Rwkv7Config, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        dim = dims.embed_dim
        self.config = config
        self.num_heads = config.num_heads(dims)
        self.dtype = dims.dtype
        vectors = initial_vectors(
            dim,
            config.head_dim,
            depth=jnp.asarray(dims.constants["depth"]),
            remaining=jnp.asarray(dims.constants["remaining"]),
        )
        self.receptance_mix = nnx.Param(vectors["receptance_mix"])
        self.decay_mix = nnx.Param(vectors["decay_mix"])
        self.key_mix = nnx.Param(vectors["key_mix"])
        self.value_mix = nnx.Param(vectors["value_mix"])
        self.rate_mix = nnx.Param(vectors["rate_mix"])
        self.gate_mix = nnx.Param(vectors["gate_mix"])
        self.receptance = Linear(dim, dim, std=dims.init_std, rngs=rngs)
        self.key = Linear(dim, dim, std=dims.init_std, rngs=rngs)
        self.value = Linear(dim, dim, std=dims.init_std, rngs=rngs)
        self.decay = LowRank(dim, config.decay_rank, bias=vectors["decay"], rngs=rngs)
        self.rate = LowRank(dim, config.rate_rank, bias=vectors["rate"], rngs=rngs)
        self.first_value = (
            None if config.is_first else LowRank(dim, config.value_rank, bias=vectors["value"], rngs=rngs)
        )
        self.gate = LowRank(dim, config.gate_rank, rngs=rngs)
        self.removal_scale = nnx.Param(vectors["removal_scale"])
        self.rate_share = nnx.Param(jnp.full((dim,), 1.02, jnp.float32))
        self.bonus = nnx.Param(jnp.full((dim,), -0.04, jnp.float32))
        self.norm_scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.norm_bias = nnx.Param(jnp.zeros((dim,), jnp.float32))
        # Zeros: a new layer adds nothing to the residual stream.
        self.output = Linear(dim, dim, std=0.0, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
        context: MixerContext = NO_CONTEXT,
    ) -> tuple[Float[Array, "B T D"], Any]:
        memory, histories = parts_of(state)
        previous, history = kernels.token_shift(x, segment_ids=segment_ids, history=histories["input"])
        step_back = previous - x

        def mixed(mix: nnx.Param) -> Float[Array, "B T D"]:
            return x + step_back * along_last(mix[...], 3).astype(x.dtype)

        def by_head(vector: nnx.Param) -> Float[Array, "N H"]:
            return vector[...].reshape(self.num_heads, -1)

        receptance = split_heads(self.receptance(mixed(self.receptance_mix)), self.num_heads)
        values = self._values(mixed(self.value_mix), context)
        value = split_heads(values, self.num_heads)
        decay = jax.nn.sigmoid(self.decay(mixed(self.decay_mix), jnp.tanh).astype(jnp.float32))
        rate = jax.nn.sigmoid(self.rate(mixed(self.rate_mix)).astype(jnp.float32))
        removal, strength, key = removed_and_written(
            split_heads(self.key(mixed(self.key_mix)), self.num_heads),
            split_heads(rate, self.num_heads),
            removal_scale=by_head(self.removal_scale),
            rate_share=by_head(self.rate_share),
        )
        outputs, memory = kernels.decayed_recurrence(
            receptance,
            key.astype(x.dtype),
            value,
            log_decay=split_heads(STRONGEST_LOG_DECAY * decay, self.num_heads),
            removal=removal,
            strength=strength,
            segment_ids=segment_ids,
            state=memory,
            chunk_size=self.config.chunk_size,
            smallest_log_decay=STRONGEST_LOG_DECAY,
        )
        normed = head_layer_norm(outputs, by_head(self.norm_scale), by_head(self.norm_bias))
        # What the token writes is also read directly.
        weight = jnp.sum(
            receptance.astype(jnp.float32) * key * by_head(self.bonus)[None, None], axis=-1, keepdims=True
        )
        normed += weight * value.astype(jnp.float32)
        gate = self.gate(mixed(self.gate_mix), jax.nn.sigmoid)
        if state is not None:
            state = MemoryState(recurrent=memory, histories={"input": history})
        return self.output(normed.reshape(x.shape).astype(x.dtype) * gate), state

    def init_state(self, batch_size: int, *, max_length: int) -> MemoryState:
        """Return an empty memory, and a history without a token."""
        recurrent = kernels.empty_recurrent_state(
            batch_size,
            num_heads=self.num_heads,
            key_dim=self.config.head_dim,
            value_dim=self.config.head_dim,
        )
        channels = self.num_heads * self.config.head_dim
        history = kernels.empty_history(batch_size, width=2, channels=channels, dtype=self.dtype)
        return MemoryState(recurrent=recurrent, histories={"input": history})

    def _values(self, x: Float[Array, "B T D"], context: MixerContext) -> Float[Array, "B T D"]:
        """Return the values, mixed with those of the first layer."""
        values = self.value(x)
        if self.first_value is None:
            context.write(FIRST_VALUES, values)
            return values
        share = jax.nn.sigmoid(self.first_value(x).astype(jnp.float32)).astype(x.dtype)
        return values + (context.shared[FIRST_VALUES] - values) * share
