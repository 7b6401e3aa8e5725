"""Sessions of a run: what each changed, which of its steps count, and the files that a later one replaces."""

import dataclasses
import json
import time
from pathlib import Path

import pytest

from slmjax import config
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.runner.session_record import begin_session, run_seconds
from slmjax.stored_json import DamagedFile
from slmjax.telemetry.recorded_environment import environment
from slmjax.telemetry.run_directory import RunDirectory, sessions, sessions_of
from slmjax.training.experiment import Experiment, RunConfig
from slmjax.training.optim import OptimConfig
from slmjax.training.recipes import MODULES

MODEL = ModelConfig(
    embed_dim=8, stack=(LayerGroup(pattern=(BlockConfig(mixer=AttentionConfig(num_heads=2), ffn=None),)),)
)
FIRST = Experiment(model=MODEL, optim=OptimConfig(lr=3e-4), run=RunConfig(steps=200))


def begin(run: RunDirectory, experiment: Experiment, *, step: int, code: Path | None = None) -> None:
    """Begin a session as a run does: its record, then its files."""
    with run.open_log() as log:
        is_resumed = (run.path / "config.json").is_file()
        begin_session(run, log, experiment, step=step, seconds=1.5, code=code, is_resumed=is_resumed)
        run.write_json("config.json", config.to_json(experiment))
        run.write_json("environment.json", environment())
        log.write("train", step=step + 1, loss=1.0)


def test_a_later_session_keeps_the_settings_of_those_before(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    begin(run, FIRST, step=0)
    (tmp_path / "experiment.py").write_text("first")
    (tmp_path / MODULES).mkdir()
    (tmp_path / MODULES / "parts.py").write_text("parts of the first")
    (tmp_path / "elsewhere").mkdir()
    second = dataclasses.replace(FIRST, optim=OptimConfig(lr=1e-3))
    begin(run, second, step=50, code=tmp_path / "elsewhere" / "code.py")
    third = dataclasses.replace(second, run=RunConfig(steps=400))
    begin(run, third, step=200, code=tmp_path / "experiment.py")

    changes = [session.changes for session in sessions(tmp_path)]
    assert changes == [{}, {"optim.lr": (3e-4, 1e-3)}, {"run.steps": (200, 400)}]
    steps = [(session.number, session.first_step, session.last_step) for session in sessions(tmp_path)]
    assert steps == [(1, 1, 50), (2, 51, 200), (3, 201, 201)]
    names = ("config-1.json", "config-2.json", "config.json")
    kept = [config.loads(Experiment, (tmp_path / name).read_text()) for name in names]
    assert kept == [FIRST, second, third]
    assert json.loads((tmp_path / "environment-1.json").read_text())["packages"]["jax"]
    assert (tmp_path / "experiment-1.py").read_text() == "first"
    assert (tmp_path / f"{MODULES}-1" / "parts.py").read_text() == "parts of the first"
    assert not (tmp_path / "experiment-2.py").exists(), "the run's own copy replaces nothing"


def test_an_environment_that_changed_is_recorded(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    begin(run, FIRST, step=0)
    before = environment()
    run.write_json("environment.json", {**before, "packages": {**before["packages"], "jax": "0.1"}})
    begin(run, FIRST, step=2)
    assert sessions(tmp_path)[1].environment == {"packages.jax": ("0.1", before["packages"]["jax"])}
    (tmp_path / "environment.json").write_text("{")
    begin(run, FIRST, step=3)
    assert sessions(tmp_path)[2].environment == {}, "it is information: a damaged file ends no run"


def test_a_log_that_lost_the_records_does_not_reuse_a_number(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    begin(run, FIRST, step=0)
    begin(run, FIRST, step=2)
    (tmp_path / "log.jsonl").unlink()
    begin(run, FIRST, step=3)
    assert [session.number for session in sessions(tmp_path)] == [3]
    assert sorted(path.name for path in tmp_path.glob("config-*")) == ["config-1.json", "config-2.json"]


def test_steps_that_a_later_session_repeats_count_for_it(tmp_path: Path) -> None:
    def session(number: int, first_step: int, time: float) -> dict:
        fields = {"kind": "session", "seconds": 2.0, "changes": {}, "environment": {}}
        return {**fields, "number": number, "first_step": first_step, "time": time}

    records = [
        session(1, 1, 100.0),
        {"kind": "train", "time": 110.0, "step": 140},  # killed after a checkpoint of step 100
        {"kind": "message", "time": 500.0},  # of the setup of the next session
        session(2, 101, 502.0),
        {"kind": "train", "time": 512.0, "step": 130},
        session(3, 51, 600.0),  # the checkpoint of step 100 was damaged
        {"kind": "train", "time": 604.0, "step": 120},
    ]
    result = [
        (item.first_step, item.last_step, item.num_steps, item.seconds) for item in sessions_of(records)
    ]
    assert result == [(1, 50, 50, 12.0), (101, 50, 0, 12.0), (51, 120, 70, 6.0)]


def test_the_time_of_a_run_is_that_of_all_its_sessions(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    begin(run, FIRST, step=0)
    begin(run, FIRST, step=1)
    first = sessions(tmp_path)[0]
    assert run_seconds(run, 7.0, first_step=2) == first.seconds + 7.0
    assert run_seconds(run, 7.0, first_step=5) is None, "the record of the present session is not there"
    lines = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(lines[2:]))
    assert run_seconds(run, 7.0, first_step=2) is None, "the first session is not there"


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    record = {"kind": "session", "time": time.time(), "number": 1, "first_step": 1, "seconds": 0.5}
    for broken in ({}, {"changes": []}, {"changes": {"optim.lr": 3}, "environment": {}}):
        (tmp_path / "log.jsonl").write_text(json.dumps({**record, **broken}) + "\n")
        with pytest.raises(DamagedFile, match="a record of a session.*remove the line"):
            sessions(tmp_path)
