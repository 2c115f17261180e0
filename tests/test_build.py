"""setup.py: what it says where something is missing, what it compiles again, and what it packs."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEADER = "-x c++-header"

# Writes empty files where a compiler would write its own, and a line in a log for each; GCC by what it says.
COMPILER = """#!/usr/bin/env bash
if [[ $1 == -v ]]; then echo COLLECT_GCC=c++; echo gcc version 12.2.0; exit; fi
if [[ $1 == --version ]]; then echo "${VERSION:-12.2.0}"; exit; fi
if [[ $1 == -dump* ]]; then echo 12.2.0; exit; fi
while (($#)); do
  [[ $1 == -o ]] && out=$2
  [[ $1 == -MF ]] && deps=$2
  line+=" $1"; shift
done
[[ $out ]] || exit 0
echo "$line" >>"$LOG"
[[ $deps ]] && echo "$out:" >"$deps"
echo "half of it" >"$out"
[[ $line == *c++-header* && $DIES ]] && exit 1
echo "and the rest" >>"$out"
"""


class Tree:
    """A copy of what the build reads, with few sources, and a compiler that only says what it is given."""

    def __init__(self, path: Path) -> None:
        self.path, self.log, self.compiler = path / "tree", path / "log", path / "compiler"
        self.compiler.write_text(COMPILER)
        self.compiler.chmod(0o755)
        kept = [
            "setup.py",
            "pyproject.toml",
            "MANIFEST.in",
            "README.md",
            "csrc/python.cpp",
            "csrc/ops/torch.h",
        ]
        kept += ["csrc/ops/processor.cpp", "csrc/kernels/cpu/fma_peak.cpp"]
        modules = [str(p.relative_to(ROOT)) for p in (ROOT / "pyens").rglob("*.py")]
        for name in [*kept, *modules, "pyens/py.typed"]:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.path / name)

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {"CXX": str(self.compiler), "LOG": str(self.log), "PYENS_CUDA": "0", "CCACHE_DISABLE": "1"}
        inherited = {k: v for k, v in os.environ.items() if not k.endswith("FLAGS")}
        return subprocess.run(
            [sys.executable, "setup.py", "-q", *arguments],
            cwd=self.path,
            env={**inherited, **own, **environment},
            capture_output=True,
            text=True,
        )

    def compiled(self, **environment: str) -> list[str]:
        """Builds the extension; the command lines of what was compiled."""
        self.log.write_text("")
        result = self.setup("build_ext", **environment)
        assert result.returncode == 0, result.stderr
        return [line for line in self.log.read_text().splitlines() if " -c " in line or HEADER in line]


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path)


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """What was said, and nothing else: no log, no traceback."""
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 2, result.stderr
    return result.stderr


def test_without_torch_it_says_what_to_run(tree):
    (tree.path / "torch.py").write_text("raise ImportError('there is none')")
    said = refused(tree.setup("egg_info", PYTHONPATH=str(tree.path)))  # what pip asks for first
    assert "torch" in said and "pip install --no-build-isolation ." in said


def test_pip_does_not_fetch_another_torch_to_build_with():
    requires = re.search(
        r"^\[build-system\].*?^requires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    assert requires and "setuptools" in requires[1] and "torch" not in requires[1]


def test_an_old_torch_is_refused(tree):
    (tree.path / "torch").mkdir()
    (tree.path / "torch" / "__init__.py").write_text("__version__ = '2.9.1+cpu'")
    (tree.path / "torch" / "utils.py").write_text("cpp_extension = None")
    said = refused(tree.setup("egg_info", PYTHONPATH=str(tree.path)))
    assert "torch 2.11 or later" in said and "2.9.1+cpu" in said


def test_without_a_compiler_it_says_so(tree):
    said = refused(tree.setup("egg_info", CXX="/nonexistent"))
    assert (
        re.match(r"pyens needs a C\+\+(17|20) compiler, and '?/nonexistent'? is none", said) and "CXX" in said
    )


def test_a_cuda_home_without_nvcc_is_no_toolkit(tree):
    """As a CUDA build of torch sees it, which this may not be."""
    (tree.path / "sitecustomize.py").write_text(
        "import torch\nfrom torch.utils import cpp_extension\n"
        "torch.version.cuda, cpp_extension.CUDA_HOME = '13.0', '/nonexistent'\n"
    )
    asked = tree.setup("egg_info", PYTHONPATH=str(tree.path), PYENS_CUDA="1")
    assert asked.returncode == 1
    assert asked.stderr == "PYENS_CUDA=1 needs nvcc in /nonexistent/bin, where CUDA_HOME points\n"
    assert tree.setup("egg_info", PYTHONPATH=str(tree.path), PYENS_CUDA="auto").returncode == 0


def test_a_compiler_that_knows_too_little_is_none(tree):
    tree.compiler.write_text("#!/bin/sh\necho 'unrecognized option -std' >&2\nexit 1\n")
    assert "is none: unrecognized option -std" in refused(tree.setup("egg_info"))


def test_what_changes_the_objects_compiles_them_again(tree):
    first = tree.compiled()
    assert sum(HEADER in line for line in first) == 1 and len(first) == 4
    assert tree.compiled() == []
    flagged = tree.compiled(CXXFLAGS="-fsanitize=address -DWITH='a space'")
    assert len(flagged) == 4
    assert all("-fsanitize=address -DWITH=a space" in line for line in flagged)
    assert len(tree.compiled(VERSION="13.1.0")) == 4  # another compiler of the same name


def test_half_a_precompiled_header_is_not_believed(tree):
    assert tree.setup("build_ext", DIES="yes").returncode != 0
    assert "half of it" in "".join(p.read_text() for p in tree.path.rglob("*.partial"))
    assert list(tree.path.rglob("*.gch")) == []
    assert sum(HEADER in line for line in tree.compiled()) == 1
    (header,) = tree.path.rglob("*.gch")
    assert header.read_text() == "half of it\nand the rest\n"


def test_a_wheel_holds_what_the_sources_hold(tree):
    (tree.path / "setup.cfg").write_text("[build]\nbuild_lib = lib\n")
    gone = tree.path / "lib" / "pyens" / "gone"
    gone.mkdir(parents=True)
    for stale in (gone / "__init__.py", gone.with_suffix(".py"), gone.with_name("_C.abi3.so")):
        stale.touch()
    result = tree.setup("bdist_wheel")
    assert result.returncode == 0, result.stderr
    (wheel,) = (tree.path / "dist").glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("pyens-")}
    sources = {str(p.relative_to(tree.path)) for p in (tree.path / "pyens").rglob("*.py")}
    built = {name for name in packed if name.endswith(".so")}
    assert len(built) == 2 and "pyens/_C.abi3.so" not in built
    assert packed == sources | built | {"pyens/py.typed", "pyens/_C.build.json"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout, whose files an sdist should hold")
def test_an_sdist_holds_all_of_the_repository(tree):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    for name in tracked:
        (tree.path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree.path / name)
    result = tree.setup("sdist")
    assert result.returncode == 0, result.stderr
    (path,) = (tree.path / "dist").glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        packed = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    assert set(tracked) - packed == set()
    own = {name for name in packed if name in ("PKG-INFO", "setup.cfg") or name.startswith("pyens.egg-info/")}
    untracked = {str(p.relative_to(tree.path)) for p in (tree.path / "pyens").rglob("*.py")} - set(tracked)
    assert packed - set(tracked) - untracked == own
