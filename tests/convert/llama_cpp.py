"""llama.cpp, driven through xllamacpp: an engine nobody here wrote, which says what a GGUF file means.

`slmjax.convert.gguf.llama_cpp` runs llama.cpp's server inside the process, and the server answers on a free
port of this machine too: `/tokenize` and `/completion` are asked over HTTP as any client would.
"""

import functools
import json
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.convert.gguf.container import PendingTensor, write_gguf
from slmjax.convert.gguf.llama_cpp import logprobs, serve

__all__ = ["ask", "generate", "logprobs", "target_logprobs", "tokenize", "write_tiny_llama"]

HIDDEN = 32
FFN = 32
HEADS = 2


def ask(path: Path, route: str, body: Mapping[str, Any], *, context: int = 2048) -> Any:
    """One request to the server that has the file loaded; its path should be new, since a server stays with
    what it has read.
    """
    url = serve(path, context=context).listening_address + route
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.loads(response.read())


def tokenize(
    path: Path, text: str, *, add_special: bool = False, parse_special: bool = False, context: int = 2048
) -> list[int]:
    """Ids of a text: with BOS and EOS as the file says, and with special tokens in the text found or taken
    for text.
    """
    body = {"content": text, "add_special": add_special, "parse_special": parse_special}
    return ask(path, "/tokenize", body, context=context)["tokens"]


def target_logprobs(
    path: Path, tokens: Sequence[int], *, first: int = 1, num_asked: int = 1000
) -> np.ndarray:
    """Natural log-probability float64 [T - first] of each of `tokens` from the position `first` on, given
    those before it.

    Quick for large vocabularies: of each position the likeliest `num_asked` are asked for, and all where the
    token is not among them. The server's own sum over the vocabulary is left as it is (`logprobs` does it
    again).
    """
    letter = tokenize(path, "a")[-1]
    found = []
    for end in range(first, len(tokens)):
        body = {
            "prompt": list(tokens[:end]),
            "n_predict": 1,
            "logit_bias": [[letter, 1000.0]],
            "temperature": 0.0,
            "cache_prompt": True,
        }
        for asked in (num_asked, 2**20):
            answer = ask(path, "/completion", {**body, "n_probs": asked})
            entries = answer["completion_probabilities"][0]["top_logprobs"]
            if matching := [entry["logprob"] for entry in entries if entry["id"] == tokens[end]]:
                found.append(matching[0])
                break
        else:
            raise AssertionError(f"llama.cpp has no token {tokens[end]}")
    return np.array(found, np.float64)


def generate(path: Path, prompt: str | Sequence[int], max_tokens: int) -> tuple[list[int], str]:
    """The ids and the text of the likeliest continuation; a text prompt gets BOS as the file says, and
    special tokens in it are found.
    """
    body = {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "n_predict": max_tokens,
        "temperature": 0.0,
    }
    answer = ask(path, "/completion", {**body, "top_k": 1, "return_tokens": True, "cache_prompt": False})
    return answer["tokens"], answer["content"]


def write_tiny_llama(path: Path, tokenizer: Mapping[str, Any]) -> None:
    """A GGUF of one random layer with the vocabulary, which llama.cpp loads in a moment."""
    rows = len(tokenizer["tokenizer.ggml.tokens"])
    generator = np.random.default_rng(0)
    shapes = {
        "token_embd": (rows, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
    }
    shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
    shapes |= {
        "blk.0.ffn_gate": (FFN, HIDDEN),
        "blk.0.ffn_up": (FFN, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FFN),
    }
    numbers = {
        f"{name}.weight": (0.3 * generator.normal(size=shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    metadata = {
        "llama.block_count": 1,
        "llama.context_length": 2048,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HIDDEN // HEADS,
        "llama.vocab_size": rows,
        **tokenizer,
    }
    pending = [
        PendingTensor(
            name=name, shape=value.shape, dtype=np.float32, read=functools.partial(np.asarray, value)
        )
        for name, value in numbers.items()
    ]
    write_gguf(path, architecture="llama", metadata=metadata, tensors=pending)
