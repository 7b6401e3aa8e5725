"""Early stopping of arms: successive halving, which is off unless a study asks for it.

    study = Study(..., stopping=SuccessiveHalving(rungs=(500, 1000), keep=0.5))

At each rung, a step of the training, the arms that are left are compared by their mean over the seeds, and
only the best of them are trained further. Members that are stopped are recorded as "stopped early" with the
reason. They enter no paired test: an arm that is stopped has no verdict.

Source: Jamieson and Talwalkar (2016), "Non-stochastic best arm identification and hyperparameter
optimization", AISTATS.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax.stored_json import DamagedFile, read_object
from slmjax.studies.claims import CLAIMS, create_once


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuccessiveHalving:
    """Train only the best arms beyond each rung. Learning rates follow the schedule of the whole training."""

    # steps after which arms are compared, each with an evaluation on held-out text (a multiple of eval.every)
    rungs: tuple[int, ...]
    keep: float = 0.5  # fraction of the arms that are trained beyond a rung, rounded up; the baseline besides

    def __post_init__(self) -> None:
        if not self.rungs or min(self.rungs) < 1 or list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"rungs are {self.rungs}: give steps from 1 in increasing order, each only once")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep is {self.keep}: give a fraction of the arms between 0 and 1, such as 0.5")

    def remaining(
        self, means: Mapping[str, float], *, baseline: str, lower_is_better: bool
    ) -> tuple[str, ...]:
        """Return the arms that are trained further.

        Args:
          means: the mean over the seeds by arm, infinite if a member diverged or failed; of arms with equal
            means the first is better.
          baseline: an arm that is always kept, and does not count.
          lower_is_better: whether a lower mean is better.
        """
        others = [arm for arm in means if arm != baseline]

        def loss(arm: str) -> float:
            mean = means[arm] if lower_is_better else -means[arm]
            return mean if math.isfinite(mean) else math.inf

        best = sorted(others, key=loss)[: math.ceil(self.keep * len(others))]
        return tuple(arm for arm in means if arm == baseline or arm in best)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """The arms that were compared at a rung. It is made once, and all workers follow it."""

    step: int
    metric: str
    means: Mapping[str, float]  # of the arms that were compared
    remaining: tuple[str, ...]

    def reason(self, arm: str) -> str | None:
        """Return why an arm is not trained further; None if it is, as arms that were added later are."""
        if arm not in self.means or arm in self.remaining:
            return None
        return (
            f"{self.metric} {self.means[arm]:.4g} after {self.step} steps, not among the best of "
            f"{len(self.means)} arms"
        )


def _path(directory: Path, step: int) -> Path:
    return directory / CLAIMS / f"rung-{step}.json"


def read_decision(directory: Path, step: int) -> Decision | None:
    """Return the decision of a study's rung; None if it is not made yet.

    Raises:
      DamagedFile: its file cannot be read.
    """
    fields = {"metric": str, "means": dict, "remaining": list}
    remedy = "delete it, and it is made again"
    path = _path(directory, step)
    try:
        content = read_object(path, fields, remedy=remedy)
    except FileNotFoundError:
        return None
    try:
        # Infinities are texts.
        means = {arm: float(mean) for arm, mean in content["means"].items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise DamagedFile(f"{path} has a mean that is no number: {remedy}") from error
    return Decision(step=step, metric=content["metric"], means=means, remaining=tuple(content["remaining"]))


def decide(
    rule: SuccessiveHalving,
    directory: Path,
    step: int,
    values: Mapping[str, Sequence[float]],
    *,
    metric: str,
    baseline: str,
    lower_is_better: bool,
    needs_links: bool = True,
) -> Decision:
    """Make the decision of a rung, unless another worker has made it, and return it.

    Args:
      rule: of the study.
      directory: of the study.
      step: of the rung.
      values: of the seeds by arm, infinite for members that diverged or failed.
      metric: name of the values.
      baseline: an arm that is always trained further.
      lower_is_better: whether a lower value is better.
      needs_links: as for `create_once`.
    """
    means = {arm: math.fsum(column) / len(column) for arm, column in values.items()}
    remaining = rule.remaining(means, baseline=baseline, lower_is_better=lower_is_better)
    content: dict[str, Any] = {"metric": metric, "means": means, "remaining": remaining}
    content["id"] = f"{step} {sorted(means.items())}"
    create_once(_path(directory, step), content, needs_links=needs_links)
    decision = read_decision(directory, step)
    assert decision is not None
    return decision
