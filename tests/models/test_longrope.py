"""LongRoPE selects its divisors by the length of the sequence alone.

Other sequences of the batch, rounded cache lengths, padding and windows must change nothing.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import evaluation, losses
from slmjax.checkpoints.loading import Loaded
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.definition import define
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.models.rope import LongScaling
from slmjax.sampling import SamplingConfig, sample
from slmjax.sampling.decoding import Continuation

Logprobs = Callable[[list[int]], np.ndarray]

ORIGINAL_CONTEXT = 40
NEW_TOKENS = 25
VOCAB = 257
SCALING = LongScaling(short_factors=(1.0,) * 8, long_factors=(4.0,) * 8, original_context=ORIGINAL_CONTEXT)
MIXERS = (
    AttentionConfig(num_heads=2, head_dim=16, rope_scaling=SCALING),
    AttentionConfig(num_heads=2, head_dim=16, rope_scaling=SCALING, window=16),
    LatentAttentionConfig(
        num_heads=2, latent_dim=16, plain_dim=4, rope_dim=16, value_dim=16, rope_scaling=SCALING
    ),
)
# 10 + 25 tokens stay within the original context, 60 + 25 and 90 + 25 do not. Caches are rounded up to 64 and
# 128 slots.
PROMPTS = [np.random.default_rng(length).integers(0, 256, length).tolist() for length in (10, 90, 60)]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """Return a model with large weights, so that a wrong angle changes the logits by several nats."""
    stack = (LayerGroup(pattern=tuple(BlockConfig(mixer=mixer, ffn=None) for mixer in MIXERS)),)
    config = ModelConfig(embed_dim=32, stack=stack, context_length=128, vocab_size=VOCAB, vocab_multiple=1)
    definition = define(config)
    draws = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(path.endswith("scale") + 0.4 * draws.normal(size=shape), jnp.float32)

    params = {path: draw(path, leaf.shape) for path, leaf in definition.params.items()}
    return Loaded(
        config=config,
        model=definition.merge(params, {}),
        definition=definition,
        params=params,
        buffers={},
        path=Path(),
        step=0,
        own_tokenizer=None,
    )


def greedy(loaded: Loaded, prompts: list[list[int]], *, max_tokens: int = NEW_TOKENS) -> list[Continuation]:
    config = SamplingConfig(temperature=0.0, max_tokens=max_tokens)
    return sample(loaded.definition, loaded.params, loaded.buffers, prompts, config=config, eos_id=None)


@pytest.fixture(scope="module")
def together(loaded: Loaded) -> list[Continuation]:
    return greedy(loaded, PROMPTS)


@pytest.fixture(scope="module")
def uncached_logprobs(loaded: Loaded) -> Logprobs:
    """Return a function that computes log-probabilities [T, V] of one sequence without a cache.

    The row of 128 tokens holds another document and padding too.
    """

    @jax.jit
    def compute(tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        output = loaded.model(tokens, segment_ids=segment_ids, positions=positions)
        return jax.nn.log_softmax(losses.logits(output.hidden, output.head)[..., :VOCAB], axis=-1)[0]

    def of(sequence: list[int]) -> np.ndarray:
        length = len(sequence)
        index = np.arange(128)[None]
        tokens = np.pad(sequence, (0, 128 - length))[None]
        segment_ids = np.where(index < length, 1, np.where(index < length + 10, 2, 0))
        positions = index - np.where(segment_ids == 2, length, 0)
        return np.asarray(compute(tokens, segment_ids, positions))[:length]

    return of


def test_a_sequence_does_not_depend_on_the_others(loaded: Loaded, together: list[Continuation]) -> None:
    # A cache of 32 slots; with the other sequences it has 128.
    [alone] = greedy(loaded, PROMPTS[:1], max_tokens=20)
    assert alone.tokens == together[0].tokens[:20]
    np.testing.assert_allclose(alone.logprobs, together[0].logprobs[:20], atol=1e-3)


def test_cached_logprobs_equal_those_without_a_cache(
    together: list[Continuation], uncached_logprobs: Logprobs
) -> None:
    for prompt, continued in zip(PROMPTS, together, strict=True):
        rows = uncached_logprobs([*prompt, *continued.tokens])[len(prompt) - 1 : -1]
        assert continued.tokens == np.argmax(rows, axis=-1).tolist()
        expected = np.take_along_axis(rows, np.array(continued.tokens)[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(continued.logprobs, expected, atol=1e-3)


def test_likelihoods_do_not_depend_on_padding(loaded: Loaded, uncached_logprobs: Logprobs) -> None:
    """A sequence of 35 tokens is padded to 64."""
    context = PROMPTS[1][:7]
    continuation = PROMPTS[1][7:36]
    rows = uncached_logprobs([*context, *continuation])[6:-1]
    [scored] = evaluation.log_likelihoods(loaded, [(context, continuation)], batch_size=1)
    np.testing.assert_allclose(scored.logprob, rows[np.arange(29), continuation].sum(), rtol=1e-4)
