"""Every experiment that is shipped builds, survives JSON, and takes a step at reduced size."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from slmjax import config
from slmjax.data.batch import empty_batch
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.definition import define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.parallel.batches import place_batch
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.training import recipes
from slmjax.training.experiment import Experiment
from slmjax.training.optim import Optimizer, make_optimizer
from slmjax.training.state import init_state, state_shapes
from slmjax.training.step import make_train_step

FILES = [
    path
    for path in sorted((Path(__file__).parents[2] / "experiments").glob("*.py"))
    if "\ndef experiment(" in path.read_text()  # others have studies, or what studies share
]
NAMES = [*recipes.BUILT_IN, *map(str, FILES)]
LENGTH = 32
ROWS = 2
VOCAB = 64


def reduced_block(block: BlockConfig) -> BlockConfig:
    """The same parts, a few dims wide."""
    mixer = block.mixer
    ffn = block.ffn
    assert isinstance(mixer, AttentionConfig) and isinstance(ffn, MlpConfig | MoeConfig)
    window = None if mixer.window is None else 8
    mixer = dataclasses.replace(
        mixer,
        num_heads=2,
        num_kv_heads=1 if mixer.kv_heads < mixer.num_heads else None,
        head_dim=8,
        window=window,
    )
    return dataclasses.replace(block, mixer=mixer, ffn=dataclasses.replace(ffn, hidden_dim=16))


def reduced(model: ModelConfig) -> ModelConfig:
    stack = tuple(
        dataclasses.replace(
            segment, pattern=tuple(map(reduced_block, segment.pattern)), repeats=min(segment.repeats, 2)
        )
        for segment in model.stack
    )
    return dataclasses.replace(model, embed_dim=16, stack=stack, vocab_size=VOCAB, context_length=LENGTH)


@pytest.mark.parametrize("name", NAMES, ids=[Path(name).stem for name in NAMES])
def test_an_experiment_survives_json(name: str) -> None:
    experiment = recipes.load_experiment(name)
    again = config.loads(Experiment, config.dumps(experiment))
    assert again == experiment
    assert config.fingerprint(again) == config.fingerprint(experiment)


def test_the_config_of_an_older_version_is_read() -> None:
    """Written before any field of these classes was added: `added_field` says what such a file stands for."""
    experiment = config.loads(Experiment, (Path(__file__).parent / "older_experiment.json").read_text())
    assert experiment.optim.kind is Optimizer.MUON and experiment.optim.muon_bias_correction
    assert len(experiment.model.stack[0].pattern) == 6
    assert config.fingerprint(experiment) == "4558d1f7c455b85a"


@pytest.mark.parametrize("name", NAMES, ids=[Path(name).stem for name in NAMES])
def test_an_experiment_takes_a_step(name: str) -> None:
    experiment = recipes.load_experiment(name)
    optim = dataclasses.replace(
        experiment.optim, accumulation_steps=min(experiment.optim.accumulation_steps, 2), warmup_steps=1
    )
    definition = define(reduced(experiment.model))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(optim, definition.params, total_steps=10)
        shapes = state_shapes(definition, optimizer, with_ema=optim.ema_decay is not None, mesh=mesh)
        objective = dataclasses.replace(experiment.objective, distill=None)  # there is no teacher here
        settings: dict[str, Any] = {
            "objective": objective,
            "optim": optim,
            "shapes": shapes,
            "total_steps": 10,
        }
        step = make_train_step(definition, optimizer, **settings)
        batch = empty_batch(ROWS, LENGTH)
        batch.tokens[:] = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH))
        batch.targets[:] = np.roll(batch.tokens, -1, axis=1)
        batch.loss_mask[:] = 1
        batch.segment_ids[:] = 1
        batch.positions[:] = np.arange(LENGTH)
        state = init_state(definition, optimizer, shapes=shapes, seed=experiment.run.seed)
        before = {path: np.asarray(leaf) for path, leaf in state.params.items()}
        state, metrics = step(state, place_batch(batch, mesh))
    # Freshly initialised weights know nothing: every token is about as likely as any other.
    assert abs(float(metrics["loss"]) - math.log(VOCAB)) < 0.1
    assert int(state.step) == 1 and int(state.skipped) == 0
    unmoved = [path for path, leaf in state.params.items() if np.array_equal(before[path], np.asarray(leaf))]
    assert not unmoved, f"these parameters did not change: {unmoved}"


def test_the_experiment_for_one_accelerator_is_of_gpt2_smalls_size() -> None:
    experiment = recipes.load_experiment(next(name for name in NAMES if name.endswith("slm_124m.py")))
    model = dataclasses.replace(experiment.model, vocab_size=50_257)
    parameters = sum(math.prod(leaf.shape) for leaf in define(model).params.values())
    assert 120e6 < parameters < 130e6
