"""A changed source is named by every reader of a run's data; a model that was trained on held-out text is
too.
"""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from slmjax import cli
from slmjax.checkpoints.loading import Loaded
from slmjax.checkpoints.stored_model import LocalModel
from slmjax.config import to_json
from slmjax.convert.verify.loss_check import text_windows
from slmjax.data import provenance
from slmjax.data.config import DataConfig, HeldOutBy, SpecialNames, Split
from slmjax.data.preparation import prepare
from slmjax.data.provenance import ChangedData
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.distill.config import DistillConfig, TeacherConfig
from slmjax.evaluation import evaluate
from slmjax.evaluation.bits_per_byte import documents_of
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.definition import define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.quantization.ptq.round_to_nearest import Clip, _origin
from slmjax.runner import setup as run_setup
from slmjax.training.experiment import Experiment, FromModel
from slmjax.training.objective import ObjectiveConfig
from tests.data.test_held_out import TEXTS, corpus

BLOCK = BlockConfig(mixer=AttentionConfig(num_heads=1), ffn=MlpConfig(hidden_dim=8))
CONFIG = ModelConfig(
    embed_dim=8, stack=(LayerGroup(pattern=(BLOCK,), repeats=1),), context_length=64, vocab_size=258
)
DEFINITION = define(CONFIG)


@pytest.fixture(autouse=True)
def logged_from_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="slmjax")


def write_run(directory: Path, data: DataConfig, *, has_record: bool = True) -> Path:
    """A run directory, as far as its data goes."""
    prepared = prepare(data, ByteTokenizer())
    prepared.tokenizer.save(directory / "tokenizer")
    (directory / "config.json").write_text(json.dumps({"data": to_json(data)}))
    if has_record:
        (directory / "data.json").write_text(json.dumps(provenance.describe(prepared, data)))
    return directory


def now(data: DataConfig) -> provenance.Record:
    return provenance.describe(prepare(data, ByteTokenizer()), data)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return dataclasses.replace(corpus(tmp_path / "corpus.jsonl"), sequence_length=64, batch_size=4)


@pytest.fixture
def run(tmp_path: Path, data: DataConfig) -> Path:
    return write_run(tmp_path / "run", data)


@pytest.fixture
def loaded(run: Path) -> Loaded:
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), DEFINITION.params)
    return Loaded(
        config=CONFIG,
        model=DEFINITION.merge(params, {}),
        own_tokenizer=ByteTokenizer().build(()),
        definition=DEFINITION,
        params=params,
        buffers={},
        path=run,
        step=1,
    )


# Evaluation -------------------------------------------------------------------------------------------------


