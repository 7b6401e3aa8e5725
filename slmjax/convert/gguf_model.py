"""GGUF files, as llama.cpp loads them: metadata, tokenizer and tensors in one. Quantized tensors are read as
the numbers they stand for.

The `gguf` extra. `gguf_file.py` and `gguf_tokenizer.py` know the container and the vocabularies; families say
what the rest is called.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.checkpoints.stored_model import LocalModel, read_origin
from slmjax.config import ConfigError, near_names
from slmjax.convert.families import GGUF_FAMILIES, GGUF_NAMES
from slmjax.convert.family import BoundRule, Family, bind, misnamed, ours_from, read_settings, rounded
from slmjax.convert.gguf.container import GgufFile, PendingTensor, num_bytes, read_gguf, type_of, write_gguf
from slmjax.convert.gguf.swallowed_blanks import name_notes, swallowing
from slmjax.convert.gguf.tensor_codes import blocks_of, container_of
from slmjax.convert.gguf.tokenizer import tokenizer_from_gguf, tokenizer_metadata
from slmjax.convert.source import ForeignModel, Written, code_notes, express
from slmjax.data import conventions
from slmjax.data.shards import file_sha256
from slmjax.data.tokenizers import Tokenizer
from slmjax.models.architecture import ModelConfig, Precision

EXTRA_TENSORS = (
    "rope_freqs",
    "rope_factors_long",
    "rope_factors_short",
)  # arrays that settings hold under these names
BIASES = {
    "qkv_bias": "attn_q",
    "output_bias": "attn_output",
    "ffn_bias": "ffn_down",
}  # settings, and the tensors that they tell of
NOT_KEYS = ("vocab_size", "has_output", *BIASES, *EXTRA_TENSORS)  # settings that are not in the metadata
TOLERANCE = 5e-7  # metadata is float32
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q4_0": 2,
    "Q8_0": 7,
    "TQ2_0": 37,
    "MXFP4": 38,
}  # general.file_type
TEKKEN_DEPTH = 40  # layers of a model for which llama.cpp has a chat template of its own
BLOCKS_VERSION = 2  # general.quantization_version: of how blocks are laid out


# Reading ----------------------------------------------------------------------------------------------------
def open_file(path: Path) -> ForeignModel:
    """The model of a GGUF file.

    Raises:
      ValueError: the file is damaged, or what it says is not understood; the message names it.
    """
    file = read_gguf(path)
    notes: list[str] = []
    family, model = described(path, file, notes=notes)
    table = family.table_of(model)
    architecture = family.architecture
    bound = bind(table, model)
    _check_names(path, architecture, *misnamed(table, bound, set(file.tensors)))
    return ForeignModel(
        config=model,
        family=architecture,
        parameters=lambda: ours_from(bound, lambda name: file.tensors[name].read()),
        tokenizer=lambda: _tokenizer(path, file),
        about={
            "format": "gguf",
            "family": architecture,
            "source": str(path.absolute()),
            "files": {path.name: file_sha256(path)},
            "license": file.metadata.get("general.license"),
            "config": _told(file),
        },
        notes=(*notes, *name_notes(file.metadata)),
    )


def described(path: Path, file: GgufFile, *, notes: list[str] | None = None) -> tuple[Family, ModelConfig]:
    """The family of a file, and the model that its metadata tells of. Raises ValueError for what is not
    understood.

    Args:
      notes: a list to add to, what whoever reads the model should know.
    """
    architecture = file.metadata.get("general.architecture")
    known = {family.architecture: family for family in GGUF_FAMILIES}
    if architecture not in known:
        names = f"{', '.join(known)}.{near_names(str(architecture), known)}"
        raise ConfigError(f"{path} is of the architecture {architecture!r}, and these are read: {names}")
    family = known[architecture]
    return family, read_settings(family, _settings(file, architecture), where=str(path), notes=notes)


def _settings(file: GgufFile, architecture: str) -> dict[str, Any]:
    """The keys of the architecture without its name, and what tensors say."""
    prefix = f"{architecture}."
    found = {
        name.removeprefix(prefix): value for name, value in file.metadata.items() if name.startswith(prefix)
    }
    if "token_embd.weight" not in file.tensors:
        raise ConfigError("the file has no token_embd.weight: it holds no language model, or a part of one")
    found |= {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "has_output": "output.weight" in file.tensors,
    }
    found |= {name: True for name, tensor in BIASES.items() if f"blk.0.{tensor}.bias" in file.tensors}
    return found | {
        name: file.tensors[f"{name}.weight"].read()
        for name in EXTRA_TENSORS
        if f"{name}.weight" in file.tensors
    }


def _told(file: GgufFile) -> dict[str, Any]:
    """The metadata that a person can read: no vocabularies."""
    return {
        name: value
        for name, value in file.metadata.items()
        if not isinstance(value, list) and not name.startswith("tokenizer.")
    }


def _check_names(path: Path, architecture: str, missing: list[str], extra: list[str]) -> None:
    if missing:
        raise ValueError(
            f"{path} has no tensor {missing[0]} ({len(missing)} such): it is incomplete, or of another model "
            "than it says"
        )
    if extra:
        raise ValueError(
            f"{path} holds {extra[0]} ({len(extra)} such), which {architecture} has no place for"
        )


def _tokenizer(path: Path, file: GgufFile) -> Tokenizer | None:
    if "tokenizer.ggml.model" not in file.metadata or file.metadata["tokenizer.ggml.model"] == "no_vocab":
        return None
    found = tokenizer_from_gguf(file.metadata)
    eos = found.eos or found.end_of_turn
    if eos is None:
        raise ValueError(
            f"{path}: its vocabulary names no token that ends a text: name a tokenizer.json with --tokenizer"
        )
    ends = () if found.end_of_turn in (None, eos) else (found.end_of_turn,)
    return Tokenizer(
        found.backend,
        bos=found.bos or eos,
        eos=eos,
        ends=ends,
        adds_bos=found.adds_bos,
        has_bos=found.bos is not None,
        chat_template=found.chat_template,
        unk=found.unk,
        pad=found.pad,
        sources={
            "bos": "tokenizer.ggml.bos_token_id of the file"
            if found.bos is not None
            else conventions.STAND_IN,
            "eos": f"tokenizer.ggml.{'eos' if found.eos is not None else 'eot'}_token_id of the file",
        },
    )


# Writing ----------------------------------------------------------------------------------------------------
def write_model(own: LocalModel, tokenizer: Tokenizer, out: Path, *, dtype: np.dtype | None) -> Written:
    """Writes a model of ours as a GGUF file. Quantized parameters go into blocks, codes and scales as they
    are.

    Args:
      dtype: of matrices in floating point; None for the one they are stored in. Vectors are float32. Where it
        is float32, it is that of quantized parameters too, whose codes are decoded.

    Raises:
      ValueError: no family can express it, GGUF has no blocks for a parameter's format, or `out` is there
        already.
    """
    if out.exists():
        raise ValueError(f"{out} exists already: give the name of a new file, or delete it first")
    expressed = express(
        own.config,
        GGUF_FAMILIES,
        format_name="GGUF",
        preferred=GGUF_NAMES.get(own.family or "", own.family),
        tolerance=TOLERANCE,
    )
    architecture = expressed.family.architecture
    model = expressed.config
    stored = np.dtype(dtype or own.dtype("embed/table"))
    keys = {
        f"{architecture}.{name}": value for name, value in expressed.settings.items() if name not in NOT_KEYS
    }
    origin = read_origin(own.path)
    # No general.name by which the file or its user goes: llama.cpp cuts special tokens otherwise where it has
    # a certain one.
    general = {"general.license": origin.get("license")}
    words = tokenizer_metadata(
        own.path / "tokenizer", adds_bos=tokenizer.adds_bos, num_rows=model.known_vocab_size
    )
    extra = [
        PendingTensor(
            name=f"{name}.weight",
            shape=array.shape,
            dtype=np.dtype(np.float32),
            read=lambda array=array: array,
        )
        for name, array in expressed.settings.items()
        if name in EXTRA_TENSORS
    ]
    in_codes = bool(own.formats) and dtype != np.float32
    tensors = [*extra, *_pending(expressed.bound, own, stored, in_codes=in_codes)]
    sizes = _sizes(tensors)
    general["general.file_type"] = FILE_TYPES[_main_type(tensors)]
    general["general.quantization_version"] = BLOCKS_VERSION if in_codes else None
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {name: value for name, value in {**general, **keys, **words}.items() if value is not None}
    write_gguf(out, architecture=architecture, metadata=metadata, tensors=tensors)
    notes = [
        *_notes(expressed.settings, own, sizes, in_codes=in_codes),
        *tokenizer_notes(own.path / "tokenizer", words, num_layers=model.num_layers),
    ]
    return Written(
        path=str(out),
        family=architecture,
        parameters=sum(numbers for _, numbers, _ in sizes.values()),
        bytes=sum(size for _, _, size in sizes.values()),
        notes=tuple(notes),
    )


Sizes = dict[str, tuple[int, int, int]]  # by type: tensors, numbers, bytes


def _sizes(tensors: list[PendingTensor]) -> Sizes:
    found: Sizes = {}
    for tensor in tensors:
        type = type_of(tensor)
        numbers = math.prod(tensor.shape)
        before = found.get(type, (0, 0, 0))
        found[type] = before[0] + 1, before[1] + numbers, before[2] + num_bytes(tensor.shape, type)
    return found


def _main_type(tensors: list[PendingTensor]) -> str:
    """The type that most numbers of matrices are in."""
    return max(
        (sizes := _sizes([one for one in tensors if len(one.shape) > 1] or tensors)),
        key=lambda type: sizes[type][1],
    )


def _notes(settings: Mapping[str, Any], own: LocalModel, sizes: Sizes, *, in_codes: bool) -> Iterator[str]:
    """What was written, and what llama.cpp does otherwise, depending on how it is started."""
    if in_codes:
        types = (
            f"{type} {tensors} tensors, {numbers:,} numbers, {size:,} bytes"
            for type, (tensors, numbers, size) in sizes.items()
        )
        yield f"codes and scales as they were trained: {'; '.join(types)}"
        yield from code_notes(own)
        if own.config.precision is Precision.BFLOAT16:
            yield (
                "it was trained in bfloat16, which multiplied with these numbers rounded to 8 bits of "
                "mantissa: engines multiply with the "
                "numbers themselves, and verify-export compares with float32 arithmetic"
            )
    elif own.formats:
        yield f"{len(own.formats)} quantized parameters are written as the float32 numbers that their codes stand for"
    if "rope_factors_long" in settings:
        yield (
            f"where its context is longer than {settings['rope.scaling.original_context_length']} tokens, "
            "llama.cpp takes the long factors "
            "of rotary positions for short texts too: start it with no longer a context than texts need"
        )


def tokenizer_notes(directory: Path, words: Mapping[str, Any], *, num_layers: int) -> Iterator[str]:
    """Yield notes on special tokens that swallow blanks beside them, and on a chat template that llama.cpp
    adds by itself.
    """
    if (
        num_layers == TEKKEN_DEPTH
        and words.get("tokenizer.ggml.pre") == "tekken"
        and "tokenizer.chat_template" not in words
    ):
        yield (
            f"llama.cpp takes a model of {TEKKEN_DEPTH} layers with this vocabulary and no chat template for "
            "Mistral Small, and renders "
            "chats by a template of its own: give it prompts, or start it with its option --chat-template"
        )
    added = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    if "general.name" not in words and (tokens := swallowing(added)):
        yield (
            f"{len(tokens)} special tokens, {tokens[0]} first, swallow blanks beside them, which GGUF has no "
            "place for: llama.cpp keeps "
            "such blanks as tokens of their own, so give it text without them"
        )


def _pending(
    bound: list[BoundRule], own: LocalModel, stored: np.dtype, *, in_codes: bool
) -> Iterator[PendingTensor]:
    """The tensors, one for each rule, made when it is its turn."""
    for one in bound:
        (name,) = one.theirs
        container = container_of(one, own) if in_codes else None
        shape = one.rule.write([np.empty(shape, bool) for shape in one.shapes])[0].shape
        is_vector = len(shape) == 1 or name.endswith(("bias", "ffn_gate_inp.weight", "position_embd.weight"))
        dtype = np.dtype(np.float32) if is_vector else stored

        def read(
            one: BoundRule = one, name: str = name, dtype: np.dtype = dtype, container: str | None = container
        ) -> np.ndarray:
            if container is not None:
                return blocks_of(one, own, container)
            return rounded(name, one.rule.write([own.read(path) for path in one.ours])[0], dtype)

        yield PendingTensor(name=name, shape=shape, dtype=container or dtype, read=read)
