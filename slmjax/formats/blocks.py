"""The bytes of GGUF's blocks: codes and scales put into a container as they are, nothing quantized again.

    container = container_for(spec)           # "Q4_0"
    raw = pack(encoded, container)            # uint8 [..., bytes of a row]; encoded has its groups along the
    last axis unpack(raw, container)                    # codes and scales again, a scale for each block

A container holds more formats than the quantizer it is named for makes: Q4_0 holds all integers from -8 to 7
under float16 scales, whatever rule chose them, and a group of several blocks repeats its scale. Layouts are
those of ggml's block structures. NumPy, on the host. A float32 scale that is no float16 is refused.
"""

import dataclasses

import numpy as np
from jaxtyping import UInt8

from slmjax.formats.coding import Encoded
from slmjax.formats.presets import name_of
from slmjax.formats.spec import CodeGrid, Granularity, QuantSpec, ScaleType


@dataclasses.dataclass(frozen=True, kw_only=True)
class Container:
    """A type of GGUF tensor."""

    # numbers of a block
    size: int
    # bytes of a block
    num_bytes: int
    # the codes it holds, both ends included; bit patterns of MXFP4
    lowest: int
    highest: int


CONTAINERS = {
    "Q4_0": Container(size=32, num_bytes=18, lowest=-8, highest=7),
    "Q8_0": Container(size=32, num_bytes=34, lowest=-128, highest=127),
    "TQ2_0": Container(size=256, num_bytes=66, lowest=-1, highest=1),
    "MXFP4": Container(size=32, num_bytes=17, lowest=0, highest=15),
}
_INTEGER_CONTAINERS = ("TQ2_0", "Q4_0", "Q8_0")  # the smallest first
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)[:, None]


def container_for(spec: QuantSpec, *, width: int | None = None) -> str:
    """The smallest container that holds every array of this format exactly.

    Args:
      spec: the format.
      width: numbers of a row, for a format whose groups have no size of their own: a row of a multiple of 256
        fits TQ2_0.

    Raises ValueError that says why there is none. Scales that are no float16 are refused by `pack`.
    """
    name = name_of(spec)
    if spec.is_asymmetric:
        raise ValueError(
            f"{name} has zero points, which GGUF's {', '.join(CONTAINERS)} have not: give a symmetric format"
        )
    run = spec.group_size if spec.granularity is Granularity.PER_GROUP else width
    if run is not None and run % 32:
        raise ValueError(
            f"{name} shares scales among {run} numbers, GGUF among 32 or 256: give groups that are a "
            "multiple of 32"
        )
    if spec.grid is CodeGrid.E2M1 and spec.scale_type is ScaleType.E8M0:
        return "MXFP4"
    if spec.grid not in (CodeGrid.INTEGER, CodeGrid.ODD):
        raise ValueError(
            f"{name} has {spec.grid.value} numbers under {spec.scale_type.value} scales: GGUF has e2m1 under "
            "e8m0 only"
        )
    for container in _INTEGER_CONTAINERS:
        kind = CONTAINERS[container]
        fits = kind.lowest <= spec.lowest_code and spec.highest_code <= kind.highest
        if fits and (kind.size == 32 or (run is not None and run % kind.size == 0)):
            return container
    raise AssertionError("all integer codes fit Q8_0")


