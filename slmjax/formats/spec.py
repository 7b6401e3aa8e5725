"""What a number format is: `QuantSpec`, a handful of choices from which `coding` computes codes and scales.

A number x is stored as a small integer, its code. What a code stands for is the grid's; numbers that share a
scale form a group along one axis of the array. Codes are computed from x and the group's scale, either as x *
(1 / scale) or as x / scale: which of them, how the result is rounded, and what the scale is computed from,
differ between engines in ways that change one code in a hundred.
"""

import dataclasses
import enum
import math

import numpy as np

from slmjax.config import renamed_field, renamed_values


class CodeGrid(enum.Enum):
    """What the codes are, before they are multiplied with the scale."""

    INTEGER = "integer"  # integers without gaps
    # odd integers, so that no level is wasted on zero: one bit is -1, 1; two bits are -3, -1, 1, 3
    ODD = "odd"
    # 4-bit floats: 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign; the code is the bit pattern, 0 to 15
    E2M1 = "e2m1"
    E4M3 = "e4m3"  # 8-bit floats up to 448; the code is the bit pattern as an int8
    E5M2 = "e5m2"  # 8-bit floats up to 57344


class Statistic(enum.Enum):
    """What of a group its scale is computed from."""

    # the number of largest magnitude, the first of such, with its sign turned: it has the lowest code
    SIGNED_MAX = "signed_max"
    # the same of the smallest or the largest number; of two as far from zero, the smallest
    FAR_END = "far_end"
    ABSMAX = "absmax"  # the largest magnitude
    ABSMEAN = "absmean"  # the mean magnitude
    MIN_MAX = "min_max"  # from the smallest number, or 0, to the largest, or 0: codes have a zero point


@renamed_values(group="per_group", row="per_channel", tensor="per_tensor")
class Granularity(enum.Enum):
    """Which numbers share a scale."""

    PER_GROUP = "per_group"  # `group_size` neighbours along the axis
    PER_CHANNEL = "per_channel"  # all along the axis: an output channel of a weight, a token of an activation
    PER_TENSOR = "per_tensor"  # all


