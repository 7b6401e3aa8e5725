"""GGUF files: the metadata and the tensors of a model in one file, for llama.cpp.

    file = read_gguf(Path("model.gguf"))
    file.metadata["general.architecture"]
    file.tensors["token_embd.weight"].read()
    write_gguf(path, architecture="qwen3", metadata={...}, tensors=[PendingTensor(...), ...])

Files are memory-mapped for reading and written one tensor at a time: neither needs more memory than the
largest tensor. Shapes are NumPy's, rows first. The layout follows the GGUF specification, versions 2 and 3,
little-endian; block formats and writing use the gguf package (the extra `gguf`).
"""

import contextlib
import dataclasses
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from slmjax.atomic_files import atomic_file

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of tensors, unless general.alignment is given
# GGML_MAX_DIMS of llama.cpp, which refuses more.
_MAX_DIMS = 4
_STRING = 8
_ARRAY = 9
# Scalar types of metadata: the number in the file, and NumPy's name.
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
# Python types of the values that are read, by the pattern of their keys; those of architectures are checked
# as settings. A list has items of the type.
_TYPES: tuple[tuple[str, type, bool], ...] = (
    (r"general\.(architecture|name|license)", str, False),
    (r"general\.alignment|split\.count", int, False),
    (r"tokenizer\.ggml\.(model|pre)|tokenizer\.chat_template", str, False),
    (r"tokenizer\.ggml\.\w+_token_id", int, False),
    (r"tokenizer\.ggml\.add_\w+", bool, False),
    (r"tokenizer\.ggml\.(tokens|merges)", str, True),
    (r"tokenizer\.ggml\.token_type", int, True),
    (r"tokenizer\.ggml\.scores", float, True),
)
# Types whose bytes NumPy can view without a conversion.
_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Block types that small models are released in, and that the gguf package can dequantize.
_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ2_0", "MXFP4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor of a file, not yet read."""

    name: str  # as in the file
    shape: tuple[int, ...]  # rows first
    type: str  # GGUF's name of the number format: "F32", "Q4_1", ...
    raw: np.ndarray  # uint8 [bytes], memory-mapped

    def read(self) -> np.ndarray:
        """Return F32, F16 and BF16 as they are (a read-only view of the file), block formats dequantized."""
        if self.type in _PLAIN:
            return self.raw.view(_PLAIN[self.type]).reshape(self.shape)
        if self.type not in _BLOCKS:
            known = ", ".join([*_PLAIN, *_BLOCKS])
            raise ValueError(
                f"tensor {self.name!r} is in {self.type}, which is not supported; supported are {known}: use "
                "a file in one of these, or requantize this one with llama-quantize"
            )
        return dequantize_blocks(self.raw.reshape(*self.shape[:-1], -1), self.type, self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufFile:
    """Content of a file."""

    metadata: dict[str, Any]  # str, int, float, bool and lists of these
    tensors: dict[str, GgufTensor]  # by name, in the file's order


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufValue:
    """Metadata with an explicit type, for a list of its items: `GgufValue(value=7, type="UINT64")`."""

    value: Any
    type: str  # a name in gguf.GGUFValueType


@dataclasses.dataclass(frozen=True, kw_only=True)
class PendingTensor:
    """A tensor to write; its values are only read when they are written."""

    name: str  # in the file
    shape: tuple[int, ...]  # rows first, in values, not bytes
    # float32, float16 or bfloat16; or GGUF's name of a block format, for which `read` returns uint8 [...,
    # bytes per row]
    dtype: Any
    read: Callable[[], np.ndarray]  # called once, in the order of the tensors


def dequantize_blocks(blocks: np.ndarray, type: str, shape: tuple[int, ...]) -> np.ndarray:
    """Dequantize blocks, uint8 [..., bytes per row], to float32 [*shape] with the gguf package."""
    gguf = _import_gguf()
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type]).reshape(shape)


def block_size(type: str) -> int:
    """Return the number of values in a block of the type."""
    gguf = _import_gguf()
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][0]


def num_bytes(shape: tuple[int, ...], type: str) -> int:
    """Return the bytes of a tensor in the type. Raises ValueError if a row is not a multiple of the block."""
    gguf = _import_gguf()
    return _num_bytes(gguf, shape, gguf.GGMLQuantizationType[type])


def read_gguf(path: Path) -> GgufFile:
    """Read the metadata, and locate each tensor.

    Raises:
      ValueError: the file is not GGUF, is truncated or damaged, or is part of a split model.
    """
    gguf = _import_gguf()
    if not path.is_file():
        raise ValueError(f"there is no {path}: give a GGUF file")
    with path.open("rb") as opened:
        magic = opened.read(len(_MAGIC))
    # Checked before the file is mapped: an empty file cannot be mapped.
    if magic != _MAGIC:
        raise ValueError(f"{path} is not a GGUF file: it does not start with {_MAGIC.decode()!r}")
    # Mapped, not read: models are larger than what an import may hold in memory.
    content = np.memmap(path, mode="r")
    cursor = _Cursor(content, len(_MAGIC))
    try:
        version = cursor.number("<u4")
        # A big-endian file has its version's bytes reversed, and is refused here too.
        if version not in _VERSIONS:
            raise ValueError(
                f"its version is {version}, but must be 2 or 3 (little-endian): convert the model again with "
                "a current llama.cpp"
            )
        # Header, metadata and tensor entries follow each other without padding; only the tensors are aligned.
        num_tensors = cursor.number("<u8")
        num_values = cursor.number("<u8")
        metadata = _unique((cursor.string(), cursor.value(cursor.number("<u4"))) for _ in range(num_values))
        entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
        _check_types(metadata)
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        # The alignment is a value of the file like any other, and a divisor below.
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, but must be a power of two")
        start = -(-cursor.offset // alignment) * alignment
        tensors = _unique((entry[0], _locate(gguf, content, start, *entry)) for entry in entries)
    # RecursionError: arrays of metadata may be nested to any depth.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or its download is incomplete: {error}") from error
    # A part has the full metadata, but only some of the tensors.
    if metadata.get("split.count", 1) > 1:
        raise ValueError(
            f"{path} is one of {metadata['split.count']} parts of a model: merge them with llama-gguf-split "
            "--merge"
        )
    return GgufFile(metadata=metadata, tensors=tensors)


def write_gguf(
    path: Path, *, architecture: str, metadata: Mapping[str, Any], tensors: Iterable[PendingTensor]
) -> None:
    """Write a file atomically.

    A Python int is written as uint32, a float as float32, a list of ints as int32; `GgufValue` selects
    another type. Raises ValueError for metadata that GGUF cannot store.
    """
    gguf = _import_gguf()
    # All checks come before the file is opened.
    values = {key: _typed(gguf, key, value) for key, value in metadata.items()}
    # The header has the sizes of all tensors, before any of their values.
    pending = list(tensors)
    with (
        atomic_file(path) as temporary,
        contextlib.closing(gguf.GGUFWriter(temporary, architecture)) as writer,
    ):
        for key, (value, value_type, item_type) in values.items():
            writer.add_key_value(key, value, value_type, item_type)
        for tensor in pending:
            format = _format_of(gguf, tensor)
            # The writer would take uint8 for bytes of blocks; for any other dtype it trusts the shape.
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
            writer.write_tensor_data(_checked_values(gguf, tensor))


class _Cursor:
    """Reads one item after another, never past the end: a damaged file may have any counts and lengths."""

    def __init__(self, content: np.ndarray, offset: int) -> None:
        # A memoryview: slices of it neither copy bytes nor create NumPy arrays, of which there would be
        # millions.
        self._content = content.data
        self.offset = offset

    def take(self, num_bytes: int) -> memoryview:
        # A subtraction, since the sum with a damaged length of 2**64 - 1 would need more care.
        if num_bytes > len(self._content) - self.offset:
            raise ValueError(
                f"at byte {self.offset} it needs {num_bytes} more bytes, but has "
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
            raise ValueError(f"before byte {self.offset} it has an unknown type of metadata: {kind}")
        item_kind = self.number("<u4")
        length = self.number("<u8")
        # Lists of scores have an entry for each token: they are read at once.
        if item_kind in _SCALARS:
            return np.frombuffer(
                self.take(length * np.dtype(_SCALARS[item_kind]).itemsize), _SCALARS[item_kind]
            ).tolist()
        return [self.value(item_kind) for _ in range(length)]


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Read a tensor's name, shape, type number, and offset from the start of the tensors."""
    name = cursor.string()
    num_dims = cursor.number("<u4")
    if num_dims > _MAX_DIMS:
        raise ValueError(f"tensor {name!r} has {num_dims} dims, but at most {_MAX_DIMS} are supported")
    # GGUF counts dims from the fastest one.
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
    """Return the tensor with its bytes. Raises ValueError if the file ends before them."""
    format = gguf.GGMLQuantizationType(type_number)  # ValueError for an unknown number
    begin = start + offset
    # Python integers do not overflow, however large the dims of a damaged file.
    end = begin + _num_bytes(gguf, shape, format)
    if end > content.size:
        raise ValueError(f"tensor {name!r} ends at byte {end}, but the file has {content.size}")
    return GgufTensor(name=name, shape=shape, type=format.name, raw=content[begin:end])


