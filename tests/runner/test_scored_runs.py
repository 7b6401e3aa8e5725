"""A run on pairs of prompt and completion whose prompts do not fit a row: no step is empty, and what it tells
is of the completions.
"""

import dataclasses
import json
from pathlib import Path

import pytest

import slmjax
from slmjax.checkpoints.run_checkpoints import CheckpointConfig
from slmjax.data.config import DataConfig
from slmjax.data.scored import ScoredText
from slmjax.data.windows import evaluation_batches
from slmjax.runner.resume import _scores_other_tokens
from slmjax.telemetry.run_directory import read_log
from slmjax.training.experiment import EvalConfig
from tests.data.in_memory import numbered
from tests.one_layer import one_layer


@pytest.mark.nightly
def test_pairs_whose_prompts_do_not_fit_a_row(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt of 300 bytes, the completion "yes", rows of 64; one row on each of 8 devices."""
    records = [{"prompt": f"{i:03d}" + "abcdefghij" * 30, "completion": "yes"} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({**one, "prompt": one["prompt"][:300]}) + "\n" for one in records)
    )
    base = one_layer(workplace, tmp_path, steps=4)
    data = DataConfig(
        path=str(tmp_path / "pairs.jsonl"),
        prompt_field="prompt",
        completion_field="completion",
        sequence_length=64,
        batch_size=8,
        heldout_fraction=0.3,
        cache_dir=str(tmp_path / "cache"),
    )
    experiment = dataclasses.replace(
        base,
        data=data,
        eval=EvalConfig(every=2, sample=False),
        checkpoint=CheckpointConfig(every=2),
        run=dataclasses.replace(base.run, log_every=1),
    )
    result = slmjax.train(experiment)
    train = list(read_log(Path(result.run_dir) / "log.jsonl", kind="train"))
    assert [record["targets"] for record in train] == [8 * 4] * 4  # y, e, s and EOS of each row
    assert (result.status, result.skipped, result.run_tokens) == ("finished", 0, 4 * 8 * 4)
    (sentence,) = (line for line in capsys.readouterr().out.splitlines() if "is left out" in line)
    assert "rows have 64 tokens" in sentence and "document 0, which begins '0" in sentence

    on_the_way, at_end = read_log(Path(result.run_dir) / "log.jsonl", kind="eval")
    assert (
        on_the_way["tokens"] == at_end["tokens"] == 4 * at_end["documents"]
        and at_end["total_tokens"] == 304 * at_end["documents"]
    )
    assert result.measured_on == "the completions of held-out text"
    assert result.compressors == {}  # gzip and xz would be of the prompts too
    assert result.loss == pytest.approx(at_end["loss"]) and result.best_loss == min(
        on_the_way["loss"], at_end["loss"]
    )

    # Another choice of what is scored is another metric: the best so far does not compare, and is replaced.
    longer = dataclasses.replace(
        experiment,
        eval=EvalConfig(every=2, sample=False, score=ScoredText.ALL),
        run=dataclasses.replace(experiment.run, steps=5),
    )
    resumed = slmjax.train(longer, resume=result.run_dir)
    assert "was chosen by the loss of other tokens" in capsys.readouterr().out
    assert (resumed.measured_on, set(resumed.compressors)) == ("held-out text", {"gzip -9", "xz -9"})


@pytest.mark.parametrize(
    ("record", "scored", "expected"),
    [
        ({"tokens": 8, "total_tokens": 18}, ScoredText.COMPLETIONS, False),
        ({"tokens": 8, "total_tokens": 18}, ScoredText.ALL, True),
        (
            {"tokens": 8, "total_tokens": 28},
            ScoredText.COMPLETIONS,
            True,
        ),  # held-out text was added or removed
        ({}, ScoredText.ALL, False),  # by an earlier version, which scored all
        ({}, ScoredText.COMPLETIONS, True),
    ],
)
def test_the_best_of_other_tokens_is_chosen_again(
    record: dict[str, int], scored: ScoredText, expected: bool, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"kind": "eval", "step": 20, "loss": 1.0, **record}) + "\n")
    documents = numbered([10, 10], prompt_lengths=[6, 6])  # of 10 tokens, BOS and EOS included, 4 are scored
    batches = evaluation_batches([documents], sequence_length=16, batch_size=1, overlap=0, text=scored)
    assert _scores_other_tokens(batches, log, step=20) is expected
    assert not _scores_other_tokens(batches, log, step=10), "an evaluation that the log does not have"
