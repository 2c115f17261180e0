"""Files that are written whole or not at all, and read only if every bit is as it was written."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pyens import _files

ROOT = Path(__file__).parents[1]


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "kept.txt"
    _files.write_atomically(path, b"old")

    def fail(handle):
        raise OSError("half way")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="half way"):
        _files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "kept.txt"
    _files.write_atomically(path, b"old")
    script = """
import resource, sys
from pyens import _files
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as a disk on which 1000 bytes are left
_files.write_atomically(sys.argv[1], bytes(5000))
"""
    done = subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True)
    assert "OSError" in done.stderr.splitlines()[-1]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "state.pt"
    _files.save({"weight": torch.arange(300.0), "epoch": 3}, path)
    content = path.read_bytes()
    state = _files.load(path)
    assert torch.equal(state["weight"], torch.arange(300.0)) and state["epoch"] == 3
    draw = np.random.default_rng(0)
    last = range(8 * (len(content) - len(_files.MARK) - 64), 8 * len(content))  # mark and digest
    for bit in [*draw.integers(8 * len(content), size=400).tolist(), *last]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"load: .*state\.pt: expected"):
            _files.load(path)


def test_cut_and_extended_files_and_those_without_a_checksum_are_refused(tmp_path):
    path = tmp_path / "state.pt"
    _files.save({"epoch": 3}, path)
    content = path.read_bytes()
    for other in (
        b"",
        content[:-1],
        content[:-77],
        content[: len(content) // 2],
        content + b"x",
        content[1:],
    ):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"state\.pt: expected"):
            _files.load(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match=r"state\.pt: .* without its checksum .* a pyens before checksums"):
        _files.load(path)
    with pytest.raises(FileNotFoundError):
        _files.load(tmp_path / "none.pt")


def test_torch_reads_the_file_too(tmp_path):
    _files.save({"weight": torch.arange(3.0)}, tmp_path / "state.pt")
    assert torch.equal(torch.load(tmp_path / "state.pt", weights_only=True)["weight"], torch.arange(3.0))


def test_many_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "large"
    errors = []

    def write(number):
        try:
            for _ in range(5):
                _files.write_atomically(path, bytes([number]) * 300_000)
                content = path.read_bytes()
                assert len(content) == 300_000 and len(set(content)) == 1
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=[number]) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert errors == []
    assert list(tmp_path.iterdir()) == [path]


def test_a_symbolic_link_and_permissions_stay(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real.pt", tmp_path / "link.pt"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    _files.write_atomically(link, b"new")
    assert link.is_symlink() and real.read_bytes() == b"new"
    assert real.stat().st_mode & 0o777 == 0o640
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    _files.write_atomically(tmp_path / "fresh", b"")
    assert (tmp_path / "fresh").stat().st_mode == plain.stat().st_mode


def test_only_one_run_may_keep_a_file(tmp_path):
    path = tmp_path / "run.pt"
    with _files.only_writer(path, "fit: checkpoint"):
        message = r"fit: checkpoint: .*run\.pt: expected one run at a time"
        with pytest.raises(RuntimeError, match=message), _files.only_writer(path, "fit: checkpoint"):
            pass
        with _files.only_writer(tmp_path / "other.pt", "fit: checkpoint"):
            pass
    with _files.only_writer(path, "fit: checkpoint"):
        pass
    assert list(tmp_path.iterdir()) == []
