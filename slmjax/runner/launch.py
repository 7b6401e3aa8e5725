"""The beginning of a session: run directory, trackers, banner, number of parameters, compilation cache."""

import logging
import math
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from slmjax import config as config_io
from slmjax.checkpoints.model_file import model_json
from slmjax.data import provenance
from slmjax.data.left_out import describe_left_out
from slmjax.data.lost_text import lost_note
from slmjax.data.pipeline import BatchSource
from slmjax.models.definition import Definition
from slmjax.parallel.agreement import require_same
from slmjax.parallel.processes import broadcast_text
from slmjax.quantization.fake_quantization import phases_of
from slmjax.quantization.quantizer_params import is_quantizer_param
from slmjax.runner.session_record import begin_session
from slmjax.runner.setup import Setup
from slmjax.telemetry.progress import Progress
from slmjax.telemetry.recorded_environment import environment, files_hash, packages, source_hash
from slmjax.telemetry.run_directory import RunDirectory, RunLog
from slmjax.telemetry.trackers import Trackers
from slmjax.training.experiment import Experiment
from slmjax.training.optim import Optimizer
from slmjax.training.recipes import code_files, copy_code

log = logging.getLogger(__name__)

# They decide shapes, random numbers and rounding of every program.
_JAX_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)


def require_same_start(
    experiment: Experiment, *, resume: str | Path | None, restart: bool, code: str | Path | None
) -> None:
    """Check that all processes have the same settings and code, and resume the same run.

    Nothing is left out of the comparison: process 0 writes the settings of all into the run directory.

    Raises:
      Disagreement: in every process, if one of them differs.
    """
    if jax.process_count() == 1:
        return
    values = {
        **config_io.to_json(experiment),
        "resume": None if resume is None else str(Path(resume).absolute()),
        "restart": restart,
        "code": {
            "slmjax": source_hash(),
            "packages": packages(),
            "experiment": None if code is None else _code_hash(Path(code)),
        },
        "jax": {name: getattr(jax.config, name) for name in _JAX_SETTINGS},
    }
    require_same(values, remedy="Start all of them with the same command and the same versions of all code")


def _code_hash(path: Path) -> str:
    files = code_files(path)
    # By content: hosts may have the files in other folders.
    return files_hash(files, root=files[0].parent)


def new_run(setup: Setup, code: str | Path | None) -> RunDirectory:
    """Return a new run directory with its description, which process 0 makes and all processes use.

    Raises:
      ValueError: this process cannot see the directory, or process 0 could not make it.
      OSError: in process 0, it cannot be written.
    """
    created = ""
    # Its name holds the time, so only one process can choose it.
    try:
        if jax.process_index() == 0:
            created = str(_create_run(setup, code))
    finally:
        # After an error too, so that the other processes do not wait for the name.
        created = broadcast_text(created)
    if not created:
        raise ValueError("process 0 could not make the run directory: its error says why")
    path = Path(created)
    if not path.is_dir():
        raise ValueError(
            f"process {jax.process_index()} does not see {path}, which process 0 made: set --run.directory "
            "to a directory that all hosts share"
        )
    return RunDirectory(path, process_index=jax.process_index())


def _create_run(setup: Setup, code: str | Path | None) -> Path:
    settings = setup.experiment.run
    run = RunDirectory.create_in(
        Path(settings.directory),
        name=settings.name,
        fingerprint=config_io.fingerprint(setup.experiment),
        write=lambda path: _write_description(setup, RunDirectory(path), code),
    )
    return run.path


def record_session(
    setup: Setup,
    run: RunDirectory,
    run_log: RunLog,
    *,
    step: int,
    seconds: float,
    code: str | Path | None,
    is_resumed: bool,
) -> None:
    """Record a session that begins after `step` in the run's log; a resumed run gets its description, too.

    Args:
      setup: that of the session.
      run: the run; only process 0 writes to it.
      run_log: the log of this process.
      step: steps that were trained so far.
      seconds: wall time of the session so far.
      code: an experiment file that replaces the run's own.
      is_resumed: whether the run has had a session before.

    Raises:
      DamagedFile: the log of the earlier sessions cannot be read.
    """
    if jax.process_index() != 0:
        return
    begin_session(
        run, run_log, setup.experiment, step=step, seconds=seconds, code=code, is_resumed=is_resumed
    )
    # The files describe the settings that the run now has; those of earlier sessions have their number.
    if is_resumed:
        _write_description(setup, run, code)


