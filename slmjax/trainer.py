"""`train`: the loop that turns an experiment into a run directory.

    result = train(experiment)                      # a new run in experiment.run.directory
    result = train(experiment, resume=run_dir)      # goes on from the newest intact checkpoint

The loop feeds batches, calls the compiled step (`step.py`), logs, evaluates, saves. A run can be stopped at any time:
Ctrl-C and SIGTERM save and say how to resume, and after kill -9 at most the steps since the last save are done again, with
the same data and, on the same machine and topology, the same bits.
"""

import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from slmjax import config as config_io
from slmjax import sampling, sharding
from slmjax.checkpoint import Checkpointer
from slmjax.data.batch import Batch
from slmjax.data.pipeline import BatchSource, ReadAhead
from slmjax.data.preparation import Prepared, prepare
from slmjax.data.windows import EvaluationBatches, evaluation_batches
from slmjax.evaluation.bits_per_byte import EvalResult, evaluate_batches, make_eval_step
from slmjax.evaluation.compressors import compressed_bits_per_byte
from slmjax.experiment import Experiment
from slmjax.optim import make_optimizer
from slmjax.parameters import Definition, define
from slmjax.processes import StopSignals, broadcast_text, process_zero_first
from slmjax.progress import Progress
from slmjax.runlog import Category, Ledger, Log, RunDirectory, commit, environment
from slmjax.step import TrainState, TrainStep, init_state, make_train_step, state_shapes, tokens_seen

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to: the fields of result.json."""

    status: str  # "finished", "interrupted" or "diverged"
    loss: float  # nats per token on all held-out text (of the last training step where nothing is held out)
    bits_per_byte: float  # on the same text
    perplexity: float
    best_loss: float | None  # lowest of the evaluations on the way
    compressors: dict[str, float]  # bits per byte that gzip -9 and xz -9 need for the same held-out text
    tokens: int  # scored targets trained on, earlier sessions included
    seconds: float  # wall time of this session, from start to result
    tokens_per_second: float  # over the training steps of this session alone
    parameters: int
    step: int
    data_wait_share: float  # share of the training time spent waiting for data
    skipped: int  # steps that were undone because something was not finite
    run_dir: str
    commit: str | None
    seconds_by_category: dict[str, float]
    samples: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What is fixed before the first step."""

    experiment: Experiment
    run: RunDirectory
    prepared: Prepared
    mesh: Mesh
    definition: Definition
    shapes: TrainState
    train_step: TrainStep
    eval_step: Any
    checkpointer: Checkpointer

    def heldout(self, max_documents: int | None) -> EvaluationBatches | None:
        """Batches of the held-out text, or None where nothing is held out."""
        data, settings = self.experiment.data, self.experiment.eval
        if not sum(len(shards) for shards in self.prepared.heldout):
            return None
        return evaluation_batches(
            self.prepared.heldout, sequence_length=data.sequence_length, batch_size=settings.batch_size or data.batch_size,
            overlap=settings.overlap, max_documents=max_documents, process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip

    def evaluate(self, state: TrainState, max_documents: int | None) -> EvalResult | None:
        """Loss and bits per byte on held-out text."""
        batches = self.heldout(max_documents)
        if batches is None:
            return None
        return evaluate_batches(self.eval_step, state.evaluated, state.frozen, batches, mesh=self.mesh)


def set_up(experiment: Experiment, run: RunDirectory, *, mesh: Mesh, report: Progress) -> Setup:
    """Prepares data, resolves the model and compiles nothing yet. Raises ValueError for settings that do not fit."""
    divisor = sharding.batch_divisor(mesh) * experiment.optim.accumulation_steps
    for name, rows in (("data.batch_size", experiment.data.batch_size), ("eval.batch_size", experiment.eval.batch_size)):
        if rows is not None and rows % divisor:
            raise ValueError(f"{name}={rows} must be a multiple of {divisor}: rows are divided over the mesh and over accumulation steps")
    prepared = process_zero_first(lambda: prepare(experiment.data, experiment.tokenizer, log=report.print))
    vocab_size = prepared.tokenizer.vocab_size
    if experiment.model.vocab_size is not None and experiment.model.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size={experiment.model.vocab_size} is smaller than the tokenizer's {vocab_size}: leave it out, or raise it"
        )
    model = dataclasses.replace(experiment.model, vocab_size=experiment.model.vocab_size or vocab_size)
    definition = define(model)
    optimizer = make_optimizer(experiment.optim, definition.params, total_steps=experiment.run.steps)
    shapes = state_shapes(definition, optimizer, with_ema=experiment.optim.ema_decay is not None, mesh=mesh)
    train_step = make_train_step(
        definition, optimizer, objective=experiment.objective, optim=experiment.optim, shapes=shapes, total_steps=experiment.run.steps
    )
    return Setup(
        experiment=experiment, run=run, prepared=prepared, mesh=mesh, definition=definition, shapes=shapes, train_step=train_step,
        eval_step=make_eval_step(definition), checkpointer=Checkpointer(run.checkpoints, model=model, config=experiment.checkpoint),
    )  # fmt: skip


