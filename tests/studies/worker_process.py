"""A worker in a process of its own: python -m tests.studies.worker_process stub|real DIRECTORY [WORKPLACE]

A stub training saves its first step and waits for the file DIRECTORY/gate before it ends. Real ones are those
of `real_study`.
"""

import dataclasses
import io
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from slmjax.ownership import require_ownership
from slmjax.runner import trainer
from slmjax.studies import Arm, Lease, Study, run_study
from slmjax.training.experiment import Experiment
from tests.one_layer import one_layer
from tests.studies.stub import StubTrainer, study

LEASE = Lease(seconds=3, heartbeat=0.5)


@dataclasses.dataclass
class GatedTrainer:
    """A stub that is interrupted at its first checkpoint, and ends once the gate is open."""

    directory: Path
    stub: StubTrainer = dataclasses.field(default_factory=StubTrainer)

    def __call__(
        self, experiment: Experiment, *, resume: Path | None = None, console: Any = None
    ) -> trainer.Result:
        saves = StubTrainer(statuses={(experiment.optim.lr, experiment.run.seed): "interrupted"})
        run = resume or Path(saves(experiment).run_dir)
        with (run / "log.jsonl").open("ab", buffering=0) as log:
            while not (self.directory / "gate").exists():
                time.sleep(0.02)
            # Written before the check: a process that was stopped may be anywhere.
            log.write(b'{"kind": "stale", "step": 4}\n' if resume is None else b"")
            require_ownership()
        return self.stub(experiment, resume=run, console=console)


def real_study(workplace: Path, directory: Path) -> Study:
    """Two arms and two seeds, of 8 steps each with a checkpoint after every second one."""
    arms = []
    for name, lr in (("slow", 1e-3), ("fast", 1e-2)):
        experiment = one_layer(workplace, directory, steps=8, lr=lr)
        checkpoint = dataclasses.replace(experiment.checkpoint, every=2)
        arms.append(Arm(name=name, experiment=dataclasses.replace(experiment, checkpoint=checkpoint)))
    return Study(name="rates", arms=tuple(arms), seeds=(3, 4), baseline="slow")


def main(kind: str, directory: Path, workplace: Path) -> None:
    """Work until nothing is left that is not in good hands."""
    if kind == "stub":
        run_study(study(), directory, train=GatedTrainer(directory), worker=True, lease=LEASE)
        return
    run_study(
        real_study(workplace, directory),
        directory,
        console=Console(file=io.StringIO()),
        worker=True,
        lease=Lease(seconds=60, heartbeat=5),
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else Path())
