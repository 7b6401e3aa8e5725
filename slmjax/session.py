"""What a run is before its first step: settings that fit together, data, model, compiled step, and the state to go on from.

All that can be wrong with an experiment is found here, before a run directory is made for a new run, and before anything
is written to that of a run which goes on.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from slmjax import placement, sampling, sharding
from slmjax.architecture import ModelConfig
from slmjax.checkpoint import Checkpointer
from slmjax.data import provenance
from slmjax.data.batch import Batch
from slmjax.data.preparation import Log, Prepared, prepare
from slmjax.data.tokenizers import FileTokenizer, Tokenizer, TokenizerConfig
from slmjax.data.windows import EvaluationBatches, evaluation_batches
from slmjax.distill import layers
from slmjax.distill.teachers import TeacherPlan, Teachers, divided_devices, plan_teachers
from slmjax.easing import Easing, easing_of
from slmjax.evaluation.bits_per_byte import EvalResult, EvalStep, evaluate_batches, make_eval_step
from slmjax.experiment import Experiment, FromTeacherLayers, read_experiment
from slmjax.flips import CodeFlips
from slmjax.loading import read_config, read_fitted
from slmjax.losses import TeacherOutput
from slmjax.numerics import weights as numeric_weights
from slmjax.optim import cooldown_step, learning_rate, make_optimizer
from slmjax.parameters import Definition, define, define_for_inference
from slmjax.processes import process_zero_first
from slmjax.runlog import RunDirectory, read_log
from slmjax.step import TrainState, TrainStep, init_state, make_train_step, state_shapes

log = logging.getLogger(__name__)
CodeSums = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What is fixed before the first step."""

    experiment: Experiment
    prepared: Prepared
    mesh: Mesh
    definition: Definition
    inference: Definition  # the same parameters, as evaluation and sampling use them
    shapes: TrainState
    train_step: TrainStep
    eval_step: EvalStep
    code_sums: CodeSums
    flips: CodeFlips  # counts codes that change, where the log tells of them
    prompts: tuple[tuple[int, ...], ...]  # tokens of the texts that the trained model continues at the end
    easing: Easing | None = None  # of a run that is quantized
    plans: tuple[TeacherPlan, ...] = ()  # in distillation, where teachers are used at all
    teachers: Teachers | None = None  # once they are loaded (`with_teachers`)

    def heldout(self, max_documents: int | None) -> EvaluationBatches | None:
        """Batches of the held-out text, or None where nothing is held out."""
        data, settings = self.experiment.data, self.experiment.eval
        if not sum(len(shards) for shards in self.prepared.heldout):
            return None
        batch_size = settings.batch_size or data.batch_size
        return evaluation_batches(
            self.prepared.heldout, sequence_length=data.sequence_length, batch_size=batch_size,
            overlap=settings.windows_overlap(data.sequence_length), max_documents=max_documents,
            rows=placement.rows_here(self.mesh, batch_size), text=settings.score,
        )  # fmt: skip

    def evaluate(self, state: TrainState, max_documents: int | None) -> EvalResult | None:
        """Loss and bits per byte on held-out text."""
        batches = self.heldout(max_documents)
        if batches is None:
            return None
        compared = None if self.teachers is None else functools.partial(self.teachers, in_parts=False)
        found = evaluate_batches(self.eval_step, state.evaluated, state.frozen, batches, mesh=self.mesh, teachers=compared)
        return found.with_tokenizer(self.prepared.tokenizer, self.prepared.heldout)

    def stored(self, state: TrainState) -> dict[str, Any]:
        """What a checkpoint keeps: the state, and of a quantized run sums of the codes that are deployed (`loading.changed_rows`)."""
        return state.items() | ({"codes": self.code_sums(state.evaluated)} if self.definition.formats else {})

    def sample(self, state: TrainState) -> list[str]:
        """Continuations of the experiment's prompts by the trained model; one process only."""
        settings, tokenizer = self.experiment.run, self.prepared.tokenizer
        if jax.process_count() > 1 or not self.prompts:
            return []
        params, buffers = state.evaluated, state.frozen
        found = sampling.sample(self.inference, params, buffers, self.prompts, config=settings.sample, eos_id=tokenizer.end_ids)
        return [
            text + tokenizer.decode_continuation(prompt, one.tokens)
            for text, prompt, one in zip(settings.sample_prompts, self.prompts, found, strict=True)
        ]

    def said(self, batch: Batch, step: int) -> tuple[tuple[TeacherOutput, ...], ...]:
        """What the train step after `step` is given beside the state and the placed batch: what teachers say of it, where they are used."""
        distill = self.experiment.objective.distill
        if self.teachers is None or distill is None or not distill.uses_teachers(step, total_steps=self.experiment.run.steps):
            return ()
        return (self.teachers(batch),)


