"""What a run is before its first step: settings that fit together, data, model, compiled step, and the state
to go on from.

All that can be wrong with an experiment is found here, before a run directory is made for a new run, and
before anything is written to that of a run which goes on.
"""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from slmjax import sampling
from slmjax.data import provenance
from slmjax.data.batch import Batch
from slmjax.data.preparation import Prepared, prepare
from slmjax.data.tokenizers import Tokenizer, TokenizerConfig
from slmjax.data.windows import EvaluationBatches, evaluation_batches
from slmjax.distill.teachers import TeacherPlan, Teachers
from slmjax.evaluation.bits_per_byte import EvalResult, EvalStep, evaluate_batches
from slmjax.losses import TeacherOutput
from slmjax.models.definition import Definition
from slmjax.parallel.batches import local_sequences
from slmjax.parallel.processes import process_zero_first
from slmjax.quantization.fake_quantization import weight_formats
from slmjax.quantization.flips import CodeFlips
from slmjax.quantization.schedule import QuantSchedule
from slmjax.training.experiment import Experiment
from slmjax.training.optim import learning_rate
from slmjax.training.programs import CodeSums, check_rows, make_programs, teacher_plans
from slmjax.training.state import TrainState
from slmjax.training.step import TrainStep

log = logging.getLogger(__name__)


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
    easing: QuantSchedule | None = None  # of a run that is quantized
    plans: tuple[TeacherPlan, ...] = ()  # in distillation, where teachers are used at all
    teachers: Teachers | None = None  # once they are loaded (`with_teachers`)

    def heldout(self, max_documents: int | None) -> EvaluationBatches | None:
        """Batches of the held-out text, or None where nothing is held out."""
        data = self.experiment.data
        settings = self.experiment.eval
        if not sum(len(shards) for shards in self.prepared.heldout):
            return None
        batch_size = settings.batch_size or data.batch_size
        return evaluation_batches(
            self.prepared.heldout,
            sequence_length=data.sequence_length,
            batch_size=batch_size,
            overlap=settings.windows_overlap(data.sequence_length),
            max_documents=max_documents,
            rows=local_sequences(self.mesh, batch_size),
            text=settings.score,
        )

    def evaluate(self, state: TrainState, max_documents: int | None) -> EvalResult | None:
        """Loss and bits per byte on held-out text."""
        batches = self.heldout(max_documents)
        if batches is None:
            return None
        compared = None if self.teachers is None else functools.partial(self.teachers, in_microbatches=False)
        found = evaluate_batches(
            self.eval_step, state.evaluated, state.frozen, batches, mesh=self.mesh, teachers=compared
        )
        return found.with_tokenizer(self.prepared.tokenizer, self.prepared.heldout)

    def stored(self, state: TrainState) -> dict[str, Any]:
        """What a checkpoint keeps: the state, and of a quantized run sums of the codes that are deployed
        (`loading.changed_rows`).
        """
        return state.items() | (
            {"codes": self.code_sums(state.evaluated)} if weight_formats(self.definition) else {}
        )

    def sample(self, state: TrainState) -> list[str]:
        """Continuations of the experiment's prompts by the trained model; one process only."""
        settings = self.experiment.run
        tokenizer = self.prepared.tokenizer
        if jax.process_count() > 1 or not self.prompts:
            return []
        params = state.evaluated
        buffers = state.frozen
        found = sampling.sample(
            self.inference, params, buffers, self.prompts, config=settings.sample, eos_id=tokenizer.end_ids
        )
        return [
            text + tokenizer.decode_continuation(prompt, one.tokens)
            for text, prompt, one in zip(settings.sample_prompts, self.prompts, found, strict=True)
        ]

    def said(self, batch: Batch, step: int) -> tuple[tuple[TeacherOutput, ...], ...]:
        """What the train step after `step` is given beside the state and the placed batch: what teachers say
        of it, where they are used.
        """
        distill = self.experiment.objective.distill
        if (
            self.teachers is None
            or distill is None
            or not distill.uses_teachers(step, total_steps=self.experiment.run.steps)
        ):
            return ()
        return (self.teachers(batch),)


def set_up(experiment: Experiment, *, tokenizer: TokenizerConfig, mesh: Mesh) -> Setup:
    """Prepares data and resolves the model; nothing is compiled yet. Raises ValueError for settings that do
    not fit.
    """
    check_rows(experiment, mesh)
    learning_rate(
        experiment.optim, 0, total_steps=experiment.run.steps
    )  # a schedule that does not fit is refused before data is read
    prepared = process_zero_first(lambda: prepare(experiment.data, tokenizer))
    _warn_of_overlap(experiment, prepared)
    vocab_size = prepared.tokenizer.vocab_size
    if experiment.model.vocab_size is not None and experiment.model.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size={experiment.model.vocab_size} is smaller than the tokenizer's {vocab_size}: "
            "leave it out, or raise it"
        )
    prompts = _encoded_prompts(experiment, prepared.tokenizer)
    programs = make_programs(experiment, vocab_size=vocab_size, mesh=mesh)
    plans = teacher_plans(experiment, programs.definition.config, mesh=mesh, tokenizer=prepared.tokenizer)
    return Setup(
        experiment=experiment,
        prepared=prepared,
        mesh=mesh,
        definition=programs.definition,
        inference=programs.inference,
        shapes=programs.shapes,
        train_step=programs.train_step,
        eval_step=programs.eval_step,
        code_sums=programs.code_sums,
        prompts=prompts,
        plans=plans,
        easing=programs.easing,
        flips=programs.flips,
    )


def _warn_of_overlap(experiment: Experiment, prepared: Prepared) -> None:
    """Warn if the model that a run starts from, or one of its teachers, was trained on text that the run
    holds out.
    """
    distill = experiment.objective.distill
    teachers = (
        []
        if distill is None or distill.weight.is_zero
        else [Path(teacher.path) for teacher in distill.teachers]
    )
    source = experiment.init.source()
    others = sorted(teachers if source is None else {source, *teachers})
    if not others or experiment.data.heldout_fraction == 0:
        return
    now = provenance.describe(prepared, experiment.data)
    for directory in others:
        for sentence in provenance.overlap(directory, experiment.data, now):
            log.warning(sentence)


def _encoded_prompts(experiment: Experiment, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The tokens of the run's prompts: what cannot be sampled is said before training, not after it."""
    settings = experiment.run
    if not settings.sample_prompts:
        return ()
    try:
        encoded = tuple(map(tuple, tokenizer.prompt_batch(settings.sample_prompts)))
        sampling.check_prompts(encoded, vocab_size=tokenizer.vocab_size)
        sampling.length_limits(
            encoded, max_tokens=settings.sample.max_tokens, context_length=experiment.model.context_length
        )
    except ValueError as error:
        raise ValueError(f"run.sample_prompts, run.sample: {error}") from error
    return encoded


def with_teachers(setup: Setup) -> Setup:
    """The setup with its teachers' parameters on the devices."""
    parts = setup.experiment.optim.accumulation_steps
    return (
        dataclasses.replace(setup, teachers=Teachers(setup.plans, num_microbatches=parts))
        if setup.plans
        else setup
    )
