"""Preparation: exact bytes, an honest split, reuse by hash, and nothing half-written."""

import dataclasses
import errno
import gzip
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from slmjax.data import locks, provenance
from slmjax.data.config import DataConfig, OnBadDocument, Split, TextSource, WeightedSource
from slmjax.data.encoding import FIXED_MEMORY, MEMORY_PER_BYTE
from slmjax.data.preparation import inspect, prepare
from slmjax.data.shards import TokenShards
from slmjax.data.splitting import boundary_before_tail, is_held_out
from slmjax.data.stdlib_corpus import StdlibSource
from slmjax.data.tokenizers import BpeTokenizer, ByteTokenizer, CharTokenizer, FileTokenizer, Tokenizer

BYTES = ByteTokenizer()
DOCUMENTS = [f"Document {i} says <|eos|> and {'äöü ' * i}\n" for i in range(60)]


@pytest.fixture(autouse=True)
def logged_from_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="slmjax")


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return DataConfig(
        path=str(tmp_path / "corpus.jsonl"), cache_dir=str(tmp_path / "cache"), heldout_fraction=0.2
    )


def decoded(shards: TokenShards, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(shards.tokens(i).tolist()) for i in range(len(shards))]


def of_path(data: DataConfig, path: Path, content: str | bytes) -> DataConfig:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return dataclasses.replace(data, path=str(path))


@pytest.mark.parametrize("tokenizer", [BYTES, CharTokenizer(), BpeTokenizer(vocab_size=270)])
def test_every_document_is_on_one_side_byte_for_byte(data: DataConfig, tokenizer: BpeTokenizer) -> None:
    prepared = prepare(data, tokenizer)
    ((train, weight),) = prepared.train
    (heldout,) = prepared.heldout
    expected = {
        side: [text for text in DOCUMENTS if is_held_out(json.dumps(["", text]), 0.2) is side]
        for side in (True, False)
    }
    assert decoded(heldout, prepared.tokenizer) == expected[True]
    assert decoded(train, prepared.tokenizer) == expected[False]
    assert prepared.heldout_text() == "".join(expected[True]).encode()
    assert weight == 1.0
    for shards in (train, heldout):
        assert all(shards.tokens(i)[[0, -1]].tolist() == [0, 1] for i in range(len(shards)))
        assert all(not {0, 1} & set(shards.tokens(i)[1:-1].tolist()) for i in range(len(shards)))
        assert shards.num_bytes.tolist() == [len(text.encode()) for text in expected[shards is heldout]]
        assert np.array_equal(shards.num_scored, shards.lengths - 1) and np.array_equal(
            shards.scored_bytes, shards.num_bytes
        )
        assert shards.manifest.tokenizer_hash == prepared.tokenizer.hash


def test_tokenizer_learns_from_the_training_side_alone(data: DataConfig, tmp_path: Path) -> None:
    config = BpeTokenizer(vocab_size=280)
    training = [text for text in DOCUMENTS if not is_held_out(json.dumps(["", text]), 0.2)]
    assert prepare(data, config).tokenizer.hash == config.build(training).hash


def test_tail_split_of_one_file(data: DataConfig, tmp_path: Path) -> None:
    text = "0123456789" * 9 + "äöüäöüäöüä"
    one_file = dataclasses.replace(
        of_path(data, tmp_path / "one.txt", text), split=Split.TAIL, heldout_fraction=0.1
    )
    prepared = prepare(one_file, CharTokenizer())
    assert decoded(prepared.train[0][0], prepared.tokenizer) == [text[:90]]
    assert prepared.heldout_text() == text[90:].encode()  # the character vocabulary knows both sides
    nothing_held_out = prepare(dataclasses.replace(one_file, heldout_fraction=0.0), BYTES)
    assert nothing_held_out.heldout == () and nothing_held_out.heldout_text() == b""
    assert decoded(nothing_held_out.train[0][0], nothing_held_out.tokenizer) == [text]


