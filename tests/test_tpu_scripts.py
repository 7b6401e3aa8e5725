"""The scripts in tpu_scripts: what they would run is as listed, and what is done on the hosts.

The lists of commands are in tests/tpu_scripts, one file per variant, with CHECKOUT for the path of this
checkout. After a change that is meant, write them anew and look at the diff:

    python -m tests.test_tpu_scripts
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from slmjax import config
from slmjax.training import recipes
from tests.fake_cloud import FAKE, POD, ROOT, SCRIPTS, TPU, environment, executable, script

GOLDEN = Path(__file__).parent / "tpu_scripts"
ALL = sorted(path.relative_to(SCRIPTS).as_posix() for path in SCRIPTS.rglob("*.sh"))
COMMANDS = [
    name for name in ALL if name not in ("common.sh", "host.sh", "slurm.sh")
]  # those that run commands elsewhere

RUNS = [*TPU, "--bucket", "gs://my-bucket"]
NFS = [*TPU, "--runs-dir", "/mnt/nfs/runs"]
GKE = [
    "--cluster",
    "my-cluster",
    "--zone",
    "us-west4-a",
    "--type",
    "v5litepod-16",
    "--bucket",
    "my-bucket",
    "--run-name",
    "first",
]
OPTIONS = ["--run.steps", "2000", "--run.sample-prompts", "def main("]
VARIANTS: dict[str, list[str]] = {
    "create": ["create.sh", *POD],
    "create-spot": ["create.sh", *POD, "--spot", "--project=my-project"],
    "create-queued": ["create.sh", *POD, "--queued"],
    "create-queued-spot": ["create.sh", *POD, "--queued", "--spot"],
    "create-version": [
        "create.sh",
        *TPU,
        "--type=v9-8",
        "--version=v2-next",
        "--create-options",
        "--network=n --internal-ips",
    ],
    "delete": ["delete.sh", *TPU],
    "delete-queued": ["delete.sh", *TPU, "--queued"],
    "install": ["install.sh", *RUNS],
    "install-wheel": ["install.sh", *NFS, "--source", "dist/slmjax-0.1.0-py3-none-any.whl"],
    "install-url": ["install.sh", *RUNS, "--source", "git+https://github.com/OWNER/slmjax"],
    "run": ["run.sh", *RUNS, "nano", *OPTIONS],
    "run-name": ["run.sh", *RUNS, "--run-name", "second", "nano"],
    "run-file": ["run.sh", *NFS, "experiments/nano_moe.py"],
    "run-resume": [
        "run.sh",
        *RUNS,
        "--resume",
        "slmjax-job/bucket/runs/tpu-a/nano-1",
        "--",
        "--run.steps",
        "4000",
    ],
    "follow": ["follow.sh", *TPU],
    "stop": ["stop.sh", *TPU],
    "fetch": ["fetch.sh", "--bucket", "my-bucket", "--run-name", "first", "--to", "here"],
    "fetch-nfs": ["fetch.sh", *NFS],
    "until-done": ["until-done.sh", *POD, "--bucket=my-bucket", "--spot", "nano", *OPTIONS],
    "until-done-queued": ["until-done.sh", *POD, "--runs-dir=/mnt/nfs/runs", "--spot", "--queued", "nano"],
    "until-done-keep": ["until-done.sh", *POD, "--bucket=my-bucket", "--keep", "nano"],
    "gke-create": ["gke/create.sh", *GKE],
    "gke-create-spot": ["gke/create.sh", *GKE, "--spot", "--project", "my-project"],
    "gke-run": ["gke/run.sh", *GKE, "nano", *OPTIONS],
    "gke-run-file": [
        "gke/run.sh",
        *GKE,
        "--source=git+https://github.com/OWNER/slmjax",
        "experiments/nano_moe.py",
    ],
    "gke-list": ["gke/list.sh", *GKE],
    "gke-follow": ["gke/follow.sh", *GKE],
    "gke-delete-workload": ["gke/delete.sh", *GKE, "workload"],
    "gke-delete-cluster": ["gke/delete.sh", *GKE, "cluster"],
    "slurm": ["slurm.sh", "nano", *OPTIONS],
}


def dry_run(words: list[str], *, cwd: Path = ROOT, **variables: str) -> str:
    done = script(words[0], "--dry-run", *words[1:], cwd=cwd, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(ROOT), "CHECKOUT")


# What the scripts would run ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def untouchable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PATH on which nothing may be called that changes anything."""
    tools = tmp_path_factory.mktemp("tools")
    for name in ("gcloud", "xpk", "kubectl", "srun", "scontrol", "mkdir", "tar", "rm", "cp", "sleep"):
        executable(tools / name, f"#!/bin/sh\necho {name} >> {tools}/called\nexit 1\n")
    yield f"{tools}:{os.environ['PATH']}"
    assert not (tools / "called").exists(), (tools / "called").read_text()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_dry_run_prints_the_listed_commands_and_does_nothing(name: str, untouchable: str) -> None:
    path = GOLDEN / f"{name}.txt"
    assert path.is_file(), f"there is no {path}: run `python -m tests.test_tpu_scripts`"
    printed = dry_run(VARIANTS[name], PATH=untouchable)
    assert printed == path.read_text(), (
        f"{name}: if the change is meant, run `python -m tests.test_tpu_scripts` and look at the diff"
    )
    for line in printed.splitlines():
        assert shlex.split(line)[0] in ("gcloud", "xpk", "kubectl", "srun", "mkdir", "tar", "rm", "cp"), line


