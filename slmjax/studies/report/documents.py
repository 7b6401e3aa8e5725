"""A report for texts and other programs: Markdown, LaTeX, and CSV."""

import contextlib
import csv
import io
import re
from collections.abc import Sequence

from slmjax.studies.caveats import counted
from slmjax.studies.report.data import StudyReport
from slmjax.studies.report.page import noise_sentences
from slmjax.studies.report.sentences import (
    answer_text,
    confidence_text,
    ladder_sentences,
    losers,
    metric_words,
    progress_text,
    summary,
)
from slmjax.studies.report.tables import (
    arms_table,
    costs_table,
    further_table,
    report_tables,
    sensitivity_note,
    short_table,
    time_note,
    verdicts_table,
)
from slmjax.studies.text_tables import TextTable, in_words, markdown_tables

# Markdown ---------------------------------------------------------------------------------------------------
_MARKUP = re.compile(r"([\\`*<>#])")


def markdown(report: StudyReport) -> str:
    """Return the report as Markdown."""
    parts = [
        f"# {markdown_text(report.question or report.study)}",
        markdown_text(summary(report)),
        markdown_text(answer_text(report)),
        markdown_text(f"{report.study}: {progress_text(report)}; {metric_words(report)}; {report.date}."),
        markdown_tables([_markdown_table(item) for item in report_tables(report)], ()).rstrip(),
        _markdown_list("What lost", losers(report)),
        _markdown_list("Sizes", ladder_sentences(report)),
        _markdown_list("Power and noise", noise_sentences(report)),
        _markdown_list("Changes since the study was fixed", report.changes),
        _markdown_list("Notes", _notes(report)),
        _markdown_list("Environment", tuple(f"{name}: {value}" for name, value in report.environment)),
    ]
    if report.commands:
        commands = "\n".join(f"    {command}" for command in report.commands)
        parts.append(f"## Reproduce\n\n{commands}")
    return "\n\n".join(part for part in parts if part) + "\n"


def verdicts_markdown(report: StudyReport) -> str:
    """Return the narrow table of verdicts as Markdown, for a README."""
    return markdown_tables([_markdown_table(short_table(report))], ()).split("\n\n", 1)[1]


def _notes(report: StudyReport) -> tuple[str, ...]:
    texts = (report.look, report.budget, *report.notes, time_note(report), sensitivity_note(report))
    return tuple(text for text in texts if text)


def markdown_text(text: str) -> str:
    """Return a text in one line, with characters that are markup escaped."""
    return _MARKUP.sub(r"\\\1", _one_line(text))


def _markdown_table(text_table: TextTable) -> TextTable:
    """Return the table with escaped cells, under a heading."""
    return TextTable(
        title=f"## {markdown_text(text_table.title)}",
        head=tuple(map(markdown_text, text_table.head)),
        rows=tuple(tuple(map(markdown_text, row)) for row in text_table.rows),
    )


def _markdown_list(title: str, texts: list[str] | tuple[str, ...]) -> str:
    lines = "\n".join(f"- {markdown_text(text)}" for text in texts)
    return f"## {title}\n\n{lines}" if lines else ""


