"""A model as it was found, whatever its format, and a model of ours on its way out."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from slmjax.checkpoints.stored_model import LocalModel
from slmjax.convert.family import BoundRule, Family, Inexpressible, bind
from slmjax.data.tokenizers import Tokenizer
from slmjax.models.architecture import ModelConfig
from slmjax.models.canonical_form import canonical, differences


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A model from elsewhere. Nothing is read but headers until its parameters are asked for."""

    config: ModelConfig
    family: str  # what its format calls the architecture
    parameters: Callable[
        [], Iterator[tuple[str, np.ndarray]]
    ]  # by logical path, in the dtype they are stored in
    tokenizer: Callable[[], Tokenizer | None]  # None where there is none
    about: dict[str, Any]  # where it comes from: for the record
    notes: tuple[str, ...] = ()  # what whoever imports it should know


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What an import or an export wrote."""

    path: str
    family: str  # the architecture, as the format calls it
    parameters: int  # numbers in all weights
    bytes: int  # of the weights, as stored
    notes: tuple[str, ...]  # what its user should know


def code_notes(own: LocalModel) -> Iterator[str]:
    """Whether codes that are computed here are those of the devices that a run was trained on."""
    file = own.path / "environment.json"
    trained = json.loads(file.read_text(encoding="utf-8")).get("devices", []) if file.is_file() else []
    here = jax.devices()[0].device_kind
    there = trained[0] if trained else "unknown devices"
    if own.changed_rows is None:
        if own.step is not None and trained and there != here:
            yield (
                f"codes were computed on {here}, and the run was trained on {there}: its checkpoint does not "
                "tell whether they are alike. "
                "Export where it was trained, or see with verify-export what it changes"
            )
        return
    changed, rows = own.changed_rows
    if changed:
        yield (
            f"codes or scales of {changed:,} of {rows:,} rows are not those of training: they were computed "
            f"on {here}, and the run was "
            f"trained on {there}. Export where it was trained, or see with verify-export what it changes"
        )
    elif there != here:
        yield f"codes were computed on {here} and are those of training on {there}: sums of {rows:,} rows were compared"


# Which family can say it ------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyExport:
    """A model in the words of a family."""

    family: Family
    config: ModelConfig  # in canonical form
    settings: dict[str, Any]
    bound: list[BoundRule]  # what its tensors are made of


def express(
    model: ModelConfig,
    families: Sequence[Family],
    *,
    format_name: str,
    preferred: str | None,
    tolerance: float = 0.0,
) -> FamilyExport:
    """The first family whose configuration reads back as the very same model and that has a tensor for each
    parameter.

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
                return FamilyExport(
                    family=family,
                    config=wanted,
                    settings=settings,
                    bound=bind(family.table_of(wanted), wanted),
                )
            reasons.append((len(lost), f"as {family.architecture}, it would lose {'; '.join(lost[:3])}"))
        except Inexpressible as error:
            reasons.append((50, f"as {family.architecture}: {error}"))
        except ValueError as error:
            reasons.append((99, f"as {family.architecture}: {error}"))
    nearest = "\n  ".join(reason for _, reason in sorted(reasons, key=lambda item: item[0])[:3])
    raise ValueError(f"no family of {format_name} can say what this model is:\n  {nearest}")
