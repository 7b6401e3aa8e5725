"""Checkpoints that can be trusted: saved in the background, verified when read, with a way back to an older
one.

A run's `checkpoints/` holds one directory per step, written by Orbax with one entry per layer
(`parameters.unstack`), so that another grouping of layers, mesh or number of hosts restores it. Orbax notices
neither a flipped bit nor a half-copied directory, and calls whatever has the highest number the latest; so
every file's SHA-256 is written to `MANIFEST.json` after the commit and checked before a restore. What fails
is set aside as `STEP.bad` and the next older one is taken.
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
    """When checkpoints are written and how many stay."""

    # steps between checkpoints; one is also written at the end and when a run is interrupted
    every: int = 500
    keep: int = 2  # how many of the newest stay; the best by validation loss stays beside them

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(
                f"checkpoint.every and checkpoint.keep must be at least 1, got {self.every} and {self.keep}"
            )


class CheckpointError(ValueError):
    """No checkpoint here can be restored, or it is of another model."""


Items = Mapping[str, Any]  # named trees of arrays: "model", "optimizer", "ema", "progress", "codes"


class Checkpointer:
    """Writes and reads the checkpoints of one run. Close it, or the last save may not be complete."""

    def __init__(self, directory: Path, *, model: ModelConfig, config: CheckpointConfig) -> None:
        self.directory = directory.absolute()
        self.model = model
        self.config = config
        # Threads of a save whose directory cannot be made would wait for it, and keep the process from
        # ending, for five minutes.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._unstack = jax.jit(functools.partial(unstack, model))

    def save(self, step: int, items: Items, *, best_loss: float | None = None) -> None:
        """Starts writing a checkpoint; returns once the arrays are copied. A failed save is logged, not
        raised.

        With `best_loss`, its validation loss, it is noted as the best once it is complete: until then the old
        one is.
        """
        self.wait()
        stored = {name: self._unstack(tree) for name, tree in items.items()}
        entries = {name: ocp.args.StandardSave(tree) for name, tree in stored.items()}
        leaves = {name: _describe(tree) for name, tree in stored.items()}
        arguments = ocp.args.Composite(**entries, meta=ocp.args.JsonSave({"step": step, "leaves": leaves}))
        try:
            self._orbax.save(self.directory / str(step), args=arguments, force=True)
        except OSError as error:
            self._give_up(step, error)
            return
        self._pending = self._finisher.submit(self._finish, step, best_loss)

    def wait(self) -> None:
        """Returns when the save under way, if any, is complete on disk."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the save under way and ends the threads."""
        self.wait()
        self._finisher.shutdown()
        self._orbax.close()

    def mark_best(self, step: int, loss: float) -> None:
        """Notes the saved checkpoint of `step` as the best by validation loss: retention spares it."""
        self.wait()
        if jax.process_index() == 0 and step in self.steps():
            self._note_best(step, loss)

    def _note_best(self, step: int, loss: float) -> None:
        if is_better(loss, None):
            write_json(self.directory / "best.json", {"step": step, "loss": loss})

    def best(self) -> tuple[int, float] | None:
        """Step and validation loss of the best checkpoint; None if there is none (any more), or its loss is
        not finite.
        """
        path = self.directory / "best.json"
        if not path.exists():
            return None
        best = json.loads(path.read_text())
        # A run killed during that save, or one whose checkpoint was set aside, has to find its best anew.
        has_one = best["step"] in self.steps() and is_better(float(best["loss"]), None)
        return (int(best["step"]), float(best["loss"])) if has_one else None

    def forget_best(self) -> None:
        """Delete the note of the best checkpoint, so that the next evaluations choose one."""
        if jax.process_index() == 0:
            (self.directory / "best.json").unlink(missing_ok=True)

    def repair_best(self, log_path: Path) -> None:
        """Take the place of a best checkpoint whose loss is not finite: the best of those that the run's log
        has a finite loss of.

        Earlier versions noted a loss of NaN as the best, and no later one was lower.
        """
        path = self.directory / "best.json"
        if (
            jax.process_index() != 0
            or not path.exists()
            or is_better(float(json.loads(path.read_text())["loss"]), None)
        ):
            return
        losses = {}
        for record in read_log(log_path, kind="eval") if log_path.exists() else []:
            if record["step"] in self.steps() and not record.get("complete"):
                losses[record["step"]] = float(record["loss"])
        path.unlink()
        if (step := best_of(losses)) is not None:
            self._note_best(step, losses[step])
        found = (
            "no checkpoint with a finite loss is left"
            if step is None
            else f"of those left, checkpoint {step} is the best"
        )
        log.warning(
            "the best checkpoint in %s was noted with a loss that is not finite: %s", self.directory, found
        )

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(
            int(entry.name) for entry in self.directory.iterdir() if entry.is_dir() and entry.name.isdigit()
        )

    def restore(
        self, like: Items, *, step: int | None = None, whole: bool = True
    ) -> tuple[int, dict[str, Any]]:
        """The newest checkpoint that is intact (or that of `step`), placed as `like`, a tree of arrays or
        shapes.

        Where it is not read as a whole, `like` names the leaves that are, by logical path.

        Raises:
          CheckpointError: there is none, or it belongs to a model of other parameters, shapes or dtypes.
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
                    return candidate, self._read(candidate, like, whole=whole)
                except Exception as error:  # Orbax has no class of its own for what it cannot read
                    # What a manifest vouches for is not damaged, and another model's checkpoint is none of
                    # ours to set aside.
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
        self, step: int, item: str, wanted: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, Any] | None:
        """Some arrays of an item by logical path, from a checkpoint that was restored before, and so
        verified; None without them.
        """
        path = self.directory / str(step)
        if not self.has(step, item):
            return None
        stored = self._meta(path)["leaves"].get(item, {})
        if any(stored.get(name) != described for name, described in _describe(wanted).items()):
            return None
        return _read_some(path / item, dict(wanted))

    def has(self, step: int, item: str) -> bool:
        """Whether the checkpoint of `step` holds this item."""
        return (self.directory / str(step) / item).is_dir()

    def _read(self, step: int, like: Items, *, whole: bool) -> dict[str, Any]:
        path = self.directory / str(step)
        meta = self._meta(path)
        shapes = {name: stored_shapes(self.model, tree) for name, tree in like.items()}
        signs: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}  # that an older version did not keep
        for name, wanted in shapes.items():
            stored = meta["leaves"].get(name, {})
            stored = stored if whole else {leaf: stored[leaf] for leaf in wanted if leaf in stored}
            signs[name] = {
                leaf: wanted.pop(leaf) for leaf in [*wanted] if is_sign(leaf) and leaf not in stored
            }
            _check_leaves(name, stored=stored, wanted=_describe(wanted), path=path)
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
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)

        def build(stored: dict[str, Any]) -> dict[str, Any]:
            whole = {name: {**leaves, **_positive(signs[name])} for name, leaves in stored.items()}
            return {name: restack(self.model, whole[name], like=tree) for name, tree in like.items()}

        return jax.jit(build, out_shardings=shardings)({name: read[name] for name in like})

    def _meta(self, path: Path) -> dict[str, Any]:
        """What was written beside the arrays."""
        return self._orbax.restore(path, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def _problem(self, step: int) -> str:
        """What is wrong with a checkpoint on disk; empty when nothing is."""
        path = self.directory / str(step)
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
            found = _digests(path)
        except (OSError, ValueError) as error:
            return f"unreadable: {error}"
        changed = sorted(name for name in expected if found.get(name) != expected[name])
        return f"{len(changed)} file(s) missing or changed, first {changed[0]}" if changed else ""

    def _finish(self, step: int, best_loss: float | None) -> None:
        """After the commit: the manifest, the note of the best, then retention. Runs in the background
        thread.
        """
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                path = self.directory / str(step)
                write_json(path / MANIFEST, _digests(path))
                if best_loss is not None:
                    self._note_best(step, best_loss)
                self._prune()
        except (OSError, ValueError, RuntimeError) as error:
            self._give_up(step, error)

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, so that no later restore tries it and its step can be saved again."""
        taken = {entry.name for entry in self.directory.iterdir()}
        free = next(name for count in itertools.count() if (name := f"{step}.bad{count or ''}") not in taken)
        (self.directory / str(step)).rename(self.directory / free)

    def _prune(self) -> None:
        best = self.best()
        kept = {*self.steps()[-self.config.keep :], *([best[0]] if best else [])}
        for step in set(self.steps()) - kept:
            shutil.rmtree(self.directory / str(step), ignore_errors=True)

    def _give_up(self, step: int, error: Exception) -> None:
        """A failed save costs the checkpoint, not the run: its remains go, older checkpoints stay."""
        log.error(
            "checkpoint %d was NOT saved: %s. Training goes on; free disk space or change the run directory",
            step,
            error,
        )
        for remains in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(remains, ignore_errors=True)


def _describe(tree: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in tree.items()}


def _check_leaves(item: str, *, stored: Mapping[str, str], wanted: Mapping[str, str], path: Path) -> None:
    """Refuses a checkpoint of another model: Orbax would cast a dtype without a word."""
    differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{path} does not fit this experiment: {item} {name} is {stored.get(name, 'absent')} in the "
            "checkpoint and "
            f"{wanted.get(name, 'absent')} in the model ({len(differing)} such). Use the model and optimizer "
            "it was trained with"
        )


def _positive(signs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    return {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in signs.items()}


def _read_some(path: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Some of an item's arrays: the handler that wrote them reads all or none."""
    if not wanted:
        return {}
    how = ocp.checkpoint_utils.construct_restore_args(wanted)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(
            path, args=ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
        )


def _digests(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {str(file.relative_to(path)): file_sha256(file) for file in files}


def _agreed(problem: Any) -> str:
    """The first process's answer, on every process: two of them must not restore different steps."""
    if jax.process_count() == 1:
        return problem()
    mine = problem().encode()[:200] if jax.process_index() == 0 else b""
    padded = np.frombuffer(mine.ljust(200, b" "), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).decode(errors="replace").strip()
