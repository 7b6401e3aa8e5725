"""Damage to files by seed: the same seed damages the same content in the same way.

    damaged = json_mutation(content, random.Random(7))

JSON is damaged as a value (types swapped, keys dropped and doubled, huge and odd numbers, deep nesting) and
as bytes (truncation, flipped bits, invalid UTF-8, other encodings). The binary formats whose headers hold
structure, safetensors and GGUF, are damaged in that structure, too: flipped bits alone rarely reach it.
"""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

# A string that stands for JSON text that `json.dumps` would not write.
_RAW = "@@raw {}@@"
_DEEP = 100_000  # levels; Python's parsers give up at about a thousand
_RAW_TEXTS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-0",
    "1" + "0" * 400,
    "9" * 5_000,  # more digits than Python converts
    "[" * _DEEP + "]" * _DEEP,
    '{"a":' * _DEEP + "1" + "}" * _DEEP,
    "[" * 300 + "]" * 300,  # deep, but readable
    '"\\ud800"',  # half of a character
    '{"a": 1, "a": "2"}',
    "01",
    "'single'",
    "",
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e-300, 1e300, 2**31, 2**32, 2**63, 2**64, 10**9, 10**30),
    *("", " ", "text", "nan", "²", "0999", "../../etc/passwd", "\x00", "ü" * 40, "x" * 100_000, "1", "true"),
    *([], [[]], [None], ["text"], [1, "2", None], [{}], {}, {"a": {}}, {"type": {}}, {"": None}),
    *({"type": "Path"}, {"type": []}, {"path": 3}, [0] * 5_000, {str(i): i for i in range(500)}),
)


# JSON -------------------------------------------------------------------------------------------------------
def json_mutation(content: bytes, draws: random.Random) -> bytes:
    """Return damaged JSON: one or two changes of its value, or of its bytes."""
    if draws.random() < 0.25:
        return byte_mutation(content, draws)
    try:
        value = json.loads(content)
    except ValueError:
        return byte_mutation(content, draws)
    return _json_text(value_mutation(value, draws), draws)


def json_lines_mutation(content: bytes, draws: random.Random) -> bytes:
    """Return JSON lines with a damaged line, a line that was moved, or damaged bytes."""
    lines = content.split(b"\n")
    kind = draws.random()
    index = draws.randrange(max(1, len(lines) - 1))
    if kind < 0.15:
        return byte_mutation(content, draws)
    if kind < 0.25:
        lines[index : index + 1] = [lines[index]] * draws.choice((0, 2, 3))
    elif kind < 0.3:
        lines.insert(index, draws.choice((b"", b"  ", b"null", b"[]", b"3", b'"text"', b"\xff", b"{}")))
    else:
        lines[index] = json_mutation(lines[index], draws).replace(b"\n", b" ")
    return b"\n".join(lines)


def value_mutation(value: Any, draws: random.Random) -> Any:
    """Return a JSON value with one or two changes at random places in it."""
    for _ in range(draws.choice((1, 1, 2))):
        value = _changed(value, draws)
    return value


def _changed(value: Any, draws: random.Random) -> Any:
    """Return a copy of the value with one change."""
    # The root is as likely as any other place in a small file, and rare in a large one.
    containers = _containers(value)
    if not containers or draws.random() < 0.06:
        return _other(value, draws)
    value, container = _copied(value, draws.choice(containers))
    if not container:
        return _other(value, draws)
    key = draws.choice(list(container) if isinstance(container, dict) else range(len(container)))
    change = draws.randrange(8)
    if change <= 3:
        container[key] = _other(container[key], draws)
    elif change == 4:
        del container[key]
    elif change == 5 and isinstance(container, dict):
        container[draws.choice((f"{key}x", "", "type", "²", str(key).upper()))] = container.pop(key)
    elif change == 6:
        other = draws.choice(list(container) if isinstance(container, dict) else range(len(container)))
        container[key] = container[other]
    else:
        container[key] = [container[key]] if draws.random() < 0.5 else {"a": container[key]}
    return value


def _containers(value: Any) -> list[tuple[Any, ...]]:
    """Return the paths of all objects and lists in a value."""
    paths: list[tuple[Any, ...]] = []
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, dict | list):
            paths.append(path)
            inner = item.items() if isinstance(item, dict) else enumerate(item)
            waiting += [((*path, key), child) for key, child in inner]
    return paths


