"""Multiple choice by likelihood, on a local file of records: JSONL, or another layout of `data/records.py`.

    {"prompt": "The capital of France is", "choices": ["Rome", "Paris"], "answer": 1}

A choice is scored as the continuation of its prompt. There is one blank between them, whether the choice
starts with it, the prompt ends with it, or neither; none is added after other white space, or before a choice
that starts with other white space. The answer is the choice with the highest log-likelihood (`accuracy`), or
with the highest one per UTF-8 byte of the choice without that blank (`accuracy_per_byte`), so that long
choices are not at a disadvantage. lm-eval's `acc` and `acc_norm` are the same, except that it counts
characters.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.checkpoints.loading import Loaded
from slmjax.data.files import Layout, file_kind
from slmjax.data.records import read_objects, value_in_cell
from slmjax.evaluation.likelihood import DEFAULT_BATCH_SIZE, Pair, log_likelihoods, pair_tokens, refuse_nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One record of the file."""

    prompt: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice
    where: str  # file and line, for messages


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultipleChoiceResult:
    """Accuracy over the questions of a file."""

    file: str
    questions: int
    accuracy: float  # by log-likelihood
    accuracy_stderr: float  # of the mean over questions
    accuracy_per_byte: float  # by log-likelihood per byte of the choice
    accuracy_per_byte_stderr: float
    chance: float  # accuracy of guessing
    truncated: int  # questions whose prompt was cut at its beginning, to fit the context
    seconds: float


def answer_questions(
    loaded: Loaded, path: str | Path, *, batch_size: int = DEFAULT_BATCH_SIZE
) -> MultipleChoiceResult:
    """Answer the questions of a file.

    Raises:
      ValueError: the file does not exist, a record is not a question, a choice is longer than the context,
        or a log-likelihood is NaN; the message has file and line.
    """
    started = time.monotonic()
    questions = read_questions(Path(path))
    pairs = []
    for question in questions:
        try:
            pairs += [_pair(loaded, question.prompt, choice) for choice in question.choices]
        except ValueError as error:
            raise ValueError(f"{question.where}: {error}") from error
    # All choices of all questions at once: batches are then full, and few shapes are compiled.
    all_likelihoods = iter(log_likelihoods(loaded, pairs, batch_size=batch_size))
    is_right = []
    is_right_per_byte = []
    truncated = 0
    for question in questions:
        # Questions may have different numbers of choices.
        likelihoods = [next(all_likelihoods) for _ in question.choices]
        refuse_nan(likelihoods, where=question.where)
        logprobs = np.asarray([likelihood.logprob for likelihood in likelihoods])
        num_bytes = [len(_split_blank(question.prompt, choice)[1].encode()) for choice in question.choices]
        # The first of equal scores, as in lm-eval.
        is_right.append(int(np.argmax(logprobs)) == question.answer)
        is_right_per_byte.append(int(np.argmax(logprobs / np.asarray(num_bytes))) == question.answer)
        truncated += any(likelihood.truncated for likelihood in likelihoods)
    return MultipleChoiceResult(
        file=str(path),
        questions=len(questions),
        accuracy=float(np.mean(is_right)),
        accuracy_stderr=_stderr(is_right),
        accuracy_per_byte=float(np.mean(is_right_per_byte)),
        accuracy_per_byte_stderr=_stderr(is_right_per_byte),
        chance=float(np.mean([1 / len(question.choices) for question in questions])),
        truncated=truncated,
        seconds=time.monotonic() - started,
    )


def _pair(loaded: Loaded, prompt: str, choice: str) -> Pair:
    """Return the tokens of a prompt and a choice.

    Raises ValueError for text that the vocabulary cannot encode, and for a choice longer than the context.
    """
    pair = pair_tokens(loaded.tokenizer, prompt, continuation_of(prompt, choice))
    context_length = loaded.config.context_length
    if len(pair[1]) > context_length:
        raise ValueError(
            f"a choice has {len(pair[1])} tokens, more than the model's {context_length=}: shorten it"
        )
    return pair


def continuation_of(prompt: str, choice: str) -> str:
    """Return the text that follows a prompt for a choice, with the blank between them (module docstring)."""
    return "".join(_split_blank(prompt, choice))


def _split_blank(prompt: str, choice: str) -> tuple[str, str]:
    """Return the blank to add after the prompt, or "", and the choice without a leading blank."""
    # Unconditional scoring, as of completed sentences: nothing separates the choice from anything.
    if not prompt:
        return "", choice
    # The blank of the prompt counts; a second one in the choice is dropped.
    if prompt[-1] == " ":
        return "", choice.removeprefix(" ") or choice
    # A newline, say, separates the two already.
    if prompt[-1].isspace() or (choice[0].isspace() and choice[0] != " "):
        return "", choice
    return " ", choice.removeprefix(" ") or choice


def _stderr(is_right: list[bool]) -> float:
    """Return the standard error of the mean, from the sample's deviation; NaN for one question."""
    return float(np.std(is_right, ddof=1) / math.sqrt(len(is_right))) if len(is_right) > 1 else math.nan


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file. Raises ValueError as `answer_questions` does."""
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}: multiple choice reads JSONL with prompt, choices and answer on each "
            "line"
        )
    in_cells = file_kind(path).layout in (Layout.CSV, Layout.TSV)
    questions = []
    for record in read_objects(path):
        values = dict(record.values or {})
        if in_cells:  # an integer is then an index, never the text of a choice
            values |= {name: value_in_cell(values[name]) for name in ("choices", "answer") if name in values}
        questions.append(_question(values, record.where))
    if not questions:
        raise ValueError(f"{path} holds no question: write one on each line, or one in each record")
    return questions


def _question(record: Mapping[str, Any], where: str) -> Question:
    # Public data sets use either name.
    prompt = record.get("prompt", record.get("question"))
    if not isinstance(prompt, str):
        raise ValueError(
            f'{where} has no text in "prompt" (or "question"); it has {", ".join(record) or "nothing"}'
        )
    choices = record.get("choices")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise ValueError(
            f'{where}: "choices" must be a list of two or more texts that are not empty, got {choices!r}'
        )
    return Question(
        prompt=prompt,
        choices=tuple(choices),
        answer=_answer(record.get("answer"), choices, where),
        where=where,
    )


def _answer(answer: Any, choices: list[str], where: str) -> int:
    """Return the index of the right choice, from an index or the text of a choice."""
    # Equal choices would make the text ambiguous: an index is then required.
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    # JSON's true is an int in Python, but no index.
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(
            f'{where}: "answer" is {answer!r}, and must be an index from 0 to {len(choices) - 1}, or the '
            "text of one choice"
        )
    return answer
