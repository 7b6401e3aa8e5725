"""Sampling: continuations of prompts of different lengths, in batches.

    sample(definition, params, buffers, [[bos, 17, 4]], config=SamplingConfig(), eos_id=1)   # ids to ids
    generate(loaded, ["def main("])                                                          # text to text
    conversation = [{"role": "user", "content": "Hello"}]
    generate(loaded, [encode_chat(loaded.tokenizer, conversation)])                          # to its answer

In order: `settings.py` checks the settings, `choice.py` chooses the next token, `progress.py` has the state
of a batch, `speculation.py` drafts and verifies several tokens at a time, `decoding.py` runs the model,
`text.py` goes from text to text. `data/chat.py` makes the prompts of conversations.
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
