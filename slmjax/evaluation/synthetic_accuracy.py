"""Accuracy on synthetic tasks, by length of the examples: `slmjax eval --tasks recall,copy,parity,s3`.

A model answers an example right if each token of the answer is the most likely one. It must have been trained
on the task (`data.synthetic_tasks.SyntheticSource`): text does not teach it. Lengths beyond those of training
measure whether it has learned the rule or the lengths.
"""

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np

from slmjax.checkpoints.loading import Loaded
from slmjax.data.provenance import own_data
from slmjax.data.synthetic_tasks import SyntheticSource, SyntheticTask, chance, evaluation_examples
from slmjax.evaluation.likelihood import DEFAULT_BATCH_SIZE, Pair, log_likelihoods, pair_tokens, refuse_nan

DEFAULT_LENGTHS = (4, 8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Accuracy on examples of one task and length."""

    task: str
    length: int  # pairs for recall, else symbols
    examples: int
    accuracy: float  # fraction of answers that are right in every token
    accuracy_stderr: float  # of the mean over examples
    chance: float  # accuracy of guessing among the possible symbols
    bits_per_symbol: float  # negative log-likelihood of a symbol of the answer
    trained_length: int | None  # longest example of the run's data; None if it was not trained on the task
    seconds: float


def evaluate_tasks(
    loaded: Loaded,
    tasks: Sequence[SyntheticTask],
    *,
    lengths: Sequence[int] | None = None,
    num_examples: int = 200,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> list[TaskResult]:
    """Return the accuracy on each task, for each length.

    Args:
      lengths: of the examples; None for those of DEFAULT_LENGTHS that fit into the model's context.
      num_examples: of each task and length.
      seed: of the examples, which differ from those of training.

    Raises:
      ValueError: a length does not fit into the model's context, or a log-likelihood is NaN.
    """
    if num_examples < 1:
        raise ValueError(f"the number of examples is {num_examples}: give at least 1")
    results = []
    for task in tasks:
        trained_length = _trained_length(loaded, task)
        for length in DEFAULT_LENGTHS if lengths is None else lengths:
            started = time.monotonic()
            examples = evaluation_examples(task, length=length, count=num_examples, seed=seed)
            pairs = [pair_tokens(loaded.tokenizer, example.prompt, example.answer) for example in examples]
            longest = max(_num_inputs(pair) for pair in pairs)
            if longest > loaded.config.context_length:
                # The first length is always tried, so that there is a result or an error.
                if lengths is None and length != DEFAULT_LENGTHS[0]:
                    break
                raise ValueError(
                    f"{task.value} of length {length} takes {longest} tokens, more than the model's "
                    f"context_length={loaded.config.context_length}: give shorter ones with --task-lengths"
                )
            likelihoods = log_likelihoods(loaded, pairs, batch_size=batch_size)
            refuse_nan(likelihoods, where=f"{task.value} of length {length}")
            is_right = np.asarray([likelihood.is_greedy for likelihood in likelihoods])
            nats = -sum(likelihood.logprob for likelihood in likelihoods)
            results.append(
                TaskResult(
                    task=task.value,
                    length=length,
                    examples=num_examples,
                    accuracy=float(np.mean(is_right)),
                    accuracy_stderr=(
                        float(np.std(is_right, ddof=1) / math.sqrt(num_examples))
                        if num_examples > 1
                        else math.nan
                    ),
                    chance=chance(task, length=length),
                    bits_per_symbol=nats / math.log(2) / sum(example.symbols for example in examples),
                    trained_length=trained_length,
                    seconds=time.monotonic() - started,
                )
            )
    return results


def _num_inputs(pair: Pair) -> int:
    """Return the tokens that the model reads: the last one is only a target."""
    return len(pair[0]) + len(pair[1]) - 1


def _trained_length(loaded: Loaded, task: SyntheticTask) -> int | None:
    """Return the longest example of a task in the data of the run."""
    data = own_data(loaded.path)
    sources = [] if data is None else [weighted.source for weighted in data.mixture]
    lengths = [
        source.max_length for source in sources if isinstance(source, SyntheticSource) and source.task is task
    ]
    return max(lengths, default=None)
