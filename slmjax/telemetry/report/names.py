"""Short names of runs: the shortest part of each directory's name that tells it from the others.

    paths = [Path("runs/nano-20260101-120000-1a2b3c"), Path("runs/nano-20260102-090000-9f8e7d")]
    short_names(paths)                               # ["20260101", "20260102"]

Charts and tables have space for a word or two per run.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

SHORT = 16  # a name of at most this many characters stays as it is


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each directory, all different, in the order of the paths.

    Names of directories that are short and different stay as they are. Otherwise a name is the first of the
    shortest sequences of words of the directory's name that no other name has; of the path, where names are
    equal.
    """
    resolved = [path.resolve() for path in paths]
    names = [path.name for path in resolved]
    if len(set(names)) == len(names) and max(map(len, names)) <= SHORT:
        return names
    if len(set(names)) < len(names):
        names = list(map(str, resolved))
    parts = [_parts_of(name) for name in names]
    return [
        _shortest_part(own, parts[:index] + parts[index + 1 :], name)
        for index, (own, name) in enumerate(zip(parts, names, strict=True))
    ]


def full_names(paths: Sequence[Path]) -> list[str]:
    """Return the names of the directories, or their paths where names are equal."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else list(map(str, paths))


def _parts_of(name: str) -> list[str]:
    """Return the words of a name, each with the separator that follows it."""
    bounds = [0, *(match.end() for match in re.finditer(r"[-_.+/ ]+", name)), len(name)]
    return [name[start:end] for start, end in pairwise(bounds) if start < end]


def _bare(parts: Sequence[str]) -> str:
    return "".join(parts).strip("-_.+/ ")


def _shortest_part(own: Sequence[str], others: Sequence[Sequence[str]], name: str) -> str:
    for length in range(1, len(own)):
        taken = {_bare(parts[i : i + length]) for parts in others for i in range(len(parts))}
        for start in range(len(own) - length + 1):
            part = _bare(own[start : start + length])
            if part and part not in taken:
                return part
    return name
