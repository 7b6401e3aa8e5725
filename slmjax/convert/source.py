"""A model as it was found, whatever its format, and a model of ours on its way out."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slmjax import loading, weights
from slmjax.architecture import ModelConfig
from slmjax.convert.canonical_form import canonical, differences
from slmjax.convert.family import Bound, Family, Inexpressible, bind
from slmjax.data.tokenizers import Tokenizer
from slmjax.formats.coding import Encoded
from slmjax.paths import logical_paths
from slmjax.weights import StoredFormat

ROWS_PER_TOKEN = ("embed/table", "head/weight")  # tables that may be padded beyond the vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A model from elsewhere. Nothing is read but headers until its parameters are asked for."""

    config: ModelConfig
    family: str  # what its format calls the architecture
    parameters: Callable[[], Iterator[tuple[str, np.ndarray]]]  # by logical path, in the dtype they are stored in
    tokenizer: Callable[[], Tokenizer | None]  # None where there is none
    about: dict[str, Any]  # where it comes from: for the record
    notes: tuple[str, ...] = ()  # what whoever imports it should know


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own:
    """A model of ours: of a run directory, or one that was imported."""

    path: Path
    config: ModelConfig
    read: Callable[[str], np.ndarray]  # a parameter by logical path, what the model multiplies with; tables without their padding
    dtype: Callable[[str], np.dtype]  # that it is stored in
    formats: Mapping[str, StoredFormat]  # of the parameters that are quantized
    encoded: Callable[[str], Encoded]  # the codes and scales of one of those, as NumPy arrays; tables without their padding
    family: str | None  # where an imported one came from
    step: int | None  # of a run: its checkpoint
    # Rows of codes that are not those of the devices it was trained on, and all rows; None where that is not known.
    changed_rows: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What an import or an export wrote."""

    path: str
    family: str  # the architecture, as the format calls it
    parameters: int  # numbers in all weights
    bytes: int  # of the weights, as stored
    notes: tuple[str, ...]  # what its user should know


def open_own(path: Path, *, step: int | None = None) -> Own:
    """A model of ours, to be exported. Raises ValueError as `load_model` does."""
    if weights.is_imported(path):
        model = loading.read_config(path)
        files = weights.ModelFiles(path)
        return Own(
            path=path, config=model, read=lambda name: _unpadded(name, files.read(name), model), dtype=files.dtype,
            formats=files.formats, encoded=lambda name: _unpadded_codes(name, files.encoded(name), model),
            family=read_origin(path).get("family"), step=None,
        )  # fmt: skip
    loaded, coded = loading.load_with_codes(path, step=step)
    places: dict[str, tuple[str, int | None]] = {}
    arrays = {**loaded.params, **loaded.buffers}
    for name in arrays:
        logical = logical_paths(loaded.definition.config, name)
        places |= {one: (name, index if name.startswith("segments/") else None) for index, one in enumerate(logical)}

    def read(name: str) -> np.ndarray:
        stacked, index = places[name]
        return _unpadded(name, np.asarray(arrays[stacked] if index is None else arrays[stacked][index]), loaded.config)

    return Own(
        path=path, config=loaded.config, read=read, dtype=lambda name: np.dtype(np.float32), family=None, step=loaded.step,
        formats={name: StoredFormat(spec=numbers.spec, axis=numbers.axis) for name, (numbers, _) in coded.items()},
        encoded=lambda name: _unpadded_codes(name, coded[name][1], loaded.config),
        changed_rows=loading.changed_rows(loaded, coded) if coded else None,
    )  # fmt: skip


def _unpadded(name: str, array: np.ndarray, model: ModelConfig) -> np.ndarray:
    return array[: model.known_vocab_size] if name in ROWS_PER_TOKEN else array


def _unpadded_codes(name: str, encoded: Encoded, model: ModelConfig) -> Encoded:
    """Codes of a table and what belongs to its rows, without the padding."""
    rows = encoded.codes.shape[0]

    def part(array: np.ndarray | None) -> np.ndarray | None:
        return _unpadded(name, array, model) if array is not None and array.shape[:1] == (rows,) else array

    return dataclasses.replace(encoded, codes=part(encoded.codes), scale=part(encoded.scale), zero=part(encoded.zero))


def read_origin(path: Path) -> dict[str, Any]:
    """What the directory of an imported model says of where it came from; empty for a run."""
    file = path / "origin.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def code_notes(own: Own) -> Iterator[str]:
    """Whether codes that are computed here are those of the devices that a run was trained on."""
    file = own.path / "environment.json"
    trained = json.loads(file.read_text(encoding="utf-8")).get("devices", []) if file.is_file() else []
    here, there = jax.devices()[0].device_kind, trained[0] if trained else "unknown devices"
    if own.changed_rows is None:
        if own.step is not None and trained and there != here:
            yield (
                f"codes were computed on {here}, and the run was trained on {there}: its checkpoint does not tell whether they are alike. "
                "Export where it was trained, or see with verify-export what it changes"
            )
        return
    changed, rows = own.changed_rows
    if changed:
        yield (
            f"codes or scales of {changed:,} of {rows:,} rows are not those of training: they were computed on {here}, and the run was "
            f"trained on {there}. Export where it was trained, or see with verify-export what it changes"
        )
    elif there != here:
        yield f"codes were computed on {here} and are those of training on {there}: sums of {rows:,} rows were compared"


# Which family can say it ----------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Expressed:
    """A model in the words of a family."""

    family: Family
    config: ModelConfig  # in canonical form
    settings: dict[str, Any]
    bound: list[Bound]  # what its tensors are made of


def express(
    model: ModelConfig, families: Sequence[Family], *, format_name: str, preferred: str | None, tolerance: float = 0.0
) -> Expressed:
    """The first family whose configuration reads back as the very same model and that has a tensor for each parameter.

    Args:
      preferred: the architecture that is tried before others.
      tolerance: of numbers that are read back, where the format rounds them.

    Raises:
      ValueError: none does; it tells for the nearest what it cannot say.
    """
    wanted = canonical(model)
    reasons: list[tuple[int, str]] = []
    for family in sorted(families, key=lambda family: family.architecture != preferred):
        try:
            settings = family.write(wanted)
            reader = family.settings(settings, where=f"{family.architecture} as written")
            found = canonical(family.read(reader))
            reader.finish()
            if not (lost := differences(wanted, found, tolerance=tolerance)):
                return Expressed(family=family, config=wanted, settings=settings, bound=bind(family.table_of(wanted), wanted))
            reasons.append((len(lost), f"as {family.architecture}, it would lose {'; '.join(lost[:3])}"))
        except Inexpressible as error:
            reasons.append((50, f"as {family.architecture}: {error}"))
        except ValueError as error:
            reasons.append((99, f"as {family.architecture}: {error}"))
    nearest = "\n  ".join(reason for _, reason in sorted(reasons, key=lambda item: item[0])[:3])
    raise ValueError(f"no family of {format_name} can say what this model is:\n  {nearest}")
