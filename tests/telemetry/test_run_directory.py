"""slmjax.telemetry.run_directory: nothing overwritten, nothing half-written, no secrets, seconds that add
up.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from slmjax import faults
from slmjax.config import ConfigError
from slmjax.stored_json import DamagedFile
from slmjax.telemetry.messages import MessageHandler
from slmjax.telemetry.report import list_runs
from slmjax.telemetry.run_directory import (
    Category,
    Ledger,
    RunDirectory,
    RunLog,
    read_log,
    read_result,
)


def test_names_are_unique_and_tell_the_experiment(tmp_path: Path) -> None:
    runs = [
        RunDirectory.create_in(tmp_path, name="a/../b c", fingerprint="0123456789abcdef") for _ in range(3)
    ]
    assert len({run.path for run in runs}) == 3
    for run in runs:
        assert run.path.parent == tmp_path
        assert run.path.name.startswith("a-..-b-c-2")
        assert "-012345" in run.path.name


def test_a_run_that_fails_as_it_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fault,) = faults.parse("run.created=full")
    monkeypatch.setattr(faults, "_faults", [fault])
    name = {"name": "run", "fingerprint": "0" * 16}

    def write(path: Path) -> None:
        (path / "config.json").write_text("{}")

    with pytest.raises(OSError, match="No space left"):
        RunDirectory.create_in(tmp_path, **name, write=write)
    assert list(tmp_path.iterdir()) == []
    # A killed one leaves a hidden directory, which is no run, and is removed after a day.
    names = [f".run-20261201-{hour}0000-0123ab-0123456789ab.tmp" for hour in (10, 11)]
    for name_of_remains in names:
        (tmp_path / name_of_remains).mkdir()
        write(tmp_path / name_of_remains)
    os.utime(tmp_path / names[0], (0, 0))
    run = RunDirectory.create_in(tmp_path, **name, write=write)
    assert [path.name for path in run.path.iterdir()] == ["config.json"]
    assert [item.name for item in list_runs(tmp_path)] == [run.path.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[1], run.path.name]


def test_a_file_is_no_place_for_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file: name a directory"):
        RunDirectory.create_in(tmp_path / "file", name="run", fingerprint="0" * 16)


def test_paths_of_processes(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, process_index=0)
    assert (run.log_path.name, run.checkpoints.name, run.tokenizer.name) == (
        "log.jsonl",
        "checkpoints",
        "tokenizer",
    )
    assert RunDirectory(tmp_path, process_index=3).log_path.name == "log-3.jsonl"


def test_a_result_of_an_earlier_version_has_the_present_names(tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    former = {"status": "finished", "step": 7, "tokens": 90, "seconds": 2.0, "tokens_per_second": 45.0}
    (tmp_path / "result.json").write_text(json.dumps(former))
    assert read_result(tmp_path) == {
        "status": "finished",
        "step": 7,
        "run_tokens": 90,
        "session_seconds": 2.0,
        "session_tokens_per_second": 45.0,
    }
    for damaged in ("", "[]", '{"status": "finished"}', '{"status": 1, "step": 7}', "\x00"):
        (tmp_path / "result.json").write_text(damaged)
        with pytest.raises(DamagedFile, match="result.json .*: delete it and resume the run"):
            read_result(tmp_path)


@pytest.mark.smoke
def test_json_is_strict_and_plain(tmp_path: Path) -> None:
    values = {
        "a": np.float32(0.5),
        "b": np.int64(3),
        "c": float("nan"),
        "d": (1, None, True),
        "e": -np.inf,
        "f": Category.DATA,
        "g": tmp_path,
    }
    path = RunDirectory(tmp_path).write_json("result.json", values)
    assert json.loads(path.read_text()) == {
        "a": 0.5,
        "b": 3,
        "c": "nan",
        "d": [1, None, True],
        "e": "-inf",
        "f": "data",
        "g": str(tmp_path),
    }


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    run.write_json("report.json", "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        run.write_json("report.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text()) == "old"


def test_readers_see_whole_files_while_one_is_rewritten(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    path = run.write_json("result.json", {"value": 0, "filler": "x" * 100_000})
    writer = threading.Thread(
        target=lambda: [
            run.write_json("result.json", {"value": i, "filler": "x" * 100_000}) for i in range(50)
        ]
    )
    writer.start()
    while writer.is_alive():
        assert len(json.loads(path.read_text())["filler"]) == 100_000
    writer.join()


def test_log_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.write("train", step=1, loss=np.float32(0.25))
        assert read_log(path)[0]["loss"] == 0.25, "flushed at once"
        log.write("eval", step=1, text="line\nbreak \u2028 é", loss=float("nan"))
    with RunLog(path) as log:
        log.write("train", step=2)
    assert [(record["kind"], record["step"]) for record in read_log(path)] == [
        ("train", 1),
        ("eval", 1),
        ("train", 2),
    ]
    assert [record["step"] for record in read_log(path, kind="train")] == [1, 2]
    assert read_log(path, kind="eval")[0]["text"] == "line\nbreak \u2028 é"
    assert read_log(path)[0]["time"] > 1.7e9


@pytest.mark.parametrize(
    "torn", ['{"kind": "train", "st', '{"kind": "train"}', '{"kind": "\u00e9'.encode()[:-1]]
)
def test_a_torn_last_line_is_passed_over_and_then_cut(tmp_path: Path, torn: str | bytes) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.write("train", step=1)
    with path.open("ab") as stream:
        stream.write(torn if isinstance(torn, bytes) else torn.encode())
    assert [record["step"] for record in read_log(path)] == [1]
    with RunLog(path) as log:
        log.write("train", step=2)
    assert [record["step"] for record in read_log(path)] == [1, 2]


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr\n{"kind": "train", "step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*log\.jsonl is not JSON .*remove the line"):
        read_log(path)


def test_a_full_disk_loses_lines_which_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    full = faults.parse("log.write:2=full,log.write:3=readonly")
    monkeypatch.setattr(faults, "_faults", full)
    with MessageHandler(lambda text: None) as messages, RunLog(path) as log:
        messages.write_to(log)
        for step in range(1, 6):
            log.write("train", step=step)
        # The warning of the first came when there was room again, and is kept.
        assert log.lost == 2
    records = read_log(path)
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 4, 5]
    assert sum(record["lines"] for record in records if record["kind"] == "lost") == 2
    [warning] = [record["text"] for record in records if record["kind"] == "message"]
    assert "cannot be written (No space left on device" in warning


FILLING = """
import resource, signal, sys
from pathlib import Path
from slmjax.telemetry.run_directory import RunLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = RunLog(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 1 << 30))
log.write("train", step=1)
log.write("train", step=2, text="x" * 60)  # a part of it fits
log.write("train", step=3, text="x" * 60)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
log.write("train", step=4)
"""


def test_a_line_of_which_a_part_fits_is_not_left_torn(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    subprocess.run([sys.executable, "-c", FILLING, str(path)], check=True, capture_output=True)
    records = [(record["kind"], record.get("step", record.get("lines"))) for record in read_log(path)]
    assert records == [("train", 1), ("lost", 2), ("train", 4)]


KILLED = """
import os, signal, sys
from pathlib import Path
from slmjax.telemetry.run_directory import RunLog
log = RunLog(Path(sys.argv[1]))
for step in range(100):
    log.write("train", step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_written_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -9
    assert [record["step"] for record in read_log(path)] == list(range(100))


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_ledger_counts_every_second_once() -> None:
    clock = FakeClock()
    ledger = Ledger(clock=clock)
    clock.now += 1  # other
    with ledger.timed(Category.STEP):
        clock.now += 5
        with ledger.timed(Category.COMPILE):
            clock.now += 20
        clock.now += 3
        with pytest.raises(KeyboardInterrupt), ledger.timed(Category.EVAL):
            clock.now += 4
            raise KeyboardInterrupt
    with ledger.timed(Category.STEP):
        clock.now += 2
        assert ledger.seconds()["step"] == 10, "an open category counts up to now"
    clock.now += 5
    assert ledger.seconds() == {
        "init": 0,
        "compile": 20,
        "data": 0,
        "step": 10,
        "eval": 4,
        "checkpoint": 0,
        "other": 6,
    }
    assert sum(ledger.seconds().values()) == clock.now - 100
