"""Loss, perplexity and bits per byte on held-out text, over the tokens that training scores.

    evaluate(loaded)                                                          # the held-out text of the run
    itself evaluate(loaded, data=DataConfig(path="book.txt", heldout_fraction=0.0))  # all of another text
    evaluate(loaded, score=ScoredText.ALL)                                    # of pairs, the prompts too

Bits per byte is the total negative log-likelihood in bits over the UTF-8 bytes of the scored text. BOS is not
scored, EOS is and counts no byte; documents that are longer than a row are cut into windows that overlap, and
what they repeat is context, not scored again (`data/windows.py`). The sum therefore has one term per token
whatever the batch size, packing or mesh; window length and overlap say how much context a token is given, so
they are part of the result.

Dims: B rows of the global batch, T positions of a row.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from slmjax import config as config_io
from slmjax.checkpoints.loading import Loaded
from slmjax.data.batch import Batch
from slmjax.data.config import DataConfig
from slmjax.data.conventions import SpecialToken
from slmjax.data.left_out import describe_left_out
from slmjax.data.lost_text import lost_fraction, lost_note
from slmjax.data.provenance import ChangedData, documents_to_evaluate, read_settings
from slmjax.data.scored import ScoredText
from slmjax.data.shards import TokenShards
from slmjax.data.tokenizers import FileTokenizer, Tokenizer
from slmjax.data.windows import EvaluationBatches, default_overlap, evaluation_batches
from slmjax.losses import DistillLossConfig, TeacherOutput, evaluation_sums, expected_calibration_error
from slmjax.models.decoder import Decoder
from slmjax.models.definition import Definition
from slmjax.parallel.batches import place_batch
from slmjax.quantization.fake_quantization import weight_formats

log = logging.getLogger(__name__)

Params = Mapping[str, Array]
EvalStep = Callable[
    ..., dict[str, Array]
]  # (params, buffers, batch) or (params, buffers, batch, what the teachers say of it)
Sums = dict[str, np.ndarray]
TeacherCall = Callable[[Batch], tuple[TeacherOutput, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What an evaluation came to, and what it was measured on."""

    loss: float  # nats per scored token
    perplexity: float
    bits_per_byte: float
    # mean gap between the model's confidence in its likeliest token and how often that is right
    calibration_error: float
    tokens: int  # that were scored
    total_tokens: int  # of the documents but BOS: more than `tokens` where prompts were not scored
    bytes: int  # of the scored text
    documents: int
    sequence_length: int  # tokens of a window
    overlap: int  # tokens of context that a further window of a long document repeats
    seconds: float
    # KL(teacher || model) in nats per scored token, at temperature 1; None: compared with none
    teacher_kl: float | None = None
    # share of scored tokens before which both find the same token the likeliest
    teacher_agreement: float | None = None
    teacher_bits_per_byte: float | None = None  # of the teachers themselves
    # share of the text's bytes that the tokenizer loses: above 0, bits per byte are too low to be compared
    lost_text: float = 0.0
    bos: SpecialToken | None = None  # what documents begin with, and what named it
    eos: SpecialToken | None = None  # what they end with
    unrounded_loss: float | None = None  # of a quantized run's weights before rounding; None: not evaluated
    unrounded_bits_per_byte: float | None = None

    def text(self) -> str:
        """In words, beside the teachers where there are any."""
        own = f"loss {self.loss:.4f}, {self.bits_per_byte:.3f} bits/byte"
        if not self.is_all:
            own += f" on {self.tokens:,} of {self.total_tokens:,} tokens, the completions"
        if self.lost_text:
            own += f" ({lost_note(self.lost_text)})"
        if self.unrounded_bits_per_byte is not None:
            own += f" ({self.unrounded_bits_per_byte:.3f} before rounding)"
        if self.teacher_bits_per_byte is None:
            return own
        return f"{own} (teacher {self.teacher_bits_per_byte:.3f}, KL {self.teacher_kl:.4f}, same first choice {self.teacher_agreement:.1%})"

    @property
    def is_all(self) -> bool:
        """Return whether all text of the documents was scored."""
        return self.tokens == self.total_tokens

    def measured_on(self, text: str) -> str:
        """In words, what part of this text was scored."""
        return text if self.is_all else f"the completions of {text}"

    def with_tokenizer(self, tokenizer: Tokenizer, documents: Sequence[TokenShards]) -> "EvalResult":
        """The result with what is to be known of the tokenizer: its BOS and EOS, and what it loses of these
        documents.
        """
        share = lost_fraction(shards.manifest.lost_text for shards in documents)
        return dataclasses.replace(self, lost_text=share, **tokenizer.special_tokens)

    def figures(self) -> dict[str, float]:
        """What a run's log tells; of the teachers only where there are any."""
        names = (
            "loss",
            "bits_per_byte",
            "calibration_error",
            "teacher_kl",
            "teacher_agreement",
            "teacher_bits_per_byte",
            "tokens",
        )
        names += ("total_tokens", "unrounded_loss", "unrounded_bits_per_byte")
        figures = {name: value for name in names if (value := getattr(self, name)) is not None}
        return figures | ({"lost_text": self.lost_text} if self.lost_text else {})


