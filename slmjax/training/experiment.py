"""`Experiment`: the tree of settings that determines a run.

An experiment file is a Python file with `def experiment() -> Experiment`. The command line overrides any
field by its path (`--optim.lr 3e-4`), and the resolved tree is written to the run directory as JSON and read
back strictly.
"""

import abc
import dataclasses
import logging
import math
from pathlib import Path

from slmjax import config as config_io
from slmjax.checkpoints import safetensors_files
from slmjax.checkpoints.loading import read_config
from slmjax.checkpoints.run_checkpoints import CheckpointConfig
from slmjax.data.config import DataConfig, TextSource
from slmjax.data.scored import ScoredText
from slmjax.data.tokenizers import BpeTokenizer, FileTokenizer, TokenizerConfig
from slmjax.data.windows import default_overlap
from slmjax.distill.config import DistillConfig, TeacherConfig
from slmjax.losses import Divergence
from slmjax.models.architecture import ModelConfig
from slmjax.parallel.mesh import MeshConfig
from slmjax.quantization.rules import QuantConfig
from slmjax.sampling import SamplingConfig
from slmjax.telemetry.trackers import Tracker
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.optim import OptimConfig, Optimizer

log = logging.getLogger(__name__)


class InitConfig(abc.ABC):
    """Source of the first parameters."""

    @abc.abstractmethod
    def source(self) -> Path | None:
        """Return a directory with a model to start from, or None for fresh parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch(InitConfig):
    """Freshly initialised parameters."""

    def source(self) -> Path | None:
        """Return None: nothing is read."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromModel(InitConfig):
    """The parameters of another run or of an imported model; all else starts from scratch."""

    path: str  # run directory, or directory of an imported model

    def source(self) -> Path | None:
        """Return the directory."""
        return Path(self.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromTeacherLayers(InitConfig):
    """Some layers of a larger model, cut to leading rows and columns where this one is narrower.

    All else starts from scratch.
    """

    path: str  # run directory of the teacher, or directory of an imported model
    # the teacher's layer for each of the student's (none: every, or spread evenly, ends included)
    layers: tuple[int, ...] | None = None
    # take the teacher's layers 0, every, 2 every, ... (none: layers, or spread evenly, ends included)
    every: int | None = None

    def __post_init__(self) -> None:
        if self.layers is not None and self.every is not None:
            raise ValueError(
                f"init.layers={self.layers} and init.every={self.every} both choose the teacher's layers: "
                "leave one out"
            )
        if self.every is not None and self.every < 1:
            raise ValueError(f"init.every must be at least 1, got {self.every}")

    def source(self) -> Path | None:
        """Return the teacher's directory."""
        return Path(self.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the held-out text."""

    every: int = 250  # steps between evaluations; one more, on all held-out text, ends the run
    max_documents: int | None = 64  # held-out documents of the evaluations on the way (none: all)
    batch_size: int | None = None  # sequences at a time (none: as in training)
    # continue run.sample_prompts each time, so that the log shows what the model has learnt to write
    sample: bool = True
    # tokens that each further window of a long document repeats (none: a quarter window, at most 64)
    overlap: int | None = None
    # the text that is scored: completions, which is what training scores (of plain text everything), or all,
    # prompts too
    score: ScoredText = config_io.added_field(ScoredText.COMPLETIONS, before=ScoredText.COMPLETIONS)
    # of a quantized run: the loss of its weights before rounding as well
    unrounded: bool = config_io.added_field(False, before=False)

    def __post_init__(self) -> None:
        for name in ("every", "max_documents", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"eval.{name} must be at least 1, got {value}")
        if self.overlap is not None and self.overlap < 0:
            raise ValueError(f"eval.overlap must be at least 0, got {self.overlap}")

    def windows_overlap(self, sequence_length: int) -> int:
        """Return the overlap of windows of this length."""
        return default_overlap(sequence_length) if self.overlap is None else self.overlap


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, name and directory of a run."""

    name: str = "run"  # begins the name of the run directory
    steps: int = 1000  # optimizer steps
    # step after which the session ends as if interrupted, to be resumed; schedules are those of `steps`
    stop_after: int | None = config_io.added_field(None, before=None)
    # passes over the training text, which set the number of steps once the text is prepared (none: steps)
    epochs: float | None = config_io.added_field(None, before=None)
    seed: int = 0  # of initial parameters and dropout; the order of the data has its own
    log_every: int = 10  # steps between lines of the log
    # of a quantized run: the fraction of codes that changed since the line before (a byte for each weight on
    # the devices)
    log_flips: bool = config_io.added_field(False, before=False)
    directory: str = "runs"  # where run directories are made
    # texts that the trained model continues at every evaluation and at the end
    sample_prompts: tuple[str, ...] = ("",)
    sample: SamplingConfig = SamplingConfig(
        temperature=0.8, top_k=40
    )  # temperature, length and more of these texts
    # where the log's metrics go as well: tensorboard, wandb, trackio
    trackers: tuple[Tracker, ...] = ()
    # under which trackers show the run together with others (none: alone, or with the runs of its study)
    group: str | None = config_io.added_field(None, before=None)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.log_every < 1:
            raise ValueError(
                f"run.steps and run.log_every must be at least 1, got {self.steps} and {self.log_every}"
            )
        if self.stop_after is not None and self.stop_after < 1:
            raise ValueError(
                f"run.stop_after must be at least 1, got {self.stop_after}; none trains to the end"
            )
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"run.epochs must be above 0, got {self.epochs}; none stands for run.steps")

    def in_steps(self, rows: int, *, batch_size: int) -> "RunConfig":
        """Return these settings with the length in steps alone, for a text of so many rows of tokens."""
        if self.epochs is None:
            return self
        # Rounded up: the last rows of the text are trained on, too.
        steps = max(1, math.ceil(self.epochs * rows / batch_size))
        return dataclasses.replace(self, steps=steps, epochs=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """All settings of a run."""

    model: ModelConfig
    init: InitConfig = Scratch()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = BpeTokenizer(vocab_size=2048)
    optim: OptimConfig = OptimConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    # formats of weights, inputs and caches in training and after it (none: floating point)
    quant: QuantConfig | None = None
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()

    # Checks of one part alone are in that part. These are between parts, so they are made here.
    def __post_init__(self) -> None:
        if self.data.sequence_length > self.model.context_length:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} is longer than "
                f"model.context_length={self.model.context_length}: shorten the one or lengthen the other"
            )
        if self.data.batch_size % self.optim.accumulation_steps:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} must be a multiple of "
                f"optim.accumulation_steps={self.optim.accumulation_steps}"
            )
        if self.eval.windows_overlap(self.data.sequence_length) >= self.data.sequence_length:
            raise ValueError(
                f"eval.overlap={self.eval.overlap} must be shorter than "
                f"data.sequence_length={self.data.sequence_length}"
            )
        # A teacher's distribution is learned from one result, and the gate would learn nothing.
        if self.objective.distill is not None and self.model.exit_gate is not None:
            raise ValueError(
                "objective.distill and model.loops.exit_gate: distillation trains one result of the model, "
                "and an exit gate chooses among several. Leave out one of them"
            )


