"""The dense feed-forward layer, gated or ungated.

Dims: B batch, T time, D model, F feed-forward.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax.config import added_field
from slmjax.models.layers import Linear, ModelDims
from slmjax.models.protocols import Ffn, FfnAux, FfnConfig


class Activation(enum.Enum):
    """Non-linearity of a feed-forward layer."""

    # Gated by silu the layer is SwiGLU (Shazeer 2020).
    SILU = "silu"
    GELU = "gelu"  # the tanh approximation, as in GPT-2 and Gemma
    GELU_EXACT = "gelu_exact"  # with the error function
    RELU = "relu"
    # Squared ReLU (Primer, So et al. 2021): sparse like ReLU, smooth at 0.
    RELU2 = "relu2"
    # for gated layers only: clipped inputs, a steeper sigmoid, and one added to the other half (GPT-OSS)
    CLAMPED_SILU = "clamped_silu"


ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {
    Activation.SILU: jax.nn.silu,
    Activation.GELU: lambda x: jax.nn.gelu(x, approximate=True),
    Activation.GELU_EXACT: lambda x: jax.nn.gelu(x, approximate=False),
    Activation.RELU: jax.nn.relu,
    Activation.RELU2: lambda x: jnp.square(jax.nn.relu(x)),
}
# The constants of CLAMPED_SILU, as in GPT-OSS; sigmoid(1.702 x) approximates the normal distribution of GELU.
CLAMP = 7.0
STEEPNESS = 1.702


def gated(
    activation: Activation, gate: Float[Array, "*B F"], up: Float[Array, "*B F"]
) -> Float[Array, "*B F"]:
    """Return the hidden layer of a gated feed-forward layer, from its two projections (Shazeer 2020)."""
    if activation is not Activation.CLAMPED_SILU:
        return ACTIVATIONS[activation](gate) * up
    # The gate is clipped from above only: for large negative inputs its sigmoid is near 0 in any case.
    gate = jnp.minimum(gate, CLAMP)
    up = jnp.clip(up, -CLAMP, CLAMP)
    # With one added to `up`, the gate alone passes where `up` is near 0.
    return gate * jax.nn.sigmoid(STEEPNESS * gate) * (up + 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig(FfnConfig):
    """A dense feed-forward layer."""

    hidden_dim: int  # width of the hidden layer, F
    activation: Activation = Activation.SILU  # non-linearity
    gated: bool = True  # multiply by a second projection (SwiGLU when the activation is silu)
    bias: bool = False  # biases on all projections
    # name of the weights, which all layers with this name share (none: each layer has its own)
    shared_as: str | None = added_field(None, before=None)
    # Constants in the manner of muP (Yang et al. 2022), as in Falcon-H1.
    # multiplies what the activation is applied to
    activation_multiplier: float = added_field(1.0, before=1.0)
    output_multiplier: float = added_field(1.0, before=1.0)  # multiplies the output
    # fractions of hidden_dim, ascending: a step trains one of these prefixes, or the whole (none: the whole)
    nested: tuple[float, ...] = added_field((), before=())

    def __post_init__(self) -> None:
        if self.hidden_dim < 1:
            raise ValueError(f"ffn.hidden_dim must be at least 1, got {self.hidden_dim}")
        if self.activation is Activation.CLAMPED_SILU and not self.gated:
            raise ValueError(
                "ffn.activation=clamped_silu needs two projections: set ffn.gated, or choose another "
                "activation"
            )
        if list(self.nested) != sorted(set(self.nested)) or not all(0.0 < part < 1.0 for part in self.nested):
            raise ValueError(
                f"ffn.nested are ascending fractions between 0 and 1, without the whole, got {self.nested}"
            )
        if any(not (self.hidden_dim * part).is_integer() for part in self.nested):
            raise ValueError(
                f"ffn.nested={self.nested} must give whole numbers of the hidden_dim={self.hidden_dim} "
                "units: choose other fractions, or another hidden_dim"
            )
        # It is part of the parameters' paths.
        if self.shared_as is not None and not self.shared_as.isidentifier():
            raise ValueError(
                f"ffn.shared_as must be a name of letters, digits and underscores, got {self.shared_as!r}"
            )

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "Mlp":
        """Build the module, with freshly initialised parameters."""
        return Mlp(self, dims, rngs=rngs)

    def shared_name(self) -> str | None:
        """Return the name of the weights that layers share."""
        return self.shared_as

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden units of each granularity, ascending; the last is the whole layer."""
        return (*(round(self.hidden_dim * part) for part in self.nested), self.hidden_dim)

    def active_fraction(self) -> float:
        """Return 1: a dense layer has no experts, and uses every parameter."""
        return 1.0

    def for_inference(self) -> "MlpConfig":
        """Return the config as it is."""
        return self


class Mlp(Ffn):
    """Gated or ungated two-layer MLP."""

    def __init__(self, config: MlpConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.config = config
        linear_kwargs = {"std": dims.init_std, "bias": config.bias, "rngs": rngs}
        self.gate = Linear(dims.embed_dim, config.hidden_dim, **linear_kwargs) if config.gated else None
        self.up = Linear(dims.embed_dim, config.hidden_dim, **linear_kwargs)
        # It writes into the residual stream, so its deviation shrinks with depth (`ModelDims.output_std`).
        self.down = Linear(
            config.hidden_dim, dims.embed_dim, std=dims.output_std, bias=config.bias, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], FfnAux]:
        activation = self.config.activation
        if self.gate is None:
            hidden = ACTIVATIONS[activation](_times(self.up(x), self.config.activation_multiplier))
        else:
            gate = _times(self.gate(x), self.config.activation_multiplier)
            hidden = gated(activation, gate, self.up(x))
        return _times(self.down(hidden), self.config.output_multiplier), FfnAux(losses={}, metrics={})


def _times(x: Float[Array, "*B F"], multiplier: float) -> Float[Array, "*B F"]:
    # Programs of models without multipliers stay as they are.
    return x if multiplier == 1.0 else x * multiplier
