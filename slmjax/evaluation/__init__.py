"""Evaluation: quality, in metrics that compare across tokenizers and engines, and cost of a model.

Files in reading order:

- document_sums.py: the loss of each document of a held-out text, as a file
- bits_per_byte.py: loss, perplexity and bits per byte of held-out text
- compressors.py: gzip and xz on the same text
- likelihood.py: log-likelihood of continuations
- multiple_choice.py: multiple choice by likelihood
- synthetic_accuracy.py: accuracy on synthetic tasks, by length
- lm_eval_adapter.py: lm-eval on a slmjax model
- efficiency.py: sizes, FLOPs, times, memory and energy
"""

from slmjax.evaluation.bits_per_byte import EvalResult, evaluate
from slmjax.evaluation.document_sums import DocumentSums, read_document_sums, write_document_sums
from slmjax.evaluation.efficiency import Efficiency, measure_efficiency
from slmjax.evaluation.likelihood import Likelihood, log_likelihoods, pair_tokens
from slmjax.evaluation.multiple_choice import MultipleChoiceResult, answer_questions
from slmjax.evaluation.synthetic_accuracy import TaskResult, evaluate_tasks

__all__ = [
    "DocumentSums",
    "Efficiency",
    "EvalResult",
    "Likelihood",
    "MultipleChoiceResult",
    "TaskResult",
    "answer_questions",
    "evaluate",
    "evaluate_tasks",
    "log_likelihoods",
    "measure_efficiency",
    "pair_tokens",
    "read_document_sums",
    "write_document_sums",
]
