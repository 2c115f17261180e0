"""The command line of every benchmark."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.harness.cases import TOLERANCE, Case, Options, dtype_name
from benchmarks.harness.measuring import ISA_CAPS, machine_info, measure_peaks, run_interleaved
from benchmarks.harness.pictures import plot
from benchmarks.harness.results import RESULTS, Report
from benchmarks.harness.tables import losses, markdown, processor, table

# GPUs are steadier, and time on them is dear.
ROUNDS = {"cpu": 20, "cuda": 10}


def main(
    benchmark: str,
    description: str | None,
    cases: Callable[[Options], list[Case]],
    argv: Sequence[str] | None = None,
    *,
    by_threads: bool = False,
    compiles: bool = True,
    picture: Callable[[Report, Path], None] = plot,
    remarks: Callable[[Report], list[str]] = lambda _: [],
) -> int:
    """Run the benchmark `benchmark` as the command line asks. 1 if one of ours was excluded, else 0.

    `by_threads`: the results of each number of threads have files of their own. `compiles`: whether there are
    contestants that torch.compile makes. `picture` draws the report,
    and `remarks` says what there is to say about all cases together.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=[dtype_name(d) for d in TOLERANCE], default="float32")
    parser.add_argument(
        "--precision",
        choices=["ieee", "tf32"],
        default="ieee",
        help="of float32 matrix products on CUDA, for all contestants: torch's own setting",
    )
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument(
        "--isa",
        choices=list(ISA_CAPS),
        default="",
        help="cap everybody's instruction set who can be; marks who cannot",
    )
    parser.add_argument("--cases", default="", help="names or beginnings of names, with commas; default: all")
    parser.add_argument("--rounds", type=_positive, help=f"default: {ROUNDS}")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the order in each round")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile must make")
    parser.add_argument("--quick", action="store_true", help="smoke test: a tiny case, no compilation")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the picture")
    parser.add_argument("--markdown", action="store_true", help="only print the saved result as a table")
    arguments = parser.parse_args(argv)
    caps = ISA_CAPS.get(arguments.isa, {})
    if any(os.environ.get(name) != value for name, value in caps.items()):
        # Libraries read these when they are loaded, so a new process has to.
        command = [sys.executable, "-m", f"benchmarks.{benchmark}", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.call(command, env={**os.environ, **caps})

    less = arguments.cases or (arguments.no_compile and compiles)
    part = "-quick" if arguments.quick else "-part" if less else ""
    if arguments.precision == "tf32" and (arguments.device, arguments.dtype) != ("cuda", "float32"):
        parser.error("--precision tf32: is for --device cuda and --dtype float32")
    number = arguments.dtype if arguments.precision == "ieee" else arguments.precision
    isa = f"-{arguments.isa}" if arguments.isa else ""
    threads = f"-threads{arguments.threads}" if by_threads else ""
    stem = f"{benchmark}-{arguments.device}-{number}{isa}{threads}{part}"
    saved = arguments.output / f"{stem}.json"
    if arguments.markdown:
        if not saved.exists():
            parser.error(f"--markdown: there is no result {saved}")
        print(markdown(Report.load(saved)))
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")

    options = Options(
        device=torch.device(arguments.device),
        dtype=getattr(torch, arguments.dtype),
        threads=arguments.threads,
        rounds=arguments.rounds or (2 if arguments.quick else ROUNDS[arguments.device]),
        seed=arguments.seed,
        quick=arguments.quick,
        compile=compiles and not (arguments.no_compile or arguments.quick),
        precision=arguments.precision,
        isa=arguments.isa,
    )
    torch.backends.cuda.matmul.allow_tf32 = options.precision == "tf32"  # for ours and for the peers
    available = cases(options)
    try:
        selected = select(available, arguments.cases)
    except ValueError as error:
        parser.error(f"--cases: {error}")

    torch.set_num_threads(options.threads)
    report = Report(
        benchmark=benchmark,
        device=arguments.device,
        dtype=arguments.dtype,
        machine=machine_info(options),
        method={
            "rounds": options.rounds,
            "seed": options.seed,
            "compiled": options.compile,
            "order": "interleaved, shuffled in every round",
            "ratio": "median over rounds of (best peer of the round / this one in the round)",
        },
        peaks=measure_peaks(options),
        results=[],
    )
    peaks = report.peaks
    print(f"{benchmark}: {arguments.dtype}, {processor(report.machine)}, ", end="")
    print(f"{options.threads} threads; peak {peaks.gflops:.0f} GF/s ({peaks.kind}), ", end="")
    print(f"copy {peaks.copy_gbs:.1f} GB/s; * is pyens\n", flush=True)
    for case in selected:
        report.results.append(run_interleaved(case, options))
        report.peaks = report.peaks.or_better(measure_peaks(options))
        print(table(report.results[-1], report.peaks) + "\n", flush=True)

    drawing = saved.with_suffix(".png")
    report.save(saved)
    picture(report, drawing)
    for line in [
        *(f"SLOWER, {r.name}: {loss}" for r in report.results for loss in losses(r)),
        *remarks(report),
    ]:
        print(line)
    print(f"wrote {saved} and {drawing.name}")
    return int(any(t.ours and t.excluded for result in report.results for t in result.timings))


def select(cases: Sequence[Case], names: str) -> list[Case]:
    """The cases that `names` lists by name or by the beginning of a name up to a dash; all if it is empty."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if not any(f"{case.name}-".startswith(f"{name}-") for case in cases):
            raise ValueError(f"no case {name!r}; there are {', '.join(case.name for case in cases)}")
    return [c for c in cases if not chosen or any(f"{c.name}-".startswith(f"{name}-") for name in chosen)]


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value
