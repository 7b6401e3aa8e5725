"""Checkpoints of a run: saved in the background, verified when read, with fallback to older ones.

A run's `checkpoints/` has one directory per step (`step_directories.py`), written by Orbax with one entry per
layer (`definition.unstack`), so that it can be restored with another grouping of layers, mesh or number of
hosts. Orbax detects neither a flipped bit nor an incomplete copy, and takes the highest number as the latest.
So it writes to `STEP.saving`, where the manifest with the SHA-256 of every file is added (`manifest.py`), and
the directory is then renamed to `STEP`: after a kill, a checkpoint has its manifest, or is none.

Only a run that resumes changes anything here: it sets damaged checkpoints aside as `STEP.bad`, and removes
what killed saves have left. Everything else only reads.
"""

import contextlib
import dataclasses
import functools
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from slmjax import faults
from slmjax.checkpoints import best_checkpoint
from slmjax.checkpoints.arrays import (
    CheckpointError,
    Items,
    describe,
    first_not_finite,
    read_arrays,
    read_some,
)
from slmjax.checkpoints.failed_saves import OrbaxTracebacks, reason_of
from slmjax.checkpoints.manifest import size_of, write_manifest
from slmjax.checkpoints.step_directories import (
    Stored,
    diverged_states,
    free_name,
    problem_of,
    remains,
    set_aside,
    stored_steps,
    to_prune,
)
from slmjax.models.architecture import ModelConfig
from slmjax.models.definition import unstack
from slmjax.ownership import require_ownership
from slmjax.parallel.processes import broadcast_text
from slmjax.stored_json import DamagedFile

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Frequency and retention of checkpoints."""

    # steps between checkpoints; one is also written at the end and when a run is interrupted
    every: int = 500
    keep: int = 2  # newest checkpoints to keep, in addition to the best by validation loss

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(
                f"checkpoint.every and checkpoint.keep must be at least 1, got {self.every} and {self.keep}"
            )


class NoIntactCheckpoint(CheckpointError):
    """There are no checkpoints, or none is intact."""


MOST_CANDIDATES = 40  # newest checkpoints among which a run of several processes looks for an intact one
MOST_BYTES = 1000  # of a text that processes exchange


class Checkpointer:
    """Writes and reads the checkpoints of one run. Close it, or the last save may be incomplete.

    Attributes:
      last_saved: the newest step whose checkpoint is complete on disk, saved or resumed from here, as of the
        last `wait`.
      failures: step and reason of each save that failed, in order, as of the last `wait`.
    """

    def __init__(self, directory: Path, *, model: ModelConfig, config: CheckpointConfig) -> None:
        # Orbax refuses relative paths.
        self.directory = directory.absolute()
        self.model = model
        self.config = config
        self.last_saved: int | None = None
        self.failures: list[tuple[int, str]] = []
        # Otherwise the threads of a save whose directory cannot be created wait for it, and keep the process
        # alive, for five minutes.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        # One thread, so that checkpoints are completed and old ones pruned in the order of the saves.
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[str]] | None = None
        self._tracebacks = OrbaxTracebacks()
        self._last_size: int | None = None  # bytes of the newest checkpoint
        # Compiled: one program copies all layers, instead of an operation for each.
        self._unstack = jax.jit(functools.partial(unstack, model))
        # Retention: the checkpoint from before this session, until two good ones of the session exist, and
        # whether checkpoints are intact, by step.
        self._resumed_from: Stored | None = None
        self._num_good = 0
        self._is_intact: dict[int, bool] = {}
        self._named: set[Any] = set()  # what was warned of, once

    # Saving -------------------------------------------------------------------------------------------------
    def save(
        self, step: int, items: Items, *, best_loss: float | None = None, diverged: bool = False
    ) -> None:
        """Start a save; returns once the arrays are copied. A failed save is logged, not raised.

        A state with a value that is not finite is not saved.

        Args:
          best_loss: the validation loss, if it is the best so far. The checkpoint is marked as the best once
            it is complete; until then the old one is.
          diverged: the run ends because it diverged. The state is kept as `STEP.diverged`, which no run
            resumes from, and the checkpoints that led to it are removed.

        Raises what `require_ownership` does, where the run belongs to another process by now.
        """
        self.wait()
        require_ownership(now=True)
        self._tracebacks.drop()
        if reason := _first_reason(self._obstacle(step, items)):
            self._give_up(step, reason)
            self.failures.append((step, reason))
            return
        # Copies, so that training may donate its own arrays to the next step while these are written.
        stored = {name: self._unstack(tree) for name, tree in items.items()}
        entries = {name: ocp.args.StandardSave(tree) for name, tree in stored.items()}
        # Shapes and dtypes are compared before a restore, whose own errors do not name the parameter.
        leaves = {name: describe(tree) for name, tree in stored.items()}
        arguments = ocp.args.Composite(**entries, meta=ocp.args.JsonSave({"step": step, "leaves": leaves}))
        save = _Save(
            step=step,
            path=self.directory / (f"{step}.diverged" if diverged else str(step)),
            skipped_in_a_row=int(items.get("progress", {}).get("skipped_in_a_row", 0)),
            best_loss=best_loss,
            diverged=diverged,
        )
        try:
            self._orbax.save(save.temporary, args=arguments, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            self._give_up(step, error)
            self.failures.append((step, reason_of(error)))
            return
        # The manifest needs complete files: it is written by a thread that waits for the commit.
        self._pending = (step, self._finisher.submit(self._finish, save))

    def _obstacle(self, step: int, items: Items) -> str:
        """Return why a save cannot succeed, or nothing; found before processes wait for each other."""
        try:
            faults.at("checkpoint.save", step)
            if name := first_not_finite(items):
                return f"{name} is not finite"
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                # Threads of a save that failed may have written after it was given up.
                self._remove_remains()
                return self._lack_of_space(sum(leaf.nbytes for leaf in jax.tree.leaves(items)))
        except OSError as error:
            return reason_of(error)
        return ""

    def _lack_of_space(self, num_bytes: int) -> str:
        """Return that the disk is too full for arrays of this size, or nothing."""
        # Arrays are compressed, floating-point numbers of a trained model by about a tenth. A save that
        # succeeds must not be refused, so the estimates are low.
        needed = num_bytes / 4 if self._last_size is None else 0.8 * self._last_size
        free = shutil.disk_usage(self.directory).free
        if free >= needed:
            return ""
        return f"No space left on device: {free / 1e6:,.1f} MB are free, and it needs {needed / 1e6:,.1f} MB"

    def _finish(self, save: "_Save") -> str:
        """Complete a save once Orbax has written it, in the background. Return why it failed, or nothing."""
        try:
            self._orbax.wait_until_finished()
            faults.at("checkpoint.committed", save.step)
            # One process writes to the shared directory.
            if jax.process_index() == 0:
                write_manifest(save.temporary, step=save.step, skipped_in_a_row=save.skipped_in_a_row)
                self._last_size = size_of(save.temporary)
                self._make_way(save)
                save.temporary.replace(save.path)
        except Exception as error:  # of any class: this is a thread, and the run continues without the save
            self._give_up(save.step, error)
            return reason_of(error)
        try:
            faults.at("checkpoint.verified", save.step)
            if jax.process_index() == 0:
                if save.best_loss is not None:
                    best_checkpoint.write(self.directory, save.step, save.best_loss)
                self._prune(save)
        except Exception as error:
            log.warning(
                "checkpoint %d is saved, but older ones were not removed: %s", save.step, reason_of(error)
            )
        return ""

    def _make_way(self, save: "_Save") -> None:
        """Move what has the name of a complete save already: it is foreign, or was damaged."""
        if save.diverged:
            # The run diverged at the same step again, and keeps its latest state.
            _remove(save.path)
        elif save.path.exists() and not (save.path.is_dir() and not any(save.path.iterdir())):
            self._set_aside(save.path)

    def _prune(self, save: "_Save") -> None:
        """Delete checkpoints that are no longer needed; called once a new one is complete."""
        # Pruned last, so that there is always one to return to.
        self._is_intact[save.step] = True
        self._num_good += not save.diverged and save.skipped_in_a_row == 0
        stored = stored_steps(self.directory)
        pruned = []
        if save.diverged:
            pruned = [entry for entry in diverged_states(self.directory) if entry.step != save.step]
            pruned += self._leading_to(save, stored)
        else:
            best = self.best()
            protected = {best[0]} if best else set()
            # The state that a session began with stays until two of its own have followed: the second shows
            # that the first could still be trained.
            if self._resumed_from is not None and self._num_good < 2:
                protected.add(self._resumed_from.step)
            pruned = to_prune(
                stored,
                newest=save.step,
                keep=self.config.keep,
                protected=protected,
                is_intact=self._verify,
            )
        for entry in pruned:
            if not entry.problem:
                shutil.rmtree(entry.path, ignore_errors=True)
        self._name_foreign([entry for entry in stored if entry.is_foreign])

    def _leading_to(self, save: "_Save", stored: list[Stored]) -> list[Stored]:
        """Return the checkpoints with which a run was about to diverge, where an earlier one remains."""
        # A state is sound if a step after it was finite. The one that the session began with counts as sound:
        # it was made with the settings from before.
        begins = save.step - save.skipped_in_a_row
        first = None if self._resumed_from is None else self._resumed_from.step
        last_sound = begins if begins == first else begins - 1
        if begins == first:
            log.warning(
                "no step since checkpoint %d was finite: if the settings are those it was made with, it is "
                "not sound. Rename it, and --resume takes the one before",
                first,
            )
        own = [entry for entry in stored if not entry.problem and entry.step <= save.step]
        earlier = any(entry.step <= last_sound and self._verify(entry) for entry in own)
        return [entry for entry in own if entry.step > last_sound] if earlier else []

    def _verify(self, stored: Stored) -> bool:
        """Return whether a checkpoint is intact; those from before this session are read once."""
        if stored.step not in self._is_intact:
            self._is_intact[stored.step] = not problem_of(stored)
        return self._is_intact[stored.step]

    def _set_aside(self, path: Path) -> None:
        """Rename a damaged checkpoint, so that its step can be saved again."""
        path.rename(free_name(path))

    def _name_foreign(self, stored: list[Stored]) -> None:
        """Warn of directories that are no checkpoints of this run, once of each."""
        for entry in stored:
            if entry.path not in self._named:
                self._named.add(entry.path)
                log.warning(
                    "%s is no checkpoint of this run (%s): it is left alone", entry.path, entry.problem
                )

    def _give_up(self, step: int, error: Exception | str) -> None:
        """Log a failed save and delete its remains. The run and older checkpoints are not affected."""
        reason = error if isinstance(error, str) else reason_of(error)
        log.error("checkpoint %d was NOT saved: %s. Older checkpoints are kept", step, reason)
        # A full disk is the usual cause, and the remains would fill it further.
        self._remove_remains()

    def _remove_remains(self) -> None:
        """Delete what saves that failed or were killed have left; no save may be under way."""
        for path in remains(self.directory):
            _remove(path)

    def wait(self) -> None:
        """Wait until a running save has ended; every process calls it. A failed save is not raised."""
        self._settle(agree=True)

    def close(self) -> None:
        """Wait for a running save and end the threads. A failed save is not raised."""
        # A process whose run has failed closes without the others, and must not wait for their answer.
        self._settle(agree=False)
        self._finisher.shutdown()
        try:
            self._orbax.close()
        except (OSError, ValueError, RuntimeError) as error:
            # Orbax reports the failure of a save a second time.
            log.debug("closing the checkpointer: %s", error)
        if self.failures and jax.process_index() == 0:
            self._remove_remains()
        self._tracebacks.restore()

    def _settle(self, *, agree: bool) -> None:
        if self._pending is None:
            return
        step, result = self._pending
        self._pending = None
        reason = result.result()
        # Process 0 completes the checkpoint, so it alone knows.
        reason = broadcast_text(_shortened(reason)) if agree else reason
        if reason:
            self.failures.append((step, reason))
        else:
            self.last_saved = step

    def withdraw(self, step: int) -> None:
        """Rename a checkpoint to `STEP.diverged`, from which no run resumes. All processes call it."""
        self.wait()
        path = self.directory / str(step)
        if jax.process_index() == 0 and path.is_dir():
            diverged = self.directory / f"{step}.diverged"
            if diverged.exists():
                self._set_aside(diverged)
            path.rename(diverged)

    # The best -----------------------------------------------------------------------------------------------
    def mark_best(self, step: int, loss: float) -> None:
        """Mark the checkpoint of `step` as the best by validation loss: retention keeps it."""
        self.wait()
        # One process writes to the shared directory.
        if jax.process_index() == 0 and step in self.steps():
            best_checkpoint.write(self.directory, step, loss)

    def best(self) -> tuple[int, float] | None:
        """Return step and loss of the best checkpoint; None if it is gone or its loss is not finite."""
        try:
            return best_checkpoint.read_present(self.directory)
        except DamagedFile as error:
            if error.args not in self._named:
                self._named.add(error.args)
                log.warning("%s", error)
            return None

    # Reading ------------------------------------------------------------------------------------------------
    def is_empty(self) -> bool:
        """Return whether nothing that was saved is here: no checkpoint, damaged, set aside or diverged."""
        return not any(look(self.directory) for look in (stored_steps, diverged_states, set_aside))

    def steps(self) -> list[int]:
        """Return the steps with a checkpoint, oldest first. Their files are not verified."""
        return [stored.step for stored in stored_steps(self.directory) if not stored.problem]

    def resume(self, like: Items) -> tuple[int, dict[str, Any]]:
        """Restore the newest intact checkpoint to train on. Every process calls it.

        Damaged ones that are newer are set aside, and what killed saves have left is removed.

        Args:
          like: trees of arrays or shapes, whose shardings the result has.

        Raises:
          NoIntactCheckpoint: there is none.
          CheckpointError: its parameters, shapes or dtypes are those of another model.
        """
        self.wait()
        if jax.process_index() == 0:
            self._remove_remains()
        refused = []
        for candidate in self._candidates():
            items, problem = self._read_finite(candidate, like)
            if items is None:
                refused.append(dataclasses.replace(candidate, problem=problem))
                continue
            for entry in refused:
                self._pass_over(entry)
            self._resumed_from = candidate
            self._last_size = size_of(candidate.path)
            self._is_intact[candidate.step] = True
            self.last_saved = candidate.step
            return candidate.step, items
        raise NoIntactCheckpoint(self._nothing_intact(refused))

    def _read_finite(self, stored: Stored, like: Items) -> tuple[dict[str, Any] | None, str]:
        """Return the arrays of a checkpoint, or None and why it is not intact."""
        if problem := _agreed(functools.partial(problem_of, stored)):
            return None, problem
        items = self._read(stored, like, whole=True)
        # Earlier versions could save such a state, from which no step is finite.
        name = first_not_finite(items)
        return (None, f"{name} is not finite") if name else (items, "")

    def _pass_over(self, stored: Stored) -> None:
        """Set a damaged checkpoint aside, and leave a foreign one alone; both are logged."""
        if stored.is_foreign:
            self._name_foreign([stored])
            return
        log.warning(
            "checkpoint %d in %s is damaged (%s): set aside", stored.step, self.directory, stored.problem
        )
        if jax.process_index() == 0:
            self._set_aside(stored.path)

    def restore(
        self, like: Items, *, step: int | None = None, whole: bool = True
    ) -> tuple[int, dict[str, Any]]:
        """Read the newest intact checkpoint, or that of `step`; nothing on disk is changed.

        The state with which a run diverged is read only by its step, or where there is no other.

        Args:
          like: trees of arrays or shapes, whose shardings the result has.
          whole: False to read only the leaves in `like`, by logical path.

        Raises:
          NoIntactCheckpoint: there is none, or that of `step` is damaged.
          CheckpointError: it does not exist, or its parameters, shapes or dtypes are those of another model.
        """
        self.wait()
        candidates = [*self._candidates(), *reversed(diverged_states(self.directory))]
        if step is not None:
            named = [*stored_steps(self.directory), *diverged_states(self.directory)]
            known = [entry.step for entry in named if not entry.is_foreign]
            candidates = [entry for entry in named if entry.step == step and not entry.is_foreign]
            if not candidates:
                raise CheckpointError(
                    f"{self.directory} has no checkpoint of step {step}: it has "
                    f"{', '.join(map(str, known)) or 'none'}"
                )
        refused = []
        for candidate in candidates:
            problem = _agreed(functools.partial(problem_of, candidate))
            if not problem:
                for entry in refused:
                    log.warning("checkpoint %s in %s is damaged (%s): an older one is read", *entry)
                return candidate.step, self._read(candidate, like, whole=whole)
            if candidate.is_foreign:
                self._name_foreign([candidate])
            else:
                refused.append((candidate.path.name, self.directory, problem))
        raise NoIntactCheckpoint(self._nothing_intact([]))

    def _candidates(self) -> list[Stored]:
        """Return what may be the newest checkpoint, newest first: the same in every process."""
        if jax.process_count() == 1:
            return stored_steps(self.directory)[::-1]
        # Process 0 may be about to rename some of them.
        stored = {entry.path.name: entry for entry in stored_steps(self.directory)}
        names = _agreed(lambda: " ".join(list(stored)[: -MOST_CANDIDATES - 1 : -1]))
        return [stored[name] for name in names.split() if name in stored]

    def _nothing_intact(self, refused: list[Stored]) -> str:
        """Describe all that there is, and what is wrong with it."""
        problems = {entry.path: entry.problem for entry in refused}
        descriptions = []
        for stored in [*stored_steps(self.directory), *set_aside(self.directory)]:
            problem = problems.get(stored.path) or problem_of(stored)
            way_out = f"it is intact: rename it to {stored.step} to resume from it"
            descriptions.append(f"{stored.path.name}: {problem or way_out}")
        for stored in diverged_states(self.directory):
            descriptions.append(
                f"{stored.path.name}: with this state the run diverged; rename it to {stored.step} to resume "
                "from it"
            )
        if not descriptions:
            return f"no intact checkpoint in {self.directory}: a run has one once its first save is complete"
        return f"no intact checkpoint in {self.directory}. {'; '.join(descriptions)}"

    def read_some(
        self, step: int, item: str, tree_shapes: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, Any] | None:
        """Read some arrays of an item by logical path; None if it lacks them.

        The checkpoint must have been restored before, and so verified.
        """
        path = self._path(step)
        if not self.has(step, item):
            return None
        # Arrays of another shape are treated as absent: they belong to another version.
        stored = self._meta(path)["leaves"].get(item, {})
        if any(stored.get(name) != described for name, described in describe(tree_shapes).items()):
            return None
        return read_some(path / item, dict(tree_shapes))

    def has(self, step: int, item: str) -> bool:
        """Return whether the checkpoint of `step` has this item."""
        return (self._path(step) / item).is_dir()

    def _path(self, step: int) -> Path:
        path = self.directory / str(step)
        diverged = self.directory / f"{step}.diverged"
        return diverged if diverged.is_dir() and not path.is_dir() else path

    def _read(self, stored: Stored, like: Items, *, whole: bool) -> dict[str, Any]:
        leaves = self._meta(stored.path)["leaves"]
        return read_arrays(self._orbax, stored.path, like, leaves=leaves, model=self.model, whole=whole)

    def _meta(self, path: Path) -> dict[str, Any]:
        """Read the metadata of the arrays."""
        return self._orbax.restore(path, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Save:
    """A save that is under way."""

    step: int
    path: Path  # of the checkpoint, once it is complete
    skipped_in_a_row: int
    best_loss: float | None
    diverged: bool

    @property
    def temporary(self) -> Path:
        """The directory that is renamed when it is complete."""
        return self.path.with_name(f"{self.path.name}.saving")


def _remove(path: Path) -> None:
    """Delete a file or a directory, if there is one, as far as that is possible: nothing depends on it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


# Several processes ------------------------------------------------------------------------------------------
def _agreed(answer: Callable[[], str]) -> str:
    """Return the first process's answer in every process: they must not restore different steps."""
    return broadcast_text(_shortened(answer()) if jax.process_index() == 0 else "")


def _first_reason(mine: str) -> str:
    """Return the answer of the first process that has one, in every process."""
    if jax.process_count() == 1:
        return mine
    padded = np.frombuffer(_shortened(mine).encode().ljust(MOST_BYTES, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    answers = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows)
    return next(filter(None, answers), "")


def _shortened(text: str) -> str:
    return text.encode()[:MOST_BYTES].decode(errors="ignore")
