"""Runs that train in number formats: phases, what is resumed, what opens a checkpoint, teachers beside it."""

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import slmjax
from slmjax.checkpoints.loading import changed_rows, load_model, load_unrounded, load_with_codes
from slmjax.checkpoints.run_checkpoints import CheckpointConfig, Checkpointer
from slmjax.distill.config import DistillConfig, TeacherConfig
from slmjax.formats.coding import decode
from slmjax.formats.presets import preset
from slmjax.formats.spec import Granularity
from slmjax.quantization.estimators import Calibrated, LearnedScale
from slmjax.quantization.rules import QuantConfig, QuantPhase, QuantRule, quant_of
from slmjax.runner.trainer import Result
from slmjax.telemetry.run_directory import read_log
from slmjax.training.experiment import EvalConfig, Experiment, FromModel, FromTeacherLayers
from slmjax.training.objective import ObjectiveConfig
from tests.one_layer import one_layer

TENSOR = dataclasses.replace(preset("int8_g32"), granularity=Granularity.PER_TENSOR, group_size=None)
# In full precision at first; then 8 bits; then 3 bits, and 4 with a sign, both learned, whose inputs have a
# measured scale; the optimizer begins again with them.
INPUT = {"input": TENSOR, "input_estimator": Calibrated()}
PHASES = (
    QuantPhase(rules=(QuantRule(paths=".", weight=preset("q8_0")),)),
    QuantPhase(
        step=2,
        rules=(
            QuantRule(paths="ffn/down", weight=preset("q4_0"), estimator=LearnedScale(), **INPUT),
            QuantRule(paths=".", weight=preset("int3_g32"), **INPUT),
        ),
        restart_optimizer=True,
    ),
)


def train(experiment: Experiment, **how: Any) -> Result:
    return slmjax.train(experiment, console=Console(file=io.StringIO(), width=200), **how)


def base(workplace: Path, directory: Path, *, steps: int = 6, **settings: Any) -> Experiment:
    experiment = one_layer(workplace, directory, steps=steps)
    experiment = dataclasses.replace(
        experiment,
        data=dataclasses.replace(experiment.data, heldout_fraction=0.02),
        checkpoint=CheckpointConfig(every=1, keep=10),
        model=dataclasses.replace(experiment.model, dropout=0.0, embed_dim=32),
        eval=EvalConfig(every=100, overlap=8),
    )
    return dataclasses.replace(experiment, **settings)


@pytest.fixture(scope="module")
def run(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Result]:
    """Six steps through all phases, which begin at steps 2 and 4, with averages of the weights."""
    experiment = base(
        workplace, tmp_path_factory.mktemp("phases"), quant=QuantConfig(phases=PHASES, start_step=2)
    )
    experiment = dataclasses.replace(
        experiment,
        optim=dataclasses.replace(experiment.optim, ema_decay=0.5, scale_lr=1e-2),
        eval=dataclasses.replace(experiment.eval, unrounded=True),
        run=dataclasses.replace(experiment.run, log_every=1, log_flips=True),
    )
    return experiment, train(experiment)


def test_a_checkpoint_opens_in_the_phase_that_made_it(run: tuple[Experiment, Result]):
    distinct = {}
    for step in (2, 4, 6):
        loaded = load_model(run[1].run_dir, step=step)
        distinct[step] = len(
            np.unique(np.asarray(loaded.params["segments/0/blocks/0/ffn/up/weight"][0, :32, 0]))
        )
        encoded = load_with_codes(run[1].run_dir, step=step)[1]
        assert bool(encoded) == (step > 2)
        for path, (numbers, one) in encoded.items():
            name = path.replace("layers/0/", "segments/0/blocks/0/")
            found = loaded.params[name][0] if name != path else loaded.params[name]
            np.testing.assert_array_equal(
                decode(jax.tree.map(jnp.asarray, one), numbers.spec, axis=numbers.axis), found
            )
    assert distinct[2] == 32 and 7 < distinct[4] and distinct[6] <= 7
    scales = load_with_codes(run[1].run_dir)[1]["layers/0/ffn/down/weight"][1].scale
    assert 0.2 < np.mean(scales < 0) < 0.8
    assert load_model(run[1].run_dir).quant_phases[-1].step == 4


def test_checkpoints_tell_codes_of_training_from_others(run: tuple[Experiment, Result]):
    """Of averages, with computed and with learned scales; a checkpoint of before has none."""
    path = run[1].run_dir
    assert not any((Path(path) / "checkpoints" / step / "codes").exists() for step in ("1", "2"))
    for step in (3, 6):
        loaded, coded = load_with_codes(path, step=step)
        changed, rows = changed_rows(loaded, coded) or (-1, 0)
        assert changed == 0 and rows > 100
    changed, _ = changed_rows(loaded, load_with_codes(path, step=5)[1]) or (0, 0)
    assert changed > 0, "another step's"
    assert changed_rows(dataclasses.replace(loaded, step=2), coded) is None


def test_what_is_evaluated_is_what_was_trained(run: tuple[Experiment, Result]):
    experiment, result = run
    found = slmjax.evaluate(
        load_model(result.run_dir), data=experiment.data, overlap=8, batch_size=experiment.data.batch_size
    )
    assert found.loss == pytest.approx(result.loss, rel=1e-6)


