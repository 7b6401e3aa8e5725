"""The first state of a session: fresh, from a model, from layers of a teacher, or from a checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from slmjax.checkpoints.loading import read_config, read_fitted
from slmjax.checkpoints.run_checkpoints import Checkpointer, NoIntactCheckpoint
from slmjax.checkpoints.step_directories import remains
from slmjax.data.tokenizers import Tokenizer
from slmjax.distill import layers
from slmjax.models.definition import define
from slmjax.parallel.processes import process_zero_first
from slmjax.runner.resume import check_best, steps_saved
from slmjax.runner.setup import Setup, log
from slmjax.runner.token_count import TokenCount, read_count
from slmjax.telemetry.run_directory import RunDirectory
from slmjax.training.experiment import FromTeacherLayers
from slmjax.training.state import TrainState


def fresh_state(setup: Setup) -> TrainState:
    """Return the state before the first step: fresh parameters, or those of another model."""
    experiment = setup.experiment
    state = setup.programs.init(experiment.run.seed)
    init = experiment.init
    if (source := init.source()) is None:
        return state
    # Only parameters and buffers come from elsewhere. Moments and counters are those of a fresh run.
    if isinstance(init, FromTeacherLayers):
        params, buffers = _layers_of(init, state, setup)
    else:
        params, buffers = _model_of(source, setup)
    # A copy: the state is donated, and one buffer must not be donated twice.
    ema = None if state.ema is None else jax.tree.map(lambda leaf: leaf.copy(), params)
    return dataclasses.replace(state, params=params, buffers=buffers, ema=ema)


def _model_of(source: Path, setup: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return parameters and buffers of another run or an imported model, with the shardings of this run.

    Of a run with averages they are the averages; of a quantized run the parameters before rounding.
    """
    if _tokenizer_at(source).hash != setup.prepared.tokenizer.hash:
        raise ValueError(
            f"init.path={source} was trained with another tokenizer, so its parameters mean nothing here: "
            f"give the experiment FileTokenizer(path='{source / 'tokenizer'}'), as `slmjax train --init-from "
            f"{source}` does"
        )
    definition = setup.programs.definition
    shapes = setup.programs.shapes
    # Read into this run's shards, so that no process needs memory for the whole model.
    if not definition.transforms:
        return read_fitted(source, definition.config, shapes.params, shapes.buffers)[1:]
    # The model has no quantizers of this run's: they are added as they begin.
    plain = define(definition.config)
    _, params, buffers = read_fitted(
        source,
        definition.config,
        {path: shapes.params[path] for path in plain.params},
        {path: shapes.buffers[path] for path in plain.buffers},
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (shapes.params, shapes.buffers))
    return jax.jit(
        lambda *trees: (definition.with_own_params(trees[0]), definition.with_missing_buffers(trees[1])),
        out_shardings=shardings,
    )(params, buffers)


def _tokenizer_at(source: Path) -> Tokenizer:
    """Return the tokenizer of the model that a run starts from."""
    read_config(source)  # raises an error that names what is missing
    if not (source / "tokenizer").is_dir():
        raise ValueError(f"init.path={source} has no tokenizer: import the model again with --tokenizer FILE")
    return Tokenizer.load(source / "tokenizer")


def _layers_of(
    init: FromTeacherLayers, state: TrainState, setup: Setup
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return parameters and buffers cut out of a teacher's, with the shardings of this run."""
    path = Path(init.path)
    student = setup.programs.definition.config
    tokenizer = _tokenizer_at(path)
    teacher = read_config(path)
    # Of the tables of tokens only those rows are taken that mean the same in both.
    num_rows = layers.shared_rows(
        tokenizer,
        setup.prepared.tokenizer,
        num_rows=min(teacher.known_vocab_size, student.known_vocab_size),
        path=path,
    )
    chosen = layers.chosen_layers(
        num_teacher=teacher.num_layers, num_student=student.num_layers, layers=init.layers, every=init.every
    )
    return layers.student_parameters(
        path,
        definition=setup.programs.definition,
        chosen=chosen,
        fresh=(state.params, state.buffers),
        num_rows=num_rows,
        mesh=setup.mesh,
    )


def restored_state(
    setup: Setup, checkpointer: Checkpointer, *, restart: bool = False
) -> tuple[TrainState, TokenCount]:
    """Return the state and the count of trained targets of a run's newest intact checkpoint.

    A run that was killed before its first checkpoint begins again at step 0.

    Args:
      restart: begin again at step 0 too where checkpoints are gone or none is intact.

    Raises:
      NoIntactCheckpoint: the run had checkpoints, and none is intact; not with `restart`.
    """
    # All processes must restore the same step, so the first one repairs the directory before the others look.
    process_zero_first(lambda: check_best(setup, checkpointer))
    try:
        if checkpointer.is_empty():
            _check_nothing_is_lost(setup, checkpointer)
        else:
            _, items = checkpointer.resume(setup.item_shapes())
            return TrainState.from_items(items), read_count(items["progress"]["tokens"])
    except NoIntactCheckpoint as error:
        if not restart:
            raise NoIntactCheckpoint(
                f"{error}. To begin again at step 0, add --restart (from Python: restart=True)"
            ) from error
        log.warning("%s", error)
    log.warning("%s has no checkpoint to resume from: beginning at step 0", checkpointer.directory)
    return fresh_state(setup), TokenCount(0)


def _check_nothing_is_lost(setup: Setup, checkpointer: Checkpointer) -> None:
    """Refuse a run that has no checkpoint although it had some.

    Raises:
      NoIntactCheckpoint: its log or its result shows that it had.
    """
    run = RunDirectory(checkpointer.directory.parent)
    every = setup.experiment.checkpoint.every
    # Training continues while a save is written: a run that was killed then may be far beyond that step.
    if any(int(path.name.partition(".")[0]) <= every for path in remains(checkpointer.directory)):
        return
    if step := steps_saved(run, every=every):
        raise NoIntactCheckpoint(
            f"{checkpointer.directory} has no checkpoint, although the run was at step {step}: restore the "
            "directory from a copy"
        )
