"""Slices of a model with nested feed-forward layers, as dense models of their own.

    slice_model("runs/nested", "models/half", fractions=[0.5])

The result is a directory as `import_model` writes: every command reads it, `slmjax export` included.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from slmjax.atomic_files import atomic_directory
from slmjax.checkpoints import safetensors_files
from slmjax.checkpoints.model_file import write_model_file
from slmjax.checkpoints.stored_model import open_local_model, read_origin
from slmjax.convert.source import Written
from slmjax.data.tokenizers import Tokenizer
from slmjax.models import nested_ffn
from slmjax.models.definition import define, stored_shapes
from slmjax.telemetry.run_directory import write_json


def slice_model(
    source: str | Path, out: str | Path, *, fractions: Sequence[float], step: int | None = None
) -> Written:
    """Write the dense model that has these fractions of the hidden units of a nested one.

    Its logits are those of the nested model at these granularities. Parameters with formats are written
    dequantized, as their layers multiply with them; inputs and caches are not rounded.

    Args:
      source: a run directory, or the directory of an imported model.
      out: the directory to write; it must not exist.
      fractions: one for all layers, or one for each ("mix and match"): of `MlpConfig.nested`, or 1.
      step: checkpoint of a run; None for the newest.

    Raises:
      ValueError: a fraction was not trained, or `out` exists already.
    """
    source = Path(source)
    out = Path(out)
    local_model = open_local_model(source, step=step)
    # Tables are read without their padding.
    whole = local_model.config
    model = nested_ffn.sliced_config(whole, fractions)
    definition = define(model)
    shapes = {
        name: tuple(leaf.shape)
        for tree in (definition.params, definition.buffers)
        for name, leaf in stored_shapes(model, tree).items()
    }

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in shapes.items():
            array = nested_ffn.sliced(local_model.read(name), name, shape)
            # Padding rows of tables come back as zeros, which no token has.
            padding = [(0, size - length) for size, length in zip(shape, array.shape, strict=True)]
            yield name, np.pad(array, padding)

    notes = ()
    if local_model.formats:
        notes = (
            f"{len(local_model.formats)} quantized parameters are written dequantized, and inputs and caches "
            "are not rounded",
        )
    with atomic_directory(out) as directory:
        safetensors_files.write_tensors(directory / safetensors_files.DIRECTORY, tensors())
        write_model_file(directory, model)
        if (source / "tokenizer").is_dir():
            Tokenizer.load(source / "tokenizer").save(directory / "tokenizer")
        # The source and its licence, where it was imported itself.
        write_json(
            directory / "origin.json",
            {**read_origin(source), "sliced_from": str(source.absolute()), "fractions": list(fractions)},
        )
    parameters = sum(math.prod(shape) for shape in shapes.values())
    size = sum(file.stat().st_size for file in (out / safetensors_files.DIRECTORY).iterdir())
    return Written(path=str(out), family="slmjax", parameters=parameters, bytes=size, notes=notes)
