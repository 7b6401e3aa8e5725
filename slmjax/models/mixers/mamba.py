"""Mamba (Gu & Dao 2023): a selective state space model after a short convolution, with a gate.

Each channel has N states that decay at rates of their own. How long a step of the recurrence is, what a token
writes to the states and what it reads from them depend on the token (`kernels.selective_scan`).

Dims: B batch, T time, D model, C inner channels, N states of a channel, R rank of the step sizes, W taps.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.models.layers import Linear, ModelDims, RmsNorm
from slmjax.models.protocols import Mixer, MixerConfig, StateSize

# The range of initial step sizes, log-uniform, and their lower bound.
STEP_SIZES = (0.001, 0.1)
SMALLEST_STEP = 1e-4
# Of the logarithm of a rate: a state with this one is gone after a step, and its exponential is finite.
LARGEST_LOG_RATE = 80.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(MixerConfig):
    """A selective state space model, Mamba (S6)."""

    inner_dim: int  # channels of the recurrence, C; usually twice the model's width
    state_dim: int = 16  # states of each channel, N
    step_rank: int | None = None  # rank of the step sizes, R (none: a sixteenth of the model's width)
    width: int = 4  # tokens that the convolution sees, itself included, W
    # norms of step sizes and of what is written and read, as in Jamba and FalconMamba
    inner_norms: bool = False
    chunk_size: int | None = None  # tokens of a chunk of the scan (none: the platform's)

    def __post_init__(self) -> None:
        for name in ("inner_dim", "state_dim", "step_rank", "chunk_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.width < 2:
            raise ValueError(f"width must be at least 2 for tokens to see each other, got {self.width}")

    def rank(self, dims: ModelDims) -> int:
        """Return the rank of the step sizes, R."""
        return math.ceil(dims.embed_dim / 16) if self.step_rank is None else self.step_rank

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "Mamba":
        """Build the module, with freshly initialised parameters."""
        return Mamba(self, dims, rngs=rngs)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return the FLOPs per token of the recurrence."""
        # Nine for each state: its decay (2), its input (3), the sums of update and readout (4). Two of them,
        # and the convolution, are counted as products with `log_rates` and the taps.
        return 7 * self.inner_dim * self.state_dim

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the size of the states and of the convolution's history, which do not grow with length."""
        return StateSize(history=(self.width - 1) * self.inner_dim, recurrent=self.state_dim * self.inner_dim)


def softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `log(1 + exp(x))` in float32, exact for large and small values."""
    return jnp.logaddexp(x.astype(jnp.float32), 0.0)


class Mamba(Mixer):
    """`output(silu(gate(x)) * scan(silu(convolution(inner(x)))))`."""

    def __init__(self, config: MambaConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = dims.dtype
        channels = config.inner_dim
        rank = config.rank(dims)
        # Separate maps, not one fused: each is sharded by channels.
        self.inner = Linear(dims.embed_dim, channels, std=dims.init_std, rngs=rngs)
        self.gate = Linear(dims.embed_dim, channels, std=dims.init_std, rngs=rngs)
        self.conv_taps = nnx.Param(uniform_taps(rngs.params(), width=config.width, channels=channels))
        self.conv_bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.step_down = Linear(channels, rank, std=dims.init_std, rngs=rngs)
        # The deviation of the uniform distribution over +-R^-1/2.
        self.step_up = Linear(rank, channels, std=(3 * rank) ** -0.5, rngs=rngs)
        self.step_bias = nnx.Param(initial_step_bias(rngs.params(), channels))
        self.input_matrix = Linear(channels, config.state_dim, std=dims.init_std, rngs=rngs)
        self.output_matrix = Linear(channels, config.state_dim, std=dims.init_std, rngs=rngs)
        # Rates 1 to N in every channel, as their logarithm (S4D-real, Gu et al. 2022).
        rates = jnp.log(jnp.arange(1, config.state_dim + 1, dtype=jnp.float32))
        self.log_rates = nnx.Param(jnp.tile(rates[None, :], (channels, 1)))
        self.skip = nnx.Param(jnp.ones((channels,), jnp.float32))
        has_norms = config.inner_norms
        self.step_norm = RmsNorm(rank, eps=dims.norm_eps) if has_norms else None
        self.input_norm = RmsNorm(config.state_dim, eps=dims.norm_eps) if has_norms else None
        self.output_norm = RmsNorm(config.state_dim, eps=dims.norm_eps) if has_norms else None
        self.output = Linear(channels, dims.embed_dim, std=dims.output_std, rngs=rngs)

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
        inner = jax.nn.silu(inner)
        # Step sizes stay float32: their sum over a document decides what is left of a state.
        steps = self.step_up(_maybe(self.step_norm, self.step_down(inner))).astype(jnp.float32)
        mixed, scan = kernels.selective_scan(
            inner,
            softplus(steps + self.step_bias[...][None, None]),
            a=-jnp.exp(jnp.minimum(self.log_rates[...], LARGEST_LOG_RATE)),
            b=_maybe(self.input_norm, self.input_matrix(inner)),
            c=_maybe(self.output_norm, self.output_matrix(inner)),
            d=self.skip[...],
            segment_ids=segment_ids,
            state=None if state is None else state["scan"],
            chunk_size=self.config.chunk_size,
        )
        state = None if state is None else {"history": history, "scan": scan}
        return self.output(mixed * jax.nn.silu(self.gate(x))), state

    def init_state(self, batch_size: int, *, max_length: int) -> dict[str, Any]:
        """Return the state before the first token; its size does not depend on `max_length`."""
        config = self.config
        return {
            "history": kernels.empty_history(
                batch_size, width=config.width, channels=config.inner_dim, dtype=self.dtype
            ),
            "scan": kernels.selective_scan_state(
                batch_size, channels=config.inner_dim, state_dim=config.state_dim
            ),
        }


def uniform_taps(key: Array, *, width: int, channels: int) -> Float[Array, "W C"]:
    """Draw the taps of a depthwise convolution, uniform over +-W^-1/2."""
    return jax.random.uniform(key, (width, channels), jnp.float32, -(width**-0.5), width**-0.5)


def initial_step_bias(key: Array, channels: int) -> Float[Array, " C"]:
    """Draw step sizes, log-uniform over STEP_SIZES, and return their inverse softplus."""
    low, high = map(math.log, STEP_SIZES)
    steps = jnp.maximum(jnp.exp(jax.random.uniform(key, (channels,), jnp.float32, low, high)), SMALLEST_STEP)
    return jnp.log(jnp.expm1(steps))


def _maybe(norm: RmsNorm | None, x: Float[Array, "B T N"]) -> Float[Array, "B T N"]:
    return x if norm is None else norm(x)
