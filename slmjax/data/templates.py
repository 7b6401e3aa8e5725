"""Chat templates of model directories: untrusted Jinja source, run in a sandbox with limits.

The dialect is that of Hugging Face's templates: blocks leave no blank lines, `break` and `continue`, `tojson`
as plain JSON, `raise_exception`, `strftime_now`, and a block `generation`, which marks the model's text and
does not change it.

jinja2's immutable sandbox keeps a template from the interpreter's internals and from changing its input.
There is no loader, so it cannot include files. Computation is limited here: steps (turns of loops, calls,
operations) and the lengths of texts. What remains: a template can take seconds, and a single replacement or
join can take much memory, before it is stopped.
"""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, cast

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


# Random and between noncharacters, so that no text has them.
ANSWER_BEGINS, ANSWER_ENDS = (f"{mark}{secrets.token_hex(8)}{mark}" for mark in "\ufdd2\ufdd3")
_ANSWER_BLOCK = re.compile(r"\{%[-+]?\s*generation\b")


def marks_answers(template: str) -> bool:
    """Return whether the template has `generation` blocks."""
    return _ANSWER_BLOCK.search(template) is not None


def render(template: str, values: Mapping[str, Any], *, answers_marked: bool = False) -> str:
    """Return the text of a template for values, which must be plain data.

    With `answers_marked`, the text of a `generation` block is between ANSWER_BEGINS and ANSWER_ENDS. Errors
    of a template are raised unchanged, of any type.
    """
    environment, compiled = _compiled(template, answers_marked=answers_marked)
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
        if cast(_Sandbox, self.environment).answers_marked:
            begin, end = (
                nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (ANSWER_BEGINS, ANSWER_ENDS)
            )
            body = [begin, *body, end]
        return nodes.Scope(body, lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Counts the steps of a template, and refuses what jinja2 would replace by nothing."""

    intercepted_binops = frozenset(["+", "-", "*", "**", "%"])

    def __init__(self, *, answers_marked: bool) -> None:
        self.answers_marked = answers_marked
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
def _compiled(source: str, *, answers_marked: bool) -> tuple[_Sandbox, Template]:
    environment = _Sandbox(answers_marked=answers_marked)
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
