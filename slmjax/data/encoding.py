"""The documents of one source, split into training and held-out text, encoded, and written as shards.

The text of a document is encoded as one string: a prompt and its completion together. A document of more than
max_document_bytes is encoded in overlapping windows, to the ids of the complete text (`spans.py`).
"""

import collections
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from slmjax.data.config import DataConfig, SourceConfig
from slmjax.data.conversations import render_conversation
from slmjax.data.documents import BadCounts, Document, Gatekeeper, Problem
from slmjax.data.lost_text import LostTextMeter
from slmjax.data.marks import SpecialNames
from slmjax.data.shards import ShardWriter
from slmjax.data.spans import Span, TextTokens, join_windows, windows_of
from slmjax.data.splitting import HELDOUT, TRAIN, SplitRule, split_document
from slmjax.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)

_BATCH_BYTES = 4 << 20  # text that the tokenizer's threads encode at a time
_MAX_BYTES = 2**31 - 1  # lengths are int32


def write_source(
    source: SourceConfig,
    directory: Path,
    *,
    source_hash: str,
    tokenizer: Tokenizer,
    data: DataConfig,
    rule: SplitRule,
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
      advance: called with the number of bytes done.

    Raises:
      ValueError: bad documents, as the policy requires, or a side without documents.
    """
    gate = Gatekeeper(data.on_bad_document, max_bad_fraction=data.max_bad_fraction)
    sides = [TRAIN, HELDOUT] if data.heldout_fraction > 0 else [TRAIN]
    about = {"tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
    writers = {
        side: ShardWriter(
            directory / side,
            **about,
            source_name=source.describe(),
            source_hash=source_hash,
            split_rule=rule.value,
        )
        for side in sides
    }
    written = dict.fromkeys(sides, 0)
    # All held-out text is measured, since its bits per byte are reported; of training text a sample.
    meters = {side: LostTextMeter(tokenizer, sample=side == TRAIN) for side in sides}
    try:
        for side, document in _encoded(source, gate=gate, tokenizer=tokenizer, data=data, rule=rule):
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EncodedDocument:
    tokens: np.ndarray  # with BOS and EOS
    scored: np.ndarray | None  # as in ShardWriter.add
    scored_bytes: int
    text: bytes  # without special tokens
    marked: tuple[str, list[int]] | None  # the text with marks of special tokens, if any, and its ids


@dataclasses.dataclass(kw_only=True)
class _Pending:
    """A document whose windows are being encoded."""

    side: str
    document: Document
    text: bytes
    scored: list[Span] | None  # bytes of the text that are scored; None: all of them
    windows: list[Span]  # several for a long text
    marked: bool = False  # marks in the text stand for special tokens
    ends_open: bool = True  # EOS is appended, and scored
    encoded: list[TextTokens] = dataclasses.field(default_factory=list)  # of windows
    ids: list[int] | None = None  # of the text, if spans are not needed (they are slower)

    @property
    def needs_spans(self) -> bool:
        return self.scored is not None or self.marked or len(self.windows) > 1

    @property
    def is_encoded(self) -> bool:
        return self.ids is not None or len(self.encoded) == len(self.windows)

    def finish(self, tokenizer: Tokenizer) -> _EncodedDocument:
        tokens = None if self.ids is not None else self._all_tokens(tokenizer)
        ids = np.asarray(self.ids, np.int32) if tokens is None else tokens.ids
        text = self._plain_text(ids, tokenizer)
        if (sizes := tokenizer.token_bytes) is not None:
            # The bytes of byte-level ids must add up to the text, or bits per byte would be wrong.
            assert int(sizes[ids].sum(dtype=np.int64)) == len(text), self.document.where
        scored = None
        scored_bytes = len(text)
        if self.scored is not None and tokens is not None:
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
        """Return the text without special tokens."""
        if not self.marked:
            return self.text
        # A special token may include white space next to it.
        if tokenizer.token_bytes is not None:
            return tokenizer.decode_bytes(ids.tolist())
        return tokenizer.marked_vocabulary.text_of(self.text.decode()).encode()

    def _all_tokens(self, tokenizer: Tokenizer) -> TextTokens:
        """Return the tokens of the complete text, from those of its windows."""
        joined = join_windows(self.encoded, self.windows)
        # Windows disagree, for example, on a run of one character that is longer than their overlap. Then the
        # complete text must be encoded at once.
        return (
            joined
            if joined is not None
            else tokenizer.encode_spans([self.text.decode()], marked=self.marked)[0]
        )


def _encoded(
    source: SourceConfig, *, gate: Gatekeeper, tokenizer: Tokenizer, data: DataConfig, rule: SplitRule
) -> Iterator[tuple[str, _EncodedDocument]]:
    """Yield admitted documents in order, encoded in batches."""
    waiting: collections.deque[_Pending] = collections.deque()
    queue: list[tuple[_Pending, str]] = []
    queued = 0
    for pending in _admitted(source, gate=gate, tokenizer=tokenizer, data=data, rule=rule):
        waiting.append(pending)
        for start, end in pending.windows:
            queue.append((pending, pending.text[start:end].decode()))
            queued += end - start
            if queued >= _BATCH_BYTES:
                _encode(queue, tokenizer)
                queued = 0
        # Documents keep their order, whichever of them is encoded first.
        while waiting and waiting[0].is_encoded:
            yield waiting[0].side, waiting.popleft().finish(tokenizer)
    _encode(queue, tokenizer)
    for pending in waiting:
        yield pending.side, pending.finish(tokenizer)


def _admitted(
    source: SourceConfig, *, gate: Gatekeeper, tokenizer: Tokenizer, data: DataConfig, rule: SplitRule
) -> Iterator[_Pending]:
    """Yield the documents that the policy admits, each with the text to encode."""
    for candidate in source.documents():
        document = gate.admit(candidate)
        for side, half in split_document(document, data, rule=rule) if document is not None else ():
            if not half.is_conversation:
                # With `encode` names are special tokens, and nothing needs to be reported.
                if data.special_tokens is SpecialNames.TEXT:
                    gate.look_for_names(half, tokenizer.special_names)
                yield _pending_text(side, half, tokenizer=tokenizer, data=data)
            elif (
                pending := _pending_conversation(side, half, gate=gate, tokenizer=tokenizer, data=data)
            ) is not None:
                yield pending


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
        document=document,
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
        document=document,
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
    return windows_of(text, data.max_document_bytes, marked=marked)


def _encode(queue: list[tuple[_Pending, str]], tokenizer: Tokenizer) -> None:
    """Encode and empty the queue."""
    plain = [(pending, text) for pending, text in queue if not pending.needs_spans]
    spanned = [(pending, text) for pending, text in queue if pending.needs_spans and not pending.marked]
    marked = [(pending, text) for pending, text in queue if pending.marked]
    try:
        # Encoding without spans is faster, and most documents do not need spans.
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
    for (pending, _), text_ids in zip(plain, ids, strict=True):
        pending.ids = text_ids
    for (pending, _), window_tokens in zip([*spanned, *marked], tokens, strict=True):
        pending.encoded.append(window_tokens)
    queue.clear()
