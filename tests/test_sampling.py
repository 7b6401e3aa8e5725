"""Sampling: decoding with a cache equals the full forward pass, and draws follow the distribution they should."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import losses, parameters, sampling, sharding
from slmjax.attention import AttentionConfig, QkNorm
from slmjax.checkpoint import Loaded
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.layers import MlpConfig
from slmjax.model import BlockConfig, Decoder, ModelConfig, NormPlacement, Segment, logits
from slmjax.moe import Balance, MoeConfig
from slmjax.parameters import Definition
from slmjax.sampling import SamplingConfig, filtered_logits, generate, next_tokens, sample

CONTEXT, VOCAB = 16, 13
BOS = 0
PROMPTS = [[BOS], [BOS, 5, 3, 8, 2, 11, 7], [BOS, 4, 4], [BOS, 9, 1, 12, 6]]
ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
MLP = MlpConfig(hidden_dim=24)


def model_config(*blocks: BlockConfig, **settings) -> ModelConfig:
    stack = (Segment(pattern=blocks, repeats=2),)
    return ModelConfig(embed_dim=16, stack=stack, context_length=CONTEXT, vocab_size=VOCAB, vocab_multiple=8, **settings)


def block(*, ffn=MLP, passes: int = 1, norm: NormPlacement = NormPlacement.PRE, **attention) -> BlockConfig:
    return BlockConfig(mixer=dataclasses.replace(ATTENTION, **attention), ffn=ffn, passes=passes, norm=norm)


# Partial rotation; no positions, a block run twice, experts; a ring of 4 slots, which the prompt of 7 tokens wraps round.
MIXED = model_config(
    block(rope_fraction=0.5, qk_norm=QkNorm.PER_HEAD),
    block(
        rope_base=None, softcap=20.0, passes=2, norm=NormPlacement.SANDWICH,
        ffn=MoeConfig(num_experts=4, hidden_dim=12, shared_hidden_dim=8, balance=Balance.BIAS),
    ),
    block(window=4, rope_base=500.0),
    logit_softcap=15.0, embed_multiplier=2.0, residual_multiplier=0.7,
)  # fmt: skip
SMALL = model_config(block(window=4))

Model = tuple[Definition, dict[str, jax.Array], dict[str, jax.Array]]


def build(config: ModelConfig) -> Model:
    """Weights are large, so that what a token sees changes its logits. Made by numpy: compiling the initialisation takes longer."""
    definition, draws = parameters.define(config), np.random.default_rng(3)

    def fill(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        normal = {path: 0.4 * draws.normal(size=leaf.shape) for path, leaf in shapes.items()}
        return {path: jnp.asarray(1 + x if path.endswith("scale") else x, jnp.float32) for path, x in normal.items()}

    return definition, fill(definition.params), fill(definition.buffers)


@pytest.fixture(scope="module")
def small() -> Model:
    """All tests sample from it four prompts at a time, in 16 tokens: one compilation for each kind of draw."""
    return build(SMALL)


def greedily(model: Model, prompts: list[list[int]], *, max_tokens: int = 8, eos_id: int | None = None) -> list[list[int]]:
    return sample(*model, prompts, config=SamplingConfig(temperature=0.0, max_tokens=max_tokens), eos_id=eos_id)


@jax.jit
def cached_logits(model: Decoder, tokens: jax.Array, prompt_lengths: jax.Array) -> jax.Array:
    """Logits at every position from a prefill of the prompts, then one token at a time, each row at its own position."""
    num_rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None, :], tokens.shape)
    segment_ids = (positions < prompt_lengths[:, None]).astype(jnp.int32)
    state = model.init_state(num_rows, max_length=length)
    prefilled = model(tokens, segment_ids=segment_ids, positions=positions, state=state)

    def step(carry, _):
        state, at, collected = carry
        real = at < length
        place = jnp.minimum(at, length - 1)[:, None]
        newest = jnp.take_along_axis(tokens, place, axis=1)
        output = model(newest, segment_ids=real[:, None].astype(jnp.int32), positions=place, state=state)
        row_logits = losses.logits(output.hidden, output.head)[:, 0]
        collected = collected.at[jnp.arange(num_rows), jnp.where(real, at, length)].set(row_logits, mode="drop")
        return (output.state, at + 1, collected), None

    first = losses.logits(prefilled.hidden, prefilled.head)
    (_, _, collected), _ = jax.lax.scan(step, (prefilled.state, prompt_lengths, first), length=length - 1)
    return collected[..., :VOCAB]


# Caches ---------------------------------------------------------------------------------------------------------------
@pytest.mark.smoke
def test_decode_equals_full_forward_at_every_position() -> None:
    definition, params, buffers = build(MIXED)
    model = definition.merge(params, buffers)
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, VOCAB)
    full_logits = jax.jit(logits)(model, tokens)
    assert float(jnp.std(full_logits)) > 0.3  # logits that differ: equal ones would pass whatever the cache holds
    cached = cached_logits(model, tokens, jnp.asarray([1, 7, 3, 5]))
    np.testing.assert_allclose(cached, full_logits, atol=1e-4, rtol=1e-4)


def test_greedy_is_the_argmax_of_the_full_forward(small: Model) -> None:
    model, forward = small[0].merge(small[1], small[2]), jax.jit(logits)
    for prompt, continued in zip(PROMPTS, greedily(small, PROMPTS), strict=True):
        sequence = list(prompt)
        for token in continued:
            padded = jnp.zeros((1, 16), jnp.int32).at[0, : len(sequence)].set(jnp.asarray(sequence))
            assert int(jnp.argmax(forward(model, padded)[0, len(sequence) - 1])) == token
            sequence.append(token)
        assert len(continued) == 8


def test_a_prompt_alone_gives_what_it_gives_in_a_batch(small: Model) -> None:
    together = greedily(small, PROMPTS)
    alone = [greedily(small, [prompt])[0] for prompt in PROMPTS]
    assert alone == together


def test_draws_do_not_depend_on_the_neighbours(small: Model) -> None:
    config = SamplingConfig(temperature=1.5, max_tokens=8, seed=5)
    draws = sample(*small, PROMPTS, config=config, eos_id=None)
    others = [[BOS, *prompt] for prompt in PROMPTS[:2]] + [PROMPTS[2]] + [[BOS, 1, 1, 1]]
    assert sample(*small, others, config=config, eos_id=None)[2] == draws[2]
    # An EOS that ends some prompts early leaves the others as they were.
    eos_id = draws[0][2]
    for stopped, whole in zip(sample(*small, PROMPTS, config=config, eos_id=eos_id), draws, strict=True):
        expected = whole[: whole.index(eos_id) + 1] if eos_id in whole else whole
        assert stopped == expected


def test_seeds_reproduce_and_differ(small: Model) -> None:
    def draw(seed: int) -> list[list[int]]:
        return sample(*small, [[BOS]] * 4, config=SamplingConfig(temperature=2.0, max_tokens=8, seed=seed), eos_id=None)

    first = draw(7)
    assert first == draw(7)
    assert first != draw(8)
    assert len({tuple(tokens) for tokens in first}) > 1  # equal prompts draw for themselves


def test_top_k_of_one_is_greedy(small: Model) -> None:
    config = SamplingConfig(temperature=3.0, top_k=1, max_tokens=8)
    assert sample(*small, PROMPTS, config=config, eos_id=None) == greedily(small, PROMPTS)


def test_sampling_on_a_mesh_equals_one_device(small: Model) -> None:
    definition, params, buffers = small
    config = SamplingConfig(temperature=1.0, max_tokens=8)
    expected = sample(definition, params, buffers, PROMPTS, config=config, eos_id=None)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    with jax.set_mesh(mesh):
        assert sample(definition, placed, buffers, PROMPTS, config=config, eos_id=None) == expected


def test_generate_goes_from_text_to_text(tmp_path: Path) -> None:
    definition, params, buffers = build(dataclasses.replace(SMALL, vocab_size=258))
    tokenizer = ByteTokenizer().build(())
    loaded = Loaded(
        config=definition.config, model=definition.merge(params, buffers), tokenizer=tokenizer, definition=definition, params=params,
        buffers=buffers, path=tmp_path, step=1,
    )  # fmt: skip
    config = SamplingConfig(temperature=1.0, max_tokens=8)
    prompts = ["", "naïve", "def"]
    expected_prompts = [(tokenizer.bos_id, *tokenizer.encode(prompt)) for prompt in prompts]
    expected = sample(definition, params, buffers, expected_prompts, config=config, eos_id=tokenizer.eos_id)
    found = generate(loaded, prompts, config=config)
    assert [one.prompt_tokens for one in found] == expected_prompts
    assert [list(one.tokens) for one in found] == expected
    assert [one.text for one in found] == [tokenizer.decode(tokens) for tokens in expected]
    assert [one.finished for one in found] == [tokens[-1] == tokenizer.eos_id for tokens in expected]
    assert generate(loaded, []) == []
    with pytest.raises(ValueError, match="give a list of texts"):
        generate(loaded, "def")


# Ends and limits ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def uniform(small: Model) -> Model:
    """All parameters zero: every token is as likely as any other."""
    definition, params, buffers = small
    return definition, jax.tree.map(jnp.zeros_like, params), buffers


def test_padding_rows_of_the_table_are_never_drawn(uniform: Model) -> None:
    drawn = sample(*uniform, [[BOS]] * 4, config=SamplingConfig(temperature=5.0, max_tokens=15), eos_id=None)
    assert {token for tokens in drawn for token in tokens} == set(range(VOCAB))


def test_eos_ends_a_continuation_and_is_kept(uniform: Model) -> None:
    assert greedily(uniform, PROMPTS, eos_id=0) == [[0]] * 4  # the first of equals is the token 0
    drawn = sample(*uniform, [[BOS]] * 4, config=SamplingConfig(max_tokens=15), eos_id=1)
    assert all(1 not in tokens[:-1] for tokens in drawn)
    assert {len(tokens) == 15 or tokens[-1] == 1 for tokens in drawn} == {True}
    assert len({len(tokens) for tokens in drawn}) > 2


def test_the_context_limit_is_exact_and_named(uniform: Model) -> None:
    prompts = [[BOS], [BOS] * 10, [BOS], [BOS]]
    assert [len(tokens) for tokens in greedily(uniform, prompts, max_tokens=6)] == [6] * 4
    with pytest.raises(ValueError, match=r"10 tokens .*max_tokens=7 .*context_length=16.*at most 6"):
        greedily(uniform, prompts, max_tokens=7)
    with pytest.raises(ValueError, match="16 tokens .*shorten it to 15"):
        sample(*uniform, [[BOS] * CONTEXT], eos_id=None)
    assert [len(tokens) for tokens in sample(*uniform, prompts, eos_id=None)] == [6] * 4  # unless told, as much as there is room for


def test_bad_prompts_are_refused(uniform: Model) -> None:
    assert sample(*uniform, [], eos_id=None) == []
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        sample(*uniform, [[BOS], []], eos_id=None)
    with pytest.raises(ValueError, match="prompt 0 has token ids from 0 to 13, and the vocabulary has 13"):
        sample(*uniform, [[BOS, VOCAB]], eos_id=None)


@pytest.mark.parametrize("bad", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}])
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingConfig(**bad)


def test_two_calls_of_one_shape_compile_once(small: Model) -> None:
    greedily(small, PROMPTS)
    before = sampling._continue._cache_size()
    greedily(small, [prompt + [3] for prompt in PROMPTS], max_tokens=5)
    # A definition that is made again, as by loading the model again, is no reason to compile again.
    greedily((parameters.define(small[0].config), small[1], small[2]), PROMPTS)
    assert sampling._continue._cache_size() == before


# Filters --------------------------------------------------------------------------------------------------------------
# Probabilities in powers of two, out of order: sums and comparisons are exact.
PROBABILITIES = [[0.125, 0.5, 0.0625, 0.25, 0.0625]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, PROBABILITIES[0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3, 0]),
        ({"top_k": 4}, [2 / 15, 8 / 15, 1 / 15, 4 / 15, 0]),  # of the equal ones the first stays
        ({"top_p": 0.75}, [0, 2 / 3, 0, 1 / 3, 0]),  # 0.5 + 0.25 reaches it
        ({"top_p": 0.76}, [1 / 7, 4 / 7, 0, 2 / 7, 0]),
        ({"top_p": 1e-6}, [0, 1, 0, 0, 0]),  # at least one
        ({"top_k": 3, "top_p": 0.6}, [0, 2 / 3, 0, 1 / 3, 0]),  # of [4, 2, 1] / 7: top-p alone would keep the same two
        ({"top_k": 3, "top_p": 0.857}, [0, 2 / 3, 0, 1 / 3, 0]),  # 6/7 reaches it: without top-k it would be three tokens
        ({"temperature": 0.5}, [4 / 90, 64 / 90, 1 / 90, 16 / 90, 1 / 90 + 4 / 90]),  # squares; see below
    ],
)
def test_filters_by_hand(settings: dict, expected: list[float]) -> None:
    if "temperature" in settings:
        squares = np.square(PROBABILITIES[0])
        expected = (squares / squares.sum()).tolist()
    kept = filtered_logits(jnp.log(jnp.asarray(PROBABILITIES)), **{"temperature": 1.0, **settings})
    np.testing.assert_allclose(jax.nn.softmax(kept)[0], expected, rtol=1e-5, atol=1e-7)


def test_temperature_comes_before_top_p() -> None:
    kept = filtered_logits(jnp.log(jnp.asarray(PROBABILITIES)), temperature=0.5, top_p=0.9)
    assert (jax.nn.softmax(kept)[0] > 0).tolist() == [False, True, False, True, False]  # 64 + 16 of 86 parts, 0.93
    warm = filtered_logits(jnp.log(jnp.asarray(PROBABILITIES)), temperature=1.0, top_p=0.9)
    assert (jax.nn.softmax(warm)[0] > 0).tolist() == [True, True, True, True, False]


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    rows = jnp.asarray([[1.0, 300.0, 299.0], [-5.0, -900.0, -5.1]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert next_tokens(rows, keys, temperature=1e-30, top_k=None, top_p=None).tolist() == [1, 0]


def test_draws_follow_the_filtered_distribution() -> None:
    num_draws, expected = 4000, np.asarray([1 / 7, 4 / 7, 2 / 7])
    rows = jnp.broadcast_to(jnp.log(jnp.asarray(PROBABILITIES)), (num_draws, 5))
    drawn = next_tokens(rows, jax.random.split(jax.random.key(0), num_draws), temperature=1.0, top_k=3, top_p=None)
    counts = np.bincount(np.asarray(drawn), minlength=5)
    assert counts[2] == counts[4] == 0
    chi_square = np.sum(np.square(counts[[0, 1, 3]] - num_draws * expected) / (num_draws * expected))
    assert chi_square < 13.8  # two degrees of freedom: exceeded by one seed in a thousand
