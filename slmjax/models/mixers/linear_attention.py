"""Linear attention (Katharopoulos et al. 2020): softmax replaced by a product of positive features.

- o_t = phi(q_t) S_t / (phi(q_t) z_t),   S_t = sum of phi(k_s) v_s^T,   z_t = sum of phi(k_s),   s <= t
- phi(x) = elu(x) + 1

The sums are a memory of fixed size, so that a token costs the same at any length. `z` is one more dim of the
values, all ones.

Dims: B batch, T time, D model, N heads, H head dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.models.layers import Linear, ModelDims
from slmjax.models.mixers.recurrent_parts import check_positive, divided, split_heads
from slmjax.models.protocols import Mixer, MixerConfig, StateSize

# Of the sum of weights; features are positive, but may underflow.
SMALLEST_DIVISOR = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(MixerConfig):
    """Linear attention with the feature elu + 1."""

    num_heads: int  # heads, N
    head_dim: int | None = None  # dims per head, H (none: embed_dim / num_heads)
    chunk_size: int = kernels.CHUNK_SIZE  # tokens that are computed by matrix products in training

    def __post_init__(self) -> None:
        check_positive(self, "num_heads", "head_dim", "chunk_size")

    def resolved_head_dim(self, dims: ModelDims) -> int:
        """Return the dims per head. Raises ValueError if the heads do not divide the model's width."""
        return self.head_dim or divided(dims.embed_dim, self.num_heads, names="num_heads or head_dim")

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "LinearAttention":
        """Build the module, with freshly initialised parameters."""
        return LinearAttention(self, dims, rngs=rngs)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return the FLOPs of the recurrence per token, in chunks."""
        head_dim = self.resolved_head_dim(dims)
        return self.num_heads * kernels.recurrence_flops(
            key_dim=head_dim, value_dim=head_dim + 1, chunk_size=min(self.chunk_size, length)
        )

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the size of the memory, which does not depend on the length."""
        head_dim = self.resolved_head_dim(dims)
        return StateSize(recurrent=self.num_heads * head_dim * (head_dim + 1))


def positive_features(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Return `elu(x) + 1`, which is positive, in the dtype of `x`."""
    return (jax.nn.elu(x.astype(jnp.float32)) + 1.0).astype(x.dtype)


def normalised_recurrence(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    *,
    segment_ids: Int[Array, "B T"],
    state: kernels.RecurrentState | None = None,
    chunk_size: int = kernels.CHUNK_SIZE,
) -> tuple[Float[Array, "B T N H"], kernels.RecurrentState]:
    """Return each token's weighted mean of the values of its document up to it, in the dtype of `v`."""
    # In float32, since the quotient of two rounded sums would lose more than either.
    values = jnp.concatenate([v.astype(jnp.float32), jnp.ones((*v.shape[:3], 1), jnp.float32)], axis=-1)
    sums, new_state = kernels.decayed_recurrence(
        positive_features(q),
        positive_features(k),
        values,
        segment_ids=segment_ids,
        state=state,
        chunk_size=chunk_size,
    )
    mixed = sums[..., :-1] / jnp.maximum(sums[..., -1:], SMALLEST_DIVISOR)
    return mixed.astype(v.dtype), new_state


class LinearAttention(Mixer):
    """Linear attention."""

    def __init__(self, config: LinearAttentionConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.head_dim = config.resolved_head_dim(dims)
        width = config.num_heads * self.head_dim
        self.query = Linear(dims.embed_dim, width, std=dims.init_std, rngs=rngs)
        self.key = Linear(dims.embed_dim, width, std=dims.init_std, rngs=rngs)
        self.value = Linear(dims.embed_dim, width, std=dims.init_std, rngs=rngs)
        self.output = Linear(width, dims.embed_dim, std=dims.output_std, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        heads = self.config.num_heads
        mixed, new_state = normalised_recurrence(
            split_heads(self.query(x), heads),
            split_heads(self.key(x), heads),
            split_heads(self.value(x), heads),
            segment_ids=segment_ids,
            state=state,
            chunk_size=self.config.chunk_size,
        )
        return self.output(mixed.reshape(*x.shape[:2], -1)), None if state is None else new_state

    def init_state(self, batch_size: int, *, max_length: int) -> kernels.RecurrentState:
        """Return an empty memory."""
        return kernels.empty_recurrent_state(
            batch_size,
            num_heads=self.config.num_heads,
            key_dim=self.head_dim,
            value_dim=self.head_dim + 1,
        )
