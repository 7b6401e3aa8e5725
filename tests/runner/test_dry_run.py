"""`slmjax train --dry-run`: the numbers of the run that it describes, and nothing is written."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from slmjax.cli import main
from slmjax.models import zoo
from slmjax.planning.memory import StepMemory
from slmjax.runner.dry_run import Plan
from tests.tiny import experiment

PARAMETERS = 60_032  # counted by hand from the shapes of tiny.py's layers, as the banner of its run shows


def test_a_dry_run(workplace: Path, run_command: Callable[..., CompletedProcess[str]]) -> None:
    before = sorted(workplace.rglob("*"))
    options = ("--dry-run", "--json", "--optim.warmup-steps", "99", "--epochs", "0.4")
    done = run_command("train", "tiny.py", *options, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "optim.warmup_steps is 99" in done.stderr and "shortened to 5" in done.stderr
    assert sorted(workplace.rglob("*")) == before, "something was written"
    plan = json.loads(done.stdout)
    # Nine tenths of 60,000 bytes, as bytes, in rows of 48: 0.4 epochs are 56.3 steps of 8.
    steps = 57
    assert (plan["parameters"], plan["steps"], plan["devices"]) == (PARAMETERS, steps, 1)
    assert plan["rows"] == pytest.approx(54_000 / 48, rel=0.01)
    assert plan["epochs"] == pytest.approx(steps * 8 / plan["rows"]) and 0.4 <= plan["epochs"] < 0.41
    assert 0.98 * steps * 8 * 48 < plan["tokens"] <= steps * 8 * 48
    # Two moments of AdamW and one average, in float32 as the parameters; the bias of the routers is a buffer.
    memory = plan["memory"]
    assert memory["average"] == 4 * PARAMETERS
    assert memory["optimizer"] == pytest.approx(8 * PARAMETERS, abs=2000)
    assert memory["parameters"] == pytest.approx(4 * PARAMETERS, abs=200) and memory["temporary"] > 1e6
    model = dataclasses.replace(experiment().model, vocab_size=258, context_length=48)
    assert plan["flops"] == pytest.approx(zoo.describe(model).training_flops_per_token * steps * 8 * 48)
    first, second = plan["step_seconds"]
    assert plan["seconds"] == pytest.approx(steps * (first + second) / 2)
    assert (plan["evaluations"], plan["checkpoints"]) == (2, 6)
    assert Path(plan["directory"]).name.startswith("tiny-DATE-TIME-")


def test_a_plan_is_shown_in_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = StepMemory(parameters=10**9, optimizer=2 * 10**9, average=0, temporary=5 * 10**8)
    plan = Plan(
        parameters=250_000_000,
        devices=8,
        device_kind="TPU v5 lite",
        memory=memory,
        device_memory=16 * 10**9,
        rows=1000,
        sequence_length=2048,
        steps=500,
        batch_size=64,
        epochs=32.0,
        tokens=65_000_000,
        flops=9.8e16,
        step_seconds=(0.5, 0.7),
        seconds=300.0,
        mfu=0.41,
        evaluations=1,
        checkpoints=2,
        checkpoint_bytes=3 * 10**9,
        directory="/data/runs/x-DATE-TIME-abcdef",
        cache="/data/cache",
    )
    monkeypatch.setenv("COLUMNS", "80")
    lines = plan.text().splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 16
    text = " ".join(plan.text().split())
    parts = ("250,000,000", "3.50 GB", "of 16.0 GB", "65,000,000 tokens", "32.00 epochs", "9.8e+16 FLOPs")
    more = ("about 5m00s, at 0.6 s a step (measured: 0.5 s, 0.7 s, 41% of the", "writes to /data/runs/x-DATE")
    assert not [part for part in (*parts, *more) if part not in text], text


def test_a_dry_run_is_of_a_new_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from slmjax.config import dumps

    (tmp_path / "config.json").write_text(dumps(experiment()))
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--resume", str(tmp_path), "--dry-run"])
    assert stopped.value.code == 2 and "--dry-run describes a new run" in capsys.readouterr().err
