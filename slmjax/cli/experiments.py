"""`slmjax experiments`."""

import dataclasses
import textwrap
from collections.abc import Sequence

from slmjax.cli.source import built_in_experiments


def experiments_command(argv: Sequence[str]) -> int:
    """List the built-in experiments.

    slmjax experiments
    """
    from slmjax.cli.options import parse, print_json

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # print the list as JSON
        json: bool = False

    description = experiments_command.__doc__
    args = parse(Arguments, argv, default=Arguments(), command="experiments", description=description)
    if args.json:
        print_json(built_in_experiments())
        return 0
    for name, summary in built_in_experiments().items():
        print(textwrap.fill(f"{name:<18}{summary}", 80, subsequent_indent=" " * 18))
    print(
        "\nTrain one with `slmjax train NAME`, or a Python file of your own, which has\n"
        "`def experiment() -> Experiment`."
    )
    return 0
