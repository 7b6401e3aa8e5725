"""slmjax: train, distil, quantize, compare and ship small language models in JAX.

    experiment = slmjax.load_experiment("nano")      # a built-in name or an experiment file
    result = slmjax.train(experiment)                # -> Result, the fields of result.json
    loaded = slmjax.load_model(result.run_dir)       # -> Loaded(config, model, tokenizer)
    slmjax.generate(loaded, ["def main("])
    slmjax.evaluate(loaded)
    slmjax.export_model(result.run_dir, "exported", to=slmjax.Target.HF)
    slmjax.import_model("SmolLM2-135M", "smollm2")   # a Hugging Face directory or a GGUF file
    loaded = slmjax.load_model("smollm2")

Classes for experiment files, and checks of classes of one's own, come from four modules:

- `slmjax.models`: architectures (`ModelConfig`, `AttentionConfig`, `MlpConfig`, `zoo`, ...), bases of layers.
- `slmjax.training`: all other settings (`Experiment`, `DataConfig`, `OptimConfig`, `QuantConfig`, ...).
- `slmjax.studies`: arms, seeds and verdicts (`Study`, `Arm`, `analyze`, ...).
- `slmjax.testing`: what must hold for a mixer of one's own (`check_mixer`).

`import slmjax` takes milliseconds: a public name is imported when it is first used.

Folders and files in reading order:

- startup.py: settings that must be made before jax is imported
- ownership.py: whether this process may still write to a run
- stop_signals.py: SIGINT and SIGTERM end a command soon, and let a run save
- stored_json.py: read JSON files that may be damaged
- faults.py: the hook by which tests break a run at a known place
- config.py: read, write and fingerprint trees of frozen dataclasses
- atomic_files.py: write files and directories atomically
- parallel: the device mesh, sharding rules, communication, several processes
- formats: number formats
- data: from text to batches
- telemetry: the run directory, log, metrics and reports
- kernels: computations with an implementation per platform
- losses: cross entropy and divergences, in chunks, on any mesh
- models: layers, architectures and decoders
- quantization: assignment of formats, estimators, schedule, rounding after training
- checkpoints: checkpoints of runs, and loading a model
- distill: teachers and the loss of distillation
- sampling: from prompts to text
- evaluation: bits per byte, multiple choice, lm-eval, costs
- convert: Hugging Face directories and GGUF files
- training: an experiment and its compiled train step
- planning: memory, FLOPs and traffic of a step
- testing: checks of a mixer of one's own
- runner: the training loop and its files
- studies: arms, seeds, verdicts
- cli: the `slmjax` command
"""

import importlib
from typing import TYPE_CHECKING, Any

from slmjax import startup as _startup

__version__ = "0.1.0"

# Here, as any of the modules may be the first to import jax.
_startup.without_tpu()
_startup.keep_compiled()

if TYPE_CHECKING:
    from slmjax import models, studies, testing, training
    from slmjax.checkpoints.loading import Loaded, load_model
    from slmjax.convert.import_export import Target, WeightType, export_model, import_model
    from slmjax.distill.teachers import load_teacher
    from slmjax.evaluation import evaluate
    from slmjax.models.decoder import logits
    from slmjax.quantization.ptq.round_to_nearest import Clip, quantize_model
    from slmjax.runner.trainer import Result, train
    from slmjax.sampling import SamplingConfig, generate
    from slmjax.telemetry.report import read_run, write_report
    from slmjax.training.experiment import Experiment
    from slmjax.training.recipes import load_experiment

_MODULE_OF = {
    "Clip": "slmjax.quantization.ptq.round_to_nearest",
    "Experiment": "slmjax.training.experiment",
    "Loaded": "slmjax.checkpoints.loading",
    "Result": "slmjax.runner.trainer",
    "SamplingConfig": "slmjax.sampling",
    "Target": "slmjax.convert.import_export",
    "WeightType": "slmjax.convert.import_export",
    "evaluate": "slmjax.evaluation",
    "export_model": "slmjax.convert.import_export",
    "generate": "slmjax.sampling",
    "import_model": "slmjax.convert.import_export",
    "load_experiment": "slmjax.training.recipes",
    "load_model": "slmjax.checkpoints.loading",
    "load_teacher": "slmjax.distill.teachers",
    "logits": "slmjax.models.decoder",
    "quantize_model": "slmjax.quantization.ptq.round_to_nearest",
    "read_run": "slmjax.telemetry.report",
    "train": "slmjax.runner.trainer",
    "write_report": "slmjax.telemetry.report",
}
_MODULES = ("models", "studies", "testing", "training")

__all__ = [
    "Clip",
    "Experiment",
    "Loaded",
    "Result",
    "SamplingConfig",
    "Target",
    "WeightType",
    "__version__",
    "evaluate",
    "export_model",
    "generate",
    "import_model",
    "load_experiment",
    "load_model",
    "load_teacher",
    "logits",
    "models",
    "quantize_model",
    "read_run",
    "studies",
    "testing",
    "train",
    "training",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"slmjax.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'slmjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
