"""A stored model of a run directory or of an imported model directory, read for export."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.checkpoints import loading, safetensors_files
from slmjax.checkpoints.safetensors_files import StoredFormat
from slmjax.formats.coding import Encoded
from slmjax.models.architecture import ModelConfig
from slmjax.models.paths import logical_paths
from slmjax.stored_json import read_object

# tables that may be padded beyond the vocabulary
ROWS_PER_TOKEN = ("embed/table", "embed/per_layer", "head/weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalModel:
    """A model of a run directory or of an imported model's directory; tables are without their padding."""

    path: Path
    config: ModelConfig
    # a parameter by logical path, as layers multiply with it: dequantized where it has a format
    read: Callable[[str], np.ndarray]
    dtype: Callable[[str], np.dtype]  # that a parameter is stored in
    formats: Mapping[str, StoredFormat]  # of the parameters that are quantized
    encoded: Callable[[str], Encoded]  # codes and scales of a quantized parameter, as NumPy arrays
    family: str | None  # of an imported model
    step: int | None  # of a run's checkpoint
    # rows of codes that differ from those on the training devices, and all rows; None where that is unknown
    changed_rows: tuple[int, int] | None = None


def open_local_model(path: Path, *, step: int | None = None) -> LocalModel:
    """Return the model of a directory, to be exported. Raises ValueError as `load_model` does."""
    return _open_imported(path) if safetensors_files.is_imported(path) else _open_run(path, step=step)


def _open_imported(path: Path) -> LocalModel:
    # Imported models are read from their files, without a model on a device: they may be larger than its
    # memory.
    config = loading.read_config(path)
    files = safetensors_files.ModelFiles(path)
    return LocalModel(
        path=path,
        config=config,
        read=lambda name: _unpadded(name, files.read(name), config),
        dtype=files.dtype,
        formats=files.formats,
        encoded=lambda name: _unpadded_codes(name, files.encoded(name), config),
        family=read_origin(path).get("family"),
        step=None,
    )


def _open_run(path: Path, *, step: int | None) -> LocalModel:
    loaded, codes = loading.load_with_codes(path, step=step)
    arrays = {**loaded.params, **loaded.buffers}
    # Logical path -> stack path, and the index of the layer in a stacked array.
    index_of: dict[str, tuple[str, int | None]] = {}
    for stack_path in arrays:
        is_stacked = stack_path.startswith("segments/")
        for index, name in enumerate(logical_paths(loaded.definition.config, stack_path)):
            index_of[name] = (stack_path, index if is_stacked else None)

    def read(name: str) -> np.ndarray:
        stack_path, index = index_of[name]
        # Layers of a group are stacked along a first dim.
        array = arrays[stack_path] if index is None else arrays[stack_path][index]
        return _unpadded(name, np.asarray(array), loaded.config)

    return LocalModel(
        path=path,
        config=loaded.config,
        read=read,
        # Runs store their parameters in float32, whatever precision they compute in.
        dtype=lambda name: np.dtype(np.float32),
        family=None,
        step=loaded.step,
        formats={
            name: StoredFormat(spec=tensor_quant.spec, axis=tensor_quant.axis)
            for name, (tensor_quant, _) in codes.items()
        },
        encoded=lambda name: _unpadded_codes(name, codes[name][1], loaded.config),
        # Codes are computed here from stored weights: checksums show whether training had the same ones.
        changed_rows=loading.changed_rows(loaded, codes) if codes else None,
    )


def _unpadded(name: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    # Padding is for the devices of the training, and of no use to another engine.
    return array[: config.known_vocab_size] if name in ROWS_PER_TOKEN else array


def _unpadded_codes(name: str, encoded: Encoded, config: ModelConfig) -> Encoded:
    """Codes, scales and zero points of a table without its padding."""
    rows = encoded.codes.shape[0]

    # Of scales and zero points only those that have a row for each token have padding.
    def part(array: np.ndarray | None) -> np.ndarray | None:
        return _unpadded(name, array, config) if array is not None and array.shape[:1] == (rows,) else array

    return dataclasses.replace(
        encoded, codes=part(encoded.codes), scale=part(encoded.scale), zero=part(encoded.zero)
    )


def read_origin(path: Path) -> dict[str, Any]:
    """Return the record of where an imported model came from; empty for a run.

    Raises:
      ValueError: it is damaged.
    """
    file = path / "origin.json"
    if not file.is_file():
        return {}
    fields: dict[str, type] = {"family": str, "license": str, "files": dict, "quantized": dict}
    remedy = "import the model again, or delete the file: exports then lack its source and licence"
    return read_object(file, optional={**fields, "experiment": dict}, remedy=remedy)
