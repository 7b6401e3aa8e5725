"""The loss of an exported file in llama.cpp and in ours, over the same tokens: level three of `verification`.

The tokens are those that the run's evaluation scores: of pairs of prompt and completion the completions,
unless eval.score says all.

Dims: W windows, T tokens of a window, V vocabulary.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Bool, Float, Int32

from slmjax.checkpoints.loading import Loaded
from slmjax.convert.gguf import llama_cpp
from slmjax.data.config import DataConfig
from slmjax.data.packing import TokenizedDocuments
from slmjax.data.provenance import ChangedData
from slmjax.data.scored import ScoredText, pieces_around, spans_in
from slmjax.evaluation.bits_per_byte import data_or_own, documents_of, scored_text
from slmjax.formats.spec import QuantSpec
from slmjax.models.architecture import Precision
from slmjax.models.decoder import Decoder, logits
from slmjax.models.definition import Definition, inference_config, restack, unstack
from slmjax.quantization.fake_quantization import define_quantized
from slmjax.quantization.rules import QuantPhase, QuantRule

NOISE = 1e-6
NOISE_DRAWS = 4  # relative, on every number of the embedding table
SMALLEST_TOLERANCE = 1e-6  # of the loss itself: float32 sums in another order


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """A piece of a document."""

    tokens: Int32[np.ndarray, " T_and_1"]  # T inputs, and the targets one further
    scored: Bool[np.ndarray, " T"]  # of the targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossCheck:
    """Mean negative log-likelihoods in nats per token."""

    tokens: int  # that were scored
    windows: int
    engine: float
    ours: float  # with inputs rounded as the engine does it
    as_trained: float  # with inputs as in training
    difference: float  # engine - ours
    standard_error: float  # of the difference, paired, over windows
    floor: float  # the most that our own loss moved under noise on the embeddings

    @property
    def tolerance(self) -> float:
        """What the difference may be."""
        return max(2 * self.floor, 2 * self.standard_error, SMALLEST_TOLERANCE * self.ours)

    @property
    def holds(self) -> bool:
        """Whether the difference is no more than that."""
        return abs(self.difference) <= self.tolerance


def engine_context(windows: list[Window]) -> int:
    """The context with which the engine loads the file for these windows."""
    return max(len(window.tokens) for window in windows) + 8


def check_loss(
    loaded: Loaded, file: Path, windows: list[Window], *, input_specs: Mapping[str, QuantSpec]
) -> LossCheck:
    """Both losses over the windows.

    Args:
      input_specs: by logical path of a weight, how the engine rounds what it is multiplied with.
    """
    vocab_size = loaded.config.known_vocab_size
    context = engine_context(windows)
    engine = np.array([_engine_nll(file, window, vocab_size, context) for window in windows])
    definition, params, buffers = with_inputs(loaded, input_specs)
    ours = _own_nll(definition.merge_transformed(params, buffers), windows)
    trained = _own_nll(loaded.model, windows)
    moved = [
        _own_nll(definition.merge_transformed(_noisy(params, draw), buffers), windows)
        for draw in range(NOISE_DRAWS)
    ]
    counts = np.array([window.scored.sum() for window in windows])
    tokens = int(counts.sum())
    difference, error = paired(engine - ours, counts)
    return LossCheck(
        tokens=tokens,
        windows=len(windows),
        engine=float(engine.sum() / tokens),
        ours=float(ours.sum() / tokens),
        as_trained=float(trained.sum() / tokens),
        difference=difference,
        standard_error=error,
        floor=max(abs(float((one - ours).sum() / tokens)) for one in moved),
    )


def paired(differences: Float[np.ndarray, " W"], counts: np.ndarray) -> tuple[float, float]:
    """Mean difference per token of sums over windows of `counts` tokens, and its standard error.

    Windows are what is drawn: a ratio estimate. One window has no standard error, which is then 0.
    """
    mean = float(differences.sum() / counts.sum())
    if len(counts) < 2:
        return mean, 0.0
    deviations = differences - mean * counts
    return mean, float(np.sqrt(len(counts) / (len(counts) - 1) * np.square(deviations).sum()) / counts.sum())


def _engine_nll(file: Path, window: Window, vocab_size: int, context: int) -> float:
    rows = llama_cpp.logprobs(file, window.tokens[:-1].tolist(), vocab_size=vocab_size, context=context)
    return -float(rows[np.arange(len(window.scored)), window.tokens[1:]][window.scored].sum())


def _own_nll(model: Decoder, windows: list[Window]) -> Float[np.ndarray, " W"]:
    """Sums over each window; what comes after a short one changes nothing in it."""
    longest = max(len(window.scored) for window in windows)
    found = []
    with jax.default_matmul_precision("highest"):
        for window in windows:
            inputs = np.zeros((1, longest), np.int32)
            inputs[0, : len(window.scored)] = window.tokens[:-1]
            rows = np.asarray(_logits(model, inputs), np.float64)[0, : len(window.scored)]
            rows -= rows.max(-1, keepdims=True)
            rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
            found.append(-float(rows[np.arange(len(rows)), window.tokens[1:]][window.scored].sum()))
    return np.array(found)


_logits = jax.jit(logits)


def with_inputs(
    loaded: Loaded, input_specs: Mapping[str, QuantSpec]
) -> tuple[Definition, dict[str, jax.Array], dict[str, jax.Array]]:
    """The same weights in float32 arithmetic, with other formats of inputs, and caches in floating point;
    parameters and buffers.
    """
    rules = tuple(QuantRule(paths=f"^{re.escape(path)}$", input=spec) for path, spec in input_specs.items())
    quant = (QuantPhase(rules=rules),) if rules else ()
    config = inference_config(dataclasses.replace(loaded.config, precision=Precision.FLOAT32))
    definition = define_quantized(config, quant)
    flat = unstack(loaded.definition.config, {**loaded.params, **loaded.buffers})
    params, buffers = (
        restack(definition.config, flat, like=like) for like in (definition.params, definition.buffers)
    )
    return definition, params, buffers


def _noisy(params: Mapping[str, jax.Array], draw: int) -> dict[str, jax.Array]:
    table = np.asarray(params["embed/table"])
    noise = np.random.default_rng(draw).normal(size=table.shape).astype(np.float32)
    return {**params, "embed/table": jax.numpy.asarray(table * (1 + np.float32(NOISE) * noise))}


# The text ---------------------------------------------------------------------------------------------------
def text_windows(
    loaded: Loaded,
    data: DataConfig | None,
    *,
    max_tokens: int,
    length: int,
    changed_data: ChangedData = ChangedData.REFUSE,
) -> list[Window]:
    """The first held-out documents, cut into windows, with `max_tokens` scored tokens in all; the first of a
    document is not scored.

    Raises:
      ValueError: there is no such text, no token to score in it, or the run's text has changed.
    """
    if max_tokens < 1 or length < 1:
        raise ValueError(f"max_tokens={max_tokens} and window={length} must be at least 1")
    length = min(length, loaded.config.context_length - 1)
    text = scored_text(loaded)
    found: list[Window] = []
    left = max_tokens
    for shards in documents_of(loaded, data_or_own(loaded, data), changed_data=changed_data):
        for window in _windows(shards, length=length, text=text):
            places = np.flatnonzero(window.scored)[:left]
            stop = int(places[-1]) + 1 if len(places) == left else len(window.scored)
            found.append(Window(tokens=window.tokens[: stop + 1], scored=window.scored[:stop]))
            left -= len(places)
            if left <= 0:
                return found
    if not found:
        raise ValueError("the text has no token to score: name a longer one with --data")
    return found


def _windows(shards: TokenizedDocuments, *, length: int, text: ScoredText) -> Iterator[Window]:
    """Those of all documents that have a scored token. What is not scored throughout is cut as it is in
    training.
    """
    for document in range(len(shards)):
        tokens = shards.tokens(document)
        scored = np.arange(len(tokens)) > 0 if text is ScoredText.ALL else shards.scored(document)
        starts = range(0, len(tokens) - 1, length)
        pieces = [(start, min(length, len(tokens) - 1 - start), 0) for start in starts]
        if not scored[1:].all() and len(pieces) > 1:
            pieces = pieces_around(spans_in(scored), sequence_length=length, overlap=0)
        for start, size, context in pieces:
            here = scored[start + 1 : start + 1 + size].copy()
            here[:context] = False
            if here.any():
                yield Window(tokens=tokens[start : start + size + 1], scored=here)
