"""Rotary position embeddings: the rotation, and how released models stretch its angles to contexts longer
than they began with.

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
    """How the frequencies of a rotary embedding differ from the plain ones."""

    @property
    def magnitude(self) -> float:
        """What the rotated dims are multiplied by."""
        return 1.0

    @abc.abstractmethod
    def scaled(
        self,
        frequencies: Float[Array, " F"],
        base: float,
        lengths: Int[Array, "B #T"] | None,
    ) -> Float[Array, "#B #T 1 F"]:
        """The frequencies in use, in radians per position.

        Args:
          frequencies: the plain ones, highest first.
          base: what they are powers of.
          lengths: length of each token's sequence, from `sequence_lengths`; None where it is not known.

        Raises:
          ValueError: the scaling depends on the length and it is not known.
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
        """The plain frequencies over the factor."""
        return _for_all(frequencies / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScaling):
    """Long waves divided by the factor, short ones kept, a linear passage between them (Llama 3.1)."""

    factor: float  # how many times the original context
    original_context: int  # tokens the model was first trained with
    # waves longer than original_context over this are divided by the factor
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0  # waves shorter than original_context over this are kept

    def __post_init__(self) -> None:
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"rope_scaling.high_frequency_factor={self.high_frequency_factor} must be above its "
                "low_frequency_factor, "
                f"{self.low_frequency_factor}"
            )

    def scaled(
        self,
        frequencies: Float[Array, " F"],
        base: float,
        lengths: Int[Array, "B #T"] | None,
    ) -> Float[Array, "1 1 1 F"]:
        """Each frequency between its plain and its divided value, by the turns that its wave makes in the
        original context.
        """
        turns = self.original_context * frequencies / (2 * math.pi)
        kept = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        return _for_all(_between(frequencies / self.factor, frequencies, jnp.clip(kept, 0.0, 1.0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling(RopeScaling):
    """YaRN (Peng et al. 2023): a passage between divided and plain frequencies that is linear in the dim, and
    a magnitude.
    """

    factor: float  # how many times the original context
    original_context: int  # tokens the model was first trained with
    fast_turns: float = 32.0  # dims that turn more often than this within the original context are kept
    slow_turns: float = 1.0  # dims that turn less often than this are divided by the factor
    whole_dims: bool = True  # the passage begins and ends at whole dims
    attention_factor: float = 1.0  # multiplies rotated queries and keys; 0.1 ln(factor) + 1 in the paper

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
        """Each frequency between its plain and its divided value, by its place among the dims."""
        num_rotated = 2 * frequencies.shape[0]

        def dim_of(turns: float) -> float:
            return (
                num_rotated * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))
            )

        first = dim_of(self.fast_turns)
        last = dim_of(self.slow_turns)
        if self.whole_dims:
            first = math.floor(first)
            last = math.ceil(last)
        first = max(first, 0)
        last = min(last, num_rotated - 1)
        passage = (jnp.arange(frequencies.shape[0], dtype=jnp.float32) - first) / (last - first or 1e-3)
        return _for_all(_between(frequencies / self.factor, frequencies, 1.0 - jnp.clip(passage, 0.0, 1.0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongScaling(RopeScaling):
    """LongRoPE (Ding et al. 2024): divisors of the frequencies, one list for short sequences, another for
    long ones.

    The length of a token's own sequence selects the list. While a sequence is decoded with a cache, that is
    the length which it may reach (prompt and new tokens together): cached keys are rotated once, and must not
    change when the text grows past `original_context`.
    """

    short_factors: tuple[float, ...]  # divisors in sequences of at most original_context tokens
    long_factors: tuple[float, ...]  # divisors in longer ones
    original_context: int  # tokens the model was first trained with
    attention_factor: float = 1.0  # multiplies rotated queries and keys

    @property
    def magnitude(self) -> float:
        """The attention factor."""
        return self.attention_factor

    def check_pairs(self, num_pairs: int) -> None:
        """Raise ValueError unless there is a divisor for each pair of dims that is rotated."""
        for name, factors in (("short", self.short_factors), ("long", self.long_factors)):
            if len(factors) != num_pairs:
                raise ValueError(
                    f"rope_scaling.{name}_factors has {len(factors)} numbers: {num_pairs} dim pairs are "
                    "rotated"
                )

    def scaled(
        self,
        frequencies: Float[Array, " F"],
        base: float,
        lengths: Int[Array, "B #T"] | None,
    ) -> Float[Array, "#B #T 1 F"]:
        """Return the plain frequencies over the divisors of each token's sequence."""
        self.check_pairs(frequencies.shape[0])
        short, long = (
            _for_all(frequencies / jnp.asarray(factors, jnp.float32))
            for factors in (self.short_factors, self.long_factors)
        )
        if lengths is None:
            raise ValueError(
                "LongScaling selects its divisors by the length of a sequence, which is not known while it "
                "is "
                "decoded: call the model with max_lengths, the tokens (prompt and new ones) that each row "
                "may reach"
            )
        return jnp.where((lengths > self.original_context)[:, :, None, None], long, short)


def _for_all(frequencies: Float[Array, " F"]) -> Float[Array, "1 1 1 F"]:
    return frequencies[None, None, None, :]


def _between(start: Array, end: Array, share: Array) -> Array:
    return start * (1.0 - share) + end * share


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
    by the frequency that `scaling` makes of it. Angles are float32.

    Args:
      rotary_dim: dims of a head that are rotated, R, an even number; None for all of them.
      lengths: length of each token's sequence, from `sequence_lengths`; LongRoPE needs it.
    """
    num_rotated = x.shape[-1] if rotary_dim is None else rotary_dim
    frequencies = base ** (-jnp.arange(0, num_rotated, 2, dtype=jnp.float32) / num_rotated)
    frequencies = _for_all(frequencies) if scaling is None else scaling.scaled(frequencies, base, lengths)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    magnitude = 1.0 if scaling is None else scaling.magnitude
    cos, sin = (kernels.materialised(wave(angles) * magnitude) for wave in (jnp.cos, jnp.sin))
    rotated, kept = jnp.split(x, [num_rotated], axis=-1)
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), kept], axis=-1)


# Lengths of sequences ---------------------------------------------------------------------------------------
def sequence_lengths(
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    max_lengths: Int[Array, " B"] | None,
    is_decoding: bool,
) -> Int[Array, "B #T"] | None:
    """Return the length in tokens of the sequence that each token belongs to; None where nothing tells it.

    The shape of an array is never that length: rows hold several documents and padding, and caches are
    rounded up or shorter than the sequence.

    Args:
      positions: index of each token within its document.
      segment_ids: document of each token.
      max_lengths: tokens that the one sequence of each row may reach, prompt and new tokens together; None
        for whole documents.
      is_decoding: the tokens continue those of a cache, so that the documents in the row are not whole.
    """
    if max_lengths is not None:
        return max_lengths[:, None]
    return None if is_decoding else document_lengths(positions, segment_ids)


def document_lengths(positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the length of each token's document within its row: the position of its last token there, plus
    one.
    """
    last_column = jnp.ones_like(segment_ids[:, :1], bool)
    is_last = jnp.concatenate([segment_ids[:, 1:] != segment_ids[:, :-1], last_column], axis=1)
    columns = jnp.broadcast_to(jnp.arange(positions.shape[1])[None], positions.shape)
    ends = jax.lax.cummin(jnp.where(is_last, columns, positions.shape[1]), axis=1, reverse=True)
    return jnp.take_along_axis(positions, ends, axis=1) + 1
