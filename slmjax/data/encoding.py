"""From the documents of one source to its shard directories: held out or trained on, cut into parts, encoded, written.

A document of more than max_document_bytes is encoded in parts, and the ids of its parts are joined: it stays one
document. Parts end before a single blank between printable characters where there is one, which is where the
pre-tokenizers of byte-level vocabularies end a word too, so that the ids are those of the whole text.
"""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from slmjax.data.config import DataConfig, SourceConfig, Split
from slmjax.data.documents import BadCounts, Document, Gatekeeper
from slmjax.data.shards import ShardWriter
from slmjax.data.tokenizers import Tokenizer

TRAIN, HELDOUT = "train", "heldout"
_BATCH_BYTES = 4 << 20  # text that is handed to the tokenizer's threads at a time
_CUT_SEARCH = 4096  # bytes before the end of a part in which a good place to cut is looked for
_CUT = re.compile(rb"[!-~](?= [!-~])")
_MAX_BYTES = 2**31 - 1  # lengths are int32


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a hash of the key (`Document.held_out_key`), uniform in [0, 1), is below the fraction."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8]) < fraction * 2.0**64


def divide(document: Document, data: DataConfig) -> Iterator[tuple[str, Document]]:
    """(TRAIN or HELDOUT, document): the whole document on one side, or its head and its tail."""
    if data.split is Split.DOCUMENTS:
        yield HELDOUT if is_held_out(document.held_out_key(data.heldout_by), data.heldout_fraction) else TRAIN, document
        return
    if document.prompt:
        raise ValueError(f"{document.where}: pairs of prompt and completion cannot be cut in two: use --data.split documents")
    cut = int(len(document.text) * (1 - data.heldout_fraction))
    for side, text in ((TRAIN, document.text[:cut]), (HELDOUT, document.text[cut:])):
        if text:
            yield side, dataclasses.replace(document, text=text)


def text_parts(text: str, max_bytes: int) -> list[str]:
    """The text in parts of at most `max_bytes` UTF-8 bytes (at least 4), which joined are the text; never inside a character."""
    raw = text.encode()
    parts = []
    start = 0
    while len(raw) - start > max_bytes:
        end = start + max_bytes
        searched = max(end - _CUT_SEARCH, start)
        blanks = [match.end() for match in _CUT.finditer(raw, searched, min(end + 2, len(raw))) if match.end() <= end]
        if blanks:
            end = blanks[-1]
        while raw[end] & 0xC0 == 0x80:  # a continuation byte: inside a character
            end -= 1
        parts.append(raw[start:end].decode())
        start = end
    return [*parts, raw[start:].decode()]


