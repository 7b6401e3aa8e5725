"""The training step, compared with PyTorch's: the same model, batch and optimizer.

    python benchmarks/train_step.py                       # 12M decoder; needs the oracle extra (torch)
    python benchmarks/train_step.py --size 0.8m --compile
    # on a GPU: SmolLM2-360M's shape; also 124m, 1.7b
    python benchmarks/train_step.py --size 360m --compile --dtypes bfloat16

Each runs in a process of its own, in turn on the same cores. Prints for float32 and bfloat16 the milliseconds
of a step, minimum and median over the rounds, and the ratio of the medians (above 1, slmjax is faster); and
tokens per second and model FLOPs utilisation. The step is the trainer's own, with its metrics and gradient
norms.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slmjax.models.architecture import ModelConfig

VARIANTS = ("slmjax", "eager", "compiled")
BATCHES = {
    "12m": (8, 256),
    "0.8m": (12, 64),
    "124m": (32, 1024),
    "360m": (8, 2048),
    "1.7b": (4, 2048),
}  # as in torch_decoder.py


def model_of(size: str) -> "ModelConfig":
    from slmjax.models import zoo

    models = {"12m": zoo.slm_12m, "124m": zoo.slm_124m, "360m": zoo.smollm2_360m, "1.7b": zoo.smollm2_1_7b}
    return zoo.shakespeare_char(vocab_size=128) if size == "0.8m" else models[size]()


def our_step(size: str, dtype: str) -> Callable[[], None]:
    from slmjax import startup

    startup.keep_memory()
    import dataclasses

    import jax
    import numpy as np

    from slmjax.data.batch import empty_batch
    from slmjax.models.architecture import Precision
    from slmjax.models.definition import define
    from slmjax.parallel.batches import place_batch
    from slmjax.parallel.mesh import MeshConfig, make_mesh
    from slmjax.training import optim, step
    from slmjax.training.objective import ObjectiveConfig
    from slmjax.training.state import init_state, state_shapes

    rows, length = BATCHES[size]
    built = model_of(size)

    definition = define(dataclasses.replace(built, precision=Precision(dtype)))
    mesh = make_mesh(MeshConfig())
    config = optim.OptimConfig(warmup_steps=2)
    optimizer = optim.make_optimizer(config, definition.params, total_steps=10_000)
    shapes = state_shapes(definition, optimizer, with_ema=False, mesh=mesh)
    with jax.set_mesh(mesh):
        state = init_state(definition, optimizer, shapes=shapes, seed=0)
        train_step = step.make_train_step(
            definition,
            optimizer,
            objective=ObjectiveConfig(),
            optim=config,
            shapes=shapes,
            total_steps=10_000,
        )
        batch = empty_batch(rows, length)
        batch.tokens[:] = np.random.default_rng(0).integers(
            2, definition.config.known_vocab_size, batch.tokens.shape
        )
        batch.targets[:] = np.roll(batch.tokens, -1, axis=1)
        batch.loss_mask[:] = 1
        batch.segment_ids[:] = 1
        batch.num_bytes[:] = 3
        batch.positions[:] = np.arange(length)
        placed = place_batch(batch, mesh)

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
    """Print the seconds of a step for each line of the standard input."""
    run = (
        our_step(size, dtype)
        if variant == "slmjax"
        else their_step(size, dtype, compiled=variant == "compiled")
    )
    for _ in range(3):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        run()
        print(time.perf_counter() - started, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(BATCHES), default="12m")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter that runs slmjax, for another version of jax"
    )
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.size, args.dtypes[0])
    print("| dtype | variant | ms, lowest | ms, median | its median over slmjax's | tokens/s | MFU |")
    for dtype in args.dtypes:
        compare(args.size, dtype, args.rounds, VARIANTS if args.compile else VARIANTS[:2], python=args.python)
    return None


def compare(size: str, dtype: str, rounds: int, variants: tuple[str, ...], *, python: str) -> None:
    workers = {}
    for variant in variants:
        command = [
            python if variant == "slmjax" else sys.executable,
            __file__,
            "--worker",
            variant,
            "--size",
            size,
            "--dtypes",
            dtype,
        ]
        # On a GPU jax would take most of the memory, and all workers share one device.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        workers[variant] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
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
    (rows, length) = BATCHES[size]
    flops = flops_per_token(size)
    peak = peak_flops(dtype)
    for variant, measured in seconds.items():
        median = statistics.median(measured)
        used = "not known" if peak is None else f"{flops * rows * length / median / peak:.1%}"
        print(
            f"| {dtype} | {variant} | {1e3 * min(measured):.1f} | {1e3 * median:.1f} | {median / ours:.2f} "
            f"| {rows * length / median:,.0f} | {used} |"
        )


def flops_per_token(size: str) -> float:
    import dataclasses

    from slmjax.models.zoo import describe

    return describe(
        dataclasses.replace(model_of(size), context_length=BATCHES[size][1])
    ).training_flops_per_token


def peak_flops(dtype: str) -> float | None:
    import jax

    from slmjax.planning import device_peaks

    return device_peaks.peak_flops(jax.devices()[0], dtype)


def read(worker: "subprocess.Popen[str]") -> str:
    assert worker.stdout is not None
    return next((line.strip() for line in worker.stdout if line.strip() == "ready" or line[:1].isdigit()), "")


if __name__ == "__main__":
    main()