def first_state(setup: Setup, *, resume: bool) -> TrainState:
    """The state to go on from: of the run's newest checkpoint, of another model, or fresh."""
    experiment = setup.experiment
    if resume and setup.checkpointer.steps():
        return TrainState.from_items(setup.checkpointer.restore(setup.shapes.items())[1])
    optimizer = make_optimizer(experiment.optim, setup.definition.params, total_steps=experiment.run.steps)
    state = init_state(setup.definition, optimizer, shapes=setup.shapes, seed=experiment.run.seed)
    source = experiment.init.source()
    if source is None:
        return state
    if not (source / "model.json").is_file():
        raise ValueError(f"init.path={source} is not a run directory: it has no model.json")
    other = Checkpointer(source / "checkpoints", model=setup.definition.config, config=experiment.checkpoint)
    try:
        model = other.restore({"model": setup.shapes.items()["model"]})[1]["model"]
    finally:
        other.close()
    ema = None if state.ema is None else jax.tree.map(lambda leaf: leaf.copy(), model["params"])
    return dataclasses.replace(state, trainable=model["params"], frozen=model["buffers"], ema=ema)


def train(
    experiment: Experiment, *, resume: str | Path | None = None, code: str | Path | None = None, console: Console | None = None
) -> Result:
    """Trains a model and returns what the run came to; everything else is in its run directory.

    Args:
      experiment: the settings.
      resume: a run directory to go on with; `experiment` is then usually the one its config.json holds.
      code: the experiment file, copied into the run directory.
      console: where progress is shown (none: standard output).

    Raises:
      ValueError: settings, data or checkpoints that do not fit, with what to change; nothing is lost.
    """
    ledger = Ledger()
    mesh = sharding.make_mesh(experiment.mesh)
    with ExitStack() as stack:
        run = _run_directory(experiment, resume)
        run_log = stack.enter_context(run.open_log())
        progress = Progress(num_steps=experiment.run.steps, process_index=jax.process_index(), console=console)
        stack.enter_context(_LogRecords(run_log, progress))
        stack.enter_context(jax.set_mesh(mesh))
        with ledger.timed(Category.INIT):
            setup = set_up(experiment, run, mesh=mesh, report=progress)
            stack.callback(setup.checkpointer.close)
            _write_description(setup, code)
            state = first_state(setup, resume=resume is not None)
            source = BatchSource(
                setup.prepared.train, experiment.data, token_bytes=setup.prepared.tokenizer.token_bytes,
                process_index=jax.process_index(), process_count=jax.process_count(),
            )  # fmt: skip
        first_step = int(state.step)
        if first_step >= experiment.run.steps:
            raise ValueError(f"{run.path} is at step {first_step} of {experiment.run.steps} already: give more --run.steps to go on")
        _announce(setup, source, progress, first_step)
        stack.enter_context(progress)
        batches = stack.enter_context(source.iterate(first_step))
        loop = Loop(setup=setup, ledger=ledger, log=run_log, progress=progress, batches=batches, first_step=first_step)
        with StopSignals() as signals:
            state, status = loop.run(state, signals)
        result = _finish(loop, state, status)
    return result


