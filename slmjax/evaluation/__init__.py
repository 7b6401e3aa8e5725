"""Evaluation: what a model is worth, in figures that compare across tokenizers and engines."""

from slmjax.evaluation.bits_per_byte import EvalResult, evaluate

__all__ = ["EvalResult", "evaluate"]
