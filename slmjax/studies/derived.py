"""Derived members: a derivation is applied to a finished run, and the model evaluated like the run."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

from slmjax.checkpoints.loading import Loaded, load_model
from slmjax.evaluation import EvalResult, evaluate, write_document_sums
from slmjax.quantization.ptq.round_to_nearest import Clip, quantize_model
from slmjax.quantization.rules import QuantRule
from slmjax.runner import trainer
from slmjax.studies.arms import Derivation
from slmjax.training.experiment import Experiment

log = logging.getLogger(__name__)

# Results of the source run that also hold for the derived model. Its speed does not.
INHERITED = ("run_tokens", "step", "parameters", "commit")


def derive(
    derivation: Derivation, source: dict[str, Any], experiment: Experiment, *, out: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Derive a model from a finished member, and evaluate it on all held-out text.

    Args:
      source: the result of the member (fields of `trainer.Result`).
      experiment: the experiment whose held-out text and windows are used.
      out: directory of the model; an existing one is replaced.

    Returns:
      result and evaluation of the new member, with the same keys as for a training.
    """
    # Remains of an interrupted derivation.
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    # From the run's directory, not from a model in memory: the derived model is what a user would get.
    derivation.make(Path(source["run_dir"]), out)
    result = {name: source[name] for name in INHERITED if name in source}
    return evaluate_run(result | {"status": "finished", "run_dir": str(out)}, experiment)


def evaluate_run(result: dict[str, Any], experiment: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate the model of a result on all held-out text, as at the end of a training.

    Returns:
      the result with the metrics of that text, and the evaluation, with the keys of a run's log.
    """
    directory = Path(result["run_dir"])
    # All held-out text: otherwise the arms would not compare.
    evaluation = evaluate_member(load_model(directory), experiment)
    if evaluation.document_sums is not None:
        write_document_sums(evaluation.document_sums, directory)
    # The keys of `trainer.Result`, so that trained and derived members can be analyzed alike.
    metrics = {
        "loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "perplexity": evaluation.perplexity,
        "measured_on": evaluation.measured_on(trainer.ALL),
        "lost_text": evaluation.lost_text,
    }
    # The keys of an "eval" record in a run's log.
    return result | metrics, {
        **evaluation.metrics(),
        "step": result.get("step"),
        "complete": True,
        "documents": evaluation.documents,
    }


def evaluate_member(loaded: Loaded, experiment: Experiment, **further: Any) -> EvalResult:
    """Evaluate a model on all held-out text of an experiment, with the windows and batches of its runs."""
    data = experiment.data
    settings = experiment.eval
    # Windows determine how much context a token has, and so the loss: they are those of the run's
    # evaluations.
    overlap = settings.windows_overlap(data.sequence_length)
    batch_size = settings.batch_size or data.batch_size
    return evaluate(
        loaded, data=data, overlap=overlap, batch_size=batch_size, score=settings.score, **further
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundToNearest(Derivation):
    """Rounding of matrices to number formats, as by `slmjax quantize`.

    The dequantized weights of a quantized model are rounded again, as a converter does that ignores its
    codes.
    """

    rules: tuple[QuantRule, ...]  # formats by paths
    clip: Clip = Clip.NONE  # choice of scales

    def make(self, model: Path, out: Path) -> None:
        """Write the quantized model."""
        quantize_model(model, out, rules=self.rules, clip=self.clip)
