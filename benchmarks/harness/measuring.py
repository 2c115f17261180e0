"""Contestants timed in interleaved rounds; memory, the machine's peaks, and what machine it was."""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

from benchmarks.harness.cases import Case, Options, Run, dtype_name
from benchmarks.harness.results import Peaks, Result, Timing
from benchmarks.remote.blocks import COLD_CALLS, Block, measure, on_cores
from benchmarks.remote.process import Remote

ROOT = Path(__file__).resolve().parents[2]


def run_interleaved(case: Case, options: Options, *, block_seconds: float | None = None) -> Result:
    """Check every contestant of `case`, then time them in rounds of blocks of at least `block_seconds`."""
    with contextlib.ExitStack() as stack:
        return _run_interleaved(case, options, block_seconds, stack)


def _run_interleaved(
    case: Case, options: Options, block_seconds: float | None, stack: contextlib.ExitStack
) -> Result:
    torch.compiler.reset()  # compiled code of the case before
    torch.set_num_threads(options.threads)
    shuffle = random.Random(options.seed)
    contestants = case.contestants()
    if len({c.name for c in contestants}) != len(contestants):
        raise ValueError(f"case {case.name}: two contestants have the same name")
    timings = [
        Timing(c.name, c.ours, yardstick=c.yardstick, uncapped=bool(options.isa) and not c.capped)
        for c in contestants
    ]
    runners: list[tuple[Timing, Callable[[int], Block], int, int]] = []
    peaks: list[float] = []
    pause = 0.0

    with tqdm(
        total=(1 + options.rounds) * len(contestants), desc=case.name, leave=False, disable=None
    ) as bar:
        for contestant, timing in zip(contestants, timings, strict=True):
            bar.set_postfix_str(f"preparing {contestant.name}")
            try:
                run = contestant.setup()
                block = partial(measure, run, cold_bytes=case.cold_bytes, wait=_wait(options))
                if isinstance(run, Remote):
                    stack.callback(run.close)
                    block, pause = partial(run.measure, cold_bytes=case.cold_bytes), PAUSE
                with torch.inference_mode(not case.grad):
                    contestant.check(run())
                    least = case.block_seconds if block_seconds is None else block_seconds
                    calls = COLD_CALLS if case.cold_bytes else _calls_per_block(block, least)
                timing.memory = contestant.memory() if contestant.memory else None
                runners.append((timing, block, calls, contestant.calls))
            except Exception as error:  # a peer may fail in any way; ours too, and then it must be seen
                reason = (str(error).strip().splitlines() or [""])[0]
                timing.excluded = f"{type(error).__name__}: {reason}"
                tqdm.write(f"EXCLUDED from {case.name}: {timing.name}: {timing.excluded}", file=sys.stderr)
                bar.total -= options.rounds
            bar.update()
        if pause or case.cold_bytes:  # all alike: processes of their own have no other cores
            stack.enter_context(on_cores(options.threads))
        with torch.inference_mode(not case.grad):
            for _ in range(options.rounds):
                if options.device.type == "cpu" and options.dtype == torch.float32:
                    peaks.append(_fma_peak_now(options))
                for timing, block, calls, work in shuffle.sample(runners, len(runners)):
                    bar.set_postfix_str(timing.name)
                    time.sleep(pause)
                    seconds, cpu_seconds = block(calls)
                    timing.seconds.append(seconds / work)
                    if options.device.type == "cpu":
                        timing.cpu_seconds.append(cpu_seconds / work)
                    bar.update()

    return Result(
        case.name, case.title, case.flops, case.bytes, list(case.targets), timings, case.memory_limit, peaks
    )


# Idle threads spin for some milliseconds; where contestants have processes of their own, the next one waits.
PAUSE = 0.01


def _wait(options: Options) -> Callable[[], Any]:
    return torch.cuda.synchronize if options.device.type == "cuda" else lambda: None


def _calls_per_block(block: Callable[[int], Block], seconds: float) -> int:
    # The fastest of three: one call that waited for a busy core would otherwise pass for a full block.
    calls = 1
    while (took := min(block(calls).seconds for _ in range(3)) * calls) < seconds:
        calls = max(2 * calls, math.ceil(1.1 * seconds / took * calls))
    return calls


def peak_memory(warm_up: Callable[[], Run], build: Callable[[], Run], options: Options) -> int | None:
    """Bytes that building and calling `build()` take at their peak, in a process of its own.

    All of that process counts but what it held when `warm_up()` had run: the same in tiny, so that libraries
    are loaded and threads are started. Both are pickled. None where the system does not tell (no /proc).
    """
    if not _STATUS.exists():
        return None
    # A fresh interpreter: a fork would begin with this process's memory.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_grown_by, warm_up, build, options.threads).result()