def _one_line(text: str) -> str:
    """Return a text without line breaks and control characters, which would end a cell or a heading."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)


# LaTeX ------------------------------------------------------------------------------------------------------
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "[": "{[}",  # at the start of a row it would be an option of the line break before it
    "]": "{]}",
    "*": "{*}",  # there, it would be a part of that line break
    "-": "{-}",  # two of them are a dash
    "`": r"\textasciigrave{}",
    "−": "$-$",
    "+": "$+$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "→": r"$\to$",
    "—": "---",
    "–": "--",
    "“": "``",
    "”": "''",
    "‘": "`",
    "’": "'",
    "…": r"\dots{}",
    "·": r"$\cdot$",
    "µ": r"$\mu$",
    "λ": r"$\lambda$",
    "β": r"$\beta$",
    "α": r"$\alpha$",
}
LONG_NAME = 30  # characters that fit in the first column of a table
# Letters that pdflatex has without further packages.
_LATIN = range(0xC0, 0x180)


def latex_text(text: str) -> str:
    """Return a text for LaTeX, with every character that has a meaning there escaped.

    A character that pdflatex cannot set without further packages becomes its code point, such as [U+4E2D].
    """
    return "".join(map(_latex_character, _one_line(text)))


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    code = ord(character)
    # Multiplication and division signs stand among the letters.
    if code < 0x80 or (code in _LATIN and character.isalpha()):
        return character
    return f"{{[}}U$+${code:04X}{{]}}"


def latex(report: StudyReport) -> str:
    """Return verdicts and arms as tables for LaTeX, with booktabs."""
    label = re.sub(r"[^A-Za-z0-9]+", "-", report.study).strip("-").lower() or "study"
    title = report.question or report.study
    parts = [
        "% \\usepackage{booktabs} and \\usepackage[T1]{fontenc} in the preamble; \\input{report.tex} here.",
    ]
    if report.comparisons:
        about = (
            f"{title} Difference of {in_words(report.metric)} to {report.baseline}, with its "
            f"{confidence_text(report)} interval; p ({report.correction}) for "
            f"{counted(len(report.comparisons), 'comparison')}."
        )
        parts.append(_latex_table(verdicts_table(report), caption=about, label=f"{label}-verdicts"))
    arms = arms_table(report)
    parts.append(_latex_table(arms, caption=f"{arms.title}.", label=f"{label}-arms"))
    if (costs := costs_table(report)) is not None:
        parts.append(_latex_table(costs, caption=f"{costs.title}.", label=f"{label}-costs"))
    if (further := further_table(report)) is not None:
        parts.append(_latex_table(further, caption=f"{further.title}.", label=f"{label}-further"))
    return "\n\n".join(parts) + "\n"


def _latex_table(text_table: TextTable, *, caption: str, label: str) -> str:
    longest = max((len(row[0]) for row in text_table.rows), default=0)
    # Long names are broken into lines, since a table does not break them by itself.
    first = r"p{0.28\textwidth}" if longest > LONG_NAME else "l"
    columns = first + "r" * (len(text_table.head) - 1)
    lines = [
        r"\begin{table}",
        r"  \centering",
        r"  \footnotesize",
        f"  \\caption{{{latex_text(caption)}}}",
        f"  \\label{{tab:{label}}}",
        f"  \\begin{{tabular}}{{{columns}}}",
        r"    \toprule",
        f"    {_latex_row(text_table.head)}",
        r"    \midrule",
        *(f"    {_latex_row(row)}" for row in text_table.rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def _latex_row(cells: tuple[str, ...]) -> str:
    return " & ".join(map(latex_text, cells)) + r" \\"


# CSV --------------------------------------------------------------------------------------------------------
def members_csv(report: StudyReport) -> str:
    """Return a row for each run with its metrics, unrounded.

    `slmjax verdict report.csv --arm arm --seed seed --metric METRIC` draws the verdicts again.
    """
    names = list(dict.fromkeys(name for member in report.members for name in member.metrics))
    head = ["study", "arm", "seed", "status", *names]
    rows = [
        [
            report.study,
            member.arm,
            member.seed,
            member.status,
            *(member.metrics.get(name, "") for name in names),
        ]
        for member in report.members
    ]
    return _csv(head, rows)


def verdicts_csv(report: StudyReport) -> str:
    """Return a row for each comparison, unrounded."""
    head = ["arm", "against", "metric", "verdict", "seeds", "difference", "standard_error", "low", "high"]
    head += ["p", "adjusted_p", "seeds_needed"]
    rows = [
        [
            item.arm,
            item.against,
            report.metric,
            item.verdict,
            len(item.seeds),
            item.difference,
            item.error,
            *(item.interval or (None, None)),
            item.p_value,
            item.adjusted_p,
            item.seeds_needed,
        ]
        for item in report.comparisons
    ]
    return _csv(head, rows)


def _csv(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_csv_cell, head))
    writer.writerows([_csv_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def _csv_cell(cell: object) -> object:
    """Return a cell that no spreadsheet takes for a formula: such a text has an apostrophe before it."""
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return cell
    # An arm that is named by a negative number.
    with contextlib.suppress(ValueError):
        float(cell)
        return cell
    return f"'{cell}"
