"""Bits per byte: by hand on a model that knows nothing, and the same whatever the batch size, window or
mesh.
"""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.checkpoints.loading import Loaded
from slmjax.config import to_json
from slmjax.convert.verify.loss_check import text_windows
from slmjax.data.config import DataConfig, Split
from slmjax.data.scored import ScoredText
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.data.windows import evaluation_batches
from slmjax.evaluation import evaluate
from slmjax.evaluation.bits_per_byte import (
    EvalResult,
    documents_of,
    evaluate_batches,
    make_eval_step,
    scored_text,
)
from slmjax.losses import TeacherOutput
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.decoder import logits
from slmjax.models.definition import Definition, define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import parameter_shardings
from slmjax.runner.setup import set_up
from slmjax.training.experiment import EvalConfig, Experiment
from tests.data.in_memory import BOS, EOS, InMemoryDocuments

VOCAB = 258
LENGTH = 8
OVERLAP = 3
Params = dict[str, jax.Array]


def model_config(window: int | None) -> ModelConfig:
    block = BlockConfig(mixer=AttentionConfig(num_heads=2, window=window), ffn=MlpConfig(hidden_dim=24))
    return ModelConfig(
        embed_dim=16,
        stack=(LayerGroup(pattern=(block,), repeats=2),),
        context_length=32,
        vocab_size=VOCAB,
        vocab_multiple=8,
    )


def random_params(definition: Definition) -> Params:
    draws = np.random.default_rng(0)
    return {
        path: jnp.asarray(0.4 * draws.normal(size=leaf.shape), jnp.float32)
        for path, leaf in definition.params.items()
    }


DEFINITION = define(model_config(window=None))
PARAMS = random_params(DEFINITION)
EVAL_STEP = make_eval_step(DEFINITION)


def documents() -> InMemoryDocuments:
    """Three documents of 4, 20 and 1 tokens of text, of 2 bytes each: 25 tokens and 3 times EOS are scored,
    50 bytes counted.
    """
    draws = np.random.default_rng(1)
    texts = [draws.integers(2, VOCAB, size=size).tolist() for size in (4, 20, 1)]
    return InMemoryDocuments(
        [[BOS, *text, EOS] for text in texts], num_bytes=[2 * len(text) for text in texts]
    )


def measure(
    params: Params = PARAMS,
    eval_step=EVAL_STEP,
    *,
    batch_size: int = 4,
    length: int = LENGTH,
    overlap: int = OVERLAP,
    mesh=None,
) -> EvalResult:
    batches = evaluation_batches(
        [documents()], sequence_length=length, batch_size=batch_size, overlap=overlap
    )
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
    expected = 0.0
    model = jax.jit(lambda tokens: jax.nn.log_softmax(logits(DEFINITION.merge(PARAMS, {}), tokens)))
    for document in documents().documents:
        scored_to = 1
        for start in range(0, len(document), LENGTH - OVERLAP):
            window = document[start : start + LENGTH + 1]
            padded = np.zeros((1, LENGTH + 1), np.int32)
            padded[0, : len(window)] = window
            nll = -np.take_along_axis(np.asarray(model(padded[:, :LENGTH])), padded[:, 1:, None], axis=-1)[
                0, :, 0
            ]
            expected += nll[scored_to - 1 - start : len(window) - 1].sum()
            scored_to = start + len(window)
    assert measure().loss * 28 == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_each_document_is_that_of_the_document_alone() -> None:
    result = measure(batch_size=2)
    sums = result.document_sums
    assert sums is not None and sums.num_documents == 3
    assert sums.tokens.tolist() == [5, 21, 2] and sums.bytes.tolist() == [8, 40, 2]
    assert sums.nats.sum() == pytest.approx(result.loss * result.tokens, rel=1e-6)
    for number, document in enumerate(documents().documents):
        alone = InMemoryDocuments([document], num_bytes=[int(sums.bytes[number])])
        batches = evaluation_batches([alone], sequence_length=LENGTH, batch_size=2, overlap=OVERLAP)
        expected = evaluate_batches(EVAL_STEP, PARAMS, {}, batches)
        assert sums.nats[number] == pytest.approx(expected.loss * expected.tokens, rel=1e-5)


