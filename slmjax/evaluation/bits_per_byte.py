"""Loss, perplexity and bits per byte on held-out text, over the tokens that training scores.

    evaluate(loaded)                                         # the run's own held-out text
    data = DataConfig(path="book.txt", heldout_fraction=0.0)
    evaluate(loaded, data=data)                              # all of another text
    evaluate(loaded, score=ScoredText.ALL)                   # prompts of pairs as well

Bits per byte is the total negative log-likelihood in bits over the UTF-8 bytes of the scored text. BOS is not
scored; EOS is scored and counts no byte. Documents that are longer than a row are cut into overlapping
windows; the repeated tokens are context, and are not scored again (`data/windows.py`). The sum therefore has
one term per token whatever the batch size, packing or mesh. Window length and overlap determine how much
context a token has, so they are part of the result.

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
from slmjax import faults
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
from slmjax.evaluation.document_sums import MAX_GROUPS, DocumentSums
from slmjax.losses import DistillLossConfig, TeacherOutput, evaluation_sums, expected_calibration_error
from slmjax.models.decoder import Decoder
from slmjax.models.definition import Definition
from slmjax.parallel.batches import place_batch
from slmjax.quantization.fake_quantization import weight_formats

log = logging.getLogger(__name__)

# (params, buffers, batch) or (params, buffers, batch, teacher_outputs), and groups by name
EvalStep = Callable[..., dict[str, Array]]
Sums = dict[str, np.ndarray]
TeacherCall = Callable[[Batch], tuple[TeacherOutput, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Metrics of an evaluation, and the text that they were measured on."""

    loss: float  # nats per scored token
    perplexity: float
    bits_per_byte: float
    # mean gap between the model's confidence in its likeliest token and how often that is right
    calibration_error: float
    tokens: int  # scored tokens
    total_tokens: int  # all tokens of the documents except BOS: more than `tokens` if prompts were not scored
    bytes: int  # of the scored text
    documents: int
    sequence_length: int  # tokens of a window
    overlap: int  # tokens of context that a further window of a long document repeats
    seconds: float
    # KL(teacher || model) in nats per scored token, at temperature 1; None without a teacher
    teacher_kl: float | None = None
    # fraction of scored tokens for which both find the same token the likeliest
    teacher_agreement: float | None = None
    teacher_bits_per_byte: float | None = None  # of the teachers themselves
    # fraction of the text's bytes that the tokenizer loses: above 0, bits per byte are too low to compare
    lost_text: float = 0.0
    bos: SpecialToken | None = None  # first token of a document, and where its name comes from
    eos: SpecialToken | None = None  # last token of a document
    unrounded_loss: float | None = None  # of a quantized run's weights before rounding; None: not evaluated
    unrounded_bits_per_byte: float | None = None
    document_sums: DocumentSums | None = dataclasses.field(default=None, repr=False, compare=False)

    def text(self) -> str:
        """Return a one-line summary, with the comparison with the teachers if there are any."""
        own = f"loss {self.loss:.4f}, {self.bits_per_byte:.3f} bits/byte"
        if not self.is_all:
            own += f" on {self.tokens:,} of {self.total_tokens:,} tokens, the completions"
        if self.lost_text:
            own += f" ({lost_note(self.lost_text)})"
        if self.unrounded_bits_per_byte is not None:
            own += f" ({self.unrounded_bits_per_byte:.3f} before rounding)"
        if self.teacher_bits_per_byte is None:
            return own
        return (
            f"{own} (teacher {self.teacher_bits_per_byte:.3f}, KL {self.teacher_kl:.4f}, "
            f"same first choice {self.teacher_agreement:.1%})"
        )

    @property
    def is_all(self) -> bool:
        """Return whether all text of the documents was scored."""
        return self.tokens == self.total_tokens

    def measured_on(self, text: str) -> str:
        """Return a description of the part of this text that was scored."""
        return text if self.is_all else f"the completions of {text}"

    def with_tokenizer(self, tokenizer: Tokenizer, documents: Sequence[TokenShards]) -> "EvalResult":
        """Return the result with the tokenizer's BOS and EOS, and the text it loses of these documents."""
        lost_text = lost_fraction(shards.manifest.lost_text for shards in documents)
        return dataclasses.replace(self, lost_text=lost_text, **tokenizer.special_tokens)

    def metrics(self) -> dict[str, float]:
        """Return the metrics for the log of a run; those of teachers only if there are any."""
        names = (
            "loss",
            "bits_per_byte",
            "calibration_error",
            "teacher_kl",
            "teacher_agreement",
            "teacher_bits_per_byte",
            "tokens",
            "total_tokens",
            "unrounded_loss",
            "unrounded_bits_per_byte",
        )
        metrics = {name: value for name in names if (value := getattr(self, name)) is not None}
        return metrics | ({"lost_text": self.lost_text} if self.lost_text else {})


