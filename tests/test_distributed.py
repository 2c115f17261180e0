"""Data-parallel training in two processes, by the wrapper that docs/training.md shows."""

import re
import subprocess
import sys
from pathlib import Path

import pyens

ROOT = Path(pyens.__file__).parents[1]
SCRIPT = """
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
import pyens

WRAPPER

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
draw = torch.Generator().manual_seed(0)
x, y = torch.randn(8, 4, generator=draw), torch.randn(8, 1, generator=draw)
own = slice(4 * rank, 4 * rank + 4)  # half of the batch each

def model():
    return pyens.EnsembleMLP(3, 4, [5], 1, seeds=[0, 1, 2])

ddp = DistributedDataParallel(Losses(model()))
ddp(x[own], y[own], loss="mse").sum().backward()
alone = model()
alone.loss(x, y, loss="mse").sum().backward()
for got, right in zip(ddp.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(got.grad, right.grad)

around = DistributedDataParallel(Losses(model()))
around.module.model.loss(x[own], y[own], loss="mse").sum().backward()
assert not torch.allclose(next(around.parameters()).grad, next(alone.parameters()).grad)
distributed.destroy_process_group()
"""


def test_the_wrapper_of_the_docs_adds_up_gradients(tmp_path):
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (wrapper,) = re.findall(r"^class Losses.*?(?=^```)", page, re.M | re.S)
    script = SCRIPT.replace("WRAPPER", wrapper)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
