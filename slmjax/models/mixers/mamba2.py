"""Mamba-2, a state-space model whose state is a matrix per head (Dao & Gu 2024).

- S_t = exp(-step_t exp(log_decay_rate)) S_{t-1} + step_t k_t v_t^T,   o_t = S_t^T q_t + skip v_t
- step_t = softplus(step(x_t) + step_bias)
- y = output(norm(o * silu(gate(x)))), where the norm may also precede the gate, or be absent

In the terms of the paper `q` is C, `k` is B, `v` is x and `log_decay_rate` is A_log. Queries, keys and values
pass through a short convolution. All heads of a group share queries and keys.

Dims: B batch, T time, D model, N heads, G groups, K state dims of a head, P value dims of a head, I = N P.
"""

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.config import added_field
from slmjax.models.layers import Linear, ModelDims, along_last
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
)
from slmjax.models.protocols import Mixer, MixerConfig, StateSize


class GatedNorm(enum.Enum):
    """Order of the gate and the norm before the output projection."""

    AFTER_GATE = "after_gate"  # norm(o * silu(gate)), as in Mamba-2 and Granite 4
    BEFORE_GATE = "before_gate"  # norm(o) * silu(gate)
    NONE = "none"  # o * silu(gate), as in most models of Falcon-H1


# Projections of the input, in the order of released weights, which have one matrix for all.
PROJECTIONS = ("gate", "value", "key", "query", "step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """Mamba-2, a selective state-space model."""

    expansion: int = 2  # width of all heads' values, as a multiple of embed_dim
    head_dim: int = 64  # value dims per head, P
    state_dim: int = 128  # key dims per head, K
    num_groups: int = 1  # groups of heads, each with the same queries and keys, G
    # Released models differ: with one group both are the same.
    norm_groups: int | None = None  # groups of dims that are normed together (none: num_groups)
    conv_width: int = 4  # tokens that the convolution sees
    chunk_size: int = kernels.CHUNK_SIZE  # tokens that are computed by matrix products in training
    # width of all heads' values (none: expansion times embed_dim)
    inner_dim: int | None = added_field(None, before=None)
    # order of the gate and the norm before the output projection
    norm: GatedNorm = added_field(GatedNorm.AFTER_GATE, before=GatedNorm.AFTER_GATE)
    input_bias: bool = added_field(False, before=False)  # biases of the projections of the input
    output_bias: bool = added_field(False, before=False)  # bias of the output projection
    conv_bias: bool = added_field(True, before=True)  # biases of the convolutions
    # Constants in the manner of muP (Yang et al. 2022), as in Falcon-H1.
    # multiply the projections gate, value, key, query and step of the input, biases included (none: 1)
    projection_multipliers: tuple[float, ...] | None = added_field(None, before=None)

    def __post_init__(self) -> None:
        names = (
            "expansion",
            "head_dim",
            "state_dim",
            "num_groups",
            "norm_groups",
            "conv_width",
            "chunk_size",
            "inner_dim",
        )
        check_positive(self, *names)
        multipliers = self.projection_multipliers
        if multipliers is not None and len(multipliers) != len(PROJECTIONS):
            raise ValueError(
                f"projection_multipliers has {len(multipliers)} entries: give one for each of "
                f"{', '.join(PROJECTIONS)}, or none"
            )

    def resolved_inner_dim(self, dims: ModelDims) -> int:
        """Return the width of all heads' values, I."""
        return self.expansion * dims.embed_dim if self.inner_dim is None else self.inner_dim

    def num_heads(self, dims: ModelDims) -> int:
        """Return the number of heads, N.

        Raises:
          ValueError: the expanded width does not divide by `head_dim`, or the heads by a number of groups.
        """
        width = "expansion" if self.inner_dim is None else "inner_dim"
        heads = divided(self.resolved_inner_dim(dims), self.head_dim, names=f"{width} or head_dim")
        for name in ("num_groups", "norm_groups"):
            if heads % (getattr(self, name) or 1):
                raise ValueError(f"{heads} heads do not divide by {name}={getattr(self, name)}: change one")
        return heads

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "Mamba2":
        """Build the module, with freshly initialised parameters."""
        return Mamba2(self, dims, rngs=rngs)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return the FLOPs of recurrence and convolutions per token."""
        heads = self.num_heads(dims)
        recurrence = heads * kernels.recurrence_flops(
            key_dim=self.state_dim,
            value_dim=self.head_dim,
            chunk_size=min(self.chunk_size, length),
            heads_per_group=heads // self.num_groups,
        )
        return recurrence + 2 * self.conv_width * self._num_convolved(heads)

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the size of memory and convolution histories, which do not depend on the length."""
        heads = self.num_heads(dims)
        return StateSize(
            recurrent=heads * self.state_dim * self.head_dim,
            history=(self.conv_width - 1) * self._num_convolved(heads),
        )

    def _num_convolved(self, heads: int) -> int:
        return heads * self.head_dim + 2 * self.num_groups * self.state_dim


def state_space(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T N P"],
    *,
    step: Float[Array, "B T N"],
    log_decay_rate: Float[Array, " N"],
    skip: Float[Array, " N"],
    segment_ids: Int[Array, "B T"],
    state: kernels.RecurrentState | None = None,
    chunk_size: int = kernels.CHUNK_SIZE,
) -> tuple[Float[Array, "B T N P"], kernels.RecurrentState]:
    """Return what each token reads, and the state (SSD); steps are float32, after the softplus."""
    mixed, state = kernels.decayed_recurrence(
        q,
        k,
        (v.astype(jnp.float32) * step[..., None]).astype(v.dtype),
        log_decay=-step * along_last(jnp.exp(log_decay_rate), 3),
        segment_ids=segment_ids,
        state=state,
        chunk_size=chunk_size,
    )
    return mixed + v * skip.astype(v.dtype)[None, None, :, None], state


def grouped_rms_norm(
    x: Float[Array, "B T I"], scale: Float[Array, " I"], *, num_groups: int, eps: float
) -> Float[Array, "B T I"]:
    """Return `scale * x / rms(x)`, with the root mean square of each group of dims, in float32."""
    x32 = split_heads(x.astype(jnp.float32), num_groups)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed.reshape(x.shape) * along_last(scale, 3)).astype(x.dtype)


