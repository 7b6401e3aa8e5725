"""What jumps when a run goes on with other settings is said before it does."""

import dataclasses
import logging
from pathlib import Path

import pytest

from slmjax import config
from slmjax.architecture import BlockConfig, ModelConfig, Segment
from slmjax.attention import AttentionConfig
from slmjax.distill.config import DistillConfig, Ramp, TeacherConfig
from slmjax.experiment import Experiment, RunConfig
from slmjax.optim import OptimConfig, Optimizer, Schedule
from slmjax.resumption import schedule_changes, warn_of_changed_schedules
from slmjax.runlog import RunDirectory
from slmjax.step import ObjectiveConfig

MODEL = ModelConfig(embed_dim=8, stack=(Segment(pattern=(BlockConfig(mixer=AttentionConfig(num_heads=2), ffn=None),)),))


def experiment(*, steps: int, distill: DistillConfig | None = None, **optim) -> Experiment:
    settings = OptimConfig(**{"lr": 1e-3, "warmup_steps": 0, **optim})
    return Experiment(model=MODEL, optim=settings, objective=ObjectiveConfig(distill=distill), run=RunConfig(steps=steps))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # A run of 100 steps has come to a tenth of its peak: of 200, it is half way, at 0.1 + 0.9 / 2.
        ({}, {}, "is 0.00055 with run.steps=200 instead of 100, and 0.0001 with those the run had (5.5 times)"),
        ({"schedule": Schedule.LINEAR, "min_lr_ratio": 0.0}, {}, "is 0.0005 with run.steps=200 instead of 100, and 0 with those"),
        ({"schedule": Schedule.WSD}, {}, "is 0.001 with run.steps=200 instead of 100, and 0.0001 with those the run had (10 times)"),
        ({"schedule": Schedule.CONSTANT}, {}, None),
        ({"schedule": Schedule.CONSTANT}, {"lr": 3e-3}, "is 0.003 with run.steps=200 instead of 100, and 0.001 with those the run had (3"),
        ({"schedule": Schedule.CONSTANT}, {"warmup_steps": 150}, "and 0.001 with those the run had (0.669 times)"),
    ],
)  # fmt: skip
def test_a_finished_run_that_is_extended(before: dict, after: dict, expected: str | None) -> None:
    found = list(schedule_changes(experiment(steps=100, **before), experiment(steps=200, **{**before, **after}), step=100))
    if expected is None:
        assert not found
        return
    (text,) = found
    assert text.startswith("optim.lr at step 101, the next one, is") and expected in text and "optim.schedule=constant" in text


def test_what_else_follows_the_steps_of_a_run() -> None:
    distill = DistillConfig(teachers=(TeacherConfig(path="runs/a"),), weight=Ramp(start=1.0, end=0.2), hard_weight=Ramp(start=0.5))
    first = experiment(steps=100, distill=distill, kind=Optimizer.MUON, schedule=Schedule.CONSTANT)
    second = dataclasses.replace(first, run=RunConfig(steps=200), optim=dataclasses.replace(first.optim, muon_lr=0.01))
    muon, weight = schedule_changes(first, second, step=100)
    assert muon.startswith("optim.muon_lr at step 101, the next one, is 0.01 with") and "(0.5 times)" in muon
    assert weight.startswith("objective.distill.weight at step 101, the next one, is 0.6 with") and "(3 times)" in weight
    # In the stable part of wsd more steps change nothing, nor does going on as before.
    stable = experiment(steps=100, schedule=Schedule.WSD)
    assert not list(schedule_changes(stable, dataclasses.replace(stable, run=RunConfig(steps=200)), step=70))
    assert not list(schedule_changes(first, first, step=50))


def test_a_resumed_run_warns_once_with_the_settings_that_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, run = experiment(steps=100), RunDirectory(tmp_path)
    second = experiment(steps=200, weight_decay=0.0)
    warn_of_changed_schedules(run, second, step=100)
    assert not caplog.records, "a new run has no settings of before"
    run.write_json("config.json", config.to_json(first))
    with caplog.at_level(logging.WARNING):
        warn_of_changed_schedules(run, second, step=100)
    assert [record.message.partition(" ")[0] for record in caplog.records] == ["optim.lr", str(tmp_path)]
    assert "other settings of its optimizer: optim.weight_decay=0.0 instead of 0.1" in caplog.text
    caplog.clear()
    warn_of_changed_schedules(run, first, step=50)
    assert not caplog.records
