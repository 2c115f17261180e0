"""Files that are there whole or not at all, and that are believed only if no bit of them has changed."""

from __future__ import annotations

import collections
import fcntl
import hashlib
import io
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What `save` writes is what torch.save writes (torch.load reads it too), this, and 64 hex digits: SHA-256 of
# all that stands before them.
MARK = b"pyens sha256 "
_DIGITS = 64
_PLAIN = (torch.Size, torch.dtype, torch.device, set)
_MAPPINGS: dict[type, Any] = {kind: kind for kind in (collections.Counter, collections.OrderedDict)}


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path in the same folder to write to. It takes the name `path` when all is on the disk.

    A kill at any moment leaves the old content or the new, never half of it; an error (a full disk) leaves
    the old content and nothing beside it. Several writers do not meet: the last one to end wins. A symbolic
    link stays one, and the file that it points to is replaced; the file's permissions stay too.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.stem[:32]}.{secrets.token_hex(8)}.partial{target.suffix[:32]}")
    try:
        yield partial
        if target.exists():
            shutil.copymode(target, partial)
        _sync(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    _sync(target.parent)  # so that the name survives a power failure too


def write_atomically(path: str | Path, content: bytes | memoryview) -> None:
    """Writes a file through `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def only_writer(path: str | Path, what: str) -> Iterator[None]:
    """Holds `<path>.lock` for as long as one run keeps writing to `path`; the system frees it after a kill.

    Raises:
        RuntimeError: another one holds it, in this process or another.
    """
    lock = Path(f"{os.path.realpath(path)}.lock")
    while True:
        with open(lock, "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    f"{what}: {path}: expected one run at a time, got a second while the first still writes"
                ) from None
            try:
                if not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    continue
            except FileNotFoundError:  # its last holder has just removed it
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def save(state: Mapping[str, Any], path: str | Path) -> None:
    """`torch.save` with a checksum over the whole file, through `write_atomically`.

    Raises:
        TypeError: something in it that `load` could not read again, by its place.
    """
    buffer = io.BytesIO()
    torch.save(plain(dict(state)), buffer)
    buffer.write(MARK)
    buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    write_atomically(path, buffer.getbuffer())


def plain(value: Any, place: str = "save: state") -> Any:
    """The same with numpy's numbers as Python's; refuses what `torch.load(weights_only=True)` cannot read."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        own = {key: plain(of_key, f"{place}[{key!r}]") for key, of_key in value.items()}
        return _MAPPINGS.get(type(value), dict)(own)
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(plain(own, f"{place}[{i}]") for i, own in enumerate(value))
    if value is not None and not isinstance(value, (Tensor, bool, int, float, complex, str, bytes, *_PLAIN)):
        raise TypeError(
            f"{place}: expected tensors, numbers, strings, lists and dicts to save, "
            f"got a {type(value).__name__}"
        )
    return value


def load(path: str | Path) -> dict[str, Any]:
    """What `save` wrote, with tensors on the CPU. The checksum is verified before anything is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, of another kind, or without a checksum, such as pyens wrote before
            it had one; it names the file.
    """
    content = memoryview(Path(path).read_bytes())
    body, digest = content[:-_DIGITS], bytes(content[-_DIGITS:])
    if bytes(body[-len(MARK) :]) != MARK:
        raise ValueError(
            f"load: {path}: expected a file that pyens saved, got one without its checksum at the end: cut "
            "off, of another kind, or of a pyens before checksums, whose files are not read any more"
        )
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError(f"load: {path}: expected the file as pyens saved it, got another checksum: damaged")
    try:
        state = torch.load(io.BytesIO(body[: -len(MARK)]), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"load: {path}: expected a file that pyens saved, got {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"load: {path}: expected a file that pyens saved, got a {type(state).__name__}")
    return state


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
