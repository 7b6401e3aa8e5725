"""Entries of a log of questions, such as experiments/LOG.md: newest first, with the verdict in the heading.

entry = log_entry(report)
insert_entry(entry, "experiments/LOG.md")
"""

from pathlib import Path

from slmjax.atomic_files import write_text
from slmjax.studies.report.data import StudyReport
from slmjax.studies.report.documents import markdown_text
from slmjax.studies.report.sentences import (
    confidence_text,
    metric_words,
    progress_text,
    short_summary,
    summary,
)
from slmjax.studies.report.tables import arms_table, costs_table, verdicts_table
from slmjax.studies.text_tables import TextTable, listed, markdown_tables

HEADING = "## "


def log_entry(report: StudyReport) -> str:
    """Return the entry of a study: question and verdict, commands, results, and what was left open."""
    question = report.question or report.study
    heading = f"{HEADING}{report.date}  {markdown_text(f'{question} {short_summary(report)}')}"
    versions = [
        f"{name} {value}" for name, value in report.environment if name in ("commit", "jax", "devices")
    ]
    commands = ", ".join(f"`{command}`" for command in report.commands if command.startswith("slmjax"))
    about = f"Command: {commands or f'none recorded for {report.study}'}"
    about += f"; {', '.join(versions)}." if versions else "."
    result = (
        f"Result: {progress_text(report)}; {metric_words(report)}; seeds {listed(report.seeds)}; differences "
        f"to {report.baseline} with their {confidence_text(report)} intervals, p adjusted for "
        f"{len(report.comparisons)} comparisons."
    )
    tables = [item for item in (verdicts_table(report), arms_table(report), costs_table(report))]
    tables = [item for item in tables if item is not None and item.rows]
    notes = [text for text in (report.look, report.budget, *report.changes, *report.notes) if text]
    parts = [
        f"{heading}\n{about}\n{markdown_text(result)}",
        *(_bare_table(item) for item in tables),
        markdown_text(f"Verdict: {summary(report)}"),
        "\n".join(f"- {markdown_text(note)}" for note in notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


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