def test_every_script_has_a_list_and_no_list_is_left_over() -> None:
    assert {words[0] for words in VARIANTS.values()} == {*COMMANDS, "slurm.sh"}
    assert {path.name for path in GOLDEN.glob("*.txt")} == {f"{name}.txt" for name in VARIANTS}


def test_variables_and_options_are_the_same_settings(tmp_path: Path) -> None:
    given = dict(
        TPU_NAME="tpu-a", TPU_ZONE="us-west4-a", TPU_TYPE="v5litepod-16", BUCKET="my-bucket", TPU_SPOT="1"
    )
    expected = (GOLDEN / "until-done.txt").read_text()
    assert dry_run(["until-done.sh", "nano", *OPTIONS], **given, TPU_QUEUED="0") == expected
    other = {**given, "TPU_NAME": "other", "RESUME": "ignored"}
    assert dry_run(["until-done.sh", "--name=tpu-a", "nano", *OPTIONS], **other) == expected
    printed = script("run.sh", "nano", cwd=tmp_path, **given, DRY_RUN="1").stdout
    assert printed.splitlines() == dry_run(["run.sh", *RUNS, "nano"], cwd=tmp_path).splitlines()


@pytest.mark.parametrize(
    "accelerator, version",
    {"v6e-8": "v2-alpha-tpuv6e", "v5p-8": "v2-alpha-tpuv5", "v4-8": "tpu-ubuntu2204-base"}.items(),
)
def test_runtime_version_of_a_type(accelerator: str, version: str) -> None:
    assert f"--version={version}\n" in dry_run(["create.sh", *TPU, "--type", accelerator])


# What is wrong is said --------------------------------------------------------------------------------------
MISSING = [
    ("create.sh", POD, "--name", "TPU_NAME"),
    ("create.sh", POD, "--zone", "TPU_ZONE"),
    ("create.sh", POD, "--type", "TPU_TYPE"),
    ("delete.sh", TPU, "--name", "TPU_NAME"),
    ("install.sh", RUNS, "--zone", "TPU_ZONE"),
    ("install.sh", RUNS, "--bucket", "BUCKET"),
    ("run.sh", RUNS, "--bucket", "BUCKET"),
    ("run.sh", NFS, "--runs-dir", "RUNS_DIR"),
    ("follow.sh", TPU, "--zone", "TPU_ZONE"),
    ("stop.sh", TPU, "--name", "TPU_NAME"),
    ("fetch.sh", ["--run-name", "a", "--bucket", "b"], "--run-name", "RUN_NAME"),
    ("fetch.sh", ["--run-name", "a", "--bucket", "b"], "--bucket", "BUCKET"),
    ("until-done.sh", [*POD, "--bucket", "b"], "--type", "TPU_TYPE"),
    ("until-done.sh", [*POD, "--bucket", "b"], "--bucket", "BUCKET"),
    ("gke/create.sh", GKE, "--bucket", "BUCKET"),
    ("gke/run.sh", GKE, "--cluster", "GKE_CLUSTER"),
    ("gke/run.sh", GKE, "--run-name", "RUN_NAME"),
    ("gke/list.sh", GKE, "--zone", "TPU_ZONE"),
    ("gke/follow.sh", GKE, "--run-name", "RUN_NAME"),
    ("gke/delete.sh", GKE, "--cluster", "GKE_CLUSTER"),
]


