"""The time of a token in linear-time mixers at 1k to 16k tokens, and in softmax attention at 4k.

    python benchmarks/mixer_time.py                                     # on this machine's CPU
    python benchmarks/mixer_time.py --mixers Mamba2Config --lengths 1024 4096
    python benchmarks/mixer_time.py --tpu                               # compiles for a TPU v5e; needs libtpu

One layer without its feed-forward layer, forward and backward, in float32, on one row of one document. Mixers
and lengths take turns; the time is the lowest of the rounds. `growth` is the time of a token at the longest
length over that at the shortest. For TPU it prints what the compiler states: bytes that the program touches
(the body of a loop counts once, so these are multiplied by the number of chunks where all work is in one
loop), and bytes of temporaries.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from slmjax import models
from slmjax.models import ModelDims
from slmjax.models.protocols import ContextMixer, MixerConfig, MixerContext

WIDTH = 256
ATTENTION_LENGTH = 4096
CONFIGS: dict[str, MixerConfig] = {
    "attention": models.AttentionConfig(num_heads=4),
    "linear attention": models.LinearAttentionConfig(num_heads=4),
    "retention": models.RetentionConfig(num_heads=4),
    "GLA": models.GatedLinearAttentionConfig(num_heads=4),
    "Mamba-2": models.Mamba2Config(state_dim=64),
    "DeltaNet": models.DeltaNetConfig(num_heads=4),
    "Gated DeltaNet": models.GatedDeltaNetConfig(num_heads=4),
    "KDA": models.KimiDeltaAttentionConfig(num_heads=4),
    "RWKV-7": models.Rwkv7Config(is_first=True),
    "Mamba": models.MambaConfig(inner_dim=2 * WIDTH),
    "RG-LRU": models.RgLruConfig(inner_dim=WIDTH, num_blocks=4),
    "RWKV-4": models.Rwkv4Config(inner_dim=WIDTH),
    "short convolution": models.ShortConvolutionConfig(),
}


def layer(config: MixerConfig, *, width: int, dtype: Any) -> tuple[Any, Callable[..., jax.Array]]:
    """Return the shapes of a mixer's parameters, and the loss of a row as a function of them."""
    constants = config.layer_constants(_dims(width, dtype), index=0, num_layers=12)
    dims = _dims(width, dtype, constants=constants)
    module = nnx.eval_shape(lambda: config.build(dims, rngs=nnx.Rngs(params=0)))
    graphdef, shapes = nnx.split(module)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        mixer = nnx.merge(graphdef, params)
        ids = jnp.ones(x.shape[:2], jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        context = {}
        if isinstance(mixer, ContextMixer):
            context = {"context": MixerContext(constants=constants)}
        y, _ = mixer(x, segment_ids=ids, positions=positions, state=None, **context)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    return shapes, loss


def _dims(width: int, dtype: Any, **constants: Any) -> ModelDims:
    return ModelDims(embed_dim=width, num_layers=12, norm_eps=1e-6, init_std=0.02, dtype=dtype, **constants)


def compiled_step(config: MixerConfig, length: int) -> Callable[[], Any]:
    """Return a function that runs the compiled gradient of a layer, of random weights and inputs."""
    shapes, loss = layer(config, width=WIDTH, dtype=jnp.float32)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves) + 1)
    # Weights of 0.02 also where initialisation has zeros: nothing is skipped.
    params = jax.tree.unflatten(
        tree, [0.02 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys[1:], leaves, strict=True)]
    )
    x = jax.random.normal(keys[0], (1, length, WIDTH))
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, x).compile()
    return lambda: jax.block_until_ready(program(params, x))


def measure(names: list[str], lengths: list[int], rounds: int) -> None:
    cases = [(name, length) for name in names if name != "attention" for length in lengths]
    cases += [("attention", ATTENTION_LENGTH)] if "attention" in names else []
    steps = {case: compiled_step(CONFIGS[case[0]], case[1]) for case in cases}
    times = {case: float("inf") for case in cases}
    for _ in range(rounds + 1):
        for case, step in steps.items():
            started = time.perf_counter()
            step()
            times[case] = min(times[case], time.perf_counter() - started)
    print(
        f"| mixer | {' | '.join(f'us/token at {length:,}' for length in lengths)} | growth | of attention |"
    )
    print("|---" * (len(lengths) + 3) + "|")
    attention = times.get(("attention", ATTENTION_LENGTH), float("nan"))
    for name in names:
        tokens = {length: 1e6 * times.get((name, length), float("nan")) / length for length in lengths}
        row = " | ".join(f"{value:.1f}" for value in tokens.values())
        growth = tokens[lengths[-1]] / tokens[lengths[0]]
        share = times.get((name, ATTENTION_LENGTH), float("nan")) / attention
        print(f"| {name} | {row} | {growth:.2f} | {share:.2f} |", flush=True)


def compile_for_tpu(names: list[str], length: int, width: int) -> None:
    device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
    sharding = SingleDeviceSharding(device)
    print(f"| mixer, {length:,} tokens, width {width:,} | GB touched | MiB of temporaries | s to compile |")
    print("|---|---|---|---|")
    for name in names:
        shapes, loss = layer(CONFIGS[name], width=width, dtype=jnp.bfloat16)
        arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            (shapes, jax.ShapeDtypeStruct((1, length, width), jnp.bfloat16)),
        )
        started = time.perf_counter()
        program = jax.jit(jax.grad(loss)).lower(*arguments).compile()
        seconds = time.perf_counter() - started
        costs = program.cost_analysis() or {}
        memory = program.memory_analysis()
        temporaries = memory.temp_size_in_bytes / 2**20 if memory else float("nan")
        touched = costs.get("bytes accessed", float("nan")) / 1e9
        print(f"| {name} | {touched:.2f} | {temporaries:.0f} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixers", nargs="+", choices=tuple(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tpu", action="store_true", help="compile for a TPU v5e instead")
    parser.add_argument("--width", type=int, default=1024, help="of the layer that is compiled for a TPU")
    args = parser.parse_args()
    if args.tpu:
        compile_for_tpu(args.mixers, args.lengths[-1], args.width)
    else:
        measure(args.mixers, args.lengths, args.rounds)


if __name__ == "__main__":
    main()
