"""`slmjax formats`: the number format of every parameter; the report is in `recovery_report.py`."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any

from slmjax.cli.options import (
    load_code,
    parse,
    peek_option,
    print_json,
    split_experiment,
    split_positional,
    without_prefix,
)
from slmjax.cli.recovery_report import recovery_command


def formats_command(argv: Sequence[str]) -> int:
    """Show the number format of each parameter, or report on a study.

    slmjax formats table [EXPERIMENT] [--quant q4_0]
    slmjax formats report STUDY_FILE [DIRECTORY]
    """
    action, rest = split_positional(argv)
    if action == "report":
        return recovery_command(rest)
    if action != "table" and not {"-h", "--help"} & set(argv):
        raise ValueError(f"{action or 'formats'}: use `slmjax formats table` or `slmjax formats report`")
    return _table_command(rest, command="formats table" if action else "formats")


def _table_command(argv: Sequence[str], *, command: str) -> int:
    from slmjax.quantization.plan import assignment_lines
    from slmjax.quantization.rules import quant_of
    from slmjax.training import experiment as experiments
    from slmjax.training import recipes
    from slmjax.training.programs import resolved_model, resolved_phases

    name, options = split_experiment(argv)
    load_code(options)
    start = recipes.load_experiment(name or "nano")
    if (formats := peek_option(options, "--quant")) is not None:
        start = dataclasses.replace(start, quant=quant_of(formats))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # number formats WEIGHTS[+INPUTS[+CACHE]] instead of the experiment's, such as q4_0+q8_0
        quant: str | None = None
        # vocabulary size, if the experiment trains its tokenizer
        vocab_size: int = 4096
        # Python file that defines your own classes, if the experiment names any
        code: str | None = None
        # print every path as JSON, without grouping layers
        json: bool = False
        experiment: Annotated[experiments.Experiment, without_prefix()] = start

    args = parse(
        Arguments, options, default=Arguments(), command=command, description=formats_command.__doc__
    )
    model = resolved_model(args.experiment, vocab_size=args.vocab_size)
    lines = assignment_lines(model, resolved_phases(args.experiment))
    if args.json:
        print_json([{**dataclasses.asdict(line), "bits": line.bits} for line in lines])
    else:
        _print_table(lines)
    return 0


def _print_table(lines: Sequence[Any]) -> None:
    from slmjax.telemetry.columns import print_columns

    head = ("path", "shape", "format", "inputs", "bits", "bytes", "reason for floating point")
    rows = []
    for path, count, line in _group_layers(lines):
        shape = " x ".join(map(str, line.shape))
        size = f"{line.bytes * count:,}" + (" per token" if path.endswith("/cache") else "")
        formats = (line.format or "float32", line.input or "")
        rows.append((path, shape, *formats, f"{line.bits:.3g}", size, line.reason))
    print_columns(head, rows, right=(4, 5))
    parameters = [line for line in lines if not line.path.endswith("/cache")]
    total = sum(line.bytes for line in parameters)
    quantized = sum(line.bytes for line in parameters if line.format)
    in_float32 = sum(line.bytes * 8 // line.bits if line.bytes else 0 for line in parameters) * 4
    print(
        f"{total:,.0f} bytes in total, {quantized / max(total, 1):.1%} of them quantized; "
        f"{in_float32:,.0f} in float32"
    )


def _group_layers(lines: Sequence[Any]) -> list[tuple[str, int, Any]]:
    """Group the lines that are the same in several layers.

    Returns:
      for each group: its path, with ranges of layers in place of indices; its number of lines; the first
      line.
    """
    groups: dict[Any, list[Any]] = {}
    for line in lines:
        name = re.sub(r"^layers/\d+/", "layers/*/", line.path)
        groups.setdefault((name, line.shape, line.format, line.input, line.reason), []).append(line)
    rows = []
    for (name, *_), group in groups.items():
        matches = [re.match(r"layers/(\d+)/", line.path) for line in group]
        layers = [int(match[1]) for match in matches if match]
        rows.append((name.replace("*", _ranges(layers)), len(group), group[0]))
    return rows


def _ranges(numbers: Sequence[int]) -> str:
    """Format ascending integers as ranges: 0-3,6."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ranges)
