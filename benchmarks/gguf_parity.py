"""Is the loss that was trained the loss that is deployed? A model in ours and in llama.cpp, in float32 and
after training for q4_0.

    slmjax train                                                    # a model of 3.8M parameters
    python benchmarks/gguf_parity.py runs/nano-...
    python benchmarks/gguf_parity.py smollm2 --steps 8 --rows 1 --length 256 --lr 1e-5 --tokens 256       # an
    imported model

The model is exported in float32 and compared; it is trained some further steps with q4_0 weights and q8_0
inputs, which is what llama.cpp computes on CPUs, exported as its codes, and compared; with --weights-only too
after training for q4_0 without inputs. Text is Python's standard library. The aims: float32 within 1e-6 of
the perplexity; q4_0 within twice the floor or two standard errors; all bytes equal.
"""

import argparse
import dataclasses
import math
from pathlib import Path

from slmjax import startup

startup.keep_memory()

from slmjax.convert.import_export import Target, WeightType, export_model  # noqa: E402
from slmjax.convert.verify.export import Verification, verify_export  # noqa: E402
from slmjax.quantization.rules import quant_of  # noqa: E402
from slmjax.runner import trainer  # noqa: E402
from slmjax.training.experiment import EvalConfig, Experiment, starting_from  # noqa: E402
from slmjax.training.recipes import nano  # noqa: E402


def further(source: Path, quant: str, given: argparse.Namespace) -> Experiment:
    """Some steps in the formats, from a model."""
    start = starting_from(source, nano())
    optim = dataclasses.replace(start.optim, lr=given.lr, muon_lr=given.lr, warmup_steps=1)
    data = dataclasses.replace(start.data, batch_size=given.rows, sequence_length=given.length)
    run = dataclasses.replace(
        start.run,
        name=f"parity-{quant}",
        steps=given.steps,
        directory=str(given.directory),
        sample_prompts=(),
        log_every=1,
    )
    evaluation = EvalConfig(every=10**9, max_documents=1, sample=False)
    return dataclasses.replace(start, quant=quant_of(quant), optim=optim, data=data, run=run, eval=evaluation)


def row(name: str, found: Verification) -> str:
    loss = found.loss
    assert loss is not None
    differing = sum(one.differing for one in found.tensors)
    flipped = sum(one.flipped_codes for one in found.products)
    codes = sum(one.input_codes for one in found.products)
    return (
        f"| {name} | {loss.tokens} | {math.exp(loss.ours):.6f} | {math.exp(loss.engine):.6f} | "
        f"{math.expm1(loss.difference):+.1e} | "
        f"{2 * loss.floor:.1e} | {2 * loss.standard_error:.1e} | {differing} of "
        f"{sum(one.numbers for one in found.tensors):,} | "
        f"{flipped} of {codes:,} | {'yes' if found.holds else 'NO'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="run directory, or directory of an imported model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=2048, help="that are compared")
    parser.add_argument("--weights-only", action="store_true")
    parser.add_argument("--directory", type=Path, default=Path("runs"))
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    data = dataclasses.replace(nano().data, sequence_length=given.length)
    rows = []
    for quant in ("", "q4_0+q8_0", *(["q4_0"] if given.weights_only else [])):
        source = Path(trainer.train(further(given.source, quant, given)).run_dir) if quant else given.source
        file = given.directory / f"{given.source.name}-{quant or 'float32'}.gguf"
        file.unlink(missing_ok=True)
        export_model(source, file, to=Target.GGUF, dtype=None if quant else WeightType.F32)
        rows.append(row(quant or "float32", verify_export(source, file, data=data, max_tokens=given.tokens)))
    print(
        (
            "| weights + inputs | tokens | perplexity, ours | llama.cpp | relative difference | twice the "
            "floor "
            "| two standard errors | "
        ),
        end="",
    )
    print("numbers that differ | input codes that flip | holds |\n" + "|---" * 10 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