def make_eval_step(
    definition: Definition, *, loss_config: DistillLossConfig | None = None, unrounded: bool = False
) -> EvalStep:
    """Return the compiled `(params, buffers, batch, teacher_outputs, groups) -> losses.evaluation_sums`.

    Args:
      definition: the model.
      loss_config: how several teachers are averaged, if the step is given any.
      unrounded: also evaluate quantized weights before they are rounded (sum "unrounded_nll").
    """

    @jax.jit
    def eval_step(
        params: Mapping[str, Array],
        buffers: Mapping[str, Array],
        batch: Batch,
        teacher_outputs: tuple[TeacherOutput, ...] = (),
        groups: Array | None = None,
    ) -> dict[str, Array]:
        def sums_of(model: Decoder, **teacher_options: Any) -> dict[str, Array]:
            output = model(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions)
            return evaluation_sums(
                output.hidden, output.head, batch.targets, batch.loss_mask, **teacher_options
            )

        sums = sums_of(
            definition.merge(params, buffers),
            teachers=teacher_outputs,
            config=loss_config,
            groups=groups,
            num_groups=MAX_GROUPS,
        )
        if unrounded and weight_formats(definition):
            # In the same step, so that the batch is placed on the devices once.
            sums["unrounded_nll"] = sums_of(definition.merge_untransformed(params, buffers))["nll"]
        return sums

    return eval_step


def evaluate_batches(
    eval_step: EvalStep,
    params: Mapping[str, Array],
    buffers: Mapping[str, Array],
    batches: EvaluationBatches,
    *,
    mesh: Mesh | None = None,
    teachers: TeacherCall | None = None,
    on_batch: Callable[[], None] | None = None,
) -> EvalResult:
    """Evaluate all batches. On a mesh the parameters must be on it, and each process passes its own rows.

    Args:
      eval_step: the compiled step of `make_eval_step`.
      params: parameters of the model.
      buffers: buffers of the model.
      batches: batches of the evaluation.
      mesh: the mesh; None for one device.
      teachers: called with each batch on its devices; its outputs are compared with the model's.
      on_batch: called after each batch; what it raises ends the evaluation.
    """
    started = time.monotonic()
    # Only sums are exchanged between devices: every mean is taken once, over all tokens.
    totals: Sums = {}
    pending: dict[str, Array] = {}
    for batch in batches:
        # The device works on this batch while the host reads the sums of the previous one and makes the next.
        inputs = (batch, batches.groups_of(batch, num_groups=MAX_GROUPS))
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            placed, groups = (
                inputs if mesh is None else place_batch(inputs, mesh, batch_size=batches.batch_size)
            )
            outputs = () if teachers is None else (teachers(placed),)
            running = eval_step(params, buffers, placed, *outputs, groups=groups)
        _add(totals, pending)
        pending = running
        faults.at("evaluation.batch")
        if on_batch is not None:
            on_batch()
    _add(totals, pending)
    # Every token is scored exactly once, or bits per byte would not compare.
    assert totals["weight"] == batches.num_targets, (
        f"{totals['weight']} tokens were scored, and there are {batches.num_targets}"
    )
    loss = float(totals["nll"]) / batches.num_targets
    plan = batches.plans[0][1]
    optional_metrics: dict[str, Any] = {}
    if "teacher_kl" in totals:
        optional_metrics = {
            name: float(totals[sum_name]) / batches.num_targets for name, sum_name in PER_TOKEN.items()
        }
        optional_metrics["teacher_bits_per_byte"] = _bits_per_byte(totals["teacher_nll"], batches)
    if "unrounded_nll" in totals:
        optional_metrics["unrounded_loss"] = float(totals["unrounded_nll"]) / batches.num_targets
        optional_metrics["unrounded_bits_per_byte"] = _bits_per_byte(totals["unrounded_nll"], batches)
    return EvalResult(
        **optional_metrics,
        loss=loss,
        # exp overflows a float at about 709.
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
        document_sums=_document_sums(totals["group_nll"], batches),
    )


def _document_sums(group_nll: np.ndarray, batches: EvaluationBatches) -> DocumentSums:
    tokens, num_bytes = batches.group_counts(MAX_GROUPS)
    return DocumentSums(
        nats=group_nll[: len(tokens)],
        tokens=tokens,
        bytes=num_bytes,
        num_documents=batches.num_documents,
    )


