"""Shards give back what was written, notice every kind of damage, and may be shared by threads and
processes.
"""

import concurrent.futures
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.data import shards as shards_module
from slmjax.data.shards import RECORD_TOKENS, ShardWriter, TokenShards, id_dtype

VOCAB = 300
LENGTHS = (2, 5, RECORD_TOKENS, RECORD_TOKENS + 1, 3 * RECORD_TOKENS + 7)


def documents(lengths: tuple[int, ...] = LENGTHS, *, vocab_size: int = VOCAB) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, length) for length in lengths]


def write(
    directory: Path, contents: list[np.ndarray], *, vocab_size: int = VOCAB, **options: object
) -> TokenShards:
    with ShardWriter(directory, tokenizer_hash="hash of the tokenizer", vocab_size=vocab_size) as writer:
        for i, tokens in enumerate(contents):
            scored = np.arange(len(tokens)) >= i if i else None  # a prompt of i tokens, BOS included
            writer.add(
                tokens, num_bytes=10 * i, scored=scored, scored_bytes=9 * i, text=b"<%d>" % i, **options
            )
        writer.close()
    return TokenShards.open(directory)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return write(tmp_path_factory.mktemp("shards") / "train", documents())


def test_what_was_written_is_read(written: TokenShards) -> None:
    assert len(written) == len(LENGTHS)
    assert written.lengths.tolist() == list(LENGTHS) and written.lengths.dtype == np.int32
    assert written.num_bytes.tolist() == [0, 10, 20, 30, 40]
    assert written.scored_bytes.tolist() == [0, 9, 18, 27, 36]
    assert written.num_scored.tolist() == [length - max(i, 1) for i, length in enumerate(LENGTHS)]
    for i, tokens in enumerate(documents()):
        read = written.tokens(i)
        assert read.dtype == np.int32 and read.flags.writeable
        assert np.array_equal(read, tokens)
    assert written.text() == b"<0><1><2><3><4>"
    manifest = written.manifest
    assert (manifest.num_documents, manifest.num_tokens, manifest.num_bytes) == (5, sum(LENGTHS), 100)
    assert (manifest.num_scored, manifest.scored_bytes) == (sum(LENGTHS) - 1 - 1 - 2 - 3 - 4, 90)
    assert [file.num_records for file in manifest.token_files] == [1 + 1 + 1 + 2 + 4]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_window(written: TokenShards, data: st.DataObject) -> None:
    document = data.draw(st.integers(0, len(LENGTHS) - 1))
    start = data.draw(st.integers(0, LENGTHS[document]))
    stop = data.draw(st.integers(start, LENGTHS[document]))
    assert np.array_equal(written.tokens(document, start=start, stop=stop), documents()[document][start:stop])


# By hand: plain text, a pair, a conversation of two turns, the flag of BOS, a last token without a
# score, nothing scored.
FLAGS = ["0111", "0001", "00110011", "1110", "010", "000", "01", "0"]


def test_scored_tokens(tmp_path: Path) -> None:
    flags = [np.array([flag == "1" for flag in text]) for text in FLAGS]
    with ShardWriter(tmp_path, tokenizer_hash="t", vocab_size=VOCAB) as writer:
        for scored in flags:
            writer.add([0] * len(scored), num_bytes=10, scored=scored, scored_bytes=3)
        writer.close()
    shards = pickle.loads(pickle.dumps(TokenShards.open(tmp_path)))
    for document, scored in enumerate(flags):
        expected = [False, *scored[1:].tolist()]  # BOS never is
        assert shards.scored(document).tolist() == expected and shards.num_scored[document] == sum(expected)
        for start in range(len(scored)):
            for stop in range(start, len(scored) + 1):
                assert shards.scored(document, start=start, stop=stop).tolist() == expected[start:stop]
    assert shards.num_scored.dtype == np.int32


