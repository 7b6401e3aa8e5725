"""Evaluation: what a model is worth, in figures that compare across tokenizers and engines, and what it
costs.
"""

from slmjax.evaluation.bits_per_byte import EvalResult, evaluate
from slmjax.evaluation.efficiency import Efficiency, measure_efficiency
from slmjax.evaluation.likelihood import Likelihood, log_likelihoods, pair_tokens
from slmjax.evaluation.multiple_choice import MultipleChoiceResult, answer_questions

__all__ = [
    "Efficiency",
    "EvalResult",
    "Likelihood",
    "MultipleChoiceResult",
    "answer_questions",
    "evaluate",
    "log_likelihoods",
    "measure_efficiency",
    "pair_tokens",
]
