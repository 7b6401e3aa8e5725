"""The documents of one source, split into training and held-out text, encoded, and written as shards.

The text of a document is encoded as one string: a prompt and its completion together. A document of more than
max_document_bytes is encoded in overlapping windows, to the ids of the complete text (`spans.py`).

Texts are encoded in batches of `_BATCH_BYTES`, in one thread (the tokenizer uses all cores), while another
reads documents and writes shards. The tokens of each batch are kept as a part (`parts.py`).

Memory: at most `FIXED_MEMORY`, and `MEMORY_PER_BYTE` times the UTF-8 bytes of the longest document, besides
the tokenizer and the index of the shards (24 bytes for each document). Of a vocabulary that is not
byte-level, the text of a document is also decoded to compare it, which takes more (`lost_text.py`).
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slmjax.data.config import DataConfig, SourceConfig
from slmjax.data.conversations import render_conversation
from slmjax.data.documents import BadCounts, Document, Gatekeeper, Problem
from slmjax.data.lost_text import LostTextMeter
from slmjax.data.marks import SpecialNames
from slmjax.data.parts import EncodedBatch, Parts
from slmjax.data.shards import ShardWriter
from slmjax.data.spans import Span, TextTokens, WindowJoin, windows_of
from slmjax.data.splitting import HELDOUT, TRAIN, SplitRule, split_document
from slmjax.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)

FIXED_MEMORY = 256 << 20  # bytes
MEMORY_PER_BYTE = 4
_BATCH_BYTES = 4 << 20  # text that the tokenizer's threads encode at a time
_MAX_BYTES = 2**31 - 1  # lengths are int32
_CHUNK = 1 << 20  # tokens that are looked up at a time


def write_source(
    source: SourceConfig,
    directory: Path,
    *,
    source_hash: str,
    tokenizer: Tokenizer,
    data: DataConfig,
    rule: SplitRule,
    parts: Parts,
    advance: Callable[[int], None],
) -> BadCounts:
    """Write directory/train and, if something is held out, directory/heldout; return the counts.

    Args:
      source: the documents.
      directory: of the shards.
      source_hash: the fingerprint of the source.
      tokenizer: encodes the documents.
      data: windows and the policy for bad documents.
      rule: which text is held out.
      parts: of this preparation, and of one before that was interrupted.
      advance: called with the number of bytes done.

    Raises:
      ValueError: bad documents, as the policy requires, or a side without documents.
    """
    gate = Gatekeeper(data.on_bad_document, max_bad_fraction=data.max_bad_fraction)
    sides = [TRAIN, HELDOUT] if data.heldout_fraction > 0 else [TRAIN]
    about = {"tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
    about |= {"source_name": source.describe(), "source_hash": source_hash, "split_rule": rule.value}
    writers = {side: ShardWriter(directory / side, **about) for side in sides}
    written = dict.fromkeys(sides, 0)
    # All held-out text is measured, since its bits per byte are reported; of training text a sample.
    meters = {side: LostTextMeter(tokenizer, sample=side == TRAIN) for side in sides}
    pending = _admitted(source, gate=gate, tokenizer=tokenizer, data=data, rule=rule)
    try:
        with _rare_collections(), _Encoder(tokenizer, parts, advance=advance) as encoder:
            for side, document in encoder.encoded(pending):
                writers[side].add(
                    document.tokens,
                    bounds=document.bounds,
                    num_bytes=len(document.text),
                    scored=document.scored,
                    scored_bytes=document.scored_bytes,
                    text=document.text if side == HELDOUT else None,
                )
                meters[side].add(document.text, document.tokens, marked=document.marked)
                written[side] += 1
        # Checked before the manifests are written: without them nothing can be read.
        gate.check(source.describe())
        _require_both_sides(source.describe(), written, data)
        for warning in gate.warnings():
            log.warning("%s: %s", source.describe(), warning)
        for side, writer in writers.items():
            writer.close(gate.counts, lost_text=meters[side].result())
    finally:
        for writer in writers.values():
            writer.abandon()
    return gate.counts


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python look for cycles of objects less often.

    A batch has thousands of lists without a cycle, and looking through them takes about 5 % of the time.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _require_both_sides(source_name: str, written: dict[str, int], data: DataConfig) -> None:
    empty = [side for side, count in written.items() if count == 0]
    if len(empty) == len(written):
        raise ValueError(f"{source_name} has no document with text: give another source")
    if empty:
        raise ValueError(
            f"{source_name}: none of its {sum(written.values())} documents is on the {empty[0]} side with "
            f"data.heldout_fraction={data.heldout_fraction:g}. Use --data.split tail, which splits every "
            "document, or another --data.heldout-fraction (0 holds out nothing)."
        )


# Encoding ---------------------------------------------------------------------------------------------------
class _PlainTokens(NamedTuple):
    """The tokens of a text that was encoded at once, and is scored as a whole."""

    tokens: np.ndarray  # with BOS and EOS
    bounds: Sequence[int]  # smallest and largest id


@dataclasses.dataclass(kw_only=True, slots=True)
class _EncodedDocument:
    tokens: np.ndarray  # with BOS and EOS
    bounds: Sequence[int] | None = None  # smallest and largest id, if they are known
    scored: np.ndarray | None  # as in ShardWriter.add
    scored_bytes: int
    text: bytes  # without special tokens
    marked: tuple[str, list[int]] | None  # the text with marks of special tokens, if any, and its ids


@dataclasses.dataclass(kw_only=True, slots=True)
class _Pending:
    """A document whose windows are being encoded."""

    side: str
    where: str
    is_conversation: bool
    text: bytes
    scored: list[Span] | None  # bytes of the text that are scored; None: all of them
    windows: list[Span]  # several for a long text
    marked: bool = False  # marks in the text stand for special tokens
    ends_open: bool = True  # EOS is appended, and scored
    plain: _PlainTokens | None = None  # if spans are not needed (they are slower)
    join: WindowJoin | None = None  # of the windows, once the first is encoded

    @property
    def needs_spans(self) -> bool:
        return self.scored is not None or self.marked or len(self.windows) > 1

    @property
    def is_encoded(self) -> bool:
        return self.plain is not None or (self.join is not None and self.join.is_complete)

    def add(self, encoded: _PlainTokens | TextTokens, tokenizer: Tokenizer) -> None:
        """Add the tokens of the next window."""
        if isinstance(encoded, _PlainTokens):
            self.plain = encoded
            return
        if self.join is None:
            keeps_spans = self.scored is not None or self.marked
            self.join = WindowJoin(self.windows, encode=self._encoder(tokenizer), keeps_spans=keeps_spans)
        self.join.add(encoded)

    def finish(self, tokenizer: Tokenizer) -> _EncodedDocument:
        if self.plain is not None:
            return _EncodedDocument(
                tokens=self.plain.tokens,
                bounds=self.plain.bounds,
                scored=None,
                scored_bytes=len(self.text),
                text=self.text,
                marked=None,
            )
        assert self.join is not None, self.where
        if self.join.num_cuts:
            log.warning(
                "%s: a run of text without a boundary for the tokenizer is cut in %d places: tokens there "
                "may differ from those of the complete text",
                self.where,
                self.join.num_cuts,
            )
        if self.scored is not None or self.marked:
            return self._finish_parts(tokenizer)
        ids = self.join.ids()
        _check_bytes(ids, self.text, tokenizer, where=self.where)
        tokens = np.empty(len(ids) + 2, np.int32)
        tokens[0] = tokenizer.bos_id
        tokens[1:-1] = ids
        tokens[-1] = tokenizer.eos_id
        return _EncodedDocument(
            tokens=tokens, scored=None, scored_bytes=len(self.text), text=self.text, marked=None
        )

    def _finish_parts(self, tokenizer: Tokenizer) -> _EncodedDocument:
        """Return a document of which parts are scored, or with special tokens."""
        assert self.join is not None, self.where
        tokens = self.join.tokens()
        ids = tokens.ids
        text = self._plain_text(ids, tokenizer)
        _check_bytes(ids, text, tokenizer, where=self.where)
        sizes = tokenizer.token_bytes
        scored = None
        scored_bytes = len(text)
        if self.scored is not None:
            trimmed = tokenizer.marked_vocabulary.without_blanks(tokens, self.text) if self.marked else tokens
            is_scored = trimmed.overlap_mask(self.scored)
            # Special tokens are scored but stand for no text.
            is_text = ~np.isin(ids, list(tokenizer.special_ids.values()))
            scored_bytes = int(
                (tokens.num_bytes() if sizes is None else sizes[ids])[is_scored & is_text].sum()
            )
            # EOS follows the scored text, and so do bytes at the end that the vocabulary drops.
            if self.ends_open:
                scored_bytes += len(self.text) - int(tokens.ends.max(initial=0))
            scored = is_scored
        # The template of a conversation decides whether it begins with BOS.
        begins = not self.is_conversation and not (self.marked and ids[:1].tolist() == [tokenizer.bos_id])
        ends = self.ends_open and not (self.marked and ids[-1:].tolist() == [tokenizer.eos_id])
        around = (int(begins), int(ends))
        marked = (self.text.decode(), ids.tolist()) if self.marked else None
        ids = np.pad(ids, around, constant_values=(tokenizer.bos_id, tokenizer.eos_id))
        if scored is not None:
            scored = np.pad(scored, around, constant_values=(False, True))
        return _EncodedDocument(
            tokens=ids, scored=scored, scored_bytes=min(scored_bytes, len(text)), text=text, marked=marked
        )

    def _plain_text(self, ids: np.ndarray, tokenizer: Tokenizer) -> bytes:
        """Return the text without special tokens."""
        if not self.marked:
            return self.text
        # A special token may include white space next to it.
        if tokenizer.token_bytes is not None:
            return tokenizer.decode_bytes(ids.tolist())
        return tokenizer.marked_vocabulary.text_of(self.text.decode()).encode()

    def _encoder(self, tokenizer: Tokenizer) -> Callable[[int, int], TextTokens]:
        """Return a function that encodes a range of the bytes of the text."""
        text = self.text
        marked = self.marked
        return lambda start, end: tokenizer.encode_spans([text[start:end].decode()], marked=marked)[0]


_Window = tuple[_Pending, Span]  # a document, and the bytes of its text


def _check_bytes(ids: np.ndarray, text: bytes, tokenizer: Tokenizer, *, where: str) -> None:
    """Require that the bytes of byte-level ids add up to the text, or bits per byte would be wrong."""
    if (sizes := tokenizer.token_bytes) is None:
        return
    # In chunks, since a long document has tens of millions of ids.
    chunks = (ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK))
    num_bytes = sum(int(sizes[chunk].sum(dtype=np.int64)) for chunk in chunks)
    _require_bytes(num_bytes, len(text), where=where)


def _require_bytes(actual: int, expected: int, *, where: str) -> None:
    # A damaged tokenizer.json may give tokens other bytes than the library does.
    if actual != expected:
        raise ValueError(
            f"{where}: {expected:,} bytes of text became tokens of {actual:,} bytes: tokenizer.json "
            "contradicts itself. Restore it, or name another tokenizer"
        )


class _Encoder:
    """Encodes documents in batches, one of them in the background."""

    def __init__(self, tokenizer: Tokenizer, parts: Parts, *, advance: Callable[[int], None]) -> None:
        self._tokenizer = tokenizer
        self._parts = parts
        self._advance = advance
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._queue: list[_Window] = []
        self._queued_bytes = 0
        self._num_batches = 0
        # The batch that is being encoded.
        self._batch: list[_Window] = []
        self._encoded: concurrent.futures.Future[list[_PlainTokens | TextTokens]] | None = None

    def __enter__(self) -> "_Encoder":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def encoded(self, documents: Iterator[_Pending]) -> Iterator[tuple[str, _EncodedDocument]]:
        """Yield the documents in their order, encoded."""
        waiting: collections.deque[_Pending] = collections.deque()
        for pending in documents:
            waiting.append(pending)
            for window in pending.windows:
                self._queue.append((pending, window))
                self._queued_bytes += window[1] - window[0]
                if self._queued_bytes >= _BATCH_BYTES:
                    self._start_batch()
            del pending
            # Documents keep their order, whichever of them is encoded first.
            while waiting and waiting[0].is_encoded:
                yield waiting[0].side, waiting.popleft().finish(self._tokenizer)
        if self._queue:
            self._start_batch()
        self._collect()
        while waiting:
            yield waiting[0].side, waiting.popleft().finish(self._tokenizer)

    def _start_batch(self) -> None:
        """Encode the queue in the background, after the batch before it."""
        self._collect()
        self._batch = self._queue
        self._queue = []
        self._queued_bytes = 0
        self._encoded = self._thread.submit(self._encode, self._num_batches, self._batch)
        self._num_batches += 1

    def _collect(self) -> None:
        """Wait for the batch, and pass its tokens to its documents."""
        if self._encoded is None:
            return
        for (pending, (start, end)), encoded in zip(self._batch, self._encoded.result(), strict=True):
            pending.add(encoded, self._tokenizer)
            self._advance(end - start)
        self._batch = []
        self._encoded = None

    def _encode(self, number: int, batch: Sequence[_Window]) -> list[_PlainTokens | TextTokens]:
        """Return the tokens of each window of a batch, from its part if there is one."""
        digest = self._digest(batch)
        encoded = self._parts.read(number, digest)
        if encoded is None:
            encoded = _encoded_batch(batch, self._tokenizer)
            self._parts.write(number, digest, encoded)
        plain = iter(_plain_tokens(batch, encoded, self._tokenizer))
        spanned = iter(encoded.spanned)
        return [next(spanned if pending.needs_spans else plain) for pending, _ in batch]

    def _digest(self, batch: Sequence[_Window]) -> str:
        """Return a hash of the windows of a batch, and of the kind of their tokens."""
        digest = hashlib.blake2b(digest_size=16)
        for pending, (start, end) in batch:
            text = memoryview(pending.text)[start:end]
            digest.update(f"{end - start} {pending.needs_spans} {pending.marked} ".encode())
            # Marks have another random part in each process.
            digest.update(
                self._tokenizer.marked_vocabulary.canonical(bytes(text)) if pending.marked else text
            )
        return digest.hexdigest()


def _encoded_batch(batch: Sequence[_Window], tokenizer: Tokenizer) -> EncodedBatch:
    """Return the tokens of a batch."""
    texts: dict[tuple[bool, bool], list[str]] = {(False, False): [], (True, False): [], (True, True): []}
    for pending, (start, end) in batch:
        texts[pending.needs_spans, pending.marked].append(pending.text[start:end].decode())
    try:
        # Encoding without spans is faster, and most documents do not need spans.
        lists = tokenizer.encode_batch(texts[False, False])
        spanned = iter(tokenizer.encode_spans(texts[True, False]))
        marked = iter(tokenizer.encode_spans(texts[True, True], marked=True) if texts[True, True] else ())
    except ValueError as error:
        first = batch[0][0].where
        last = batch[-1][0].where
        raise ValueError(f"{first if first == last else f'{first} to {last}'}: {error}") from error
    # One array for all texts: thousands of small ones take longer.
    flat: list[int] = []
    for ids in lists:
        flat.append(tokenizer.bos_id)
        flat += ids
        flat.append(tokenizer.eos_id)
    return EncodedBatch(
        documents=np.fromiter(flat, np.int32, len(flat)),
        lengths=np.asarray([len(ids) + 2 for ids in lists], np.int64),
        spanned=[next(marked if pending.marked else spanned) for pending, _ in batch if pending.needs_spans],
    )


def _plain_tokens(
    batch: Sequence[_Window], encoded: EncodedBatch, tokenizer: Tokenizer
) -> list[_PlainTokens]:
    """Return the documents of a batch that were encoded at once, checked as `_check_bytes` does."""
    tokens = encoded.documents
    if not len(tokens):
        return []
    ends = np.cumsum(encoded.lengths)
    starts = ends - encoded.lengths
    if (sizes := tokenizer.token_bytes) is not None:
        num_bytes = np.add.reduceat(sizes[tokens], starts, dtype=np.int64)
        num_bytes -= int(sizes[tokenizer.bos_id] + sizes[tokenizer.eos_id])
        texts = [pending for pending, _ in batch if not pending.needs_spans]
        for pending, count in zip(texts, num_bytes.tolist(), strict=True):
            _require_bytes(count, len(pending.text), where=pending.where)
    low = np.minimum.reduceat(tokens, starts).tolist()
    high = np.maximum.reduceat(tokens, starts).tolist()
    parts = np.split(tokens, ends[:-1])
    return [_PlainTokens(part, bounds) for part, *bounds in zip(parts, low, high, strict=True)]


# Documents --------------------------------------------------------------------------------------------------
def _admitted(
    source: SourceConfig, *, gate: Gatekeeper, tokenizer: Tokenizer, data: DataConfig, rule: SplitRule
) -> Iterator[_Pending]:
    """Yield the documents that the policy admits, each with the text to encode."""
    for candidate in source.documents():
        pending = _pending_parts(candidate, gate=gate, tokenizer=tokenizer, data=data, rule=rule)
        # A long document needs memory only once: as the text to encode.
        del candidate
        while pending:
            yield pending.popleft()


def _pending_parts(
    candidate: Document, *, gate: Gatekeeper, tokenizer: Tokenizer, data: DataConfig, rule: SplitRule
) -> collections.deque[_Pending]:
    """Return the text of a document to encode: none, all of it on one side, or its head and its tail."""
    parts: collections.deque[_Pending] = collections.deque()
    document = gate.admit(candidate)
    for side, half in split_document(document, data, rule=rule) if document is not None else ():
        if half.is_conversation:
            pending = _pending_conversation(side, half, gate=gate, tokenizer=tokenizer, data=data)
            parts += [] if pending is None else [pending]
            continue
        # With `encode` names are special tokens, and nothing needs to be reported.
        if data.special_tokens is SpecialNames.TEXT:
            gate.look_for_names(half, tokenizer.special_names)
        parts.append(_pending_text(side, half, tokenizer=tokenizer, data=data))
    return parts


def _pending_text(side: str, document: Document, *, tokenizer: Tokenizer, data: DataConfig) -> _Pending:
    prompt = document.prompt
    text = document.text
    marked = data.special_tokens is SpecialNames.ENCODE
    if marked:
        prompt, text = (tokenizer.marked_vocabulary.mark(part) for part in (prompt, text))
    begin = len(prompt.encode())
    encoded = (prompt + text).encode()
    return _Pending(
        side=side,
        where=document.where,
        is_conversation=document.is_conversation,
        text=encoded,
        scored=[(begin, len(encoded))] if begin else None,
        marked=marked,
        windows=_windows(encoded, document, data, marked=marked),
    )


def _pending_conversation(
    side: str, document: Document, *, gate: Gatekeeper, tokenizer: Tokenizer, data: DataConfig
) -> _Pending | None:
    """Return the text to encode; None for a conversation that the chat template cannot render."""
    require_template(document, tokenizer.chat_template)
    try:
        messages = json.loads(document.text)
        rendered = render_conversation(
            tokenizer, messages, turns=data.scored_turns, names=data.special_tokens
        )
    except (ValueError, RecursionError) as error:
        gate.refuse(document, Problem.BAD_CONVERSATION, str(error))
        return None
    if rendered.ended_by is not None and rendered.ended_by not in tokenizer.end_ids:
        gate.note_end(tokenizer.name_of(rendered.ended_by) or "")
    text = rendered.text.encode()
    return _Pending(
        side=side,
        where=document.where,
        is_conversation=document.is_conversation,
        text=text,
        scored=rendered.answers,
        marked=True,
        ends_open=rendered.ends_open,
        windows=_windows(text, document, data, marked=True),
    )


def require_template(document: Document, template: str | None) -> None:
    """Raise ValueError for a conversation if there is no chat template."""
    if document.is_conversation and template is None:
        raise ValueError(
            f"{document.where}: the tokenizer has no chat template, which conversations need. Use a "
            "tokenizer with a template (FileTokenizer), or put the Jinja source into chat_template.jinja "
            "next to its tokenizer.json, and the special tokens that it writes into tokenizer.json"
        )


def _windows(text: bytes, document: Document, data: DataConfig, *, marked: bool) -> list[Span]:
    if len(text) > _MAX_BYTES:
        raise ValueError(
            f"{document.where}: a document of more than 2 GiB: split it into several files, or lines of a "
            ".jsonl"
        )
    if len(text) <= data.max_document_bytes:
        return [(0, len(text))]
    return windows_of(text, data.max_document_bytes, marked=marked)
