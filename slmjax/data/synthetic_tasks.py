"""Tasks that tell token mixers apart: recall, copying, and tracking of a state, as text made from a seed.

    SyntheticSource(task=SyntheticTask.RECALL, max_length=16)        # a source of training text
    make_example(SyntheticTask.PARITY, length=3, rng=rng)            # prompt "1 0 1 =", answer " 0"

An example is a prompt and its answer, so that training and evaluation score the answer alone. Symbols are
letters and digits separated by blanks, which every tokenizer has tokens for. Perplexity on text hardly
differs between mixers that differ in these tasks (Arora et al. 2023; Jelassi et al. 2024; Merrill et al.
2024).
"""

import dataclasses
import enum
import itertools
import string
from collections.abc import Iterator

import numpy as np

from slmjax.data.documents import Document
from slmjax.data.sources import SourceConfig, combined_hash

# Part of the fingerprint: change it when the same settings make other documents.
_VERSION = "synthetic tasks, version 1"
_LETTERS = tuple(string.ascii_lowercase)
# Pairs of letters, so that long examples have the same kind of keys as short ones.
_KEYS = tuple(first + second for first, second in itertools.product(_LETTERS, repeat=2))
# The six permutations of three things, each named by a letter, the identity first.
_PERMUTATIONS = tuple(itertools.permutations(range(3)))
_TRAINING = 0
_EVALUATION = 1


class SyntheticTask(enum.Enum):
    """A synthetic task, and what its length counts."""

    RECALL = "recall"  # the value of one key among pairs of keys and values; length: pairs
    COPY = "copy"  # all letters of the prompt, in order; length: letters
    PARITY = "parity"  # whether the number of ones is odd; length: digits
    # the product of permutations of three things, from left to right (word problem of the group S3)
    S3 = "s3"  # length: permutations


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskExample:
    """A prompt and its answer, which begins with a blank."""

    prompt: str
    answer: str

    @property
    def symbols(self) -> int:
        """The number of symbols of the answer."""
        return len(self.answer.split())


def make_example(task: SyntheticTask, *, length: int, rng: np.random.Generator) -> TaskExample:
    """Return a random example of a task.

    Raises ValueError for a length below 1, or above the number of keys for recall.

    >>> make_example(SyntheticTask.COPY, length=3, rng=np.random.default_rng(0))
    TaskExample(prompt='w q n =', answer=' w q n')
    """
    check_length(task, length)
    if task is SyntheticTask.RECALL:
        keys = [_KEYS[index] for index in rng.choice(len(_KEYS), size=length, replace=False)]
        values = [_LETTERS[index] for index in rng.integers(len(_LETTERS), size=length)]
        asked = int(rng.integers(length))
        pairs = " ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
        return TaskExample(prompt=f"{pairs} ? {keys[asked]}", answer=f" {values[asked]}")
    if task is SyntheticTask.COPY:
        letters = " ".join(_LETTERS[index] for index in rng.integers(len(_LETTERS), size=length))
        return TaskExample(prompt=f"{letters} =", answer=f" {letters}")
    if task is SyntheticTask.PARITY:
        digits = rng.integers(2, size=length)
        return TaskExample(prompt=f"{' '.join(map(str, digits))} =", answer=f" {digits.sum() % 2}")
    elements = rng.integers(len(_PERMUTATIONS), size=length)
    product = _PERMUTATIONS[0]
    for element in elements:
        # First what was done so far, then this permutation.
        product = tuple(_PERMUTATIONS[element][index] for index in product)
    names = " ".join(_LETTERS[element] for element in elements)
    return TaskExample(prompt=f"{names} =", answer=f" {_LETTERS[_PERMUTATIONS.index(product)]}")


def check_length(task: SyntheticTask, length: int) -> None:
    """Raise ValueError if there is no example of this length."""
    if length < 1:
        raise ValueError(f"a length of {task.value} is {length}: give at least 1")
    if task is SyntheticTask.RECALL and length > len(_KEYS):
        raise ValueError(f"a length of recall is {length}, and there are {len(_KEYS)} keys: give fewer pairs")


def chance(task: SyntheticTask, *, length: int) -> float:
    """Return the accuracy of guessing among the symbols that may be the answer.

    >>> chance(SyntheticTask.PARITY, length=8)
    0.5
    """
    if task is SyntheticTask.COPY:
        return len(_LETTERS) ** -float(length)
    num_answers = {
        SyntheticTask.RECALL: len(_LETTERS),
        SyntheticTask.PARITY: 2,
        SyntheticTask.S3: len(_PERMUTATIONS),
    }
    return 1 / num_answers[task]


def evaluation_examples(task: SyntheticTask, *, length: int, count: int, seed: int = 0) -> list[TaskExample]:
    """Return examples of one length; their draws are not those of any `SyntheticSource`."""
    rng = np.random.default_rng((_EVALUATION, list(SyntheticTask).index(task), seed, length))
    return [make_example(task, length=length, rng=rng) for _ in range(count)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticSource(SourceConfig):
    """Examples of a synthetic task, made from a seed; lengths are uniform."""

    task: SyntheticTask  # recall, copy, parity or s3
    num_documents: int = 100_000  # examples
    min_length: int = 1  # of an example; what it counts depends on the task
    max_length: int = 16  # of an example
    seed: int = 0  # of all examples

    def __post_init__(self) -> None:
        if self.num_documents < 1:
            raise ValueError(f"num_documents must be at least 1, got {self.num_documents}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.min_length > self.max_length:
            raise ValueError(f"min_length={self.min_length} is above max_length={self.max_length}")
        check_length(self.task, self.min_length)
        check_length(self.task, self.max_length)

    def documents(self) -> Iterator[Document]:
        rng = np.random.default_rng((_TRAINING, list(SyntheticTask).index(self.task), self.seed))
        for index in range(self.num_documents):
            length = int(rng.integers(self.min_length, self.max_length + 1))
            example = make_example(self.task, length=length, rng=rng)
            # A name, not a record: its hash holds out a part of the draws. That of the content would hold out
            # all examples of some short prompts, and training would never see them.
            id = f"{self.task.value}:{index}"
            yield Document(id=id, where=id, prompt=example.prompt, text=example.answer)

    def fingerprint(self) -> str:
        return combined_hash(_VERSION, repr(self))

    def describe(self) -> str:
        return f"{self.task.value} of lengths {self.min_length} to {self.max_length}, seed {self.seed}"

    def size_hint(self) -> int | None:
        return None