class Loop:
    """The steps of one session of a run, from `first_step` until the end, a signal or divergence."""

    def __init__(self, *, setup: Setup, ledger: Ledger, log: Log, progress: Progress, batches: ReadAhead, first_step: int) -> None:
        self.setup, self.ledger, self.log, self.progress, self.batches = setup, ledger, log, progress, batches
        self.first_step = self.step = first_step
        self.last: dict[str, float] = {}  # metrics of the last logged step
        self.best = setup.checkpointer.best()
        self._saved_step = -1
        self.timed_targets, self.timed_seconds = 0.0, 0.0  # of the logged stretches, compilation and evaluation left out
        self._logged_step, self._logged_time, self._logged_wait = first_step, time.perf_counter(), 0.0

    def run(self, state: TrainState, signals: StopSignals) -> tuple[TrainState, str]:
        """Trains until the last step; returns the state and how the session ended."""
        settings, every = self.setup.experiment.run, self.setup.experiment
        while self.step < settings.steps:
            with self.ledger.timed(Category.DATA):
                batch = next(self.batches)
            with self.ledger.timed(Category.COMPILE if self.step == self.first_step else Category.STEP):
                state, metrics = self.setup.train_step(state, sharding.place_batch(batch, self.setup.mesh))
                if self.step == self.first_step:
                    jax.block_until_ready(metrics)
                    self._logged_time = time.perf_counter()  # compilation says nothing about the pace
            self.step += 1
            self.progress.advance(self.step)
            is_last = self.step == settings.steps
            if self.step % settings.log_every == 0 or is_last:
                if self._log_step(batch, metrics) >= every.optim.max_consecutive_skips:
                    return state, "diverged"
            if self.step % every.eval.every == 0 and not is_last:
                self._evaluate(state)
            if self.step % every.checkpoint.every == 0 and not is_last:
                self.save(state)
            if not is_last and (signal := signals.requested(self.step)) is not None:
                self.progress.print(f"{signal.name} received after step {self.step}: saving")
                return state, "interrupted"
        return state, "finished"

    def save(self, state: TrainState) -> None:
        """Starts a checkpoint of this step, unless there is one."""
        if self._saved_step != self.step:
            with self._aside(Category.CHECKPOINT):
                self.setup.checkpointer.save(self.step, state.items())
            self._saved_step = self.step

    @contextmanager
    def _aside(self, category: Category) -> Iterator[None]:
        """Time spent on other things than training: tokens per second do not count it."""
        started = time.perf_counter()
        with self.ledger.timed(category):
            yield
        self._logged_time += time.perf_counter() - started

    def _log_step(self, batch: Batch, metrics: dict[str, Any]) -> float:
        """Writes and shows the figures of this step; returns how many steps in a row were undone up to it."""
        with self.ledger.timed(Category.STEP):
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now, waited = time.perf_counter(), self.batches.waiting_seconds
        steps, seconds = self.step - self._logged_step, now - self._logged_time
        if self._logged_step == self.first_step:
            steps -= 1  # the first one was spent compiling
        rate = values["targets"] * steps / seconds if steps else math.nan
        self.timed_targets, self.timed_seconds = self.timed_targets + values["targets"] * steps, self.timed_seconds + seconds
        bits = values["nll"] / math.log(2) / max(values.pop("bytes"), 1.0)
        share = (waited - self._logged_wait) / max(seconds, 1e-9)
        self.log.write("train", step=self.step, bits_per_byte=bits, tokens_per_second=rate, data_wait_share=min(share, 1.0), **values)
        self.progress.update(self.step, loss=values["loss"], bits_per_byte=bits, tokens_per_second=rate)
        if values["skipped_in_a_row"]:
            rows = f"rows {int(batch.row_ids.min())} to {int(batch.row_ids.max())}"
            log.warning(
                "step %d (%s) was undone: its loss or gradient is not finite (%d in a row)", self.step, rows, values["skipped_in_a_row"]
            )
        self.last = values | {"bits_per_byte": bits, "data_wait_share": share}
        self._logged_step, self._logged_time, self._logged_wait = self.step, now, waited
        return values["skipped_in_a_row"]

    def _evaluate(self, state: TrainState) -> None:
        """Evaluates on the way, and saves the state if it is the best so far."""
        with self._aside(Category.EVAL):
            found = self.setup.evaluate(state, self.setup.experiment.eval.max_documents)
        if found is None:
            return
        self.log.write("eval", step=self.step, loss=found.loss, bits_per_byte=found.bits_per_byte, documents=found.documents)
        self.progress.print(f"step {self.step}: held-out loss {found.loss:.4f}, {found.bits_per_byte:.3f} bits/byte")
        if self.best is None or found.loss < self.best[1]:
            self.best = (self.step, found.loss)
            self.setup.checkpointer.mark_best(*self.best)
            self.save(state)


# Before and after the loop --------------------------------------------------------------------------------------------
def _run_directory(experiment: Experiment, resume: str | Path | None) -> RunDirectory:
    if resume is not None:
        path = Path(resume)
        if not (path / "config.json").is_file():
            raise ValueError(f"cannot resume {path}: it has no config.json. Name a run directory, as `slmjax train` prints it at the end")
        return RunDirectory(path, process_index=jax.process_index())
    made = None
    if jax.process_index() == 0:
        fingerprint = config_io.fingerprint(experiment)
        made = RunDirectory.create_in(Path(experiment.run.directory), name=experiment.run.name, fingerprint=fingerprint)
    return RunDirectory(Path(broadcast_text(str(made.path) if made else "")), process_index=jax.process_index())


