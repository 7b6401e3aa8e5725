"""Small models that nobody trained, in directories as imported ones have, wide enough for blocks of 32 or
256.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slmjax import config as config_io
from slmjax.checkpoints import safetensors_files
from slmjax.convert.family import logical_shapes
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.models.architecture import BlockConfig, HeadKind, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig, QkNorm

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 4


def model(
    block: BlockConfig, *, width: int = 64, layers: int = 1, head: HeadKind = HeadKind.TIED
) -> ModelConfig:
    words = ByteTokenizer().build([])
    stack = (LayerGroup(pattern=(block,), repeats=layers),)
    return ModelConfig(
        embed_dim=width, stack=stack, vocab_size=words.vocab_size, context_length=128, head=head
    )


ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32)
NORMED = dataclasses.replace(ATTENTION, qk_norm=QkNorm.PER_HEAD)
# llama.cpp keeps the rotated dims of a Llama side by side: the rows of its queries and keys are reordered.
LLAMA = model(BlockConfig(mixer=ATTENTION, ffn=MlpConfig(hidden_dim=96)), layers=2, head=HeadKind.UNTIED)
QWEN = model(BlockConfig(mixer=NORMED, ffn=MlpConfig(hidden_dim=96)))
MOE = model(BlockConfig(mixer=NORMED, ffn=MoeConfig(num_experts=4, num_selected=2, hidden_dim=32)))
WIDE = model(
    BlockConfig(
        mixer=dataclasses.replace(NORMED, num_heads=8, num_kv_heads=8), ffn=MlpConfig(hidden_dim=256)
    ),
    width=256,
)


def write_untrained(path: Path, config: ModelConfig) -> Path:
    """A directory that `load_model` takes; draws of the size that training leaves."""
    generator = np.random.default_rng(7)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in logical_shapes(config).items():
            draws = generator.normal(size=shape) * (
                0.1 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1 if "embed" in name else -2])
            )
            yield name, (draws + name.endswith("scale")).astype(np.float32)

    safetensors_files.write_tensors(path / safetensors_files.DIRECTORY, tensors())
    (path / "model.json").write_text(config_io.dumps(config))
    words().save(path / "tokenizer")
    (path / "origin.json").write_text(json.dumps({}))
    return path


words = functools.cache(lambda: ByteTokenizer().build([]))
