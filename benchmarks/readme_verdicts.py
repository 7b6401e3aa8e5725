"""The verdicts of the README: the picture and table of one shipped study, and a line for each of the others.

    pip install -e '.[plot]'
    python benchmarks/readme_verdicts.py

It reads experiments/results/, which `slmjax report DIR --no-page --output experiments/results/NAME` writes,
and writes docs/study-verdicts.svg and the part of README.md between its two marks.
"""

from collections.abc import Iterable
from pathlib import Path

from slmjax.studies.report import StudyReport, forest_picture, study_report, summary, verdicts_markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
PICTURE = ROOT / "docs" / "study-verdicts.svg"
SHOWN = "schedule"  # the study with a picture
BEGIN = "<!-- verdicts: python benchmarks/readme_verdicts.py -->"
END = "<!-- end of verdicts -->"


def committed_reports() -> dict[str, StudyReport]:
    """Return the report of each study whose results are committed, by the name of its folder."""
    return {path.parent.name: study_report(path.parent) for path in sorted(RESULTS.glob("**/report.json"))}


def questions_table(reports: Iterable[StudyReport]) -> str:
    """Return a row for each study, its question and its verdicts, in Markdown."""
    rows = [f"| {report.question} | {summary(report)} |" for report in reports]
    return "\n".join(["| question | verdicts |", "|---|---|", *rows]) + "\n"


def replaced(text: str) -> str:
    """Return a README with the verdicts of the committed reports between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest and after, f"README.md needs the marks {BEGIN} and {END}"
    reports = committed_reports()
    shown = reports.pop(SHOWN)
    picture = f"![{shown.question} Difference of each arm with its interval](docs/study-verdicts.svg)"
    parts = (
        BEGIN,
        picture,
        verdicts_markdown(shown).rstrip(),
        questions_table(reports.values()).rstrip(),
        END,
    )
    return before + "\n\n".join(parts) + after


def main() -> None:
    PICTURE.write_bytes(forest_picture(committed_reports()[SHOWN]))
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
