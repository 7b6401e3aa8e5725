"""The protocols of a block's two parts: token mixers (`MixerConfig`, `Mixer`) and `FfnConfig`, `Ffn`.

A config is a frozen dataclass that builds the module and counts its costs without building it. A plain
`Mixer` receives its tokens and a decoding state. One that needs more is a `CachingMixer` (the maximum length
of each sequence), a `ContextMixer` (constants of the layer, values of earlier layers, visibility), or both.

Dims: B batch, T time, D model.
"""

import abc
import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
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


class Visibility(enum.Enum):
    """The tokens of its document that a token sees, besides itself."""

    CAUSAL = "causal"  # those before it
    PREFIX = "prefix"  # those before it, and all of a prefix of the document (Raffel et al. 2020)
    BOTH = "both"  # all of them, as in encoders


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateSize:
    """How many numbers the decoding state of one sequence has, by kind; ids and positions do not count."""

    cached: int = 0  # entries of each token, in the dtype of the computation or in the format of the cache
    history: int = 0  # entries of a fixed number of tokens, in the dtype of the computation
    recurrent: int = 0  # float32 in every precision: a state is a sum over all tokens before it

    def __add__(self, other: "StateSize") -> "StateSize":
        """Return the size of both states together."""
        return StateSize(
            cached=self.cached + other.cached,
            history=self.history + other.history,
            recurrent=self.recurrent + other.recurrent,
        )

    def bytes(self, itemsize: int) -> int:
        """Return the bytes of the state where the computation has numbers of `itemsize` bytes.

        >>> StateSize(cached=100, recurrent=10).bytes(2)
        240
        """
        return (self.cached + self.history) * itemsize + self.recurrent * np.dtype(np.float32).itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerContext:
    """What a `ContextMixer` receives besides its tokens and its state."""

    # of this layer (`MixerConfig.layer_constants`), and values of earlier layers (`MixerConfig.reads`)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    visibility: Visibility = Visibility.CAUSAL
    is_prefix: Any = None  # Bool[Array, "B T"] | None: tokens of the prefix, with `Visibility.PREFIX`
    written: dict[str, Any] = dataclasses.field(default_factory=dict)  # by this layer, for later ones

    def write(self, name: str, value: Any) -> None:
        """Pass a value on to later layers that read it: one of the names of `MixerConfig.writes`.

        Call this in the mixer itself, not in a function that it passes to a loop or to `jax.checkpoint`.
        """
        # A mixer on its own has no later layers.
        if self is not NO_CONTEXT:
            self.written[name] = value


NO_CONTEXT = MixerContext()  # a mixer on its own, which reads and writes nothing


