"""Chat templates of model directories: untrusted Jinja source, run in a sandbox, in a process of its own.

`template_process.py` runs this file, which therefore imports nothing of slmjax. The dialect is that of
Hugging Face's templates: blocks leave no blank lines, `break` and `continue`, `tojson` as plain JSON,
`raise_exception`, `strftime_now`, and a block `generation`, which marks the model's text and does not change
it.

jinja2's immutable sandbox keeps a template from the interpreter's internals and from changing its input.
There is no loader, so it cannot include files. The sandbox also counts steps (turns of loops, calls,
operations) and the lengths of texts, so that most endless templates are stopped early, with their reason.
What it does not count, such as the comparisons inside of two lists, is bounded with all the rest by the
limits of the process: memory, CPU time, and no files to write.
"""

import contextlib
import datetime
import functools
import json
import re
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NoReturn, cast

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 100_000
# of any text; no function is called with a larger number
MAX_CHARACTERS = 10_000_000
MAX_BITS = 4096  # of an integer
_WIDTH = re.compile(r"\d{6}")  # a width in a format, which would pad to any length

MAX_MESSAGE = 2**28  # bytes: a text of MAX_CHARACTERS as JSON, and conversations that are longer

Marks = tuple[str, str]  # put before and after the text of a `generation` block


def render(template: str, values: Mapping[str, Any], *, marks: Marks | None = None) -> str:
    """Return the text of a template for values, which must be plain data.

    Errors of a template are raised unchanged, of any type.
    """
    environment, compiled = _compiled(template, marks=marks)
    # Compiled templates are cached, and each rendering has its own limits.
    environment.steps = environment.made = 0
    pieces = []
    length = 0
    # Generated piece by piece, so that an endless template is stopped early.
    for piece in compiled.generate(**values):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise SecurityError(f"it makes more than {MAX_CHARACTERS:,} characters")
    return "".join(pieces)


class _GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}: its body."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        if (marks := cast(_Sandbox, self.environment).marks) is not None:
            begin, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in marks)
            body = [begin, *body, end]
        return nodes.Scope(body, lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Counts the steps of a template, and refuses what jinja2 would replace by nothing."""

    intercepted_binops = frozenset(["+", "-", "*", "**", "%"])

    def __init__(self, *, marks: Marks | None) -> None:
        self.marks = marks
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, loopcontrols],
            finalize=_refuse_large,
        )
        self.steps = self.made = 0
        # `lipsum` makes text of any length; the filter `format` is not limited as the operator `%` is.
        del self.globals["lipsum"], self.filters["format"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": lambda *args, **items: dict(*args, **items),
        }
        filters = {**self.filters, "tojson": _tojson, _COUNTED: self._counted}
        self.filters = {name: self._limited(function) for name, function in filters.items()}

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._check(args, kwargs)
        return self._measured(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        """Wrap `format` of a text, which jinja2 has wrapped so that it reads no internals."""
        # `str.format` with a wide field pads to any length before the result can be measured.
        if isinstance(template := getattr(value, "__self__", None), str) and getattr(
            value, "__name__", ""
        ).startswith("format"):
            _refuse_width(template)
        return super().wrap_str_format(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._count(1)
        # `%` formats texts, and a width in the format can make them arbitrarily long.
        if operator == "%" and isinstance(left, str):
            _refuse_width(left)
        elif operator == "**" and not (abs(left) <= MAX_STEPS and abs(right) <= 64):
            raise SecurityError(f"{left!r} ** {right!r} is too large")
        if operator == "*" and isinstance(left, int) != isinstance(right, int):
            times, repeated = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(repeated, str | list | tuple) and times * len(repeated) > MAX_CHARACTERS:
                raise SecurityError(f"it repeats something {times:,} times")
        return self._measured(super().call_binop(context, operator, left, right))

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Raise at once: an undefined value would print as nothing."""
        raise SecurityError(f"it reads {attribute!r} of a {type(obj).__name__}, which templates may not")

    def _limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter with the limits of a call."""

        # `wraps` copies the attributes by which jinja2 knows the further arguments to pass.
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._check(args, kwargs)
            return self._measured(function(*args, **kwargs))

        return call

    def _measured(self, value: Any) -> Any:
        """Return a new value, after counting its size: the total is limited, too."""
        # Repeated squaring makes integers that fill the memory.
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise SecurityError(f"it makes a number of {value.bit_length():,} bits")
        if isinstance(value, str | list | tuple):
            self.made += len(value)
            if len(value) > MAX_CHARACTERS or self.made > 10 * MAX_CHARACTERS:
                raise SecurityError(f"it makes something of {len(value):,} parts")
        return value

    def _check(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
        self._count(1)
        for value in (*args, *kwargs.values()):
            _refuse_large(value)
            if isinstance(value, int) and abs(value) > MAX_CHARACTERS:
                raise SecurityError(f"it calls a function with the number {value:,}")

    def _counted(self, items: Iterable[Any]) -> list[Any]:
        counted = list(items)
        self._count(len(counted))
        return counted

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")


_COUNTED = "counted items"  # a filter that no template can name


class _Limited(NodeTransformer):
    """Makes loops iterate over counted items, and `a ~ b` an addition of texts that the sandbox sees."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _COUNTED, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        first, *rest = [
            nodes.Filter(part, "string", [], [], None, None, lineno=node.lineno) for part in node.nodes
        ]
        joined: nodes.Expr = first
        for text in rest:
            joined = nodes.Add(joined, text, lineno=node.lineno)
        return joined


