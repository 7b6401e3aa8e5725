"""Read, write and fingerprint trees of frozen dataclasses as JSON. There are no settings here.

A config is a frozen, keyword-only dataclass whose fields hold bool, int, float, str, Path, Enum, None, other
configs, tuples and `dict[str, X]` of these, and unions of these. It is read back by its declared types alone.
An unknown field, a missing one or a value of another type raises a `ConfigError` that names the dotted path.
A class is looked up only among the imported subclasses of the declared one: no dotted import path is ever
resolved, so a config file cannot name code to run.

    text = dumps(experiment);  experiment == loads(Experiment, text)
"""

import abc
import dataclasses
import difflib
import enum
import functools
import hashlib
import inspect
import json
import logging
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field and says what to change."""


log = logging.getLogger(__name__)

# Keys of a field's metadata.
_BEFORE = "slmjax.before"
_FORMER_NAME = "slmjax.former_name"


def added_field(default: Any, *, before: Any) -> Any:
    """Return a dataclass field that older files lack: `steps: int = added_field(100, before=50)`.

    Args:
      default: the value in a new config.
      before: the value that a file without the field stands for: what the program did when it was written. A
        tree with this value keeps the fingerprint that it had before the field was added.
    """
    return dataclasses.field(default=default, metadata={_BEFORE: before})


def renamed_field(default: Any = dataclasses.MISSING, *, was: str) -> Any:
    """Return a dataclass field that had another name: `num_loops: int = renamed_field(1, was="passes")`.

    Older files are read with a note in the log, and a tree keeps the fingerprint that it had under the former
    name.

    Args:
      default: the default value; without one the field is required.
      was: the former name.
    """
    return dataclasses.field(default=default, metadata={_FORMER_NAME: was})


E = TypeVar("E", bound=enum.Enum)


def renamed_values(**former: str) -> Callable[[type[E]], type[E]]:
    """Return a decorator for an enum whose members had other values: `@renamed_values(free="untied")`.

    Older files are read with a note in the log, and a tree keeps the fingerprint that it had with the former
    values.

    Args:
      former: the former value of each renamed member, with its present value.
    """

    def register(cls: type[E]) -> type[E]:
        _FORMER_VALUES[cls] = {was: cls(now) for was, now in former.items()}
        return cls

    return register


_FORMER_VALUES: dict[type, Mapping[str, enum.Enum]] = {}


@typing.runtime_checkable
class Upgrades(typing.Protocol):
    """A config class with fields that replaced others: it reads older files and keeps their fingerprints."""

    @classmethod
    def upgraded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON fields of this version for those of a file of any version."""
        ...

    @classmethod
    def downgraded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON fields of the earliest version that can express the same, for the fingerprint."""
        ...


def _upgrades(cls: type) -> type[Upgrades] | None:
    return cls if issubclass(cls, Upgrades) else None


def near_names(name: str, options: Iterable[str]) -> str:
    """Return a hint to append to an error message: "" or " Did you mean 'x' or 'y'?"."""
    # A cutoff of 0.5 finds transposed and missing letters without suggesting unrelated names.
    near = difflib.get_close_matches(str(name), [str(option) for option in options], n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(option) for option in near)}?" if near else ""


def to_json(tree: Any) -> Any:
    """Return a tree as values that JSON can hold: an Enum as its value, a tuple as a list, a Path as a str.

    A dataclass has the key "type" with its class name where the declared type leaves the class open: it is
    abstract, a union of dataclasses, or a base of the value's class. A dataclass at the root has the key if
    it derives from another dataclass or an ABC.

    Raises:
        ConfigError: a NaN, an infinity, or a value of a type that no config holds.
    """
    return _encode(tree, Any, "", is_short=False)


def from_json(cls: type[T], data: Any) -> T:
    """Return the config that `to_json` gave these values for.

    Args:
        cls: a dataclass, concrete or the abstract base of imported ones.
        data: the JSON values.

    Raises:
        ConfigError: a field is unknown, missing or of another type (the message has its dotted path and near
          names), or a `__post_init__` refused it.
    """
    return cast(T, _decode(data, cls, ""))


def dumps(tree: Any) -> str:
    """Return `to_json` as indented text."""
    return json.dumps(to_json(tree), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def loads(cls: type[T], text: str) -> T:
    """Return `from_json` of a text. A duplicate key and a NaN raise ConfigError, too."""
    try:
        # Python's json accepts NaN and duplicate keys by default.
        data = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except ConfigError:
        raise
    except ValueError as error:  # also an integer of thousands of digits
        raise ConfigError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError("not a config: nested too deeply") from error
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError("a text has half of a surrogate pair, which is no character") from error
    return from_json(cls, data)


def read_file(cls: type[T], path: Path) -> T:
    """Return `loads` of a file. Raises ConfigError, which names the file, also if it cannot be read."""
    try:
        return loads(cls, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text ({error.reason} at {error.start})"
        raise ConfigError(f"{path}: {problem}. Restore the file from a copy") from error
    except ValueError as error:
        problem = str(error).rstrip(".")
        raise ConfigError(f"{path}: {problem}. Repair the file, or restore it from a copy") from error


def fingerprint(tree: Any) -> str:
    """Return 16 hex digits of the SHA-256 of canonical JSON, the same in any process and on any Python.

    A field that was added later and has its former value is left out, so that a study resumes with members
    that were trained before.
    """
    # Former names and values, so that a rename does not make trained members look like other ones.
    short = _encode(tree, Any, "", is_short=True)
    canonical = json.dumps(short, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the dotted path of each value in which two JSON values differ, and both values.

    A value that only one side has is None on the other. Lists of other lengths, and objects of other classes
    (the key "type"), differ as a whole.
    """
    if before == after and type(before) is type(after):
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping) and before.get("type") == after.get("type"):
        for name in dict.fromkeys((*before, *after)):
            inner = f"{path}.{name}" if path else str(name)
            yield from differences(before.get(name), after.get(name), inner)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{path}[{i}]")
    else:
        yield path, (before, after)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ConfigError(f"the key {key!r} appears twice in one object: remove one")
        result[key] = value
    return result


