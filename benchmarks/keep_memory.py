"""Gain of `startup.keep_memory`: the training step of `nano` on CPU with and without it.

python benchmarks/keep_memory.py [ROUNDS]       # prints one row of the table in RESULTS.md

Both run in turn, each in a new process.
"""

import dataclasses
import statistics
import subprocess
import sys
import time

NUM_STEPS = 10


def step_seconds(keep: bool) -> float:
    """Return the median seconds of a step in this process, which must not have imported jax."""
    from slmjax.startup import keep_memory

    if keep and not keep_memory():
        sys.exit("this C library has no mallopt: there is nothing to compare")
    import jax
    import numpy as np

    from slmjax.data.batch import empty_batch
    from slmjax.models.definition import define
    from slmjax.parallel.batches import place_batch
    from slmjax.parallel.mesh import MeshConfig, make_mesh
    from slmjax.training import recipes
    from slmjax.training.optim import make_optimizer
    from slmjax.training.state import init_state, state_shapes
    from slmjax.training.step import make_train_step

    nano = recipes.nano()
    mesh = make_mesh(MeshConfig())
    rows = nano.data.batch_size
    length = nano.data.sequence_length
    vocab = 2048
    batch = empty_batch(rows, length)
    batch.tokens[:] = np.random.default_rng(0).integers(0, vocab, (rows, length))
    batch.targets[:] = batch.tokens
    batch.loss_mask[:] = 1
    batch.segment_ids[:] = 1
    batch.positions[:] = np.arange(length)
    with jax.set_mesh(mesh):
        definition = define(dataclasses.replace(nano.model, vocab_size=vocab))
        optimizer = make_optimizer(nano.optim, definition.params, total_steps=nano.run.steps)
        shapes = state_shapes(definition, optimizer, with_ema=False, mesh=mesh)
        state = init_state(definition, optimizer, shapes=shapes, seed=0)
        step = make_train_step(
            definition,
            optimizer,
            objective=nano.objective,
            optim=nano.optim,
            shapes=shapes,
            total_steps=nano.run.steps,
        )
        seconds = []
        for _ in range(NUM_STEPS + 1):  # the first compiles
            started = time.perf_counter()
            state, metrics = step(state, place_batch(batch, mesh))
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(step_seconds(keep=sys.argv[2] == "keep"))
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    pairs = []
    for _ in range(rounds):
        commands = [[sys.executable, __file__, "--one", how] for how in ("keep", "default")]
        pairs.append(
            [
                float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                for command in commands
            ]
        )
    ratios = [kept / default for kept, default in pairs]
    kept, default = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"| {1000 * kept:.0f} ms | {1000 * default:.0f} ms | {statistics.median(ratios):.2f} (of {rounds} "
        "pairs: "
        f"{min(ratios):.2f} to {max(ratios):.2f}) |"
    )


if __name__ == "__main__":
    main()