def with_absolute_paths(experiment: Experiment) -> Experiment:
    """Return the experiment with absolute paths of text, tokenizer and models.

    Its run can then be read from any directory.
    """

    # Links are not resolved, so that a resumed run follows a link whose target has moved.
    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    data = experiment.data
    tokenizer = experiment.tokenizer
    sources = tuple(
        dataclasses.replace(weighted, source=dataclasses.replace(source, path=absolute(source.path)))
        if isinstance(source := weighted.source, TextSource)
        else weighted
        for weighted in data.sources
    )
    data = dataclasses.replace(data, sources=sources, path=None if data.path is None else absolute(data.path))
    if isinstance(tokenizer, FileTokenizer):
        tokenizer = dataclasses.replace(tokenizer, path=absolute(tokenizer.path))
    init = experiment.init
    objective = experiment.objective
    if isinstance(init, FromModel | FromTeacherLayers):
        init = dataclasses.replace(init, path=absolute(init.path))
    if (distill := objective.distill) is not None:
        teachers = tuple(
            dataclasses.replace(teacher, path=absolute(teacher.path)) for teacher in distill.teachers
        )
        objective = dataclasses.replace(objective, distill=dataclasses.replace(distill, teachers=teachers))
    return dataclasses.replace(experiment, data=data, tokenizer=tokenizer, init=init, objective=objective)


def taught_by(path: Path, experiment: Experiment) -> Experiment:
    """Return the experiment with this teacher, a run or an imported model.

    Other settings of distillation stay.

    A student that begins as its teacher's layers begins as this one's. The tokenizer is taken too, unless the
    student begins as another model, whose own must then have the same tokens.
    """
    read_config(path)  # raises an error that names what is missing
    if not (path / "tokenizer").is_dir():
        raise ValueError(
            f"the teacher {path} has no tokenizer for its student: import it again with --tokenizer FILE"
        )
    teachers = (TeacherConfig(path=str(path)),)
    distill = experiment.objective.distill
    distill = (
        DistillConfig(teachers=teachers)
        if distill is None
        else dataclasses.replace(distill, teachers=teachers)
    )
    experiment = dataclasses.replace(
        experiment, objective=dataclasses.replace(experiment.objective, distill=distill)
    )
    # Distillation compares token by token, so a student without parameters takes the teacher's tokenizer.
    if isinstance(init := experiment.init, FromModel):
        return experiment
    init = dataclasses.replace(init, path=str(path)) if isinstance(init, FromTeacherLayers) else init
    return dataclasses.replace(experiment, init=init, tokenizer=FileTokenizer(path=str(path / "tokenizer")))