def _refuse_constant(name: str) -> Any:
    raise ConfigError(f"{name} is not a value that a config can hold: give a finite number")


# Declared types -------------------------------------------------------------------------------------------


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    """Return the declared type of each field of the constructor, without Annotated."""
    # Cached, since resolving type hints is slow.
    hints = typing.get_type_hints(cls)
    types_by_name = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    # The key "type" is needed to write the class of a value.
    if "type" in types_by_name:
        raise ConfigError(
            f"{cls.__name__}.type: a config field cannot have this name, in JSON it holds the class: rename "
            "it"
        )
    return types_by_name


def _is_dataclass(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _is_config(hint: Any) -> bool:
    """Return whether a type is a dataclass, or an abstract base without fields of its own."""
    return _is_dataclass(hint) or (isinstance(hint, type) and _is_abstract(hint))


def _is_abstract(cls: type) -> bool:
    return inspect.isabstract(cls) or abc.ABC in cls.__bases__


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union; any other type is its own only member."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_open(hint: Any, cls: type) -> bool:
    """Return whether a value of class `cls`, declared as `hint`, must be written with its class name."""
    if hint is Any:
        return any(_is_config(base) for base in cls.__mro__[1:] if base is not abc.ABC)
    configs = [member for member in _members(hint) if _is_config(member)]
    return len(configs) != 1 or _is_abstract(configs[0]) or configs[0] is not cls


def _concrete_classes(hints: Iterable[Any]) -> dict[str, type]:
    """Return the imported dataclasses, by name, that a field declared as one of `hints` can hold."""
    classes: dict[str, type] = {}
    pending = [hint for hint in hints if _is_config(hint)]
    while pending:
        cls = pending.pop(0)
        # Subclasses of subclasses, too: any imported class may be meant.
        pending += cls.__subclasses__()
        if _is_abstract(cls) or not _is_dataclass(cls):
            continue
        # A class name in a file must mean one class.
        other = classes.get(cls.__name__)
        # An experiment file that was loaded twice defines its classes twice; the later one counts.
        if (
            other is not None
            and other is not cls
            and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__)
        ):
            raise ConfigError(
                f"two classes are named {cls.__name__} ({other.__module__} and {cls.__module__}): rename one"
            )
        classes[cls.__name__] = cls
    return classes


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "None"
    if len(_members(hint)) > 1:
        return " | ".join(_type_name(member) for member in _members(hint))
    if typing.get_origin(hint) is not None:
        inner = ", ".join("..." if arg is Ellipsis else _type_name(arg) for arg in typing.get_args(hint))
        return f"{typing.get_origin(hint).__name__}[{inner}]"
    return getattr(hint, "__name__", str(hint))


def _at(path: str) -> str:
    return path or "the config"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# Writing ----------------------------------------------------------------------------------------------------