def test_a_run_tells_the_loss_before_rounding_and_codes_that_flip(run: tuple[Experiment, Result]):
    experiment, result = run
    log = Path(result.run_dir) / "log.jsonl"
    (last,) = read_log(log, kind="eval")
    before = slmjax.evaluate(
        load_unrounded(result.run_dir), data=experiment.data, overlap=8, batch_size=experiment.data.batch_size
    )
    assert last["unrounded_loss"] == pytest.approx(before.loss, rel=1e-6)
    assert last["unrounded_bits_per_byte"] == pytest.approx(before.bits_per_byte, rel=1e-6)
    assert last["loss"] != pytest.approx(last["unrounded_loss"], rel=1e-4)
    lines = {record["step"]: record for record in read_log(log, kind="train")}
    assert {step: record.get("flipped_since") for step, record in lines.items()} == {
        1: None,
        2: None,
        3: 2,
        4: 3,
        5: 4,
        6: 5,
    }
    assert all(0 < lines[step]["flipped_codes"] < 1 for step in (3, 4, 5, 6))
    with pytest.raises(
        ValueError, match="has no weights before rounding: name a run that was trained in number formats"
    ):
        load_unrounded(result.run_dir, step=2)


def test_the_optimizer_begins_again_with_a_phase(run: tuple[Experiment, Result]):
    """A parameter's counter counts updates of the phase, that of the schedule those of the run."""
    checkpointer = Checkpointer(
        Path(run[1].run_dir) / "checkpoints",
        model=load_model(run[1].run_dir).config,
        config=CheckpointConfig(),
    )
    one = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    found = {}
    for step in (4, 6):
        counters = checkpointer.read_some(
            step, "optimizer", {"1/final_norm/scale/0/count": one, "2/count": one}
        )
        assert counters is not None
        found[step] = [int(counters[name]) for name in ("1/final_norm/scale/0/count", "2/count")]
    checkpointer.close()
    assert found == {4: [4, 4], 6: [2, 6]}


def test_scales_of_inputs_were_measured(run: tuple[Experiment, Result]):
    loaded = load_model(run[1].run_dir)
    measured = {
        path: float(np.asarray(leaf).reshape(-1)[0])
        for path, leaf in loaded.buffers.items()
        if path.endswith("_quantizer/log_scale")
    }
    assert (
        len(measured) == 8
        and len(set(measured.values())) >= 5
        and all(-20 < value < 3 and value != 0 for value in measured.values())
    )


@pytest.mark.parametrize("step", [2, *(pytest.param(step, marks=pytest.mark.nightly) for step in (3, 4))])
@pytest.mark.composes("quantization", "resume")
def test_resumed_bit_for_bit(run: tuple[Experiment, Result], tmp_path: Path, step: int):
    """From before a phase, within one and at the end of one."""
    experiment, result = run
    again = Path(shutil.copytree(result.run_dir, tmp_path / "again"))
    for later in range(step + 1, 7):
        shutil.rmtree(again / "checkpoints" / str(later))
    (again / "result.json").unlink()
    # What a run tells is no part of it: it may be left out when it goes on.
    experiment = dataclasses.replace(
        experiment,
        run=dataclasses.replace(experiment.run, directory=str(tmp_path), log_flips=False),
        eval=dataclasses.replace(experiment.eval, unrounded=False),
    )
    resumed = train(experiment, resume=again)
    assert resumed.loss == result.loss
    first, second = (load_model(path).params for path in (result.run_dir, resumed.run_dir))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    losses = [
        {record["step"]: record["loss"] for record in read_log(Path(path) / "log.jsonl", kind="train")}
        for path in (result.run_dir, again)
    ]
    assert losses[0] == losses[1]


def test_a_resumed_run_keeps_its_formats(run: tuple[Experiment, Result]):
    other = dataclasses.replace(run[0], quant=quant_of("q4_0"))
    with pytest.raises(
        ValueError, match="has another quant, which a resumed run keeps: begin a new run, with --init-from"
    ):
        train(other, resume=run[1].run_dir)


@pytest.mark.composes("accumulation", "distillation", "quantization")
def test_it_begins_from_a_model_and_learns_from_it(
    run: tuple[Experiment, Result], workplace: Path, tmp_path: Path
):
    """Distillation from the model itself, with 8-bit inputs and microbatches; the source is itself
    quantized.
    """
    experiment, source = run
    teacher = DistillConfig(teachers=(TeacherConfig(path=source.run_dir),))
    data = dataclasses.replace(experiment.data, batch_size=16)
    student = base(
        workplace,
        tmp_path,
        steps=2,
        data=data,
        init=FromModel(path=source.run_dir),
        tokenizer=experiment.tokenizer,
        quant=quant_of("q4_0+q8_0"),
        objective=ObjectiveConfig(distill=teacher),
        optim=dataclasses.replace(experiment.optim, accumulation_steps=2, ema_decay=None),
    )
    result = train(student)
    (first, _) = read_log(Path(result.run_dir) / "log.jsonl", kind="train")
    assert 0 < first["divergence"] < 0.5 and np.isfinite(result.loss)
    (evaluated,) = read_log(Path(result.run_dir) / "log.jsonl", kind="eval")
    assert evaluated["teacher_kl"] > 0
    own = load_model(source.run_dir)
    assert evaluated["teacher_bits_per_byte"] == pytest.approx(
        slmjax.evaluate(own, data=student.data, overlap=8, batch_size=student.data.batch_size).bits_per_byte,
        rel=1e-5,
    )


def test_it_begins_as_layers_of_a_teacher(run: tuple[Experiment, Result], workplace: Path, tmp_path: Path):
    student = base(
        workplace,
        tmp_path,
        steps=1,
        init=FromTeacherLayers(path=run[1].run_dir),
        tokenizer=run[0].tokenizer,
        quant=quant_of("int3_g32"),
    )
    loaded = load_model(train(student).run_dir)
    assert len(np.unique(np.asarray(loaded.params["embed/table"][0]))) <= 7
