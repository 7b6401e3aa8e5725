"""The families that are known, one file each."""

from slmjax.convert.families import llama, qwen3
from slmjax.convert.family import Family

# In the order in which an export tries them.
HF_FAMILIES: tuple[Family, ...] = (llama.HF, qwen3.HF)