@functools.lru_cache(maxsize=8)
def _compiled(source: str, *, marks: Marks | None) -> tuple[_Sandbox, Template]:
    environment = _Sandbox(marks=marks)
    # Limits are built into the compiled template, so it cannot avoid them.
    tree = _Limited().visit(environment.parse(source))
    return environment, environment.from_string(tree.set_environment(environment))


def _refuse_large(value: Any) -> Any:
    """Return a value, unless it has too many parts, at any depth, to count them in a bounded time."""
    parts = 0
    waiting = [value] if isinstance(value, list | tuple | dict) else []
    while waiting:
        container = waiting.pop()
        parts += len(container)
        if parts > MAX_STEPS:
            raise SecurityError(f"it makes something of more than {MAX_STEPS:,} parts")
        inner = container.values() if isinstance(container, dict) else container
        waiting += [item for item in inner if isinstance(item, list | tuple | dict)]
    return value


def _refuse_width(template: str) -> None:
    if _WIDTH.search(template):
        raise SecurityError(f"its format {template[:40]!r} is too wide")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


# The process ------------------------------------------------------------------------------------------------
def serve(requests: BinaryIO, answers: BinaryIO, *, memory: int) -> None:
    """Answer requests until there are no more, or until memory has run out.

    A request is {"template", "values", "marks", "seconds"}, an answer {"text"} or {"error"}; both are JSON
    after their number of bytes.

    Args:
      requests: the stream to read.
      answers: the stream to write.
      memory: bytes that the process may have.
    """
    _limit("RLIMIT_AS", memory)
    _limit("RLIMIT_CORE", 0)
    # No file can grow; pipes have no size.
    _limit("RLIMIT_FSIZE", 0)
    while (request := read_message(requests)) is not None:
        # The system ends the process at its limit. It counts whole seconds, and those of earlier requests.
        _limit("RLIMIT_CPU", int(time.process_time()) + 1 + request["seconds"])
        answer, is_last = _answer(request, memory)
        answers.write(message_bytes({**answer, "is_last": is_last}))
        answers.flush()
        if is_last:
            return


def _answer(request: dict[str, Any], memory: int) -> tuple[dict[str, str], bool]:
    """Return the answer, and whether the process ends with it."""
    marks = request["marks"]
    try:
        text = render(request["template"], request["values"], marks=None if marks is None else tuple(marks))
    except MemoryError:
        return {"error": f"it needs more than {memory // 2**20:,} MiB of memory"}, True
    except Exception as error:  # a template can fail in any way a program can
        name = type(error).__name__
        return {"error": f"{name}: {error}" if type(error).__module__ == "builtins" else str(error)}, False
    return {"text": text}, False


def _limit(name: str, value: int) -> None:
    # Systems other than Linux lack some limits, or all.
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def read_message(stream: BinaryIO) -> dict[str, Any] | None:
    """Return the next message; None at the end of the stream, or if it is longer than any may be."""
    head = stream.read(8)
    size = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_MESSAGE + 1
    body = stream.read(size) if size <= MAX_MESSAGE else b""
    return json.loads(body) if len(body) == size else None


def message_bytes(message: Mapping[str, Any]) -> bytes:
    """Return a message as bytes. Raises TypeError or ValueError if it is not plain data."""
    body = json.dumps(message).encode()
    return struct.pack("<Q", len(body)) + body


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, memory=int(sys.argv[1]))