def test_documents_of_several_sources_are_in_groups_in_turn() -> None:
    batches = evaluation_batches(
        [documents(), documents()], sequence_length=LENGTH, batch_size=2, overlap=OVERLAP
    )
    tokens, num_bytes = batches.group_counts(4)
    assert tokens.tolist() == [5 + 21, 21 + 2, 2, 5] and num_bytes.tolist() == [8 + 40, 40 + 2, 2, 8]
    scored = np.zeros(4)
    for batch in batches:
        np.add.at(scored, batches.groups_of(batch, num_groups=4), batch.loss_mask)
    assert scored.tolist() == tokens.tolist()


def test_batch_size_changes_nothing() -> None:
    one = measure(batch_size=1)
    several = measure(batch_size=4)
    assert one.loss == pytest.approx(several.loss, rel=1e-6)
    assert one.bits_per_byte == pytest.approx(several.bits_per_byte, rel=1e-6)


def test_overlap_and_length_change_the_context_alone() -> None:
    assert measure(overlap=0).tokens == measure(overlap=7).tokens == 28
    assert abs(measure(overlap=0).loss - measure(overlap=7).loss) > 1e-3
    # Where a token sees only itself, context is of no use: the loss is the same for any windows.
    definition = define(model_config(window=1))
    step = make_eval_step(definition)
    losses = [
        measure(eval_step=step, length=length, overlap=overlap).loss
        for length, overlap in ((8, 0), (8, 7), (24, 5))
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_a_mesh_equals_one_device() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(PARAMS, parameter_shardings(PARAMS, mesh))
    assert measure(placed, mesh=mesh).loss == pytest.approx(measure().loss, rel=1e-6)


# The public function ----------------------------------------------------------------------------------------
@pytest.fixture
def uniform_run(tmp_path: Path) -> Loaded:
    """A run directory, as far as evaluation reads it, of a byte-level model that knows nothing."""
    (tmp_path / "corpus.txt").write_text("naïve text, longer than one window\n" * 30, encoding="utf-8")
    run = tmp_path / "run"
    tokenizer = ByteTokenizer().build(())
    tokenizer.save(run / "tokenizer")
    data = DataConfig(
        path=str(tmp_path / "corpus.txt"),
        split=Split.TAIL,
        heldout_fraction=0.1,
        sequence_length=LENGTH,
        batch_size=4,
    )
    (run / "config.json").write_text(json.dumps({"data": to_json(data), "eval": {"overlap": OVERLAP}}))
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    return Loaded(
        config=DEFINITION.config,
        model=DEFINITION.merge(params, {}),
        own_tokenizer=tokenizer,
        definition=DEFINITION,
        params=params,
        buffers={},
        path=run,
        step=1,
    )


def test_evaluate_reads_the_run(uniform_run: Loaded) -> None:
    result = evaluate(uniform_run)
    num_bytes = 3 * 36  # three of thirty lines; "ï" has two bytes
    assert (result.tokens, result.bytes, result.documents) == (num_bytes + 1, num_bytes, 1)
    assert result.bits_per_byte == pytest.approx(math.log2(258) * (num_bytes + 1) / num_bytes, rel=1e-6)
    assert (result.sequence_length, result.overlap) == (LENGTH, OVERLAP)


def test_evaluate_on_other_text(uniform_run: Loaded, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / name).write_text("word " * 10)
    data = DataConfig(path=str(tmp_path / "other"), heldout_fraction=0.0, sequence_length=1000, batch_size=4)
    result = evaluate(uniform_run, data=data, max_documents=1, overlap=5, batch_size=2)
    assert (result.tokens, result.bytes, result.documents) == (51, 50, 1)
    assert (result.sequence_length, result.overlap) == (32, 5)  # no longer than the model's context
    (uniform_run.path / "config.json").write_text(json.dumps({"data": to_json(data)}))
    with pytest.raises(ValueError, match="held nothing out"):
        evaluate(uniform_run)
    (uniform_run.path / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json"):
        evaluate(uniform_run)


# Pairs of prompt and completion -----------------------------------------------------------------------------
def pairs_in(directory: Path) -> tuple[DataConfig, list[str]]:
    """200 records: a prompt of 40 random letters, the completion "yes"."""
    draws = np.random.default_rng(5)
    prompts = ["".join(chr(97 + i) for i in draws.integers(0, 26, 40)) for _ in range(200)]
    path = directory / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": "yes"}) + "\n" for prompt in prompts))
    data = DataConfig(
        path=str(path),
        prompt_field="prompt",
        completion_field="completion",
        heldout_fraction=0.0,
        sequence_length=64,
        batch_size=8,
    )
    return data, prompts


@pytest.fixture
def random_run(uniform_run: Loaded) -> Loaded:
    """A model with random weights and a context of 64."""
    definition = define(dataclasses.replace(DEFINITION.config, context_length=64))
    return dataclasses.replace(
        uniform_run,
        config=definition.config,
        definition=definition,
        params=PARAMS,
        model=definition.merge(PARAMS, {}),
    )


def nll_by_place(run: Loaded, prompts: list[str]) -> np.ndarray:
    """[200 44]: minus the log-probability of each token but BOS, from the plain logits of each document by
    itself.
    """
    tokens = np.array(
        [
            [run.tokenizer.bos_id, *run.tokenizer.encode(f"{prompt}yes"), run.tokenizer.eos_id]
            for prompt in prompts
        ]
    )
    values = np.asarray(jax.jit(logits)(run.model, jnp.asarray(tokens[:, :-1], jnp.int32)), np.float64)
    normalisers = np.log(np.exp(values).sum(axis=-1))
    return normalisers - np.take_along_axis(values, tokens[:, 1:, None], axis=-1)[:, :, 0]


def test_evaluation_scores_the_completions_as_training_does(random_run: Loaded, tmp_path: Path) -> None:
    data, prompts = pairs_in(tmp_path)
    nll = nll_by_place(random_run, prompts)
    found = evaluate(random_run, data=data)
    assert found.loss == pytest.approx(nll[:, 40:].mean(), rel=1e-5)  # y, e, s and EOS
    assert found.bits_per_byte == pytest.approx(nll[:, 40:].sum() / math.log(2) / (200 * 3), rel=1e-5)
    assert (found.tokens, found.total_tokens, found.bytes, found.is_all) == (
        200 * 4,
        200 * 44,
        200 * 3,
        False,
    )
    assert found.text().endswith("on 800 of 8,800 tokens, the completions")
    assert found.measured_on("held-out text") == "the completions of held-out text"
    everything = evaluate(random_run, data=data, score=ScoredText.ALL)
    assert (
        everything.loss == pytest.approx(nll.mean(), rel=1e-5)
        and abs(everything.loss / found.loss - 1) > 0.005
    )
    assert (everything.tokens, everything.total_tokens, everything.bytes, everything.is_all) == (
        200 * 44,
        200 * 44,
        200 * 43,
        True,
    )
    # The run's own setting holds where nothing is said.
    (random_run.path / "config.json").write_text(
        json.dumps({"data": to_json(data), "eval": {"score": "all"}})
    )
    assert scored_text(random_run) is ScoredText.ALL


def test_calibration_and_teachers_are_of_the_scored_tokens(random_run: Loaded, tmp_path: Path) -> None:
    """A teacher that is the model itself but for the prompts' tokens: at completions their bits per byte
    agree.
    """
    data, prompts = pairs_in(tmp_path)
    prepared = documents_of(random_run, data)
    batches = evaluation_batches(prepared, sequence_length=64, batch_size=8, overlap=0, max_documents=8)
    (batch, *_) = batches
    output = random_run.model(
        jnp.asarray(batch.tokens),
        segment_ids=jnp.asarray(batch.segment_ids),
        positions=jnp.asarray(batch.positions),
    )
    scored = batch.loss_mask[:, :, None] > 0
    teacher = TeacherOutput(hidden=jnp.where(scored, output.hidden, 0.0), head=output.head)
    step = make_eval_step(random_run.definition)
    found = evaluate_batches(step, random_run.params, {}, batches, teachers=lambda placed: (teacher,))
    assert found.teacher_kl == pytest.approx(0.0, abs=1e-6) and found.teacher_agreement == 1.0
    assert found.teacher_bits_per_byte == pytest.approx(found.bits_per_byte, rel=1e-5)
    # One bin of 15 of every token's confidence, over the scored tokens, by hand.
    # a pair is a row by itself
    rows = np.asarray(logits(random_run.model, jnp.asarray(batch.tokens)), np.float64)
    probabilities = np.exp(rows) / np.exp(rows).sum(-1, keepdims=True)
    confidence = probabilities.max(-1)
    right = rows.argmax(-1) == batch.targets
    bins = (confidence * 15).astype(int)
    here = batch.loss_mask > 0
    gaps = [abs((right[here & (bins == b)] - confidence[here & (bins == b)]).sum()) for b in range(15)]
    assert found.calibration_error == pytest.approx(sum(gaps) / here.sum(), rel=1e-4)


def test_the_loss_of_an_exported_file_is_of_the_same_tokens(random_run: Loaded, tmp_path: Path) -> None:
    data, _ = pairs_in(tmp_path)
    windows = text_windows(random_run, data, max_tokens=6, length=64)
    texts = [random_run.tokenizer.decode(window.tokens[1:][window.scored].tolist()) for window in windows]
    assert texts == ["yes", "ye"] and [int(window.scored.sum()) for window in windows] == [4, 2]
    short = text_windows(random_run, data, max_tokens=4, length=8)
    assert [(len(window.tokens), window.scored.tolist()) for window in short] == [
        (9, [False] * 4 + [True] * 4)
    ]


def test_the_trainers_evaluation_scores_the_completions(tmp_path: Path) -> None:
    data, _ = pairs_in(tmp_path)
    data = dataclasses.replace(data, heldout_fraction=0.2, cache_dir=str(tmp_path))
    experiment = Experiment(
        model=dataclasses.replace(DEFINITION.config, context_length=64), data=data, tokenizer=ByteTokenizer()
    )
    setup = set_up(experiment, tokenizer=ByteTokenizer(), mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    batches = setup.heldout(None)
    assert (
        batches is not None
        and batches.num_targets == 4 * batches.num_documents
        and batches.num_bytes == 3 * batches.num_documents
    )
    scores_all = dataclasses.replace(
        setup, experiment=dataclasses.replace(experiment, eval=EvalConfig(score=ScoredText.ALL))
    )
    everything = scores_all.heldout(None)
    assert (
        everything is not None
        and everything.num_targets == everything.num_tokens == 44 * batches.num_documents
    )


def test_text_without_a_byte_has_no_bits_per_byte() -> None:
    only_eos = InMemoryDocuments(
        [[BOS, 5, EOS]], num_bytes=[1], scored=[[False, False, True]], scored_bytes=[0]
    )
    batches = evaluation_batches([only_eos], sequence_length=LENGTH, batch_size=4, overlap=0)
    result = evaluate_batches(EVAL_STEP, PARAMS, {}, batches)
    assert math.isfinite(result.loss) and math.isnan(result.bits_per_byte) and result.tokens == 1