@pytest.mark.parametrize("name, words, option, variable", MISSING)
def test_a_missing_setting_is_named(
    name: str, words: list[str], option: str, variable: str, tmp_path: Path
) -> None:
    at = words.index(option)
    done = script(
        name,
        "--dry-run",
        *words[:at],
        *words[at + 2 :],
        "workload" if "delete" in name else "nano",
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert re.search(rf"\b{variable}\b", done.stderr) and option in done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["create.sh", *POD, "--spott"], "no option --spott"),
        (["create.sh", "--name"], "--name needs a value"),
        (["create.sh", *TPU, "--type", "v9-8"], "give --version, or set TPU_VERSION"),
        (["install.sh", *RUNS, "--source", "/nowhere"], r"SLMJAX_SOURCE \(--source\) is /nowhere"),
        (["install.sh", *RUNS, "--runs-dir", "/mnt/nfs"], "give one of them"),
        (["run.sh", *RUNS], "name an experiment"),
        (["run.sh", *TPU, "--runs-dir", "/my runs", "nano"], "no spaces"),
        (["until-done.sh", *POD, "--bucket=b"], "name an experiment"),
        (["gke/run.sh", *GKE], "name an experiment"),
        (["gke/delete.sh", *GKE], "workload or cluster"),
        (["slurm.sh"], "name an experiment"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], message: str, tmp_path: Path) -> None:
    done = script(words[0], *([] if words == ["slurm.sh"] else ["--dry-run"]), *words[1:], cwd=tmp_path)
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr


def test_help_is_the_header_and_all_settings(tmp_path: Path) -> None:
    settings = re.findall(
        r"^#   ([A-Z_]+)\S* +(--[a-z-]+)", (SCRIPTS / "common.sh").read_text(), flags=re.MULTILINE
    )
    assert len(settings) > 15
    for name in COMMANDS:
        done = script(name, "--help", cwd=tmp_path)
        assert done.returncode == 0 and f"  {name} " in done.stdout and "#" not in done.stdout, name
        assert all(f"{variable}" in done.stdout and option in done.stdout for variable, option in settings)
    for variable, option in settings:  # each is understood: the one that has no value is the last word
        if option not in ("--spot", "--queued", "--keep", "--dry-run"):
            assert (
                script("follow.sh", option, cwd=tmp_path).stderr == f"follow.sh: {option} needs a value\n"
            ), variable
    for name in ("slurm.sh", "host.sh"):
        done = script(name, "--help", cwd=tmp_path)
        assert done.returncode == 0 and f"{name} " in done.stdout and "SBATCH" not in done.stdout


# How they are written ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ALL)
def test_shellcheck_finds_nothing(name: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.is_file():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "shellcheck is not installed: it comes with the dev extra"
        )
    command = [str(shellcheck), "--external-sources", "--source-path=SCRIPTDIR", str(SCRIPTS / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert name == "common.sh" or os.access(SCRIPTS / name, os.X_OK)


def test_skypilot_task_has_known_keys_and_calls_what_is_there() -> None:
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    assert set(task) <= {
        "name",
        "workdir",
        "num_nodes",
        "resources",
        "file_mounts",
        "setup",
        "run",
        "envs",
        "secrets",
    }
    resources = task["resources"]
    assert set(resources) <= {
        "infra",
        "accelerators",
        "accelerator_args",
        "use_spot",
        "job_recovery",
        "disk_size",
        "autostop",
    }
    assert set(resources["accelerator_args"]) <= {
        "runtime_version",
        "tpu_name",
        "tpu_vm",
        "gcp_queued_resource",
    }
    assert resources["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    (place, mount), *others = task["file_mounts"].items()
    assert (
        not others
        and set(mount) <= {"name", "source", "store", "mode", "persistent"}
        and mount["mode"] == "MOUNT"
    )
    assert all(isinstance(value, str) for value in task["envs"].values())
    setup = shlex.split(task["setup"])
    run = shlex.split(task["run"])
    assert setup[:3] == ["bash", "tpu_scripts/host.sh", "install"] and run[:3] == [
        "bash",
        "tpu_scripts/host.sh",
        "train",
    ]
    assert (ROOT / setup[1]).is_file() and run[3].startswith(f"{place}/")
    assert {word.strip("$") for word in re.findall(r"\$[A-Z_]+", task["run"])} == set(task["envs"])


# On the hosts -----------------------------------------------------------------------------------------------
def make_run(
    directory: Path, *, steps: int = 10, result: dict[str, object] | None = None, code: bool = False
) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"run": {"steps": steps}}))
    if result is not None:
        (directory / "result.json").write_text(json.dumps(result))
    if code:
        (directory / "experiment.py").touch()