class ScaleType(enum.Enum):
    """How scales are stored."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    BFLOAT16_IN_FLOAT16 = "bfloat16_in_float16"  # rounded to bfloat16, then kept as float16
    # powers of two: that of the statistic, rounded down, over that of the grid's largest number
    E8M0 = "e8m0"
    E4M3 = "e4m3"  # 8-bit floats, under a second scale for the whole tensor


class Rounding(enum.Enum):
    """To which code a number goes that lies between two."""

    HALF_EVEN = "half_even"  # half to the even code
    HALF_AWAY = "half_away"  # half away from zero
    HALF_UP = "half_up"  # the code below x / scale + 0.5, the sum taken in float32 from the lowest code on
    HALF_DOWN = "half_down"  # half towards zero


class Scaling(enum.Enum):
    """How x is brought to the scale of the codes. In float32 the two differ in the last bit."""

    RECIPROCAL = "reciprocal"  # x * (1 / scale)
    DIVISION = "division"  # x / scale


class CodesFrom(enum.Enum):
    """Which scale the codes are computed on, where the format computes it."""

    STORED = "stored"  # the one that is stored: each number goes to the nearest level
    EXACT = "exact"  # the one before it is rounded for storage, as GGUF has it


class Codes(enum.Enum):
    """Which integers an INTEGER grid has."""

    FULL = "full"  # two's complement: -8 to 7 in four bits
    SYMMETRIC = "symmetric"  # without the lowest: -7 to 7


FLOAT_GRIDS = (CodeGrid.E2M1, CodeGrid.E4M3, CodeGrid.E5M2)
LARGEST = {CodeGrid.E2M1: 6.0, CodeGrid.E4M3: 448.0, CodeGrid.E5M2: 57344.0}
BITS = (1, 1.58, 2, 3, 4, 5, 6, 7, 8)
TERNARY_BITS = 1.58
_SCALE_BITS = {
    ScaleType.FLOAT32: 32,
    ScaleType.FLOAT16: 16,
    ScaleType.BFLOAT16: 16,
    ScaleType.BFLOAT16_IN_FLOAT16: 16,
    ScaleType.E8M0: 8,
    ScaleType.E4M3: 8,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """One number format. `presets` names those that engines use."""

    # bits of a code; 1.58 is three levels, which take 2 bits where they are stored
    bits: float
    # what the codes are
    grid: CodeGrid = CodeGrid.INTEGER
    # which integers, in an INTEGER grid
    codes: Codes = Codes.FULL
    # which numbers share a scale
    granularity: Granularity = renamed_field(Granularity.PER_GROUP, was="share")
    # numbers of a group; None unless `granularity` is PER_GROUP
    group_size: int | None = None
    # what the scale is computed from
    statistic: Statistic = Statistic.ABSMAX
    # the scale is the statistic over this
    divisor: float = 1.0
    # how the scale is stored
    scale_type: ScaleType = ScaleType.FLOAT32
    # a computed scale is at least this
    smallest_scale: float = 0.0
    # the scale of a group that would have 0
    scale_of_zeros: float = 0.0
    # a block scale of a two-level format is at least this, over the scale of the tensor
    smallest_block_scale: float = 0.0
    # whether a computed scale makes the codes before or after it is rounded
    codes_from: CodesFrom = CodesFrom.STORED
    # how x is divided by the scale
    scaling: Scaling = Scaling.DIVISION
    # where halves go
    rounding: Rounding = Rounding.HALF_EVEN

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}: give one of {', '.join(map(str, BITS))}")
        if (self.granularity is Granularity.PER_GROUP) != (self.group_size is not None):
            raise ValueError(
                f"group_size is {self.group_size} with granularity {self.granularity.value!r}: give a size "
                "for groups, "
                "and for nothing else"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}: give at least 1")
        if not (self.divisor > 0 and math.isfinite(self.divisor)):
            raise ValueError(f"divisor is {self.divisor}: give a positive number")
        if self.grid is CodeGrid.INTEGER and self.bits == 1:
            raise ValueError("one bit is -1 and 1: give grid ODD")
        if self.grid is CodeGrid.ODD and self.bits not in (1, 2, 3, 4):
            raise ValueError(f"bits is {self.bits} with grid ODD: give 1, 2, 3 or 4")
        if self.grid in FLOAT_GRIDS and self.bits != (4 if self.grid is CodeGrid.E2M1 else 8):
            raise ValueError(
                f"bits is {self.bits} with grid {self.grid.value!r}: e2m1 has 4 bits, e4m3 and e5m2 have 8"
            )
        if self.is_two_level and (
            self.grid not in FLOAT_GRIDS or self.granularity is not Granularity.PER_GROUP
        ):
            raise ValueError(
                "scales in e4m3 are under one for the tensor: give a float grid in groups, or another "
                "scale_type"
            )
        if self.statistic is Statistic.MIN_MAX and (
            self.grid is not CodeGrid.INTEGER or self.codes is Codes.SYMMETRIC
        ):
            raise ValueError(
                "a zero point is for an INTEGER grid with its FULL codes: give statistic ABSMAX, or such a "
                "grid"
            )

    @property
    def is_asymmetric(self) -> bool:
        """Whether codes have a zero point."""
        return self.statistic is Statistic.MIN_MAX

    @property
    def has_signed_scale(self) -> bool:
        """Return whether a scale may be negative, so that the grid of a group is mirrored: the largest number
        then has the lowest code.
        """
        is_signed = self.statistic in (Statistic.SIGNED_MAX, Statistic.FAR_END)
        return is_signed and self.scale_type is not ScaleType.E8M0  # which stores no sign

    @property
    def is_two_level(self) -> bool:
        """Whether the scales are under one for the whole tensor."""
        return self.scale_type is ScaleType.E4M3

    @property
    def lowest_code(self) -> int:
        """Of an INTEGER or ODD grid."""
        if self.grid is CodeGrid.ODD:
            return 1 - 2 ** int(self.bits)
        if self.grid is not CodeGrid.INTEGER:
            raise ValueError(f"the codes of {self.grid.value} are bit patterns: they have no lowest one")
        if self.bits == TERNARY_BITS:
            return -1
        return -(2 ** (int(self.bits) - 1)) + (1 if self.codes is Codes.SYMMETRIC else 0)

    @property
    def highest_code(self) -> int:
        """Of an INTEGER or ODD grid."""
        if self.grid is CodeGrid.ODD:
            return 2 ** int(self.bits) - 1
        if self.grid is not CodeGrid.INTEGER:
            raise ValueError(f"the codes of {self.grid.value} are bit patterns: they have no highest one")
        return 1 if self.bits == TERNARY_BITS else 2 ** (int(self.bits) - 1) - 1

    def groups(self, width: int) -> int:
        """Number of groups along an axis of `width` numbers."""
        return 1 if self.group_size is None else width // self.group_size


def check_width(spec: QuantSpec, width: int, *, what: str, name: str | None = None) -> None:
    """Raises ValueError if an axis of `width` numbers has no whole number of groups.

    Args:
      spec: the format.
      width: numbers along the axis that groups run along.
      what: names the array in the message: "blocks.mlp.up.kernel".
      name: names the format in the message.
    """
    if spec.group_size is not None and (width < 1 or width % spec.group_size):
        divisors = [size for size in (256, 128, 64, 32, 16) if width % size == 0 and width > 0]
        way_out = (
            f"a format in groups of {divisors[0]} or one scale per row"
            if divisors
            else "a format with one scale per row"
        )
        raise ValueError(
            f"{what} is {width} wide, which {name or 'a format'} cannot hold: its groups are of "
            f"{spec.group_size} numbers,"
            f" and {width} is no multiple of that. Give {way_out}, or a width that is a multiple of "
            f"{spec.group_size}"
        )


def levels(spec: QuantSpec) -> np.ndarray:
    """The numbers that a group whose scale is 1 (and whose zero point is 0) can hold, ascending, float32."""
    if spec.grid is CodeGrid.INTEGER:
        return np.arange(spec.lowest_code, spec.highest_code + 1, dtype=np.float32)
    if spec.grid is CodeGrid.ODD:
        return np.arange(spec.lowest_code, spec.highest_code + 1, 2, dtype=np.float32)
    exponent_bits, mantissa_bits = {CodeGrid.E2M1: (2, 1), CodeGrid.E4M3: (4, 3), CodeGrid.E5M2: (5, 2)}[
        spec.grid
    ]
    smallest = 2.0 ** (2 - 2 ** (exponent_bits - 1))
    fractions = np.arange(2**mantissa_bits) / 2**mantissa_bits
    normal = [(1 + fractions) * smallest * 2.0**e for e in range(2**exponent_bits)]
    positive = np.concatenate([fractions * smallest, *normal])
    positive = positive[positive <= LARGEST[spec.grid]]
    return np.concatenate([-positive[:0:-1], positive]).astype(np.float32)


def bits_per_number(spec: QuantSpec, width: int) -> float:
    """Bits that a number takes as stored, along an axis of `width` numbers: its code, and its share of the
    scale and zero point.

    What the whole tensor shares is not counted. Raises ValueError for a width that has no whole number of
    groups.
    """
    check_width(spec, width, what="an axis")
    shared = (
        0
        if spec.granularity is Granularity.PER_TENSOR
        else _SCALE_BITS[spec.scale_type] + (math.ceil(spec.bits) if spec.is_asymmetric else 0)
    )
    return math.ceil(spec.bits) + shared * spec.groups(width) / width


def stored_bytes(spec: QuantSpec, shape: tuple[int, ...], *, axis: int = -1) -> int:
    """Bytes of an array of `shape` as stored, codes packed without gaps, scales and zero points included.

    Raises ValueError for a width that has no whole number of groups.
    """
    numbers = math.prod(shape)
    if numbers == 0:
        return 0
    of_tensor = (
        32 + (8 if spec.is_asymmetric else 0)
        if spec.granularity is Granularity.PER_TENSOR
        else 32
        if spec.is_two_level
        else 0
    )
    return math.ceil((bits_per_number(spec, shape[axis]) * numbers + of_tensor) / 8)
