"""`slmjax import` and `slmjax export`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from slmjax.cli.options import by_place, load_code, parse, print_json


def import_command(words: Sequence[str]) -> int:
    """read a released model: slmjax import DIR_OR_GGUF OUT_DIR"""
    from slmjax.convert.import_export import import_model

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        source: Annotated[str, *by_place("DIR_OR_GGUF")]  # Hugging Face directory or GGUF file
        out: Annotated[str, *by_place("OUT_DIR")]  # directory to write
        tokenizer: str | None = None  # tokenizer.json, or a directory with one, in place of the model's own
        add_token: tuple[
            str, ...
        ] = ()  # special tokens to add to the vocabulary; their embeddings begin as the mean of the others
        vocab_multiple: int = 1  # pad the tables to a multiple of this many rows
        json: bool = False  # print what was written as JSON

    given = parse(Arguments, words, command="import", description=import_command.__doc__)
    written = import_model(
        given.source,
        given.out,
        tokenizer=given.tokenizer,
        add_tokens=given.add_token,
        vocab_multiple=given.vocab_multiple,
    )
    _tell(written, is_json=given.json, then=f'slmjax generate {given.out} "Once upon a time"')
    return 0


def export_command(words: Sequence[str]) -> int:
    """write a model for other engines: slmjax export RUN_OR_MODEL_DIR OUT --to hf|gguf"""
    from slmjax.convert.import_export import Target, WeightType, export_model

    load_code(words)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        source: Annotated[
            str, *by_place("RUN_OR_MODEL_DIR")
        ]  # run directory, or directory of an imported model
        out: Annotated[str, *by_place("OUT")]  # what to write: a directory for hf, a file for gguf
        to: Target  # the format
        dtype: WeightType | None = None  # dtype of the weights (none: the one they are stored in)
        step: int | None = None  # checkpoint of the run (none: the newest)
        # Python file that defines the classes of your own which the run's settings name
        code: str | None = None
        json: bool = False  # print what was written as JSON

    given = parse(Arguments, words, command="export", description=export_command.__doc__)
    _tell(
        export_model(given.source, given.out, to=given.to, dtype=given.dtype, step=given.step),
        is_json=given.json,
    )
    return 0


def _tell(written: Any, *, is_json: bool, then: str | None = None) -> None:
    if is_json:
        print_json(dataclasses.asdict(written))
        return
    print(
        f"{written.path}: {written.family}, {written.parameters:,} parameters, {written.bytes / 1e6:,.1f} MB "
        "of weights"
    )
    for note in written.notes:
        print(f"note: {note}")
    if then is not None:
        print(f"try: {then}")
