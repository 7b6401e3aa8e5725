"""Sampling: decoding with a cache equals the full forward pass, and draws follow the distribution they
should.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax import losses
from slmjax.checkpoints.loading import Loaded
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig, NormPlacement
from slmjax.models.decoder import Decoder, logits
from slmjax.models.definition import Definition, define, define_for_inference
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import Balance, MoeConfig
from slmjax.models.mixers.attention import AttentionConfig, QkNorm
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import parameter_shardings
from slmjax.sampling import FinishReason, SamplingConfig, decoding, generate, penalised
from slmjax.sampling import sample as continuations

CONTEXT = 16
VOCAB = 13
BOS = 0
PROMPTS = [[BOS], [BOS, 5, 3, 8, 2, 11, 7], [BOS, 4, 4], [BOS, 9, 1, 12, 6]]
ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
MLP = MlpConfig(hidden_dim=24)


def model_config(*blocks: BlockConfig, **settings) -> ModelConfig:
    stack = (LayerGroup(pattern=blocks, repeats=2),)
    return ModelConfig(
        embed_dim=16, stack=stack, context_length=CONTEXT, vocab_size=VOCAB, vocab_multiple=8, **settings
    )


def block(
    *, ffn=MLP, num_loops: int = 1, norm: NormPlacement = NormPlacement.PRE, **attention
) -> BlockConfig:
    return BlockConfig(
        mixer=dataclasses.replace(ATTENTION, **attention), ffn=ffn, num_loops=num_loops, norm=norm
    )


# Partial rotation; no positions, a block run twice, experts; a ring of 4 slots, which the prompt of 7 tokens
# wraps round.
MIXED = model_config(
    block(rotary_dim=4, qk_norm=QkNorm.PER_HEAD),
    block(
        rope_base=None,
        softcap=20.0,
        num_loops=2,
        norm=NormPlacement.SANDWICH,
        ffn=MoeConfig(num_experts=4, hidden_dim=12, shared_hidden_dim=8, balance=Balance.BIAS),
    ),
    block(window=4, rope_base=500.0),
    logit_softcap=15.0,
    embed_multiplier=2.0,
    residual_multiplier=0.7,
)
SMALL = model_config(block(window=4))

Model = tuple[Definition, dict[str, jax.Array], dict[str, jax.Array]]


def build(config: ModelConfig) -> Model:
    """Weights are large, so that what a token sees changes its logits. Made by numpy: compiling the
    initialisation takes longer.
    """
    definition = define(config)
    draws = np.random.default_rng(3)

    def fill(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        normal = {path: 0.4 * draws.normal(size=leaf.shape) for path, leaf in shapes.items()}
        return {
            path: jnp.asarray(1 + x if path.endswith("scale") else x, jnp.float32)
            for path, x in normal.items()
        }

    return definition, fill(definition.params), fill(definition.buffers)


@pytest.fixture(scope="module")
def small() -> Model:
    """All tests sample from it four prompts at a time, in 16 tokens: one compilation for each kind of
    draw.
    """
    return build(SMALL)


def sample(*arguments, **settings) -> list[list[int]]:
    return [item.tokens for item in continuations(*arguments, **settings)]


def greedily(
    model: Model, prompts: list[list[int]], *, max_tokens: int = 8, eos_id: int | None = None
) -> list[list[int]]:
    return sample(
        *model, prompts, config=SamplingConfig(temperature=0.0, max_tokens=max_tokens), eos_id=eos_id
    )


@jax.jit
def cached_logits(model: Decoder, tokens: jax.Array, prompt_lengths: jax.Array) -> jax.Array:
    """Logits at every position from a prefill of the prompts, then one token at a time, each row at its own
    position.
    """
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
        collected = collected.at[jnp.arange(num_rows), jnp.where(real, at, length)].set(
            row_logits, mode="drop"
        )
        return (output.state, at + 1, collected), None

    first = losses.logits(prefilled.hidden, prefilled.head)
    (_, _, collected), _ = jax.lax.scan(step, (prefilled.state, prompt_lengths, first), length=length - 1)
    return collected[..., :VOCAB]


# Caches -----------------------------------------------------------------------------------------------------
@pytest.mark.smoke
def test_decode_equals_full_forward_at_every_position() -> None:
    definition, params, buffers = build(MIXED)
    model = definition.merge(params, buffers)
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, VOCAB)
    full_logits = jax.jit(logits)(model, tokens)
    assert (
        float(jnp.std(full_logits)) > 0.3
    )  # logits that differ: equal ones would pass whatever the cache holds
    cached = cached_logits(model, tokens, jnp.asarray([1, 7, 3, 5]))
    np.testing.assert_allclose(cached, full_logits, atol=1e-4, rtol=1e-4)


def test_experts_with_a_capacity_drop_nothing_when_asked() -> None:
    """What `sample` runs, layers taken apart, on all there is: greedy tokens are those of the full forward,
    alone as together.
    """
    narrow = [
        dataclasses.replace(item, ffn=dataclasses.replace(item.ffn, capacity_factor=0.3))
        if isinstance(item.ffn, MoeConfig)
        else item
        for item in MIXED.stack[0].pattern
    ]
    trained = dataclasses.replace(MIXED, stack=(LayerGroup(pattern=tuple(narrow), repeats=2),))
    definition, params, buffers = build(trained)
    inference = define_for_inference(trained)
    assert inference.params == definition.params and inference.config == MIXED
    together = greedily((inference, params, buffers), PROMPTS, max_tokens=4)
    assert greedily((inference, params, buffers), PROMPTS[1:2], max_tokens=4) == together[1:2]
    sequences = np.zeros((len(PROMPTS), 12), np.int32)
    for row, prompt, continued in zip(sequences, PROMPTS, together, strict=True):
        row[: len(prompt) + 4] = [*prompt, *continued]
    likeliest = np.argmax(jax.jit(logits)(inference.merge(params, buffers), jnp.asarray(sequences)), axis=-1)
    for row, prompt, continued in zip(likeliest, PROMPTS, together, strict=True):
        assert row[len(prompt) - 1 : len(prompt) + 3].tolist() == continued
    dropping = jax.jit(logits)(definition.merge(params, buffers), jnp.asarray(sequences))
    assert np.any(np.argmax(dropping, axis=-1) != likeliest), "this capacity would not have been felt"


def test_greedy_is_the_argmax_of_the_full_forward(small: Model) -> None:
    model = small[0].merge(small[1], small[2])
    forward = jax.jit(logits)
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
    # The third prompt's seed is 5 + 2: alone, with that seed, it gives the same, in a batch of any size.
    alone = sample(*small, [PROMPTS[2]], config=dataclasses.replace(config, seed=7), eos_id=None)
    assert alone == [draws[2]] == sample(*small, [PROMPTS[2]], config=config, seeds=[7], eos_id=None)
    # An EOS that ends some prompts early leaves the others as they were.
    eos_id = draws[0][2]
    for stopped, whole in zip(sample(*small, PROMPTS, config=config, eos_id=eos_id), draws, strict=True):
        expected = whole[: whole.index(eos_id) + 1] if eos_id in whole else whole
        assert stopped == expected


def test_seeds_reproduce_and_differ(small: Model) -> None:
    def draw(seed: int) -> list[list[int]]:
        return sample(
            *small, [[BOS]] * 4, config=SamplingConfig(temperature=2.0, max_tokens=8, seed=seed), eos_id=None
        )

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
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, parameter_shardings(params, mesh))
    with jax.set_mesh(mesh):
        assert sample(definition, placed, buffers, PROMPTS, config=config, eos_id=None) == expected


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A model of bytes: its output is not text, and most characters are incomplete."""
    definition, params, buffers = build(dataclasses.replace(SMALL, vocab_size=258, context_length=64))
    return Loaded(
        config=definition.config,
        model=definition.merge(params, buffers),
        own_tokenizer=ByteTokenizer().build(()),
        definition=definition,
        params=params,
        buffers=buffers,
        path=tmp_path_factory.mktemp("speaking"),
        step=1,
    )


