"""A cloud of folders: what the scripts in tpu_scripts are run against.

`tests/tpu_scripts/fake` holds its gcloud, and what the hosts have: an old Python with pip and uv, a gcsfuse,
and a slmjax that is "installed" and does as a test asks.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "tpu_scripts"
FAKE = Path(__file__).parent / "tpu_scripts" / "fake"

TPU = ["--name", "tpu-a", "--zone", "us-west4-a"]
POD = [*TPU, "--type", "v5litepod-16"]


def environment(**more: str) -> dict[str, str]:
    """No setting of whoever runs the tests."""
    return {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "LC_ALL": "C.UTF-8", **more}


def script(name: str, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPTS / name), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=60
    )


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """Folders for TPU VMs, their hosts and buckets, and a gcloud that knows no others."""

    def __init__(self, fake: Path) -> None:
        self.fake = fake
        self.settings = ["--bucket=my-bucket", "--poll-seconds=0.05", f"--source={fake}/checkout"]
        self.variables = {"PATH": f"{fake}/bin:{os.environ['PATH']}", "FAKE": str(fake)}
        (fake / "bin").mkdir()
        executable(fake / "bin" / "gcloud", f'#!/bin/sh\nexec {sys.executable} -IS {FAKE}/gcloud "$@"\n')
        source = fake / "checkout"
        for path in ("pyproject.toml", "README.md", "LICENSE", "slmjax/__init__.py", "experiments/mine.py"):
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).touch()
        self.behave(fresh="0", resumed="0")

    def behave(self, *, fresh: str, resumed: str, preempted_at_look: int = 0) -> None:
        """How trainings end, and which look at the status, from 1, finds the hosts gone (once all have
        begun).
        """
        for name, text in (("fresh", fresh), ("resumed", resumed), ("looks", str(preempted_at_look))):
            (self.fake / name).write_text(text)

    def until_done(self, *words: str) -> subprocess.CompletedProcess[str]:
        settings = [*POD, "--spot", "--to=fetched", *self.settings]
        return script(
            "until-done.sh",
            *settings,
            *(words or ("nano", "--run.steps", "10")),
            cwd=self.fake,
            **self.variables,
        )

    def calls(self) -> list[str]:
        """What was done, in words: looks at states and statuses are left out."""
        done = []
        for line in (self.fake / "calls").read_text().splitlines():
            words = shlex.split(line)
            command = next((word.partition("=")[2] for word in words if word.startswith("--command=")), "")
            on_host = re.match(r"bash slmjax-job/host.sh (\w+)", command)
            verb = on_host[1] if on_host else words[3] if words[0] == "compute" else words[1]
            if verb not in ("describe", "status"):
                done.append("resume" if " --resume " in command else verb)
        return done

    def trainings(self) -> list[str]:
        path = self.fake / "trainings"
        return path.read_text().splitlines() if path.exists() else []

    def machines(self) -> list[str]:
        return [path.name for path in (self.fake / "tpus").iterdir()]
