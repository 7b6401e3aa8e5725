"""Retention: linear attention with a fixed decay per head (RetNet, Sun et al. 2023; Lightning Attention-2).

- S_t = gamma S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(H)
- y = output(norm(o) * silu(gate(x)))

Dims: B batch, T time, D model, N heads, H key dims of a head, V value dims of a head.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.models.layers import Linear, ModelDims, RmsNorm
from slmjax.models.mixers.recurrent_parts import check_positive, divided, split_heads
from slmjax.models.protocols import NO_CONTEXT, ContextMixer, MixerConfig, MixerContext, StateSize
from slmjax.models.rope import rotary


class RetentionDecay(enum.Enum):
    """Decays of the heads."""

    RETNET = "retnet"  # 1 - 2^(-5 - h) for head h from 0, in every layer
    # The log decay is -(8 h / N) (1 - l / layers): the first head, and the last layers, forget least.
    LIGHTNING = "lightning"  # a geometric series of log decays, slower in later layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetentionConfig(MixerConfig):
    """Retention, with a decay per head that is not learned."""

    num_heads: int  # heads, N
    head_dim: int | None = None  # key dims per head, H (none: embed_dim / num_heads)
    value_dim: int | None = None  # value dims per head, V (none: twice head_dim)
    decay: RetentionDecay = RetentionDecay.RETNET  # decays of the heads
    rope_base: float | None = 10_000.0  # base of the rotary angles (none: no position information)
    chunk_size: int = kernels.CHUNK_SIZE  # tokens that are computed by matrix products in training

    def __post_init__(self) -> None:
        check_positive(self, "num_heads", "head_dim", "value_dim", "chunk_size")
        if self.rope_base is not None and self.rope_base <= 0:
            raise ValueError(f"rope_base must be positive, or none for no positions, got {self.rope_base}")

    def resolved_head_dim(self, dims: ModelDims) -> int:
        """Return the key dims per head. Raises ValueError if heads do not divide the model's width."""
        return self.head_dim or divided(dims.embed_dim, self.num_heads, names="num_heads or head_dim")

    def resolved_value_dim(self, dims: ModelDims) -> int:
        """Return the value dims per head."""
        return self.value_dim or 2 * self.resolved_head_dim(dims)

    def layer_constants(self, dims: ModelDims, *, index: int, num_layers: int) -> Mapping[str, np.ndarray]:
        """Return the logarithm of each head's decay, [N]."""
        return {
            "log_decay": retention_log_decay(self.decay, self.num_heads, index=index, num_layers=num_layers)
        }

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "Retention":
        """Build the module, with freshly initialised parameters."""
        return Retention(self, dims, rngs=rngs)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return the FLOPs of the recurrence per token, in chunks."""
        return self.num_heads * kernels.recurrence_flops(
            key_dim=self.resolved_head_dim(dims),
            value_dim=self.resolved_value_dim(dims),
            chunk_size=min(self.chunk_size, length),
        )

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the size of the memory, which does not depend on the length."""
        return StateSize(
            recurrent=self.num_heads * self.resolved_head_dim(dims) * self.resolved_value_dim(dims)
        )


def retention_log_decay(decay: RetentionDecay, num_heads: int, *, index: int, num_layers: int) -> np.ndarray:
    """Return the logarithm of each head's decay in layer `index`, counted from 0: float32 [N].

    >>> retention_log_decay(RetentionDecay.LIGHTNING, 4, index=1, num_layers=2).tolist()
    [0.0, -1.0, -2.0, -3.0]
    """
    heads = np.arange(num_heads)
    if decay is RetentionDecay.RETNET:
        return np.log1p(-(2.0 ** (-5.0 - heads))).astype(np.float32)
    return (0.0 - (8 * heads / num_heads) * (1 - index / num_layers)).astype(np.float32)


class Retention(ContextMixer):
    """Retention."""

    def __init__(self, config: RetentionConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.head_dim = config.resolved_head_dim(dims)
        self.value_dim = config.resolved_value_dim(dims)
        keys = config.num_heads * self.head_dim
        values = config.num_heads * self.value_dim
        self.query = Linear(dims.embed_dim, keys, std=dims.init_std, rngs=rngs)
        self.key = Linear(dims.embed_dim, keys, std=dims.init_std, rngs=rngs)
        self.value = Linear(dims.embed_dim, values, std=dims.init_std, rngs=rngs)
        self.gate = Linear(dims.embed_dim, values, std=dims.init_std, rngs=rngs)
        self.norm = RmsNorm(self.value_dim, eps=dims.norm_eps)
        self.output = Linear(values, dims.embed_dim, std=dims.output_std, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
        context: MixerContext = NO_CONTEXT,
    ) -> tuple[Float[Array, "B T D"], Any]:
        heads = self.config.num_heads
        queries = self._rotated(split_heads(self.query(x), heads), positions)
        log_decay = context.constants["log_decay"]
        mixed, new_state = kernels.decayed_recurrence(
            queries * self.head_dim**-0.5,
            self._rotated(split_heads(self.key(x), heads), positions),
            split_heads(self.value(x), heads),
            log_decay=jnp.broadcast_to(log_decay[None, None, :], (*x.shape[:2], heads)),
            segment_ids=segment_ids,
            state=state,
            chunk_size=self.config.chunk_size,
        )
        gated = self.norm(mixed).reshape(*x.shape[:2], -1) * jax.nn.silu(self.gate(x))
        return self.output(gated), None if state is None else new_state

    def init_state(self, batch_size: int, *, max_length: int) -> kernels.RecurrentState:
        """Return an empty memory."""
        return kernels.empty_recurrent_state(
            batch_size, num_heads=self.config.num_heads, key_dim=self.head_dim, value_dim=self.value_dim
        )

    def _rotated(self, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        # The angle of a query relative to a key depends on their distance only.
        return x if self.config.rope_base is None else rotary(x, positions, base=self.config.rope_base)
