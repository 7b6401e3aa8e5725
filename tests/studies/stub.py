"""A training that takes no time: a run directory with the files that a study reads, and figures that follow
from the experiment.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from slmjax import config
from slmjax.runner import trainer
from slmjax.studies import Arm, Study
from slmjax.telemetry.run_directory import RunDirectory
from slmjax.training.experiment import Experiment
from slmjax.training.recipes import nano


def experiment(lr: float = 1e-3) -> Experiment:
    base = nano()
    return dataclasses.replace(
        base, optim=dataclasses.replace(base.optim, lr=lr), run=dataclasses.replace(base.run, steps=10)
    )


def study(seeds: tuple[int, ...] = (0, 1, 2), **changes: Any) -> Study:
    """Two arms whose learning rates tell the stub what they come to, and a third with that of the second."""
    arms = tuple(
        Arm(name=name, experiment=experiment(lr))
        for name, lr in (("slow", 1e-3), ("fast & loose", 2e-3), ("third", 2e-3))
    )
    return Study(**{"name": "pace", "arms": arms, "seeds": seeds, "baseline": "slow"} | changes)


@dataclasses.dataclass
class StubTrainer:
    """Stands for `trainer.train`, and remembers what it was asked to do. Keys of what goes wrong: (learning
    rate, seed).
    """

    statuses: dict[tuple[float, int], str] = dataclasses.field(default_factory=dict)
    errors: dict[tuple[float, int], BaseException] = dataclasses.field(default_factory=dict)
    bits: dict[tuple[float, int], float] = dataclasses.field(default_factory=dict)
    tokens: dict[float, int] = dataclasses.field(default_factory=dict)
    asked: list[Experiment] = dataclasses.field(default_factory=list)
    resumed: list[Path | None] = dataclasses.field(default_factory=list)

    def __call__(
        self, experiment: Experiment, *, resume: Path | None = None, console: Any = None
    ) -> trainer.Result:
        self.asked.append(experiment)
        self.resumed.append(resume)
        key = (experiment.optim.lr, experiment.run.seed)
        if resume is None:
            run = RunDirectory.create_in(
                Path(experiment.run.directory), name="stub", fingerprint=config.fingerprint(experiment)
            )
        else:
            run = RunDirectory(resume)
        run.write_json("config.json", config.to_json(experiment))
        status = self.statuses.get(key, "finished")
        if status == "interrupted":
            (run.checkpoints / "4").mkdir(parents=True, exist_ok=True)
        if (error := self.errors.get(key)) is not None:
            raise error
        bits = self.bits.get(key, 2 - 100 * key[0] + 0.1 * key[1] + 3 * key[0] * key[1] ** 2)
        found = (
            dict(loss=bits, bits_per_byte=bits)
            if status == "finished"
            else dict(loss=math.nan, bits_per_byte=math.nan)
        )
        if status == "finished":
            with run.open_log() as log:
                log.write("eval", step=5, loss=9.0, bits_per_byte=9.0, documents=1)
                log.write(
                    "eval",
                    step=10,
                    complete=True,
                    calibration_error=key[0] + 1e-4 * key[1] * key[0],
                    documents=3,
                    **found,
                )
        result = trainer.Result(
            status=status,
            **found,
            measured_on=trainer.ALL,
            perplexity=1.0,
            best_loss=None,
            best_step=None,
            compressors={},
            run_tokens=self.tokens.get(key[0], 1_064_778),
            run_seconds=1.0,
            session_tokens=1,
            session_seconds=1.0,
            session_tokens_per_second=1.0,
            parameters=1,
            step=10,
            session_data_wait_share=0.0,
            skipped=0,
            run_dir=str(run.path),
            commit="c0ffee",
            session_seconds_by_category={},
            samples=[],
        )
        run.write_json("result.json", dataclasses.asdict(result))
        return result
