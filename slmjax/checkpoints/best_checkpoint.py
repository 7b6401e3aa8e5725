"""`best.json` of a run's checkpoints: which of them has the lowest held-out loss.

write(directory, 30, 2.5)
read_present(directory)                     # (30, 2.5), or None once that checkpoint is gone
repair(directory, run / "log.jsonl")        # chooses again where the mark is damaged or not finite
"""

import logging
import math
import sys
from pathlib import Path

from slmjax.checkpoints.selection import best_of, is_better
from slmjax.checkpoints.step_directories import stored_steps
from slmjax.stored_json import DamagedFile, check_object, read_object
from slmjax.telemetry.run_directory import read_log, write_json

log = logging.getLogger(__name__)
_NAME = "best.json"
_REMEDY = "delete it, or resume the run, which chooses the best checkpoint again by its log"


def write(directory: Path, step: int, loss: float) -> None:
    """Mark the checkpoint of a step as the best. A loss that is not finite changes nothing."""
    if is_better(loss, None):
        write_json(directory / _NAME, {"step": step, "loss": loss})


def read_present(directory: Path) -> tuple[int, float] | None:
    """Return step and loss of the best checkpoint; None if it is gone or its loss is not finite.

    Raises:
      DamagedFile: best.json is damaged.
    """
    best = _read(directory)
    # It is gone if the run was killed during its save, or it was damaged: a new best is then found.
    if best is None or not is_better(best[1], None) or best[0] not in _steps(directory):
        return None
    return best


def _read(directory: Path) -> tuple[int, float] | None:
    path = directory / _NAME
    try:
        best = read_object(path, {"step": int}, remedy=_REMEDY)
    except FileNotFoundError:
        return None
    # Earlier versions noted losses that are not finite, as text.
    if best.get("loss") in ("nan", "inf", "-inf"):
        return best["step"], float(best["loss"])
    check_object(best, {"loss": float}, name=str(path), remedy=_REMEDY)
    # JSON has integers that no float can hold.
    return best["step"], float(min(best["loss"], sys.float_info.max))


def forget(directory: Path) -> None:
    """Delete the mark, so that later evaluations select a new best."""
    (directory / _NAME).unlink(missing_ok=True)


def repair(directory: Path, log_path: Path) -> None:
    """Choose the best checkpoint again, by the run's log, where its mark is damaged or its loss not finite.

    Earlier versions marked a loss of NaN as the best, and no later one was lower.
    """
    reason = f"the best checkpoint in {directory} had a loss that is not finite"
    try:
        best = _read(directory)
    except DamagedFile as error:
        best = (0, math.nan)
        reason = str(error).removesuffix(f": {_REMEDY}")
    if best is None or is_better(best[1], None):
        return
    # Only checkpoints that still exist, and evaluations on the sample that the best is selected by.
    losses = {}
    present = _steps(directory)
    for record in read_log(log_path, kind="eval") if log_path.exists() else []:
        if record["step"] in present and not record.get("complete"):
            losses[record["step"]] = float(record["loss"])
    forget(directory)
    if (step := best_of(losses)) is not None:
        write(directory, step, losses[step])
    replacement = (
        "no checkpoint with a finite loss is left"
        if step is None
        else f"of those left, checkpoint {step} is the best"
    )
    log.warning("%s: %s", reason, replacement)


def _steps(directory: Path) -> list[int]:
    return [stored.step for stored in stored_steps(directory) if not stored.problem]
