"""OLMo 2: norms after each sublayer alone, queries and keys normed over all heads together."""

from typing import Any

from slmjax.architecture import BlockConfig, ModelConfig, NormPlacement
from slmjax.attention import Biases, QkNorm
from slmjax.convert.family import Family, Table
from slmjax.convert.hf_settings import first_block, read_attention, read_decoder, read_mlp, write_attention, write_decoder, write_mlp
from slmjax.convert.hf_tensors import ATTENTION, EMBEDDING, GATED_MLP, POST_NORMS
from slmjax.convert.settings import Settings


def read(settings: Settings) -> ModelConfig:
    """config.json -> ModelConfig."""
    biases = Biases.ALL if settings.take("attention_bias", False) else Biases.NONE
    attention = read_attention(settings, qk_norm=QkNorm.ALL_HEADS, biases=biases)
    block = BlockConfig(mixer=attention, ffn=read_mlp(settings), norm=NormPlacement.POST)
    return read_decoder(settings, [block] * settings.take("num_hidden_layers"), norm_eps=settings.take("rms_norm_eps", 1e-5))


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    attention, ffn = first_block(model)
    biases = {"attention_bias": attention.biases is Biases.ALL}
    return {"model_type": "olmo2", **write_decoder(model), **write_attention(attention), **write_mlp(ffn), **biases}


TABLE = Table(around=EMBEDDING, layer=(*POST_NORMS, *ATTENTION, *GATED_MLP))
HF = Family(architecture="Olmo2ForCausalLM", read=read, write=write, table=TABLE)
