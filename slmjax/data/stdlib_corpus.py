"""The built-in corpus: the running Python's own standard library. Nothing is downloaded or distributed.

Documents are the .py files (id: path below the library) and the help topics of `pydoc` (id:
pydoc_data/topics/NAME). Tests, installed packages, caches and files that record how this Python was built are
excluded, so that the corpus depends only on the Python version. So are the character tables of `encodings`,
which are near copies of each other: with some of them held out and others trained on, the loss would measure
memory.
"""

import dataclasses
import importlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from slmjax.data.documents import Document
from slmjax.data.files import decode
from slmjax.data.sources import SourceConfig, combined_hash, file_fingerprint

_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib-dynload",
    "encodings",
}
_TOPICS = "pydoc_data/topics.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StdlibSource(SourceConfig):
    """Sources and help topics of the running Python's standard library, about 10 MB."""

    def documents(self) -> Iterator[Document]:
        for name, path in _library_files():
            if name != _TOPICS:
                yield Document(id=name, where=str(path), text=decode(path.read_bytes()))
                continue
            # The topics are one large module; as documents they are about a page each.
            topics = importlib.import_module("pydoc_data.topics").topics
            for topic in sorted(topics):
                yield Document(
                    id=f"pydoc_data/topics/{topic}", where=f"{path}, topic {topic!r}", text=topics[topic]
                )

    def fingerprint(self) -> str:
        return combined_hash(
            "stdlib", *(f"{name} {file_fingerprint(path)}" for name, path in _library_files())
        )

    def describe(self) -> str:
        return f"standard library of Python {sysconfig.get_python_version()}"

    def size_hint(self) -> int | None:
        return sum(path.stat().st_size for _, path in _library_files())


def _library_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    library_files = []
    for directory, subdirectories, files in os.walk(root):
        # Changing the list in place keeps os.walk out of the other directories.
        subdirectories[:] = [name for name in subdirectories if not _is_left_out(name)]
        paths = [Path(directory, name) for name in files if name.endswith(".py") and not _is_left_out(name)]
        # Many __init__.py are empty, and an empty document counts as bad.
        library_files += [
            (path.relative_to(root).as_posix(), path) for path in paths if path.stat().st_size > 0
        ]
    if not library_files:
        raise ValueError(f"this Python has no library sources in {root}: give your own text with --data.path")
    return sorted(library_files)


def _is_left_out(part: str) -> bool:
    # _sysconfigdata_*.py and config-*/ have the paths and compiler flags of the build machine.
    return part in _LEFT_OUT or part.startswith(("_sysconfigdata", "config-"))
