"""`train`: the loop that turns an experiment into a run directory.

    result = train(experiment)                      # a new run in experiment.run.directory
    result = train(experiment, resume=run_dir)      # goes on from the newest intact checkpoint

The loop feeds batches, calls the compiled step (`step.py`), logs, evaluates, saves. A run can be stopped at
any time: Ctrl-C and SIGTERM save and say how to resume, and after kill -9 at most the steps since the last
save are done again, with the same data and, on the same machine and topology, the same bits.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from slmjax import startup
from slmjax.checkpoints.run_checkpoints import Checkpointer
from slmjax.checkpoints.selection import is_better
from slmjax.data.batch import Batch
from slmjax.data.pipeline import BatchSource, ReadAhead
from slmjax.distill.teachers import split_devices
from slmjax.evaluation.bits_per_byte import EvalResult
from slmjax.evaluation.compressors import compressed_bits_per_byte
from slmjax.models.zoo import describe
from slmjax.parallel import hosts
from slmjax.parallel.batches import local_sequences, place_batch
from slmjax.parallel.mesh import make_mesh
from slmjax.parallel.processes import StopSignals
from slmjax.planning import device_peaks
from slmjax.quantization.fake_quantization import phase_of
from slmjax.runner import quant_phases
from slmjax.runner.changed_schedules import warn_of_changed_schedules
from slmjax.runner.initial_state import fresh_state, restored_state
from slmjax.runner.launch import (
    CompiledPrograms,
    announce,
    new_run,
    num_parameters,
    open_trackers,
    write_description,
)
from slmjax.runner.out_of_memory import explained
from slmjax.runner.resume import is_complete, run_to_resume, tokenizer_of, warn_of_other_data
from slmjax.runner.session import Setup, set_up, with_teachers
from slmjax.telemetry.messages import MessageHandler
from slmjax.telemetry.meter import Meter
from slmjax.telemetry.profiling import Profile
from slmjax.telemetry.progress import Progress
from slmjax.telemetry.report import write_report
from slmjax.telemetry.run_directory import Category, Ledger, RunDirectory, RunLog, commit
from slmjax.telemetry.trackers import Trackers
from slmjax.training.experiment import Experiment, with_absolute_paths
from slmjax.training.metrics import named_metrics
from slmjax.training.state import TrainState, tokens_seen

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to: the fields of result.json."""

    status: str  # "finished", "interrupted" or "diverged"
    loss: float  # nats per token, on what `measured_on` says
    bits_per_byte: float  # on the same
    # "held-out text", "part of the held-out text" (if cut short), "the completions of" them, "the last
    # training batch"
    measured_on: str
    perplexity: float
    best_loss: float | None  # lowest of the evaluations on the way
    best_step: int | None  # whose checkpoint is kept beside the newest
    compressors: dict[
        str, float
    ]  # bits per byte of gzip -9 and xz -9 for the same text (its first 16 MB); empty if only part was scored
    tokens: int  # scored targets trained on, earlier sessions included
    seconds: float  # wall time of this session, from start to result
    tokens_per_second: float  # fed, padding left out, over the training steps of this session alone
    parameters: int
    step: int
    data_wait_share: float  # share of the training time spent waiting for data
    skipped: int  # steps that were undone because something was not finite, or no token was scored
    run_dir: str
    commit: str | None
    seconds_by_category: dict[str, float]
    samples: list[str]
    # share of the held-out text's bytes that the tokenizer loses: above 0, bits per byte are too low
    lost_text: float = 0.0


