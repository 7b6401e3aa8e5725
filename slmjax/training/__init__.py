"""An experiment and its train step.

An experiment file imports the settings of everything but the model from here:

    from slmjax.training import Experiment, OptimConfig, QuantConfig, QuantPhase, QuantRule, preset

    optim = OptimConfig(lr=3e-4)
    rules = (QuantRule(paths=".", weight=preset("q4_0")),)
    quant = QuantConfig(phases=(QuantPhase(rules=rules),))

Files in reading order:

- hyperparameters.py: numbers of a step that may be arrays
- multipliers.py: learning rate, weight decay and eps of a parameter, by the parameterization
- optim.py: optimizers and learning-rate schedules
- objective.py: settings of the loss
- experiment.py: `Experiment`, the tree of settings
- recipes.py: built-in experiments, and experiments from files
- state.py: `TrainState`
- multi_token.py: the loss of the tokens after the next one
- expected_loss.py: the loss of a model with an exit gate
- metrics.py: metrics of a step
- step.py: the train step, with the loss of a batch as sums and counts
- population.py: the train step of several members at once
- programs.py: the jitted programs of an experiment
"""

from slmjax.checkpoints.run_checkpoints import CheckpointConfig
from slmjax.data.config import DataConfig, Packing, Split, WeightedSource
from slmjax.data.conversations import ScoredTurns
from slmjax.data.dataset_sources import HuggingFaceSource, TfdsSource
from slmjax.data.documents import Document, HeldOutBy, OnBadDocument
from slmjax.data.marks import SpecialNames
from slmjax.data.scored import ScoredText
from slmjax.data.sources import SourceConfig, TextSource
from slmjax.data.splitting import is_held_out
from slmjax.data.stdlib_corpus import StdlibSource
from slmjax.data.synthetic_tasks import SyntheticSource, SyntheticTask
from slmjax.data.tokenizers import BpeTokenizer, ByteTokenizer, CharTokenizer, FileTokenizer, TokenizerConfig
from slmjax.distill.config import DistillConfig, Ramp, RampShape, ShortContext, TeacherConfig
from slmjax.formats.presets import preset
from slmjax.formats.spec import (
    CodeGrid,
    Codes,
    CodesFrom,
    Granularity,
    QuantSpec,
    Rounding,
    ScaleType,
    Scaling,
    Statistic,
)
from slmjax.losses import (
    Divergence,
    ForwardKl,
    Jsd,
    ReverseKl,
    Sampled,
    SkewKl,
    SkewReverseKl,
    SoftCrossEntropy,
    Taid,
    TopK,
    TotalVariation,
)
from slmjax.parallel.mesh import MeshConfig
from slmjax.quantization.estimators import (
    Calibrated,
    ClippedFrom,
    Estimator,
    LearnedClip,
    LearnedScale,
    LearnedScaleAndOffset,
    StochasticRounding,
    StraightThrough,
)
from slmjax.quantization.rules import QuantConfig, QuantPhase, QuantRule
from slmjax.sampling.settings import SamplingConfig
from slmjax.telemetry.trackers import Tracker
from slmjax.training.experiment import (
    EvalConfig,
    Experiment,
    FromModel,
    FromTeacherLayers,
    InitConfig,
    RunConfig,
    Scratch,
    starting_from,
)
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.optim import OptimConfig, Optimizer, Schedule

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "Calibrated",
    "CharTokenizer",
    "CheckpointConfig",
    "ClippedFrom",
    "CodeGrid",
    "Codes",
    "CodesFrom",
    "DataConfig",
    "DistillConfig",
    "Divergence",
    "Document",
    "Estimator",
    "EvalConfig",
    "Experiment",
    "FileTokenizer",
    "ForwardKl",
    "FromModel",
    "FromTeacherLayers",
    "Granularity",
    "HeldOutBy",
    "HuggingFaceSource",
    "InitConfig",
    "Jsd",
    "LearnedClip",
    "LearnedScale",
    "LearnedScaleAndOffset",
    "MeshConfig",
    "ObjectiveConfig",
    "OnBadDocument",
    "OptimConfig",
    "Optimizer",
    "Packing",
    "QuantConfig",
    "QuantPhase",
    "QuantRule",
    "QuantSpec",
    "Ramp",
    "RampShape",
    "ReverseKl",
    "Rounding",
    "RunConfig",
    "Sampled",
    "SamplingConfig",
    "ScaleType",
    "Scaling",
    "Schedule",
    "ScoredText",
    "ScoredTurns",
    "Scratch",
    "ShortContext",
    "SkewKl",
    "SkewReverseKl",
    "SoftCrossEntropy",
    "SourceConfig",
    "SpecialNames",
    "Split",
    "Statistic",
    "StdlibSource",
    "SyntheticSource",
    "SyntheticTask",
    "StochasticRounding",
    "StraightThrough",
    "Taid",
    "TeacherConfig",
    "TextSource",
    "TfdsSource",
    "TokenizerConfig",
    "TopK",
    "TotalVariation",
    "Tracker",
    "WeightedSource",
    "is_held_out",
    "preset",
    "starting_from",
]
