# %% [markdown]
# # Train a small language model and look at it
#
# A decoder of a few hundred thousand parameters learns Python's own standard library, on a laptop in about a
# minute. Each cell does one thing; open this file in Jupyter (with jupytext) or in an editor that knows `#
# %%`, or run it as it is.
#
# `SLMJAX_NOTEBOOK_STEPS` makes it shorter, as the tests do.

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
# `nano` is the default one. Nothing of it is hidden: print it, and change what you like with
# `dataclasses.replace`. Here the model becomes smaller: two layers, each a block of attention and a
# feed-forward layer.

# %%
nano = slmjax.load_experiment("nano")
segment = nano.model.stack[0]
block = dataclasses.replace(segment.pattern[0], ffn=MlpConfig(hidden_dim=256))
model = dataclasses.replace(
    nano.model, embed_dim=128, stack=(dataclasses.replace(segment, pattern=(block,), repeats=2),)
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
# Everything about the run is in its directory: settings, log, checkpoints, tokenizer, result, and a page to
# look at.

# %%
result = slmjax.train(experiment)
print(f"{result.bits_per_byte:.3f} bits per byte on held-out text; {result.compressors}")

# %% [markdown]
# ## Look at the curves
#
# `report.html` needs no network and no server. The figures behind it are the lines of `log.jsonl`.

# %%
page = slmjax.write_report(result.run_dir)
records = slmjax.read_run(result.run_dir)
for record in records.train[:: max(len(records.train) // 8, 1)]:
    print(f"step {record['step']:4}  loss {record['loss']:.3f}  gradient norm {record['grad_norm']:.2f}")
print("open", page.resolve())

# %% [markdown]
# ## Sample
#
# A prompt and its seed decide what comes, whatever else is sampled beside it.

# %%
loaded = slmjax.load_model(result.run_dir)
for one in slmjax.generate(
    loaded, ["def main(", "import "], config=SamplingConfig(max_tokens=48, temperature=0.7, top_p=0.95)
):
    print(f"--- seed {one.seed}, {one.reason.value}, {sum(one.logprobs):.1f} nats")
    print(one.text)

# %% [markdown]
# ## Evaluate
#
# Bits per byte compares models with different tokenizers, and compressors. The held-out text is never trained
# on.

# %%
evaluation = slmjax.evaluate(loaded, max_documents=2)
print(f"{evaluation.documents} documents, {evaluation.bits_per_byte:.3f} bits per byte")
assert Path(result.run_dir, "report.html").is_file()

# %% [markdown]
# ## Where to go from here
#
# The same from the command line: `slmjax train nano --optim.lr 3e-3`, `slmjax runs`, `slmjax compare RUN
# RUN`. Your own text: `--data.path FILE`. Your own architecture: an experiment file, like those in
# `experiments/`.
