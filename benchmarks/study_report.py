"""Time and size of the report of a study with 50 runs: less than 10 seconds, and pages of less than 5 MB.

    python benchmarks/study_report.py [--arms 10 --seeds 5 --steps 2000] [--directory DIR]

The runs are synthetic: run directories with the files and log records of a training, one record a step and
20 evaluations. The time is that of `slmjax report STUDY_DIR` in this process, without its imports: reading
all logs, drawing the page and the picture of the verdicts, writing all files. It is measured with an empty
cache, as for the first report on a machine, and again; the seconds of the processor do not depend on what
else the machine does.
"""

import argparse
import dataclasses
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from slmjax import config
from slmjax.studies.design import Budget
from slmjax.studies.findings import analyze_members, write_findings
from slmjax.studies.questions import Question
from slmjax.studies.report import study_report, write_report_files
from slmjax.studies.statistics.results_table import Rules
from slmjax.studies.study import MEMBERS, Member
from slmjax.telemetry.report.charts import drawing_code
from slmjax.telemetry.run_directory import RunLog
from slmjax.training.recipes import nano

MOST_SECONDS = 10
MOST_BYTES = 5_000_000
EVALUATIONS = 20


def write_study(directory: Path, *, arms: int, seeds: int, steps: int) -> None:
    """Write run directories, members.jsonl and findings.json as a study leaves them."""
    generator = random.Random(0)
    names = tuple(f"{2 + arm} layers of {128 - 4 * arm}" for arm in range(arms))
    members = []
    directory.mkdir(parents=True, exist_ok=True)
    with RunLog(directory / MEMBERS) as log:
        for seed in range(seeds):
            for arm, name in enumerate(names):
                member = _write_run(directory, name, arm, seed, steps=steps, generator=generator)
                log.write("member", **member)
                members.append(Member(**member))
    question = Question(
        name="synthetic",
        text="Does the depth of a model matter?",
        arms=names,
        seeds=tuple(range(seeds)),
        baseline=names[0],
        metric="bits_per_byte",
        further_metrics=("calibration_error",),
        budget=Budget(),
        rules=Rules(equal_within=0.005),
    )
    write_findings(analyze_members(question, members), directory)


def _write_run(
    directory: Path, name: str, arm: int, seed: int, *, steps: int, generator: random.Random
) -> dict[str, Any]:
    run = directory / name.replace(" ", "-") / f"seed-{seed}" / f"nano-{arm}-{seed}"
    run.mkdir(parents=True)
    settings = config.to_json(nano())
    settings["optim"]["lr"] = 1e-3 * (1 + arm)
    (run / "config.json").write_text(json.dumps(settings))
    environment = {"python": "3.11", "packages": {"jax": "0.10.2"}, "devices": ["cpu"], "commit": "c0ffee"}
    (run / "environment.json").write_text(json.dumps(environment))
    final = 1.7 - 0.01 * arm + generator.gauss(0, 0.004)
    records = []
    for step in range(1, steps + 1):
        bits = final + 4 / (1 + step / 40)
        record = {"time": float(step), "step": step, "loss": bits + generator.gauss(0, 0.05)}
        record |= {"learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1e4, "mfu": 0.3}
        record |= {"data_wait_share": 0.01, "total_tokens": 2048 * step, "skipped": 0}
        record["grad_norms"] = {f"layers/{layer}": 0.1 for layer in range(8)}
        records.append({"kind": "train", **record})
        if step % (steps // EVALUATIONS) == 0:
            evaluation = {"time": float(step), "step": step, "loss": bits, "bits_per_byte": bits}
            records.append({"kind": "eval", **evaluation, "documents": 100})
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = {"status": "finished", "step": steps, "loss": final, "bits_per_byte": final}
    result |= {"run_tokens": 2048 * steps, "run_seconds": 60.0, "session_tokens_per_second": 1e4}
    result |= {"parameters": 600_000 + 1000 * arm, "run_dir": str(run), "commit": "c0ffee"}
    result["calibration_error"] = 0.01 + abs(generator.gauss(0, 0.001))
    (run / "result.json").write_text(json.dumps(result))
    about = {"arm": name, "seed": seed, "fingerprint": "0", "status": "finished"}
    return {**about, "result": result, "evaluation": {}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One report."""

    reading: float  # seconds
    writing: float
    processor: float  # seconds of the processor in all
    sizes: dict[str, int]  # bytes of each file


def measure(directory: Path) -> Measured:
    """Measure reading the study and writing its files."""
    begin = time.perf_counter()
    processor = time.process_time()
    report = study_report(directory)
    middle = time.perf_counter()
    page = write_report_files(report, directory)
    end = time.perf_counter()
    processor = time.process_time() - processor
    names = ("report.html", "report.json", "report.md", "report.tex", "report.csv", "verdicts.svg")
    sizes = {name: (page.parent / name).stat().st_size for name in names}
    return Measured(reading=middle - begin, writing=end - middle, processor=processor, sizes=sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arms", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--directory", type=Path, help="where to leave the study (none: nowhere)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["SLMJAX_CACHE"] = str(Path(temporary) / "cache")
        directory = args.directory or Path(temporary) / "study"
        write_study(directory, arms=args.arms, seeds=args.seeds, steps=args.steps)
        first = measure(directory)
        drawing_code.cache_clear()
        again = measure(directory)
    print(f"{args.arms * args.seeds} runs of {args.steps:,} steps, at most {MOST_SECONDS} s:")
    for name, measured in (("first report", first), ("second", again)):
        seconds = measured.reading + measured.writing
        print(
            f"  {name}: {measured.reading:.1f} s to read, {measured.writing:.1f} s to draw and write, ",
            end="",
        )
        print(f"{seconds:.1f} s in all, {measured.processor:.1f} s of the processor")
    for name, size in first.sizes.items():
        print(f"  {name}: {size:,} bytes")
    is_small = first.sizes["report.html"] <= MOST_BYTES
    print(f"page of at most {MOST_BYTES:,} bytes: {'yes' if is_small else 'NO'}")
    assert is_small and first.processor < MOST_SECONDS


if __name__ == "__main__":
    main()
