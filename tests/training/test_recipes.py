"""Fine-tuning: the rates of the recipe, the model it takes, and the warning of rates from scratch."""

import dataclasses
import logging
from pathlib import Path

import pytest

import slmjax
from slmjax import config
from slmjax.checkpoints.model_file import NAME, model_json
from slmjax.models import zoo
from slmjax.telemetry.run_directory import write_json
from slmjax.training.experiment import FromModel, RunConfig, starting_from, warn_of_scratch_rates
from slmjax.training.optim import OptimConfig, Optimizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A run's directory with a narrow model of a short context."""
    narrow = dataclasses.replace(zoo.nano(vocab_size=300), embed_dim=64, context_length=128)
    write_json(tmp_path / NAME, model_json(narrow))
    return tmp_path


def test_fine_tuning_takes_the_model_and_its_tokenizer(model: Path) -> None:
    recipe = slmjax.load_experiment("finetune")
    experiment = starting_from(model, recipe, takes_model=True)
    assert (experiment.model.embed_dim, experiment.data.sequence_length) == (64, 128)
    assert experiment.init == FromModel(path=str(model))
    assert experiment.optim == recipe.optim
    # A file of the user's describes its own model, such as one with a longer context.
    nano = slmjax.load_experiment("nano")
    assert starting_from(model, nano).model == nano.model


def test_rates_from_scratch_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    finetune = slmjax.load_experiment("finetune")
    nano = slmjax.load_experiment("nano")
    fresh = dataclasses.replace(finetune, init=nano.init, optim=nano.optim)
    warn_of_scratch_rates(finetune)
    warn_of_scratch_rates(fresh)
    assert not caplog.records, "neither rates of fine-tuning nor fresh parameters are warned of"
    expected = {
        nano.optim: "optim.lr=0.02 (at most about 0.0002), optim.muon_lr=0.01 (at most about 0.002)",
        OptimConfig(): "optim.lr=0.001 (at most",
        OptimConfig(kind=Optimizer.LION, lr=1e-4): "optim.lr=0.0001 (at most about 5e-05)",
    }
    for optim, text in expected.items():
        caplog.clear()
        warn_of_scratch_rates(dataclasses.replace(finetune, optim=optim))
        assert text in caplog.text and "`finetune`" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING


def test_epochs_are_passes_over_the_rows() -> None:
    run = RunConfig(epochs=1.5)
    assert run.in_steps(101, batch_size=8) == RunConfig(steps=19)  # 151.5 rows in 18.9 batches
    assert run.in_steps(3, batch_size=8).steps == 1
    assert RunConfig(steps=7).in_steps(101, batch_size=8) == RunConfig(steps=7)
    with pytest.raises(ValueError, match=r"run.epochs must be above 0, got 0"):
        RunConfig(epochs=0)


def test_the_length_in_epochs_is_no_part_of_older_fingerprints() -> None:
    assert config.fingerprint(RunConfig()) == "7a68d0936dd10b60"
    assert config.fingerprint(RunConfig(epochs=2)) != config.fingerprint(RunConfig())