class Mixer(nnx.Module):
    """A token mixer: `(x, segment_ids, positions, state) -> (y, state)`.

    A state of None means complete sequences, as in training. A token must not see others of another segment.
    In decoding, padding (segment id 0) follows the tokens of a row, and may be all of it: the new state is
    that after the last token of the document (`models.padding`).
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
    def cached_shape(self) -> tuple[int, ...] | None:
        """Return the shape of a token's cache entry; a per-token format has one scale along the last dim.

        None for a mixer without a cache of its own, which reads that of another.
        """


class ContextMixer(Mixer):
    """A mixer that is called with `context` in addition to the arguments of every mixer."""

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
        context: MixerContext = NO_CONTEXT,
    ) -> tuple[Float[Array, "B T D"], Any]: ...


class CompositeMixer(Mixer):
    """A mixer of several others, to which it passes what each takes (`optional_arguments`)."""

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
        max_lengths: Int[Array, " B"] | None = None,
        context: MixerContext = NO_CONTEXT,
    ) -> tuple[Float[Array, "B T D"], Any]: ...

    @abc.abstractmethod
    def inner(self) -> Iterator[tuple[str, Mixer]]:
        """Yield the mixers with their paths below this one, each of which ends in `/mixer`."""


def optional_arguments(
    mixer: Mixer, *, max_lengths: Int[Array, " B"] | None, context: MixerContext
) -> dict[str, Any]:
    """Return the arguments that only some kinds of mixer take, if this one does."""
    arguments: dict[str, Any] = {}
    if isinstance(mixer, CachingMixer | CompositeMixer):
        arguments["max_lengths"] = max_lengths
    if isinstance(mixer, ContextMixer | CompositeMixer):
        arguments["context"] = context
    return arguments


def caching_mixers(mixer: Mixer, path: str) -> Iterator[tuple[str, CachingMixer]]:
    """Yield a mixer, and those inside it, that have a cache, with their paths; `path` is that of `mixer`."""
    if isinstance(mixer, CachingMixer) and mixer.cached_shape() is not None:
        yield path, mixer
    if isinstance(mixer, CompositeMixer):
        for below, part in mixer.inner():
            yield from caching_mixers(part, f"{path}/{below}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(abc.ABC):
    """Settings of a token mixer."""

    @abc.abstractmethod
    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> Mixer:
        """Build the module, with freshly initialised parameters."""

    def parts(self) -> tuple["MixerConfig", ...]:
        """Return the mixers that this one consists of: none, unless it builds a `CompositeMixer`."""
        return ()

    def training_note(self, dims: ModelDims) -> str | None:
        """Return a warning about training with these settings; None if there is none."""
        return None

    # Products with weights are counted in `zoo.costs`, from the shapes of parameters.
    @abc.abstractmethod
    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return forward FLOPs per token without products with weights, averaged over a causal sequence."""

    @abc.abstractmethod
    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the size of the decoding state of one sequence of `length` tokens."""

    def layer_constants(
        self, dims: ModelDims, *, index: int, num_layers: int
    ) -> Mapping[str, np.ndarray | np.generic | float]:
        """Return what depends on the layer's place in the model and is not trained, by name.

        The module has it as `dims.constants` when it is built, and a `ContextMixer` as `context.constants` in
        every call. Layers of equal configs have arrays of equal shapes. They are part of no checkpoint.

        Args:
          index: index of the layer in the model, from 0.
          num_layers: number of layers of the model, without loops.
        """
        return {}

    def reads(self) -> tuple[str, ...]:
        """Return the names of the values of earlier layers that the mixer reads (`MixerContext.shared`)."""
        return ()

    def writes(self) -> tuple[str, ...]:
        """Return the names of the values that the mixer writes for later layers (`MixerContext.write`)."""
        return ()

    def source_problem(self, name: str, source: "MixerConfig", dims: ModelDims) -> str | None:
        """Return why this mixer cannot read what `source` writes under this name; None if it can."""
        return None

    def visibilities(self) -> frozenset[Visibility]:
        """Return the kinds of visibility that the mixer can compute."""
        return frozenset({Visibility.CAUSAL})


def innermost(mixer: MixerConfig) -> Iterator[MixerConfig]:
    """Yield the mixers that a mixer consists of, at any depth; itself if it has no parts."""
    parts = mixer.parts()
    if not parts:
        yield mixer
    for part in parts:
        yield from innermost(part)


class Ffn(nnx.Module):
    """A feed-forward layer: `(x, segment_ids) -> (y, aux)`."""

    # It mixes no tokens: segment ids only mark padding, with 0, for losses and metrics.
    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], FfnAux]: ...


class StatefulFfn(nnx.Module):
    """A feed-forward layer that also reads the tokens just before each: `(x, segment_ids, state)`.

    RWKV's channel mix is one. What a `Mixer` does about documents, padding and its state, it does too.
    """

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"], state: Any
    ) -> tuple[Float[Array, "B T D"], FfnAux, Any]: ...

    @abc.abstractmethod
    def init_state(self, batch_size: int) -> Any:
        """Return an empty decoding state."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FfnConfig(abc.ABC):
    """Settings of a feed-forward layer."""

    @abc.abstractmethod
    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> Ffn | StatefulFfn:
        """Build the module, with freshly initialised parameters."""

    def state_size(self, dims: ModelDims) -> StateSize:
        """Return the size of the decoding state of one sequence: none, but for a `StatefulFfn`."""
        return StateSize()

    def layer_constants(
        self, dims: ModelDims, *, index: int, num_layers: int
    ) -> Mapping[str, np.ndarray | np.generic | float]:
        """Return what initial parameters depend on, as `MixerConfig.layer_constants`: `dims.constants`."""
        return {}

    def shared_name(self) -> str | None:
        """Return the name of the module that all layers with this name use; None for one module per layer.

        The decoder builds it once, an `Ffn` that has no `layer_constants`.
        """
        return None

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
