"""A document as a source yields it, and the policy for bad documents.

A source does not decide: it yields every `Document`, with `problem` set if a record could not be read.
`Gatekeeper.admit` applies the policy and counts, and `Gatekeeper.check` enforces the limit at the end.
"""

import dataclasses
import enum
import itertools
import json
import re

from slmjax.config import added_field

_SEVERAL_NAMES = 2  # of special tokens in a text that a chat template may have made
_MANY = 0.01  # fraction of documents with such text that causes a warning
_quoted = json.encoder.encode_basestring_ascii
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class OnBadDocument(enum.Enum):
    """The treatment of a document that is not clean, non-empty text."""

    ERROR = "error"
    SKIP = "skip"
    REPLACE = "replace"


class HeldOutBy(enum.Enum):
    """The key whose hash decides which documents are held out."""

    CONTENT = "content"  # the content of a record, wherever it is; the name of a text file
    # the file and line (or row) of a record; the name of a text file: the rule of runs before this option
    ID = "id"


class Problem(enum.Enum):
    """Kinds of bad documents. The values are names of fields of BadCounts."""

    INVALID_UTF8 = "invalid_utf8"
    EMPTY = "empty"
    MISSING_FIELD = "missing_field"
    BROKEN_RECORD = "broken_record"
    BINARY = "binary"
    BAD_CONVERSATION = "bad_conversation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One text, one prompt with its completion, or one conversation.

    Bytes that are not UTF-8 are lone surrogates in `text` and `prompt` (`errors="surrogateescape"`), as are
    the unpaired surrogates that JSON can express. Neither can be encoded, and both are INVALID_UTF8 to the
    policy.
    """

    id: str  # stable name of the document within its source
    where: str  # file and line or record, for messages
    text: str = ""  # the text, the completion of a pair, or the messages of a conversation as JSON
    prompt: str = ""  # the text before the completion, which is not scored; "" for plain text
    problem: Problem | None = None  # set by the source if there is no text to check
    detail: str = ""  # the source's description of the problem
    is_conversation: bool = False  # the text is JSON, a list of messages
    # a record of a file or dataset, whose id is a line or row; else the id is a name
    is_record: bool = False

    def held_out_key(self, heldout_by: HeldOutBy) -> str:
        """Return the text whose hash decides whether the document is held out."""
        if heldout_by is HeldOutBy.ID or not self.is_record:
            return self.id
        # JSON keeps apart pairs whose joined texts are equal. This is `json.dumps` of a list, but faster.
        return f"[{_quoted(self.prompt)}, {_quoted(self.text)}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadCounts:
    """The number of documents, and of bad ones by kind."""

    documents: int = 0  # every document read, good or bad
    invalid_utf8: int = 0  # bytes that are not UTF-8, or unpaired surrogates
    empty: int = 0  # no text at all
    missing_field: int = 0  # a record without the field, or with a field that is not text
    broken_record: int = 0  # a line that is not a JSON object, a table row with other fields than the first
    binary: int = added_field(0, before=0)  # a file that is not text
    # not a list of messages, or messages that the chat template cannot render
    bad_conversation: int = added_field(0, before=0)
    # good documents with several names of special tokens in their text
    special_names: int = added_field(0, before=0)
    replaced: int = 0  # bad documents that were repaired with U+FFFD and used

    @property
    def bad(self) -> int:
        return sum(getattr(self, problem.value) for problem in Problem)

    def describe(self) -> str:
        """Return a clause for the log.

        For example "3 of 100 documents are bad (2 empty, 1 invalid_utf8; 1 repaired, 2 skipped)".
        """
        kinds = [
            f"{getattr(self, problem.value)} {problem.value}"
            for problem in Problem
            if getattr(self, problem.value)
        ]
        outcome = f"{self.replaced} repaired, {self.bad - self.replaced} skipped"
        return f"{self.bad} of {self.documents} documents are bad ({', '.join(kinds) or 'none'}; {outcome})"


class Gatekeeper:
    """Applies a policy to the documents of one source, and counts."""

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
        """Return the document, repaired if the policy asks for it; None to skip it.

        Raises:
            ValueError: the document is bad, under `error`.
        """
        self._count("documents")
        # Every document counts, so that the fraction of bad ones is of all that were read.
        problem, detail = _judge(document)
        if problem is None:
            return document
        self.refuse(document, problem, detail)
        if self._policy is OnBadDocument.REPLACE and problem is Problem.INVALID_UTF8:
            self._count("replaced")
            # Only invalid bytes can be repaired; other problems leave no text.
            text, prompt = (_LONE_SURROGATE.sub("\ufffd", part) for part in (document.text, document.prompt))
            return dataclasses.replace(document, text=text, prompt=prompt)
        return None

    def refuse(self, document: Document, problem: Problem, detail: str) -> None:
        """Count a bad document. Raises ValueError under `error`."""
        self._count(problem.value)
        message = f"{document.where}: {detail}"
        # One example is enough to find the cause.
        self._first_bad = self._first_bad or message
        if self._policy is OnBadDocument.ERROR:
            raise ValueError(
                f"{message}. Repair it, or pass --data.on-bad-document skip (leave such documents out)"
                " or replace (put U+FFFD where the bytes are invalid, leave out what cannot be repaired)."
            )

    def look_for_names(self, document: Document, names: re.Pattern[str]) -> None:
        """Count the document if its text has several of the names, as the text of a chat template has."""
        matches = list(itertools.islice(names.finditer(document.prompt + document.text), _SEVERAL_NAMES))
        if len(matches) == _SEVERAL_NAMES:
            self._count("special_names")
            self._first_names = (
                self._first_names
                or f"{' and '.join(dict.fromkeys(repr(match[0]) for match in matches))} in {document.where}"
            )

    def note_end(self, token: str) -> None:
        """Record a token that ends answers of a conversation and is not an end token of the tokenizer."""
        self._ends.add(token)

    def warnings(self) -> list[str]:
        """Return warnings about good documents that may not be what the user intended."""
        counts = self.counts
        warnings = []
        # A few documents may quote such names, for example in text about chat templates.
        if counts.special_names > _MANY * counts.documents:
            warnings.append(
                f"{counts.special_names:,} of {counts.documents:,} documents hold names of special tokens "
                f"({self._first_names}), which are encoded as text. If a chat template made this text, "
                "--data.special-tokens encode makes them those tokens; conversations are better given as "
                "records of messages, with --data.messages-field"
            )
        for token in sorted(self._ends):
            warnings.append(
                f"answers end with {token!r}, which is not an end token of the tokenizer, so that generate "
                'would continue after it: add it to "end_tokens" of tokenizer_config.json'
            )
        return warnings

    def check(self, source_name: str) -> None:
        """Raise ValueError if more than `max_bad_fraction` of the documents so far are bad."""
        check_bad_fraction(
            self.counts, self._max_bad_fraction, source_name=source_name, first_bad=self._first_bad
        )

    def _count(self, name: str) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1


def check_bad_fraction(
    counts: BadCounts, max_bad_fraction: float, *, source_name: str, first_bad: str = ""
) -> None:
    """Raise ValueError if more than this fraction of the documents is bad and not repaired."""
    if counts.bad - counts.replaced > max_bad_fraction * counts.documents:
        example = f" The first: {first_bad.rstrip('.')}." if first_bad else ""
        # Records without the field are rarely damaged: the field has another name.
        way_out = (
            "Name the right field (--data.text-field, or --data.prompt-field and --data.completion-field, or "
            "--data.messages-field)"
            if counts.missing_field > counts.bad / 2
            else "Repair the data"
        )
        raise ValueError(
            f"{source_name}: {counts.describe()}, more than "
            f"data.max_bad_fraction={max_bad_fraction:g}.{example}"
            f" {way_out}, or raise --data.max-bad-fraction."
        )


def _judge(document: Document) -> tuple[Problem | None, str]:
    if document.problem is not None:
        return document.problem, document.detail
    if not document.text:
        return Problem.EMPTY, "the document is empty"
    for part in (document.text, document.prompt):
        # Most text is ASCII, which Python knows without reading it.
        if part.isascii():
            continue
        try:
            part.encode("utf-8")
        except UnicodeEncodeError as error:
            return Problem.INVALID_UTF8, f"invalid UTF-8 at character {error.start}"
    return None, ""
