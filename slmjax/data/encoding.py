"""From the documents of one source to its shard directories: held out or trained on, encoded, written.

The text of a document is encoded as one string: a prompt and its completion together, and a document of more
than max_document_bytes, which is encoded in windows that overlap, to the ids of the whole text (`spans.py`).
"""

import collections
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from slmjax.data.config import DataConfig, SourceConfig, Split
from slmjax.data.conversations import render_conversation
from slmjax.data.documents import BadCounts, Document, Gatekeeper, Problem
from slmjax.data.lost_text import LostTextMeter
from slmjax.data.marks import SpecialNames
from slmjax.data.shards import ShardWriter
from slmjax.data.spans import Span, TextTokens, join_windows, windows_of
from slmjax.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)

TRAIN = "train"
HELDOUT = "heldout"
_BATCH_BYTES = 4 << 20  # text that is handed to the tokenizer's threads at a time
_MAX_BYTES = 2**31 - 1  # lengths are int32


def is_held_out(key: str, fraction: float) -> bool:
    """Return whether a hash of the key (`Document.held_out_key`), uniform in [0, 1), is below the
    fraction.
    """
    return (
        int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8])
        < fraction * 2.0**64
    )


def divide(document: Document, data: DataConfig) -> Iterator[tuple[str, Document]]:
    """(TRAIN or HELDOUT, document): the whole document on one side, or its head and its tail."""
    if data.split is Split.DOCUMENTS:
        yield (
            HELDOUT if is_held_out(document.held_out_key(data.heldout_by), data.heldout_fraction) else TRAIN,
            document,
        )
        return
    if document.prompt or document.is_conversation:
        kind = "a conversation" if document.is_conversation else "a pair of prompt and completion"
        raise ValueError(f"{document.where}: {kind} cannot be cut in two: use --data.split documents")
    cut = int(len(document.text) * (1 - data.heldout_fraction))
    for side, text in ((TRAIN, document.text[:cut]), (HELDOUT, document.text[cut:])):
        if text:
            yield side, dataclasses.replace(document, text=text)


