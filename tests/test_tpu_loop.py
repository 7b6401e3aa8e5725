"""A whole loop of until-done.sh, with preemptions and what else goes wrong, on a cloud of folders."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fake_cloud import POD, SCRIPTS, TPU, Cloud, environment, script


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path)
    yield cloud
    for pid in tmp_path.glob("tpus/*/hosts/*/slmjax-job/pid"):
        kill_group(int(pid.read_text()))


BRING_UP = ["create", "ssh", "scp", "install", "mount", "find"]
RUNS_ON_HOST = "slmjax-job/bucket/runs/tpu-a"


@pytest.mark.parametrize("queued", [False, True], ids=["at-once", "queued"])
def test_a_preempted_run_is_resumed_until_it_is_done(cloud: Cloud, queued: bool) -> None:
    cloud.behave(fresh="block", resumed="0", preempted_at_look=3)
    done = cloud.until_done(*(["--queued"] if queued else []), "nano", "--run.steps", "10")
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == [*BRING_UP, "start", "delete", *BRING_UP, "resume", "rsync", "delete"]
    fresh = f"train nano --run.steps 10 --run.directory {RUNS_ON_HOST}"
    resumed = f"train --resume {RUNS_ON_HOST}/nano-1"
    assert sorted(cloud.trainings()) == sorted(
        [f"host-{n} {line}" for line in (fresh, resumed) for n in "01"]
    )
    # The run was fetched, with what each host printed; nothing else is left.
    fetched = cloud.fake / "fetched" / "tpu-a"
    assert json.loads((fetched / "nano-1" / "result.json").read_text())["status"] == "finished"
    assert {path.name for path in fetched.iterdir()} == {"nano-1", "console-host-0.log", "console-host-1.log"}
    assert cloud.machines() == []
    assert "restart 1 of at most 20" in done.stderr and "status 0 after 1 restarts" in done.stderr
    installed = (cloud.fake / "installed").read_text().splitlines()
    assert len(installed) == 4 and all(
        re.fullmatch(r"host-[01] slmjax\[tpu\] @ file://\S+/slmjax-job/source", line) for line in installed
    )


def test_it_stops_after_so_many_restarts(cloud: Cloud) -> None:
    cloud.behave(fresh="75", resumed="75")
    done = cloud.until_done("--max-restarts=1", "nano")
    assert done.returncode == 75 and "status 75 after 1 restarts" in done.stderr
    assert cloud.calls() == [*BRING_UP, "start", "delete", *BRING_UP, "resume", "rsync", "delete"]
    assert cloud.machines() == [] and (cloud.fake / "fetched" / "tpu-a" / "nano-1" / "config.json").is_file()
    # Started again, it goes on.
    cloud.behave(fresh="2", resumed="0")
    assert cloud.until_done("nano").returncode == 0
    # And once more: there is nothing to do.
    before = len(cloud.trainings())
    again = cloud.until_done("nano")
    assert (
        again.returncode == 0
        and f"finished {RUNS_ON_HOST}/nano-1: for another run give another --run-name" in again.stderr
    )
    assert len(cloud.trainings()) == before and cloud.machines() == []


@pytest.mark.parametrize("request_state", ["ACTIVE", "FAILED"])
def test_a_request_whose_machine_is_gone_is_made_anew(cloud: Cloud, request_state: str) -> None:
    (cloud.fake / "tpus" / "tpu-a").mkdir(parents=True)
    (cloud.fake / "tpus" / "tpu-a" / "request").write_text(request_state)
    assert cloud.until_done("--queued", "nano").returncode == 0
    assert cloud.calls() == ["delete", *BRING_UP, "start", "rsync", "delete"] and cloud.machines() == []


@pytest.mark.parametrize("keep", [False, True])
def test_a_diverged_run_stops_the_loop(cloud: Cloud, keep: bool) -> None:
    cloud.behave(fresh="1", resumed="0")
    done = cloud.until_done(*(["--keep"] if keep else []), "nano")
    assert done.returncode == 1 and "status 1 after 0 restarts" in done.stderr
    assert cloud.calls() == [*BRING_UP, "start", "rsync", *([] if keep else ["delete"])]
    assert (cloud.fake / "fetched" / "tpu-a" / "console-host-0.log").is_file()
    assert cloud.machines() == (["tpu-a"] if keep else [])
    assert ("tpu-a is kept, and costs until delete.sh deletes it" in done.stderr) == keep


def test_a_run_that_fails_because_its_peers_were_taken_away_goes_on(cloud: Cloud) -> None:
    (cloud.fake / "peers-go-first").touch()
    cloud.behave(fresh="1", resumed="0")
    done = cloud.until_done()
    assert done.returncode == 0 and "status 0 after 1 restarts" in done.stderr, done.stderr
    assert cloud.calls() == [*BRING_UP, "start", "delete", *BRING_UP, "resume", "rsync", "delete"]


def test_a_killed_run_goes_on_and_a_lost_connection_does_not_matter(cloud: Cloud) -> None:
    (cloud.fake / "unreachable").touch()
    cloud.behave(fresh="137", resumed="0")  # killed, as for want of memory
    done = cloud.until_done()
    assert done.returncode == 0 and "status 0 after 1 restarts" in done.stderr, done.stderr
    assert not (cloud.fake / "unreachable").exists()


def test_an_installation_that_fails_is_not_tried_on_another_machine(cloud: Cloud) -> None:
    (cloud.fake / "broken").touch()
    done = cloud.until_done()
    assert (
        done.returncode == 2
        and "status 2 after 0 restarts" in done.stderr
        and "the run was not fetched" in done.stderr
    )
    assert cloud.calls() == ["create", "ssh", "scp", "install", "rsync", "delete"] and cloud.machines() == []


def test_a_machine_that_cannot_be_had_is_asked_for_again(cloud: Cloud) -> None:
    (cloud.fake / "no-capacity").touch()
    done = cloud.until_done("--max-restarts=2", "nano")
    assert done.returncode == 75 and done.stderr.count("no more capacity") == 3
    assert [call for call in cloud.calls() if call != "rsync"] == ["create"] * 3


def test_an_experiment_file_goes_to_the_hosts_and_a_run_that_goes_on_is_waited_for(cloud: Cloud) -> None:
    def run_on(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        return script(name, *TPU, *cloud.settings, *words, cwd=cloud.fake, **cloud.variables)

    cloud.behave(fresh="block", resumed="0")
    for words in (
        ["create.sh", "--type=v5litepod-16"],
        ["install.sh"],
        ["run.sh", "checkout/experiments/mine.py"],
    ):
        done = run_on(*words)
        assert done.returncode == 0, done.stderr
    hosts = [cloud.fake / "tpus" / "tpu-a" / "hosts" / f"host-{number}" for number in "01"]
    assert all((host / "slmjax-job" / "mine.py").is_file() for host in hosts)
    wait_for(lambda: len(cloud.trainings()) == 2)
    assert cloud.trainings()[0].endswith(f"train slmjax-job/mine.py --run.directory {RUNS_ON_HOST}")
    assert (second := run_on("run.sh", "nano")).returncode == 2 and "running already" in second.stderr
    # until-done.sh finds it running; it is stopped, as a signal to one of the hosts would do, and resumed on
    # a new machine.
    command = ["bash", str(SCRIPTS / "until-done.sh"), *POD, *cloud.settings, "mine"]
    process = subprocess.Popen(
        command, cwd=cloud.fake, env=environment(**cloud.variables), stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: (cloud.fake / "calls").read_text().count("host.sh status") > 1)
    assert run_on("stop.sh").returncode == 0
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "tpu-a runs already" in errors and "restart 1 of" in errors, errors
    assert cloud.trainings()[2].endswith(f"train --resume {RUNS_ON_HOST}/nano-1") and cloud.machines() == []


def test_how_a_command_ended_is_kept(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    home = {"HOME": str(tmp_path)}
    job = tmp_path / "slmjax-job"

    def status() -> str:
        return script("host.sh", "status", cwd=tmp_path, **home).stdout.strip()

    def start(program: str) -> int:
        assert script("host.sh", "start", "runs", "bash", "-c", program, cwd=tmp_path, **home).returncode == 0
        group = int((job / "pid").read_text())
        request.addfinalizer(lambda: kill_group(group))
        return group

    assert status() == "slmjax-job none"
    saves = "trap 'exit 75' TERM; echo ready; while :; do sleep 0.02; done"
    group = start(saves)
    assert status() == "slmjax-job running"
    wait_for(lambda: (job / "console.log").read_text().count("ready") == 1)
    os.killpg(
        group, signal.SIGTERM
    )  # the machine shuts down: the script that waits for the command is signalled too
    wait_for(lambda: status() != "slmjax-job running")
    assert status() == "slmjax-job 75" and len(list((tmp_path / "runs").glob("console-*.log"))) == 1
    group = start(saves)
    wait_for(
        lambda: (job / "console.log").read_text().count("ready") == 2
    )  # before that the group may not be there yet
    os.killpg(group, signal.SIGKILL)
    wait_for(lambda: status() == "slmjax-job lost")


def kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