def _num_bytes(gguf: Any, shape: tuple[int, ...], format: Any) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[format]
    # Blocks never cross the end of a row.
    if shape and shape[-1] % block:
        raise ValueError(
            f"a row of {shape[-1]} values is not a multiple of {block}, the block size of {format.name}"
        )
    return math.prod(shape) // block * block_bytes


def _check_types(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError if a value that is read by name has another type than the specification gives it."""
    for key, value in metadata.items():
        for pattern, kind, is_list in _TYPES:
            if not re.fullmatch(pattern, key):
                continue
            items = value if is_list else [value]
            # A boolean is an int in Python, and none in GGUF.
            if not isinstance(items, list) or not all(type(item) is kind for item in items):
                expected = f"a list of {kind.__name__}" if is_list else kind.__name__
                raise ValueError(f"{key} has values of another type than {expected}")


def _unique(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in items:
        if name in unique:
            raise ValueError(f"it has {name!r} twice")
        unique[name] = value
    return unique


def _typed(gguf: Any, key: str, value: Any) -> tuple[Any, Any, Any]:
    """Return the arguments of the writer: the value, its type, and the type of its items."""
    types = gguf.GGUFValueType
    inner, name = (value.value, value.type) if isinstance(value, GgufValue) else (value, None)
    if isinstance(inner, list | tuple):
        items = list(inner)
        if not items:
            raise ValueError(f"{key} is an empty list, which the writer does not support: leave the key out")
        # int32, since llama.cpp reads lists such as token types as signed.
        names = {_type_name(key, item, int_name="INT32") for item in items} if name is None else {name}
        if len(names) > 1:
            raise ValueError(f"{key} is a list of {', '.join(sorted(names))}: its items must be of one type")
        return items, types.ARRAY, types[names.pop()]
    return inner, types[name or _type_name(key, inner, int_name="UINT32")], None


def _type_name(key: str, value: Any, *, int_name: str) -> str:
    # Looked up by exact type: a bool is an int in Python, but another type in GGUF.
    names = {bool: "BOOL", int: int_name, float: "FLOAT32", str: "STRING"}
    if type(value) not in names:
        raise ValueError(
            f"{key} is {value!r}, a {type(value).__name__}: GGUF stores str, int, float, bool and lists of "
            "them"
        )
    # The writer's own error would not name the key.
    low, high = {"UINT32": (0, 2**32), "INT32": (-(2**31), 2**31)}[int_name]
    if type(value) is int and not low <= value < high:
        raise ValueError(
            f"{key} is {value}, which does not fit {int_name}: pass GgufValue(value=..., type='INT64')"
        )
    return names[type(value)]


def type_of(tensor: PendingTensor) -> str:
    """Return GGUF's name of the type in which a tensor is written."""
    return _format_of(_import_gguf(), tensor).name


def _format_of(gguf: Any, tensor: PendingTensor) -> Any:
    # Block types have names that NumPy does not know.
    if isinstance(tensor.dtype, str) and tensor.dtype in gguf.GGMLQuantizationType.__members__:
        return gguf.GGMLQuantizationType[tensor.dtype]
    names = {dtype: name for name, dtype in _PLAIN.items()}
    if np.dtype(tensor.dtype) not in names:
        raise ValueError(
            f"tensor {tensor.name!r} is {np.dtype(tensor.dtype)}: use float32, float16, bfloat16 or the name "
            "of a GGUF format"
        )
    return gguf.GGMLQuantizationType[names[np.dtype(tensor.dtype)]]


def _checked_values(gguf: Any, tensor: PendingTensor) -> np.ndarray:
    """Read the tensor's values or blocks, and check their dtype and shape."""
    # Transposed views are written in the order of their shape.
    values = np.ascontiguousarray(tensor.read())
    format = _format_of(gguf, tensor)
    dtype = _PLAIN.get(format.name, np.dtype(np.uint8))
    shape = tensor.shape
    if format.name not in _PLAIN:
        shape = (*shape[:-1], _num_bytes(gguf, shape[-1:], format))
    # Sizes are in the header already: other bytes would shift every tensor after this one.
    if values.dtype != dtype or values.shape != shape:
        raise ValueError(
            f"tensor {tensor.name!r} was declared as {dtype} {shape}, but is {values.dtype} {values.shape}"
        )
    return values.view(np.uint8) if values.ndim else values


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF files need the gguf package: pip install 'slmjax[gguf]'") from error
    return gguf
