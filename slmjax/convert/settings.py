"""Somebody else's configuration, read so that nothing in it is passed over: what was not asked for is an error."""

from collections.abc import Mapping
from typing import Any

from slmjax.config import ConfigError, near_names

_REQUIRED: Any = object()


class Settings:
    """The keys of a configuration. Each is taken once or more; `finish` refuses those that nobody took."""

    def __init__(self, values: Mapping[str, Any], *, where: str) -> None:
        self._values, self._where = dict(values), where
        self._taken: set[str] = set()

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a key; the default where it is absent or null. Raises ConfigError where there is no default."""
        self._taken.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"{self._where} has no {name!r}, without which the model is not known.{near_names(name, self._values)}")
        return default

    def optional(self, name: str, absent: Any) -> Any:
        """The value of a key for which null has a meaning: None where it is null, `absent` where there is none."""
        self._taken.add(name)
        return self._values.get(name, absent)

    def expect(self, name: str, *supported: Any) -> None:
        """Takes a key that may only have one of these values; absent or null is well too.

        Raises:
          ConfigError: it has another.
        """
        value = self.take(name, None)
        if value is not None and value not in supported:
            allowed = " or ".join(repr(one) for one in supported) or "absent"
            raise ConfigError(f"{self._where}: {name} is {value!r}, which would change the result: only {allowed} is understood")

    def inner(self, name: str) -> "Settings":
        """The keys of a nested configuration, which wants its own `finish`."""
        value = self.take(name, {})
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self._where}: {name} is {value!r}, and should be a table of settings")
        return Settings(value, where=f"{self._where}: {name}")

    def add_defaults(self, defaults: Mapping[str, Any]) -> None:
        """Adds keys that are absent."""
        self._values = {**defaults, **self._values}

    def has(self, name: str) -> bool:
        """Whether a key is there, and not null."""
        return self._values.get(name) is not None

    def ignore(self, *names: str) -> None:
        """Takes keys that change nothing here."""
        self._taken.update(names)

    def finish(self) -> None:
        """Raises ConfigError for a key that nobody took: it may change what the model computes."""
        left = sorted(name for name, value in self._values.items() if name not in self._taken and value is not None)
        if left:
            raise ConfigError(
                f"{self._where}: {left[0]} = {self._values[left[0]]!r} is not understood, and may change what the model computes"
                + (f" (as may {', '.join(left[1:4])})" if left[1:] else "")
                + ". Remove it if you know that it does not, or teach the family's file in slmjax/convert/families what it means"
            )
