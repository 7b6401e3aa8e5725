"""Hugging Face directories: config.json, safetensors and tokenizer.json.

Only the families in `families/` and the keys they support are read, and only JSON and safetensors: nothing
from a model's directory is run.
"""

import dataclasses
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
    cast_tensor,
    foreign_tensors,
    local_parameters,
    missing_and_extra,
    read_settings,
)
from slmjax.convert.source import FamilyExport, ForeignModel, choose_export
from slmjax.data.shards import file_sha256
from slmjax.data.tokenizers import Tokenizer
from slmjax.stored_json import read_object
from slmjax.telemetry.run_directory import write_json

# Files of this size can be downloaded in parallel, and fit in the memory of most machines.
LARGEST_FILE = 2**30  # bytes


_REMEDY = "copy it again from the model's directory"


# Reading ----------------------------------------------------------------------------------------------------
def open_directory(directory: Path) -> ForeignModel:
    """Open the model in a Hugging Face directory.

    Raises:
      ValueError: a file is missing, damaged or not supported; the message names it.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} is not a Hugging Face model: it has no config.json. For a GGUF file, give the path "
            "of the file"
        )
    values = read_object(path, remedy=_REMEDY)
    # Packed weights have other tensor names and shapes: without this check, the error would be about a
    # missing tensor.
    if values.get("quantization_config"):
        raise ConfigError(
            f"{path}: the weights are packed ({values['quantization_config']}), and packed safetensors are "
            "not supported: use a release that is not quantized, or a GGUF file"
        )
    family = _family_of(values, path)
    notes: list[str] = []
    model = read_settings(family, values, where=str(path), notes=notes)
    tensors = safetensors_files.TensorFiles(directory)
    tensor_map = family.tensor_map_for(model)
    # Names are checked before any weights are read.
    rules = _as_saved(bind(tensor_map, model), tensor_map, set(tensors.names))
    _check_names(family.architecture, tensor_map, rules, tensors)
    return ForeignModel(
        config=model,
        family=family.architecture,
        parameters=lambda: local_parameters(rules, tensors.read, where=str(directory)),
        # Lazy, since a caller that brings its own tokenizer must not fail on a damaged one.
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


def _family_of(values: dict[str, Any], path: Path) -> Family:
    # transformers writes a list; hand-written files often have a single name.
    listed = values.get("architectures") or []
    names = listed if isinstance(listed, list) else [listed]
    known = {family.architecture: family for family in HF_FAMILIES}
    for name in names:
        if isinstance(name, str) and name in known:
            return known[name]
    named = ", ".join(map(str, names)) or "nothing under architectures"
    raise ConfigError(f"{path} names {named}; supported are {', '.join(known)}.{near_names(named, known)}")


def _as_saved(rules: list[BoundRule], tensor_map: TensorMap, names: set[str]) -> list[BoundRule]:
    """Adapt the rules to the names of a file, which lack the prefix `base` if it was saved without a head."""
    # transformers saves a bare model, such as `LlamaModel`, without the prefix of its head's class.
    base = tensor_map.base
    rules = [
        dataclasses.replace(rule, theirs=[_name_in_file(name, tensor_map, names) for name in rule.theirs])
        for rule in rules
    ]
    if names & {name for rule in rules for name in rule.theirs if name.startswith(base)}:
        return rules
    return [
        dataclasses.replace(rule, theirs=[name.removeprefix(base) for name in rule.theirs]) for rule in rules
    ]


def _name_in_file(name: str, tensor_map: TensorMap, names: set[str]) -> str:
    others = (name.replace(part, other) for part, other in tensor_map.other_names)
    return name if name in names else next((other for other in others if other in names), name)


def _check_names(
    architecture: str, tensor_map: TensorMap, rules: list[BoundRule], tensors: safetensors_files.TensorFiles
) -> None:
    missing, extra = missing_and_extra(tensor_map, rules, set(tensors.names))
    if missing:
        raise ValueError(
            f"{tensors.directory} lacks tensor {missing[0]} ({len(missing)} missing): weights and "
            "configuration do not belong together"
        )
    # Some releases store the tied head a second time.
    if extra == ["lm_head.weight"]:
        embedding = next(rule.theirs[0] for rule in rules if rule.ours == ["embed/table"])
        if np.array_equal(tensors.read("lm_head.weight"), tensors.read(embedding)):
            return
        raise ValueError(
            "the configuration ties the output to the embedding, but lm_head.weight differs from it: set "
            "tie_word_embeddings to false"
        )
    if extra:
        raise ValueError(
            f"{tensors.directory} has tensor {extra[0]} ({len(extra)} unexpected), which {architecture} does "
            "not have"
        )


def _tokenizer(directory: Path, values: dict[str, Any]) -> Tokenizer | None:
    """Load the directory's tokenizer, with every token that ends a text or a turn."""
    if not (directory / "tokenizer.json").is_file():
        return None
    # For chats, generation_config.json lists more ends than config.json: it takes precedence, as in
    # transformers.
    path = directory / "generation_config.json"
    generation = read_object(path, remedy=_REMEDY) if path.is_file() else {}
    listed = {
        kind: generation.get(f"{kind}_token_id", values.get(f"{kind}_token_id")) for kind in ("bos", "eos")
    }
    ids = {
        # An id may be one integer, a list, or null.
        kind: [id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int)]
        for kind, value in listed.items()
    }
    # The first id is the one that ends a text; the others end turns.
    model_ids = {kind: next(iter(role_ids), None) for kind, role_ids in ids.items()}
    # Ids have names only in a loaded tokenizer: it is loaded again if there are further ends.
    tokenizer = Tokenizer.load(directory, model_ids=model_ids)
    names = [
        name for id in ids["eos"] if id != tokenizer.eos_id and (name := tokenizer.name_of(id)) is not None
    ]
    return Tokenizer.load(directory, ends=names, model_ids=model_ids) if names else tokenizer


