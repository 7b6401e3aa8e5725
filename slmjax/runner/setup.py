"""`Setup`: what is fixed before the first step of a run, such as data, model and jitted steps.

    setup = set_up(experiment, tokenizer=experiment.tokenizer, mesh=mesh)
    setup = with_teachers(setup)

Errors in an experiment are found here, before a new run has a directory, and before anything is written to
the directory of a resumed run.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from slmjax import sampling
from slmjax.data import provenance
from slmjax.data.batch import Batch
from slmjax.data.pipeline import BatchSource
from slmjax.data.preparation import Prepared, prepare
from slmjax.data.tokenizers import Tokenizer, TokenizerConfig
from slmjax.data.windows import EvaluationBatches, evaluation_batches
from slmjax.distill.teachers import TeacherPlan, Teachers
from slmjax.evaluation.bits_per_byte import EvalResult, evaluate_batches
from slmjax.losses import TeacherOutput
from slmjax.parallel.agreement import in_all_processes, require_same
from slmjax.parallel.batches import local_sequences
from slmjax.parallel.processes import process_zero_first
from slmjax.quantization.fake_quantization import weight_formats
from slmjax.runner.token_count import TokenCount, stored_shape
from slmjax.training.experiment import Experiment, warn_of_scratch_rates
from slmjax.training.optim import warn_of_shortened_warmup
from slmjax.training.programs import Programs, check_rows, make_programs, teacher_plans
from slmjax.training.state import TrainState

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that is fixed before the first step; `programs` change with the quantization phase."""

    experiment: Experiment
    prepared: Prepared
    mesh: Mesh
    programs: Programs
    prompts: tuple[tuple[int, ...], ...]  # tokens of the texts that the trained model continues at the end
    plans: tuple[TeacherPlan, ...] = ()  # in distillation, where teachers are used at all
    teachers: Teachers | None = None  # once they are loaded (`with_teachers`)

    def heldout(self, max_documents: int | None) -> EvaluationBatches | None:
        """Return batches of the held-out text, or None where nothing is held out."""
        data = self.experiment.data
        settings = self.experiment.eval
        if not sum(len(shards) for shards in self.prepared.heldout):
            return None
        batch_size = settings.batch_size or data.batch_size
        # All processes must run the same number of batches, or collectives would wait forever. So batches are
        # cut from all documents, and each process takes its rows of every batch.
        return evaluation_batches(
            self.prepared.heldout,
            sequence_length=data.sequence_length,
            batch_size=batch_size,
            overlap=settings.windows_overlap(data.sequence_length),
            max_documents=max_documents,
            rows=local_sequences(self.mesh, batch_size),
            text=settings.score,
        )

    def evaluate(
        self, state: TrainState, max_documents: int | None, *, on_batch: Callable[[], None] | None = None
    ) -> EvalResult | None:
        """Return loss and bits per byte on held-out text, or None where nothing is held out.

        `on_batch` is called after each batch, and may raise to end the evaluation.
        """
        batches = self.heldout(max_documents)
        if batches is None:
            return None
        # A batch of evaluation is not split into microbatches, and neither are the outputs of teachers.
        teachers = None if self.teachers is None else functools.partial(self.teachers, in_microbatches=False)
        result = evaluate_batches(
            self.programs.eval_step,
            state.eval_params,
            state.buffers,
            batches,
            mesh=self.mesh,
            teachers=teachers,
            on_batch=on_batch,
        )
        return result.with_tokenizer(self.prepared.tokenizer, self.prepared.heldout)

    def checkpoint_items(self, state: TrainState, trained: TokenCount) -> dict[str, Any]:
        """Return what a checkpoint stores: the state, the count of targets, and checksums of deployed codes.

        Of a quantized run, the checksums show on another machine whether its weights have the same codes
        (`loading.changed_rows`).
        """
        items = state.items()
        # Counted on the host, but stored with the state: a resumed run must not count a step twice.
        items["progress"]["tokens"] = trained.stored(state.step.sharding)
        if weight_formats(self.programs.definition):
            items["codes"] = self.programs.code_sums(state.eval_params)
        return items

    def item_shapes(self) -> dict[str, Any]:
        """Return the shapes of what a checkpoint must hold to resume from it."""
        shapes = self.programs.shapes
        items = shapes.items()
        items["progress"]["tokens"] = stored_shape(shapes.step.sharding)
        return items

    def sample(self, state: TrainState) -> list[str]:
        """Return continuations of the run's prompts by the trained model; none with several processes."""
        settings = self.experiment.run
        tokenizer = self.prepared.tokenizer
        if jax.process_count() > 1 or not self.prompts:
            return []
        continuations = sampling.sample(
            self.programs.inference,
            state.eval_params,
            state.buffers,
            self.prompts,
            config=settings.sample,
            eos_id=tokenizer.end_ids,
        )
        return [
            text + tokenizer.decode_continuation(prompt, continuation.tokens)
            for text, prompt, continuation in zip(
                settings.sample_prompts, self.prompts, continuations, strict=True
            )
        ]

    def teacher_outputs(self, batch: Batch, step: int) -> tuple[TeacherOutput, ...]:
        """Return the outputs of the teachers for a placed batch; none where the next step uses none."""
        # A schedule of the weight may be 0 for some steps. Their teachers' forward passes would be wasted.
        distill = self.experiment.objective.distill
        if (
            self.teachers is None
            or distill is None
            or not distill.uses_teachers(step, total_steps=self.experiment.run.steps)
        ):
            return ()
        return self.teachers(batch)


