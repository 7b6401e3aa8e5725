"""`slmjax verdict`: which arm of runs is better, for runs that slmjax did not train too."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from slmjax.cli.options import parse, positional, print_json


def verdict_command(argv: Sequence[str]) -> int:
    """Judge which arm is better, from files or run directories.

    slmjax verdict RESULTS ... --arm COLUMN --metric COLUMN --baseline NAME
    slmjax verdict --campaign DIR

    Columns that are not named are guessed where only one can be meant. A run has diverged if its metric is
    NaN or infinite, or its status says so; a blank metric is no result. The exit status is 0, also if nothing
    is resolved, and 2 for input that cannot be used.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # files (.csv, .tsv, .jsonl, .json; W&B exports) or directories (of a run, several runs, a study)
        results: Annotated[tuple[str, ...], *positional("RESULTS ...")] = ()
        # column that says which arm a run belongs to; of run directories and studies also a setting, such as
        # optim.lr
        arm: str | None = None
        # column of the seed: runs of two arms with the same one are a pair
        seed: str | None = None
        # column that is compared
        metric: str | None = None
        # name of the arm that every other is compared with
        baseline: str | None = None
        # differences up to this are equal (none: nothing is called equal)
        equal_within: float | None = None
        # smallest difference worth having, for power
        smallest_effect: float | None = None
        # the metric is better if it is higher, such as an accuracy
        higher_is_better: bool = False
        # of intervals; the probability of any false verdict is at most 1 - confidence
        confidence: float = 0.95
        # numbers of seeds at which verdicts are drawn, such as 3 5 8, chosen before the first result
        looks: tuple[int, ...] = ()
        # column of the status: finished, diverged, failed, running (NaN in the metric is diverged, too)
        status: str | None = None
        # column of the step, if a run has several rows: its last one counts
        step: str | None = None
        # regular expression with the groups arm and seed, for names of runs: (?P<arm>.+)-seed(?P<seed>\d+)
        name_pattern: str | None = None
        # columns to report without a verdict
        further_metrics: tuple[str, ...] = ()
        # column that must be equal for all arms, such as tokens
        budget: str | None = None
        # largest difference of budgets that counts as none, as a fraction
        tolerance: float = 0.0
        # directory to write findings.json and the report to (none: nothing is written)
        out: str | None = None
        # instead of results: judge all studies below this directory together
        campaign: str | None = None
        # of a campaign: largest expected fraction of false verdicts among those that survive
        rate: float = 0.05
        # of a campaign: benjamini-yekutieli or e-bh
        control: str = "benjamini-yekutieli"
        # print the findings as JSON
        json: bool = False

    args = parse(Arguments, argv, command="verdict", description=verdict_command.__doc__)
    return _verdict(args) if args.campaign is None else _campaign(args)


def _campaign(args: Any) -> int:
    from slmjax.config import near_names, to_json
    from slmjax.studies.campaign import CAMPAIGN, Control, judge_campaign, print_campaign, read_campaign
    from slmjax.telemetry.run_directory import write_json

    if args.results:
        raise ValueError(f"give results ({args.results[0]}) or --campaign {args.campaign}, not both")
    names = [control.value for control in Control]
    if args.control not in names:
        raise ValueError(
            f"--control {args.control} is none.{near_names(args.control, names)} Give {' or '.join(names)}"
        )
    judged = judge_campaign(read_campaign(args.campaign), rate=args.rate, control=Control(args.control))
    written = [] if args.out is None else [write_json(Path(args.out) / CAMPAIGN, to_json(judged))]
    if args.json:
        print_json({"written": [*map(str, written)], "campaign": to_json(judged)})
        return 0
    print_campaign(judged)
    for path in written:
        print(f"\n{path}")
    return 0


def _verdict(args: Any) -> int:
    from slmjax.studies import Budget, findings_json, print_findings, write_findings
    from slmjax.studies.findings import analyze_members
    from slmjax.studies.foreign_results import choose_columns, read_columns, with_names
    from slmjax.studies.report import report_of, write_report_files
    from slmjax.studies.results_files import read_results
    from slmjax.studies.statistics.results_table import Rules

    # Checked before any file is read.
    rules = Rules(
        confidence=args.confidence,
        lower_is_better=not args.higher_is_better,
        equal_within=args.equal_within,
        smallest_effect=args.smallest_effect,
        looks=args.looks,
    )
    _ = Budget(tolerance=args.tolerance)
    table = read_results(args.results)
    if args.name_pattern is not None:
        table = with_names(table, args.name_pattern)
    columns = choose_columns(
        table,
        arm=args.arm,
        seed=args.seed,
        metric=args.metric,
        status=args.status,
        step=args.step,
        further_metrics=args.further_metrics,
        budget=args.budget,
    )
    results = read_columns(table, columns, baseline=args.baseline, rules=rules, tolerance=args.tolerance)
    findings = analyze_members(results.question, results.members)
    written = []
    if args.out is not None:
        written = [
            write_findings(findings, Path(args.out)),
            write_report_files(report_of(findings, results.members), Path(args.out), needs_page=False),
        ]
    if args.json:
        print_json(
            {
                "columns": dataclasses.asdict(columns),
                "written": [*map(str, written)],
                "findings": findings_json(findings),
            }
        )
        return 0
    if columns.guessed:
        guesses = (f"{role} = {getattr(columns, role)}" for role in columns.guessed)
        print(f"columns: {', '.join(guesses)} (guessed)\n")
    print_findings(findings)
    for path in written:
        print(f"\n{path}")
    return 0
