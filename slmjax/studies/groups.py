"""Members of a study that are trained in one program, where that is faster than one after another.

    group = tasks_together(queue, task, populations=Populations.AUTO)    # the task and others like it

Seeds of an arm, and arms that differ in learning rates and other numbers, share a program
(`runner.population_pace.share_a_program`). Whether that is used is measured on the device.
"""

import enum
import logging

from slmjax.models.zoo import describe
from slmjax.runner.population_pace import population_pays, share_a_program
from slmjax.studies.arms import Arm, Derived
from slmjax.studies.member_queue import MemberQueue, Task
from slmjax.studies.study import member_experiment
from slmjax.training.experiment import Experiment
from slmjax.training.programs import resolved_model

log = logging.getLogger(__name__)

MOST_MEMBERS = 16  # of a population; others that share its program follow in further ones
# A measurement compiles two programs. With fewer steps in all there is nothing to gain from it.
LEAST_STEPS = 500
NOMINAL_VOCABULARY = 4096  # of models that take that of their tokenizer, to compare their sizes


class Populations(enum.Enum):
    """Training of members that share a program."""

    AUTO = "auto"  # together where a measurement shows that it is faster
    NEVER = "off"  # one after another
    ALWAYS = "on"  # together, as many as share a program


# FLOPs of a step for which a population did not pay: larger steps fill the device even better.
_not_worth_it: list[float] = []


def tasks_together(queue: MemberQueue, first: Task, *, populations: Populations) -> list[Task]:
    """Return the tasks that are trained in one program with the first, which is among them.

    The others are claimed as well. Members that build on other runs, and those of studies with early
    stopping, are trained alone.
    """
    study = queue.study
    arm = first.arm
    is_alone = isinstance(arm, Derived) or arm.after is not None or study.stopping is not None
    if populations is Populations.NEVER or is_alone:
        return [first]
    experiment = member_experiment(study, arm.name, first.seed)

    def shares(arm: Arm | Derived, seed: int) -> bool:
        if isinstance(arm, Derived) or arm.after is not None:
            return False
        try:
            return share_a_program(experiment, member_experiment(study, arm.name, seed))
        except ValueError:  # settings that do not fit each other, which its own training will name
            return False

    others = [
        member_experiment(study, arm.name, seed)
        for arm, seed in queue.free()
        if (arm, seed) != (first.arm, first.seed) and shares(arm, seed)
    ]
    members = [experiment, *others][:MOST_MEMBERS]
    if len(members) < 2 and populations is Populations.ALWAYS:
        log.info("%s: no other member that is left shares its program", queue.member_text(first))
    if len(members) < 2 or (populations is Populations.AUTO and not _pays(members)):
        return [first]
    tasks = [first]
    while len(tasks) < MOST_MEMBERS and (task := queue.take(shares)) is not None:
        tasks.append(task)
    return tasks


def _pays(members: list[Experiment]) -> bool:
    """Return whether these members are faster together, by a measurement where one may be worth its time."""
    first = members[0]
    if first.run.steps * len(members) < LEAST_STEPS:
        return False
    model = resolved_model(first, vocab_size=NOMINAL_VOCABULARY)
    flops = describe(model).training_flops_per_token * first.data.batch_size * first.data.sequence_length
    if any(flops >= earlier for earlier in _not_worth_it):
        return False
    try:
        pace = population_pays(members)
    # What is wrong with a member is recorded of it, when it is trained.
    except Exception as error:
        log.warning("members are trained one after another, their pace cannot be measured: %s", error)
        return False
    log.info("%s", pace.text())
    if not pace.pays:
        _not_worth_it.append(flops)
    return pace.pays
