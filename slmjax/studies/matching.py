"""Arms made equal to the baseline before anything is trained.

    study, matched = match_arms(study)      # the arms, changed; and what was chosen for each
    print(matched[0].text)                  # "wide: ffn 320 -> 296: 612,480 parameters, 0.3 % below ..."
    study = at_matched(study, matched)      # later: the same choices, without a search

For each `Match` of the study, the named dimension of every other trained arm is moved until the quantity is
within the tolerance of the baseline's. Widths move in multiples of 8, or of what formats and the mesh need.
All layers of a stack move alike: those of other sizes keep their ratio. A coarse dimension can be followed by
a fine one: parameters by width, then parameters by ffn.
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slmjax.config import differences, to_json
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.mixers.differential import DifferentialAttentionConfig
from slmjax.models.protocols import innermost
from slmjax.runner.step_time import time_training
from slmjax.studies.arms import Arm
from slmjax.studies.changes import with_changes
from slmjax.studies.costs import cost_in, text_size, vocab_size_of
from slmjax.studies.design import Dimension, Match, Quantity
from slmjax.studies.planned import planned_experiment
from slmjax.studies.study import Study
from slmjax.training.experiment import Experiment

log = logging.getLogger(__name__)

WIDTH_MULTIPLE = 8  # of widths that move: what the matrix units of all devices divide by
MOST_ROUNDS = 5  # through the matches of an arm, where one disturbs another
# A dimension moves at most to this multiple of itself, and at least to this fraction.
FARTHEST = 16

Seconds = Callable[[Experiment], float]  # of one training step on this device


class CannotMatch(ValueError):
    """Arms that cannot be brought within the tolerance of the baseline."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matched:
    """What was chosen for an arm to match the baseline in a quantity."""

    arm: str
    quantity: Quantity
    dimension: Dimension
    target: float  # of the baseline
    before: float  # the quantity of the arm as it was
    after: float  # and with all choices made
    value_before: int  # of the dimension: steps, width, layers, or the largest hidden width
    value_after: int
    tolerance: float
    # the fields that all matches of the arm have changed, by path; the same for each of them
    changes: dict[str, int | None]

    @property
    def off_by(self) -> float:
        """The difference from the baseline, as a fraction of it."""
        return self.after / self.target - 1.0

    @property
    def is_met(self) -> bool:
        """Whether the quantity is within the tolerance."""
        return abs(self.off_by) <= self.tolerance

    @property
    def text(self) -> str:
        """One line for people."""
        moved = (
            f"{self.dimension.value} {self.value_before:,} -> {self.value_after:,}"
            if self.value_before != self.value_after
            else f"{self.dimension.value} stays {self.value_after:,}"
        )
        side = "above" if self.off_by > 0 else "below"
        off = f"{100 * abs(self.off_by):.2g} % {side}" if self.off_by else "exactly as"
        outside = "" if self.is_met else f", outside {100 * self.tolerance:g} %"
        return f"{self.arm}: {moved}: {quantity_text(self.quantity, self.after)}, {off} the baseline{outside}"


def quantity_text(quantity: Quantity, value: float) -> str:
    """Return a quantity with its name: "612,480 parameters", "3.2e+13 flops"."""
    name = quantity.value.replace("_", " ")
    return f"{value:.4g} {name}" if quantity in _REAL else f"{round(value):,} {name}"


_REAL = (Quantity.FLOPS, Quantity.SECONDS, Quantity.EPOCHS)


