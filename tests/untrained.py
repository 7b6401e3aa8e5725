"""A model that nobody trained, with its tokenizer: weights large enough that what a token sees changes its
logits.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.checkpoints.loading import Loaded
from slmjax.data.tokenizers import Tokenizer
from slmjax.models.decoder import ModelConfig
from slmjax.models.definition import define


def untrained(config: ModelConfig, *, tokenizer: Tokenizer, path: Path, scale: float = 0.4) -> Loaded:
    """As `load_model` gives it. Made by numpy: compiling the initialisation takes longer."""
    definition = define(config)
    draws = np.random.default_rng(3)

    def fill(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        normal = {path: scale * draws.normal(size=leaf.shape) for path, leaf in shapes.items()}
        return {
            path: jnp.asarray(1 + x if path.endswith("scale") else x, jnp.float32)
            for path, x in normal.items()
        }

    params = fill(definition.params)
    buffers = fill(definition.buffers)
    return Loaded(
        config=definition.config,
        model=definition.merge(params, buffers),
        own_tokenizer=tokenizer,
        definition=definition,
        params=params,
        buffers=buffers,
        path=path,
        step=1,
    )
