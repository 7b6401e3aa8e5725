"""Names of tensors in most Hugging Face models: rules for the tensor maps of families."""

from slmjax.convert.family import Rule, experts, linear, matrix, norm, same

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
PRE_NORMS: tuple[Rule, ...] = (
    *norm("mixer_norm", "input_layernorm"),
    *norm("ffn_norm", "post_attention_layernorm"),
)
# Llama uses the first name for the norm before the MLP, these families for the one after attention.
POST_NORMS: tuple[Rule, ...] = (
    *norm("mixer_post_norm", "post_attention_layernorm"),
    *norm("ffn_post_norm", "post_feedforward_layernorm"),
)
SANDWICH_NORMS: tuple[Rule, ...] = (
    *norm("mixer_norm", "input_layernorm"),
    *norm("ffn_norm", "pre_feedforward_layernorm"),
    *POST_NORMS,
)
MOE: tuple[Rule, ...] = (
    matrix("ffn/router/weight", "mlp.gate.weight"),
    experts("ffn/experts/gate", "mlp.experts.{e}.gate_proj.weight"),
    experts("ffn/experts/up", "mlp.experts.{e}.up_proj.weight"),
    experts("ffn/experts/down", "mlp.experts.{e}.down_proj.weight"),
)