def match_arms(study: Study, *, seconds: Seconds | None = None) -> tuple[Study, tuple[Matched, ...]]:
    """Return the study with its arms made equal to the baseline, and what was chosen.

    The matches of a study are made in their order; where a later one disturbs an earlier one, they are made
    again. The experiment of the first seed decides for all seeds.

    Args:
      seconds: measures the time of a step, for `Quantity.SECONDS` (none: compiles the step and times it).

    Raises:
      CannotMatch: some arms cannot be matched, unless the match allows it for them; the message says how near
        they come.
      ValueError: an arm's experiment is invalid, or `allow` names no arm.
    """
    if not study.matched:
        return study, ()
    _check_allowed(study)
    base = study.trained(study.baseline).name
    with planned_experiment(study, base, study.seeds[0]) as experiment:
        baseline = _Measured(experiment, seconds)
        targets = [baseline.of(match.quantity) for match in study.matched]
    chosen: list[Matched] = []
    for arm in study.arms:
        if isinstance(arm, Arm) and arm.name != base:
            with planned_experiment(study, arm.name, study.seeds[0]) as experiment:
                chosen += _match_arm(arm.name, experiment, study.matched, targets, seconds)
    for choice in chosen:
        log.info("matched %s", choice.text)
    allowed = {(match.quantity, name) for match in study.matched for name in match.allow}
    missed = [
        choice for choice in chosen if not choice.is_met and (choice.quantity, choice.arm) not in allowed
    ]
    if missed:
        lines = "\n".join(f"  {choice.text}" for choice in missed)
        raise CannotMatch(
            f"arms that cannot be made equal to {study.baseline!r} come no nearer than this:\n{lines}\nGive "
            "them another dimension to move, a larger tolerance, or name them in allow of their Match"
        )
    return at_matched(study, chosen), tuple(chosen)


def at_matched(study: Study, matched: Sequence[Matched]) -> Study:
    """Return the study with choices that were made before, such as those of a study that is resumed."""
    changes = {choice.arm: choice.changes for choice in matched if choice.changes}
    arms = tuple(
        arm.then(functools.partial(with_changes, changes=changes[arm.name]))
        if isinstance(arm, Arm) and arm.name in changes
        else arm
        for arm in study.arms
    )
    return dataclasses.replace(study, arms=arms)


def _check_allowed(study: Study) -> None:
    for match in study.matched:
        for name in match.allow:
            study.arm(name)  # raises an error that names the arms


def step_seconds(experiment: Experiment) -> float:
    """Return the time of a training step on this device, the mean over the programs of the run."""
    timed = time_training(experiment, vocab_size=vocab_size_of(experiment))
    return timed.per_step(experiment.run.steps)


# One arm ----------------------------------------------------------------------------------------------------
def _match_arm(
    name: str,
    experiment: Experiment,
    matches: Sequence[Match],
    targets: Sequence[float],
    seconds: Seconds | None,
) -> list[Matched]:
    """Return the choices for an arm, one for each match."""
    start = experiment
    for _ in range(MOST_ROUNDS):
        for match, target in zip(matches, targets, strict=True):
            if not _is_met(_Measured(experiment, seconds).of(match.quantity), target, match):
                experiment = _nearest(experiment, match, target, seconds)
        measured = _Measured(experiment, seconds)
        if all(
            _is_met(measured.of(match.quantity), target, match)
            for match, target in zip(matches, targets, strict=True)
        ):
            break
    # Paths as `with_changes` reads them: indices of tuples are names, too.
    changes = {
        re.sub(r"\[(\d+)\]", r".\1", path): new
        for path, (_, new) in differences(to_json(start), to_json(experiment))
    }
    before = _Measured(start, seconds)
    after = _Measured(experiment, seconds)
    return [
        Matched(
            arm=name,
            quantity=match.quantity,
            dimension=match.by,
            target=target,
            before=before.of(match.quantity),
            after=after.of(match.quantity),
            value_before=DIMENSIONS[match.by].value(start),
            value_after=DIMENSIONS[match.by].value(experiment),
            tolerance=match.tolerance,
            changes=changes,
        )
        for match, target in zip(matches, targets, strict=True)
    ]


def _is_met(value: float, target: float, match: Match) -> bool:
    return abs(value - target) <= match.tolerance * target


class _Measured:
    """The quantities of an experiment."""

    def __init__(self, experiment: Experiment, seconds: Seconds | None) -> None:
        self._experiment = experiment
        self._seconds = seconds

    def of(self, quantity: Quantity) -> float:
        """Return a quantity of the training or of the model."""
        if quantity is Quantity.SECONDS:
            measure = step_seconds if self._seconds is None else self._seconds
            experiment = _in_steps(self._experiment)
            return measure(experiment) * experiment.run.steps
        return cost_in(quantity, self._experiment)


