"""What nvcc makes of the CUDA kernels: nothing spilled, no atomics to memory, wide loads where meant.

Needs nvcc (on PATH, or in CUDA_HOME); for the instructions nvdisasm too (on PATH, or nvidia-cuda-nvdisasm of
PyPI). No GPU.
"""

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))
ARCHITECTURES = ["sm_80", "sm_90"]

# Kernels that may keep numbers in local memory, each with its reason. There are none.
MAY_USE_LOCAL_MEMORY: dict[str, str] = {}
# Kernels meant to use tensor cores (HMMA), and to load 16 bytes at once from memory and from shared memory.
TENSOR_CORES = {"ensemble_mlp_mma_kernel", "mma_peak_kernel"}
LOADS_OF_16_BYTES = {"ensemble_mlp_fma_kernel", "epilogue_kernel"}
SHARED_LOADS_OF_16_BYTES = {"ensemble_mlp_mma_kernel", "ensemble_mlp_fma_kernel"}
# Atomics in a block's shared memory. Those to global memory would make sums depend on the order of blocks.
SHARED_ATOMICS = {"masked_weights_backward_kernel"}


class Usage(NamedTuple):
    """Of one entry function: registers; bytes of its stack; bytes that spills write and read."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def nvcc() -> str:
    candidates = [
        shutil.which("nvcc"),
        *(f"{os.environ[k]}/bin/nvcc" for k in ["CUDA_HOME"] if k in os.environ),
    ]
    found = next((path for path in candidates if path and Path(path).exists()), None)
    return found or pytest.skip("no nvcc on PATH or in CUDA_HOME")


def nvdisasm() -> str:
    in_site_packages = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm")
    found = shutil.which("nvdisasm") or next(map(str, in_site_packages), None)
    return found or pytest.skip("no nvdisasm on PATH or from PyPI's nvidia-cuda-nvdisasm")


def compile_one(source: Path, architecture: str, cubin: Path) -> dict[str, Usage]:
    """Compiles for one architecture; what ptxas says of each entry function, by mangled name."""
    command = [
        nvcc(),
        "-std=c++17",
        "-O3",
        "-lineinfo",
        f"-I{ROOT / 'csrc'}",
        "-cubin",
        f"-arch={architecture}",
    ]
    done = subprocess.run(
        [*command, "-Xptxas", "-v", "-o", str(cubin), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    usage = {}
    for part in done.stderr.split("Compiling entry function '")[1:]:
        numbers = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.* (\d+) registers",
            part,
        )
        assert numbers, f"{source.name}: ptxas says nothing that can be read: {part}"
        stack, stores, loads, registers = map(int, numbers.groups())
        usage[part.partition("'")[0]] = Usage(registers, stack, stores, loads)
    return usage


@pytest.fixture(scope="session")
def compile_all(tmp_path_factory) -> Callable[[str], dict[Path, dict[str, Usage]]]:
    """By architecture, the cubin of each source and the usage of each entry function in it; compiled once."""

    @functools.cache
    def of_architecture(architecture: str) -> dict[Path, dict[str, Usage]]:
        nvcc()
        folder = tmp_path_factory.mktemp(architecture)
        cubins = [folder / f"{source.stem}.cubin" for source in SOURCES]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            usages = pool.map(compile_one, SOURCES, [architecture] * len(SOURCES), cubins)
            return dict(zip(cubins, usages, strict=True))

    return of_architecture


@pytest.fixture(scope="session", params=ARCHITECTURES)
def compiled(request, compile_all) -> dict[Path, dict[str, Usage]]:
    """The cubin of each source, and the usage of each entry function in it."""
    return compile_all(request.param)


def instructions(cubin: Path) -> dict[str, set[str]]:
    """The instructions of each entry function, with their modifiers ("LDG.E.64"), by mangled name."""
    done = subprocess.run([nvdisasm(), "-c", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", done.stdout, flags=re.MULTILINE)[1:]:
        lines = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", part, re.MULTILINE)
        found[re.match(r"[\w$]+", part).group()] = set(lines)
    return found


@pytest.fixture(scope="session")
def code(compile_all) -> dict[str, set[str]]:
    """The instructions of each entry function, for the H100 and the H200."""
    nvcc(), nvdisasm()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(instructions, compile_all("sm_90"))
        return {name: lines for of_cubin in found for name, lines in of_cubin.items()}


def kernel_of(mangled: str) -> str:
    """`ensemble_mlp_kernel` of `_ZN5pyens..19ensemble_mlp_kernelIfEEv..`."""
    # The last length and name: what stands before is the file's own namespace.
    return re.search(r"(?<=\d)[a-z_]+_kernel(?=[IEP])", mangled).group()


def using(code: dict[str, set[str]], pattern: str) -> set[str]:
    """The kernels that have an instruction of this kind."""
    return {kernel_of(name) for name, lines in code.items() if any(re.match(pattern, x) for x in lines)}


def test_every_kernel_is_seen(compiled):
    written = {
        name
        for source in SOURCES
        for name in re.findall(r"__global__ void [^;{]*?\b(\w+_kernel)\(", source.read_text())
    }
    assert written == {kernel_of(name) for usage in compiled.values() for name in usage}
    assert len(written) >= 15


def test_no_kernel_spills_or_uses_local_memory(compiled):
    spilling = {
        name: usage
        for usages in compiled.values()
        for name, usage in usages.items()
        if usage.stack + usage.spill_stores + usage.spill_loads > 0
        and kernel_of(name) not in MAY_USE_LOCAL_MEMORY
    }
    assert not spilling


def test_no_kernel_loads_or_stores_local_memory(code):
    assert using(code, r"(LDL|STL)\b") == set(MAY_USE_LOCAL_MEMORY)


def test_no_atomics_to_memory(code):
    assert using(code, r"(REDG?|ATOMG?)\b") == set()
    assert using(code, r"ATOMS\b") == SHARED_ATOMICS


def test_tensor_cores_where_they_are_meant(code):
    assert using(code, r"(HMMA|HGMMA|DMMA|IMMA)\b") == TENSOR_CORES


def test_loads_of_16_bytes_where_they_are_meant(code):
    assert using(code, r"LDG\b.*\.128") == LOADS_OF_16_BYTES
    assert using(code, r"LDS\.128") >= SHARED_LOADS_OF_16_BYTES


def test_multiply_adds_are_fused(code):
    assert {
        "ensemble_mlp_kernel",
        "ensemble_mlp_fma_kernel",
        "training_kernel",
        "products_kernel",
        "gradient_kernel",
    } <= using(code, r"FFMA\b")


def test_what_is_looked_for_would_be_found(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text("""
__global__ void planted_kernel(const float4* in, float* out, const int* at) {
  float4 four = in[threadIdx.x];
  float local[64];
  for (int i = 0; i < 64; ++i) local[at[i]] = four.x * i + four.y + four.z + four.w;
  atomicAdd(out, local[at[threadIdx.x]]);
}
""")
    cubin = tmp_path / "planted.cubin"
    (usage,) = compile_one(source, "sm_90", cubin).values()
    assert usage.stack >= 256 and usage.registers > 0
    nvdisasm()
    for pattern in (r"(LDL|STL)\b", r"(REDG?|ATOMG?)\b", r"LDG\b.*\.128"):
        assert using(instructions(cubin), pattern) == {"planted_kernel"}
