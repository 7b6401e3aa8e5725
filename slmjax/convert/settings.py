"""A foreign configuration, read so that no key is ignored silently: an unread key is an error."""

from collections.abc import Mapping
from typing import Any

from slmjax.config import ConfigError, near_names

_MISSING: Any = object()


class Settings:
    """The keys of a configuration, of which each must be taken; `finish` refuses the rest.

    An absent key has the family's published default, if there is one. A null is different: it has a meaning
    only where the reader gives it one, since libraries refuse it elsewhere.
    """

    def __init__(
        self, values: Mapping[str, Any], *, where: str, defaults: Mapping[str, Any] | None = None
    ) -> None:
        self._values = dict(values)
        self._where = where
        self._defaults = dict(defaults or {})
        self._taken: set[str] = set()
        self.notes: list[str] = []  # for the user who imports the model

    def take(self, name: str, default: Any = _MISSING, *, null: Any = _MISSING) -> Any:
        """Return the value of a key.

        Args:
          default: value of an absent key without a published default; a null then means the same.
          null: value of a null, whether written or published.

        Raises:
          ConfigError: there is no value.
        """
        self._taken.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        published = self._defaults.get(name)
        # A written null is not an absent key: the published default does not apply to it.
        is_null = name in self._values
        if published is not None and not is_null:
            return published
        # For a null its own meaning comes first, for an absent key the reader's default.
        choices = (null, default if published is None else _MISSING) if is_null else (default, null)
        for choice in choices:
            if choice is not _MISSING:
                return choice
        if is_null:
            fix = "give it a value"
            if published is not None:
                fix += f", or delete it for the family's default, {published!r}"
            raise ConfigError(f"{self._where}: {name} is null, which has no meaning here: {fix}")
        # The key itself may be present with a null, and is no suggestion.
        near = near_names(name, [other for other in self._values if other != name])
        raise ConfigError(f"{self._where} has no {name!r}, which the model requires.{near}")

    def optional(self, name: str, absent: Any = None) -> Any:
        """Return the value of a key: None if it is null, the default if it is absent.

        Raises:
          ConfigError: it is a number, but not above 0. Libraries accept it, but compute nothing useful.
        """
        return self.positive(name, absent, null=None)

    def positive(self, name: str, default: Any = _MISSING, *, null: Any = _MISSING) -> Any:
        """Return the value of a key, as `take` does. Raises ConfigError for a number that is not above 0."""
        value = self.take(name, default, null=null)
        # `not value > 0` also refuses NaN, which JSON files of Python programs may contain.
        if isinstance(value, (int, float)) and not value > 0:
            raise ConfigError(f"{self._where}: {name} is {value!r}, but must be greater than 0")
        return value

    def nonzero(self, name: str, default: Any = _MISSING, *, null: Any = _MISSING) -> Any:
        """Return the value of a key, as `take` does. Raises ConfigError if it is 0."""
        value = self.take(name, default, null=null)
        if value == 0:
            raise ConfigError(
                f"{self._where}: {name} is {value!r}, but it is a divisor: give it another value"
            )
        return value

    def expect(self, name: str, *supported: Any) -> None:
        """Take a key that may only have one of these values; without values, it must be null or absent.

        A null is accepted if one of the values is falsy, or the family has no default.

        Raises:
          ConfigError: it has another value, written or by the family's default.
        """
        self._taken.add(name)
        published = self._defaults.get(name)
        value = self._values.get(name, published)
        # A null acts as a falsy value in the libraries, and does not stand for a truthy default.
        if value in supported or (value is None and (published is None or not all(supported))):
            return
        allowed = " or ".join(map(repr, supported)) or "absent"
        verb = "is" if name in self._values else "is absent, and by the family's default"
        raise ConfigError(
            f"{self._where}: {name} {verb} {value!r}, which would change the result: only {allowed} is "
            "supported"
        )

    def inner(self, name: str, *, defaults: Mapping[str, Any] | None = None) -> "Settings":
        """Return a nested configuration, which needs its own `finish`."""
        return self.nested(name, self.take(name, default={}), defaults=defaults)

    def nested(self, name: str, value: Any, *, defaults: Mapping[str, Any] | None = None) -> "Settings":
        """Wrap a configuration found under `name`. Raises ConfigError if it is not a mapping."""
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self._where}: {name} is {value!r}, but must be an object of settings")
        return Settings(value, where=f"{self._where}: {name}", defaults=defaults)

    def has(self, name: str) -> bool:
        """Return whether a key is present and not null."""
        return self._values.get(name) is not None

    def published(self, name: str) -> Any:
        """Return the family's default of a key; None if it has none."""
        return self._defaults.get(name)

    def ignore(self, *names: str) -> None:
        """Take keys that do not affect the result."""
        self._taken.update(names)

    def refuse(self, name: str, reason: str) -> None:
        """Raise ConfigError for the value of a key."""
        raise ConfigError(f"{self._where}: {name} is {self._values.get(name)!r}: {reason}")

    def finish(self) -> None:
        """Raise ConfigError if a key was not taken: it may change what the model computes."""
        # Nulls are left out: transformers writes one for every unset option.
        left = sorted(
            name for name, value in self._values.items() if name not in self._taken and value is not None
        )
        if left:
            others = f" (as may {', '.join(left[1:4])})" if left[1:] else ""
            raise ConfigError(
                f"{self._where}: {left[0]} = {self._values[left[0]]!r} is not understood, and may change "
                f"what the model computes{others}. Remove it if you know that it does not, or support it in "
                "the family's file in slmjax/convert/families"
            )
