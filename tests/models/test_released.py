"""Parameter counts of released models equal those published, and those of Hugging Face's classes."""

from typing import Any

import pytest

from slmjax.config import ConfigError, from_json, to_json
from slmjax.convert.families import HF_FAMILIES, olmoe
from slmjax.convert.family import Inexpressible
from slmjax.convert.source import choose_family
from slmjax.models.architecture import ModelConfig
from slmjax.models.canonical_form import canonical
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.zoo import RELEASED, describe

# Parameters as transformers counts them, tied tables once (`test_transformers_agrees`), and the rounded
# count of the page or paper.
COUNTS = {
    "gpt2_124m": (124_439_808, "124M"),
    "gpt2_355m": (354_823_168, "355M"),
    "smollm2_135m": (134_515_008, "135M"),
    "smollm2_360m": (361_821_120, "362M"),
    "smollm2_1_7b": (1_711_376_384, "1.71B"),
    "smollm3_3b": (3_075_098_624, "3.08B"),
    "mobilellm_125m": (124_635_456, "124.6M"),
    "mobilellm_350m": (345_355_200, "345.3M"),
    "mobilellm_600m": (603_188_352, "603.1M"),
    "mobilellm_1b": (1_005_461_760, "1.01B"),
    "tinyllama_1_1b": (1_100_048_384, "1.1B"),
    "llama3_2_1b": (1_235_814_400, "1.24B"),
    "llama3_2_3b": (3_212_749_824, "3.21B"),
    "qwen2_5_0_5b": (494_032_768, "0.49B"),
    "qwen2_5_1_5b": (1_543_714_304, "1.54B"),
    "qwen2_5_3b": (3_085_938_688, "3.09B"),
    "qwen3_0_6b": (596_049_920, "0.6B"),
    "qwen3_1_7b": (1_720_574_976, "1.7B"),
    "qwen3_4b": (4_022_468_096, "4.0B"),
    "gemma2_2b": (2_614_341_888, "2.61B"),
    "gemma3_270m": (268_098_176, "268M"),
    "gemma3_1b": (999_885_952, "1.00B"),
    "gemma3_4b": (3_880_263_168, "3.88B"),
    "olmo2_1b": (1_484_916_736, "1.48B"),
    "olmoe_1b_7b": (6_919_161_856, "6.92B"),
    "phi3_mini": (3_821_079_552, "3.8B"),
    "phi4_mini": (3_836_021_760, "3.8B"),
    "granite3_3_2b": (2_533_539_840, "2.53B"),
    "granite4_micro": (3_402_836_480, "3.4B"),
    "mamba2_130m": (128_989_632, "129M"),
    "mamba2_370m": (368_346_624, "368M"),
    "mamba2_1_3b": (1_343_757_312, "1.3B"),
    "lfm2_350m": (354_483_968, "354M"),
    "lfm2_700m": (742_489_344, "742M"),
    "lfm2_1_2b": (1_170_340_608, "1.17B"),
    "granite4_h_350m": (340_332_224, "340M"),
    "granite4_h_1b": (1_461_538_368, "1.5B"),
    "granite4_h_tiny": (6_939_037_248, "7B"),
    "falcon_h1_0_5b": (521_411_104, "521M"),
    "qwen3_5_0_8b": (752_393_024, "0.8B"),
    "qwen3_5_4b": (4_205_751_296, "4B"),
    "qwen3_next_80b_a3b": (79_674_391_296, "80B"),
    "olmo_hybrid_7b": (7_430_870_688, "7B"),
    "recurrentgemma_2b": (2_682_862_080, "2.7B"),
}
MIXTURES = ("olmoe_1b_7b", "granite4_h_tiny", "qwen3_next_80b_a3b")
# Published parameters without the embedding tables.
NON_EMBEDDING = {
    "qwen2_5_0_5b": 0.36e9,
    "qwen2_5_1_5b": 1.31e9,
    "qwen2_5_3b": 2.77e9,
    "qwen3_0_6b": 0.44e9,
    "gemma3_270m": 100e6,
}


def test_every_released_model_is_counted() -> None:
    assert set(COUNTS) == set(RELEASED)


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name: str) -> None:
    summary = describe(RELEASED[name]())
    exact, rounded = COUNTS[name]
    assert summary.parameters == exact
    unit = {"M": 1e6, "B": 1e9}[rounded[-1]]
    decimals = len(rounded[:-1].partition(".")[2])
    # Papers truncate as often as they round.
    assert abs(exact / unit - float(rounded[:-1])) < 10**-decimals
    assert (summary.active_parameters == exact) == (name not in MIXTURES)
    if name in NON_EMBEDDING:
        assert exact - summary.embedding_parameters == pytest.approx(NON_EMBEDDING[name], rel=0.015)


