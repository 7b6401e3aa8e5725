"""Time and memory of training in number formats, compared with training in floating point.

    # nano: steps timed in turn, in one process
    python benchmarks/qat_step.py
    # on a GPU
    python benchmarks/qat_step.py --model 135m --dtype bfloat16 --rows 16 --length 1024
    # compiled for a TPU v5e: the extra `plan`
    python benchmarks/qat_step.py --device tpu --model 12m --dtype bfloat16 --unrolled

Prints for each of `--quant` the median over the rounds of its step over the step without formats, or, where
it is only compiled, how many more bytes the step reads and writes in memory, and how much more memory it
needs. The compiler counts the body of a loop once: with `--unrolled` each layer is counted. The targets are
1.10 for q4_0, 1.15 for q4_0+q8_0, and under 10 % more bytes. Weights and tokens are random.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from typing import Any

from slmjax import startup

if "tpu" in sys.argv:
    startup.compile_for_tpu()
else:
    startup.keep_memory()

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from slmjax import kernels
from slmjax.data.batch import empty_batch  # noqa: E402
from slmjax.models import zoo  # noqa: E402
from slmjax.models.architecture import Precision, Remat  # noqa: E402
from slmjax.models.definition import Definition  # noqa: E402
from slmjax.parallel.batches import batch_shapes, place_batch
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.quantization.fake_quantization import define_quantized  # noqa: E402
from slmjax.quantization.rules import quant_of  # noqa: E402
from slmjax.training import step
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.optim import make_optimizer  # noqa: E402
from slmjax.training.recipes import nano  # noqa: E402
from slmjax.training.state import init_state, state_shapes

MODELS = {"nano": lambda: zoo.nano(vocab_size=4096), "12m": zoo.slm_12m, "135m": zoo.smollm2_135m}
STEPS = 1000


def definition_of(name: str, quant: str, args: Any) -> Definition:
    config = dataclasses.replace(MODELS[name](), precision=Precision(args.dtype), remat=Remat(args.remat))
    return define_quantized(config, quant_of(quant).phases if quant else ())


def train_step_of(definition: Definition, mesh: Any) -> tuple[Any, Any, Any]:
    """Return definition and optimizer, shapes of the state, and the step."""
    optim = nano().optim
    optimizer = make_optimizer(optim, definition.params, total_steps=STEPS)
    shapes = state_shapes(definition, optimizer, with_ema=False, mesh=mesh)
    made = step.make_train_step(
        definition, optimizer, objective=ObjectiveConfig(), optim=optim, shapes=shapes, total_steps=STEPS
    )
    return (definition, optimizer), shapes, made


def time_steps(args: Any) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = empty_batch(args.rows, args.length)
    draw = np.random.default_rng(0)
    batch.tokens[:] = draw.integers(2, MODELS[args.model]().known_vocab_size, batch.tokens.shape)
    batch.targets[:] = np.roll(batch.tokens, -1, axis=1)
    batch.loss_mask[:] = 1
    batch.segment_ids[:] = 1
    batch.num_bytes[:] = 3
    batch.positions[:] = np.arange(args.length)
    states = {}
    steps = {}
    with jax.set_mesh(mesh):
        placed = place_batch(batch, mesh)
        for name in ("", *args.quant):
            made, shapes, steps[name] = train_step_of(definition_of(args.model, name, args), mesh)
            states[name] = init_state(*made, shapes=shapes, seed=0)

        def run(name: str) -> float:
            started = time.perf_counter()
            states[name], _ = steps[name](states[name], placed)
            jax.block_until_ready(states[name])
            return time.perf_counter() - started

        for name in steps:
            run(name), run(name)
        measured: dict[str, list[float]] = {name: [] for name in steps}
        for index in range(args.rounds):
            for name in steps if index % 2 else reversed(list(steps)):
                measured[name].append(run(name))
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: plain step "
        f"{1e3 * statistics.median(measured['']):.1f} ms"
    )
    print("| formats | step, median ms | over plain | middle half of the rounds |\n|---|---|---|---|")
    for name in args.quant:
        ratios = sorted(
            quantized / plain for quantized, plain in zip(measured[name], measured[""], strict=True)
        )
        middle = len(ratios) // 4
        print(
            f"| {name} | {1e3 * statistics.median(measured[name]):.1f} | {statistics.median(ratios):.3f} | "
            f"{ratios[middle]:.3f} to {ratios[-middle - 1]:.3f} |"
        )


def compile_steps(args: Any) -> None:
    """Compile for a TPU v5e with 4 chips, with parameters sharded over them."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), topologies.get_topology_desc("v5e:2x2", "tpu").devices)
    if args.unrolled:
        kernels.unrolled_repeats = lambda num_repeats, num_blocks: num_repeats
    costs = {}
    for name in ("", *args.quant):
        # Outside the mesh: these devices can compile, but not compute.
        _, shapes, made = train_step_of(definition_of(args.model, name, args), mesh)
        with jax.set_mesh(mesh):
            compiled = made.lower(
                shapes, batch_shapes(empty_batch(4 * args.rows, args.length), mesh)
            ).compile()
        costs[name] = (
            compiled.cost_analysis()["bytes accessed"],
            compiled.memory_analysis().temp_size_in_bytes,
        )
    accessed, temporary = costs[""]
    print(
        f"plain step: {accessed / 1e9:.2f} GB read and written per chip, {temporary / 1e9:.3f} GB of "
        "temporary memory"
    )
    print("| formats | more bytes read and written | more temporary memory |\n|---|---|---|")
    for name in args.quant:
        print(f"| {name} | {costs[name][0] / accessed - 1:+.1%} | {costs[name][1] / temporary - 1:+.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="nano")
    parser.add_argument("--quant", nargs="+", default=["q4_0", "q4_0+q8_0"])
    parser.add_argument("--dtype", choices=[choice.value for choice in Precision], default="float32")
    parser.add_argument("--remat", choices=[choice.value for choice in Remat], default="none")
    parser.add_argument("--rows", type=int, default=8, help="sequences per device")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", choices=["here", "tpu"], default="here")
    parser.add_argument(
        "--unrolled", action="store_true", help="unroll layers, so that the compiler counts each"
    )
    args = parser.parse_args()
    compile_steps(args) if args.device == "tpu" else time_steps(args)


if __name__ == "__main__":
    main()
