"""What all tests share: devices, folders of real data, how hypothesis searches.

Environment:
    PYENS_REQUIRE_CUDA=1  tests that need a GPU fail where they would skip
    PYENS_DATA=folder     where real data lies (default: shared/data beside the repository)
    CI=1                  hypothesis draws the same examples every time
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

# Before torch loads OpenMP: threads that wait sleep. Spinning, beside another process on the same cores, they
# make minutes of seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile("dev", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, database=None)
for name, examples in (("slow", 250), ("fuzz", 5000)):  # make slow, make fuzz
    hypothesis.settings.register_profile(name, deadline=None, max_examples=examples)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def why_no_cuda() -> str | None:
    """Why tests on a GPU cannot run here; None if they can."""
    if not torch.cuda.is_available():
        return f"no CUDA GPU is available to torch {torch.__version__}"
    import pyens

    built = json.loads(Path(pyens.__file__).with_name("_C.build.json").read_text())
    return None if built["cuda"] else "pyens was built without CUDA"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and (reason := why_no_cuda()):
        if os.environ.get("PYENS_REQUIRE_CUDA") == "1":
            pytest.fail(f"PYENS_REQUIRE_CUDA=1, but {reason}", pytrace=False)
        pytest.skip(reason)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module draws while it is imported is the same in every run, as `_seed` makes it for tests."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same state of torch's generators, whichever tests ran before it."""
    torch.manual_seed(0)


# Of the session, not of the function, so that tests under hypothesis may take it.
@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The test runs on the CPU and on the GPU."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def data_dir() -> Callable[[str], Path]:
    """`data_dir("mnist")` is the folder of that data set; the test skips where it is absent."""
    root = Path(os.environ.get("PYENS_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"no data set {name!r} in {root} (set PYENS_DATA)")
        return root / name

    return find
