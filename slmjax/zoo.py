"""Named architectures, and what any architecture costs.

    zoo.nano()                                   # -> ModelConfig; the tokenizer decides the size of the vocabulary
    zoo.ARCHITECTURES["qwen3_0_6b"]()            # -> ModelConfig, complete
    zoo.describe(zoo.ARCHITECTURES["nano"]())    # -> Summary: parameters, FLOPs, bytes

The first four are small ones of our own; then come released models at their released sizes, those that today's layers
express exactly. They say what a model is, not how it is trained or what precision it runs in.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

from slmjax.architecture import BlockConfig, HeadKind, ModelConfig, Segment
from slmjax.attention import AttentionConfig, QkNorm
from slmjax.layers import Activation, FfnConfig, MlpConfig
from slmjax.moe import MoeConfig
from slmjax.parameters import block_at, define


# Our own --------------------------------------------------------------------------------------------------------------
def nano(*, vocab_size: int | None = None) -> ModelConfig:
    """3.8M parameters with 4096 tokens, for minutes on a CPU: a Qwen3 in every detail, so that it exports as one."""
    return _nano((BlockConfig(mixer=_NANO_ATTENTION, ffn=MlpConfig(hidden_dim=640)),), vocab_size=vocab_size)


def nano_moe(*, vocab_size: int | None = None) -> ModelConfig:
    """`nano` with 8 experts, of which 2 together are as wide as its feed-forward layer."""
    ffn = MoeConfig(num_experts=8, num_selected=2, hidden_dim=320)
    return _nano((BlockConfig(mixer=_NANO_ATTENTION, ffn=ffn),), vocab_size=vocab_size)


def nano_window(*, vocab_size: int | None = None) -> ModelConfig:
    """`nano` with three layers that see 64 tokens before the one that sees all."""
    mixers = (*(dataclasses.replace(_NANO_ATTENTION, window=64),) * 3, _NANO_ATTENTION)
    return _nano(tuple(BlockConfig(mixer=mixer, ffn=MlpConfig(hidden_dim=640)) for mixer in mixers), vocab_size=vocab_size)


_NANO_ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64, qk_norm=QkNorm.PER_HEAD)


def _nano(pattern: tuple[BlockConfig, ...], *, vocab_size: int | None) -> ModelConfig:
    stack = (Segment(pattern=pattern, repeats=4 // len(pattern)),)
    return ModelConfig(embed_dim=256, stack=stack, context_length=256, vocab_size=vocab_size)


def shakespeare_char(*, vocab_size: int | None = None) -> ModelConfig:
    """nanoGPT's character model for a CPU: 4 layers of 4 heads, width 128, context 64, plain GELU layers of four times the width."""
    return _uniform(
        layers=4, embed_dim=128, attention=AttentionConfig(num_heads=4),
        ffn=MlpConfig(hidden_dim=512, activation=Activation.GELU, gated=False), context_length=64, vocab_size=vocab_size,
    )  # fmt: skip


def slm_12m(*, vocab_size: int | None = 4096) -> ModelConfig:
    """A decoder that a laptop trains overnight: 6 layers of width 384. What the benchmarks on CPUs time."""
    return _uniform(
        layers=6, embed_dim=384, attention=AttentionConfig(num_heads=6), ffn=MlpConfig(hidden_dim=1024), context_length=512,
        vocab_size=vocab_size,
    )  # fmt: skip


def slm_124m(*, vocab_size: int | None = 50_257) -> ModelConfig:
    """The size of GPT-2 small, with rotary positions, RMSNorm and SwiGLU; the table is padded to 50,304 rows."""
    config = _uniform(
        layers=12, embed_dim=768, attention=AttentionConfig(num_heads=12), ffn=MlpConfig(hidden_dim=2048), context_length=1024,
        vocab_size=vocab_size,
    )  # fmt: skip
    return dataclasses.replace(config, vocab_multiple=128)


# Released models ------------------------------------------------------------------------------------------------------
def smollm2_135m() -> ModelConfig:
    """SmolLM2-135M (https://huggingface.co/HuggingFaceTB/SmolLM2-135M)."""
    return _smollm2(layers=30, embed_dim=576, heads=9, kv_heads=3, hidden_dim=1536, rope_base=100_000.0)


def smollm2_360m() -> ModelConfig:
    """SmolLM2-360M (https://huggingface.co/HuggingFaceTB/SmolLM2-360M)."""
    return _smollm2(layers=32, embed_dim=960, heads=15, kv_heads=5, hidden_dim=2560, rope_base=100_000.0)


def smollm2_1_7b() -> ModelConfig:
    """SmolLM2-1.7B (https://huggingface.co/HuggingFaceTB/SmolLM2-1.7B)."""
    return _smollm2(layers=24, embed_dim=2048, heads=32, kv_heads=32, hidden_dim=8192, rope_base=130_000.0)


def qwen3_0_6b() -> ModelConfig:
    """Qwen3-0.6B (https://huggingface.co/Qwen/Qwen3-0.6B)."""
    return _qwen3(layers=28, embed_dim=1024, heads=16, hidden_dim=3072)


