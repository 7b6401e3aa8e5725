"""Runs that are trained in one program: each is what it is alone, and none disturbs another."""

import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import slmjax
from slmjax import faults
from slmjax.checkpoints.loading import load_model
from slmjax.checkpoints.run_checkpoints import CheckpointConfig
from slmjax.data.config import DataConfig, Split
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.distill.config import DistillConfig, Ramp, TeacherConfig
from slmjax.formats.presets import preset
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.parameterization import Parameterization
from slmjax.parallel.mesh import MeshConfig
from slmjax.quantization.estimators import LearnedScale
from slmjax.quantization.rules import QuantConfig, QuantPhase, QuantRule
from slmjax.runner import population_pace
from slmjax.runner.population import Pace, population_pays, share_a_program, train_population
from slmjax.telemetry.run_directory import read_log
from slmjax.training.experiment import EvalConfig, Experiment, RunConfig
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.optim import OptimConfig, Schedule

QUIET = Console(quiet=True)
BLOCK = BlockConfig(mixer=AttentionConfig(num_heads=2), ffn=MlpConfig(hidden_dim=16))
STEPS = 9
DIVERGES = 3e38  # a rate whose first updates are beyond float32


def member(directory: Path, text: Path, *, seed: int, lr: float) -> Experiment:
    return Experiment(
        model=ModelConfig(
            embed_dim=16,
            context_length=16,
            stack=(LayerGroup(pattern=(BLOCK,)),),
            parameterization=Parameterization.MUP,
            base_width=8,
        ),
        data=DataConfig(
            path=str(text),
            split=Split.TAIL,
            heldout_fraction=0.02,
            sequence_length=16,
            batch_size=8,
            seed=seed,
        ),
        tokenizer=ByteTokenizer(),
        # This eps keeps differences of rounding from growing where a gradient is tiny.
        optim=OptimConfig(lr=lr, warmup_steps=2, eps=1e-4, max_consecutive_skips=3),
        eval=EvalConfig(every=6, max_documents=None, sample=False),
        checkpoint=CheckpointConfig(every=4),
        mesh=MeshConfig(data=8),
        run=RunConfig(
            name="member",
            steps=STEPS,
            log_every=1,
            seed=seed,
            sample_prompts=(),
            directory=str(directory / f"seed-{seed}"),
        ),
    )


def members(directory: Path, text: Path) -> list[Experiment]:
    return [member(directory, text, seed=seed, lr=lr) for seed, lr in enumerate((1e-2, 2e-2, DIVERGES, 5e-3))]