def test_active_parameters_of_a_mixture() -> None:
    assert describe(RELEASED["olmoe_1b_7b"]()).active_parameters == pytest.approx(1.3e9, rel=0.02)
    # Published without the embedding tables.
    summary = describe(RELEASED["qwen3_next_80b_a3b"]())
    assert summary.active_parameters - summary.embedding_parameters == pytest.approx(3e9, rel=0.1)


def mixers(name: str) -> list[AttentionConfig]:
    all_mixers = [block.mixer for block in RELEASED[name]().blocks()]
    return [mixer for mixer in all_mixers if isinstance(mixer, AttentionConfig)]


def windows(name: str) -> list[int | None]:
    return [mixer.window for mixer in mixers(name)]


def test_patterns_of_layers() -> None:
    assert windows("gemma3_1b") == ([512] * 5 + [None]) * 4 + [512] * 2
    assert windows("gemma2_2b") == [4096, None] * 13
    assert [(len(group.pattern), group.repeats) for group in RELEASED["gemma3_1b"]().stack] == [
        (6, 4),
        (1, 2),
    ]
    assert [mixer.rope_base for mixer in mixers("smollm3_3b")] == [5e6, 5e6, 5e6, None] * 9


# The config.json of the released OLMoE-1B-7B, copied by hand.
OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50_279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 50_304,
}


def read_olmoe(keys: dict[str, Any]) -> ModelConfig:
    settings = olmoe.HF.settings(keys, where="config.json")
    model = olmoe.HF.read(settings)
    settings.finish()
    return model


def test_a_released_configuration_is_the_model_of_that_name() -> None:
    """With all keys, and with only the keys that differ from the defaults of the library."""
    wanted = canonical(RELEASED["olmoe_1b_7b"]())
    assert canonical(read_olmoe(OLMOE)) == wanted
    said = (
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
    )
    assert canonical(read_olmoe({name: OLMOE[name] for name in said})) == wanted


def test_models_that_olmoe_cannot_express_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"clip_qkv is 8.0, which would change the result: only absent is supported"
    ):
        read_olmoe(OLMOE | {"clip_qkv": 8.0})
    with pytest.raises(
        Inexpressible, match=r"its width, 2048, must equal that of its 16 heads together, 1024"
    ):
        olmoe.HF.write(read_olmoe(OLMOE | {"head_dim": 64}))


