"""Rotary position embeddings, and the scalings with which released models extend their context.

    rotary(queries, positions, base=500_000.0, scaling=Llama3Scaling(factor=32.0, original_context=8192))

Dims: B batch, T time, N heads, H head dim; R the rotated dims of a head, F frequencies (R = 2 F).
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slmjax import kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling(abc.ABC):
    """A change of the frequencies of a rotary embedding, for contexts longer than the original."""

    @property
    def magnitude(self) -> float:
        """Factor of the rotated dims."""
        return 1.0

    @abc.abstractmethod
    def scaled(
        self,
        frequencies: Float[Array, " F"],
        base: float,
        lengths: Int[Array, "B #T"] | None,
    ) -> Float[Array, "#B #T 1 F"]:
        """Return the scaled frequencies, in radians per position.

        Args:
          frequencies: the original frequencies, highest first.
          base: the original frequencies are powers of it.
          lengths: length of each token's sequence, from `sequence_lengths`; None if it is unknown.

        Raises:
          ValueError: the scaling depends on the length, which is unknown.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling):
    """All angles divided by one factor (position interpolation, Chen et al. 2023)."""

    factor: float  # how many times the original context

    def scaled(
        self,
        frequencies: Float[Array, " F"],
        base: float,
        lengths: Int[Array, "B #T"] | None,
    ) -> Float[Array, "1 1 1 F"]:
        """Return the frequencies divided by the factor."""
        # Dividing frequencies is dividing positions: all stay within the range of training.
        return frequencies[None, None, None, :] / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScaling):
    """Low frequencies divided by the factor, high ones unchanged, a linear transition between (Llama 3.1)."""

    factor: float  # how many times the original context
    original_context: int  # tokens the model was first trained with
    # wavelengths above original_context over this are multiplied by the factor
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0  # wavelengths below original_context over this do not change

    def __post_init__(self) -> None:
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"rope_scaling.high_frequency_factor={self.high_frequency_factor} must be above "
                f"low_frequency_factor={self.low_frequency_factor}"
            )

    def scaled(
        self,
        frequencies: Float[Array, " F"],
        base: float,
        lengths: Int[Array, "B #T"] | None,
    ) -> Float[Array, "1 1 1 F"]:
        """Interpolate between divided and original frequencies, by the turns within the original context."""
        # Dims with many turns encode nearby distances, which stay the same in a longer context.
        turns = self.original_context * frequencies / (2 * math.pi)
        weight = (turns - self.low_frequency_factor) / (
            self.high_frequency_factor - self.low_frequency_factor
        )
        scaled = _interpolate(frequencies / self.factor, frequencies, jnp.clip(weight, 0.0, 1.0))
        return scaled[None, None, None, :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling(RopeScaling):
    """YaRN (Peng et al. 2023): a transition from original to divided frequencies, linear in the dim.

    It also scales rotated queries and keys by the attention factor.
    """

    factor: float  # how many times the original context
    original_context: int  # tokens the model was first trained with
    fast_turns: float = 32.0  # dims with more turns than this within the original context do not change
    slow_turns: float = 1.0  # frequencies of dims with fewer turns than this are divided by the factor
    # `truncate` of Hugging Face configs, which GPT-OSS turns off.
    whole_dims: bool = True  # the transition begins and ends at whole dims
    # A temperature of the softmax: queries and keys both have it, so scores get its square.
    attention_factor: float = 1.0  # factor of rotated queries and keys; 0.1 ln(factor) + 1 in the paper

    @property
    def magnitude(self) -> float:
        """The attention factor."""
        return self.attention_factor

    def scaled(
        self,
        frequencies: Float[Array, " F"],
        base: float,
        lengths: Int[Array, "B #T"] | None,
    ) -> Float[Array, "1 1 1 F"]:
        """Interpolate between divided and original frequencies, by the index of the dim."""
        num_rotated = 2 * frequencies.shape[0]

        def dim_of(turns: float) -> float:
            """Return the dim whose wave makes this many turns within the original context."""
            # Solves turns * 2 pi * base ** (2 dim / R) = original_context, where dim counts pairs.
            wavelength = self.original_context / (turns * 2 * math.pi)
            return num_rotated * math.log(wavelength) / (2 * math.log(base))

        first = dim_of(self.fast_turns)
        last = dim_of(self.slow_turns)
        if self.whole_dims:
            first = math.floor(first)
            last = math.ceil(last)
        first = max(first, 0)
        # The published code has this bound, though pairs end at R / 2 - 1: it sets the slope of the
        # transition.
        last = min(last, num_rotated - 1)
        # 1e-3, as in the published code, is a step where the transition has no width.
        transition = (jnp.arange(frequencies.shape[0], dtype=jnp.float32) - first) / (last - first or 1e-3)
        weight = 1.0 - jnp.clip(transition, 0.0, 1.0)
        return _interpolate(frequencies / self.factor, frequencies, weight)[None, None, None, :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongScaling(RopeScaling):
    """LongRoPE (Ding et al. 2024): frequency divisors, one list for short sequences and one for long ones.

    The length of a token's own sequence selects the list. In decoding with a cache this is the maximum length
    of the sequence (prompt and new tokens together), because cached keys are rotated once and must not change
    when the text grows past `original_context`.
    """

    short_factors: tuple[float, ...]  # divisors in sequences of at most original_context tokens
    long_factors: tuple[float, ...]  # divisors in longer ones
    original_context: int  # tokens the model was first trained with
    attention_factor: float = 1.0  # factor of rotated queries and keys

    @property
    def magnitude(self) -> float:
        """The attention factor."""
        return self.attention_factor

    def check_pairs(self, num_pairs: int) -> None:
        """Raise ValueError unless there is a divisor for each rotated pair of dims."""
        for name, factors in (("short", self.short_factors), ("long", self.long_factors)):
            if len(factors) != num_pairs:
                raise ValueError(
                    f"rope_scaling.{name}_factors has {len(factors)} values, but {num_pairs} pairs of dims "
                    "are rotated: give one value for each pair"
                )

    def scaled(
        self,
        frequencies: Float[Array, " F"],
        base: float,
        lengths: Int[Array, "B #T"] | None,
    ) -> Float[Array, "#B #T 1 F"]:
        """Return the frequencies divided by the list for each token's sequence."""
        self.check_pairs(frequencies.shape[0])
        short, long = (
            (frequencies / jnp.asarray(factors, jnp.float32))[None, None, None, :]
            for factors in (self.short_factors, self.long_factors)
        )
        if lengths is None:
            raise ValueError(
                "LongScaling selects its divisors by the length of a sequence, which is unknown in decoding: "
                "call the model with max_lengths, the maximum tokens (prompt and new ones) of each sequence"
            )
        # A selection for each token: documents of both kinds may be in one row.
        return jnp.where((lengths > self.original_context)[:, :, None, None], long, short)


def _interpolate(start: Array, end: Array, weight: Array) -> Array:
    return start * (1.0 - weight) + end * weight


# The rotation -----------------------------------------------------------------------------------------------
def rotary(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    *,
    base: float,
    rotary_dim: int | None = None,
    scaling: RopeScaling | None = None,
    lengths: Int[Array, "B #T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Rotary position embedding (Su et al. 2021), half-split pairing as in Hugging Face models.

    The first R dims of a head are rotated, pair (i, i + R/2) by the angle `position * base ** (-2i / R)`, or
    by the frequency of `scaling`. Angles are float32: bfloat16 cannot even count positions above 256.

    Args:
      rotary_dim: R, the number of rotated dims of a head, even; None for all of them.
      lengths: length of each token's sequence, from `sequence_lengths`; LongRoPE needs it.
    """
    num_rotated = x.shape[-1] if rotary_dim is None else rotary_dim
    frequencies = base ** (-jnp.arange(0, num_rotated, 2, dtype=jnp.float32) / num_rotated)
    if scaling is None:
        frequencies = frequencies[None, None, None, :]
    else:
        frequencies = scaling.scaled(frequencies, base, lengths)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    # Multiplies cosines and sines, so that unrotated dims of a head are not scaled.
    magnitude = 1.0 if scaling is None else scaling.magnitude
    # Without this the CPU compiler computes cosines and sines again for every head.
    cos, sin = (kernels.materialised(wave(angles) * magnitude) for wave in (jnp.cos, jnp.sin))
    rotated, unrotated = jnp.split(x, [num_rotated], axis=-1)
    # Pairs of the paper are neighbours, (2i, 2i + 1). The two layouts differ by a permutation of the
    # projection's outputs, which conversion must apply to weights of the other kind.
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), unrotated], axis=-1)


# Lengths of sequences ---------------------------------------------------------------------------------------
def sequence_lengths(
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    max_lengths: Int[Array, " B"] | None,
    is_decoding: bool,
) -> Int[Array, "B #T"] | None:
    """Return the length in tokens of the sequence that each token belongs to; None if it is unknown.

    The shape of an array is never this length: packed rows hold several documents and padding, and caches are
    rounded up, or shorter than the sequence.

    Args:
      positions: index of each token within its document.
      segment_ids: document of each token.
      max_lengths: maximum tokens of the one sequence in each row, prompt and new tokens together; None for
        complete documents.
      is_decoding: the tokens continue those of a cache, so that the row does not show the full sequence.
    """
    if max_lengths is not None:
        return max_lengths[:, None]
    return None if is_decoding else document_lengths(positions, segment_ids)


def document_lengths(positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the length of each token's document: the position of its last token in the row, plus one."""
    last_column = jnp.ones_like(segment_ids[:, :1], bool)
    is_last = jnp.concatenate([segment_ids[:, 1:] != segment_ids[:, :-1], last_column], axis=1)
    columns = jnp.broadcast_to(jnp.arange(positions.shape[1])[None], positions.shape)
    # Documents are contiguous, so a token's document ends at the first end at or after the token.
    ends = jax.lax.cummin(jnp.where(is_last, columns, positions.shape[1]), axis=1, reverse=True)
    return jnp.take_along_axis(positions, ends, axis=1) + 1
