"""`train`: the loop that turns an experiment into a run directory.

    result = train(experiment)                      # a new run in experiment.run.directory
    result = train(experiment, resume=run_dir)      # resumes from the newest intact checkpoint

The loop feeds batches, calls the compiled step (`training/step.py`), logs, evaluates, saves. A run can be
stopped at any time. After Ctrl-C or SIGTERM it stops after the step, saves and leaves without evaluating; the
last message has the command that resumes. A second one ends at once. After kill -9 at most the steps since
the last checkpoint are repeated, with the same data and, on the same machine and topology, the same bits.
"""

import collections
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from rich.console import Console

from slmjax import faults
from slmjax.checkpoints.selection import is_better
from slmjax.data.batch import Batch
from slmjax.evaluation.bits_per_byte import EvalResult
from slmjax.evaluation.compressors import compressed_bits_per_byte
from slmjax.parallel.batches import place_batch
from slmjax.parallel.processes import share_signals
from slmjax.quantization.fake_quantization import phase_of
from slmjax.runner import quant_phases
from slmjax.runner.launch import num_parameters
from slmjax.runner.out_of_memory import explaining_out_of_memory
from slmjax.runner.result import Result, write_heldout_documents, write_page, write_result
from slmjax.runner.session import Session, open_session, resume_command
from slmjax.runner.session_record import run_seconds
from slmjax.stop_signals import INTERRUPTED_STATUS, Stopped, StopSignals
from slmjax.telemetry.peak_memory import PeakMemory
from slmjax.telemetry.recorded_environment import commit
from slmjax.telemetry.run_directory import Category
from slmjax.training.experiment import Experiment
from slmjax.training.metrics import named_metrics
from slmjax.training.state import TrainState, not_finite

T = TypeVar("T")
log = logging.getLogger(__name__)


def train(
    experiment: Experiment,
    *,
    resume: str | Path | None = None,
    code: str | Path | None = None,
    profile: int | None = None,
    console: Console | None = None,
    restart: bool = False,
) -> Result:
    """Train a model and return the result; everything else is in the run directory.

    Args:
      experiment: the settings.
      resume: a run directory to resume; `experiment` is then usually the one in its config.json.
      code: the experiment file, copied into the run directory.
      profile: how many steps to trace, after the first two of this session, into the directory `profile` of
        the run.
      console: where progress is shown (none: standard output).
      restart: with `resume`, begin again at step 0 if no checkpoint of the run is left.

    Raises:
      ValueError: settings, data or checkpoints that do not fit, with what to change; nothing is lost.
      memory.OutOfMemory: there was too little, with options that need less; checkpoints stay.
    """
    if profile is not None and profile < 1:
        raise ValueError(f"profile is {profile}: give the number of steps to trace, 1 or more")
    # Inside the session, so that an error still closes the log and waits for checkpoints that are being
    # written.
    with StopSignals() as signals, signals.training():
        share_signals(signals)
        with open_session(
            experiment,
            resume=resume,
            restart=restart,
            code=code,
            profile=profile,
            console=console,
            signals=signals,
        ) as session:
            loop = Loop(session, signals)
            # Inside the session, whose end waits for processes that may be gone.
            with (
                signals.together(),
                explaining_out_of_memory(
                    session.setup,
                    activity=lambda: loop.activity,
                    step=lambda: loop.step,
                    is_resumed=session.is_resumed,
                    record=session.telemetry.log.write,
                ),
            ):
                # No variable keeps the state alive: where memory runs out, compiling for advice needs its
                # memory.
                return finish(loop, *loop.run(session.take_state()))


ALL = "held-out text"
PART = "part of the held-out text"
TRAINING_BATCH = "the last training batch"

# The host prepares the next step while one computes and one waits.
STEPS_UNDER_WAY = 2


