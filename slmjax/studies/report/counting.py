"""Costs of arms, counted once from their runs and kept in the directory of the study.

    count_costs("studies/width", members)             # writes costs.json
    read_costs("studies/width")["wide"]["flops"]

Parameters, FLOPs and bytes follow from the settings of a run, but take seconds to trace. A report reads them.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmjax.checkpoints.model_file import read_config
from slmjax.config import fingerprint
from slmjax.stored_json import read_object
from slmjax.studies.costs import arm_cost
from slmjax.studies.report.records import directory_of_run
from slmjax.studies.study import FINISHED, Member
from slmjax.telemetry.report.reading import number
from slmjax.telemetry.run_directory import plain, write_json
from slmjax.training.experiment import read_experiment

log = logging.getLogger(__name__)

COSTS = "costs.json"


def count_costs(directory: str | Path, members: Sequence[Member]) -> Path:
    """Count the costs of each trained arm that has none yet or has changed, and write them to costs.json.

    An arm whose run directory is not there, or whose settings cannot be read, has none.
    """
    directory = Path(directory)
    counted = _entries(directory)
    first = {member.arm: member for member in reversed(members) if member.status == FINISHED}
    for arm, member in first.items():
        run = directory_of_run(directory, member)
        # A derived model has no training.
        if run is None or not (run / "model.json").is_file():
            continue
        try:
            experiment = read_experiment(run)
            vocab_size = read_config(run).vocab_size
            key = fingerprint({"experiment": member.fingerprint, "vocab_size": vocab_size})
            if counted.get(arm, {}).get("key") != key:
                cost = dataclasses.asdict(arm_cost(experiment, vocab_size=vocab_size))
                counted[arm] = {"key": key, "cost": plain(cost)}
        # A study that took hours must not end in an error because of a table.
        except (ValueError, OSError) as error:
            log.warning("the costs of %s are not known: %s", arm, error)
    return write_json(directory / COSTS, {"arms": counted})


def read_costs(directory: str | Path) -> dict[str, dict[str, float]]:
    """Return the costs in costs.json by arm and name; empty if there is no such file.

    Raises:
      DamagedFile: the file is damaged.
    """
    return {
        arm: {
            name: value
            for name, each in entry["cost"].items()
            # As the results of runs have it: scored targets alone, not positions.
            if name != "tokens" and (value := number(each)) is not None
        }
        for arm, entry in _entries(Path(directory)).items()
    }


def _entries(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / COSTS
    if not path.is_file():
        return {}
    entries = read_object(path, {"arms": dict}, remedy="delete it: it is written again")["arms"]
    return {
        arm: entry for arm, entry in entries.items() if isinstance(entry, dict) and _is_dict(entry, "cost")
    }


def _is_dict(entry: dict[str, Any], name: str) -> bool:
    return isinstance(entry.get(name), dict)
