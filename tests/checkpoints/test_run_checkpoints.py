"""Checkpoints: exact round trips to any grouping and mesh, and what happens to those that are damaged,
missing or foreign.
"""

import dataclasses
import functools
import json
import logging
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import config as config_io
from slmjax import faults
from slmjax.checkpoints import best_checkpoint
from slmjax.checkpoints.failed_saves import OrbaxTracebacks, reason_of
from slmjax.checkpoints.loading import load_model
from slmjax.checkpoints.manifest import MANIFEST, changed_files, read_manifest
from slmjax.checkpoints.run_checkpoints import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    NoIntactCheckpoint,
)
from slmjax.checkpoints.step_directories import stored_steps
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.formats.presets import preset
from slmjax.models.architecture import LayerGroup
from slmjax.models.definition import define, unstack
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import like_parameters, parameter_shardings
from slmjax.quantization.estimators import LearnedScale
from slmjax.quantization.fake_quantization import define_quantized
from slmjax.quantization.rules import QuantPhase, QuantRule
from slmjax.telemetry.run_directory import RunLog
from tests.checkpoints.small_states import BLOCK, MODEL, REGROUPED, placed, state_at, state_shapes


def assert_equal_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


# Round trips ------------------------------------------------------------------------------------------------
def test_the_newest_checkpoint_comes_back_bit_for_bit(saved, opened):
    checkpointer = opened(saved)
    assert (
        checkpointer.steps() == [1, 2, 3]
        and checkpointer.has(3, "optimizer")
        and not checkpointer.has(3, "ema")
    )
    step, items = checkpointer.restore(placed(state_shapes(MODEL)))
    assert step == 3
    assert_equal_trees(items, state_at(3))
    step, items = checkpointer.restore(placed({"progress": state_shapes(MODEL)["progress"]}), step=1)
    assert step == 1
    assert_equal_trees(items, {"progress": state_at(1)["progress"]})


def test_another_grouping_and_another_mesh_restore_the_same_layers(saved, opened):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    shapes = state_shapes(REGROUPED)
    params = define(REGROUPED).params
    by_rule = {"params": parameter_shardings(params, mesh), "buffers": {}}
    shardings = {
        "model": by_rule,
        "optimizer": like_parameters(shapes["optimizer"], params, mesh),
        "progress": like_parameters(shapes["progress"], params, mesh),
    }
    step, items = opened(saved, model=REGROUPED).restore(placed(shapes, shardings))
    assert step == 3
    query = items["model"]["params"]["segments/1/blocks/0/mixer/query/weight"]
    assert query.shape == (2, 8, 8) and query.addressable_shards[0].data.shape == (2, 2, 4)
    assert (
        items["optimizer"][0]
        .mu["segments/1/blocks/0/mixer/query/weight"]
        .sharding.is_equivalent_to(query.sharding, 3)
    )
    actual, expected = (unstack(model, tree) for model, tree in ((REGROUPED, items), (MODEL, state_at(3))))
    assert_equal_trees(actual, expected)


def test_a_save_from_a_mesh_restores_on_one_device(tmp_path, opened):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    params = state_at(5)["model"]["params"]
    divided = jax.device_put(params, parameter_shardings(params, mesh))
    checkpointer = opened(tmp_path)
    checkpointer.save(5, {"model": {"params": divided, "buffers": {}}})
    _, items = checkpointer.restore(placed({"model": state_shapes(MODEL)["model"]}))
    assert_equal_trees(items["model"]["params"], params)


def test_a_step_may_overwrite_the_state_while_it_is_being_saved(tmp_path, opened):
    checkpointer = opened(tmp_path)
    params = state_at(1)["model"]["params"]
    expected = jax.tree.map(np.array, params)
    train = jax.jit(functools.partial(jax.tree.map, lambda leaf: leaf * 0 - 1), donate_argnums=0)
    checkpointer.save(1, {"model": {"params": params, "buffers": {}}})
    for _ in range(5):
        params = train(params)
    jax.block_until_ready(params)
    _, items = checkpointer.restore(placed({"model": state_shapes(MODEL)["model"]}))
    assert_equal_trees(items["model"]["params"], jax.tree.map(jnp.asarray, expected))


