"""Initial deviations and forward multipliers, against values worked out by hand from the papers' tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.config import fingerprint, from_json, to_json
from slmjax.models.architecture import BlockConfig, HeadKind, LayerGroup, ModelConfig
from slmjax.models.canonical_form import canonical
from slmjax.models.decoder import logits
from slmjax.models.definition import define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.models.parameterization import Parameterization, Scaling
from slmjax.models.protocols import FfnConfig

MUP = Parameterization.MUP
COMPLETEP = Parameterization.COMPLETEP


def model(**more):
    """Four layers of width 64: attention, latent attention, dense and mixture-of-experts layers."""
    blocks = (
        BlockConfig(mixer=AttentionConfig(num_heads=4), ffn=MlpConfig(hidden_dim=128)),
        BlockConfig(
            mixer=LatentAttentionConfig(num_heads=4, latent_dim=32, plain_dim=8, rope_dim=8, value_dim=16),
            ffn=MoeConfig(num_experts=4, num_selected=2, hidden_dim=64),
        ),
    )
    stack = (LayerGroup(pattern=blocks, repeats=2),)
    defaults = {"embed_dim": 64, "vocab_size": 512, "head": HeadKind.UNTIED, "context_length": 16}
    return ModelConfig(**{**defaults, "stack": stack, **more})


def test_factors_of_the_tables():
    # Four times as wide: table 8 of Tensor Programs V has 1/4 for the variance of hidden weights, 1/4 for
    # logits.
    mup = Scaling(kind=MUP, width=4.0)
    assert (mup.hidden_std, mup.router_std, mup.logits, mup.residual) == (0.5, 0.25, 0.25, 1.0)
    # And eight times as deep: table 1 of CompleteP has m_L^-1 for the residual branch.
    complete = Scaling(kind=COMPLETEP, width=4.0, depth=8.0)
    assert (complete.hidden_std, complete.logits, complete.residual) == (0.5, 0.25, 0.125)
    # Scores: one over the head's dims, with the base's root: 16**-0.5 at 16 dims, 16**0.5 / 64 at 64.
    scaled = Scaling(kind=MUP, base_head_dim=16)
    assert scaled.score_scale(16, None) == 0.25
    assert scaled.score_scale(64, None) == 0.0625
    assert scaled.score_scale(64, 0.1) == 0.025
    # More heads instead of larger ones: nothing changes.
    assert mup.score_scale(64, None) == 0.125


def test_initial_deviations():
    config = model(parameterization=COMPLETEP, base_width=16, base_depth=2, init_std=0.5, base_head_dim=8)
    assert config.scaling == Scaling(kind=COMPLETEP, width=4.0, depth=2.0, base_head_dim=8)
    params, _ = jax.jit(define(config).init)(jax.random.key(0))
    cut = 0.9866  # deviation of a normal that is cut at three deviations
    expected = {
        "embed/table": 0.5,
        "head/weight": 0.5,
        # 0.5 over the root of 4; those that write into the residual stream as at the base's 2 layers
        "segments/0/blocks/0/mixer/query/weight": 0.25,
        "segments/0/blocks/0/mixer/output/weight": 0.125,
        "segments/0/blocks/0/ffn/up/weight": 0.25,
        "segments/0/blocks/0/ffn/down/weight": 0.125,
        "segments/0/blocks/1/mixer/latent_down/weight": 0.25,
        "segments/0/blocks/1/mixer/latent_up/weight": 0.25,
        "segments/0/blocks/1/mixer/output/weight": 0.125,
        "segments/0/blocks/1/ffn/experts/gate": 0.25,
        "segments/0/blocks/1/ffn/experts/down": 0.125,
        # a readout: 0.5 / 4
        "segments/0/blocks/1/ffn/router/weight": 0.125,
    }
    for path, std in expected.items():
        assert np.std(params[path]) == pytest.approx(std * cut, rel=0.1), path


@pytest.mark.parametrize("kind", [MUP, COMPLETEP])
def test_base_is_the_standard_model(kind):
    standard = model()
    base = model(parameterization=kind, base_width=64, base_depth=4, base_head_dim=16)
    assert canonical(base) == canonical(standard)
    assert base.layer_dims().init_std == standard.layer_dims().init_std
    assert base.layer_dims().output_std == standard.layer_dims().output_std
    assert base.layer_dims().router_std == standard.layer_dims().router_std


def test_forward_multipliers():
    """The model computes what the standard one with explicit multipliers does: also the canonical form."""
    scaled = model(
        parameterization=COMPLETEP, base_width=32, base_depth=2, base_head_dim=4, head=HeadKind.TIED
    )
    explicit = canonical(scaled)
    assert explicit.parameterization is Parameterization.STANDARD
    assert (explicit.residual_multiplier, explicit.logit_multiplier) == (0.5, 0.5)
    # 4**0.5 / 16
    assert [block.mixer.scale for block in explicit.blocks()] == [0.125] * 4
    plain = dataclasses.replace(explicit, residual_multiplier=1.0)
    tokens = jnp.arange(8)[None]

    @jax.jit
    def results(key):
        params, buffers = define(scaled).init(key)
        return [logits(define(config).merge(params, buffers), tokens) for config in (scaled, explicit, plain)]

    of_scaled, of_explicit, of_plain = results(jax.random.key(0))
    np.testing.assert_allclose(of_scaled, of_explicit, rtol=1e-6)
    assert not np.allclose(of_scaled, of_plain)


def test_old_files_and_fingerprints_stay():
    config = model()
    fields = to_json(config)
    added = ("parameterization", "base_width", "base_depth", "base_head_dim")
    older = {name: value for name, value in fields.items() if name not in added}
    assert from_json(ModelConfig, older) == config
    assert fingerprint(config) == fingerprint(from_json(ModelConfig, older))
    other = model(parameterization=MUP, base_width=16)
    assert from_json(ModelConfig, to_json(other)) == other
    assert fingerprint(other) != fingerprint(config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherFfn(FfnConfig):
    def build(self, dims, *, rngs):
        raise NotImplementedError

    def active_fraction(self):
        return 1.0

    def for_inference(self):
        return self


def test_refusals():
    with pytest.raises(ValueError, match=r"parameterization=mup needs base_width: set it to the embed_dim"):
        model(parameterization=MUP)
    with pytest.raises(ValueError, match=r"completep needs base_depth: set it to the number of layers"):
        model(parameterization=COMPLETEP, base_width=16)
    with pytest.raises(ValueError, match="base_width must be at least 1 or none, got 0"):
        model(base_width=0)
    block = BlockConfig(mixer=AttentionConfig(num_heads=4), ffn=OtherFfn())
    with pytest.raises(ValueError, match="not for OtherFfn: set parameterization=standard"):
        model(stack=(LayerGroup(pattern=(block,)),), parameterization=MUP, base_width=16)
