"""slmjax.telemetry.trackers, with the real packages: what they wrote is read back."""

import contextlib
import json
import logging
import shutil
import sqlite3
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from slmjax.telemetry.trackers import Tracker, Trackers

RECORD = {
    "loss": 3.5,
    "mfu": None,
    "complete": True,
    "grad_norms": {"embed": 0.5, "layers/0": 0.25},
    "expert_loads": {"layers/0": [0.75, 0.25]},
}


def opened(directory: Path, *expected: Tracker) -> Trackers:
    return Trackers(expected, directory=directory, name="run-1", config={"model": {"embed_dim": 8}})


def test_tensorboard_keeps_numbers_and_texts(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  # the package is there

    for step in (10, 20):  # the second time as a resumed run does
        with opened(tmp_path, Tracker.TENSORBOARD) as trackers:
            trackers.write("train", step=step, **RECORD)
            trackers.write("sample", step=step, prompt="a", text="abc")
    result = {}
    for path in (tmp_path / "tensorboard").iterdir():
        content = path.read_bytes()
        place = 0
        while place < len(
            content
        ):  # a record: its length (8 bytes), a checksum (4), the event, a checksum (4)
            length = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + length])
            result |= {(event.step, value.tag): value for value in event.summary.value}
            place += 16 + length
    numbers = {key: value.simple_value for key, value in result.items() if key[1].startswith("train/")}
    for step in (10, 20):
        assert numbers[step, "train/loss"] == 3.5 and numbers[step, "train/grad_norms/layers/0"] == 0.25
        assert numbers[step, "train/expert_loads/layers/0/1"] == 0.25 and (step, "train/mfu") not in numbers
        assert any(at == step and tag.startswith("sample/text") for at, tag in result)


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    with opened(tmp_path, Tracker.WANDB) as trackers:
        trackers.write("train", step=10, **RECORD)
        trackers.write("sample", step=10, prompt="a", text="abc")
    [remaining] = (tmp_path / "wandb").glob("offline-run-*/run-run-1.wandb")
    # Written by a process of its own, which may be behind on a busy machine.
    deadline = time.monotonic() + 60
    while b"train/grad_norms/layers/0" not in remaining.read_bytes():
        assert time.monotonic() < deadline, remaining.read_bytes()
        time.sleep(0.1)


def test_trackio_keeps_numbers_and_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Read once, when the package is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    for step in (10, 20):  # the second time as a resumed run does
        with Trackers(
            [Tracker.TRACKIO], directory=tmp_path, name="run-1", group="depth", config={}
        ) as trackers:
            trackers.write("train", step=step, **RECORD)
            trackers.write("sample", step=step, text="abc")
    with contextlib.closing(sqlite3.connect(tmp_path / "slmjax.db")) as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
        [(settings,)] = database.execute("select config from configs").fetchall()
    assert {(name, step) for name, step, _ in rows} == {("run-1", 10), ("run-1", 20)}
    assert json.loads(settings)["_Group"] == "depth"
    values = [json.loads(metrics) for *_, metrics in rows]
    assert {"train/loss": 3.5, "train/grad_norms/layers/0": 0.25}.items() <= values[0].items()
    assert {"sample/text": "abc"} in values


def test_a_tracker_that_fails_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorboardX

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tensorboardX.SummaryWriter, "add_scalar", full)
    with caplog.at_level(logging.WARNING), opened(tmp_path, Tracker.TENSORBOARD) as trackers:
        for step in (10, 20):
            trackers.write("train", step=step, loss=1.0)
    [record] = caplog.records
    assert "tensorboard failed" in record.getMessage() and "no space left" in record.getMessage()


def test_a_missing_package_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"has tensorboard.*slmjax\[track\]"):
        opened(tmp_path, Tracker.TENSORBOARD)


def test_a_full_disk_disables_tensorboard_before_its_thread_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its queue holds ten events, and nothing takes them out once the thread has ended."""
    with opened(tmp_path, Tracker.TENSORBOARD) as trackers:
        trackers.write("train", step=1, **RECORD)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        for step in range(2, 20):
            trackers.write("train", step=step, **RECORD)
    [warning] = caplog.messages
    assert warning.startswith("tensorboard failed and is disabled") and "No space left on device" in warning