# Damage -----------------------------------------------------------------------------------------------------
def largest_file(directory):
    return max(
        (file for file in directory.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )


def flip_a_bit(step):
    file = largest_file(step / "model")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_a_file_short(step):
    file = largest_file(step / "model")
    file.write_bytes(file.read_bytes()[:-1])


def lose_a_file(step, item="optimizer"):
    largest_file(step / item).unlink()


def copy_a_part(step):
    """As a copy that was interrupted: no manifest yet, and not all of the data."""
    (step / MANIFEST).unlink()
    shutil.rmtree(step / "optimizer")


def lose_data_and_manifest(step):
    (step / MANIFEST).unlink()
    largest_file(step / "model").unlink()


def break_the_manifest(step):
    (step / MANIFEST).write_text((step / MANIFEST).read_text()[:-9])


def lose_the_manifest(step):
    (step / MANIFEST).unlink()


def replace_the_manifest(content, step):
    (step / MANIFEST).write_text(content)


def forget_a_file(step):
    """A manifest of another version or hand, which lists fewer files."""
    content = json.loads((step / MANIFEST).read_text())
    content["files"].popitem()
    (step / MANIFEST).write_text(json.dumps(content))


DAMAGES = [
    flip_a_bit,
    cut_a_file_short,
    lose_a_file,
    copy_a_part,
    break_the_manifest,
    lose_data_and_manifest,
    lose_the_manifest,
    forget_a_file,
]
ODD_MANIFESTS = (
    "{}",
    "[]",
    "null",
    "7",
    '""',
    '{"step": 3}',
    '{"digest": 1}',
    '{"meta/metadata": 5}',
    "[" * 9999,
)


def assert_goes_back_to_2(saved, opened):
    step, items = opened(saved).resume(placed(state_shapes(MODEL)))
    assert step == 2
    assert_equal_trees(items["model"], state_at(2)["model"])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(damage, saved, opened, caplog):
    damage(saved / "3")
    assert_goes_back_to_2(saved, opened)
    assert "checkpoint 3" in caplog.text and "is damaged" in caplog.text
    assert (saved / "3.bad").is_dir() and not (saved / "3").exists()


def test_a_manifest_of_odd_json_is_damage(saved):
    for content in ODD_MANIFESTS:
        replace_the_manifest(content, saved / "3")
        (stored,) = [one for one in stored_steps(saved) if one.step == 3]
        assert stored.problem and not stored.is_foreign, content
        assert str(saved / "3" / MANIFEST) in stored.problem


def test_the_manifest_of_an_older_version_is_read(saved, opened, caplog):
    """It has the digests alone, of all files."""
    manifest = read_manifest(saved / "3")
    replace_the_manifest(json.dumps(manifest.files), saved / "3")
    assert opened(saved).restore(placed(state_shapes(MODEL)))[0] == 3 and not caplog.records
    replace_the_manifest(json.dumps(dict(list(manifest.files.items())[1:])), saved / "3")
    assert_goes_back_to_2(saved, opened)
    assert "does not list" in caplog.text


@pytest.mark.parametrize("name", ["/dev/zero", "../1/meta/metadata", "a\0b"])
def test_a_manifest_names_no_file_outside(name, saved):
    """The first of them never ends, and the last is no name."""
    manifest = read_manifest(saved / "3")
    assert changed_files(saved / "3", manifest) == []
    manifest.files[name] = "0" * 64
    assert changed_files(saved / "3", manifest) == [name]


def test_a_step_damaged_again_is_set_aside_again(saved, opened):
    checkpointer = opened(saved)
    for name in ("3.bad", "3.bad1", "3.bad2"):
        flip_a_bit(saved / "3")
        assert checkpointer.resume(placed({"model": state_shapes(MODEL)["model"]}))[0] == 2
        assert (saved / name / "model").is_dir()
        checkpointer.save(3, state_at(3))
        checkpointer.wait()
    assert checkpointer.restore(placed({"model": state_shapes(MODEL)["model"]}))[0] == 3


def test_reading_changes_nothing(saved, opened, caplog):
    flip_a_bit(saved / "3")
    (saved / "4.saving").mkdir()
    before = sorted(saved.rglob("*"))
    assert opened(saved).restore(placed(state_shapes(MODEL)))[0] == 2
    assert sorted(saved.rglob("*")) == before and "checkpoint 3" in caplog.text


def test_remains_of_killed_saves_are_removed_by_the_run_that_resumes(saved, opened):
    for name in ("4.saving", "4.saving.orbax-checkpoint-tmp", "5.orbax-checkpoint-tmp", "4.diverged.saving"):
        (saved / name).mkdir()
    (saved / ".best.json-0123456789ab.tmp").touch()
    assert opened(saved).resume(placed(state_shapes(MODEL)))[0] == 3
    assert {path.name for path in saved.iterdir()} == {"1", "2", "3"}


def test_a_save_that_is_killed_before_its_manifest_is_no_checkpoint(saved, opened, monkeypatch):
    """The manifest and the name of the directory come last, together."""
    checkpointer = opened(saved)
    monkeypatch.setattr(faults, "_faults", faults.parse("checkpoint.committed:4=full"))
    checkpointer.save(4, state_at(4))
    checkpointer.wait()
    assert [step for step, reason in checkpointer.failures if "injected" in reason] == [4]
    assert checkpointer.steps() == [1, 2, 3] and {path.name for path in saved.iterdir()} == {"1", "2", "3"}
    monkeypatch.setattr(faults, "_faults", faults.parse("checkpoint.verified:5=full"))
    checkpointer.save(5, state_at(5))
    checkpointer.wait()
    assert checkpointer.last_saved == 5 and checkpointer.steps() == [1, 2, 3, 5]


def test_when_nothing_is_left_the_error_lists_what_there_is(saved, opened, tmp_path):
    flip_a_bit(saved / "1")
    lose_the_manifest(saved / "2")
    (saved / "3").rename(saved / "30")
    flip_a_bit(shutil.copytree(saved / "1", saved / "1.bad"))  # flipped back
    (saved / "1.bad" / MANIFEST).write_bytes((saved / "1" / MANIFEST).read_bytes())
    before = sorted(saved.iterdir())
    for read in (opened(saved).restore, opened(saved).resume):
        with pytest.raises(NoIntactCheckpoint, match="no intact checkpoint in") as error:
            read(placed(state_shapes(MODEL)))
        for reason in (
            "1: 1 file(s) missing or changed",
            "2: it has no MANIFEST.json",
            "30: it holds a checkpoint of step 3",
            "1.bad: it is intact: rename it to 1",
        ):
            assert reason in str(error.value)
    assert sorted(saved.iterdir()) == before, "nothing is moved where that does not help"
    with pytest.raises(NoIntactCheckpoint, match="no intact checkpoint in"):
        opened(tmp_path / "nowhere").restore(placed(state_shapes(MODEL)))


def test_a_step_that_was_not_saved_names_those_that_were(saved, opened):
    with pytest.raises(CheckpointError, match="no checkpoint of step 7: it has 1, 2, 3"):
        opened(saved).restore(placed(state_shapes(MODEL)), step=7)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"step": 1}', '{"step": "1", "loss": 2}', '{"step": 1, "loss": [2]}', "[" * 9999],
)
def test_a_damaged_mark_of_the_best_is_named_and_chosen_again(content, saved, opened, caplog):
    mark = saved / "best.json"
    mark.write_text(content)
    checkpointer = opened(saved)
    assert checkpointer.best() is None and checkpointer.best() is None
    assert caplog.text.count(str(mark)) == 1 and "the best checkpoint again by its log" in caplog.text
    with RunLog(saved.parent / "log.jsonl") as log:
        for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
            log.write("eval", step=step, loss=loss)
    best_checkpoint.repair(saved, saved.parent / "log.jsonl")
    assert checkpointer.best() == (2, 2.0) and "of those left, checkpoint 2 is the best" in caplog.text