def write_source(
    source: SourceConfig,
    directory: Path,
    *,
    source_hash: str,
    tokenizer: Tokenizer,
    data: DataConfig,
    advance: Callable[[int], None],
) -> BadCounts:
    """Writes directory/train and, where something is held out, directory/heldout. `advance` is told the bytes
    done.

    Raises ValueError for bad documents as the policy says, and when a side would be empty.
    """
    gate = Gatekeeper(data.on_bad_document, max_bad_fraction=data.max_bad_fraction)
    sides = [TRAIN, HELDOUT] if data.heldout_fraction > 0 else [TRAIN]
    about = {"tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
    writers = {
        side: ShardWriter(directory / side, **about, source_name=source.describe(), source_hash=source_hash)
        for side in sides
    }
    written = dict.fromkeys(sides, 0)
    meters = {side: LostTextMeter(tokenizer, sample=side == TRAIN) for side in sides}
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
            meters[side].add(document.text, document.tokens.tolist(), marked=document.marked)
            written[side] += 1
            advance(num_bytes)
        gate.check(source.describe())
        _require_both_sides(source.describe(), written, data)
        for warning in gate.warnings():
            log.warning("%s: %s", source.describe(), warning)
        for side, writer in writers.items():
            writer.close(gate.counts, lost_text=meters[side].found())
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
            f" data.heldout_fraction={data.heldout_fraction:g}. Use --data.split tail, which cuts every "
            "document in two,"
            " or another --data.heldout-fraction (0 holds out nothing)."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EncodedDocument:
    tokens: np.ndarray  # with BOS and EOS
    scored: np.ndarray | None  # as in ShardWriter.add
    scored_bytes: int
    text: bytes  # without special tokens
    marked: tuple[str, list[int]] | None  # with their marks, where it has any, and its ids


@dataclasses.dataclass(kw_only=True)
class _Pending:
    """A document whose windows are being encoded."""

    side: str
    document: Document
    text: bytes
    scored: list[Span] | None  # bytes of the text that are scored; None: all of them
    windows: list[Span]  # one, but for a long text
    marked: bool = False  # marks in the text stand for special tokens
    ends_open: bool = True  # EOS comes last, and is scored
    encoded: list[TextTokens] = dataclasses.field(default_factory=list)  # of windows
    ids: list[int] | None = None  # of the whole, where spans are not needed, which take time

    @property
    def needs_spans(self) -> bool:
        return self.scored is not None or self.marked or len(self.windows) > 1

    @property
    def is_encoded(self) -> bool:
        return self.ids is not None or len(self.encoded) == len(self.windows)

    def finish(self, tokenizer: Tokenizer) -> _EncodedDocument:
        tokens = None if self.ids is not None else self._whole(tokenizer)
        ids = np.asarray(self.ids, np.int32) if tokens is None else tokens.ids
        text = self._plain_text(ids, tokenizer)
        if (sizes := tokenizer.token_bytes) is not None:
            assert int(sizes[ids].sum(dtype=np.int64)) == len(text), self.document.where
        scored = None
        scored_bytes = len(text)
        if self.scored is not None and tokens is not None:
            placed = tokenizer.marked_vocabulary.without_blanks(tokens, self.text) if self.marked else tokens
            held = placed.held(self.scored)
            is_text = ~np.isin(ids, list(tokenizer.special_ids.values()))
            scored_bytes = int((tokens.num_bytes() if sizes is None else sizes[ids])[held & is_text].sum())
            if (
                self.ends_open
            ):  # EOS follows what is scored, and so do the bytes at the end that the vocabulary drops
                scored_bytes += len(self.text) - int(tokens.ends.max(initial=0))
            scored = held
        # A conversation begins as its template has it.
        begins = not self.document.is_conversation and not (
            self.marked and ids[:1].tolist() == [tokenizer.bos_id]
        )
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
        """The text without special tokens."""
        if not self.marked:
            return self.text
        if tokenizer.token_bytes is not None:  # a special token may take the white space beside it with it
            return tokenizer.decode_bytes(ids.tolist())
        return tokenizer.marked_vocabulary.text_of(self.text.decode()).encode()

    def _whole(self, tokenizer: Tokenizer) -> TextTokens:
        """The tokens of the whole text, from those of its windows."""
        joined = join_windows(self.encoded, self.windows)
        # Windows disagree on such as a run of one character that is longer than their overlap: then nothing
        # but the whole will do.
        return (
            joined
            if joined is not None
            else tokenizer.encode_spans([self.text.decode()], marked=self.marked)[0]
        )


def _encoded(
    source: SourceConfig, *, gate: Gatekeeper, tokenizer: Tokenizer, data: DataConfig
) -> Iterator[tuple[str, _EncodedDocument]]:
    """Admitted documents in order, encoded many at a time."""
    waiting: collections.deque[_Pending] = collections.deque()
    queue: list[tuple[_Pending, str]] = []
    queued = 0
    for pending in _admitted(source, gate=gate, tokenizer=tokenizer, data=data):
        waiting.append(pending)
        for start, end in pending.windows:
            queue.append((pending, pending.text[start:end].decode()))
            queued += end - start
            if queued >= _BATCH_BYTES:
                _encode(queue, tokenizer)
                queued = 0
        while waiting and waiting[0].is_encoded:
            yield waiting[0].side, waiting.popleft().finish(tokenizer)
    _encode(queue, tokenizer)
    for pending in waiting:
        yield pending.side, pending.finish(tokenizer)


def _admitted(
    source: SourceConfig, *, gate: Gatekeeper, tokenizer: Tokenizer, data: DataConfig
) -> Iterator[_Pending]:
    """The documents that the policy lets in, each with the text that is encoded."""
    for found in source.documents():
        document = gate.admit(found)
        for side, half in divide(document, data) if document is not None else ():
            if not half.is_conversation:
                if data.special_tokens is SpecialNames.TEXT:
                    gate.look_for_names(half, tokenizer.special_names)
                yield _of_text(side, half, tokenizer=tokenizer, data=data)
            elif (
                pending := _of_conversation(side, half, gate=gate, tokenizer=tokenizer, data=data)
            ) is not None:
                yield pending


def _of_text(side: str, document: Document, *, tokenizer: Tokenizer, data: DataConfig) -> _Pending:
    prompt = document.prompt
    text = document.text
    marked = data.special_tokens is SpecialNames.ENCODE
    if marked:
        prompt, text = (tokenizer.marked_vocabulary.mark(part) for part in (prompt, text))
    begin = len(prompt.encode())
    whole = (prompt + text).encode()
    return _Pending(
        side=side,
        document=document,
        text=whole,
        scored=[(begin, len(whole))] if begin else None,
        marked=marked,
        windows=_windows(whole, document, data, marked=marked),
    )


def _of_conversation(
    side: str, document: Document, *, gate: Gatekeeper, tokenizer: Tokenizer, data: DataConfig
) -> _Pending | None:
    """None for a conversation that the chat template cannot put into text."""
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
        document=document,
        text=text,
        scored=rendered.answers,
        marked=True,
        ends_open=rendered.ends_open,
        windows=_windows(text, document, data, marked=True),
    )


def require_template(document: Document, template: str | None) -> None:
    """Raise ValueError for a conversation where there is no chat template."""
    if document.is_conversation and template is None:
        raise ValueError(
            f"{document.where}: the tokenizer has no chat template, which conversations need. Take one that "
            "has (FileTokenizer), or put the"
            " Jinja source into chat_template.jinja beside its tokenizer.json, and the special tokens that "
            "it writes into tokenizer.json"
        )


def _windows(text: bytes, document: Document, data: DataConfig, *, marked: bool) -> list[Span]:
    if len(text) > _MAX_BYTES:
        raise ValueError(
            f"{document.where}: a document of more than 2 GiB: split it into several files, or lines of a "
            ".jsonl"
        )
    return windows_of(text, data.max_document_bytes, marked=marked)


def _encode(queue: list[tuple[_Pending, str]], tokenizer: Tokenizer) -> None:
    """Encodes and empties the queue."""
    plain = [(pending, text) for pending, text in queue if not pending.needs_spans]
    spanned = [(pending, text) for pending, text in queue if pending.needs_spans and not pending.marked]
    marked = [(pending, text) for pending, text in queue if pending.marked]
    try:
        ids = tokenizer.encode_batch([text for _, text in plain])
        tokens = tokenizer.encode_spans([text for _, text in spanned])
        if marked:
            tokens += tokenizer.encode_spans([text for _, text in marked], marked=True)
    except ValueError as error:
        names = (
            f"{queue[0][0].document.where} to {queue[-1][0].document.where}"
            if len(queue) > 1
            else queue[0][0].document.where
        )
        raise ValueError(f"{names}: {error}") from error
    for (pending, _), of_text in zip(plain, ids, strict=True):
        pending.ids = of_text
    for (pending, _), of_window in zip([*spanned, *marked], tokens, strict=True):
        pending.encoded.append(of_window)
    queue.clear()
