"""`slmjax eval`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from slmjax.cli.options import load_code, needed, option, parse, positional, print_aside, print_json


def eval_command(words: Sequence[str]) -> int:
    """evaluate a model on held-out text: slmjax eval RUN_DIR [--data.path FILE]"""
    from slmjax import checkpoint, evaluation
    from slmjax.data.config import DataConfig
    from slmjax.experiment import read_experiment

    path, options = positional(words)
    load_code(options)
    of_run = read_experiment(Path(path)).data if path and (Path(path) / "config.json").is_file() else DataConfig()
    if option(options, "--data.path") is not None:
        of_run = dataclasses.replace(of_run, heldout_fraction=0.0)  # another text is evaluated whole, unless a fraction is given

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        step: int | None = None  # checkpoint to evaluate (none: the newest)
        max_documents: int | None = None  # evaluate the first held-out documents only (none: all)
        overlap: int | None = None  # tokens of context that each further window of a long document repeats (none: as in the run)
        code: str | None = None  # Python file that defines the classes of your own which the run's settings name
        json: bool = False  # print the result as JSON
        data: DataConfig = of_run

    given = parse(Arguments, options, default=Arguments(), command="eval RUN_DIR", description=eval_command.__doc__)
    loaded = checkpoint.load_model(needed(path, "eval RUN_DIR"), step=given.step)
    # None: the held-out text of the run, and an error if it has none.
    data = given.data if any(word.startswith("--data.") for word in options) else None
    result = evaluation.evaluate(loaded, data=data, max_documents=given.max_documents, overlap=given.overlap, log=print_aside)
    if given.json:
        print_json(dataclasses.asdict(result))
        return 0
    print(f"{result.documents:,} documents, {result.tokens:,} tokens, {result.bytes:,} bytes, in {result.seconds:.1f} s")
    print(f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte")
    return 0
