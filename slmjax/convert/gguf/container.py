"""GGUF files: named metadata and named tensors, as llama.cpp keeps a model in one file.

    file = read_gguf(Path("model.gguf"));  file.metadata["general.architecture"];
    file.tensors["token_embd.weight"].read() write_gguf(path, architecture="qwen3", metadata={...},
    tensors=[PendingTensor(name=..., shape=..., dtype=..., read=...), ...])

A file is memory-mapped, and written a tensor at a time, so that neither needs more memory than its largest
tensor. Shapes are NumPy's, rows first. The layout of the file is that of the GGUF specification, versions 2
and 3, little-endian; block formats, and the writing, are the gguf package's (the extra `gguf`).
"""

import contextlib
import dataclasses
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from slmjax.atomic_files import atomic_file

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of tensors, where general.alignment says no other
_MAX_DIMS = 4
_STRING = 8
_ARRAY = 9
# The types of metadata by their number in the file; NumPy's name of each scalar.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ2_0", "MXFP4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of a file, still on disk."""

    name: str  # as in the file
    shape: tuple[int, ...]  # rows first
    type: str  # GGUF's name of the number format: "F32", "Q4_1", ...
    raw: np.ndarray  # uint8 [bytes], mapped from the file

    def read(self) -> np.ndarray:
        """F32, F16 and BF16 in their own dtype (a read-only view of the file), block formats decoded to
        float32.
        """
        if self.type in _PLAIN:
            return self.raw.view(_PLAIN[self.type]).reshape(self.shape)
        if self.type not in _BLOCKS:
            known = ", ".join([*_PLAIN, *_BLOCKS])
            raise ValueError(
                f"tensor {self.name!r} is in {self.type}, which cannot be decoded here, only {known}: take a "
                "file in one of these,"
                " or requantize this one with llama-quantize"
            )
        return decoded_blocks(self.raw.reshape(*self.shape[:-1], -1), self.type, self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufFile:
    """What a file holds."""

    metadata: dict[str, Any]  # str, int, float, bool and lists of these
    tensors: dict[str, GgufTensor]  # by name, in the order of the file


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufValue:
    """Metadata of a type that its Python value does not tell: `GgufValue(value=7, type="UINT64")`, for a list
    that of its items.
    """

    value: Any  # what Python has
    type: str  # a name of gguf.GGUFValueType


@dataclasses.dataclass(frozen=True, kw_only=True)
class PendingTensor:
    """A tensor to be written: what must be known beforehand, and how to get the numbers when their turn
    comes.
    """

    name: str  # as in the file
    shape: tuple[int, ...]  # rows first, in numbers, not bytes
    # float32, float16 or bfloat16; or GGUF's name of a format, whose bytes `read` gives as uint8 [...,
    # bytes of a row]
    dtype: Any
    read: Callable[[], np.ndarray]  # called once, in the order of the tensors


def decoded_blocks(blocks: np.ndarray, type: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 numbers [*shape] that blocks, uint8 [..., bytes of a row], stand for, by the gguf
    package.
    """
    gguf = _import_gguf()
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type]).reshape(shape)


def block_size(type: str) -> int:
    """How many numbers of a row are one block of the type."""
    gguf = _import_gguf()
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][0]


def num_bytes(shape: tuple[int, ...], type: str) -> int:
    """Bytes of a tensor in the type. Raises ValueError for rows that are no whole number of blocks."""
    gguf = _import_gguf()
    return _num_bytes(gguf, shape, gguf.GGMLQuantizationType[type])


def read_gguf(path: Path) -> GgufFile:
    """The metadata, and where each tensor lies. Raises ValueError for a file that is no GGUF, is cut short,
    or is damaged.
    """
    gguf = _import_gguf()
    if not path.is_file():
        raise ValueError(f"there is no {path}: name a GGUF file")
    with path.open("rb") as opened:
        magic = opened.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ValueError(f"{path} is no GGUF file: it does not begin with {_MAGIC.decode()!r}")
    content = np.memmap(path, mode="r")
    cursor = _Cursor(content, len(_MAGIC))
    try:
        version = cursor.number("<u4")
        if version not in _VERSIONS:
            raise ValueError(
                f"its version is {version}, must be 2 or 3 (little-endian): convert the model again with a "
                "current llama.cpp"
            )
        num_tensors = cursor.number("<u8")
        num_values = cursor.number("<u8")
        metadata = _unique((cursor.string(), cursor.value(cursor.number("<u4"))) for _ in range(num_values))
        entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, must be a power of two")
        start = -(-cursor.offset // alignment) * alignment
        tensors = _unique((entry[0], _locate(gguf, content, start, *entry)) for entry in entries)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or was not fetched whole: {error}") from error
    if metadata.get("split.count", 1) > 1:
        raise ValueError(
            f"{path} is one of {metadata['split.count']} parts of a model: join them with llama-gguf-split "
            "--merge"
        )
    return GgufFile(metadata=metadata, tensors=tensors)


def write_gguf(
    path: Path, *, architecture: str, metadata: Mapping[str, Any], tensors: Iterable[PendingTensor]
) -> None:
    """Write a file atomically.

    A Python int becomes an unsigned 32-bit number, a float one of 32 bits, a list of ints one of signed
    32-bit numbers; `GgufValue` asks for something else. Raises ValueError for metadata that GGUF cannot hold.
    """
    gguf = _import_gguf()
    values = {key: _typed(gguf, key, value) for key, value in metadata.items()}
    pending = list(tensors)
    with (
        atomic_file(path) as temporary,
        contextlib.closing(gguf.GGUFWriter(temporary, architecture)) as writer,
    ):
        for key, (value, value_type, item_type) in values.items():
            writer.add_key_value(key, value, value_type, item_type)
        for tensor in pending:
            format = _format_of(gguf, tensor)
            # The writer takes uint8 for bytes of blocks, and for any other dtype believes the shape that it
            # is told.
            writer.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.float32),
                _num_bytes(gguf, tensor.shape, format),
                raw_dtype=format,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in pending:
            writer.write_tensor_data(_checked_numbers(gguf, tensor))


class _Cursor:
    """Reads one item after another, and never past the end: counts and lengths of a damaged file may be
    anything.
    """

    def __init__(self, content: np.ndarray, offset: int) -> None:
        self._content = content.data
        self.offset = offset

    def take(self, num_bytes: int) -> memoryview:
        if num_bytes > len(self._content) - self.offset:
            raise ValueError(
                f"at byte {self.offset} it should go on for {num_bytes} bytes, and has "
                f"{len(self._content) - self.offset}"
            )
        self.offset += num_bytes
        return self._content[self.offset - num_bytes : self.offset]

    def number(self, dtype: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def string(self) -> str:
        return str(self.take(*struct.unpack("<Q", self.take(8))), "utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(
                f"before byte {self.offset} it names a type of metadata that does not exist: {kind}"
            )
        item_kind = self.number("<u4")
        length = self.number("<u8")
        if item_kind in _SCALARS:
            return np.frombuffer(
                self.take(length * np.dtype(_SCALARS[item_kind]).itemsize), _SCALARS[item_kind]
            ).tolist()
        return [self.value(item_kind) for _ in range(length)]


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, number of the type, and offset from where the tensors start."""
    name = cursor.string()
    num_dims = cursor.number("<u4")
    if num_dims > _MAX_DIMS:
        raise ValueError(f"tensor {name!r} has {num_dims} dims, must be at most {_MAX_DIMS}")
    columns_first = [cursor.number("<u8") for _ in range(num_dims)]
    return name, tuple(reversed(columns_first)), cursor.number("<u4"), cursor.number("<u8")


def _locate(
    gguf: Any,
    content: np.ndarray,
    start: int,
    name: str,
    shape: tuple[int, ...],
    type_number: int,
    offset: int,
) -> GgufTensor:
    """The tensor and its bytes. Raises ValueError if they are not all in the file."""
    format = gguf.GGMLQuantizationType(type_number)  # a ValueError of its own for an unknown number
    begin = start + offset
    end = begin + _num_bytes(gguf, shape, format)
    if end > content.size:
        raise ValueError(f"tensor {name!r} should end at byte {end}, and the file has {content.size}")
    return GgufTensor(name=name, shape=shape, type=format.name, raw=content[begin:end])


def _num_bytes(gguf: Any, shape: tuple[int, ...], format: Any) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[format]
    if shape and shape[-1] % block:
        raise ValueError(
            f"a row of {shape[-1]} numbers is no multiple of {block}, the block of {format.name}"
        )
    return math.prod(shape) // block * block_bytes


def _unique(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in items:
        if name in found:
            raise ValueError(f"it holds {name!r} twice")
        found[name] = value
    return found


def _typed(gguf: Any, key: str, value: Any) -> tuple[Any, Any, Any]:
    """The value as the writer takes it: with its type, and the type of its items."""
    types = gguf.GGUFValueType
    inner, name = (value.value, value.type) if isinstance(value, GgufValue) else (value, None)
    if isinstance(inner, list | tuple):
        items = list(inner)
        if not items:
            raise ValueError(f"{key} is an empty list, which GGUF's writer does not know: leave the key out")
        named = {_type_name(key, item, int_name="INT32") for item in items} if name is None else {name}
        if len(named) > 1:
            raise ValueError(f"{key} is a list of {', '.join(sorted(named))}: its items must be of one type")
        return items, types.ARRAY, types[named.pop()]
    return inner, types[name or _type_name(key, inner, int_name="UINT32")], None


def _type_name(key: str, value: Any, *, int_name: str) -> str:
    names = {bool: "BOOL", int: int_name, float: "FLOAT32", str: "STRING"}
    if type(value) not in names:
        raise ValueError(
            f"{key} is {value!r}, a {type(value).__name__}: GGUF holds str, int, float, bool and lists of "
            "them"
        )
    low, high = {"UINT32": (0, 2**32), "INT32": (-(2**31), 2**31)}[int_name]
    if type(value) is int and not low <= value < high:
        raise ValueError(
            f"{key} is {value}, which {int_name} does not hold: pass GgufValue(value=..., type='INT64')"
        )
    return names[type(value)]


def type_of(tensor: PendingTensor) -> str:
    """GGUF's name of the type that a tensor is written in."""
    return _format_of(_import_gguf(), tensor).name


def _format_of(gguf: Any, tensor: PendingTensor) -> Any:
    if isinstance(tensor.dtype, str) and tensor.dtype in gguf.GGMLQuantizationType.__members__:
        return gguf.GGMLQuantizationType[tensor.dtype]
    names = {dtype: name for name, dtype in _PLAIN.items()}
    if np.dtype(tensor.dtype) not in names:
        raise ValueError(
            f"tensor {tensor.name!r} is {np.dtype(tensor.dtype)}: GGUF takes float32, float16, bfloat16 or a "
            "format's name"
        )
    return gguf.GGMLQuantizationType[names[np.dtype(tensor.dtype)]]


def _checked_numbers(gguf: Any, tensor: PendingTensor) -> np.ndarray:
    """The tensor's numbers or blocks, which must be as they were announced."""
    numbers = np.ascontiguousarray(tensor.read())
    format = _format_of(gguf, tensor)
    wanted = _PLAIN.get(format.name, np.dtype(np.uint8))
    shape = tensor.shape
    if format.name not in _PLAIN:
        shape = (*shape[:-1], _num_bytes(gguf, shape[-1:], format))
    if numbers.dtype != wanted or numbers.shape != shape:
        raise ValueError(
            f"tensor {tensor.name!r} was to be {wanted} {shape}, and is {numbers.dtype} {numbers.shape}"
        )
    return numbers.view(np.uint8) if numbers.ndim else numbers


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF files need the gguf package: pip install 'slmjax[gguf]'") from error
    return gguf
