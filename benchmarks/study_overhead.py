"""Overhead of the study machinery over bare training: claims, heartbeats, records and the queue.

    python benchmarks/study_overhead.py nano --run.steps 200
    python benchmarks/study_overhead.py experiments/nano_moe.py --rounds 20 --run.steps 100

In one process, in turn: a run by `trainer.train`, and the same run (experiment and seed) as a member of a
study by `run_study`, as a worker with a claim and a sign of life every second, 30 times as often as by
default. Each round begins with the other one. The study has a seed more in every round, so that its queue and
its records grow as in a long study. Prints the median over the rounds of member / bare - 1 in seconds of wall
time, with the middle half of the rounds and a 95 % interval of the geometric mean (Student's t on the
logarithms of the ratios), and the median in seconds of processor time, in which other programs on the same
cores count for little, but neither does waiting. The first round compiles and is left out.
"""

import dataclasses
import io
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.stats

from slmjax import startup

startup.keep_memory()

import jax  # noqa: E402
from rich.console import Console  # noqa: E402

from slmjax.cli.options import parse  # noqa: E402
from slmjax.runner import trainer  # noqa: E402
from slmjax.studies import Arm, Lease, Study, run_study  # noqa: E402
from slmjax.training import recipes  # noqa: E402
from slmjax.training.experiment import Experiment  # noqa: E402

LEASE = Lease(seconds=30, heartbeat=1)


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Return the wall time of a call, and the processor time of this process during it."""
    started = time.perf_counter()
    used = time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - used


def measure(experiment: Experiment, *, rounds: int, scratch: Path) -> np.ndarray:
    """Return seconds [round, (member, bare run), (wall time, processor time)]."""
    quiet = Console(file=io.StringIO())
    pairs = []
    for seed in range(rounds + 1):
        run = dataclasses.replace(experiment.run, seed=seed, directory=str(scratch / "bare"))
        data = dataclasses.replace(experiment.data, seed=seed)
        alone = dataclasses.replace(experiment, run=run, data=data)
        arms = (Arm(name="arm", experiment=experiment),)
        study = Study(name="overhead", arms=arms, seeds=tuple(range(seed + 1)), baseline="arm")

        def bare(alone: Experiment = alone) -> None:
            trainer.train(alone, console=quiet)

        def member(study: Study = study) -> None:
            run_study(study, scratch / "study", console=quiet, worker=True, lease=LEASE)

        order = (bare, member) if seed % 2 else (member, bare)
        seconds = {work: seconds_of(work) for work in order}
        pairs.append((seconds[member], seconds[bare]))
    return np.array(pairs[1:])


def main() -> None:
    """Measure and print a row of benchmarks/RESULTS.md."""
    name = sys.argv[1]
    argv = sys.argv[2:]
    rounds = 15
    if "--rounds" in argv:
        at = argv.index("--rounds")
        rounds = int(argv[at + 1])
        argv = argv[:at] + argv[at + 2 :]
    experiment = parse(
        Experiment, argv, default=recipes.load_experiment(name), command=name, description=__doc__
    )
    with tempfile.TemporaryDirectory() as scratch:
        seconds = measure(experiment, rounds=rounds, scratch=Path(scratch))
    ratios = seconds[:, 0, 0] / seconds[:, 1, 0]
    of_processor = np.median(seconds[:, 0, 1] / seconds[:, 1, 1]) - 1
    logs = np.log(ratios)
    half = scipy.stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)) - 1
    bare = np.median(seconds[:, 1, 0])
    print(
        "| experiment | device | bare run | overhead, median | middle half | mean, 95 % interval | "
        "in processor time |"
    )
    print(
        f"| {name}, {experiment.run.steps} steps, {rounds} rounds | {jax.devices()[0].device_kind} | "
        f"{bare:.2f} s | {middle:.1%} | {low:.1%} to {high:.1%} | {math.expm1(logs.mean()):.1%}, "
        f"{math.expm1(logs.mean() - half):.1%} to {math.expm1(logs.mean() + half):.1%} | {of_processor:.1%} |"
    )


if __name__ == "__main__":
    main()