def _nearest(experiment: Experiment, match: Match, target: float, seconds: Seconds | None) -> Experiment:
    """Return the experiment with the value of the dimension that comes nearest to the target."""
    dimension = DIMENSIONS[match.by]
    unit = dimension.unit(experiment)
    start = dimension.value(experiment)

    def moved(units: int) -> Experiment:
        return dimension.at(experiment, units * unit)

    def quantity(units: int) -> float:
        return _Measured(moved(units), seconds).of(match.quantity)

    low = max(1, math.ceil(start / FARTHEST / unit))
    high = max(low, math.floor(start * FARTHEST / unit))
    best = nearest_integer(quantity, target, start=max(low, round(start / unit)), low=low, high=high)
    # The value as it is need not be a multiple of the unit, and may be nearer.
    if abs(quantity(best) - target) < abs(_Measured(experiment, seconds).of(match.quantity) - target):
        return moved(best)
    return experiment


def nearest_integer(
    function: Callable[[int], float], target: float, *, start: int, low: int, high: int
) -> int:
    """Return the integer from `low` to `high` at which a rising function comes nearest to a target.

    Interpolation between two values that enclose the target, which for a linear function is exact, so that
    few values are computed; halving where it makes little progress.
    """
    known: dict[int, float] = {}

    def at(x: int) -> float:
        if x not in known:
            known[x] = function(x)
        return known[x]

    # The target is enclosed by two values: about where it would be if the function were proportional.
    guess = min(max(round(start * target / at(start)), low), high) if at(start) > 0 else start
    left = guess
    right = guess
    stride = max(1, guess // 16)
    while at(left) > target and left > low:
        right = left
        left = max(low, left - stride)
        stride *= 2
    while at(right) < target and right < high:
        left = right
        right = min(high, right + stride)
        stride *= 2
    while right - left > 1:
        rise = at(right) - at(left)
        share = (target - at(left)) / rise if rise > 0 else 0.5
        guess = min(max(left + round(share * (right - left)), left + 1), right - 1)
        width = right - left
        for x in (guess, guess - 1, guess + 1):
            if left < x < right:
                if at(x) <= target:
                    left = x
                else:
                    right = x
        if right - left > width / 2:
            middle = (left + right) // 2
            if at(middle) <= target:
                left = middle
            else:
                right = middle
    return min((left, right), key=lambda x: abs(at(x) - target))


# Dimensions -------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Moving:
    """How a dimension is read and set."""

    value: Callable[[Experiment], int]
    unit: Callable[[Experiment], int]  # values are multiples of it
    at: Callable[[Experiment, int], Experiment]


def _steps(experiment: Experiment) -> int:
    return _in_steps(experiment).run.steps


def _in_steps(experiment: Experiment) -> Experiment:
    """Return the experiment with its length in steps."""
    if experiment.run.epochs is None:
        return experiment
    rows = text_size(experiment).rows
    run = experiment.run.in_steps(rows, batch_size=experiment.data.batch_size)
    return dataclasses.replace(experiment, run=run)


def _at_steps(experiment: Experiment, steps: int) -> Experiment:
    run = dataclasses.replace(experiment.run, steps=steps, epochs=None)
    return dataclasses.replace(experiment, run=run)


def _with_stack(experiment: Experiment, stack: Sequence[LayerGroup], **changes: Any) -> Experiment:
    model = dataclasses.replace(experiment.model, stack=tuple(stack), **changes)
    return dataclasses.replace(experiment, model=model)


def _depth(experiment: Experiment) -> int:
    return experiment.model.num_layers


def _main_group(model: ModelConfig) -> LayerGroup:
    return max(model.stack, key=lambda group: group.repeats)


def _at_depth(experiment: Experiment, layers: int) -> Experiment:
    model = experiment.model
    # Groups keep their share of the layers: the one with the most repeats has as many as asked for.
    factor = layers / model.num_layers
    return _with_stack(
        experiment,
        [dataclasses.replace(group, repeats=max(1, round(factor * group.repeats))) for group in model.stack],
    )


def _hidden_dims(block: BlockConfig) -> tuple[int, ...]:
    ffn = block.ffn
    if isinstance(ffn, MlpConfig):
        return (ffn.hidden_dim,)
    if isinstance(ffn, MoeConfig):
        return (ffn.hidden_dim, *((ffn.shared_hidden_dim,) if ffn.shared_hidden_dim else ()))
    return ()


def _ffn(experiment: Experiment) -> int:
    dims = [dim for block in experiment.model.blocks() for dim in _hidden_dims(block)]
    if not dims:
        raise ValueError("the model has no feed-forward layer that ffn could move: match by width or depth")
    return max(dims)


def _at_ffn(experiment: Experiment, hidden_dim: int) -> Experiment:
    unit = _width_unit(experiment)
    factor = hidden_dim / _ffn(experiment)
    return _with_stack(experiment, _with_hidden_dims(experiment.model, factor, unit=unit))


def _with_hidden_dims(model: ModelConfig, factor: float, *, unit: int) -> list[LayerGroup]:
    """Return the layer groups with wider or narrower feed-forward layers, in multiples of the unit."""

    def scaled(dim: int) -> int:
        return max(unit, unit * round(factor * dim / unit))

    def changed(block: BlockConfig) -> BlockConfig:
        ffn = block.ffn
        if isinstance(ffn, MlpConfig):
            ffn = dataclasses.replace(ffn, hidden_dim=scaled(ffn.hidden_dim))
        elif isinstance(ffn, MoeConfig):
            shared = scaled(ffn.shared_hidden_dim) if ffn.shared_hidden_dim else 0
            ffn = dataclasses.replace(ffn, hidden_dim=scaled(ffn.hidden_dim), shared_hidden_dim=shared)
        return dataclasses.replace(block, ffn=ffn)

    return [dataclasses.replace(group, pattern=tuple(map(changed, group.pattern))) for group in model.stack]


def _width(experiment: Experiment) -> int:
    return experiment.model.embed_dim


def _at_width(experiment: Experiment, width: int) -> Experiment:
    model = experiment.model
    factor = width / model.embed_dim
    stack = _with_hidden_dims(model, factor, unit=_width_unit(experiment))
    return _with_stack(experiment, stack, embed_dim=width)


def _width_unit(experiment: Experiment) -> int:
    """Return the multiple that feed-forward widths and the model's width must keep."""
    unit = WIDTH_MULTIPLE
    # Formats in groups hold only whole groups.
    for phase in () if experiment.quant is None else experiment.quant.phases:
        for rule in phase.rules:
            for spec in (rule.weight, rule.input):
                if spec is not None and spec.group_size is not None and rule.fallback is None:
                    unit = math.lcm(unit, spec.group_size)
    mesh = experiment.mesh
    return math.lcm(unit, *(size for size in (mesh.tensor, mesh.fsdp) if size > 0))


def _embed_unit(experiment: Experiment) -> int:
    """Return the multiple of the model's width: heads that follow it have an even number of dims."""
    unit = _width_unit(experiment)
    for mixer in (mixer for block in experiment.model.blocks() for mixer in innermost(block.mixer)):
        if isinstance(mixer, AttentionConfig) and mixer.head_dim is None:
            unit = math.lcm(unit, 2 * mixer.num_heads)
        # Its heads have two queries each.
        if isinstance(mixer, DifferentialAttentionConfig) and mixer.head_dim is None:
            unit = math.lcm(unit, 4 * mixer.num_heads)
    return unit


DIMENSIONS: Mapping[Dimension, _Moving] = {
    Dimension.STEPS: _Moving(value=_steps, unit=lambda experiment: 1, at=_at_steps),
    Dimension.WIDTH: _Moving(value=_width, unit=_embed_unit, at=_at_width),
    Dimension.DEPTH: _Moving(
        value=_depth, unit=lambda experiment: len(_main_group(experiment.model).pattern), at=_at_depth
    ),
    Dimension.FFN: _Moving(value=_ffn, unit=_width_unit, at=_at_ffn),
}