def train(
    experiment: Experiment,
    *,
    resume: str | Path | None = None,
    code: str | Path | None = None,
    profile: int | None = None,
    console: Console | None = None,
) -> Result:
    """Trains a model and returns what the run came to; everything else is in its run directory.

    Args:
      experiment: the settings.
      resume: a run directory to go on with; `experiment` is then usually the one its config.json holds.
      code: the experiment file, copied into the run directory.
      profile: how many steps to trace, after the first two of this session, into the directory `profile` of
        the run.
      console: where progress is shown (none: standard output).

    Raises:
      ValueError: settings, data or checkpoints that do not fit, with what to change; nothing is lost.
      memory.OutOfMemory: there was too little, with what needs less; what was saved stays.
    """
    if profile is not None and profile < 1:
        raise ValueError(f"profile is {profile}: say how many steps to trace, 1 or more")
    ledger = Ledger()
    if jax.default_backend() == "cpu":
        startup.keep_memory()
    experiment = experiment if resume is not None else with_absolute_paths(experiment)
    run = None if resume is None else run_to_resume(Path(resume), experiment)
    mesh = make_mesh(experiment.mesh, split_devices(experiment.objective.distill, jax.devices())[0])
    with ledger.timed(Category.INIT):
        peak = device_peaks.peak_flops(
            jax.devices()[0], experiment.model.layer_shape().dtype, num_devices=mesh.size
        )
    with ExitStack() as stack:
        progress = Progress(
            num_steps=experiment.run.steps, process_index=jax.process_index(), console=console
        )
        records = stack.enter_context(MessageHandler(progress.print))
        programs = stack.enter_context(CompiledPrograms())
        stack.enter_context(jax.set_mesh(mesh))
        if jax.process_count() > 1:
            log.info(
                "process %d of %d, %s",
                jax.process_index(),
                jax.process_count(),
                hosts.joined or "joined by the calling program",
            )
        with ledger.timed(Category.INIT):
            tokenizer = experiment.tokenizer if run is None else tokenizer_of(run, experiment)
            setup = set_up(experiment, tokenizer=tokenizer, mesh=mesh)
            source = BatchSource(
                setup.prepared.train,
                experiment.data,
                token_bytes=setup.prepared.tokenizer.token_bytes,
                rows=local_sequences(mesh, experiment.data.batch_size),
            )
            try:
                fresh = fresh_state(setup) if run is None else None
                setup = with_teachers(setup)
            except (RuntimeError, MemoryError) as error:
                if (out_of_memory := explained(error, setup, doing="making the first state")) is None:
                    raise
                raise out_of_memory from error
            run = run or new_run(experiment)
            run_log = stack.enter_context(run.open_log())
            records.write_to(run_log)
            checkpointer = Checkpointer(
                run.checkpoints, model=setup.definition.config, config=experiment.checkpoint
            )
            stack.callback(checkpointer.close)
            state = fresh or restored_state(setup, checkpointer)
            if int(state.step) >= experiment.run.steps and is_complete(run, int(state.step)):
                raise ValueError(
                    f"{run.path} is at step {int(state.step)} of {experiment.run.steps} already: give more "
                    "--run.steps"
                )
            warn_of_other_data(run, experiment, setup.prepared)
            warn_of_changed_schedules(run, experiment, step=int(state.step))
            write_description(setup, run, code)
            trackers = stack.enter_context(open_trackers(run, experiment))
        announce(setup, run, source, progress, int(state.step))
        stack.enter_context(progress)
        batches = stack.enter_context(source.iterate(int(state.step)))
        config = dataclasses.replace(setup.definition.config, context_length=experiment.data.sequence_length)
        meter = Meter(
            flops_per_token=describe(config).training_flops_per_token, peak_flops=peak, tokens=0, waiting=0.0
        )
        name = "profile" if jax.process_index() == 0 else f"profile-{jax.process_index()}"
        trace = Profile(
            run.path / name,
            first_step=int(state.step),
            last_step=experiment.run.steps,
            num_steps=profile,
        )
        loop = Loop(
            setup,
            run=run,
            checkpointer=checkpointer,
            ledger=ledger,
            log=run_log,
            trackers=trackers,
            progress=progress,
            meter=meter,
            batches=batches,
            state=state,
            programs=programs,
            profile=trace,
        )
        try:
            with StopSignals() as signals:
                state, status = loop.run(state, signals)
                return _finish(loop, state, status, signals)
        except (RuntimeError, MemoryError) as error:
            del state, fresh  # what the devices hold is of no more use, and the compiler may want the room
            out_of_memory = explained(
                error,
                setup,
                doing=loop.doing,
                step=loop.step,
                is_resumed=resume is not None,
                record=run_log.write,
            )
            if out_of_memory is None:
                raise
            raise out_of_memory from error


ALL = "held-out text"
PART = "part of the held-out text"
TRAINING_BATCH = "the last training batch"