def qwen3_1_7b() -> ModelConfig:
    """Qwen3-1.7B (https://huggingface.co/Qwen/Qwen3-1.7B)."""
    return _qwen3(layers=28, embed_dim=2048, heads=16, hidden_dim=6144)


def qwen3_4b() -> ModelConfig:
    """Qwen3-4B (https://huggingface.co/Qwen/Qwen3-4B)."""
    return _qwen3(layers=36, embed_dim=2560, heads=32, hidden_dim=9728)


def _smollm2(*, layers: int, embed_dim: int, heads: int, kv_heads: int, hidden_dim: int, rope_base: float) -> ModelConfig:
    attention = AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, rope_base=rope_base)
    config = _uniform(
        layers=layers, embed_dim=embed_dim, attention=attention, ffn=MlpConfig(hidden_dim=hidden_dim), context_length=8192,
        vocab_size=49_152,
    )  # fmt: skip
    return dataclasses.replace(config, norm_eps=1e-5)


def _qwen3(*, layers: int, embed_dim: int, heads: int, hidden_dim: int) -> ModelConfig:
    attention = AttentionConfig(num_heads=heads, num_kv_heads=8, head_dim=128, rope_base=1e6, qk_norm=QkNorm.PER_HEAD)
    return _uniform(
        layers=layers, embed_dim=embed_dim, attention=attention, ffn=MlpConfig(hidden_dim=hidden_dim), context_length=40_960,
        vocab_size=151_936,
    )  # fmt: skip


def _uniform(
    *, layers: int, embed_dim: int, attention: AttentionConfig, ffn: FfnConfig, context_length: int, vocab_size: int | None
) -> ModelConfig:
    """All layers alike, embeddings tied, RMSNorm before each sublayer."""
    stack = (Segment(pattern=(BlockConfig(mixer=attention, ffn=ffn),), repeats=layers),)
    return ModelConfig(embed_dim=embed_dim, stack=stack, context_length=context_length, vocab_size=vocab_size, head=HeadKind.TIED)


# Complete, that is, with a vocabulary: ours with that of the experiment of the same name.
ARCHITECTURES: Mapping[str, Callable[[], ModelConfig]] = {
    "nano": functools.partial(nano, vocab_size=2048),
    "nano_moe": functools.partial(nano_moe, vocab_size=2048),
    "nano_window": functools.partial(nano_window, vocab_size=2048),
    "shakespeare_char": functools.partial(shakespeare_char, vocab_size=67),  # 65 characters, BOS, EOS
    "slm_12m": slm_12m,
    "slm_124m": slm_124m,
    "smollm2_135m": smollm2_135m,
    "smollm2_360m": smollm2_360m,
    "smollm2_1_7b": smollm2_1_7b,
    "qwen3_0_6b": qwen3_0_6b,
    "qwen3_1_7b": qwen3_1_7b,
    "qwen3_4b": qwen3_4b,
}


# Sizes and costs ------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Sizes and costs of an architecture, worked out from its config."""

    parameters: int  # all that are trained; a tied table counts once
    active_parameters: int  # those that one token uses: of the experts, only the selected
    embedding_parameters: int  # of them in the tables that have one row per token: embedding and untied head
    training_flops_per_token: float  # forward and backward, at the context length
    bytes_bf16: int  # of all parameters
    cache_bytes_per_token: float  # of the decoding state of a full context in bfloat16, divided by its length


def describe(config: ModelConfig) -> Summary:
    """Sizes and costs of an architecture. Nothing is computed or allocated.

    Training costs 6 FLOPs per token for each parameter that a token is multiplied with (2 forward, 4 backward: once per
    pass of a block; the head counts also where it is tied, the lookup in the table does not) and 3 times what mixers
    compute beside their weights, averaged over a sequence of the context length. Recomputation by a rematerialisation policy
    is not counted.

    Raises:
      ValueError: the config leaves the size of the vocabulary open.
    """
    shape, length = config.layer_shape(), config.context_length
    shapes = {path: leaf.shape for path, leaf in define(config).params.items()}
    sizes = {path: math.prod(dims) for path, dims in shapes.items()}
    tables = sum(size for path, size in sizes.items() if path in ("embed/table", "head/weight"))
    active, multiplied = 0.0, float(config.table_rows * config.embed_dim)
    for path, dims in shapes.items():
        used = sizes[path] * _active_share(config, path)
        active += used
        if path.startswith("segments/") and len(dims) > 2:  # a matrix, beside the layer dim
            multiplied += used * block_at(config, path).passes
    passes = [block.mixer for block in config.blocks() for _ in range(block.passes)]
    return Summary(
        parameters=sum(sizes.values()),
        active_parameters=round(active),
        embedding_parameters=tables,
        training_flops_per_token=6 * multiplied + 3 * sum(mixer.mixing_flops(shape, length=length) for mixer in passes),
        bytes_bf16=2 * sum(sizes.values()),
        cache_bytes_per_token=sum(mixer.state_bytes(shape, length=length, itemsize=2) for mixer in passes) / length,
    )


def _active_share(config: ModelConfig, path: str) -> float:
    """The share of a parameter that one token uses."""
    ffn = block_at(config, path).ffn if "/experts/" in path else None
    return 1.0 if ffn is None else ffn.active_share()
