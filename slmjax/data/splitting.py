"""Which text is held out: entire documents, chosen by a hash, or the last part of each document.

    rule = split_rule(source, data)                       # reads documents until both sides have one
    for side, part in split_document(document, data, rule=rule): ...

Documents are chosen by a hash of their content or name, so that adding text moves none of them to the other
side. If the hash leaves a side empty, as it does for the one document of a text file, the end of each
document is held out instead (`SplitRule.BOUNDARY`).
"""

import dataclasses
import enum
import hashlib
from collections.abc import Iterator

from slmjax.data.config import DataConfig, SourceConfig, Split
from slmjax.data.documents import Document, Gatekeeper

TRAIN = "train"
HELDOUT = "heldout"
# If none of the first documents can be used, the rest is not read: a field may be misnamed.
_HOPELESS = 1000
# The cut is moved to a boundary of the text by at most this fraction of the held-out part.
_SLACK = 0.25
_BOUNDARIES = ("\n\n", "\n", " ")  # paragraphs, lines, words


class SplitRule(enum.Enum):
    """How a source was split."""

    DOCUMENTS = "documents"  # entire documents, chosen by a hash
    TAIL = "tail"  # the last characters of each document
    # the last part of each document, from a paragraph, line or word on, since the hash left a side empty
    BOUNDARY = "boundary"


def is_held_out(key: str, fraction: float) -> bool:
    """Return whether a hash of the key, uniform in [0, 1), is below the fraction.

    The key is `Document.held_out_key`.
    """
    return (
        # Independent of other documents, so that adding text moves none of them to the other side.
        int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8])
        < fraction * 2.0**64
    )


def little_text_note(source: str, *, held_out: int, total: int, fraction: float) -> str:
    """Return a sentence if far less of a source is held out than the fraction asked for; empty otherwise.

    Args:
      source: its name.
      held_out: bytes.
      total: bytes of both sides.
      fraction: `DataConfig.heldout_fraction`.
    """
    # Documents are drawn by a hash: where few are large, the part that is held out may be anything.
    if held_out >= fraction * total / 4:
        return ""
    return (
        f"{source}: only {held_out:,} of {total:,} bytes ({100 * held_out / total:.2g}%) are held out, and "
        f"not {100 * fraction:g}%: its documents are few or of very different lengths, and results on so "
        "little text are noise. --data.split tail holds out the end of each document"
    )


def split_rule(source: SourceConfig, data: DataConfig) -> SplitRule:
    """Return how a source is split; reads its documents until both sides have one.

    Raises:
      ValueError: no document can be used, too many are bad, or one side would have no text.
    """
    gate = Gatekeeper(data.on_bad_document, max_bad_fraction=data.max_bad_fraction)
    sides: set[str] = set()
    num_good = 0
    longest = 0
    kinds: set[str] = set()
    expected = {TRAIN, HELDOUT} if data.heldout_fraction > 0 else {TRAIN}
    for candidate in source.documents():
        document = gate.admit(candidate)
        if document is None:
            # More documents would not help: most likely a field has another name.
            if num_good == 0 and gate.counts.documents >= _HOPELESS:
                gate.check(source.describe())
            continue
        num_good += 1
        longest = max(longest, len(document.text))
        kinds.add(_unsplittable(document))
        sides.add(_side(document, data))
        if data.split is Split.TAIL or sides >= expected:
            break
    if not num_good:
        gate.check(source.describe())
        raise ValueError(f"{source.describe()} has no document with text: give another source")
    if data.split is Split.TAIL or sides >= expected:
        return SplitRule.TAIL if data.split is Split.TAIL else SplitRule.DOCUMENTS
    _check_tails(source.describe(), data, num_good=num_good, longest=longest, kinds=kinds - {""})
    return SplitRule.BOUNDARY


def _check_tails(name: str, data: DataConfig, *, num_good: int, longest: int, kinds: set[str]) -> None:
    """Raise ValueError unless holding out the end of each document gives text for both sides."""
    fraction = data.heldout_fraction
    if kinds or fraction >= 1 or longest < 2:
        why = (
            f"it has {sorted(kinds)[0]}, of which no part can be held out"
            if kinds
            else "nothing would be left to train on"
            if fraction >= 1
            else "its text is too short to split"
        )
        raise ValueError(
            f"{name}: its {num_good} document(s) are all on one side with data.heldout_fraction="
            f"{fraction:g}, and {why}. Give more documents, or another --data.heldout-fraction (0 holds out "
            "nothing)."
        )


def split_document(
    document: Document, data: DataConfig, *, rule: SplitRule
) -> Iterator[tuple[str, Document]]:
    """Yield (TRAIN or HELDOUT, document): the document on one side, or its head and its tail."""
    if rule is SplitRule.DOCUMENTS:
        yield _side(document, data), document
        return
    if kind := _unsplittable(document):
        raise ValueError(f"{document.where}: {kind} cannot be split: use --data.split documents")
    # The cut is between characters, so that neither side has a part of one.
    cut = (
        int(len(document.text) * (1 - data.heldout_fraction))
        if rule is SplitRule.TAIL
        else boundary_before_tail(document.text, data.heldout_fraction)
    )
    for side, text in ((TRAIN, document.text[:cut]), (HELDOUT, document.text[cut:])):
        if text:
            yield side, dataclasses.replace(document, text=text)


def boundary_before_tail(text: str, fraction: float) -> int:
    """Return the index of the character with which the last `fraction` of a text's UTF-8 bytes begins.

    It is moved to the nearest paragraph, else line, else word, if one begins near it. Both sides have text,
    if there are two characters.
    """
    raw = text.encode()
    # A part of a character at the end is dropped.
    target = len(raw[: int(len(raw) * (1 - fraction))].decode(errors="ignore"))
    slack = int((len(text) - target) * _SLACK)
    for boundary in _BOUNDARIES:
        before = text.rfind(boundary, max(target - slack, 0), target)
        after = text.find(boundary, target, target + slack)
        begins = [index + len(boundary) for index in (before, after) if index >= 0]
        if begins:
            target = min(begins, key=lambda index: abs(index - target))
            break
    return min(max(target, 1), len(text) - 1)


def _side(document: Document, data: DataConfig) -> str:
    return HELDOUT if is_held_out(document.held_out_key(data.heldout_by), data.heldout_fraction) else TRAIN


def _unsplittable(document: Document) -> str:
    """Describe a document of which no part can be held out; "" for plain text."""
    if document.is_conversation:
        return "a conversation"
    return "a pair of prompt and completion" if document.prompt else ""