class Loop:
    """The steps of one session of a run, from `first_step` until the end, a signal or divergence."""

    def __init__(
        self,
        setup: Setup,
        *,
        run: RunDirectory,
        checkpointer: Checkpointer,
        ledger: Ledger,
        log: RunLog,
        trackers: Trackers,
        progress: Progress,
        meter: Meter,
        batches: ReadAhead,
        state: TrainState,
        programs: CompiledPrograms,
        profile: Profile,
    ) -> None:
        self.setup = setup
        self.run_dir = run
        self.checkpointer = checkpointer
        self.ledger = ledger
        self.log = log
        self.trackers = trackers
        self.progress = progress
        self.meter = meter
        self.batches = batches
        self.programs = programs
        self.profile = profile
        self.doing = "training"  # or "evaluation"
        self.first_step = self.step = int(state.step)
        self.last: dict[str, Any] = {
            "measured_on": TRAINING_BATCH,
            "loss": math.nan,
            "bits_per_byte": math.nan,
        }  # until evaluated
        self.best = checkpointer.best()
        self.num_documents: int | None = None  # of the evaluations on the way
        self._saved_step = self.first_step  # where the state came from, or 0, which is never saved
        self._skipped = int(state.skipped)
        self._logged_step = self.step
        self._fed = 0  # tokens of this session, padding left out: of all processes, as this one's rows tell

    def run(self, state: TrainState, signals: StopSignals) -> tuple[TrainState, str]:
        """Trains until the last step; returns the state and how the session ended."""
        with self.profile:
            state, status = self._steps(state, signals)
            if self.profile.is_running:
                jax.block_until_ready(state.step)
        return state, status

    def _steps(self, state: TrainState, signals: StopSignals) -> tuple[TrainState, str]:
        experiment = self.setup.experiment
        while self.step < experiment.run.steps:
            with self.profile.annotated(self.step + 1):
                state, metrics = self._step(state)
            self.step += 1
            self.progress.advance(self.step)
            if self.profile.turns_after(self.step):
                with self._aside(Category.OTHER, state):
                    self.profile.turn()
            is_last = self.step == experiment.run.steps
            if self.step % experiment.run.log_every == 0 or is_last:
                limit = experiment.optim.max_consecutive_skips
                # A session that ends without one step that counted has diverged, however short it is.
                if self._log_step(state, metrics) >= (
                    min(limit, self.step - self.first_step) if is_last else limit
                ):
                    return state, "diverged"
            if self.step % experiment.eval.every == 0 and not is_last:
                self._evaluate(state)
            if self.step % experiment.checkpoint.every == 0 and not is_last:
                self.save(state)
            if not is_last and (signal := signals.requested(self.step)) is not None:
                self.progress.print(f"{signal.name} received after step {self.step}: saving")
                return state, "interrupted"
        return state, "finished"

    def _step(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The next batch, and the step with it; of the first of a session or a phase, which compiles, all is
        waited for.
        """
        begins = self.step == self.first_step or quant_phases.starts_phase(self.setup, self.step)
        batch_size = self.setup.experiment.data.batch_size
        with self.ledger.timed(Category.DATA), jax.profiler.TraceAnnotation("data"):
            batch = next(self.batches)
        self._fed += int(np.count_nonzero(batch.segment_ids)) * batch_size // len(batch.segment_ids)
        with self.ledger.timed(Category.COMPILE if begins else Category.STEP):
            placed = place_batch(batch, self.setup.mesh, batch_size=batch_size)
            if begins:
                state = self._begin_phase(state, placed)
            state, metrics = self.setup.train_step(state, placed, *self.setup.said(placed, self.step))
            if begins:
                jax.block_until_ready(metrics)
                # Compilation, and the wait for the first batch, say nothing about the pace.
                self.meter.restart(tokens=self._fed, waiting=self.batches.waiting_seconds)
                self.programs.say()
        return state, metrics

    def _begin_phase(self, state: TrainState, placed: Batch) -> TrainState:
        """Takes the programs of the phase that the next step is in; losses of another one are not compared
        with its own.
        """
        self.setup = quant_phases.at_step(self.setup, self.step)
        phase = phase_of(self.setup.definition)
        if phase is not None and self.best is not None and self.best[0] <= phase.step:
            self.best = None
        return quant_phases.begin(self.setup, state, placed)

    def evaluate(self, state: TrainState, max_documents: int | None) -> EvalResult | None:
        """Loss and bits per byte on held-out text."""
        self.doing = "evaluation"
        found = self.setup.evaluate(state, max_documents)
        self.doing = "training"
        return found

    def save(self, state: TrainState, *, best_loss: float | None = None) -> None:
        """Starts a checkpoint of this step, unless there is one."""
        if self._saved_step != self.step:
            with self._aside(Category.CHECKPOINT, state):
                self.checkpointer.save(self.step, self.setup.stored(state), best_loss=best_loss)
            self._saved_step = self.step

    def record(self, kind: str, **values: Any) -> None:
        """Writes a record of this step to the log and to the trackers."""
        self.log.write(kind, step=self.step, **values)
        self.trackers.write(kind, step=self.step, **values)

    def sample(self, state: TrainState) -> list[str]:
        """Continues the run's prompts, and keeps what comes of it in the log."""
        samples = self.setup.sample(state)
        for prompt, text in zip(self.setup.experiment.run.sample_prompts, samples, strict=False):
            self.record("sample", prompt=prompt, text=text)
        return samples

    @contextmanager
    def _aside(self, category: Category, state: TrainState) -> Iterator[None]:
        """Time spent on other things than training: tokens per second do not count it."""
        with self.ledger.timed(Category.STEP):
            jax.block_until_ready(state.step)  # steps under way are training
        started = time.perf_counter()
        with self.ledger.timed(category):
            yield
        self.meter.leave_out(time.perf_counter() - started)

    def _log_step(self, state: TrainState, metrics: dict[str, Any]) -> float:
        """Writes and shows the figures of this step; returns how many steps in a row were undone up to it."""
        with self.ledger.timed(Category.STEP):
            values = named_metrics(self.setup.definition.config, jax.device_get(metrics))
        figures = self.meter.measure(
            tokens=self._fed,
            waiting=self.batches.waiting_seconds,
            nll=values["nll"],
            num_bytes=values.pop("bytes"),
        )
        self.record(
            "train",
            **dataclasses.asdict(figures),
            **values,
            **self.setup.flips.count(state.trainable, self.step),
        )
        self.progress.update(self.step, loss=values["loss"], metrics=figures)
        if undone := int(values["skipped"]) - self._skipped:
            log.warning(
                (
                    "%d of steps %d to %d undone, their loss or gradient is not finite or no token is "
                    "scored: "
                    "%d "
                    "in all, %d in a row"
                ),
                undone,
                self._logged_step + 1,
                self.step,
                values["skipped"],
                values["skipped_in_a_row"],
            )
        self._skipped += undone
        if self.last["measured_on"] == TRAINING_BATCH:
            self.last |= {"loss": values["loss"], "bits_per_byte": figures.bits_per_byte}
        self._logged_step = self.step
        return values["skipped_in_a_row"]

    def _evaluate(self, state: TrainState) -> None:
        """Evaluates on the way, samples, and saves the state if it is the best so far."""
        with self._aside(Category.EVAL, state):
            found = self.evaluate(state, self.setup.experiment.eval.max_documents)
            if self.setup.experiment.eval.sample:
                self.sample(state)
        if found is None:
            return
        self.num_documents = found.documents
        self.last = {
            "measured_on": found.measured_on(PART),
            "loss": found.loss,
            "bits_per_byte": found.bits_per_byte,
        }
        self.record("eval", documents=found.documents, **found.figures())
        self.progress.print(f"step {self.step}: held-out {found.text()}")
        if self.is_best(found.loss):
            self.save(state, best_loss=found.loss)

    def is_best(self, loss: float) -> bool:
        """Return whether the held-out loss of this step is the lowest so far, as which it is then noted."""
        if not is_better(loss, None if self.best is None else self.best[1]):
            return False
        self.best = (self.step, loss)
        return True


# Before and after the loop ----------------------------------------------------------------------------------
def _finish(loop: Loop, state: TrainState, status: str, signals: StopSignals) -> Result:
    """Saves, evaluates on all held-out text, samples, and writes result.json.

    The state is safe on disk before the rest begins, and a signal that comes meanwhile ends the session as
    interrupted: resuming makes up for what was left out.
    """
    setup = loop.setup
    run = loop.run_dir
    loop.save(state)
    with loop.ledger.timed(Category.CHECKPOINT):
        loop.checkpointer.wait()
    found = None
    samples = []
    compressors = {}
    with loop.ledger.timed(Category.EVAL):
        if status != "interrupted" and not signals.received:
            found = loop.evaluate(state, None)
        if found is not None and not signals.received:
            if jax.process_index() == 0 and found.is_all:  # else they would be of another text
                compressors = compressed_bits_per_byte(setup.prepared.heldout_text())
            samples = loop.sample(state)
        if found is not None and found.documents == loop.num_documents and loop.is_best(found.loss):
            loop.checkpointer.mark_best(loop.step, found.loss)
    if signals.received and status == "finished":
        status = "interrupted"
    seconds = loop.ledger.seconds()
    figures = loop.last
    if found is not None:
        figures = {
            "measured_on": found.measured_on(ALL),
            "loss": found.loss,
            "bits_per_byte": found.bits_per_byte,
        }
        loop.record("eval", documents=found.documents, complete=True, **found.figures())
    result = Result(
        status=status,
        **figures,
        perplexity=math.exp(min(figures["loss"], 700.0)),
        best_loss=None if loop.best is None else loop.best[1],
        best_step=None if loop.best is None else loop.best[0],
        compressors=compressors,
        tokens=tokens_seen(state),
        seconds=sum(seconds.values()),
        tokens_per_second=loop.meter.tokens_per_second,
        parameters=num_parameters(setup.definition),
        step=loop.step,
        skipped=int(state.skipped),
        run_dir=str(run.path),
        commit=commit()["commit"],
        seconds_by_category=seconds,
        samples=samples,
        data_wait_share=loop.meter.data_wait_share,
        lost_text=setup.prepared.lost_text,
    )
    if jax.process_index() == 0:
        run.write_json("result.json", dataclasses.asdict(result))
    loop.record("result", status=status, **figures)
    if jax.process_index() == 0:
        _write_page(run)
    return result


def _write_page(run: RunDirectory) -> None:
    """The run's page, where the extra that draws it is there; what goes wrong with it is no reason to
    fail.
    """
    try:
        write_report(run.path)
    except Exception as error:
        log.info("no report.html: %s", error)
