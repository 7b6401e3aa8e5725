"""The helper that asks llama.cpp: its answers fit together."""

from pathlib import Path

import numpy as np

from slmjax.convert.gguf.tokenizer import tokenizer_metadata
from slmjax.data.tokenizers import ByteTokenizer
from tests.convert.llama_cpp import generate, logprobs, write_tiny_llama


def test_what_is_likeliest_is_generated(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer().build([])
    tokenizer.save(tmp_path)
    path = tmp_path / "x.gguf"
    write_tiny_llama(path, tokenizer_metadata(tmp_path, adds_bos=True, num_rows=258))
    prompt = [0, *tokenizer.encode("The ")]
    ids, text = generate(path, "The ", 6)
    assert 0 < len(ids) <= 6
    assert (ids, text) == generate(path, prompt, 6)  # a text gets BOS
    rows = logprobs(path, [*prompt, *ids], vocab_size=258)
    assert rows.shape == (len(prompt) + len(ids), 258)
    np.testing.assert_allclose(np.exp(rows).sum(1), 1, rtol=1e-12)
    assert rows[len(prompt) - 1 : -1].argmax(1).tolist() == ids
    np.testing.assert_allclose(logprobs(path, [*prompt, *ids], vocab_size=258, first=3), rows[3:], atol=1e-6)
