"""Builds `pyens._operations` and `pyens._C`. Everything else about the package is in pyproject.toml.

Environment:
    PYENS_CUDA=0|1|auto   build the CUDA kernels; auto (default): if torch is a CUDA build and nvcc is there
    TORCH_CUDA_ARCH_LIST  compute capabilities to compile for (default: 8.0 and 9.0, with PTX for later ones)
    CXX, CXXFLAGS         the C++ compiler, and flags for it after those from here
    MAX_JOBS              how many compilers run at once

What is missing is said before anything is built, and also before pip fetches what pyens needs to run.
"""

import hashlib
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        "pyens compiles against the torch that it will run with, and none can be imported here: pip builds "
        "in an environment of its own unless it is told not to.\n"
        "Install torch 2.11 or later first, and setuptools, ninja and a C++ compiler. "
        "Then run: pip install --no-build-isolation ."
    ) from error


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


for name, version, least in (
    ("torch", torch.__version__, "2.11"),
    ("setuptools", setuptools.__version__, "70.1"),
):
    if numbers(version) < numbers(least):
        raise SystemExit(
            f"pyens needs {name} {least} or later to build, and this is {version}.\n"
            f"Run: pip install --upgrade {name}"
        )

# Where the environment is not activated, its ninja is not on PATH.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "pyens" / "_version.py"))["__version__"]
COMPILER = shlex.split(cpp_extension.get_cxx_compiler())


