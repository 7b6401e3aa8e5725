"""`slmjax models` and `slmjax data`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from slmjax.cli.options import parse, print_json, split_experiment, split_positional


def models_command(argv: Sequence[str]) -> int:
    """List the named architectures with their sizes and costs.

    FLOPs are those of training, per token of a sequence of 4,096 or 131,072 tokens. The state is what
    decoding keeps of it, in bfloat16, with states of recurrences in float32.

    slmjax models
    """
    from slmjax.models import zoo

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # print the table as JSON
        json: bool = False

    args = parse(Arguments, argv, default=Arguments(), command="models", description=models_command.__doc__)
    summaries = {name: zoo.describe(build()) for name, build in zoo.ARCHITECTURES.items()}
    if args.json:
        print_json({name: dataclasses.asdict(summary) for name, summary in summaries.items()})
        return 0
    from slmjax.planning.memory import size_text
    from slmjax.telemetry.columns import print_columns

    # Costs of a sequence of 4k and of 128k tokens: where mixers differ.
    lengths = [f"{length // 1024}k" for length in zoo.LENGTHS]
    head = (
        "name",
        "parameters",
        "active",
        "embedding",
        "bytes",
        "resident",
        *(f"FLOPs/token {length}" for length in lengths),
        *(f"state {length}" for length in lengths),
    )
    rows = [
        (
            name,
            f"{summary.parameters:,}",
            f"{summary.active_parameters:,}",
            f"{summary.embedding_parameters:,}",
            size_text(summary.bytes_bf16),
            size_text(summary.resident_bytes_bf16),
            *(f"{costs.training_flops_per_token:.3g}" for costs in summary.by_length),
            *(size_text(costs.state_bytes) for costs in summary.by_length),
        )
        for name, summary in summaries.items()
    ]
    print_columns(head, rows, right=range(1, len(head)))
    return 0


def data_command(argv: Sequence[str]) -> int:
    """Prepare the data of an experiment, or inspect it.

    slmjax data prepare [EXPERIMENT] [--data.path FILE ...]
    slmjax data inspect [EXPERIMENT] [--data.path FILE ...]
    """
    from slmjax.data.config import DataConfig
    from slmjax.data.tokenizers import TokenizerConfig
    from slmjax.training import recipes

    action, rest = split_positional(argv)
    if action not in ("prepare", "inspect") and not {"-h", "--help"} & set(argv):
        raise ValueError(f"{action or 'data'}: use `slmjax data prepare` or `slmjax data inspect`")
    name, options = split_experiment(rest)
    start = recipes.load_experiment(name or "nano")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # decoded samples that `inspect` shows
        samples: int = 3
        # print the statistics as JSON
        json: bool = False
        data: DataConfig = start.data
        tokenizer: TokenizerConfig = start.tokenizer

    args = parse(
        Arguments,
        options,
        default=Arguments(),
        command=f"data {action or 'prepare|inspect'}",
        description=data_command.__doc__,
    )
    if action == "prepare":
        _prepare(args)
    else:
        _inspect(args)
    return 0


def _prepare(args: Any) -> None:
    from slmjax.data.preparation import prepare

    prepared = prepare(args.data, args.tokenizer)
    sides = [("train", shards) for shards, _ in prepared.train]
    sides += [("heldout", shards) for shards in prepared.heldout]
    if args.json:
        print_json([dataclasses.asdict(shards.manifest) for _, shards in sides])
        return
    for side, shards in sides:
        manifest = shards.manifest
        counts = (
            f"{manifest.num_documents:,} documents, {manifest.num_bytes:,} bytes, "
            f"{manifest.num_tokens:,} tokens"
        )
        print(f"{manifest.source_name}, {side}: {counts}, in {shards.directory}")


def _inspect(args: Any) -> None:
    from slmjax.data.preparation import inspect

    statistics = inspect(args.data, args.tokenizer, num_samples=args.samples)
    if args.json:
        print_json(statistics)
        return
    for key, value in statistics.items():
        if key != "samples":
            print(f"{key}: {value}")
    for sample in statistics["samples"]:
        print(f"--- {sample}")
