# %% [markdown]
# # A student and its teacher
#
# The text has one next token; a trained model has a distribution over all of them. A student that learns
# from this distribution needs fewer tokens. Here both models are small enough for a CPU, and the metric is
# measured on text that neither has seen.

# %%
import dataclasses
import os
from pathlib import Path

import slmjax
from slmjax.training import DistillConfig, Experiment, ForwardKl, FromTeacherLayers, Ramp, TeacherConfig

STEPS = int(os.environ.get("SLMJAX_NOTEBOOK_STEPS", "100"))

# %% [markdown]
# ## The teacher
#
# Four narrow layers of `nano`, trained on the text alone for twice as many steps as the students.


# %%
def of_depth(num_layers: int, steps: int) -> Experiment:
    nano = slmjax.load_experiment("nano")
    return dataclasses.replace(
        nano,
        model=dataclasses.replace(
            nano.model, embed_dim=128, stack=(dataclasses.replace(nano.model.stack[0], repeats=num_layers),)
        ),
        data=dataclasses.replace(nano.data, sequence_length=128, heldout_fraction=0.01),
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
# All see the same batches. The first learns from the text alone, the second from the teacher's outputs for
# the same tokens. The third also learns from the teacher, and starts as two of its layers.

# %%
student = of_depth(2, STEPS)
distill = DistillConfig(
    teachers=(TeacherConfig(path=teacher.run_dir),),
    divergence=ForwardKl(),  # or Jsd(beta=0.5), Taid(), TopK(k=64), ...
    weight=Ramp(start=1.0),
    hard_weight=Ramp(start=0.0),  # of the cross entropy on the text
    temperature=Ramp(start=1.0),
)
taught = dataclasses.replace(student, objective=dataclasses.replace(student.objective, distill=distill))
arms = {
    "text alone": student,
    "forward KL": taught,
    "forward KL, teacher's layers": dataclasses.replace(taught, init=FromTeacherLayers(path=teacher.run_dir)),
}
results = {name: slmjax.train(experiment) for name, experiment in arms.items()}

# %% [markdown]
# One seed does not resolve small differences: `experiments/distill_study.py` repeats this with three seeds
# and reports intervals.

# %%
for name, result in results.items():
    print(f"{name:30} {result.bits_per_byte:.3f} bits per byte")

# %% [markdown]
# The KL divergence from the teacher of the first student, which never saw the teacher's outputs:

# %%
loaded = slmjax.load_model(results["text alone"].run_dir)
evaluation = slmjax.evaluate(
    loaded,
    max_documents=2,
    teachers=slmjax.load_teacher(Path(teacher.run_dir), loaded),
)
print(evaluation.text())

# %% [markdown]
# The report of a run shows the divergence, its weight and temperature, and the KL on held-out text.

# %%
print(slmjax.write_report(results["forward KL"].run_dir))
