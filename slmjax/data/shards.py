"""Token shards: one directory of documents as token ids, with checksums, for random access by many threads.

    manifest.json                 ShardManifest: counts, hashes, one ShardFile per file; with its own checksum
    index.npz                     lengths, num_bytes, scored_bytes: int32, one entry per document;
                                  edge_documents, edges: int32, the scored tokens (`scored.py`)
    tokens-00000.array_record     the ids, little-endian uint16 (vocabularies up to 65,536) or uint32
    text.bin                      only if the text is stored: the UTF-8 text of all documents, joined

A document is [BOS] ids [EOS]. It is stored as consecutive records of `record_tokens` ids (the last one
shorter), so that a window of a long document costs one or two small reads. `TokenShards.open` checks sizes,
checksums (once per process) and the range of the ids. Any fault raises a ValueError that says how to repair
it.
"""

import collections
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Bool, Int32, Integer

from slmjax.config import ConfigError, added_field, from_json, to_json
from slmjax.data.documents import BadCounts
from slmjax.data.lost_text import LostText
from slmjax.data.scored import ScoredTokens, edges_of
from slmjax.stored_json import DamagedFile, check_object, read_object

FORMAT_VERSION = 2
RECORD_TOKENS = 16_384
SHARD_FILE_BYTES = 256 << 20  # of raw ids in one tokens-*.array_record
_MAX_INT32 = 2**31 - 1
_INT32 = np.dtype("<i4")  # ids in this type have the bytes of "<u4"
_CACHED_RECORDS = 256  # up to 16 MiB of decoded ids in one TokenShards
_INDEX = ("lengths", "num_bytes", "scored_bytes", "edge_documents", "edges")  # arrays of index.npz
_WAY_OUT = (
    "Delete the directory and run `slmjax data prepare` (or the training) again, which writes it again."
)
_WAY_OUT_IN_USE = (
    "Delete the directory, and continue the run with `slmjax train --resume RUN`, which prepares the data "
    "again; the checkpoints of the run are not affected."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardFile:
    """Size and checksum of one file; of a file of ids also its contents in numbers."""

    name: str  # within the directory
    num_bytes: int  # size on disk
    sha256: str  # of the file
    num_records: int = 0  # of a token file
    min_id: int = 0  # smallest token id
    max_id: int = 0  # largest token id


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """The contents of a shard directory."""

    version: int  # of this format
    content_hash: str  # sha256 of ids, index and tokenizer: equal for equal data on any machine
    tokenizer_hash: str  # Tokenizer.hash
    vocab_size: int  # every id is below it
    source_name: str  # for messages
    source_hash: str  # SourceConfig.fingerprint()
    # how the source was split (`splitting.SplitRule`); "" in older manifests, which follow DataConfig.split
    split_rule: str = added_field("", before="")
    record_tokens: int  # ids per record
    num_documents: int
    num_tokens: int  # with BOS and EOS
    num_bytes: int  # UTF-8 bytes of the text, prompts included
    num_scored: int  # tokens that are scored as targets
    scored_bytes: int  # UTF-8 bytes of the text of these tokens
    bad_documents: BadCounts  # of the source, both sides of the split included
    lost_text: LostText = added_field(LostText(), before=LostText())  # by the tokenizer
    token_files: tuple[ShardFile, ...]
    other_files: tuple[ShardFile, ...]  # index.npz, and text.bin if the text is stored


def id_dtype(vocab_size: int) -> np.dtype:
    """Return little-endian uint16 if every id fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes a shard directory; nothing is readable before `close`.

    with ShardWriter(directory, tokenizer_hash=..., vocab_size=...) as writer:
        writer.add([bos, *ids, eos], num_bytes=len(text.encode()))
        manifest = writer.close()
    """

    def __init__(
        self,
        directory: Path,
        *,
        tokenizer_hash: str,
        vocab_size: int,
        source_name: str = "",
        source_hash: str = "",
        split_rule: str = "documents",
    ) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._about = {
            "tokenizer_hash": tokenizer_hash,
            "vocab_size": vocab_size,
            "source_name": source_name,
            "source_hash": source_hash,
            "split_rule": split_rule,
        }
        self._vocab_size = vocab_size
        self._dtype = id_dtype(vocab_size)
        self._digest = hashlib.sha256()
        self._index: dict[str, list[int]] = {name: [] for name in _INDEX}
        self._files: list[ShardFile] = []
        self._writer: Any = None
        self._text: Any = None
        self._start_file()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Close open files; after `close` there are none."""
        # Also after an error: open files would keep the temporary directory from being deleted on some
        # systems.
        for stream in (self._writer, self._text):
            if stream is not None:
                stream.close()
        self._writer = self._text = None

    def add(
        self,
        tokens: Integer[np.ndarray, " T"] | list[int],
        *,
        num_bytes: int,
        bounds: Sequence[int] | None = None,
        scored: Bool[np.ndarray, " T"] | None = None,
        scored_bytes: int | None = None,
        text: bytes | None = None,
    ) -> None:
        """Append one document.

        Args:
          tokens: its ids with BOS and EOS.
          num_bytes: UTF-8 bytes of its text.
          bounds: the smallest and the largest id, if they are known.
          scored: the tokens that are scored as targets; BOS never is. None: all of them.
          scored_bytes: UTF-8 bytes of the text of the scored tokens, required with `scored`.
          text: the text to store, in UTF-8.

        Raises:
          ValueError: there are no ids, some are outside the vocabulary, or the document is too long.
        """
        ids = np.asarray(tokens)
        document = len(self._index["lengths"])
        if bounds is None:
            bounds = int(ids.min(initial=self._vocab_size)), int(ids.max(initial=-1))
        low, high = bounds
        if ids.size == 0 or low < 0 or high >= self._vocab_size:
            raise ValueError(f"document {document} is empty or has ids outside 0..{self._vocab_size - 1}")
        # Lengths are stored as int32.
        if max(ids.size, num_bytes) > _MAX_INT32:
            raise ValueError(
                f"a document of {num_bytes} bytes is too long: split it into several (files, or lines of a "
                ".jsonl)"
            )
        if scored is not None:
            assert scored.shape == ids.shape and scored_bytes is not None, (
                f"document {document}: {scored.shape} of {ids.shape}"
            )
            edges = edges_of(scored).tolist()
            self._index["edges"] += edges
            self._index["edge_documents"] += [document] * len(edges)
        scored_bytes = num_bytes if scored_bytes is None else scored_bytes
        assert 0 <= scored_bytes <= num_bytes, (
            f"document {document}: {scored_bytes} scored bytes of {num_bytes}"
        )
        # Long documents are several records, so that a window reads only a part.
        for start in range(0, ids.size, RECORD_TOKENS):
            record = ids[start : start + RECORD_TOKENS]
            # The hash is of the ids, whatever the width in which they are stored.
            self._digest.update((record if record.dtype == _INT32 else record.astype("<u4")).data)
            if ids.size > RECORD_TOKENS:
                bounds = int(record.min()), int(record.max())
            # Two bytes per id halve the disk space for vocabularies up to 65,536.
            self._write_record(record.astype(self._dtype), *bounds)
        self._index["lengths"].append(ids.size)
        self._index["num_bytes"].append(num_bytes)
        self._index["scored_bytes"].append(scored_bytes)
        if text is not None:
            if self._text is None:
                self._text = (self._directory / "text.bin").open("wb")
            self._text.write(text)

    def close(
        self, bad_documents: BadCounts | None = None, *, lost_text: LostText | None = None
    ) -> ShardManifest:
        """Finish the files and write the manifest last."""
        assert self._index["lengths"], f"{self._directory}: no document to write"
        self._finish_file()
        index = {name: np.asarray(values, np.int32) for name, values in self._index.items()}
        np.savez(self._directory / "index.npz", allow_pickle=False, **index)
        others = [_shard_file(self._directory / "index.npz")]
        if self._text is not None:
            self._text.close()
            self._text = None
            others.append(_shard_file(self._directory / "text.bin"))
        scored = _scored_tokens(index)
        for values in _hashed_index(index):
            self._digest.update(values.astype("<i4").tobytes())
        self._digest.update(f"{self._about['tokenizer_hash']} {self._vocab_size}".encode())
        manifest = ShardManifest(
            version=FORMAT_VERSION,
            content_hash=self._digest.hexdigest(),
            record_tokens=RECORD_TOKENS,
            num_documents=len(index["lengths"]),
            num_tokens=int(index["lengths"].sum(dtype=np.int64)),
            num_bytes=int(index["num_bytes"].sum(dtype=np.int64)),
            num_scored=int(scored.counts().sum(dtype=np.int64)),
            scored_bytes=int(index["scored_bytes"].sum(dtype=np.int64)),
            bad_documents=bad_documents or BadCounts(),
            lost_text=lost_text or LostText(),
            token_files=tuple(self._files),
            other_files=tuple(others),
            **self._about,
        )
        body = to_json(manifest)
        # The manifest comes last: a directory without it is not read.
        (self._directory / "manifest.json").write_text(
            json.dumps({"manifest": body, "sha256": _json_digest(body)}, indent=1)
        )
        return manifest

    def _start_file(self) -> None:
        self._path = self._directory / f"tokens-{len(self._files):05d}.array_record"
        # group_size 1, since records are read one at a time. zstd would save 5 % of the disk space of short
        # records, and take three times as long.
        self._writer = ArrayRecordWriter(str(self._path), "group_size:1,snappy")
        self._in_file = {"num_records": 0, "min_id": self._vocab_size, "max_id": 0}
        self._file_bytes = 0

    def _write_record(self, ids: np.ndarray, min_id: int, max_id: int) -> None:
        if self._file_bytes + ids.nbytes > SHARD_FILE_BYTES:
            self._finish_file()
            self._start_file()
        self._writer.write(ids.tobytes())
        self._file_bytes += ids.nbytes
        self._in_file["num_records"] += 1
        self._in_file["min_id"] = min(self._in_file["min_id"], min_id)
        self._in_file["max_id"] = max(self._in_file["max_id"], max_id)

    def _finish_file(self) -> None:
        self._writer.close()
        self._writer = None
        self._files.append(_shard_file(self._path, **self._in_file))


class TokenShards:
    """The documents of one shard directory, read at random; may be shared by threads and pickled.

    lengths, num_bytes, num_scored, scored_bytes: int32 [documents]. Lengths count BOS and EOS. `num_scored`
    counts the tokens that are scored as targets (`scored`), and `scored_bytes` the UTF-8 bytes of their text;
    EOS has none.
    """

    def __init__(self, directory: Path, *, manifest: ShardManifest, index: dict[str, np.ndarray]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.lengths = index["lengths"]
        self.num_bytes = index["num_bytes"]
        self.scored_bytes = index["scored_bytes"]
        self._index = index
        self._scored = _scored_tokens(index)
        self.num_scored = self._scored.counts()
        num_records = -(-self.lengths.astype(np.int64) // manifest.record_tokens)
        self._first_record = np.concatenate([[0], np.cumsum(num_records)])
        self._first_of_file = np.concatenate(
            [[0], np.cumsum([file.num_records for file in manifest.token_files])]
        )
        self._readers: dict[int, Any] = {}
        self._cache: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: str | Path, *, tokenizer_hash: str | None = None) -> "TokenShards":
        """Open and verify a directory. ValueError if it is missing, damaged, or of another tokenizer."""
        directory = Path(directory).absolute()
        manifest = _read_manifest(directory)
        # Ids of another tokenizer would be valid numbers with another meaning.
        if tokenizer_hash not in (None, manifest.tokenizer_hash):
            raise ValueError(
                f"{directory} was written with tokenizer {manifest.tokenizer_hash[:16]}, not with this one"
                f" ({str(tokenizer_hash)[:16]}). Use the tokenizer it was prepared with, or run `slmjax data "
                "prepare` with this one."
            )
        for file in (*manifest.other_files, *manifest.token_files):
            _verify_file(directory / file.name, file)
        for file in manifest.token_files:
            _check_range(file.min_id, file.max_id, manifest.vocab_size, directory / file.name)
        with np.load(directory / "index.npz", allow_pickle=False) as arrays:
            index = {name: arrays[name] for name in _INDEX}
        # Everything is verified before the first batch, not in the middle of a run.
        shards = cls(directory, manifest=manifest, index=index)
        # Each file has a valid checksum, but the files may be of different writes.
        if shards._first_record[-1] != shards._first_of_file[-1] or len(shards) != manifest.num_documents:
            raise ValueError(f"{directory}: the index does not fit the token files. {_WAY_OUT}")
        return shards

    @property
    def hash(self) -> str:
        """A hash of the documents: equal for equal ids, bytes and scored tokens under the same tokenizer."""
        return self.manifest.content_hash

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, *, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, " T"]:
        """Return ids `start` to `stop` of a document as a new array. Only the needed records are read."""
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        assert 0 <= start <= stop <= length, (document, start, stop, length)
        size = self.manifest.record_tokens
        first = int(self._first_record[document])
        parts = [
            self._record(first + k)[max(start - k * size, 0) : stop - k * size]
            for k in range(start // size, -(-stop // size))
        ]
        return np.concatenate(parts or [np.zeros(0)]).astype(np.int32)

    def scored(self, document: int, *, start: int = 0, stop: int | None = None) -> Bool[np.ndarray, " T"]:
        """Return whether each of the tokens `start` to `stop` is scored as a target; BOS never is."""
        return self._scored.of(document, start=start, stop=stop)

    def text(self) -> bytes:
        """Return the text of all documents, joined. ValueError if it was not stored (held-out text is)."""
        path = self.directory / "text.bin"
        if not path.exists():
            raise ValueError(
                f"{self.directory} has no text, only ids. If it is held-out text, delete "
                f"{self.directory.parent}: it is prepared again"
            )
        return path.read_bytes()

    def _record(self, record: int) -> np.ndarray:
        with self._lock:
            if record in self._cache:
                self._cache.move_to_end(record)
                return self._cache[record]
        file = int(np.searchsorted(self._first_of_file, record, side="right")) - 1
        path = self.directory / self.manifest.token_files[file].name
        in_use = f"was damaged or replaced while it was in use. {_WAY_OUT_IN_USE}"
        try:
            raw = self._reader(file, path).read([record - int(self._first_of_file[file])])[0]
        except DamagedFile:
            raise
        except Exception as error:  # the library raises errors of several kinds
            raise DamagedFile(f"{path} cannot be read ({error}): it {in_use}") from error
        dtype = id_dtype(self.manifest.vocab_size)
        # The library has checksums, but another file in its place has good ones.
        if len(raw) != self._record_size(record) * dtype.itemsize:
            raise DamagedFile(f"{path} has another record: it {in_use}")
        ids = np.frombuffer(raw, dtype)
        # An id outside the vocabulary would index past the embedding without an error.
        _check_range(int(ids.min()), int(ids.max()), self.manifest.vocab_size, path)
        with self._lock:
            # Windows of a long document read the same records one after another.
            self._cache[record] = ids
            if len(self._cache) > _CACHED_RECORDS:
                self._cache.popitem(last=False)
        return ids

    def _record_size(self, record: int) -> int:
        """Return the number of ids of a record."""
        document = int(np.searchsorted(self._first_record, record, side="right")) - 1
        start = (record - int(self._first_record[document])) * self.manifest.record_tokens
        return min(self.manifest.record_tokens, int(self.lengths[document]) - start)

    def _reader(self, file: int, path: Path) -> Any:
        with self._lock:
            if file not in self._readers:
                # It was verified when the directory was opened, which may be long ago. It is hashed again
                # only if it was changed since.
                _verify_file(path, self.manifest.token_files[file])
                # No read-ahead, since access is random. Its reads are thread-safe: one reader serves all
                # threads.
                self._readers[file] = ArrayRecordReader(
                    str(path), "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32768
                )
            return self._readers[file]

    def __getstate__(self) -> dict[str, Any]:
        # Readers and locks cannot be pickled; they are created again on demand.
        return {"directory": self.directory, "manifest": self.manifest, "index": self._index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["directory"], manifest=state["manifest"], index=state["index"])


def _scored_tokens(index: dict[str, np.ndarray]) -> ScoredTokens:
    return ScoredTokens(lengths=index["lengths"], documents=index["edge_documents"], edges=index["edges"])


def _hashed_index(index: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the arrays that the content hash includes.

    The hash of plain text is that of version 1, which runs have in their data.json.
    """
    of_version_1 = [index["lengths"], index["num_bytes"], np.zeros_like(index["lengths"])]
    is_plain = len(index["edges"]) == 0 and np.array_equal(index["num_bytes"], index["scored_bytes"])
    return (
        of_version_1
        if is_plain
        else [*of_version_1, *(index[name] for name in ("scored_bytes", "edge_documents", "edges"))]
    )


# (path, size, modification time) -> sha256. A process verifies a file once, since hashing reads all of it.
_verified: dict[tuple[str, int, int], str] = {}


def _verify_file(path: Path, expected: ShardFile) -> None:
    if not path.exists():
        raise DamagedFile(f"{path} is missing. {_WAY_OUT}")
    status = path.stat()
    if status.st_size != expected.num_bytes:
        raise DamagedFile(
            f"{path} has {status.st_size} bytes, not {expected.num_bytes}: it was cut short or changed. "
            f"{_WAY_OUT}"
        )
    key = (os.fspath(path), status.st_size, status.st_mtime_ns)
    if key not in _verified:
        _verified[key] = file_sha256(path)
    if _verified[key] != expected.sha256:
        raise DamagedFile(f"{path} is damaged: its checksum is not the one in the manifest. {_WAY_OUT}")


def _read_manifest(directory: Path) -> ShardManifest:
    path = directory / "manifest.json"
    if not path.exists():
        raise ValueError(
            f"{directory} is not a complete shard directory: manifest.json is missing. {_WAY_OUT}"
        )
    damaged = f"the directory is damaged. {_WAY_OUT}"
    content = read_object(path, {"manifest": dict, "sha256": str}, remedy=damaged)
    body = content["manifest"]
    if _json_digest(body) != content["sha256"]:
        raise ValueError(f"{path} is damaged: its checksum does not match. {_WAY_OUT}")
    check_object(body, {"version": int}, name=str(path), remedy=damaged)
    if body["version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {body['version']}, this slmjax reads {FORMAT_VERSION}. {_WAY_OUT}"
        )
    try:
        manifest = from_json(ShardManifest, body)
    except ConfigError as error:
        raise ValueError(f"{path} is damaged: {error}. {_WAY_OUT}") from error
    # A manifest may come from anywhere: it must not name files outside its directory.
    for file in (*manifest.token_files, *manifest.other_files):
        if Path(file.name).name != file.name or len(file.name) > 255 or "\0" in file.name:
            raise ValueError(f"{path} names a file {file.name[:80]!r}, which is none of its directory")
    if manifest.record_tokens < 1 or manifest.vocab_size < 1:
        raise ValueError(f"{path} is damaged: a record has no tokens, or there is no vocabulary. {_WAY_OUT}")
    return manifest


def _check_range(min_id: int, max_id: int, vocab_size: int, path: Path) -> None:
    if min_id < 0 or max_id >= vocab_size:
        raise ValueError(
            f"{path} holds token ids {min_id}..{max_id}, outside the vocabulary of {vocab_size}. {_WAY_OUT}"
        )


def file_sha256(path: Path) -> str:
    """Return the hex digest of a file, which is read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _shard_file(path: Path, *, num_records: int = 0, min_id: int = 0, max_id: int = 0) -> ShardFile:
    return ShardFile(
        name=path.name,
        num_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        num_records=num_records,
        min_id=min_id,
        max_id=max_id,
    )


def _json_digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
