"""Bits per byte: by hand on a model that knows nothing, and the same whatever the batch size, window or mesh."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import parameters, sharding
from slmjax.architecture import BlockConfig, ModelConfig, Segment
from slmjax.attention import AttentionConfig
from slmjax.config import to_json
from slmjax.data.config import DataConfig, Split
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.data.windows import evaluation_batches
from slmjax.evaluation import evaluate
from slmjax.evaluation.bits_per_byte import EvalResult, evaluate_batches, make_eval_step
from slmjax.layers import MlpConfig
from slmjax.loading import Loaded
from slmjax.model import logits
from tests.data.in_memory import BOS, EOS, InMemoryDocuments

VOCAB, LENGTH, OVERLAP = 258, 8, 3
Params = dict[str, jax.Array]


def model_config(window: int | None) -> ModelConfig:
    block = BlockConfig(mixer=AttentionConfig(num_heads=2, window=window), ffn=MlpConfig(hidden_dim=24))
    return ModelConfig(embed_dim=16, stack=(Segment(pattern=(block,), repeats=2),), context_length=32, vocab_size=VOCAB, vocab_multiple=8)


def random_params(definition: parameters.Definition) -> Params:
    draws = np.random.default_rng(0)
    return {path: jnp.asarray(0.4 * draws.normal(size=leaf.shape), jnp.float32) for path, leaf in definition.params.items()}


DEFINITION = parameters.define(model_config(window=None))
PARAMS = random_params(DEFINITION)
EVAL_STEP = make_eval_step(DEFINITION)


def documents() -> InMemoryDocuments:
    """Three documents of 4, 20 and 1 tokens of text, of 2 bytes each: 25 tokens and 3 times EOS are scored, 50 bytes counted."""
    draws = np.random.default_rng(1)
    texts = [draws.integers(2, VOCAB, size=size).tolist() for size in (4, 20, 1)]
    return InMemoryDocuments([[BOS, *text, EOS] for text in texts], num_bytes=[2 * len(text) for text in texts])


def measure(
    params: Params = PARAMS, eval_step=EVAL_STEP, *, batch_size: int = 4, length: int = LENGTH, overlap: int = OVERLAP, mesh=None
) -> EvalResult:
    batches = evaluation_batches([documents()], sequence_length=length, batch_size=batch_size, overlap=overlap)
    return evaluate_batches(eval_step, params, {}, batches, mesh=mesh)


@pytest.mark.smoke
def test_a_model_that_knows_nothing_by_hand() -> None:
    result = measure(jax.tree.map(jnp.zeros_like, PARAMS))
    assert result.loss == pytest.approx(math.log(258), rel=1e-6)
    assert result.perplexity == pytest.approx(258, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(258) * 28 / 50, rel=1e-6)
    assert (result.tokens, result.bytes, result.documents) == (28, 50, 3)
    assert (result.sequence_length, result.overlap) == (LENGTH, OVERLAP)


def test_every_token_is_scored_once_with_the_context_of_its_window() -> None:
    """Against the plain logits of each window, cut here by hand: 8 inputs, of which 3 are repeated."""
    expected, model = 0.0, jax.jit(lambda tokens: jax.nn.log_softmax(logits(DEFINITION.merge(PARAMS, {}), tokens)))
    for document in documents().documents:
        scored_to = 1
        for start in range(0, len(document), LENGTH - OVERLAP):
            window = document[start : start + LENGTH + 1]
            padded = np.zeros((1, LENGTH + 1), np.int32)
            padded[0, : len(window)] = window
            nll = -np.take_along_axis(np.asarray(model(padded[:, :LENGTH])), padded[:, 1:, None], axis=-1)[0, :, 0]
            expected += nll[scored_to - 1 - start : len(window) - 1].sum()
            scored_to = start + len(window)
    assert measure().loss * 28 == pytest.approx(expected, rel=1e-5)


def test_batch_size_changes_nothing() -> None:
    one, several = measure(batch_size=1), measure(batch_size=4)
    assert one.loss == pytest.approx(several.loss, rel=1e-6)
    assert one.bits_per_byte == pytest.approx(several.bits_per_byte, rel=1e-6)


def test_overlap_and_length_change_the_context_alone() -> None:
    assert measure(overlap=0).tokens == measure(overlap=7).tokens == 28
    assert abs(measure(overlap=0).loss - measure(overlap=7).loss) > 1e-3
    # Where a token sees only itself, context is of no use: the loss is the same for any windows.
    definition = parameters.define(model_config(window=1))
    step = make_eval_step(definition)
    losses = [measure(eval_step=step, length=length, overlap=overlap).loss for length, overlap in ((8, 0), (8, 7), (24, 5))]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_a_mesh_equals_one_device() -> None:
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(PARAMS, sharding.parameter_shardings(PARAMS, mesh))
    assert measure(placed, mesh=mesh).loss == pytest.approx(measure().loss, rel=1e-6)


# The public function --------------------------------------------------------------------------------------------------
@pytest.fixture
def uniform_run(tmp_path: Path) -> Loaded:
    """A run directory, as far as evaluation reads it, of a byte-level model that knows nothing."""
    (tmp_path / "corpus.txt").write_text("naïve text, longer than one window\n" * 30, encoding="utf-8")
    run = tmp_path / "run"
    tokenizer = ByteTokenizer().build(())
    tokenizer.save(run / "tokenizer")
    data = DataConfig(path=str(tmp_path / "corpus.txt"), split=Split.TAIL, heldout_fraction=0.1, sequence_length=LENGTH, batch_size=4)
    (run / "config.json").write_text(json.dumps({"data": to_json(data), "eval": {"overlap": OVERLAP}}))
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    return Loaded(
        config=DEFINITION.config, model=DEFINITION.merge(params, {}), own_tokenizer=tokenizer, definition=DEFINITION, params=params,
        buffers={}, path=run, step=1,
    )  # fmt: skip


def test_evaluate_reads_the_run(uniform_run: Loaded) -> None:
    result = evaluate(uniform_run, log=lambda line: None)
    num_bytes = 3 * 36  # three of thirty lines; "ï" has two bytes
    assert (result.tokens, result.bytes, result.documents) == (num_bytes + 1, num_bytes, 1)
    assert result.bits_per_byte == pytest.approx(math.log2(258) * (num_bytes + 1) / num_bytes, rel=1e-6)
    assert (result.sequence_length, result.overlap) == (LENGTH, OVERLAP)


def test_evaluate_on_other_text(uniform_run: Loaded, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / name).write_text("word " * 10)
    data = DataConfig(path=str(tmp_path / "other"), heldout_fraction=0.0, sequence_length=1000, batch_size=4)
    result = evaluate(uniform_run, data=data, max_documents=1, overlap=5, batch_size=2, log=lambda line: None)
    assert (result.tokens, result.bytes, result.documents) == (51, 50, 1)
    assert (result.sequence_length, result.overlap) == (32, 5)  # no longer than the model's context
    (uniform_run.path / "config.json").write_text(json.dumps({"data": to_json(data)}))
    with pytest.raises(ValueError, match="held nothing out"):
        evaluate(uniform_run)
    (uniform_run.path / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json"):
        evaluate(uniform_run)
