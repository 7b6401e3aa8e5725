"""Studies: arms that differ in one thing, several seeds each, paired differences and a verdict.

    arms = (Arm(name="adam"), Arm(name="muon", changes={"optim.kind": Optimizer.MUON}))
    study = Study(name="...", base=experiment, arms=arms, seeds=(0, 1, 2), baseline="adam")
    members = run_study(study, "studies/...")
    write_findings(analyze(study, members), "studies/...")

A recovery report compares quantization-aware training with the cost of rounding:

    study = Study(..., recovery=Recovery(reference="full precision", rounded={"QAT": "rounded"}))
    measurements = measure(study, members, "studies/...")
    write_recovery([report_recovery(study, members, measurements)], "studies/...")

A study file has `def study() -> Study`, and is run by `slmjax ablate`:

    for outcome in run_ablation(open_ablation("width_study.py")):
        outcome.findings

Files in reading order:

- changes.py: changes of an experiment by field paths.
- arms.py: trained and derived arms; derived.py makes the models of derived ones.
- statistics/: samples, verdicts and power, on plain numbers.
- design.py: budgets, quantities that are made equal, rates that are tuned.
- costs.py: parameters, FLOPs and bytes of an arm.
- claims.py: which process trains a member, on any host.
- stopping.py: arms that are not trained to the end.
- study.py: a study and its members; member_queue.py: those that are left, as each of many workers sees them.
- groups.py: members that share a program and are trained together.
- running.py: members are trained, derived and resumed.
- planned.py: experiments before the runs that they build on.
- matching.py: arms made equal to the baseline, in parameters, FLOPs and others.
- questions.py: what is asked of results, and their table; caveats.py: notes on what does not compare.
- combinators.py: grids, pairs and ladders; study_directory.py: study files, and what is fixed beforehand.
- results_files.py: rows of files and directories; foreign_results.py: their columns as a question.
- heldout_text.py: uncertainty of the held-out text, compared with that of seeds.
- findings.py: comparisons and verdicts; layout.py shows them; text_tables.py aligns their tables.
- noise.py: the ledger of noise of all studies.
- campaign.py: verdicts of all studies together, and which winners are confirmed.
- tuning.py: each arm at its own best learning rate.
- plan.py: what a study will take, and what it can find.
- report/: the page of a study, its tables for texts, and the data that they show.
- recovery.py: what quantization-aware training recovers; recovery_layout.py shows it.
- ablation.py: a study file from its question to its findings.
"""

from slmjax.quantization.ptq.round_to_nearest import Clip
from slmjax.studies.ablation import Ablation, Outcome, open_ablation, plan_ablation, run_ablation
from slmjax.studies.arms import Arm, Derivation, Derived
from slmjax.studies.campaign import judge_campaign, read_campaign
from slmjax.studies.claims import Lease
from slmjax.studies.combinators import grid, ladder, pair
from slmjax.studies.costs import ArmCost, TextSize, arm_cost, text_size
from slmjax.studies.derived import RoundToNearest
from slmjax.studies.design import Budget, Dimension, LearningRates, Match, Quantity, Recovery
from slmjax.studies.findings import (
    ArmSummary,
    Comparison,
    Divergence,
    Findings,
    analyze,
    read_findings,
    write_findings,
)
from slmjax.studies.layout import (
    findings_json,
    findings_markdown,
    findings_table,
    print_findings,
)
from slmjax.studies.matching import CannotMatch, Matched, at_matched, match_arms
from slmjax.studies.noise import expected_deviation, ledger_of, record_noise
from slmjax.studies.plan import PlannedArm, Power, StudyPlan, plan_study
from slmjax.studies.questions import Question
from slmjax.studies.recovery import (
    ArmRecovery,
    Measurement,
    Recovered,
    RecoveryOver,
    RecoveryReport,
    measure,
    report_recovery,
)
from slmjax.studies.recovery_layout import (
    print_recovery,
    recovery_json,
    recovery_markdown,
    recovery_table,
    write_recovery,
)
from slmjax.studies.report import write_study_report
from slmjax.studies.running import Interrupted, run_study
from slmjax.studies.statistics.ratios import RecoveredFraction, recovered_fraction
from slmjax.studies.statistics.samples import (
    PairedDifference,
    Summary,
    bootstrap_interval,
    holm,
    paired_difference,
    summarize,
)
from slmjax.studies.statistics.verdicts import Verdict, decide
from slmjax.studies.stopping import SuccessiveHalving
from slmjax.studies.study import (
    MEMBERS,
    Member,
    OnChange,
    Study,
    member_experiment,
    read_members,
)
from slmjax.studies.study_directory import Change, StudyDirectory, load_studies, load_study
from slmjax.studies.tuning import (
    TriedRate,
    Tuned,
    TuningUnfinished,
    at_rates,
    choose_rates,
    tune,
    tuning_study,
    unresolved_arms,
)

__all__ = [
    "Ablation",
    "Outcome",
    "open_ablation",
    "plan_ablation",
    "run_ablation",
    "Change",
    "StudyDirectory",
    "grid",
    "ladder",
    "load_studies",
    "load_study",
    "pair",
    "Quantity",
    "CannotMatch",
    "Match",
    "Matched",
    "at_matched",
    "match_arms",
    "LearningRates",
    "Dimension",
    "Arm",
    "ArmCost",
    "ArmRecovery",
    "ArmSummary",
    "Budget",
    "Clip",
    "Comparison",
    "Derived",
    "Divergence",
    "Findings",
    "Question",
    "Interrupted",
    "Lease",
    "Measurement",
    "MEMBERS",
    "Member",
    "OnChange",
    "PairedDifference",
    "Derivation",
    "Recovered",
    "RecoveredFraction",
    "Recovery",
    "RecoveryOver",
    "RecoveryReport",
    "RoundToNearest",
    "Study",
    "SuccessiveHalving",
    "Summary",
    "Verdict",
    "TextSize",
    "PlannedArm",
    "Power",
    "StudyPlan",
    "plan_study",
    "TriedRate",
    "Tuned",
    "TuningUnfinished",
    "choose_rates",
    "tune",
    "tuning_study",
    "unresolved_arms",
    "analyze",
    "arm_cost",
    "text_size",
    "at_rates",
    "bootstrap_interval",
    "decide",
    "expected_deviation",
    "findings_json",
    "findings_markdown",
    "findings_table",
    "holm",
    "judge_campaign",
    "ledger_of",
    "measure",
    "member_experiment",
    "paired_difference",
    "print_findings",
    "print_recovery",
    "read_campaign",
    "read_findings",
    "read_members",
    "record_noise",
    "recovered_fraction",
    "recovery_json",
    "recovery_markdown",
    "recovery_table",
    "report_recovery",
    "run_study",
    "summarize",
    "write_findings",
    "write_recovery",
    "write_study_report",
]
