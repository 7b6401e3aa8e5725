"""Seconds from the command to the first step, as a person waits for it: everything anew, the data prepared,
programs compiled.

    python benchmarks/first_step.py [nano] [--rounds 3] [further options of `slmjax train`]

The process is stopped once it shows its first step. "anew" has empty caches; "prepared" finds the tokenized
data of an earlier run and compiles; "cached" finds compiled programs too, as every further run of the same
experiment does.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def seconds_to_first_step(cache: Path, runs: Path, words: list[str]) -> float:
    command = [
        sys.executable,
        "-m",
        "slmjax",
        "train",
        *words,
        "--run.log-every",
        "1",
        "--run.directory",
        str(runs),
    ]
    environment = {**os.environ, "SLMJAX_CACHE": str(cache)}
    started = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        found = next(
            (time.monotonic() - started for line in process.stdout if line.lstrip().startswith("step ")), None
        )
        process.kill()
    assert found is not None, f"{' '.join(command)} ended before its first step"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", nargs="?", default="nano")
    parser.add_argument("--rounds", type=int, default=3)
    given, options = parser.parse_known_args()
    seconds: dict[str, list[float]] = {"anew": [], "prepared": [], "cached": []}
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            cache = Path(scratch) / "cache"
            runs = Path(scratch) / "runs"
            for name, found in seconds.items():
                if name == "prepared":
                    shutil.rmtree(cache / "compiled", ignore_errors=True)
                found.append(seconds_to_first_step(cache, runs, [given.experiment, *options]))
    print("| experiment | anew | data prepared | and programs compiled |")
    print(
        f"| {given.experiment} | "
        f"{' | '.join(f'{statistics.median(found):.1f} s' for found in seconds.values())} |"
    )


if __name__ == "__main__":
    main()
