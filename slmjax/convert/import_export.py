"""Models of other people as directories that every command takes, and ours as files that other people's
engines take.

An imported model's directory holds `model.json`, `tokenizer/`, `weights/` (safetensors by logical path, in
the dtype they came in) and `origin.json`, which tells where it came from. Weights go through tensor by
tensor: no more than about one file of them is in memory.
"""

import dataclasses
import enum
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from slmjax.atomic_files import atomic_directory
from slmjax.checkpoints import safetensors_files
from slmjax.checkpoints.model_file import write_model_file
from slmjax.checkpoints.stored_model import ROWS_PER_TOKEN, open_local_model
from slmjax.convert import gguf_model, hf_directory
from slmjax.convert.model_card import write_card
from slmjax.convert.source import ForeignModel, Written
from slmjax.data.tokenizers import Tokenizer
from slmjax.models.architecture import ModelConfig
from slmjax.telemetry.run_directory import write_json


class Target(enum.Enum):
    """What a model is exported as."""

    HF = "hf"  # a directory that Hugging Face libraries load
    GGUF = "gguf"  # a file that llama.cpp loads


class WeightType(enum.Enum):
    """What exported weights are stored in."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"

    @property
    def dtype(self) -> np.dtype:
        """The dtype of numpy."""
        return np.dtype({"bf16": jnp.bfloat16, "f16": np.float16, "f32": np.float32}[self.value])


# Import -----------------------------------------------------------------------------------------------------
def import_model(
    source: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    add_tokens: Sequence[str] = (),
    vocab_multiple: int = 1,
) -> Written:
    """Makes of a Hugging Face directory or a GGUF file a directory that `load_model` and every command take.

    Args:
      source: the directory, or the file.
      out: the directory to write, which is not there yet.
      tokenizer: a tokenizer.json, or a directory with one, in place of the model's own.
      add_tokens: special tokens that the vocabulary is to have besides. Their rows in the tables begin as the
        mean of the others.
      vocab_multiple: rows of the tables are padded to a multiple of this; no token is ever drawn from the
        padding.

    Raises:
      ValueError: the source is not understood, or `out` exists already.
    """
    source = Path(source)
    out = Path(out)
    found = _open(source)
    words = found.tokenizer() if tokenizer is None else Tokenizer.load(Path(tokenizer))
    notes = list(found.notes)
    if words is None:
        notes.append(
            f"{source} has no tokenizer.json: what needs text will refuse, until it is imported with "
            "--tokenizer"
        )
    if words is None and add_tokens:
        raise ValueError(
            f"{source} has no tokenizer.json to add {add_tokens[0]!r} to: name one with --tokenizer"
        )
    num_rows = found.config.known_vocab_size
    if words is not None and words.vocab_size > num_rows:
        notes.append(
            f"the tokenizer's added tokens from id {num_rows:,} on have no rows in the model, and were left "
            "out"
        )
        words = words.without_rows_from(num_rows)
    first_new = num_rows if words is None else words.vocab_size
    if words is not None and add_tokens:
        words = words.add_tokens(add_tokens, special=True)
    rows = _Rows(first_new=first_new, end_new=first_new if words is None else words.vocab_size)
    model = dataclasses.replace(
        found.config, vocab_size=max(num_rows, rows.end_new), vocab_multiple=vocab_multiple
    )
    sizes = {"parameters": 0, "bytes": 0}
    with atomic_directory(out) as directory:
        safetensors_files.write_tensors(
            directory / safetensors_files.DIRECTORY, _counted(_resized(found, model, rows), sizes)
        )
        write_model_file(directory, model)
        if words is not None:
            words.save(directory / "tokenizer")
        write_json(directory / "origin.json", found.about)
    return Written(path=str(out), family=found.family, notes=tuple(notes), **sizes)


def _open(source: Path) -> ForeignModel:
    if source.is_dir():
        return hf_directory.open_directory(source)
    if not source.is_file():
        raise ValueError(f"there is no {source}: name a Hugging Face directory or a GGUF file")
    return gguf_model.open_file(source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of tables that new tokens get."""

    first_new: int
    end_new: int


def _resized(found: ForeignModel, model: ModelConfig, rows: _Rows) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters, tables as long as they are to be."""
    for name, array in found.parameters():
        if name in ROWS_PER_TOKEN and (rows.end_new > rows.first_new or model.table_rows > array.shape[0]):
            table = np.zeros((model.table_rows, array.shape[1]), array.dtype)
            table[: array.shape[0]] = array
            table[rows.first_new : rows.end_new] = np.mean(
                array[: rows.first_new], axis=0, dtype=np.float64
            ).astype(array.dtype)
            array = table
        yield name, array


def _counted(
    tensors: Iterator[tuple[str, np.ndarray]], sizes: dict[str, int]
) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in tensors:
        sizes["parameters"] += array.size
        sizes["bytes"] += array.nbytes
        yield name, array


# Export -----------------------------------------------------------------------------------------------------
def export_model(
    source: str | Path,
    out: str | Path,
    *,
    to: Target,
    dtype: WeightType | None = None,
    step: int | None = None,
) -> Written:
    """Writes a run's or an imported model for other engines.

    Args:
      source: a run directory or an imported model's.
      out: for HF the directory, for GGUF the file to write, which is not there yet.
      dtype: of the weights; None for the one that they are stored in.
      step: of a run, the checkpoint; None for the newest.

    Raises:
      ValueError: the format cannot say what the model is (the message tells why), or `out` exists already.
    """
    source = Path(source)
    out = Path(out)
    own = open_local_model(source, step=step)
    if not (source / "tokenizer").is_dir():
        raise ValueError(
            f"{source} has no tokenizer, without which no engine takes it: import it again with --tokenizer "
            "FILE"
        )
    words = Tokenizer.load(source / "tokenizer")
    kind = None if dtype is None else dtype.dtype
    if to is Target.GGUF:
        written = gguf_model.write_model(own, words, out, dtype=kind)
        write_card(own, out.with_suffix(".model_card.md"), title=out.stem, family=written.family)
        return written
    with atomic_directory(out) as directory:
        expressed = hf_directory.write_directory(own, words, directory, dtype=kind)
        write_card(own, directory / "model_card.md", title=out.name, family=expressed.family.architecture)
        tensors = safetensors_files.TensorFiles(directory)
        size = sum(file.stat().st_size for file in tensors.files)
        parameters = sum(math.prod(tensors.shape(name)) for name in tensors.names)
    notes = (
        (f"{len(own.formats)} quantized parameters are written as the numbers that their codes stand for",)
        if own.formats
        else ()
    )
    return Written(
        path=str(out), family=expressed.family.architecture, parameters=parameters, bytes=size, notes=notes
    )
