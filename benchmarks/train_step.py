"""The training step beside PyTorch's: the same model, batch and optimizer, each in a process of its own, in turn on the same cores.

    python benchmarks/train_step.py                       # 12M decoder; needs the oracle extra (torch)
    python benchmarks/train_step.py --size 0.8m --compile
    python benchmarks/train_step.py --size 124m --compile # on a GPU: tokens per second and model FLOPs utilisation of both

Prints for float32 and bfloat16 the milliseconds of a step, minimum and median over the rounds, and the ratio of the
medians: above 1, ours is faster. The step is the trainer's own, with its metrics and gradient norms.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

VARIANTS = ("slmjax", "eager", "compiled")


def our_step(size: str, dtype: str) -> Callable[[], None]:
    from slmjax import startup

    startup.keep_memory()
    import jax
    import numpy as np

    from slmjax import optim, sharding, step, zoo
    from slmjax.data.batch import empty_batch
    from slmjax.model import Precision
    from slmjax.parameters import define

    rows, length = {"12m": (8, 256), "0.8m": (12, 64), "124m": (32, 1024)}[size]
    built = {"12m": zoo.slm_12m(), "0.8m": zoo.shakespeare_char(vocab_size=128), "124m": zoo.slm_124m()}[size]
    import dataclasses

    definition = define(dataclasses.replace(built, precision=Precision(dtype)))
    mesh = sharding.make_mesh(sharding.MeshConfig())
    config = optim.OptimConfig(warmup_steps=2)
    optimizer = optim.make_optimizer(config, definition.params, total_steps=10_000)
    shapes = step.state_shapes(definition, optimizer, with_ema=False, mesh=mesh)
    with jax.set_mesh(mesh):
        state = step.init_state(definition, optimizer, shapes=shapes, seed=0)
        train_step = step.make_train_step(
            definition, optimizer, objective=step.ObjectiveConfig(), optim=config, shapes=shapes, total_steps=10_000
        )
        batch = empty_batch(rows, length)
        batch.tokens[:] = np.random.default_rng(0).integers(2, definition.config.known_vocab_size, batch.tokens.shape)
        batch.targets[:] = np.roll(batch.tokens, -1, axis=1)
        batch.loss_mask[:], batch.segment_ids[:], batch.num_bytes[:] = 1, 1, 3
        batch.positions[:] = np.arange(length)
        placed = sharding.place_batch(batch, mesh)

    def run() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, placed)
            jax.block_until_ready((state, metrics))

    return run


def their_step(size: str, dtype: str, *, compiled: bool) -> Callable[[], None]:
    import torch
    import torch_decoder

    shape = torch_decoder.SIZES[size]
    training = torch_decoder.Training(shape, half=dtype == "bfloat16", compiled=compiled)
    tokens = torch.randint(0, shape.vocab, (shape.rows, shape.length), device=training.device)

    def run() -> None:
        training.step(tokens, tokens.roll(-1, 1)).item()

    return run


def work(variant: str, size: str, dtype: str) -> None:
    """A worker: prints the seconds of a step for each line that it reads."""
    run = our_step(size, dtype) if variant == "slmjax" else their_step(size, dtype, compiled=variant == "compiled")
    for _ in range(3):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        run()
        print(time.perf_counter() - started, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("12m", "0.8m", "124m"), default="12m")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--python", default=sys.executable, help="interpreter of slmjax's side, for another version of jax")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(given.worker, given.size, given.dtypes[0])
    print("| dtype | variant | ms, lowest | ms, median | its median over slmjax's |")
    for dtype in given.dtypes:
        compare(given.size, dtype, given.rounds, VARIANTS if given.compile else VARIANTS[:2], python=given.python)
    return None


def compare(size: str, dtype: str, rounds: int, variants: tuple[str, ...], *, python: str) -> None:
    workers = {}
    for variant in variants:
        command = [python if variant == "slmjax" else sys.executable, __file__, "--worker", variant, "--size", size, "--dtypes", dtype]
        workers[variant] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert read(workers[variant]) == "ready", f"{variant} did not start"
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, worker in workers.items():
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
            seconds[variant].append(float(read(worker)))
    for worker in workers.values():
        worker.kill()
    ours = statistics.median(seconds["slmjax"])
    for variant, found in seconds.items():
        median = statistics.median(found)
        print(f"| {dtype} | {variant} | {1e3 * min(found):.1f} | {1e3 * median:.1f} | {median / ours:.2f} |")


def read(worker: "subprocess.Popen[str]") -> str:
    assert worker.stdout is not None
    return next((line.strip() for line in worker.stdout if line.strip() == "ready" or line[:1].isdigit()), "")


if __name__ == "__main__":
    main()