def set_up(experiment: Experiment, *, tokenizer: TokenizerConfig, mesh: Mesh, report: Log) -> Setup:
    """Prepares data and resolves the model; nothing is compiled yet. Raises ValueError for settings that do not fit."""
    _check_rows(experiment, mesh)
    learning_rate(experiment.optim, 0, total_steps=experiment.run.steps)  # a schedule that does not fit is refused before data is read
    prepared = process_zero_first(lambda: prepare(experiment.data, tokenizer, log=report))
    _warn_of_overlap(experiment, prepared)
    vocab_size = prepared.tokenizer.vocab_size
    if experiment.model.vocab_size is not None and experiment.model.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size={experiment.model.vocab_size} is smaller than the tokenizer's {vocab_size}: leave it out, or raise it"
        )
    prompts = _encoded_prompts(experiment, prepared.tokenizer)
    programs = make_programs(experiment, vocab_size=vocab_size, mesh=mesh)
    plans = teacher_plans(experiment, programs.definition.config, mesh=mesh, tokenizer=prepared.tokenizer)
    return Setup(
        experiment=experiment, prepared=prepared, mesh=mesh, definition=programs.definition, inference=programs.inference,
        shapes=programs.shapes, train_step=programs.train_step, eval_step=programs.eval_step, code_sums=programs.code_sums, prompts=prompts,
        plans=plans, easing=programs.easing, flips=programs.flips,
    )  # fmt: skip


def _warn_of_overlap(experiment: Experiment, prepared: Prepared) -> None:
    """Warn if the model that a run starts from, or one of its teachers, was trained on text that the run holds out."""
    distill = experiment.objective.distill
    teachers = [] if distill is None or distill.weight.is_zero else [Path(teacher.path) for teacher in distill.teachers]
    source = experiment.init.source()
    others = sorted(teachers if source is None else {source, *teachers})
    if not others or experiment.data.heldout_fraction == 0:
        return
    now = provenance.describe(prepared, experiment.data)
    for directory in others:
        for sentence in provenance.overlap(directory, experiment.data, now):
            log.warning(sentence)


