"""Weights in safetensors files: those of published models, and those of an imported model's directory.

    tensors = TensorFiles(directory)                  # nothing is read but the headers
    tensors.read("model.norm.weight")                 # one tensor, in the dtype it is stored in
    write_tensors(directory, pairs, largest_file=2**29)   # streamed: about one file's tensors in memory at a
    time

An imported model stores each layer's parameters by logical path (`layers/3/mixer/query/weight`), in their
original dtype, or quantized: then PATH is stored as `PATH/codes` (int8) and `PATH/scale`, with `PATH/zero`
and `PATH/tensor_scale` where the format has them, and `formats.json` has the formats. `read_stacked` returns
the stacked float32 parameters of a model; each device reads only its shards. Codes are dequantized, and
nothing is quantized again.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slmjax import config as config_io
from slmjax.formats.coding import Encoded
from slmjax.formats.spec import QuantSpec
from slmjax.models.architecture import ModelConfig
from slmjax.models.paths import logical_paths
from slmjax.quantization.weights import decode_matrices
from slmjax.stored_json import read_object

DIRECTORY = "weights"  # of an imported model's directory
INDEX = "model.safetensors.index.json"
LARGEST_FILE = 2**27  # bytes: while one is written, its tensors are in memory twice
# Names as in the headers of safetensors files.
DTYPES: Mapping[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jax.numpy.bfloat16,
    "F64": np.float64,
}
CODE_DTYPES: Mapping[str, Any] = DTYPES | {"I8": np.int8, "I32": np.int32}
FORMATS = "formats.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    """The file, shape and dtype of a tensor."""

    file: Path
    shape: tuple[int, ...]
    stored: str  # the name of its dtype


class TensorFiles:
    """The tensors of a directory of safetensors files; the file that was read last stays memory-mapped."""

    def __init__(self, directory: Path, *, dtypes: Mapping[str, Any] = DTYPES) -> None:
        """Read the headers of all files.

        Args:
          dtypes: the dtypes that are supported, by their names in the files.

        Raises:
          ValueError: there are no files, or one is damaged or missing.
        """
        self.directory = directory
        self._dtypes = dtypes
        self._entries: dict[str, _Entry] = {}
        self._open: tuple[Path | None, Any] = (None, None)
        # Headers alone show all names, shapes and dtypes: errors are found before any weights are read.
        files, places = _files(directory)
        for path in files:
            if not path.is_file():
                raise ValueError(
                    f"{directory / INDEX} names {path.name}, which is not there: the copy of the model is "
                    "incomplete"
                )
            for name, entry in _entries(path).items():
                if places and places.get(name) != path:
                    continue  # the index has it in another file, or not at all
                # Without an index nothing decides which of the two belongs to the model.
                if name in self._entries:
                    raise ValueError(
                        f"{name} is in {self._entries[name].file.name} and in {path.name}: delete the file "
                        "that is not the model's"
                    )
                self._entries[name] = entry
        if missing := sorted(places.keys() - self._entries.keys()):
            raise ValueError(
                f"{places[missing[0]]} has no {missing[0]}, which {INDEX} lists: copy both again"
            )

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def files(self) -> list[Path]:
        """The files they are in."""
        return sorted({entry.file for entry in self._entries.values()})

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype that a tensor is stored in. Raises ValueError for one that is not supported."""
        entry = self._entries[name]
        if entry.stored not in self._dtypes:
            raise ValueError(
                f"{entry.file}: {name} is stored as {entry.stored}, and weights are read as "
                f"{', '.join(self._dtypes)}: "
                "take the checkpoint that is not quantized, or a GGUF file"
            )
        return np.dtype(self._dtypes[entry.stored])

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Return a tensor, or a part of it: only that is read. Raises ValueError as `dtype` does."""
        # For its error: the library would fail on packed or 8-bit floats without a way out.
        self.dtype(name)
        path = self._entries[name].file
        # Reading goes file by file: one open file is enough, and more would stay mapped.
        if self._open[0] != path:
            self._open = (path, safe_open(path, framework="np"))
        file = self._open[1]
        return file.get_slice(name)[index] if index else file.get_tensor(name)


def _entries(path: Path) -> dict[str, _Entry]:
    """The tensors that the header of a file lists. Raises ValueError for a damaged file."""
    try:
        with safe_open(path, framework="np") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            return {
                name: _Entry(file=path, shape=tuple(part.get_shape()), stored=part.get_dtype())
                for name, part in parts.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error}): copy it again") from error


def _files(directory: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files to read, and the file of each tensor where there is an index.

    They are model.safetensors, or those of the index, or all that there are.
    """
    # The single file comes first, as in transformers: an index next to it may be left from a larger save.
    single = directory / "model.safetensors"
    index = directory / INDEX
    if single.is_file():
        return [single], {}
    if index.is_file():
        listed = read_object(index, {"weight_map": dict}, remedy="copy it again")["weight_map"]
        files = {name: str(file) for name, file in listed.items()}
        # An index may come from anywhere: it must not name files outside its directory.
        if outside := [file for file in files.values() if Path(file).name != file]:
            raise ValueError(f"{index} names {outside[0]}, which is not in its directory: it is not followed")
        places = {name: directory / file for name, file in files.items()}
        return sorted(set(places.values())), places
    unindexed = sorted(directory.glob("*.safetensors"))
    if not unindexed:
        others = sorted(
            path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in directory.glob(pattern)
        )
        way_out = (
            f": {others[0]} is a pickle, which could run code and is not read; convert it to safetensors"
            if others
            else ""
        )
        raise ValueError(f"{directory} holds no .safetensors file{way_out}")
    return unindexed, {}