class Mamba2(Mixer):
    """Mamba-2."""

    def __init__(self, config: Mamba2Config, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.num_heads = config.num_heads(dims)
        self.eps = dims.norm_eps
        keys = config.num_groups * config.state_dim
        values = self.num_heads * config.head_dim
        linear_kwargs = {"std": dims.init_std, "bias": config.input_bias, "rngs": rngs}
        # One projection each, where released weights have one for all: a shard then holds whole heads.
        self.gate = Linear(dims.embed_dim, values, **linear_kwargs)
        self.value = Linear(dims.embed_dim, values, **linear_kwargs)
        self.key = Linear(dims.embed_dim, keys, **linear_kwargs)
        self.query = Linear(dims.embed_dim, keys, **linear_kwargs)
        self.step = Linear(dims.embed_dim, self.num_heads, **linear_kwargs)
        conv_kwargs: dict[str, Any] = {
            "width": config.conv_width,
            "bias": config.conv_bias,
            "dims": dims,
            "rngs": rngs,
        }
        self.value_convolution = SiluConvolution(values, **conv_kwargs)
        self.key_convolution = SiluConvolution(keys, **conv_kwargs)
        self.query_convolution = SiluConvolution(keys, **conv_kwargs)
        self.log_decay_rate = nnx.Param(initial_log_scale(rngs.params(), (self.num_heads,), low=1.0))
        self.step_bias = nnx.Param(initial_step_bias(rngs.params(), (self.num_heads,)))
        self.skip = nnx.Param(jnp.ones((self.num_heads,), jnp.float32))
        is_normed = config.norm is not GatedNorm.NONE
        self.norm_scale = nnx.Param(jnp.ones((values,), jnp.float32)) if is_normed else None
        self.output = Linear(values, dims.embed_dim, std=dims.output_std, bias=config.output_bias, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        groups = self.config.num_groups
        memory, histories = parts_of(state)
        ids = segment_ids
        gate, value, key, query, step = self._project(x)
        value, value_history = self.value_convolution(value, segment_ids=ids, history=histories["value"])
        key, key_history = self.key_convolution(key, segment_ids=ids, history=histories["key"])
        query, query_history = self.query_convolution(query, segment_ids=ids, history=histories["query"])
        step = softplus(step.astype(jnp.float32) + along_last(self.step_bias[...], 3))
        mixed, memory = state_space(
            split_heads(query, groups),
            split_heads(key, groups),
            split_heads(value, self.num_heads),
            step=step,
            log_decay_rate=self.log_decay_rate[...],
            skip=self.skip[...],
            segment_ids=ids,
            state=memory,
            chunk_size=self.config.chunk_size,
        )
        gated = self._gate(mixed.reshape(*x.shape[:2], -1), gate)
        if state is not None:
            histories = {"value": value_history, "key": key_history, "query": query_history}
            state = MemoryState(recurrent=memory, histories=histories)
        return self.output(gated), state

    def _project(self, x: Float[Array, "B T D"]) -> list[Array]:
        """Return the projections of the input, in the order of `PROJECTIONS`."""
        projected = [layer(x) for layer in (self.gate, self.value, self.key, self.query, self.step)]
        multipliers = self.config.projection_multipliers
        if multipliers is None:
            return projected
        return [y * multiplier for y, multiplier in zip(projected, multipliers, strict=True)]

    def _gate(self, mixed: Float[Array, "B T I"], gate: Float[Array, "B T I"]) -> Float[Array, "B T I"]:
        """Return what the heads read, gated and normed."""
        kind = self.config.norm
        if kind is not GatedNorm.BEFORE_GATE:
            mixed = mixed * jax.nn.silu(gate)
        if self.norm_scale is not None:
            num_groups = self.config.norm_groups or self.config.num_groups
            mixed = grouped_rms_norm(mixed, self.norm_scale[...], num_groups=num_groups, eps=self.eps)
        return mixed * jax.nn.silu(gate) if kind is GatedNorm.BEFORE_GATE else mixed

    def init_state(self, batch_size: int, *, max_length: int) -> MemoryState:
        """Return an empty memory, and histories without tokens."""
        recurrent = kernels.empty_recurrent_state(
            batch_size,
            num_heads=self.num_heads,
            key_dim=self.config.state_dim,
            value_dim=self.config.head_dim,
        )
        histories = {
            "value": self.value_convolution.empty_history(batch_size),
            "key": self.key_convolution.empty_history(batch_size),
            "query": self.query_convolution.empty_history(batch_size),
        }
        return MemoryState(recurrent=recurrent, histories=histories)
