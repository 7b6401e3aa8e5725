"""OLMo 3: OLMo 2 with three windowed layers to each full one; only full layers have scaled angles."""

import dataclasses
from typing import Any

from slmjax.convert.families import olmo2
from slmjax.convert.family import Family, Inexpressible, attentions, check_whole_rotation, first_block
from slmjax.convert.hf.settings import (
    read_attention,
    read_biases,
    read_decoder,
    read_mlp,
    read_ropes_by_kind,
    read_windows,
    write_attention,
    write_biases,
    write_decoder,
    write_mlp,
    write_scaling,
    write_windows,
)
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig, NormPlacement
from slmjax.models.mixers.attention import QkNorm

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 50_304,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "rope_theta": 500_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    num_layers = settings.take("num_hidden_layers")
    biases = read_biases(settings)
    # Positions are set for each kind of layer below.
    attention = read_attention(settings, rope_base=None, qk_norm=QkNorm.ALL_HEADS, biases=biases)
    ropes = read_ropes_by_kind(settings, local=None)
    windows = read_windows(
        settings,
        num_layers=num_layers,
        window=settings.optional("sliding_window"),
        default=[(layer + 1) % 4 != 0 for layer in range(num_layers)],
    )
    ffn = read_mlp(settings)
    mixers = [
        dataclasses.replace(attention, window=window, **ropes[window is not None]) for window in windows
    ]
    blocks = [BlockConfig(mixer=mixer, ffn=ffn, norm=NormPlacement.POST) for mixer in mixers]
    return read_decoder(settings, blocks)


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    # Each kind has one entry: layers of a kind that differ do not read back as the same model.
    ropes = {}
    for mixer in attentions(model):
        check_whole_rotation(mixer)
        if mixer.rope_base is None:
            raise Inexpressible("every layer has positions")
        kind = "full_attention" if mixer.window is None else "sliding_attention"
        ropes[kind] = {
            "rope_theta": mixer.rope_base,
            "rope_type": "default",
            **(write_scaling(mixer.rope_scaling) or {}),
        }
    keys = {**write_decoder(model), **write_attention(attention), **write_mlp(ffn), **write_windows(model)}
    # Top-level keys would take part in both kinds of layers (`read_ropes_by_kind`).
    for name in ("rope_theta", "rope_scaling"):
        keys.pop(name, None)
    biases = write_biases(attention)
    return {"model_type": "olmo3", **keys, **biases, "rope_parameters": ropes}


HF = Family(
    architecture="Olmo3ForCausalLM", read=read, write=write, defaults=DEFAULTS, tensor_map=olmo2.TENSOR_MAP
)
