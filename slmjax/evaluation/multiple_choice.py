"""Multiple choice by likelihood, on a local file of records: JSONL, or another layout of `data/records.py`.

    {"prompt": "The capital of France is", "choices": ["Rome", "Paris"], "answer": 1}

A choice is scored as the continuation of its prompt. One blank stands between them, whether the choice begins
with it, the prompt ends with it, or neither; after other white space, and in a choice that begins with other
white space, none is added. The answer is the choice of the highest log-likelihood (`accuracy`), or of the
highest per UTF-8 byte of the choice without that blank (`accuracy_per_byte`), so that long choices are not at
a disadvantage. lm-eval's `acc` and `acc_norm` are the same, but that it counts characters.
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
    """What the answers came to."""

    file: str
    questions: int
    accuracy: float  # by log-likelihood
    accuracy_stderr: float  # of the mean over questions
    accuracy_per_byte: float  # by log-likelihood per byte of the choice
    accuracy_per_byte_stderr: float
    chance: float  # accuracy of guessing
    truncated: int  # questions of which a prompt lost its beginning, as the context had no room for it
    seconds: float


def answer_questions(
    loaded: Loaded, path: str | Path, *, batch_size: int = DEFAULT_BATCH_SIZE
) -> MultipleChoiceResult:
    """Answer the questions of a file.

    Raises:
      ValueError: the file is not there, a record of it is no question, a choice is longer than the context,
        or a log-likelihood is NaN; file and line are named.
    """
    started = time.monotonic()
    questions = read_questions(Path(path))
    pairs = []
    for one in questions:
        try:
            pairs += [_pair(loaded, one.prompt, choice) for choice in one.choices]
        except ValueError as error:
            raise ValueError(f"{one.where}: {error}") from error
    scores = iter(log_likelihoods(loaded, pairs, batch_size=batch_size))
    right = []
    right_per_byte = []
    truncated = 0
    for one in questions:
        found = [next(scores) for _ in one.choices]
        refuse_nan(found, where=one.where)
        logprobs = np.asarray([score.logprob for score in found])
        per_byte = logprobs / np.asarray(
            [len(_split_blank(one.prompt, choice)[1].encode()) for choice in one.choices]
        )
        right.append(int(np.argmax(logprobs)) == one.answer)
        right_per_byte.append(int(np.argmax(per_byte)) == one.answer)
        truncated += any(score.truncated for score in found)
    return MultipleChoiceResult(
        file=str(path),
        questions=len(questions),
        accuracy=float(np.mean(right)),
        accuracy_stderr=_stderr(right),
        accuracy_per_byte=float(np.mean(right_per_byte)),
        accuracy_per_byte_stderr=_stderr(right_per_byte),
        chance=float(np.mean([1 / len(one.choices) for one in questions])),
        truncated=truncated,
        seconds=time.monotonic() - started,
    )


def _pair(loaded: Loaded, prompt: str, choice: str) -> Pair:
    """A prompt and a choice as tokens. Raises ValueError for text that the vocabulary lacks, and a choice
    longer than the context.
    """
    pair = pair_tokens(loaded.tokenizer, prompt, continuation_of(prompt, choice))
    if len(pair[1]) > (room := loaded.config.context_length):
        raise ValueError(
            f"a choice has {len(pair[1])} tokens, more than the model's context_length={room}: shorten it"
        )
    return pair


def continuation_of(prompt: str, choice: str) -> str:
    """Return the text that follows a prompt for a choice: one blank stands between them, as the module
    says.
    """
    return "".join(_split_blank(prompt, choice))


def _split_blank(prompt: str, choice: str) -> tuple[str, str]:
    """The blank to put after the prompt, or "", and the choice without a blank of its own that stands for
    it.
    """
    if not prompt:
        return "", choice
    if prompt[-1] == " ":
        return "", choice.removeprefix(" ") or choice
    if prompt[-1].isspace() or (choice[0].isspace() and choice[0] != " "):
        return "", choice
    return " ", choice.removeprefix(" ") or choice


def _stderr(right: list[bool]) -> float:
    """Of a mean, by the sample's own deviation; NaN for one question."""
    return float(np.std(right, ddof=1) / math.sqrt(len(right))) if len(right) > 1 else math.nan


def read_questions(path: Path) -> list[Question]:
    """The questions of a file. Raises ValueError as `answer_questions` does."""
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}: multiple choice reads JSONL with prompt, choices and answer on each "
            "line"
        )
    in_cells = file_kind(path).layout in (Layout.CSV, Layout.TSV)
    questions = []
    for record in read_objects(path):
        values = dict(record.values or {})
        if in_cells:  # a whole number is then an index, never the text of a choice
            values |= {name: value_in_cell(values[name]) for name in ("choices", "answer") if name in values}
        questions.append(_question(values, record.where))
    if not questions:
        raise ValueError(f"{path} holds no question: write one on each line, or one in each record")
    return questions


def _question(record: Mapping[str, Any], where: str) -> Question:
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


def _answer(given: Any, choices: list[str], where: str) -> int:
    """An index, or the text of a choice, as an index."""
    if isinstance(given, str) and choices.count(given) == 1:
        return choices.index(given)
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < len(choices):
        raise ValueError(
            f'{where}: "answer" is {given!r}, and must be an index from 0 to {len(choices) - 1}, or the text '
            "of one choice"
        )
    return given
