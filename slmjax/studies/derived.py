"""Members that are made, not trained: a recipe applied to a finished run, and the model evaluated as that run
was.
"""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

from slmjax.checkpoints.loading import Loaded, load_model
from slmjax.evaluation import EvalResult, evaluate
from slmjax.quantization.ptq.round_to_nearest import Clip, quantize_model
from slmjax.quantization.rules import QuantRule
from slmjax.runner import trainer
from slmjax.studies.arms import Derivation
from slmjax.training.experiment import Experiment

log = logging.getLogger(__name__)

# Of the run that a model is made of: what it was trained on and for how long is so of the model too. Its
# speed is not.
INHERITED = ("tokens", "step", "parameters", "commit")


def derive(
    recipe: Derivation, source: dict[str, Any], experiment: Experiment, *, out: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Makes a model of a finished member's and evaluates it on all held-out text; what was in `out` before is
    replaced.

    Args:
      recipe: how it is made.
      source: the member's result (`trainer.Result`'s fields).
      experiment: whose held-out text is read, with its windows.
      out: the directory of the model.

    Returns:
      Result and evaluation of the new member, with the names that those of a training have.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe.make(Path(source["run_dir"]), out)
    found = evaluate_member(load_model(out), experiment)
    result = {name: source[name] for name in INHERITED if name in source}
    result |= {
        "status": "finished",
        "loss": found.loss,
        "bits_per_byte": found.bits_per_byte,
        "perplexity": found.perplexity,
        "measured_on": found.measured_on(trainer.ALL),
        "run_dir": str(out),
        "lost_text": found.lost_text,
    }
    return result, {
        **found.metrics(),
        "step": source.get("step"),
        "complete": True,
        "documents": found.documents,
    }


def evaluate_member(loaded: Loaded, experiment: Experiment, **further: Any) -> EvalResult:
    """A model on all held-out text of an experiment, in the windows and rows in which its runs are evaluated
    at their end.
    """
    data = experiment.data
    settings = experiment.eval
    overlap = settings.windows_overlap(data.sequence_length)
    rows = settings.batch_size or data.batch_size
    return evaluate(loaded, data=data, overlap=overlap, batch_size=rows, score=settings.score, **further)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundToNearest(Derivation):
    """Matrices rounded to formats, as `slmjax quantize` does it. Of a model that is quantized already the
    decoded numbers are rounded anew, as a converter does that knows nothing of its codes."""

    rules: tuple[QuantRule, ...]  # the formats, by paths
    clip: Clip = Clip.NONE  # how scales are chosen

    def make(self, model: Path, out: Path) -> None:
        """Writes the quantized model."""
        quantize_model(model, out, rules=self.rules, clip=self.clip)
