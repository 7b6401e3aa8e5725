"""Somebody else's configuration, read so that nothing in it is passed over: what was not asked for is an
error.
"""

from collections.abc import Mapping
from typing import Any

from slmjax.config import ConfigError, near_names

_MISSING: Any = object()


class Settings:
    """The keys of a configuration. Each is taken once or more; `finish` refuses those that nobody took.

    A key that is absent has the default that the family published, if it did. A null is another thing: it has
    a meaning only where the reader gives it one, as libraries refuse it elsewhere.
    """

    def __init__(
        self, values: Mapping[str, Any], *, where: str, defaults: Mapping[str, Any] | None = None
    ) -> None:
        self._values = dict(values)
        self._where = where
        self._defaults = dict(defaults or {})
        self._taken: set[str] = set()
        self.notes: list[str] = []  # what whoever reads the model should know

    def take(self, name: str, default: Any = _MISSING, *, null: Any = _MISSING) -> Any:
        """Return the value of a key.

        Args:
          default: the value where the key is absent and the family has published none; null then means the
            same.
          null: the value that a null stands for, whether it is written or published.

        Raises:
          ConfigError: there is no value.
        """
        self._taken.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        published = self._defaults.get(name)
        is_null = name in self._values
        if published is not None and not is_null:
            return published
        choices = (null, default if published is None else _MISSING) if is_null else (default, null)
        for choice in choices:
            if choice is not _MISSING:
                return choice
        if is_null:
            ways = (
                "give it a value"
                if published is None
                else f"give it a value, or delete it for the family's default, {published!r}"
            )
            raise ConfigError(f"{self._where}: {name} is null, which stands for no value of it: {ways}")
        near = near_names(name, [other for other in self._values if other != name])
        raise ConfigError(f"{self._where} has no {name!r}, without which the model is not known.{near}")

    def optional(self, name: str, absent: Any = None) -> Any:
        """Return the value of a key for which null has a meaning: None where it is null, the default where
        there is none.

        Raises:
          ConfigError: it is a number that is not above 0, which libraries take for a number, and compute
            nothing with.
        """
        return self.positive(name, absent, null=None)

    def positive(self, name: str, default: Any = _MISSING, *, null: Any = _MISSING) -> Any:
        """Return the value of a key, as `take` does. Raises ConfigError where it is a number that is not
        above 0.
        """
        value = self.take(name, default, null=null)
        if isinstance(value, (int, float)) and not value > 0:
            raise ConfigError(
                f"{self._where}: {name} is {value!r}, and has to be above 0: no model can be computed with it"
            )
        return value

    def nonzero(self, name: str, default: Any = _MISSING, *, null: Any = _MISSING) -> Any:
        """Return the value of a key, as `take` does. Raises ConfigError where it is 0."""
        value = self.take(name, default, null=null)
        if value == 0:
            raise ConfigError(f"{self._where}: {name} is {value!r}, and is divided by: give it another value")
        return value

    def expect(self, name: str, *supported: Any) -> None:
        """Take a key that may only have one of these values. A null is accepted where one of them is falsy or
        the family published none.

        Raises:
          ConfigError: it has another, said or by the family's default.
        """
        self._taken.add(name)
        published = self._defaults.get(name)
        value = self._values.get(name, published)
        if value in supported or (value is None and (published is None or not all(supported))):
            return
        allowed = " or ".join(repr(one) for one in supported) or "absent"
        said = "is" if name in self._values else "is absent, and by the family's default"
        raise ConfigError(
            f"{self._where}: {name} {said} {value!r}, which would change the result: only {allowed} is "
            "understood"
        )

    def inner(self, name: str, *, defaults: Mapping[str, Any] | None = None) -> "Settings":
        """The keys of a nested configuration, which wants its own `finish`."""
        return self.nested(name, self.take(name, default={}), defaults=defaults)

    def nested(self, name: str, value: Any, *, defaults: Mapping[str, Any] | None = None) -> "Settings":
        """The keys of a configuration that stands under `name`. Raises ConfigError where it is no table."""
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self._where}: {name} is {value!r}, and should be a table of settings")
        return Settings(value, where=f"{self._where}: {name}", defaults=defaults)

    def has(self, name: str) -> bool:
        """Whether a key is there, and not null."""
        return self._values.get(name) is not None

    def published(self, name: str) -> Any:
        """The family's default of a key; None where it has none."""
        return self._defaults.get(name)

    def ignore(self, *names: str) -> None:
        """Takes keys that change nothing here."""
        self._taken.update(names)

    def refuse(self, name: str, reason: str) -> None:
        """Raise ConfigError for the value of a key."""
        raise ConfigError(f"{self._where}: {name} is {self._values.get(name)!r}: {reason}")

    def finish(self) -> None:
        """Raises ConfigError for a key that nobody took: it may change what the model computes."""
        left = sorted(
            name for name, value in self._values.items() if name not in self._taken and value is not None
        )
        if left:
            raise ConfigError(
                (
                    f"{self._where}: {left[0]} = {self._values[left[0]]!r} is not understood, and may change "
                    "what the model computes"
                )
                + (f" (as may {', '.join(left[1:4])})" if left[1:] else "")
                + (
                    ". Remove it if you know that it does not, or teach the family's file in "
                    "slmjax/convert/families what it means"
                )
            )
