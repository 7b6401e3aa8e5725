r"""Regular expressions of a tokenizer.json that is not trusted: those that may take too long are refused.

    check_patterns(specification, name="tokenizer.json")     # ValueError for `(a+)+b`
    with library_errors("the text cannot be encoded"): ...   # ValueError in place of any error of the library

The `tokenizers` library matches by backtracking: where what follows a repetition fails, it is tried again
with fewer repetitions. Nested or adjacent repetitions multiply, up to exponential time. Of such a pattern
only the rule below is checked, since no test finds the text that makes it slow:

- A repetition is *unbounded* if it may be repeated more than `_FEW` times, and *followed* if something after
  it may fail to match. What is possessive (`++`) or atomic (`(?>...)`) is not tried again.
- A followed unbounded repetition contains no other repetition of varying length, and no alternatives, unless
  each begins with another character.
- A path through the pattern has at most one followed unbounded repetition. The bounded ones multiply to at
  most `_MOST_TRIES`.
- Back references and calls of groups are refused, as is what this file cannot read.

The patterns of released models keep this rule, for example `\s*[\r\n]+|\s+(?!\S)|\s+`. What remains is
quadratic time in a run of characters that no alternative consumes.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

_FEW = 16
_MOST_TRIES = 1000
_MOST_COPIES = 10_000  # of a part of a pattern, by repetitions of fixed number
_MOST_GROWTH = 256  # of a text by normalizers that replace
_DEEPEST = 50  # groups inside of groups
_QUANTIFIER = re.compile(r"\{(\d*)(,?)(\d*)\}")
# What one element matches; what has letters and braces comes first.
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[\w =:-]*\}|x\{[0-9A-Fa-f ]+\}|x[0-9A-Fa-f]{1,2}|u[0-9A-Fa-f]{4}|[^0-9kg])", re.DOTALL
)
_ANCHORS = frozenset("bBAzZGK")
_GROUP = re.compile(
    r"\((?:\?(?:(?P<flags>[a-zA-Z]*(?:-[a-zA-Z]+)?)(?P<ends>[:)])|(?P<kind>=|!|>|<=|<!)|P?<[A-Za-z_]\w*>))?"
)


class SlowPattern(ValueError):
    """A regular expression that may take too long, or cannot be judged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cost:
    """What matching an element costs, depending on whether something after it may fail."""

    can_fail: bool = True  # it does not match everywhere
    varies: bool = False  # it has a repetition of varying length, which is tried again
    has_alternatives: bool = False  # that may begin with the same character
    shortest: int = 1  # characters that it matches at least
    copies: int = 1  # elements, with repetitions of fixed number written out
    unbounded: int = 0  # unbounded repetitions on a path if it is followed
    tries: int = 1  # of bounded repetitions, if it is followed
    own_unbounded: int = 0  # those that are followed within the element, whatever comes after it
    own_tries: int = 1


_ONE = _Cost()
_NOTHING = _Cost(can_fail=False, shortest=0, copies=0)


def check_patterns(specification: Any, *, name: str) -> None:
    """Raise ValueError if a pattern in a tokenizer.json may take too long, or a text may grow too much."""
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1.0
        for step in _objects(specification.get(part) if isinstance(specification, Mapping) else None):
            pattern = step.get("pattern")
            if not isinstance(pattern, Mapping):
                continue
            try:
                shortest = _shortest_match(pattern)
            except SlowPattern as error:
                raise ValueError(
                    f"{name}: the pattern {str(pattern.get('Regex'))[:200]!r} of its {part} is refused: "
                    f"{error}. Use another tokenizer, or, if you know where this file comes from, rewrite "
                    "the pattern, for example with possessive repetitions (++)"
                ) from error
            content = step.get("content")
            if isinstance(content, str):
                # A match of nothing inserts the content between any two characters.
                growth *= max(1.0, len(content) / shortest if shortest else len(content) + 1)
        if growth > _MOST_GROWTH:
            raise ValueError(
                f"{name}: the replacements of its {part} may make a text {growth:.3g} times as long"
            )


