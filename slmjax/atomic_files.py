"""Write files and directories atomically: a reader sees the old content or all of the new.

    write_text(path, text)
    with atomic_file(path) as temporary:            # a path in the same directory
        np.save(temporary, array)                   # renamed to `path` when the block ends
    with atomic_directory(path) as temporary:       # an empty directory next to `path`
        (temporary / "model.json").write_text(text)

When a block raises, what it wrote is deleted and the old content stays. A process that is killed leaves
a temporary file or directory behind. Its name begins with a dot, and no reader opens it.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from slmjax import faults


def write_text(path: Path, text: str) -> Path:
    """Replace the content of a file with UTF-8 text, and return the path."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to, which is renamed to `path` when the block ends.

    An existing file is replaced. Missing parent directories are created.

    Raises:
      OSError: it cannot be written; the error names `path`, and the old content stays.
    """
    temporary = _temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        # Without this, a power failure soon after the rename can leave an empty file: the file system may
        # store the new name before the content.
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        faults.at("file.replace")
        temporary.replace(path)
    except OSError as error:
        _name_final_file(error, path, temporary=temporary)
        raise
    finally:
        # On a disk that became read-only nothing can be deleted, and the error of writing is the one to show.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yield an empty directory to fill, which is renamed to `path` when the block ends.

    Args:
      path: the final directory; missing parents are created.
      keep_existing: if another process creates `path` first, keep that directory and drop this one.
        For caches, where all processes write the same content.

    Raises:
      ValueError: `path` exists and is not empty, unless `keep_existing`.
      OSError: the directory cannot be created, filled or renamed; the error names a file or `path`.
    """
    if not keep_existing and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already: give the name of a new directory, or delete it first")
    temporary = _temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        faults.at("file.replace")
        try:
            temporary.replace(path)  # an empty directory may be replaced, any other may not
        except OSError:
            if not (keep_existing and path.is_dir()):
                raise
    except OSError as error:
        _name_final_file(error, path, temporary=temporary)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# Errors of writing, which the system often raises without the name of a file.
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


def _name_final_file(error: OSError, path: Path, *, temporary: Path) -> None:
    """Name the final file in an error that names the temporary one, or none at all."""
    if error.filename is None and error.errno in _WRITE_ERRORS:
        error.filename = str(path)
    elif str(error.filename).startswith(str(temporary)):
        error.filename = str(path) + str(error.filename).removeprefix(str(temporary))


def disk_problem(error: Exception | str) -> str | None:
    """Return the reason, such as "No space left on device", if an error of any library is one of writing."""
    if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
        return os.strerror(error.errno)
    # Libraries in C++ and Rust raise classes of their own, with the system's text in theirs.
    texts = (os.strerror(number) for number in _WRITE_ERRORS)
    return next((text for text in texts if text in str(error)), None)


def _temporary_path(path: Path) -> Path:
    # In the same directory, since a rename is atomic only within one file system. The random part keeps apart
    # threads and processes (of several hosts, too) that write the same file.
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}.tmp")
