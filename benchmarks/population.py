"""A population of seeds against the same runs one after another: tokens per second.

    python benchmarks/population.py                                     # 8 members of 1M parameters
    python benchmarks/population.py --parameters 200k 1M 4M --members 2 8 32
    python benchmarks/population.py --train 200                         # whole runs of 200 steps as well

Prints, for each size and number of members, what `population_pays` measures on this device: a few steps of
both ways, on random tokens, after compilation. With --train, whole runs are trained both ways: their wall
time, compilation, evaluation and checkpoints included, and the largest difference of their final losses. The
target on a GPU is 3 times the tokens per second, with 8 members of 1M parameters.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import jax
from rich.console import Console

import slmjax
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.runner.population import population_pays, train_population
from slmjax.training import OptimConfig
from slmjax.training.experiment import EvalConfig, Experiment, RunConfig
from slmjax.training.recipes import nano

WIDTHS = {"200k": 64, "1M": 128, "4M": 256}


def member(seed: int, *, width: int, batch_size: int, length: int, steps: int, directory: Path) -> Experiment:
    """Return five layers of this width, trained on the text of the experiment `nano`."""
    block = BlockConfig(
        mixer=AttentionConfig(num_heads=width // 32), ffn=MlpConfig(hidden_dim=width * 8 // 3 // 8 * 8)
    )
    stack = (LayerGroup(pattern=(block,), repeats=5),)
    return Experiment(
        model=ModelConfig(embed_dim=width, context_length=length, stack=stack),
        data=dataclasses.replace(nano().data, sequence_length=length, batch_size=batch_size, seed=seed),
        tokenizer=ByteTokenizer(),
        optim=OptimConfig(lr=2e-3, warmup_steps=20),
        eval=EvalConfig(every=steps, max_documents=64, sample=False),
        run=RunConfig(
            name="population",
            steps=steps,
            seed=seed,
            sample_prompts=(),
            directory=str(directory / f"seed-{seed}"),
        ),
    )


def measure(directory: Path, count: int, *, train: bool, **sizes: int) -> dict[str, float | str]:
    """Measure one population, and train it if asked to."""
    members = [member(seed, directory=directory / "together", **sizes) for seed in range(count)]
    tokens = sizes["batch_size"] * sizes["length"] * count
    pace = population_pays(members)
    metrics: dict[str, float | str] = {
        "device": jax.devices()[0].device_kind,
        "members": count,
        "tokens_per_second_in_turn": round(tokens / pace.seconds_in_turn),
        "tokens_per_second_together": round(tokens / pace.seconds_together),
        "ratio": round(pace.ratio, 3),
    }
    if train:
        quiet = Console(quiet=True)
        started = time.perf_counter()
        together = train_population(members, console=quiet)
        metrics["seconds_together"] = round(time.perf_counter() - started, 2)
        started = time.perf_counter()
        alone = [
            slmjax.train(member(seed, directory=directory / "alone", **sizes), console=quiet)
            for seed in range(count)
        ]
        metrics["seconds_in_turn"] = round(time.perf_counter() - started, 2)
        metrics["largest_difference_of_losses"] = max(
            abs(ours.loss - other.loss) for ours, other in zip(together, alone, strict=True)
        )
        metrics["parameters"] = together[0].parameters
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[8])
    parser.add_argument("--parameters", choices=WIDTHS, nargs="+", default=["1M"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--train", type=int, metavar="STEPS", help="train whole runs of so many steps, too")
    options = parser.parse_args()
    sizes = {"batch_size": options.batch_size, "length": options.length, "steps": options.train or 100}
    for parameters in options.parameters:
        for count in options.members:
            with tempfile.TemporaryDirectory() as directory:
                metrics = measure(
                    Path(directory), count, train=options.train is not None, width=WIDTHS[parameters], **sizes
                )
            print(json.dumps({"size": parameters} | metrics), flush=True)


if __name__ == "__main__":
    main()
