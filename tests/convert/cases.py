"""Small models of every family with its odd corners: the class of transformers, and the settings of its configuration."""

from typing import Any

# Heads wider than width over heads, an odd number of layers, a vocabulary that nothing divides.
_SMALL: dict[str, Any] = {
    "vocab_size": 47, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        _SMALL | {
            "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama_tied": ("LlamaForCausalLM", _SMALL | {"tie_word_embeddings": True, "head_dim": 6, "hidden_act": "gelu"}),
    "qwen3": (
        "Qwen3ForCausalLM",
        _SMALL | {
            "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
