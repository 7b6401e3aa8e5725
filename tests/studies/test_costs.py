"""Costs of an arm: counted by hand, from real architectures by shapes alone, and from the text."""

import dataclasses
from pathlib import Path

import pytest

from slmjax.data.tokenizers import CharTokenizer
from slmjax.models import (
    AttentionConfig,
    BlockConfig,
    HeadKind,
    LatentAttentionConfig,
    LayerGroup,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    zoo,
)
from slmjax.models.architecture import Remat
from slmjax.planning.run_flops import stretches, training_flops
from slmjax.quantization.rules import QuantConfig, QuantPhase, QuantRule, quant_of
from slmjax.studies.costs import arm_cost, text_size
from slmjax.studies.design import Quantity
from slmjax.training.experiment import Experiment, RunConfig
from slmjax.training.optim import OptimConfig
from tests import tiny

WIDTH = 32
FFN = 64
HEAD_DIM = 32
LENGTH = 16
VOCAB_SIZE = 64
ROWS = 4


def experiment(
    *blocks: BlockConfig, head: HeadKind = HeadKind.TIED, context_length: int = LENGTH, **changes: object
) -> Experiment:
    """One layer of each block, trained for 10 steps by AdamW."""
    base = tiny.experiment()
    model = ModelConfig(
        embed_dim=WIDTH,
        stack=tuple(LayerGroup(pattern=(block,)) for block in blocks),
        context_length=context_length,
        vocab_size=VOCAB_SIZE,
        head=head,
    )
    fields = {
        "model": model,
        "data": dataclasses.replace(base.data, sequence_length=LENGTH, batch_size=ROWS),
        "optim": OptimConfig(),
        "eval": dataclasses.replace(base.eval, overlap=0),
        "run": RunConfig(steps=10),
    }
    return dataclasses.replace(base, **{**fields, **changes})


MIXER = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=HEAD_DIM)
DENSE = BlockConfig(mixer=MIXER, ffn=MlpConfig(hidden_dim=FFN))


def test_a_dense_layer_costs_what_a_count_by_hand_says() -> None:
    cost = arm_cost(experiment(DENSE))
    attention = WIDTH * HEAD_DIM * (2 + 2 + 1 + 1)  # two heads of queries and outputs, one of keys and values
    matrices = attention + 3 * WIDTH * FFN
    table = VOCAB_SIZE * WIDTH
    norms = 3 * WIDTH
    assert cost.parameters == table + matrices + norms
    assert cost.non_embedding_parameters == matrices + norms
    assert cost.active_parameters == cost.parameters
    assert cost.steps == 10
    assert cost.tokens == 10 * ROWS * LENGTH
    # A product costs 2 forward and 4 backward for each parameter; scores and their sum over all pairs alike.
    mixing = 2 * 2 * LENGTH * 2 * HEAD_DIM
    assert cost.flops == 3 * (2 * (matrices + table) + mixing) * cost.tokens
    assert cost.deployed_bytes == 4 * cost.parameters
    assert cost.cache_bytes == LENGTH * 2 * HEAD_DIM * 4
    assert cost.epochs is None
    assert cost.of(Quantity.FLOPS) == cost.flops
    assert cost.of(Quantity.SECONDS) is None
    untied = arm_cost(experiment(DENSE, head=HeadKind.UNTIED))
    assert untied.parameters == cost.parameters + table
    assert untied.non_embedding_parameters == cost.non_embedding_parameters
    assert untied.flops == cost.flops


