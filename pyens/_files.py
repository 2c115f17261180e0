"""Files that are there whole or not at all."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file such that a kill at any moment leaves the old content or the new, never half of it.

    The content goes to `<path>.partial` first, reaches the disk, and then takes the name.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if os.name == "posix":  # so that the name survives a power failure too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(state: Mapping[str, Any], path: str | Path) -> None:
    """`torch.save` through `write_atomically`."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomically(path, buffer.getbuffer())


def load(path: str | Path) -> dict[str, Any]:
    """What `save` wrote, with tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged or of another kind; it names the file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"load: {path}: expected a file that pyens saved, got {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"load: {path}: expected a file that pyens saved, got a {type(state).__name__}")
    return state
