"""What is asked of results: names of arms, seeds, a metric and rules, without experiments.

    question = Question.of(study)                             # of a study
    question = Question(name="rates", arms=("base", "low"), seeds=(0, 1, 2), baseline="base", ...)
    question.pairs                                            # each arm with the baseline, then others

Runs that slmjax did not train have a question, too (`results_files.py`), so that studies and foreign
results are analyzed by the same code.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from slmjax.config import near_names
from slmjax.studies.design import Budget
from slmjax.studies.statistics.results_table import Rules, Table
from slmjax.studies.study import DIVERGED, Member, Study

Pair = tuple[str, str]  # an arm, and the arm that it is compared with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Arms by name, and what is asked of them."""

    name: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    metric: str
    rules: Rules
    text: str = ""  # the question in words
    further_metrics: tuple[str, ...] = ()
    comparisons: tuple[Pair, ...] = ()  # besides each arm with the baseline
    budget: Budget | None = None  # None: budgets are not compared

    @classmethod
    def of(cls, study: Study, *, further: Sequence[Pair] = ()) -> "Question":
        """Return the question of a study, with further comparisons."""
        return cls(
            name=study.name,
            arms=tuple(arm.name for arm in study.arms),
            seeds=study.seeds,
            baseline=study.baseline,
            metric=study.metric,
            rules=study.rules,
            text=study.question,
            further_metrics=study.further_metrics,
            comparisons=(*study.comparisons, *further),
            budget=study.budget,
        )

    def __post_init__(self) -> None:
        for arm in (self.baseline, *(arm for pair in self.comparisons for arm in pair)):
            if arm not in self.arms:
                raise ValueError(
                    f"{arm!r} is not an arm of {self.name}.{near_names(arm, self.arms)} Arms are "
                    f"{', '.join(self.arms)}"
                )
        _ = self.pairs  # which checks the comparisons

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All comparisons: each arm with the baseline, then the others. They are one family of tests."""
        # The order of the study, in which tables show the arms.
        pairs = [(arm, self.baseline) for arm in self.arms if arm != self.baseline]
        for arm, against in self.comparisons:
            if arm == against:
                raise ValueError(f"{arm!r} cannot be compared with itself: name two arms")
            # A pair that is tested twice would make Holm's correction stricter for nothing.
            if (arm, against) in pairs or (against, arm) in pairs:
                raise ValueError(
                    f"{arm!r} is compared with {against!r} already (every arm is with the baseline): name "
                    "the pair once"
                )
            pairs.append((arm, against))
        return tuple(pairs)


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """The members of a question by arm and seed."""

    question: Question
    members: Mapping[tuple[str, int], Member]

    @classmethod
    def of(cls, question: Question, members: Iterable[Member]) -> "Outcomes":
        """Return the outcomes of these members.

        Raises:
          ValueError: no member has a metric that the question names.
        """
        outcomes = cls(question, {(member.arm, member.seed): member for member in members})
        # Before the first member has finished, no metric is known.
        known = {name for member in outcomes.members.values() for name in member.metric_names}
        budget = () if question.budget is None else (question.budget.metric,)
        # A metric that no run has is a mistake in its name; one that some runs lack is a note.
        for name in (question.metric, *budget, *question.further_metrics):
            if known and name not in known:
                raise ValueError(
                    f"no run of the study has a metric {name!r}.{near_names(name, known)} There are "
                    f"{', '.join(sorted(known))}"
                )
        return outcomes

    def value(self, arm: str, seed: int, metric: str) -> float | None:
        """Return a metric of a member; None if it has not finished, or has no finite value of it."""
        member = self.members.get((arm, seed))
        return None if member is None else member.metric_value(metric)

    def values(self, arm: str, metric: str, *, seeds: Sequence[int] | None = None) -> list[float]:
        """Return the values of an arm that exist, in the order of the seeds."""
        seeds = self.question.seeds if seeds is None else seeds
        values = (self.value(arm, seed, metric) for seed in seeds)
        return [value for value in values if value is not None]

    def paired_seeds(self, pair: Pair, metric: str) -> tuple[int, ...]:
        """Return the seeds for which both arms have a value."""
        return tuple(
            seed
            for seed in self.question.seeds
            if all(self.value(arm, seed, metric) is not None for arm in pair)
        )

    def seeds_with(self, arm: str, status: str) -> tuple[int, ...]:
        """Return the seeds whose members ended with this status."""
        return tuple(
            seed
            for seed in self.question.seeds
            if (member := self.members.get((arm, seed))) is not None and member.status == status
        )

    def table(self) -> Table:
        """Return the metric of the question by arm and seed."""
        seeds = self.question.seeds
        arms = self.question.arms
        values = [[self.value(arm, seed, self.question.metric) for seed in seeds] for arm in arms]
        diverged = [[seed in self.seeds_with(arm, DIVERGED) for seed in seeds] for arm in arms]
        return Table(
            arms=arms,
            seeds=seeds,
            values=np.array(
                [[math.nan if value is None else value for value in row] for row in values], np.float64
            ).reshape(len(arms), len(seeds)),
            diverged=np.array(diverged, bool).reshape(len(arms), len(seeds)),
        )

    def lost_text(self, arm: str) -> set[float]:
        """Return the fractions of the text lost by the tokenizers of an arm; empty without members."""
        # Results without the field are of tokenizers that lose nothing.
        return {
            self.value(arm, seed, "lost_text") or 0.0
            for seed in self.question.seeds
            if (arm, seed) in self.members
        }

    def is_comparable(self, pair: Pair) -> bool:
        """Return whether bits per byte compare: both arms' tokenizers lose the same fraction of the text."""
        # Text that a tokenizer loses costs nothing, so that bits per byte of two arms would differ for that
        # reason.
        first, second = (self.lost_text(arm) for arm in pair)
        return self.question.metric != "bits_per_byte" or first == second
