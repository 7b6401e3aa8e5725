"""Sampling: text that a model continues, prompts of different lengths together.

    sample(definition, params, buffers, [[bos, 17, 4]], config=SamplingConfig(), eos_id=1)   # token ids to
    token ids generate(loaded, ["def main("])                                                         # text
    to text generate(loaded, [encode_chat(loaded.tokenizer, [{"role": "user", "content": "Hello"}])])   # a
    conversation to its answer

`settings.py` says how tokens are chosen and checks what is asked, `choice.py` chooses, `decoding.py` runs the
model, `text.py` goes from text to text. Prompts of conversations, by a model's template, are made in
`data/chat.py`.
"""

from slmjax.data.chat import encode_chat, render_chat
from slmjax.sampling.choice import filtered_logits, next_tokens, penalised
from slmjax.sampling.decoding import Continuation, sample
from slmjax.sampling.settings import SamplingConfig, check_prompts, length_limits
from slmjax.sampling.text import FinishReason, Generation, encode_prompts, generate

__all__ = [
    "Continuation",
    "FinishReason",
    "Generation",
    "SamplingConfig",
    "check_prompts",
    "encode_chat",
    "encode_prompts",
    "filtered_logits",
    "generate",
    "length_limits",
    "next_tokens",
    "penalised",
    "render_chat",
    "sample",
]
