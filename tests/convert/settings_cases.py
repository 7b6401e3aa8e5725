"""Settings of rotary positions in every place where a config.json can have them, for tests against
transformers.
"""

from typing import Any

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 8.0}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.5, 6.0],
}
LONG_LEGACY = {name: value for name, value in LONG.items() if name != "rope_type"}
LINEAR_LEGACY = {"type": "linear", "factor": 2.0, "rope_theta": 7e4}
SU = LONG_LEGACY | {"type": "su", "original_max_position_embeddings": 16}


def plain(base: float) -> dict[str, Any]:
    """Angles as they are."""
    return {"rope_type": "default", "rope_theta": base}


def by_kind(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    """Settings for either kind of layer."""
    return {"full_attention": full, "sliding_attention": sliding}


# The case of cases.py, and what its config.json has besides: the keys of NAMES are taken away first.
NAMES = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor")
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing": ("llama", {}),
    "new": ("llama", {"rope_parameters": plain(5e5) | LLAMA3}),
    "both": ("llama", {"rope_parameters": plain(5e5), "rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "both_without_base": ("llama", {"rope_parameters": plain(5e5), "rope_scaling": LLAMA3}),
    "both_scaled": ("llama", {"rope_parameters": plain(5e5) | LLAMA3, "rope_scaling": LINEAR_LEGACY}),
    "empty": ("qwen3", {"rope_parameters": plain(1e6) | YARN, "rope_scaling": {}}),
    "null": ("qwen3", {"rope_parameters": plain(1e6) | YARN, "rope_scaling": None}),
    "yarn_qwen3": ("qwen3", {"rope_parameters": plain(1e6), "rope_scaling": YARN, "rope_theta": 1e6}),
    "yarn_original_outside": (
        "qwen3",
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            "rope_theta": 1e6,
            "original_max_position_embeddings": 16,
        },
    ),
    "yarn_turns_of_zero": ("qwen3", {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": 0}}),
    "yarn_attention_factor": ("qwen3", {"rope_scaling": YARN | {"attention_factor": 1.5, "truncate": False}}),
    "mixtral": ("mixtral", {"rope_scaling": LINEAR}),
    "smollm3": ("smollm3", {"rope_parameters": plain(5e6), "rope_scaling": YARN}),
    "granite": ("granite", {"rope_parameters": plain(1e5), "rope_scaling": LLAMA3, "rope_theta": 3e5}),
    "gemma2": ("gemma2", {"rope_parameters": plain(1e5), "rope_scaling": LINEAR}),
    "gemma3": ("gemma3", {"rope_parameters": by_kind(plain(1e6), plain(1e4)), "rope_scaling": LINEAR}),
    "gemma3_released": ("gemma3", {"rope_scaling": LINEAR, "rope_theta": 2e6, "rope_local_base_freq": 3e4}),
    "gemma3_base": (
        "gemma3",
        {"rope_parameters": by_kind(plain(1e6), plain(2e4)), "rope_scaling": YARN | {"rope_theta": 3e5}},
    ),
    "olmo3": ("olmo3", {"rope_parameters": by_kind(plain(4e5), plain(3e5)), "rope_scaling": YARN}),
    "olmo3_released": (
        "olmo3",
        {"rope_scaling": YARN | {"beta_fast": 32, "beta_slow": 1}, "rope_theta": 500_000},
    ),
    "gpt_oss_nothing": ("gpt_oss", {}),
    "gpt_oss": ("gpt_oss", {"rope_parameters": plain(1e4), "rope_scaling": YARN | {"truncate": False}}),
    "deepseek": (
        "deepseek_v2_lite",
        {
            "rope_parameters": plain(1e4) | YARN | {"mscale": 0.707, "mscale_all_dim": 0.9},
            "rope_scaling": YARN | {"factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5},
        },
    ),
    "deepseek_plain": ("deepseek_v2_lite", {"rope_parameters": plain(3e4)}),
    "minicpm3": ("minicpm3", {"rope_parameters": plain(1e4), "rope_scaling": YARN | {"mscale_all_dim": 0.7}}),
    "phi4_mini": (
        "phi4_mini",
        {"rope_parameters": plain(2e4), "rope_scaling": LONG, "partial_rotary_factor": 0.75},
    ),
    "phi4_mini_su": ("phi4_mini", {"rope_scaling": SU, "partial_rotary_factor": 0.75, "rope_theta": 2e4}),
    "phi4_mini_yarn": (
        "phi4_mini",
        {"rope_scaling": LONG_LEGACY | {"type": "yarn"}, "partial_rotary_factor": 0.75},
    ),
}


def config_with(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A config.json with these settings of rotary positions and no others."""
    return {name: value for name, value in config.items() if name not in NAMES} | changes
