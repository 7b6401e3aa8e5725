"""The directories in a run's `checkpoints/`: which are checkpoints of the run, and which may be deleted.

    for stored in stored_steps(directory):      # oldest first
        stored.step, stored.problem             # "" where nothing but the arrays could be wrong
    problem_of(stored)                          # reads and verifies all files

Names in `checkpoints/`:

- `30`: the checkpoint of step 30
- `30.diverged`: the state with which a run diverged; no run resumes from it
- `30.bad`, `30.bad1`: set aside by a resumed run, because it is damaged
- `30.saving`, `30.saving.orbax-checkpoint-tmp`: a save that is under way, or was killed

Everything else is foreign: it is never counted, moved or deleted.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from slmjax.checkpoints.manifest import MANIFEST, Manifest, changed_files, read_manifest
from slmjax.stored_json import DamagedFile

_DIVERGED = re.compile(r"([0-9]+)\.diverged")
_SET_ASIDE = re.compile(r"([0-9]+)(\.diverged)?\.bad[0-9]*")
# Earlier versions saved without a `.saving` of their own.
_REMAINS = re.compile(
    r"[0-9]+(\.diverged)?(\.saving)?(\.orbax-checkpoint-tmp.*)|[0-9]+(\.diverged)?\.saving"
    r"|\.best\.json-[0-9a-f]{12}\.tmp"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """A directory whose name is that of a checkpoint."""

    path: Path
    step: int  # by its name
    manifest: Manifest | None = None
    problem: str = ""  # why it is no checkpoint of this step; the content of its files was not looked at
    is_foreign: bool = False  # it was never a checkpoint of this run and step, rather than damaged

    @property
    def is_skipping(self) -> bool:
        """Whether the step before it was skipped since something was not finite."""
        return self.manifest is not None and self.manifest.skipped_in_a_row > 0


def stored_steps(directory: Path) -> list[Stored]:
    """Return the directories that are named as the checkpoint of a step, oldest first."""
    return _stored(directory, lambda name: _step(name))


def diverged_states(directory: Path) -> list[Stored]:
    """Return the states with which a run diverged, oldest first."""
    return _stored(directory, lambda name: _step(match[1]) if (match := _DIVERGED.fullmatch(name)) else None)


def set_aside(directory: Path) -> list[Stored]:
    """Return the checkpoints that resumed runs have set aside, oldest first."""
    return _stored(directory, lambda name: _step(match[1]) if (match := _SET_ASIDE.fullmatch(name)) else None)


def newest_step(directory: Path) -> int | None:
    """Return the newest step with a checkpoint, whose files are not verified; None where there is none.

    It is that of a diverged state only where there is no other.
    """
    for stored in (stored_steps(directory), diverged_states(directory)):
        if steps := [entry.step for entry in stored if not entry.problem]:
            return steps[-1]
    return None


def remains(directory: Path) -> list[Path]:
    """Return what killed saves have left."""
    return [path for path in _entries(directory) if _REMAINS.fullmatch(path.name)]


def problem_of(stored: Stored) -> str:
    """Verify the files of a checkpoint. Return what is wrong with it, or nothing."""
    if stored.problem or stored.manifest is None:
        return stored.problem
    changed = changed_files(stored.path, stored.manifest)
    return f"{len(changed)} file(s) missing or changed, first {changed[0]}" if changed else ""


def to_prune(
    stored: Sequence[Stored],
    *,
    newest: int,
    keep: int,
    protected: Collection[int],
    is_intact: Callable[[Stored], bool],
) -> list[Stored]:
    """Return the checkpoints that retention deletes after a save.

    Args:
      stored: all of the run, as `stored_steps` returns them.
      newest: step of the save, which is never among the result. Later ones are not of the run's history.
      keep: number of good checkpoints to keep: intact, and not made while steps were skipped.
      protected: steps to keep in addition.
      is_intact: verifies a checkpoint, asked only where it decides.
    """
    own = [entry for entry in stored if not entry.problem and entry.step <= newest]
    good = (entry for entry in reversed(own) if not entry.is_skipping and is_intact(entry))
    kept = {entry.step for entry in itertools.islice(good, keep)}
    # While fewer than `keep` are known to be good, an older one may be the only one that is.
    oldest = min(kept) if len(kept) == keep else 0
    return [
        entry
        for entry in own
        if entry.step not in {newest, *kept, *protected} and (entry.step < oldest or entry.is_skipping)
    ]


def free_name(path: Path) -> Path:
    """Return the path under which a damaged checkpoint is set aside; nothing has it yet."""
    # The same step may be damaged twice: nothing is overwritten, so that the files can be examined.
    existing = {entry.name for entry in _entries(path.parent)}
    names = (f"{path.name}.bad{count or ''}" for count in itertools.count())
    return path.with_name(next(name for name in names if name not in existing))


def _stored(directory: Path, step_of: Callable[[str], int | None]) -> list[Stored]:
    named = ((step_of(path.name), path) for path in _entries(directory))
    stored = [_look_at(path, step) for step, path in named if step is not None]
    return sorted(stored, key=lambda entry: (entry.step, entry.path.name))


def _step(name: str) -> int | None:
    """Return the step that a name stands for; None for any other than the one that a save would give it."""
    # `isdigit` is true of superscripts, and `int` reads "007".
    return int(name) if name.isascii() and name.isdigit() and str(int(name)) == name else None


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _look_at(path: Path, step: int) -> Stored:
    try:
        return _checked(path, step)
    except OSError as error:
        return Stored(path=path, step=step, problem=f"it cannot be read: {error.strerror or error}")


def _checked(path: Path, step: int) -> Stored:
    if not any((path / name).exists() for name in (MANIFEST, "meta", "model")):
        return Stored(path=path, step=step, problem="it holds nothing of a checkpoint", is_foreign=True)
    if not (path / "meta").is_dir() or not (path / "model").is_dir():
        return Stored(path=path, step=step, problem="incomplete")
    try:
        manifest = read_manifest(path)
    except FileNotFoundError as error:
        missing = Path(error.filename or MANIFEST).name
        return Stored(path=path, step=step, problem=f"it has no {missing}, so nothing shows that it is whole")
    except DamagedFile as error:
        return Stored(path=path, step=step, problem=str(error))
    if manifest.step != step:
        problem = f"it holds a checkpoint of step {manifest.step}"
        return Stored(path=path, step=step, manifest=manifest, problem=problem, is_foreign=True)
    return Stored(path=path, step=step, manifest=manifest)