def test_of_experts_the_chosen_and_the_shared_ones_are_active() -> None:
    moe = MoeConfig(num_experts=8, num_selected=2, hidden_dim=FFN, shared_hidden_dim=FFN // 2)
    sparse = arm_cost(experiment(dataclasses.replace(DENSE, ffn=moe)))
    dense = arm_cost(experiment(DENSE))
    expert = 3 * WIDTH * FFN
    router = 8 * WIDTH
    assert sparse.parameters == dense.parameters + 7 * expert + router + expert // 2
    assert sparse.active_parameters == dense.parameters + expert + router + expert // 2
    # The FLOPs are those of the chosen experts: one and a half more of them, the router, and the weighted sum
    # of two outputs.
    assert sparse.flops - dense.flops == 6 * (expert + expert // 2 + router + 2 * WIDTH) * dense.tokens


def test_caches_are_those_of_the_mixers() -> None:
    windowed = dataclasses.replace(DENSE, mixer=dataclasses.replace(MIXER, window=8))
    latent = dataclasses.replace(
        DENSE,
        mixer=LatentAttentionConfig(num_heads=2, latent_dim=12, plain_dim=8, rope_dim=4, value_dim=8),
    )
    looped = dataclasses.replace(DENSE, num_loops=3)
    full = 2 * HEAD_DIM * 4
    cost = arm_cost(experiment(DENSE, windowed, latent, looped))
    assert cost.cache_bytes == LENGTH * full + 8 * full + LENGTH * (12 + 4) * 4 + 3 * LENGTH * full


def test_formats_count_with_their_scales() -> None:
    plain = experiment(DENSE)
    quantized = dataclasses.replace(plain, quant=quant_of("q8_0+none+q8_0"))
    cost = arm_cost(quantized)
    norms = 3 * WIDTH
    matrices = arm_cost(plain).parameters - norms
    # Blocks of 32 numbers have a scale of 2 bytes.
    assert cost.deployed_bytes == matrices * 34 // 32 + 4 * norms
    assert cost.cache_bytes == LENGTH * 2 * HEAD_DIM * 34 // 32
    assert cost.parameters == arm_cost(plain).parameters


def test_phases_and_teachers_are_programs_of_their_own() -> None:
    rules = (QuantRule(paths=".", weight=quant_of("q8_0").phases[0].rules[0].weight),)
    late = dataclasses.replace(
        experiment(DENSE), quant=QuantConfig(phases=(QuantPhase(rules=rules),), start_step=4)
    )
    assert [(stretch.first, stretch.num_steps) for stretch in stretches(late)] == [(0, 4), (4, 6)]


def test_recomputation_and_accumulation_are_no_training() -> None:
    plain = experiment(DENSE)
    flops = training_flops(plain, vocab_size=VOCAB_SIZE)
    model = dataclasses.replace(plain.model, remat=Remat.FULL)
    assert training_flops(dataclasses.replace(plain, model=model), vocab_size=VOCAB_SIZE) == flops
    split = dataclasses.replace(plain, optim=OptimConfig(accumulation_steps=2))
    assert training_flops(split, vocab_size=VOCAB_SIZE) == flops


@pytest.mark.parametrize(
    "model",
    [
        zoo.slm_124m(),
        pytest.param(zoo.qwen3_0_6b(), marks=pytest.mark.nightly),
        pytest.param(zoo.gemma3_270m(), marks=pytest.mark.nightly),
    ],
)
def test_real_architectures_by_shapes_alone(model: ModelConfig) -> None:
    base = tiny.experiment()
    length = 256
    real = dataclasses.replace(
        base,
        model=dataclasses.replace(model, context_length=length, learned_positions=None),
        data=dataclasses.replace(base.data, sequence_length=length),
        optim=OptimConfig(),
    )
    cost = arm_cost(real, vocab_size=model.vocab_size or 50_257)
    sizes = zoo.describe(dataclasses.replace(real.model, vocab_size=model.vocab_size or 50_257))
    assert cost.parameters == sizes.parameters
    # The traced step computes some masked scores; the config's figure counts only those that are seen.
    assert 1.0 <= cost.flops / (sizes.training_flops_per_token * cost.tokens) < 1.1


def test_the_text_gives_epochs_and_vocabulary(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    base = dataclasses.replace(tiny.experiment(), tokenizer=CharTokenizer(), run=RunConfig(epochs=2.0))
    text = text_size(base)
    cost = arm_cost(base)
    assert cost.steps == -(-2 * text.rows // base.data.batch_size)
    assert cost.epochs == pytest.approx(2.0, abs=base.data.batch_size / text.rows)
    assert cost == arm_cost(base, text=text)
    assert 0.5 < text.packing_efficiency <= 1.0