def _bits_per_byte(nll: np.ndarray, batches: EvaluationBatches) -> float:
    """Return NaN if the scored text has no bytes: only EOS was scored."""
    return float(nll) / math.log(2) / batches.num_bytes if batches.num_bytes else math.nan


# Metrics that are means over scored tokens, and the sums that they are computed from.
PER_TOKEN = {"teacher_kl": "teacher_kl", "teacher_agreement": "agreement"}


def _add(totals: Sums, sums: Mapping[str, Array]) -> None:
    """Add the sums of a batch to the totals, in float64: float32 would lose digits over a corpus."""
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
    """Return loss and bits per byte of a trained model on held-out text, with its tokenizer, on one device.

    Args:
      loaded: the model, from `load_model`.
      data: text to evaluate on: its held-out part, or all of it if nothing is held out (`heldout_fraction`
        0), in windows of its sequence length (or the model's context, if that is shorter). None: the held-out
        text of the run itself.
      max_documents: evaluate only this many documents, the first ones.
      overlap: tokens of context that a further window of a long document repeats; None: the run's setting.
      batch_size: rows at a time; None: that of the data.
      score: the text that is scored; None: the run's setting, which is by default what training scores.
      teachers: models to compare with (`distill.teachers.load_teacher`).
      changed_data: what to do if the text that the model was trained on has changed since.

    Raises:
      ValueError: the run's text has changed, and `changed_data` does not allow it; or `data` is None, and the
        run held nothing out or the model's directory has no experiment.
    """
    experiment = _experiment_of(loaded)
    score = score or scored_text(loaded)
    data = data_or_own(loaded, data)
    # A window is never longer than the context that the model was trained with.
    length = min(data.sequence_length, loaded.config.context_length)
    if overlap is None:
        run_overlap = experiment.get("eval", {}).get("overlap")
        # A shorter context than the run's windows needs a shorter overlap.
        overlap = default_overlap(length) if run_overlap is None else min(int(run_overlap), length - 1)
    documents = documents_of(loaded, data, changed_data=changed_data)
    batches = evaluation_batches(
        documents,
        text=score,
        sequence_length=length,
        batch_size=batch_size or data.batch_size,
        overlap=overlap,
        max_documents=max_documents,
    )
    # Of all documents only: for a part of them the counts would mislead.
    if max_documents is None and score is not ScoredText.ALL:
        _log_left_out(batches, documents, decode=loaded.tokenizer.decode)
    result = evaluate_batches(
        make_eval_step(loaded.definition), loaded.params, loaded.buffers, batches, teachers=teachers
    )
    return result.with_tokenizer(loaded.tokenizer, documents)


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
    """Return the data to evaluate on: `data`, or the run's own for None.

    Raises:
      ValueError: the run held nothing out, or the model has no run.
    """
    if data is not None:
        return data
    experiment = _experiment_of(loaded)
    if "data" not in experiment:
        raise ValueError(
            f"{loaded.path} has no config.json with its training data: set data to the text to evaluate on"
        )
    # Only the data: other parts of the experiment may be of another version.
    own = config_io.from_json(DataConfig, experiment["data"])
    # A loss on training text would look better than it is, so that it must be asked for.
    if own.heldout_fraction == 0:
        raise ValueError(
            f"{loaded.path} was trained on all of its text and held nothing out: set data to the text to "
            "evaluate on"
        )
    return own


def scored_text(loaded: Loaded) -> ScoredText:
    """Return the text that evaluations of the model's run score; the default is what training scores."""
    score = _experiment_of(loaded).get("eval", {}).get("score", ScoredText.COMPLETIONS.value)
    try:
        return ScoredText(score)
    except ValueError as error:
        raise ValueError(f"{loaded.path}: eval.score of its settings is unknown ({error})") from error


def documents_of(
    loaded: Loaded,
    data: DataConfig,
    *,
    changed_data: ChangedData = ChangedData.REFUSE,
) -> tuple[TokenShards, ...]:
    """Return the held-out documents of `data` in tokens of the model, or all if nothing is held out.

    Raises:
      ValueError: they are those of the model's own run, and have changed
        (`provenance.documents_to_evaluate`).
    """
    # The model's own copy: the file that the run was trained with may have moved or changed.
    tokenizer = FileTokenizer(path=str(loaded.path / "tokenizer" / "tokenizer.json"))
    return documents_to_evaluate(loaded.path, data, tokenizer, changed_data=changed_data)


def _experiment_of(loaded: Loaded) -> dict[str, Any]:
    """Return the run's experiment as JSON, or the part that a derived model keeps; empty without a run."""
    return read_settings(loaded.path)
