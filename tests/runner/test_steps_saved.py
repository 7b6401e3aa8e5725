"""What the log of a run proves about checkpoints that are gone."""

import json
from pathlib import Path

from slmjax.runner.resume import steps_saved
from slmjax.telemetry.run_directory import RunDirectory


def saved(path: Path, *records: dict) -> int:
    run = RunDirectory(path)
    run.log_path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return steps_saved(run, every=4)


def session(first_step: int) -> dict:
    return {"kind": "session", "number": 1, "first_step": first_step}


def train(step: int) -> dict:
    return {"kind": "train", "step": step}


def test_only_the_last_session_that_began_at_step_0_counts(tmp_path: Path) -> None:
    assert saved(tmp_path) == 0
    # The record of step 4 is written before its checkpoint.
    assert saved(tmp_path, session(1), train(4)) == 0
    assert saved(tmp_path, session(1), train(4), train(5)) == 5
    assert saved(tmp_path, session(1), train(2), {"kind": "eval", "step": 3}) == 3
    # Had there been a checkpoint, the second session would have resumed from it.
    assert saved(tmp_path, session(1), train(9), session(1), train(3)) == 0
    assert saved(tmp_path, session(1), train(9), session(9), train(9)) == 9
    # A log of an earlier version has no sessions.
    assert saved(tmp_path, train(9)) == 9
