"""Checks of a resumed run: that its settings fit it, and that its data is what it was trained with."""

from pathlib import Path

import jax

from slmjax.checkpoints import best_checkpoint
from slmjax.checkpoints.run_checkpoints import Checkpointer
from slmjax.data import provenance
from slmjax.data.preparation import Prepared
from slmjax.data.tokenizers import FileTokenizer, TokenizerConfig
from slmjax.data.windows import EvaluationBatches
from slmjax.runner.setup import Setup, log
from slmjax.stored_json import read_object
from slmjax.telemetry.run_directory import RunDirectory, read_log
from slmjax.training.experiment import Experiment, read_experiment
from slmjax.training.programs import resolved_phases


def check_best(setup: Setup, checkpointer: Checkpointer) -> None:
    """Forget a best checkpoint whose loss does not compare with later ones; replace a loss of NaN."""
    run_log = RunDirectory(checkpointer.directory.parent).log_path
    batches = setup.heldout(setup.experiment.eval.max_documents)
    # Repaired first: nothing compares with a loss that is not finite, so it would stay the best.
    if jax.process_index() == 0:
        best_checkpoint.repair(checkpointer.directory, run_log)
    if (
        (best := checkpointer.best()) is not None
        and run_log.exists()
        and _scores_other_tokens(batches, run_log, step=best[0])
    ):
        log.warning(
            "the best checkpoint so far, of step %d, was chosen by the loss of other tokens (the held-out "
            "text or eval.score changed): it is chosen again from the evaluations to come",
            best[0],
        )
        if jax.process_index() == 0:
            best_checkpoint.forget(checkpointer.directory)


def _scores_other_tokens(now: EvaluationBatches | None, run_log: Path, *, step: int) -> bool:
    """Return whether the evaluation after `step` scored a different number of tokens than one does now."""
    records = [record for record in read_log(run_log, kind="eval") if record["step"] == step]
    if not records or now is None:
        return False
    # Earlier versions scored all tokens and logged no counts.
    totals = [record.get("total_tokens", now.num_tokens) for record in records]
    counts = [(record.get("tokens", total), total) for record, total in zip(records, totals, strict=True)]
    # The last step has two records, of a part of the held-out text and of all.
    return (now.num_targets, now.num_tokens) not in counts


# Settings of the data that decide which row comes when.
ROW_SETTINGS = ("sequence_length", "batch_size", "packing", "packing_window", "seed", "sources")


# Resuming a run ---------------------------------------------------------------------------------------------
def run_to_resume(path: Path, experiment: Experiment) -> RunDirectory:
    """Return the directory of a run to resume with these settings.

    Raises:
      ValueError: the directory holds no run, or the settings do not fit its state.
    """
    if not (path / "config.json").is_file():
        raise ValueError(
            f"cannot resume {path}: it has no config.json. Name a run directory, as `slmjax train` prints it "
            "at the end"
        )
    before = read_experiment(path)
    # The state has the shapes and the formats of these: with others it could not be read, or would mean
    # something else.
    for name in ("model", "tokenizer", "quant"):
        if getattr(before, name) != getattr(experiment, name):
            raise ValueError(
                f"{path} has another {name}, which a resumed run keeps: begin a new run, with --init-from "
                f"{path} if it fits"
            )
    # Phases may be set relative to the schedule, so a longer run can move them although `quant` is the same.
    if _phase_steps(before) != _phase_steps(experiment):
        raise ValueError(
            f"{path} has quantization phases that begin at steps {_phase_steps(before)}, and with these "
            f"settings at {_phase_steps(experiment)}: set quant.start_step to a number, or leave "
            "run.steps and optim as they are"
        )
    if (kind := before.optim.kind) is not experiment.optim.kind:
        raise ValueError(
            f"{path} was trained by {kind.value}, whose state means nothing to "
            f"optim.kind={experiment.optim.kind.value}: leave it as it is, or begin a new run with "
            f"--init-from {path}"
        )
    if _objective_state(before) != _objective_state(experiment):
        raise ValueError(
            f"{path} keeps {_objective_state(before)} of its objective from step to step, and this "
            f"experiment {_objective_state(experiment)}: leave objective.distill as it is, or begin a "
            f"new run with --init-from {path}"
        )
    # The decay itself may change, but an average cannot begin in the middle: there is nothing to restore.
    if (before.optim.ema_decay is None) is not (experiment.optim.ema_decay is None):
        state = "no averaged weights" if before.optim.ema_decay is None else "averaged weights"
        raise ValueError(
            f"{path} keeps {state}, and a resumed run must too: set optim.ema_decay to "
            f"{before.optim.ema_decay}"
        )
    return RunDirectory(path, process_index=jax.process_index())


def _phase_steps(experiment: Experiment) -> list[int]:
    return [phase.step for phase in resolved_phases(experiment)]


def _objective_state(experiment: Experiment) -> str:
    """Return the names of what the objective keeps from step to step."""
    distill = experiment.objective.distill
    names = () if distill is None else sorted(distill.divergence.initial_state())
    return ", ".join(names) or "nothing"


def tokenizer_of(run: RunDirectory, experiment: Experiment) -> TokenizerConfig:
    """Return the run's own tokenizer, which stays the same even if the text that it was made from changes."""
    # Training it again, on text that has grown, would give ids that the model has not learnt.
    if (run.tokenizer / "tokenizer.json").is_file():
        return FileTokenizer(path=str(run.tokenizer))
    return experiment.tokenizer


def warn_of_other_data(run: RunDirectory, experiment: Experiment, prepared: Prepared) -> None:
    """Warn if a run resumes with other text or rows than it began with: nothing else would show it."""
    if (run.path / "config.json").is_file():
        before = read_experiment(run.path).data
        changed = [name for name in ROW_SETTINGS if getattr(before, name) != getattr(experiment.data, name)]
        if changed:
            log.warning(
                "%s resumes with another data.%s: some of its text comes twice, some not at all",
                run.path,
                changed[0],
            )
    for sentence in provenance.changes_on_resume(
        run.path, experiment.data, provenance.describe(prepared, experiment.data)
    ):
        log.warning(sentence)


def steps_saved(run: RunDirectory, *, every: int) -> int:
    """Return a step that a run must have had a checkpoint of, by its result and its log; 0 if there is none.

    Args:
      every: steps between its checkpoints.
    """
    result = run.path / "result.json"
    if result.is_file():
        content = read_object(result, {"status": str, "step": int}, remedy=_RESULT_REMEDY)
        # Written once the last state of a session was saved, or could not be.
        return 0 if content["status"] == "not_saved" else content["step"]
    if not run.log_path.exists():
        return 0
    records = read_log(run.log_path)
    # A session that began at step 0 had nothing to resume from: only what it did itself counts.
    first = [i for i, record in enumerate(records) if record.get("first_step") == 1]
    steps = {
        kind: [record["step"] for record in records[first[-1] if first else 0 :] if record["kind"] == kind]
        for kind in ("train", "eval")
    }
    # The record of a step is written before its checkpoint, which the first evaluation causes too.
    return max([*(step for step in steps["train"] if step > every), *steps["eval"]], default=0)


_RESULT_REMEDY = "delete it, and resume the run, which writes it again"


def is_complete(run: RunDirectory, step: int) -> bool:
    """Return whether a run that is at this step has written its result.

    A run that was killed after its last step has not. The result of a run that was then extended is of an
    earlier step.
    """
    path = run.path / "result.json"
    if not path.is_file():
        return False
    result = read_object(path, {"status": str, "step": int}, remedy=_RESULT_REMEDY)
    return result["status"] == "finished" and result["step"] >= step
