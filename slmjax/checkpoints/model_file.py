"""`model.json` of a run's or an imported model's directory: the architecture, and its phases of quantization.

The phases are under `quant`, next to the fields of `ModelConfig`: {"embed_dim": 256, ..., "quant": [...]}.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmjax import config as config_io
from slmjax.models.architecture import ModelConfig
from slmjax.quantization.rules import QuantPhase, check_phases
from slmjax.stored_json import read_object

NAME = "model.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Phases:
    """What model.json has in addition to the architecture."""

    quant: tuple[QuantPhase, ...] = config_io.added_field((), before=())

    def __post_init__(self) -> None:
        check_phases(self.quant)


def model_json(config: ModelConfig, *, phases: Sequence[QuantPhase] = ()) -> dict[str, Any]:
    """Return the contents of model.json; without phases the model is in floating point."""
    # One flat object: files without `quant`, of older versions, are read like models in floating point.
    return {**config_io.to_json(config), **config_io.to_json(_Phases(quant=tuple(phases)))}


def write_model_file(directory: Path, config: ModelConfig, *, phases: Sequence[QuantPhase] = ()) -> None:
    """Write model.json into a directory."""
    # `allow_nan=False`: NaN and Infinity are not JSON, and other readers refuse them.
    text = json.dumps(model_json(config, phases=phases), indent=2, ensure_ascii=False, allow_nan=False)
    (directory / NAME).write_text(text + "\n", encoding="utf-8")


def read_config(path: Path) -> ModelConfig:
    """Return the architecture in a run's or an imported model's directory.

    Raises:
      ValueError: this is no such directory, or its model.json is damaged.
    """
    try:
        return config_io.read_file(ModelConfig, _file(path))
    except config_io.ConfigError as error:
        raise ValueError(f"{error}. {_REMEDY.capitalize()}") from error


def read_quant_phases(path: Path) -> tuple[QuantPhase, ...]:
    """Return the phases of quantization of a run or an imported model; empty where it has none.

    Raises:
      ValueError: as `read_config`.
    """
    file = _file(path)
    # The architecture is checked by `read_config`: here only the phases are read.
    fields = read_object(file, remedy=_REMEDY)
    try:
        return config_io.from_json(_Phases, {"quant": fields.get("quant", [])}).quant
    except ValueError as error:
        raise ValueError(f"{file}: {error}. {_REMEDY.capitalize()}") from error


_REMEDY = "copy it again from where the model is from, or restore it from a backup"


def _file(path: Path) -> Path:
    if not (path / NAME).is_file():
        raise ValueError(
            f"{path} is neither a run directory nor an imported model: it has no {NAME}. Name the directory "
            "that the last line of `slmjax train` printed, or one that `slmjax import` wrote"
        )
    return path / NAME