def write_tensors(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], *, largest_file: int = LARGEST_FILE
) -> None:
    """Write tensors into one or more files, named and indexed as Hugging Face libraries do."""
    directory.mkdir(parents=True, exist_ok=True)
    written: list[tuple[Path, list[str]]] = []
    total = 0
    for part in _parts(tensors, largest_file):
        # A temporary name: a directory that is not complete has no model.safetensors.
        path = directory / f"part-{len(written)}.tmp"
        # transformers refuses files without this key.
        save_file(part, path, metadata={"format": "pt"})
        total += sum(array.nbytes for array in part.values())
        written.append((path, list(part)))
    # The names contain the number of files, which is known only now.
    weight_map = {}
    for number, (path, names) in enumerate(written, start=1):
        name = (
            "model.safetensors"
            if len(written) == 1
            else f"model-{number:05d}-of-{len(written):05d}.safetensors"
        )
        path.chmod(0o644)  # the library lets nobody else read what it writes
        path.rename(directory / name)
        weight_map |= dict.fromkeys(names, name)
    # A single file needs no index, as in the Hugging Face hub.
    if len(written) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _parts(tensors: Iterable[tuple[str, np.ndarray]], largest_file: int) -> Iterator[dict[str, np.ndarray]]:
    part: dict[str, np.ndarray] = {}
    size = 0
    # Tensors come one at a time: no more than one file of them is in memory.
    for name, array in tensors:
        # A tensor is never divided: one larger than a file gets a file of its own.
        if part and size + array.nbytes > largest_file:
            yield part
            part = {}
            size = 0
        # safetensors requires contiguous arrays.
        part[name] = np.ascontiguousarray(array)
        size += array.nbytes
    yield part


# An imported model's parameters -----------------------------------------------------------------------------
def is_imported(path: Path) -> bool:
    """Return whether this is the directory of an imported model."""
    return (path / DIRECTORY).is_dir()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredFormat:
    """The number format of a parameter that is stored in codes."""

    spec: QuantSpec
    axis: int  # of its groups


