"""`slmjax coordinate-check`: activations, logits and updates over widths and depths."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Annotated, Any

from slmjax.cli.options import (
    load_code,
    parse,
    print_json,
    print_stderr,
    split_experiment,
    without_prefix,
)


def coordinate_check_command(argv: Sequence[str]) -> int:
    """Check that settings transfer between widths and depths.

    slmjax coordinate-check [EXPERIMENT] [--widths 64 256 1024] [--depths 2 4 8 16]

    Each width and depth is a model that is compiled and trained for a few steps, in each parameterization.
    """
    from slmjax.models.parameterization import Parameterization
    from slmjax.training import experiment as experiments
    from slmjax.training import recipes

    name, options = split_experiment(argv)
    load_code(options)
    start = recipes.load_experiment(name or "nano")

    class Tokens(enum.Enum):
        SYNTHETIC = "synthetic"
        TEXT = "text"

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # widths (embed_dim) that are compared, at the experiment's depth; one for no comparison. Time grows
        # with the square of the largest: 512 and 1024 show more, and take minutes on a CPU
        widths: tuple[int, ...] = (64, 128, 256)
        # depths (layers) that are compared, at the experiment's width; one for no comparison
        depths: tuple[int, ...] = (2, 4, 8)
        # parameterizations that are compared
        parameterization: tuple[Parameterization, ...] = tuple(Parameterization)
        # numbers of steps after which is measured; 0 stands for the initial weights
        steps: tuple[int, ...] = (1, 4, 8)
        # initialisations, over which sizes are averaged
        seeds: int = 1
        # tokens of the batches: synthetic ones, or the experiment's text
        tokens: Tokens = Tokens.SYNTHETIC
        # directory for coordinates.html and coordinates.json (none: only print)
        out: str | None = None
        # print all steps as JSON
        json: bool = False
        # Python file that defines your own classes, if the experiment names any
        code: str | None = None
        experiment: Annotated[experiments.Experiment, without_prefix()] = start

    args = parse(
        Arguments,
        options,
        default=Arguments(),
        command="coordinate-check",
        description=coordinate_check_command.__doc__,
        first=("widths", "depths", "parameterization", "steps", "seeds", "tokens", "out"),
    )
    _check(args, is_text=args.tokens is Tokens.TEXT)
    return 0


def _check(args: Any, *, is_text: bool) -> None:
    from pathlib import Path

    from slmjax.planning.coordinates import coordinate_check, text_batches
    from slmjax.planning.coordinates_page import check_json, check_lines, write_check
    from slmjax.telemetry.columns import output_width
    from slmjax.telemetry.report import charts

    # Before minutes of training: a page needs the package that draws it.
    if args.out is not None:
        charts.converter()
    experiment = args.experiment
    batches = None
    if is_text:
        experiment, batches = text_batches(experiment, num_steps=max(args.steps))
    check = coordinate_check(
        experiment,
        widths=args.widths,
        depths=args.depths,
        kinds=args.parameterization,
        steps=args.steps,
        seeds=args.seeds,
        batches=batches,
        progress=print_stderr,
    )
    if args.json:
        print_json(check_json(check))
    else:
        print("\n".join(check_lines(check, width=output_width())))
    if args.out is not None:
        for path in write_check(check, Path(args.out)):
            print_stderr(str(path))
