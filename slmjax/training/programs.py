"""The jitted programs of an experiment: train step, evaluation step, and the shapes of the state.

Each is compiled at its first call.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from slmjax.data.tokenizers import Tokenizer
from slmjax.distill.teachers import TeacherPlan, plan_teachers, split_devices
from slmjax.evaluation.bits_per_byte import EvalStep, make_eval_step
from slmjax.models.architecture import ModelConfig
from slmjax.models.definition import Definition, inference_config
from slmjax.parallel.mesh import batch_divisor, make_mesh
from slmjax.quantization import weights as quantized_weights
from slmjax.quantization.fake_quantization import define_quantized, phase_of, weight_formats
from slmjax.quantization.flips import CodeFlips
from slmjax.quantization.rules import QuantPhase
from slmjax.quantization.schedule import quant_schedule_of
from slmjax.training.experiment import Experiment
from slmjax.training.optim import cooldown_step, make_optimizer
from slmjax.training.state import TrainState, make_init, state_shapes
from slmjax.training.step import StepSettings, TrainStep, compiled_step, step_settings

CodeSums = Callable[[Mapping[str, Any]], dict[str, Any]]


def teacher_plans(
    experiment: Experiment, student: ModelConfig, *, mesh: Mesh, tokenizer: Tokenizer | None = None
) -> tuple[TeacherPlan, ...]:
    """Return the teachers of an experiment; none where the divergence from them has no weight.

    Raises:
      ValueError: a teacher does not fit the student, its data or its mesh.
    """
    distill = experiment.objective.distill
    # A divergence without weight needs no teacher, so none is loaded: an arm of a study may set it to 0.
    if distill is None or distill.weight.is_zero:
        return ()
    teacher_mesh = mesh
    if distill.mesh is not None:
        teacher_mesh = make_mesh(distill.mesh, split_devices(distill, jax.devices())[1])
    return plan_teachers(
        distill,
        student,
        sequence_length=experiment.data.sequence_length,
        mesh=mesh,
        teacher_mesh=teacher_mesh,
        tokenizer=tokenizer,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The model of an experiment, its optimizer and its jitted steps, without any array."""

    definition: Definition
    inference: Definition  # the same parameters, as evaluation and sampling use them
    optimizer: optax.GradientTransformation
    shapes: TrainState
    init: Callable[[int], TrainState]  # from a seed to a fresh state
    step_settings: StepSettings
    train_step: TrainStep
    eval_step: EvalStep
    code_sums: CodeSums  # checksums of the codes that parameters have on these devices, for a checkpoint
    flips: CodeFlips  # counts codes that change, where the log has them

    def for_another_run(self) -> "Programs":
        """Return the same programs, without what they keep of a run."""
        return dataclasses.replace(self, flips=self.flips.fresh())


def make_programs(
    experiment: Experiment, *, vocab_size: int, mesh: Mesh, step: int | None = None
) -> Programs:
    """Return the programs of an experiment. Nothing is compiled before it is called.

    Args:
      vocab_size: of the tokenizer, which the model takes unless it has a size of its own.
      step: the training step that they are for, where quantization has phases; None for the last phase.

    Raises:
      ValueError: the settings do not fit each other or the mesh.
    """
    # Cheap checks come first: a definition traces the whole model.
    check_rows(experiment, mesh)
    model = resolved_model(experiment, vocab_size=vocab_size)
    phases = resolved_phases(experiment)
    definition = define_quantized(model, phases, step=step)
    inference = define_quantized(inference_config(model), phases, step=step)
    quant = experiment.quant
    steps = experiment.run.steps
    # Before the first phase nothing is quantized, and the step is the plain one.
    quant_schedule = None
    if quant is not None and phase_of(definition) is not None:
        quant_schedule = quant_schedule_of(quant, first_step=phases[0].step, total_steps=steps)
    optimizer = make_optimizer(experiment.optim, definition.params, total_steps=steps, scaling=model.scaling)
    with_ema = experiment.optim.ema_decay is not None
    objective = experiment.objective
    shapes = state_shapes(definition, optimizer, with_ema=with_ema, mesh=mesh, objective=objective)
    settings = step_settings(
        definition,
        optimizer,
        objective=objective,
        optim=experiment.optim,
        total_steps=steps,
        quant_schedule=quant_schedule,
    )
    loss_config = None if objective.distill is None else objective.distill.loss_config
    # Layers may compute in another way at inference, with the same parameters (`FfnConfig.for_inference`).
    return Programs(
        definition=definition,
        inference=inference,
        optimizer=optimizer,
        shapes=shapes,
        init=make_init(definition, optimizer, shapes=shapes, objective=objective),
        step_settings=settings,
        train_step=compiled_step(settings, shapes),
        eval_step=make_eval_step(inference, loss_config=loss_config, unrounded=experiment.eval.unrounded),
        flips=CodeFlips(weight_formats(definition) if experiment.run.log_flips else {}),
        code_sums=jax.jit(
            functools.partial(quantized_weights.code_sums, formats_of=weight_formats(definition))
        ),
    )


def resolved_model(experiment: Experiment, *, vocab_size: int) -> ModelConfig:
    """Return the model of an experiment with a tokenizer of this size."""
    # A model may have more rows than the tokenizer has tokens, as imported ones do; never fewer (`set_up`).
    model = experiment.model
    return dataclasses.replace(model, vocab_size=model.vocab_size or vocab_size)


def resolved_phases(experiment: Experiment) -> tuple[QuantPhase, ...]:
    """Return the quantization phases at the steps where they begin; empty without quantization.

    Raises:
      ValueError: as `QuantConfig.resolved`.
    """
    steps = experiment.run.steps
    if experiment.quant is None:
        return ()
    cooldown = cooldown_step(experiment.optim, total_steps=steps)
    return experiment.quant.resolved(cooldown_step=cooldown, total_steps=steps)


def check_rows(experiment: Experiment, mesh: Mesh) -> None:
    """Raise ValueError where a batch cannot be split evenly over devices and microbatches."""
    # Every device must have the same number of sequences of every microbatch: shapes of a program are static.
    divisor = batch_divisor(mesh)
    parts = divisor * experiment.optim.accumulation_steps
    if experiment.data.batch_size % parts:
        raise ValueError(
            f"data.batch_size={experiment.data.batch_size} must be a multiple of {parts}: sequences are "
            f"sharded over {divisor} device(s) and split into {experiment.optim.accumulation_steps} "
            "microbatch(es)"
        )
    batch_size = experiment.eval.batch_size
    if batch_size is not None and batch_size % divisor:
        raise ValueError(
            f"eval.batch_size={batch_size} must be a multiple of {divisor}, the devices that sequences are "
            "sharded over"
        )
