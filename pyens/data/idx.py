"""Images and labels in the idx format: MNIST and what is laid out like it, from the user's own folder."""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyens.data.digits import Split

BLOCK = 1 << 20  # bytes read at a time
MOST_DIMENSIONS = 64  # of a tensor


class Mnist(NamedTuple):
    """The two parts that MNIST and its kin come in."""

    train: Split
    test: Split


def load_mnist(folder: str | os.PathLike[str]) -> Mnist:
    """MNIST, or what is laid out like it, such as Fashion-MNIST: its "train" and "t10k" parts.

    Args:
        folder: where the four files lie, as they are downloaded.

    Returns:
        Images `[N, 784]` float32 in [0, 1] and labels `[N]` int64 of both parts, in their order.

    Raises:
        FileNotFoundError, ValueError: as `load_idx`.
    """
    return Mnist(load_idx(folder, "train"), load_idx(folder, "t10k"))


def load_idx(folder: str | os.PathLike[str], part: str = "train") -> Split:
    """The images and labels of one part of a data set: MNIST, Fashion-MNIST, notMNIST, ...

    Reads `<part>-images-idx3-ubyte` and `<part>-labels-idx1-ubyte` in `folder`, plain or with `.gz`.

    Args:
        folder: where the files lie, as they are downloaded.
        part: how their names begin: "train" and "t10k" for MNIST.

    Returns:
        Images `[N, H W]` float32 in [0, 1], row by row, and labels `[N]` int64, on the CPU, in their order.

    Raises:
        FileNotFoundError: without one of the files.
        ValueError: for a file that is not idx of unsigned bytes, is cut short or too long, or for another
            number of labels than of images. All errors name the file.
    """
    images_path = _find(Path(folder), f"{part}-images-idx3-ubyte")
    labels_path = _find(Path(folder), f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.dim() != 3:
        raise ValueError(f"load_idx: {images_path}: expected [N, H, W], got shape {list(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"load_idx: {labels_path}: expected a label for each of the {len(images)} images, "
            f"got shape {list(labels.shape)}"
        )
    return Split(images.flatten(1).float() / 255, labels.long())


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """One idx file of unsigned bytes, plain or gzip by its content, as a uint8 tensor of the shape it states.

    Raises:
        OSError: a file that cannot be read.
        ValueError: for another format, or another length than the header's shape says.
    """
    path = Path(path)
    with path.open("rb") as plain:
        zipped = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        try:
            return _read(path, gzip.GzipFile(fileobj=plain) if zipped else plain)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"read_idx: {path}: expected a whole gzip file, got {error}") from error


def _read(path: Path, file: BinaryIO | gzip.GzipFile) -> Tensor:
    # Two zeros, the element type (8: unsigned byte), the number of dimensions, their sizes big-endian.
    start = file.read(4)
    if len(start) < 4 or start[:3] != b"\0\0\x08":
        raise ValueError(
            f"read_idx: {path}: expected idx of unsigned bytes (00 00 08), "
            f"got {start[:3].hex(' ') or 'no bytes'}"
        )
    sizes = file.read(4 * start[3])
    if len(sizes) < 4 * start[3]:
        raise ValueError(
            f"read_idx: {path}: expected a header of {4 + 4 * start[3]} bytes, got {4 + len(sizes)}"
        )
    shape = list(struct.unpack(f">{start[3]}I", sizes))
    if len(shape) > MOST_DIMENSIONS or math.prod(size for size in shape if size) >= 1 << 63:
        raise ValueError(
            f"read_idx: {path}: expected at most {MOST_DIMENSIONS} dimensions and 2^63 - 1 bytes, got "
            f"{len(shape)} dimensions and {math.prod(shape):.3g} bytes"
        )
    # No more than the header promises, and one byte to see that nothing is left: a small gzip file can hold
    # more than the memory.
    expected, content = math.prod(shape), bytearray()
    while len(content) <= expected and (block := file.read(min(BLOCK, expected + 1 - len(content)))):
        content += block
    if len(content) != expected:
        more = " or more" * (len(content) > expected)
        raise ValueError(
            f"read_idx: {path}: expected {expected} bytes for shape {shape}, got {len(content)}{more}"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8)).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise FileNotFoundError(f"load_idx: expected {folder / name} or {name}.gz beside it, found neither")
