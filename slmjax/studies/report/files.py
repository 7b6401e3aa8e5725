"""The files of a report: report.json, and from it report.html, report.md, report.tex and CSV.

    write_study_report("studies/width")                        # of a study's directory
    write_from_data("shipped/width/report.json", "out")        # of report.json alone
"""
