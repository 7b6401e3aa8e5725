"""The families that are known, one file each."""

from collections.abc import Mapping

from slmjax.convert.families import (
    deepseek_v2,
    gemma2,
    gemma3,
    gpt2,
    gpt_oss,
    granite,
    llama,
    minicpm3,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from slmjax.convert.family import Family

# In the order in which an export tries them: what most engines know comes first.
HF_FAMILIES: tuple[Family, ...] = (
    llama.HF,
    llama.HF_MOBILE,
    qwen3.HF,
    qwen2.HF,
    mistral.HF,
    mixtral.HF,
    qwen3_moe.HF,
    gemma2.HF,
    gemma3.HF,
    gemma3.HF_WITH_VISION,
    olmo2.HF,
    olmo3.HF,
    olmoe.HF,
    phi3.HF,
    smollm3.HF,
    granite.HF,
    granite.HF_HYBRID,
    gpt_oss.HF,
    gpt2.HF,
    deepseek_v2.HF,
    minicpm3.HF,
)

# What llama.cpp calls them, in the same order but for Qwen2, which "llama" could say too. Mistral and Mixtral
# are "llama" there, OLMo 3 is "olmo2".
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
    gpt_oss.GGUF,
    gpt2.GGUF,
)

# What an imported model is exported as, if that can say what it has become; by its own name in the other
# format.
GGUF_NAMES: Mapping[str, str] = {
    one.HF.architecture: one.GGUF.architecture
    for one in (llama, qwen3, qwen2, qwen3_moe, gemma2, gemma3, olmo2, phi3, smollm3, granite, gpt_oss, gpt2)
}
HF_NAMES: Mapping[str, str] = {gguf: hf for hf, gguf in GGUF_NAMES.items()}