# Foreign models ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vocab_size": 300},
            (
                r"model params/embed/table is float32\[258, 8\] in the checkpoint and float32\[300, 8\] in "
                r"the "
                r"model"
            ),
        ),
        (
            {"stack": (LayerGroup(pattern=(BLOCK,), repeats=4),)},
            r"params/layers/3/mixer/key/weight is absent in the checkpoint",
        ),
        (
            {"stack": (LayerGroup(pattern=(BLOCK,), repeats=2),)},
            r"params/layers/2/mixer/key/weight is float32.* and absent in the model",
        ),
    ],
    ids=["shape", "more layers", "fewer layers"],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(change, message, saved, opened):
    other = dataclasses.replace(MODEL, **change)
    with pytest.raises(CheckpointError, match=message):
        opened(saved, model=other).restore(placed({"model": state_shapes(other)["model"]}))
    assert not list(saved.glob("*.bad"))  # nothing is wrong with it


def test_another_dtype_is_refused_rather_than_cast(saved, opened):
    like = {
        "model": jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), state_shapes(MODEL)["model"]
        )
    }
    with pytest.raises(CheckpointError, match="is float32.* in the checkpoint and bfloat16"):
        opened(saved).restore(placed(like))


# Saving -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("failing", ["save", "wait_until_finished"], ids=["at once", "in the background"])
def test_a_failed_save_costs_neither_the_run_nor_older_checkpoints(
    failing, saved, opened, caplog, monkeypatch
):
    checkpointer = opened(saved)

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpointer._orbax, failing, no_space)
        checkpointer.save(4, state_at(4))
        checkpointer.wait()
    assert any(
        record.levelno == logging.ERROR and "checkpoint 4 was NOT saved" in record.message
        for record in caplog.records
    )
    assert set(checkpointer.steps()) >= {1, 2, 3} and checkpointer.last_saved is None
    assert [step for step, reason in checkpointer.failures if "No space left" in reason] == [4]
    checkpointer.save(5, state_at(5))
    step, items = checkpointer.restore(placed(state_shapes(MODEL)))
    assert step == 5 and checkpointer.last_saved == 5
    assert_equal_trees(items, state_at(5))
    assert not list(saved.glob("*tmp*"))


