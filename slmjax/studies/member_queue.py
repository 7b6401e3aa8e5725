"""The members of a study that are left, in order, as one of many processes takes them.

    queue = MemberQueue(study, directory, claims, only=None, on_change=OnChange.REFUSE, earlier=parent)
    while (task := queue.take()) is not None:
        ...                                     # train it, and record or release `task.claim`

A member that another process has claimed is passed over, and one that waits for others too: a derived member
for its source, and at a rung of early stopping every member for the last one.
"""

import collections
import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax.studies.arms import Arm, Derived
from slmjax.studies.claims import Claim, Claims, State
from slmjax.studies.stopping import Decision, SuccessiveHalving, decide, read_decision
from slmjax.studies.study import (
    FAILED,
    FINISHED,
    STOPPED,
    Member,
    OnChange,
    Study,
    member_experiment,
    member_fingerprint,
    member_of,
    read_members,
)
from slmjax.telemetry.progress import format_seconds
from slmjax.telemetry.run_directory import read_log

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A member that this process has claimed."""

    arm: Arm | Derived
    seed: int
    claim: Claim
    stop_after: int | None = None  # step of the next rung, where there is early stopping
    stopped: str | None = None  # reason why the member is not trained further


class MemberQueue:
    """The members that are left of a study, in its order."""

    def __init__(
        self,
        study: Study,
        directory: Path,
        claims: Claims,
        *,
        only: Sequence[str] | None,
        on_change: OnChange,
        earlier: Path,
    ) -> None:
        self.study = study
        self.claims = claims
        self.directory = directory
        if study.stopping is not None:
            _check_rungs(study, study.stopping, only=only)
        names = set() if only is not None else {arm.name for arm in study.arms}
        for name in only or ():
            while name not in names:
                names.add(name)
                name = _built_on(study.arm(name)) or name
        self.left = [(arm, seed) for seed in study.seeds for arm in study.arms if arm.name in names]
        # Outcomes before this process, from members.jsonl where an earlier version wrote no others.
        self._before = {
            (member.arm, member.seed): member
            for member in read_members(study, directory, on_change=on_change)
        }
        # A failure may be of the machine, such as a full disk, and is tried again: once by each process that
        # starts after it. Divergence is a result.
        self._retried = {
            (arm.name, seed): claims.look(_key(arm, seed)).recorded
            for arm, seed in self.left
            if (member := self._before.get((arm.name, seed))) is not None and member.status == FAILED
        }
        self.ended: dict[tuple[str, int], Member] = {}
        self._earlier = earlier
        self._decisions: dict[int, Decision] = {}
        self._awaits_decision = False
        self._elsewhere: list[State] = []  # claimed by other processes, at the last look
        self._logged: set[tuple[str, int]] = set()
        # Of the members that this process has trained, by arm, and of their compilation.
        self._seconds: dict[str, list[float]] = {}
        self._compile_seconds: list[float] = []

    def free(self) -> list[tuple[Arm | Derived, int]]:
        """Return the members that are left and that no process has claimed."""
        return [
            (arm, seed)
            for arm, seed in self.left
            if not (state := self.claims.look(_key(arm, seed))).is_claimed
            and self._outcome(arm, seed, state) is None
        ]

    def take(self, accepts: Callable[[Arm | Derived, int], bool] | None = None) -> Task | None:
        """Claim the first member that is free, of those that `accepts` is true for. None if there is none."""
        self._elsewhere = []
        self._awaits_decision = False
        if self.study.stopping is not None:
            self._decide(self.study.stopping)
        for arm, seed in list(self.left):
            state = self.claims.look(_key(arm, seed))
            if (member := self._outcome(arm, seed, state)) is not None:
                self.ended[arm.name, seed] = member
                self.left.remove((arm, seed))
                continue
            if state.is_claimed:
                self._elsewhere.append(state)
                continue
            if accepts is not None and not accepts(arm, seed):
                continue
            # A member waits for what it is made from, which comes before it in the order.
            if (name := _built_on(arm)) is not None and (name, seed) not in self.ended:
                continue
            stop_after, stopped = self._target(arm, seed, state)
            if stop_after in self._reached(arm, seed, state):
                self._awaits_decision = True
            elif (claim := self.claims.take(state)) is not None:
                return Task(arm=arm, seed=seed, claim=claim, stop_after=stop_after, stopped=stopped)
            else:  # another process was faster
                self._elsewhere.append(state)
        return None

    def source(self, arm: Arm | Derived, seed: int) -> Member | None:
        """Return the member that a member is derived from or builds on; None if there is none.

        Raises:
          ValueError: it is of an earlier study, which has no such member.
        """
        if (name := _built_on(arm)) is not None:
            return self.ended[name, seed]
        return _earlier_member(self.study, arm, seed, self._earlier) if isinstance(arm, Arm) else None

    # Early stopping -----------------------------------------------------------------------------------------
    def _decide(self, stopping: SuccessiveHalving) -> None:
        """Read the decisions of all rungs so far, and make the next one once its values are complete."""
        arms = [arm for arm in self.study.arms if isinstance(arm, Arm)]
        for rung in stopping.rungs:
            if rung in self._decisions:
                decision = self._decisions[rung]
            elif (decision := read_decision(self.directory, rung)) is None:
                columns = {
                    arm.name: [self._value(arm, seed, rung) for seed in self.study.seeds] for arm in arms
                }
                values = {
                    name: complete
                    for name, column in columns.items()
                    if len(complete := [value for value in column if value is not None]) == len(column)
                }
                if len(values) < len(columns):
                    return
                decision = decide(
                    stopping,
                    self.directory,
                    rung,
                    values,
                    metric=self.study.metric,
                    baseline=self.study.baseline,
                    lower_is_better=self.study.lower_is_better,
                    needs_links=self.claims.needs_links,
                )
            self._decisions[rung] = decision
            arms = [arm for arm in arms if decision.reason(arm.name) is None]

    def _value(self, arm: Arm, seed: int, rung: int) -> float | None:
        """Return the metric of a member at a rung, infinite if it diverged or failed; None before it."""
        state = self.claims.look(_key(arm, seed))
        if (value := self._reached(arm, seed, state).get(rung)) is not None:
            return value
        if (member := self._outcome(arm, seed, state)) is None:
            return None
        # It finished before the study had this rung.
        is_finished = member.status == FINISHED
        record = evaluation_at(Path(member.result["run_dir"]), rung) if is_finished else None
        worst = math.inf if self.study.lower_is_better else -math.inf
        return worst if record is None else metric_at(record, self.study, rung)

    def _reached(self, arm: Arm | Derived, seed: int, state: State) -> dict[int, float]:
        """Return the metric of a member at each rung that it has reached with its present experiment."""
        if not state.rungs:
            return {}
        present = member_fingerprint(self.study, arm.name, seed)
        return {
            rung["step"]: float(rung["value"]) for rung in state.rungs if rung.get("fingerprint") == present
        }

    def _target(self, arm: Arm | Derived, seed: int, state: State) -> tuple[int | None, str | None]:
        """Return the rung to which a member is trained next (none: to the end), or why it is stopped."""
        if self.study.stopping is None or isinstance(arm, Derived):
            return None, None
        for rung in self.study.stopping.rungs:
            if (decision := self._decisions.get(rung)) is None:
                return rung, None
            if (reason := decision.reason(arm.name)) is not None:
                return None, reason
        return None, None

    def _outcome(self, arm: Arm | Derived, seed: int, state: State) -> Member | None:
        """Return the outcome of a member, unless it is to be trained (again)."""
        if state.record is not None:
            member = member_of(state.record, name=f"the claim of {state.member}")
        else:
            member = self._before.get((arm.name, seed))
        # An arm of another name had this directory before: its run counts, once it is recorded again.
        if member is None or member.arm != arm.name:
            return None
        if member.fingerprint != member_fingerprint(self.study, arm.name, seed):
            return None
        if member.status == STOPPED and self.study.stopping is None:
            return None
        is_retried = self._retried.get((arm.name, seed)) == state.recorded
        return None if member.status == FAILED and is_retried else member

    # Progress -----------------------------------------------------------------------------------------------
    def member_text(self, task: Task) -> str:
        """Return a member with its number in the order of the study: "member 3 of 12: deep, seed 1"."""
        arms = self.study.arms
        number = self.study.seeds.index(task.seed) * len(arms) + arms.index(task.arm) + 1
        total = len(arms) * len(self.study.seeds)
        return f"{self.study.name}: member {number} of {total}: {task.arm.name}, seed {task.seed}"

    def add_seconds(self, task: Task, seconds: float, *, compiling: float = 0.0) -> None:
        """Take the time that a member took, for `time_left`; derived members take almost none.

        Args:
          compiling: the part of it in which programs were compiled.
        """
        if isinstance(task.arm, Arm) and task.stopped is None:
            self._seconds.setdefault(task.arm.name, []).append(seconds)
            self._compile_seconds.append(compiling)

    def time_left(self) -> str:
        """Return the time that the rest takes at the pace of this process; empty while it is unknown."""
        if not self._seconds:
            return ""
        num_workers = 1 + sum(state.is_alive for state in self._elsewhere)
        counts = collections.Counter(arm.name for arm, _ in self.left if isinstance(arm, Arm))
        left = sum(self._expected_seconds(arm, number) for arm, number in counts.items())
        return f", about {format_seconds(left / num_workers)} left"

    def _expected_seconds(self, arm: str, number: int) -> float:
        """Return the time of further members of an arm: its first one alone compiles its programs."""
        own = self._seconds.get(arm, [])
        if later := own[1:]:
            return number * statistics.fmean(later)
        firsts = [seconds[0] for seconds in self._seconds.values()]
        saved = [
            seconds[0] - statistics.fmean(seconds[1:])
            for seconds in self._seconds.values()
            if len(seconds) > 1
        ]
        # The very first member of all also prepares the data.
        first = own[0] if own else statistics.fmean(firsts[1:] or firsts)
        further = max(first - statistics.fmean(saved or self._compile_seconds), 0.0)
        return number * further if own else first + (number - 1) * further

    @property
    def is_done(self) -> bool:
        """Return whether nothing is left to train, here or elsewhere."""
        return not self.left

    @property
    def is_in_good_hands(self) -> bool:
        """Return whether workers that are seen to live train all that can be trained now."""
        # At a rung all workers wait for the last member, since most of the work may follow.
        is_waiting = self._awaits_decision or not self._elsewhere
        return not is_waiting and all(state.is_alive for state in self._elsewhere)

    def pause(self) -> None:
        """Wait before the next look at the members that are trained elsewhere."""
        for state in self._elsewhere:
            if (state.member, state.token) not in self._logged:
                self._logged.add((state.member, state.token))
                log.info("waiting for %s, which %s trains", state.member, state.holder)
        time.sleep(min(self.claims.lease.heartbeat / 3, 5.0))


def _built_on(arm: Arm | Derived) -> str | None:
    """Return the arm of the same study that an arm is derived from or builds on."""
    if isinstance(arm, Derived):
        return arm.source
    return arm.after if isinstance(arm.after, str) else None


def _earlier_member(study: Study, arm: Arm, seed: int, directory: Path) -> Member | None:
    """Return the member of an earlier study that a member builds on; None if it builds on none.

    Raises:
      ValueError: the earlier study has no such member.
    """
    if (key := study.source(arm.name, seed)) is None:
        return None
    earlier, name, earlier_seed = key
    there = directory / earlier.directory
    for member in read_members(dataclasses.replace(earlier, seeds=(earlier_seed,)), there):
        if member.arm == name:
            return member
    raise ValueError(
        f"{arm.name!r} builds on {name!r} of the study {earlier.name!r} with seed {earlier_seed}, which is "
        f"not in {there}: run that study there first"
    )


def _key(arm: Arm | Derived, seed: int) -> str:
    return f"{arm.directory}/seed-{seed}"


def _check_rungs(study: Study, stopping: SuccessiveHalving, *, only: Sequence[str] | None) -> None:
    """Refuse rungs at which runs have no evaluation, and a part of the arms, which cannot be compared."""
    if only is not None:
        raise ValueError(
            f"only {', '.join(only)} would be trained, but the study's stopping compares all arms at each "
            "rung: train all of them"
        )
    for arm in study.arms:
        if isinstance(arm, Arm) and arm.after is not None:
            raise ValueError(
                f"{arm.name!r} builds on a finished run, so the study's stopping cannot compare it on the "
                "way: leave out one of both"
            )
        experiment = member_experiment(study, arm.name, study.seeds[0])
        for rung in stopping.rungs:
            is_too_late = experiment.run.epochs is None and rung >= experiment.run.steps
            if rung % experiment.eval.every or is_too_late:
                raise ValueError(
                    f"the rung {rung} of the study's stopping is no step of {arm.name} with an evaluation on "
                    f"the way: give multiples of eval.every ({experiment.eval.every}) below run.steps "
                    f"({experiment.run.steps})"
                )


def evaluation_at(run: Path, step: int) -> dict[str, Any] | None:
    """Return the evaluation after a step in the log of a run; None if there is none."""
    path = run / "log.jsonl"
    records = read_log(path, kind="eval") if path.is_file() else []
    return next((record for record in reversed(records) if record["step"] == step), None)


def metric_at(record: Mapping[str, Any], study: Study, step: int) -> float:
    """Return the metric of an evaluation on the way; a value that is not finite is the worst."""
    if study.metric not in record:
        raise ValueError(
            f"evaluations on the way have no {study.metric!r}, by which the study's stopping compares arms "
            f"after step {step}: they have {', '.join(sorted(record))}"
        )
    value = float(record[study.metric])
    worst = math.inf if study.lower_is_better else -math.inf
    return value if math.isfinite(value) else worst
