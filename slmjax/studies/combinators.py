"""Arms and studies made from a few lines: a grid of settings, two arms, a question at several sizes.

    arms = grid({"optim.lr": (0.01, 0.02), "model.embed_dim": (128, 256)})   # "lr 0.01, embed_dim 128", ...
    arms = pair("tied", "untied", {"model.tied": False})
    studies = ladder(study, {"1M": {}, "4M": {"model.embed_dim": 256}})      # a study for each size

All changes are of the study's base, by the paths of its fields (`changes.py`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from slmjax.studies.arms import Arm, Derived
from slmjax.studies.changes import with_changes
from slmjax.studies.study import Study
from slmjax.training.experiment import Experiment

Changes = Mapping[str, Any]  # values by field path


def grid(axes: Mapping[str, Sequence[Any] | Mapping[str, Any]]) -> tuple[Arm, ...]:
    """Return an arm for each combination of settings, the last axis varying fastest.

    Args:
      axes: by field path, the values, or values by names that arms show instead. A named value may itself be
        a mapping, of several changes by field path; the axis is then only a title.

            grid({"optim.lr": (0.01, 0.02), "shape": {"deep": {...}, "wide": {...}}})

    Raises:
      ValueError: an axis has no values, or two combinations have the same name or change the same field.
    """
    options = [_options(path, values, _short_names(axes)[path]) for path, values in axes.items()]
    arms = [_combined(combination) for combination in itertools.product(*options)]
    if len({arm.directory.lower() for arm in arms}) < len(arms):
        names = ", ".join(arm.name for arm in arms)
        raise ValueError(f"two arms of the grid have the same name: name the values of an axis ({names})")
    return tuple(arms)


def _options(path: str, values: Sequence[Any] | Mapping[str, Any], short: str) -> list[tuple[str, Changes]]:
    """Return the name and the changes of each value of an axis."""
    if not values or isinstance(values, str):
        raise ValueError(f"the axis {path!r} of the grid is {values!r}: give a tuple with a value or more")
    if not isinstance(values, Mapping):
        return [(f"{short} {_shown(value, path)}", {path: value}) for value in values]
    return [(name, value if isinstance(value, Mapping) else {path: value}) for name, value in values.items()]


def _shown(value: Any, path: str) -> str:
    value = getattr(value, "value", value)  # of an enum
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(
            f"{path} takes a {type(value).__name__}, which has no short name for an arm: give a mapping of "
            f"names to values, such as {{'a name': {type(value).__name__}(...)}}"
        )
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short_names(paths: Iterable[str]) -> dict[str, str]:
    """Return the last parts of paths, as many as tell them apart."""
    parts = {path: path.split(".") for path in paths}
    names = {}
    for path, own in parts.items():
        others = [other for each, other in parts.items() if each != path]
        length = next(
            (n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own)
        )
        names[path] = ".".join(own[-length:])
    return names


def _combined(combination: Sequence[tuple[str, Changes]]) -> Arm:
    changes: dict[str, Any] = {}
    for name, more in combination:
        if twice := sorted(changes.keys() & more.keys()):
            raise ValueError(f"two axes of the grid change {', '.join(twice)}, one of them in {name!r}")
        changes |= more
    return Arm(name=", ".join(name for name, _ in combination), changes=changes)


def pair(baseline: str, arm: str, changes: Changes | Callable[[Experiment], Experiment]) -> tuple[Arm, Arm]:
    """Return the base as it is, and an arm with changes."""
    return Arm(name=baseline), Arm(name=arm, changes=changes)


def ladder(
    study: Study, sizes: Mapping[str, Changes | Callable[[Experiment], Experiment]]
) -> tuple[Study, ...]:
    """Return the study at several sizes, in their order; three or more show a trend.

    Args:
      study: the question. Its base is changed to each size, and so are the experiments of arms that have
        their own; what makes an arm is changed afterwards.
      sizes: by name, such as "1M": changes by field path, or a function of the experiment.

    Raises:
      ValueError: there are fewer than two sizes.
    """
    if len(sizes) < 2:
        raise ValueError(f"a ladder has two sizes or more, and these are {list(sizes)}")
    return tuple(
        dataclasses.replace(
            study,
            name=f"{study.name}, {size}",
            ladder=study.name,
            size=size,
            base=None if study.base is None else _at_size(study.base, changes),
            arms=tuple(_arm_at_size(arm, changes) for arm in study.arms),
        )
        for size, changes in sizes.items()
    )


def _at_size(experiment: Experiment, changes: Changes | Callable[[Experiment], Experiment]) -> Experiment:
    return changes(experiment) if callable(changes) else with_changes(experiment, changes)


def _arm_at_size(arm: Arm | Derived, changes: Changes | Callable[[Experiment], Experiment]) -> Arm | Derived:
    if isinstance(arm, Derived) or arm.experiment is None:
        return arm
    own = arm.experiment
    if isinstance(own, Experiment):
        return dataclasses.replace(arm, experiment=_at_size(own, changes))
    # A function of the seed, and of the run that the arm builds on if it has one.
    return dataclasses.replace(arm, experiment=lambda *member: _at_size(own(*member), changes))
