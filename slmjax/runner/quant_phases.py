"""Quantization phases of a run: static changes, such as the step from which weights are quantized.

    setup = setup_of_phase(setup, 500)              # before a step: the programs of its phase
    state = begin_phase(setup, state, batch)        # calibrates quantizers at the first step of a phase

Each phase has programs of its own. The state keeps its shape from phase to phase, so that a checkpoint of one
is read in another.
"""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from slmjax.data.batch import Batch
from slmjax.models.paths import num_uses
from slmjax.quantization.fake_quantization import define_quantized, phase_of, quantization_of
from slmjax.quantization.quantizer_params import is_activation_quantizer_param, is_quantizer_param
from slmjax.quantization.rules import phase_at
from slmjax.runner.setup import Setup
from slmjax.training import multi_token
from slmjax.training.optim import restarted
from slmjax.training.programs import make_programs
from slmjax.training.state import TrainState

log = logging.getLogger(__name__)


def starts_phase(setup: Setup, step: int) -> bool:
    """Return whether the training step after `step` is in another phase than the setup's programs."""
    quantization = quantization_of(setup.programs.definition)
    return quantization is not None and phase_at(quantization.phases, step) != quantization.phase


def setup_of_phase(setup: Setup, step: int) -> Setup:
    """Return the setup with the programs of the phase that the training step after `step` is in."""
    if not starts_phase(setup, step):
        return setup
    # Phases are static: a compiled program has fixed formats, so a new phase is a new program.
    vocab_size = setup.programs.definition.config.known_vocab_size
    programs = make_programs(setup.experiment, vocab_size=vocab_size, mesh=setup.mesh, step=step)
    return dataclasses.replace(setup, programs=programs)


def begin_phase(setup: Setup, state: TrainState, batch: Batch) -> TrainState:
    """Return the state with which a session or a phase begins; changes of codes are counted from here on.

    Args:
      batch: the placed batch of the next step, on which activation quantizers are calibrated.
    """
    phase = phase_of(setup.programs.definition)
    # A session that resumes within a phase has its quantizers in the checkpoint, and must not calibrate
    # again: the run would no longer be bitwise the uninterrupted one.
    if phase is not None and phase.step == int(state.step):
        log.info("step %d: a quantization phase begins", phase.step)
        state = _with_new_quantizers(setup, state, batch)
        if phase.restart_optimizer:
            state = dataclasses.replace(state, optimizer=_restarted_optimizer(setup, state))
    setup.programs.flips.begin(state.params, int(state.step))
    return state


def _with_new_quantizers(setup: Setup, state: TrainState, batch: Batch) -> TrainState:
    """Return the state with the parameters of this phase's quantizers as they begin.

    Those of weights begin as the best scales, those of activations as calibrated. Weights whose format stays
    keep theirs; activations are calibrated again where the format of any changes.
    """
    definition = setup.programs.definition
    quantization = quantization_of(definition)
    assert quantization is not None
    step_before = int(state.step) - 1
    before = quantization_of(define_quantized(definition.config, quantization.phases, step=step_before))
    assert before is not None
    params = state.params
    buffers = state.buffers
    if before.input_formats != quantization.input_formats:
        params, buffers = _calibrated(setup, state, batch)
    if quantization.learned_formats:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.programs.shapes.params)
        initialize = functools.partial(quantization.init_changed, before=before)
        params = jax.jit(initialize, out_shardings=shardings)(params)
    ema = state.ema
    if ema is not None:
        # An average over values from before the phase would mean nothing.
        ema = {
            path: jnp.copy(params[path]) if is_quantizer_param(path) else leaf for path, leaf in ema.items()
        }
    return dataclasses.replace(state, params=params, buffers=buffers, ema=ema)


def _restarted_optimizer(setup: Setup, state: TrainState) -> Any:
    """Return the optimizer's state without moments of earlier gradients."""
    # Gradients of another forward pass are a poor estimate of those to come.
    programs = setup.programs
    shardings = jax.tree.map(lambda leaf: leaf.sharding, programs.shapes.optimizer)
    restart = functools.partial(restarted, programs.optimizer)
    return jax.jit(restart, out_shardings=shardings)(state.optimizer, state.params)


def _calibrated(setup: Setup, state: TrainState, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return parameters and buffers with activation quantizers calibrated on this batch."""
    config = setup.programs.definition.config
    quantization = quantization_of(setup.programs.definition)
    assert quantization is not None
    calibrating = define_quantized(config, quantization.phases, step=int(state.step), is_calibrating=True)
    params = state.params
    buffers = state.buffers
    everything = {**params, **buffers}
    ours = {path: leaf for path, leaf in everything.items() if is_activation_quantizer_param(path)}
    rest = {path: leaf for path, leaf in everything.items() if path not in ours}
    # Dynamic quantizers measure every input for themselves, so there may be nothing to calibrate.
    if not ours:
        return params, buffers

    # Observers return what they measure as the gradient of their scale, which passes through jit, remat and
    # scan without state in the modules.
    def forward(ours: dict[str, Array], rest: dict[str, Array]) -> Array:
        merged = {**rest, **ours}
        model = calibrating.merge(
            {path: merged[path] for path in params}, {path: merged[path] for path in buffers}
        )
        output = model(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions)
        total = jnp.sum(output.hidden.astype(jnp.float32))
        # Quantizers of modules of further tokens see their own inputs, and are there to be calibrated too.
        hidden = output.hidden
        for module in range(multi_token.num_modules(config)):
            next_tokens = batch.targets if module == 0 else multi_token.further_targets(batch, module)[0]
            hidden, _, _ = model.further(
                module, hidden, next_tokens, segment_ids=batch.segment_ids, positions=batch.positions
            )
            total = total + jnp.sum(hidden.astype(jnp.float32))
        return total

    shardings = {path: leaf.sharding for path, leaf in ours.items()}
    calibrated = jax.jit(jax.grad(forward), out_shardings=shardings)(ours, rest)
    for path, leaf in calibrated.items():
        # Gradients add up over loops, and over layers that share a module; the scale is the mean of what they
        # measured.
        calibrated[path] = leaf / num_uses(config, path)
    return (
        {path: calibrated.get(path, leaf) for path, leaf in params.items()},
        {path: calibrated.get(path, leaf) for path, leaf in buffers.items()},
    )
