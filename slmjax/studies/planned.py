"""The experiments of a study before anything is trained: also of arms that build on runs which do not exist.

    with planned_experiment(study, "distilled", 0) as experiment:
        cost = arm_cost(experiment)

Sizes and FLOPs of such an arm need the architecture of the run that it builds on, and nothing else of it. A
temporary directory with a model.json stands for that run.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from slmjax.checkpoints.model_file import write_model_file
from slmjax.data.tokenizers import FileTokenizer
from slmjax.studies.costs import vocab_size_of
from slmjax.studies.study import Study
from slmjax.training.experiment import Experiment
from slmjax.training.programs import resolved_model, resolved_phases


@contextlib.contextmanager
def planned_experiment(study: Study, arm: str, seed: int) -> Iterator[Experiment]:
    """Context with the experiment of an arm, for its costs; it is not to be trained.

    Its tokenizer is that of the run that it builds on, where it names that run's.

    Raises:
      ValueError: the experiment of the arm, or of one that it builds on, is invalid.
    """
    source = study.source(arm, seed)
    if source is None:
        yield study.experiment(arm, seed)
        return
    with planned_experiment(*source) as before, tempfile.TemporaryDirectory() as directory:
        run = Path(directory)
        model = resolved_model(before, vocab_size=vocab_size_of(before))
        write_model_file(run, model, phases=resolved_phases(before))
        experiment = study.experiment(arm, seed, run=run)
        tokenizer = experiment.tokenizer
        if isinstance(tokenizer, FileTokenizer) and run in (
            Path(tokenizer.path),
            *Path(tokenizer.path).parents,
        ):
            experiment = dataclasses.replace(experiment, tokenizer=before.tokenizer)
        yield experiment
