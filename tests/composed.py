"""One small model that holds at once what released models have one of each: norms with biases, sinks, learned
positions, and so on.
"""

from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig, NormPlacement
from slmjax.models.ffn.mlp import Activation, MlpConfig
from slmjax.models.ffn.moe import Balance, MoeConfig
from slmjax.models.layers import NormKind
from slmjax.models.mixers.attention import AttentionConfig, Biases, OutputGate, QkNorm
from slmjax.models.rope import YarnScaling


def composed_model(*, repeats: int = 2, **settings) -> ModelConfig:
    """Repeats of a window layer with experts and a full one that is dense."""
    window = BlockConfig(
        mixer=AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            window=6,
            sinks=True,
            output_gate=OutputGate.PER_HEAD,
            qk_norm=QkNorm.ALL_HEADS,
            biases=Biases.ALL,
            rope_base=500.0,
            rope_scaling=YarnScaling(factor=4.0, original_context=16, attention_factor=1.1),
        ),
        ffn=MoeConfig(
            num_experts=4, hidden_dim=16, bias=True, activation=Activation.CLAMPED_SILU, balance=Balance.BIAS
        ),
    )
    full = BlockConfig(
        mixer=AttentionConfig(
            num_heads=4,
            num_kv_heads=1,
            sinks=True,
            output_gate=OutputGate.PER_ELEMENT,
            qk_norm=QkNorm.PER_HEAD,
            biases=Biases.QKV,
            rope_base=None,
            softcap=20.0,
        ),
        ffn=MlpConfig(hidden_dim=48, activation=Activation.GELU_EXACT, gated=False, bias=True),
        norm=NormPlacement.SANDWICH,
    )
    return ModelConfig(
        embed_dim=32,
        stack=(LayerGroup(pattern=(window, full), repeats=repeats),),
        context_length=64,
        learned_positions=64,
        norm_kind=NormKind.LAYER,
        norm_eps=1e-5,
        embed_multiplier=2.0,
        residual_multiplier=0.7,
        logit_multiplier=0.5,
        **settings,
    )
