"""What a person looks at: the page of a run, runs side by side, the list of runs.

    write_report("runs/nano-...")                      # report.html and plots/*.png in the run directory
    write_comparison(["runs/a", "runs/b"], output)     # one page
    list_runs("runs")                                  # what `slmjax runs` shows

Only files of run directories are read. Pages hold all they need: no network, no server.

Files in reading order:

- settings.py: settings by path, and how the sessions of a run changed them
- reading.py: run directories as data
- names.py: what tells the names of several runs apart
- charts.py: charts of runs as Vega-Lite
- page.py: the page of a run
- comparison.py: a page that compares runs
"""

from slmjax.telemetry.report.comparison import config_differences, write_comparison
from slmjax.telemetry.report.page import write_report
from slmjax.telemetry.report.reading import RunRecords, RunSummary, list_runs, read_run

__all__ = [
    "RunRecords",
    "RunSummary",
    "config_differences",
    "list_runs",
    "read_run",
    "write_comparison",
    "write_report",
]
