"""Changes of an experiment by the paths of its fields.

    with_changes(experiment, {"optim.muon_lr": 0.02, "model.stack.0.repeats": 8})
    with_changes(experiment, {"model.stack.*.pattern.*.mixer.num_kv_heads": 2})    # *: of every element

Paths and values are those of config.json and of the command line, with underscores: an enumerated value may
be given by its name, such as "adamw".
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, TypeVar

from slmjax.config import from_json, near_names, to_json

T = TypeVar("T")


def with_changes(experiment: T, changes: Mapping[str, Any]) -> T:
    """Return a config with other values at these paths.

    All changes of a config are made at once, so that fields which limit each other can change together.

    Raises:
      ValueError: there is no such path, or a value that a config refuses; the message names the path.
    """
    if not changes:
        return experiment
    changed = _changed(experiment, changes, at="")
    # As config.json is read: a value of another type is refused.
    return from_json(type(experiment), to_json(changed))


def _changed(value: Any, changes: Mapping[str, Any], *, at: str) -> Any:
    if "" in changes:
        if len(changes) > 1:
            raise ValueError(f"{at} is changed as a whole and in parts: leave out one of both")
        return _of_same_enum(changes[""], value, at=at)
    names = _names(value, at=at, asked=next(iter(changes)))
    by_name: dict[str, dict[str, Any]] = {}
    for path, new in changes.items():
        first, _, rest = path.partition(".")
        first = first.replace("-", "_")
        if first != "*" and first not in names:
            raise ValueError(
                f"there is no field {_join(at, first)}.{near_names(first, names)} Fields are "
                f"{', '.join(names)}"
            )
        for name in names if first == "*" else (first,):
            by_name.setdefault(name, {})[rest] = new
    changed = {
        name: _changed(_child(value, name), inner, at=_join(at, name)) for name, inner in by_name.items()
    }
    if isinstance(value, tuple):
        return tuple(changed.get(str(index), item) for index, item in enumerate(value))
    try:
        return dataclasses.replace(value, **changed)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{at or 'the experiment'} with {', '.join(changed)} changed: {error}") from None


def _of_same_enum(new: Any, value: Any, *, at: str) -> Any:
    """Return the member of an enumeration that a name stands for, where the value is one; else `new`."""
    if not isinstance(value, enum.Enum) or not isinstance(new, str):
        return new
    options = {member.value: member for member in type(value)}
    if new not in options:
        raise ValueError(
            f"{at} is one of {', '.join(map(str, options))}, not {new!r}.{near_names(new, map(str, options))}"
        )
    return options[new]


def _names(value: Any, *, at: str, asked: str) -> list[str]:
    """Return the names of what a value consists of: fields of a config, or indices of a tuple."""
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    if isinstance(value, tuple):
        return [str(index) for index in range(len(value))]
    raise ValueError(f"{at} is {value!r}, which has no field {asked!r}: change {at} itself")


def _child(value: Any, name: str) -> Any:
    return value[int(name)] if isinstance(value, tuple) else getattr(value, name)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
