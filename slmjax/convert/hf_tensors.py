"""The names that most Hugging Face models give their tensors: rules to build a family's table from."""

from slmjax.convert.family import Rule, linear, norm, same

EMBEDDING: tuple[Rule, ...] = (
    same("embed/table", "model.embed_tokens.weight"),
    *norm("final_norm", "model.norm"),
    same("head/weight", "lm_head.weight"),
)
ATTENTION: tuple[Rule, ...] = (
    *linear("mixer/query", "self_attn.q_proj"),
    *linear("mixer/key", "self_attn.k_proj"),
    *linear("mixer/value", "self_attn.v_proj"),
    *linear("mixer/output", "self_attn.o_proj"),
    *norm("mixer/query_norm", "self_attn.q_norm"),
    *norm("mixer/key_norm", "self_attn.k_norm"),
)
GATED_MLP: tuple[Rule, ...] = (
    *linear("ffn/gate", "mlp.gate_proj"),
    *linear("ffn/up", "mlp.up_proj"),
    *linear("ffn/down", "mlp.down_proj"),
)
NORMS: tuple[Rule, ...] = (*norm("mixer_norm", "input_layernorm"), *norm("ffn_norm", "post_attention_layernorm"))
