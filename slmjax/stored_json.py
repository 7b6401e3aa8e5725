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
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{name} is not UTF-8 text ({error.reason} at {error.start}): {remedy}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DamagedFile(f"{name} is not JSON ({error.msg} at {where}): {remedy}") from error
    except RecursionError as error:
        raise DamagedFile(f"{name} is nested too deeply for JSON: {remedy}") from error
    except ValueError as error:  # an integer with thousands of digits
        raise DamagedFile(f"{name} cannot be read ({error}): {remedy}") from error


def read_object(path: Path, fields: Mapping[str, type] | None = None, *, remedy: str) -> dict[str, Any]:
    """Return the object in a JSON file, which must have these fields with values of these types.

    Args:
      path: the file.
      fields: types of the fields that must be present; `float` admits integers, and `int` no booleans.
        Other fields are not looked at.
      remedy: what to do if the file is damaged, the end of a sentence.

    Raises:
      FileNotFoundError: there is no such file.
      DamagedFile: the file is damaged, no object, or has a field that is missing or of another type.
    """
    return check_object(read_json(path, remedy=remedy), fields, name=str(path), remedy=remedy)


def check_object(
    value: Any, fields: Mapping[str, type] | None = None, *, name: str, remedy: str
) -> dict[str, Any]:
    """Return `value` if it is an object with these fields, as `read_object` describes.

    Raises:
      DamagedFile: it is not.
    """
    if not isinstance(value, dict):
        raise DamagedFile(f"{name} holds {_described(value)}, not an object: {remedy}")
    for field, kind in (fields or {}).items():
        if field not in value:
            raise DamagedFile(f"{name} has no field {field!r}: {remedy}")
        if not _is_a(value[field], kind):
            raise DamagedFile(
                f"{name} has {_described(value[field])} as {field!r}, not {_NAMES[kind]}: {remedy}"
            )
    return value


def _is_a(value: Any, kind: type) -> bool:
    # In Python a boolean is an integer; in JSON it is not.
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _described(value: Any) -> str:
    """Describe a JSON value for an error: short ones in full, others by their kind."""
    text = json.dumps(value) if not isinstance(value, dict | list) else ""
    return text if 0 < len(text) <= 40 else "null" if value is None else _NAMES[type(value)]
