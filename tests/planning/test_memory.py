"""slmjax.planning.memory: what a step needs, what would need less, and how a run ends that had too little."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from rich.console import Console

import slmjax
from slmjax import cli
from slmjax.data.batch import empty_batch
from slmjax.models.architecture import Precision, Remat
from slmjax.parallel.batches import place_batch
from slmjax.parallel.mesh import make_mesh
from slmjax.planning import memory
from slmjax.planning.memory import Change, StepMemory
from slmjax.runner import out_of_memory, session
from slmjax.runner.setup import Setup
from slmjax.telemetry.run_directory import read_log
from slmjax.training.experiment import Experiment
from slmjax.training.optim import make_optimizer
from slmjax.training.programs import make_programs
from slmjax.training.state import init_state
from tests.one_layer import one_layer

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 258  # of the byte tokenizer
TWICE = Change(settings={"optim.accumulation_steps": 2})


@pytest.fixture
def experiment(workplace: Path, tmp_path: Path) -> Experiment:
    """64 rows, so that activations are most of what a step needs."""
    found = one_layer(workplace, tmp_path, steps=6)
    return dataclasses.replace(found, data=dataclasses.replace(found.data, batch_size=64))


def step_of(total: int) -> StepMemory:
    return StepMemory(parameters=10**8, optimizer=2 * 10**8, average=0, temporary=total - 3 * 10**8)


def allocated_bytes(experiment: Experiment, mesh: jax.sharding.Mesh) -> int:
    """Of the step that training compiles: for a state and a batch that are there."""
    programs = make_programs(experiment, vocab_size=VOCAB_SIZE, mesh=mesh)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(
            experiment.optim, programs.definition.params, total_steps=experiment.run.steps
        )
        state = init_state(programs.definition, optimizer, shapes=programs.shapes, seed=0)
        batch = place_batch(empty_batch(experiment.data.batch_size, experiment.data.sequence_length), mesh)
        found = programs.train_step.lower(state, batch).compile().memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )


# What a step needs ------------------------------------------------------------------------------------------
def test_promises_are_what_the_compiler_says(experiment: Experiment) -> None:
    mesh = make_mesh(experiment.mesh, devices=jax.devices()[:1])
    needed = allocated_bytes(experiment, mesh)
    halved = allocated_bytes(TWICE.applied(experiment), mesh)
    found = memory.advise(experiment, vocab_size=VOCAB_SIZE, mesh=mesh, changes=[TWICE])
    assert isinstance(found.needed, StepMemory) and found.needed.total == needed
    ((change, promised),) = found.helping
    assert change is TWICE and promised.total == halved < 0.8 * needed
    assert found.saved(promised) == needed - halved
    num_params = sum(
        leaf.size
        for leaf in make_programs(experiment, vocab_size=VOCAB_SIZE, mesh=mesh).definition.params.values()
    )
    assert (
        found.needed.parameters == found.needed.average == 4 * num_params
    )  # float32, and no buffers in this layer
    assert 8 * num_params <= found.needed.optimizer < 8 * num_params + 100  # two moments, and counters


def test_parameters_are_divided_where_the_mesh_divides_them(experiment: Experiment) -> None:
    """The change is the one that the advice names on 8 devices, and what it saves is there."""
    assert jax.device_count() == 8
    mesh = make_mesh(experiment.mesh)
    (change,) = (
        one
        for one in memory.training_changes(experiment, mesh)
        if one.options == "--mesh.data 1 --mesh.fsdp 8"
    )
    found = memory.advise(experiment, vocab_size=VOCAB_SIZE, mesh=mesh, changes=[change])
    assert isinstance(found.needed, StepMemory)
    ((_, divided),) = found.helping
    assert divided.parameters < found.needed.parameters / 6 and divided.optimizer < found.needed.optimizer / 6
    assert "--mesh.data 1 --mesh.fsdp 8" in found.text()


def test_an_evaluation_keeps_the_state_beside_it(experiment: Experiment) -> None:
    mesh = make_mesh(experiment.mesh, devices=jax.devices()[:1])
    changes = memory.evaluation_changes(experiment, mesh)
    assert [change.options for change in changes] == ["--eval.batch-size 32", "--eval.batch-size 1"]
    found = memory.advise(
        experiment, vocab_size=VOCAB_SIZE, mesh=mesh, measure=memory.evaluation_memory, changes=changes[:1]
    )
    assert isinstance(found.needed, StepMemory)
    ((_, halved),) = found.helping
    assert halved.temporary < 0.7 * found.needed.temporary and halved.optimizer == found.needed.optimizer > 0


# What would need less ---------------------------------------------------------------------------------------
def test_changes_fit_the_experiment(experiment: Experiment) -> None:
    mesh = make_mesh(experiment.mesh)
    options = [change.options for change in memory.training_changes(experiment, mesh)]
    assert options == [
        "--optim.accumulation-steps 2",
        "--model.remat full",
        "--optim.accumulation-steps 8 --model.remat full",
        "--optim.accumulation-steps 4",
        "--optim.accumulation-steps 8",
        "--mesh.data 1 --mesh.fsdp 8",
        "--mesh.data 4 --mesh.tensor 2",
        "--data.batch-size 32",
        "--model.precision bfloat16",
        "--data.sequence-length 24",
        "--model.remat dots",
        "--optim.ema-decay None",
        "--objective.chunk-size 256",
    ]
    resumed = [change.options for change in memory.training_changes(experiment, mesh, is_resumed=True)]
    assert resumed == [option for option in options if "--model" not in option and "ema" not in option], (
        "a resumed run keeps its model"
    )

    frugal = {
        "model.remat": Remat.FULL,
        "model.precision": Precision.BFLOAT16,
        "optim.accumulation_steps": 64,
        "objective.chunk_size": 64,
    }
    tight = Change(settings=frugal).applied(experiment)
    alone = make_mesh(experiment.mesh, devices=jax.devices()[:1])
    left = ["--data.batch-size 32", "--data.sequence-length 24", "--optim.ema-decay None"]
    assert [change.options for change in memory.training_changes(tight, alone)] == left


def test_options_are_those_of_the_command_line(experiment: Experiment) -> None:
    from slmjax.cli.options import parse

    for change in memory.training_changes(experiment, make_mesh(experiment.mesh)):
        assert parse(
            Experiment, change.options.split(), default=experiment, command="train", description=None
        ) == change.applied(experiment)


def test_a_table_tells_the_most_saving_first(experiment: Experiment) -> None:
    """What does not fit the experiment is left out; what the compiler refuses is told apart; what is not
    tried is named.
    """
    changes = [
        Change(settings={"data.sequence_length": 24}, price="shorter context"),
        Change(settings={"optim.accumulation_steps": 3}),  # does not divide 64 rows
        Change(settings={"model.remat": Remat.FULL}),
        Change(settings={"objective.chunk_size": 256}),
        Change(settings={"data.batch_size": 32}),
    ]

    def measure(experiment: Experiment, **_: object) -> StepMemory:
        if experiment.data.batch_size == 32:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 16G hbm.\nmore")
        if experiment.data.sequence_length == 24:
            return step_of(5_130_000_000)
        return step_of(870_000_000 if experiment.model.remat is Remat.FULL else 8_000_000_000)

    mesh = make_mesh(experiment.mesh, devices=jax.devices()[:1])
    found = memory.advise(experiment, vocab_size=VOCAB_SIZE, mesh=mesh, measure=measure, changes=changes)
    assert found.text(available=5_000_000_000).splitlines() == [
        (
            "Each device needs 8.00 GB (parameters 100 MB, optimizer 200 MB, activations, gradients and the "
            "rest "
            "7.70 GB), and has 5.00 GB"
        ),
        "Options to add, compiled one by one:",
        "  --model.remat full          needs 870 MB    7.13 GB less   fits",
        "  --data.sequence-length 24   needs 5.13 GB   2.87 GB less   too large   shorter context",
        "Compiled, of no help: --objective.chunk-size 256",
        "Too large as well: --data.batch-size 32 (RESOURCE_EXHAUSTED: Used 20G of 16G hbm.)",
    ]
    hurried = memory.advise(
        experiment, vocab_size=VOCAB_SIZE, mesh=mesh, measure=measure, changes=changes, seconds=0.0
    )
    assert hurried.untried == tuple(changes) and not hurried.helping
    assert (
        "Not tried, for lack of time: --data.sequence-length 24; --optim.accumulation-steps 3; "
        in hurried.text()
    )


def test_a_step_that_does_not_compile_has_advice_all_the_same(experiment: Experiment) -> None:
    def measure(experiment: Experiment, **_: object) -> StepMemory:
        if experiment.optim.accumulation_steps == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 16G hbm.")
        return step_of(10**9)

    mesh = make_mesh(experiment.mesh, devices=jax.devices()[:1])
    found = memory.advise(experiment, vocab_size=VOCAB_SIZE, mesh=mesh, measure=measure, changes=[TWICE])
    assert found.text().splitlines() == [
        "Each device needs more than there is: RESOURCE_EXHAUSTED: Used 20G of 16G hbm.",
        "Options to add, compiled one by one:",
        "  --optim.accumulation-steps 2   needs 1.00 GB",
    ]
    assert found.record()["changes"] == [
        {"options": "--optim.accumulation-steps 2", "total": 10**9, "saved": None}
    ]


@pytest.mark.parametrize(
    ("size", "said"), [(999_960_000, "1,000 MB"), (12_345_678_901, "12.3 GB"), (1500, "1.50 kB")]
)
def test_sizes_for_people(size: int, said: str) -> None:
    assert memory.size_text(size) == said


# The end of a run -------------------------------------------------------------------------------------------
def exhausted(*_: object, **__: object) -> None:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123456 bytes.\n[...]")


@pytest.fixture
def too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third step finds no memory; of all that could be tried, what divides the parameters is."""
    prepared = session.set_up
    divided = Change(settings={"mesh.data": 1, "mesh.fsdp": 8})

    def set_up(*arguments, **options):
        setup = prepared(*arguments, **options)
        train_step = setup.programs.train_step

        def third_step_fails(state, batch, teacher_outputs):
            return (exhausted if state.step >= 2 else train_step)(state, batch, teacher_outputs)

        programs = dataclasses.replace(setup.programs, train_step=third_step_fails)
        return dataclasses.replace(setup, programs=programs)

    monkeypatch.setattr(session, "set_up", set_up)
    monkeypatch.setattr(out_of_memory, "training_changes", lambda *_, **__: [divided])