# Against transformers ---------------------------------------------------------------------------------------
LLAMA = {"model_type": "llama", "tie_word_embeddings": True}
MOBILELLM = {**LLAMA, "vocab_size": 32_000}  # a class of its own that differs only in names
QWEN = {"vocab_size": 151_936, "tie_word_embeddings": True}
GEMMA3 = {"model_type": "gemma3_text", "head_dim": 256, "vocab_size": 262_144}
GRANITE = {
    "num_hidden_layers": 40,
    "intermediate_size": 8192,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


MAMBA2 = {"vocab_size": 50_288, "n_groups": 1, "tie_word_embeddings": True}
LFM2_KINDS = ["full_attention" if layer in (2, 5, 8, 10, 12, 14) else "conv" for layer in range(16)]
LFM2 = {"num_key_value_heads": 8, "layer_types": LFM2_KINDS, "block_auto_adjust_ff_dim": False}
GRANITE4_H = {
    "vocab_size": 100_352,
    "tie_word_embeddings": True,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "mamba_n_heads": 48,
    "mamba_d_state": 128,
}


def granite4_kinds(layers: int, *full: int) -> list[str]:
    return ["attention" if layer in full else "mamba" for layer in range(layers)]


def sizes(layers: int, width: int, heads: int, kv_heads: int, hidden: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": hidden,
    }


CONFIGS = {
    "gpt2_124m": {"model_type": "gpt2"},
    "gpt2_355m": {"model_type": "gpt2", "n_layer": 24, "n_embd": 1024, "n_head": 16},
    "smollm2_135m": {**LLAMA, "vocab_size": 49_152, **sizes(30, 576, 9, 3, 1536)},
    "smollm2_360m": {**LLAMA, "vocab_size": 49_152, **sizes(32, 960, 15, 5, 2560)},
    "smollm2_1_7b": {**LLAMA, "vocab_size": 49_152, **sizes(24, 2048, 32, 32, 8192)},
    "smollm3_3b": {
        "model_type": "smollm3",
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
        **sizes(36, 2048, 16, 4, 11_008),
    },
    "mobilellm_125m": {**MOBILELLM, **sizes(30, 576, 9, 3, 1536)},
    "mobilellm_350m": {**MOBILELLM, **sizes(32, 960, 15, 5, 2560)},
    "mobilellm_600m": {**MOBILELLM, **sizes(40, 1152, 18, 6, 3072)},
    "mobilellm_1b": {**MOBILELLM, **sizes(54, 1280, 20, 5, 3584)},
    "tinyllama_1_1b": {"model_type": "llama", "vocab_size": 32_000, **sizes(22, 2048, 32, 4, 5632)},
    "llama3_2_1b": {**LLAMA, "vocab_size": 128_256, **sizes(16, 2048, 32, 8, 8192)},
    "llama3_2_3b": {**LLAMA, "vocab_size": 128_256, **sizes(28, 3072, 24, 8, 8192)},
    "qwen2_5_0_5b": {"model_type": "qwen2", **QWEN, **sizes(24, 896, 14, 2, 4864)},
    "qwen2_5_1_5b": {"model_type": "qwen2", **QWEN, **sizes(28, 1536, 12, 2, 8960)},
    "qwen2_5_3b": {"model_type": "qwen2", **QWEN, **sizes(36, 2048, 16, 2, 11_008)},
    "qwen3_0_6b": {"model_type": "qwen3", **QWEN, **sizes(28, 1024, 16, 8, 3072)},
    "qwen3_1_7b": {"model_type": "qwen3", **QWEN, **sizes(28, 2048, 16, 8, 6144)},
    "qwen3_4b": {"model_type": "qwen3", **QWEN, **sizes(36, 2560, 32, 8, 9728)},
    "gemma2_2b": {
        "model_type": "gemma2",
        "vocab_size": 256_000,
        "head_dim": 256,
        **sizes(26, 2304, 8, 4, 9216),
    },
    "gemma3_270m": {**GEMMA3, **sizes(18, 640, 4, 1, 2048), "sliding_window": 512},
    "gemma3_1b": {**GEMMA3, **sizes(26, 1152, 4, 1, 6912), "sliding_window": 512},
    "gemma3_4b": {**GEMMA3, "vocab_size": 262_208, **sizes(34, 2560, 8, 4, 10_240), "sliding_window": 1024},
    "olmo2_1b": {"model_type": "olmo2", "vocab_size": 100_352, **sizes(16, 2048, 16, 16, 8192)},
    "olmoe_1b_7b": {
        "model_type": "olmoe",
        "vocab_size": 50_304,
        "num_experts": 64,
        **sizes(16, 2048, 16, 16, 1024),
    },
    "phi3_mini": {"model_type": "phi3", "sliding_window": 2047},
    "phi4_mini": {
        "model_type": "phi3",
        "vocab_size": 200_064,
        "tie_word_embeddings": True,
        **sizes(32, 3072, 24, 8, 8192),
    },
    "granite3_3_2b": {
        "model_type": "granite",
        "vocab_size": 49_159,
        **GRANITE,
        "hidden_size": 2048,
        "num_attention_heads": 32,
    },
    "granite4_micro": {
        "model_type": "granite",
        "vocab_size": 100_352,
        **GRANITE,
        "hidden_size": 2560,
        "num_attention_heads": 40,
    },
    "mamba2_130m": {
        "model_type": "mamba2",
        **MAMBA2,
        "hidden_size": 768,
        "num_heads": 24,
        "num_hidden_layers": 24,
    },
    "mamba2_370m": {
        "model_type": "mamba2",
        **MAMBA2,
        "hidden_size": 1024,
        "num_heads": 32,
        "num_hidden_layers": 48,
    },
    "mamba2_1_3b": {
        "model_type": "mamba2",
        **MAMBA2,
        "hidden_size": 2048,
        "num_heads": 64,
        "num_hidden_layers": 48,
    },
    "lfm2_350m": {"model_type": "lfm2", **sizes(16, 1024, 16, 8, 4608), **LFM2},
    "lfm2_700m": {"model_type": "lfm2", **sizes(16, 1536, 24, 8, 6912), **LFM2},
    "lfm2_1_2b": {"model_type": "lfm2", **sizes(16, 2048, 32, 8, 8192), **LFM2},
    "granite4_h_350m": {
        "model_type": "granitemoehybrid",
        **GRANITE4_H,
        "hidden_size": 768,
        "num_hidden_layers": 32,
        "num_local_experts": 0,
        "shared_intermediate_size": 2048,
        "layer_types": granite4_kinds(32, 10, 13, 17, 27),
    },
    "granite4_h_1b": {
        "model_type": "granitemoehybrid",
        **GRANITE4_H,
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_local_experts": 0,
        "shared_intermediate_size": 4096,
        "layer_types": granite4_kinds(40, 5, 15, 25, 35),
    },
    "granite4_h_tiny": {
        "model_type": "granitemoehybrid",
        **GRANITE4_H,
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_local_experts": 64,
        "num_experts_per_tok": 6,
        "intermediate_size": 512,
        "shared_intermediate_size": 1024,
        "layer_types": granite4_kinds(40, 5, 15, 25, 35),
    },
    "falcon_h1_0_5b": {
        "model_type": "falcon_h1",
        "vocab_size": 32_784,
        "head_dim": 64,
        **sizes(36, 1024, 8, 2, 2048),
        "mamba_d_ssm": 1536,
        "mamba_n_heads": 24,
        "mamba_d_state": 128,
    },
    "qwen3_5_0_8b": {
        "model_type": "qwen3_5_text",
        "tie_word_embeddings": True,
        "vocab_size": 248_320,
        **sizes(24, 1024, 8, 2, 3584),
        "linear_num_value_heads": 16,
    },
    "qwen3_5_4b": {
        "model_type": "qwen3_5_text",
        "tie_word_embeddings": True,
        "vocab_size": 248_320,
        **sizes(32, 2560, 16, 4, 9216),
    },
    "qwen3_next_80b_a3b": {
        "model_type": "qwen3_next",
        "max_position_embeddings": 262_144,
        "num_hidden_layers": 48,
        "num_experts": 512,
    },
    "olmo_hybrid_7b": {
        "model_type": "olmo_hybrid",
        "vocab_size": 100_352,
        **sizes(32, 3840, 30, 30, 11_008),
        "rope_theta": None,
    },
    "recurrentgemma_2b": {
        "model_type": "recurrent_gemma",
        **sizes(26, 2560, 10, 1, 15_360),
    },
}


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", COUNTS)
def test_transformers_agrees(name: str) -> None:
    """The class that loads the released weights, on torch's meta device: nothing is allocated."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(CONFIGS[name])
    theirs = AutoConfig.for_model(settings.pop("model_type"), pad_token_id=None, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name][0]
    # If the class lists the layers with windows or without positions, they are the same.
    if theirs.model_type.startswith("gemma") or name == "phi3_mini":
        is_full = [
            kind == "full_attention"
            for kind in getattr(theirs, "layer_types", ["sliding"] * len(mixers(name)))
        ]
        assert windows(name) == [None if full else theirs.sliding_window for full in is_full]
    if name == "smollm3_3b":
        assert [int(mixer.rope_base is not None) for mixer in mixers(name)] == theirs.no_rope_layers


ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "olmo_hybrid": "OlmoHybridForCausalLM",
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", COUNTS)
def test_a_released_model_can_be_written_as_the_family_it_came_from(name: str) -> None:
    architecture = ARCHITECTURES[CONFIGS[name]["model_type"]]
    export = choose_family(RELEASED[name](), HF_FAMILIES, format_name="Hugging Face", preferred=architecture)
    assert export.family.architecture == architecture
    assert {key: export.settings[key] for key in CONFIGS[name] if key in export.settings} == CONFIGS[name]


@pytest.mark.nightly
def test_llama_scaling_and_longrope_are_those_of_transformers() -> None:
    """Compare frequencies and magnitudes of the released configs, dim by dim."""
    import numpy as np
    import torch
    from jax import numpy as jnp
    from transformers import LlamaConfig, Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from slmjax.models.zoo.released import PHI4_MINI_FACTORS

    llama3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    long = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": list(PHI4_MINI_FACTORS)}
    shared: dict[str, Any] = {
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "max_position_embeddings": 131_072,
    }
    cases = {
        "llama3_2_3b": LlamaConfig(
            **shared, rope_parameters={**llama3, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
        ),
        "phi4_mini": Phi3Config(
            **shared,
            original_max_position_embeddings=4096,
            rope_parameters={
                **long,
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 4096,
            },
        ),
    }
    for name, config in cases.items():
        mixer = mixers(name)[0]
        rotated = 96 if name == "phi4_mini" else 128
        assert mixer.rope_base is not None and mixer.rope_scaling is not None
        expected, magnitude = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](
            config, torch.device("cpu"), seq_len=131_072
        )
        unscaled = mixer.rope_base ** (-jnp.arange(0, rotated, 2) / rotated)
        frequencies = mixer.rope_scaling.scaled(unscaled, mixer.rope_base, jnp.full((1, 1), 5000))
        np.testing.assert_allclose(frequencies[0, 0, 0], expected, rtol=1e-5)
        np.testing.assert_allclose(mixer.rope_scaling.magnitude, magnitude, rtol=1e-6)


def test_configs_are_read_back_as_they_were_written() -> None:
    """Released configs contain what small ones do not: scalings, other kinds of norms, learned positions."""
    for name in ("gpt2_124m", "gemma3_4b", "llama3_2_1b", "olmoe_1b_7b", "phi4_mini"):
        assert from_json(ModelConfig, to_json(RELEASED[name]())) == RELEASED[name]()
