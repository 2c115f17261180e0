"""Benchmarks in processes of their own: what is timed there, other engines, cold caches, instruction sets."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_benchmarks import PEAKS, accept, options, report, result

import pyens
from benchmarks import contention, cost_curves, every_engine, harness, peers, results_page, training_peers
from benchmarks.engines import peers as engines
from benchmarks.harness import Case, Contestant, Report, Target, Timing, measuring
from benchmarks.remote import blocks
from tests import benchmark_programs

HERE = benchmark_programs.__name__
ENGINES = ("jax", "onnx", "onnxruntime", "openvino")
linux = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def remote():
    made = []

    def make(name, *arguments, **kind):
        made.append(harness.Remote(f"{HERE}:{name}", *arguments, **dict(threads=1) | kind))
        return made[-1]

    yield make
    for each in made:
        each.close()


# --- processes


@linux
def test_a_call_runs_elsewhere_on_as_many_cores_as_threads(remote):
    run = remote("double", torch.tensor([1.0, 2.0]), (torch.ones(2), torch.ones(2)))
    doubled, total, cores = run()
    assert torch.equal(doubled, torch.tensor([2.0, 4.0])) and torch.equal(total, torch.full((2,), 2.0))
    assert cores.tolist() == sorted(os.sched_getaffinity(0))[-1:]


def test_wall_time_and_processor_time_are_those_over_there(remote):
    seconds, cpu_seconds = remote("sleep", 0.02).measure(5)
    assert 0.02 <= seconds < 0.2 and 0.01 <= cpu_seconds < 0.02


def test_several_processes_share_the_time_that_passes(remote):
    """Two that each wait half of the time hardly stand in each other's way, even on one core."""
    one, two = (remote("sleep", 0.02, processes=count).measure(10).seconds for count in (1, 2))
    assert two < 0.9 * one


def test_a_process_serves_one_call_after_the_other(remote):
    first = remote("process")
    (number,) = first()
    first.close()
    again, beside, another = remote("process"), remote("process"), remote("process", environment={"A": "1"})
    assert again()[0] == number
    assert len({int(run()[0]) for run in (again, beside, another)}) == 3
    again.close()
    with pytest.raises(RuntimeError, match="nothing to prepare"):
        remote("fail")
    assert remote("process")()[0] != number  # that one failed


def test_what_fails_over_there_is_said_here(remote):
    with pytest.raises(RuntimeError, match="ValueError: nothing to prepare"):
        remote("fail")
    with pytest.raises(RuntimeError, match="the process ended with 3"):
        remote("die")
    with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
        harness.Remote("no_such_engine:forward", threads=1)


def test_remote_contestants_take_turns_with_others_and_are_closed(remote):
    made = []

    def setup():
        made.append(remote("sleep", 0.001))
        return made[0]

    case = Case("mixed", "", lambda: [Contestant("there", setup, accept), Contestant("here", here, accept)])

    def here():
        return lambda: None

    measured = harness.run_interleaved(case, options(rounds=3), block_seconds=0.002)
    there, _ = measured.timed()
    assert len(there.seconds) == len(there.cpu_seconds) == 3
    assert there.median >= 0.001 > there.cpu_median
    with pytest.raises(IndexError):
        made[0]()


# --- cold caches


@linux
def test_every_core_reads_before_each_cold_call():
    order = []

    class Buffer:
        def sum(self):
            order.append(sorted(os.sched_getaffinity(0)))

    before = threading.active_count()
    reader = blocks.Reader(80)
    assert reader._buffer.nbytes == 80
    reader._buffer = Buffer()
    cores = sorted(os.sched_getaffinity(0))
    for _ in range(2):
        reader()
        order.append("call")
    reader.close()
    assert sorted(order[: len(cores)]) == [[core] for core in cores] and order[len(cores)] == "call"
    assert len(order) == 2 * (len(cores) + 1)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and "_serve" in thread.name:
            thread.join(5.0)
    assert threading.active_count() == before


