"""Definition of a number format: `QuantSpec`, the choices from which coding.py computes codes and scales.

A value x is stored as a small integer, its code, which represents a level of the grid. Values that share a
scale form a group along one axis of the array. Codes are computed from x and the group's scale, either as x *
(1 / scale) or as x / scale. Engines differ in which of the two they use, in how they round the result, and in
how they compute the scale; the difference changes about one code in a hundred.
"""

import dataclasses
import enum
import math

import numpy as np

from slmjax.config import renamed_field, renamed_values


class CodeGrid(enum.Enum):
    """Levels that codes represent, before the multiplication with the scale."""

    # Consecutive integers.
    INTEGER = "integer"
    # Odd integers, so that no level is spent on zero: one bit is -1, 1; two bits are -3, -1, 1, 3.
    ODD = "odd"
    # 4-bit floats: 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign; the code is the bit pattern, 0 to 15.
    E2M1 = "e2m1"
    # 8-bit floats up to 448; the code is the bit pattern as an int8.
    E4M3 = "e4m3"
    # 8-bit floats up to 57344.
    E5M2 = "e5m2"


class Statistic(enum.Enum):
    """Statistic of a group that its scale is computed from."""

    # The first value of largest magnitude, negated: this value gets the lowest code.
    SIGNED_MAX = "signed_max"
    # The minimum or the maximum, whichever is farther from zero (of equal ones the minimum), negated.
    FAR_END = "far_end"
    # The largest magnitude.
    ABSMAX = "absmax"
    # The mean magnitude.
    ABSMEAN = "absmean"
    # The range from the minimum, or 0, to the maximum, or 0: codes have a zero point.
    MIN_MAX = "min_max"


@renamed_values(group="per_group", row="per_channel", tensor="per_tensor")
class Granularity(enum.Enum):
    """Elements that share a scale."""

    # `group_size` neighbours along the axis.
    PER_GROUP = "per_group"
    # All along the axis: an output channel of a weight, a token of an activation.
    PER_CHANNEL = "per_channel"
    # All elements of the tensor.
    PER_TENSOR = "per_tensor"