class ModelFiles:
    """The parameters of an imported model's directory by logical path, some of them perhaps in codes."""

    def __init__(self, path: Path) -> None:
        """Read the headers of all files. Raises ValueError where files are damaged or missing."""
        self.directory = path / DIRECTORY
        self._tensors = TensorFiles(self.directory, dtypes=CODE_DTYPES)
        self.formats = _read_formats(self.directory / FORMATS)
        # Checked here, since formats.json and the weights are separate files, one of which may not be copied.
        if absent := sorted(
            name
            for name in self.formats
            if not {f"{name}/codes", f"{name}/scale"} <= set(self._tensors.names)
        ):
            raise ValueError(
                f"{self.directory}: {FORMATS} has {absent[0]} in codes, and the files lack its codes or its "
                "scale: copy all files again"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.formats or name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self._tensors.shape(f"{name}/codes" if name in self.formats else name)

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of the result of `read`."""
        return np.dtype(np.float32) if name in self.formats else self._tensors.dtype(name)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Return a parameter, or a part of it; codes are read in full and dequantized."""
        if (stored := self.formats.get(name)) is None:
            return self._tensors.read(name, index)
        # Dequantized by the same code as in training, so that the weights are the same to the last bit.
        encoded = jax.tree.map(jax.numpy.asarray, self.encoded(name))
        try:
            return np.asarray(decode_matrices(encoded, stored.spec, axis=stored.axis))[index]
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{self.directory}: the codes and scales of {name} are not of the format that {FORMATS} has "
                f"for it ({error}): copy all files again"
            ) from error

    def encoded(self, name: str) -> Encoded:
        """Return the codes and scales of a parameter that is stored in codes, as NumPy arrays."""

        def part(kind: str, dtype: Any) -> np.ndarray | None:
            return (
                self._tensors.read(f"{name}/{kind}").astype(dtype)
                if f"{name}/{kind}" in self._tensors
                else None
            )

        return Encoded(
            # Scales may be stored in float16, without loss (`in_codes`).
            codes=part("codes", np.int8),
            scale=part("scale", np.float32),
            zero=part("zero", np.int32),
            tensor_scale=part("tensor_scale", np.float32),
        )


def _read_formats(path: Path) -> dict[str, StoredFormat]:
    """The contents of `write_formats`; empty for a model without parameters in codes."""
    if not path.is_file():
        return {}
    formats = read_object(path, remedy="copy it again")
    try:
        return {name: config_io.from_json(StoredFormat, value) for name, value in formats.items()}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error


def write_formats(path: Path, formats: Mapping[str, StoredFormat]) -> None:
    """Write the formats of those parameters that are in codes into an imported model's directory."""
    text = json.dumps({name: config_io.to_json(stored) for name, stored in formats.items()}, indent=1)
    (path / DIRECTORY / FORMATS).write_text(text, encoding="utf-8")


def in_codes(name: str, encoded: Encoded) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors that a parameter in codes is stored as."""
    yield f"{name}/codes", np.asarray(encoded.codes, np.int8)
    # Many formats have float16 scales: those are stored as such where nothing is lost.
    scale = np.asarray(encoded.scale, np.float32)
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    yield f"{name}/scale", half if np.array_equal(half.astype(np.float32), scale) else scale
    if encoded.zero is not None:
        yield f"{name}/zero", np.asarray(encoded.zero, np.int32)
    if encoded.tensor_scale is not None:
        yield f"{name}/tensor_scale", np.asarray(encoded.tensor_scale, np.float32)


def read_stacked(
    path: Path, config: ModelConfig, like: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Array]:
    """Return the parameters (or buffers) of an imported model's directory by stack path, in float32.

    Args:
      like: their shapes, with the shardings of the result.

    Raises:
      ValueError: the directory's files are damaged, or have other parameters than the model.
    """
    files = ModelFiles(path)
    return {
        # One stack at a time: its layers are all that is in host memory.
        name: _read_one(files, logical_paths(config, name), leaf, is_stacked=name.startswith("segments/"))
        for name, leaf in like.items()
    }


def _read_one(files: ModelFiles, names: list[str], leaf: jax.ShapeDtypeStruct, *, is_stacked: bool) -> Array:
    shape = tuple(leaf.shape[1:]) if is_stacked else tuple(leaf.shape)
    for name in names:
        # All layers are compared before any is read.
        if name not in files or files.shape(name) != shape:
            stored_shape = files.shape(name) if name in files else "absent"
            raise ValueError(
                f"{files.directory}: {name} is {stored_shape} there, and {shape} in the model: these are the "
                "weights of another"
            )

    # Called for every shard: a device's part of a tensor is all that is read for it.
    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index, "parameters have dims"
        if not is_stacked:
            return files.read(names[0], index).astype(leaf.dtype)
        # The first dim of the index selects layers, and the rest a part of each.
        return np.stack([files.read(name, index[1:]).astype(leaf.dtype) for name in names[index[0]]])

    # Without a mesh, callers give shapes alone.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(leaf.shape, sharding, part)
