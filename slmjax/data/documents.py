"""A document as a source yields it, and the policy for documents that cannot be used as they are.

A source never decides: it yields `Document`s as it found them, with `problem` set where a record could not be
read. `Gatekeeper.admit` applies the policy, counts what it did, and `Gatekeeper.check` enforces the cap at
the end.
"""

import dataclasses
import enum
import itertools
import json
import re

from slmjax.config import added_field

_SEVERAL_NAMES = 2  # of special tokens in a text that a chat template may have made
_MANY = 0.01  # share of the documents with such text that is warned of
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class OnBadDocument(enum.Enum):
    """What becomes of a document that is not clean, non-empty text."""

    ERROR = "error"
    SKIP = "skip"
    REPLACE = "replace"


class HeldOutBy(enum.Enum):
    """The key whose hash decides which documents are held out."""

    CONTENT = "content"  # of a record its content, wherever it stands; of a whole file its name
    # of a record its file and line or row, of a whole file its name: the rule of runs before this option
    ID = "id"


class Problem(enum.Enum):
    """Kinds of bad documents; the values are the names of the fields of BadCounts."""

    INVALID_UTF8 = "invalid_utf8"
    EMPTY = "empty"
    MISSING_FIELD = "missing_field"
    BROKEN_RECORD = "broken_record"
    BINARY = "binary"
    BAD_CONVERSATION = "bad_conversation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One text, one prompt with its completion, or one conversation.

    Bytes that are not UTF-8 stand in `text` and `prompt` as lone surrogates (`errors="surrogateescape"`), as
    do the
    unpaired surrogates that JSON can express: neither can be encoded, and both are INVALID_UTF8 to the
    policy.
    """

    id: str  # stable name of the document within its source
    where: str  # file and line or record, for messages
    text: str = ""  # the text, the completion of a pair, or the messages of a conversation as JSON
    prompt: str = ""  # what precedes the completion and is not scored; "" for plain text
    problem: Problem | None = None  # set by the source when there is no text to judge
    detail: str = ""  # what the source has to say about the problem
    is_conversation: bool = False  # the text is JSON, a list of messages
    # a record of a file or dataset, whose id is a place (a line, a row); else the id is a name
    is_record: bool = False

    def held_out_key(self, heldout_by: HeldOutBy) -> str:
        """The text whose hash decides whether the document is held out."""
        if heldout_by is HeldOutBy.ID or not self.is_record:
            return self.id
        return json.dumps([self.prompt, self.text])


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadCounts:
    """How many documents were read, and how many were bad, by kind."""

    documents: int = 0  # every document read, good or bad
    invalid_utf8: int = 0  # bytes that are not UTF-8, or unpaired surrogates
    empty: int = 0  # no text at all
    missing_field: int = 0  # a record without the field, or with something that is not text in it
    broken_record: int = 0  # a line that is no JSON object, a row of a table with other fields than the first
    binary: int = added_field(0, before=0)  # a file that is not text
    # messages that are none, or that the chat template cannot put into text
    bad_conversation: int = added_field(0, before=0)
    # good ones that hold several names of special tokens as text
    special_names: int = added_field(0, before=0)
    replaced: int = 0  # those of the bad ones that were mended with U+FFFD and used

    @property
    def bad(self) -> int:
        return sum(getattr(self, problem.value) for problem in Problem)

    def describe(self) -> str:
        """One clause for the log, e.g. "3 of 100 documents are bad (2 empty, 1 invalid_utf8; 1 mended, 2
        skipped)".
        """
        kinds = [
            f"{getattr(self, problem.value)} {problem.value}"
            for problem in Problem
            if getattr(self, problem.value)
        ]
        fate = f"{self.replaced} mended, {self.bad - self.replaced} skipped"
        return f"{self.bad} of {self.documents} documents are bad ({', '.join(kinds) or 'none'}; {fate})"


class Gatekeeper:
    """Applies one policy to the documents of one source and keeps the counts."""

    def __init__(self, policy: OnBadDocument, *, max_bad_fraction: float) -> None:
        self._policy = policy
        self._max_bad_fraction = max_bad_fraction
        self._counts: dict[str, int] = {}
        self._first_bad = ""
        self._first_names = ""
        self._ends: set[str] = set()

    @property
    def counts(self) -> BadCounts:
        return BadCounts(**self._counts)

    def admit(self, document: Document) -> Document | None:
        """The document, mended if the policy says so; None to skip it. Raises ValueError under `error`."""
        self._count("documents")
        problem, detail = _judge(document)
        if problem is None:
            return document
        self.refuse(document, problem, detail)
        if self._policy is OnBadDocument.REPLACE and problem is Problem.INVALID_UTF8:
            self._count("replaced")
            text, prompt = (_LONE_SURROGATE.sub("\ufffd", part) for part in (document.text, document.prompt))
            return dataclasses.replace(document, text=text, prompt=prompt)
        return None

    def refuse(self, document: Document, problem: Problem, detail: str) -> None:
        """Count a bad document. Raises ValueError under `error`."""
        self._count(problem.value)
        message = f"{document.where}: {detail}"
        self._first_bad = self._first_bad or message
        if self._policy is OnBadDocument.ERROR:
            raise ValueError(
                f"{message}. Repair it, or pass --data.on-bad-document skip (leave such documents out)"
                " or replace (put U+FFFD where the bytes are invalid, leave out what cannot be mended)."
            )

    def look_for_names(self, document: Document, names: re.Pattern[str]) -> None:
        """Count the document if its text holds several of the names, as that of a chat template does."""
        found = list(itertools.islice(names.finditer(document.prompt + document.text), _SEVERAL_NAMES))
        if len(found) == _SEVERAL_NAMES:
            self._count("special_names")
            self._first_names = (
                self._first_names
                or f"{' and '.join(dict.fromkeys(repr(one[0]) for one in found))} in {document.where}"
            )

    def note_end(self, token: str) -> None:
        """Remember that answers of a conversation end with this token, at which the tokenizer does not end a
        turn.
        """
        self._ends.add(token)

    def warnings(self) -> list[str]:
        """Warnings about good documents that may not be what the user meant."""
        counts = self.counts
        warnings = []
        if counts.special_names > _MANY * counts.documents:
            warnings.append(
                f"{counts.special_names:,} of {counts.documents:,} documents hold names of special tokens "
                f"({self._first_names}). They are"
                " encoded as the text that they are. If a chat template made this text, "
                "--data.special-tokens encode makes them those"
                " tokens; conversations are better given as records of messages, with --data.messages-field"
            )
        for token in sorted(self._ends):
            warnings.append(
                f"answers end with {token!r}, which is no end of a turn to the tokenizer, so that generate "
                "would go on after it: name it in"
                ' "end_tokens" of tokenizer_config.json'
            )
        return warnings

    def check(self, source_name: str) -> None:
        """Raises ValueError when more than `max_bad_fraction` of the documents so far are bad."""
        check_bad_fraction(
            self.counts, self._max_bad_fraction, source_name=source_name, first_bad=self._first_bad
        )

    def _count(self, name: str) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1


def check_bad_fraction(
    counts: BadCounts, max_bad_fraction: float, *, source_name: str, first_bad: str = ""
) -> None:
    """Raises ValueError when more than `max_bad_fraction` of the documents counted are bad and were not
    mended.
    """
    if counts.bad - counts.replaced > max_bad_fraction * counts.documents:
        example = f" The first: {first_bad.rstrip('.')}." if first_bad else ""
        raise ValueError(
            f"{source_name}: {counts.describe()}, more than "
            f"data.max_bad_fraction={max_bad_fraction:g}.{example}"
            " Repair the data, or raise --data.max-bad-fraction."
        )


def _judge(document: Document) -> tuple[Problem | None, str]:
    if document.problem is not None:
        return document.problem, document.detail
    if not document.text:
        return Problem.EMPTY, "the document is empty"
    for part in (document.text, document.prompt):
        try:
            part.encode("utf-8")
        except UnicodeEncodeError as error:
            return Problem.INVALID_UTF8, f"invalid UTF-8 at character {error.start}"
    return None, ""
