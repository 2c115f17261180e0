"""Checkpoints: everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyens import _files
from pyens.training._source import Source

FORMAT = "pyens.training 3"


def describe(
    arguments: Mapping[str, Any],
    data: Source | Sequence[Tensor | None],
    validation: Source | Sequence[Tensor | None],
) -> dict[str, Any]:
    """What must be the same for a run to be continued: arguments, and data down to the bits."""
    return {**arguments, "data": _describe(data), "validation data": _describe(validation)}


def _describe(data: Source | Sequence[Tensor | None]) -> Any:
    if isinstance(data, Source):
        return data.describe()
    return [None if t is None else describe_tensor(t) for t in data]


def save(path: Path, described: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint atomically."""
    _files.save({"format": FORMAT, "run": dict(described), "state": dict(state)}, path)


def load(
    path: Path, described: Mapping[str, Any], kind: str = FORMAT, who: str = "fit"
) -> dict[str, Any] | None:
    """The state that was saved last, None if there is no file.

    Raises:
        ValueError: a damaged file, or one of another run; it says in what they differ.
    """
    if not path.exists():
        return None
    saved = _files.load(path)
    if saved.get("format") != kind:
        raise ValueError(f"{who}: checkpoint: {path}: expected a checkpoint of {who}, got another file")
    run, state = saved.get("run"), saved.get("state")
    if not isinstance(run, dict) or not isinstance(state, dict):
        raise ValueError(
            f"{who}: checkpoint: {path}: expected a checkpoint of {who}, got one without its parts"
        )
    for name in {**run, **described}:
        then, now = run.get(name), described.get(name)
        if then != now:
            expected, got = _short(repr(now), repr(then))
            raise ValueError(
                f"{who}: checkpoint: {path} is of another run: expected {name} {expected}, "
                f"got {got}; name another file, or delete this one to start anew"
            )
    return state


def describe_tensor(tensor: Tensor) -> str:
    stored = tensor.detach().cpu().contiguous()
    bits = zlib.crc32(stored.reshape(-1).view(torch.uint8).numpy().data)
    return f"{stored.dtype} {list(stored.shape)} crc32 {bits:08x}"


def _short(*texts: str) -> list[str]:
    """Cut to 60 characters, so that they show where they differ."""
    if all(len(text) <= 60 for text in texts):
        return list(texts)
    same = next((i for i, found in enumerate(zip(*texts, strict=False)) if len(set(found)) > 1), 0)
    start = max(0, same - 30)
    shown = [("..." if start else "") + text[start:] for text in texts]
    return [text if len(text) <= 60 else text[:57] + "..." for text in shown]
