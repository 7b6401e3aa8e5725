"""Workers of one study: no member is lost, none is trained twice, and one that was killed or paused harms
nothing.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from slmjax.checkpoints.loading import load_model
from slmjax.formats.presets import preset
from slmjax.quantization.rules import QuantRule
from slmjax.studies import (
    Derived,
    Interrupted,
    Lease,
    Member,
    RoundToNearest,
    Study,
    read_members,
    run_study,
)
from slmjax.studies.claims import Claims
from slmjax.studies.running import take_over
from slmjax.telemetry.run_directory import read_log
from tests.conftest import ROOT
from tests.studies.stub import StubTrainer, study
from tests.studies.test_study import Killed, all_keys, keys, records
from tests.studies.worker_process import LEASE, real_study

QUICK = Lease(seconds=30, heartbeat=0.05)


def work(directory: Path, train: Any = None, **settings: Any) -> tuple[Member, ...]:
    settings = {"worker": True, "lease": QUICK} | settings
    return run_study(settings.pop("study", study()), directory, train=train or StubTrainer(), **settings)


def in_threads(*calls: Callable[[], object]) -> None:
    """Call these at the same time, and raise what one of them raises."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> None:
        try:
            start.wait()
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def expire(directory: Path) -> None:
    """Make the holders of all claims processes of this machine that have ended."""
    for path in (directory / "claims").glob("*/*/[0-9]*.json"):
        event = json.loads(path.read_text())
        if event["event"] == "claimed":
            path.write_text(json.dumps(event | {"started": "1"}))


# One after another, and at once -----------------------------------------------------------------------------
def test_workers_in_threads_train_each_member_once(tmp_path: Path) -> None:
    train = StubTrainer()
    seeds = (0, 1, 2, 3)
    in_threads(*[lambda: work(tmp_path, train, study=study(seeds)) for _ in range(6)])
    assert sorted(keys(train.asked)) == sorted(all_keys(seeds))
    lines = [(record["arm"], record["seed"]) for record in records(tmp_path)]
    assert len(lines) == len(set(lines)) == 12
    alone = run_study(study(seeds), tmp_path / "alone", train=StubTrainer())
    members = read_members(study(seeds), tmp_path)
    assert [member.metric_value("loss") for member in members] == [
        member.metric_value("loss") for member in alone
    ]


def test_the_outcome_is_in_the_claims_as_well_as_in_the_log(tmp_path: Path) -> None:
    members = work(tmp_path)
    (tmp_path / "members.jsonl").unlink()  # two hosts wrote to it at once, and a line was lost
    assert read_members(study(), tmp_path) == members
    train = StubTrainer()
    assert work(tmp_path, train) == members and not train.asked


