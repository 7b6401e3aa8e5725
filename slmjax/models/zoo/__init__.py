"""Named architectures, and the sizes and costs of any architecture.

    zoo.nano()                                   # -> ModelConfig; the tokenizer sets the vocabulary size
    zoo.ARCHITECTURES["qwen3_0_6b"]()            # -> ModelConfig, complete
    zoo.describe(zoo.ARCHITECTURES["nano"]())    # -> Summary: parameters, FLOPs, bytes

Small architectures of this project are in `ours.py`, released models at their sizes in `released.py` and
`released_hybrids.py`.

Files in reading order:

- ours.py: small architectures of this project
- released.py: released models with attention in all layers, at their sizes
- released_hybrids.py: released models with recurrent layers or convolutions
- costs.py: parameters, FLOPs and bytes of an architecture
"""

import functools
from collections.abc import Callable, Mapping

from slmjax.models.architecture import ModelConfig
from slmjax.models.zoo.costs import LENGTHS, LengthCosts, Summary, block_state_size, describe, state_size
from slmjax.models.zoo.ours import nano, nano_moe, nano_window, shakespeare_char, slm_12m, slm_124m
from slmjax.models.zoo.released import (
    RELEASED_ATTENTION,
    gemma2_2b,
    gemma3_1b,
    gemma3_4b,
    gemma3_270m,
    gpt2_124m,
    gpt2_355m,
    granite3_3_2b,
    granite4_micro,
    llama3_2_1b,
    llama3_2_3b,
    mobilellm_1b,
    mobilellm_125m,
    mobilellm_350m,
    mobilellm_600m,
    olmo2_1b,
    olmoe_1b_7b,
    phi3_mini,
    phi4_mini,
    qwen2_5_0_5b,
    qwen2_5_1_5b,
    qwen2_5_3b,
    qwen3_0_6b,
    qwen3_1_7b,
    qwen3_4b,
    smollm2_1_7b,
    smollm2_135m,
    smollm2_360m,
    smollm3_3b,
    tinyllama_1_1b,
)
from slmjax.models.zoo.released_hybrids import (
    RELEASED_HYBRIDS,
    falcon_h1_0_5b,
    granite4_h_1b,
    granite4_h_350m,
    granite4_h_tiny,
    lfm2_1_2b,
    lfm2_350m,
    lfm2_700m,
    mamba2_1_3b,
    mamba2_130m,
    mamba2_370m,
    olmo_hybrid_7b,
    qwen3_5_0_8b,
    qwen3_5_4b,
    qwen3_next_80b_a3b,
    recurrentgemma_2b,
)

RELEASED: Mapping[str, Callable[[], ModelConfig]] = {**RELEASED_ATTENTION, **RELEASED_HYBRIDS}
# Complete configurations: ours have the vocabulary size of the experiment of the same name.
ARCHITECTURES: Mapping[str, Callable[[], ModelConfig]] = {
    "nano": functools.partial(nano, vocab_size=2048),
    "nano_moe": functools.partial(nano_moe, vocab_size=2048),
    "nano_window": functools.partial(nano_window, vocab_size=2048),
    "shakespeare_char": functools.partial(shakespeare_char, vocab_size=67),  # 65 characters, BOS, EOS
    "slm_12m": slm_12m,
    "slm_124m": slm_124m,
    **RELEASED,
}

__all__ = [
    "ARCHITECTURES",
    "LENGTHS",
    "RELEASED",
    "LengthCosts",
    "Summary",
    "block_state_size",
    "describe",
    "falcon_h1_0_5b",
    "gemma2_2b",
    "gemma3_1b",
    "gemma3_270m",
    "gemma3_4b",
    "gpt2_124m",
    "gpt2_355m",
    "granite3_3_2b",
    "granite4_h_1b",
    "granite4_h_350m",
    "granite4_h_tiny",
    "granite4_micro",
    "lfm2_1_2b",
    "lfm2_350m",
    "lfm2_700m",
    "llama3_2_1b",
    "llama3_2_3b",
    "mamba2_130m",
    "mamba2_1_3b",
    "mamba2_370m",
    "mobilellm_125m",
    "mobilellm_1b",
    "mobilellm_350m",
    "mobilellm_600m",
    "nano",
    "nano_moe",
    "nano_window",
    "olmo2_1b",
    "olmoe_1b_7b",
    "phi3_mini",
    "phi4_mini",
    "qwen2_5_0_5b",
    "qwen2_5_1_5b",
    "qwen2_5_3b",
    "qwen3_0_6b",
    "qwen3_1_7b",
    "qwen3_4b",
    "shakespeare_char",
    "slm_124m",
    "slm_12m",
    "smollm2_135m",
    "smollm2_1_7b",
    "smollm2_360m",
    "smollm3_3b",
    "state_size",
    "tinyllama_1_1b",
    "olmo_hybrid_7b",
    "qwen3_5_0_8b",
    "qwen3_5_4b",
    "qwen3_next_80b_a3b",
    "recurrentgemma_2b",
]