def make_eval_step(
    definition: Definition, *, loss_config: DistillLossConfig | None = None, unrounded: bool = False
) -> EvalStep:
    """The compiled `(params, buffers, batch, teachers) -> sums` over the global batch
    (`losses.evaluation_sums`).

    Args:
      loss_config: how several teachers are averaged, if the step is given any.
      unrounded: whether weights that have a format are also evaluated before they are rounded (sum
        "unrounded_nll").
    """

    @jax.jit
    def eval_step(
        params: Params, buffers: Params, batch: Batch, teachers: tuple[TeacherOutput, ...] = ()
    ) -> dict[str, Array]:
        def sums(model: Decoder, **compared: Any) -> dict[str, Array]:
            output = model(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions)
            return evaluation_sums(output.hidden, output.head, batch.targets, batch.loss_mask, **compared)

        found = sums(definition.merge(params, buffers), teachers=teachers, config=loss_config)
        if unrounded and weight_formats(definition):
            found["unrounded_nll"] = sums(definition.merge_untransformed(params, buffers))["nll"]
        return found

    return eval_step


def evaluate_batches(
    eval_step: EvalStep,
    params: Params,
    buffers: Params,
    batches: EvaluationBatches,
    *,
    mesh: Mesh | None = None,
    teachers: TeacherCall | None = None,
) -> EvalResult:
    """Runs all batches; on a mesh the parameters must be on it, and every process passes the rows that it
    holds.

    Args:
      teachers: whom the model is compared with, called with each placed batch.
    """
    started = time.monotonic()
    totals: Sums = {}
    pending: dict[str, Array] = {}
    for batch in batches:
        # The device works on this batch while the host reads the sums of the one before and makes the next.
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            placed = batch if mesh is None else place_batch(batch, mesh, batch_size=batches.batch_size)
            running = eval_step(params, buffers, placed, *(() if teachers is None else (teachers(placed),)))
        _add(totals, pending)
        pending = running
    _add(totals, pending)
    assert totals["weight"] == batches.num_targets, (
        f"{totals['weight']} tokens were scored, and there are {batches.num_targets}"
    )
    loss = float(totals["nll"]) / batches.num_targets
    plan = batches.plans[0][1]
    compared: dict[str, Any] = {}
    if "teacher_kl" in totals:
        compared = {
            name: float(totals[sum_name]) / batches.num_targets for name, sum_name in PER_TOKEN.items()
        }
        compared["teacher_bits_per_byte"] = _bits_per_byte(totals["teacher_nll"], batches)
    if "unrounded_nll" in totals:
        compared["unrounded_loss"] = float(totals["unrounded_nll"]) / batches.num_targets
        compared["unrounded_bits_per_byte"] = _bits_per_byte(totals["unrounded_nll"], batches)
    return EvalResult(
        **compared,
        loss=loss,
        perplexity=math.inf if loss >= 700 else math.exp(loss),
        bits_per_byte=_bits_per_byte(totals["nll"], batches),
        calibration_error=expected_calibration_error(
            *(totals[f"bin_{name}"] for name in ("weight", "confidence", "correct"))
        ),
        tokens=batches.num_targets,
        total_tokens=batches.num_tokens,
        bytes=batches.num_bytes,
        documents=batches.num_documents,
        sequence_length=plan.sequence_length,
        overlap=plan.overlap,
        seconds=time.monotonic() - started,
    )


def _bits_per_byte(nll: np.ndarray, batches: EvaluationBatches) -> float:
    """NaN where the scored text has no byte: only EOS was scored."""
    return float(nll) / math.log(2) / batches.num_bytes if batches.num_bytes else math.nan


PER_TOKEN = {"teacher_kl": "teacher_kl", "teacher_agreement": "agreement"}


