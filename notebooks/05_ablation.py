# %% [markdown]
# # Ablations with a verdict
#
# Is A better than B, at this budget, and how sure are we? A study trains each arm with several seeds, on the
# same batches, and compares them in pairs. Here three small variants of `nano` are compared.

# %%
import csv
import dataclasses
import os
from pathlib import Path

import slmjax
from slmjax.studies import Arm, Study, analyze, print_findings, run_study, write_findings, write_study_report

STEPS = int(os.environ.get("SLMJAX_NOTEBOOK_STEPS", "40"))

# %% [markdown]
# ## A question
#
# The base is one narrow layer of `nano`, so that a run takes seconds. Arms name what they change, by the
# paths of `config.json`; a star stands for every element.

# %%
nano = slmjax.load_experiment("nano")
base = dataclasses.replace(
    nano,
    model=dataclasses.replace(
        nano.model, embed_dim=64, stack=(dataclasses.replace(nano.model.stack[0], repeats=1),)
    ),
    data=dataclasses.replace(nano.data, sequence_length=128, batch_size=4, heldout_fraction=0.005),
    tokenizer=dataclasses.replace(nano.tokenizer, vocab_size=512, training_bytes=500_000),
    optim=dataclasses.replace(nano.optim, warmup_steps=min(5, STEPS - 1)),
    eval=dataclasses.replace(nano.eval, every=STEPS, sample=False),
    run=dataclasses.replace(nano.run, name="notebook", steps=STEPS, sample_prompts=()),
)
study = Study(
    name="rates",
    question="Which learning rate suits a very short run?",
    base=base,
    arms=(
        Arm(name="nano's"),
        Arm(name="half", changes={"optim.lr": nano.optim.lr / 2, "optim.muon_lr": nano.optim.muon_lr / 2}),
        Arm(name="double", changes={"optim.lr": nano.optim.lr * 2, "optim.muon_lr": nano.optim.muon_lr * 2}),
    ),
    seeds=(0, 1, 2),
    baseline="nano's",
    smallest_effect=0.02,
)

# %% [markdown]
# ## Runs, and a verdict
#
# Called again, `run_study` resumes where it was stopped. From a file with `def study() -> Study`, the command
# `slmjax ablate FILE` does all of this, and writes a page.

# %%
directory = Path("runs") / "notebook-study"
members = run_study(study, directory)
findings = analyze(study, members)
print_findings(findings)
for comparison in findings.comparisons:
    print(f"{comparison.arm} against {comparison.against}: {comparison.verdict.value}")
write_findings(findings, directory)
print(write_study_report(directory))

# %% [markdown]
# ## Runs of another program
#
# `slmjax verdict FILE --arm arm --seed seed --metric bits_per_byte --baseline "nano's"` judges any table of
# results by the same rules.

# %%
table = directory / "results.csv"
with table.open("w", newline="") as stream:
    rows = csv.writer(stream)
    rows.writerow(["arm", "seed", "bits_per_byte"])
    rows.writerows([member.arm, member.seed, member.metric_value("bits_per_byte")] for member in members)
print(table.read_text())
