"""Files that are written whole or not at all."""

import os

import pytest

from pyens import _files


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "kept.txt"
    _files.write_atomically(path, b"old")

    def fail(handle):
        raise OSError("half way")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="half way"):
        _files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