def test_what_is_read_is_not_timed(monkeypatch):
    now = [0.0]

    def read(_):
        now[0] += 1.0

    def run():
        now[0] += 0.25

    monkeypatch.setattr(blocks.Reader, "__call__", read)
    monkeypatch.setattr(blocks.time, "perf_counter", lambda: now[0])
    assert blocks.measure(run, 5, cold_bytes=64).seconds == 0.25
    assert blocks.measure(run, 5).seconds == 0.25
    assert now[0] >= 5.0


@linux
def test_threads_stay_on_the_last_cores_and_come_back():
    before = os.sched_getaffinity(0)
    with blocks.on_cores(1):
        assert os.sched_getaffinity(0) == {max(before)}
    assert os.sched_getaffinity(0) == before


# --- what is said of it


def test_processor_time_and_who_is_not_capped_are_shown():
    timings = [
        Timing("ours", True, [1e-3], cpu_seconds=[2e-3]),
        Timing("a", False, [2e-3], cpu_seconds=[3e-3], uncapped=True),
    ]
    text = harness.table(result(timings=timings), PEAKS)
    assert "CPU time" in text and "a (not capped)" in text
    (row,) = [line for line in text.splitlines() if line.startswith("* ours")]
    assert "1 ms" in row and "2 ms" in row
    assert "CPU time" not in harness.table(result(), PEAKS)


def test_who_is_not_capped_is_no_rival():
    timings = [
        Timing("ours", True, [2e-3, 2e-3]),
        Timing("slow", False, [6e-3, 4e-3]),
        Timing("fast", False, [1e-3, 1e-3], uncapped=True),
    ]
    one = result(timings=timings)
    assert one.best_peer().name == "slow" and one.speedup("ours") == pytest.approx(2.5)
    assert one.speedup("fast") == pytest.approx(5) and one.speedup("ours", ["fast"]) == pytest.approx(0.5)
    assert "fast (not capped)" in harness.table(one, PEAKS)


def test_files_without_processor_time_still_load(tmp_path):
    report().save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    for timing in content["results"][0]["timings"]:
        for new in ("cpu_seconds", "uncapped", "cpu_median"):
            timing.pop(new, None)
    for target in content["results"][0]["targets"]:
        target.pop("seconds")
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert Report.load(tmp_path / "report.json") == report()


def test_a_target_in_seconds():
    slow, fast = Target("ours", 1.0, seconds=5e-4), Target("ours", 1.0, seconds=2e-3)
    assert harness.verdict(result(), slow, PEAKS) == "ours in at most 500 µs: MISSED, 1 ms"
    assert harness.verdict(result(), fast, PEAKS) == "ours in at most 2 ms: met, 1 ms"
    assert "not measured" in harness.verdict(result(), Target("broken", 1.0, seconds=1.0), PEAKS)


def test_what_we_lose_comes_first():
    lost = result(title="lost", timings=[Timing("ours", True, [2.0]), Timing("a", False, [1.0])])
    both = report()
    both.results.append(lost)
    rows = harness.markdown(both).splitlines()[2:4]
    assert rows[0].startswith("| lost |") and rows[1].startswith("| B 1 |")
    assert harness.table(lost, PEAKS).splitlines()[1].startswith("  SLOWER: ours runs at 0.50×")


def test_tables_and_pictures_name_the_instruction_set():
    from benchmarks.harness.pictures import draw

    named = report()
    named.machine["pyens"] = {"cpu_capability": "avx2"}
    assert "on a processor (avx2), 2 threads" in harness.markdown(named)
    assert draw(named).axes[0].get_title() == "op: float32, a processor (avx2)"


