"""Which documents are held out: of records by their content, of files by their name; runs of before keep the
lines of their file.
"""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from slmjax.config import from_json, to_json
from slmjax.data.config import DataConfig, HeldOutBy, TextSource
from slmjax.data.preparation import Prepared, prepare
from slmjax.data.tokenizers import ByteTokenizer

TEXTS = [f"Document {i} of the corpus, with {i * i} in it." for i in range(60)]


def corpus(path: Path, texts: Sequence[str] = TEXTS) -> DataConfig:
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([["text"], *([text] for text in texts)])
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(path=str(path), cache_dir=str(path.parent / "cache"), heldout_fraction=0.1)


def sides(prepared: Prepared) -> tuple[list[str], list[str]]:
    """The documents that are trained on, and those that are held out."""
    ((train, _),) = prepared.train
    (heldout,) = prepared.heldout
    return tuple(
        [prepared.tokenizer.decode(shards.tokens(i).tolist()) for i in range(len(shards))]
        for shards in (train, heldout)
    )


def test_a_line_at_the_top_of_a_file_moves_no_other_document(tmp_path: Path) -> None:
    data = corpus(tmp_path / "corpus.jsonl")
    train, heldout = sides(prepare(data, ByteTokenizer()))
    assert len(train) + len(heldout) == 60 and len(heldout) > 2
    corpus(tmp_path / "corpus.jsonl", ["One more line", *TEXTS])
    new_train, new_heldout = sides(prepare(data, ByteTokenizer()))
    assert {*new_train, *new_heldout} - {*train, *heldout} == {"One more line"}
    assert not set(new_heldout) & set(train) and not set(new_train) & set(heldout)
    as_table = sides(prepare(corpus(tmp_path / "other.csv", TEXTS[::-1]), ByteTokenizer()))
    assert [set(side) for side in as_table] == [set(train), set(heldout)]  # neither order nor layout matters


def test_pairs_differ_by_their_prompts(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"q": text, "a": "yes"}) + "\n" for text in TEXTS)
    )
    data = DataConfig(
        path=str(tmp_path / "pairs.jsonl"),
        prompt_field="q",
        completion_field="a",
        cache_dir=str(tmp_path),
        heldout_fraction=0.5,
    )
    train, heldout = sides(prepare(data, ByteTokenizer()))
    assert len(train) > 15 and len(heldout) > 15


def test_files_are_held_out_by_name(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"file {i}")
    keys = [item.held_out_key(HeldOutBy.CONTENT) for item in TextSource(path=str(tmp_path)).documents()]
    assert sorted(keys) == sorted(f"{i}.txt" for i in range(20))


def test_configs_of_before_hold_out_by_line(tmp_path: Path) -> None:
    data = corpus(tmp_path / "corpus.jsonl")
    older = {name: value for name, value in to_json(data).items() if name != "heldout_by"}
    read = from_json(DataConfig, older)
    assert read == dataclasses.replace(data, heldout_by=HeldOutBy.ID)
    _, heldout = sides(prepare(read, ByteTokenizer()))
    # By sha256(b"corpus.jsonl:LINE")[:8] / 2**64 < 0.1.
    assert [TEXTS.index(text) + 1 for text in heldout] == [8, 10, 33, 46, 55]
