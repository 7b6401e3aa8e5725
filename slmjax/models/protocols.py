"""The two protocols that a block is made of: token mixers (`MixerConfig`, `Mixer`) and feed-forward layers
(`FfnConfig`, `Ffn`).

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
    """What a feed-forward layer reports beside its output: sums over the batch's real tokens, never means.

    The sums are typed `Any` because this is a pytree: it may hold shapes.
    """

    losses: dict[str, Any]  # already multiplied by their coefficients; to divide by the count of real tokens
    metrics: dict[str, Any]


class Mixer(nnx.Module):
    """A token mixer: `(x, segment_ids, positions, state) -> (y, state)`; state None means a whole sequence at
    once.
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
        """Empty decoding state for sequences of at most `max_length` tokens."""


class CachingMixer(Mixer):
    """A mixer whose decoding state keeps numbers of every token, its cache.

    It applies `cache_quantizer`, if set, to them before it uses them, in training as in decoding. Cached numbers are computed once. Whatever in them depends on the length of the
    sequence needs the length that it may reach, so that such a mixer is called with `max_lengths` beside the
    arguments of every mixer.
    """

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
        """Mix tokens; `max_lengths`: tokens that each row's sequence may reach, None for whole documents."""

    @abc.abstractmethod
    def cached_shape(self) -> tuple[int, ...]:
        """The shape of what is kept of a token; the last dim is what is rounded together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(abc.ABC):
    """Settings of a token mixer."""

    @abc.abstractmethod
    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> Mixer:
        """The module, with freshly initialised parameters."""

    @abc.abstractmethod
    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Forward FLOPs per token beside the weights' own, averaged over a causal sequence of `length`
        tokens.
        """

    @abc.abstractmethod
    def state_bytes(self, dims: ModelDims, *, length: int, itemsize: int) -> int:
        """Bytes of decoding state of one sequence of `length` tokens."""


class Ffn(nnx.Module):
    """A feed-forward layer: `(x, segment_ids) -> (y, aux)`."""

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], FfnAux]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FfnConfig(abc.ABC):
    """Settings of a feed-forward layer."""

    @abc.abstractmethod
    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> Ffn:
        """The module, with freshly initialised parameters."""

    @abc.abstractmethod
    def active_share(self) -> float:
        """Share of the parameters under `experts/` that one token uses."""

    @abc.abstractmethod
    def for_inference(self) -> "FfnConfig":
        """The layer with the same parameters as it is evaluated and sampled from: what a token gets depends
        on no later or other one.
        """