def _encode(value: Any, hint: Any, path: str, *, is_short: bool) -> Any:
    """Return a value as JSON; with `is_short`, without the added fields that have their former value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        declared_types = _field_types(cls)
        # A config without the fields that were added since has the fingerprint it had then.
        if is_short:
            before = {
                field.name: field.metadata[_BEFORE]
                for field in dataclasses.fields(cls)
                if _BEFORE in field.metadata
            }
            as_before = {name for name, former in before.items() if getattr(value, name) == former}
            declared_types = {
                name: declared for name, declared in declared_types.items() if name not in as_before
            }
        fields = {
            name: _encode(getattr(value, name), declared, _join(path, name), is_short=is_short)
            for name, declared in declared_types.items()
        }
        if is_short:
            former = _former_names(cls)
            fields = {former.get(name, name): item for name, item in fields.items()}
            if upgrades := _upgrades(cls):
                fields = upgrades.downgraded(fields)
        return {"type": cls.__name__, **fields} if _is_open(hint, cls) else fields
    # Enums before str, since an Enum may derive from it.
    if isinstance(value, enum.Enum):
        former_values = _FORMER_VALUES.get(type(value), {}) if is_short else {}
        return next((was for was, member in former_values.items() if member is value), value.value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        declared = _element_types(hint, len(value))
        return [_encode(item, declared[i], f"{path}[{i}]", is_short=is_short) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        declared = next(
            (typing.get_args(member)[1] for member in _members(hint) if typing.get_origin(member) is dict),
            Any,
        )
        return {
            str(key): _encode(item, declared, _join(path, str(key)), is_short=is_short)
            for key, item in value.items()
        }
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        # JSON has no NaN or infinity, and a NaN would make a config differ from itself.
        if not math.isfinite(value):
            raise ConfigError(
                f"{_at(path)}: {value} is not a value that a config can hold: give a finite number"
            )
        # 1 and 1.0 in a float field are the same config and must have the same fingerprint.
        is_float = float in _members(hint) and int not in _members(hint)
        return float(value) if is_float else value
    raise ConfigError(f"{_at(path)}: a config cannot hold a value of type {type(value).__name__}")


def _element_types(hint: Any, length: int) -> tuple[Any, ...]:
    """Return the declared type of each element of a tuple of `length`, Any where none is declared."""
    args = next(
        (typing.get_args(member) for member in _members(hint) if typing.get_origin(member) in (tuple, list)),
        (),
    )
    if len(args) == 2 and args[1] is Ellipsis:
        return args[:1] * length
    return args if len(args) == length else (Any,) * length


# Reading ----------------------------------------------------------------------------------------------------


def _decode(data: Any, hint: Any, path: str) -> Any:
    members = _members(hint)
    if data is None and type(None) in members:
        return None
    configs = [member for member in members if _is_config(member)]
    if configs and isinstance(data, dict):
        return _decode_dataclass(data, configs, path)
    others = [member for member in members if member not in configs and member is not type(None)]
    # Exact types first, so that `int | float` keeps 1 an int.
    exact = [member for member in others if type(data) is member]
    for member in exact + others:
        is_match, value = _decode_value(data, member, path)
        if is_match:
            return value
    raise ConfigError(f"{_at(path)}: {_mismatch(data, hint, others)}")


def _mismatch(data: Any, hint: Any, members: list[Any]) -> str:
    options = [
        item.value
        for member in members
        if isinstance(member, type) and issubclass(member, enum.Enum)
        for item in member
    ]
    allowed = f" ({', '.join(map(repr, options))})" if options else ""
    if data is None:
        actual = "null"
    elif isinstance(data, dict | list):
        actual = type(data).__name__
    else:
        actual = f"{type(data).__name__} {_shortened(data)}"
    hint_text = near_names(data, options) if isinstance(data, str) else ""
    return f"expected {_type_name(hint)}{allowed}, found {actual}.{hint_text}"


def _shortened(value: Any) -> str:
    """Return a value for an error; of a long one, which a damaged file may have, the beginning."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _decode_value(data: Any, hint: Any, path: str) -> tuple[bool, Any]:
    """Return (True, value) if `data` fits `hint`, no union and no config; else (False, None)."""
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(data, list):
        return _decode_tuple(data, hint, path)
    if origin is dict and isinstance(data, dict):
        return True, {
            key: _decode(item, typing.get_args(hint)[1], _join(path, key)) for key, item in data.items()
        }
    if not isinstance(hint, type) or origin is not None:
        return False, None
    if issubclass(hint, enum.Enum):
        matches = [item for item in hint if item.value == data and type(item.value) is type(data)]
        if not matches and isinstance(data, str) and data in (former := _FORMER_VALUES.get(hint, {})):
            log.info("%s: %r is now called %r", _at(path), data, former[data].value)
            return True, former[data]
        return bool(matches), matches[0] if matches else None
    if issubclass(hint, Path) and isinstance(data, str):
        return True, hint(data)
    # JSON does not distinguish 1 and 1.0.
    if hint is float and type(data) in (int, float):
        return _is_finite_float(data), float(data) if _is_finite_float(data) else None
    return hint in (bool, int, str) and type(data) is hint, data


