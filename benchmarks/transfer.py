"""How far the best learning rate moves with the width and the depth, by parameterization.

    python benchmarks/transfer.py                       # under 20 minutes on 2 cores
    python benchmarks/transfer.py --only width --steps 300

A character-like language model is trained on synthetic tokens at widths 64 to 512 (standard and muP) and at
depths 2 to 16 (standard, muP and CompleteP), over a grid of learning rates that are powers of two. The best
rate is the minimum of a quadratic through the best point of the grid and its neighbours, in the logarithm of
the rate. Prints the loss at every rate, the best rates, and their largest ratio: theory asks for about 1 with
muP over widths and CompleteP over depths, and at most 2 is expected; the standard one moves more.

The loss is the mean over the last quarter of the steps and over the seeds; one that is not finite counts as
that of guessing.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.definition import define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.parameterization import Parameterization
from slmjax.planning.coordinates import synthetic_batches
from slmjax.planning.sizes import HeadGrowth, at_depth, at_width
from slmjax.training.objective import CROSS_ENTROPY
from slmjax.training.optim import OptimConfig, Optimizer, Schedule, make_optimizer
from slmjax.training.step import loss_terms

VOCAB_SIZE = 64
BATCH = (8, 32)
RATES = tuple(2.0**exponent for exponent in range(-12, -3))
WIDTHS = (64, 128, 256, 512)
DEPTHS = (2, 4, 8, 16)
COMPARED = {
    "width": (Parameterization.STANDARD, Parameterization.MUP),
    "depth": (Parameterization.STANDARD, Parameterization.MUP, Parameterization.COMPLETEP),
}


def base_model() -> ModelConfig:
    block = BlockConfig(mixer=AttentionConfig(num_heads=4, head_dim=16), ffn=MlpConfig(hidden_dim=128))
    return ModelConfig(
        embed_dim=64,
        stack=(LayerGroup(pattern=(block,), repeats=2),),
        vocab_size=VOCAB_SIZE,
        context_length=BATCH[1],
        base_width=64,
        base_depth=2,
    )


def losses_by_rate(
    model: ModelConfig, optim: OptimConfig, rates: Sequence[float], *, steps: int, seeds: int
) -> list[float]:
    """Return the loss at the end of training for each rate; one program, to which rates are an input."""
    definition = define(model)
    batches = synthetic_batches(num_steps=steps, vocab_size=VOCAB_SIZE, shape=BATCH)

    def loss(params: Any, batch: Any) -> jax.Array:
        terms, _ = loss_terms(definition, CROSS_ENTROPY, params, {}, batch, key=None)
        return terms["cross_entropy"][0] / jnp.sum(batch.loss_mask)

    # Updates are in proportion to the rate, so that it can be an input: 1 stands in for it in the chain.
    unit = make_optimizer(optim, definition.params, total_steps=steps, scaling=model.scaling)

    @jax.jit
    def train(key: jax.Array, rate: jax.Array, batches: Any) -> jax.Array:
        params, _ = definition.init(key)

        def step(carry: Any, inputs: Any) -> tuple[Any, jax.Array]:
            params, state = carry
            batch, index = inputs
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = unit.update(grads, state, params)
            # A tenth of the steps to the peak, then a line down to a tenth.
            warmup = jnp.minimum(1.0, (index + 1) / (0.1 * steps))
            factor = rate * warmup * (1.0 - 0.9 * index / steps)
            params = jax.tree.map(lambda old, change: old + factor * change, params, updates)
            return (params, state), value

        _, values = jax.lax.scan(step, (params, unit.init(params)), (batches, jnp.arange(steps)))
        return jnp.mean(values[-(steps // 4) :])

    guessing = math.log(VOCAB_SIZE)
    results = []
    for rate in rates:
        values = [float(train(jax.random.key(seed), jnp.float32(rate), batches)) for seed in range(seeds)]
        results.append(float(np.mean([value if math.isfinite(value) else guessing for value in values])))
    return results


def best_rate(rates: Sequence[float], values: Sequence[float]) -> tuple[float, bool]:
    """Return the minimum of the quadratic through the best point and its neighbours, and if it is resolved.

    At an edge of the grid the best rate is unknown: the edge is returned, unresolved.
    """
    index = int(np.argmin(values))
    if index in (0, len(values) - 1):
        return rates[index], False
    left, middle, right = values[index - 1 : index + 2]
    curvature = left - 2 * middle + right
    shift = 0.5 * (left - right) / curvature if curvature > 0 else 0.0
    return rates[index] * 2.0 ** float(np.clip(shift, -0.5, 0.5)), True


def measure(axis: str, kind: Parameterization, args: argparse.Namespace) -> dict[str, Any]:
    optim = OptimConfig(
        kind=Optimizer(args.optimizer),
        lr=1.0,
        # With both rates at the same value the swept factor multiplies them alike.
        muon_lr=args.muon_ratio,
        schedule=Schedule.CONSTANT,
        warmup_steps=0,
        weight_decay=0.0,
    )
    base = dataclasses.replace(base_model(), parameterization=kind)
    sizes = args.widths if axis == "width" else args.depths
    resize = functools.partial(at_width, growth=HeadGrowth.NUMBER) if axis == "width" else at_depth
    rows = {}
    for size in sizes:
        started = time.perf_counter()
        values = losses_by_rate(resize(base, size), optim, RATES, steps=args.steps, seeds=args.seeds)
        rate, is_resolved = best_rate(RATES, values)
        rows[size] = {"losses": values, "best": rate, "resolved": is_resolved}
        shown = " ".join(f"{value:.3f}" for value in values)
        mark = "" if is_resolved else " (edge of the grid)"
        seconds = time.perf_counter() - started
        name = f"{kind.value:10} {axis} {size:5}"
        print(f"{name}: {shown}  best {rate:.2e}{mark}  {seconds:.0f} s", flush=True)
    return {"axis": axis, "parameterization": kind.value, "moved": moved(rows), "sizes": rows}


def moved(rows: Mapping[int, Mapping[str, Any]]) -> float:
    """Return the ratio of the largest best rate to the smallest."""
    best = [row["best"] for row in rows.values()]
    return max(best) / min(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=("width", "depth"))
    parser.add_argument("--optimizer", choices=("adamw", "muon", "lion"), default="adamw")
    parser.add_argument("--muon-ratio", type=float, default=5.0, help="muon_lr over lr")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for all losses and rates")
    args = parser.parse_args()
    print(
        f"learning rates {' '.join(f'{rate:.1e}' for rate in RATES)}; {args.steps} steps of {args.optimizer}"
    )
    axes = ("width", "depth") if args.only is None else (args.only,)
    results = [measure(axis, kind, args) for axis in axes for kind in COMPARED[axis]]
    for result in results:
        compared = f"{result['parameterization']} over {result['axis']}s"
        print(f"{compared}: the best rate moves by a factor of {result['moved']:.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
