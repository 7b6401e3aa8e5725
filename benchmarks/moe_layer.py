"""Speed of a mixture of experts, compared with a dense layer of the same active FLOPs.

    python benchmarks/moe_layer.py

Prints tokens per second of value and gradient. There are 8 experts, of which a token uses 2, each half as
wide as the dense layer; 2048 tokens, at the widths of the 12M model and of `nano`, in the implementation that
the platform picks, in turn in one process. The target is a ratio of at least 0.6.
"""

import argparse
import statistics
import time
from collections.abc import Callable

from slmjax.startup import keep_memory

keep_memory()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from slmjax.models.ffn.mlp import MlpConfig  # noqa: E402
from slmjax.models.ffn.moe import MoeConfig  # noqa: E402
from slmjax.models.layers import ModelDims  # noqa: E402
from slmjax.models.protocols import FfnConfig  # noqa: E402

ROWS = 8
LENGTH = 256
SIZES = {"width 384, 1024 active": (384, 1024), "width 192, 512 active": (192, 512)}


def step_of(config: FfnConfig, dim: int, dtype: str) -> Callable[[], object]:
    """Return a call that computes a layer's value and its gradient for input and weights."""
    shape = ModelDims(embed_dim=dim, num_layers=6, norm_eps=1e-6, init_std=0.02, dtype=jnp.dtype(dtype))
    graphdef, params = nnx.split(config.build(shape, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, dim), shape.dtype)
    segment_ids = jnp.ones((ROWS, LENGTH), jnp.int32)

    def loss(params: nnx.State, x: jax.Array) -> jax.Array:
        y, aux = nnx.merge(graphdef, params)(x, segment_ids=segment_ids)
        return jnp.sum(jnp.square(y.astype(jnp.float32))) + sum(aux.losses.values(), jnp.zeros(()))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return lambda: jax.block_until_ready(step(params, x))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    print("| layer | dtype | dense, tokens/s | experts, tokens/s | ratio, median of pairs |")
    for name, (dim, hidden) in SIZES.items():
        for dtype in ("float32", "bfloat16"):
            configs = (
                MlpConfig(hidden_dim=hidden),
                MoeConfig(num_experts=8, num_selected=2, hidden_dim=hidden // 2),
            )
            steps = [step_of(config, dim, dtype) for config in configs]
            for step in steps * 2:
                step()
            seconds: list[list[float]] = [[], []]
            for _ in range(args.rounds):
                for step, measured in zip(steps, seconds, strict=True):
                    started = time.perf_counter()
                    step()
                    measured.append(time.perf_counter() - started)
            rates = [ROWS * LENGTH / statistics.median(measured) for measured in seconds]
            ratio = statistics.median(dense / experts for dense, experts in zip(*seconds, strict=True))
            print(f"| {name} | {dtype} | {rates[0]:,.0f} | {rates[1]:,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