def with_divergence(experiment: Experiment, divergence: Divergence) -> Experiment:
    """Return the experiment with another divergence from its teachers. Raises ValueError if it has none."""
    distill = experiment.objective.distill
    if distill is None:
        raise ValueError(
            "a divergence is one from a teacher: name a model with --teacher DIR, or set objective.distill "
            "in the experiment file"
        )
    distill = dataclasses.replace(distill, divergence=divergence)
    return dataclasses.replace(
        experiment, objective=dataclasses.replace(experiment.objective, distill=distill)
    )


def read_experiment(run_dir: Path) -> Experiment:
    """Return the experiment of a run directory's config.json, read strictly."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{run_dir} is not a run directory: it has no config.json. Name one that `slmjax train` printed"
        )
    return config_io.read_file(Experiment, path)


def starting_from(run_dir: Path, experiment: Experiment | None, *, takes_model: bool = False) -> Experiment:
    """Return the experiment with the parameters and the tokenizer of a run or an imported model.

    Without an experiment it is that of the run itself. The architecture of an imported model replaces that of
    the experiment; its precision, remat and dropout stay those of the experiment, and its sequences are
    shortened to what the model was made for.

    Args:
      takes_model: the architecture of a run replaces that of the experiment, too.
    """
    is_imported = safetensors_files.is_imported(run_dir)
    if is_imported and experiment is None:
        raise ValueError(
            f"{run_dir} is an imported model, which has no experiment of its own: name one, whose data "
            f"and optimizer it is trained with, as in `slmjax train finetune --init-from {run_dir}`"
        )
    if experiment is not None and (is_imported or takes_model):
        how = {name: getattr(experiment.model, name) for name in ("precision", "remat", "dropout")}
        model = dataclasses.replace(read_config(run_dir), **how)
        length = min(experiment.data.sequence_length, model.context_length)
        data = dataclasses.replace(experiment.data, sequence_length=length)
        experiment = dataclasses.replace(experiment, model=model, data=data)
    # Parameters mean something only with the tokenizer that they were trained with, so it comes with them.
    base = read_experiment(run_dir) if experiment is None else experiment
    return dataclasses.replace(
        base, init=FromModel(path=str(run_dir)), tokenizer=FileTokenizer(path=str(run_dir / "tokenizer"))
    )


# Peak rates above which training is that of fresh parameters, and undoes what a model has learnt. Full
# fine-tuning of small models uses AdamW at 1e-5 to 5e-5, seldom above 1e-4; Lion's rates are 3 to 10 times
# lower; Adafactor's are relative to a parameter's size, of which 1e-2 is usual from scratch.
HIGHEST_FINE_TUNING_RATES = {
    Optimizer.ADAMW: 2e-4,
    Optimizer.LION: 5e-5,
    Optimizer.ADAFACTOR: 2e-3,
    Optimizer.MUON: 2e-3,
}


def warn_of_scratch_rates(experiment: Experiment) -> None:
    """Log a warning if a run starts from a model with a learning rate that is usual for fresh parameters."""
    if not isinstance(experiment.init, FromModel):
        return
    optim = experiment.optim
    rates = {"optim.lr": (optim.lr, optim.kind)}
    if optim.kind is Optimizer.MUON:
        # Embedding, head and vectors are trained by AdamW.
        rates = {"optim.lr": (optim.lr, Optimizer.ADAMW), "optim.muon_lr": (optim.muon_lr, Optimizer.MUON)}
    high = {
        name: (rate, HIGHEST_FINE_TUNING_RATES[kind])
        for name, (rate, kind) in rates.items()
        if rate > HIGHEST_FINE_TUNING_RATES[kind]
    }
    if high:
        log.warning(
            "this run starts from %s with rates of training from scratch, which undo what the model has "
            "learnt: %s. The built-in experiment `finetune` has rates for trained models",
            experiment.init.path,
            ", ".join(f"{name}={rate:g} (at most about {limit:g})" for name, (rate, limit) in high.items()),
        )
