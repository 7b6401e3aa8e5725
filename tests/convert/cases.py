"""Small models of every family with its odd corners: the class of transformers, and the settings of its
configuration.
"""

from typing import Any

# Heads wider than width over heads, an odd number of layers, a vocabulary that nothing divides.
_SMALL: dict[str, Any] = {
    "vocab_size": 47,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}

_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}

# Two heads of values for each head of keys.
_DELTA_NET = {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 3,
}
_SHARED_EXPERT = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 14,
}
_SMALL_WITHOUT_MLP = {name: value for name, value in _SMALL.items() if name != "intermediate_size"}
_SMALL_WITHOUT_HEADS = {name: value for name, value in _SMALL.items() if name != "head_dim"}
_VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_heads": 1,
    "out_hidden_size": 24,
    "patch_size": 2,
    "num_position_embeddings": 4,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        _SMALL
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama_tied": (
        "LlamaForCausalLM",
        _SMALL | {"tie_word_embeddings": True, "head_dim": 6, "hidden_act": "gelu"},
    ),
    "mistral": (
        "MistralForCausalLM",
        _SMALL | {"sliding_window": 5, "num_attention_heads": 5, "num_key_value_heads": 1},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        _SMALL
        | {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 1e4, **_YARN},
        },
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        _SMALL
        | {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        _SMALL
        | {
            "num_hidden_layers": 3,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "mlp_only_layers": [0],
            "norm_topk_prob": False,
            "attention_bias": True,
        },
    ),
    # A share of dims to rotate that is no whole number, a dense layer.
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        _SMALL
        | {
            "num_hidden_layers": 4,
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            "head_dim": 10,
            "attention_bias": True,
            "partial_rotary_factor": 0.45,
            **_DELTA_NET,
            **_SHARED_EXPERT,
            "mlp_only_layers": [2],
            "norm_topk_prob": False,
        },
    ),
    "qwen3_5": (
        "Qwen3_5ForCausalLM",
        _SMALL
        | {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "tie_word_embeddings": True,
            **_DELTA_NET,
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        _SMALL_WITHOUT_MLP
        | {"layer_types": ["full_attention", "linear_attention"], **_DELTA_NET, **_SHARED_EXPERT},
    ),
    "qwen3_5_vision": (
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": _SMALL
            | {
                "layer_types": ["full_attention", "linear_attention"],
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.75,
                    "mrope_section": [1, 1, 1],
                    "mrope_interleaved": True,
                },
                **_DELTA_NET,
            },
            "vision_config": _VISION,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_5_moe_vision": (
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": _SMALL_WITHOUT_MLP
            | {"layer_types": ["linear_attention", "full_attention"], **_DELTA_NET, **_SHARED_EXPERT},
            "vision_config": _VISION,
        },
    ),
    # Norms before linear layers and after full ones; no positions.
    "olmo_hybrid": (
        "OlmoHybridForCausalLM",
        _SMALL_WITHOUT_HEADS
        | {
            "num_hidden_layers": 5,
            "num_key_value_heads": 2,
            "layer_types": [
                "linear_attention",
                "full_attention",
                "linear_attention",
                "full_attention",
                "linear_attention",
            ],
            "pad_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": None},
            **_DELTA_NET,
            # As wide as all values together: transformers saves the convolutions in thirds.
            "linear_key_head_dim": 14,
        },
    ),
    # A recurrence wider than the model, and windows shorter than the text.
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        {
            "vocab_size": 47,
            "hidden_size": 24,
            "intermediate_size": 41,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "lru_width": 30,
            "attention_window_size": 6,
            "conv1d_width": 3,
            "logits_soft_cap": 4.0,
            "block_types": ["recurrent", "attention", "recurrent"],
            "partial_rotary_factor": 0.75,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 6},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        _SMALL
        | {
            "num_hidden_layers": 3,
            "sliding_window": 5,
            "query_pre_attn_scalar": 13,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        _SMALL
        | {
            "num_hidden_layers": 7,
            "sliding_window": 4,
            "query_pre_attn_scalar": 11,
            "final_logit_softcapping": 5.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3_vision": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _SMALL | {"sliding_window": 4},
            "vision_config": {
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "image_size": 8,
                "patch_size": 4,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 44,
            "eoi_token_index": 45,
            "image_token_index": 46,
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", _SMALL | {"num_key_value_heads": 4, "head_dim": 6}),
    "olmo3": (
        "Olmo3ForCausalLM",
        _SMALL
        | {
            "num_hidden_layers": 5,
            "sliding_window": 4,
            "rope_parameters": {
                "full_attention": {"rope_theta": 5e4, **_YARN},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
            },
        },
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        _SMALL
        | {
            "head_dim": 6,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "intermediate_size": 12,
            "attention_bias": True,
        },
    ),
    # Half of 6 dims is an odd number: transformers rotates 4.
    "phi3": (
        "Phi3ForCausalLM",
        _SMALL
        | {
            "sliding_window": 7,
            "head_dim": 6,
            "partial_rotary_factor": 0.5,
            "pad_token_id": 0,
            "num_key_value_heads": 4,
        },
    ),
    "phi4_mini": (
        "Phi3ForCausalLM",
        _SMALL
        | {
            "hidden_size": 32,
            "original_max_position_embeddings": 16,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [1.0, 2.5, 6.0],
            },
        },
    ),
    "smollm3": (
        "SmolLM3ForCausalLM",
        _SMALL
        | {
            "num_hidden_layers": 5,
            "use_sliding_window": True,
            "sliding_window": 6,
            "mlp_bias": True,
            "pad_token_id": 0,
        },
    ),
    "granite": (
        "GraniteForCausalLM",
        _SMALL
        | {
            "embedding_multiplier": 12.0,
            "logits_scaling": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "tie_word_embeddings": True,
        },
    ),
    "granite4_micro": (
        "GraniteMoeHybridForCausalLM",
        _SMALL
        | {
            "hidden_size": 64,
            "layer_types": ["attention"] * 2,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 20,
            "position_embedding_type": "rope",
            "embedding_multiplier": 12.0,
            "logits_scaling": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
        },
    ),
    "granite4_hybrid": (
        "GraniteMoeHybridForCausalLM",
        _SMALL
        | {
            "num_hidden_layers": 5,
            "layer_types": [
                "linear_attention",
                "linear_attention",
                "full_attention",
                "linear_attention",
                "full_attention",
            ],
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "intermediate_size": 12,
            "shared_intermediate_size": 20,
            "mamba_n_heads": 6,
            "mamba_n_groups": 3,
            "mamba_d_state": 7,
            "mamba_d_conv": 3,
            "mamba_proj_bias": True,
            "embedding_multiplier": 12.0,
            "logits_scaling": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "tie_word_embeddings": True,
        },
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        {
            "vocab_size": 47,
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_heads": 6,
            "head_dim": 8,
            "state_size": 5,
            "n_groups": 2,
            "chunk_size": 8,
            "use_bias": True,
            "layer_norm_epsilon": 1e-5,
        },
    ),
    "mamba2_tied": (
        "Mamba2ForCausalLM",
        {
            "vocab_size": 47,
            "hidden_size": 20,
            "num_hidden_layers": 2,
            "num_heads": 12,
            "head_dim": 5,
            "state_size": 6,
            "n_groups": 1,
            "expand": 3,
            "conv_kernel": 2,
            "use_conv_bias": False,
            "layer_norm_epsilon": 1e-3,
            "tie_word_embeddings": True,
        },
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        _SMALL
        | {
            "num_hidden_layers": 5,
            "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
            "intermediate_size": 61,
            "block_multiple_of": 6,
            "block_ffn_dim_multiplier": 1.1,
            "conv_L_cache": 4,
            "conv_bias": True,
            "norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        _SMALL
        | {
            "num_hidden_layers": 3,
            "mamba_d_ssm": 30,
            "mamba_n_heads": 6,
            "mamba_n_groups": 2,
            "mamba_d_state": 7,
            "lm_head_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "key_multiplier": 0.39,
            "attention_in_multiplier": 1.2,
            "attention_out_multiplier": 0.9,
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.6,
            "ssm_multipliers": [0.4, 1.3, 0.8, 1.2, 0.7],
            "mlp_multipliers": [0.9, 0.6],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
        },
    ),
    "falcon_h1_normed": (
        "FalconH1ForCausalLM",
        _SMALL
        | {
            "mamba_d_ssm": None,
            "mamba_n_heads": 4,
            "mamba_n_groups": 2,
            "mamba_d_state": 5,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": True,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        _SMALL
        | {
            "num_hidden_layers": 3,
            "sliding_window": 5,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_theta": 1e4, "truncate": False, **_YARN},
        },
    ),
    "deepseek_v2_lite": (
        "DeepseekV2ForCausalLM",
        _SMALL
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "head_dim": 4,
            "kv_lora_rank": 10,
            "q_lora_rank": None,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "rope_parameters": {"rope_theta": 1e4, "mscale": 0.707, "mscale_all_dim": 0.9, **_YARN},
        },
    ),
    "minicpm3": (
        "MiniCPM3ForCausalLM",
        _SMALL
        | {
            "num_key_value_heads": 4,
            "head_dim": 4,
            "kv_lora_rank": 10,
            "q_lora_rank": 9,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
            "scale_emb": 3,
            "scale_depth": 1.4,
            "dim_model_base": 16,
            "rms_norm_eps": 1e-5,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 47,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "n_inner": 52,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
}
