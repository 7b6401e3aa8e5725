"""The state that a run starts from: fresh, from a model, from layers of a teacher, or restored from a
checkpoint.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from slmjax.checkpoints.loading import read_config, read_fitted
from slmjax.checkpoints.run_checkpoints import Checkpointer
from slmjax.data.tokenizers import Tokenizer
from slmjax.distill import layers
from slmjax.models.definition import define
from slmjax.parallel.processes import process_zero_first
from slmjax.runner.resume import check_best
from slmjax.runner.session import Setup, log
from slmjax.training.experiment import FromTeacherLayers
from slmjax.training.optim import make_optimizer
from slmjax.training.state import TrainState, init_state


# The first state --------------------------------------------------------------------------------------------
def fresh_state(setup: Setup) -> TrainState:
    """The state before the first step: fresh parameters, or those of another model."""
    experiment = setup.experiment
    optimizer = make_optimizer(experiment.optim, setup.definition.params, total_steps=experiment.run.steps)
    state = init_state(
        setup.definition,
        optimizer,
        shapes=setup.shapes,
        seed=experiment.run.seed,
        objective=experiment.objective,
    )
    init = experiment.init
    if (source := init.source()) is None:
        return state
    params, buffers = (
        _layers_of(init, state, setup) if isinstance(init, FromTeacherLayers) else _model_of(source, setup)
    )
    ema = None if state.ema is None else jax.tree.map(lambda leaf: leaf.copy(), params)
    return dataclasses.replace(state, trainable=params, frozen=buffers, ema=ema)


def _model_of(source: Path, setup: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
    """Another run's parameters (averaged, where it kept averages) and buffers, placed as this run's; of a
    quantized run those it trains.
    """
    if _tokenizer_at(source).hash != setup.prepared.tokenizer.hash:
        raise ValueError(
            f"init.path={source} was trained with another tokenizer, so its parameters mean nothing here: "
            "give the experiment "
            f"FileTokenizer(path='{source / 'tokenizer'}'), as `slmjax train --init-from {source}` does"
        )
    definition = setup.definition
    shapes = setup.shapes
    if not definition.transforms:
        return read_fitted(source, definition.config, shapes.trainable, shapes.frozen)[1:]
    plain = define(definition.config)
    wanted = (
        {path: shapes.trainable[path] for path in plain.params},
        {path: shapes.frozen[path] for path in plain.buffers},
    )
    _, params, buffers = read_fitted(source, definition.config, *wanted)
    places = jax.tree.map(lambda leaf: leaf.sharding, (shapes.trainable, shapes.frozen))
    return jax.jit(
        lambda *trees: (definition.with_own_params(trees[0]), definition.with_missing_buffers(trees[1])),
        out_shardings=places,
    )(params, buffers)


def _tokenizer_at(source: Path) -> Tokenizer:
    """The tokenizer of the model that a run starts from."""
    read_config(source)  # or an error that says what to name
    if not (source / "tokenizer").is_dir():
        raise ValueError(f"init.path={source} has no tokenizer: import the model again with --tokenizer FILE")
    return Tokenizer.load(source / "tokenizer")


def _layers_of(
    init: FromTeacherLayers, state: TrainState, setup: Setup
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and buffers that are cut out of a teacher's, placed as this run's."""
    path = Path(init.path)
    student = setup.definition.config
    tokenizer = _tokenizer_at(path)
    teacher = read_config(path)
    rows = layers.shared_rows(
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
        definition=setup.definition,
        chosen=chosen,
        fresh=(state.trainable, state.frozen),
        num_rows=rows,
        mesh=setup.mesh,
    )


def restored_state(setup: Setup, checkpointer: Checkpointer) -> TrainState:
    """The state of a run's newest intact checkpoint; the first state where it was killed before its first
    checkpoint.

    Raises:
      CheckpointError: there is none that is intact.
    """
    if not checkpointer.steps() and not any(checkpointer.directory.glob("*.bad*")):
        log.warning("%s has no checkpoint yet: beginning at step 0", checkpointer.directory)
        return fresh_state(setup)
    process_zero_first(lambda: check_best(setup, checkpointer))  # it may change what the others read
    return TrainState.from_items(checkpointer.restore(setup.shapes.items())[1])
