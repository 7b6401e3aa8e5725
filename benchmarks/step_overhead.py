"""Overhead of the training loop over the compiled step: feeding, metrics, logging, progress.

    python benchmarks/step_overhead.py nano
    python benchmarks/step_overhead.py shakespeare_char --data.path FILE

In one process, in turn: some steps by the trainer's own loop, and as many calls of the same compiled step,
one after the other, on a batch that is on the device already. Prints the median over the rounds of loop /
calls - 1. Evaluations and checkpoints are no part of a step and are left out.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from typing import Any

from slmjax import startup

startup.keep_memory()

import jax  # noqa: E402
from rich.console import Console  # noqa: E402

from slmjax.cli.options import parse  # noqa: E402
from slmjax.parallel.batches import place_batch  # noqa: E402
from slmjax.runner import trainer  # noqa: E402
from slmjax.training import recipes  # noqa: E402
from slmjax.training.experiment import Experiment  # noqa: E402

ROUNDS = 15
SECONDS = 3.0  # of half a round, approximately

pairs: list[tuple[float, float]] = []
size = 0
in_loop = trainer.Loop.run


def alternating(loop: trainer.Loop, state: Any) -> tuple[Any, str]:
    """Run the loop's own steps and bare calls in turn, in place of `Loop.run`."""
    global size

    def steps(state: Any, count: int) -> Any:
        settings = loop.setup.experiment
        run = dataclasses.replace(settings.run, steps=loop.step + count)
        loop.setup = dataclasses.replace(loop.setup, experiment=dataclasses.replace(settings, run=run))
        state, _ = in_loop(loop, state)
        return jax.block_until_ready(state)

    def calls(state: Any, count: int) -> Any:
        for _ in range(count):
            state, _ = loop.setup.programs.train_step(state, placed, ())
        return jax.block_until_ready(state)

    placed = place_batch(next(loop.batches), loop.setup.mesh)
    every = loop.setup.experiment.run.log_every
    state = steps(state, every)  # compiles
    started = time.perf_counter()
    state = calls(state, every)
    size = every * max(1, round(SECONDS / (time.perf_counter() - started)))
    for index in range(ROUNDS):
        seconds = {}
        for half in (steps, calls) if index % 2 else (calls, steps):
            started = time.perf_counter()
            state = half(state, size)
            seconds[half] = time.perf_counter() - started
        pairs.append((seconds[steps], seconds[calls]))
    return state, "interrupted"


def main() -> None:
    name = sys.argv[1]
    argv = sys.argv[2:]
    experiment = parse(
        Experiment, argv, default=recipes.load_experiment(name), command=name, description=__doc__
    )
    with tempfile.TemporaryDirectory() as scratch, open(f"{scratch}/progress.txt", "w") as stream:
        far = 10**9
        experiment = dataclasses.replace(
            experiment,
            eval=dataclasses.replace(experiment.eval, every=far),
            checkpoint=dataclasses.replace(experiment.checkpoint, every=far),
            run=dataclasses.replace(experiment.run, directory=scratch, steps=100_000, sample_prompts=()),
        )
        trainer.Loop.run = alternating  # type: ignore[method-assign]
        trainer.train(experiment, console=Console(file=stream, width=200))
    overheads = sorted(loop / calls - 1 for loop, calls in pairs)
    step = statistics.median(calls for _, calls in pairs) / size
    middle = len(overheads) // 4
    print("| experiment | compiled step | overhead of the loop, median | middle half of the rounds |")
    print(
        f"| {name} | {1e3 * step:.1f} ms | {statistics.median(overheads):.1%} | {overheads[middle]:.1%} to "
        f"{overheads[-middle - 1]:.1%} |"
    )


if __name__ == "__main__":
    main()