def _license(directory: Path) -> str | None:
    """Return the licence named in the front matter of README.md, with its own name if it has one."""
    readme = directory / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    # A few keys of a YAML header, found without a YAML parser.
    # PyYAML is no dependency, and would read far more than two keys.
    head = re.match(r"---\s*\n(.*?)\n---", text, flags=re.DOTALL)
    keys = (
        dict(re.findall(r"^(license(?:_name)?):[ \t]*([^\n]*)$", head.group(1), flags=re.MULTILINE))
        if head
        else {}
    )
    # The licence may also be a list: its first item is on the line below.
    listed = (
        re.search(r"^license:[ \t]*\n[ \t]*-[ \t]*([^\n]*)", head.group(1), flags=re.MULTILINE)
        if head
        else None
    )
    names = [keys.get("license") or (listed.group(1) if listed else ""), keys.get("license_name", "")]
    return ", ".join(filter(None, (name.strip().strip("\"'") for name in names))) or None


# Writing ----------------------------------------------------------------------------------------------------
def write_directory(
    local_model: LocalModel, tokenizer: Tokenizer, out: Path, *, dtype: np.dtype | None
) -> FamilyExport:
    """Write a model as a Hugging Face directory, and return its representation.

    Args:
      dtype: of the weights; None for the stored one.

    Raises:
      ValueError: no family can represent it.
    """
    export, local_model = choose_export(
        local_model,
        HF_FAMILIES,
        format_name="Hugging Face",
        preferred=HF_NAMES.get(local_model.family or "", local_model.family),
        keeps_codes=False,
    )
    stored = np.dtype(dtype or local_model.dtype("embed/table"))
    ends = list(tokenizer.end_ids)
    # transformers ends a generation by these ids, not by the tokenizer.
    ids = {
        "bos_token_id": tokenizer.named_bos_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": None if tokenizer.pad is None else tokenizer.special_ids.get(tokenizer.pad),
    }
    config = {
        "architectures": [export.family.architecture],
        **export.settings,
        # Older releases of transformers read only `torch_dtype`.
        "dtype": stored.name,
        "torch_dtype": stored.name,
        "initializer_range": local_model.config.init_std,
        **ids,
    }
    write_json(out / "config.json", config)
    # Some engines read the ends of a text only from this file.
    write_json(out / "generation_config.json", ids)
    safetensors_files.write_tensors(
        out, _converted(foreign_tensors(export.rules, local_model.read), dtype), largest_file=LARGEST_FILE
    )
    tokenizer.save(out)
    return export


def _converted(
    tensors: Iterator[tuple[str, np.ndarray]], dtype: np.dtype | None
) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in tensors:
        yield name, cast_tensor(name, array, dtype)
