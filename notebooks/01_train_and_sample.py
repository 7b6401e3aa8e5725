# %% [markdown]
# # Train a small language model and look at it
#
# A decoder with a few hundred thousand parameters learns Python's standard library on a laptop, in about a
# minute. Open this file in Jupyter (with jupytext) or in an editor that supports `# %%` cells, or run it as a
# script.
#
# `SLMJAX_NOTEBOOK_STEPS` sets another number of steps.

# %%
import dataclasses
import os
from pathlib import Path

import slmjax
from slmjax.models import MlpConfig, zoo
from slmjax.training import SamplingConfig

STEPS = int(os.environ.get("SLMJAX_NOTEBOOK_STEPS", "200"))

# %% [markdown]
# ## An experiment is a tree of settings
#
# `nano` is the default experiment. Print it to see every setting, and change any of them with
# `dataclasses.replace`. Here the model becomes smaller: two layers, each a block of attention and a
# feed-forward layer.

# %%
nano = slmjax.load_experiment("nano")
group = nano.model.stack[0]
block = dataclasses.replace(group.pattern[0], ffn=MlpConfig(hidden_dim=256))
model = dataclasses.replace(
    nano.model, embed_dim=128, stack=(dataclasses.replace(group, pattern=(block,), repeats=2),)
)
experiment = dataclasses.replace(
    nano,
    model=model,
    data=dataclasses.replace(nano.data, sequence_length=128, batch_size=8),
    tokenizer=dataclasses.replace(nano.tokenizer, vocab_size=1024, training_bytes=1_000_000),
    optim=dataclasses.replace(nano.optim, warmup_steps=min(20, STEPS - 1)),
    eval=dataclasses.replace(nano.eval, every=max(STEPS // 4, 1), max_documents=2),
    run=dataclasses.replace(nano.run, name="notebook", steps=STEPS, log_every=max(STEPS // 40, 1)),
)
print(zoo.describe(dataclasses.replace(model, vocab_size=1024)))

# %% [markdown]
# ## Train
#
# The run directory holds everything: settings, log, checkpoints, tokenizer, result and a report.

# %%
result = slmjax.train(experiment)
print(f"{result.bits_per_byte:.3f} bits per byte on held-out text; {result.compressors}")

# %% [markdown]
# ## Look at the curves
#
# `report.html` needs no network and no server. Its data are the lines of `log.jsonl`.

# %%
page = slmjax.write_report(result.run_dir)
records = slmjax.read_run(result.run_dir)
for record in records.train[:: max(len(records.train) // 8, 1)]:
    print(f"step {record['step']:4}  loss {record['loss']:.3f}  gradient norm {record['grad_norm']:.2f}")
print("open", page.resolve())

# %% [markdown]
# ## Sample
#
# The output depends on the prompt and its seed only, not on the other prompts of the batch.

# %%
loaded = slmjax.load_model(result.run_dir)
for generation in slmjax.generate(
    loaded, ["def main(", "import "], config=SamplingConfig(max_tokens=48, temperature=0.7, top_p=0.95)
):
    print(f"--- seed {generation.seed}, {generation.reason.value}, {sum(generation.logprobs):.1f} nats")
    print(generation.text)

# %% [markdown]
# ## Evaluate
#
# Bits per byte compares models with different tokenizers, and also compressors. The model never trains on the
# held-out text.

# %%
evaluation = slmjax.evaluate(loaded, max_documents=2)
print(f"{evaluation.documents} documents, {evaluation.bits_per_byte:.3f} bits per byte")
assert Path(result.run_dir, "report.html").is_file()

# %% [markdown]
# ## Next steps
#
# The same from the command line: `slmjax train nano --optim.lr 3e-3`, `slmjax runs`, `slmjax compare RUN
# RUN`. Your own text: `--data.path FILE`. Your own architecture: an experiment file, like those in
# `experiments/`.