def teacher_plans(
    experiment: Experiment, student: ModelConfig, *, mesh: Mesh, tokenizer: Tokenizer | None = None
) -> tuple[TeacherPlan, ...]:
    """The teachers of an experiment; none where nothing is learned from them. Raises ValueError for those that do not fit."""
    distill = experiment.objective.distill
    if distill is None or distill.weight.is_zero:
        return ()
    own = mesh
    if distill.mesh is not None:
        own = sharding.make_mesh(distill.mesh, divided_devices(distill, jax.devices())[1])
    return plan_teachers(
        distill, student, sequence_length=experiment.data.sequence_length, mesh=mesh, teacher_mesh=own, tokenizer=tokenizer
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The model of an experiment and the steps that are compiled for it, without any array."""

    definition: Definition
    inference: Definition
    shapes: TrainState
    train_step: TrainStep
    eval_step: EvalStep
    code_sums: CodeSums  # what a checkpoint keeps of the codes that its parameters have on these devices
    flips: CodeFlips
    easing: Easing | None = None


def make_programs(experiment: Experiment, *, vocab_size: int, mesh: Mesh, step: int | None = None) -> Programs:
    """What the settings come to with a tokenizer of this size, if the model has none of its own. Raises ValueError if they do not fit.

    Args:
      step: before which training step, where quantization has phases; None for the last of them.
    """
    _check_rows(experiment, mesh)
    model = resolved_model(experiment, vocab_size=vocab_size)
    definition, inference = define(model, step=step), define_for_inference(model, step=step)
    quant, steps = experiment.quant, experiment.run.steps
    easing = None if quant is None else easing_of(quant, first_step=model.quant[0].step, total_steps=steps)
    optimizer = make_optimizer(experiment.optim, definition.params, total_steps=steps)
    with_ema, objective = experiment.optim.ema_decay is not None, experiment.objective
    shapes = state_shapes(definition, optimizer, with_ema=with_ema, mesh=mesh, objective=objective)
    train_step = make_train_step(
        definition, optimizer, objective=objective, optim=experiment.optim, shapes=shapes, total_steps=steps,
        easing=None if definition.phase is None else easing,
    )  # fmt: skip
    matching = None if objective.distill is None else objective.distill.matching
    return Programs(
        definition=definition, inference=inference, shapes=shapes, train_step=train_step,
        eval_step=make_eval_step(inference, matching=matching, unrounded=experiment.eval.unrounded), easing=easing,
        flips=CodeFlips(definition.formats if experiment.run.log_flips else {}),
        code_sums=jax.jit(functools.partial(numeric_weights.code_sums, formats_of=definition.formats)),
    )  # fmt: skip


def resolved_model(experiment: Experiment, *, vocab_size: int) -> ModelConfig:
    """The model of an experiment with a tokenizer of this size, and with the phases of its quantization at their steps."""
    model, quant, steps = experiment.model, experiment.quant, experiment.run.steps
    phases = () if quant is None else quant.timed(cooldown_step=cooldown_step(experiment.optim, total_steps=steps), total_steps=steps)
    return dataclasses.replace(model, vocab_size=model.vocab_size or vocab_size, quant=phases)


def _check_rows(experiment: Experiment, mesh: Mesh) -> None:
    divisor = sharding.batch_divisor(mesh)
    parts = divisor * experiment.optim.accumulation_steps
    if experiment.data.batch_size % parts:
        raise ValueError(
            f"data.batch_size={experiment.data.batch_size} must be a multiple of {parts}: rows are divided over "
            f"{divisor} device(s) and {experiment.optim.accumulation_steps} accumulation step(s)"
        )
    rows = experiment.eval.batch_size
    if rows is not None and rows % divisor:
        raise ValueError(f"eval.batch_size={rows} must be a multiple of {divisor}, the devices that rows are divided over")


def _encoded_prompts(experiment: Experiment, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The tokens of the run's prompts: what cannot be sampled is said before training, not after it."""
    settings = experiment.run
    if not settings.sample_prompts:
        return ()
    try:
        encoded = tuple(map(tuple, tokenizer.prompt_batch(settings.sample_prompts)))
        sampling.check_prompts(encoded, vocab_size=tokenizer.vocab_size)
        sampling.length_limits(encoded, max_tokens=settings.sample.max_tokens, context_length=experiment.model.context_length)
    except ValueError as error:
        raise ValueError(f"run.sample_prompts, run.sample: {error}") from error
    return encoded


def with_teachers(setup: Setup) -> Setup:
    """The setup with its teachers' parameters on the devices."""
    parts = setup.experiment.optim.accumulation_steps
    return dataclasses.replace(setup, teachers=Teachers(setup.plans, num_parts=parts)) if setup.plans else setup


# The first state ------------------------------------------------------------------------------------------------------
def fresh_state(setup: Setup) -> TrainState:
    """The state before the first step: fresh parameters, or those of another model."""
    experiment = setup.experiment
    optimizer = make_optimizer(experiment.optim, setup.definition.params, total_steps=experiment.run.steps)
    state = init_state(setup.definition, optimizer, shapes=setup.shapes, seed=experiment.run.seed, objective=experiment.objective)
    init = experiment.init
    if (source := init.source()) is None:
        return state
    params, buffers = _layers_of(init, state, setup) if isinstance(init, FromTeacherLayers) else _model_of(source, setup)
    ema = None if state.ema is None else jax.tree.map(lambda leaf: leaf.copy(), params)
    return dataclasses.replace(state, trainable=params, frozen=buffers, ema=ema)


def _model_of(source: Path, setup: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
    """Another run's parameters (averaged, where it kept averages) and buffers, placed as this run's; of a quantized run those it trains."""
    if _tokenizer_at(source).hash != setup.prepared.tokenizer.hash:
        raise ValueError(
            f"init.path={source} was trained with another tokenizer, so its parameters mean nothing here: give the experiment "
            f"FileTokenizer(path='{source / 'tokenizer'}'), as `slmjax train --init-from {source}` does"
        )
    definition, shapes = setup.definition, setup.shapes
    if not definition.config.quant:
        return read_fitted(source, definition.config, shapes.trainable, shapes.frozen)[1:]
    plain = define(dataclasses.replace(definition.config, quant=()))
    wanted = ({path: shapes.trainable[path] for path in plain.params}, {path: shapes.frozen[path] for path in plain.buffers})
    _, params, buffers = read_fitted(source, definition.config, *wanted)
    places = jax.tree.map(lambda leaf: leaf.sharding, (shapes.trainable, shapes.frozen))
    return jax.jit(lambda *trees: (definition.with_learned(trees[0]), definition.with_measured(trees[1])), out_shardings=places)(
        params, buffers
    )


def _tokenizer_at(source: Path) -> Tokenizer:
    """The tokenizer of the model that a run starts from."""
    read_config(source)  # or an error that says what to name
    if not (source / "tokenizer").is_dir():
        raise ValueError(f"init.path={source} has no tokenizer: import the model again with --tokenizer FILE")
    return Tokenizer.load(source / "tokenizer")


def _layers_of(init: FromTeacherLayers, state: TrainState, setup: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and buffers that are cut out of a teacher's, placed as this run's."""
    path, student = Path(init.path), setup.definition.config
    tokenizer, teacher = _tokenizer_at(path), read_config(path)
    rows = layers.shared_rows(
        tokenizer, setup.prepared.tokenizer, num_rows=min(teacher.known_vocab_size, student.known_vocab_size), path=path
    )
    chosen = layers.chosen_layers(num_teacher=teacher.num_layers, num_student=student.num_layers, layers=init.layers, every=init.every)
    return layers.student_parameters(
        path, definition=setup.definition, chosen=chosen, fresh=(state.trainable, state.frozen), num_rows=rows, mesh=setup.mesh
    )


def restored_state(setup: Setup, checkpointer: Checkpointer) -> TrainState:
    """The state of a run's newest intact checkpoint; the first state where it was killed before its first checkpoint.

    Raises:
      CheckpointError: there is none that is intact.
    """
    if not checkpointer.steps() and not any(checkpointer.directory.glob("*.bad*")):
        log.warning("%s has no checkpoint yet: beginning at step 0", checkpointer.directory)
        return fresh_state(setup)
    process_zero_first(lambda: _check_best(setup, checkpointer))  # it may change what the others read
    return TrainState.from_items(checkpointer.restore(setup.shapes.items())[1])


def _check_best(setup: Setup, checkpointer: Checkpointer) -> None:
    """Delete the note of a best checkpoint whose loss does not compare with those to come; replace one that is not finite."""
    run_log, evaluated = RunDirectory(checkpointer.directory.parent).log_path, setup.heldout(setup.experiment.eval.max_documents)
    checkpointer.repair_best(run_log)
    if (best := checkpointer.best()) is not None and run_log.exists() and _scored_otherwise(evaluated, run_log, step=best[0]):
        why = "the loss of other tokens (the held-out text or eval.score changed)"
        log.warning("the best checkpoint so far, of step %d, was chosen by %s: it is found anew", best[0], why)
        checkpointer.forget_best()


def _scored_otherwise(now: EvaluationBatches | None, run_log: Path, *, step: int) -> bool:
    """Return whether the evaluation after `step` scored another number of tokens than one does now."""
    records = [record for record in read_log(run_log, kind="eval") if record["step"] == step]
    if not records or now is None:
        return False
    total = records[-1].get("total_tokens", now.num_tokens)  # earlier versions said neither, and scored all
    return (records[-1].get("tokens", total), total) != (now.num_targets, now.num_tokens)


ROW_SETTINGS = ("sequence_length", "batch_size", "packing", "packing_window", "seed", "sources")  # they decide what row comes when


# Going on with a run --------------------------------------------------------------------------------------------------
def run_to_resume(path: Path, experiment: Experiment) -> RunDirectory:
    """The directory of a run that goes on with these settings.

    Raises:
      ValueError: it is none, or the settings are for another model.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"cannot resume {path}: it has no config.json. Name a run directory, as `slmjax train` prints it at the end")
    before = read_experiment(path)
    for name in ("model", "tokenizer", "quant"):
        if getattr(before, name) != getattr(experiment, name):
            raise ValueError(f"{path} has another {name}, which a resumed run keeps: begin a new run, with --init-from {path} if it fits")
    if _phase_steps(before) != _phase_steps(experiment):
        raise ValueError(
            f"{path} has phases of quantization that begin at steps {_phase_steps(before)}, and with these settings at "
            f"{_phase_steps(experiment)}: set quant.start_step to a number, or leave run.steps and optim as they are"
        )
    if (kind := before.optim.kind) is not experiment.optim.kind:
        raise ValueError(
            f"{path} was trained by {kind.value}, whose state means nothing to optim.kind={experiment.optim.kind.value}: leave it as "
            f"it is, or begin a new run with --init-from {path}"
        )
    if _remembered(before) != _remembered(experiment):
        raise ValueError(
            f"{path} keeps {_remembered(before)} of its objective from step to step, and this experiment {_remembered(experiment)}: leave "
            f"objective.distill as it is, or begin a new run with --init-from {path}"
        )
    if (before.optim.ema_decay is None) is not (experiment.optim.ema_decay is None):
        state = "no averaged weights" if before.optim.ema_decay is None else "averaged weights"
        raise ValueError(f"{path} keeps {state}, and a resumed run goes on so: optim.ema_decay is {before.optim.ema_decay} there")
    return RunDirectory(path, process_index=jax.process_index())


def _phase_steps(experiment: Experiment) -> list[int]:
    return [phase.step for phase in resolved_model(experiment, vocab_size=1).quant]


def _remembered(experiment: Experiment) -> str:
    """What the objective keeps from step to step, in words."""
    distill = experiment.objective.distill
    names = () if distill is None else sorted(distill.divergence.initial_state())
    return ", ".join(names) or "nothing"


def tokenizer_of(run: RunDirectory, experiment: Experiment) -> TokenizerConfig:
    """The run's own tokenizer, so that it stays the same whatever became of the text it was made from."""
    kept = FileTokenizer(path=str(run.tokenizer))
    return kept if (run.tokenizer / "tokenizer.json").is_file() else experiment.tokenizer


def warn_of_other_data(run: RunDirectory, experiment: Experiment, prepared: Prepared) -> None:
    """Says so if a run goes on with other text or rows than it began with: nothing else would show it."""
    if (run.path / "config.json").is_file():
        before = read_experiment(run.path).data
        changed = [name for name in ROW_SETTINGS if getattr(before, name) != getattr(experiment.data, name)]
        if changed:
            log.warning("%s goes on with another data.%s: some of its text comes twice, some not at all", run.path, changed[0])
    for sentence in provenance.changes_on_resume(run.path, experiment.data, provenance.describe(prepared, experiment.data)):
        log.warning(sentence)


def is_complete(run: RunDirectory, step: int) -> bool:
    """Whether a run that is at this step came to its end and wrote its result: one that was killed after its last step has not.

    The result of a run that was then extended is that of an earlier step.
    """
    path = run.path / "result.json"
    if not path.is_file():
        return False
    result = json.loads(path.read_text())
    return result["status"] == "finished" and result["step"] >= step
