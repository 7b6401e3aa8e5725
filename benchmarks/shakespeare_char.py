"""Time and loss of `shakespeare_char`, compared with the same model in eager PyTorch.

    # FILE: the tinyshakespeare text; needs the oracle extra (torch)
    python benchmarks/shakespeare_char.py FILE [--rounds 3]

Whole processes are compared, with data prepared from scratch. Both train 4 layers of width 128 for 2000 steps
of 12 rows of 64 characters, and evaluate the last tenth of the text, all of it, every 250 steps and at the
end. Prints wall seconds from start to exit and the last validation loss of each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 2000
EVERY = 250
WARMUP = 100
PEAK = 1e-3
LOWEST = 1e-4


def ours(text: Path) -> tuple[float, float]:
    """Return seconds and loss of the command, with empty caches."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "SLMJAX_CACHE": str(Path(scratch) / "cache")}
        options = ["--data.path", str(text), "--json", "--run.directory", str(Path(scratch) / "runs")]
        command = [sys.executable, "-m", "slmjax", "train", "shakespeare_char", *options]
        started = time.monotonic()
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
        )
        return time.monotonic() - started, json.loads(done.stdout)["loss"]


def theirs(text: Path) -> tuple[float, float]:
    """Return seconds and loss of the model in PyTorch: this file with `--peer`."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, str(text), "--peer"], stdout=subprocess.PIPE, text=True, check=True
    )
    return time.monotonic() - started, float(done.stdout.split()[-1])


def peer(text: Path) -> None:
    import math

    import torch
    import torch_decoder

    characters = text.read_text(encoding="utf-8")
    vocabulary = {character: index for index, character in enumerate(sorted(set(characters)))}
    ids = torch.tensor([vocabulary[character] for character in characters])
    cut = int(0.9 * len(ids))
    train = ids[:cut]
    held_out = ids[cut:]
    size = torch_decoder.SIZES["0.8m"]
    training = torch_decoder.Training(size, half=False, compiled=False, lr=PEAK)
    rows = size.rows
    length = size.length
    windows = (len(held_out) - 1) // length
    inputs, targets = (held_out[shift : shift + windows * length].view(windows, length) for shift in (0, 1))

    def evaluate() -> float:
        with torch.no_grad():
            losses = [
                training.loss(inputs[i : i + 256], targets[i : i + 256]).item() * len(inputs[i : i + 256])
                for i in range(0, windows, 256)
            ]
        return sum(losses) / windows

    loss = evaluate()
    for step in range(STEPS):
        fraction = max(step - WARMUP, 0) / (STEPS - WARMUP)
        rate = LOWEST + 0.5 * (1 + math.cos(math.pi * fraction)) * (PEAK - LOWEST)
        for group in training.optimizer.param_groups:
            group["lr"] = min((step + 1) / (WARMUP + 1), 1.0) * rate
        starts = torch.randint(len(train) - length - 1, (rows,))
        batch = torch.stack([train[start : start + length + 1] for start in starts])
        training.step(batch[:, :-1], batch[:, 1:])
        if (step + 1) % EVERY == 0:
            loss = evaluate()
    print(loss)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args.text)
    pairs = [(ours(args.text), theirs(args.text)) for _ in range(args.rounds)]
    print("| variant | seconds, median | validation loss, median |")
    for name, side in zip(("slmjax", "PyTorch, eager"), zip(*pairs, strict=True), strict=True):
        seconds, losses = zip(*side, strict=True)
        print(f"| {name} | {statistics.median(seconds):.0f} | {statistics.median(losses):.4f} |")
    return None


if __name__ == "__main__":
    main()
