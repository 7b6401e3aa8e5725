"""Loss of a trained model in slmjax and in llama.cpp, in float32 and after training for q4_0.

    slmjax train                                                    # a model of 3.8M parameters
    python benchmarks/gguf_parity.py runs/nano-...
    # an imported model
    python benchmarks/gguf_parity.py smollm2 --steps 8 --rows 1 --length 256 --lr 1e-5 --tokens 256

The model is exported in float32 and compared. It is trained some further steps with q4_0 weights and q8_0
inputs, which is what llama.cpp computes on CPUs, exported as its codes, and compared; with --weights-only
also after training for q4_0 without quantized inputs. Text is Python's standard library. The targets: float32
within 1e-6 of the perplexity; q4_0 within twice the floor or two standard errors; all bytes equal.
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


def further(source: Path, quant: str, args: argparse.Namespace) -> Experiment:
    """Return an experiment of some further steps of a model in these formats."""
    start = starting_from(source, nano())
    optim = dataclasses.replace(start.optim, lr=args.lr, muon_lr=args.lr, warmup_steps=1)
    data = dataclasses.replace(start.data, batch_size=args.rows, sequence_length=args.length)
    run = dataclasses.replace(
        start.run,
        name=f"parity-{quant}",
        steps=args.steps,
        directory=str(args.directory),
        sample_prompts=(),
        log_every=1,
    )
    evaluation = EvalConfig(every=10**9, max_documents=1, sample=False)
    return dataclasses.replace(start, quant=quant_of(quant), optim=optim, data=data, run=run, eval=evaluation)


def row(name: str, verification: Verification) -> str:
    loss = verification.loss
    assert loss is not None
    differing = sum(tensor.differing for tensor in verification.tensors)
    flipped = sum(product.flipped_codes for product in verification.products)
    codes = sum(product.input_codes for product in verification.products)
    return (
        f"| {name} | {loss.tokens} | {math.exp(loss.ours):.6f} | {math.exp(loss.engine):.6f} | "
        f"{math.expm1(loss.difference):+.1e} | "
        f"{2 * loss.floor:.1e} | {2 * loss.standard_error:.1e} | {differing} of "
        f"{sum(tensor.numbers for tensor in verification.tensors):,} | "
        f"{flipped} of {codes:,} | {'yes' if verification.holds else 'NO'} |"
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
    parser.add_argument("--tokens", type=int, default=2048, help="tokens that are compared")
    parser.add_argument("--weights-only", action="store_true")
    parser.add_argument("--directory", type=Path, default=Path("runs"))
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    data = dataclasses.replace(nano().data, sequence_length=args.length)
    rows = []
    for quant in ("", "q4_0+q8_0", *(["q4_0"] if args.weights_only else [])):
        source = Path(trainer.train(further(args.source, quant, args)).run_dir) if quant else args.source
        file = args.directory / f"{args.source.name}-{quant or 'float32'}.gguf"
        file.unlink(missing_ok=True)
        export_model(source, file, to=Target.GGUF, dtype=None if quant else WeightType.F32)
        rows.append(row(quant or "float32", verify_export(source, file, data=data, max_tokens=args.tokens)))
    print(
        (
            "| weights + inputs | tokens | perplexity, slmjax | llama.cpp | relative difference | twice the "
            "floor "
            "| two standard errors | "
        ),
        end="",
    )
    print("values that differ | input codes that flip | holds |\n" + "|---" * 10 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
