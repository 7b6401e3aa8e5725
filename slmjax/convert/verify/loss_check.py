"""Comparison of the losses of llama.cpp and slmjax over the same tokens: level three of `export.py`.

The tokens are those that the run's evaluation scores: in pairs of prompt and completion only the completions,
unless eval.score is all.

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

NOISE = 1e-6  # relative, on every value of the embedding table
NOISE_DRAWS = 4
SMALLEST_TOLERANCE = 1e-6  # relative to the loss, for float32 sums in another order


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """A piece of a document."""

    tokens: Int32[np.ndarray, " T_and_1"]  # T inputs; the targets are one position later
    scored: Bool[np.ndarray, " T"]  # which targets are scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossCheck:
    """Mean negative log-likelihoods of both implementations, in nats per token."""

    tokens: int  # scored
    windows: int
    engine: float
    ours: float  # with activations quantized as in the engine
    as_trained: float  # with activations as in training
    difference: float  # engine - ours
    standard_error: float  # of the difference, paired over windows
    floor: float  # largest change of our own loss by noise on the embeddings

    @property
    def tolerance(self) -> float:
        """Largest difference that is accepted."""
        # Chaotic rounding, the choice of text, and the order of sums each set a limit; the largest applies.
        return max(2 * self.floor, 2 * self.standard_error, SMALLEST_TOLERANCE * self.ours)

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance."""
        return abs(self.difference) <= self.tolerance


def engine_context(windows: list[Window]) -> int:
    """Return the context length with which the engine loads the file for these windows."""
    # Some more, since the server needs space for the token that it generates.
    return max(len(window.tokens) for window in windows) + 8


def check_loss(
    loaded: Loaded, file: Path, windows: list[Window], *, input_specs: Mapping[str, QuantSpec]
) -> LossCheck:
    """Compute both losses over the windows.

    Args:
      input_specs: formats in which the engine quantizes the inputs of weights, by logical path.
    """
    vocab_size = loaded.config.known_vocab_size
    context = engine_context(windows)
    engine = np.array([_engine_nll(file, window, vocab_size, context) for window in windows])
    # Our side imitates the engine's quantized activations, so that only the order of sums differs.
    definition, params, buffers = with_inputs(loaded, input_specs)
    ours = _our_nll(definition.merge_transformed(params, buffers), windows)
    trained = _our_nll(loaded.model, windows)
    # Several draws, since a single one may flip few codes.
    with_noise = [
        _our_nll(definition.merge_transformed(_noisy(params, draw), buffers), windows)
        for draw in range(NOISE_DRAWS)
    ]
    # Engine and slmjax score the same windows, so that their difference is paired.
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
        floor=max(abs(float((noisy - ours).sum() / tokens)) for noisy in with_noise),
    )


def paired(differences: Float[np.ndarray, " W"], counts: np.ndarray) -> tuple[float, float]:
    """Mean difference per token of sums over windows of `counts` tokens, and its standard error.

    A ratio estimate: the windows are the sample. A single window has no standard error; 0 is returned.
    """
    mean = float(differences.sum() / counts.sum())
    if len(counts) < 2:
        return mean, 0.0
    # The variance of a ratio estimate (Cochran, 1977).
    deviations = differences - mean * counts
    return mean, float(np.sqrt(len(counts) / (len(counts) - 1) * np.square(deviations).sum()) / counts.sum())


def _engine_nll(file: Path, window: Window, vocab_size: int, context: int) -> float:
    rows = llama_cpp.logprobs(file, window.tokens[:-1].tolist(), vocab_size=vocab_size, context=context)
    return -float(rows[np.arange(len(window.scored)), window.tokens[1:]][window.scored].sum())


