"""Phases of a run: static changes, such as the step from which weights are quantized, each with programs of
its own.

    setup = at_step(setup, 500)                 # before a step: the programs of its phase
    state = begin(setup, state, batch)          # nothing happens but at the first step of a phase

The state keeps its shape from phase to phase, so that a checkpoint of one is read in another.
"""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from slmjax.data.batch import Batch
from slmjax.models.paths import block_at
from slmjax.quantization.fake_quantization import define_quantized, quantization_of
from slmjax.quantization.quantizer_params import is_activation_quantizer_param, is_quantizer_param
from slmjax.quantization.rules import phase_at
from slmjax.runner.session import Setup
from slmjax.training.optim import make_optimizer, restarted
from slmjax.training.programs import make_programs
from slmjax.training.state import TrainState

log = logging.getLogger(__name__)


def starts_phase(setup: Setup, step: int) -> bool:
    """Whether the training step after `step` is in another phase than the one that `setup` is of."""
    quantization = quantization_of(setup.definition)
    return quantization is not None and phase_at(quantization.phases, step) != quantization.phase


def at_step(setup: Setup, step: int) -> Setup:
    """The setup with the programs of the phase that the training step after `step` is in."""
    if not starts_phase(setup, step):
        return setup
    programs = make_programs(
        setup.experiment, vocab_size=setup.definition.config.known_vocab_size, mesh=setup.mesh, step=step
    )
    return dataclasses.replace(
        setup,
        definition=programs.definition,
        inference=programs.inference,
        train_step=programs.train_step,
        eval_step=programs.eval_step,
        code_sums=programs.code_sums,
        flips=programs.flips,
    )


def begin(setup: Setup, state: TrainState, batch: Batch) -> TrainState:
    """Return the state with which a session or a phase begins; codes that change are counted from here on."""
    state = _begun(setup, state, batch)
    setup.flips.begin(state.trainable, int(state.step))
    return state


def _begun(setup: Setup, state: TrainState, batch: Batch) -> TrainState:
    """The state at the first step of a phase: what is learned beside weights begins as their best scales,
    that of inputs as measured.

    Weights whose format stays keep theirs; inputs are measured anew where the format of any changes.

    Args:
      batch: the placed batch that is trained on next, on which inputs are measured.
    """
    definition = setup.definition
    quantization = quantization_of(definition)
    if quantization is None or quantization.phase is None or quantization.phase.step != int(state.step):
        return state
    phase = quantization.phase
    log.info("step %d: quantization begins, or goes on with other rules", phase.step)
    before = quantization_of(define_quantized(definition.config, quantization.phases, step=phase.step - 1))
    assert before is not None
    params, buffers = (
        (state.trainable, state.frozen)
        if before.input_formats == quantization.input_formats
        else _measured(setup, state, batch)
    )
    if quantization.learned_formats:
        places = jax.tree.map(lambda leaf: leaf.sharding, setup.shapes.trainable)
        initialize = functools.partial(quantization.init_changed, before=before)
        params = jax.jit(initialize, out_shardings=places)(params)
    ema = state.ema
    if ema is not None:  # what is averaged of what only begins now is what it begins as
        ema = {
            path: jnp.copy(params[path]) if is_quantizer_param(path) else leaf for path, leaf in ema.items()
        }
    optimizer = _restarted(setup, state.optimizer, params) if phase.restart_optimizer else state.optimizer
    return dataclasses.replace(state, trainable=params, frozen=buffers, ema=ema, optimizer=optimizer)


def _restarted(setup: Setup, optimizer_state: Any, params: dict[str, Array]) -> Any:
    """The optimizer's state without what it remembers of earlier gradients."""
    experiment = setup.experiment
    optimizer = make_optimizer(experiment.optim, setup.definition.params, total_steps=experiment.run.steps)
    places = jax.tree.map(lambda leaf: leaf.sharding, setup.shapes.optimizer)
    return jax.jit(functools.partial(restarted, optimizer), out_shardings=places)(optimizer_state, params)


def _measured(setup: Setup, state: TrainState, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and buffers with scales of inputs as they should begin for this batch."""
    config = setup.definition.config
    quantization = quantization_of(setup.definition)
    assert quantization is not None
    observed = define_quantized(config, quantization.phases, step=int(state.step), is_calibrating=True)
    params = state.trainable
    buffers = state.frozen
    wanted = {path for path in (*params, *buffers) if is_activation_quantizer_param(path)}
    if not wanted:
        return params, buffers

    def total(some: dict[str, Array], rest: dict[str, Array]) -> Array:
        everything = {**rest, **some}
        model = observed.merge(
            {path: everything[path] for path in params}, {path: everything[path] for path in buffers}
        )
        output = model(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions)
        return jnp.sum(output.hidden.astype(jnp.float32))

    everything = {**params, **buffers}
    some = {path: everything[path] for path in wanted}
    rest = {path: leaf for path, leaf in everything.items() if path not in wanted}
    places = {path: leaf.sharding for path, leaf in some.items()}
    found = jax.jit(jax.grad(total), out_shardings=places)(some, rest)
    found = {
        path: leaf / block_at(config, path).num_loops if path.startswith("segments/") else leaf
        for path, leaf in found.items()
    }
    return {path: found.get(path, leaf) for path, leaf in params.items()}, {
        path: found.get(path, leaf) for path, leaf in buffers.items()
    }
