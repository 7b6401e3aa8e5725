"""Telemetry of a training run: trackers, and the time spent waiting for data."""

import dataclasses
import io
import math
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import slmjax
from slmjax.data.batch import Batch
from slmjax.data.pipeline import BatchSource
from slmjax.telemetry.run_directory import read_log
from slmjax.telemetry.trackers import Tracker
from tests.one_layer import one_layer


def trained_with(
    workplace: Path,
    directory: Path,
    *,
    steps: int,
    evaluate_every: int,
    data: dict | None = None,
    run: dict | None = None,
) -> slmjax.Result:
    """What the tiny experiment with one layer, which compiles in a moment, comes to."""
    found = one_layer(workplace, directory, steps=steps)
    experiment = dataclasses.replace(
        found,
        data=dataclasses.replace(found.data, **data or {}),
        eval=dataclasses.replace(found.eval, every=evaluate_every, max_documents=1),
        run=dataclasses.replace(found.run, **run or {}),
    )
    return slmjax.train(experiment, console=Console(file=io.StringIO(), width=200))


def scalars(directory: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> value, of TensorBoard's event files."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in directory.iterdir():
        content = path.read_bytes()
        place = 0
        while place < len(
            content
        ):  # a record: its length (8 bytes), a checksum (4), the event, a checksum (4)
            length = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + length])
            numbers = [value for value in event.summary.value if value.WhichOneof("value") == "simple_value"]
            found |= {(event.step, value.tag): value.simple_value for value in numbers}
            place += 16 + length
    return found


def logged_numbers(run_dir: Path) -> dict[tuple[int, str], float]:
    """The same of log.jsonl, which keeps what is not finite as text."""
    numbers = {}
    for record in read_log(run_dir / "log.jsonl"):
        kind = record.pop("kind")
        if kind == "session":  # of the log alone
            continue
        step = record.pop("step", None)
        flat = {name: value for name, value in record.items() if name != "time"} | {
            f"{name}/{part}": value
            for name, parts in record.items()
            if isinstance(parts, dict)
            for part, value in parts.items()
        }
        numbers |= {
            (step, f"{kind}/{name}"): float(value)
            for name, value in flat.items()
            if isinstance(value, int | float)
        }
    return numbers


def test_trackers_are_told_what_is_logged(workplace: Path, tmp_path: Path) -> None:
    result = trained_with(
        workplace, tmp_path, steps=5, evaluate_every=2, run={"trackers": (Tracker.TENSORBOARD,)}
    )
    found = {
        key: value
        for key, value in scalars(Path(result.run_dir) / "tensorboard").items()
        if math.isfinite(value)
    }
    assert [step for step, name in found if name == "train/loss"] == [1, 2, 3, 4, 5]
    assert [step for step, name in found if name == "eval/loss"] == [2, 4, 5]
    assert (5, "train/grad_norms/layers/0") in found and found[5, "result/loss"] == np.float32(result.loss)
    expected = {key: np.float32(value) for key, value in logged_numbers(Path(result.run_dir)).items()}
    assert found == expected


def test_waiting_for_data_is_counted(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a batch takes a third of a second and a step a few milliseconds, nearly all of the time is spent
    waiting.
    """
    made = BatchSource.batch

    def slowly(source: BatchSource, step: int) -> Batch:
        time.sleep(0.3)
        return made(source, step)

    monkeypatch.setattr(BatchSource, "batch", slowly)
    result = trained_with(
        workplace, tmp_path, steps=8, evaluate_every=100, data={"read_threads": 1, "prefetch": 1}
    )
    shares = [
        record["data_wait_share"] for record in read_log(Path(result.run_dir) / "log.jsonl", kind="train")
    ]
    # The first step is not counted, and while it compiles batches are made for those that follow at once.
    assert len(shares) == 8 and shares[0] < 0.5 < np.median(shares[3:]) <= 1, shares
    assert 0.5 < result.session_data_wait_share <= 1
