"""Builds the operation beside the installed pyens and puts it where its files would lie in the repository."""

import importlib
from pathlib import Path

import torch.utils.cpp_extension

import benchmarks
import pyens.ops
import pyens.reference

HERE = Path(__file__).resolve().parents[1]
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "template" / torch.__version__

BUILD.mkdir(parents=True, exist_ok=True)
kernel = BUILD / "gain_kernel.cpp"  # objects are named after files alone, and ops/ has a gain.cpp too
kernel.unlink(missing_ok=True)
kernel.symlink_to(HERE / "csrc/kernels/cpu/gain.cpp")
ours = HERE / "csrc/python.cpp", HERE / "csrc/ops/gain.cpp", kernel
sources = *ours, ROOT / "csrc/kernels/cpu/isa.cpp", ROOT / "csrc/ops/results.cpp"
extension = torch.utils.cpp_extension.load(
    "gain_template",
    [str(source) for source in sources],
    extra_include_paths=[str(HERE / "csrc"), str(ROOT / "csrc")],
    extra_cflags=["-fvisibility=hidden", "-ffp-contract=off", "-fopenmp"],
    build_directory=str(BUILD),
)
pyens._C.gain = extension.gain
for package in (pyens.reference, pyens.ops, benchmarks):
    package.__path__.append(str(HERE / package.__name__.replace(".", "/")))
for package in (pyens.reference, pyens.ops):
    package.gain = importlib.import_module(f"{package.__name__}.gain").gain