def pack(encoded: Encoded, container: str) -> UInt8[np.ndarray, "..."]:
    """The blocks of an array whose groups run along its last axis: [..., bytes of a row].

    Raises ValueError where the container cannot hold codes or scales exactly: codes out of its range, a zero
    point, a second scale, groups that are no multiple of its blocks, scales that float16 (of MXFP4: a power
    of two) does not hold.
    """
    kind = _kind(container)
    codes = np.asarray(encoded.codes)
    scale = np.asarray(encoded.scale, np.float32)
    if encoded.zero is not None or encoded.tensor_scale is not None:
        raise ValueError(
            f"{container} has neither zero points nor a second scale: give a symmetric format of one level"
        )
    width = codes.shape[-1]
    num_groups = scale.shape[-1]
    if width % kind.size or (width // num_groups) % kind.size:
        raise ValueError(
            f"rows of {width} numbers in groups of {width // num_groups} do not fit {container}, whose "
            f"blocks are of {kind.size}:"
            f" give groups that are a multiple of {kind.size}"
        )
    if codes.size and (codes.min() < kind.lowest or codes.max() > kind.highest):
        raise ValueError(
            f"codes from {codes.min()} to {codes.max()} do not fit {container}, which has {kind.lowest} to "
            f"{kind.highest}"
        )
    num_blocks = width // kind.size
    # A group of several blocks gives each its scale, a TENSOR gives it to all.
    scale = np.broadcast_to(
        np.repeat(scale, num_blocks // num_groups, axis=-1), (*codes.shape[:-1], num_blocks)
    )
    blocks = codes.reshape(*codes.shape[:-1], num_blocks, kind.size)
    return _LAYOUTS[container][0](blocks, scale).reshape(*codes.shape[:-1], num_blocks * kind.num_bytes)


def unpack(raw: UInt8[np.ndarray, "..."], container: str) -> Encoded:
    """Codes and scales of blocks [..., bytes of a row], a scale for each block, as NumPy arrays.

    Raises ValueError for rows that are no whole number of blocks.
    """
    kind = _kind(container)
    if raw.shape[-1] % kind.num_bytes:
        raise ValueError(
            f"a row of {raw.shape[-1]} bytes is no whole number of {container} blocks of {kind.num_bytes}"
        )
    num_blocks = raw.shape[-1] // kind.num_bytes
    codes, scale = _LAYOUTS[container][1](raw.reshape(*raw.shape[:-1], num_blocks, kind.num_bytes))
    return Encoded(
        codes=codes.astype(np.int8).reshape(*raw.shape[:-1], num_blocks * kind.size), scale=scale[..., 0]
    )


def _kind(container: str) -> Container:
    if container not in CONTAINERS:
        raise ValueError(f"there is no container {container!r}: give one of {', '.join(CONTAINERS)}")
    return CONTAINERS[container]


def _float16_bytes(scale: np.ndarray) -> np.ndarray:
    """[..., blocks] to [..., blocks, 2]."""
    with np.errstate(over="ignore"):
        narrow = scale.astype(np.float16)
    wrong = (narrow.astype(np.float32) != scale) | ~np.isfinite(narrow)
    if wrong.any():
        raise ValueError(
            f"{wrong.sum()} of {scale.size} scales are no float16, which GGUF stores ({scale[wrong][0]!r} is "
            "the first):"
            " train in a format whose scales are float16"
        )
    return narrow.astype("<f2")[..., None].view(np.uint8)


def _float16_scale(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes from 0 to 15, [..., 32], to bytes [..., 16]: the first half of a block below, the second
    above.
    """
    low = codes[..., :16].astype(np.uint8)
    high = codes[..., 16:].astype(np.uint8)
    return low | (high << 4)


def _from_nibbles(raw: np.ndarray) -> np.ndarray:
    return np.concatenate([raw & 15, raw >> 4], axis=-1).astype(np.int8)


def _pack_q4_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.concatenate([_float16_bytes(scale), _nibbles(codes + 8)], axis=-1)


def _unpack_q4_0(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _from_nibbles(raw[..., 2:]) - 8, _float16_scale(raw[..., :2])


def _pack_q8_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.concatenate([_float16_bytes(scale), codes.astype(np.int8).view(np.uint8)], axis=-1)


def _unpack_q8_0(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return raw[..., 2:].view(np.int8), _float16_scale(raw[..., :2])


def _pack_tq2_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    # A byte has the codes of four numbers that are 32 apart.
    quarters = (codes + 1).astype(np.uint8).reshape(*codes.shape[:-1], 2, 4, 32)
    packed = np.bitwise_or.reduce(quarters << _SHIFTS, axis=-2)
    return np.concatenate([packed.reshape(*codes.shape[:-1], 64), _float16_bytes(scale)], axis=-1)


def _unpack_tq2_0(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    quarters = (raw[..., :64].reshape(*raw.shape[:-1], 2, 1, 32) >> _SHIFTS) & 3
    return quarters.reshape(*raw.shape[:-1], 256).astype(np.int8) - 1, _float16_scale(raw[..., 64:])


def _pack_mxfp4(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(scale).view(np.uint32)
    # The smallest, 2**-127, is below the normal numbers.
    exponent = np.where(bits == 0x00400000, 0, bits >> 23)
    wrong = ((bits & 0x007FFFFF) != 0) & (bits != 0x00400000) | (exponent > 254) | (bits == 0)
    if wrong.any():
        raise ValueError(
            f"{wrong.sum()} of {scale.size} scales are no power of two ({scale[wrong][0]!r} is the first): "
            "give e8m0 scales"
        )
    return np.concatenate([exponent.astype(np.uint8)[..., None], _nibbles(codes)], axis=-1)


def _unpack_mxfp4(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    exponent = raw[..., :1].astype(np.uint32)
    return _from_nibbles(raw[..., 1:]), np.where(exponent == 0, np.uint32(0x00400000), exponent << 23).view(
        np.float32
    )


_LAYOUTS = {
    "Q4_0": (_pack_q4_0, _unpack_q4_0),
    "Q8_0": (_pack_q8_0, _unpack_q8_0),
    "TQ2_0": (_pack_tq2_0, _unpack_tq2_0),
    "MXFP4": (_pack_mxfp4, _unpack_mxfp4),
}