def test_one_document_is_split_at_a_boundary_before_its_tail(
    data: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paragraphs = [f"Paragraph {i} says ä.\nIt has two lines.\n\n" for i in range(100)]
    text = "".join(paragraphs)
    one_file = of_path(dataclasses.replace(data, heldout_fraction=0.05), tmp_path / "one.txt", text)
    prepared = prepare(one_file, BpeTokenizer(vocab_size=260))
    # 4.9 of 100 paragraphs are 5 % of the bytes; the nearest begins the 96th.
    assert prepared.heldout_text() == "".join(paragraphs[95:]).encode()
    assert decoded(prepared.train[0][0], prepared.tokenizer) == ["".join(paragraphs[:95])]
    assert "the last 5% of its one document is held out" in caplog.messages[-1]
    # The vocabulary has learned from the training text alone.
    assert prepared.tokenizer.hash == BpeTokenizer(vocab_size=260).build(["".join(paragraphs[:95])]).hash
    assert prepare(one_file, BpeTokenizer(vocab_size=260)).heldout_text() == prepared.heldout_text()
    record = provenance.describe(prepared, one_file)
    assert record[0]["split"] == "boundary" and not provenance.differences(record, record)


@pytest.mark.parametrize(
    ("text", "fraction", "expected"),
    [
        ("ab", 0.05, "b"),
        ("no boundary", 0.05, "y"),
        ("one two three four", 0.25, "four"),
        ("a" * 96 + "ä\n\n" + "b", 0.035, "ä\n\nb"),  # no half character; no boundary near it
    ],
)
def test_the_tail_of_a_short_text(text: str, fraction: float, expected: str) -> None:
    assert text[boundary_before_tail(text, fraction) :] == expected


def test_too_few_documents_are_checked_before_work_is_done(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> Tokenizer:
        raise AssertionError("the tokenizer was made first")

    monkeypatch.setattr(BpeTokenizer, "build", build)
    config = BpeTokenizer(vocab_size=260)
    pair = of_path(data, tmp_path / "pair.jsonl", '{"q": "1+1=", "a": "2"}')
    with pytest.raises(ValueError, match="all on one side.*a pair of prompt and completion.*0 holds out"):
        prepare(dataclasses.replace(pair, prompt_field="q", completion_field="a"), config)
    with pytest.raises(ValueError, match="too short to split"):
        prepare(of_path(data, tmp_path / "short.txt", "x"), config)
    with pytest.raises(ValueError, match="nothing would be left to train on"):
        one = of_path(data, tmp_path / "one.txt", "some text")
        prepare(dataclasses.replace(one, heldout_fraction=1.0), config)
    with pytest.raises(
        ValueError, match="no field 'text'; the record has 'id', 'body'.*--data.text-field body"
    ):
        prepare(of_path(data, tmp_path / "body.jsonl", '{"id": "1", "body": "the text"}'), config)
    with pytest.raises(ValueError, match="no field 'text', but 'id', 'body'.*--data.text-field"):
        prepare(of_path(data, tmp_path / "body.csv", "id,body\n1,the text\n"), config)
    with pytest.raises(ValueError, match="--data.messages-field turns"):
        prepare(
            of_path(data, tmp_path / "chat.jsonl", '{"turns": [{"role": "user", "content": "a"}]}'), config
        )


def test_little_held_out_text_is_warned_of(
    data: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of one long and many short documents the hash may hold out short ones alone."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"short text {number}")
    held_out = {number for number in range(40) if is_held_out(f"short text {number}", 0.25)}
    assert held_out
    long = next(text for text in ("a" * 9_000, "b" * 9_000, "c" * 9_000) if not is_held_out(text, 0.25))
    (folder / "long.txt").write_text(long)
    with caplog.at_level(logging.WARNING, logger="slmjax"):
        prepare(dataclasses.replace(data, path=str(folder), heldout_fraction=0.25), ByteTokenizer())
    (message,) = [text for text in caplog.messages if "held out" in text]
    assert "and not 25%" in message and "--data.split tail" in message


def test_held_out_share_is_about_the_fraction_and_grows_with_it() -> None:
    ids = [f"file {i}" for i in range(4000)]
    few, more = ({id for id in ids if is_held_out(id, fraction)} for fraction in (0.05, 0.1))
    assert few < more
    assert abs(len(few) / 4000 - 0.05) < 0.015  # four standard deviations
    assert not any(is_held_out(id, 0.0) for id in ids) and all(is_held_out(id, 1.0) for id in ids)


def test_prompts_are_marked(data: DataConfig, tmp_path: Path) -> None:
    pairs = [{"q": f"{i}+{i}=", "a": f"{2 * i}"} for i in range(40)]
    config = of_path(data, tmp_path / "pairs.jsonl", "\n".join(json.dumps(pair) for pair in pairs))
    config = dataclasses.replace(config, prompt_field="q", completion_field="a")
    prepared = prepare(config, BYTES)
    shards = prepared.train[0][0]
    tokenizer = prepared.tokenizer
    for i in range(len(shards)):
        tokens = shards.tokens(i).tolist()
        prompt_length = int(np.flatnonzero(shards.scored(i))[0])
        prompt = tokenizer.decode(tokens[:prompt_length])
        completion = tokenizer.decode(tokens[prompt_length:])
        assert {"q": prompt, "a": completion} in pairs
        assert shards.num_bytes[i] == len(prompt) + len(completion)
        assert shards.scored_bytes[i] == len(completion)
    with pytest.raises(ValueError, match="cannot be split: use --data.split documents"):
        prepare(dataclasses.replace(config, split=Split.TAIL), BYTES)
    with pytest.raises(ValueError, match="go together"):
        dataclasses.replace(config, completion_field=None)


def test_mixture_keeps_sources_apart(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for i in range(30):
        (tmp_path / "more" / f"{i}.txt").write_text(f"more {i}")
    sources = (
        WeightedSource(source=TextSource(path=str(data.path)), weight=3.0),
        WeightedSource(source=TextSource(path=str(tmp_path / "more"))),
    )
    prepared = prepare(dataclasses.replace(data, path=None, sources=sources), BYTES)
    assert [weight for _, weight in prepared.train] == [3.0, 1.0]
    assert all(text.startswith("more") for text in decoded(prepared.train[1][0], prepared.tokenizer))
    assert prepared.train[0][0].hash == prepare(data, BYTES).train[0][0].hash
    with pytest.raises(ValueError, match="must be above 0"):
        WeightedSource(source=sources[0].source, weight=0.0)


# Long documents ---------------------------------------------------------------------------------------------


def test_long_documents_have_the_ids_of_the_whole(data: DataConfig, tmp_path: Path) -> None:
    text = "".join(f"line {i} of the file, it's {i * i} long   \n\n    indented\n" for i in range(400))
    config = dataclasses.replace(
        of_path(data, tmp_path / "long.txt", text), split=Split.TAIL, max_document_bytes=1024
    )
    prepared = prepare(config, BpeTokenizer(vocab_size=300))
    cut = int(len(text) * 0.8)
    assert prepared.train[0][0].tokens(0)[1:-1].tolist() == prepared.tokenizer.encode(text[:cut])
    assert len(prepared.train[0][0]) == 1 and prepared.train[0][0].num_bytes[0] == cut


def test_many_batches_of_text_keep_their_order(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmjax.data.encoding._BATCH_BYTES", 50)  # some documents are larger, some smaller
    one_batch = prepare(dataclasses.replace(data, cache_dir=f"{data.cache_dir}-other"), BYTES)
    monkeypatch.undo()
    assert prepare(data, BYTES).train[0][0].hash == one_batch.train[0][0].hash


# Bad documents ----------------------------------------------------------------------------------------------


def test_bad_documents_are_counted_in_the_manifest_and_capped(
    data: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps({"text": text}).encode() for text in DOCUMENTS] + [b'{"text": "bad \xff"}', b"{"]
    bad = of_path(data, tmp_path / "bad.jsonl", b"\n".join(lines))
    with pytest.raises(
        ValueError,
        match=r"2 of 62 documents are bad \(1 invalid_utf8, 1 broken_record.*--data.max-bad-fraction",
    ):
        prepare(bad, BYTES)
    assert not list((tmp_path / "cache" / "shards").iterdir())  # nothing is left of the attempt
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 61: invalid UTF-8"):
        prepare(dataclasses.replace(bad, on_bad_document=OnBadDocument.ERROR), BYTES)
    allowed = dataclasses.replace(bad, max_bad_fraction=0.1, on_bad_document=OnBadDocument.REPLACE)
    prepared = prepare(allowed, BYTES)
    counts = prepared.train[0][0].manifest.bad_documents
    assert (counts.documents, counts.bad, counts.replaced) == (62, 2, 1)
    assert "1 repaired, 1 skipped" in caplog.messages[-1]
    both_sides = decoded(prepared.train[0][0], prepared.tokenizer) + decoded(
        prepared.heldout[0], prepared.tokenizer
    )
    assert "bad \ufffd" in both_sides
    with pytest.raises(ValueError, match="2 of 62"):  # the cap holds for prepared data too
        prepare(dataclasses.replace(allowed, max_bad_fraction=0.01), BYTES)


def test_no_text_at_all(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no document with text"):
        prepare(dataclasses.replace(of_path(data, tmp_path / "empty.txt", ""), max_bad_fraction=1.0), BYTES)


@pytest.mark.parametrize(
    "change",
    [
        {"heldout_fraction": 1.5},
        {"max_bad_fraction": -0.1},
        {"batch_size": 0},
        {"max_document_bytes": 10},
        {"sources": (), "path": None},
    ],
)
def test_config_refuses_what_makes_no_sense(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="data\\."):
        dataclasses.replace(DataConfig(), **change)


# Reuse ------------------------------------------------------------------------------------------------------


def test_prepared_once_and_found_again(
    data: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = BpeTokenizer(vocab_size=270)
    first = prepare(data, config)
    assert len(caplog.messages) == 2
    again = prepare(dataclasses.replace(data, seed=1, batch_size=4), config)
    assert len(caplog.messages) == 2
    assert (
        again.train[0][0].directory == first.train[0][0].directory
        and again.tokenizer.hash == first.tokenizer.hash
    )
    prepare(dataclasses.replace(data, heldout_fraction=0.3), config)
    assert len(caplog.messages) == 4  # another split: another vocabulary, other shards
    with Path(str(data.path)).open("a") as stream:
        stream.write('\n{"text": "one more"}')
    prepare(data, config)
    assert len(caplog.messages) == 6


def test_progress_is_shown_on_a_terminal_alone(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "400")
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        prepare(
            dataclasses.replace(data, cache_dir=f"{data.cache_dir}-{type(stream).__name__}"),
            BYTES,
        )
        assert ("corpus.jsonl" in stream.getvalue()) is stream.isatty()


def test_existing_tokenizer_is_used_as_it_is(data: DataConfig, tmp_path: Path) -> None:
    built = BpeTokenizer(vocab_size=270).build(DOCUMENTS)
    built.save(tmp_path / "tokenizer")
    prepared = prepare(data, FileTokenizer(path=str(tmp_path / "tokenizer")))
    assert prepared.tokenizer.hash == built.hash == prepared.heldout[0].manifest.tokenizer_hash


def test_damaged_cache_says_what_to_delete(data: DataConfig) -> None:
    config = BpeTokenizer(vocab_size=270)
    train = prepare(data, config).train[0][0]
    (train.directory / "index.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"index\.npz.*Delete the directory"):
        prepare(data, config)
    shutil.rmtree(train.directory)
    assert prepare(data, config).train[0][0].hash == train.hash
    (directory,) = (Path(str(data.cache_dir)) / "tokenizers").iterdir()
    specification = json.loads((directory / "tokenizer.json").read_text())
    specification["model"]["merges"].pop()
    (directory / "tokenizer.json").write_text(json.dumps(specification))
    with pytest.raises(ValueError, match="is damaged.*[Dd]elete it"):
        prepare(data, config)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged.*delete it"):
        prepare(data, config)


PREPARE = """
import logging, sys
import slmjax.data.encoding
from slmjax.data.config import DataConfig
from slmjax.data.preparation import prepare
from slmjax.data.stdlib_corpus import StdlibSource
from slmjax.data.tokenizers import BpeTokenizer

logging.basicConfig(level=logging.INFO)
slmjax.data.encoding._BATCH_BYTES = 20_000
data = DataConfig(path=sys.argv[1], cache_dir=sys.argv[2], heldout_fraction=0.2)
print("started", flush=True)
print(prepare(data, BpeTokenizer(vocab_size=300)).train[0][0].hash)
"""


def start(data: DataConfig, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, str(data.path), str(data.cache_dir)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | environment,
    )


def test_killed_at_a_part_and_two_at_once(data: DataConfig, tmp_path: Path) -> None:
    """A preparation continues from the parts of one that was killed; of two, one works, the other waits."""
    text = "\n".join(json.dumps({"text": f"{i} {text}"}) for i in range(20) for text in DOCUMENTS)
    big = of_path(data, tmp_path / "big.jsonl", text)
    expected = prepare(
        dataclasses.replace(big, cache_dir=str(tmp_path / "other")), BpeTokenizer(vocab_size=300)
    )
    victim = start(big, SLMJAX_FAULT="data.part:4=kill")
    victim.communicate(timeout=120)
    assert victim.returncode == -signal.SIGKILL
    cache = Path(str(data.cache_dir))
    (parts,) = (cache / "parts").iterdir()
    assert len(list(parts.iterdir())) == 5 and list((cache / "shards").glob(".*.tmp"))
    assert not [directory for directory in (cache / "shards").iterdir() if directory.name[0] != "."]
    owner = start(big, SLMJAX_FAULT="data.part:9=sleep")
    while not list(parts.glob("*9.npz")):
        time.sleep(0.02)
    other = start(big)
    assert other.stderr is not None
    while "waiting for it" not in (line := other.stderr.readline()):
        assert line, "it has ended"
    owner.kill()
    owner.communicate()
    output, messages = other.communicate(timeout=120)
    assert other.returncode == 0, messages
    assert "continues a preparation that was interrupted, from 10 parts" in messages
    assert output.split()[-1] == expected.train[0][0].hash
    # Nothing is left but the data.
    assert not list((cache / "parts").iterdir()) and not list((cache / "locks").iterdir())
    assert len(list((cache / "shards").iterdir())) == 1


def test_parts_of_other_text_and_damaged_parts_are_made_again(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmjax.data.encoding._BATCH_BYTES", 1000)
    expected = prepare(dataclasses.replace(data, cache_dir=f"{data.cache_dir}-other"), BYTES)
    written: list[int] = []

    def stop(point: str, number: int | None = None) -> None:
        if point == "data.part" and number is not None:
            written.append(number)
        if len(written) == 4 and point == "data.part":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("slmjax.faults.at", stop)
    with pytest.raises(ValueError, match="cannot be written.*Free space.*--data.cache-dir.*is kept"):
        prepare(data, BYTES)
    parts = sorted((Path(str(data.cache_dir)) / "parts").glob("*/*.npz"))
    assert [part.name for part in parts] == [f"part-00000{i}.npz" for i in range(4)]
    raw = bytearray(parts[0].read_bytes())
    raw[len(raw) // 2] ^= 1
    parts[0].write_bytes(raw)
    parts[1].write_bytes(parts[2].read_bytes())  # tokens of other text
    parts[3].write_bytes(b"")
    assert prepare(data, BYTES).train[0][0].hash == expected.train[0][0].hash
    assert written[4:7] == [0, 1, 3] and written[7] == 4


def test_a_stuck_owner_of_the_lock_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("slmjax.data.locks.STALE_SECONDS", 0.2)
    with locks.exclusive(tmp_path / "lock", what="it") as first:
        with locks.exclusive(tmp_path / "lock", what="it") as second:
            assert first and not second
    assert "waiting for it" in caplog.text and "is stuck" in caplog.text
    assert not list(tmp_path.iterdir())
    with locks.exclusive(tmp_path / "lock", what="it") as again:
        assert again


@pytest.mark.nightly
def test_memory_of_a_long_document_is_bounded(data: DataConfig, tmp_path: Path) -> None:
    texts = [document.text for document in StdlibSource().documents()]
    text = "".join(texts)
    BpeTokenizer(vocab_size=4096).build(texts).save(tmp_path / "tokenizer")
    (tmp_path / "long.txt").write_text((text * 6)[:50_000_000], encoding="utf-8")
    code = f"""
import resource
from slmjax.data.config import DataConfig
from slmjax.data.preparation import prepare
from slmjax.data.tokenizers import FileTokenizer
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare(DataConfig(path={str(tmp_path / "long.txt")!r}, cache_dir={str(data.cache_dir)!r}),
        FileTokenizer(path={str(tmp_path / "tokenizer")!r}))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(output.split()[-1]) < FIXED_MEMORY + MEMORY_PER_BYTE * 50_000_000


# The default corpus, and what is shown of a corpus ----------------------------------------------------------


def test_default_corpus_is_no_giveaway() -> None:
    """Neither tables nor noise are held out: gzip needs about two bits per byte."""
    fraction = DataConfig().heldout_fraction
    heldout = "".join(
        document.text for document in StdlibSource().documents() if is_held_out(document.id, fraction)
    ).encode()
    assert len(heldout) > 200_000
    assert 1.8 < 8 * len(gzip.compress(heldout, 9)) / len(heldout) < 2.4


def test_inspect_shows_figures_and_samples(data: DataConfig) -> None:
    shown = inspect(data, BYTES, num_samples=2)
    prepared = prepare(data, BYTES)
    train = prepared.train[0][0]
    assert json.loads(json.dumps(shown)) == shown
    assert shown["tokenizer"] == {"kind": "ByteTokenizer", "vocab_size": 258, "hash": prepared.tokenizer.hash}
    (source,) = shown["sources"]
    assert (
        source["train"]["documents"] + source["heldout"]["documents"]
        == source["bad_documents"]["documents"]
        == len(DOCUMENTS)
    )
    assert source["train"]["tokens"] == int(train.lengths.sum()) == source["train"]["bytes"] + 2 * len(train)
    assert source["train"]["tokens_per_document"]["longest"] == int(np.max(train.lengths))
    assert len(shown["samples"]) == 2
    for sample in shown["samples"]:
        assert DOCUMENTS[59].startswith(sample["text"][:9])
        assert sample["text"] == prepared.tokenizer.decode(train.tokens(sample["document"])[:100].tolist())
