"""Run directories as training leaves them, written by hand: tests of pages and lists need no training."""

import json
from pathlib import Path
from typing import Any

# Text that would leave an element of a page that does not escape it.
EVIL = "</script><script>alert(1)</script><img src=http://example.com/x.png>"


def write_run(
    path: Path,
    *,
    steps: int = 40,
    moe: bool = True,
    finished: bool = True,
    lr: float = 1e-3,
    peak: bool = True,
    dropped: float = 2.0,
) -> Path:
    """A run directory as training leaves it: resumed once after step 20, so that steps 11 to 20 are there
    twice.

    It logs everything, unless there are no experts, they drop nothing, or the device's peak is not known.
    """
    path.mkdir(parents=True)
    config = {
        "run": {"name": path.name, "steps": steps},
        "optim": {"lr": lr},
        "model": {"stack": [{"repeats": 2}], "note": EVIL},
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "environment.json").write_text(
        json.dumps({"python": "3.11", "packages": {"jax": "0.10"}, "command": ["slmjax", "train"]})
    )
    (path / "data.json").write_text(json.dumps([{"source": "a.txt", "weight": 1.0, "bytes": 12345}]))
    records = [{"kind": "message", "time": 0.5, "level": "WARNING", "text": f"beware {EVIL}"}]
    for step in [*range(1, 21), *range(11, steps + 1)]:
        # what the first session found in the steps that were done again
        late = 1.0 if len(records) >= 21 else 100.0
        record = {
            "kind": "train",
            "time": float(step),
            "step": step,
            "loss": late * 5 / step,
            "bits_per_byte": 3 / step,
            "learning_rate": lr,
            "grad_norm": "nan" if step == 5 else 1 / step,
            "tokens_per_second": 1e3,
            "data_wait_share": 0.01 + step / 1000,
            "mfu": 0.3 + step / 1000 if peak and step > 2 else None,
            "grad_norms": {"layers/0": 0.1, "layers/1": 0.2, "embed": 0.3},
        }
        records.append(
            record
            | (
                {"expert_loads": {"layers/1": [0.75, 0.25]}, "dropped": dropped, "expert_imbalance": 1.5}
                if moe
                else {}
            )
        )
    for step in (20, steps):
        records.append(
            {
                "kind": "eval",
                "time": 50.0,
                "step": step,
                "loss": 6 / step,
                "bits_per_byte": 4 / step,
                "documents": 2,
            }
        )
        records.append(
            {
                "kind": "sample",
                "time": 50.0,
                "step": step,
                "prompt": "def <x>",
                "text": f"def <x> at {step} {EVIL}",
            }
        )
    (path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        result = {
            "status": "finished",
            "loss": 0.15,
            "bits_per_byte": 0.1,
            "compressors": {"xz -9": 1.5},
            "parameters": 1234567,
            "tokens": 5000,
            "seconds": 61.0,
            "tokens_per_second": 1000.0,
            "step": steps,
            "samples": [EVIL],
            "seconds_by_category": {"step": 60.0},
            "commit": "a" * 40,
        }
        (path / "result.json").write_text(json.dumps(result))
    return path


def add_session(
    run: Path, *, number: int, first_step: int, changes: dict[str, Any], last_step: int | None = None
) -> None:
    """Append a session to the log, and a line of training after each of its steps."""
    record = {"kind": "session", "time": 100.0 * number, "number": number, "first_step": first_step}
    record |= {"seconds": 1.0, "changes": changes, "environment": {}}
    steps = range(first_step, first_step if last_step is None else last_step + 1)
    trained = [{"kind": "train", "time": 100.0 * number + 1, "step": step, "loss": 1.0} for step in steps]
    with (run / "log.jsonl").open("a") as log:
        log.writelines(json.dumps(item) + "\n" for item in (record, *trained))
