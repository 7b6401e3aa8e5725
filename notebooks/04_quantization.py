# %% [markdown]
# # Quantization-aware training
#
# A model that is rounded after training is not the model that was trained. Here a small model trains with its
# weights fake-quantized to 3 bits, is compared with the same model rounded after training, and is exported
# with the codes that were trained.

# %%
import dataclasses
import os
from pathlib import Path

import slmjax
from slmjax.training import Experiment, FileTokenizer, FromModel, QuantConfig, QuantPhase, QuantRule, preset

STEPS = int(os.environ.get("SLMJAX_NOTEBOOK_STEPS", "100"))

# %% [markdown]
# ## In full precision
#
# Two narrow layers of `nano`.

# %%
nano = slmjax.load_experiment("nano")
full = dataclasses.replace(
    nano,
    model=dataclasses.replace(
        nano.model, embed_dim=128, stack=(dataclasses.replace(nano.model.stack[0], repeats=2),)
    ),
    data=dataclasses.replace(nano.data, sequence_length=128, heldout_fraction=0.01),
    tokenizer=dataclasses.replace(nano.tokenizer, vocab_size=1024, training_bytes=1_000_000),
    optim=dataclasses.replace(nano.optim, warmup_steps=min(20, STEPS - 1)),
    eval=dataclasses.replace(nano.eval, every=STEPS, sample=False),
    run=dataclasses.replace(nano.run, name="notebook", steps=STEPS, sample_prompts=()),
)
base = slmjax.train(full)
print(f"full precision: {base.bits_per_byte:.3f} bits per byte")

# %% [markdown]
# ## Some more steps, in full precision and in 3 bits
#
# Both continue from the same model for as many steps. Without the first, the effect of further training
# would be mistaken for that of quantization-aware training. Three bits, because rounding to four costs a
# model of this size little.


# %%
def further(experiment: Experiment) -> Experiment:
    return dataclasses.replace(
        experiment,
        init=FromModel(path=base.run_dir),
        tokenizer=FileTokenizer(path=f"{base.run_dir}/tokenizer"),
        optim=dataclasses.replace(
            experiment.optim, lr=experiment.optim.lr / 2, muon_lr=experiment.optim.muon_lr / 2
        ),
    )


# every matrix, including the embedding; vectors stay in floating point
rules = (QuantRule(paths=".", weight=preset("int3_g32")),)
longer = slmjax.train(further(full))
aware = slmjax.train(dataclasses.replace(further(full), quant=QuantConfig(phases=(QuantPhase(rules=rules),))))

# %% [markdown]
# ## Rounded after training

# %%
written = slmjax.quantize_model(longer.run_dir, Path(longer.run_dir) / "rounded", rules=rules)
rounded = slmjax.evaluate(slmjax.load_model(written.path), data=full.data)
print(f"as stored: {written.bytes:,} bytes for {written.parameters:,} numbers")
for name, bits in (
    ("full precision", longer.bits_per_byte),
    ("rounded", rounded.bits_per_byte),
    ("aware", aware.bits_per_byte),
):
    print(f"{name:20} {bits:.3f} bits per byte")
if (cost := rounded.bits_per_byte - longer.bits_per_byte) > 0:
    print(f"recovered: {1 - (aware.bits_per_byte - longer.bits_per_byte) / cost:.0%}")

# %% [markdown]
# One seed does not resolve small differences: `experiments/qat_study.py` repeats this with three seeds and
# several formats, and reports intervals.
#
# ## Export the codes that were trained
#
# llama.cpp's 4-bit blocks hold these codes and their scales exactly.

# %%
target = Path(aware.run_dir) / "exported.gguf"
slmjax.export_model(aware.run_dir, target, to=slmjax.Target.GGUF)
print(f"{target.name}: {target.stat().st_size:,} bytes")

# %% [markdown]
# `slmjax verify-export RUN_DIR FILE` compares bytes, products and loss in llama.cpp, which the `verify` extra
# installs.

# %%
print(slmjax.write_report(aware.run_dir))
