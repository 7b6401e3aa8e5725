"""The default experiment as `make train` runs it after installation, with empty caches.

    python benchmarks/train_nano.py          # prints one row of the table in RESULTS.md

The row has the wall time of the process from start to exit, with data preparation, compilation, evaluation
and samples, and the held-out bits per byte next to those of gzip -9 and xz -9 on the same text.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "SLMJAX_CACHE": str(Path(scratch) / "cache")}
        command = [
            sys.executable,
            "-m",
            "slmjax",
            "train",
            "nano",
            "--json",
            "--run.directory",
            str(Path(scratch) / "runs"),
            *sys.argv[1:],
        ]
        started = time.monotonic()
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.monotonic() - started
    result = json.loads(done.stdout)
    compressors = " | ".join(f"{name} {bits:.3f}" for name, bits in result["compressors"].items())
    spent = ", ".join(
        f"{name} {part:.0f} s" for name, part in result["session_seconds_by_category"].items() if part >= 1
    )
    size = f"{result['parameters']:,} parameters, {result['step']} steps, {result['run_tokens']:,} tokens"
    quality = f"{result['bits_per_byte']:.3f} bits per byte | {compressors}"
    speed = f"{result['session_tokens_per_second']:,.0f} tokens/s"
    print(f"| nano, {size} | {seconds:.0f} s in all ({spent}) | {speed} | {quality} |")


if __name__ == "__main__":
    main()