def set_up(
    experiment: Experiment, *, tokenizer: TokenizerConfig, mesh: Mesh, shared: Setup | None = None
) -> Setup:
    """Prepare data and resolve the model. Nothing is compiled yet.

    Args:
      experiment: the settings.
      tokenizer: that of the experiment, or of the run that is resumed.
      mesh: the devices.
      shared: of another member of the same population, whose data and programs are taken.

    Raises:
      ValueError: settings that do not fit each other, the data or the mesh.
    """
    # Before data is read, which may take long: a batch that does not fit.
    check_rows(experiment, mesh)
    # One process tokenizes, the others read its cache: the work is the same, and so must be the shards.
    prepared = (
        in_all_processes(
            lambda: process_zero_first(lambda: prepare(experiment.data, tokenizer)),
            activity="preparing the data",
        )
        if shared is None
        else shared.prepared
    )
    # The text may change between two readings, and hosts may read other files of the same name.
    require_same(
        {"data": provenance.describe(prepared, experiment.data)},
        remedy="Let all processes read the same files, and the same tokenizer",
    )
    experiment = _with_steps(experiment, prepared)
    warn_of_shortened_warmup(experiment.optim, total_steps=experiment.run.steps)
    warn_of_scratch_rates(experiment)
    _warn_of_overlap(experiment, prepared)
    vocab_size = prepared.tokenizer.vocab_size
    if experiment.model.vocab_size is not None and experiment.model.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size={experiment.model.vocab_size} is smaller than the tokenizer's {vocab_size}: "
            "leave it out, or raise it"
        )
    prompts = _encoded_prompts(experiment, prepared.tokenizer)
    programs = (
        make_programs(experiment, vocab_size=vocab_size, mesh=mesh)
        if shared is None
        else shared.programs.for_another_run()
    )
    plans = teacher_plans(experiment, programs.definition.config, mesh=mesh, tokenizer=prepared.tokenizer)
    return Setup(
        experiment=experiment,
        prepared=prepared,
        mesh=mesh,
        programs=programs,
        prompts=prompts,
        plans=plans,
    )


def _with_steps(experiment: Experiment, prepared: Prepared) -> Experiment:
    """Return the experiment with its length in steps, where it is given in epochs."""
    if experiment.run.epochs is None:
        return experiment
    # The plans of rows are saved, so that they are not packed again for the batches.
    rows = BatchSource(prepared.train, experiment.data).num_rows
    run = experiment.run.in_steps(rows, batch_size=experiment.data.batch_size)
    log.info("run.epochs=%g of %s rows are run.steps=%d", experiment.run.epochs, f"{rows:,}", run.steps)
    return dataclasses.replace(experiment, run=run)


def _warn_of_overlap(experiment: Experiment, prepared: Prepared) -> None:
    """Warn if the initial model or a teacher of a run was trained on text that the run holds out."""
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
    # Held-out loss of a model that has seen the text is too low. It is allowed, so this is a warning.
    now = provenance.describe(prepared, experiment.data)
    for directory in others:
        for sentence in provenance.overlap(directory, experiment.data, now):
            log.warning(sentence)


def _encoded_prompts(experiment: Experiment, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of the run's prompts."""
    # Prompts that cannot be sampled raise here, before training: at its end the time would be lost.
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


def with_teachers(setup: Setup, *, shared: Setup | None = None) -> Setup:
    """Return the setup with its teachers' parameters on the devices, or with those of `shared`."""
    if not setup.plans:
        return setup
    if shared is not None:
        return dataclasses.replace(setup, teachers=shared.teachers)
    num_microbatches = setup.experiment.optim.accumulation_steps
    return dataclasses.replace(setup, teachers=Teachers(setup.plans, num_microbatches=num_microbatches))