def test_scored_tokens_are_part_of_the_hash(tmp_path: Path) -> None:
    hashes = set()
    for name, options in {
        "plain": {},
        "pair": {"scored": np.array([False, False, True]), "scored_bytes": 1},
        "other bytes": {"scored": np.array([False, False, True]), "scored_bytes": 2},
        "all": {"scored": np.array([False, True, True]), "scored_bytes": 2},  # the same as plain text
    }.items():
        with ShardWriter(tmp_path / name, tokenizer_hash="t", vocab_size=VOCAB) as writer:
            writer.add([0, 5, 1], num_bytes=2, **options)
            hashes.add(writer.close().content_hash)
    assert len(hashes) == 3
    # That of plain text is that of version 1, which run directories have kept.
    assert "a760961599edcdbb5376b07152e465465e41c345fa5414adfc8a93225a64329c" in hashes


@pytest.mark.parametrize(("vocab_size", "num_bytes"), [(65_536, 2), (65_537, 4)])
def test_ids_take_two_bytes_where_they_can(tmp_path: Path, vocab_size: int, num_bytes: int) -> None:
    assert id_dtype(vocab_size).itemsize == num_bytes and id_dtype(vocab_size).byteorder in "<="
    shards = write(tmp_path / "s", [np.asarray([0, vocab_size - 1])], vocab_size=vocab_size)
    assert shards.tokens(0).tolist() == [0, vocab_size - 1]


def test_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "SHARD_FILE_BYTES", 3 * RECORD_TOKENS)  # one record and a half
    shards = write(tmp_path / "s", documents())
    assert len(shards.manifest.token_files) > 3
    assert all(np.array_equal(shards.tokens(i), tokens) for i, tokens in enumerate(documents()))


def test_hash_is_of_the_content(
    tmp_path: Path, written: TokenShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "SHARD_FILE_BYTES", 3 * RECORD_TOKENS)
    assert write(tmp_path / "other files", documents()).hash == written.hash
    changed = documents()
    changed[4][-1] = (changed[4][-1] + 1) % VOCAB
    assert write(tmp_path / "changed", changed).hash != written.hash
    joined = [np.concatenate(documents()[:2]), *documents()[2:]]
    assert write(tmp_path / "joined", joined).hash != written.hash


def test_threads_and_pickles(written: TokenShards) -> None:
    copy = pickle.loads(pickle.dumps(written))
    rng = np.random.default_rng(0)

    def check(seed: int) -> bool:
        document = int(rng.integers(len(LENGTHS)))
        start = seed % LENGTHS[document]
        return np.array_equal(copy.tokens(document, start=start), expected[document][start:])

    expected = documents()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(0, 60_000, 300)))


@pytest.mark.parametrize("tokens", [[], [0, VOCAB], [0, -1]])
def test_bad_ids_are_not_written(tmp_path: Path, tokens: list[int]) -> None:
    with (
        ShardWriter(tmp_path, tokenizer_hash="t", vocab_size=VOCAB) as writer,
        pytest.raises(ValueError, match="outside 0..299"),
    ):
        writer.add(np.asarray(tokens, int), num_bytes=1)
    assert not (tmp_path / "manifest.json").exists()


# Damage -----------------------------------------------------------------------------------------------------

FILES = ["tokens-00000.array_record", "index.npz", "text.bin", "manifest.json"]
TRY_AGAIN = "Delete the directory and run `slmjax data prepare`"


@pytest.fixture
def damaged(written: TokenShards, tmp_path: Path) -> Path:
    """A copy to be damaged. Its files are new to this process, so that they are verified."""
    return Path(shutil.copytree(written.directory, tmp_path / "copy"))