def test_streamed_pieces_make_up_the_text(speaking: Loaded) -> None:
    pieces: dict[int, list[str]] = {0: [], 1: []}
    config = SamplingConfig(temperature=1.5, max_tokens=30)
    result = generate(
        speaking, ["a", "b"], config=config, on_text=lambda index, text: pieces[index].append(text)
    )
    assert result == generate(speaking, ["a", "b"], config=config)
    for index, item in enumerate(result):
        assert "".join(pieces[index]) == item.text and len(pieces[index]) > 3


def test_a_stop_text_ends_a_continuation_and_is_left_out(speaking: Loaded) -> None:
    config = SamplingConfig(temperature=1.5, max_tokens=30)
    whole = generate(speaking, ["a", "b"], config=config)[0].text
    stop = whole[1:3]  # no U+FFFD: what may still become a character stops nothing
    pieces: list[str] = []
    stopping = dataclasses.replace(config, stop=("never generated", stop))
    result = generate(speaking, ["a"], config=stopping, on_text=lambda _, text: pieces.append(text))[0]
    assert result.text == whole[: whole.index(stop)] == "".join(pieces)
    assert (
        result.reason is FinishReason.STOP
        and len(result.tokens) < 30
        and len(result.logprobs) == len(result.tokens)
    )
    assert stop in speaking.tokenizer.decode(result.tokens) and stop not in speaking.tokenizer.decode(
        result.tokens[:-1]
    )


