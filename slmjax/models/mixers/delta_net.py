"""The delta rule: a token replaces what the memory holds at its key, instead of adding to it.

- S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,   S' = exp(g_t) S_{t-1},   o_t = S_t^T q_t / sqrt(K)

DeltaNet (Yang et al. 2024) has no decay: g = 0. Gated DeltaNet (Yang et al. 2024b) decays by head, and Kimi
Delta Attention (Kimi Team 2025) by key dim: g_t = -exp(log_decay_rate) softplus(decay(x_t) + step_bias).
Queries, keys and values pass through a short convolution; queries and keys have length 1.

Dims: B batch, T time, D model, G heads of queries and keys, N heads of values, K key dims, V value dims.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.config import added_field
from slmjax.models.layers import Linear, ModelDims, RmsNorm, along_last
from slmjax.models.mixers.recurrent_parts import (
    MemoryState,
    SiluConvolution,
    check_positive,
    divided,
    initial_log_scale,
    initial_step_bias,
    parts_of,
    softplus,
    split_heads,
    unit_vectors,
)
from slmjax.models.protocols import Mixer, MixerConfig, StateSize

# Of the initial rates of Gated DeltaNet, which are uniform above 0: their logarithm is a parameter.
SMALLEST_DECAY_RATE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaRuleConfig(MixerConfig):
    """Settings that all mixers with the delta rule share."""

    num_heads: int  # heads of queries and keys, G
    key_dim: int | None = None  # key dims per head, K (none: embed_dim / num_heads)
    value_dim: int | None = None  # value dims per head, V (none: key_dim)
    conv_width: int = 4  # tokens that the convolutions of queries, keys and values see
    # With a strength of up to 2 the memory may change its sign, which counting modulo 2 needs (Grazzi et al.
    # 2024).
    negative_eigenvalues: bool = False  # double the write strength, which is then below 2
    chunk_size: int = kernels.CHUNK_SIZE  # tokens that are computed by matrix products in training

    def check_dims(self) -> None:
        """Raise ValueError for a dim below 1."""
        check_positive(self, "num_heads", "key_dim", "value_dim", "conv_width", "chunk_size")

    def resolved_key_dim(self, dims: ModelDims) -> int:
        """Return the key dims per head. Raises ValueError if the heads do not divide the model's width."""
        return self.key_dim or divided(dims.embed_dim, self.num_heads, names="num_heads or key_dim")

    def resolved_value_dim(self, dims: ModelDims) -> int:
        """Return the value dims per head."""
        return self.value_dim or self.resolved_key_dim(dims)

    @property
    @abc.abstractmethod
    def value_heads(self) -> int:
        """Number of heads of values, N."""

    @property
    @abc.abstractmethod
    def has_channel_decay(self) -> bool:
        """Whether each key dim has its own decay."""

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return the FLOPs of recurrence and convolutions per token."""
        recurrence = self.value_heads * kernels.recurrence_flops(
            key_dim=self.resolved_key_dim(dims),
            value_dim=self.resolved_value_dim(dims),
            chunk_size=min(self.chunk_size, length),
            heads_per_group=self.value_heads // self.num_heads,
            has_channel_decay=self.has_channel_decay,
            has_delta_rule=True,
        )
        return recurrence + 2 * self.conv_width * self._num_convolved(dims)

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the size of memory and convolution histories, which do not depend on the length."""
        return StateSize(
            recurrent=self.value_heads * self.resolved_key_dim(dims) * self.resolved_value_dim(dims),
            history=(self.conv_width - 1) * self._num_convolved(dims),
        )

    def _num_convolved(self, dims: ModelDims) -> int:
        keys = self.num_heads * self.resolved_key_dim(dims)
        return 2 * keys + self.value_heads * self.resolved_value_dim(dims)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(DeltaRuleConfig):
    """DeltaNet: the delta rule without decay."""

    def __post_init__(self) -> None:
        self.check_dims()

    @property
    def value_heads(self) -> int:
        """Number of heads of values, N."""
        return self.num_heads

    @property
    def has_channel_decay(self) -> bool:
        """Whether each key dim has its own decay."""
        return False

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "DeltaNet":
        """Build the module, with freshly initialised parameters."""
        return DeltaNet(self, dims, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(DeltaRuleConfig):
    """Gated DeltaNet: the delta rule with a decay per head, as in Qwen3-Next."""

    num_value_heads: int | None = None  # heads of values, N, a multiple of num_heads (none: num_heads)
    # added to the mean square in the norm of what heads return (none: the model's norm_eps)
    head_norm_eps: float | None = added_field(None, before=None)

    def __post_init__(self) -> None:
        self.check_dims()
        check_positive(self, "num_value_heads")
        if self.value_heads % self.num_heads:
            raise ValueError(
                f"num_value_heads={self.num_value_heads} must be a multiple of num_heads={self.num_heads}: "
                "heads of values share queries and keys"
            )
        if self.head_norm_eps is not None and self.head_norm_eps <= 0:
            raise ValueError(
                f"head_norm_eps must be positive, or none for the model's, got {self.head_norm_eps}"
            )

    @property
    def value_heads(self) -> int:
        """Number of heads of values, N."""
        return self.num_value_heads or self.num_heads

    @property
    def has_channel_decay(self) -> bool:
        """Whether each key dim has its own decay."""
        return False

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "GatedDeltaNet":
        """Build the module, with freshly initialised parameters."""
        return GatedDeltaNet(self, dims, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KimiDeltaAttentionConfig(DeltaRuleConfig):
    """Kimi Delta Attention (KDA): the delta rule with a decay per key dim."""

    gate_rank: int | None = None  # width inside the projections of decay and gate (none: value_dim)

    def __post_init__(self) -> None:
        self.check_dims()
        check_positive(self, "gate_rank")

    @property
    def value_heads(self) -> int:
        """Number of heads of values, N."""
        return self.num_heads

    @property
    def has_channel_decay(self) -> bool:
        """Whether each key dim has its own decay."""
        return True

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "KimiDeltaAttention":
        """Build the module, with freshly initialised parameters."""
        return KimiDeltaAttention(self, dims, rngs=rngs)


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T N V"],
    *,
    strength: Float[Array, "B T N"],
    log_decay: Float[Array, "B T N"] | Float[Array, "B T N K"] | None,
    segment_ids: Int[Array, "B T"],
    state: kernels.RecurrentState | None = None,
    chunk_size: int = kernels.CHUNK_SIZE,
) -> tuple[Float[Array, "B T N V"], kernels.RecurrentState]:
    """Return what each token reads, with queries and keys scaled to length 1, and the state.

    Args:
      q: queries.
      k: keys.
      v: values.
      strength: write strengths beta, float32.
      log_decay: logarithm of the decay, float32 (none: no decay).
      segment_ids: document of each token, padding 0.
      state: state before the first token (none: an empty one).
      chunk_size: tokens of a chunk.
    """
    return kernels.decayed_recurrence(
        unit_vectors(q) * q.shape[-1] ** -0.5,
        unit_vectors(k),
        v,
        beta=strength,
        log_decay=log_decay,
        segment_ids=segment_ids,
        state=state,
        chunk_size=chunk_size,
    )


class ConvolvedHeads(nnx.Module):
    """Projections to queries, keys and values, with short convolutions, and the delta rule on them."""

    def __init__(self, config: DeltaRuleConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.key_dim = config.resolved_key_dim(dims)
        self.value_dim = config.resolved_value_dim(dims)
        keys = config.num_heads * self.key_dim
        values = config.value_heads * self.value_dim
        linear_kwargs = {"std": dims.init_std, "rngs": rngs}
        self.query = Linear(dims.embed_dim, keys, **linear_kwargs)
        self.key = Linear(dims.embed_dim, keys, **linear_kwargs)
        self.value = Linear(dims.embed_dim, values, **linear_kwargs)
        self.strength = Linear(dims.embed_dim, config.value_heads, **linear_kwargs)
        conv_kwargs: dict[str, Any] = {"width": config.conv_width, "dims": dims, "rngs": rngs}
        self.query_convolution = SiluConvolution(keys, **conv_kwargs)
        self.key_convolution = SiluConvolution(keys, **conv_kwargs)
        self.value_convolution = SiluConvolution(values, **conv_kwargs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        log_decay: Float[Array, "B T N"] | Float[Array, "B T N K"] | None,
        segment_ids: Int[Array, "B T"],
        state: MemoryState | None,
    ) -> tuple[Float[Array, "B T N V"], MemoryState | None]:
        memory, histories = parts_of(state)
        query, query_history = self.query_convolution(
            self.query(x), segment_ids=segment_ids, history=histories["query"]
        )
        key, key_history = self.key_convolution(
            self.key(x), segment_ids=segment_ids, history=histories["key"]
        )
        value, value_history = self.value_convolution(
            self.value(x), segment_ids=segment_ids, history=histories["value"]
        )
        largest_strength = 2.0 if self.config.negative_eigenvalues else 1.0
        mixed, memory = delta_rule(
            split_heads(query, self.config.num_heads),
            split_heads(key, self.config.num_heads),
            split_heads(value, self.config.value_heads),
            strength=largest_strength * jax.nn.sigmoid(self.strength(x).astype(jnp.float32)),
            log_decay=log_decay,
            segment_ids=segment_ids,
            state=memory,
            chunk_size=self.config.chunk_size,
        )
        if state is None:
            return mixed, None
        histories = {"query": query_history, "key": key_history, "value": value_history}
        return mixed, MemoryState(recurrent=memory, histories=histories)

    def init_state(self, batch_size: int) -> MemoryState:
        """Return an empty memory, and histories without tokens."""
        recurrent = kernels.empty_recurrent_state(
            batch_size, num_heads=self.config.value_heads, key_dim=self.key_dim, value_dim=self.value_dim
        )
        histories = {
            "query": self.query_convolution.empty_history(batch_size),
            "key": self.key_convolution.empty_history(batch_size),
            "value": self.value_convolution.empty_history(batch_size),
        }
        return MemoryState(recurrent=recurrent, histories=histories)


class DeltaNet(Mixer):
    """DeltaNet: `output(norm(o))`."""

    def __init__(self, config: DeltaNetConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.heads = ConvolvedHeads(config, dims, rngs=rngs)
        self.norm = RmsNorm(self.heads.value_dim, eps=dims.norm_eps)
        width = config.value_heads * self.heads.value_dim
        self.output = Linear(width, dims.embed_dim, std=dims.output_std, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        mixed, state = self.heads(x, log_decay=None, segment_ids=segment_ids, state=state)
        return self.output(self.norm(mixed).reshape(*x.shape[:2], -1)), state

    def init_state(self, batch_size: int, *, max_length: int) -> MemoryState:
        """Return an empty memory, and histories without tokens."""
        return self.heads.init_state(batch_size)


class GatedDeltaNet(Mixer):
    """Gated DeltaNet: `output(norm(o) * silu(gate(x)))`."""

    def __init__(self, config: GatedDeltaNetConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        num_heads = config.value_heads
        self.heads = ConvolvedHeads(config, dims, rngs=rngs)
        width = num_heads * self.heads.value_dim
        self.decay = Linear(dims.embed_dim, num_heads, std=dims.init_std, rngs=rngs)
        self.log_decay_rate = nnx.Param(
            initial_log_scale(rngs.params(), (num_heads,), low=SMALLEST_DECAY_RATE)
        )
        self.step_bias = nnx.Param(initial_step_bias(rngs.params(), (num_heads,)))
        self.gate = Linear(dims.embed_dim, width, std=dims.init_std, rngs=rngs)
        self.norm = RmsNorm(self.heads.value_dim, eps=config.head_norm_eps or dims.norm_eps)
        self.output = Linear(width, dims.embed_dim, std=dims.output_std, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        step = softplus(self.decay(x).astype(jnp.float32) + along_last(self.step_bias[...], 3))
        log_decay = -along_last(jnp.exp(self.log_decay_rate[...]), 3) * step
        mixed, state = self.heads(x, log_decay=log_decay, segment_ids=segment_ids, state=state)
        # The norm precedes the gate.
        gated = self.norm(mixed).reshape(*x.shape[:2], -1) * jax.nn.silu(self.gate(x))
        return self.output(gated), state

    def init_state(self, batch_size: int, *, max_length: int) -> MemoryState:
        """Return an empty memory, and histories without tokens."""
        return self.heads.init_state(batch_size)


class KimiDeltaAttention(Mixer):
    """Kimi Delta Attention: `output(norm(o) * sigmoid(gate_up(gate_down(x))))`."""

    def __init__(self, config: KimiDeltaAttentionConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.heads = ConvolvedHeads(config, dims, rngs=rngs)
        self.num_heads = config.num_heads
        keys = config.num_heads * self.heads.key_dim
        width = config.num_heads * self.heads.value_dim
        rank = config.gate_rank or self.heads.value_dim
        linear_kwargs = {"std": dims.init_std, "rngs": rngs}
        self.decay_down = Linear(dims.embed_dim, rank, **linear_kwargs)
        self.decay_up = Linear(rank, keys, **linear_kwargs)
        self.log_decay_rate = nnx.Param(initial_log_scale(rngs.params(), (config.num_heads,), low=1.0))
        self.step_bias = nnx.Param(initial_step_bias(rngs.params(), (keys,)))
        self.gate_down = Linear(dims.embed_dim, rank, **linear_kwargs)
        self.gate_up = Linear(rank, width, **linear_kwargs)
        self.norm = RmsNorm(self.heads.value_dim, eps=dims.norm_eps)
        self.output = Linear(width, dims.embed_dim, std=dims.output_std, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        # No activation between the two projections.
        decay = self.decay_up(self.decay_down(x)).astype(jnp.float32)
        step = split_heads(softplus(decay + along_last(self.step_bias[...], 3)), self.num_heads)
        log_decay = -jnp.exp(self.log_decay_rate[...])[None, None, :, None] * step
        mixed, state = self.heads(x, log_decay=log_decay, segment_ids=segment_ids, state=state)
        gate = jax.nn.sigmoid(self.gate_up(self.gate_down(x)))
        return self.output(self.norm(mixed).reshape(*x.shape[:2], -1) * gate), state

    def init_state(self, batch_size: int, *, max_length: int) -> MemoryState:
        """Return an empty memory, and histories without tokens."""
        return self.heads.init_state(batch_size)