@pytest.mark.parametrize("name", FILES)
def test_missing_file(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    with pytest.raises(ValueError, match=f"missing.*{TRY_AGAIN}"):
        TokenShards.open(damaged)


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_empty_file(damaged: Path, name: str) -> None:
    raw = (damaged / name).read_bytes()
    for remaining in (len(raw) - 1, 0):
        (damaged / name).write_bytes(raw[:remaining])
        with pytest.raises(ValueError, match=f"(cut short|damaged).*{TRY_AGAIN}"):
            TokenShards.open(damaged)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit(damaged: Path, name: str) -> None:
    raw = bytearray((damaged / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (damaged / name).write_bytes(raw)
    with pytest.raises(ValueError, match=f"damaged.*{TRY_AGAIN}"):
        TokenShards.open(damaged)


def test_changed_figures_in_the_manifest(damaged: Path) -> None:
    content = json.loads((damaged / "manifest.json").read_text())
    content["manifest"]["vocab_size"] += 1
    (damaged / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"checksum does not match.*{TRY_AGAIN}"):
        TokenShards.open(damaged)


def rewrite_manifest(directory: Path, **changes: object) -> None:
    """A manifest with a valid checksum, but other contents."""
    content = json.loads((directory / "manifest.json").read_text())
    content["manifest"].update(changes)
    content["sha256"] = shards_module._json_digest(content["manifest"])
    (directory / "manifest.json").write_text(json.dumps(content))


def test_ids_beyond_the_vocabulary(damaged: Path) -> None:
    rewrite_manifest(damaged, vocab_size=200)
    with pytest.raises(ValueError, match="token ids 0..299, outside the vocabulary of 200"):
        TokenShards.open(damaged)


def test_ids_beyond_the_vocabulary_that_the_manifest_does_not_know_of(damaged: Path) -> None:
    content = json.loads((damaged / "manifest.json").read_text())
    files = [{**file, "max_id": 199} for file in content["manifest"]["token_files"]]
    rewrite_manifest(damaged, vocab_size=200, token_files=files)
    shards = TokenShards.open(damaged)
    with pytest.raises(ValueError, match="outside the vocabulary of 200"):
        shards.tokens(4)


def test_index_of_other_shards(damaged: Path) -> None:
    content = json.loads((damaged / "manifest.json").read_text())
    files = [{**file, "num_records": 8} for file in content["manifest"]["token_files"]]
    rewrite_manifest(damaged, token_files=files)
    with pytest.raises(ValueError, match=f"index does not fit.*{TRY_AGAIN}"):
        TokenShards.open(damaged)


def test_other_version_and_other_tokenizer(damaged: Path, written: TokenShards) -> None:
    rewrite_manifest(damaged, version=0)
    with pytest.raises(ValueError, match="format version 0"):
        TokenShards.open(damaged)
    with pytest.raises(ValueError, match="written with tokenizer hash of the tok.*not with this one"):
        TokenShards.open(written.directory, tokenizer_hash="another")


def test_files_are_verified_once(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    monkeypatch.setattr(
        shards_module,
        "file_sha256",
        lambda path, real=shards_module.file_sha256: (hashed.append(path), real(path))[1],
    )
    TokenShards.open(damaged)
    TokenShards.open(damaged)
    assert len(hashed) == 3


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "deleted", "other"])
def test_damage_while_it_is_in_use(
    damage: str, is_open: bool, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never other ids: an error that names the file and says how the run is continued."""
    monkeypatch.setattr("slmjax.data.shards._CACHED_RECORDS", 0)
    shards = TokenShards.open(damaged)
    if is_open:
        shards.tokens(0)
    path = damaged / "tokens-00000.array_record"
    raw = bytearray(path.read_bytes())
    if damage == "deleted":
        path.unlink()
    elif damage == "other":  # sound, and of other documents
        other = write(tmp_path / "other", documents((7, 6, 9, 8, 11, 2, 2, 2, 2)))
        path.write_bytes((other.directory / path.name).read_bytes())
    else:
        # In place, as a failing disk does: the open file has the damage, too.
        with path.open("r+b") as stream:
            if damage == "flipped":
                stream.seek(len(raw) // 2)
                stream.write(bytes([raw[len(raw) // 2] ^ 1]))
            else:
                stream.truncate(0 if damage == "empty" else len(raw) // 2)
    contents = documents()
    errors = []
    for document, tokens in enumerate(contents):
        try:
            assert np.array_equal(shards.tokens(document), tokens)
        except ValueError as error:
            errors.append(str(error))
    if damage == "deleted" and is_open:  # the open file is still there
        assert not errors
        return
    assert errors and all(str(path) in error and "Delete the directory" in error for error in errors)


def test_ids_without_text(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, tokenizer_hash="t", vocab_size=VOCAB) as writer:
        writer.add([0, 1], num_bytes=0)
        writer.close()
    with pytest.raises(ValueError, match="has no text, only ids"):
        TokenShards.open(tmp_path).text()
