"""GGUF files for llama.cpp: metadata, tokenizer and tensors in one. Quantized tensors are read dequantized.

Needs the `gguf` extra. `gguf/container.py` and `gguf/tokenizer.py` handle the container and the vocabularies;
the families map the rest.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.checkpoints.stored_model import LocalModel, read_origin
from slmjax.config import ConfigError, near_names
from slmjax.convert.families import GGUF_FAMILIES, GGUF_NAMES
from slmjax.convert.family import (
    BoundRule,
    Family,
    bind,
    cast_tensor,
    local_parameters,
    missing_and_extra,
    read_settings,
)
from slmjax.convert.gguf.container import GgufFile, PendingTensor, num_bytes, read_gguf, type_of, write_gguf
from slmjax.convert.gguf.stripped_spaces import name_notes, stripping_tokens
from slmjax.convert.gguf.tensor_codes import blocks_of, container_of
from slmjax.convert.gguf.tokenizer import tokenizer_from_gguf, tokenizer_metadata
from slmjax.convert.source import ForeignModel, Written, choose_export, code_notes
from slmjax.data import conventions
from slmjax.data.conventions import Conventions, SpecialToken
from slmjax.data.shards import file_sha256
from slmjax.data.tokenizers import Tokenizer
from slmjax.models.architecture import ModelConfig, Precision

# Settings that are arrays, stored as tensors of these names.
EXTRA_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
# Settings that follow from whether a tensor has a bias.
BIASES = {"qkv_bias": "attn_q", "output_bias": "attn_output", "ffn_bias": "ffn_down"}
# Settings that are not in the metadata.
NOT_KEYS = ("vocab_size", "has_output", "has_ssm_norm", *BIASES, *EXTRA_TENSORS)
TOLERANCE = 5e-7  # relative; metadata is float32
# general.file_type
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q8_0": 7, "TQ2_0": 37, "MXFP4": 38}
# Tensors of several dims that llama.cpp reads in float32 alone, and routers and positions.
FLOAT32_TENSORS = (
    "bias",
    "ffn_gate_inp.weight",
    "position_embd.weight",
    "shortconv.conv.weight",
    "ssm_a",
    "ssm_conv1d.weight",
    "ssm_d",
    "ssm_norm.weight",
)
TEKKEN_DEPTH = 40  # layers of Mistral Small, for which llama.cpp has a built-in chat template
BLOCKS_VERSION = 2  # general.quantization_version: layout of the blocks


# Reading ----------------------------------------------------------------------------------------------------
def open_file(path: Path) -> ForeignModel:
    """Open the model in a GGUF file.

    Raises:
      ValueError: the file is damaged or not supported; the message names it.
    """
    # Memory-mapped: tensors are only read when their parameters are.
    file = read_gguf(path)
    notes: list[str] = []
    family, model = family_and_config(path, file, notes=notes)
    tensor_map = family.tensor_map_for(model)
    architecture = family.architecture
    rules = bind(tensor_map, model)
    _check_names(path, architecture, *missing_and_extra(tensor_map, rules, set(file.tensors)))
    return ForeignModel(
        config=model,
        family=architecture,
        parameters=lambda: local_parameters(rules, lambda name: file.tensors[name].read(), where=str(path)),
        tokenizer=lambda: _tokenizer(path, file),
        about={
            "format": "gguf",
            "family": architecture,
            "source": str(path.absolute()),
            "files": {path.name: file_sha256(path)},
            "license": file.metadata.get("general.license"),
            "config": _readable_metadata(file),
        },
        notes=(*notes, *name_notes(file.metadata)),
    )


def family_and_config(
    path: Path, file: GgufFile, *, notes: list[str] | None = None
) -> tuple[Family, ModelConfig]:
    """Return the family of a file and its model's config. Raises ValueError if they are not supported.

    Args:
      notes: list to which notes for the user are added.
    """
    # Model files of other kinds, such as adapters and tokenizers alone, lack this key.
    architecture = file.metadata.get("general.architecture")
    known = {family.architecture: family for family in GGUF_FAMILIES}
    if architecture not in known:
        names = f"{', '.join(known)}.{near_names(str(architecture), known)}"
        raise ConfigError(f"{path} has the architecture {architecture!r}; supported are {names}")
    family = known[architecture]
    if "token_embd.weight" not in file.tensors:
        raise ConfigError(f"{path} has no token_embd.weight: it is not a language model, or only part of one")
    return family, read_settings(family, _settings(file, architecture), where=str(path), notes=notes)


def _settings(file: GgufFile, architecture: str) -> dict[str, Any]:
    """Return the architecture's keys without its prefix, and settings that follow from the tensors."""
    prefix = f"{architecture}."
    settings: dict[str, Any] = {
        name.removeprefix(prefix): value for name, value in file.metadata.items() if name.startswith(prefix)
    }
    # Not from the metadata: `vocab_size` is optional there, and padding rows need not count.
    settings["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    # llama.cpp ties the head if the file has no tensor for it; there is no key.
    settings["has_output"] = "output.weight" in file.tensors
    # The norm of Mamba-2 layers is optional in one architecture.
    if "blk.0.ssm_norm.weight" in file.tensors:
        settings["has_ssm_norm"] = True
    # Biases have no key either: layer 0 stands for all, and `_check_names` finds an exception.
    settings |= {name: True for name, tensor in BIASES.items() if f"blk.0.{tensor}.bias" in file.tensors}
    return settings | {
        name: file.tensors[f"{name}.weight"].read()
        for name in EXTRA_TENSORS
        if f"{name}.weight" in file.tensors
    }


def _readable_metadata(file: GgufFile) -> dict[str, Any]:
    """Return the metadata without vocabularies and other lists."""
    return {
        name: value
        for name, value in file.metadata.items()
        # They are megabytes, and the imported tokenizer has them.
        if not isinstance(value, list) and not name.startswith("tokenizer.")
    }


def _check_names(path: Path, architecture: str, missing: list[str], extra: list[str]) -> None:
    if missing:
        raise ValueError(
            f"{path} lacks tensor {missing[0]} ({len(missing)} missing): it is incomplete, or its metadata "
            "is of another model"
        )
    if extra:
        raise ValueError(
            f"{path} has tensor {extra[0]} ({len(extra)} unexpected), which {architecture} does not have"
        )


def _tokenizer(path: Path, file: GgufFile) -> Tokenizer | None:
    # "no_vocab" is what llama.cpp's converter writes for a model without a tokenizer.
    if "tokenizer.ggml.model" not in file.metadata or file.metadata["tokenizer.ggml.model"] == "no_vocab":
        return None
    # Models for chats may name only the end of a turn: it then ends texts too.
    try:
        vocabulary = tokenizer_from_gguf(file.metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    eos = vocabulary.eos or vocabulary.end_of_turn
    # Generation would never end, and training could not separate documents.
    if eos is None:
        raise ValueError(
            f"{path}: its vocabulary names no token that ends a text: give a tokenizer.json with --tokenizer"
        )
    ends = () if vocabulary.end_of_turn in (None, eos) else (vocabulary.end_of_turn,)
    ids = vocabulary.backend.get_vocab(with_added_tokens=True)
    sources = {
        "bos": "tokenizer.ggml.bos_token_id of the file",
        "eos": f"tokenizer.ggml.{'eos' if vocabulary.eos is not None else 'eot'}_token_id of the file",
    }
    end = SpecialToken(name=eos, id=ids[eos], source=sources["eos"])
    begin = (
        dataclasses.replace(end, source=conventions.STAND_IN)
        if vocabulary.bos is None
        else SpecialToken(name=vocabulary.bos, id=ids[vocabulary.bos], source=sources["bos"])
    )
    # Documents of a chat model do not begin with a mark of a turn.
    if vocabulary.bos is not None and not vocabulary.adds_bos:
        begin = conventions.separator(
            begin,
            eos=end,
            conventions=Conventions(chat_template=vocabulary.chat_template),
            special=[token.content for token in vocabulary.backend.get_added_tokens_decoder().values()],
            vocabulary=ids,
        )
    return Tokenizer(
        vocabulary.backend,
        bos=begin.name,
        eos=eos,
        ends=ends,
        adds_bos=vocabulary.adds_bos,
        has_bos=vocabulary.bos is not None,
        named_bos=vocabulary.bos,
        chat_template=vocabulary.chat_template,
        unk=vocabulary.unk,
        pad=vocabulary.pad,
        sources={"bos": begin.source, "eos": end.source},
    )


# Writing ----------------------------------------------------------------------------------------------------
def write_model(
    local_model: LocalModel, tokenizer: Tokenizer, out: Path, *, dtype: np.dtype | None
) -> Written:
    """Write a model as a GGUF file; trained codes and scales are packed into blocks as they are.

    Args:
      dtype: of matrices in floating point; None for the stored one. Vectors are float32. float32 also
        dequantizes the quantized parameters.

    Raises:
      ValueError: no family can represent it, GGUF has no blocks for a parameter's format, or `out` exists
        already.
    """
    if out.exists():
        raise ValueError(f"{out} exists already: choose another name, or delete it first")
    # An explicit float32 asks for dequantized weights.
    in_codes = bool(local_model.formats) and dtype != np.float32
    export, local_model = choose_export(
        local_model,
        GGUF_FAMILIES,
        format_name="GGUF",
        preferred=GGUF_NAMES.get(local_model.family or "", local_model.family),
        keeps_codes=in_codes,
        # Numbers read back from float32 metadata differ in the last digits.
        tolerance=TOLERANCE,
    )
    architecture = export.family.architecture
    model = export.config
    # The embedding's dtype stands for the model: most files have a single dtype.
    stored = np.dtype(dtype or local_model.dtype("embed/table"))
    keys = {
        f"{architecture}.{name}": value for name, value in export.settings.items() if name not in NOT_KEYS
    }
    origin = read_origin(local_model.path)
    # No general.name from the file or the user: some names change how llama.cpp splits special tokens.
    general = {"general.license": origin.get("license")}
    # llama.cpp needs a token for each row, also for those beyond the vocabulary.
    vocabulary = tokenizer_metadata(
        local_model.path / "tokenizer", adds_bos=tokenizer.adds_bos, num_rows=model.known_vocab_size
    )
    extra = [
        PendingTensor(
            name=f"{name}.weight",
            shape=array.shape,
            dtype=np.dtype(np.float32),
            read=lambda array=array: array,
        )
        for name, array in export.settings.items()
        if name in EXTRA_TENSORS
    ]
    tensors = [*extra, *_pending(export.rules, local_model, stored, in_codes=in_codes)]
    sizes = _sizes(tensors)
    # llama.cpp only displays this type: each tensor has its own.
    general["general.file_type"] = FILE_TYPES[_main_type(tensors)]
    general["general.quantization_version"] = BLOCKS_VERSION if in_codes else None
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {name: value for name, value in {**general, **keys, **vocabulary}.items() if value is not None}
    write_gguf(out, architecture=architecture, metadata=metadata, tensors=tensors)
    notes = [
        *_notes(export.settings, local_model, sizes, in_codes=in_codes),
        *tokenizer_notes(local_model.path / "tokenizer", vocabulary, num_layers=model.num_layers),
    ]
    return Written(
        path=str(out),
        family=architecture,
        parameters=sum(count for _, count, _ in sizes.values()),
        bytes=sum(size for _, _, size in sizes.values()),
        notes=tuple(notes),
    )


Sizes = dict[str, tuple[int, int, int]]  # by type: tensors, values, bytes


def _sizes(tensors: list[PendingTensor]) -> Sizes:
    sizes: Sizes = {}
    for tensor in tensors:
        type = type_of(tensor)
        num_tensors, num_values, size = sizes.get(type, (0, 0, 0))
        sizes[type] = (
            num_tensors + 1,
            num_values + math.prod(tensor.shape),
            size + num_bytes(tensor.shape, type),
        )
    return sizes


def _main_type(tensors: list[PendingTensor]) -> str:
    """Return the type of most values in matrices."""
    # Vectors stay in float32, and would outvote the matrices only in number, so they are left out.
    sizes = _sizes([tensor for tensor in tensors if len(tensor.shape) > 1] or tensors)
    return max(sizes, key=lambda type: sizes[type][1])


def _notes(
    settings: Mapping[str, Any], local_model: LocalModel, sizes: Sizes, *, in_codes: bool
) -> Iterator[str]:
    """Yield notes on what was written, and on differences in llama.cpp."""
    if in_codes:
        types = (
            f"{type} {num_tensors} tensors, {num_values:,} values, {size:,} bytes"
            for type, (num_tensors, num_values, size) in sizes.items()
        )
        yield f"codes and scales are written as trained: {'; '.join(types)}"
        yield from code_notes(local_model)
        if local_model.config.precision is Precision.BFLOAT16:
            yield (
                "the model was trained in bfloat16, which rounds the dequantized weights to 8 bits of "
                "mantissa: engines do not, and verify-export compares in float32"
            )
    elif local_model.formats:
        yield f"{len(local_model.formats)} quantized parameters are written dequantized, in float32"
    # Here the length of a text selects the factors, in llama.cpp the context with which it is started.
    if "rope_factors_long" in settings:
        yield (
            f"with a context longer than {settings['rope.scaling.original_context_length']} tokens, "
            "llama.cpp uses the long factors of rotary positions for short texts too: start it with no "
            "longer a context than the texts need"
        )


def tokenizer_notes(directory: Path, metadata: Mapping[str, Any], *, num_layers: int) -> Iterator[str]:
    """Yield notes on tokens that strip whitespace, and on a chat template that llama.cpp adds by itself."""
    if (
        # This is how llama.cpp recognises the model, whose files have no template.
        num_layers == TEKKEN_DEPTH
        and metadata.get("tokenizer.ggml.pre") == "tekken"
        and "tokenizer.chat_template" not in metadata
    ):
        yield (
            f"llama.cpp mistakes a model of {TEKKEN_DEPTH} layers with this vocabulary and no chat template "
            "for Mistral Small, and uses a built-in chat template: give it plain prompts, or start it with "
            "--chat-template"
        )
    # `general.name` among the keys means that llama.cpp strips the same spaces (`stripped_spaces.py`).
    added = Tokenizer.load(directory).specification["added_tokens"]
    if "general.name" not in metadata and (tokens := stripping_tokens(added)):
        yield (
            f"{len(tokens)} special tokens, {tokens[0]} first, strip spaces next to them, which GGUF cannot "
            "represent: llama.cpp keeps such spaces as tokens, so give it text without them"
        )


def _pending(
    rules: list[BoundRule], local_model: LocalModel, stored: np.dtype, *, in_codes: bool
) -> Iterator[PendingTensor]:
    """Yield the tensors, one for each rule; their values are read when they are written."""
    for rule in rules:
        # GGUF has one tensor for all experts, so that every rule writes a single tensor.
        (name,) = rule.theirs
        container = container_of(rule, local_model) if in_codes else None
        # Rules only move values, so that an empty array gives the shape.
        shape = rule.write([np.empty(shape, bool) for shape in rule.shapes])[0].shape
        # As in llama.cpp's own converter, vectors, routers, convolutions and positions stay in float32.
        is_vector = len(shape) == 1 or name.endswith(FLOAT32_TENSORS)
        dtype = np.dtype(np.float32) if is_vector else stored

        # Default arguments bind the values of this iteration: a closure would see those of the last one.
        def read(
            rule: BoundRule = rule,
            name: str = name,
            dtype: np.dtype = dtype,
            container: str | None = container,
        ) -> np.ndarray:
            if container is not None:
                return blocks_of(rule, local_model, container)
            return cast_tensor(name, rule.write([local_model.read(path) for path in rule.ours])[0], dtype)

        yield PendingTensor(name=name, shape=shape, dtype=container or dtype, read=read)
