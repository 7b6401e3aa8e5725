"""How a session of a run begins: its directory, what is written there before the first step, and what is said
of it.
"""

import logging
import math
import shutil
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
from slmjax.models.ffn.moe import MoeConfig
from slmjax.parallel.processes import broadcast_text
from slmjax.quantization.fake_quantization import phases_of
from slmjax.quantization.quantizer_params import is_activation_quantizer_param, is_weight_quantizer_param
from slmjax.runner.session import Setup
from slmjax.telemetry.progress import Progress
from slmjax.telemetry.run_directory import RunDirectory, environment
from slmjax.telemetry.trackers import Trackers
from slmjax.training.experiment import Experiment

log = logging.getLogger(__name__)


def new_run(experiment: Experiment) -> RunDirectory:
    """A new run directory, made by the first process and known to all.

    Raises:
      ValueError: this process cannot see it.
    """
    made = None
    if jax.process_index() == 0:
        fingerprint = config_io.fingerprint(experiment)
        made = RunDirectory.create_in(
            Path(experiment.run.directory), name=experiment.run.name, fingerprint=fingerprint
        )
    path = Path(broadcast_text(str(made.path) if made else ""))
    if not path.is_dir():
        raise ValueError(
            f"process {jax.process_index()} does not see {path}, which process 0 made: give --run.directory "
            "a place that all hosts share"
        )
    return RunDirectory(path, process_index=jax.process_index())


def write_description(setup: Setup, run: RunDirectory, code: str | Path | None) -> None:
    """What makes the run directory self-contained. Written before the first step."""
    if jax.process_index() != 0:
        return
    run.write_json("config.json", config_io.to_json(setup.experiment))
    run.write_json("model.json", model_json(setup.definition.config, phases=phases_of(setup.definition)))
    run.write_json(provenance.RECORD_FILE, provenance.describe(setup.prepared, setup.experiment.data))
    run.write_json("environment.json", environment())
    setup.prepared.tokenizer.save(run.tokenizer)
    if code is not None and Path(code).resolve() != (run.path / "experiment.py").resolve():
        shutil.copyfile(code, run.path / "experiment.py")


def open_trackers(run: RunDirectory, experiment: Experiment) -> Trackers:
    """The trackers that the experiment asks for; the first process alone writes to them."""
    wanted = experiment.run.trackers if jax.process_index() == 0 else ()
    return Trackers(wanted, directory=run.path, name=run.path.name, config=config_io.to_json(experiment))


def num_parameters(definition: Definition) -> int:
    """Parameters that are trained, without what is learned of their formats."""
    beside = (is_weight_quantizer_param, is_activation_quantizer_param)
    return sum(
        math.prod(leaf.shape)
        for path, leaf in definition.params.items()
        if not any(learned(path) for learned in beside)
    )


def announce(
    setup: Setup, run: RunDirectory, source: BatchSource, progress: Progress, first_step: int
) -> None:
    """Says what is trained, on what, and from where."""
    sizes = {axis: size for axis, size in setup.mesh.shape.items() if size > 1}
    mesh = " x ".join(f"{axis}={size}" for axis, size in sizes.items()) or "1 device"
    rows = sum(len(plan) for plan in source.plans)
    data = setup.experiment.data
    epochs = setup.experiment.run.steps * data.batch_size / max(rows, 1)
    progress.print(f"run directory {run.path}")
    progress.print(
        f"{num_parameters(setup.definition):,} parameters on {mesh} ({jax.devices()[0].device_kind})"
    )
    progress.print(
        f"{rows:,} rows of {data.sequence_length} tokens, {source.packing_efficiency:.1%} filled; "
        f"{setup.experiment.run.steps:,} steps of {data.batch_size} rows are {epochs:.2f} epochs"
    )
    tokens = setup.prepared.tokenizer.special_tokens
    log.info("documents begin with %s and end with %s", tokens["bos"].text(), tokens["eos"].text())
    if setup.prepared.lost_text:
        log.warning("bits per byte are too low: %s", lost_note(setup.prepared.lost_text))
    ffns = (block.ffn for segment in setup.definition.config.stack for block in segment.pattern)
    notes = (ffn.training_note() for ffn in ffns if isinstance(ffn, MoeConfig))
    for note in dict.fromkeys(filter(None, notes)):
        log.warning("%s", note)
    for plan, (shards, _) in zip(source.plans, setup.prepared.train, strict=True):
        name = shards.manifest.source_name
        decode = setup.prepared.tokenizer.decode
        for sentence in describe_left_out(plan, shards, name=name, decode=decode):
            log.warning("%s", sentence)
    if first_step:
        progress.print(f"resuming after step {first_step}")
    log.info(keeping_of_programs())


def keeping_of_programs() -> str:
    """Whether compiled programs are kept for the next process, and where."""
    directory, is_on = (
        getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    )
    if directory and is_on:
        return f"compiled programs are kept in {directory}"
    return "compiled programs are not kept for the next process: JAX_COMPILATION_CACHE_DIR names no directory for them"


class CompiledPrograms:
    """While entered, counts the programs that jax asks for and those among them that were kept from
    before.
    """

    def __init__(self) -> None:
        self.asked = self.kept = 0

    def say(self) -> None:
        """How many there were so far, where programs are kept at all."""
        if self.asked:
            log.info("%d of %d programs were kept from before", self.kept, self.asked)

    def _count(self, event: str, **_: Any) -> None:
        self.asked += event == "/jax/compilation_cache/compile_requests_use_cache"
        self.kept += event == "/jax/compilation_cache/cache_hits"

    def __enter__(self) -> "CompiledPrograms":
        jax.monitoring.register_event_listener(self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        jax.monitoring.unregister_event_listener(self._count)
