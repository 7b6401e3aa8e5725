# %% [markdown]
# # A student and its teacher
#
# A model that has been trained knows more of each next token than the one token of the text: a whole distribution. A student that
# learns from it needs fewer tokens. Here both are small enough for a CPU, and the only figure that counts is measured on text
# that neither has seen.

# %%
import dataclasses
import os
from pathlib import Path

import slmjax
from slmjax.distill.config import DistillConfig, Ramp, TeacherConfig
from slmjax.distill.teachers import beside
from slmjax.experiment import Experiment, FromTeacherLayers
from slmjax.losses import ForwardKl, Jsd
from slmjax.report import write_report

STEPS = int(os.environ.get("SLMJAX_NOTEBOOK_STEPS", "100"))

# %% [markdown]
# ## The teacher
#
# Four narrow layers of `nano`, trained on the text alone for twice the steps that students have.


# %%
def of_depth(num_layers: int, steps: int) -> Experiment:
    nano = slmjax.load_experiment("nano")
    return dataclasses.replace(
        nano,
        model=dataclasses.replace(nano.model, embed_dim=128, stack=(dataclasses.replace(nano.model.stack[0], repeats=num_layers),)),
        data=dataclasses.replace(nano.data, sequence_length=128),
        tokenizer=dataclasses.replace(nano.tokenizer, vocab_size=1024, training_bytes=1_000_000),
        optim=dataclasses.replace(nano.optim, warmup_steps=min(20, STEPS - 1)),
        eval=dataclasses.replace(nano.eval, every=steps, sample=False),
        run=dataclasses.replace(nano.run, name="notebook", steps=steps, sample_prompts=()),
    )


teacher = slmjax.train(of_depth(4, 2 * STEPS))
print(f"teacher: {teacher.bits_per_byte:.3f} bits per byte")

# %% [markdown]
# ## Students
#
# All see the same batches. The first learns from the text alone, the second from what the teacher says of the same tokens, the third from both,
# by another divergence. The last begins as two of the teacher's layers.

# %%
student = of_depth(2, STEPS)
alone = DistillConfig(teachers=(TeacherConfig(path=teacher.run_dir),), divergence=ForwardKl())
both = dataclasses.replace(alone, divergence=Jsd(beta=0.5), weight=Ramp(start=1.0, end=0.5), hard_weight=Ramp(start=0.5))


def taught(distill: DistillConfig) -> Experiment:
    return dataclasses.replace(student, objective=dataclasses.replace(student.objective, distill=distill))


arms = {
    "text alone": student,
    "forward KL": taught(alone),
    "JSD and text": taught(both),
    "forward KL, teacher's layers": dataclasses.replace(taught(alone), init=FromTeacherLayers(path=teacher.run_dir)),
}
results = {name: slmjax.train(experiment) for name, experiment in arms.items()}

# %% [markdown]
# One seed resolves nothing that is near: `experiments/distill_study.py` asks the same with three seeds, and says how sure it is.

# %%
for name, result in results.items():
    loaded = slmjax.load_model(result.run_dir)
    found = slmjax.evaluate(loaded, max_documents=4, teachers=beside(Path(teacher.run_dir), loaded), log=lambda text: None)
    print(f"{name:30} {found.bits_per_byte:.3f} bits per byte, {found.text()}")

# %% [markdown]
# The page of a run shows the divergence, its weight and temperature, and the KL on held-out text.

# %%
print(write_report(results["forward KL"].run_dir))
