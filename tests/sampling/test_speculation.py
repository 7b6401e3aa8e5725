"""Drafts of the model's own modules: the same tokens greedily, the same distribution otherwise."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig, MultiTokenConfig
from slmjax.models.decoder import logits
from slmjax.models.definition import Definition, define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.models.mixers.mamba2 import Mamba2Config
from slmjax.models.mixers.rwkv4 import Rwkv4Config
from slmjax.models.mixers.short_convolution import ShortConvolutionConfig
from slmjax.models.protocols import MixerConfig
from slmjax.sampling import Continuation, SamplingConfig, filtered_logits, penalised, sample
from slmjax.sampling.speculation import is_rewindable

VOCAB = 5  # so few that random modules are often right
CONTEXT = 32
EOS = 4
PROMPTS = [[0, 1, 3], [0, 2, 2, 1, 3, 1, 0, 2, 1], [0, 1, 1, 2], [0, 3, 2, 1, 0]]
FULL = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)

Model = tuple[Definition, dict[str, jax.Array], dict[str, jax.Array]]


def config_of(*mixers: MixerConfig, repeats: int = 2, num_tokens: int = 3) -> ModelConfig:
    blocks = tuple(BlockConfig(mixer=mixer, ffn=MlpConfig(hidden_dim=16)) for mixer in mixers)
    return ModelConfig(
        embed_dim=16,
        stack=(LayerGroup(pattern=blocks, repeats=repeats),),
        context_length=CONTEXT,
        vocab_size=VOCAB,
        vocab_multiple=8,
        multi_token=MultiTokenConfig(num_tokens=num_tokens),
    )


def build(config: ModelConfig) -> Model:
    definition = define(config)
    draws = np.random.default_rng(5)
    params = {
        path: jnp.asarray(draws.normal(size=leaf.shape) * 0.4 + path.endswith("scale"), jnp.float32)
        for path, leaf in definition.params.items()
    }
    return definition, params, {}


@functools.cache
def attention_model() -> Model:
    return build(config_of(FULL))


def both(model: Model, **settings) -> tuple[list[Continuation], list[Continuation]]:
    """Continuations with drafts and without."""
    plain = SamplingConfig(temperature=0.0, max_tokens=18, **settings)
    return tuple(
        sample(*model, PROMPTS, config=dataclasses.replace(plain, draft_tokens=drafts), eos_id=EOS)
        for drafts in (3, None)
    )


def assert_equal(drafted: list[Continuation], plain: list[Continuation]) -> None:
    for ours, theirs in zip(drafted, plain, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-4)
    assert all(item.drafted == item.accepted == 0 for item in plain)


# Greedily ---------------------------------------------------------------------------------------------------
def test_attention_continues_alike_and_forgets_rejected_drafts() -> None:
    """Three modules, prompts of different lengths, and ends; some drafts are accepted, others are not."""
    drafted, plain = both(attention_model())
    assert_equal(drafted, plain)
    drafts = sum(item.drafted for item in drafted)
    accepted = sum(item.accepted for item in drafted)
    assert 0.02 * drafts < accepted < 0.95 * drafts, (drafts, accepted)
    assert len({len(item.tokens) for item in plain}) > 1


@pytest.mark.nightly
def test_a_penalty_counts_drafts_before_a_draft() -> None:
    assert_equal(*both(attention_model(), repetition_penalty=1.4))


@pytest.mark.parametrize(
    "mixers",
    [
        (dataclasses.replace(FULL, window=4), ShortConvolutionConfig()),
        pytest.param((Mamba2Config(head_dim=8, state_dim=4),), marks=pytest.mark.nightly),
        pytest.param((Rwkv4Config(inner_dim=16),), marks=pytest.mark.nightly),
        pytest.param(
            (LatentAttentionConfig(num_heads=2, latent_dim=8, plain_dim=4, rope_dim=4, value_dim=4),),
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_states_that_cannot_take_a_token_back_are_computed_again(mixers: tuple[MixerConfig, ...]) -> None:
    """Also where every layer is unrolled, and where the layer of the modules has such a state itself."""
    config = config_of(*mixers)
    model = build(config)
    merged = model[0].merge(model[1], {})
    state = merged.init_state(1, max_length=CONTEXT)
    assert is_rewindable(state, CONTEXT) == isinstance(mixers[0], LatentAttentionConfig)
    assert_equal(*both(model))


@pytest.mark.nightly
def test_short_prompts_have_fewer_drafts_and_the_context_is_used_to_its_end() -> None:
    """A prompt of one token allows one module; the last step may need no draft at all."""
    settings = {"temperature": 0.0, "max_tokens": CONTEXT - 2}
    prompts = [[1], [2, 3]]
    found, expected = (
        sample(
            *attention_model(),
            prompts,
            config=SamplingConfig(draft_tokens=drafts, **settings),
            eos_id=None,
        )
        for drafts in (3, None)
    )
    assert [item.tokens for item in found] == [item.tokens for item in expected]
    assert [len(item.tokens) for item in found] == [CONTEXT - 2, CONTEXT - 2]


# Draws ------------------------------------------------------------------------------------------------------
@pytest.mark.nightly
def test_draws_follow_the_distribution_of_the_model() -> None:
    """4,000 continuations of three tokens against the probabilities of all 125, with every setting that
    changes them; without the rejection the drafts' own distribution would be far from it.
    """
    model = attention_model()
    prompt = [0, 2, 1]
    settings = {"temperature": 0.8, "top_k": 4, "repetition_penalty": 1.3}
    num_draws = 4000
    found = sample(
        *model,
        [prompt] * num_draws,
        config=SamplingConfig(draft_tokens=2, max_tokens=4, **settings),
        eos_id=None,
    )
    # The first new token comes from the prompt alone: the drafts are those after it.
    counts: dict[tuple[int, ...], int] = {}
    for item in found:
        key = tuple(item.tokens[:3])
        counts[key] = counts.get(key, 0) + 1
    exact = exact_probabilities(model, prompt, length=3)
    assert sum(exact.values()) == pytest.approx(1.0, abs=1e-5)
    assert all(exact[key] > 0 for key in counts)
    # Half the sum of absolute differences; of multinomial draws it is at most about half of
    # sum(sqrt(2 p / (pi n))).
    distance = 0.5 * sum(abs(counts.get(key, 0) / num_draws - p) for key, p in exact.items())
    expected = 0.5 * sum(np.sqrt(2 * p / (np.pi * num_draws)) for p in exact.values())
    assert distance < 1.35 * expected
    accepted = sum(item.accepted for item in found) / sum(item.drafted for item in found)
    assert 0.1 < accepted < 0.95


def exact_probabilities(model: Model, prompt: list[int], *, length: int) -> dict[tuple[int, ...], float]:
    """The probability of each continuation, from logits of whole sequences."""
    merged = model[0].merge(model[1], {})
    texts = np.array([[*prompt, *new] for new in itertools.product(range(VOCAB), repeat=length)])
    all_logits = logits(merged, jnp.asarray(texts))
    probability = np.ones(len(texts))
    for index in range(len(prompt), texts.shape[1]):
        used = np.zeros((len(texts), VOCAB), bool)
        for row, text in enumerate(texts):
            used[row, text[:index]] = True
        adjusted = penalised(all_logits[:, index - 1], jnp.asarray(used), penalty=1.3)
        filtered = filtered_logits(adjusted, temperature=0.8, top_k=4)
        probability *= np.asarray(jax.nn.softmax(filtered))[np.arange(len(texts)), texts[:, index]]
    return {tuple(text[len(prompt) :].tolist()): p for text, p in zip(texts, probability, strict=True)}


# Settings ---------------------------------------------------------------------------------------------------
def test_a_model_without_modules_drafts_nothing() -> None:
    config = dataclasses.replace(config_of(FULL), multi_token=None)
    with pytest.raises(ValueError, match="draft_tokens=1, and the model has 0 modules"):
        sample(*build(config), PROMPTS, config=SamplingConfig(draft_tokens=1), eos_id=None)
    with pytest.raises(ValueError, match="draft_tokens must be at least 1"):
        SamplingConfig(draft_tokens=0)