def _our_nll(model: Decoder, windows: list[Window]) -> Float[np.ndarray, " W"]:
    """Return our sum over each window."""
    # Windows are padded to one length to compile once: attention is causal, so padding changes nothing.
    longest = max(len(window.scored) for window in windows)
    sums = []
    # The engine sums in float32 on a CPU.
    with jax.default_matmul_precision("highest"):
        for window in windows:
            inputs = np.zeros((1, longest), np.int32)
            inputs[0, : len(window.scored)] = window.tokens[:-1]
            # Normalized in float64, as the engine's values are.
            rows = np.asarray(_logits(model, inputs), np.float64)[0, : len(window.scored)]
            rows -= rows.max(-1, keepdims=True)
            rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
            sums.append(-float(rows[np.arange(len(rows)), window.tokens[1:]][window.scored].sum()))
    return np.array(sums)


_logits = jax.jit(logits)


def with_inputs(
    loaded: Loaded, input_specs: Mapping[str, QuantSpec]
) -> tuple[Definition, dict[str, jax.Array], dict[str, jax.Array]]:
    """Return the model with activations quantized in other formats, in float32, and an unquantized cache.

    Returns:
      its definition, parameters and buffers; the weights are the same.
    """
    # Only inputs: the weights are dequantized codes already.
    rules = tuple(QuantRule(paths=f"^{re.escape(path)}$", input=spec) for path, spec in input_specs.items())
    quant = (QuantPhase(rules=rules),) if rules else ()
    config = inference_config(dataclasses.replace(loaded.config, precision=Precision.FLOAT32))
    definition = define_quantized(config, quant)
    # Other input formats may group the layers in another way.
    flat = unstack(loaded.definition.config, {**loaded.params, **loaded.buffers})
    params, buffers = (
        restack(definition.config, flat, like=like) for like in (definition.params, definition.buffers)
    )
    return definition, params, buffers


def _noisy(params: Mapping[str, jax.Array], draw: int) -> dict[str, jax.Array]:
    # At the start of the network, so that the noise passes through every quantizer.
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
    """Cut the first held-out documents into windows with `max_tokens` scored tokens in total.

    The first token of a document is not scored.

    Raises:
      ValueError: there is no held-out text, it has no token to score, or the run's text has changed.
    """
    if max_tokens < 1 or length < 1:
        raise ValueError(f"max_tokens={max_tokens} and window={length} must be at least 1")
    # A window has one more token than inputs, and the context includes all of them.
    length = min(length, loaded.config.context_length - 1)
    text = scored_text(loaded)
    windows: list[Window] = []
    remaining = max_tokens
    for shards in documents_of(loaded, data_or_own(loaded, data), changed_data=changed_data):
        for window in _windows(shards, length=length, text=text):
            positions = np.flatnonzero(window.scored)[:remaining]
            # The last window ends with its last scored token, so that exactly `max_tokens` are scored.
            stop = int(positions[-1]) + 1 if len(positions) == remaining else len(window.scored)
            windows.append(Window(tokens=window.tokens[: stop + 1], scored=window.scored[:stop]))
            remaining -= len(positions)
            if remaining <= 0:
                return windows
    if not windows:
        raise ValueError("the text has no token to score: give a longer one with --data")
    return windows


def _windows(shards: TokenizedDocuments, *, length: int, text: ScoredText) -> Iterator[Window]:
    """Yield the windows with a scored token. Documents scored in part are cut as in training."""
    for document in range(len(shards)):
        tokens = shards.tokens(document)
        # The first token of a document has no context to be predicted from.
        scored = np.arange(len(tokens)) > 0 if text is ScoredText.ALL else shards.scored(document)
        starts = range(0, len(tokens) - 1, length)
        pieces = [(start, min(length, len(tokens) - 1 - start), 0) for start in starts]
        # A cut in the middle of a prompt would leave its completion without context.
        if not scored[1:].all() and len(pieces) > 1:
            pieces = pieces_around(spans_in(scored), sequence_length=length, overlap=0)
        for start, size, context in pieces:
            targets = scored[start + 1 : start + 1 + size].copy()
            targets[:context] = False
            if targets.any():
                yield Window(tokens=tokens[start : start + size + 1], scored=targets)
