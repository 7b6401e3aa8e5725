"""Several mixers side by side in one block: they read the same tokens, and their outputs are combined.

    mixers = (AttentionConfig(num_heads=8), Mamba2Config())
    ParallelMixerConfig(mixers=mixers, output_multipliers=(0.9, 0.5))      # as Falcon-H1
    ParallelMixerConfig(mixers=mixers, combine=Combine.MEAN_OF_NORMS)      # in the manner of Hymba

With input multipliers a, output multipliers b and M mixers f, the block adds to the residual stream

    SUM              sum_i b_i f_i(a_i x)
    MEAN_OF_NORMS    1/M sum_i b_i norm_i(f_i(a_i x))

Any mixers go together, and what quantizes, shards or counts them finds each as `mixer/parts/0/mixer/...`.

Dims: B batch, T time, D model.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax.models.layers import ModelDims, Norm
from slmjax.models.protocols import (
    NO_CONTEXT,
    CompositeMixer,
    Mixer,
    MixerConfig,
    MixerContext,
    StateSize,
    Visibility,
    optional_arguments,
)


class Combine(enum.Enum):
    """How the outputs of parallel mixers are combined."""

    SUM = "sum"  # their sum, as in Falcon-H1
    # Outputs of different sizes then count alike: in Hymba those of the state-space layer are larger.
    MEAN_OF_NORMS = "mean_of_norms"  # the mean of their norms, each with scales of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelMixerConfig(MixerConfig):
    """Several mixers side by side."""

    mixers: tuple[MixerConfig, ...]  # the mixers, at least two
    combine: Combine = Combine.SUM  # how their outputs are combined
    input_multipliers: tuple[float, ...] | None = None  # of each mixer's input (none: 1)
    output_multipliers: tuple[float, ...] | None = None  # of each mixer's output, after its norm (none: 1)

    def __post_init__(self) -> None:
        if len(self.mixers) < 2:
            raise ValueError(f"mixers must be at least two, got {len(self.mixers)}: set the mixer itself")
        for name in ("input_multipliers", "output_multipliers"):
            multipliers = getattr(self, name)
            if multipliers is not None and len(multipliers) != len(self.mixers):
                raise ValueError(
                    f"{name} has {len(multipliers)} entries for {len(self.mixers)} mixers: give one for "
                    "each, or none"
                )
        writers = self.writes()
        if repeated := sorted({name for name in writers if writers.count(name) > 1}):
            raise ValueError(
                f"several of the mixers write {repeated[0]!r}: one of them must have another name"
            )

    def parts(self) -> tuple[MixerConfig, ...]:
        """Return the mixers."""
        return self.mixers

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "ParallelMixer":
        """Build the module, with freshly initialised parameters."""
        return ParallelMixer(self, dims, rngs=rngs)

    def training_note(self, dims: ModelDims) -> str | None:
        """Return the first warning of the mixers."""
        return next(filter(None, (mixer.training_note(dims) for mixer in self.mixers)), None)

    def layer_constants(
        self, dims: ModelDims, *, index: int, num_layers: int
    ) -> Mapping[str, np.ndarray | np.generic | float]:
        """Return the constants of all mixers, each under `INDEX/NAME`."""
        return {
            f"{part}/{name}": value
            for part, mixer in enumerate(self.mixers)
            for name, value in mixer.layer_constants(dims, index=index, num_layers=num_layers).items()
        }

    def reads(self) -> tuple[str, ...]:
        """Return what any of the mixers reads."""
        return tuple(dict.fromkeys(name for mixer in self.mixers for name in mixer.reads()))

    def writes(self) -> tuple[str, ...]:
        """Return what the mixers write."""
        return tuple(name for mixer in self.mixers for name in mixer.writes())

    def visibilities(self) -> frozenset[Visibility]:
        """Return the kinds that all of the mixers can compute."""
        return frozenset.intersection(*(mixer.visibilities() for mixer in self.mixers))

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return the sum over the mixers."""
        return sum(mixer.mixing_flops(dims, length=length) for mixer in self.mixers)

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the sum over the mixers."""
        return sum((mixer.state_size(dims, length=length) for mixer in self.mixers), StateSize())


def _constants_of(part: int, constants: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{part}/"
    return {name.removeprefix(prefix): value for name, value in constants.items() if name.startswith(prefix)}


class Part(nnx.Module):
    """One of the mixers, with the norm of its output."""

    def __init__(self, config: MixerConfig, dims: ModelDims, *, norm: Norm | None, rngs: nnx.Rngs) -> None:
        self.mixer = config.build(dims, rngs=rngs)
        self.norm = norm


class ParallelMixer(CompositeMixer):
    """Several mixers side by side; the decoding state is the tuple of theirs."""

    def __init__(self, config: ParallelMixerConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.config = config
        is_normed = config.combine is Combine.MEAN_OF_NORMS
        self.parts = nnx.List(
            [
                Part(
                    mixer,
                    dataclasses.replace(dims, constants=_constants_of(part, dims.constants)),
                    norm=dims.norm(dims.embed_dim) if is_normed else None,
                    rngs=rngs,
                )
                for part, mixer in enumerate(config.mixers)
            ]
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
        max_lengths: Int[Array, " B"] | None = None,
        context: MixerContext = NO_CONTEXT,
    ) -> tuple[Float[Array, "B T D"], Any]:
        outputs = []
        states = []
        for index, part in enumerate(self.parts):
            # What the part writes goes into the same dict, for later layers.
            own = dataclasses.replace(context, constants=_constants_of(index, context.constants))
            y, new_state = part.mixer(
                _times(x, self.config.input_multipliers, index),
                segment_ids=segment_ids,
                positions=positions,
                state=None if state is None else state[index],
                **optional_arguments(part.mixer, max_lengths=max_lengths, context=own),
            )
            y = y if part.norm is None else part.norm(y)
            outputs.append(_times(y, self.config.output_multipliers, index))
            states.append(new_state)
        total = sum(outputs[1:], start=outputs[0])
        if self.config.combine is Combine.MEAN_OF_NORMS:
            total = total / len(outputs)
        return total, None if state is None else tuple(states)

    def init_state(self, batch_size: int, *, max_length: int) -> tuple[Any, ...]:
        """Return the empty state of each mixer."""
        return tuple(part.mixer.init_state(batch_size, max_length=max_length) for part in self.parts)

    def inner(self) -> Iterator[tuple[str, Mixer]]:
        """Yield the mixers with their paths below this one."""
        for index, part in enumerate(self.parts):
            yield f"parts/{index}/mixer", part.mixer


def _times(
    x: Float[Array, "B T D"], multipliers: tuple[float, ...] | None, index: int
) -> Float[Array, "B T D"]:
    return x if multipliers is None else x * multipliers[index]


def with_parts_changed(
    config: ParallelMixerConfig, change: Callable[[MixerConfig], MixerConfig]
) -> ParallelMixerConfig:
    """Return the config with `change` applied to each of its mixers.

    >>> from slmjax.models.mixers.attention import AttentionConfig
    >>> full = AttentionConfig(num_heads=2)
    >>> both = ParallelMixerConfig(mixers=(full, dataclasses.replace(full, window=4)))
    >>> wider = with_parts_changed(both, lambda mixer: dataclasses.replace(mixer, num_heads=4))
    >>> [mixer.num_heads for mixer in wider.mixers]
    [4, 4]
    """
    return dataclasses.replace(config, mixers=tuple(change(mixer) for mixer in config.mixers))
