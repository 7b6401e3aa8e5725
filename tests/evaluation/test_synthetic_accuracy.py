"""Accuracy on synthetic tasks: what counts as right, which lengths, and what a trained model learns."""

import dataclasses
import json
import math

import pytest

import slmjax
from slmjax import evaluation
from slmjax.checkpoints.run_checkpoints import CheckpointConfig
from slmjax.cli import main
from slmjax.data.synthetic_tasks import SyntheticSource, SyntheticTask, evaluation_examples
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.evaluation import synthetic_accuracy
from slmjax.evaluation.likelihood import Likelihood
from slmjax.models import BlockConfig, LayerGroup, MlpConfig, ModelConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.training import DataConfig, OptimConfig, WeightedSource
from slmjax.training.experiment import EvalConfig, Experiment, RunConfig
from tests.untrained import untrained

BLOCK = BlockConfig(mixer=AttentionConfig(num_heads=2), ffn=MlpConfig(hidden_dim=64))
MODEL = ModelConfig(embed_dim=32, context_length=64, stack=(LayerGroup(pattern=(BLOCK,)),))


@pytest.fixture
def loaded(tmp_path):
    tokenizer = ByteTokenizer().build([])
    config = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    return untrained(config, tokenizer=tokenizer, path=tmp_path)


def test_an_answer_is_right_if_all_of_it_is_likeliest(loaded, monkeypatch):
    """With a model that is right about the examples with the answer 0, at two bits for each symbol."""
    seen = []

    def likelihoods(loaded, pairs, *, batch_size):
        seen.extend(pairs)
        digits = [int(loaded.tokenizer.decode(answer)) for _, answer in pairs]
        nats = 2 * math.log(2)
        return [
            Likelihood(logprob=-nats, is_greedy=digit == 0, num_tokens=2, truncated=0) for digit in digits
        ]

    monkeypatch.setattr(synthetic_accuracy, "log_likelihoods", likelihoods)
    (result,) = evaluation.evaluate_tasks(loaded, [SyntheticTask.PARITY], lengths=[6], num_examples=40)
    examples = evaluation_examples(SyntheticTask.PARITY, length=6, count=40)
    even = sum(example.answer == " 0" for example in examples) / 40
    assert result.accuracy == even
    assert result.accuracy_stderr == pytest.approx(math.sqrt(even * (1 - even) / 39))
    assert result.bits_per_symbol == pytest.approx(2.0)
    assert (result.chance, result.examples, result.length, result.trained_length) == (0.5, 40, 6, None)
    assert [loaded.tokenizer.decode(answer) for _, answer in seen] == [example.answer for example in examples]


def test_lengths_that_fit_are_the_default_and_others_are_refused(loaded, monkeypatch):
    """64 tokens hold a prompt of 32 digits with blanks, its sign and its answer, but not 64 digits."""
    monkeypatch.setattr(
        synthetic_accuracy,
        "log_likelihoods",
        lambda loaded, pairs, batch_size: [
            Likelihood(logprob=-1.0, is_greedy=False, num_tokens=2, truncated=0) for _ in pairs
        ],
    )
    results = evaluation.evaluate_tasks(loaded, [SyntheticTask.PARITY], num_examples=1)
    assert [result.length for result in results] == [4, 8, 16]
    assert math.isnan(results[0].accuracy_stderr)
    with pytest.raises(ValueError, match=r"parity of length 32 takes \d+ tokens.*--task-lengths"):
        evaluation.evaluate_tasks(loaded, [SyntheticTask.PARITY], lengths=[32], num_examples=1)
    with pytest.raises(ValueError, match="number of examples is 0"):
        evaluation.evaluate_tasks(loaded, [SyntheticTask.PARITY], num_examples=0)


def command_output(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *words])
    return stopped.value.code, capsys.readouterr()


def test_the_command_shows_a_row_for_each_task_and_length(trained, workplace, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    run = str(workplace / json.loads(trained.stdout)["run_dir"])
    settings = ["--task-lengths", "2", "4", "--task-examples", "5", run]
    code, out = command_output(capsys, "--tasks", "copy,s3", *settings)
    assert not code
    for part in ("copy, length 2: accuracy", "s3, length 4: accuracy", "chance 0.167", "not trained on it"):
        assert part in out.out, out.out
    assert "bits per byte" not in out.out
    code, out = command_output(capsys, "--tasks", "coyp", run)
    assert code
    assert "Did you mean 'copy'?" in out.err


@pytest.mark.nightly
def test_a_trained_model_has_learned_the_task(tmp_path):
    """A layer of attention learns the parity of one digit; of two it has seen none."""
    source = SyntheticSource(task=SyntheticTask.PARITY, num_documents=400, max_length=1)
    experiment = Experiment(
        model=MODEL,
        data=DataConfig(
            sources=(WeightedSource(source=source),), sequence_length=48, batch_size=8, heldout_fraction=0.05
        ),
        tokenizer=ByteTokenizer(),
        optim=OptimConfig(lr=1e-2, warmup_steps=5),
        eval=EvalConfig(every=60),
        checkpoint=CheckpointConfig(every=60),
        run=RunConfig(name="parity", steps=60, directory=str(tmp_path), sample_prompts=()),
    )
    result = slmjax.train(experiment)
    loaded = slmjax.load_model(tmp_path / result.run_dir)
    (one,) = evaluation.evaluate_tasks(loaded, [SyntheticTask.PARITY], lengths=[1], num_examples=20)
    assert one.accuracy == 1.0
    assert one.trained_length == 1
    assert one.bits_per_symbol < 0.1
