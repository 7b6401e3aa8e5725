# %% [markdown]
# # Bring a model in, look at it, take it out again
#
# A released model is a directory of files: a configuration, weights, a tokenizer. slmjax reads such a
# directory without running anything in it, and every command then takes the model as it takes a run. What
# slmjax trains goes out the same way.
#
# So that this needs no network, the model from elsewhere is one that was trained here and exported. Set
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
# ## A model to begin with
#
# `nano` is a Qwen3 in every detail, only smaller: it needs no conversion of its own to be understood by other
# engines.

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
# The configuration becomes a `ModelConfig`; a key that is not understood would be an error that names it. The
# weights stay as they are stored.

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
# Bits per byte compares it with any other model, whatever its tokenizer.

# %%
text = work / "text.txt"
text.write_text("\n\n".join((value.__doc__ or "") for value in vars(dataclasses).values() if callable(value)))
evaluation = slmjax.evaluate(
    loaded, data=DataConfig(path=str(text), heldout_fraction=0.0, sequence_length=128)
)
print(f"{evaluation.bytes:,} bytes, {evaluation.bits_per_byte:.3f} bits per byte")
for one in slmjax.generate(loaded, ["The "], config=SamplingConfig(max_tokens=24, temperature=0.0)):
    print(one.text)

# %% [markdown]
# ## Export
#
# In half precision this time. What comes back is the same model, its weights rounded once; the model card
# says what is known of it.

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
# ## Where to go from here
#
# The same from the command line: `slmjax import DIR OUT`, `slmjax export OUT elsewhere --to gguf`, which
# llama.cpp loads. `slmjax train nano --init-from OUT` goes on training it. docs/models-from-elsewhere.md has
# the rest.
