"""Which checkpoints stay: the newest, the best, and the last good one; what is foreign is left alone."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.checkpoints import run_checkpoints
from slmjax.checkpoints.run_checkpoints import NoIntactCheckpoint
from slmjax.checkpoints.step_directories import newest_step
from tests.checkpoints.small_states import MODEL, placed, state_at, state_shapes


def test_retention_keeps_the_newest_and_the_best(tmp_path, opened):
    checkpointer = opened(tmp_path, keep=2)
    for step in range(1, 6):
        checkpointer.save(step, {"model": state_at(step)["model"]})
        if step == 2:
            checkpointer.mark_best(2, 1.25)
    checkpointer.wait()
    assert checkpointer.steps() == [2, 4, 5] and checkpointer.best() == (2, 1.25)
    checkpointer.mark_best(5, 1.0)
    checkpointer.mark_best(99, 0.5)  # there is none: it is not noted
    checkpointer.save(6, {"model": state_at(6)["model"]})
    checkpointer.wait()
    assert checkpointer.steps() == [5, 6] and checkpointer.best() == (5, 1.0)


def test_a_save_that_fails_does_not_cost_the_best(tmp_path, opened, monkeypatch):
    checkpointer = opened(tmp_path, keep=1)
    checkpointer.save(1, {"model": state_at(1)["model"]}, best_loss=2.0)
    checkpointer.save(2, {"model": state_at(2)["model"]})
    with monkeypatch.context() as patched:

        def no_space(*_, **__):
            raise OSError(28, "No space left on device")

        patched.setattr(checkpointer._orbax, "save", no_space)
        checkpointer.save(3, {"model": state_at(3)["model"]}, best_loss=1.0)
    checkpointer.save(4, {"model": state_at(4)["model"]})
    checkpointer.wait()
    assert checkpointer.steps() == [1, 4] and checkpointer.best() == (1, 2.0)


# Foreign directories ---------------------------------------------------------------------------------------
def test_a_copy_under_another_name_and_an_empty_directory_are_left_alone(saved, opened, caplog):
    """They are neither restored nor counted, and cost none of the run's own checkpoints."""
    shutil.copytree(saved / "3", saved / "999")
    for name in ("5000", "0999", "\N{SUPERSCRIPT TWO}", "notes"):
        (saved / name).mkdir()
    checkpointer = opened(saved, keep=1)
    like = placed(state_shapes(MODEL))
    assert checkpointer.steps() == [1, 2, 3] and checkpointer.restore(like)[0] == 3
    assert checkpointer.resume(like)[0] == 3
    for step in (4, 5, 6):
        checkpointer.save(step, state_at(step))
    checkpointer.close()
    names = {path.name for path in saved.iterdir()}
    assert names == {"6", "999", "5000", "0999", "\N{SUPERSCRIPT TWO}", "notes"}
    assert caplog.text.count("it holds a checkpoint of step 3") == 1
    assert caplog.text.count("it holds nothing of a checkpoint") == 1


def test_a_step_with_the_name_of_a_foreign_directory_is_saved(saved, opened):
    shutil.copytree(saved / "3", saved / "4")
    checkpointer = opened(saved)
    checkpointer.save(4, state_at(4))
    assert checkpointer.restore(placed(state_shapes(MODEL)))[0] == 4
    assert (saved / "4.bad").is_dir() and checkpointer.last_saved == 4


# Values that are not finite, and divergence -----------------------------------------------------------------
def spoiled(state, value=np.nan):
    """A state with one value of one moment replaced."""
    moments = state["optimizer"][0]
    name = "embed/table"
    mu = {**moments.mu, name: moments.mu[name].at[0, 0].set(value)}
    return {**state, "optimizer": (moments._replace(mu=mu), *state["optimizer"][1:])}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(value, saved, opened, caplog):
    checkpointer = opened(saved)
    checkpointer.save(4, spoiled(state_at(4), value))
    checkpointer.wait()
    ((step, reason),) = checkpointer.failures
    assert step == 4 and reason == "optimizer 0 mu embed/table is not finite"
    assert f"checkpoint 4 was NOT saved: {reason}" in caplog.text
    assert {path.name for path in saved.iterdir()} == {"1", "2", "3"}


def test_a_stored_state_that_is_not_finite_is_not_resumed(saved, opened, caplog, monkeypatch):
    checkpointer = opened(saved)
    with monkeypatch.context() as patched:
        patched.setattr(run_checkpoints, "first_not_finite", lambda items: "")  # as in earlier versions
        checkpointer.save(4, spoiled(state_at(4)))
    assert checkpointer.resume(placed(state_shapes(MODEL)))[0] == 3
    assert "checkpoint 4" in caplog.text and "optimizer 0 mu embed/table is not finite" in caplog.text


def skipping(step, in_a_row):
    state = state_at(step)
    return {**state, "progress": {**state["progress"], "skipped_in_a_row": jnp.int32(in_a_row)}}


def names_in(directory):
    return {path.name for path in directory.iterdir()}


def test_divergence_does_not_cost_the_last_good_checkpoint(tmp_path, opened, caplog):
    """Good at 30; two sessions diverge, of which the first had saved a state that blew up right after."""
    checkpointer = opened(tmp_path, keep=1)
    checkpointer.save(30, skipping(30, 0))
    checkpointer.close()
    like = placed(jax.eval_shape(lambda: skipping(0, 0)))
    checkpointer = opened(tmp_path, keep=1)
    assert checkpointer.resume(like)[0] == 30
    checkpointer.save(40, skipping(40, 0))
    checkpointer.save(45, skipping(45, 5))
    checkpointer.wait()
    assert names_in(tmp_path) == {"30", "40", "45"}
    checkpointer.save(51, skipping(51, 11), diverged=True)
    checkpointer.close()
    assert names_in(tmp_path) == {"30", "51.diverged"} and checkpointer.last_saved == 51

    checkpointer = opened(tmp_path, keep=1)
    assert checkpointer.resume(like)[0] == 30
    for _ in range(2):  # as in a third session with the same settings
        checkpointer.save(52, skipping(52, 22), diverged=True)
    checkpointer.wait()
    assert names_in(tmp_path) == {"30", "52.diverged"}
    assert "no step since checkpoint 30 was finite" in caplog.text
    assert checkpointer.restore(like)[0] == 30 and checkpointer.restore(like, step=52)[0] == 52

    for step in (60, 70):
        checkpointer.save(step, skipping(step, 0))
    checkpointer.wait()
    assert names_in(tmp_path) == {"70", "52.diverged"}, "two good saves prove the run sound"


def test_a_run_that_diverged_before_its_first_checkpoint_can_be_read(tmp_path, opened):
    checkpointer = opened(tmp_path)
    checkpointer.save(5, skipping(5, 4), diverged=True)
    like = placed(jax.eval_shape(lambda: skipping(0, 0)))
    assert checkpointer.restore(like)[0] == 5 and newest_step(tmp_path) == 5
    with pytest.raises(
        NoIntactCheckpoint, match="5.diverged: with this state the run diverged; rename it to 5"
    ):
        opened(tmp_path).resume(like)


def test_a_state_that_turned_out_unsound_is_withdrawn(saved, opened):
    """No run resumes from it; an earlier one that has the name is kept under another."""
    (saved / "3.diverged").mkdir()
    checkpointer = opened(saved)
    checkpointer.withdraw(3)
    assert checkpointer.steps() == [1, 2] and (saved / "3.diverged" / "model").is_dir()
    assert (saved / "3.diverged.bad").is_dir()
    assert checkpointer.resume(placed(state_shapes(MODEL)))[0] == 2
