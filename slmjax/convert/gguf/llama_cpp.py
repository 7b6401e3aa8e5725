"""llama.cpp, run inside this process through the xllamacpp wheel: what an engine that nobody here wrote makes
of a GGUF file.

    rows = logprobs(Path("model.gguf"), tokens, vocab_size=2048)        # of the whole network, at every
    position product = Product("Q4_0"); codes = product.coded(x); y = product(blocks, codes)     # of one
    matrix, by the engine's own kernels

The extra `verify`. Keys and values are cached in float32, flash attention is off and weights stay laid out as
they are in the file, so that what differs from a reference is the order of float32 sums, and that inputs of
matrices in block formats are quantized to 8 bits, which is what llama.cpp does on a CPU.

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
FORCED = 1000.0  # added to the logit of a token that is to be chosen
LARGE_FILE = 2**28
# threads wait for each other after every operation: with a small model, and busy cores, for long
MOST_THREADS = 8


def import_engine() -> Any:
    """The xllamacpp package. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module("xllamacpp")
    except ImportError as error:
        raise ValueError(
            "running llama.cpp needs the xllamacpp wheel: pip install 'slmjax[verify]'"
        ) from error


def serve(path: Path, *, context: int = 2048) -> Any:
    """The server that has the file loaded, as it is now; the last few stay loaded."""
    state = path.stat()
    return _server(path.absolute(), context, (state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=4)
def _server(path: Path, context: int, _: tuple[int, int]) -> Any:
    engine = import_engine()
    params = engine.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.no_extra_bufts = True  # weights laid out anew for this CPU: other sums, and a crash on some
    threads = min(os.cpu_count() or 1, MOST_THREADS) if path.stat().st_size > LARGE_FILE else 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = engine.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # or another text that begins alike goes on from a window of the one before, and computes something else
    params.swa_full = True
    params.cache_ram_mib = 0
    params.fit_params = False  # no look at the memory of this machine
    params.warmup = False
    params.verbosity = -1
    return engine.Server(params)


# The whole network ------------------------------------------------------------------------------------------
def logprobs(
    path: Path,
    tokens: Sequence[int],
    *,
    vocab_size: int,
    first: int = 0,
    last: int | None = None,
    context: int = 2048,
) -> Float[np.ndarray, "T V"]:
    """Natural log-probabilities of what follows each of `tokens`, from the position `first` to before `last`
    (None: the end); float64.

    The server gives those of the last position alone, so it is asked for every prefix; each goes on from the
    cache of the one before. Its own sum over the vocabulary is one of float32, wrong by 1e-4 for 49,152
    tokens, so it is done again. It gives none where the
    token that it chooses ends inside a character: a bias, which these numbers are without, lets it choose a
    plain one every time.

    Raises:
      ValueError: the file has no vocabulary, or another than `vocab_size`.
    """
    server = serve(path, context=context)
    plain = _plain_token(path)
    ends = range(first + 1, (len(tokens) if last is None else last) + 1)
    rows = np.full((len(ends), vocab_size), np.nan)
    for row, end in enumerate(ends):
        body = {
            "prompt": [int(token) for token in tokens[:end]],
            "n_predict": 1,
            "n_probs": vocab_size,
            "temperature": 0.0,
        }
        choice = _completed(server, {**body, "logit_bias": [[plain, FORCED]], "cache_prompt": row > 0})
        entries = choice["logprobs"]["content"][0]["top_logprobs"]
        ids = np.fromiter((entry["id"] for entry in entries), np.int64, len(entries))
        if len(ids) != vocab_size or ids.max() >= vocab_size:
            raise ValueError(
                f"{path} predicts {max(ids.max() + 1, len(ids)):,} tokens, and the model has {vocab_size:,}"
            )
        rows[row, ids] = np.fromiter((entry["logprob"] for entry in entries), np.float64, len(entries))
    return rows - np.log(np.exp(rows).sum(1, keepdims=True))


def _completed(server: Any, body: dict[str, Any]) -> Any:
    """The one choice of a completion."""
    answers: list[str] = []
    server.handle_completions(json.dumps(body), answers.append)
    answer = json.loads(answers[0])
    if "choices" not in answer:
        raise ValueError(f"llama.cpp does not go on from {len(body['prompt'])} tokens: {answer}")
    return answer["choices"][0]


@functools.lru_cache(maxsize=16)
def _plain_token(path: Path) -> int:
    """A token of ordinary letters, after which a text may go on."""
    metadata = read_gguf(path).metadata
    words = metadata.get("tokenizer.ggml.tokens", [])
    kinds = metadata.get("tokenizer.ggml.token_type")
    for index, word in enumerate(words):
        if word.isascii() and word.isalpha() and (kinds is None or kinds[index] == NORMAL_TOKEN):
            return index
    raise ValueError(
        f"{path} has no vocabulary with a letter in it, and the server of llama.cpp needs one: export it "
        "with its tokenizer"
    )


# The tokenizer ----------------------------------------------------------------------------------------------
def tokenize(
    path: Path, text: str, *, add_special: bool = False, parse_special: bool = False, context: int = 2048
) -> list[int]:
    """Ids that the engine gives a text, asked over HTTP on a port of this machine, which is the only way that
    the wheel has.

    Args:
      add_special: with BOS and EOS as the file says.
      parse_special: names of special tokens in the text stand for them.

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
        raise ValueError(f"llama.cpp does not encode {text[:80]!r}: {answer}")
    return answer["tokens"]


# One matrix -------------------------------------------------------------------------------------------------
class _Traits(ctypes.Structure):
    """ggml_type_traits_cpu of ggml-cpu.h: how the engine multiplies with a type."""

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
    """Inner products with rows of one type, by the functions that llama.cpp itself calls on this CPU."""

    def __init__(self, type: str) -> None:
        """Raises ValueError for a type that the engine does not multiply with, and where its functions cannot
        be reached.
        """
        import gguf

        library = _library()
        kinds = gguf.GGMLQuantizationType
        self._own = library.ggml_get_type_traits_cpu(int(kinds[type])).contents
        self.input_type: str = kinds(
            self._own.vec_dot_type
        ).name  # what inputs are turned into first: "Q8_0" for "Q4_0"
        self._coder = library.ggml_get_type_traits_cpu(self._own.vec_dot_type).contents
        self._row_size = functools.partial(library.ggml_row_size, self._own.vec_dot_type)
        if not self._own.vec_dot or (self.input_type != "F32" and not self._coder.from_float):
            raise ValueError(f"this build of llama.cpp does not multiply with {type}")

    def coded(self, x: Float[np.ndarray, "R I"]) -> UInt8[np.ndarray, "R bytes"]:
        """Inputs as the engine makes them ready: the bytes of their rows."""
        x = np.ascontiguousarray(x, np.float32)
        if self.input_type == "F32":
            return x.view(np.uint8)
        out = np.zeros((x.shape[0], self._row_size(x.shape[1])), np.uint8)
        for row, bytes_of_row in zip(x, out, strict=True):
            self._coder.from_float(row.ctypes.data, bytes_of_row.ctypes.data, row.size)
        return out

    def __call__(
        self, blocks: UInt8[np.ndarray, "O bytes"], inputs: UInt8[np.ndarray, "R other_bytes"], *, width: int
    ) -> Float[np.ndarray, "R O"]:
        """Products of coded inputs with the rows of a matrix as the file has them, `width` numbers each."""
        blocks = np.ascontiguousarray(blocks)
        inputs = np.ascontiguousarray(inputs)
        out = np.zeros((inputs.shape[0], blocks.shape[0]), np.float32)
        one = out.ctypes.data
        step = out.itemsize
        for row in range(inputs.shape[0]):
            place = inputs.ctypes.data + row * inputs.strides[0]
            for column in range(blocks.shape[0]):
                to = one + step * (row * blocks.shape[0] + column)
                self._own.vec_dot(
                    width, to, 0, blocks.ctypes.data + column * blocks.strides[0], 0, place, 0, 1
                )
        return out


@functools.cache
def _library() -> Any:
    """The functions of ggml that the wheel's library exports."""
    engine = import_engine()
    library = ctypes.CDLL(importlib.import_module(f"{engine.__name__}.xllamacpp").__file__)
    try:
        library.ggml_get_type_traits_cpu.argtypes = [ctypes.c_int]
        library.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_Traits)
        library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
        library.ggml_row_size.restype = ctypes.c_size_t
        library.ggml_cpu_init()
    except AttributeError as error:
        raise ValueError(
            f"this xllamacpp does not let its functions be called ({error}): install a newer one"
        ) from error
    return library
