"""Settings by their path, over the sessions of a run.

    flat({"optim": {"lr": 0.001}})                           # {"optim.lr": 0.001}
    changed_settings(config, sessions)                       # {"optim.lr": [(1, 0.0003), (151, 0.001)]}

config.json has the settings of the newest session. The log has what each session changed, from which the
settings of the earlier ones follow.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slmjax.telemetry.run_directory import Session

Settings = dict[str, Any]


def flat(value: Any, prefix: str = "") -> Settings:
    """Return the leaves of nested settings by their dotted path; an empty mapping or list is a leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    leaves: Settings = {}
    for key, item in items:
        leaves |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return leaves or {prefix: value}


def settings_of_sessions(
    config: Mapping[str, Any], sessions: Sequence[Session]
) -> list[tuple[int, Settings]]:
    """Return the settings of each session with a step that counts, and that step; the oldest first.

    Steps before the first session in the log, of a version that recorded none, count as one.
    """
    settings = flat(dict(config))
    counting: list[tuple[int, Settings]] = []
    # From the newest back: a change holds the values before it.
    for session in reversed(sessions):
        if session.num_steps:
            counting.insert(0, (session.first_step, settings))
        settings = dict(settings)
        for name, (before, _) in session.changes.items():
            path = re.sub(r"\[(\d+)\]", r".\1", name)
            for leaf in [leaf for leaf in settings if leaf == path or leaf.startswith(f"{path}.")]:
                del settings[leaf]
            settings |= flat(before, path)
    if sessions and sessions[0].first_step > 1:
        counting.insert(0, (1, settings))
    return counting


def changed_settings(
    config: Mapping[str, Any], sessions: Sequence[Session]
) -> dict[str, list[tuple[int, Any]]]:
    """Return the settings that steps of a run had different values of.

    Returns:
      by path, the first step with each value, and the value; None if it was absent.
    """
    counting = settings_of_sessions(config, sessions)
    changed: dict[str, list[tuple[int, Any]]] = {}
    # In the order of config.json, with settings that are no longer there at the end.
    for path in dict.fromkeys(path for _, settings in reversed(counting) for path in settings):
        history: list[tuple[int, Any]] = []
        for first_step, settings in counting:
            value = settings.get(path)
            # By repr, since NaN differs from itself and 1 equals True.
            if not history or repr(value) != repr(history[-1][1]):
                history.append((first_step, value))
        if len(history) > 1:
            changed[path] = history
    return changed


@dataclasses.dataclass(frozen=True)
class History:
    """The values of a setting that a resumed session changed: the first step with each, and the value."""

    values: tuple[tuple[int, Any], ...]

    def text(self) -> str:
        """Return the values in words."""
        first, *others = self.values
        later = "".join(f", from step {step:,}: {setting_text(value)}" for step, value in others)
        return f"{setting_text(first[1])}{later}"


def setting_text(value: Any) -> str:
    """Return the value of a setting, or its history, with all digits: values that differ look different."""
    if isinstance(value, History):
        return value.text()
    return repr(value) if isinstance(value, float) else shown(value)


def shown(value: Any) -> str:
    """Return a value as text for people."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "—"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


# The architecture -------------------------------------------------------------------------------------------
STACK = "model.stack"


def is_of_stack(path: str) -> bool:
    """Return whether a setting is of the layers of the model."""
    return path.startswith(f"{STACK}.")


def stack_text(config: Mapping[str, Any]) -> str:
    """Describe the stack of layers by its structure: "2 x (Attention Mlp, Attention Moe), 1 x (...)"."""
    model = config.get("model")
    stack = model.get("stack") if isinstance(model, dict) else None
    return ", ".join(map(_group, stack if isinstance(stack, list) else ()))


def _group(group: Any) -> str:
    if not isinstance(group, dict):
        return "?"
    pattern = group.get("pattern")
    blocks = ", ".join(map(_block, pattern if isinstance(pattern, list) else ()))
    return f"{group.get('repeats', 1)} x ({blocks})"


def _block(block: Any) -> str:
    parts = (block.get("mixer"), block.get("ffn")) if isinstance(block, dict) else ()
    names = (str(part["type"]) for part in parts if isinstance(part, dict) and "type" in part)
    return " ".join(name.removesuffix("Config") for name in names)
