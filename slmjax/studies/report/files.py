"""The files of a report: report.json, and from it page, picture, Markdown, LaTeX and CSV.

write_study_report("studies/width")                        # of a study's directory
write_from_data("shipped/width/report.json", "out")        # of report.json alone
"""

import logging
from pathlib import Path

from slmjax.atomic_files import write_text
from slmjax.stored_json import read_object
from slmjax.studies.findings import Findings
from slmjax.studies.report.counting import count_costs
from slmjax.studies.report.data import REPORT, StudyReport, printable, read_report, write_report_data
from slmjax.studies.report.documents import latex, markdown, members_csv, verdicts_csv, verdicts_markdown
from slmjax.studies.report.gathering import gather
from slmjax.studies.report.page import study_page
from slmjax.studies.report.progress import findings_so_far
from slmjax.studies.report.records import SEVERAL, recorded_members
from slmjax.studies.report.verdict_charts import forest_picture
from slmjax.telemetry.report.charts import converter
from slmjax.telemetry.report.page import write_page

log = logging.getLogger(__name__)

PAGE = "report.html"
MARKDOWN = "report.md"
PICTURE = "verdicts.svg"
_OF_STUDIES = ("findings.json", REPORT, SEVERAL, "plan.json", "members.jsonl")


def is_of_study(path: str | Path) -> bool:
    """Return whether a directory has the results of a study, or of several."""
    return any((Path(path) / name).is_file() for name in _OF_STUDIES)


def directories_of(path: str | Path) -> tuple[Path, ...]:
    """Return the directories of the studies in a directory, which may be itself."""
    path = Path(path)
    if not (path / SEVERAL).is_file():
        return (path,)
    remedy = "restore the file from a copy, or name the directory of one of the studies"
    names = read_object(path / SEVERAL, {"studies": dict}, remedy=remedy)["studies"]
    # A study that has not begun has nothing to report.
    return tuple(path / str(name) for name in names.values() if is_of_study(path / str(name)))


def write_study_report(directory: str | Path, findings: Findings | None = None) -> Path:
    """Write the report of a study to its directory, and return the path of the page.

    With new findings, the costs of arms are counted first, which takes seconds for each arm. Without the
    `plot` extra there is no page, which the log says: the path is then that of report.md.

    Args:
      directory: of the study, complete or not; or one with report.json alone, from which the other files are
        written.
      findings: the results; None for those in findings.json, or those of the members that ended so far.

    Raises:
      ValueError: the directory is not one of a study, or a file cannot be written.
      DamagedFile: a file of the study is damaged.
    """
    directory = Path(directory)
    if findings is not None:
        arms = tuple(arm.arm for arm in findings.arms)
        count_costs(directory, recorded_members(directory, arms=arms, seeds=findings.seeds))
    # A study that took hours must not end in an error because of its page.
    return write_report_files(study_report(directory, findings), directory, needs_page=False)


def study_report(directory: str | Path, findings: Findings | None = None) -> StudyReport:
    """Return the report of a study's directory, as `write_study_report` does. Nothing is written."""
    directory = Path(directory)
    findings = findings or findings_so_far(directory)
    if findings is not None:
        return gather(directory, findings)
    # A study that is shipped has neither runs nor findings of its own.
    if (directory / REPORT).is_file():
        return read_report(directory / REPORT)
    raise ValueError(
        f"{directory} has no results of a study: `slmjax ablate STUDY.py` trains one, and `slmjax verdict "
        "RESULTS --out DIRECTORY` judges runs from elsewhere"
    )


def write_from_data(data: str | Path, directory: str | Path) -> Path:
    """Write the files of a report from its report.json, and return the path of the page.

    Args:
      data: report.json.
      directory: where to write; created if it does not exist.

    Raises:
      ValueError: report.json cannot be read, or the `plot` extra is not installed.
    """
    return write_report_files(read_report(data), directory)


def write_report_files(
    report: StudyReport, directory: str | Path, *, needs_page: bool = True, with_page: bool = True
) -> Path:
    """Write all files of a report to a directory, and return the path of the page.

    Args:
      report: the report.
      directory: where to write; created if it does not exist.
      needs_page: whether a page or a picture that cannot be drawn is an error; otherwise the log says why
        there is none, and the path is that of report.md.
      with_page: whether to write report.html, a megabyte of which is the program that draws it. Without it,
        the files are what a repository keeps of a study, and the path is that of report.md.

    Raises:
      ValueError: the page is needed, and the `plot` extra is not installed; all other files are written.
    """
    directory = Path(directory)
    report = printable(report)
    write_texts(report, directory)
    try:
        converter()
    except ValueError as error:
        if needs_page:
            raise
        log.warning("no %s: %s", PAGE, error)
        return directory / MARKDOWN
    page = write_page(directory / PAGE, study_page(report)) if with_page else directory / MARKDOWN
    # For a README, which cannot embed a page.
    if any(item.difference is not None for item in report.comparisons):
        write_text(directory / PICTURE, forest_picture(report, "svg").decode("utf-8"))
    return page


def write_texts(report: StudyReport, directory: Path) -> None:
    """Write report.json, Markdown, LaTeX and CSV to a directory, which need no other package."""
    write_report_data(report, directory / REPORT)
    texts = {
        MARKDOWN: markdown(report),
        "report.tex": latex(report),
        "report.csv": members_csv(report),
        "verdicts.csv": verdicts_csv(report),
        "verdicts.md": verdicts_markdown(report),
    }
    for name, text in texts.items():
        write_text(directory / name, text)