def test_a_cap_starts_the_benchmark_anew_under_it(monkeypatch, tmp_path):
    started = []

    def call(command, env):
        started.append((command, env))
        return 7

    for name in measuring.ISA_CAPS["avx2"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(subprocess, "call", call)
    arguments = ["--quick", "--isa", "avx2", "--output", str(tmp_path)]
    assert harness.main("every_engine", "", every_engine.cases, arguments) == 7
    ((command, env),) = started
    assert command[1:] == ["-m", "benchmarks.every_engine", *arguments]
    assert env["PYENS_CPU_CAPABILITY"] == env["ATEN_CPU_CAPABILITY"] == "avx2"
    assert env["ONEDNN_MAX_CPU_ISA"] == "AVX2" and env["XLA_FLAGS"] == "--xla_cpu_max_isa=AVX2"


@pytest.mark.skipif(pyens.build_info()["cpu_capability"] == "base", reason="this processor has no AVX2")
def test_a_capped_run_says_so_in_name_and_tables(tmp_path):
    command = [sys.executable, "-m", "benchmarks.ensemble_mlp", "--quick", "--threads", "1"]
    subprocess.run(
        [*command, "--isa", "avx2", "--output", tmp_path], check=True, cwd=harness.RESULTS.parents[1]
    )
    saved = Report.load(tmp_path / "ensemble_mlp-cpu-float32-avx2-quick.json")
    assert saved.machine["pyens"]["cpu_capability"] == "avx2"
    assert saved.machine["isa"]["asked"] == "avx2" and saved.machine["isa"]["torch"] == "AVX2"


def test_who_cannot_be_capped_is_marked_under_a_cap_alone():
    case = Case("case", "", lambda: [Contestant("a", lambda: lambda: None, accept, capped=False)])
    for isa, marked in (("avx2", True), ("", False)):
        (timing,) = harness.run_interleaved(case, options(isa=isa), block_seconds=0.0).timings
        assert timing.uncapped is marked


# --- the engines


def need_engines():
    for name in ENGINES:
        pytest.importorskip(name)


def agreed(contestants):
    """Sets up, calls twice and checks, as the harness does; the names."""
    for contestant in contestants:
        run = contestant.setup()
        try:
            contestant.check(run())
            contestant.check(run())  # a second call too
        finally:
            if isinstance(run, harness.Remote):
                run.close()
    return {contestant.name for contestant in contestants}


def test_engines_compute_the_same():
    need_engines()
    problem = peers.Problem.random(3, 5, (4, 6, 2), seed=1)
    found = engines.forward_peers(problem, problem.expected(), 1)
    assert agreed(found) >= {"jax lax.map", "jax transposed, ynn", "onnxruntime gemm", "openvino matmul"}
    assert all(c.capped == c.name.startswith("openvino") for c in found)


def test_engines_compute_the_same_gradients():
    need_engines()
    problem = training_peers.TrainingProblem.random(3, 5, (4, 6, 6, 2), seed=1)
    found = engines.gradient_peers(problem, problem.expected(), 1)
    assert agreed(found) == {f"jax {form}" for form in engines.FORMS["jax"]}


def test_a_missing_engine_is_excluded_aloud(monkeypatch, capsys):
    problem = peers.Problem.random(2, 3, (4, 2), seed=1)
    monkeypatch.setitem(engines.MODULES, "jax", "no_such_engine")
    monkeypatch.setattr(engines, "FORMS", {"jax": ("vmap",)})
    found = engines.forward_peers(problem, problem.expected(), 1)
    case = Case("case", "", lambda: found)
    measured = harness.run_interleaved(case, options(), block_seconds=0.0)
    assert all("ModuleNotFoundError" in t.excluded for t in measured.timings)
    assert "EXCLUDED from case: jax vmap" in capsys.readouterr().err


def test_targets_are_those_of_the_instruction_set(monkeypatch):
    def ratios(name, isa, threads):
        monkeypatch.setattr(every_engine, "isa", lambda: isa)
        (case,) = [c for c in every_engine.cases(options(quick=False, threads=threads)) if c.name == name]
        return {(t.ours, t.ratio, t.seconds, bool(t.flops)) for t in case.targets}

    loss = every_engine.LOSS
    assert ratios("forward-1", "avx2", 1) == {("pyens op", 1.2, 0, False), ("pyens packed()", 1.8, 0, False)}
    assert ratios("cold-forward-1", "avx512", 2) == {
        ("pyens op", 1.2, 0, False),
        ("pyens packed()", 1.7, 0, False),
    }
    assert ratios("training-16", "avx2", 1) == {(loss, 1.3, 0, False), (loss, 1.0, 350e-6, False)}
    assert ratios("training-16", "avx512", 1) == ratios("training-16", "avx2", 2) == {(loss, 1.3, 0, False)}
    for isa, ratio in (("avx2", 1.0), ("avx512", 1.2)):
        assert ratios("training-wide-1200", isa, 2) == {(loss, ratio, 0, False), (loss, 0.8, 0, True)}
    assert ratios("forward-1", "", 1) == set()


def test_every_row_has_a_target_or_is_cold(monkeypatch):
    monkeypatch.setattr(every_engine, "isa", lambda: "avx2")
    for case in every_engine.cases(options(quick=False, threads=1)):
        assert case.targets or case.cold_bytes == 16 << 20, case.name
    assert every_engine.cases(options(dtype=torch.bfloat16)) == []


def test_quick_run_of_every_engine(tmp_path, capsys, monkeypatch):
    need_engines()
    monkeypatch.setattr(engines, "FORMS", dict.fromkeys(engines.FORMS, ("transposed",)))
    run = partial(harness.main, "every_engine", "text", every_engine.cases, by_threads=True)
    assert run(["--quick", "--threads", "1", "--output", str(tmp_path)]) == 0
    saved = Report.load(tmp_path / "every_engine-cpu-float32-threads1-quick.json")
    assert [r.name for r in saved.results] == [
        *("forward", "cold-forward", "training", "cold-training"),
        *("adam-step", "adam-tables"),
    ]
    for entry in saved.results:
        excluded = {t.name for t in entry.timings if t.excluded} - {"tabm"}
        assert not excluded and all(len(t.cpu_seconds) == len(t.seconds) for t in entry.timed())
    assert {"jax", "onnxruntime", "openvino"} <= set(saved.machine["engines"])
    assert "CPU time" in capsys.readouterr().out


# --- curves and contention


def curve(times, kind="forward", axis="batch", name=cost_curves.OP):
    """A report of a curve whose points take so many seconds and do as much work as their value says."""
    made = report()
    made.results = [
        result(
            name=f"{kind}-{axis}-{value}",
            flops=float(value),
            timings=[Timing(name, True, [seconds]), Timing("baddbmm", False, [2 * seconds])],
        )
        for value, seconds in times.items()
    ]
    return made


def test_a_cliff_is_work_that_costs_more_or_less_work_that_takes_longer():
    assert cost_curves.cliffs(curve({1: 1.0, 2: 1.0, 4: 2.5, 8: 5.0, 16: 4.0})) == []
    (dearer,) = cost_curves.cliffs(curve({16: 1.0, 17: 1.5}))
    assert dearer == "pyens op, forward, B 16 to 17: an operation costs 1.41× as much"
    (longer,) = cost_curves.cliffs(curve({15: 1.5, 16: 1.0}))
    assert longer == "pyens op, forward, B 15 to 16: the smaller one takes 1.50× as long"
    # Points of another curve are no neighbours.
    both = curve({16: 1.0})
    both.results += curve({16: 9.0}, kind="training", name=cost_curves.LOSS).results
    assert cost_curves.cliffs(both) == [] and cost_curves.remarks(both)[0].endswith(": met")
    assert cost_curves.remarks(curve({15: 1.5, 16: 1.0}))[0].endswith("MISSED, 1 are")


def test_curves_reach_from_one_to_the_largest_sizes():
    full = cost_curves.cases(options(quick=False))
    assert len({case.name for case in full}) == len(full)
    values = {axis: numbers for axis, (_, numbers) in cost_curves.AXES.items()}
    ends = {axis: (min(numbers), max(numbers)) for axis, numbers in values.items()}
    assert ends == {"members": (1, 1000), "batch": (1, 65_536), "width": (8, 2048), "layers": (1, 8)}
    assert {15, 16, 17, 31, 32, 33, 63, 64, 65} <= set(values["batch"])
    assert all(list(numbers) == sorted(set(numbers)) for numbers in values.values())
    assert cost_curves.shape("layers", 3) == (100, 64, (32, 50, 50, 1))


def test_quick_run_of_cost_curves(tmp_path, capsys):
    command = ["--quick", "--threads", "1", "--output", str(tmp_path)]
    drawn = dict(by_threads=True, picture=cost_curves.plot, remarks=cost_curves.remarks)
    assert harness.main("cost_curves", "text", cost_curves.cases, command, **drawn) == 0
    assert "target: no step between neighbours larger than 1.3×" in capsys.readouterr().out
    saved = Report.load(tmp_path / "cost_curves-cpu-float32-threads1-quick.json")
    figure = cost_curves.draw(saved)
    assert len(figure.axes) == 8 and (tmp_path / "cost_curves-cpu-float32-threads1-quick.png").exists()
    batch = figure.axes[1]
    labels = [line.get_label() for line in batch.lines]
    assert labels == ["pyens op", "pyens packed()", "best peer"] and batch.get_xlabel() == "B"
    results = [r for r in saved.results if r.name.startswith("forward-batch-")]
    op, best = batch.lines[0], batch.lines[-1]
    assert op.get_xdata().tolist() == [4, 17]
    per_member = [1e6 * cost_curves.median(r, "pyens op") / 32 for r in results]
    assert np.allclose(op.get_ydata(), per_member)
    assert np.allclose(best.get_ydata(), [1e6 * r.best_peer().median / 32 for r in results])
    assert cost_curves.summary(saved).count("\n| ") == 8


def test_curves_have_their_place_on_the_page(tmp_path, monkeypatch):
    made = curve({15: 1.5, 16: 1.0})
    made.benchmark = "cost_curves"
    made.save(tmp_path / "curves.json")
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    monkeypatch.setattr(results_page, "SECTIONS", {"curves": ("Curves", "What.", ""), "none": ("", "", "")})
    page = results_page.page()
    assert "0 of 1 targets met" in page and "\n- Curves, all: no step between neighbours" in page
    assert "- pyens op, forward, B 15 to 16: the smaller one takes 1.50× as long" in page


def test_quick_run_of_contention(tmp_path, monkeypatch):
    need_engines()
    monkeypatch.setattr(engines, "FORMS", dict.fromkeys(engines.FORMS, ("transposed",)))
    run = partial(harness.main, "contention", "text", contention.cases, by_threads=True)
    assert run(["--quick", "--threads", "1", "--output", str(tmp_path)]) == 0
    saved = Report.load(Path(tmp_path) / "contention-cpu-float32-threads1-quick.json")
    forward, trained = saved.results
    assert not [t for r in saved.results for t in r.timings if t.excluded]
    assert {t.name for t in forward.timed(ours=True)} == {"pyens op", "pyens packed()"}
    assert {t.name for t in forward.timed(ours=False)} >= {"baddbmm", "jax transposed", "openvino transposed"}
    assert {t.name for t in trained.timed()} == {
        *("pyens loss", "baddbmm", "baddbmm transposed"),
        "jax transposed",
    }
    names = [case.name for case in contention.cases(options(quick=False))]
    assert names[:3] == [f"forward-16-processes-{count}" for count in (1, 2, 4)]
