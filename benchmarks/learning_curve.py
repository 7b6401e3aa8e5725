"""The picture of the README: held-out bits per byte of a run over its training, beside gzip and xz.

pip install -e '.[plot]'
python benchmarks/learning_curve.py RUN_DIR docs/nano.svg
"""

import json
import sys
from pathlib import Path

import matplotlib

from slmjax.runlog import read_log

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402  # the backend is chosen first


def main(run_dir: Path, picture: Path) -> None:
    result = json.loads((run_dir / "result.json").read_text())
    training = read_log(run_dir / "log.jsonl", kind="train")
    held_out = read_log(run_dir / "log.jsonl", kind="eval")
    pyplot.rcParams |= {"svg.hashsalt": "slmjax", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = pyplot.subplots(figsize=(7.2, 3.0), layout="constrained")
    figure.patch.set_facecolor("white")
    axes.plot(*columns(training), color="#b8c4d6", label="training batches")
    axes.plot(*columns(held_out), color="#1f4e9c", marker="o", markersize=4, label="held-out text")
    for (name, bits), style in zip(result["compressors"].items(), ("--", ":"), strict=True):
        axes.axhline(bits, color="#8a5a00", linestyle=style, linewidth=1, label=f"{name} of the same text: {bits:.2f}")
    highest = max(row["bits_per_byte"] for row in held_out)
    axes.set(xlabel="steps", ylabel="bits per byte", ylim=(0, 1.6 * highest))
    sizes = f"{result['parameters'] / 1e6:.1f}M parameters, {result['tokens'] / 1e6:.2f}M tokens"
    axes.set_title(f"{sizes}, {result['bits_per_byte']:.2f} bits per byte at the end", loc="left")
    axes.legend(frameon=False, ncols=2)
    figure.savefig(picture, metadata={"Date": None})


def columns(rows: list[dict]) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [row["bits_per_byte"] for row in rows]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