def found(runs: Path) -> str:
    done = script("host.sh", "find", str(runs), cwd=runs.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_newest_run_goes_on_unless_it_is_at_its_end(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert found(runs) == ""
    (runs / "killed-at-once").mkdir(parents=True)  # before it wrote its config.json
    assert found(runs) == ""
    make_run(runs / "b")
    assert found(runs) == f"--resume {runs}/b"
    make_run(runs / "a", result={"status": "interrupted", "step": 4}, code=True)
    os.utime(runs / "b" / "config.json", (1e9, 1e9))
    assert found(runs) == f"--resume {runs}/a --code {runs}/a/experiment.py"
    shutil.rmtree(runs / "a")
    make_run(runs / "a", result={"status": "finished", "step": 10})
    assert found(runs) == f"finished {runs}/a"
    shutil.rmtree(runs / "a")
    make_run(runs / "a", steps=20, result={"status": "finished", "step": 10})  # extended, then killed
    assert found(runs) == f"--resume {runs}/a"


def test_what_is_read_of_a_run_is_what_slmjax_writes() -> None:
    assert config.to_json(recipes.load_experiment("nano"))["run"]["steps"] > 0
    result = (
        (ROOT / "slmjax" / "runner" / "result.py")
        .read_text()
        .partition("class Result:")[2]
        .partition("\ndef ")[0]
    )
    assert re.search(r"^    status: str", result, flags=re.MULTILINE) and re.search(
        r"^    step: int", result, flags=re.MULTILINE
    )


def test_pods_decide_for_themselves(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    variables = {
        "FAKE": str(tmp_path),
        "HOME": str(tmp_path / "home"),
        "PATH": f"{FAKE}:{os.environ['PATH']}",
    }

    def train() -> int:
        return script(
            "host.sh", "train", str(runs), "nano", "--run.steps", "10", cwd=tmp_path, **variables
        ).returncode

    (tmp_path / "fresh").write_text("75")
    (tmp_path / "resumed").write_text("0")
    assert [train(), train(), train()] == [75, 0, 0]
    fresh, resumed = (tmp_path / "trainings").read_text().splitlines()  # the third found that all was done
    assert fresh == f"home train nano --run.steps 10 --run.directory {runs}"
    assert resumed == f"home train --resume {runs}/nano-1"


def test_slurm_resumes_and_queues_again(tmp_path: Path) -> None:
    for name in ("srun", "scontrol"):
        executable(
            tmp_path / name,
            f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n[ {name} = scontrol ] || exit "$ENDING"\n',
        )
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "4",
    }
    submitted = tmp_path / "spool" / "slurm_script"  # as Slurm does
    submitted.parent.mkdir()
    shutil.copyfile(SCRIPTS / "slurm.sh", submitted)

    def batch(ending: int, **more: str) -> tuple[int, list[str]]:
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(submitted), "nano"],
            cwd=tmp_path,
            env=environment(**variables, ENDING=str(ending), **more),
            capture_output=True,
        )
        return done.returncode, (tmp_path / "calls").read_text().splitlines() if (
            tmp_path / "calls"
        ).exists() else []

    srun = "srun --cpus-per-task=4 --kill-on-bad-exit=0 slmjax train"
    assert batch(75) == (75, [f"{srun} nano --run.directory runs/7", "scontrol requeue 7"])
    make_run(tmp_path / "runs" / "7" / "nano-1")
    assert batch(75, SLURM_RESTART_COUNT="19") == (
        75,
        [f"{srun} --resume runs/7/nano-1", "scontrol requeue 7"],
    )
    assert batch(75, SLURM_RESTART_COUNT="20") == (75, [f"{srun} --resume runs/7/nano-1"])
    assert batch(1) == (1, [f"{srun} --resume runs/7/nano-1"])
    (tmp_path / "runs" / "7" / "nano-1" / "result.json").write_text('{"status": "finished", "step": 10}')
    assert batch(1) == (0, [])


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for variant, variant_words in VARIANTS.items():
        (GOLDEN / f"{variant}.txt").write_text(dry_run(variant_words))