def _add(totals: Sums, sums: Mapping[str, Array]) -> None:
    """Adds in float64: the sum over a corpus loses nothing to the float32 of one batch."""
    for name, value in jax.device_get(sums).items():
        totals[name] = np.asarray(totals.get(name, 0.0) + np.asarray(value, np.float64))


def evaluate(
    loaded: Loaded,
    *,
    data: DataConfig | None = None,
    max_documents: int | None = None,
    overlap: int | None = None,
    batch_size: int | None = None,
    score: ScoredText | None = None,
    teachers: TeacherCall | None = None,
    changed_data: ChangedData = ChangedData.REFUSE,
) -> EvalResult:
    """Loss and bits per byte of a trained model on held-out text, with the model's own tokenizer, on one
    device.

    Args:
      data: what to evaluate on: its held-out part, or all of it where nothing is held out (`heldout_fraction`
        0), in windows of its sequence length (or the model's context, if that is shorter). None: the held-out
        text of the run itself.
      max_documents: the first so many documents only.
      overlap: tokens of context that a further window of a long document repeats; None: as the run was
        evaluated.
      batch_size: rows at a time; None: that of the data.
      score: the text that is scored; None: as the run was evaluated, which is what training scores unless
        eval.score says otherwise.
      teachers: whom it is compared with (`distill.teachers.beside`).
      changed_data: what to do where the text that the model was trained on has changed since.

    Raises:
      ValueError: the run's text has changed, and `changed_data` does not allow it; or `data` is None, and the
        run held nothing out or the model's directory has no experiment.
    """
    experiment = _experiment_of(loaded)
    score = score or scored_text(loaded)
    data = data_or_own(loaded, data)
    length = min(data.sequence_length, loaded.config.context_length)
    if overlap is None:
        of_run = experiment.get("eval", {}).get("overlap")
        overlap = default_overlap(length) if of_run is None else min(int(of_run), length - 1)
    documents = documents_of(loaded, data, changed_data=changed_data)
    batches = evaluation_batches(
        documents,
        text=score,
        sequence_length=length,
        batch_size=batch_size or data.batch_size,
        overlap=overlap,
        max_documents=max_documents,
    )
    if max_documents is None and score is not ScoredText.ALL:
        _log_left_out(batches, documents, decode=loaded.tokenizer.decode)
    found = evaluate_batches(
        make_eval_step(loaded.definition), loaded.params, loaded.buffers, batches, teachers=teachers
    )
    return found.with_tokenizer(loaded.tokenizer, documents)


def _log_left_out(
    batches: EvaluationBatches,
    documents: Sequence[TokenShards],
    *,
    decode: Callable[[list[int]], str],
) -> None:
    names = {id(shards): shards.manifest.source_name for shards in documents}
    for shards, plan in batches.plans:
        for sentence in describe_left_out(plan, shards, name=names[id(shards)], decode=decode):
            log.warning("%s", sentence)


def data_or_own(loaded: Loaded, data: DataConfig | None) -> DataConfig:
    """What to evaluate on; for None the data of the run. Raises ValueError where the run held nothing out, or
    there is none.
    """
    if data is not None:
        return data
    experiment = _experiment_of(loaded)
    if "data" not in experiment:
        raise ValueError(
            f"{loaded.path} has no config.json that says what it was trained on: say what to evaluate on "
            "with data"
        )
    own = config_io.from_json(DataConfig, experiment["data"])
    if own.heldout_fraction == 0:
        raise ValueError(
            f"{loaded.path} was trained on all of its text and held nothing out: say what to evaluate on "
            "with data"
        )
    return own


def scored_text(loaded: Loaded) -> ScoredText:
    """Return the text that evaluations of the model's own run score; without a run or a setting, what
    training scores.
    """
    return ScoredText(_experiment_of(loaded).get("eval", {}).get("score", ScoredText.COMPLETIONS.value))


def documents_of(
    loaded: Loaded,
    data: DataConfig,
    *,
    changed_data: ChangedData = ChangedData.REFUSE,
) -> tuple[TokenShards, ...]:
    """The held-out documents of `data` in tokens of the model, or all of them where nothing is held out.

    Raises:
      ValueError: they are those of the model's own run, and have changed
        (`provenance.documents_to_evaluate`).
    """
    tokenizer = FileTokenizer(path=str(loaded.path / "tokenizer" / "tokenizer.json"))
    return documents_to_evaluate(loaded.path, data, tokenizer, changed_data=changed_data)


def _experiment_of(loaded: Loaded) -> dict[str, Any]:
    """The run's resolved experiment as JSON, or what a model made of a run keeps of it; empty for a model of
    other people.
    """
    return read_settings(loaded.path)