def _is_finite_float(number: int | float) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False


def _decode_tuple(data: list[Any], hint: Any, path: str) -> tuple[bool, Any]:
    args = typing.get_args(hint)
    if not (len(args) == 2 and args[1] is Ellipsis) and len(args) != len(data):
        raise ConfigError(
            f"{_at(path)}: expected {len(args)} values for {_type_name(hint)}, found {len(data)}"
        )
    # Each element of a tuple may have its own type.
    declared = _element_types(hint, len(data))
    return True, tuple(_decode(item, declared[i], f"{path}[{i}]") for i, item in enumerate(data))


def _decode_dataclass(data: dict[str, Any], hints: list[Any], path: str) -> Any:
    cls = _chosen_class(data, hints, path)
    declared = _field_types(cls)
    fields = _with_present_names(cls, {key: item for key, item in data.items() if key != "type"}, path)
    if upgrades := _upgrades(cls):
        try:
            fields = upgrades.upgraded(fields)
        except ValueError as error:
            raise ConfigError(f"{_at(path)}: {error}") from error
    added = {
        field.name: field.metadata[_BEFORE] for field in dataclasses.fields(cls) if _BEFORE in field.metadata
    }
    # Unknown fields first: a misspelled name also leaves a field missing, and this message is clearer.
    for key in fields:
        if key not in declared:
            raise ConfigError(
                f"{_join(path, key)}: {cls.__name__} has no field {key!r}.{near_names(key, declared)}"
            )
    for field in dataclasses.fields(cls):
        if field.init and field.name not in fields and field.name not in added:
            default = (
                ""
                if field.default is dataclasses.MISSING
                else f" (the default of this version is {field.default!r})"
            )
            raise ConfigError(f"{_join(path, field.name)}: missing; {cls.__name__} needs it{default}")
    values = {
        name: _decode(fields[name], hint, _join(path, name))
        for name, hint in declared.items()
        if name in fields
    }
    # A field that the file lacks has the value of the time when it was written.
    values = {**added, **values}
    # The constructor runs last: the checks of `__post_init__` see decoded values.
    try:
        return cls(**values)
    except ValueError as error:  # from __post_init__
        raise ConfigError(f"{_at(path)}: {error}") from error


def _former_names(cls: type) -> dict[str, str]:
    """Return the former name of each renamed field, by its present name."""
    return {
        field.name: field.metadata[_FORMER_NAME]
        for field in dataclasses.fields(cls)
        if _FORMER_NAME in field.metadata
    }


def _with_present_names(cls: type, fields: dict[str, Any], path: str) -> dict[str, Any]:
    """Return JSON fields of any version under the names of this version."""
    present = {was: now for now, was in _former_names(cls).items() if was in fields and now not in fields}
    for was, now in present.items():
        log.info("%s is now called %s", _join(path, was), _join(path, now))
    return {present.get(name, name): item for name, item in fields.items()}


def _chosen_class(data: dict[str, Any], hints: list[Any], path: str) -> type:
    """Return the class that "type" names among the allowed ones, or the only declared one."""
    # Only imported classes are candidates, so that a file cannot make the program import code.
    options = _concrete_classes(hints)
    name = data.get("type")
    # One concrete class needs no "type", unless the file names a subclass.
    if len(hints) == 1 and not _is_abstract(hints[0]) and name is None:
        return hints[0]
    if name is None:
        raise ConfigError(f"{_join(path, 'type')}: missing; give one of {', '.join(sorted(options))}")
    if not isinstance(name, str) or name not in options:
        hint = near_names(name, options) if isinstance(name, str) else ""
        known = ", ".join(sorted(options))
        raise ConfigError(
            f"{_join(path, 'type')}: {_shortened(name)} is not one of {known}.{hint} "
            "A class of your own is known once its file is named with --code FILE."
        )
    return options[name]