def test_a_write_error_of_the_storage_is_a_failed_save(tmp_path, opened, caplog):
    # The directory turns into a file under the checkpointer's feet: the write itself fails, not a stand-in
    # for it.
    directory = tmp_path / "checkpoints"
    directory.write_text("in the way")
    checkpointer = opened(directory)
    checkpointer.save(1, {"model": state_at(1)["model"]})
    checkpointer.wait()
    assert "checkpoint 1 was NOT saved" in caplog.text
    directory.unlink()
    checkpointer.save(2, {"model": state_at(2)["model"]})
    checkpointer.wait()
    assert checkpointer.steps() == [2]


def test_a_disk_that_is_too_full_is_found_before_anything_is_written(saved, opened, monkeypatch):
    checkpointer = opened(saved)
    (saved / "4.saving.orbax-checkpoint-tmp").mkdir()  # of a thread of Orbax, after its save was given up
    usage = shutil.disk_usage(saved)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2000))
    checkpointer.save(5, state_at(5))
    checkpointer.close()
    ((step, reason),) = checkpointer.failures
    assert step == 5 and reason.startswith("No space left on device: 0.0 MB are free, and it needs")
    assert {path.name for path in saved.iterdir()} == {"1", "2", "3"}


def test_the_reason_of_a_failed_save_is_short():
    layers = 'RESOURCE_EXHAUSTED: Error opening "zarr" driver: ' * 9
    assert reason_of(ValueError(f"{layers}No space left on device [os_error_code='28']")) == (
        "No space left on device"
    )
    assert reason_of(FileExistsError(17, "File exists", "runs/a/checkpoints")) == (
        "File exists: runs/a/checkpoints"
    )
    assert reason_of(RuntimeError()) == "RuntimeError"


def test_tracebacks_of_orbax_alone_are_dropped(caplog):
    absl = logging.getLogger("absl")
    quiet = OrbaxTracebacks()

    def log_error(path):
        record = absl.makeRecord(
            "absl", logging.ERROR, path, 1, "failed", (), (ValueError, ValueError(), None)
        )
        absl.handle(record)
        return [record.pathname for record in caplog.records]

    hook = sys.unraisablehook
    quiet.drop()
    assert log_error("site-packages/orbax/checkpoint/futures.py") == []
    assert log_error("site-packages/other.py") == ["site-packages/other.py"]
    quiet.restore()
    assert len(log_error("site-packages/orbax/checkpoint/futures.py")) == 2 and sys.unraisablehook == hook


