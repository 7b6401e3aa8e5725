"""Rules of quantization: what they come to, what is refused, phases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax.formats.presets import preset
from slmjax.formats.spec import Granularity
from slmjax.models.architecture import BlockConfig, HeadKind, LayerGroup, ModelConfig
from slmjax.models.definition import define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.quantization.activations import ActivationQuantizer, init_activation_params
from slmjax.quantization.assignment import TensorQuant
from slmjax.quantization.estimators import (
    Calibrated,
    LearnedScale,
    LearnedScaleAndOffset,
    StochasticRounding,
    StraightThrough,
)
from slmjax.quantization.fake_quantization import define_quantized, quantization_of
from slmjax.quantization.plan import assignment_lines, plan_quantization, shapes_of
from slmjax.quantization.rules import QuantConfig, QuantPhase, QuantRule, phase_at, quant_of

Q4 = preset("q4_0")
Q8 = preset("q8_0")
INT3 = preset("int3_g32")
TENSOR = dataclasses.replace(preset("int8_g32"), granularity=Granularity.PER_TENSOR, group_size=None)
DENSE = BlockConfig(mixer=AttentionConfig(num_heads=2, head_dim=32), ffn=MlpConfig(hidden_dim=96))
EXPERTS = BlockConfig(
    mixer=LatentAttentionConfig(num_heads=2, latent_dim=32, plain_dim=16, rope_dim=32, value_dim=32),
    ffn=MoeConfig(num_experts=2, num_selected=2, hidden_dim=32, bias=True),
)
MODEL = ModelConfig(
    embed_dim=64,
    stack=(LayerGroup(pattern=(DENSE, EXPERTS), repeats=2),),
    context_length=32,
    vocab_size=40,
    learned_positions=32,
    head=HeadKind.UNTIED,
)


def covered(*rules: QuantRule, model=MODEL):
    return {line.path: line for line in assignment_lines(model, (QuantPhase(rules=rules),))}


def test_every_parameter_and_cache_has_a_format_or_a_reason():
    lines = covered(
        QuantRule(paths="cache$", cache=Q8),
        QuantRule(paths="layers/1/", weight=Q8, input=Q8),
        QuantRule(paths=".", weight=Q4),
    )
    known = {*define(MODEL).params, *define(MODEL).buffers}
    assert len({path.split("/", 2)[-1] for path in lines}) >= len({path.split("/", 4)[-1] for path in known})
    assert all((line.format is None) == bool(line.reason) for line in lines.values())
    quantized = {path for path, line in lines.items() if line.format}
    assert quantized >= {
        "embed/table",
        "head/weight",
        "layers/3/ffn/experts/down",
        "layers/0/mixer/cache",
        "layers/1/mixer/latent_up/weight",
    }
    assert not any(
        "norm" in path or "bias" in path or "router" in path or "positions" in path for path in quantized
    )
    assert (
        lines["layers/1/mixer/output/weight"].input == "q8_0"
        and lines["layers/3/mixer/output/weight"].input is None
    )
    assert lines["layers/2/mixer/cache"].shape == (2, 2, 32) and lines["layers/1/mixer/cache"].shape == (64,)
    assert lines["head/weight"].bytes == 40 * 64 // 32 * 18 and lines["head/weight"].bits == 4.5
    assert lines["final_norm/scale"].bytes == 4 * 64


def test_the_gate_of_a_shared_expert_stays():
    """It is one column, which scales all of the shared expert; the expert itself has a format."""
    ffn = MoeConfig(hidden_dim=32, shared_hidden_dim=32, shared_gate=True)
    stack = (LayerGroup(pattern=(dataclasses.replace(DENSE, ffn=ffn),)),)
    lines = covered(QuantRule(paths=".", weight=Q4), model=dataclasses.replace(MODEL, stack=stack))
    assert "shared expert" in lines["layers/0/ffn/shared_gate/weight"].reason
    assert lines["layers/0/ffn/shared/up/weight"].format == "q4_0"


def test_without_rules_everything_stays():
    assert all(line.format is None and line.reason for line in assignment_lines(MODEL, ()))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [QuantRule(paths=".", weight=Q4), QuantRule(paths="embed", weight=Q8)],
            r"rule for 'embed' never applies to a parameter: .* earlier rules match",
        ),
        ([QuantRule(paths="layer/", weight=Q4)], r"'layer/' never applies to a parameter.*embed/table"),
        ([QuantRule(paths="norm", weight=Q4)], r"'norm' never applies to a parameter"),
        (
            [QuantRule(paths=".", cache=Q8), QuantRule(paths="1/mixer/cache", cache=Q4)],
            r"'1/mixer/cache' never applies to a cache",
        ),
        (
            [QuantRule(paths=".", weight=preset("tq2_0"))],
            r"embed/table is 64 wide, which tq2_0 cannot hold: .* 256",
        ),
        ([QuantRule(paths=".", input=preset("tq2_0"))], r"the input of embed/table is 64 wide"),
        ([QuantRule(paths="weight|table", weight=Q4, cache=Q8)], r"'weight\|table' never applies to a cache"),
        (
            [QuantRule(paths="up/", input=preset("nvfp4"))],
            r"nvfp4 computes a scale from all tokens, so that a token would see later ones",
        ),
        (
            [QuantRule(paths=".", cache=preset("nvfp4"))],
            r"mixer/cache: nvfp4 computes a scale from all tokens",
        ),
        (
            [QuantRule(paths="experts/down", input=TENSOR, input_estimator=Calibrated())],
            r"not there for the hidden layer of experts",
        ),
        (
            [QuantRule(paths="down", input=Q8, input_estimator=Calibrated())],
            r"Calibrated has one scale for all tokens, and q8_0",
        ),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        covered(*rules)


def test_a_width_that_does_not_fit_falls_back_where_a_rule_says_so():
    wide = dataclasses.replace(
        MODEL, stack=(LayerGroup(pattern=(dataclasses.replace(DENSE, ffn=MlpConfig(hidden_dim=256)),)),)
    )
    lines = covered(QuantRule(paths=".", weight=preset("tq2_0"), fallback=Q4), model=wide)
    assert (
        lines["layers/0/ffn/down/weight"].format == "tq2_0"
        and lines["layers/0/ffn/up/weight"].format == "q4_0"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantRule(paths="(", weight=Q4), "is not a valid regular expression"),
        (lambda: QuantRule(paths=".", fallback=Q4), "fallback of q4_0 and no format"),
        (
            lambda: QuantRule(paths=".", weight=preset("mxfp4"), estimator=LearnedScale()),
            "for integer codes, and those of mxfp4",
        ),
        (
            lambda: QuantRule(paths=".", weight=Q4, estimator=LearnedScaleAndOffset()),
            "q4_0 has none: use LearnedScale",
        ),
        (
            lambda: QuantRule(paths=".", input=preset("torchao_int8_token"), input_estimator=LearnedScale()),
            "has a zero point",
        ),
        (
            lambda: QuantRule(paths=".", weight=preset("stretched2_g32"), estimator=StochasticRounding()),
            "needs consecutive integer codes and no zero point",
        ),
        (lambda: QuantPhase(rules=()), "no rule"),
        (lambda: QuantPhase(rules=(QuantRule(paths="."),), step=-1), "step -1"),
        (lambda: QuantConfig(phases=()), "quant.phases is empty"),
        (
            lambda: QuantConfig(phases=(QuantPhase(rules=(QuantRule(paths="."),), step=3),) * 2),
            r"steps \[3, 3\]",
        ),
        (lambda: dataclasses.replace(quant_of("q4_0"), damping=-1.0), "damping"),
        (lambda: dataclasses.replace(quant_of("q4_0"), freeze_steps=0), "freeze_steps"),
        (lambda: dataclasses.replace(quant_of("q4_0"), warmup_steps=-1), "warmup_steps=-1"),
        (lambda: quant_of("q4_1"), r"no number format 'q4_1'.*q4_0"),
        (lambda: quant_of("none"), "leaves everything in floating point"),
        (lambda: quant_of("q4_0+q8_0+q8_0+q8_0"), "has 4 parts"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_names_stand_for_rules():
    (phase,) = quant_of("q4_0+q8_0+q8_0").phases
    assert [(rule.weight, rule.input, rule.cache) for rule in phase.rules] == [
        (None, None, Q8),
        (Q4, Q8, None),
    ]
    assert quant_of("w4a8") == quant_of("q4_0+q8_0")
    assert quant_of("8da4w").phases[0].rules[0].input == preset("torchao_int8_token")
    (rule,) = quant_of("none+q8_0").phases[0].rules
    assert rule.weight is None and rule.input == Q8


def test_phases_are_found_by_their_steps():
    rules = (QuantRule(paths=".", weight=Q8),)
    config = QuantConfig(phases=(QuantPhase(rules=rules), QuantPhase(rules=rules, step=5)), start_step=10)
    phases = config.resolved(cooldown_step=None, total_steps=20)
    assert [phase.step for phase in phases] == [10, 15]
    assert [phase_at(phases, step) for step in (9, 10, 14, 15, None)] == [
        None,
        phases[0],
        phases[0],
        phases[1],
        phases[1],
    ]
    with pytest.raises(
        ValueError, match="last phase at step 15, and the run ends at 15: lower quant.start_step"
    ):
        config.resolved(cooldown_step=None, total_steps=15)
    fused = dataclasses.replace(config, start_step=None)
    assert [phase.step for phase in fused.resolved(cooldown_step=12, total_steps=20)] == [12, 17]
    with pytest.raises(ValueError, match="set optim.schedule to wsd"):
        fused.resolved(cooldown_step=None, total_steps=20)


def test_layers_that_differ_in_what_modules_hold_are_in_segments_of_their_own():
    def repeats(*rules):
        return [
            segment.repeats for segment in define_quantized(MODEL, (QuantPhase(rules=rules),)).config.stack
        ]

    rest = QuantRule(paths=".", weight=Q4)
    assert repeats(QuantRule(paths="layers/2/", weight=Q8), rest) == [2]  # weights alone are no reason
    assert repeats(QuantRule(paths="layers/2/", weight=Q8, input=Q8), rest) == [1, 1]
    assert repeats(QuantRule(paths="layers/0/mixer/cache", cache=Q8), rest) == [1, 1]
    assert repeats(QuantRule(paths="layers/3/mixer", weight=INT3), rest) == [
        1,
        1,
    ]  # what is learned has a place in each layer of a stack


def test_what_is_learned_keeps_its_shape_over_phases():
    tensor = dataclasses.replace(INT3, granularity=Granularity.PER_TENSOR, group_size=None)
    phases = (
        QuantPhase(rules=(QuantRule(paths="down", weight=INT3),)),
        QuantPhase(rules=(QuantRule(paths="down", weight=tensor),), step=3),
    )
    with pytest.raises(
        ValueError,
        match=(
            r"learn scales of the weight of layers/0/ffn/down/weight with different estimators or group sizes"
        ),
    ):
        define_quantized(MODEL, phases)
    straight = QuantRule(paths="down", weight=tensor, estimator=StraightThrough())
    definition = define_quantized(MODEL, (phases[0], QuantPhase(rules=(straight,), step=3)))
    assert definition.params["segments/0/blocks/0/ffn/down/weight/log_scale"].shape == (2, 3, 64)


def test_what_is_learned_begins_for_the_phase_that_it_is_in():
    four = QuantRule(paths="down", weight=preset("int4_g32"), estimator=LearnedScale())
    two = QuantRule(paths="down", weight=preset("int2_g32"))
    phases = (QuantPhase(rules=(four,)), QuantPhase(rules=(two, QuantRule(paths="up", weight=INT3)), step=3))
    config = dataclasses.replace(MODEL, stack=(LayerGroup(pattern=(DENSE,)),))
    down, up = (f"segments/0/blocks/0/ffn/{name}/weight" for name in ("down", "up"))
    params = {
        path: jax.random.normal(jax.random.key(0), leaf.shape) for path, leaf in define(config).params.items()
    }
    first, second = (define_quantized(config, phases, step=step).with_own_params(params) for step in (0, 3))
    assert (
        float(jnp.mean(second[f"{down}/log_scale"] - first[f"{down}/log_scale"])) > 1
    )  # 7 levels a side, and then 1
    same_up = QuantPhase(rules=(four, QuantRule(paths="up", weight=INT3)))
    before, after = (
        quantization_of(define_quantized(config, (same_up, phases[1]), step=step)) for step in (0, 3)
    )
    kept = after.init_changed({**second, f"{up}/log_scale": second[f"{up}/log_scale"] + 5}, before=before)
    np.testing.assert_array_equal(kept[f"{up}/log_scale"], second[f"{up}/log_scale"] + 5)
    np.testing.assert_array_equal(kept[f"{down}/log_scale"], second[f"{down}/log_scale"])


def test_a_sign_is_kept_where_any_phase_has_one():
    """4 bits with a sign in one phase and without in another, and a layer of a stack that has none: arrays
    keep their shapes.
    """
    learned = LearnedScale()
    plain = QuantRule(paths="down", weight=preset("int4_g32"), estimator=learned)
    signed = QuantRule(paths="down", weight=Q4, estimator=learned)
    up = (
        QuantRule(paths="layers/0/ffn/up", weight=Q4, estimator=learned),
        QuantRule(paths="up", weight=INT3),
    )
    config = dataclasses.replace(MODEL, stack=(LayerGroup(pattern=(DENSE,), repeats=2),))
    phases = (QuantPhase(rules=(plain, *up)), QuantPhase(rules=(signed, *up), step=3))
    first, second = (plan_quantization(config, phases, shapes_of(config), step=step) for step in (0, 3))
    assert [segment.repeats for segment in first.config.stack] == [1, 1]
    x = jax.random.normal(jax.random.key(0), (32, 8))
    names = [
        {path: set(jax.eval_shape(one[0].init_params, x)) for path, one in plan.learned_formats.items()}
        for plan in (first, second)
    ]
    assert names[0] == names[1]
    assert {path for path, learned in names[0].items() if "sign" in learned} == {
        f"segments/{i}/blocks/0/ffn/{name}/weight" for i, name in ((0, "down"), (1, "down"), (0, "up"))
    }
    begun = [
        plan.learned_formats["segments/0/blocks/0/ffn/down/weight"][0].init_params(x)
        for plan in (first, second)
    ]
    assert np.all(begun[0]["sign"] == 1) and set(np.unique(begun[1]["sign"])) == {-1, 1}


def test_a_measured_scale_of_inputs_keeps_its_sign():
    """The number farthest from zero, 3, has the lowest code, -8: a scale of -3/8."""
    numbers = TensorQuant(
        spec=dataclasses.replace(
            preset("onnx_int4_b32"), granularity=Granularity.PER_TENSOR, group_size=None
        ),
        estimator=Calibrated(),
        axis=-1,
    )
    x = jnp.asarray([[3.0, -1.0, 2.0, 0.5]])
    begun = init_activation_params(numbers, num_layers=None)
    graph, state = nnx.split(ActivationQuantizer(numbers, learned=numbers, params=begun, is_calibrating=True))
    measured = nnx.to_pure_dict(jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(x)))(state))
    assert set(measured) == set(begun) == {"log_scale", "sign"} and measured["sign"] == -1
    assert float(measured["log_scale"]) == pytest.approx(np.log2(3 / 8))
    np.testing.assert_allclose(
        ActivationQuantizer(numbers, learned=numbers, params=measured)(x),
        [[3.0, -1.125, 1.875, 0.375]],
        rtol=1e-6,
    )


def test_rules_for_rounded_weights_name_what_they_named():
    rules = (QuantRule(paths="mixer", weight=Q4, cache=Q8), QuantRule(paths=".", weight=Q4, input=Q8))
    before = covered(*rules)
    after = covered(*QuantPhase(rules=rules).without_weights().rules)
    assert {path: line.input for path, line in before.items()} == {
        path: line.input for path, line in after.items()
    }
    assert (
        after["layers/0/mixer/cache"].format == "q8_0" and after["layers/0/mixer/query/weight"].format is None
    )
