"""A stored model of a run directory or of an imported model directory, read for export."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.checkpoints import loading, safetensors_files
from slmjax.checkpoints.safetensors_files import StoredFormat
from slmjax.formats.coding import Encoded
from slmjax.models.architecture import ModelConfig
from slmjax.models.paths import logical_paths

ROWS_PER_TOKEN = ("embed/table", "head/weight")  # tables that may be padded beyond the vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalModel:
    """A model of ours: of a run directory, or one that was imported."""

    path: Path
    config: ModelConfig
    read: Callable[
        [str], np.ndarray
    ]  # a parameter by logical path, what the model multiplies with; tables without their padding
    dtype: Callable[[str], np.dtype]  # that it is stored in
    formats: Mapping[str, StoredFormat]  # of the parameters that are quantized
    encoded: Callable[
        [str], Encoded
    ]  # the codes and scales of one of those, as NumPy arrays; tables without their padding
    family: str | None  # where an imported one came from
    step: int | None  # of a run: its checkpoint
    # Rows of codes that are not those of the devices it was trained on, and all rows; None where that is not
    # known.
    changed_rows: tuple[int, int] | None = None


def open_local_model(path: Path, *, step: int | None = None) -> LocalModel:
    """A model of ours, to be exported. Raises ValueError as `load_model` does."""
    if safetensors_files.is_imported(path):
        model = loading.read_config(path)
        files = safetensors_files.ModelFiles(path)
        return LocalModel(
            path=path,
            config=model,
            read=lambda name: _unpadded(name, files.read(name), model),
            dtype=files.dtype,
            formats=files.formats,
            encoded=lambda name: _unpadded_codes(name, files.encoded(name), model),
            family=read_origin(path).get("family"),
            step=None,
        )
    loaded, coded = loading.load_with_codes(path, step=step)
    places: dict[str, tuple[str, int | None]] = {}
    arrays = {**loaded.params, **loaded.buffers}
    for name in arrays:
        logical = logical_paths(loaded.definition.config, name)
        places |= {
            one: (name, index if name.startswith("segments/") else None) for index, one in enumerate(logical)
        }

    def read(name: str) -> np.ndarray:
        stacked, index = places[name]
        return _unpadded(
            name, np.asarray(arrays[stacked] if index is None else arrays[stacked][index]), loaded.config
        )

    return LocalModel(
        path=path,
        config=loaded.config,
        read=read,
        dtype=lambda name: np.dtype(np.float32),
        family=None,
        step=loaded.step,
        formats={
            name: StoredFormat(spec=numbers.spec, axis=numbers.axis) for name, (numbers, _) in coded.items()
        },
        encoded=lambda name: _unpadded_codes(name, coded[name][1], loaded.config),
        changed_rows=loading.changed_rows(loaded, coded) if coded else None,
    )


def _unpadded(name: str, array: np.ndarray, model: ModelConfig) -> np.ndarray:
    return array[: model.known_vocab_size] if name in ROWS_PER_TOKEN else array


def _unpadded_codes(name: str, encoded: Encoded, model: ModelConfig) -> Encoded:
    """Codes of a table and what belongs to its rows, without the padding."""
    rows = encoded.codes.shape[0]

    def part(array: np.ndarray | None) -> np.ndarray | None:
        return _unpadded(name, array, model) if array is not None and array.shape[:1] == (rows,) else array

    return dataclasses.replace(
        encoded, codes=part(encoded.codes), scale=part(encoded.scale), zero=part(encoded.zero)
    )


def read_origin(path: Path) -> dict[str, Any]:
    """What the directory of an imported model says of where it came from; empty for a run."""
    file = path / "origin.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
