"""Import of foreign models as directories that every command accepts, and export for other engines.

The directory of an imported model has `model.json`, `tokenizer/`, `weights/` (safetensors by logical path, in
their original dtype) and `origin.json`, which records the source. Weights are converted one tensor at a time:
at most about one file of them is in memory.
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
    """Formats of an export."""

    HF = "hf"  # directory for Hugging Face libraries
    GGUF = "gguf"  # file for llama.cpp


class WeightType(enum.Enum):
    """Dtypes of exported weights."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"

    @property
    def dtype(self) -> np.dtype:
        """NumPy dtype."""
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
    """Import a Hugging Face directory or a GGUF file, for `load_model` and every command.

    Args:
      source: the directory, or the file.
      out: the directory to write; it must not exist.
      tokenizer: a tokenizer.json, or a directory with one, instead of the model's own.
      add_tokens: special tokens to add to the vocabulary. Their embeddings start as the mean of the others.
      vocab_multiple: pad the embedding and the head to a multiple of this many rows; padding is never
        sampled.

    Raises:
      ValueError: the source is not supported, or `out` exists already.
    """
    source = Path(source)
    out = Path(out)
    # Only headers are read here: an unsupported model is refused before any weights are converted.
    foreign_model = _open(source)
    loaded = foreign_model.tokenizer() if tokenizer is None else Tokenizer.load(Path(tokenizer))
    notes = list(foreign_model.notes)
    if loaded is None:
        notes.append(
            f"{source} has no tokenizer.json: commands that need text will fail until it is imported with "
            "--tokenizer"
        )
    if loaded is None and add_tokens:
        raise ValueError(
            f"{source} has no tokenizer.json to add {add_tokens[0]!r} to: name one with --tokenizer"
        )
    # Some releases have added tokens without embeddings, which no model could read or write.
    num_rows = foreign_model.config.known_vocab_size
    if loaded is not None and loaded.vocab_size > num_rows:
        notes.append(
            f"the tokenizer's added tokens from id {num_rows:,} on have no rows in the model and were removed"
        )
        loaded = loaded.without_rows_from(num_rows)
    # New tokens take padding rows beyond the tokenizer's vocabulary before the table grows.
    first_new = num_rows if loaded is None else loaded.vocab_size
    if loaded is not None and add_tokens:
        loaded = loaded.add_tokens(add_tokens, special=True)
    new_rows = range(first_new, first_new if loaded is None else loaded.vocab_size)
    model = dataclasses.replace(
        foreign_model.config, vocab_size=max(num_rows, new_rows.stop), vocab_multiple=vocab_multiple
    )
    # Counted while the tensors are streamed, since they are never all in memory.
    sizes = {"parameters": 0, "bytes": 0}
    with atomic_directory(out) as directory:
        safetensors_files.write_tensors(
            directory / safetensors_files.DIRECTORY, _counted(_resized(foreign_model, model, new_rows), sizes)
        )
        write_model_file(directory, model)
        if loaded is not None:
            loaded.save(directory / "tokenizer")
        write_json(directory / "origin.json", foreign_model.about)
    return Written(path=str(out), family=foreign_model.family, notes=tuple(notes), **sizes)


def _open(source: Path) -> ForeignModel:
    if source.is_dir():
        return hf_directory.open_directory(source)
    if not source.is_file():
        raise ValueError(f"there is no {source}: name a Hugging Face directory or a GGUF file")
    return gguf_model.open_file(source)


def _resized(
    foreign_model: ForeignModel, model: ModelConfig, new_rows: range
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the parameters, with rows for new tokens and padding in the embedding and the head."""
    for name, array in foreign_model.parameters():
        # A tied head has no table of its own, so that only existing ones grow.
        if name in ROWS_PER_TOKEN and (new_rows or model.table_rows > array.shape[0]):
            # Padding rows stay zero: they are excluded from the softmax.
            table = np.zeros((model.table_rows, array.shape[1]), array.dtype)
            table[: array.shape[0]] = array
            # In float64: the sum over a large vocabulary would lose digits in bfloat16.
            mean = np.mean(array[: new_rows.start], axis=0, dtype=np.float64)
            table[new_rows.start : new_rows.stop] = mean.astype(array.dtype)
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
    """Export a run's model or an imported one for other engines.

    Args:
      source: a run directory, or the directory of an imported model.
      out: the directory (HF) or file (GGUF) to write; it must not exist.
      dtype: dtype of the weights; None for the stored one.
      step: checkpoint of a run; None for the newest.

    Raises:
      ValueError: the format cannot represent the model (the message says why), or `out` exists already.
    """
    source = Path(source)
    out = Path(out)
    local_model = open_local_model(source, step=step)
    if not (source / "tokenizer").is_dir():
        raise ValueError(
            f"{source} has no tokenizer, which other engines require: import it again with --tokenizer FILE"
        )
    tokenizer = Tokenizer.load(source / "tokenizer")
    array_dtype = None if dtype is None else dtype.dtype
    if to is Target.GGUF:
        written = gguf_model.write_model(local_model, tokenizer, out, dtype=array_dtype)
        write_card(local_model, out.with_suffix(".model_card.md"), title=out.stem, family=written.family)
        return dataclasses.replace(written, notes=(*written.notes, *_left_out(local_model.config)))
    with atomic_directory(out) as directory:
        export = hf_directory.write_directory(local_model, tokenizer, directory, dtype=array_dtype)
        write_card(
            local_model, directory / "model_card.md", title=out.name, family=export.family.architecture
        )
        tensors = safetensors_files.TensorFiles(directory)
        size = sum(file.stat().st_size for file in tensors.files)
        parameters = sum(math.prod(tensors.shape(name)) for name in tensors.names)
    notes: tuple[str, ...] = ()
    if local_model.formats:
        notes = (f"{len(local_model.formats)} quantized parameters are written dequantized",)
    notes += tuple(_left_out(local_model.config))
    return Written(
        path=str(out), family=export.family.architecture, parameters=parameters, bytes=size, notes=notes
    )


def _left_out(config: ModelConfig) -> Iterator[str]:
    """Yield notes on what a model has, and other engines do not run."""
    if config.multi_token is not None:
        yield (
            "the modules that predict tokens after the next one (multi_token) are left out: the next token "
            "does not need them"
        )
