"""Changes of a resumed run: rates and weights that jump, and changed settings of its optimizer.

warn_of_changed_schedules(run, experiment, step=100)      # before the first step of the session
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from slmjax.losses import Taid
from slmjax.quantization.rules import QuantConfig
from slmjax.quantization.schedule import quant_schedule_of
from slmjax.telemetry.run_directory import RunDirectory
from slmjax.training.experiment import Experiment, read_experiment
from slmjax.training.optim import OptimConfig, Optimizer, cooldown_step, learning_rate

log = logging.getLogger(__name__)
LARGEST_CHANGE = 0.01  # relative: what a schedule changes by from step to step is no jump


def warn_of_changed_schedules(run: RunDirectory, experiment: Experiment, *, step: int) -> None:
    """Log a warning for each rate that differs, from this step on, from that of the run's config.json.

    Args:
      run: a resumed run; a new one has no config.json yet, and nothing is logged.
      experiment: the settings that it resumes with.
      step: steps that were trained so far.
    """
    # At step 0 nothing was trained under the old settings, so nothing jumps.
    if step == 0 or not (run.path / "config.json").is_file():
        return
    before = read_experiment(run.path)
    for text in schedule_changes(before, experiment, step=step):
        log.warning("%s", text)
    if changed := _changed_settings(before.optim, experiment.optim):
        log.warning("%s resumes with other settings of its optimizer: %s", run.path, ", ".join(changed))


def schedule_changes(before: Experiment, after: Experiment, *, step: int) -> Iterator[str]:
    """Yield a sentence for each rate or weight that jumps after this step because settings have changed."""
    # A longer run is the usual reason: schedules are fractions of run.steps, so their
    # values at a step change.
    steps = f"run.steps={after.run.steps} instead of {before.run.steps}"
    why = steps if after.run.steps != before.run.steps else "the settings it has now"
    rates = _values(before, step)
    new_rates = _values(after, step)
    # Only a rate that both have can jump.
    for name, rate in rates.items():
        if name not in new_rates or abs(new_rates[name] - rate) <= LARGEST_CHANGE * abs(rate):
            continue
        factor = f" ({new_rates[name] / rate:.3g} times)" if rate else ""
        yield (
            f"{name} at step {step + 1}, the next one, is {new_rates[name]:.3g} with {why}, and {rate:.3g} "
            f"with those the run had{factor}: it jumps there. {_FURTHER.get(name, '')}"
        ).rstrip()


_TAID = "the least weight of the teacher in TAID (objective.distill.divergence)"
_FURTHER = {
    "optim.lr": (
        "To keep it, leave the settings as they are, or set optim.schedule=constant with "
        "optim.warmup-steps=0 and optim.lr to the rate that you want; a schedule of wsd can be extended "
        "before its decay without a jump"
    ),
    _TAID: "The weight itself never falls: one that is higher stays",
}


def _values(experiment: Experiment, step: int) -> dict[str, float]:
    """Return the rates and weights of the training step after so many."""
    optim = experiment.optim
    total_steps = experiment.run.steps
    rate = float(learning_rate(optim, step, total_steps=total_steps))
    values = {"optim.lr": rate}
    if optim.kind is Optimizer.MUON:
        values["optim.muon_lr"] = rate * optim.muon_lr / optim.lr
    if (distill := experiment.objective.distill) is not None:
        ramps = {
            "weight": distill.weight,
            "hard_weight": distill.hard_weight,
            "temperature": distill.temperature,
        }
        values |= {
            f"objective.distill.{name}": float(ramp.at(step, total_steps=total_steps))
            for name, ramp in ramps.items()
        }
        # TAID adapts its weight to the loss, and the state of that resumes; its lower bound is a schedule.
        if isinstance(distill.divergence, Taid):
            values[_TAID] = min(
                distill.divergence.end, distill.divergence.min_teacher_weight(step / total_steps)
            )
    if experiment.quant is not None:
        values |= _quantization(experiment.quant, experiment, step)
    return values


def _quantization(quant: QuantConfig, experiment: Experiment, step: int) -> dict[str, float]:
    """Return the quantization phase, and the values of its schedule (`QuantSchedule`)."""
    total_steps = experiment.run.steps
    phases = quant.resolved(
        cooldown_step=cooldown_step(experiment.optim, total_steps=total_steps), total_steps=total_steps
    )
    schedule = quant_schedule_of(quant, first_step=phases[0].step, total_steps=total_steps)
    num_begun = sum(phase.step <= step for phase in phases)
    # Before the first phase weights have no rounding error, and no layer is frozen.
    fraction: Any = 0.0
    num_frozen: Any = 0.0
    if num_begun:
        fraction = schedule.warmup_fraction(jnp.asarray(step))
        num_frozen = schedule.num_frozen(jnp.asarray(step), num_layers=experiment.model.num_layers)
    return {
        "the quantization phase (0: full precision; quant.start_step, quant.phases)": float(num_begun),
        "the fraction of the rounding error (quant.warmup_steps)": 1.0
        if fraction is None
        else float(fraction),
        "the number of frozen layers (quant.freeze_steps)": float(num_frozen),
    }


def _changed_settings(before: OptimConfig, after: OptimConfig) -> list[str]:
    """Return the settings that have changed, with both values."""
    # All fields, so that a setting which is added later cannot be forgotten here.
    names = [field.name for field in dataclasses.fields(OptimConfig)]
    return [
        f"optim.{name}={getattr(after, name)} instead of {getattr(before, name)}"
        for name in names
        if getattr(before, name) != getattr(after, name)
    ]