def _copied(value: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return a copy of a value, and the container at the path in it."""
    value = json.loads(json.dumps(value))
    container = value
    for key in path:
        container = container[key]
    return value, container


def _other(value: Any, draws: random.Random) -> Any:
    """Return another value, often near to this one."""
    if draws.random() < 0.2:
        return _RAW.format(draws.randrange(len(_RAW_TEXTS)))
    if isinstance(value, int | float) and not isinstance(value, bool) and draws.random() < 0.5:
        return draws.choice((-value, value + 1, value - 1, value * 10**9, float(value), str(value), 0))
    if isinstance(value, str) and draws.random() < 0.3:
        return draws.choice((value[: len(value) // 2], value + "²", value * 1000, [value], value.upper()))
    return draws.choice(_VALUES)


def _json_text(value: Any, draws: random.Random) -> bytes:
    text = json.dumps(value, ensure_ascii=draws.random() < 0.5)
    for index, raw in enumerate(_RAW_TEXTS):
        text = text.replace(json.dumps(_RAW.format(index)), raw)
    # Python's json writes no key twice.
    if draws.random() < 0.05 and text.startswith("{") and ":" in text:
        text = f"{text[:-1]}, {text[1:]}"
    return text.encode("utf-8", "surrogatepass")


# Bytes ------------------------------------------------------------------------------------------------------
def byte_mutation(content: bytes, draws: random.Random) -> bytes:
    """Return content of which a part is missing, repeated, changed, or in another encoding."""
    change = draws.randrange(9)
    # Cubed: the beginning of a file, its header, is damaged more often.
    at = int(len(content) * draws.random() ** draws.choice((1, 3)))
    if change == 0:
        return content[:at]
    if change == 1:
        return content[:at] + bytes([content[at] ^ (1 << draws.randrange(8))]) + content[at + 1 :]
    if change == 2:
        return content[:at] + content[at + draws.choice((1, 2, 7, 100)) :]
    if change == 3:
        return content[:at] + content[at : at + 50] + content[at:]
    if change == 4:
        return content[:at] + draws.choice((b"\xff", b"\xc3", b"\x00", b"\xed\xa0\x80")) + content[at:]
    if change == 5:
        return content[:at] + draws.randbytes(draws.choice((1, 8, 64))) + content[at:]
    if change == 6:
        return b"\xef\xbb\xbf" + content
    if change == 7:
        # As a full disk or a lost power supply leaves it: blocks of zeros.
        return content[:at] + bytes(len(content) - at)
    return draws.choice((b"", b"\n", b"null", b"[]", b"{}", b"3", b'"text"', content * 2, b"[" * _DEEP))


# Text of a program ------------------------------------------------------------------------------------------
_JINJA = (
    "{% for a in messages %}{% for b in messages %}{{ a }}{% endfor %}{% endfor %}",
    "{% set x = messages %}{% for i in range(60) %}{% set x = x + x %}{% endfor %}",
    "{% set n = namespace(x='abc') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ 'a' * 10 ** 12 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages[0].content.format_map({}) }}",
    "{{ range(10 ** 9) | list }}",
    "{{ messages | map(attribute='x' * 9999) | join('y' * 99999) }}",
    "{{ undefined_name.attribute }}",
    "{{ raise_exception('no') }}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{{ '(' * 5000 }}" + "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if " + "not " * 3000 + "1 %}{% endif %}",
    "{{ 9 ** 9 ** 9 }}",
    "{% generation %}{% endgeneration %}",
    "{{ strftime_now('%Y' * 100000) }}",
)


def template_mutation(content: bytes, draws: random.Random) -> bytes:
    """Return the source of a chat template with a foreign expression in it, or damaged bytes."""
    if draws.random() < 0.4:
        return byte_mutation(content, draws)
    at = draws.randrange(len(content) + 1)
    return content[:at] + draws.choice(_JINJA).encode() + content[at:]


# Binary headers ---------------------------------------------------------------------------------------------
def safetensors_mutation(content: bytes, draws: random.Random) -> bytes:
    """Return a safetensors file whose JSON header was changed, or damaged bytes."""
    (size,) = struct.unpack("<Q", content[:8])
    kind = draws.random()
    if kind < 0.2:
        return byte_mutation(content, draws)
    if kind < 0.3:
        return struct.pack("<Q", draws.choice((0, 1, size - 1, 2**31, 2**63, 2**64 - 1))) + content[8:]
    header = json_mutation(content[8 : 8 + size], draws)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def gguf_mutation(content: bytes, draws: random.Random) -> bytes:
    """Return a GGUF file with metadata of another type or value, other tensor entries, or damaged bytes."""
    if draws.random() < 0.2:
        return byte_mutation(content, draws)
    metadata, tensors, rest = _gguf_parts(content)
    entries: list[Any] = draws.choice((metadata, metadata, tensors))
    index = draws.randrange(len(entries))
    change = draws.randrange(10)
    if change == 0:
        del entries[index]
    elif change == 1:
        entries.append(draws.choice(entries))
    elif entries is metadata:
        key, kind, _ = metadata[index]
        metadata[index] = (key, *_gguf_value(kind, draws))
    else:
        tensors[index] = _gguf_tensor(tensors[index], draws)
    counts = [len(tensors), len(metadata)]
    if change == 2:
        counts[draws.randrange(2)] = draws.choice((0, 1, 2**31, 2**64 - 1))
    head = [b"GGUF", struct.pack("<IQQ", draws.choice((3, 3, 3, 3, 3, 2, 1, 99)), *counts)]
    head += [_gguf_string(key) + struct.pack("<I", kind) + raw for key, kind, raw in metadata]
    for name, dims, kind, offset in tensors:
        head.append(_gguf_string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        head.append(struct.pack("<IQ", kind, offset))
    joined = b"".join(head)
    return joined + bytes(-len(joined) % 32) + rest


_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _gguf_value(kind: int, draws: random.Random) -> tuple[int, bytes]:
    """Return the type and the bytes of another value, half the time of the same type."""
    kind = kind if draws.random() < 0.5 else draws.choice((*_GGUF_SCALARS, 8, 9, 13))
    if kind in _GGUF_SCALARS:
        code = _GGUF_SCALARS[kind]
        if code in "fd":
            number = draws.choice((0.0, -1.0, 1.5, 1e30, float("nan"), float("inf")))
            return kind, struct.pack(f"<{code}", number)
        # Random bytes are any integer; small ones are more often of consequence.
        small = draws.choice((0, 1, 2, 3, 7, 64, 100))
        return kind, struct.pack(f"<{code}", small) if draws.random() < 0.6 else draws.randbytes(
            struct.calcsize(code)
        )
    if kind == 8:
        return kind, _gguf_string(draws.choice(("", "text", "llama", "²", "x" * 100_000, "\x00")))
    if kind == 9:
        return kind, _gguf_array(draws)
    return kind, draws.randbytes(8)


def _gguf_array(draws: random.Random) -> bytes:
    item = draws.choice((0, 4, 5, 6, 7, 8, 9))
    # Arrays of arrays, to any depth.
    if item == 9:
        return struct.pack("<IQ", 9, 1) * draws.choice((2, 5_000)) + struct.pack("<IQ", 4, 0)
    length = draws.choice((0, 1, 2, 300))
    of_item = _gguf_string("text") if item == 8 else b"\x01" + bytes(struct.calcsize(_GGUF_SCALARS[item]) - 1)
    return struct.pack("<IQ", item, length) + of_item * length


def _gguf_tensor(
    tensor: tuple[str, list[int], int, int], draws: random.Random
) -> tuple[str, list[int], int, int]:
    name, dims, kind, offset = tensor
    change = draws.randrange(5)
    if change == 0:
        return draws.choice(("", name + "x", "token_embd.weight", "²")), dims, kind, offset
    if change == 1:
        other = draws.choice((0, 1, 2**31, 2**63, 2**64 - 1))
        at = draws.randrange(len(dims))
        return name, [*dims[:at], other, *dims[at + 1 :]], kind, offset
    if change == 2:
        return name, draws.choice(([], [1], dims[::-1], dims * 3, [2**40] * 3)), kind, offset
    if change == 3:
        return name, dims, draws.choice((*range(40), 999)), offset
    return name, dims, kind, draws.choice((0, 1, 31, offset + 32, 2**40, 2**64 - 1))


def _gguf_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


class _Reader:
    """Reads a sound GGUF file, item after item."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.offset = 0

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from(f"<{code}", self.content, self.offset)
        self.offset += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        size = self.number("Q")
        self.offset += size
        return self.content[self.offset - size : self.offset].decode()

    def value(self, kind: int) -> bytes:
        start = self.offset
        if kind == 8:
            self.string()
        elif kind == 9:
            item = self.number("I")
            for _ in range(self.number("Q")):
                self.value(item)
        else:
            self.offset += struct.calcsize(_GGUF_SCALARS[kind])
        return self.content[start : self.offset]


def _gguf_parts(
    content: bytes,
) -> tuple[list[tuple[str, int, bytes]], list[tuple[str, list[int], int, int]], bytes]:
    """Return the metadata (key, type, bytes), the tensors (name, dims, type, offset), and the data."""
    reader = _Reader(content)
    reader.offset = 8  # after magic and version
    num_tensors = reader.number("Q")
    metadata = []
    for _ in range(reader.number("Q")):
        key = reader.string()
        kind = reader.number("I")
        metadata.append((key, kind, reader.value(kind)))
    tensors = []
    for _ in range(num_tensors):
        name = reader.string()
        dims = [reader.number("Q") for _ in range(reader.number("I"))]
        tensors.append((name, dims, reader.number("I"), reader.number("Q")))
    return metadata, tensors, content[-(-reader.offset // 32) * 32 :]
