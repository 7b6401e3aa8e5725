"""Does a run lose by a WSD schedule, which can be extended, against a cosine?

    slmjax ablate experiments/schedule_study.py

All schedules have the same peak and end at zero.
"""

from study_base import base

from slmjax.studies import Arm, Study
from slmjax.training import Schedule


def study(size: str = "small") -> Study:
    """Return the study of three schedules."""
    return Study(
        name=f"schedules-{size}",
        question="Does a run lose by a WSD schedule against a cosine or a line?",
        base=base(size),
        arms=tuple(
            Arm(name=schedule.value, changes={"optim.schedule": schedule})
            for schedule in (Schedule.COSINE, Schedule.WSD, Schedule.LINEAR)
        ),
        seeds=(0, 1, 2, 3, 4),
        baseline="cosine",
        equal_within=0.005,
        smallest_effect=0.005,
    )