def _write_description(setup: Setup, code: str | Path | None) -> None:
    """What makes the run directory self-contained. Written before the first step."""
    if jax.process_index() != 0:
        return
    run = setup.run
    run.write_json("config.json", config_io.to_json(setup.experiment))
    run.write_json("model.json", config_io.to_json(setup.definition.config))
    run.write_json("environment.json", environment())
    setup.prepared.tokenizer.save(run.tokenizer)
    if code is not None and Path(code).resolve() != (run.path / "experiment.py").resolve():
        shutil.copyfile(code, run.path / "experiment.py")


def num_parameters(definition: Definition) -> int:
    """Parameters that are trained."""
    return sum(math.prod(leaf.shape) for leaf in definition.params.values())


def _announce(setup: Setup, source: BatchSource, progress: Progress, first_step: int) -> None:
    sizes = {axis: size for axis, size in setup.mesh.shape.items() if size > 1}
    mesh = " x ".join(f"{axis}={size}" for axis, size in sizes.items()) or "1 device"
    rows = sum(len(plan) for plan in source.plans)
    data = setup.experiment.data
    epochs = setup.experiment.run.steps * data.batch_size / max(rows, 1)
    progress.print(f"run directory {setup.run.path}")
    progress.print(f"{num_parameters(setup.definition):,} parameters on {mesh} ({jax.devices()[0].device_kind})")
    progress.print(
        f"{rows:,} rows of {data.sequence_length} tokens, {source.packing_efficiency:.1%} filled; "
        f"{setup.experiment.run.steps:,} steps of {data.batch_size} rows are {epochs:.2f} epochs"
    )
    if first_step:
        progress.print(f"resuming after step {first_step}")


def _finish(loop: Loop, state: TrainState, status: str) -> Result:
    """Saves, evaluates on all held-out text, samples, and writes result.json."""
    setup, run = loop.setup, loop.setup.run
    loop.save(state)
    found, samples, compressors = None, [], {}
    if status != "interrupted":
        with loop.ledger.timed(Category.EVAL):
            found = setup.evaluate(state, None)
            compressors = compressed_bits_per_byte(setup.prepared.heldout_text()) if found is not None else {}
            samples = _samples(setup, state)
    with loop.ledger.timed(Category.CHECKPOINT):
        setup.checkpointer.wait()
    seconds = loop.ledger.seconds()
    figures = {"loss": loop.last.get("loss", math.nan), "bits_per_byte": loop.last.get("bits_per_byte", math.nan)}
    if found is not None:
        figures = {"loss": found.loss, "bits_per_byte": found.bits_per_byte}
        loop.log.write("eval", step=loop.step, documents=found.documents, complete=True, **figures)
    result = Result(
        status=status, **figures, perplexity=math.exp(min(figures["loss"], 700.0)), best_loss=None if loop.best is None else loop.best[1],
        compressors=compressors, tokens=tokens_seen(state), seconds=sum(seconds.values()),
        tokens_per_second=loop.timed_targets / max(loop.timed_seconds, 1e-9), parameters=num_parameters(setup.definition),
        step=loop.step, skipped=int(state.skipped), run_dir=str(run.path), commit=commit()["commit"], seconds_by_category=seconds,
        samples=samples, data_wait_share=seconds["data"] / max(seconds["step"] + seconds["data"], 1e-9),
    )  # fmt: skip
    if jax.process_index() == 0:
        run.write_json("result.json", dataclasses.asdict(result))
    loop.log.write("result", status=status, step=loop.step, **figures)
    return result


def _samples(setup: Setup, state: TrainState) -> list[str]:
    """Continuations of the experiment's prompts by the trained model; one process only."""
    settings, tokenizer = setup.experiment.run, setup.prepared.tokenizer
    if jax.process_count() > 1 or not settings.sample_prompts:
        return []
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in settings.sample_prompts]
    found = sampling.sample(setup.definition, state.evaluated, state.frozen, prompts, config=settings.sample, eos_id=tokenizer.eos_id)
    return [prompt + tokenizer.decode(tokens) for prompt, tokens in zip(settings.sample_prompts, found, strict=True)]


class _LogRecords(logging.Handler):
    """While entered, what slmjax's modules log goes into log.jsonl, and warnings on the screen as well."""

    def __init__(self, run_log: Log, progress: Progress) -> None:
        super().__init__(logging.INFO)
        self._log, self._progress, self._logger = run_log, progress, logging.getLogger("slmjax")

    def emit(self, record: logging.LogRecord) -> None:
        self._log.write("message", level=record.levelname, text=record.getMessage())
        self._progress.print(record.getMessage() if record.levelno < logging.WARNING else f"{record.levelname}: {record.getMessage()}")

    def __enter__(self) -> "_LogRecords":
        self._before = self._logger.level, self._logger.propagate
        self._logger.addHandler(self)
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False  # imported libraries give the root logger handlers that would show all twice
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        level, self._logger.propagate = self._before
        self._logger.setLevel(level)
