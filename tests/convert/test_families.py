"""Every family against transformers: logits of whole sequences and of cached decoding.

The values of transformers are golden files, made by `python -m tests.convert.make_golden`.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slmjax
from slmjax import losses
from slmjax.convert.families import HF_FAMILIES
from slmjax.convert.import_export import import_model
from tests.convert.cases import CASES
from tests.convert.synthetic import VOCAB_SIZE, tokens, write_model

GOLDEN = Path(__file__).parent / "golden"


def read_golden(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{case}.json").read_text())


# Exported without the vision tower.
OTHER_NAMES = {
    "gemma3_vision": "Gemma3ForCausalLM",
    "qwen3_5_vision": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_vision": "Qwen3_5MoeForCausalLM",
}


# Variants of other cases: each is compiled twice, which takes too long in every run.
NIGHTLY = ("mamba2_tied", "falcon_h1_normed", "qwen3_5_moe", "qwen3_5_vision", "qwen3_5_moe_vision")
MARKED_CASES = [pytest.param(case, marks=pytest.mark.nightly) if case in NIGHTLY else case for case in CASES]


def decoded_logits(loaded: slmjax.Loaded, ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of tokens that are fed one at a time."""
    model = loaded.model

    @jax.jit
    def step(
        params: Any, buffers: Any, token: jax.Array, position: jax.Array, state: Any
    ) -> tuple[jax.Array, Any]:
        rows = {
            "segment_ids": jnp.ones_like(token),
            "positions": position,
            "max_lengths": jnp.array([ids.shape[1]]),
        }
        output = loaded.definition.merge(params, buffers)(token, **rows, state=state)
        return losses.logits(output.hidden, output.head)[0], output.state

    rows = []
    state = model.init_state(1, max_length=ids.shape[1])
    for place in (slice(i, i + 1) for i in range(ids.shape[1])):
        row, state = step(
            loaded.params, loaded.buffers, ids[:, place], np.arange(ids.shape[1])[None, place], state
        )
        rows.append(row[:, : loaded.config.known_vocab_size])
    return np.concatenate(rows)


@pytest.mark.parametrize("case", MARKED_CASES)
def test_logits_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    golden = read_golden(case)
    write_model(tmp_path / "theirs", golden["config"], golden["shapes"])
    import_model(tmp_path / "theirs", tmp_path / "ours")
    loaded = slmjax.load_model(tmp_path / "ours")
    expected = np.array(golden["logits"])
    ids = tokens(VOCAB_SIZE).astype(np.int32)
    assert np.std(expected) > 0.3, "logits that hardly differ would hide what is wrong"
    np.testing.assert_allclose(jax.jit(slmjax.logits)(loaded.model, ids)[0], expected, atol=2e-4)
    np.testing.assert_allclose(decoded_logits(loaded, ids), expected, atol=2e-4)


def tiny_tokenizer(directory: Path) -> Path:
    """A vocabulary of characters that is smaller than the model's."""
    from slmjax.data.tokenizers import CharTokenizer

    CharTokenizer().build(["abcdefghij"]).save(directory / "characters")
    return directory / "characters"


def test_every_family_has_a_case() -> None:
    covered = {read_golden(case)["config"]["architectures"][0] for case in CASES}
    mobile = {"MobileLLMForCausalLM"}  # a Llama by another name, which transformers does not know
    assert {family.architecture for family in HF_FAMILIES} - mobile <= covered
