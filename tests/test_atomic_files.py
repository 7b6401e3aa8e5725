"""Atomic writes: all of the new content or the old one, and no temporary files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmjax import faults
from slmjax.atomic_files import atomic_directory, atomic_file, write_text


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    assert write_text(path, "Größe") == path
    assert path.read_bytes() == "Größe".encode()
    write_text(path, "second")
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as temporary:
        temporary.write_text("half of the n")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with atomic_file(path) as first, atomic_file(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last
    assert list(tmp_path.iterdir()) == [path]


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    with atomic_directory(tmp_path / "directory"):
        pass
    assert (tmp_path / "directory").stat().st_mode == ordinary.stat().st_mode


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directory"
    with atomic_directory(path) as temporary:
        (temporary / "a").write_text("1")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["a"]
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_directory_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "directory") as temporary:
        (temporary / "a").write_text("1")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_an_empty_directory_is_replaced_and_any_other_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    path.mkdir()
    with atomic_directory(path) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(ValueError, match="exists already"), atomic_directory(path):
        pass
    with pytest.raises(ValueError, match="exists already"), atomic_directory(path / "a"):
        pass
    assert (path / "a").read_text() == "1"


def test_the_first_of_two_writers_of_a_cache_wins(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    with atomic_directory(path, keep_existing=True) as late:
        (late / "a").write_text("late")
        with atomic_directory(path, keep_existing=True) as early:
            (early / "a").write_text("early")
    assert (path / "a").read_text() == "early"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="not empty"), atomic_directory(path.parent / "other") as temporary:
        (temporary / "a").write_text("1")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "b").write_text("of another process")


@pytest.mark.parametrize("write", [atomic_file, atomic_directory])
def test_an_error_of_the_disk_names_the_final_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Any]
) -> None:
    monkeypatch.setattr(faults, "_faults", faults.parse("file.replace=full"))
    path = tmp_path / "final"
    with pytest.raises(OSError, match="No space left on device") as raised, write(path) as temporary:
        temporary.write_text("1") if write is atomic_file else (temporary / "a").write_text("1")
    assert raised.value.filename == str(path) and not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError) as raised, write(path) as temporary:
        (temporary / "missing" / "b").read_text()
    assert raised.value.filename == str(path / "missing" / "b")
    # An error of reading something else keeps its own name.
    with pytest.raises(FileNotFoundError) as raised, write(path):
        (tmp_path / "source").read_text()
    assert raised.value.filename == str(tmp_path / "source")
