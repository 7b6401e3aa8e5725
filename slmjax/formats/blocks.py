"""Bytes of GGUF blocks: codes and scales are packed into a container as they are, without quantizing again.

    container = container_for(spec)           # "Q4_0"
    raw = pack(encoded, container)            # uint8 [..., bytes of a row]; groups run along the last axis
    unpack(raw, container)                    # codes and scales again, one scale for each block

A container holds more formats than the quantizer of its name produces: Q4_0 holds all integers from -8 to 7
with float16 scales, whichever rule chose them, and a group of several blocks repeats its scale. The layouts
are those of ggml's block structures. This is NumPy code on the host. A float32 scale that float16 cannot hold
is an error.
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

    size: int  # elements of a block
    num_bytes: int  # bytes of a block
    lowest: int  # the lowest code; codes of MXFP4 are bit patterns
    highest: int  # the highest code, included


CONTAINERS = {
    "Q4_0": Container(size=32, num_bytes=18, lowest=-8, highest=7),
    "Q8_0": Container(size=32, num_bytes=34, lowest=-128, highest=127),
    "TQ2_0": Container(size=256, num_bytes=66, lowest=-1, highest=1),
    "MXFP4": Container(size=32, num_bytes=17, lowest=0, highest=15),
}
_INTEGER_CONTAINERS = ("TQ2_0", "Q4_0", "Q8_0")  # the smallest first
# Positions of the four 2-bit codes in a byte of TQ2_0.
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)[:, None]


def container_for(spec: QuantSpec, *, width: int | None = None) -> str:
    """Return the smallest container that holds every array of this format exactly.

    Args:
      spec: the format.
      width: elements of a row, for a format without a group size: a multiple of 256 fits TQ2_0.

    Raises:
      ValueError: no container holds the format, with the reason. Scales that float16 cannot hold are not
        checked here, but by `pack`.
    """
    name = name_of(spec)
    if spec.is_asymmetric:
        raise ValueError(
            f"{name} has zero points, which GGUF's {', '.join(CONTAINERS)} do not: give a symmetric format"
        )
    run = spec.group_size if spec.granularity is Granularity.PER_GROUP else width
    if run is not None and run % 32:
        raise ValueError(
            f"{name} shares a scale among {run} elements, GGUF among 32 or 256: give groups that are a "
            "multiple of 32"
        )
    if spec.grid is CodeGrid.E2M1 and spec.scale_type is ScaleType.E8M0:
        return "MXFP4"
    if spec.grid not in (CodeGrid.INTEGER, CodeGrid.ODD):
        raise ValueError(
            f"{name} has {spec.grid.value} codes with {spec.scale_type.value} scales: the only float codes "
            "of GGUF are e2m1 with e8m0 scales"
        )
    for container in _INTEGER_CONTAINERS:
        kind = CONTAINERS[container]
        fits = kind.lowest <= spec.lowest_code and spec.highest_code <= kind.highest
        if fits and (kind.size == 32 or (run is not None and run % kind.size == 0)):
            return container
    raise AssertionError("all integer codes fit Q8_0")


def pack(encoded: Encoded, container: str) -> UInt8[np.ndarray, "..."]:
    """Return the blocks of an array whose groups run along its last axis: [..., bytes of a row].

    Raises:
      ValueError: the container cannot hold codes or scales exactly: codes out of its range, a zero point, a
        second scale, groups that are not a multiple of its blocks, or scales that float16 (in MXFP4: a power
        of two) cannot hold.
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
            f"rows of {width} elements in groups of {width // num_groups} do not fit {container}, whose "
            f"blocks have {kind.size}: give groups that are a multiple of {kind.size}"
        )
    if codes.size and (codes.min() < kind.lowest or codes.max() > kind.highest):
        raise ValueError(
            f"codes from {codes.min()} to {codes.max()} do not fit {container}, which has {kind.lowest} to "
            f"{kind.highest}"
        )
    num_blocks = width // kind.size
    # A group of several blocks repeats its scale in each, a PER_TENSOR scale in all.
    scale = np.broadcast_to(
        np.repeat(scale, num_blocks // num_groups, axis=-1), (*codes.shape[:-1], num_blocks)
    )
    blocks = codes.reshape(*codes.shape[:-1], num_blocks, kind.size)
    return _LAYOUTS[container][0](blocks, scale).reshape(*codes.shape[:-1], num_blocks * kind.num_bytes)


def unpack(raw: UInt8[np.ndarray, "..."], container: str) -> Encoded:
    """Return the codes and scales of blocks [..., bytes of a row] as NumPy arrays, one scale for each block.

    Raises:
      ValueError: the rows are not a multiple of the block's bytes.
    """
    kind = _kind(container)
    if raw.shape[-1] % kind.num_bytes:
        raise ValueError(
            f"a row of {raw.shape[-1]} bytes is not a multiple of {container}'s blocks of {kind.num_bytes}: "
            "the file is damaged, or of another type"
        )
    num_blocks = raw.shape[-1] // kind.num_bytes
    codes, scale = _LAYOUTS[container][1](raw.reshape(*raw.shape[:-1], num_blocks, kind.num_bytes))
    return Encoded(
        codes=codes.astype(np.int8).reshape(*raw.shape[:-1], num_blocks * kind.size), scale=scale[..., 0]
    )


def _kind(container: str) -> Container:
    if container not in CONTAINERS:
        raise ValueError(f"unknown container {container!r}: give one of {', '.join(CONTAINERS)}")
    return CONTAINERS[container]


def _float16_bytes(scale: np.ndarray) -> np.ndarray:
    """Convert scales [..., blocks] to bytes [..., blocks, 2]."""
    with np.errstate(over="ignore"):
        scale16 = scale.astype(np.float16)
    wrong = (scale16.astype(np.float32) != scale) | ~np.isfinite(scale16)
    if wrong.any():
        raise ValueError(
            f"{wrong.sum()} of {scale.size} scales are not float16 values, which GGUF stores (the first is "
            f"{scale[wrong][0]!r}): train in a format whose scales are float16"
        )
    return scale16.astype("<f2")[..., None].view(np.uint8)


def _float16_scale(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Pack codes from 0 to 15, [..., 32], into bytes [..., 16].

    The first half of a block goes into the low nibbles, the second into the high ones.
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
    # A byte has the codes of four elements that are 32 apart.
    quarters = (codes + 1).astype(np.uint8).reshape(*codes.shape[:-1], 2, 4, 32)
    packed = np.bitwise_or.reduce(quarters << _SHIFTS, axis=-2)
    return np.concatenate([packed.reshape(*codes.shape[:-1], 64), _float16_bytes(scale)], axis=-1)


def _unpack_tq2_0(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    quarters = (raw[..., :64].reshape(*raw.shape[:-1], 2, 1, 32) >> _SHIFTS) & 3
    return quarters.reshape(*raw.shape[:-1], 256).astype(np.int8) - 1, _float16_scale(raw[..., 64:])


def _pack_mxfp4(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(scale).view(np.uint32)
    # The smallest scale, 2**-127, is a subnormal float32.
    exponent = np.where(bits == 0x00400000, 0, bits >> 23)
    wrong = ((bits & 0x007FFFFF) != 0) & (bits != 0x00400000) | (exponent > 254) | (bits == 0)
    if wrong.any():
        raise ValueError(
            f"{wrong.sum()} of {scale.size} scales are not powers of two (the first is {scale[wrong][0]!r}): "
            "train in a format whose scales are e8m0"
        )
    return np.concatenate([exponent.astype(np.uint8)[..., None], _nibbles(codes)], axis=-1)


def _unpack_mxfp4(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    exponent = raw[..., :1].astype(np.uint32)
    bits = np.where(exponent == 0, np.uint32(0x00400000), exponent << 23)
    return _from_nibbles(raw[..., 1:]), bits.view(np.float32)


_LAYOUTS = {
    "Q4_0": (_pack_q4_0, _unpack_q4_0),
    "Q8_0": (_pack_q8_0, _unpack_q8_0),
    "TQ2_0": (_pack_tq2_0, _unpack_tq2_0),
    "MXFP4": (_pack_mxfp4, _unpack_mxfp4),
}
