"""Cost of attention with a window, compared with full attention, as sequences grow.

    python benchmarks/attention_cost.py [--window 512] [--lengths 1024 2048 4096 8192] [--dtype bfloat16]

Self-attention of 6 heads of 64, one sequence, value and gradient, in the implementation that the platform
picks. Prints milliseconds and FLOPs per token: the cost of a window should stay the same once sequences are
longer than it, that of full attention should double with the length. FLOPs are those of the program's
products (`slmjax.planning.flops`), because XLA's own analysis counts the body of a loop once.
"""

import argparse
import statistics
import time

from slmjax.startup import keep_memory

keep_memory()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from slmjax import kernels  # noqa: E402
from slmjax.planning import flops  # noqa: E402

HEADS = 6
HEAD_DIM = 64


def gradient_of(length: int, window: int | None):
    """Return the gradient of attention over a sequence as a function of queries, keys and values."""
    segment_ids = jnp.ones((1, length), jnp.int32)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mixed = kernels.self_attention(
            q, k, v, segment_ids=segment_ids, window=window, scale=HEAD_DIM**-0.5, softcap=None
        )
        return jnp.sum(jnp.square(mixed.astype(jnp.float32)))

    return jax.grad(total, argnums=(0, 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(
        f"| tokens | window {args.window}, us per token | full, us per token | window, kFLOPs per token | "
        "full, kFLOPs per token |"
    )
    cases = {}
    seconds = {}
    for length in args.lengths:
        shape = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), jnp.dtype(args.dtype))
        arrays = [jax.random.normal(jax.random.key(i), shape.shape, shape.dtype) for i in range(3)]
        for window in (args.window, None):
            gradient = gradient_of(length, window)
            compiled = jax.jit(gradient)
            jax.block_until_ready(compiled(*arrays))
            cases[length, window] = (compiled, arrays, flops.count(gradient, shape, shape, shape))
            seconds[length, window] = []
    # In turn, so that other programs on the machine slow all cases alike.
    for _ in range(args.rounds):
        for case, (compiled, arrays, _) in cases.items():
            started = time.perf_counter()
            jax.block_until_ready(compiled(*arrays))
            seconds[case].append(time.perf_counter() - started)
    for length in args.lengths:
        both = [(length, window) for window in (args.window, None)]
        times = " | ".join(f"{1e6 * statistics.median(seconds[case]) / length:.1f}" for case in both)
        counts = " | ".join(f"{cases[case][2] / length / 1e3:,.0f}" for case in both)
        print(f"| {length:,} | {times} | {counts} |")


if __name__ == "__main__":
    main()
