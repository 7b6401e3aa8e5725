"""Rates that jump when a run resumes with other settings are logged before they do."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from slmjax import config
from slmjax.distill.config import DistillConfig, Ramp, TeacherConfig
from slmjax.formats.presets import preset
from slmjax.losses import Taid
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.quantization.rules import QuantConfig, QuantPhase, QuantRule
from slmjax.runner.changed_schedules import schedule_changes, warn_of_changed_schedules
from slmjax.telemetry.run_directory import RunDirectory
from slmjax.training.experiment import Experiment, RunConfig
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.optim import OptimConfig, Optimizer, Schedule

MODEL = ModelConfig(
    embed_dim=8, stack=(LayerGroup(pattern=(BlockConfig(mixer=AttentionConfig(num_heads=2), ffn=None),)),)
)


def experiment(
    *, steps: int, distill: DistillConfig | None = None, quant: QuantConfig | None = None, **optim
) -> Experiment:
    settings = OptimConfig(**{"lr": 1e-3, "warmup_steps": 0, **optim})
    return Experiment(
        model=MODEL,
        optim=settings,
        objective=ObjectiveConfig(distill=distill),
        run=RunConfig(steps=steps),
        quant=quant,
    )


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # A run of 100 steps has come to a tenth of its peak: of 200, it is half way, at 0.1 + 0.9 / 2.
        (
            {},
            {},
            "is 0.00055 with run.steps=200 instead of 100, and 0.0001 with those the run had (5.5 times)",
        ),
        (
            {"schedule": Schedule.LINEAR, "min_lr_ratio": 0.0},
            {},
            "is 0.0005 with run.steps=200 instead of 100, and 0 with those",
        ),
        (
            {"schedule": Schedule.WSD},
            {},
            "is 0.001 with run.steps=200 instead of 100, and 0.0001 with those the run had (10 times)",
        ),
        ({"schedule": Schedule.CONSTANT}, {}, None),
        (
            {"schedule": Schedule.CONSTANT},
            {"lr": 3e-3},
            "is 0.003 with run.steps=200 instead of 100, and 0.001 with those the run had (3",
        ),
        (
            {"schedule": Schedule.CONSTANT},
            {"warmup_steps": 150},
            "and 0.001 with those the run had (0.669 times)",
        ),
    ],
)
def test_a_finished_run_that_is_extended(before: dict, after: dict, expected: str | None) -> None:
    found = list(
        schedule_changes(
            experiment(steps=100, **before), experiment(steps=200, **{**before, **after}), step=100
        )
    )
    if expected is None:
        assert not found
        return
    (text,) = found
    assert (
        text.startswith("optim.lr at step 101, the next one, is")
        and expected in text
        and "optim.schedule=constant" in text
    )


def test_what_else_follows_the_steps_of_a_run() -> None:
    distill = DistillConfig(
        teachers=(TeacherConfig(path="runs/a"),), weight=Ramp(start=1.0, end=0.2), hard_weight=Ramp(start=0.5)
    )
    first = experiment(steps=100, distill=distill, kind=Optimizer.MUON, schedule=Schedule.CONSTANT)
    second = dataclasses.replace(
        first, run=RunConfig(steps=200), optim=dataclasses.replace(first.optim, muon_lr=0.01)
    )
    muon, weight = schedule_changes(first, second, step=100)
    assert muon.startswith("optim.muon_lr at step 101, the next one, is 0.01 with") and "(0.5 times)" in muon
    assert (
        weight.startswith("objective.distill.weight at step 101, the next one, is 0.6 with")
        and "(3 times)" in weight
    )
    # In the stable part of wsd more steps change nothing, nor does going on as before.
    stable = experiment(steps=100, schedule=Schedule.WSD)
    assert not list(schedule_changes(stable, dataclasses.replace(stable, run=RunConfig(steps=200)), step=70))
    assert not list(schedule_changes(first, first, step=50))


def test_the_line_of_taid_follows_the_steps_of_a_run() -> None:
    taid = DistillConfig(teachers=(TeacherConfig(path="runs/a"),), divergence=Taid(start=0.4, end=1.0))
    first = experiment(steps=100, distill=taid, schedule=Schedule.CONSTANT)
    (text,) = schedule_changes(first, dataclasses.replace(first, run=RunConfig(steps=200)), step=100)
    assert text.startswith(
        "the least weight of the teacher in TAID (objective.distill.divergence) at step 101, the next one, "
        "is 0.7 with"
    )
    assert "and 1 with those the run had (0.7 times)" in text and "The weight itself never falls" in text
    # After half of the steps the line has come half of its way: 0.4 + 0.6 / 2 of 100 steps, 0.4 + 0.6 / 4 of
    # 200.
    (text,) = schedule_changes(dataclasses.replace(first, run=RunConfig(steps=200)), first, step=50)
    assert "is 0.7 with run.steps=100 instead of 200, and 0.55 with those the run had" in text


ZERO_FROM_ONE = ".* at step 91, the next one, is 0 with .* and 1 with"


@pytest.mark.parametrize(
    ("quant", "step", "expected"),
    [
        # Of 100 steps wsd decays over the last 20, of 200 over the last 40: quantization ends, and with it
        # the error.
        (
            {"start_step": None},
            90,
            [
                f"the quantization phase {ZERO_FROM_ONE}",
                f"the fraction of the rounding error {ZERO_FROM_ONE}",
            ],
        ),
        # The ramp of 19 steps begins at step 80 and at step 160: at 90 it is 11 / 20 of the error.
        (
            {"start_step": None, "warmup_steps": 19},
            90,
            ["the quantization phase", "the fraction of the rounding error .* is 0 with .* and 0.55 with"],
        ),
        ({"start_step": 10, "warmup_steps": 19}, 90, []),
        # The only layer stops in the last 20 steps, and moves again.
        ({"freeze_steps": 20}, 90, [f"the number of frozen layers {ZERO_FROM_ONE}"]),
        ({"freeze_steps": 20}, 70, []),
    ],
)
def test_the_quantization_schedule_follows_the_steps_of_a_run(
    quant: dict[str, Any], step: int, expected: list[str]
) -> None:
    config = QuantConfig(phases=(QuantPhase(rules=(QuantRule(paths=".*", weight=preset("q4_0")),)),), **quant)
    first = experiment(steps=100, quant=config, schedule=Schedule.WSD, decay_fraction=0.2)
    found = schedule_changes(first, dataclasses.replace(first, run=RunConfig(steps=200)), step=step)
    texts = [text for text in found if not text.startswith("optim.lr")]
    assert len(texts) == len(expected), texts
    assert all(re.search(pattern, text) for pattern, text in zip(expected, texts, strict=True)), texts


def test_a_resumed_run_warns_once_with_the_settings_that_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = experiment(steps=100)
    run = RunDirectory(tmp_path)
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
