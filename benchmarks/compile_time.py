"""Compile time of the training loss and its gradient, for a shallow and a deep decoder.

    # 12 and 48 layers of a 135M model's width; nothing is computed
    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --remat full --rounds 5

Layers are scanned, so depth should add almost no time. Both depths are compiled in turn, several times, with
the compilation caches off, and medians are compared. Prints one table row; the target is a ratio of at most
1.5.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from slmjax import losses
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig, Precision, Remat
from slmjax.models.definition import define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig


def model_of(num_layers: int, *, remat: Remat) -> ModelConfig:
    """Return a decoder of the width of the 135M models."""
    block = BlockConfig(
        mixer=AttentionConfig(num_heads=9, num_kv_heads=3, head_dim=64), ffn=MlpConfig(hidden_dim=1536)
    )
    stack = (LayerGroup(pattern=(block,), repeats=num_layers),)
    return ModelConfig(
        embed_dim=576, stack=stack, vocab_size=49_152, precision=Precision.BFLOAT16, remat=remat
    )


def compile_seconds(config: ModelConfig, *, rows: int, length: int) -> tuple[float, float]:
    """Return the seconds of tracing and of compiling the loss and its gradient, from shapes alone."""
    definition = define(config)

    def loss(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        inputs = {
            "segment_ids": jnp.ones_like(tokens),
            "positions": jnp.broadcast_to(jnp.arange(length), tokens.shape),
        }
        output = definition.merge(params, {})(tokens, **inputs)
        targets = jnp.roll(tokens, -1, axis=1)
        return losses.cross_entropy(output.hidden, output.head, targets, jnp.ones(tokens.shape))[0]

    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(jax.value_and_grad(loss)).lower(
        definition.params, jax.ShapeDtypeStruct((rows, length), jnp.int32)
    )
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def main() -> None:
    """Compile both depths in turn and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs=2, default=(12, 48), metavar=("SHALLOW", "DEEP"))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--remat", choices=[remat.value for remat in Remat], default=Remat.NONE.value)
    args = parser.parse_args()

    jax.config.update("jax_enable_compilation_cache", False)
    configs = {depth: model_of(depth, remat=Remat(args.remat)) for depth in args.layers}
    seconds: dict[int, list[tuple[float, float]]] = {depth: [] for depth in configs}
    for repetition in range(args.rounds + 1):
        for depth, config in configs.items():
            measured = compile_seconds(config, rows=args.rows, length=args.length)
            # The first round also loads libraries and warms up caches.
            if repetition > 0:
                seconds[depth].append(measured)
    traces, compiles, totals = (
        [statistics.median(map(of, seconds[depth])) for depth in args.layers]
        for of in (lambda s: s[0], lambda s: s[1], sum)
    )
    shallow, deep = args.layers
    print(
        f"| device | rows x tokens | remat | trace s, {shallow} / {deep} layers | compile s | both | ratio "
        "(target <= 1.5) |"
    )
    print(
        f"| {jax.devices()[0].device_kind} | {args.rows} x {args.length} | {args.remat} | "
        f"{traces[0]:.2f} / {traces[1]:.2f} "
        f"| {compiles[0]:.2f} / {compiles[1]:.2f} | {totals[0]:.2f} / {totals[1]:.2f} | "
        f"{totals[1] / totals[0]:.2f} |"
    )


if __name__ == "__main__":
    main()