def test_evaluation_names_a_changed_source(
    loaded: Loaded, data: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (whole,) = documents_of(loaded, data)
    assert len(whole) == 6 and not caplog.messages
    corpus(tmp_path / "corpus.jsonl", ["One more line", *TEXTS])
    with pytest.raises(ValueError) as refused:
        evaluate(loaded)
    for words in (
        "corpus.jsonl had 54 documents",
        "and 6 (",
        "has 55 documents",
        "no document that was trained on is held out now",
        "--changed-data allow",
        "recorded",
    ):
        assert words in str(refused.value)
    with pytest.raises(ValueError, match="corpus.jsonl had 54 documents"):  # the loss check of verify-export
        text_windows(loaded, None, max_tokens=8, length=8)
    with pytest.raises(ValueError, match="corpus.jsonl had 54 documents"):  # the run's data, with other rows
        evaluate(loaded, data=dataclasses.replace(data, sequence_length=32))
    (allowed,) = documents_of(loaded, data, changed_data=ChangedData.ALLOW)
    assert allowed.text() == whole.text() and "had 54 documents" in caplog.messages[-1]
    (recorded,) = documents_of(loaded, data, changed_data=ChangedData.RECORDED)
    assert recorded.directory == whole.directory != allowed.directory


def test_a_source_that_is_gone_is_evaluated_from_the_cache(
    loaded: Loaded, data: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (expected,) = documents_of(loaded, data)
    Path(str(data.path)).unlink()
    (result,) = documents_of(loaded, data)
    assert result.directory == expected.directory
    assert "does not exist" in caplog.messages[0] and "as it was prepared for training" in caplog.messages[0]
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="does not exist"):
        documents_of(loaded, data)
    with pytest.raises(ValueError, match="does not have the text that was prepared"):
        documents_of(loaded, data, changed_data=ChangedData.RECORDED)


def test_another_split_of_the_run_s_text_is_reported(
    loaded: Loaded, data: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    documents_of(loaded, dataclasses.replace(data, heldout_fraction=0.05))
    assert not caplog.messages or all("prepared" in line for line in caplog.messages)  # held out then too
    documents_of(loaded, dataclasses.replace(data, heldout_fraction=0.5))
    assert "some of the text evaluated here may have been trained on" in caplog.messages[-1]


def test_another_way_to_encode_the_same_text_is_no_change_of_it(
    loaded: Loaded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = corpus(tmp_path / "names.jsonl", [f"{i} <|eos|> {text}" for i, text in enumerate(TEXTS)])
    model = dataclasses.replace(loaded, path=write_run(tmp_path / "named", data))
    (as_text,) = documents_of(model, data)
    (encoded,) = documents_of(model, dataclasses.replace(data, special_tokens=SpecialNames.ENCODE))
    assert len(encoded) == len(as_text) and encoded.lengths.sum() < as_text.lengths.sum()
    assert not any("trained on" in line for line in caplog.messages), "what is held out is the same"


def test_a_model_made_of_a_run_has_its_record(run: Path, data: DataConfig, tmp_path: Path) -> None:
    unread = {name: lambda _: pytest.fail("no weight is read") for name in ("read", "dtype", "encoded")}
    own = LocalModel(path=run, config=CONFIG, formats={}, family=None, step=1, **unread)
    origin = _origin(own, (), Clip.NONE)
    model = tmp_path / "model"
    model.mkdir()
    (model / "origin.json").write_text(json.dumps(origin))
    assert provenance.read_record(model) == provenance.read_record(run) == now(data)
    assert provenance.read_settings(model)["data"] == to_json(data)


def test_a_run_without_a_record_says_so(
    loaded: Loaded, data: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    (loaded.path / "data.json").unlink()
    documents_of(loaded, data)
    assert (
        "it is unknown whether its text is still what it was trained on" in caplog.messages[0]
        and len(caplog.messages) == 1
    )


def test_settings_of_unknown_classes_do_not_stop_another_evaluation(
    loaded: Loaded, data: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    settings = to_json(dataclasses.replace(data, path=None))
    settings["sources"][0]["source"]["type"] = "SourceOfTheUser"
    (loaded.path / "config.json").write_text(json.dumps({"data": settings}))
    assert documents_of(loaded, data)
    assert "its settings cannot be read" in caplog.messages[-1] and "SourceOfTheUser" in caplog.messages[-1]


# Records ----------------------------------------------------------------------------------------------------


def test_differences_are_described(data: DataConfig, tmp_path: Path) -> None:
    before = now(data)
    assert provenance.differences(before, now(data)) == []
    corpus(tmp_path / "corpus.jsonl", [TEXTS[0].replace("D", "d"), *TEXTS[1:]])
    (changed,) = provenance.differences(before, now(data))
    assert "corpus.jsonl has other text in as many documents and bytes: 54 documents" in changed
    corpus(tmp_path / "corpus.jsonl", TEXTS)
    (changed,) = provenance.differences(before, now(dataclasses.replace(data, heldout_fraction=0.3)))
    assert "the same text, prepared with other settings" in changed
    (tmp_path / "copy").mkdir()
    copied = corpus(tmp_path / "copy" / "corpus.jsonl")
    assert provenance.differences(before, now(copied)) == []
    assert "the mixture had 1 source(s)" in provenance.differences(before, before * 2)[0]


def test_records_of_earlier_versions(data: DataConfig, tmp_path: Path) -> None:
    older = [
        {key: entry[key] for key in ("source", "weight", "documents", "bytes", "tokens", "hash")}
        for entry in now(data)
    ]
    assert provenance.differences(older, now(data)) == []
    older[0]["hash"] = "0"
    assert (
        "an earlier version of slmjax encoded the same text in another way"
        in provenance.differences(older, now(data))[0]
    )
    assert provenance.recorded_heldout(older, data) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "no document that was trained on is held out now"),
        ({"heldout_by": HeldOutBy.ID}, "records that moved may have been trained on"),
        ({"split": Split.TAIL}, "tail of an edited document begins at another place"),
    ],
)
def test_resuming_with_a_changed_source(
    data: DataConfig, tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    data = dataclasses.replace(data, **changes)  # type: ignore[arg-type]
    run = write_run(tmp_path / "run", data)
    assert provenance.changes_on_resume(run, data, now(data)) == []
    corpus(tmp_path / "corpus.jsonl", ["One more line", *TEXTS])
    (sentence,) = provenance.changes_on_resume(run, data, now(data))
    assert (
        "corpus.jsonl had" in sentence
        and "continues with the text as it is now" in sentence
        and expected in sentence
    )


# Teachers and first parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "overlaps"),
    [
        ({}, {}, False),
        ({}, {"heldout_fraction": 0.05}, False),  # a part of what was held out there
        ({}, {"heldout_fraction": 0.3}, True),
        ({"heldout_by": HeldOutBy.ID}, {}, True),  # a run of an earlier version
        ({"heldout_fraction": 0.0}, {}, True),
        ({"split": Split.TAIL}, {"split": Split.TAIL}, False),
        ({"split": Split.TAIL}, {}, True),
    ],
)
def test_a_model_that_was_trained_on_what_is_held_out(
    data: DataConfig, tmp_path: Path, theirs: dict[str, object], ours: dict[str, object], overlaps: bool
) -> None:
    other = write_run(tmp_path / "other", dataclasses.replace(data, **theirs))  # type: ignore[arg-type]
    own = dataclasses.replace(data, **ours)  # type: ignore[arg-type]
    result = provenance.overlap(other, own, now(own))
    assert bool(result) is overlaps
    assert all("corpus.jsonl" in item and str(other) in item for item in result)
    assert provenance.overlap_with_own(other, write_run(tmp_path / "own", own)) == result


def test_a_changed_file_overlaps_only_where_places_decide(data: DataConfig, tmp_path: Path) -> None:
    by_id = dataclasses.replace(data, heldout_by=HeldOutBy.ID)
    runs = [write_run(tmp_path / name, item) for name, item in (("content", data), ("id", by_id))]
    corpus(tmp_path / "corpus.jsonl", ["One more line", *TEXTS])
    assert provenance.overlap(runs[0], data, now(data)) == []
    assert provenance.overlap(runs[1], by_id, now(by_id))
    other = corpus(tmp_path / "other.jsonl", ["Other text"] * 5 + TEXTS[:5])
    assert provenance.overlap(runs[0], other, now(dataclasses.replace(other, heldout_fraction=0))) == []


def test_text_in_a_file_of_another_name_is_known_by_its_sizes(
    run: Path, data: DataConfig, tmp_path: Path
) -> None:
    whole = dataclasses.replace(data, path=str(tmp_path / "renamed.jsonl"), heldout_fraction=0.0)
    (tmp_path / "renamed.jsonl").write_bytes((tmp_path / "corpus.jsonl").read_bytes())
    (sentence,) = provenance.overlap(run, whole, now(whole))
    assert "renamed.jsonl too" in sentence and "may have been trained on" in sentence
    divided = dataclasses.replace(whole, heldout_fraction=data.heldout_fraction)
    assert provenance.overlap(run, divided, now(divided)) == [], "the same records are held out"


def test_a_new_run_names_models_that_were_trained_on_what_it_holds_out(
    data: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fractions = {"first": 0.0, "teacher": 0.05, "honest": 0.1}
    first, teacher, honest = (
        write_run(tmp_path / name, dataclasses.replace(data, heldout_fraction=fraction))
        for name, fraction in fractions.items()
    )
    distill = DistillConfig(teachers=tuple(TeacherConfig(path=str(path)) for path in (teacher, honest)))
    asked = Experiment(
        model=CONFIG, data=data, init=FromModel(path=str(first)), objective=ObjectiveConfig(distill=distill)
    )
    run_setup._warn_of_overlap(asked, prepare(data, ByteTokenizer()))
    assert [str(tmp_path / name) in caplog.text for name in fractions] == [True, True, False]


def test_options_of_an_evaluation_default_to_the_run_s_and_not_to_its_teacher_s(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, run = (
        write_run(tmp_path / str(length), dataclasses.replace(data, sequence_length=length))
        for length in (48, 57)
    )
    with pytest.raises(SystemExit):
        cli.main(["eval", "--teacher", str(teacher), str(run), "--help", "all"])
    shown = capsys.readouterr().out
    assert "(default: 57)" in shown and "(default: 48)" not in shown
