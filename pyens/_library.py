"""Loads the operations and their front door `pyens._C`, or says what to run so that they load.

`pyens/_operations.abi3.so` registers `torch.ops.pyens`; it needs no Python, so C++ programs load it alone.

The reference is never a silent stand-in for it: without a matching extension the import fails.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from pyens._version import __version__

__all__ = ["_C", "build_info"]

_BUILD = "pip install --no-build-isolation --force-reinstall --no-deps .   (in a checkout: make build)"


def _shadowed() -> str:
    """What to say where a folder of sources, such as a checkout, comes before a pyens that is installed."""
    here = Path(__file__).resolve().parent
    for entry in sys.path:
        there = (Path(entry) / "pyens").resolve()
        if there != here and (there / "_C.build.json").exists():
            return (
                f"\nThese are the sources in {here}. They hide the pyens that is installed in {there}: start "
                "Python in another folder to use that one."
            )
    return ""


def _check_build() -> dict[str, Any]:
    """What the extension was built for, read without loading it."""
    path = Path(__file__).with_name("_C.build.json")
    if not path.exists():
        raise ImportError(
            f"pyens: its extension pyens._C is not built. In the folder of its sources run\n    {_BUILD}"
            f"{_shadowed()}"
        )
    built: dict[str, Any] = json.loads(path.read_text())
    if built["torch"] != torch.__version__:
        raise ImportError(
            f"pyens: its extension was built for torch {built['torch']}, but torch {torch.__version__} is "
            f"imported. Build it again, in the folder of its sources:\n    {_BUILD}"
        )
    return built


_built = _check_build()
try:
    torch.ops.load_library(Path(__file__).with_name("_operations.abi3.so"))
    # Not `from pyens import _C`: where the file is missing, that speaks of circular imports.
    import pyens._C as _C
except (ImportError, OSError) as error:
    raise ImportError(
        f"pyens: its extension, built for Python {_built['python']}, does not load ({error}). "
        f"Build it again, in the folder of its sources:\n    {_BUILD}"
    ) from error


def release_memory() -> int:
    """Gives the memory of freed results, kept for the next ones, back to the system; returns its bytes.

    Operations on the CPU keep at most `PYENS_KEEP_MB` megabytes, 256 where the environment does not say.
    """
    released: int = torch.ops.pyens.release_memory()
    return released


def build_info() -> dict[str, Any]:
    """What this pyens was built for and what it runs on.

    Keys: `version`, `torch` (built for), `python`, `compiler`, `cpu_capability` (the instruction set that the
    CPU kernels use here: base, avx2, avx512 or avx512_bf16; the environment variable `PYENS_CPU_CAPABILITY`
    caps it), `cuda` ("yes", or "no" and why) and `threads` (of torch, which the kernels share).
    """
    info: dict[str, Any] = {
        "version": __version__,
        "torch": _built["torch"],
        "python": _built["python"],
        "compiler": torch.ops.pyens.compiler(),
        "cpu_capability": torch.ops.pyens.cpu_capability(),
        "cuda": "yes",
    }
    if not _built["cuda"]:
        cause = (
            "this torch has no CUDA"
            if torch.version.cuda is None
            else "built with PYENS_CUDA=0 or without nvcc"
        )
        info["cuda"] = f"no: {cause}"
    elif not torch.cuda.is_available():
        info["cuda"] = "built, but torch sees no GPU"
    info["threads"] = torch.get_num_threads()
    return info