def test_a_run_that_had_too_little_says_what_needs_less(
    workplace: Path,
    tmp_path: Path,
    too_little: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    experiment = one_layer(workplace, tmp_path, steps=6)
    experiment = dataclasses.replace(
        experiment, checkpoint=dataclasses.replace(experiment.checkpoint, every=1)
    )
    monkeypatch.setattr("slmjax.training.recipes.load_experiment", lambda name: experiment)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "nano"])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and "Traceback" not in said.err
    message, needed, heading, line, *_ = said.err.splitlines()
    assert message == (
        "error: out of memory in training, after step 2 (RESOURCE_EXHAUSTED: Out of memory allocating "
        "123456 bytes.)"
    )
    assert needed.startswith("Each device needs ") and "parameters" in needed
    assert heading == "Options to add, compiled one by one:"
    assert line.split()[:5] == ["--mesh.data", "1", "--mesh.fsdp", "8", "needs"] and line.endswith(" less")
    assert "out of memory in training: compiling what would need less" in said.out

    (run_dir,) = (tmp_path / "runs").iterdir()
    (record,) = read_log(run_dir / "log.jsonl", kind="out_of_memory")
    assert (record["step"], record["doing"], record["available"]) == (2, "training", None)
    (change,) = record["changes"]
    assert (
        change["options"] == "--mesh.data 1 --mesh.fsdp 8"
        and change["saved"] == record["needed"]["total"] - change["total"] > 0
    )
    assert slmjax.load_model(run_dir).step == 2, "what was saved is lost"


