"""Gated linear attention (Yang et al. 2023): a decay for each key dim, which depends on the token.

- S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
- g_t = logsigmoid(decay_up(decay_down(x_t))) / 16
- y = output(norm(o) * silu(gate(x)))

Dims: B batch, T time, D model, N heads, K key dims of a head, V value dims of a head.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.models.layers import Linear, ModelDims, RmsNorm
from slmjax.models.mixers.recurrent_parts import check_positive, divided, split_heads
from slmjax.models.protocols import Mixer, MixerConfig, StateSize


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedLinearAttentionConfig(MixerConfig):
    """Gated linear attention (GLA)."""

    num_heads: int = 4  # heads, N
    key_dim: int | None = None  # key dims per head, K (none: embed_dim / (2 num_heads))
    value_dim: int | None = None  # value dims per head, V (none: embed_dim / num_heads)
    decay_rank: int = 16  # width between the two projections that give the decay
    # Divides the logarithm: an untrained gate of one half then keeps half of the memory for 16 tokens.
    decay_divisor: float = 16.0  # divisor of the log decay
    chunk_size: int = kernels.CHUNK_SIZE  # tokens that are computed by matrix products in training

    def __post_init__(self) -> None:
        check_positive(self, "num_heads", "key_dim", "value_dim", "decay_rank", "chunk_size")
        if self.decay_divisor <= 0:
            raise ValueError(f"decay_divisor must be positive, got {self.decay_divisor}")

    def resolved_key_dim(self, dims: ModelDims) -> int:
        """Return the key dims per head. Raises ValueError if heads do not divide half the model's width."""
        return self.key_dim or divided(dims.embed_dim, 2 * self.num_heads, names="num_heads or key_dim")

    def resolved_value_dim(self, dims: ModelDims) -> int:
        """Return the value dims per head. Raises ValueError if heads do not divide the model's width."""
        return self.value_dim or divided(dims.embed_dim, self.num_heads, names="num_heads or value_dim")

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "GatedLinearAttention":
        """Build the module, with freshly initialised parameters."""
        return GatedLinearAttention(self, dims, rngs=rngs)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return the FLOPs of the recurrence per token, in chunks."""
        return self.num_heads * kernels.recurrence_flops(
            key_dim=self.resolved_key_dim(dims),
            value_dim=self.resolved_value_dim(dims),
            chunk_size=min(self.chunk_size, length),
            has_channel_decay=True,
        )

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the size of the memory, which does not depend on the length."""
        return StateSize(
            recurrent=self.num_heads * self.resolved_key_dim(dims) * self.resolved_value_dim(dims)
        )


class GatedLinearAttention(Mixer):
    """Gated linear attention."""

    def __init__(self, config: GatedLinearAttentionConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.key_dim = config.resolved_key_dim(dims)
        self.value_dim = config.resolved_value_dim(dims)
        keys = config.num_heads * self.key_dim
        values = config.num_heads * self.value_dim
        linear_kwargs = {"std": dims.init_std, "rngs": rngs}
        self.query = Linear(dims.embed_dim, keys, **linear_kwargs)
        self.key = Linear(dims.embed_dim, keys, **linear_kwargs)
        self.value = Linear(dims.embed_dim, values, **linear_kwargs)
        self.gate = Linear(dims.embed_dim, values, **linear_kwargs)
        self.decay_down = Linear(dims.embed_dim, config.decay_rank, **linear_kwargs)
        self.decay_up = Linear(config.decay_rank, keys, bias=True, **linear_kwargs)
        self.norm = RmsNorm(self.value_dim, eps=dims.norm_eps)
        self.output = Linear(values, dims.embed_dim, std=dims.output_std, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        heads = self.config.num_heads
        gates = self.decay_up(self.decay_down(x)).astype(jnp.float32)
        mixed, new_state = kernels.decayed_recurrence(
            split_heads(self.query(x), heads) * self.key_dim**-0.5,
            split_heads(self.key(x), heads),
            split_heads(self.value(x), heads),
            log_decay=split_heads(jax.nn.log_sigmoid(gates) / self.config.decay_divisor, heads),
            segment_ids=segment_ids,
            state=state,
            chunk_size=self.config.chunk_size,
        )
        gated = self.norm(mixed).reshape(*x.shape[:2], -1) * jax.nn.silu(self.gate(x))
        return self.output(gated), None if state is None else new_state

    def init_state(self, batch_size: int, *, max_length: int) -> kernels.RecurrentState:
        """Return an empty memory."""
        return kernels.empty_recurrent_state(
            batch_size, num_heads=self.config.num_heads, key_dim=self.key_dim, value_dim=self.value_dim
        )
