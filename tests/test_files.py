"""A file is written whole or not at all."""

from pathlib import Path
from typing import BinaryIO

import pytest

from hessfunc.files import write_text, write_whole


def test_a_file_is_replaced_by_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old and longer")
    write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    def full(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "state"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, full)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_the_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "state", lambda file: file.write(b""))


def test_text_is_utf_8_and_paths_of_other_locales_are_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text"
    escaped = "é".encode().decode("ascii", "surrogateescape")
    write_text(path, f"± {escaped}")
    assert path.read_text(encoding="utf-8") == "± é"