def test_a_directory_of_an_earlier_version_has_no_claims(tmp_path: Path) -> None:
    members = work(tmp_path)
    for path in sorted((tmp_path / "claims").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    lines = (tmp_path / "members.jsonl").read_text().splitlines()
    (tmp_path / "members.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    train = StubTrainer()
    assert read_members(study(), tmp_path) == members[:-1]
    # The last one is read from its run.
    assert work(tmp_path, train) == members and not train.asked


def test_a_worker_leaves_what_others_train_and_the_study_waits_for_it(tmp_path: Path) -> None:
    """A worker returns once the others are seen to live; without `worker` the call returns all members."""
    with Claims(tmp_path, lease=QUICK) as other:
        claim = other.take(other.look("slow/seed-0"))
        assert claim is not None
        assert len(work(tmp_path)) == 8

        def release() -> None:
            time.sleep(0.2)
            claim.release()

        train = StubTrainer()
        in_threads(release, lambda: work(tmp_path, train, worker=False))
    assert keys(train.asked) == [(1e-3, 0)] and len(read_members(study(), tmp_path)) == 9


def test_a_derived_member_waits_for_its_source(tmp_path: Path) -> None:
    rules = (QuantRule(paths=".", weight=preset("q4_0")),)
    derived = Derived(name="rounded", source="slow", derivation=RoundToNearest(rules=rules))
    asked = study((0,))
    asked = dataclasses.replace(asked, arms=(asked.arms[0], derived, asked.arms[1]))
    with Claims(tmp_path, lease=QUICK) as other:
        claim = other.take(other.look("slow/seed-0"))
        assert claim is not None
        assert [member.arm for member in work(tmp_path, study=asked)] == ["fast & loose"]
    # A stub has no model to round: the derivation is tried, and fails.
    members = work(tmp_path, study=asked, only=["rounded"])
    assert [(member.arm, member.status) for member in members[:2]] == [
        ("slow", "finished"),
        ("rounded", "failed"),
    ]


def test_only_some_arms(tmp_path: Path) -> None:
    train = StubTrainer()
    assert len(work(tmp_path, train, only=["slow"])) == 3
    assert keys(train.asked) == [(1e-3, seed) for seed in (0, 1, 2)]
    assert len(work(tmp_path, worker=False)) == 9
    with pytest.raises(ValueError, match=r"'sloww' is not an arm of the study. Did you mean 'slow'"):
        work(tmp_path, only=["sloww"])


def test_a_failure_is_tried_again_by_workers_that_start_after_it(tmp_path: Path) -> None:
    """Not by those that run: each would fail at it as well."""
    failing = StubTrainer(errors={(1e-3, 0): RuntimeError("no space")})
    in_threads(*[lambda: work(tmp_path, failing) for _ in range(3)])
    assert keys(failing.asked).count((1e-3, 0)) == 1
    again = StubTrainer()
    assert all(member.status == "finished" for member in work(tmp_path, again))
    assert keys(again.asked) == [(1e-3, 0)]


def test_a_signal_ends_a_worker_in_order(tmp_path: Path) -> None:
    """Its claim is released, so that the member is resumed at once."""
    with pytest.raises(Interrupted, match="arm fast & loose, seed 0"):
        work(tmp_path, StubTrainer(statuses={(2e-3, 0): "interrupted"}))

    def signalled(*arguments: Any, **settings: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped by SIGTERM: start the worker again"):
        work(tmp_path, signalled)
    with Claims(tmp_path) as claims:
        assert not claims.look("fast-loose/seed-0").is_claimed
    train = StubTrainer()
    assert len(work(tmp_path, train)) == 9
    resumed = train.resumed[0]
    assert resumed is not None and len(list(resumed.parent.iterdir())) == 1


# Killed and paused workers ----------------------------------------------------------------------------------
def test_the_run_of_a_killed_worker_is_taken_over(tmp_path: Path) -> None:
    """As after kill -9: the claim is there, and its holder is not."""
    key = (1e-3, 0)
    with pytest.raises(Killed):
        work(tmp_path, StubTrainer(statuses={key: "interrupted"}, errors={key: Killed()}))
    chain = tmp_path / "claims" / "slow" / "seed-0"
    (chain / "2.json").unlink()  # a process that is killed releases nothing
    expire(tmp_path)
    (run,) = (tmp_path / "slow" / "seed-0").iterdir()
    train = StubTrainer()
    assert len(work(tmp_path, train)) == 9
    assert train.resumed[0] == run.with_name(f"{run.name}.2") and not run.exists()
    assert keys(train.asked) == all_keys()


def test_what_a_paused_worker_writes_is_not_in_the_run(tmp_path: Path) -> None:
    run = tmp_path / "nano-20260101-000000-abcdef"
    (run / "checkpoints" / "4").mkdir(parents=True)
    (run / "checkpoints" / "4" / "arrays").write_bytes(b"0123")
    (run / "tensorboard").mkdir()
    (run / "log.jsonl").write_text('{"kind": "train", "step": 4}\n')
    (run / "tensorboard" / "events").write_text("events")
    os.utime(run / "log.jsonl", (1e9, 1e9))
    inode = (run / "checkpoints" / "4" / "arrays").stat().st_ino
    with (run / "log.jsonl").open("a") as log, (run / "tensorboard" / "events").open("a") as events:
        target = take_over(run, 3)
        log.write("stale")
        events.write("stale")
    with pytest.raises(FileNotFoundError):
        (run / "checkpoints" / "4.saving").rename(run / "checkpoints" / "8")
    assert target.name == "nano-20260101-000000-abcdef.3"
    assert (target / "log.jsonl").read_text() == '{"kind": "train", "step": 4}\n'
    assert (target / "log.jsonl").stat().st_mtime == 1e9
    assert (target / "tensorboard" / "events").read_text() == "events"
    assert (target / "checkpoints" / "4" / "arrays").stat().st_ino == inode  # large, and never written again
    assert take_over(target, 12).name == "nano-20260101-000000-abcdef.12"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_takeover_that_fails_leaves_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()

    def full(*arguments: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("shutil.copy2", full)
    with pytest.raises(OSError, match="No space"):
        take_over(tmp_path / "run", 3)
    assert (tmp_path / "run" / "log.jsonl").exists()


@pytest.fixture
def start(user_environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start("stub", directory)`: a worker in a process of its own, which is killed after the test."""
    processes = []

    def popen(*arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.studies.worker_process", *map(str, arguments)]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=user_environment,
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield popen
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def num_saved(directory: Path) -> int:
    return len(list(directory.glob("*/seed-*/*/checkpoints/[0-9]*")))


def test_of_three_workers_two_are_killed_and_one_is_paused(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """A fourth one resumes all that they had begun, and the one that wakes up again records nothing."""
    processes = [start("stub", tmp_path) for _ in range(3)]
    wait_for(lambda: num_saved(tmp_path) == 3, *processes)
    begun = {path.parent.parent.parent for path in tmp_path.glob("*/seed-*/*/checkpoints/4")}
    processes[2].send_signal(signal.SIGSTOP)
    for process in processes[:2]:
        process.kill()
        process.wait()
    train = StubTrainer()
    members = run_study(study(), tmp_path, train=train, worker=True, lease=LEASE)
    assert len(members) == 9 and len(records(tmp_path)) == 9
    resumed = [run for run in train.resumed if run is not None]
    assert {run.parent for run in resumed} == begun and len(train.asked) == 9
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "gate").touch()
    processes[2].send_signal(signal.SIGCONT)
    _, errors = processes[2].communicate(timeout=300)
    assert processes[2].returncode == 0 and "another process has taken over this claim" in errors
    # Its line in the log went to the file that was open, which is not that of the run any more.
    assert {path: path.read_bytes() for path in before} == before
    assert read_members(study(), tmp_path) == members


# Real training ----------------------------------------------------------------------------------------------
def parameters(member: Member) -> list[np.ndarray]:
    model = load_model(member.result["run_dir"]).model
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


@pytest.mark.nightly
@pytest.mark.composes("resume", "studies")
def test_killed_workers_of_a_real_study_are_resumed_bit_for_bit(
    workplace: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    whole: Study = real_study(workplace, tmp_path / "whole")
    alone = start("real", tmp_path / "whole", workplace)
    assert alone.wait() == 0, alone.communicate()[1]
    expected = read_members(whole, tmp_path / "whole")

    directory = tmp_path / "shared"
    processes = [start("real", directory, workplace) for _ in range(3)]
    saved: dict[int, Path] = {}
    victims = processes[:2]

    def has_saved(process: subprocess.Popen[str]) -> bool:
        """Whether a member of this process has a checkpoint and no result yet."""
        for path in directory.glob("claims/*/*/[0-9]*.json"):
            event = json.loads(path.read_text())
            run_parent = directory / path.parent.relative_to(directory / "claims")
            if event.get("pid") == process.pid and not path.with_name(f"{int(path.stem) + 1}.json").exists():
                if list(run_parent.glob("*/checkpoints/[24]")):
                    saved[process.pid] = run_parent
                    return True
        return False

    for process in victims:
        wait_for(lambda process=process: has_saved(process))
        process.kill()
        process.wait()
    assert processes[2].wait() == 0, processes[2].communicate()[1]
    members = read_members(real_study(workplace, directory), directory)
    assert [member.status for member in members] == ["finished"] * 4
    assert [member.metric_value("loss") for member in members] == [
        member.metric_value("loss") for member in expected
    ]
    for member, other in zip(members, expected, strict=True):
        ours = parameters(member)
        theirs = parameters(other)
        assert len(ours) == len(theirs) > 3
        assert all(np.array_equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    for run_parent in saved.values():
        (run,) = run_parent.iterdir()
        assert run.name.endswith(".2")
        steps = [record["step"] for record in read_log(run / "log.jsonl", kind="train")]
        assert steps[-1] == 8 and len(list(read_log(run / "log.jsonl", kind="session"))) == 2
