"""Inject faults into small runs, and count which promises held.

    python benchmarks/chaos.py --injections 2000                 # all kinds, about half an hour on two cores
    python benchmarks/chaos.py --kinds kill disk --injections 50
    python benchmarks/chaos.py --only kill:17                    # repeat one injection

Each injection breaks a run at a random or chosen place: it kills or signals its processes, damages its files,
fills its disk, makes its numbers non-finite. An oracle then decides by itself: *survived* as promised (after
resuming, losses and parameters have the bits of an undisturbed run), *refused* cleanly (non-zero status, one
error that names the file and the way out, no traceback), or *defect*. docs/reliability.md lists the promises.

Results are appended to a JSONL file, and what it has already is not repeated: an interrupted campaign
continues. Everything random follows from `--seed`, the kind and the number of an injection.
"""

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.injections import disks, litter, processes, sessions, signals, stored, texts, values  # noqa: E402
from benchmarks.injections.lab import Lab  # noqa: E402
from benchmarks.injections.verdicts import Case, Defect, Outcome, Verdict  # noqa: E402

MODULES = (signals, stored, litter, disks, values, texts, processes)
KINDS: dict[str, Any] = {name: inject for module in MODULES for name, inject in module.KINDS.items()}
# Shares of a campaign. Two processes cost four times as much as others, reading a small file a fifth.
SHARES = {
    "kill": 12,
    "signal": 10,
    "checkpoint": 17,
    "small file": 24,
    "disk": 10,
    "non-finite": 6,
    "data": 11,
    "processes": 3,
    "litter": 7,
}


def plan(kinds: Iterable[str], injections: int) -> list[tuple[str, int]]:
    """Return kinds and numbers of a campaign, the kinds mixed so that a part of it has something of each."""
    chosen = {kind: SHARES[kind] for kind in kinds}
    total = sum(chosen.values())
    counts = {kind: max(1, injections * share // total) for kind, share in chosen.items()}
    # What rounding has left goes to the largest.
    counts[max(chosen, key=lambda kind: chosen[kind])] += injections - sum(counts.values())
    cases = [(number / counts[kind], kind, number) for kind in chosen for number in range(counts[kind])]
    return [(kind, number) for _, kind, number in sorted(cases)]


def inject(lab: Lab, kind: str, number: int, *, seed: int) -> dict[str, Any]:
    """Inject one fault and return its record."""
    case = Case(kind=kind, number=number, seed=seed)
    started = time.monotonic()
    try:
        outcome = KINDS[kind](lab, case)
    except Defect as defect:
        outcome = Outcome(verdict=Verdict.DEFECT, reason=str(defect))
    except Exception:
        # An oracle that cannot judge has met what nobody promised.
        outcome = Outcome(verdict=Verdict.DEFECT, reason=f"the oracle failed: {traceback.format_exc()}")
    option = f" --seed {seed}" if seed else ""
    return {
        "kind": kind,
        "number": number,
        "seed": seed,
        "variant": case.variant,
        "verdict": outcome.verdict.value,
        "reason": outcome.reason,
        "seconds": round(time.monotonic() - started, 3),
        "command": f"python benchmarks/chaos.py --only '{kind}:{number}'{option}",
    }


def _work(lab: Lab, cases: list[tuple[str, int]], counter: Any, out: Path, seed: int, loud: bool) -> None:
    """Inject what no other worker has taken yet."""
    while True:
        with counter.get_lock():
            index = counter.value
            counter.value += 1
        if index >= len(cases):
            return
        record = inject(lab, *cases[index], seed=seed)
        # One write for each line, so that lines of two workers do not mix.
        with out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        if loud or record["verdict"] == "defect":
            text = f"{record['kind']}:{record['number']} {record['verdict']} ({record['variant']}): "
            print(text + record["reason"], flush=True)


def run(lab: Lab, cases: list[tuple[str, int]], *, out: Path, seed: int, workers: int, loud: bool) -> None:
    """Inject all cases with several processes at a time, and append their records to `out`."""
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    started = [
        context.Process(target=_work, args=(lab, cases, counter, out, seed, loud)) for _ in range(workers)
    ]
    for worker in started:
        worker.start()
    for worker in started:
        worker.join()


def read(out: Path) -> list[dict[str, Any]]:
    """Return the records of a campaign; an unfinished last line is left out."""
    if not out.exists():
        return []
    records = []
    for line in out.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Return the table of RESULTS.md."""
    counts = collections.Counter((record["kind"], record["verdict"]) for record in records)
    lines = [
        "| kind | injections | survived as promised | refused cleanly | defects |",
        "|---|---|---|---|---|",
    ]
    kinds = [kind for kind in SHARES if any(record["kind"] == kind for record in records)]
    for kind in [*kinds, None]:
        row = [
            sum(count for (of, is_), count in counts.items() if kind in (of, None) and is_ == verdict.value)
            for verdict in Verdict
        ]
        cells = [kind or "all", f"{sum(row):,}", *(f"{count:,}" for count in row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def campaign(
    *,
    kinds: Iterable[str] = tuple(SHARES),
    injections: int,
    out: Path,
    work: Path | None = None,
    seed: int = 0,
    workers: int = 2,
    loud: bool = False,
    cases: list[tuple[str, int]] | None = None,
) -> list[dict[str, Any]]:
    """Inject what `out` does not have yet and return all of its records."""
    cases = cases or plan(kinds, injections)
    done = {(record["kind"], record["number"]) for record in read(out) if record["seed"] == seed}
    remaining = [case for case in cases if case not in done]
    # In memory, where there is such a directory: most of an injection is then computation.
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    directory = work or Path(tempfile.mkdtemp(prefix="chaos-", dir=memory))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        sessions.prepare(directory)
        lab = Lab(work=directory)
        lab.build()
        out.parent.mkdir(parents=True, exist_ok=True)
        run(lab, remaining, out=out, seed=seed, workers=workers, loud=loud)
    finally:
        if work is None:
            shutil.rmtree(directory, ignore_errors=True)
    return [record for record in read(out) if (record["kind"], record["number"]) in set(cases)]


def main() -> int:
    """Run the command line. The status is 1 if there is a defect."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--injections", type=int, default=2000, help="how many in all")
    parser.add_argument("--kinds", nargs="+", choices=list(SHARES), default=list(SHARES), metavar="KIND")
    parser.add_argument("--workers", type=int, default=2, help="how many at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("chaos.jsonl"), help="results, appended")
    parser.add_argument("--work", type=Path, help="directory of the runs (none: a temporary one)")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="repeat one injection, without a record")
    parser.add_argument("--loud", action="store_true", help="print every injection, not only defects")
    arguments = parser.parse_args()
    started = time.monotonic()
    options = {"work": arguments.work, "seed": arguments.seed, "injections": arguments.injections}
    if arguments.only:
        kind, _, number = arguments.only.rpartition(":")
        # Not a TemporaryDirectory: forked sessions would delete it as they exit.
        scratch = Path(tempfile.mkdtemp(prefix="chaos-"))
        out = scratch / "repeated.jsonl"
        records = campaign(**options, cases=[(kind, int(number))], out=out, workers=1, loud=True)
        shutil.rmtree(scratch)
    else:
        records = campaign(
            **options,
            kinds=arguments.kinds,
            out=arguments.out,
            workers=arguments.workers,
            loud=arguments.loud,
        )
        print(table(records))
        print(f"{time.monotonic() - started:.0f} s with {arguments.workers} workers")
    return int(any(record["verdict"] == "defect" for record in records))


if __name__ == "__main__":
    sys.exit(main())
