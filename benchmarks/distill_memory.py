"""Temporary memory and time of a distillation loss: in chunks, compared with all logits at once.

    # compiles only, so the dense program's memory is never needed
    python benchmarks/distill_memory.py
    python benchmarks/distill_memory.py --width 4096
    # for a TPU v5p, which need not be attached: the extra `plan`
    python benchmarks/distill_memory.py --device tpu
    # runs both, in turn
    python benchmarks/distill_memory.py --time --tokens 2048 --vocab-size 16384 --width 512
    python benchmarks/distill_memory.py --time --chunk-sizes 128 512 2048

The gradient is included. Prints one row for each divergence and chunk size; by default the chunk size of a
run. Memory is that of the compiler, results not counted; the target is a ratio below 1/5. Hidden states of
student and teacher are bfloat16, both tables float32; the gradient is that of the student's hidden states and
table.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from slmjax.startup import compile_for_tpu

if "tpu" in sys.argv:
    compile_for_tpu()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from slmjax.losses import (
    DistillLossConfig,
    Divergence,
    ForwardKl,
    Head,
    Jsd,
    TeacherOutput,
    default_chunk_size,
    distill_loss,
    logits,
)  # noqa: E402

DIVERGENCES: tuple[Divergence, ...] = (ForwardKl(), Jsd(beta=0.5))
Loss = Callable[[Divergence, jax.Array, Head, TeacherOutput, jax.Array, jax.Array], jax.Array]


def chunked(chunk_size: int) -> Loss:
    """Return the loss of the package, in chunks of this many tokens."""

    def loss(
        divergence: Divergence,
        hidden: jax.Array,
        head: Head,
        teacher: TeacherOutput,
        targets: jax.Array,
        weights: jax.Array,
    ) -> jax.Array:
        config = DistillLossConfig(divergence=divergence)
        return distill_loss(hidden, head, (teacher,), config, targets, weights, chunk_size=chunk_size)[0]

    return loss


def dense(
    divergence: Divergence,
    hidden: jax.Array,
    head: Head,
    teacher: TeacherOutput,
    targets: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """Return the loss of the reference implementation: every logit of both models, and jax's derivative."""
    del targets
    log_q = jax.nn.log_softmax(logits(hidden, head))
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(logits(teacher.hidden, teacher.head)))
    p = jnp.exp(log_p)
    q = jnp.exp(log_q)
    if isinstance(divergence, Jsd):
        log_m = jnp.logaddexp(math.log(divergence.beta) + log_p, math.log(1.0 - divergence.beta) + log_q)
        values = divergence.beta * p * (log_p - log_m) + (1.0 - divergence.beta) * q * (log_q - log_m)
    else:
        values = p * (log_p - log_q)
    return jnp.sum(weights * jnp.sum(values, axis=-1))


def shapes(*, tokens: int, vocab_size: int, width: int, teacher_width: int) -> tuple[Any, ...]:
    """Return student, teacher, targets and weights, as shapes."""

    def states_and_head(width: int) -> tuple[jax.ShapeDtypeStruct, Head]:
        head = Head(weight=jax.ShapeDtypeStruct((vocab_size, width), jnp.float32), vocab_size=vocab_size)
        return jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16), head

    teacher_hidden, teacher_head = states_and_head(teacher_width)
    teacher = TeacherOutput(hidden=teacher_hidden, head=teacher_head)
    return (
        *states_and_head(width),
        teacher,
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, tokens), jnp.float32),
    )


def value_and_grad(loss: Loss, divergence: Divergence) -> Any:
    """Return the compiled value and gradient of a loss for the student's hidden states and head."""
    return jax.jit(jax.value_and_grad(lambda *args: loss(divergence, *args), argnums=(0, 1)))


def temporary_bytes(loss: Loss, divergence: Divergence, arguments: tuple[Any, ...], device: Any) -> int:
    """Return the peak temporary memory of the compiled value and gradient on a device."""
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(device)),
        arguments,
    )
    # Kernels are chosen for the devices of the mesh, which need not be attached.
    with jax.set_mesh(jax.sharding.Mesh([device], ("one",))):
        analysis = value_and_grad(loss, divergence).lower(*placed).compile().memory_analysis()
    if analysis is None:
        sys.exit(f"{device.device_kind} reports no memory analysis: run on another one (JAX_PLATFORMS=cpu)")
    return analysis.temp_size_in_bytes


def milliseconds(
    losses: Sequence[Loss], divergence: Divergence, arguments: tuple[Any, ...], *, rounds: int
) -> list[float]:
    """Return the median milliseconds of their values and gradients, run in turn on random numbers."""
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(arguments)))
    leaves = [
        jnp.zeros(x.shape, x.dtype)
        if jnp.issubdtype(x.dtype, jnp.integer)
        else (jax.random.normal(key, x.shape) / 8).astype(x.dtype)
        for key, x in zip(keys, jax.tree.leaves(arguments), strict=True)
    ]
    filled = jax.tree.unflatten(jax.tree.structure(arguments), leaves)
    programs = [value_and_grad(loss, divergence) for loss in losses]
    for program in programs:
        jax.block_until_ready(program(*filled))
    seconds: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds):
        for program, taken in zip(programs, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program(*filled))
            taken.append(time.perf_counter() - start)
    return [1000 * statistics.median(taken) for taken in seconds]


def main() -> None:
    """Compile both programs of each divergence, run them with --time, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument(
        "--teacher-width", type=int, help="width of the teacher (default: that of the student)"
    )
    parser.add_argument("--device", choices=("here", "tpu"), default="here")
    parser.add_argument(
        "--time", action="store_true", help="run both programs, and print milliseconds instead of memory"
    )
    parser.add_argument("--chunk-sizes", type=int, nargs="+", help="tokens per chunk")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    arguments = shapes(
        tokens=args.tokens,
        vocab_size=args.vocab_size,
        width=args.width,
        teacher_width=args.teacher_width or args.width,
    )
    here = (
        jax.devices()[0]
        if args.device == "here"
        else topologies.get_topology_desc("v5p:2x2x1", "tpu").devices[0]
    )
    unit = "ms" if args.time else "MiB"
    print(
        (
            f"| divergence | device | tokens x vocabulary, width | chunk | chunked {unit} | dense {unit} | "
            "ratio "
            "|\n"
        )
        + "|---" * 7
        + "|"
    )
    sizes = args.chunk_sizes or [default_chunk_size(args.tokens, args.vocab_size)]
    losses = [*map(chunked, sizes), dense]
    for divergence in DIVERGENCES:
        if args.time:
            *chunked_results, theirs = milliseconds(losses, divergence, arguments, rounds=args.rounds)
        else:
            *chunked_results, theirs = (
                temporary_bytes(loss, divergence, arguments, here) / 2**20 for loss in losses
            )
        for size, ours in zip(sizes, chunked_results, strict=True):
            print(
                f"| {type(divergence).__name__} | {here.device_kind} | {args.tokens} x "
                f"{args.vocab_size}, {args.width} "
                f"| {size} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.3f} |"
            )


if __name__ == "__main__":
    main()
