"""`slmjax models` and `slmjax data`: what there is to train, and on what."""

import dataclasses
from collections.abc import Sequence

from slmjax.cli.options import experiment_name, parse, positional, print_aside, print_json


def models_command(words: Sequence[str]) -> int:
    """list the named architectures with their sizes and costs"""
    from slmjax.models import zoo

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        json: bool = False  # print the table as JSON

    given = parse(Arguments, words, default=Arguments(), command="models", description=models_command.__doc__)
    summaries = {name: zoo.describe(build()) for name, build in zoo.ARCHITECTURES.items()}
    if given.json:
        print_json({name: dataclasses.asdict(summary) for name, summary in summaries.items()})
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in (
        "name",
        "parameters",
        "active",
        "embedding",
        "FLOPs/token",
        "bf16 bytes",
        "cache B/token",
    ):
        table.add_column(heading, justify="left" if heading == "name" else "right")
    for name, one in summaries.items():
        figures = (one.parameters, one.active_parameters, one.embedding_parameters)
        table.add_row(
            name,
            *(f"{n:,}" for n in figures),
            f"{one.training_flops_per_token:.3g}",
            f"{one.bytes_bf16:,}",
            f"{one.cache_bytes_per_token:,.0f}",
        )
    Console(width=max(120, Console().width), highlight=False).print(table)
    return 0


def data_command(words: Sequence[str]) -> int:
    """prepare or look at data: slmjax data prepare|inspect [EXPERIMENT] [--data.path FILE ...]"""
    from slmjax.data.config import DataConfig
    from slmjax.data.preparation import inspect, prepare
    from slmjax.data.tokenizers import TokenizerConfig
    from slmjax.training import recipes

    action, rest = positional(words)
    if action not in ("prepare", "inspect") and not {"-h", "--help"} & set(words):
        raise ValueError(f"{action or 'data'}: say `slmjax data prepare` or `slmjax data inspect`")
    name, options = experiment_name(rest)
    start = recipes.load_experiment(name or "nano")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        samples: int = 3  # decoded samples that `inspect` shows
        json: bool = False  # print statistics as JSON
        data: DataConfig = start.data
        tokenizer: TokenizerConfig = start.tokenizer

    given = parse(
        Arguments,
        options,
        default=Arguments(),
        command=f"data {action or 'prepare|inspect'}",
        description=data_command.__doc__,
    )
    if action == "prepare":
        prepared = prepare(given.data, given.tokenizer, log=print_aside)
        every = [("train", shards) for shards, _ in prepared.train] + [
            ("heldout", shards) for shards in prepared.heldout
        ]
        if given.json:
            print_json([dataclasses.asdict(shards.manifest) for _, shards in every])
            return 0
        for side, shards in every:
            counts = f"{shards.manifest.num_documents:,} documents, {shards.manifest.num_bytes:,} bytes, {shards.manifest.num_tokens:,} tokens"
            print(f"{shards.manifest.source_name}, {side}: {counts}, in {shards.directory}")
        return 0
    found = inspect(given.data, given.tokenizer, num_samples=given.samples, log=print_aside)
    if given.json:
        print_json(found)
        return 0
    for key, value in found.items():
        if key != "samples":
            print(f"{key}: {value}")
    for sample in found["samples"]:
        print(f"--- {sample}")
    return 0
