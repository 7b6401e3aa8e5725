"""Synthetic tasks: answers by definition, examples from seeds, documents that a run can train on."""

import dataclasses
import itertools

import numpy as np
import pytest

from slmjax.config import from_json, to_json
from slmjax.data.documents import HeldOutBy
from slmjax.data.synthetic_tasks import (
    SyntheticSource,
    SyntheticTask,
    chance,
    evaluation_examples,
    make_example,
)
from slmjax.training import DataConfig, WeightedSource


def examples(task, *, length, count=50):
    rng = np.random.default_rng(3)
    return [make_example(task, length=length, rng=rng) for _ in range(count)]


def test_recall_asks_for_the_value_of_one_key():
    for example in examples(SyntheticTask.RECALL, length=30):
        pairs, key = example.prompt.split(" ? ")
        symbols = pairs.split()
        table = dict(zip(symbols[::2], symbols[1::2], strict=True))
        assert len(table) == 30  # no key twice
        assert example.answer == f" {table[key]}"


def test_copy_and_parity_by_definition():
    for example in examples(SyntheticTask.COPY, length=5):
        assert example.prompt == f"{example.answer[1:]} ="
        assert example.symbols == 5
    answers = set()
    for example in examples(SyntheticTask.PARITY, length=7):
        digits = example.prompt.removesuffix(" =").split()
        assert example.answer == f" {digits.count('1') % 2}"
        answers.add(example.answer)
    assert answers == {" 0", " 1"}


def test_s3_multiplies_in_a_group_of_six_that_does_not_commute():
    """The products of two make a table in which every row and column has all six, and a b is not b a."""
    found = {
        tuple(example.prompt.split()[:2]): example.answer[1:]
        for example in examples(SyntheticTask.S3, length=2, count=600)
    }
    names = "abcdef"
    assert set(found) == set(itertools.product(names, repeat=2))
    for name in names:
        assert {found[name, other] for other in names} == set(names)
        assert {found[other, name] for other in names} == set(names)
        assert found["a", name] == found[name, "a"] == name
    assert any(found[x, y] != found[y, x] for x, y in found)
    # Longer ones are products from left to right.
    for example in examples(SyntheticTask.S3, length=4):
        product = "a"
        for name in example.prompt.removesuffix(" =").split():
            product = found[product, name]
        assert example.answer == f" {product}"


def test_chance_is_that_of_the_symbols():
    assert chance(SyntheticTask.S3, length=9) == 1 / 6
    assert chance(SyntheticTask.RECALL, length=9) == 1 / 26
    assert chance(SyntheticTask.COPY, length=2) == pytest.approx(26**-2)


def test_a_source_has_the_same_documents_each_time_and_others_for_another_seed():
    source = SyntheticSource(task=SyntheticTask.COPY, num_documents=40, min_length=3, max_length=6)
    documents = list(source.documents())
    assert documents == list(source.documents())
    assert {len(document.text.split()) for document in documents} == {3, 4, 5, 6}
    assert all(document.prompt for document in documents)
    # Held out by name: of two equal examples one may be trained on.
    assert len({document.held_out_key(HeldOutBy.CONTENT) for document in documents}) == 40
    other = dataclasses.replace(source, seed=1)
    assert list(other.documents()) != documents
    assert other.fingerprint() != source.fingerprint() == dataclasses.replace(source).fingerprint()


def test_a_stored_config_finds_the_source():
    source = SyntheticSource(task=SyntheticTask.S3)
    data = DataConfig(sources=(WeightedSource(source=source),))
    assert from_json(DataConfig, to_json(data)) == data


def test_evaluation_has_examples_of_its_own():
    training = SyntheticSource(task=SyntheticTask.COPY, num_documents=500, min_length=6, max_length=6)
    prompts = {document.prompt for document in training.documents()}
    evaluated = evaluation_examples(SyntheticTask.COPY, length=6, count=100)
    assert not prompts & {example.prompt for example in evaluated}
    assert evaluated == evaluation_examples(SyntheticTask.COPY, length=6, count=100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_length": 0}, "a length of recall is 0"),
        ({"max_length": 1000}, "there are 676 keys"),
        ({"min_length": 9, "max_length": 8}, "min_length=9 is above max_length=8"),
        ({"num_documents": 0}, "num_documents must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_settings_without_examples_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SyntheticSource(task=SyntheticTask.RECALL, **settings)