@pytest.fixture(scope="module")
def together(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> list[slmjax.Result]:
    directory = tmp_path_factory.mktemp("together")
    return train_population(members(directory, workplace / "text.txt"), console=QUIET)


def records(result: slmjax.Result, kind: str) -> list[dict[str, Any]]:
    return read_log(Path(result.run_dir) / "log.jsonl", kind=kind)


@pytest.mark.composes("mesh", "studies")
def test_a_member_is_what_it_is_alone(together, workplace, tmp_path):
    """The same rows, exactly; loss and parameters to one part in 10,000, as between meshes: sums are added up
    in another order.
    """
    alone = slmjax.train(members(tmp_path, workplace / "text.txt")[1], console=QUIET)
    ours = together[1]
    names = {path.name for path in Path(alone.run_dir).iterdir()}
    assert {path.name for path in Path(ours.run_dir).iterdir()} == names >= {"log.jsonl", "tokenizer"}
    rows = [[line["data_checksum"] for line in records(run, "train")] for run in (ours, alone)]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS
    for name in ("loss", "grad_norm", "learning_rate"):
        values = [[line[name] for line in records(run, "train")] for run in (ours, alone)]
        np.testing.assert_allclose(*values, rtol=1e-4, err_msg=name)
    evaluated = [[(line["step"], line["loss"]) for line in records(run, "eval")] for run in (ours, alone)]
    np.testing.assert_allclose(*evaluated, rtol=1e-4)
    loaded = [load_model(run.run_dir).params for run in (ours, alone)]
    for path, leaf in loaded[1].items():
        np.testing.assert_allclose(loaded[0][path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)
    same = ("status", "step", "skipped", "run_tokens", "parameters", "measured_on", "best_step")
    assert {name: getattr(ours, name) for name in same} == {name: getattr(alone, name) for name in same}
    assert (ours.population, alone.population) == (4, 1)


def test_a_member_that_diverges_disturbs_no_other(together):
    assert [result.status for result in together] == ["finished", "finished", "diverged", "finished"]
    diverged = together[2]
    assert diverged.step < STEPS and records(diverged, "train")[-1]["step"] == diverged.step
    assert json.loads((Path(diverged.run_dir) / "result.json").read_text())["status"] == "diverged"
    assert [result.skipped for result in together if result is not diverged] == [0, 0, 0]
    # Warnings are those of the member alone.
    warned = [any("skipped" in line["text"] for line in records(result, "message")) for result in together]
    assert warned == [False, False, True, False]


def test_members_may_differ_in_numbers_seeds_and_names(tmp_path):
    base = member(tmp_path, tmp_path / "text.txt", seed=0, lr=1e-3)

    def shares(**changes: Any) -> bool:
        return share_a_program(base, dataclasses.replace(base, **changes))

    def optim(**changes: Any) -> OptimConfig:
        return dataclasses.replace(base.optim, **changes)

    assert share_a_program(base, member(tmp_path / "b", tmp_path / "text.txt", seed=1, lr=2e-3))
    assert shares(optim=optim(betas=(0.8, 0.9), weight_decay=0.0, schedule=Schedule.WSD, warmup_steps=0.5))
    assert shares(objective=ObjectiveConfig(z_loss=1e-4))
    assert not shares(optim=optim(grad_clip=None)) and not shares(optim=optim(ema_decay=0.9))
    assert not shares(optim=optim(accumulation_steps=2))
    assert not shares(model=dataclasses.replace(base.model, embed_dim=32))
    assert not shares(run=dataclasses.replace(base.run, steps=10))
    wider = dataclasses.replace(base, model=dataclasses.replace(base.model, embed_dim=32))
    with pytest.raises(ValueError, match=r"members 0 and 1 .* differ in model.embed_dim"):
        train_population([base, wider], console=QUIET)
    with pytest.raises(ValueError, match="0 experiments and 0 runs"):
        train_population([], console=QUIET)


# Interrupted, in phases, taught -----------------------------------------------------------------------------
def states(result: slmjax.Result) -> dict[str, Any]:
    return load_model(result.run_dir).params


def assert_same_bits(found: slmjax.Result, wanted: slmjax.Result) -> None:
    for path, leaf in states(wanted).items():
        np.testing.assert_array_equal(states(found)[path], leaf, err_msg=path)
    assert (found.loss, found.step, found.run_tokens) == (wanted.loss, wanted.step, wanted.run_tokens)
    checksums = [
        {line["step"]: line["data_checksum"] for line in records(run, "train")} for run in (found, wanted)
    ]
    assert checksums[0] == checksums[1]


@pytest.mark.nightly
@pytest.mark.composes("resume", "studies")
def test_an_interrupted_population_resumes_bit_for_bit(workplace, tmp_path, monkeypatch):
    """Also members that resume at different steps; and one that is resumed alone ends as it does in the
    population, up to rounding.
    """

    def stop(point: str, step: int = -1) -> None:
        if (point, step) == ("step", 5):
            signal.raise_signal(signal.SIGTERM)

    whole = train_population(members(tmp_path / "whole", workplace / "text.txt")[:2], console=QUIET)
    experiments = members(tmp_path, workplace / "text.txt")[:2]
    with monkeypatch.context() as patched:
        patched.setattr(faults, "at", stop)
        stopped = train_population(experiments, console=QUIET)
    assert [(result.status, result.step) for result in stopped] == [("interrupted", 5)] * 2
    runs = [Path(result.run_dir) for result in stopped]
    alone = tmp_path / "alone"
    shutil.copytree(runs[0], alone)
    # As if the process had been killed before the last save of one of them was complete.
    shutil.rmtree(runs[1] / "checkpoints" / "5")
    resumed = train_population(experiments, resume=runs, console=QUIET)
    assert [Path(result.run_dir) for result in resumed] == runs
    for result, wanted in zip(resumed, whole, strict=True):
        assert_same_bits(result, wanted)
    result = slmjax.train(experiments[0], resume=alone, console=QUIET)
    np.testing.assert_allclose(result.loss, whole[0].loss, rtol=1e-4)


def assert_close(found: slmjax.Result, wanted: slmjax.Result) -> None:
    for name in ("loss", "grad_norm"):
        values = [[line[name] for line in records(run, "train")] for run in (found, wanted)]
        np.testing.assert_allclose(*values, rtol=1e-3, err_msg=name)
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-3)
    assert (found.status, found.step, found.run_tokens) == (wanted.status, wanted.step, wanted.run_tokens)


@pytest.mark.nightly
@pytest.mark.composes("quantization", "accumulation", "studies")
def test_members_pass_through_phases_of_quantization_together(workplace, tmp_path):
    """With averages, learned scales and microbatches; rounding to codes amplifies differences of rounding."""
    phases = (
        QuantPhase(rules=(QuantRule(paths=".", weight=preset("q8_0")),)),
        QuantPhase(
            step=2,
            rules=(QuantRule(paths=".", weight=preset("q4_0"), estimator=LearnedScale()),),
            restart_optimizer=True,
        ),
    )

    wide = dataclasses.replace(BLOCK, ffn=MlpConfig(hidden_dim=32))

    def experiments(directory: Path) -> list[Experiment]:
        return [
            dataclasses.replace(
                base,
                model=dataclasses.replace(base.model, embed_dim=32, stack=(LayerGroup(pattern=(wide,)),)),
                quant=QuantConfig(phases=phases, start_step=3),
                data=dataclasses.replace(base.data, batch_size=16),
                optim=dataclasses.replace(
                    base.optim, ema_decay=0.5 + 0.1 * number, scale_lr=1e-2, accumulation_steps=2
                ),
                run=dataclasses.replace(base.run, log_flips=True),
            )
            for number, base in enumerate(members(directory, workplace / "text.txt")[:2])
        ]

    found = train_population(experiments(tmp_path / "together"), console=QUIET)
    alone = slmjax.train(experiments(tmp_path / "alone")[1], console=QUIET)
    assert_close(found[1], alone)
    flips = [
        [line["flipped_since"] for line in records(run, "train") if "flipped_since" in line]
        for run in (found[1], alone)
    ]
    assert flips[0] == flips[1] != []


@pytest.mark.nightly
@pytest.mark.composes("distillation", "mesh", "studies")
def test_members_share_a_teacher(together, workplace, tmp_path):
    teachers = (TeacherConfig(path=together[3].run_dir),)
    distill = DistillConfig(teachers=teachers, hard_weight=Ramp(start=0.5))

    def experiments(directory: Path) -> list[Experiment]:
        return [
            dataclasses.replace(experiment, objective=ObjectiveConfig(distill=distill, z_loss=z_loss))
            for experiment, z_loss in zip(
                members(directory, workplace / "text.txt")[:2], (0.0, 1e-3), strict=True
            )
        ]

    found = train_population(experiments(tmp_path / "together"), console=QUIET)
    for result, experiment in zip(found, experiments(tmp_path / "alone"), strict=True):
        alone = slmjax.train(experiment, console=QUIET)
        assert_close(result, alone)
        divergences = [[line["divergence"] for line in records(run, "train")] for run in (result, alone)]
        np.testing.assert_allclose(*divergences, rtol=1e-3)


# Whether it pays --------------------------------------------------------------------------------------------
@pytest.mark.nightly
def test_a_few_steps_are_measured_both_ways(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(population_pace, "MEASURED_SECONDS", 0.02)
    experiments = members(tmp_path, workplace / "text.txt")[:2]
    pace = population_pays(experiments)
    assert 0 < pace.seconds_in_turn < math.inf and 0 < pace.seconds_together < math.inf and not pace.note
    assert not list(tmp_path.iterdir())  # no run directory
    assert population_pays(experiments[::-1]) is pace
    monkeypatch.setattr(population_pace, "_available_bytes", lambda: 1000)
    pace = population_pays(members(tmp_path, workplace / "text.txt")[:3])
    assert not pace.pays and "of memory, and the device has" in pace.text()


def test_the_pace_in_words():
    slower = Pace(num_members=8, seconds_in_turn=1.0, seconds_together=1.25)
    assert not slower.pays and slower.text() == (
        "8 members are trained in turn: one program for all of them has 0.80 times the tokens per second of "
        "one after another"
    )
    assert Pace(num_members=8, seconds_in_turn=3.0, seconds_together=1.0).pays
    assert not Pace(num_members=8, seconds_in_turn=3.0, note="no memory").pays
