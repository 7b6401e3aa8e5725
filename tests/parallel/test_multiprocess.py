"""Several processes, standing for several hosts: a run is stopped, killed, and resumed on other meshes.

They are started as a user starts them, with COORDINATOR, RANK and WORLD. On every mesh, each step must see
the same sequences.
"""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmjax.cli import INTERRUPTED_STATUS
from slmjax.telemetry.run_directory import read_log

Processes = list[subprocess.Popen[str]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Hosts:
    """Starts `slmjax train` in one or several processes and waits for them; their output goes to files."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self.environment = environment

    def start(
        self, arguments: str, *, num_processes: int, num_devices: int, of_the_last: str = ""
    ) -> Processes:
        """Start processes with the same arguments; the last one may have further ones."""
        flags = f"{self.environment['XLA_FLAGS']} --xla_force_host_platform_device_count={num_devices}"
        environment = self.environment | {"XLA_FLAGS": flags}
        if num_processes > 1:
            environment |= {"COORDINATOR": f"127.0.0.1:{free_port()}", "WORLD": str(num_processes)}
        command = [sys.executable, "-m", "slmjax", "train", *arguments.split()]
        processes = []
        for rank in range(num_processes):
            with self.output_path(rank).open("w") as output:
                variables = environment | ({"RANK": str(rank)} if num_processes > 1 else {})
                processes.append(
                    subprocess.Popen(
                        command if rank < num_processes - 1 else [*command, *of_the_last.split()],
                        cwd=self.directory,
                        env=variables,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        text=True,
                    )
                )
        return processes

    def run(self, arguments: str, *, num_processes: int, num_devices: int) -> list[int]:
        return self.finish(self.start(arguments, num_processes=num_processes, num_devices=num_devices))

    def finish(self, processes: Processes) -> list[int]:
        try:
            return [process.wait(timeout=300) for process in processes]
        except subprocess.TimeoutExpired:
            pytest.fail("\n".join(self.output(rank) for rank in range(len(processes))))
        finally:
            for process in processes:
                process.kill()

    def after_checkpoint(self, processes: Processes, run_pattern: str, step: int) -> None:
        """Wait until the checkpoint of `step` is complete in a run directory that matches the pattern."""
        while not any(self.directory.glob(f"{run_pattern}/checkpoints/{step}/meta")):
            assert all(process.poll() is None for process in processes), self.output(0)
            time.sleep(0.05)

    def output_path(self, rank: int) -> Path:
        return self.directory / f"output-{rank}.txt"

    def output(self, rank: int = 0) -> str:
        return self.output_path(rank).read_text()

    def resumed_after(self) -> int:
        """Return the step that the last command resumed after."""
        match = re.search(r"resuming after step (\d+)", self.output())
        assert match is not None, self.output()
        return int(match[1])


@pytest.fixture
def hosts(workplace: Path, user_environment: dict[str, str]) -> Hosts:
    return Hosts(workplace, user_environment)


def kill(processes: Processes) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def assert_the_same_training(run: Path, trained: subprocess.CompletedProcess[str], workplace: Path) -> None:
    """Compare data and loss of every step, repeated ones included, with one uninterrupted process."""
    alone = json.loads(trained.stdout)
    expected = {
        record["step"]: record
        for record in read_log(workplace / alone["run_dir"] / "log.jsonl", kind="train")
    }
    records = read_log(run / "log.jsonl", kind="train")
    assert {record["step"] for record in records} == set(expected) == set(range(1, 61))
    checksums = {step: record["data_checksum"] for step, record in expected.items()}
    assert (
        all(isinstance(checksum, int) for checksum in checksums.values())
        and len(set(checksums.values())) > 50
    )
    for record in records:
        assert record["data_checksum"] == checksums[record["step"]], record["step"]
        assert record["tokens"] == expected[record["step"]]["tokens"]
        # Sums over devices are taken in another order, and 60 steps of training carry the difference along.
        np.testing.assert_allclose(
            record["loss"], expected[record["step"]]["loss"], rtol=2e-3, err_msg=str(record["step"])
        )
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    assert result["run_tokens"] == alone["run_tokens"]
    np.testing.assert_allclose(result["bits_per_byte"], alone["bits_per_byte"], rtol=2e-3)


def stopped_together(
    hosts: Hosts, workplace: Path, directory: str, number: signal.Signals
) -> tuple[Path, int]:
    """Train in two processes until one gets a signal; return the run directory and the last step."""
    processes = hosts.start(
        f"tiny.py --run.directory {directory} --mesh.data 2 --mesh.fsdp 2", num_processes=2, num_devices=2
    )
    hosts.after_checkpoint(processes, f"{directory}/*", 10)
    processes[1].send_signal(number)  # to one of them
    assert hosts.finish(processes) == [INTERRUPTED_STATUS] * 2, hosts.output()
    (run,) = workplace.glob(f"{directory}/*")
    stopped = json.loads((run / "result.json").read_text())
    assert stopped["status"] == "interrupted" and 10 <= stopped["step"] < 60
    logs = [read_log(run / name, kind="train") for name in ("log.jsonl", "log-1.jsonl")]
    for field in ("step", "loss", "data_checksum"):
        assert [record[field] for record in logs[0]] == [record[field] for record in logs[1]], field
    assert logs[0][-1]["step"] == stopped["step"]
    texts = [record["text"] for record in read_log(run / "log-1.jsonl", kind="message")]
    assert sum(text.startswith("process 1 of 2, coordinator 127.0.0.1:") for text in texts) == 1
    return run, stopped["step"]


# Settings that differ -------------------------------------------------------------------------------------
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("of_the_last", "expected"),
    [
        (
            "--optim.lr 3e-3",
            "processes of this run differ: optim.lr is 0.01 (process 0), 0.003 (process 1). Start",
        ),
        (
            "--checkpoint.every 7",
            "checkpoint.every is 10 (process 0), 7 (process 1). Start all of them with",
        ),
        ("--optim.nothing 7", "failed in another process: process 1: slmjax train tiny.py has no option"),
    ],
)
def test_processes_with_other_settings_end_before_the_first_step(
    hosts: Hosts, workplace: Path, of_the_last: str, expected: str
) -> None:
    started = time.monotonic()
    status = hosts.finish(
        hosts.start("tiny.py --run.directory apart", num_processes=2, num_devices=1, of_the_last=of_the_last)
    )
    assert status == [2, 2] and expected in hosts.output(0), hosts.output(0)
    assert time.monotonic() - started < 90, "nothing waits for a process that is gone"
    assert not (workplace / "apart").exists()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("line", "signals", "status", "message"),
    [
        ("compiling the train step", [signal.SIGTERM], INTERRUPTED_STATUS, "before the first step"),
        ("step  2/60", [signal.SIGTERM, signal.SIGINT], 130, "the second signal ends at once"),
    ],
    ids=["compiling", "second signal"],
)
def test_two_processes_end_at_once(
    hosts: Hosts, line: str, signals: list[signal.Signals], status: int, message: str
) -> None:
    """Before the first step there is nothing to save; a second signal does not wait for the save."""
    processes = hosts.start("tiny.py --run.directory ended --mesh.data 4", num_processes=2, num_devices=2)
    while line not in hosts.output():
        assert all(process.poll() is None for process in processes), hosts.output()
        time.sleep(0.05)
    started = time.monotonic()
    for number in signals:
        processes[1].send_signal(number)
    assert hosts.finish(processes) == [status] * 2, hosts.output() + hosts.output(1)
    assert time.monotonic() - started < 15
    assert message in hosts.output(1) and "Traceback" not in hosts.output() + hosts.output(1)


# The tensor axis spans the processes: both read every row.
SPANNING = "--mesh.data 1 --mesh.fsdp 1 --mesh.tensor 4"


def test_two_processes_stop_together_and_resume_on_another_mesh(
    hosts: Hosts, workplace: Path, trained: subprocess.CompletedProcess[str]
) -> None:
    """Data order and losses are those of one process, through two meshes."""
    run, step = stopped_together(hosts, workplace, "stopped", signal.SIGINT)
    status = hosts.run(f"--resume {run} {SPANNING}", num_processes=2, num_devices=2)
    assert status == [0, 0], hosts.output()
    assert hosts.resumed_after() == step
    assert_the_same_training(run, trained, workplace)


@pytest.mark.nightly
def test_two_processes_stop_together_are_killed_and_one_resumes(
    hosts: Hosts, workplace: Path, trained: subprocess.CompletedProcess[str]
) -> None:
    """Data order and losses are those of one process, through three meshes."""
    run, step = stopped_together(hosts, workplace, "together", signal.SIGTERM)
    processes = hosts.start(f"--resume {run} {SPANNING}", num_processes=2, num_devices=2)
    at = (step // 10 + 1) * 10
    hosts.after_checkpoint(processes, str(run.relative_to(workplace)), at)
    kill(processes)
    assert hosts.resumed_after() == step

    mesh = "--mesh.data 1 --mesh.fsdp 1 --mesh.tensor 2 --mesh.expert 2"
    assert hosts.run(f"--resume {run} {mesh}", num_processes=1, num_devices=4) == [0], hosts.output()
    assert hosts.resumed_after() in (at, at + 10)  # the kill takes a moment
    assert_the_same_training(run, trained, workplace)


@pytest.mark.nightly
def test_four_processes_are_killed_and_two_resume(
    hosts: Hosts, workplace: Path, trained: subprocess.CompletedProcess[str]
) -> None:
    processes = hosts.start(
        "tiny.py --run.directory four --mesh.data 2 --mesh.tensor 2", num_processes=4, num_devices=1
    )
    hosts.after_checkpoint(processes, "four/*", 20)
    kill(processes)
    (run,) = workplace.glob("four/*")
    mesh = "--mesh.data 1 --mesh.fsdp 2 --mesh.expert 2 --mesh.tensor 1"
    assert hosts.run(f"--resume {run} {mesh}", num_processes=2, num_devices=2) == [0, 0], hosts.output()
    assert hosts.resumed_after() in (20, 30)
    assert_the_same_training(run, trained, workplace)


@pytest.mark.nightly
def test_two_processes_learn_from_a_teacher(
    hosts: Hosts, workplace: Path, trained: subprocess.CompletedProcess[str]
) -> None:
    """The teacher is sharded over both, and every step equals that of one process."""
    teacher = json.loads(trained.stdout)["run_dir"]
    losses = []
    for number, mesh in ((1, "--mesh.data 1"), (2, "--mesh.data 1 --mesh.fsdp 2 --mesh.tensor 2")):
        arguments = f"tiny.py --teacher {teacher} --run.directory taught-{number} --run.steps 20 {mesh}"
        assert hosts.run(arguments, num_processes=number, num_devices=number) == [0] * number, hosts.output()
        (run,) = workplace.glob(f"taught-{number}/*")
        losses.append(
            [(record["loss"], record["divergence"]) for record in read_log(run / "log.jsonl", kind="train")]
        )
    assert losses[0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-3)
