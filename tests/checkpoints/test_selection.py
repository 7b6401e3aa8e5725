"""Figures that are not finite are never kept, wherever they stand."""

import dataclasses
import io
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import slmjax
from slmjax.checkpoints import best_checkpoint
from slmjax.checkpoints.run_checkpoints import CheckpointConfig, Checkpointer
from slmjax.checkpoints.selection import best_of, is_better
from slmjax.evaluation.bits_per_byte import EvalResult
from slmjax.runner import trainer
from slmjax.runner.setup import Setup
from slmjax.telemetry.run_directory import RunLog
from tests.checkpoints.small_states import MODEL, state_at
from tests.one_layer import one_layer

BAD = (math.nan, math.inf, -math.inf)


def result_of(loss: float, *, tokens: int = 1, total_tokens: int = 1) -> EvalResult:
    """An evaluation with this loss."""
    return EvalResult(
        loss=loss,
        perplexity=loss,
        bits_per_byte=loss,
        calibration_error=0.0,
        tokens=tokens,
        total_tokens=total_tokens,
        bytes=1,
        documents=1,
        sequence_length=48,
        overlap=8,
        seconds=0.0,
    )


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_what_is_not_finite_is_never_the_best(lower_is_better: bool) -> None:
    for bad in BAD:
        assert not is_better(bad, None, lower_is_better=lower_is_better)
        assert not is_better(bad, 1.0, lower_is_better=lower_is_better)
        assert is_better(1.0, bad, lower_is_better=lower_is_better)
        assert best_of({"a": bad}, lower_is_better=lower_is_better) is None
    assert is_better(1.0, 2.0, lower_is_better=lower_is_better) is lower_is_better
    assert is_better(2.0, 1.0, lower_is_better=lower_is_better) is not lower_is_better
    assert not is_better(1.0, 1.0, lower_is_better=lower_is_better)
    for order in itertools.permutations((1.0, 2.0, *BAD)):
        best = best_of(dict(enumerate(order)), lower_is_better=lower_is_better)
        assert best is not None and order[best] == (1.0 if lower_is_better else 2.0)


def test_an_evaluation_that_is_not_finite_does_not_become_a_runs_best() -> None:
    loop = SimpleNamespace(best=None, step=0, _text_of=lambda result: "text")
    kept = []
    for loop.step, loss in enumerate((math.nan, 2.0, math.nan, -math.inf, 1.5), start=1):
        if trainer.Loop._is_best(loop, result_of(loss)):  # pyright: ignore[reportArgumentType]  # all that it uses
            kept.append(loop.best)
    assert kept == [(2, 2.0), (5, 1.5)]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(loss, tmp_path, caplog):
    directory = tmp_path / "checkpoints"
    checkpointer = Checkpointer(directory, model=MODEL, config=CheckpointConfig(keep=3))
    checkpointer.save(1, {"model": state_at(1)["model"]}, best_loss=2.0)
    checkpointer.save(2, {"model": state_at(2)["model"]}, best_loss=loss)
    checkpointer.mark_best(2, loss)
    assert checkpointer.best() == (1, 2.0)
    # As versions before this one left it: repaired from the log, in which the evaluations of lost checkpoints
    # stand too.
    losses = {1: 2.0, 2: math.nan, 7: 0.5}
    with RunLog(tmp_path / "log.jsonl") as log:
        for step, value in losses.items():
            log.write("eval", step=step, loss=value)
        log.write("eval", step=2, loss=0.1, complete=True)  # on other text
    (directory / "best.json").write_text(json.dumps({"step": 2, "loss": str(loss)}))
    assert checkpointer.best() is None
    best_checkpoint.repair(directory, tmp_path / "log.jsonl")
    assert checkpointer.best() == (1, 2.0) and "of those left, checkpoint 1 is the best" in caplog.text
    (directory / "best.json").write_text(json.dumps({"step": 2, "loss": str(loss)}))
    best_checkpoint.repair(directory, tmp_path / "no log")
    assert checkpointer.best() is None and not (directory / "best.json").exists()
    checkpointer.close()


@pytest.mark.nightly
def test_an_evaluation_that_is_not_finite_is_never_the_best(workplace, tmp_path, monkeypatch):
    """Evaluations after steps 1 to 5 and at the end; the best checkpoint stays, also of a run that noted NaN
    as its best.
    """
    losses = [2.0, math.nan, 3.0, math.inf, 2.5, math.nan]

    def evaluation(setup, state, max_documents, **_):
        batches = setup.heldout(max_documents)
        return result_of(losses.pop(0), tokens=batches.num_targets, total_tokens=batches.num_tokens)

    monkeypatch.setattr(Setup, "evaluate", evaluation)
    experiment = one_layer(workplace, tmp_path, steps=6)
    experiment = dataclasses.replace(
        experiment,
        eval=dataclasses.replace(experiment.eval, every=1),
        checkpoint=CheckpointConfig(every=4, keep=1),
    )
    result = slmjax.train(experiment, console=Console(file=io.StringIO()))
    directory = Path(result.run_dir) / "checkpoints"
    assert (result.best_step, result.best_loss) == (1, 2.0)
    assert {path.name for path in directory.iterdir()} == {"1", "6", "best.json"}
    (directory / "best.json").write_text('{"step": 6, "loss": "nan"}')
    losses = [2.75, 2.25]
    longer = dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, steps=8))
    again = slmjax.train(longer, resume=result.run_dir, console=Console(file=io.StringIO()))
    assert (again.best_step, again.best_loss) == (1, 2.0)
    assert {path.name for path in directory.iterdir()} == {"1", "6", "8", "best.json"}
    assert json.loads((directory / "best.json").read_text()) == {"step": 1, "loss": 2.0}