_STATUS = Path("/proc/self/status")


def _grown_by(warm_up: Callable[[], Run], build: Callable[[], Run], threads: int) -> int:
    torch.set_num_threads(threads)
    run = warm_up()
    run()
    run()
    del run
    gc.collect()
    before = _memory("VmRSS")
    run = build()
    for _ in range(3):
        run()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    # Not ru_maxrss: a child's begins with its parent's, across exec.
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024  # in kB


def measure_peaks(options: Options) -> Peaks:
    """Arithmetic peak and copy bandwidth of the device, the best of several short measurements.

    CPU: fused multiply-adds between registers, in float32 and on every thread; float64 has half the lanes.
    For bfloat16 and float16 the float32 peak stands: that is what their kernels accumulate in.
    CUDA: see `_cuda_peak`.
    """
    if options.device.type == "cuda":
        gflops, kind = _cuda_peak(options)
    else:
        gflops, kind = _fma_peak(options), "float32 FMA"
        if options.dtype == torch.float64:
            gflops, kind = gflops / 2, "float64 FMA"
    return Peaks(gflops, kind, _copy_gbs(options))


def _cuda_peak(options: Options) -> tuple[float, str]:
    """GF/s of the GPU's arithmetic in this dtype and precision between registers, and what it is a rate of.

    On tensor cores that of `mma.sync`, which our kernels use. The library's products for wide layers have
    faster instructions, and may pass it.
    """
    from pyens import _C

    tf32 = options.precision == "tf32"
    sink = torch.empty(1, dtype=options.dtype, device=options.device)
    rounds = 1_000 if options.quick else 20_000
    operations = _C.fma_peak_cuda(sink, tf32, rounds)
    timer = Timer("run()", globals={"run": lambda: _C.fma_peak_cuda(sink, tf32, rounds)})
    gflops = operations / min(timer.timeit(5).mean for _ in range(5)) / 1e9
    name = "TF32" if tf32 else dtype_name(options.dtype)
    return gflops, f"{name} {'mma.sync' if tf32 or sink.element_size() == 2 else 'FMA'}"


def _fma_peak(options: Options) -> float:
    from pyens import _C

    if not hasattr(_C, "fma_peak"):
        raise RuntimeError("pyens._C has no fma_peak, so the FMA peak cannot be measured: rebuild pyens")
    torch.set_num_threads(options.threads)
    return max(_C.fma_peak(10.0 if options.quick else 50.0) for _ in range(3 if options.quick else 10))


def _fma_peak_now(options: Options) -> float:
    from pyens import _C

    return _C.fma_peak(2.0 if options.quick else 20.0)


def _copy_gbs(options: Options) -> float:
    megabytes = 32 if options.quick else 256 if options.device.type == "cpu" else 2048  # far beyond any cache
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=options.device)
    copy = torch.empty_like(source)
    timer = Timer("copy.copy_(source)", globals={"copy": copy, "source": source}, num_threads=options.threads)
    return 2 * source.numel() / min(timer.timeit(3).mean for _ in range(3)) / 1e9


def machine_info(options: Options | None = None) -> dict[str, Any]:
    """What one must know to read the numbers: processor, threads, versions, commit."""
    import pyens

    cuda = options is not None and options.device.type == "cuda"
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        models = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        cpu = next(models, f"model name: {cpu}").partition(":")[2].strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": options.threads if options else torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(options.device) if cuda else None,
        "float32_products": options.precision if cuda else None,
        "driver": _driver() if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "engines": _engines(),
        "isa": _instruction_sets(options),
        "pyens": pyens.build_info(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _engines() -> dict[str, str]:
    """The versions of those that are here."""
    found = {}
    for name in ("jax", "onnxruntime", "openvino", "tabm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


# What caps instruction sets, by what `--isa` may say. On AMD's processors MKL takes AVX2 whatever it says.
ISA_CAPS = {
    "avx2": {
        "PYENS_CPU_CAPABILITY": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    }
}


def _instruction_sets(options: Options | None) -> dict[str, str | None]:
    """Of torch, and what caps whom; that of pyens is in its `build_info`."""
    caps = {name: os.environ.get(name) for name in ISA_CAPS["avx2"]}
    return {
        "asked": (options and options.isa) or None,
        "torch": torch.backends.cpu.get_cpu_capability(),
        **caps,
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver; None if nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().partition("\n")[0]


def _git(*arguments: str) -> str | None:
    """What git answers; None without git, a repository or a commit."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