class Loop:
    """The steps of one session of a run, until the last one, a signal or divergence."""

    def __init__(self, session: Session, signals: StopSignals) -> None:
        self.session = session
        self.signals = signals
        self.setup = session.setup
        self.telemetry = session.telemetry
        self.checkpointer = session.checkpointer
        self.batches = session.batches
        self.trained = session.trained
        self.activity = "training"  # or "evaluation"
        self.population = 1  # runs that are trained in the same program
        self.peak_memory = PeakMemory(self.setup.mesh.local_devices)
        assert session.state is not None
        self.first_step = int(session.state.step)
        self.step = self.first_step
        # What result.json holds of a run whose held-out text is never evaluated.
        self.last: dict[str, Any] = {
            "measured_on": TRAINING_BATCH,
            "loss": math.nan,
            "bits_per_byte": math.nan,
        }
        self.best = session.checkpointer.best()
        # The text by whose loss the best step is selected, once it was evaluated in this session.
        self.best_measured_on: str | None = None
        self.part_loss: float | None = None  # of the last step, if that text is a part of the held-out text
        self._saved_step: int | None = self.first_step  # of the checkpoint that the state came from, or 0
        self._skipped = int(session.state.skipped)
        self._logged_step = self.step
        self._evaluated_step = self.step  # of `last`, if it is of an evaluation
        # Tokens of this session without padding, of all processes, estimated from the sequences of this one.
        self._fed = 0
        # A metric of each step that the devices may not have done yet.
        self._under_way: collections.deque[jax.Array] = collections.deque()

    def run(self, state: TrainState) -> tuple[TrainState, str]:
        """Train until the last step. Return the state and the status: finished, interrupted or diverged."""
        with self.telemetry.profile as profile:
            state, status = self._steps(state)
            if profile.is_running:
                jax.block_until_ready(state.step)  # steps that are under way belong to the trace
        return state, status

    def _steps(self, state: TrainState) -> tuple[TrainState, str]:
        experiment = self.setup.experiment
        profile = self.telemetry.profile
        # The host counts steps itself: reading `state.step` would wait for the device at every step.
        while self.step < experiment.run.steps:
            with profile.annotated(self.step + 1):
                state, metrics = self._step(state)
            self.step += 1
            self.telemetry.progress.advance(self.step)
            if profile.turns_after(self.step):
                with self._not_training(Category.OTHER, state):
                    profile.turn()
            if (status := self.after_step(state, metrics)) is not None:
                return state, status
            if not self.is_last and (reason := self._reason_to_stop()):
                self.telemetry.progress.print(f"{reason} after step {self.step}: saving")
                return state, "interrupted"
        return state, "finished"

    def _reason_to_stop(self) -> str:
        """Return why the session ends after this step, or nothing; all processes stop after the same one."""
        if (signal := self.signals.requested()) is not None:
            return f"{signal.name} received"
        return "run.stop_after" if self.step == self.setup.experiment.run.stop_after else ""

    @property
    def is_last(self) -> bool:
        """Whether the step that was just taken is the last one of the run."""
        return self.step == self.setup.experiment.run.steps

    @property
    def is_due(self) -> bool:
        """Whether `after_step` does anything after the step that was just taken."""
        return self.reads_state or self.step % self.setup.experiment.run.log_every == 0

    @property
    def reads_state(self) -> bool:
        """Whether `after_step` and `finish` need the state after the step that was just taken."""
        experiment = self.setup.experiment
        every = (experiment.eval.every, experiment.checkpoint.every)
        return self.is_last or experiment.run.log_flips or any(self.step % steps == 0 for steps in every)

    def after_step(self, state: TrainState | None, metrics: dict[str, Any]) -> str | None:
        """Log, evaluate and save where the step that was just taken is due. Return "diverged" if it has.

        Args:
          state: after the step; None where it is not needed (`reads_state`).
          metrics: of the step.
        """
        experiment = self.setup.experiment
        # Metrics are fetched for lines of the log alone. Between them the host runs ahead of the device.
        if self.step % experiment.run.log_every == 0 or self.is_last:
            limit = experiment.optim.max_consecutive_skips
            if self.is_last:
                # A session all of whose steps were skipped has diverged, however short it is.
                limit = min(limit, self.step - self.first_step)
            if self._log_step(state, metrics) >= limit:
                return "diverged"
        if state is None:
            return None
        # The last step is evaluated and saved by `finish`, on all of the held-out text.
        if self.step % experiment.eval.every == 0 and not self.is_last:
            self._evaluate(state)
        if self.step % experiment.checkpoint.every == 0 and not self.is_last:
            self.save(state)
        return None

    def _step(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Take the next batch and train on it.

        The first step of a session or a phase compiles, and is waited for; others run while the host
        continues.
        """
        compiles = self.step == self.first_step or quant_phases.starts_phase(self.setup, self.step)
        batch_size = self.setup.experiment.data.batch_size
        ledger = self.telemetry.ledger
        if compiles:
            # Said before it begins: for a large model nothing else is shown for minutes.
            self.telemetry.progress.print(f"compiling the train step: step {self.step + 1} follows")
        with ledger.timed(Category.DATA), jax.profiler.TraceAnnotation("data"):
            batch = next(self.batches)
        # Counted from this process's sequences, so that no communication is needed for a rate in the log.
        self.count_fed(int(np.count_nonzero(batch.segment_ids)) * batch_size // len(batch.segment_ids))
        with ledger.timed(Category.COMPILE if compiles else Category.STEP):
            placed = place_batch(batch, self.setup.mesh, batch_size=batch_size)
            if compiles:
                state = self.begin_phase(state, placed)
            # A program of its own: teachers may be on other devices, and then work ahead of the student.
            teacher_outputs = self.setup.teacher_outputs(placed, self.step)
            # The old state is donated: its buffers are gone after this call, so nothing
            # else may refer to it.
            state, metrics = self.setup.programs.train_step(state, placed, teacher_outputs)
            self.trained.add(metrics.pop("trained_targets"))
            faults.at("step", self.step + 1)
            if faults.taints(self.step + 1):
                state = not_finite(state)
            if compiles:
                jax.block_until_ready(metrics)
                self.restart_meter()
                self.telemetry.cache.report()
                # From now on there are steps to save.
                self.signals.defer()
            self._limit_steps_under_way(metrics["loss"])
        return state, metrics

    def count_fed(self, num_tokens: int) -> None:
        """Count tokens of a batch, without padding, for the pace of this session."""
        self._fed += num_tokens

    def restart_meter(self) -> None:
        """Measure the pace from now on: without compilation and without the wait for the first batch."""
        self.telemetry.meter.restart(tokens=self._fed, waiting=self.batches.waiting_seconds)

    def _limit_steps_under_way(self, metric: jax.Array) -> None:
        """Wait until few steps are left to the devices: a signal stops the run only once they are done."""
        self._under_way.append(metric)
        if len(self._under_way) > STEPS_UNDER_WAY:
            jax.block_until_ready(self._under_way.popleft())

    def begin_phase(self, state: TrainState, placed: Batch) -> TrainState:
        """Take the programs of the next step's quantization phase, and the state with which it begins."""
        self.setup = quant_phases.setup_of_phase(self.setup, self.step)
        phase = phase_of(self.setup.programs.definition)
        if phase is not None and self.best is not None and self.best[0] <= phase.step:
            # Losses of another phase do not compare with those of this one.
            self.best = None
        return quant_phases.begin_phase(self.setup, state, placed)

    def evaluate(self, state: TrainState, max_documents: int | None) -> EvalResult | None:
        """Return loss and bits per byte on held-out text.

        None where nothing is held out, or a signal came: it ends the evaluation between two batches.
        """
        self.activity = "evaluation"
        try:
            self._heed_signals()
            result = self.setup.evaluate(state, max_documents, on_batch=self._heed_signals)
        except Stopped:
            result = None
        # Not after an error: it is said to be one of evaluation, for example where memory runs out.
        self.activity = "training"
        return result

    def _heed_signals(self) -> None:
        """Raise `Stopped` if the run is to stop, in all processes at the same call."""
        if (number := self.signals.requested()) is not None:
            raise Stopped(number.name, status=INTERRUPTED_STATUS)

    def save(self, state: TrainState, *, best_loss: float | None = None, diverged: bool = False) -> None:
        """Start to write a checkpoint of this step, unless there is one."""
        # A step may be both an evaluation's best and due for a checkpoint, or the one that was restored.
        if self._saved_step != self.step:
            with self._not_training(Category.CHECKPOINT, state):
                items = self.setup.checkpoint_items(state, self.trained)
                self.checkpointer.save(self.step, items, best_loss=best_loss, diverged=diverged)
            self._saved_step = self.step

    def save_last(self, state: TrainState, *, diverged: bool = False) -> bool:
        """Save this step and wait for it. Return whether it is on disk, to be resumed from."""
        if self.checkpointer.last_saved != self.step:
            if self.step in dict(self.checkpointer.failures):
                self._saved_step = None  # it failed as the best of the evaluations, and is tried once more
            self.save(state, diverged=diverged)
            with self.telemetry.ledger.timed(Category.CHECKPOINT):
                self.checkpointer.wait()
        return self.checkpointer.last_saved == self.step

    def record(self, kind: str, **values: Any) -> None:
        """Write a record of this step to the log and to the trackers."""
        self.telemetry.record(kind, step=self.step, **values)

    def sample(self, state: TrainState) -> list[str]:
        """Return continuations of the run's prompts, which are logged too; none if a signal comes."""
        samples = self.unless_stopped(lambda: self.setup.sample(state)) or []
        for prompt, text in zip(self.setup.experiment.run.sample_prompts, samples, strict=False):
            self.record("sample", prompt=prompt, text=text)
        return samples

    def unless_stopped(self, work: Callable[[], T]) -> T | None:
        """Return what `work` does, in which no other process takes part; None if a signal came or comes."""
        try:
            with self.signals.interruptible():
                return None if self.signals.received else work()
        except Stopped:
            return None

    @contextmanager
    def _not_training(self, category: Category, state: TrainState) -> Iterator[None]:
        """Attribute the time within to a category, and leave it out of tokens per second."""
        ledger = self.telemetry.ledger
        with ledger.timed(Category.STEP):
            jax.block_until_ready(state.step)  # steps that are under way are training
        started = time.perf_counter()
        with ledger.timed(category):
            yield
        self.telemetry.meter.leave_out(time.perf_counter() - started)

    def _log_step(self, state: TrainState | None, metrics: dict[str, Any]) -> float:
        """Log and show the metrics of this step. Return how many steps in a row up to it were not finite."""
        with self.telemetry.ledger.timed(Category.STEP):
            config = self.setup.programs.definition.config
            values = named_metrics(config, jax.device_get(metrics))
            self.trained.total()  # adds up the counts of steps that are done, so that few are pending
        throughput = self.telemetry.meter.measure(
            tokens=self._fed,
            waiting=self.batches.waiting_seconds,
            nll=values["nll"],
            num_bytes=values.pop("bytes"),
        )
        # After the throughput, which must not include the time of counting.
        flips = {} if state is None else self.setup.programs.flips.count(state.params, self.step)
        self.record("train", **dataclasses.asdict(throughput), **values, **flips)
        shown = {name: values.get(name) for name in ("learning_rate", "grad_norm", "divergence")}
        self.telemetry.progress.update(self.step, metrics=throughput, loss=values["loss"], **shown)
        self._warn_of_skipped(int(values["skipped"]), int(values["skipped_in_a_row"]))
        if self.last["measured_on"] == TRAINING_BATCH:
            self.last |= {"loss": values["loss"], "bits_per_byte": throughput.bits_per_byte}
        self._logged_step = self.step
        return values["skipped_in_a_row"]

    def _warn_of_skipped(self, total: int, in_a_row: int) -> None:
        """Warn of steps that were skipped since the last line of the log."""
        if skipped := total - self._skipped:
            log.warning(
                "%d of steps %d to %d skipped, their loss, gradient or new state is not finite or no token "
                "is scored: %d in all, %d in a row",
                skipped,
                self._logged_step + 1,
                self.step,
                total,
                in_a_row,
            )
        self._skipped = total

    def _evaluate(self, state: TrainState) -> None:
        """Evaluate on the way, sample, and save the state if it is the best so far."""
        with self._not_training(Category.EVAL, state):
            result = self.evaluate(state, self.setup.experiment.eval.max_documents)
            if self.setup.experiment.eval.sample:
                self.sample(state)
        if result is None:
            return
        self._record_evaluation(result)
        # Every process has the same loss, so all of them decide alike, as a collective save requires.
        if self._is_best(result):
            self.save(state, best_loss=result.loss)

    @property
    def evaluates_part(self) -> bool:
        """Whether the evaluations on the way are of a part of the held-out documents."""
        most = self.setup.experiment.eval.max_documents
        return most is not None and most < sum(len(shards) for shards in self.setup.prepared.heldout)

    def evaluate_last(self, state: TrainState) -> EvalResult | None:
        """Evaluate the last state on all held-out text, and let it take part in the choice of the best.

        Only losses on the same text compare: where the evaluations on the way are of a part of it, the last
        state is evaluated on that part first.
        """
        # Without another evaluation there is nothing to choose from.
        is_candidate = self.best_measured_on is not None or self.best is not None
        part = None
        if is_candidate and self.evaluates_part:
            part = self.evaluate(state, self.setup.experiment.eval.max_documents)
        if part is not None:
            self._record_evaluation(part)
            self.part_loss = part.loss
        evaluation = self.evaluate(state, None)
        compared = part or evaluation
        if is_candidate and compared is not None and self._is_best(compared):
            self.checkpointer.mark_best(self.step, compared.loss)
        return evaluation

    def _record_evaluation(self, result: EvalResult) -> None:
        """Log and show an evaluation on the text of the evaluations on the way."""
        self._evaluated_step = self.step
        self.last = {
            "measured_on": self._text_of(result),
            "loss": result.loss,
            "bits_per_byte": result.bits_per_byte,
        }
        self.record("eval", documents=result.documents, **result.metrics())
        text = "part of held-out text" if self.evaluates_part else "held-out text"
        self.telemetry.progress.print(f"step {self.step}: {text}, {result.text()}")

    def last_metrics(self) -> dict[str, Any]:
        """Return the newest metrics; of an evaluation after an earlier step, `measured_on` names the step."""
        text = self.last["measured_on"]
        is_earlier = text != TRAINING_BATCH and self._evaluated_step != self.step
        return self.last | (
            {"measured_on": f"{text}, after step {self._evaluated_step}"} if is_earlier else {}
        )

    def _text_of(self, result: EvalResult) -> str:
        """Name the text of the evaluations on the way."""
        return result.measured_on(PART if self.evaluates_part else ALL)

    def _is_best(self, result: EvalResult) -> bool:
        """Return whether this step's held-out loss is the lowest so far, and note it as the best if so."""
        self.best_measured_on = self._text_of(result)
        if not is_better(result.loss, None if self.best is None else self.best[1]):
            return False
        self.best = (self.step, result.loss)
        return True


# After the loop ---------------------------------------------------------------------------------------------
def finish(loop: Loop, state: TrainState, status: str) -> Result:
    """Save, evaluate on all held-out text, sample, and write result.json.

    The state is safe on disk before the rest begins, which a signal cuts short. A run that was interrupted
    leaves it out.
    """
    telemetry = loop.telemetry
    # Saved first: an evaluation takes long, and a job that is preempted is killed soon after its signal.
    is_saved = loop.save_last(state, diverged=status == "diverged")
    evaluation = None
    samples = []
    compressors = {}
    if status != "interrupted":
        with telemetry.ledger.timed(Category.EVAL):
            evaluation = loop.evaluate_last(state)
            if evaluation is not None:
                # Compressors read all held-out text, so they compare with nothing else.
                if jax.process_index() == 0 and evaluation.is_all:
                    text = loop.setup.prepared.heldout_text()
                    compressors = loop.unless_stopped(lambda: compressed_bits_per_byte(text)) or {}
                samples = loop.sample(state)
    if status == "finished" and evaluation is not None and evaluation.tokens and math.isnan(evaluation.loss):
        # Its parameters are finite, and too large to compute with: no run may resume from them.
        status = "diverged"
        loop.checkpointer.withdraw(loop.step)
    if not is_saved and status != "diverged":
        status = "not_saved"
        _explain_not_saved(loop)
    metrics = loop.last_metrics()
    if evaluation is not None:
        metrics = {
            "measured_on": evaluation.measured_on(ALL),
            "loss": evaluation.loss,
            "bits_per_byte": evaluation.bits_per_byte,
        }
        loop.record("eval", documents=evaluation.documents, complete=True, **evaluation.metrics())
        if jax.process_index() == 0:
            write_heldout_documents(telemetry.run, evaluation)
    elif status == "finished" and (number := loop.signals.requested()) is not None:
        telemetry.progress.print(
            f"{number.name} received after the last step: the evaluation of the held-out text was cut short. "
            f"slmjax eval {telemetry.run.path} does it"
        )
    result = _result(loop, state, status=status, metrics=metrics, compressors=compressors, samples=samples)
    loop.record("result", status=status, **metrics)
    if jax.process_index() == 0:
        resume = resume_command(telemetry.run.path, loop.setup.experiment)
        result = write_result(telemetry.run, result, resume=resume)
        # The page takes seconds, which a preempted job may not have. `slmjax report` writes it.
        if not loop.signals.received and status != "interrupted":
            write_page(telemetry.run)
    return result


def _explain_not_saved(loop: Loop) -> None:
    """Log what is lost because the last state could not be saved, and how to get it again."""
    last = loop.checkpointer.last_saved
    reasons = dict(loop.checkpointer.failures)
    resume = resume_command(loop.telemetry.run.path, loop.setup.experiment)
    log.error(
        "step %d is LOST (%s): %s. Free disk space, then repeat the steps since with: %s",
        loop.step,
        reasons.get(loop.step, "its save did not end"),
        "the run has no checkpoint" if last is None else f"the newest checkpoint is of step {last}",
        resume,
    )


def _result(
    loop: Loop,
    state: TrainState,
    *,
    status: str,
    metrics: dict[str, Any],
    compressors: dict[str, float],
    samples: list[str],
) -> Result:
    """Return the result of the run at the end of this session."""
    setup = loop.setup
    telemetry = loop.telemetry
    seconds = telemetry.ledger.seconds()
    session_seconds = sum(seconds.values())
    best_step, best_loss = (None, None) if loop.best is None else loop.best
    return Result(
        status=status,
        **metrics,
        # Beyond this, the exponential overflows.
        perplexity=math.exp(min(metrics["loss"], 700.0)),
        best_loss=best_loss,
        best_step=best_step,
        compressors=compressors,
        run_tokens=loop.trained.total(),
        run_seconds=run_seconds(telemetry.run, session_seconds, first_step=loop.first_step + 1),
        session_tokens=loop.trained.in_session(),
        session_seconds=session_seconds,
        session_tokens_per_second=telemetry.meter.tokens_per_second,
        parameters=num_parameters(setup.programs.definition),
        step=loop.step,
        skipped=int(state.skipped),
        run_dir=str(telemetry.run.path),
        commit=commit()["commit"],
        session_seconds_by_category=seconds,
        samples=samples,
        session_data_wait_share=telemetry.meter.data_wait_share,
        lost_text=setup.prepared.lost_text,
        best_measured_on=loop.best_measured_on,
        part_loss=loop.part_loss,
        log_lines_lost=telemetry.log.lost,
        population=loop.population,
        session_peak_memory_bytes=loop.peak_memory.bytes_so_far(),
    )
