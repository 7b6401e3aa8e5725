"""llama.cpp, driven through xllamacpp: an engine nobody here wrote, which says what a GGUF file means.

xllamacpp runs llama.cpp's server inside the process, and the server answers on a free port of this machine: `/tokenize` and `/completion`
are asked over HTTP as any client would. The cache of keys and values is kept in float32, and flash attention is off, so that what
differs from a reference is the order of float32 sums; block formats have their inputs quantized to 8 bits by llama.cpp itself.
A server stays loaded for the session.
"""

import functools
import importlib
import json
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.convert.gguf_file import PendingTensor, write_gguf

HIDDEN, FFN, HEADS = 32, 32, 2


@functools.lru_cache(maxsize=4)
def _server(path: Path, context: int) -> Any:
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context
    params.n_parallel = 1
    params.cpuparams.n_threads = 2
    params.cpuparams_batch.n_threads = 2
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = False  # no look at the memory of this machine
    params.warmup = False
    params.verbosity = -1
    return xllamacpp.Server(params)


def ask(path: Path, route: str, body: Mapping[str, Any], *, context: int = 2048) -> Any:
    """One request to the server that has the file loaded; its path should be new, since a server stays with what it has read."""
    url = _server(path, context).listening_address + route
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.loads(response.read())


def tokenize(path: Path, text: str, *, add_special: bool = False, parse_special: bool = False, context: int = 2048) -> list[int]:
    """Ids of a text: with BOS and EOS as the file says, and with special tokens in the text found or taken for text."""
    body = {"content": text, "add_special": add_special, "parse_special": parse_special}
    return ask(path, "/tokenize", body, context=context)["tokens"]


def logprobs(path: Path, tokens: Sequence[int], *, vocab_size: int, first: int = 0, context: int = 2048) -> np.ndarray:
    """Natural log-probabilities float64 [T - first, V] of what follows each of `tokens`, from the position `first` on.

    The server gives those of the last position alone, so it is asked for every prefix; each goes on from the cache of the one before.
    Its own sum over the vocabulary is one of float32, wrong by 1e-4 for 49,152 tokens, so it is done again. It gives none where the
    token that it chooses ends inside a character: a bias, which these numbers are without, lets it choose an "a" every time.
    """
    letter = tokenize(path, "a", context=context)[-1]
    rows = np.full((len(tokens) - first, vocab_size), np.nan)
    for row, end in enumerate(range(first + 1, len(tokens) + 1)):
        body = {"prompt": list(tokens[:end]), "n_predict": 1, "n_probs": vocab_size, "logit_bias": [[letter, 1000.0]]}
        answer = ask(path, "/completion", {**body, "temperature": 0.0, "cache_prompt": True}, context=context)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            rows[row, entry["id"]] = entry["logprob"]
    assert not np.isnan(rows).any()
    return rows - np.log(np.exp(rows).sum(1, keepdims=True))


def target_logprobs(path: Path, tokens: Sequence[int], *, first: int = 1, num_asked: int = 1000) -> np.ndarray:
    """Natural log-probability float64 [T - first] of each of `tokens` from the position `first` on, given those before it.

    Quick for large vocabularies: of each position the likeliest `num_asked` are asked for, and all where the token is not among them. The
    server's own sum over the vocabulary is left as it is (`logprobs` does it again).
    """
    letter, found = tokenize(path, "a")[-1], []
    for end in range(first, len(tokens)):
        body = {"prompt": list(tokens[:end]), "n_predict": 1, "logit_bias": [[letter, 1000.0]], "temperature": 0.0, "cache_prompt": True}
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
    """The ids and the text of the likeliest continuation; a text prompt gets BOS as the file says, and special tokens in it are found."""
    body = {"prompt": prompt if isinstance(prompt, str) else list(prompt), "n_predict": max_tokens, "temperature": 0.0}
    answer = ask(path, "/completion", {**body, "top_k": 1, "return_tokens": True, "cache_prompt": False})
    return answer["tokens"], answer["content"]


def write_tiny_llama(path: Path, tokenizer: Mapping[str, Any]) -> None:
    """A GGUF of one random layer with the vocabulary, which llama.cpp loads in a moment."""
    rows = len(tokenizer["tokenizer.ggml.tokens"])
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (rows, HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,)}
    shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (FFN, HIDDEN), "blk.0.ffn_up": (FFN, HIDDEN), "blk.0.ffn_down": (HIDDEN, FFN)}
    numbers = {f"{name}.weight": (0.3 * generator.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
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
        PendingTensor(name=name, shape=value.shape, dtype=np.float32, read=functools.partial(np.asarray, value))
        for name, value in numbers.items()
    ]
    write_gguf(path, architecture="llama", metadata=metadata, tensors=pending)
