"""Models whose tables are padded to other numbers of rows: the same model, whoever reads it."""

import dataclasses
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from slmjax.checkpoints.loading import load_model, read_fitted
from slmjax.models.architecture import HeadKind, ModelConfig
from slmjax.models.definition import define
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import parameter_shardings, shapes_with_shardings
from tests.distill.lessons import STUDENT, VOCAB, write_teacher

FREE = dataclasses.replace(STUDENT, head=HeadKind.UNTIED, vocab_multiple=8)  # 61 tokens, 64 rows


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("source") / "model", FREE)


def read(source: Path, config: ModelConfig) -> dict[str, jax.Array]:
    """Its parameters for another model, on a mesh of eight devices."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    params = define(config).params
    like = shapes_with_shardings(params, parameter_shardings(params, mesh))
    _, found, _ = read_fitted(source, config, like, {})
    assert all(leaf.sharding == like[name].sharding for name, leaf in found.items())
    return found


@pytest.mark.parametrize("multiple", [1, 8, 50])
def test_rows_of_padding_are_dropped_and_added(source: Path, multiple: int) -> None:
    config = dataclasses.replace(FREE, vocab_multiple=multiple)
    own = load_model(source).params
    found = read(source, config)
    assert own.keys() == found.keys()
    for name, leaf in found.items():
        if name not in ("embed/table", "head/weight"):
            np.testing.assert_array_equal(leaf, own[name], err_msg=name)
            continue
        assert leaf.shape[0] == config.table_rows == {1: 61, 8: 64, 50: 100}[multiple]
        np.testing.assert_array_equal(leaf[:VOCAB], own[name][:VOCAB], err_msg=name)
        assert multiple == 8 or not np.any(leaf[VOCAB:])


def test_rows_that_take_part_in_the_softmax(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        read(source, dataclasses.replace(FREE, vocab_size=60, vocab_multiple=1))
    assert "1 rows of its tables stand for no token, and are left out" in caplog.text
    with pytest.raises(
        ValueError,
        match=r"a vocabulary of 61 rows, and model.vocab_size is 64: .* Set model.vocab_size to 61",
    ):
        read(source, dataclasses.replace(FREE, vocab_size=64))


def test_another_width_is_refused_as_before(source: Path) -> None:
    with pytest.raises(ValueError, match="these are the weights of another"):
        read(source, dataclasses.replace(FREE, embed_dim=24, vocab_multiple=1))
