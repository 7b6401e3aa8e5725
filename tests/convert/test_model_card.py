"""The model card of a run that was resumed with other settings."""

import json
from pathlib import Path

from slmjax.convert.model_card import _changes


def test_a_setting_that_a_session_changed_is_on_the_card(tmp_path: Path) -> None:
    session = {"kind": "session", "seconds": 1.0, "time": 0.0, "environment": {}}
    records = [
        session | {"number": 1, "first_step": 1, "changes": {}},
        {"kind": "train", "step": 150},
        session | {"number": 2, "first_step": 151, "changes": {"optim.lr": [0.0003, 0.001]}},
        {"kind": "train", "step": 200},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = list(_changes(tmp_path, {"optim": {"lr": 0.001, "kind": "adamw"}}))
    assert rows == [("optim.lr, changed", "0.0003, from step 151: 0.001")]
