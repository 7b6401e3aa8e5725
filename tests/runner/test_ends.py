"""Where a model's prompts begin and its turns end, as its tokenizer says."""

import dataclasses

import pytest

from slmjax.checkpoints.loading import Loaded
from slmjax.data.tokenizers import ByteTokenizer, Tokenizer
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.sampling import FinishReason, SamplingConfig, encode_prompts, generate
from tests.untrained import untrained


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    block = BlockConfig(mixer=AttentionConfig(num_heads=2), ffn=MlpConfig(hidden_dim=24))
    config = ModelConfig(
        embed_dim=16, stack=(LayerGroup(pattern=(block,)),), context_length=64, vocab_size=258
    )
    return untrained(config, tokenizer=ByteTokenizer().build(()), path=tmp_path_factory.mktemp("speaking"))


def test_a_turn_ends_at_any_end_of_the_tokenizer(speaking: Loaded) -> None:
    """Tokens that are text here: an end need not be special. What ends a turn is no part of its text."""
    config = SamplingConfig(temperature=1.5, max_tokens=30)
    free = generate(speaking, ["a"], config=config)[0]
    byte = speaking.tokenizer
    tokens = [byte.add_tokens([], special=True)._backend.id_to_token(id) for id in free.tokens[4:6]]
    ending = Tokenizer(
        byte.add_tokens([], special=True)._backend, bos=byte.bos, eos=byte.eos, ends=tokens[1:]
    )
    pieces: list[str] = []
    found = generate(
        dataclasses.replace(speaking, own_tokenizer=ending),
        ["a"],
        config=config,
        on_text=lambda _, text: pieces.append(text),
    )[0]
    count = free.tokens.index(ending.end_ids[1]) + 1
    assert found.tokens == free.tokens[:count] and found.reason is FinishReason.EOS
    assert found.text == byte.decode(free.tokens[: count - 1]) == "".join(pieces)
    # The name of a special token as a stop text is that token: decoded text does not show it.
    special = byte.add_tokens([tokens[1]], special=True)
    assert special.special_ids[tokens[1]] == ending.end_ids[1] and special.end_ids == (1,)
    stopped = generate(
        dataclasses.replace(speaking, own_tokenizer=special),
        ["a"],
        config=dataclasses.replace(config, stop=(tokens[1],)),
    )[0]
    assert stopped.tokens == found.tokens and stopped.reason is FinishReason.STOP


def test_a_prompt_has_no_bos_where_the_model_wants_none(speaking: Loaded) -> None:
    backend = speaking.tokenizer.add_tokens([], special=True)._backend
    without = dataclasses.replace(
        speaking, own_tokenizer=Tokenizer(backend, bos="<|bos|>", eos="<|eos|>", adds_bos=False)
    )
    assert encode_prompts(without, ["ab", "", [5]]) == [[99, 100], [0], [5]]
    assert encode_prompts(speaking, ["ab", "", [5]]) == [[0, 99, 100], [0], [5]]
