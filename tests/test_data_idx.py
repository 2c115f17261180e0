"""Loaders of idx files, on small made-up files of the same format."""

import gzip
import struct
import tracemalloc

import pytest
import torch

from pyens.data import load_idx, load_mnist, read_idx


def idx(array: torch.Tensor, kind: int = 8) -> bytes:
    header = struct.pack(">BBBB", 0, 0, kind, array.dim()) + struct.pack(f">{array.dim()}I", *array.shape)
    return header + array.to(torch.uint8).numpy().tobytes()


IMAGES = torch.arange(2 * 3 * 4).view(2, 3, 4) * 11 % 256
LABELS = torch.tensor([9, 0])


def write(folder, images=IMAGES, labels=LABELS, part="train", zipped=False):
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx(array)
        path = folder / f"{part}-{name}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("part", ["train", "t10k", "notMNIST_small"])
def test_images_and_labels(tmp_path, part, zipped):
    split = load_idx(write(tmp_path, part=part, zipped=zipped), part)
    assert split.images.dtype == torch.float32 and split.labels.dtype == torch.int64
    assert torch.equal(split.images, IMAGES.view(2, 12).float() / 255)
    assert split.labels.tolist() == [9, 0]
    split.images.zero_()  # memory of its own


def test_mnist_is_both_parts(tmp_path):
    write(tmp_path, zipped=True)
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte or t10k-images-idx3-ubyte\.gz"):
        load_mnist(tmp_path)
    write(tmp_path, part="t10k", images=IMAGES + 1, labels=LABELS.flip(0))
    mnist = load_mnist(tmp_path)
    for split, part in ((mnist.train, "train"), (mnist.test, "t10k")):
        assert torch.equal(split.images, load_idx(tmp_path, part).images)
        assert torch.equal(split.labels, load_idx(tmp_path, part).labels)
    assert mnist.train.labels.tolist() == [9, 0] and mnist.test.labels.tolist() == [0, 9]


def test_any_shape(tmp_path):
    for array in (torch.arange(5), torch.zeros(0, 3, 4), torch.ones(2, 2, 2, 2)):
        (tmp_path / "file").write_bytes(idx(array))
        got = read_idx(tmp_path / "file")
        assert got.dtype == torch.uint8 and torch.equal(got, array.to(torch.uint8))


def test_plain_files_come_first(tmp_path):
    write(tmp_path, zipped=True, labels=torch.tensor([1, 1]))
    write(tmp_path)
    assert load_idx(tmp_path).labels.tolist() == [9, 0]


GOOD = idx(IMAGES)
BAD = {
    "empty": (b"", "expected idx of unsigned bytes (00 00 08), got no bytes"),
    "another format": (b"P5 1 1 255", "expected idx of unsigned bytes (00 00 08), got 50 35 20"),
    "floats": (idx(IMAGES, kind=13), "expected idx of unsigned bytes (00 00 08), got 00 00 0d"),
    "half a header": (GOOD[:10], "expected a header of 16 bytes, got 10"),
    "cut short": (GOOD[:-1], "expected 24 bytes for shape [2, 3, 4], got 23"),
    "too long": (GOOD + b"\0", "expected 24 bytes for shape [2, 3, 4], got 25"),
    "cut gzip": (gzip.compress(GOOD)[:-9], "expected a whole gzip file"),
    "bad gzip": (b"\x1f\x8b" + b"\xff" * 30, "expected a whole gzip file"),
    "labels": (idx(LABELS), "expected [N, H, W], got shape [2]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(tmp_path, case):
    content, message = BAD[case]
    path = write(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        load_idx(tmp_path)
    assert f"{path}: {message}" in str(raised.value)


def test_missing_files_and_labels(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte or t10k-images-idx3-ubyte\.gz"):
        load_idx(write(tmp_path), "t10k")
    write(tmp_path, labels=torch.arange(3))
    with pytest.raises(
        ValueError, match=r"labels-idx1-ubyte: expected a label for each of the 2 images, got"
    ):
        load_idx(tmp_path)


def test_real_files(data_dir):
    for name, part, shape in (
        ("mnist", "t10k", (10_000, 784)),
        ("notmnist-small", "notMNIST_small", (18_724, 784)),
    ):
        split = load_idx(data_dir(name), part)
        assert split.images.shape == shape and split.labels.unique().tolist() == list(range(10))
        assert split.images.min() == 0 and split.images.max() == 1


def test_a_header_that_promises_too_much_is_refused_at_once(tmp_path):
    path = tmp_path / "file"
    huge = 2**32 - 1
    for shape in ([huge] * 2, [huge] * 3, [0, huge, huge, huge], [1] * 65, [1] * 255):
        header = struct.pack(">BBBB", 0, 0, 8, len(shape)) + struct.pack(f">{len(shape)}I", *shape)
        for content in (header + b"1", gzip.compress(header + b"1")):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"read_idx: {path}: expected .*, got "):
                read_idx(path)
    path.write_bytes(struct.pack(">BBBB", 0, 0, 8, 64) + struct.pack(">64I", *[1] * 64) + b"1")
    assert read_idx(path).shape == (1,) * 64


@pytest.mark.parametrize("zipped", [False, True])
def test_no_more_is_read_than_the_header_promises(tmp_path, monkeypatch, zipped):
    path = tmp_path / "file"
    for extra in (1, 10**8):
        content = idx(LABELS) + bytes(extra)
        path.write_bytes(gzip.compress(content, 1) if zipped else content)
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"file: expected 2 bytes for shape \[2\], got 3 or more"):
            read_idx(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10**7
    monkeypatch.setattr("pyens.data.idx.BLOCK", 7)  # in several pieces
    content = idx(IMAGES)
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert torch.equal(read_idx(path), IMAGES.to(torch.uint8))


def test_a_damaged_end_of_a_gzip_file_is_seen(tmp_path):
    content = bytearray(gzip.compress(idx(IMAGES)))
    content[-6] ^= 1  # of the checksum
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"file: expected a whole gzip file, got CRC"):
        read_idx(tmp_path / "file")
