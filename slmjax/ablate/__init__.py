"""Studies: arms that differ in one thing, several seeds each, paired differences, and a verdict: better, worse or not resolved.

study = Study(name="...", arms=(Arm(...), Arm(...)), seeds=(0, 1, 2), baseline="...")
findings = analyze(study, run_study(study, "studies/..."))
write_findings(findings, "studies/...")
"""

from slmjax.ablate.findings import ArmSummary, Comparison, Findings, analyze
from slmjax.ablate.layout import findings_json, findings_markdown, findings_table, write_findings
from slmjax.ablate.statistics import (
    PairedDifference,
    Summary,
    Verdict,
    bootstrap_interval,
    decide,
    holm,
    paired_difference,
    summarize,
)
from slmjax.ablate.arms import Arm, Derived, Recipe
from slmjax.ablate.study import Budget, Interrupted, Member, OnChange, Study, member_experiment, read_members, run_study

__all__ = [
    "Arm", "ArmSummary", "Budget", "Comparison", "Findings", "Interrupted", "Member", "OnChange", "PairedDifference", "Study", "Summary",
    "Verdict", "analyze", "bootstrap_interval", "decide", "findings_json", "findings_markdown", "findings_table", "holm",
    "member_experiment", "paired_difference", "read_members", "run_study", "summarize", "write_findings",
]  # fmt: skip
