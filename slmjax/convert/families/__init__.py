"""Supported families of models, one file each."""

from collections.abc import Mapping

from slmjax.convert.families import (
    deepseek_v2,
    falcon_h1,
    gemma2,
    gemma3,
    gpt2,
    gpt_oss,
    granite,
    granite_hybrid,
    lfm2,
    llama,
    mamba2,
    minicpm3,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmo_hybrid,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
    recurrent_gemma,
    smollm3,
)
from slmjax.convert.family import Family

# In the order in which an export tries them: the most widely supported come first.
HF_FAMILIES: tuple[Family, ...] = (
    llama.HF,
    llama.HF_MOBILE,
    qwen3.HF,
    qwen2.HF,
    mistral.HF,
    mixtral.HF,
    qwen3_moe.HF,
    qwen3_next.HF,
    qwen3_5.HF,
    qwen3_5.HF_MOE,
    qwen3_5.HF_WITH_VISION,
    qwen3_5.HF_MOE_WITH_VISION,
    gemma2.HF,
    gemma3.HF,
    gemma3.HF_WITH_VISION,
    recurrent_gemma.HF,
    olmo2.HF,
    olmo3.HF,
    olmoe.HF,
    olmo_hybrid.HF,
    phi3.HF,
    smollm3.HF,
    granite.HF,
    granite_hybrid.HF,
    lfm2.HF,
    falcon_h1.HF,
    mamba2.HF,
    gpt_oss.HF,
    gpt2.HF,
    deepseek_v2.HF,
    minicpm3.HF,
)

# llama.cpp's architectures, in the same order, except that Qwen2 is before "llama", which could represent it
# too. Mistral and Mixtral are "llama" there, OLMo 3 is "olmo2".
GGUF_FAMILIES: tuple[Family, ...] = (
    qwen2.GGUF,
    llama.GGUF,
    qwen3.GGUF,
    qwen3_moe.GGUF,
    gemma2.GGUF,
    gemma3.GGUF,
    olmo2.GGUF,
    phi3.GGUF,
    smollm3.GGUF,
    granite.GGUF,
    granite_hybrid.GGUF,
    gpt_oss.GGUF,
    gpt2.GGUF,
    lfm2.GGUF,
    falcon_h1.GGUF,
    mamba2.GGUF,
)

# The architecture of an imported model in the other format. An export tries it first.
GGUF_NAMES: Mapping[str, str] = {
    family.HF.architecture: family.GGUF.architecture
    for family in (
        llama,
        qwen3,
        qwen2,
        qwen3_moe,
        gemma2,
        gemma3,
        olmo2,
        phi3,
        smollm3,
        granite,
        granite_hybrid,
        gpt_oss,
        gpt2,
        lfm2,
        falcon_h1,
        mamba2,
    )
}
# What models with a vision tower are exported as.
LANGUAGE_MODELS: Mapping[str, str] = {
    gemma3.HF_WITH_VISION.architecture: gemma3.HF.architecture,
    qwen3_5.HF_WITH_VISION.architecture: qwen3_5.HF.architecture,
    qwen3_5.HF_MOE_WITH_VISION.architecture: qwen3_5.HF_MOE.architecture,
}
HF_NAMES: Mapping[str, str] = {**LANGUAGE_MODELS, **{gguf: hf for hf, gguf in GGUF_NAMES.items()}}