class ScaleType(enum.Enum):
    """Type that scales are stored in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    # Rounded to bfloat16, then stored as float16.
    BFLOAT16_IN_FLOAT16 = "bfloat16_in_float16"
    # Powers of two: that of the statistic, rounded down, over that of the grid's largest level.
    E8M0 = "e8m0"
    # 8-bit floats, relative to a second scale for the tensor.
    E4M3 = "e4m3"


class Rounding(enum.Enum):
    """Rounding to the nearest level: the direction of ties."""

    # Ties to the even code.
    HALF_EVEN = "half_even"
    # Ties away from zero.
    HALF_AWAY = "half_away"
    # Ties up: the floor of x / scale + 0.5, a float32 sum that starts from the lowest code.
    HALF_UP = "half_up"
    # Ties towards zero.
    HALF_DOWN = "half_down"


class Scaling(enum.Enum):
    """Operation that divides x by the scale. In float32 the two differ in the last bit."""

    RECIPROCAL = "reciprocal"  # x * (1 / scale)
    DIVISION = "division"  # x / scale


class CodesFrom(enum.Enum):
    """Scale that codes are computed with, where the format computes the scale."""

    STORED = "stored"  # the rounded scale that is stored: each value goes to the nearest level
    EXACT = "exact"  # the scale before it is rounded for storage, as in GGUF


class Codes(enum.Enum):
    """Range of the integers of an INTEGER grid."""

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
    """A number format. `presets` names the formats of inference engines."""

    bits: float  # bits of a code; 1.58 is three levels, stored in 2 bits
    grid: CodeGrid = CodeGrid.INTEGER  # levels that codes represent
    codes: Codes = Codes.FULL  # range of integers in an INTEGER grid
    # elements that share a scale
    granularity: Granularity = renamed_field(Granularity.PER_GROUP, was="share")
    group_size: int | None = None  # elements of a group; None unless `granularity` is PER_GROUP
    statistic: Statistic = Statistic.ABSMAX  # statistic that the scale is computed from
    divisor: float = 1.0  # the scale is the statistic divided by this
    scale_type: ScaleType = ScaleType.FLOAT32  # type that the scale is stored in
    smallest_scale: float = 0.0  # lower bound of a computed scale
    scale_of_zeros: float = 0.0  # scale of a group whose scale would be 0
    smallest_block_scale: float = 0.0  # lower bound of a block scale, relative to the tensor's scale
    codes_from: CodesFrom = CodesFrom.STORED  # compute codes with the scale before or after it is rounded
    scaling: Scaling = Scaling.DIVISION  # operation that divides x by the scale
    rounding: Rounding = Rounding.HALF_EVEN  # direction of ties

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}: give one of {', '.join(map(str, BITS))}")
        if (self.granularity is Granularity.PER_GROUP) != (self.group_size is not None):
            raise ValueError(
                f"group_size is {self.group_size} with granularity {self.granularity.value!r}: give a size "
                "for per_group, and None for the others"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}: give at least 1")
        if not (self.divisor > 0 and math.isfinite(self.divisor)):
            raise ValueError(f"divisor is {self.divisor}: give a positive number")
        if self.grid is CodeGrid.INTEGER and self.bits == 1:
            raise ValueError("bits is 1 with grid INTEGER: give grid ODD, whose codes are -1 and 1")
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
                "scale_type e4m3 needs a second scale for the tensor: give a float grid in groups, or "
                "another scale_type"
            )
        if self.statistic is Statistic.MIN_MAX and (
            self.grid is not CodeGrid.INTEGER or self.codes is Codes.SYMMETRIC
        ):
            raise ValueError(
                "statistic MIN_MAX has a zero point, which needs an INTEGER grid with FULL codes: change the "
                "grid or the statistic"
            )

    @property
    def is_asymmetric(self) -> bool:
        """Return whether codes have a zero point."""
        return self.statistic is Statistic.MIN_MAX

    @property
    def has_signed_scale(self) -> bool:
        """Return whether a scale may be negative.

        That mirrors the grid of a group, so that the value of largest magnitude always gets the lowest code.
        """
        # E8M0 stores no sign.
        is_signed = self.statistic in (Statistic.SIGNED_MAX, Statistic.FAR_END)
        return is_signed and self.scale_type is not ScaleType.E8M0

    @property
    def is_two_level(self) -> bool:
        """Return whether the scales are relative to a second scale for the tensor."""
        return self.scale_type is ScaleType.E4M3

    @property
    def lowest_code(self) -> int:
        """Return the lowest code of an INTEGER or ODD grid."""
        if self.grid is CodeGrid.ODD:
            return 1 - 2 ** int(self.bits)
        if self.grid is not CodeGrid.INTEGER:
            raise ValueError(f"the codes of {self.grid.value} are bit patterns and have no lowest code")
        if self.bits == TERNARY_BITS:
            return -1
        return -(2 ** (int(self.bits) - 1)) + (1 if self.codes is Codes.SYMMETRIC else 0)

    @property
    def highest_code(self) -> int:
        """Return the highest code of an INTEGER or ODD grid."""
        if self.grid is CodeGrid.ODD:
            return 2 ** int(self.bits) - 1
        if self.grid is not CodeGrid.INTEGER:
            raise ValueError(f"the codes of {self.grid.value} are bit patterns and have no highest code")
        return 1 if self.bits == TERNARY_BITS else 2 ** (int(self.bits) - 1) - 1

    def groups(self, width: int) -> int:
        """Return the number of groups along an axis of `width` elements."""
        return 1 if self.group_size is None else width // self.group_size


def check_width(spec: QuantSpec, width: int, *, what: str, name: str | None = None) -> None:
    """Raise ValueError if the width is not a multiple of the group size.

    Args:
      spec: the format.
      width: elements along the axis that groups run along.
      what: name of the array for the message, such as "blocks.mlp.up.kernel".
      name: name of the format for the message.
    """
    if spec.group_size is None or (width > 0 and width % spec.group_size == 0):
        return
    divisors = [size for size in (256, 128, 64, 32, 16) if width % size == 0 and width > 0]
    groups = f"a format in groups of {divisors[0]} or" if divisors else "a format with"
    raise ValueError(
        f"{what} is {width} wide, which {name or 'a format'} cannot hold: {width} is not a multiple of its "
        f"group size {spec.group_size}. Give {groups} one scale per row, or a width that is a multiple of "
        f"{spec.group_size}"
    )


def levels(spec: QuantSpec) -> np.ndarray:
    """Return the values that a group with scale 1 and zero point 0 can hold, ascending, float32."""
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


def bits_per_element(spec: QuantSpec, width: int) -> float:
    """Return the stored bits per element of an axis of `width` elements.

    These are the bits of its code and its fraction of the group's scale and zero point; scales for the whole
    tensor are not counted.

    Raises:
      ValueError: the width is not a multiple of the group size.
    """
    check_width(spec, width, what="an axis")
    shared = (
        0
        if spec.granularity is Granularity.PER_TENSOR
        else _SCALE_BITS[spec.scale_type] + (math.ceil(spec.bits) if spec.is_asymmetric else 0)
    )
    return math.ceil(spec.bits) + shared * spec.groups(width) / width


def stored_bytes(spec: QuantSpec, shape: tuple[int, ...], *, axis: int = -1) -> int:
    """Return the stored bytes of an array: codes packed without gaps, scales and zero points included.

    Raises:
      ValueError: the width is not a multiple of the group size.
    """
    size = math.prod(shape)
    if size == 0:
        return 0
    tensor_bits = 32 if spec.is_two_level else 0
    if spec.granularity is Granularity.PER_TENSOR:
        tensor_bits = 32 + (8 if spec.is_asymmetric else 0)
    return math.ceil((bits_per_element(spec, shape[axis]) * size + tensor_bits) / 8)
