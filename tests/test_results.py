"""csrc/ops/results.h: the memory of freed results is that of the next ones, within bounds."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyens import reference, release_memory
from pyens.ops import mask_channels

MASKS = torch.tensor([[True, False], [True, True]])
MB = 1 << 20


def result(megabytes: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A result of an operation that takes so much memory."""
    rows = round(megabytes * MB) // (2 * dtype.itemsize)
    return mask_channels(torch.ones(1, 2, dtype=dtype).expand(rows, 2), MASKS)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[1])
    inherited = {k: v for k, v in os.environ.items() if k != "PYENS_KEEP_MB"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        cwd=root,
    )


@pytest.mark.parametrize("megabytes", [0.1, 3, 40])
def test_a_freed_result_is_the_next_ones_memory(megabytes):
    first = result(megabytes)
    address = first.data_ptr()
    del first
    second = result(megabytes)
    assert second.data_ptr() == address
    third = result(megabytes)
    assert abs(third.data_ptr() - address) >= second.nbytes


def test_a_smaller_batch_takes_the_same_memory_and_a_much_smaller_one_its_own():
    first = result(8)
    address = first.data_ptr()
    del first
    nearly = result(7.5)
    assert nearly.data_ptr() == address
    del nearly
    half = result(4)
    assert not address <= half.data_ptr() < address + 8 * MB


def test_a_view_keeps_the_memory():
    whole = result(2)
    row = whole[5]
    address = whole.data_ptr()
    del whole
    other = result(2)
    assert other.data_ptr() != address and torch.equal(row, torch.tensor([1.0, 0.0]))


def test_a_result_grows_shrinks_and_is_copied_as_any_tensor():
    a = result(1)
    expected = a.clone()
    n = len(a)
    a.resize_(3 * n, 2)
    assert torch.equal(a[:n], expected) and a.untyped_storage().resizable()
    a.resize_(1, 2)
    assert torch.equal(a, expected[:1])
    b = result(1)
    b.numpy()[0] = 5
    assert b[0].tolist() == [5, 5]
    b.share_memory_()
    assert torch.equal(b[1:], expected[1:])


def test_threads_get_memory_of_their_own():
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            rows = int(torch.randint(9000, 30000, (), generator=generator))
            x = torch.randn(rows, 2, generator=generator)
            kept = [mask_channels(x, MASKS), mask_channels(-x, MASKS)]
            if not torch.equal(kept[0], reference.mask_channels(x, MASKS)):
                wrong.append(seed)
            if not torch.equal(kept[1], -kept[0]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


LEFT = """
import torch
from pyens.ops import mask_channels
from pathlib import Path

def resident():  # anonymous memory, in megabytes
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("RssAnon")) / 1024

masks = torch.tensor([[True, True]])
x = torch.ones(2 ** 20, 2)  # 8 MB
mask_channels(x, masks)  # torch's threads and the like
before = resident()
alive = [mask_channels(x, masks) for _ in range(40)]
full = resident()
del alive
print(full - before, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
@pytest.mark.parametrize(("given", "most"), [("", 256), ("24", 24), ("0", 0)])
def test_no_more_is_kept_than_the_environment_allows(given, most):
    done = run(LEFT, PYENS_KEEP_MB=given)
    assert done.returncode == 0, done.stderr
    full, left = (float(number) for number in done.stdout.split())
    # The first result's 8 MB may have been counted before.
    assert full > 300 and most - 9 <= left <= most + 8


def test_what_is_kept_is_given_back_on_request():
    release_memory()
    first, second = result(3), result(5)
    del first
    assert 3 * MB <= release_memory() < 4 * MB and release_memory() == 0
    assert torch.equal(second[0], torch.tensor([1.0, 0.0]))
    del second
    assert 5 * MB <= release_memory() < 6 * MB


def test_a_result_is_cloned_lazily():
    a = result(1)
    b = torch._lazy_clone(a)
    a[0] = 7
    assert b[0].tolist() == [1, 0] and a[0].tolist() == [7, 7]
    del a
    assert result(1).data_ptr() != b.data_ptr() and b[0].tolist() == [1, 0]


@pytest.mark.parametrize("given", ["1.5", "-1", "99999999999999999999"])
def test_other_numbers_of_megabytes_are_refused_by_name(given):
    done = run(LEFT, PYENS_KEEP_MB=given)
    assert done.returncode == 1 and "ValueError: PYENS_KEEP_MB: expected a number of megabytes" in done.stderr
    assert f'got "{given}"' in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_child_of_a_fork_has_results_too():
    code = """
import os, threading, torch
from pyens.ops import mask_channels
torch.set_num_threads(1)
masks, x = torch.tensor([[True, False]]), torch.ones(20000, 2)
stop = threading.Event()
def busy():
    while not stop.is_set():
        mask_channels(x, masks)
other = threading.Thread(target=busy)
other.start()
for _ in range(30):
    child = os.fork()
    if child == 0:
        os._exit(int(mask_channels(x, masks).sum()) != 20000)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
other.join()
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
