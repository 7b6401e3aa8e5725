"""The protocols of a block's two parts: token mixers (`MixerConfig`, `Mixer`) and `FfnConfig`, `Ffn`.

A config is a frozen dataclass that builds the module and counts its costs without building it.

Dims: B batch, T time, D model.
"""

import abc
import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax.models.layers import ArrayFunction, ModelDims


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FfnAux:
    """Losses and metrics of a feed-forward layer: sums over the batch's real tokens, never means.

    Sums can be added over layers, microbatches and devices; the train step divides once, by the global count.
    They are typed `Any` because this is a pytree: it may hold shapes.
    """

    losses: dict[str, Any]  # multiplied by their coefficients; the train step divides by the real tokens
    metrics: dict[str, Any]


class Mixer(nnx.Module):
    """A token mixer: `(x, segment_ids, positions, state) -> (y, state)`.

    A state of None means complete sequences, as in training. A token must not see others of another segment.
    """

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
    ) -> tuple[Float[Array, "B T D"], Any]: ...

    @abc.abstractmethod
    def init_state(self, batch_size: int, *, max_length: int) -> Any:
        """Return an empty decoding state for sequences of at most `max_length` tokens."""


class CachingMixer(Mixer):
    """A mixer whose decoding state has an entry for every token, its cache.

    It applies `cache_quantizer`, if set, to entries before it uses them, in training and in decoding. An
    entry is computed once, so anything in it that depends on the length of the sequence must use the maximum
    length. The mixer is therefore called with `max_lengths` in addition to the arguments of every mixer.
    """

    # Set by `quantization.plan.set_quantizers`; None in full precision.
    cache_quantizer: ArrayFunction | None

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
        max_lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Mix tokens; `max_lengths`: maximum length of each row's sequence, None for complete documents."""

    @abc.abstractmethod
    def cached_shape(self) -> tuple[int, ...]:
        """Return the shape of a token's cache entry; a per-token format has one scale along the last dim."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(abc.ABC):
    """Settings of a token mixer."""

    @abc.abstractmethod
    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> Mixer:
        """Build the module, with freshly initialised parameters."""

    def training_note(self, dims: ModelDims) -> str | None:
        """Return a warning about training with these settings; None if there is none."""
        return None

    # Products with weights are counted in `zoo.costs`, from the shapes of parameters.
    @abc.abstractmethod
    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return forward FLOPs per token without products with weights, averaged over a causal sequence."""

    @abc.abstractmethod
    def state_bytes(self, dims: ModelDims, *, length: int, itemsize: int) -> int:
        """Return the bytes of decoding state of one sequence of `length` tokens."""


class Ffn(nnx.Module):
    """A feed-forward layer: `(x, segment_ids) -> (y, aux)`."""

    # It mixes no tokens: segment ids only mark padding, with 0, for losses and metrics.
    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], FfnAux]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FfnConfig(abc.ABC):
    """Settings of a feed-forward layer."""

    @abc.abstractmethod
    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> Ffn:
        """Build the module, with freshly initialised parameters."""

    def training_note(self) -> str | None:
        """Return a warning about training with these settings; None if there is none."""
        return None

    @abc.abstractmethod
    def active_fraction(self) -> float:
        """Return the fraction of the parameters under `experts/` that one token uses."""

    @abc.abstractmethod
    def for_inference(self) -> "FfnConfig":
        """Return the config for evaluation and sampling, with the same parameters.

        Its output for a token must not depend on later tokens, or on other sequences of the batch.
        """
