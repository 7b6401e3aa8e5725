"""Hugging Face directories: config.json, safetensors and tokenizer.json, read and written by our own code.

Only families of `families/` are read, only keys that they understand, and only JSON and safetensors: nothing
from a model's directory is run.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.checkpoints import safetensors_files
from slmjax.checkpoints.stored_model import LocalModel
from slmjax.config import ConfigError, near_names
from slmjax.convert.families import HF_FAMILIES, HF_NAMES
from slmjax.convert.family import (
    BoundRule,
    Family,
    TensorMap,
    bind,
    misnamed,
    ours_from,
    read_settings,
    rounded,
    theirs_from,
)
from slmjax.convert.source import FamilyExport, ForeignModel, express
from slmjax.data.shards import file_sha256
from slmjax.data.tokenizers import Tokenizer
from slmjax.telemetry.run_directory import write_json

LARGEST_FILE = 2**30  # bytes


# Reading ----------------------------------------------------------------------------------------------------
def open_directory(directory: Path) -> ForeignModel:
    """The model of a Hugging Face directory.

    Raises:
      ValueError: the directory lacks something, or what it says is not understood; the message names it.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} is no Hugging Face model: it has no config.json. A GGUF file is named by its own "
            "path"
        )
    values = _read_json(path)
    if values.get("quantization_config"):
        raise ConfigError(
            f"{path}: the weights are packed ({values['quantization_config']}), and packed safetensors are "
            "not read: take the release "
            "that is not quantized, or a GGUF file"
        )
    family = _family_of(values, path)
    notes: list[str] = []
    model = read_settings(family, values, where=str(path), notes=notes)
    tensors = safetensors_files.TensorFiles(directory)
    table = family.table_of(model)
    bound = _as_saved(bind(table, model), table, set(tensors.names))
    _check_names(family.architecture, table, bound, tensors)
    return ForeignModel(
        config=model,
        family=family.architecture,
        parameters=lambda: ours_from(bound, tensors.read),
        tokenizer=lambda: _tokenizer(directory, values),
        about={
            "format": "hf",
            "family": family.architecture,
            "source": str(directory.absolute()),
            "config": values,
            "files": {file.name: file_sha256(file) for file in tensors.files},
            "license": _license(directory),
        },
        notes=tuple(notes),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it anew") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no table of settings")
    return values


def _family_of(values: dict[str, Any], path: Path) -> Family:
    listed = values.get("architectures") or []
    names = listed if isinstance(listed, list) else [listed]
    known = {family.architecture: family for family in HF_FAMILIES}
    for name in names:
        if name in known:
            return known[name]
    named = ", ".join(map(str, names)) or "nothing under architectures"
    raise ConfigError(
        f"{path} names {named}, and these are read: {', '.join(known)}.{near_names(named, known)}"
    )


def _as_saved(bound: list[BoundRule], table: TensorMap, found: set[str]) -> list[BoundRule]:
    """The rules with the names of a model that was saved without its head, and so without what stands before
    the names below it.
    """
    base = table.base
    if found & {name for one in bound for name in one.theirs if name.startswith(base)}:
        return bound
    return [
        dataclasses.replace(one, theirs=[name.removeprefix(base) for name in one.theirs]) for one in bound
    ]


def _check_names(
    architecture: str, table: TensorMap, bound: list[BoundRule], tensors: safetensors_files.TensorFiles
) -> None:
    missing, extra = misnamed(table, bound, set(tensors.names))
    if missing:
        raise ValueError(
            f"{tensors.directory} has no tensor {missing[0]} ({len(missing)} such): weights and "
            "configuration do not belong together"
        )
    if extra == ["lm_head.weight"]:
        embedding = next(one.theirs[0] for one in bound if one.ours == ["embed/table"])
        if np.array_equal(tensors.read("lm_head.weight"), tensors.read(embedding)):
            return
        raise ValueError(
            "the configuration ties the output to the embedding, and lm_head.weight differs from it: set "
            "tie_word_embeddings to false"
        )
    if extra:
        raise ValueError(
            f"{tensors.directory} holds {extra[0]} ({len(extra)} such), which {architecture} has no place for"
        )


def _tokenizer(directory: Path, values: dict[str, Any]) -> Tokenizer | None:
    """The directory's tokenizer, with every token that ends a text or a turn."""
    if not (directory / "tokenizer.json").is_file():
        return None
    path = directory / "generation_config.json"
    generation = _read_json(path) if path.is_file() else {}
    listed = {
        kind: generation.get(f"{kind}_token_id", values.get(f"{kind}_token_id")) for kind in ("bos", "eos")
    }
    ids = {
        kind: [id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int)]
        for kind, value in listed.items()
    }
    model_ids = {kind: next(iter(found), None) for kind, found in ids.items()}
    tokenizer = Tokenizer.load(directory, model_ids=model_ids)
    names = [
        name for id in ids["eos"] if id != tokenizer.eos_id and (name := tokenizer.name_of(id)) is not None
    ]
    return Tokenizer.load(directory, ends=names, model_ids=model_ids) if names else tokenizer


def _license(directory: Path) -> str | None:
    """The licence that the head of the model's README names, with its own name where it has one."""
    readme = directory / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    head = re.match(r"---\s*\n(.*?)\n---", text, flags=re.DOTALL)
    keys = (
        dict(re.findall(r"^(license(?:_name)?):[ \t]*([^\n]*)$", head.group(1), flags=re.MULTILINE))
        if head
        else {}
    )
    listed = (
        re.search(r"^license:[ \t]*\n[ \t]*-[ \t]*([^\n]*)", head.group(1), flags=re.MULTILINE)
        if head
        else None
    )
    named = [keys.get("license") or (listed.group(1) if listed else ""), keys.get("license_name", "")]
    return ", ".join(word for word in (name.strip().strip("\"'") for name in named) if word) or None


# Writing ----------------------------------------------------------------------------------------------------
def write_directory(
    own: LocalModel, tokenizer: Tokenizer, out: Path, *, dtype: np.dtype | None
) -> FamilyExport:
    """Writes a model of ours as a Hugging Face directory, and says as which family.

    Args:
      dtype: of the weights; None for the one they are stored in.

    Raises:
      ValueError: no family can express it.
    """
    expressed = express(
        own.config,
        HF_FAMILIES,
        format_name="Hugging Face",
        preferred=HF_NAMES.get(own.family or "", own.family),
    )
    stored = np.dtype(dtype or own.dtype("embed/table"))
    ends = list(tokenizer.end_ids)
    ids = {
        "bos_token_id": tokenizer.bos_id if tokenizer.has_bos else None,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": None if tokenizer.pad is None else tokenizer.special_ids.get(tokenizer.pad),
    }
    config = {
        "architectures": [expressed.family.architecture],
        **expressed.settings,
        "dtype": stored.name,
        "torch_dtype": stored.name,
        "initializer_range": own.config.init_std,
        **ids,
    }
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", ids)
    safetensors_files.write_tensors(
        out, _converted(theirs_from(expressed.bound, own.read), dtype), largest_file=LARGEST_FILE
    )
    tokenizer.save(out)
    return expressed


def _converted(
    tensors: Iterator[tuple[str, np.ndarray]], dtype: np.dtype | None
) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in tensors:
        yield name, rounded(name, array, dtype)
