"""The files of a report: report.json, and from it report.html, report.md, report.tex and CSV.

write_study_report("studies/width")                        # of a study's directory
write_from_data("shipped/width/report.json", "out")        # of report.json alone
"""

from pathlib import Path

from slmjax.atomic_files import write_text
from slmjax.studies.findings import Findings, read_findings
from slmjax.studies.report.data import REPORT, StudyReport, read_report, write_report_data
from slmjax.studies.report.documents import latex, markdown, members_csv, verdicts_csv
from slmjax.studies.report.gathering import gather
from slmjax.studies.report.page import study_page
from slmjax.telemetry.report.page import write_page

PAGE = "report.html"


def write_study_report(directory: str | Path, findings: Findings | None = None) -> Path:
    """Write the report of a study to its directory, and return the path of the page.

    Args:
      directory: of the study, complete or not; or one with report.json alone, from which the other files are
        written.
      findings: the results; None for those in findings.json.

    Raises:
      ValueError: the directory is not one of a study, or the `plot` extra is not installed.
      DamagedFile: a file of the study is damaged.
    """
    directory = Path(directory)
    return write_report_files(study_report(directory, findings), directory)


def study_report(directory: str | Path, findings: Findings | None = None) -> StudyReport:
    """Return the report of a study's directory, as `write_study_report` does. Nothing is written."""
    directory = Path(directory)
    if findings is None:
        try:
            findings = read_findings(directory)
        except FileNotFoundError:
            # A study that is shipped has neither runs nor findings of its own.
            return read_report(directory / REPORT)
    return gather(directory, findings)


def write_from_data(data: str | Path, directory: str | Path) -> Path:
    """Write the files of a report from its report.json, and return the path of the page.

    Args:
      data: report.json.
      directory: where to write; created if it does not exist.

    Raises:
      ValueError: report.json cannot be read, or the `plot` extra is not installed.
    """
    return write_report_files(read_report(data), directory)


def write_report_files(report: StudyReport, directory: str | Path) -> Path:
    """Write all files of a report to a directory, and return the path of the page.

    Raises:
      ValueError: the `plot` extra is not installed; all files but the page are written.
    """
    directory = Path(directory)
    write_report_data(report, directory / REPORT)
    texts = {
        "report.md": markdown(report),
        "report.tex": latex(report),
        "report.csv": members_csv(report),
        "verdicts.csv": verdicts_csv(report),
    }
    # Names from elsewhere may hold what is not valid UTF-8.
    for name, text in texts.items():
        write_text(directory / name, text.encode("utf-8", "replace").decode("utf-8"))
    return write_page(directory / PAGE, study_page(report))
