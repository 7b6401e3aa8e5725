"""Checkpointers, and a directory with three checkpoints."""

import shutil

import pytest

from slmjax.checkpoints.run_checkpoints import CheckpointConfig, Checkpointer
from tests.checkpoints.small_states import MODEL, state_at


@pytest.fixture
def opened():
    """Opens checkpointers and closes them after the test."""
    open_ones = []

    def open_at(directory, *, model=MODEL, keep=3):
        open_ones.append(Checkpointer(directory, model=model, config=CheckpointConfig(keep=keep)))
        return open_ones[-1]

    yield open_at
    for checkpointer in open_ones:
        checkpointer.close()


@pytest.fixture(scope="session")
def three_saved(tmp_path_factory):
    """A directory with checkpoints of steps 1, 2 and 3; to be copied, not changed."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpointer = Checkpointer(directory, model=MODEL, config=CheckpointConfig(keep=3))
    for step in (1, 2, 3):
        checkpointer.save(step, state_at(step))
    checkpointer.close()
    return directory


@pytest.fixture
def saved(three_saved, tmp_path):
    return shutil.copytree(three_saved, tmp_path / "checkpoints")
