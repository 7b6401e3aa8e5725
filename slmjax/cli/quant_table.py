"""`slmjax quant`: what the rules of quantization come to; the report is in `quant_reporting.py`."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any

from slmjax.cli.options import (
    experiment_name,
    load_code,
    option,
    parse,
    positional,
    print_json,
    without_prefix,
)
from slmjax.cli.quant_reporting import recovery_command


def quant_command(words: Sequence[str]) -> int:
    """list number formats, or report on a study of them: slmjax quant table [EXPERIMENT] [--quant q4_0] |
    report STUDY_FILE [DIR]
    """
    action, rest = positional(words)
    if action == "report":
        return recovery_command(rest)
    if action != "table" and not {"-h", "--help"} & set(words):
        raise ValueError(f"{action or 'quant'}: say `slmjax quant table` or `slmjax quant report`")
    return _table(rest)


def _table(words: Sequence[str]) -> int:
    from slmjax.models.quantized_modules import assignment_lines
    from slmjax.quantization.rules import quant_of
    from slmjax.training import experiment as experiments
    from slmjax.training import recipes
    from slmjax.training.programs import resolved_model

    name, options = experiment_name(words)
    load_code(options)
    start = recipes.load_experiment(name or "nano")
    if (chosen := option(options, "--quant")) is not None:
        start = dataclasses.replace(start, quant=quant_of(chosen))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # formats WEIGHTS[+INPUTS[+CACHE]] in place of the experiment's own, such as q4_0+q8_0
        quant: str | None = None
        vocab_size: int = 4096  # of a tokenizer that is yet to be trained
        code: str | None = None  # Python file that defines the classes of your own which the experiment names
        json: bool = False  # print every path as JSON, layers not gathered
        experiment: Annotated[experiments.Experiment, without_prefix()] = start

    given = parse(
        Arguments, options, default=Arguments(), command="quant table", description=quant_command.__doc__
    )
    lines = assignment_lines(resolved_model(given.experiment, vocab_size=given.vocab_size))
    if given.json:
        print_json([{**dataclasses.asdict(line), "bits": line.bits} for line in lines])
        return 0
    _print_table(lines)
    return 0


def _print_table(lines: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading, justify in (
        ("path", "left"),
        ("shape", "left"),
        ("format", "left"),
        ("inputs", "left"),
        ("bits", "right"),
        ("bytes", "right"),
    ):
        table.add_column(heading, justify=justify)  # pyright: ignore[reportArgumentType]  # a Literal in a loop
    table.add_column("why in floating point")
    for path, count, line in _gathered(lines):
        shape = " x ".join(map(str, line.shape))
        size = f"{line.bytes * count:,}" + (" a token" if path.endswith("/cache") else "")
        table.add_row(
            path, shape, line.format or "float32", line.input or "", f"{line.bits:.3g}", size, line.reason
        )
    console = Console(width=max(150, Console().width), highlight=False)
    console.print(table)
    stored = [line for line in lines if not line.path.endswith("/cache")]
    total = sum(line.bytes for line in stored)
    covered = sum(line.bytes for line in stored if line.format)
    bare = sum(line.bytes * 8 // line.bits if line.bytes else 0 for line in stored) * 4
    console.print(
        f"{total:,.0f} bytes in all, {covered / max(total, 1):.1%} of them in a format; {bare:,.0f} in "
        "float32"
    )


def _gathered(lines: Sequence[Any]) -> list[tuple[str, int, Any]]:
    """One line for a parameter that all layers have alike: its path with their numbers, how many they are,
    the line of the first.
    """
    rows: dict[Any, list[Any]] = {}
    for line in lines:
        name = re.sub(r"^layers/\d+/", "layers/*/", line.path)
        rows.setdefault((name, line.shape, line.format, line.input, line.reason), []).append(line)
    result = []
    for (name, *_), alike in rows.items():
        numbers = [match.group(1) for line in alike if (match := re.match(r"layers/(\d+)/", line.path))]
        result.append((name.replace("*", _ranges([int(number) for number in numbers])), len(alike), alike[0]))
    return result


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in ascending order, neighbours joined: 0-3,6."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