@pytest.mark.parametrize("place", ["evaluation", "making the first state"])
def test_it_is_said_where_memory_ran_out(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    asked = []

    def advise(experiment: Experiment, *, measure: object, **_: object) -> memory.Advice:
        asked.append(measure)
        return memory.Advice(
            needed=step_of(10**9),
            helping=((TWICE, step_of(5 * 10**8)),),
            useless=(),
            too_large=(),
            untried=(),
        )

    monkeypatch.setattr(out_of_memory, "advise", advise)
    if place == "evaluation":
        monkeypatch.setattr(Setup, "evaluate", exhausted)
    else:
        monkeypatch.setattr(session, "fresh_state", exhausted)
    with pytest.raises(
        memory.OutOfMemory,
        match=f"out of memory in {place}, after step .*\n.*\n.*\n  --optim.accumulation-steps 2 ",
    ):
        slmjax.train(one_layer(workplace, tmp_path, steps=2), console=Console(file=io.StringIO()))
    assert asked == [memory.evaluation_memory if place == "evaluation" else memory.step_memory]


def test_another_error_stays_what_it_is(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Setup, "evaluate", fail)
    with pytest.raises(RuntimeError, match="^a bug$"):
        slmjax.train(one_layer(workplace, tmp_path, steps=2), console=Console(file=io.StringIO()))


# For hardware that is not there -----------------------------------------------------------------------------
ON_A_TPU = """
import dataclasses, json, sys
from slmjax import startup
startup.compile_for_tpu()
from jax.experimental import topologies
import slmjax
from slmjax.parallel.mesh import make_mesh
from slmjax.planning import memory
experiment = slmjax.load_experiment("tiny.py")
(group,) = experiment.model.stack
group = dataclasses.replace(group, pattern=group.pattern[:1], repeats=1)
model = dataclasses.replace(experiment.model, stack=(group,))
data = dataclasses.replace(experiment.data, batch_size=2**21)
experiment = dataclasses.replace(experiment, model=model, data=data)
devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
mesh = make_mesh(experiment.mesh, devices=devices)
change = memory.Change(settings={"data.batch_size": 8})
found = memory.advise(experiment, vocab_size=258, mesh=mesh, changes=[change])
print(json.dumps([found.record(), found.text()]))
"""


@pytest.mark.usefixtures("libtpu")
def test_a_tpu_that_is_not_there_has_too_little(workplace: Path, user_environment: dict[str, str]) -> None:
    """The compiler's own refusal is what is told of the step; and nothing is said beside."""
    done = subprocess.run(
        [sys.executable, "-c", ON_A_TPU],
        cwd=workplace,
        env=user_environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    record, text = json.loads(done.stdout)
    assert "RESOURCE_EXHAUSTED" in record["needed"] and record["needed"] in text
    (change,) = record["changes"]
    assert change["options"] == "--data.batch-size 8" and 0 < change["total"] < 2**34
