# %% [markdown]
# # Import a model, evaluate it, export it
#
# A released model is a directory of files: a configuration, weights, a tokenizer. slmjax imports such a
# directory without running any of its code, and every command then accepts the model like a run. A model that
# slmjax trained is exported in the same form.
#
# To need no network, this notebook trains and exports the model that it then imports. Set
# `SLMJAX_NOTEBOOK_MODEL` to a Hugging Face directory or a GGUF file of a small model to use that instead.

# %%
import dataclasses
import json
import os
from pathlib import Path

import slmjax
from slmjax.models import zoo
from slmjax.training import DataConfig, SamplingConfig

STEPS = int(os.environ.get("SLMJAX_NOTEBOOK_STEPS", "100"))
SOURCE = os.environ.get("SLMJAX_NOTEBOOK_MODEL")
work = Path("notebook-models")

# %% [markdown]
# ## A model to start with
#
# `nano` is a small Qwen3, so other engines can run it without a special conversion.

# %%
if SOURCE is None:
    nano = slmjax.load_experiment("nano")
    experiment = dataclasses.replace(
        nano,
        model=dataclasses.replace(
            nano.model, embed_dim=128, stack=(dataclasses.replace(nano.model.stack[0], repeats=2),)
        ),
        data=dataclasses.replace(nano.data, sequence_length=128),
        tokenizer=dataclasses.replace(nano.tokenizer, vocab_size=1024, training_bytes=1_000_000),
        optim=dataclasses.replace(nano.optim, warmup_steps=min(20, STEPS - 1)),
        eval=dataclasses.replace(nano.eval, every=STEPS, max_documents=2),
        run=dataclasses.replace(nano.run, name="notebook", steps=STEPS),
    )
    result = slmjax.train(experiment)
    slmjax.write_report(result.run_dir)
    exported = slmjax.export_model(result.run_dir, work / "released", to=slmjax.Target.HF)
    print(f"{exported.family}: {exported.parameters:,} parameters, {exported.bytes / 1e6:.1f} MB")
    print(json.dumps(json.loads((work / "released" / "config.json").read_text()), indent=1)[:400], "...")

# %% [markdown]
# ## Import
#
# The configuration becomes a `ModelConfig`; an unknown key is an error that names it. The weights keep their
# stored dtype.

# %%
imported = slmjax.import_model(SOURCE or work / "released", work / "imported")
print(
    f"{imported.family}: {imported.parameters:,} parameters; {', '.join(imported.notes) or 'nothing to note'}"
)
loaded = slmjax.load_model(work / "imported")
print(loaded.config.stack)
print(zoo.describe(loaded.config))

# %% [markdown]
# ## Evaluate and sample
#
# Bits per byte compares the model with any other one, whatever its tokenizer.

# %%
text = work / "text.txt"
text.write_text("\n\n".join((value.__doc__ or "") for value in vars(dataclasses).values() if callable(value)))
evaluation = slmjax.evaluate(
    loaded, data=DataConfig(path=str(text), heldout_fraction=0.0, sequence_length=128)
)
print(f"{evaluation.bytes:,} bytes, {evaluation.bits_per_byte:.3f} bits per byte")
for generation in slmjax.generate(loaded, ["The "], config=SamplingConfig(max_tokens=24, temperature=0.0)):
    print(generation.text)

# %% [markdown]
# ## Export
#
# This time in half precision. Importing the result gives the same model with its weights rounded once. The
# model card lists its origin, data and metrics.

# %%
half = slmjax.export_model(
    work / "imported", work / "half", to=slmjax.Target.HF, dtype=slmjax.WeightType.BF16
)
slmjax.import_model(work / "half", work / "back")
rounded = slmjax.evaluate(
    slmjax.load_model(work / "back"),
    data=DataConfig(path=str(text), heldout_fraction=0.0, sequence_length=128),
)
print(
    f"{half.bytes / 1e6:.1f} MB; {rounded.bits_per_byte:.3f} bits per byte, {evaluation.bits_per_byte:.3f} "
    "before"
)
print((work / "half" / "model_card.md").read_text())

# %% [markdown]
# ## Next steps
#
# The same from the command line: `slmjax import DIR OUT`, `slmjax export OUT elsewhere --to gguf`, which
# llama.cpp loads. `slmjax train finetune --init-from OUT` trains it further. See
# docs/models-from-elsewhere.md.
