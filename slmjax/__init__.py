"""slmjax: train, distil, quantize, compare and ship small language models in JAX.

    experiment = slmjax.load_experiment("nano")      # a built-in name or an experiment file
    result = slmjax.train(experiment)                # -> Result, the fields of result.json
    loaded = slmjax.load_model(result.run_dir)       # -> Loaded(config, model, tokenizer)
    slmjax.generate(loaded, ["def main("])
    slmjax.evaluate(loaded)
    slmjax.import_model("SmolLM2-135M", "smollm2")   # a Hugging Face directory or a GGUF file; then
    load_model("smollm2") slmjax.export_model(result.run_dir, "exported", to=slmjax.Target.HF)

`import slmjax` takes milliseconds: a public name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from slmjax import startup as _startup

__version__ = "0.1.0"

_startup.without_tpu()  # here, as any of the modules may be the first to import jax

if TYPE_CHECKING:
    from slmjax.checkpoints.loading import Loaded, load_model
    from slmjax.convert.import_export import Target, WeightType, export_model, import_model
    from slmjax.evaluation import evaluate
    from slmjax.models.decoder import logits
    from slmjax.runner.trainer import Result, train
    from slmjax.sampling import generate
    from slmjax.training.experiment import Experiment
    from slmjax.training.recipes import load_experiment

_MODULE_OF = {
    "Experiment": "slmjax.training.experiment",
    "Loaded": "slmjax.checkpoints.loading",
    "Result": "slmjax.runner.trainer",
    "Target": "slmjax.convert.import_export",
    "WeightType": "slmjax.convert.import_export",
    "evaluate": "slmjax.evaluation",
    "export_model": "slmjax.convert.import_export",
    "generate": "slmjax.sampling",
    "import_model": "slmjax.convert.import_export",
    "load_experiment": "slmjax.training.recipes",
    "load_model": "slmjax.checkpoints.loading",
    "logits": "slmjax.models.decoder",
    "train": "slmjax.runner.trainer",
}

__all__ = [
    "Experiment",
    "Loaded",
    "Result",
    "Target",
    "WeightType",
    "__version__",
    "evaluate",
    "export_model",
    "generate",
    "import_model",
    "load_experiment",
    "load_model",
    "logits",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'slmjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
