"""The costs of an arm, from its experiment alone: sizes, FLOPs of its training, bytes when it is deployed.

    cost = arm_cost(experiment)            # ArmCost; nothing is computed or allocated
    cost.of(Quantity.FLOPS)                # what arms are made equal in

The text is read only where a cost depends on it: the length of a run in epochs, or a vocabulary that is made
from the text.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.config import fingerprint
from slmjax.data.pipeline import BatchSource
from slmjax.data.preparation import prepare
from slmjax.data.tokenizers import BpeTokenizer, ByteTokenizer, FileTokenizer, Tokenizer
from slmjax.models import zoo
from slmjax.models.architecture import ModelConfig
from slmjax.planning.run_flops import training_flops
from slmjax.quantization.assignment import CACHE
from slmjax.quantization.plan import Line, assignment_lines
from slmjax.studies.design import Quantity
from slmjax.training.experiment import Experiment
from slmjax.training.programs import resolved_model, resolved_phases

_BYTE_VOCABULARY = 258  # BOS, EOS and the 256 bytes

# Costs by fingerprint: a search asks for the same experiment again, and so do the stages of a study.
_costs: dict[tuple[Any, ...], "ArmCost"] = {}
_texts: dict[str, "TextSize"] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSize:
    """The training text of an experiment, once it is prepared."""

    rows: int  # packed sequences of one epoch
    packing_efficiency: float  # fraction of the positions of rows that hold tokens
    vocab_size: int  # of the tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmCost:
    """The costs of one run of an arm, and of the model that it leaves."""

    parameters: int  # trained ones of the model; a tied table counts once
    non_embedding_parameters: int  # without the embedding table and an untied head
    active_parameters: int  # that a token uses: of experts the chosen ones, shared ones included
    flops: float  # of the whole training, teachers included (`training_flops`)
    tokens: int  # positions that are trained on, padding included
    steps: int
    # of the parameters in their formats; those in floating point have 4 bytes each
    deployed_bytes: int
    cache_bytes: int  # of the decoding state of a sequence of context_length tokens
    epochs: float | None = None  # passes over the unique text; None where its size is not known

    def of(self, quantity: Quantity) -> float | None:
        """Return a quantity; None for epochs over a text of unknown size, and for seconds."""
        return None if quantity is Quantity.SECONDS else getattr(self, quantity.value)


def arm_cost(
    experiment: Experiment, *, vocab_size: int | None = None, text: TextSize | None = None
) -> ArmCost:
    """Return the costs of an experiment.

    Args:
      vocab_size: tokens of the tokenizer (none: as its settings say; a vocabulary that is made from the text
        is made).
      text: size of the training text, for epochs (none: the text is read if `run.epochs` is set, otherwise
        epochs are not known).

    Raises:
      ValueError: the settings do not fit each other, or the text that is needed cannot be read.
    """
    experiment, vocabulary, text = _resolved(experiment, vocab_size=vocab_size, text=text)
    key = (fingerprint(experiment), vocabulary, text)
    if key not in _costs:
        _costs[key] = _cost(experiment, vocab_size=vocabulary, text=text)
    return _costs[key]


def cost_in(quantity: Quantity, experiment: Experiment) -> float:
    """Return one quantity of `arm_cost`, without computing the others: for a search.

    Epochs read the text. Raises ValueError as `arm_cost`, and for seconds, which are measured.
    """
    experiment, vocab_size, text = _resolved(experiment, with_text=quantity is Quantity.EPOCHS)
    model = resolved_model(experiment, vocab_size=vocab_size)
    run = experiment.run
    rows = run.steps * experiment.data.batch_size
    if quantity is Quantity.TOKENS:
        return float(rows * experiment.data.sequence_length)
    if quantity is Quantity.EPOCHS:
        assert text is not None
        return rows / text.rows
    if quantity is Quantity.FLOPS:
        return training_flops(experiment, vocab_size=vocab_size)
    if quantity in (Quantity.DEPLOYED_BYTES, Quantity.CACHE_BYTES):
        lines = assignment_lines(model, resolved_phases(experiment))
        is_cache = quantity is Quantity.CACHE_BYTES
        return float(_cache_bytes(model, lines) if is_cache else _deployed_bytes(lines))
    if quantity is Quantity.SECONDS:
        raise ValueError("seconds are measured on a device: they do not follow from an experiment")
    return float(getattr(_sizes(model), quantity.value))


def text_size(experiment: Experiment) -> TextSize:
    """Return the size of the training text; prepares it into its cache, as training would.

    Raises:
      ValueError: the text or the tokenizer cannot be used.
    """
    key = fingerprint({"data": experiment.data, "tokenizer": experiment.tokenizer})
    if key not in _texts:
        prepared = prepare(experiment.data, experiment.tokenizer)
        source = BatchSource(prepared.train, experiment.data)
        _texts[key] = TextSize(
            rows=source.num_rows,
            packing_efficiency=source.packing_efficiency,
            vocab_size=prepared.tokenizer.vocab_size,
        )
    return _texts[key]


def vocab_size_of(experiment: Experiment) -> int:
    """Return the tokens that the model of an experiment will have; reads the text if they depend on it."""
    return _resolved(experiment)[1]


def known_vocab_size(experiment: Experiment) -> int | None:
    """Return the tokens of the tokenizer as its settings say; None where they depend on the text."""
    tokenizer = experiment.tokenizer
    # BPE has fewer tokens than it is asked for where the text is very short.
    if isinstance(tokenizer, BpeTokenizer):
        return tokenizer.vocab_size
    if isinstance(tokenizer, ByteTokenizer):
        return _BYTE_VOCABULARY
    if isinstance(tokenizer, FileTokenizer):
        return Tokenizer.load(Path(tokenizer.path).expanduser()).vocab_size
    return None


def _resolved(
    experiment: Experiment,
    *,
    vocab_size: int | None = None,
    text: TextSize | None = None,
    with_text: bool = False,
) -> tuple[Experiment, int, TextSize | None]:
    """Return the experiment with its length in steps, the size of its vocabulary, and the text if known."""
    vocab_size = vocab_size or experiment.model.vocab_size or known_vocab_size(experiment)
    if text is None and (with_text or vocab_size is None or experiment.run.epochs is not None):
        text = text_size(experiment)
    if text is None:
        assert vocab_size is not None
        return experiment, vocab_size, None
    run = experiment.run.in_steps(text.rows, batch_size=experiment.data.batch_size)
    return dataclasses.replace(experiment, run=run), vocab_size or text.vocab_size, text


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    parameters: int
    non_embedding_parameters: int
    active_parameters: int


def _sizes(model: ModelConfig) -> _Sizes:
    summary = zoo.describe(model)
    return _Sizes(
        parameters=summary.parameters,
        non_embedding_parameters=summary.parameters - summary.embedding_parameters,
        active_parameters=summary.active_parameters,
    )


def _cost(experiment: Experiment, *, vocab_size: int, text: TextSize | None) -> ArmCost:
    model = resolved_model(experiment, vocab_size=vocab_size)
    sizes = _sizes(model)
    lines = assignment_lines(model, resolved_phases(experiment))
    run = experiment.run
    data = experiment.data
    rows = run.steps * data.batch_size
    return ArmCost(
        parameters=sizes.parameters,
        non_embedding_parameters=sizes.non_embedding_parameters,
        active_parameters=sizes.active_parameters,
        flops=training_flops(experiment, vocab_size=vocab_size),
        tokens=rows * data.sequence_length,
        steps=run.steps,
        deployed_bytes=_deployed_bytes(lines),
        cache_bytes=_cache_bytes(model, lines),
        epochs=None if text is None else rows / text.rows,
    )


def _deployed_bytes(lines: Sequence[Line]) -> int:
    return sum(line.bytes for line in lines if not line.path.endswith(CACHE))


def _cache_bytes(model: ModelConfig, lines: Sequence[Line]) -> int:
    """Return the bytes of the decoding state of a sequence of the context length, in its formats."""
    dims = model.layer_dims()
    itemsize = np.dtype(dims.dtype).itemsize
    formats = {line.path: line for line in lines if line.path.endswith(CACHE) and line.format is not None}
    total = 0.0
    for layer, block in enumerate(model.blocks()):
        # The mixer knows how many tokens it caches: those of its window, or of the whole context.
        size = zoo.block_state_size(block, model, length=model.context_length)
        line = formats.get(f"layers/{layer}{CACHE}")
        share = 1.0 if line is None else line.bytes / (itemsize * math.prod(line.shape))
        # Only the entries of a cache have its format.
        others = dataclasses.replace(size, cached=0).bytes(itemsize)
        total += share * size.cached * itemsize + others
    return round(total)