def check_compiler() -> None:
    """Whether there is a compiler that knows the C++ that torch's headers are written in."""
    standard = "c++20" if numbers(torch.__version__) >= (2, 13) else "c++17"
    command = [*COMPILER, f"-std={standard}", "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "").strip() or error
        raise SystemExit(
            f"pyens needs a {standard.upper()} compiler, and {shlex.join(COMPILER)!r} is none: {said}\n"
            "Install one, such as g++, or set CXX to one that is there."
        ) from None


check_compiler()


def wants_cuda() -> bool:
    """Whether to build the CUDA kernels, as PYENS_CUDA asks."""
    choice = os.environ.get("PYENS_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"PYENS_CUDA: expected 0, 1 or auto, got {choice!r}")
    missing = []
    if torch.version.cuda is None:
        missing.append(f"a CUDA build of torch (this is torch {torch.__version__})")
    if cpp_extension.CUDA_HOME is None:
        missing.append("a CUDA toolkit (nvcc on PATH, or CUDA_HOME)")
    elif shutil.which("nvcc", path=os.path.join(cpp_extension.CUDA_HOME, "bin")) is None:
        missing.append(f"nvcc in {os.path.join(cpp_extension.CUDA_HOME, 'bin')}, where CUDA_HOME points")
    if choice == "1" and missing:
        raise SystemExit("PYENS_CUDA=1 needs " + " and ".join(missing))
    return choice != "0" and not missing


CUDA = wants_cuda()


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extension(name: str, sources: list[str], **options: Any) -> setuptools.Extension:
    macros = []
    cxx = ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
    # Python asks for debug information; without it the extension builds faster and is a fraction of the size.
    cxx += ["-O3", "-g0"]
    # An FMA is written where one is meant: the accumulation order is part of the kernels' contract.
    cxx += ["-ffp-contract=off"]
    # Compiled with OpenMP (at::parallel_for needs it) but not linked with it: the symbols resolve to the
    # runtime that torch has loaded, so that both share one thread pool.
    cxx += ["-fopenmp"]
    # Torch's headers as system headers: their warnings are not ours to mend.
    cxx += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    # Setuptools gives them to the linker alone.
    cxx += shlex.split(os.environ.get("CXXFLAGS", ""))
    compile_args = {"cxx": cxx}
    if CUDA:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        macros += [("PYENS_WITH_CUDA", None)]
        # BuildExtension turns the operators of __half and __nv_bfloat16 off. The kernels know no torch:
        # they compile here as they do under CMake.
        switched_off = ["HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS"]
        nvcc = ["-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]
        compile_args["nvcc"] = nvcc + [f"-U__CUDA_NO_{name}__" for name in switched_off]
    make_extension = cpp_extension.CUDAExtension if CUDA else cpp_extension.CppExtension
    return make_extension(
        name,
        sources,
        depends=files("csrc/**/*.h", "csrc/**/*.cuh"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args=compile_args,
        **options,
    )


def extensions() -> list[setuptools.Extension]:
    kernels = files("csrc/kernels/cpu/*.cpp") + (files("csrc/kernels/cuda/*.cu") if CUDA else [])
    return [
        # The operations are no Python module: py_limited_api leaves torch_python out of what they link to, so
        # that a process without Python loads them too.
        extension("pyens._operations", files("csrc/ops/*.cpp") + kernels, py_limited_api=True),
        extension("pyens._C", ["csrc/python.cpp"]),
    ]


def settings() -> str:
    """A name for what objects are made with. Ninja sees no more of that than command lines and our sources:
    behind one and the same command line there may be another compiler and other headers of torch."""
    compilers = [COMPILER, *([[os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc")]] if CUDA else [])]
    versions = [subprocess.run([*c, "--version"], capture_output=True).stdout for c in compilers]
    flags = ("CFLAGS", "CPPFLAGS", "CXXFLAGS", "LDFLAGS", "NVCC_APPEND_FLAGS", "TORCH_CUDA_ARCH_LIST")
    made_with = compilers, versions, [os.environ.get(name) for name in flags]
    digest = hashlib.sha256(repr(made_with).encode()).hexdigest()[:8]
    return f"torch-{torch.__version__}{'-cuda' * CUDA}-{digest}"


class BuildPy(build_py):
    """Copies the modules to where the wheel is made from."""

    def run(self) -> None:
        # An earlier build may have left modules and libraries there that are gone.
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "pyens", ignore_errors=True)
        super().run()


class BuildExtension(cpp_extension.BuildExtension):
    """Compiles with ninja, then writes down beside the extension what it was built for.

    It cannot say so itself: with another torch it fails to load. `pyens._library` reads the file.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = os.path.join(self.build_temp, settings())
        self.force = True  # ninja knows what is up to date; without it, all is compiled

    def build_extensions(self) -> None:
        """Has csrc/ops/torch.h precompiled where the compiler is GCC: headers take most of a source's time.

        GCC takes `ops/torch.h.gch` where it looks for `ops/torch.h`, if its flags are the same. Only a
        function of torch's own, which hands them to ninja, knows them: without it nothing is precompiled.
        """
        folder = Path(self.build_temp).resolve() / "precompiled"
        name = "_write_ninja_file_and_compile_objects"
        compile_objects = getattr(cpp_extension, name, None)
        compiler = shlex.join(COMPILER)
        if compile_objects is None or not cpp_extension.check_compiler_is_gcc(compiler):
            return super().build_extensions()

        def with_precompiled_headers(**options: Any) -> None:
            source, header = ROOT / "csrc" / "ops" / "torch.h", folder / "ops" / "torch.h"
            precompiled = header.with_suffix(".h.gch")
            reads_torch = any("csrc/ops/" in path for path in options["sources"])
            if reads_torch and not (
                precompiled.exists() and precompiled.stat().st_mtime > source.stat().st_mtime
            ):
                header.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, header)  # for what preprocesses apart, as ccache does
                flags = " ".join([*options["cflags"], *options["post_cflags"]])
                whole = precompiled.with_suffix(".partial")  # a build that is killed leaves no half of it
                files = f"-x c++-header {shlex.quote(str(header))} -o {shlex.quote(str(whole))}"
                subprocess.run(f"{compiler} {flags} {files}", shell=True, check=True)
                whole.replace(precompiled)
            compile_objects(**options)

        for extension in self.extensions:
            extension.include_dirs.insert(0, str(folder))
        setattr(cpp_extension, name, with_precompiled_headers)
        try:
            super().build_extensions()
        finally:
            setattr(cpp_extension, name, compile_objects)

    def run(self) -> None:
        super().run()
        built = {
            "version": VERSION,
            "torch": torch.__version__,
            "python": ".".join(platform.python_version_tuple()[:2]),
            "cuda": CUDA,
        }
        path = Path(self.get_ext_fullpath("pyens._C")).with_name("_C.build.json")
        path.write_text(json.dumps(built) + "\n")


setuptools.setup(
    license="Apache-2.0",
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPy},
)
