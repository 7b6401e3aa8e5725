"""Seconds from the command to the first step, with empty caches, prepared data, and compiled programs.

    python benchmarks/first_step.py [nano] [--rounds 3] [further options of `slmjax train`]

The process is stopped once it shows its first step. "from scratch" has empty caches; "prepared" has the
tokenized data of an earlier run and compiles; "cached" has the compiled programs too, as every further run of
the same experiment does.
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


def seconds_to_first_step(cache: Path, runs: Path, argv: list[str]) -> float:
    command = [
        sys.executable,
        "-m",
        "slmjax",
        "train",
        *argv,
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
        elapsed = next(
            (time.monotonic() - started for line in process.stdout if line.lstrip().startswith("step ")), None
        )
        process.kill()
    assert elapsed is not None, f"{' '.join(command)} ended before its first step"
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", nargs="?", default="nano")
    parser.add_argument("--rounds", type=int, default=3)
    args, options = parser.parse_known_args()
    seconds: dict[str, list[float]] = {"from scratch": [], "prepared": [], "cached": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            cache = Path(scratch) / "cache"
            runs = Path(scratch) / "runs"
            for name, measured in seconds.items():
                if name == "prepared":
                    shutil.rmtree(cache / "compiled", ignore_errors=True)
                measured.append(seconds_to_first_step(cache, runs, [args.experiment, *options]))
    print("| experiment | from scratch | data prepared | and programs compiled |")
    print(
        f"| {args.experiment} | "
        f"{' | '.join(f'{statistics.median(measured):.1f} s' for measured in seconds.values())} |"
    )


if __name__ == "__main__":
    main()
