"""llama.cpp, run in this process through the xllamacpp wheel: an independent reference.

    rows = logprobs(Path("model.gguf"), tokens, vocab_size=2048)  # of the full model, at every position
    product = Product("Q4_0")  # of one matrix, by the engine's kernels
    y = product(blocks, product.coded(x), width=256)

Needs the `verify` extra. Keys and values are cached in float32, flash attention is off, and weights keep the
layout of the file. Two differences from a reference remain: the order of float32 sums, and that the inputs of
matrices in block formats are quantized to 8 bits, as llama.cpp does on a CPU.

Dims: T tokens, V vocabulary, R rows of inputs, I inputs of a matrix, O its outputs.
"""

import ctypes
import functools
import http.client
import importlib
import json
import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from slmjax.convert.gguf.container import read_gguf

NORMAL_TOKEN = 1  # in tokenizer.ggml.token_type
FORCED = 1000.0  # logit bias that makes the engine choose a token
LARGE_FILE = 2**28  # bytes; smaller models run on one thread
# Threads synchronize after every operation: with small models and busy cores, waiting dominates.
MOST_THREADS = 8


def import_engine() -> Any:
    """Import the xllamacpp package. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module("xllamacpp")
    except ImportError as error:
        raise ValueError(
            "running llama.cpp needs the xllamacpp wheel: pip install 'slmjax[verify]'"
        ) from error


def serve(path: Path, *, context: int = 2048) -> Any:
    """Return a server that has the file loaded; the last few servers are kept."""
    # Time and size are part of the key, so that a changed file is loaded again.
    state = path.stat()
    return _server(path.absolute(), context, (state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=4)
def _server(path: Path, context: int, _: tuple[int, int]) -> Any:
    engine = import_engine()
    params = engine.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context
    # One slot: several would divide the context among them.
    params.n_parallel = 1
    # On the CPU, which is the same reference on every machine.
    params.n_gpu_layers = 0
    # Weights repacked for the CPU would change the order of sums, and crash on some CPUs.
    params.no_extra_bufts = True
    threads = min(os.cpu_count() or 1, MOST_THREADS) if path.stat().st_size > LARGE_FILE else 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = engine.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # Otherwise a text with the same prefix continues from a truncated window of the last one, with other
    # results.
    params.swa_full = True
    # Prompts of other texts are not cached: results must not depend on what was asked before.
    params.cache_ram_mib = 0
    params.fit_params = False  # do not adapt to the free memory
    # Saves a run of the model that does nothing but warm caches.
    params.warmup = False
    params.verbosity = -1
    return engine.Server(params)


# Full model -------------------------------------------------------------------------------------------------
def logprobs(
    path: Path,
    tokens: Sequence[int],
    *,
    vocab_size: int,
    first: int = 0,
    last: int | None = None,
    context: int = 2048,
) -> Float[np.ndarray, "T V"]:
    """Return the natural log-probabilities of the next token after each of `tokens`, in float64.

    The server returns only those of the last position, so it is asked for every prefix; each request
    continues from the cache of the last. Its normalization in float32 is off by 1e-4 for 49,152 tokens, so it
    is done again in float64. The server returns nothing if the token it chooses ends inside a character: a
    logit bias, which the returned values exclude, makes it choose a plain token every time.

    Args:
      first: first position.
      last: position after the last; None for the end.

    Raises:
      ValueError: the file has no vocabulary, or its size is not `vocab_size`.
    """
    server = serve(path, context=context)
    plain = _plain_token(path)
    # Prefixes grow by one token, so that each request computes only its last position.
    ends = range(first + 1, (len(tokens) if last is None else last) + 1)
    rows = np.full((len(ends), vocab_size), np.nan)
    for row, end in enumerate(ends):
        body = {
            "prompt": [int(token) for token in tokens[:end]],
            "n_predict": 1,
            # All tokens: the log-probability of any target is needed.
            "n_probs": vocab_size,
            "temperature": 0.0,
        }
        choice = _completed(server, {**body, "logit_bias": [[plain, FORCED]], "cache_prompt": row > 0})
        entries = choice["logprobs"]["content"][0]["top_logprobs"]
        ids = np.fromiter((entry["id"] for entry in entries), np.int64, len(entries))
        if len(ids) != vocab_size or ids.max() >= vocab_size:
            raise ValueError(
                f"{path} predicts {max(ids.max() + 1, len(ids)):,} tokens, but the model has {vocab_size:,}"
            )
        rows[row, ids] = np.fromiter((entry["logprob"] for entry in entries), np.float64, len(entries))
    return rows - np.log(np.exp(rows).sum(1, keepdims=True))


def _completed(server: Any, body: dict[str, Any]) -> Any:
    """Return the only choice of a completion."""
    answers: list[str] = []
    # The callback gets the full answer at once, since streaming is off.
    server.handle_completions(json.dumps(body), answers.append)
    answer = json.loads(answers[0])
    if "choices" not in answer:
        raise ValueError(f"llama.cpp cannot continue {len(body['prompt'])} tokens: {answer}")
    return answer["choices"][0]


@functools.lru_cache(maxsize=16)
def _plain_token(path: Path) -> int:
    """Return a token of ASCII letters, which does not end a text."""
    metadata = read_gguf(path).metadata
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    types = metadata.get("tokenizer.ggml.token_type")
    for index, token in enumerate(tokens):
        # Without a space or "▁": a full character in every kind of vocabulary.
        if token.isascii() and token.isalpha() and (types is None or types[index] == NORMAL_TOKEN):
            return index
    raise ValueError(
        f"{path} has no token of letters, which llama.cpp's server needs here: export it with its tokenizer"
    )


# Tokenizer --------------------------------------------------------------------------------------------------
def tokenize(
    path: Path, text: str, *, add_special: bool = False, parse_special: bool = False, context: int = 2048
) -> list[int]:
    """Encode a text with the engine, over HTTP on localhost: the wheel has no other interface.

    Args:
      add_special: add BOS and EOS as the file says.
      parse_special: read names of special tokens in the text as these tokens.

    Raises:
      ValueError: the engine refuses the text.
    """
    address = urllib.parse.urlsplit(serve(path, context=context).listening_address)
    connection = http.client.HTTPConnection(str(address.hostname), address.port)
    try:
        body = json.dumps({"content": text, "add_special": add_special, "parse_special": parse_special})
        connection.request("POST", "/tokenize", body.encode(), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    if "tokens" not in answer:
        raise ValueError(f"llama.cpp cannot encode {text[:80]!r}: {answer}")
    return answer["tokens"]


# Single matrix ----------------------------------------------------------------------------------------------
# The layout must follow the header of the wheel's release; `_library` fails if a function is missing.
class _Traits(ctypes.Structure):
    """ggml_type_traits_cpu of ggml-cpu.h: the kernels of a type."""

    _fields_ = [
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        (
            "vec_dot",
            ctypes.CFUNCTYPE(
                None,
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_int,
            ),
        ),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    ]


class Product:
    """Inner products with rows of one type, by the kernels that llama.cpp calls on this CPU."""

    def __init__(self, type: str) -> None:
        """Look up the kernels of a type, by GGUF's name of it.

        Raises:
          ValueError: the engine has no kernel for the type, or its functions cannot be called.
        """
        # The numbers of types are those of ggml.h, which the gguf package has by name.
        import gguf

        library = _library()
        kinds = gguf.GGMLQuantizationType
        self._traits = library.ggml_get_type_traits_cpu(int(kinds[type])).contents
        # Type to which inputs are converted first: "Q8_0" for "Q4_0".
        self.input_type: str = kinds(self._traits.vec_dot_type).name
        self._input_traits = library.ggml_get_type_traits_cpu(self._traits.vec_dot_type).contents
        self._row_size = functools.partial(library.ggml_row_size, self._traits.vec_dot_type)
        if not self._traits.vec_dot or (self.input_type != "F32" and not self._input_traits.from_float):
            raise ValueError(f"this build of llama.cpp has no kernel for {type}")

    def coded(self, x: Float[np.ndarray, "R I"]) -> UInt8[np.ndarray, "R bytes"]:
        """Convert inputs as the engine does; returns the bytes of their rows."""
        x = np.ascontiguousarray(x, np.float32)
        # Unquantized inputs go to the kernel as they are.
        if self.input_type == "F32":
            return x.view(np.uint8)
        # Rows are converted separately, as the engine does: a block never spans two.
        out = np.zeros((x.shape[0], self._row_size(x.shape[1])), np.uint8)
        for row, bytes_of_row in zip(x, out, strict=True):
            self._input_traits.from_float(row.ctypes.data, bytes_of_row.ctypes.data, row.size)
        return out

    def __call__(
        self, blocks: UInt8[np.ndarray, "O bytes"], inputs: UInt8[np.ndarray, "R other_bytes"], *, width: int
    ) -> Float[np.ndarray, "R O"]:
        """Multiply coded inputs with the rows of a matrix as stored in the file, of `width` values each."""
        blocks = np.ascontiguousarray(blocks)
        inputs = np.ascontiguousarray(inputs)
        out = np.zeros((inputs.shape[0], blocks.shape[0]), np.float32)
        for row in range(inputs.shape[0]):
            input_pointer = inputs.ctypes.data + row * inputs.strides[0]
            # One inner product at a time: kernels for several rows sum in another order.
            for column in range(blocks.shape[0]):
                result = out.ctypes.data + out.itemsize * (row * blocks.shape[0] + column)
                weight_pointer = blocks.ctypes.data + column * blocks.strides[0]
                self._traits.vec_dot(width, result, 0, weight_pointer, 0, input_pointer, 0, 1)
        return out


@functools.cache
def _library() -> Any:
    """Return the wheel's library, with the functions of ggml that are called here declared."""
    engine = import_engine()
    library = ctypes.CDLL(importlib.import_module(f"{engine.__name__}.xllamacpp").__file__)
    try:
        library.ggml_get_type_traits_cpu.argtypes = [ctypes.c_int]
        library.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_Traits)
        library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
        library.ggml_row_size.restype = ctypes.c_size_t
        # Fills the tables of float16 conversions, which kernels read.
        library.ggml_cpu_init()
    except AttributeError as error:
        raise ValueError(
            f"this xllamacpp does not export the functions of ggml ({error}): install a newer one"
        ) from error
    return library