@pytest.mark.parametrize("settings", [{"every": 0}, {"keep": 0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must be at least 1"):
        CheckpointConfig(**settings)


# Loading ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def saved_run(tmp_path_factory):
    """A run directory with two checkpoints that keep averaged weights."""
    run = tmp_path_factory.mktemp("run")
    (run / "model.json").write_text(json.dumps(config_io.to_json(MODEL)))
    ByteTokenizer().build([]).save(run / "tokenizer")
    checkpointer = Checkpointer(run / "checkpoints", model=MODEL, config=CheckpointConfig())
    for step in (1, 2):
        checkpointer.save(
            step, {"model": state_at(step)["model"], "ema": state_at(10 + step)["model"]["params"]}
        )
    checkpointer.close()
    return run


@pytest.fixture
def run_directory(saved_run, tmp_path):
    return shutil.copytree(saved_run, tmp_path / "run")


def test_load_model_takes_the_averaged_weights_of_the_newest(run_directory):
    loaded = load_model(str(run_directory))
    assert loaded.step == 2 and loaded.config == MODEL and loaded.path == run_directory
    assert_equal_trees(loaded.params, state_at(12)["model"]["params"])
    np.testing.assert_array_equal(loaded.model.embed.table[...], loaded.params["embed/table"])
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("slm")) == "slm"
    assert_equal_trees(load_model(run_directory, step=1).params, state_at(11)["model"]["params"])


def test_load_model_falls_back_to_older_averaged_weights(run_directory, caplog):
    lose_a_file(run_directory / "checkpoints" / "2", item="ema")
    loaded = load_model(run_directory)
    assert loaded.step == 1 and "is damaged" in caplog.text
    assert_equal_trees(loaded.params, state_at(11)["model"]["params"])


def test_load_model_replicates_over_the_current_mesh(run_directory):
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2))):
        loaded = load_model(run_directory)
    assert all(
        leaf.sharding.is_fully_replicated and len(leaf.devices()) == 8 for leaf in loaded.params.values()
    )


def test_load_model_errors_say_what_is_missing(run_directory, tmp_path):
    with pytest.raises(
        ValueError, match="is neither a run directory nor an imported model: it has no model.json"
    ):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no checkpoint of step 9: it has 1, 2"):
        load_model(run_directory, step=9)
    shutil.rmtree(run_directory / "checkpoints")
    with pytest.raises(ValueError, match="no intact checkpoint in"):
        load_model(run_directory)


def test_learned_scales_of_an_older_version_are_read_as_the_positive_ones_that_they_were(tmp_path, opened):
    block = dataclasses.replace(BLOCK, mixer=AttentionConfig(num_heads=2, head_dim=32))
    rule = QuantRule(paths="query", weight=preset("q4_0"), estimator=LearnedScale())
    model = dataclasses.replace(
        MODEL,
        embed_dim=32,
        stack=(LayerGroup(pattern=(block,), repeats=2),),
    )
    checkpointer = opened(tmp_path, model=model)
    shapes = define_quantized(model, (QuantPhase(rules=(rule,)),)).params
    params = {path: jnp.full(leaf.shape, -2.0) for path, leaf in shapes.items()}
    sign = "segments/0/blocks/0/mixer/query/weight/sign"
    before = {path: leaf for path, leaf in params.items() if path != sign}
    for step, saved in ((1, before), (2, params)):
        checkpointer.save(step, {"model": {"params": saved, "buffers": {}}})
    like = placed({"model": {"params": shapes, "buffers": {}}})
    for step, value in ((1, 1.0), (2, -2.0)):
        restored = checkpointer.restore(like, step=step)[1]["model"]["params"]
        np.testing.assert_array_equal(restored[sign], jnp.full(shapes[sign].shape, value))
        assert all(np.all(restored[path] == -2.0) for path in before)
