"""A foreign model, whatever its format, and the choice of a family for a model that is exported."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from slmjax.checkpoints.stored_model import LocalModel
from slmjax.convert.family import BoundRule, Family, Inexpressible, bind
from slmjax.convert.folding import folded
from slmjax.data.tokenizers import Tokenizer
from slmjax.models.architecture import ModelConfig
from slmjax.models.canonical_form import canonical, differences
from slmjax.models.parameterization import Parameterization
from slmjax.stored_json import read_object


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A model of another library. Only headers are read until its parameters are."""

    config: ModelConfig
    family: str  # name of the architecture in the format
    # our parameters by logical path, in the stored dtype
    parameters: Callable[[], Iterator[tuple[str, np.ndarray]]]
    tokenizer: Callable[[], Tokenizer | None]  # returns None if there is none
    about: dict[str, Any]  # origin of the model, for origin.json
    notes: tuple[str, ...] = ()  # for the user who imports it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """Summary of an import or an export."""

    path: str
    family: str  # name of the architecture in the format
    parameters: int
    bytes: int  # of the weights, as stored
    notes: tuple[str, ...]  # for the user


def code_notes(local_model: LocalModel) -> Iterator[str]:
    """Yield notes on codes that may differ from those of the training.

    Codes are computed when a checkpoint is exported. Another kind of device may sum in another order, and so
    round to another code.
    """
    # Imported models have no such file: their codes were not trained here.
    file = local_model.path / "environment.json"
    environment = read_object(file, optional={"devices": list}, remedy="delete it") if file.is_file() else {}
    trained = environment.get("devices") or []
    here = jax.devices()[0].device_kind
    there = trained[0] if trained else "unknown devices"
    if local_model.changed_rows is None:
        # Checkpoints of older versions have no checksums of codes, so the kind of device is all that is
        # known.
        if local_model.step is not None and trained and there != here:
            yield (
                f"codes were computed on {here}, but the run was trained on {there}, and its checkpoint does "
                "not record whether the codes are the same. Export on the devices of the training, or "
                "measure the effect with verify-export"
            )
        return
    changed, rows = local_model.changed_rows
    if changed:
        yield (
            f"codes or scales of {changed:,} of {rows:,} rows differ from those of training: they were "
            f"computed on {here}, and the run was trained on {there}. Export on the devices of the training, "
            "or measure the effect with verify-export"
        )
    # On the same kind of device equal codes are what a user expects, and need no note.
    elif there != here:
        yield (
            f"codes were computed on {here} and match those of training on {there}: sums of the codes of "
            f"{rows:,} rows were compared"
        )


# Choice of a family -----------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyExport:
    """A model as a family represents it."""

    family: Family
    config: ModelConfig  # in canonical form
    settings: dict[str, Any]  # keys of the family's configuration
    rules: list[BoundRule]  # for its tensors


def choose_export(
    local_model: LocalModel,
    families: Sequence[Family],
    *,
    format_name: str,
    preferred: str | None,
    keeps_codes: bool,
    tolerance: float = 0.0,
) -> tuple[FamilyExport, LocalModel]:
    """Return the first family that represents a model exactly, and the model as it is written.

    If no family has fields for the multipliers of its parameterization, these become part of its weights.

    Args:
      local_model: the model.
      families: in order of preference.
      format_name: name of the format, for messages.
      preferred: the architecture to try first.
      keeps_codes: whether quantized weights are written as codes, which cannot be multiplied.
      tolerance: relative, of numbers that are read back, if the format rounds them.

    Raises:
      ValueError: there is none, or codes would have to be multiplied.
    """

    def choose(model: ModelConfig) -> FamilyExport:
        return choose_family(
            model, families, format_name=format_name, preferred=preferred, tolerance=tolerance
        )

    if local_model.config.parameterization is Parameterization.STANDARD:
        return choose(local_model.config), local_model
    try:
        return choose(local_model.config), local_model
    except ValueError as error:
        plain = folded(local_model, keeps_codes=keeps_codes)
        try:
            return choose(plain.config), plain
        except ValueError as other:
            raise other from error


def choose_family(
    model: ModelConfig,
    families: Sequence[Family],
    *,
    format_name: str,
    preferred: str | None,
    tolerance: float = 0.0,
) -> FamilyExport:
    """Return the first family that represents a model exactly.

    Its configuration must read back as the same model, and it must have a tensor for each parameter.

    Args:
      preferred: the architecture to try first.
      tolerance: relative, of numbers that are read back, if the format rounds them.

    Raises:
      ValueError: there is none; the message names what the nearest families cannot represent.
    """
    config = canonical(model)
    # (number of differences, text): the fewer, the nearer. Refusals count as many.
    reasons: list[tuple[int, str]] = []
    # A stable sort: all other families stay in the order of preference.
    for family in sorted(families, key=lambda family: family.architecture != preferred):
        try:
            settings = family.write(config)
            reader = family.settings(settings, where=f"{family.architecture} as written")
            # What the format cannot represent shows as a difference, so that writers need not check
            # everything.
            # The model is also compared after a round trip: a reader and a writer that disagree would change
            # it silently.
            read_back = canonical(family.read(reader))
            reader.finish()
            if not (lost := differences(config, read_back, tolerance=tolerance)):
                rules = bind(family.tensor_map_for(config), config)
                return FamilyExport(family=family, config=config, settings=settings, rules=rules)
            reasons.append((len(lost), f"as {family.architecture}, it would lose {'; '.join(lost[:3])}"))
        except Inexpressible as error:
            # A refusal by a writer stops at the first reason, so that differences cannot be counted.
            reasons.append((50, f"as {family.architecture}: {error}"))
        except ValueError as error:
            # An error of the reader is the least specific reason, and ranks last.
            reasons.append((99, f"as {family.architecture}: {error}"))
    nearest = "\n  ".join(reason for _, reason in sorted(reasons, key=lambda item: item[0])[:3])
    raise ValueError(f"no family of {format_name} can represent this model:\n  {nearest}")
