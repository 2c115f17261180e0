"""Images and labels in the idx format: MNIST and what is laid out like it, from the user's own folder."""

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyens.data.digits import Split


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
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"read_idx: {path}: expected a whole gzip file, got {error}") from error
    # Two zeros, the element type (8: unsigned byte), the number of dimensions, their sizes big-endian.
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(
            f"read_idx: {path}: expected idx of unsigned bytes (00 00 08), "
            f"got {content[:3].hex(' ') or 'no bytes'}"
        )
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise ValueError(f"read_idx: {path}: expected a header of {header} bytes, got {len(content)}")
    shape = np.frombuffer(content, ">u4", content[3], offset=4).tolist()
    if len(content) != header + math.prod(shape):
        raise ValueError(
            f"read_idx: {path}: expected {math.prod(shape)} bytes for shape {shape}, "
            f"got {len(content) - header}"
        )
    # A copy: what is made of bytes cannot be written to.
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise FileNotFoundError(f"load_idx: expected {folder / name} or {name}.gz beside it, found neither")