def _shortest_match(pattern: Mapping[str, Any]) -> int:
    """Return the least number of characters that the pattern of a step matches. Raises SlowPattern."""
    regex = pattern.get("Regex")
    return check_pattern(regex) if isinstance(regex, str) else len(str(pattern.get("String", "")))


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all objects in a JSON value, itself included."""
    if isinstance(value, Mapping):
        yield value
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _objects(item)


def check_pattern(pattern: str) -> int:
    """Return the least number of characters of a match. Raises SlowPattern unless the rule above is kept."""
    parser = _Parser(pattern)
    cost = parser.alternatives()
    if parser.at < len(pattern):
        raise SlowPattern(f"it has a ')' without '(' at character {parser.at}")
    _check(cost.own_unbounded, cost.own_tries)
    return cost.shortest


def _check(unbounded: int, tries: int) -> None:
    if unbounded > 1:
        raise SlowPattern("several repetitions without bound are tried in all combinations")
    if tries > _MOST_TRIES:
        raise SlowPattern("its repetitions are tried in too many combinations")


class _Parser:
    """Reads a pattern from left to right; each method returns the cost of what it has read."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.at = 0
        self._depth = 0

    def alternatives(self) -> _Cost:
        """Read alternatives, to the end or a closing parenthesis."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise SlowPattern("its groups are nested too deeply")
        begins: list[str] = []
        branches: list[_Cost] = []
        while True:
            begins.append(self._pattern[self.at : self.at + 1])
            branches.append(self._sequence())
            if self._next() != "|":
                break
            self.at += 1
        self._depth -= 1
        if len(branches) == 1:
            return branches[0]
        # Literal characters that differ: only one branch can match.
        is_clear = len(set(begins)) == len(begins) and all(
            begin.isalnum() or begin in " '_" for begin in begins
        )
        return _Cost(
            can_fail=all(branch.can_fail for branch in branches),
            varies=any(branch.varies for branch in branches),
            has_alternatives=not is_clear or any(branch.has_alternatives for branch in branches),
            shortest=min(branch.shortest for branch in branches),
            copies=sum(branch.copies for branch in branches),
            unbounded=max(branch.unbounded for branch in branches),
            tries=max(branch.tries for branch in branches) + len(branches) * (not is_clear),
            own_unbounded=max(branch.own_unbounded for branch in branches),
            own_tries=max(branch.own_tries for branch in branches),
        )

    def _sequence(self) -> _Cost:
        elements: list[_Cost] = []
        while self._next() not in ("", "|", ")"):
            elements.append(self._quantified())
        total = _NOTHING
        # From the end, where it is known whether something that may fail comes after an element.
        for element in reversed(elements):
            is_followed = total.can_fail
            own_unbounded = total.own_unbounded + (
                element.unbounded if is_followed else element.own_unbounded
            )
            own_tries = total.own_tries * (element.tries if is_followed else element.own_tries)
            _check(own_unbounded, own_tries)
            total = _Cost(
                can_fail=total.can_fail or element.can_fail,
                varies=total.varies or element.varies,
                has_alternatives=total.has_alternatives or element.has_alternatives,
                shortest=total.shortest + element.shortest,
                copies=min(total.copies + element.copies, _MOST_COPIES + 1),
                unbounded=total.unbounded + element.unbounded,
                tries=min(total.tries * element.tries, _MOST_TRIES + 1),
                own_unbounded=own_unbounded,
                own_tries=own_tries,
            )
        return total

    def _quantified(self) -> _Cost:
        cost = self._atom()
        while (bounds := self._bounds()) is not None:
            low, high = bounds
            suffix = self._next()
            # After an interval, "+" is a repetition of its own.
            is_possessive = suffix == "+" and self._pattern[self.at - 1] != "}"
            if suffix == "?" or is_possessive:
                self.at += 1
            cost = _repeated(cost, low, high, is_possessive=is_possessive)
        return cost

    def _bounds(self) -> tuple[int, int | None] | None:
        """Read a quantifier: the least and the most repetitions; None if there is no quantifier."""
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        character = self._next()
        if character in simple:
            self.at += 1
            return simple[character]
        match = _QUANTIFIER.match(self._pattern, self.at)
        # Braces without numbers are literal.
        if match is None or not (match[1] or match[3]):
            return None
        self.at = match.end()
        if max(len(match[1]), len(match[3])) > 5:
            raise SlowPattern("it repeats a part too often")
        low = int(match[1] or 0)
        return low, (int(match[3]) if match[3] else None if match[2] else low)

    def _atom(self) -> _Cost:
        character = self._next()
        if character == "(":
            return self._group()
        if character == "[":
            return self._class()
        if character == "\\":
            match = _ESCAPE.match(self._pattern, self.at)
            if match is None:
                raise SlowPattern("it has a reference to a group, or an unfinished escape")
            self.at = match.end()
            return dataclasses.replace(_ONE, shortest=0) if match[0][1] in _ANCHORS else _ONE
        self.at += 1
        return dataclasses.replace(_ONE, shortest=0) if character in "^$" else _ONE

    def _group(self) -> _Cost:
        match = _GROUP.match(self._pattern, self.at)
        if match is None or self._pattern.startswith("(?", self.at) and match[0] == "(":
            raise SlowPattern(f"it has a kind of group that is not known, at character {self.at}")
        self.at = match.end()
        if "x" in (match["flags"] or "").partition("-")[0]:
            raise SlowPattern("it uses the extended syntax")
        # Flags alone hold for the rest of the pattern.
        if match["ends"] == ")":
            return _NOTHING
        cost = self.alternatives()
        if self._next() != ")":
            raise SlowPattern("it has a '(' without ')'")
        self.at += 1
        if match["kind"] is None:
            return cost
        # What is inside is not tried again because of what follows.
        alone = dataclasses.replace(
            cost,
            varies=False,
            has_alternatives=False,
            unbounded=cost.own_unbounded,
            tries=cost.own_tries,
        )
        return alone if match["kind"] == ">" else dataclasses.replace(alone, can_fail=True, shortest=0)

    def _class(self) -> _Cost:
        """Read a class in brackets, which may have others inside."""
        depth = 0
        while True:
            character = self._next()
            if not character:
                raise SlowPattern("it has a '[' without ']'")
            self.at += 2 if character == "\\" else 1
            if character == "[":
                depth += 1
                # A bracket that comes first is literal.
                self.at += self._pattern.startswith("^", self.at)
                self.at += self._pattern.startswith("]", self.at)
            elif character == "]":
                depth -= 1
                if depth == 0:
                    return _ONE

    def _next(self) -> str:
        return self._pattern[self.at : self.at + 1]


def _repeated(cost: _Cost, low: int, high: int | None, *, is_possessive: bool) -> _Cost:
    """Return the cost of `low` to `high` repetitions; None is no limit."""
    copies = cost.copies * max(low, high or 1)
    if copies > _MOST_COPIES:
        raise SlowPattern("it repeats a part too often")
    shortest = cost.shortest * low
    if high == low:
        # The same as a sequence.
        return dataclasses.replace(
            cost,
            shortest=shortest,
            copies=copies,
            unbounded=cost.unbounded * low,
            tries=_power(cost.tries, low),
            own_unbounded=cost.unbounded * low if cost.can_fail and low > 1 else cost.own_unbounded,
            own_tries=_power(cost.tries, low) if cost.can_fail and low > 1 else cost.own_tries,
        )
    can_fail = cost.can_fail and low > 0
    if is_possessive:
        # An iteration is tried again only because of what fails within it.
        return dataclasses.replace(
            cost,
            can_fail=can_fail,
            shortest=shortest,
            copies=copies,
            varies=False,
            has_alternatives=False,
            unbounded=cost.own_unbounded,
            tries=cost.own_tries,
        )
    is_unbounded = high is None or high > _FEW
    is_nested = is_unbounded and (cost.varies or cost.has_alternatives)
    number = 1 if high is None else high - low + 1
    # Within an iteration, an element is followed by those after it, and by the next iteration.
    return _Cost(
        can_fail=can_fail,
        varies=True,
        shortest=shortest,
        copies=copies,
        # A nested repetition counts as two: it is refused where it is followed.
        unbounded=(2 if is_nested else 1) if is_unbounded else cost.unbounded * (high or 1),
        tries=1 if is_unbounded else min(number * _power(cost.tries, high or 1), _MOST_TRIES + 1),
        own_unbounded=cost.own_unbounded,
        own_tries=cost.own_tries,
    )


def _power(tries: int, number: int) -> int:
    """Return tries ** number, or the limit if that is lower."""
    return 1 if tries == 1 else _MOST_TRIES + 1 if number > _FEW else min(tries**number, _MOST_TRIES + 1)


@contextlib.contextmanager
def library_errors(problem: str) -> Iterator[None]:
    """Turn any error of the `tokenizers` library into ValueError: `problem` and the error in parentheses.

    The library raises bare Exception, and where it gives up (a pattern that needs too many tries) a
    PanicException, which derives from BaseException.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{problem} ({error})") from error
        raise
