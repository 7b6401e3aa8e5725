"""Two processes on this machine, as two hosts: they train one model together, stop together, and go on together."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from slmjax.cli import INTERRUPTED_STATUS
from slmjax.runlog import read_log

DRIVER = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
from slmjax.cli import main
main(sys.argv[3:])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(arguments: list[str], *, cwd: Path, environment: dict[str, str]) -> list[subprocess.Popen[str]]:
    """The slmjax command in two processes of two devices each; their output goes to files."""
    environment = environment | {"XLA_FLAGS": f"{environment['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
    port = str(free_port())
    processes = []
    for index in ("0", "1"):
        with (cwd / f"output-{index}.txt").open("w") as output:
            command = [sys.executable, "-c", DRIVER, port, index, *arguments]
            processes.append(subprocess.Popen(command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True))
    return processes


def finish(processes: list[subprocess.Popen[str]], *, cwd: Path) -> list[int]:
    try:
        return [process.wait(timeout=300) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join((cwd / f"output-{index}.txt").read_text() for index in range(2)))
    finally:
        for process in processes:
            process.kill()


def losses(run: Path, name: str = "log.jsonl") -> dict[int, float]:
    """Loss by step; of a step that was taken again after a resume, the later one."""
    return {record["step"]: record["loss"] for record in read_log(run / name, kind="train")}


def test_two_processes_train_stop_and_resume_as_one(
    workplace: Path, user_environment: dict[str, str], trained: subprocess.CompletedProcess[str]
) -> None:
    processes = start(["train", "tiny.py", "--run.directory", "together"], cwd=workplace, environment=user_environment)
    while processes[0].poll() is None and not any(workplace.glob("together/*/checkpoints/10/meta")):
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)  # to one of them
    statuses = finish(processes, cwd=workplace)
    output = (workplace / "output-0.txt").read_text()
    assert statuses == [INTERRUPTED_STATUS] * 2, output
    (run,) = workplace.glob("together/*")
    stopped = json.loads((run / "result.json").read_text())
    assert stopped["status"] == "interrupted" and 10 <= stopped["step"] < 60
    assert max(losses(run)) == max(losses(run, "log-1.jsonl")) == stopped["step"]

    resumed = start(["train", "--resume", str(run)], cwd=workplace, environment=user_environment)
    assert finish(resumed, cwd=workplace) == [0, 0], (workplace / "output-0.txt").read_text()
    assert f"resuming after step {stopped['step']}" in (workplace / "output-0.txt").read_text()

    alone = Path(json.loads(trained.stdout)["run_dir"])
    expected, found = losses(workplace / alone), losses(run)
    assert sorted(found) == sorted(expected) == list(range(1, 61))
    # Sums over devices are taken in another order, and 60 steps of training carry the difference along.
    np.testing.assert_allclose([found[step] for step in sorted(found)], [expected[step] for step in sorted(found)], rtol=2e-3)
    result = json.loads((run / "result.json").read_text())
    assert result["tokens"] == json.loads(trained.stdout)["tokens"]
    np.testing.assert_allclose(result["bits_per_byte"], json.loads(trained.stdout)["bits_per_byte"], rtol=2e-3)