def test_generate_goes_from_text_to_text(tmp_path: Path) -> None:
    definition, params, buffers = build(dataclasses.replace(SMALL, vocab_size=258))
    tokenizer = ByteTokenizer().build(())
    loaded = Loaded(
        config=definition.config,
        model=definition.merge(params, buffers),
        own_tokenizer=tokenizer,
        definition=definition,
        params=params,
        buffers=buffers,
        path=tmp_path,
        step=1,
    )
    config = SamplingConfig(temperature=1.0, max_tokens=8)
    prompts = ["", "naïve", "def"]
    expected_prompts = [(tokenizer.bos_id, *tokenizer.encode(prompt)) for prompt in prompts]
    expected = sample(definition, params, buffers, expected_prompts, config=config, eos_id=tokenizer.eos_id)
    result = generate(loaded, prompts, config=config)
    assert [item.prompt_tokens for item in result] == expected_prompts
    assert [list(item.tokens) for item in result] == expected
    assert [item.text for item in result] == [tokenizer.decode(tokens) for tokens in expected]
    assert [item.reason is FinishReason.EOS for item in result] == [
        tokens[-1] == tokenizer.eos_id for tokens in expected
    ]
    assert [item.seed for item in result] == [0, 1, 2] and all(
        len(item.logprobs) == len(item.tokens) for item in result
    )
    assert generate(loaded, []) == []
    assert (
        generate(loaded, [expected_prompts[0], "naïve", list(expected_prompts[2])], config=config) == result
    )
    with pytest.raises(ValueError, match="give a list of texts"):
        generate(loaded, "def")


# Probabilities, seeds, penalties ----------------------------------------------------------------------------
def test_logprobs_are_those_of_the_full_forward(small: Model) -> None:
    """Whatever is drawn from: here a distribution that a penalty, a temperature and two filters have
    changed.
    """
    config = SamplingConfig(temperature=1.7, top_k=9, min_p=0.01, repetition_penalty=1.3, max_tokens=8)
    model = small[0].merge(small[1], small[2])
    for prompt, result in zip(
        PROMPTS, continuations(*small, PROMPTS, config=config, eos_id=None), strict=True
    ):
        sequence = (
            jnp.zeros((1, 16), jnp.int32).at[0, : len(prompt) + 8].set(jnp.asarray([*prompt, *result.tokens]))
        )
        chances = jax.nn.log_softmax(jax.jit(logits)(model, sequence))[0, len(prompt) - 1 : len(prompt) + 7]
        np.testing.assert_allclose(
            result.logprobs, chances[jnp.arange(8), jnp.asarray(result.tokens)], atol=2e-4
        )


def test_what_a_penalty_counts_is_the_prompt_and_what_came(small: Model) -> None:
    """Greedy, each token is the argmax of the full forward's logits after the penalty of all before it."""
    model = small[0].merge(small[1], small[2])
    config = SamplingConfig(temperature=0.0, repetition_penalty=3.0, max_tokens=8)
    result = sample(*small, PROMPTS, config=config, eos_id=None)
    assert result != greedily(small, PROMPTS)
    for prompt, continued in zip(PROMPTS, result, strict=True):
        sequence = (
            jnp.zeros((1, 16), jnp.int32).at[0, : len(prompt) + 8].set(jnp.asarray([*prompt, *continued]))
        )
        rows = jax.jit(logits)(model, sequence)[0]
        for index, token in enumerate(continued):
            before = [*prompt, *continued[:index]]
            seen = jnp.zeros((1, VOCAB), bool).at[0, jnp.asarray(before)].set(True)
            assert int(jnp.argmax(penalised(rows[None, len(before) - 1], seen, penalty=3.0))) == token


