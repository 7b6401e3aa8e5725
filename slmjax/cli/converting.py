"""`slmjax import`, `slmjax export` and `slmjax slice`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from slmjax.cli.options import load_code, parse, positional, print_json


def import_command(argv: Sequence[str]) -> int:
    """Import a model from a Hugging Face directory or GGUF file.

    slmjax import DIR_OR_GGUF OUT_DIR
    """
    from slmjax.convert.import_export import import_model

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # Hugging Face directory or GGUF file
        source: Annotated[str, *positional("DIR_OR_GGUF")]
        # directory to write
        out: Annotated[str, *positional("OUT_DIR")]
        # tokenizer.json, or a directory with one, to use instead of the model's own
        tokenizer: str | None = None
        # special tokens to add to the vocabulary; their embeddings start as the mean of the others
        add_token: tuple[str, ...] = ()
        # pad the embedding and the head to a multiple of this many rows
        vocab_multiple: int = 1
        # print a summary of what was written as JSON
        json: bool = False

    args = parse(Arguments, argv, command="import", description=import_command.__doc__)
    imported = import_model(
        args.source,
        args.out,
        tokenizer=args.tokenizer,
        add_tokens=args.add_token,
        vocab_multiple=args.vocab_multiple,
    )
    _print_written(imported, is_json=args.json, next_command=f'slmjax generate {args.out} "Once upon a time"')
    return 0


def export_command(argv: Sequence[str]) -> int:
    """Export a model for Hugging Face libraries or llama.cpp.

    slmjax export RUN_OR_MODEL_DIR OUT --to hf|gguf
    """
    from slmjax.convert.import_export import Target, WeightType, export_model

    load_code(argv)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # run directory, or directory of an imported or quantized model
        source: Annotated[str, *positional("RUN_OR_MODEL_DIR")]
        # output: a directory for hf, a file for gguf
        out: Annotated[str, *positional("OUT")]
        # format of the output
        to: Target
        # dtype of the weights (none: the stored dtype)
        dtype: WeightType | None = None
        # checkpoint of the run (none: the newest)
        step: int | None = None
        # Python file that defines your own classes, if the run's config names any
        code: str | None = None
        # print a summary of what was written as JSON
        json: bool = False

    args = parse(Arguments, argv, command="export", description=export_command.__doc__)
    exported = export_model(args.source, args.out, to=args.to, dtype=args.dtype, step=args.step)
    _print_written(exported, is_json=args.json)
    return 0


def slice_command(argv: Sequence[str]) -> int:
    """Write a smaller model out of nested feed-forward layers.

    slmjax slice RUN_OR_MODEL_DIR OUT_DIR --fractions 0.5
    """
    from slmjax.convert.slicing import slice_model

    load_code(argv)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # run directory, or directory of an imported model
        source: Annotated[str, *positional("RUN_OR_MODEL_DIR")]
        # directory to write
        out: Annotated[str, *positional("OUT_DIR")]
        # fractions of the hidden units: one for all layers, or one for each; of ffn.nested, or 1
        fractions: tuple[float, ...]
        # checkpoint of the run (none: the newest)
        step: int | None = None
        # Python file that defines your own classes, if the run's config names any
        code: str | None = None
        # print a summary of what was written as JSON
        json: bool = False

    args = parse(Arguments, argv, command="slice", description=slice_command.__doc__)
    written = slice_model(args.source, args.out, fractions=args.fractions, step=args.step)
    _print_written(written, is_json=args.json, next_command=f"slmjax eval {args.out}")
    return 0


def _print_written(written: Any, *, is_json: bool, next_command: str | None = None) -> None:
    if is_json:
        print_json(dataclasses.asdict(written))
        return
    print(
        f"{written.path}: {written.family}, {written.parameters:,} parameters, {written.bytes / 1e6:,.1f} MB "
        "of weights"
    )
    for note in written.notes:
        print(f"note: {note}")
    if next_command is not None:
        print(f"try: {next_command}")
