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
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from slmjax import config
from slmjax.training import recipes
from tests.fake_cloud import FAKE, POD, ROOT, SCRIPTS, TPU, environment, executable, script

GOLDEN = Path(__file__).parent / "tpu_scripts"
ALL = sorted(path.relative_to(SCRIPTS).as_posix() for path in SCRIPTS.rglob("*.sh"))
LOCAL = ("slurm.sh", "slurm-workers.sh", "workers.sh")  # those that start processes where they are
COMMANDS = [
    name for name in ALL if name not in ("common.sh", "host.sh", *LOCAL)
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
PODS = ["--run-name=rates", "--workers=8", "--image=registry/slmjax:1", "--claim", "runs"]
POOL = ["--run-name", "rates", "--workers", "3", "--nfs", "10.0.0.2:/share"]
STUDY = "experiments/qat_study.py"
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
    "slurm-workers": ["slurm-workers.sh", STUDY, "--budget", "large"],
    "workers-chip": ["workers.sh", "--per", "chip", "--workers", "4", STUDY],
    "workers-gpu": ["workers.sh", "--per=gpu", "--workers=2", STUDY, "--directory", "/my runs"],
    "workers-cpu": ["workers.sh", "--per", "cpu", "--workers", "3", "runs/studies/rates"],
    "run-workers": ["run-workers.sh", *NFS, "--run-name", "rates", STUDY, "--budget", "large"],
    "run-workers-directory": ["run-workers.sh", *NFS, "/mnt/nfs/runs/rates"],
    "gke-run-workers": ["gke/run-workers.sh", *PODS, STUDY, "--only", 'a "good" arm', "--budget=a|b&c"],
    "gke-run-workers-queue": ["gke/run-workers.sh", *PODS, "--queue", "research", STUDY],
    "skypilot-workers": ["skypilot-workers.sh", *POOL, STUDY, "--budget", "large"],
}


TOOLS = ("gcloud", "xpk", "kubectl", "sky", "srun", "mkdir", "tar", "rm", "cp")


def dry_run(words: list[str], *, cwd: Path = ROOT, **variables: str) -> str:
    done = script(words[0], "--dry-run", *words[1:], cwd=cwd, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(ROOT), "CHECKOUT")


# What the scripts would run ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def untouchable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PATH on which nothing may be called that changes anything."""
    tools = tmp_path_factory.mktemp("tools")
    for name in (*TOOLS, "scontrol", "sleep", "slmjax"):
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
        assert shlex.split(line)[0] in (*TOOLS, "env", "bash", "sed"), line


def test_every_script_has_a_list_and_no_list_is_left_over() -> None:
    assert {words[0] for words in VARIANTS.values()} == {*COMMANDS, *LOCAL}
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
    ("run-workers.sh", NFS, "--runs-dir", "RUNS_DIR"),
    ("skypilot-workers.sh", POOL, "--nfs", "NFS"),
    ("skypilot-workers.sh", POOL, "--workers", "WORKERS"),
    ("gke/run-workers.sh", PODS, "--claim", "RUNS_CLAIM"),
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
        (["slurm-workers.sh"], "name a study"),
        (["workers.sh"], "name a study"),
        (["workers.sh", "--per", "tpu", STUDY], "give chip, gpu or cpu"),
        (["workers.sh", "--per", "gpu", "--workers", "0", STUDY], "there is no gpu for a worker"),
        (["workers.sh", "--workers"], "--workers needs a value"),
        (["run-workers.sh", *RUNS, STUDY], "workers cannot claim work in a bucket"),
        (["run-workers.sh", *NFS], "name a study"),
        (["gke/run-workers.sh", *PODS], "name a study"),
        (["skypilot-workers.sh", *POOL], "name a study"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], message: str, tmp_path: Path) -> None:
    is_local = words[0] in LOCAL
    done = script(words[0], *([] if is_local else ["--dry-run"]), *words[1:], cwd=tmp_path)
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
    for name in (*LOCAL, "host.sh"):
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