def test_seeds_are_checked(small: Model) -> None:
    with pytest.raises(ValueError, match="2 seeds for 4 prompts"):
        sample(*small, PROMPTS, seeds=[1, 2], eos_id=None)
    with pytest.raises(ValueError, match="got -3"):
        sample(*small, PROMPTS, seeds=[1, 2, -3, 4], eos_id=None)


def test_a_watcher_ends_a_prompt_and_no_other(small: Model) -> None:
    free = greedily(small, PROMPTS)
    config = SamplingConfig(temperature=0.0, max_tokens=8)
    watched = sample(
        *small,
        PROMPTS,
        config=config,
        eos_id=None,
        steps_per_call=2,
        watch=lambda i, tokens: i == 1 and len(tokens) >= 3,
    )
    assert (
        watched[0] == free[0]
        and watched[2:] == free[2:]
        and watched[1] == free[1][: len(watched[1])]
        and 3 <= len(watched[1]) <= 4
    )


def test_a_long_prompt_is_taken_in_parts(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[BOS, 5, 3, 8, 2, 11, 7, 1, 1, 2, 6], [BOS, 4, 4]]
    whole = greedily(small, prompts, max_tokens=5)
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 4)
    decoding._prefill.clear_cache()
    assert greedily(small, prompts, max_tokens=5) == whole


def test_a_window_layer_keeps_a_window() -> None:
    """Bytes of the decoding state, of a context of 4096 tokens: a ring of 4 slots next to a full cache."""
    config = model_config(block(window=4), block())
    definition = define(dataclasses.replace(config, context_length=4096))
    model = jax.eval_shape(lambda: Decoder(definition.config, rngs=nnx.Rngs(params=jax.random.key(0))))
    state = jax.eval_shape(lambda: model.init_state(1, max_length=4096))
    sizes = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(item)) for item in state[0]]
    keys_and_values = 2 * 2 * 8 * 4
    marks = 2 * 4  # 2 heads of 8 dims in float32; position and segment
    assert sizes == [2 * 4 * (keys_and_values + marks), 2 * 4096 * (keys_and_values + marks)]


# Ends and limits --------------------------------------------------------------------------------------------
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
    config = SamplingConfig(max_tokens=15)
    free = sample(*uniform, [[BOS]] * 4, config=config, eos_id=None)
    firsts = [next((i for i, token in enumerate(tokens) if token in (1, 5, 7)), 14) + 1 for tokens in free]
    ended = sample(*uniform, [[BOS]] * 4, config=config, eos_id=(1, 5, 7))
    assert ended == [tokens[:first] for tokens, first in zip(free, firsts, strict=True)] and min(firsts) < 14


def test_the_context_limit_is_exact_and_named(uniform: Model) -> None:
    prompts = [[BOS], [BOS] * 10, [BOS], [BOS]]
    assert [len(tokens) for tokens in greedily(uniform, prompts, max_tokens=6)] == [6] * 4
    with pytest.raises(ValueError, match=r"10 tokens .*max_tokens=7 .*context_length=16.*at most 6"):
        greedily(uniform, prompts, max_tokens=7)
    with pytest.raises(ValueError, match="16 tokens .*shorten it to 15"):
        sample(*uniform, [[BOS] * CONTEXT], eos_id=None)
    # By default, as much as fits the context after each: what one prompt gives does not depend on the
    # others.
    assert [len(tokens) for tokens in sample(*uniform, prompts, eos_id=None)] == [15, 6, 15, 15]


def test_bad_prompts_are_refused(uniform: Model) -> None:
    assert sample(*uniform, [], eos_id=None) == []
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        sample(*uniform, [[BOS], []], eos_id=None)
    with pytest.raises(ValueError, match="prompt 0 has token ids from 0 to 13, and the vocabulary has 13"):
        sample(*uniform, [[BOS, VOCAB]], eos_id=None)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"min_p": 0.0},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"stop": ("a", "")},
    ],
)
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingConfig(**bad)


def test_two_calls_of_one_shape_compile_once(small: Model) -> None:
    greedily(small, PROMPTS)
    before = decoding._continue._cache_size()
    greedily(small, [prompt + [3] for prompt in PROMPTS], max_tokens=5)
    # A definition that is made again, as by loading the model again, is no reason to compile again.
    greedily((define(small[0].config), small[1], small[2]), PROMPTS)
    assert decoding._continue._cache_size() == before