def write_source(
    source: SourceConfig, directory: Path, *, source_hash: str, tokenizer: Tokenizer, data: DataConfig, advance: Callable[[int], None]
) -> BadCounts:
    """Writes directory/train and, where something is held out, directory/heldout. `advance` is told the bytes done.

    Raises ValueError for bad documents as the policy says, and when a side would be empty.
    """
    gate = Gatekeeper(data.on_bad_document, max_bad_fraction=data.max_bad_fraction)
    sides = [TRAIN, HELDOUT] if data.heldout_fraction > 0 else [TRAIN]
    about = {"tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
    writers = {side: ShardWriter(directory / side, **about, source_name=source.describe(), source_hash=source_hash) for side in sides}
    written = dict.fromkeys(sides, 0)
    try:
        for side, document in _encoded(source, gate=gate, tokenizer=tokenizer, data=data):
            num_bytes = len(document.text)
            writers[side].add(
                document.tokens,
                num_bytes=num_bytes,
                scored=document.scored,
                scored_bytes=document.scored_bytes,
                text=document.text if side == HELDOUT else None,
            )
            written[side] += 1
            advance(num_bytes)
        gate.check(source.describe())
        _require_both_sides(source.describe(), written, data)
        for writer in writers.values():
            writer.close(gate.counts)
    finally:
        for writer in writers.values():
            writer.abandon()
    return gate.counts


def _require_both_sides(source_name: str, written: dict[str, int], data: DataConfig) -> None:
    empty = [side for side, count in written.items() if count == 0]
    if len(empty) == len(written):
        raise ValueError(f"{source_name} holds no document with text in it: give another source")
    if empty:
        raise ValueError(
            f"{source_name}: of its {sum(written.values())} documents none falls to the {empty[0]} side at"
            f" data.heldout_fraction={data.heldout_fraction:g}. Use --data.split tail, which cuts every document in two,"
            " or another --data.heldout-fraction (0 holds out nothing)."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EncodedDocument:
    tokens: np.ndarray  # with BOS and EOS
    scored: np.ndarray | None  # as in ShardWriter.add
    scored_bytes: int
    text: bytes


@dataclasses.dataclass(kw_only=True)
class _Pending:
    """A document whose parts are being encoded."""

    side: str
    document: Document
    num_prompt_parts: int
    num_parts: int
    ids: list[np.ndarray] = dataclasses.field(default_factory=list)

    def finish(self, tokenizer: Tokenizer) -> _EncodedDocument:
        bos, eos = (np.asarray([id], np.int32) for id in (tokenizer.bos_id, tokenizer.eos_id))
        tokens = np.concatenate([bos, *self.ids, eos])
        text = (self.document.prompt + self.document.text).encode()
        if tokenizer.token_bytes is not None:
            assert int(tokenizer.token_bytes[tokens[1:-1]].sum(dtype=np.int64)) == len(text), self.document.where
        scored = None
        if self.num_prompt_parts:
            scored = np.arange(len(tokens)) > sum(len(ids) for ids in self.ids[: self.num_prompt_parts])
        return _EncodedDocument(tokens=tokens, scored=scored, scored_bytes=len(self.document.text.encode()), text=text)


def _encoded(source: SourceConfig, *, gate: Gatekeeper, tokenizer: Tokenizer, data: DataConfig) -> Iterator[tuple[str, _EncodedDocument]]:
    """Admitted documents in order, encoded many at a time."""
    waiting: collections.deque[_Pending] = collections.deque()
    queue: list[tuple[_Pending, str]] = []
    queued = 0
    for found in source.documents():
        document = gate.admit(found)
        for side, half in divide(document, data) if document is not None else ():
            prompt = _parts_of(half.prompt, half, data) if half.prompt else []
            parts = [*prompt, *_parts_of(half.text, half, data)]
            waiting.append(_Pending(side=side, document=half, num_prompt_parts=len(prompt), num_parts=len(parts)))
            for part in parts:
                queue.append((waiting[-1], part))
                queued += len(part)
                if queued >= _BATCH_BYTES:
                    _encode(queue, tokenizer)
                    queued = 0
            while waiting and len(waiting[0].ids) == waiting[0].num_parts:
                yield waiting[0].side, waiting.popleft().finish(tokenizer)
    _encode(queue, tokenizer)
    for pending in waiting:
        yield pending.side, pending.finish(tokenizer)


def _parts_of(text: str, document: Document, data: DataConfig) -> list[str]:
    if len(text) > _MAX_BYTES // 4 and len(text.encode()) > _MAX_BYTES:
        raise ValueError(f"{document.where}: a document of more than 2 GiB: split it into several files, or lines of a .jsonl")
    return text_parts(text, data.max_document_bytes)


def _encode(queue: list[tuple[_Pending, str]], tokenizer: Tokenizer) -> None:
    """Encodes and empties the queue."""
    try:
        encoded = tokenizer.encode_batch([part for _, part in queue])
    except ValueError as error:
        names = f"{queue[0][0].document.where} to {queue[-1][0].document.where}" if len(queue) > 1 else queue[0][0].document.where
        raise ValueError(f"{names}: {error}") from error
    for (pending, _), ids in zip(queue, encoded, strict=True):
        pending.ids.append(np.asarray(ids, np.int32))
    queue.clear()
