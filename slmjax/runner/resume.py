"""Which run is resumed, and whether its data and settings are still those it was trained with."""

import json
from pathlib import Path

import jax

from slmjax.checkpoints.run_checkpoints import Checkpointer
from slmjax.data import provenance
from slmjax.data.preparation import Prepared
from slmjax.data.tokenizers import FileTokenizer, TokenizerConfig
from slmjax.data.windows import EvaluationBatches
from slmjax.runner.setup import Setup, log
from slmjax.telemetry.run_directory import RunDirectory, read_log
from slmjax.training.experiment import Experiment, read_experiment
from slmjax.training.programs import resolved_phases


def check_best(setup: Setup, checkpointer: Checkpointer) -> None:
    """Delete the note of a best checkpoint whose loss does not compare with those to come; replace one that
    is not finite.
    """
    run_log = RunDirectory(checkpointer.directory.parent).log_path
    evaluated = setup.heldout(setup.experiment.eval.max_documents)
    checkpointer.repair_best(run_log)
    if (
        (best := checkpointer.best()) is not None
        and run_log.exists()
        and _scored_otherwise(evaluated, run_log, step=best[0])
    ):
        why = "the loss of other tokens (the held-out text or eval.score changed)"
        log.warning(
            "the best checkpoint so far, of step %d, was chosen by %s: it is found anew", best[0], why
        )
        checkpointer.forget_best()


def _scored_otherwise(now: EvaluationBatches | None, run_log: Path, *, step: int) -> bool:
    """Return whether the evaluation after `step` scored another number of tokens than one does now."""
    records = [record for record in read_log(run_log, kind="eval") if record["step"] == step]
    if not records or now is None:
        return False
    total = records[-1].get("total_tokens", now.num_tokens)  # earlier versions said neither, and scored all
    return (records[-1].get("tokens", total), total) != (now.num_targets, now.num_tokens)


ROW_SETTINGS = (
    "sequence_length",
    "batch_size",
    "packing",
    "packing_window",
    "seed",
    "sources",
)  # they decide what row comes when


# Going on with a run ----------------------------------------------------------------------------------------
def run_to_resume(path: Path, experiment: Experiment) -> RunDirectory:
    """The directory of a run that goes on with these settings.

    Raises:
      ValueError: it is none, or the settings are for another model.
    """
    if not (path / "config.json").is_file():
        raise ValueError(
            f"cannot resume {path}: it has no config.json. Name a run directory, as `slmjax train` prints it "
            "at the end"
        )
    before = read_experiment(path)
    for name in ("model", "tokenizer", "quant"):
        if getattr(before, name) != getattr(experiment, name):
            raise ValueError(
                f"{path} has another {name}, which a resumed run keeps: begin a new run, with --init-from "
                f"{path} if it fits"
            )
    if _phase_steps(before) != _phase_steps(experiment):
        raise ValueError(
            f"{path} has phases of quantization that begin at steps {_phase_steps(before)}, and with these "
            "settings at "
            f"{_phase_steps(experiment)}: set quant.start_step to a number, or leave run.steps and optim as "
            "they are"
        )
    if (kind := before.optim.kind) is not experiment.optim.kind:
        raise ValueError(
            f"{path} was trained by {kind.value}, whose state means nothing to "
            f"optim.kind={experiment.optim.kind.value}: leave it as "
            f"it is, or begin a new run with --init-from {path}"
        )
    if _remembered(before) != _remembered(experiment):
        raise ValueError(
            f"{path} keeps {_remembered(before)} of its objective from step to step, and this experiment "
            f"{_remembered(experiment)}: leave "
            f"objective.distill as it is, or begin a new run with --init-from {path}"
        )
    if (before.optim.ema_decay is None) is not (experiment.optim.ema_decay is None):
        state = "no averaged weights" if before.optim.ema_decay is None else "averaged weights"
        raise ValueError(
            f"{path} keeps {state}, and a resumed run goes on so: optim.ema_decay is "
            f"{before.optim.ema_decay} there"
        )
    return RunDirectory(path, process_index=jax.process_index())


def _phase_steps(experiment: Experiment) -> list[int]:
    return [phase.step for phase in resolved_phases(experiment)]


def _remembered(experiment: Experiment) -> str:
    """What the objective keeps from step to step, in words."""
    distill = experiment.objective.distill
    names = () if distill is None else sorted(distill.divergence.initial_state())
    return ", ".join(names) or "nothing"


def tokenizer_of(run: RunDirectory, experiment: Experiment) -> TokenizerConfig:
    """The run's own tokenizer, so that it stays the same whatever became of the text it was made from."""
    kept = FileTokenizer(path=str(run.tokenizer))
    return kept if (run.tokenizer / "tokenizer.json").is_file() else experiment.tokenizer


def warn_of_other_data(run: RunDirectory, experiment: Experiment, prepared: Prepared) -> None:
    """Says so if a run goes on with other text or rows than it began with: nothing else would show it."""
    if (run.path / "config.json").is_file():
        before = read_experiment(run.path).data
        changed = [name for name in ROW_SETTINGS if getattr(before, name) != getattr(experiment.data, name)]
        if changed:
            log.warning(
                "%s goes on with another data.%s: some of its text comes twice, some not at all",
                run.path,
                changed[0],
            )
    for sentence in provenance.changes_on_resume(
        run.path, experiment.data, provenance.describe(prepared, experiment.data)
    ):
        log.warning(sentence)


def is_complete(run: RunDirectory, step: int) -> bool:
    """Whether a run that is at this step came to its end and wrote its result: one that was killed after its
    last step has not.

    The result of a run that was then extended is that of an earlier step.
    """
    path = run.path / "result.json"
    if not path.is_file():
        return False
    result = json.loads(path.read_text())
    return result["status"] == "finished" and result["step"] >= step