def _write_description(setup: Setup, run: RunDirectory, code: str | Path | None) -> None:
    """Write what makes a run directory self-contained: config, model, data, environment, tokenizer, code."""
    run.write_json("config.json", config_io.to_json(setup.experiment))
    definition = setup.programs.definition
    run.write_json("model.json", model_json(definition.config, phases=phases_of(definition)))
    run.write_json(provenance.RECORD_FILE, provenance.describe(setup.prepared, setup.experiment.data))
    run.write_json("environment.json", environment())
    setup.prepared.tokenizer.save(run.tokenizer)
    if code is not None:
        copy_code(Path(code), run.path)


def open_trackers(run: RunDirectory, experiment: Experiment) -> Trackers:
    """Return the trackers of the experiment; only the first process writes to them."""
    trackers = experiment.run.trackers if jax.process_index() == 0 else ()
    return Trackers(
        trackers,
        directory=run.path,
        name=run.path.name,
        group=experiment.run.group,
        config=config_io.to_json(experiment),
    )


def num_parameters(definition: Definition) -> int:
    """Return the number of trained parameters, without those of quantizers."""
    # Scales and zero points are part of a number format, so that all formats have models of the same size.
    return sum(
        math.prod(leaf.shape) for path, leaf in definition.params.items() if not is_quantizer_param(path)
    )


def print_banner(
    setup: Setup, run: RunDirectory, source: BatchSource, progress: Progress, first_step: int
) -> None:
    """Print the model, its data and the first step, and log warnings about them."""
    definition = setup.programs.definition
    sizes = {axis: size for axis, size in setup.mesh.shape.items() if size > 1}
    mesh = " x ".join(f"{axis}={size}" for axis, size in sizes.items()) or "1 device"
    num_rows = source.num_rows
    data = setup.experiment.data
    epochs = setup.experiment.run.steps * data.batch_size / max(num_rows, 1)
    progress.print(f"run directory {run.path}")
    progress.print(f"{num_parameters(definition):,} parameters on {mesh} ({jax.devices()[0].device_kind})")
    progress.print(
        f"{num_rows:,} rows of {data.sequence_length} tokens, {source.packing_efficiency:.1%} filled; "
        f"{setup.experiment.run.steps:,} steps of {data.batch_size} rows are {epochs:.2f} epochs"
    )
    tokens = setup.prepared.tokenizer.special_tokens
    log.info("documents begin with %s and end with %s", tokens["bos"].text(), tokens["eos"].text())
    optim = setup.experiment.optim
    if optim.kind is Optimizer.MUON:
        log.info(
            "matrices are trained at optim.muon_lr=%g; embeddings, norms and the head at optim.lr=%g",
            optim.muon_lr,
            optim.lr,
        )
    if setup.prepared.lost_text:
        log.warning("bits per byte are too low: %s", lost_note(setup.prepared.lost_text))
    for note in definition.config.training_notes():
        log.warning("%s", note)
    # Text that is left out changes the result without an error, so it is a warning.
    for plan, (shards, _) in zip(source.plans, setup.prepared.train, strict=True):
        name = shards.manifest.source_name
        decode = setup.prepared.tokenizer.decode
        for sentence in describe_left_out(plan, shards, name=name, decode=decode):
            log.warning("%s", sentence)
    if first_step:
        progress.print(f"resuming after step {first_step}")
    log.info(compilation_cache_note())


# Compiled programs ------------------------------------------------------------------------------------------
def compilation_cache_note() -> str:
    """Return a sentence about JAX's compilation cache: its directory, or why it is off."""
    # Not attributes that a type checker knows.
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    directory, is_enabled = (getattr(jax.config, name) for name in names)
    if not directory:
        return "compilation cache off: JAX_COMPILATION_CACHE_DIR is empty"
    if not is_enabled:
        return "compilation cache off: JAX_ENABLE_COMPILATION_CACHE is false"
    return f"compilation cache: {directory}"


class CompilationCache:
    """While entered, counts the programs that JAX compiles and those of them that the cache had."""

    def __init__(self) -> None:
        self.requests = 0
        self.hits = 0

    def report(self) -> None:
        """Log the counts so far, unless the cache is off."""
        if self.requests:
            compiled = self.requests - self.hits
            log.info("%d programs compiled, %d read from the compilation cache", compiled, self.hits)

    def _count(self, event: str, **_: Any) -> None:
        self.requests += event == "/jax/compilation_cache/compile_requests_use_cache"
        self.hits += event == "/jax/compilation_cache/cache_hits"

    # Listeners are those of the whole process, so each session removes its own.
    def __enter__(self) -> "CompilationCache":
        jax.monitoring.register_event_listener(self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        jax.monitoring.unregister_event_listener(self._count)
