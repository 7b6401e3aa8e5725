"""Weights that any program can make again from the names of tensors alone, so that a golden file need not
hold them.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

NUM_TOKENS = 20
VOCAB_SIZE = 47


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws that depend on the name and the shape; of a size at which every part of a small model matters."""
    draws = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)  # noqa: NPY002 - its stream is frozen
    if len(shape) == 1:
        return (float("norm" in name or "ln_" in name) + 0.3 * draws).astype(np.float32)
    return (draws * (1.5 / np.sqrt(shape[-1]))).astype(np.float32)


def tokens(vocab_size: int) -> np.ndarray:
    """The tokens that golden logits belong to, [1, T]."""
    return (np.arange(NUM_TOKENS) ** 2 * 7 + 3)[None] % vocab_size


def write_model(directory: Path, config: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> None:
    """A Hugging Face directory with these names and shapes."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {name: values(name, tuple(shape)) for name, shape in shapes.items()}, directory / "model.safetensors"
    )
