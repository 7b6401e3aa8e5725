"""Entries of a log of questions, such as experiments/LOG.md: newest first, with the verdict in the heading.

entry = log_entry(report)
insert_entry(entry, "experiments/LOG.md")
"""

import textwrap
from pathlib import Path

from slmjax.atomic_files import write_text
from slmjax.studies.caveats import counted
from slmjax.studies.report.data import StudyReport
from slmjax.studies.report.documents import markdown_text
from slmjax.studies.report.sentences import (
    answer_text,
    confidence_text,
    losers,
    metric_words,
    progress_text,
    short_summary,
    summary,
)
from slmjax.studies.report.tables import COSTS, log_table, shared_costs
from slmjax.studies.text_tables import TextTable, in_words, listed, markdown_tables

HEADING = "## "
WIDTH = 150  # of lines, as in experiments/LOG.md
MOST_NOTES = 6  # caveats of an entry; the report has all


def log_entry(report: StudyReport) -> str:
    """Return the entry of a study: question and verdict, command, results, and what was left open."""
    question = report.question or report.study
    heading = f"{HEADING}{report.date}  {markdown_text(f'{question} {short_summary(report)}')}"
    table = log_table(report)
    parts = [
        f"{heading}\n{_wrapped(_command(report))}\n{_wrapped(markdown_text(_result(report)))}",
        _bare_table(table) if table.rows else "",
        _wrapped(markdown_text(_costs(report))),
        _wrapped(markdown_text(_verdict(report))),
        "\n".join(_wrapped(f"- {markdown_text(note)}") for note in _notes(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _command(report: StudyReport) -> str:
    trained = [command for command in report.commands if command.startswith("slmjax")]
    about = f"Command: {', '.join(f'`{command}`' for command in trained) or f'not recorded ({report.study})'}"
    known = dict(report.environment)
    devices = known.get("devices", "")
    # A CPU says little without its number of cores.
    if "cpu" in devices and "processors" in known:
        devices = f"{known['processors']} CPU cores"
    made_with = [*(f"{name} {known[name]}" for name in ("jax", "commit") if name in known), devices]
    return f"{'; '.join(text for text in (about, ', '.join(filter(None, made_with))) if text)}."


def _result(report: StudyReport) -> str:
    return (
        f"Result: {progress_text(report)}, seeds {listed(report.seeds)}; {metric_words(report)}, mean and "
        f"standard deviation over seeds. Paired differences with their {confidence_text(report)} intervals; "
        f"p ({report.correction}) for {counted(len(report.comparisons), 'comparison')}."
    )


def _costs(report: StudyReport) -> str:
    """Return what all runs have in common, in a sentence."""
    shared = shared_costs(report)
    texts = [f"{COSTS[name].text(value)} {COSTS[name].title}" for name, value in shared.items()]
    return f"Every arm: {', '.join(texts)}." if texts else ""


def _verdict(report: StudyReport) -> str:
    lost = [text for text in losers(report) if " diverged" in text or " failed" in text]
    noise = report.noise
    seen = (
        f"A difference of {noise.smallest_resolved:.2g} {in_words(report.metric)} is found 4 times in 5."
        if noise is not None and noise.smallest_resolved is not None and not answer_text(report)
        else ""
    )
    trends = () if report.ladder is None else report.ladder.trends
    texts = (f"Verdict: {summary(report)}", answer_text(report), seen, *trends, *lost)
    return " ".join(text for text in texts if text)


def _notes(report: StudyReport) -> list[str]:
    notes = [text for text in (report.look, *report.changes, *report.notes) if text]
    if len(notes) <= MOST_NOTES:
        return notes
    return [*notes[: MOST_NOTES - 1], f"{len(notes) - MOST_NOTES + 1} more notes are in the report."]


def _wrapped(text: str) -> str:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _bare_table(text_table: TextTable) -> str:
    """Return the lines of a table without its title, which the entry has in words."""
    cells = TextTable(
        title="",
        head=tuple(map(markdown_text, text_table.head)),
        rows=tuple(tuple(map(markdown_text, row)) for row in text_table.rows),
    )
    return markdown_tables([cells], ()).strip()


def insert_entry(entry: str, path: str | Path) -> Path:
    """Insert an entry above those of a log, and return the path of the log.

    Raises:
      ValueError: there is no such file, or it has an entry with this heading.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no {path} to write to: create it with a heading, or leave out --write")
    text = path.read_text(encoding="utf-8")
    heading = entry.splitlines()[0]
    lines = text.splitlines(keepends=True)
    if any(line.rstrip() == heading for line in lines):
        raise ValueError(f"{path} has the entry {heading.removeprefix(HEADING)!r} already: remove it first")
    # Indented headings, such as those of an example, are no entries.
    first = next((index for index, line in enumerate(lines) if line.startswith(HEADING)), len(lines))
    before = "".join(lines[:first]).rstrip("\n")
    after = "".join(lines[first:])
    parts = [part for part in (before, entry.rstrip("\n"), after.rstrip("\n")) if part]
    return write_text(path, "\n\n".join(parts) + "\n")
