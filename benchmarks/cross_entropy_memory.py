"""Temporary memory of cross entropy and its gradient: in chunks, compared with all logits at once.

    # compiles only, so the dense program's memory is never needed
    python benchmarks/cross_entropy_memory.py
    python benchmarks/cross_entropy_memory.py --vocab-size 128256

Prints one table row; the target is a ratio below 1/5. Sizes are those of the compiler, for the first device.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from slmjax.losses import Head, cross_entropy, default_chunk_size, logits


def dense_cross_entropy(
    hidden: jax.Array, head: Head, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, None]:
    """Return the loss of the reference implementation: every logit, then optax's cross entropy."""
    nll = optax.softmax_cross_entropy_with_integer_labels(logits(hidden, head), targets)
    return jnp.sum(weights * nll), None


def temporary_bytes(loss_fn: Callable[..., tuple[jax.Array, Any]], arguments: tuple[Any, ...]) -> int:
    """Return the peak temporary memory of the compiled value and gradient, outputs not counted."""
    value_and_grad = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    analysis = jax.jit(value_and_grad).lower(*arguments).compile().memory_analysis()
    if analysis is None:
        sys.exit(
            f"the {jax.default_backend()} backend reports no memory analysis: run on another one "
            "(JAX_PLATFORMS=cpu)"
        )
    return analysis.temp_size_in_bytes


def main() -> None:
    """Compile both programs and print their temporary memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab-size", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="dtype of the hidden states and products",
    )
    args = parser.parse_args()

    head = Head(
        weight=jax.ShapeDtypeStruct((args.vocab_size, args.width), jnp.float32),
        vocab_size=args.vocab_size,
    )
    arguments = (
        jax.ShapeDtypeStruct((1, args.tokens, args.width), args.dtype),
        head,
        jax.ShapeDtypeStruct((1, args.tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, args.tokens), jnp.float32),
    )
    chunked = temporary_bytes(cross_entropy, arguments)
    dense = temporary_bytes(dense_cross_entropy, arguments)
    print(
        "| device | tokens x vocabulary, width | dtype | chunk | chunked MiB | dense MiB | ratio (target < "
        "0.2) |"
    )
    chunk_size = default_chunk_size(args.tokens, args.vocab_size)
    print(
        f"| {jax.devices()[0].device_kind} | {args.tokens} x {args.vocab_size}, {args.width} | "
        f"{args.dtype} "
        f"| {chunk_size} | {chunked / 2**20:.0f} | {dense / 2**20:.0f} | {chunked / dense:.3f} |"
    )


if __name__ == "__main__":
    main()
