"""The report of a study: a page that opens offline, Markdown, LaTeX, CSV, and the data that they show.

    write_study_report("studies/width")                    # report.html, .json, .md, .tex, .csv
    write_from_data("report.json", "out")                  # again, from the data alone
    write_report_files(report, "results/width", with_page=False)      # what a repository keeps
    print(log_entry(study_report("studies/width")))        # an entry of experiments/LOG.md

The page, its texts and its tables are drawn from a `StudyReport`, which holds numbers and texts alone. It is
made from findings and, where they are there, run directories.

Files in reading order:

- data.py: everything that a report shows, and report.json
- sentences.py: findings in words and digits
- tables.py: the tables, as text
- pareto.py: Pareto fronts
- verdict_charts.py: forest plot and paired differences as Vega-Lite; the picture of the verdicts
- charts.py: the other charts
- page.py: the page
- documents.py: Markdown, LaTeX and CSV
- entries.py: entries of a log of questions
- records.py: members and their run directories
- reproducing.py: commands that train a study again
- planned.py: what a study's directory has of its plan
- counting.py: costs of arms
- curves.py: learning curves over seeds
- gathering.py: a report from findings and run directories
- progress.py: findings of a study that has not ended
- files.py: all files of a report
"""

from slmjax.studies.report.data import StudyReport, read_report
from slmjax.studies.report.documents import verdicts_markdown
from slmjax.studies.report.entries import insert_entry, log_entry
from slmjax.studies.report.files import (
    directories_of,
    is_of_study,
    study_report,
    write_from_data,
    write_report_files,
    write_study_report,
)
from slmjax.studies.report.gathering import gather, report_of
from slmjax.studies.report.planned import write_tuned
from slmjax.studies.report.sentences import summary
from slmjax.studies.report.verdict_charts import forest_picture

__all__ = [
    "StudyReport",
    "directories_of",
    "forest_picture",
    "gather",
    "insert_entry",
    "is_of_study",
    "log_entry",
    "read_report",
    "report_of",
    "study_report",
    "summary",
    "verdicts_markdown",
    "write_from_data",
    "write_report_files",
    "write_study_report",
    "write_tuned",
]
