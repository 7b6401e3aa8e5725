"""Checkpoints of a run: saved in the background, verified when read, with fallback to older ones.

A run's `checkpoints/` has one directory per step, written by Orbax with one entry per layer
(`definition.unstack`), so that it can be restored with another grouping of layers, mesh or number of hosts.
Orbax detects neither a flipped bit nor an incomplete copy, and takes the highest number as the latest. So the
SHA-256 of every file is written to `MANIFEST.json` after the commit, and checked before a restore. A damaged
checkpoint is renamed to `STEP.bad`, and the next older one is used.
"""

import dataclasses
import functools
import itertools
import json
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from slmjax import faults
from slmjax.checkpoints.selection import best_of, is_better
from slmjax.data.shards import file_sha256
from slmjax.models.architecture import ModelConfig
from slmjax.models.definition import restack, stored_shapes, unstack
from slmjax.quantization.quantizer_params import is_sign
from slmjax.telemetry.run_directory import read_log, write_json

log = logging.getLogger(__name__)
MANIFEST = "MANIFEST.json"


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


class CheckpointError(ValueError):
    """No checkpoint can be restored, or it belongs to another model."""


Items = Mapping[str, Any]  # named trees of arrays: "model", "optimizer", "ema", "progress", "codes"


class Checkpointer:
    """Writes and reads the checkpoints of one run. Close it, or the last save may be incomplete.

    Attributes:
      failures: step and reason of each save that failed, in order.
    """

    def __init__(self, directory: Path, *, model: ModelConfig, config: CheckpointConfig) -> None:
        # Orbax refuses relative paths.
        self.directory = directory.absolute()
        self.model = model
        self.config = config
        # Otherwise the threads of a save whose directory cannot be created wait for it, and keep the process
        # alive, for five minutes.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        # One thread, so that manifests are written and old checkpoints pruned in the order of the saves.
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.failures: list[tuple[int, str]] = []
        self._last_saved: int | None = None
        # Compiled: one program copies all layers, instead of an operation for each.
        self._unstack = jax.jit(functools.partial(unstack, model))

    def save(self, step: int, items: Items, *, best_loss: float | None = None) -> None:
        """Start a save; returns once the arrays are copied. A failed save is logged, not raised.

        Args:
          best_loss: the validation loss, if it is the best so far. The checkpoint is marked as the best once
            it is complete; until then the old one is.
        """
        self.wait()
        # Copies, so that training may donate its own arrays to the next step while these are written.
        stored = {name: self._unstack(tree) for name, tree in items.items()}
        entries = {name: ocp.args.StandardSave(tree) for name, tree in stored.items()}
        # Shapes and dtypes are compared before a restore, whose own errors do not name the parameter.
        leaves = {name: _describe(tree) for name, tree in stored.items()}
        arguments = ocp.args.Composite(**entries, meta=ocp.args.JsonSave({"step": step, "leaves": leaves}))
        try:
            faults.at("checkpoint.save", step)
            self._orbax.save(self.directory / str(step), args=arguments, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            self._give_up(step, error)
            return
        # The manifest needs complete files: it is written by a thread that waits for the commit.
        self._pending = self._finisher.submit(self._finish, step, best_loss)

    @property
    def last_saved(self) -> int | None:
        """The newest step whose checkpoint is complete on disk: saved here, or restored for training."""
        return self._last_saved

    def wait(self) -> None:
        """Wait until a running save has ended: `last_saved` and `failures` then include it. Never raises."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for a running save and end the threads. A failed save is in `failures`, and not raised."""
        self.wait()
        self._finisher.shutdown()
        try:
            self._orbax.close()
        except (OSError, ValueError, RuntimeError) as error:
            # Its own wait reports the failure of a save a second time.
            log.debug("closing the checkpointer: %s", error)

    def mark_best(self, step: int, loss: float) -> None:
        """Mark the checkpoint of `step` as the best by validation loss: retention keeps it."""
        self.wait()
        # One process writes to the shared directory.
        if jax.process_index() == 0 and step in self.steps():
            self._note_best(step, loss)

    def _note_best(self, step: int, loss: float) -> None:
        if is_better(loss, None):
            write_json(self.directory / "best.json", {"step": step, "loss": loss})

    def best(self) -> tuple[int, float] | None:
        """Return step and loss of the best checkpoint; None if it is gone or its loss is not finite."""
        path = self.directory / "best.json"
        if not path.exists():
            return None
        best = json.loads(path.read_text())
        # It is gone if the run was killed during its save, or it was damaged: a new best is then found.
        is_present = best["step"] in self.steps() and is_better(float(best["loss"]), None)
        return (int(best["step"]), float(best["loss"])) if is_present else None

    def forget_best(self) -> None:
        """Delete the mark of the best checkpoint, so that later evaluations select a new one."""
        if jax.process_index() == 0:
            (self.directory / "best.json").unlink(missing_ok=True)

    def repair_best(self, log_path: Path) -> None:
        """Replace a best checkpoint whose loss is not finite by the best with a finite loss in the log.

        Earlier versions marked a loss of NaN as the best, and no later one was lower.
        """
        path = self.directory / "best.json"
        if (
            jax.process_index() != 0
            or not path.exists()
            or is_better(float(json.loads(path.read_text())["loss"]), None)
        ):
            return
        # Only checkpoints that still exist, and evaluations on the sample that the best is selected by.
        losses = {}
        for record in read_log(log_path, kind="eval") if log_path.exists() else []:
            if record["step"] in self.steps() and not record.get("complete"):
                losses[record["step"]] = float(record["loss"])
        path.unlink()
        if (step := best_of(losses)) is not None:
            self._note_best(step, losses[step])
        replacement = (
            "no checkpoint with a finite loss is left"
            if step is None
            else f"of those left, checkpoint {step} is the best"
        )
        log.warning(
            "the best checkpoint in %s had a loss that is not finite: %s", self.directory, replacement
        )

    def steps(self) -> list[int]:
        """Return the steps with a committed checkpoint, oldest first."""
        if not self.directory.is_dir():
            return []
        # Orbax writes to a directory with a suffix and renames it: a plain number is a committed save.
        return sorted(
            int(entry.name) for entry in self.directory.iterdir() if entry.is_dir() and entry.name.isdigit()
        )

    def restore(
        self, like: Items, *, step: int | None = None, whole: bool = True
    ) -> tuple[int, dict[str, Any]]:
        """Restore the newest intact checkpoint, or that of `step`.

        Args:
          like: trees of arrays or shapes, whose shardings the result has.
          whole: False to read only the leaves in `like`, by logical path.

        Raises:
          CheckpointError: there is none, or its parameters, shapes or dtypes are those of another model.
        """
        self.wait()
        known = self.steps()
        if step is not None and step not in known:
            raise CheckpointError(
                f"{self.directory} has no checkpoint of step {step}: it has "
                f"{', '.join(map(str, known)) or 'none'}"
            )
        for candidate in reversed(known) if step is None else [step]:
            problem = _agreed(functools.partial(self._problem, candidate))
            if not problem:
                try:
                    items = self._read(candidate, like, whole=whole)
                    self._last_saved = candidate
                    return candidate, items
                except Exception as error:  # Orbax has no class of its own for what it cannot read
                    # A checkpoint that matches its manifest is not damaged; nor is one of another model.
                    if (
                        isinstance(error, CheckpointError)
                        or (self.directory / str(candidate) / MANIFEST).exists()
                    ):
                        raise
                    problem = f"{type(error).__name__} while reading it"
            log.warning("checkpoint %d in %s is damaged (%s): set aside", candidate, self.directory, problem)
            if jax.process_index() == 0:
                self._set_aside(candidate)
        raise CheckpointError(
            f"no intact checkpoint in {self.directory}: a run has one once its first save is complete"
        )

    def read_some(
        self, step: int, item: str, tree_shapes: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, Any] | None:
        """Read some arrays of an item by logical path; None if it lacks them.

        The checkpoint must have been restored before, and so verified.
        """
        path = self.directory / str(step)
        if not self.has(step, item):
            return None
        # Arrays of another shape are treated as absent: they belong to another version.
        stored = self._meta(path)["leaves"].get(item, {})
        if any(stored.get(name) != described for name, described in _describe(tree_shapes).items()):
            return None
        return _read_some(path / item, dict(tree_shapes))

    def has(self, step: int, item: str) -> bool:
        """Return whether the checkpoint of `step` has this item."""
        return (self.directory / str(step) / item).is_dir()

    def _read(self, step: int, like: Items, *, whole: bool) -> dict[str, Any]:
        path = self.directory / str(step)
        meta = self._meta(path)
        shapes = {name: stored_shapes(self.model, tree) for name, tree in like.items()}
        signs: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}  # that an older version did not keep
        for name, tree_shapes in shapes.items():
            stored = meta["leaves"].get(name, {})
            stored = stored if whole else {leaf: stored[leaf] for leaf in tree_shapes if leaf in stored}
            signs[name] = {
                leaf: tree_shapes.pop(leaf) for leaf in [*tree_shapes] if is_sign(leaf) and leaf not in stored
            }
            _check_leaves(name, stored=stored, expected=_describe(tree_shapes), path=path)
        if not whole:
            some = {
                name: _read_some(path / name, tree) | _positive(signs[name]) for name, tree in shapes.items()
            }
            return {name: restack(self.model, some[name], like=tree) for name, tree in like.items()}
        read = self._orbax.restore(
            path,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
            ),
        )
        # Layers are stacked in one program, whose outputs have the requested shardings.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)

        def build(stored: dict[str, Any]) -> dict[str, Any]:
            whole = {name: {**leaves, **_positive(signs[name])} for name, leaves in stored.items()}
            return {name: restack(self.model, whole[name], like=tree) for name, tree in like.items()}

        return jax.jit(build, out_shardings=shardings)({name: read[name] for name in like})

    def _meta(self, path: Path) -> dict[str, Any]:
        """Read the metadata of the arrays."""
        return self._orbax.restore(path, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def _problem(self, step: int) -> str:
        """Describe the damage of a checkpoint on disk; empty if it is intact."""
        path = self.directory / str(step)
        # Checked first, since without a manifest these directories are the only sign of a complete save.
        if not (path / "meta").is_dir() or not (path / "model").is_dir():
            return "incomplete"
        if not (path / MANIFEST).exists():
            log.warning(
                "checkpoint %d has no %s (the run was stopped right after the save): restored unverified",
                step,
                MANIFEST,
            )
            return ""
        try:
            expected = json.loads((path / MANIFEST).read_text())
            actual = _digests(path)
        except (OSError, ValueError) as error:
            return f"unreadable: {error}"
        # Files that the manifest does not list are harmless.
        changed = sorted(name for name in expected if actual.get(name) != expected[name])
        return f"{len(changed)} file(s) missing or changed, first {changed[0]}" if changed else ""

    def _finish(self, step: int, best_loss: float | None) -> None:
        """Write the manifest once the save is committed, mark the best and prune; runs in the background."""
        try:
            self._orbax.wait_until_finished()
            faults.at("checkpoint.committed", step)
            if jax.process_index() == 0:
                path = self.directory / str(step)
                write_json(path / MANIFEST, _digests(path))
            self._last_saved = step
            faults.at("checkpoint.verified", step)
            if jax.process_index() == 0:
                if best_loss is not None:
                    self._note_best(step, best_loss)
                self._prune()
        except Exception as error:  # of any class: this is a thread, and the run goes on without the save
            self._give_up(step, error)

    def _set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint, so that no later restore tries it and its step can be saved again."""
        # The same step may be damaged twice: nothing is overwritten, so that the files can be examined.
        existing = {entry.name for entry in self.directory.iterdir()}
        names = (f"{step}.bad{count or ''}" for count in itertools.count())
        (self.directory / str(step)).rename(
            self.directory / next(name for name in names if name not in existing)
        )

    def _prune(self) -> None:
        # Pruned only after a new checkpoint is complete, so that there is always one to return to.
        best = self.best()
        to_keep = {*self.steps()[-self.config.keep :], *([best[0]] if best else [])}
        for step in set(self.steps()) - to_keep:
            shutil.rmtree(self.directory / str(step), ignore_errors=True)

    def _give_up(self, step: int, error: Exception) -> None:
        """Log a failed save and delete its remains. The run and older checkpoints are not affected."""
        self.failures.append((step, str(error) or type(error).__name__))
        log.error(
            "checkpoint %d was NOT saved: %s. Training continues; free disk space or change --run.directory",
            step,
            error,
        )
        # A full disk is the usual cause, and the remains would fill it further.
        for remains in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(remains, ignore_errors=True)


def _describe(tree: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in tree.items()}


def _check_leaves(item: str, *, stored: Mapping[str, str], expected: Mapping[str, str], path: Path) -> None:
    """Refuse a checkpoint of another model: Orbax would cast a dtype silently."""
    names = stored.keys() | expected.keys()
    differing = sorted(name for name in names if stored.get(name) != expected.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{path} does not fit this experiment: {item} {name} is {stored.get(name, 'absent')} in the "
            f"checkpoint and {expected.get(name, 'absent')} in the model ({len(differing)} differ). Use the "
            "model and optimizer it was trained with"
        )


def _positive(signs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    return {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in signs.items()}


def _read_some(path: Path, tree_shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Read some of an item's arrays; the handler that wrote them reads all or none."""
    if not tree_shapes:
        return {}
    restore_args = ocp.checkpoint_utils.construct_restore_args(tree_shapes)
    # The two handlers share their layout of files.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(
            path, args=ocp.args.PyTreeRestore(tree_shapes, restore_args=restore_args, partial_restore=True)
        )


def _digests(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {str(file.relative_to(path)): file_sha256(file) for file in files}


def _agreed(problem: Any) -> str:
    """Return the first process's answer on every process: they must not restore different steps."""
    if jax.process_count() == 1:
        return problem()
    # A broadcast needs arrays of the same size on every process.
    mine = problem().encode()[:200] if jax.process_index() == 0 else b""
    padded = np.frombuffer(mine.ljust(200, b" "), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).decode(errors="replace").strip()
