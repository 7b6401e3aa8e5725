"""Read JSON files that may be damaged: an error names the file, what is wrong with it, and the way out.

    fields = {"step": int, "loss": float}
    best = read_object(path, fields, remedy="delete it: the next evaluation writes it again")

Files of a run, a model or a data cache are written by slmjax and read much later, after a full disk, an
incomplete copy or an editor. All of them are read here, so that none ends in a traceback.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class DamagedFile(ValueError):
    """A file that slmjax wrote cannot be read as what it should be."""


_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "an integer"}
_NAMES |= {float: "a number"}


def read_json(path: Path, *, remedy: str) -> Any:
    """Return the content of a JSON file.

    Args:
      path: the file.
      remedy: what to do if it is damaged, the end of a sentence: "delete it and resume the run".

    Raises:
      FileNotFoundError: there is no such file.
      DamagedFile: it cannot be read, is not UTF-8 text, or is not JSON.
    """
    try:
        return parse_json(path.read_bytes(), name=str(path), remedy=remedy)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read ({error.strerror or error}): {remedy}") from error


def parse_json(content: bytes | str, *, name: str, remedy: str) -> Any:
    """Return the value of JSON text; `name` says in errors where it comes from.

    Raises:
      DamagedFile: it is not UTF-8 text, or not JSON.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(text)
        # Half of a surrogate pair is no text: it could neither be shown nor written again.
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError as error:
        raise DamagedFile(f"{name} has half of a surrogate pair in a text: {remedy}") from error
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{name} is not UTF-8 text ({error.reason} at {error.start}): {remedy}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DamagedFile(f"{name} is not JSON ({error.msg} at {where}): {remedy}") from error
    except RecursionError as error:
        raise DamagedFile(f"{name} is nested too deeply for JSON: {remedy}") from error
    except ValueError as error:  # an integer with thousands of digits
        raise DamagedFile(f"{name} cannot be read ({error}): {remedy}") from error


Fields = Mapping[str, type]


def read_object(
    path: Path, fields: Fields | None = None, *, optional: Fields | None = None, remedy: str
) -> dict[str, Any]:
    """Return the object in a JSON file, which must have these fields with values of these types.

    Args:
      path: the file.
      fields: types of the fields that must be present; `float` admits integers, and `int` no booleans.
        Other fields are not looked at.
      optional: types of fields that may be absent or null.
      remedy: what to do if the file is damaged, the end of a sentence.

    Raises:
      FileNotFoundError: there is no such file.
      DamagedFile: the file is damaged, no object, or has a field that is missing or of another type.
    """
    value = read_json(path, remedy=remedy)
    return check_object(value, fields, optional=optional, name=str(path), remedy=remedy)


def check_object(
    value: Any,
    fields: Fields | None = None,
    *,
    optional: Fields | None = None,
    name: str,
    remedy: str,
) -> dict[str, Any]:
    """Return `value` if it is an object with these fields, as `read_object` describes.

    Raises:
      DamagedFile: it is not.
    """
    if not isinstance(value, dict):
        raise DamagedFile(f"{name} holds {_described(value)}, not an object: {remedy}")
    # Logs have a hundred thousand records: nothing is built that a record without faults does not need.
    for field, kind in (fields or {}).items():
        if field not in value:
            raise DamagedFile(f"{name} has no field {field!r}: {remedy}")
        if not _is_a(value[field], kind):
            raise DamagedFile(_wrong_type(value, field, kind, name=name, remedy=remedy))
    for field, kind in (optional or {}).items():
        item = value.get(field)
        if item is not None and not _is_a(item, kind):
            raise DamagedFile(_wrong_type(value, field, kind, name=name, remedy=remedy))
    return value


def _wrong_type(value: dict[str, Any], field: str, kind: type, *, name: str, remedy: str) -> str:
    return f"{name} has {_described(value[field])} as {field!r}, not {_NAMES[kind]}: {remedy}"


def check_list(
    value: Any,
    fields: Fields | None = None,
    *,
    optional: Fields | None = None,
    name: str,
    remedy: str,
) -> list[dict[str, Any]]:
    """Return `value` if it is a list of objects with these fields, as `read_object` describes.

    Raises:
      DamagedFile: it is not.
    """
    if not isinstance(value, list):
        raise DamagedFile(f"{name} holds {_described(value)}, not a list: {remedy}")
    return [
        check_object(item, fields, optional=optional, name=f"entry {number} of {name}", remedy=remedy)
        for number, item in enumerate(value, start=1)
    ]


def _is_a(value: Any, kind: type) -> bool:
    if type(value) is kind:
        return True
    # In Python a boolean is an integer; in JSON it is not.
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _described(value: Any) -> str:
    """Describe a JSON value for an error: short ones in full, others by their kind."""
    text = json.dumps(value) if not isinstance(value, dict | list) else ""
    return text if 0 < len(text) <= 40 else "null" if value is None else _NAMES[type(value)]
