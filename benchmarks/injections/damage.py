"""Random damage to files, as disks, copies, editors and other programs do it."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

BYTE_WAYS = ("flip", "truncate", "empty", "delete", "zero", "append", "insert", "directory")
# Values of every JSON type, and some that are special to a reader.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 10**9, 10**30, 0.5, -1e300, 1e400, "", "x", "nan", "../../x", "²", "\x00"),
    *([], {}, [0], {"type": {}}, [[]], {"": None}, "x" * 5000),
)


def damage_bytes(path: Path, rng: random.Random, *, way: str | None = None) -> str:
    """Damage a file and return a description of how."""
    way = way or rng.choice(BYTE_WAYS)
    content = bytearray(path.read_bytes())
    if way in ("delete", "directory"):
        path.unlink()
        if way == "directory":
            path.mkdir()
        return way
    at = rng.randrange(len(content) or 1)
    if way == "flip" and content:
        bit = rng.randrange(8)
        content[at] ^= 1 << bit
        way = f"flip bit {bit} of byte {at}"
    elif way == "truncate":
        del content[at:]
        way = f"truncate to {at} bytes"
    elif way == "empty":
        content.clear()
    elif way == "zero":
        length = min(len(content) - at, rng.choice((1, 16, 512, 4096)))
        content[at : at + length] = bytes(length)
        way = f"zero {length} bytes at {at}"
    elif way == "append":
        content += rng.randbytes(rng.choice((1, 16, 512)))
    else:
        content[at:at] = rng.randbytes(rng.choice((1, 2, 16)))
        way = f"insert at {at}"
    path.write_bytes(content)
    return way


def mutate_json(path: Path, rng: random.Random) -> str:
    """Change a JSON file, or a JSON object per line, in its structure or as text; return how."""
    choice = rng.random()
    if choice < 0.25:
        return damage_bytes(path, rng)
    text = path.read_text(encoding="utf-8")
    if choice < 0.4:
        mutated, way = _mutated_text(text, rng)
        path.write_text(mutated, encoding="utf-8", errors="surrogateescape")
        return way
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        number = rng.randrange(len(lines))
        value, way = mutated_value(json.loads(lines[number]), rng)
        lines[number] = json.dumps(value)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return f"line {number + 1}: {way}"
    value, way = mutated_value(json.loads(text), rng)
    path.write_text(json.dumps(value), encoding="utf-8")
    return way


def mutated_value(value: Any, rng: random.Random) -> tuple[Any, str]:
    """Return a JSON value with one change somewhere inside, and a description of the change."""
    if rng.random() < 0.1:
        replacement = rng.choice(_VALUES)
        return replacement, f"all is {_short(replacement)}"
    # From the top a random path is followed, so that outer objects are changed as often as inner ones.
    trail: list[Any] = []
    parent: Any = None
    inner = value
    while isinstance(inner, dict | list) and inner and (parent is None or rng.random() < 0.8):
        parent = inner
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        trail.append(key)
        inner = inner[key]
    if parent is None:
        replacement = rng.choice(_VALUES)
        return replacement, f"all is {_short(replacement)}"
    place = ".".join(map(str, trail))
    key = trail[-1]
    action = rng.choice(("replace", "replace", "remove", "add", "nest"))
    if action == "remove":
        del parent[key]
    elif action == "add":
        parent.insert(key, rng.choice(_VALUES)) if isinstance(parent, list) else parent.update(odd=1)
    elif action == "nest":
        parent[key] = [parent[key]] if rng.random() < 0.5 else {"value": parent[key]}
    else:
        parent[key] = rng.choice(_VALUES)
        return value, f"{place} is {_short(parent[key])}"
    return value, f"{action} {place}"


def _mutated_text(text: str, rng: random.Random) -> tuple[str, str]:
    ways = {
        "byte order mark": "\ufeff" + text,
        "nested deeply": "[" * 100_000,
        "NaN": text.replace("1", "NaN", 1),
        "two values": text + text,
        "not JSON": "not JSON",
        "another encoding": text.encode("utf-16").decode("latin-1"),
        "carriage returns": text.replace("\n", "\r"),
        "only white space": "\n \n",
        "lone surrogate": text.replace('"', '"\\ud800', 1),
        "a huge number": text.replace(": ", ": " + "9" * 5000, 1),
        "a repeated key": text.replace("{", '{"step": 1, "step": 2, ', 1),
    }
    way = rng.choice(list(ways))
    return ways[way], way


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "..."


def damage_tree(directory: Path, rng: random.Random) -> str:
    """Damage one entry of a directory: a file's bytes, a whole folder, or two files exchanged."""
    entries = sorted(path for path in directory.rglob("*"))
    files = [path for path in entries if path.is_file()]
    choice = rng.random()
    if choice < 0.1:
        folder = rng.choice([path for path in entries if path.is_dir()] or [directory])
        shutil.rmtree(folder)
        return f"delete folder {folder.relative_to(directory)}"
    if choice < 0.17 and len(files) > 1:
        first, second = rng.sample(files, 2)
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
        return f"exchange {first.relative_to(directory)} and {second.relative_to(directory)}"
    # Half of the time a file with arrays, which are most of the bytes of a real checkpoint.
    large = [path for path in files if path.parent.name == "d"]
    path = rng.choice(large if large and rng.random() < 0.5 else files)
    return f"{path.relative_to(directory)}: {damage_bytes(path, rng)}"