# Workers of studies -----------------------------------------------------------------------------------------
def run_in_tools(tmp_path: Path, *tools: str) -> dict[str, str]:
    """A PATH whose tools note how they are called, in the file `calls`."""
    for name in tools:
        executable(tmp_path / name, f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n')
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_the_job_of_kubernetes_is_filled_in(tmp_path: Path) -> None:
    scripts = tmp_path / "checkout" / "tpu_scripts"
    shutil.copytree(SCRIPTS, scripts)
    words = ["--queue", "research", STUDY, "--only", 'a "good" arm', "--budget=a|b&c"]
    done = subprocess.run(
        ["bash", str(scripts / "gke" / "run-workers.sh"), *PODS, *words],
        env=environment(**run_in_tools(tmp_path, "kubectl")),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / "checkout" / "dist" / "gke" / "rates.yaml"
    assert (tmp_path / "calls").read_text() == f"kubectl apply --filename={path}\n"
    job = yaml.safe_load(path.read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["metadata"] == {"name": "rates", "labels": {"kueue.x-k8s.io/queue-name": "research"}}
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 8, 8)
    # A rule that fails an index needs a limit per index, and pods that are not started again in place.
    assert spec["backoffLimitPerIndex"] == 20 and spec["template"]["spec"]["restartPolicy"] == "Never"
    actions = [rule["action"] for rule in spec["podFailurePolicy"]["rules"]]
    assert actions == ["Ignore", "Count", "FailIndex"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["image"] == "registry/slmjax:1"
    assert container["command"] == ["slmjax", "ablate", *words[2:], "--directory", "/runs/rates", "--worker"]
    (volume,) = spec["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"] == {"claimName": "runs"}
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/runs"}]
    assert not re.findall(r"\b[A-Z]+_[A-Z]+\b", json.dumps({**job, "spec": {**spec, "template": {}}}))


def test_the_pool_of_skypilot_runs_what_is_there() -> None:
    pool = yaml.safe_load((SCRIPTS / "skypilot-pool.yaml").read_text())
    worker = yaml.safe_load((SCRIPTS / "skypilot-worker.yaml").read_text())
    # SkyPilot allows a pool no command, and its jobs neither a setup nor files.
    assert set(pool) == {"pool", "workdir", "resources", "envs", "setup"} and pool["pool"] == {"workers": 1}
    assert set(worker) == {"name", "resources", "envs", "run"}
    assert worker["resources"]["accelerators"] == pool["resources"]["accelerators"]
    run = shlex.split(worker["run"])
    assert run[1:3] == ["bash", "tpu_scripts/workers.sh"] and (ROOT / run[2]).is_file()
    names = {word.strip("$") for word in re.findall(r"\$[A-Z_]+", worker["run"])} - {"HOME", "PATH"}
    assert names == set(worker["envs"]) and (ROOT / worker["envs"]["STUDY"]).is_file()


def test_workers_end_with_the_status_that_matters(tmp_path: Path) -> None:
    (tmp_path / "statuses").write_text("")
    executable(
        tmp_path / "slmjax",
        f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $SLMJAX_DISTRIBUTED $*" >> {tmp_path}/calls\n'
        f"exit $(sed -n $((CUDA_VISIBLE_DEVICES + 1))p {tmp_path}/statuses)\n",
    )
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0,1,2"}

    def status(*statuses: int) -> int:
        (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        return script("workers.sh", "--per", "gpu", "study.py", cwd=tmp_path, **variables).returncode

    assert [status(0, 0, 0), status(1, 0, 75), status(2, 0, 1)] == [0, 75, 2]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sorted(calls[:3]) == [f"{index} off ablate study.py --worker" for index in range(3)]


def test_a_signal_reaches_every_worker_once_and_the_job_queues_again(tmp_path: Path) -> None:
    variables = run_in_tools(tmp_path, "scontrol")
    executable(
        tmp_path / "slmjax",
        "#!/bin/bash\n"
        f"trap 'echo stopped >> {tmp_path}/calls; exit 75' TERM\n"
        f"echo started >> {tmp_path}/calls\n"
        "while :; do sleep 0.05; done\n",
    )
    variables |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "9", "CUDA_VISIBLE_DEVICES": "4,5"}
    variables |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    job = subprocess.Popen(
        ["bash", str(SCRIPTS / "slurm-workers.sh"), "study.py"], cwd=tmp_path, env=environment(**variables)
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "calls").exists() or (tmp_path / "calls").read_text().count("started") < 2:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    job.terminate()
    assert job.wait(timeout=60) == 75
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["started", "started", "stopped", "stopped", "scontrol requeue 7_2"]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for variant, variant_words in VARIANTS.items():
        (GOLDEN / f"{variant}.txt").write_text(dry_run(variant_words))
