"""The benchmark harness: it measures what it says, excludes what is wrong, and leaves its files behind."""

import itertools
import json
import math
import os
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pyens
from benchmarks import (
    ensemble_mlp,
    fit,
    harness,
    masksembles,
    networks,
    peers,
    results_page,
    table_peers,
    training,
    training_peers,
)
from benchmarks.harness import Case, Contestant, Options, Peaks, Report, Result, Target, Timing, measuring
from benchmarks.harness.pictures import draw
from tests.pictures import same_picture, saved_figures

PEAKS = Peaks(gflops=100.0, kind="float32 FMA", copy_gbs=10.0)


@pytest.fixture(autouse=True)
def _restore_threads():
    """Benchmarks set torch's thread count for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def options(**changes) -> Options:
    defaults = dict(device=torch.device("cpu"), dtype=torch.float32, threads=2, rounds=4, seed=0)
    return Options(**defaults | dict(quick=True, compile=False) | changes)


def build_megabytes(count):
    """For a process of its own: a call that takes `count` MB."""
    return lambda: torch.ones(count * 1_000_000, dtype=torch.uint8)


def accept(output):
    """A check that any output passes."""


def result(**changes) -> Result:
    """Ours against two peers, each the best in some round: 2, 1 and 4 times as fast as the best."""
    timings = [
        Timing("ours", True, [1e-3, 4e-3, 1e-3]),
        Timing("a", False, [2e-3, 6e-3, 9e-3]),
        Timing("b", False, [3e-3, 4e-3, 4e-3]),
        Timing("broken", False, excluded="ValueError: wrong"),
    ]
    return Result(
        **dict(name="case", title="B 1", flops=2e7, bytes=0.0, targets=[], timings=timings) | changes
    )


def report() -> Report:
    machine = {"cpu": "a processor", "gpu": None, "threads": 2, "torch": torch.__version__}
    machine |= {"commit": "0123456789abcdef", "dirty": True, "date": "2020-01-02T03:04:05+00:00"}
    targets = [Target("ours", 1.5), Target("ours", 9.0, against=("a",))]
    return Report("op", "cpu", "float32", machine, {"rounds": 3}, PEAKS, [result(targets=targets)])


# --- what the numbers mean


def test_speedup_is_formed_within_rounds():
    assert result().speedup("ours") == pytest.approx(2.0)
    assert result().speedup("ours", ("a",)) == pytest.approx(2.0)
    assert result().speedup("ours", ("b",)) == pytest.approx(3.0)
    assert result().speedup("a") == pytest.approx(2 / 3)
    assert result().best_peer().name == "b"


def test_quartiles():
    assert Timing("a", False, [4.0, 1.0, 3.0, 2.0, 5.0]).quartiles == (2.0, 4.0)
    assert Timing("a", False, [4.0]).quartiles == (4.0, 4.0)


def test_speedup_without_anything_to_compare_is_none():
    assert result().speedup("broken") is None
    assert result().speedup("ours", ("broken",)) is None
    assert "MISSED, not measured" in harness.verdict(result(), Target("ours", 1.0, ("broken",)), PEAKS)


def test_a_machine_that_others_use_is_said():
    alone, shared = result(peaks_of_rounds=[95.0, 50.0, 99.0]), result(peaks_of_rounds=[95.0, 50.0, 60.0])
    assert alone.share_of_machine(PEAKS) == 0.95 and result().share_of_machine(PEAKS) is None
    assert "SHARED: between the rounds the machine had 60% of its peak" in harness.table(shared, PEAKS)
    assert "SHARED" not in harness.table(alone, PEAKS) + harness.table(result(), PEAKS)
    told = report()
    assert "of the machine" not in harness.markdown(told)
    told.results.append(shared)
    assert "| B 1 *(60% of the machine)* |" in harness.markdown(told)
    assert "others used it" in harness.markdown(told)


def test_rate_is_useful_work_per_second():
    assert result().rate(1e-3) == (pytest.approx(20.0), "GF/s")
    assert result(flops=0.0, bytes=3e6).rate(1e-3) == (pytest.approx(3.0), "GB/s")
    assert result(flops=0.0).rate(1e-3) == (pytest.approx(1000.0), "calls/s")
    assert [result(flops=f, bytes=b).peak(PEAKS) for f, b in [(1, 1), (0, 1), (0, 0)]] == [100.0, 10.0, None]


def test_mlp_flops_counts_multiplications_and_additions():
    assert peers.mlp_flops(100, 1, (32, 50, 20, 10, 1)) == 2 * 100 * (32 * 50 + 50 * 20 + 20 * 10 + 10)


def test_table_says_what_was_met_missed_lost_and_excluded():
    text = harness.table(result(targets=[Target("ours", 1.5), Target("ours", 2.5)]), PEAKS)
    assert "ours at least 1.5× the best peer: met, 2.00×" in text
    assert "ours at least 2.5× the best peer: MISSED, 2.00×" in text
    assert "EXCLUDED broken: ValueError: wrong" in text
    assert "UNSTEADY: 2 of 3 contestants, worst ours: quartiles 150%" in text
    assert "SLOWER" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("* ours")]
    assert "1 ms" in row and "20 GF/s" in row and "20%" in row and row.endswith("2.00×")

    slow = result(timings=[Timing("ours", True, [2.0, 2.0]), Timing("a", False, [1.0, 1.0])])
    assert "SLOWER: ours runs at 0.50×" in harness.table(slow, PEAKS)
    assert "UNSTEADY" not in harness.table(slow, PEAKS)


def test_memory_is_shown_and_held_against_its_limit():
    timings = [Timing("ours", True, [1.0], memory=250_000_000), Timing("a", False, [2.0], memory=90_000_000)]
    text = harness.table(result(timings=timings, memory_limit=300_000_000), PEAKS)
    assert "ours takes at most 300 MB: met, 250 MB" in text
    assert [line.split()[-2:] for line in text.splitlines()[2:4]] == [["250", "MB"], ["90", "MB"]]
    assert harness.verdicts(result(timings=timings, memory_limit=200_000_000), PEAKS) == [
        "ours takes at most 200 MB: MISSED, 250 MB"
    ]
    assert harness.verdicts(result(memory_limit=1), PEAKS) == [
        "ours takes at most 0 MB: MISSED, not measured"
    ]
    assert "memory" not in harness.table(result(), PEAKS) and not harness.verdicts(result(), PEAKS)


# --- measuring


def test_contestants_take_turns_in_a_new_order_each_round():
    calls = []

    def contestant(name):
        return Contestant(name, lambda: lambda: calls.append(name), accept, ours=name == "a")

    case = Case("turns", "", lambda: [contestant(name) for name in "abcd"])
    measured = harness.run_interleaved(case, options(rounds=6), block_seconds=0.0)
    assert [t.name for t in measured.timings] == list("abcd")
    assert all(len(t.seconds) == 6 and min(t.seconds) > 0 for t in measured.timings)
    blocks = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert set(blocks) == set("abcd")
    # One block each after another would give 4 changes of contestant; turns in rounds give many more.
    assert len(blocks) >= 4 + 6 * 3
    assert blocks[4:] != list("abcd") * 6


def test_wrong_and_failing_contestants_are_excluded_aloud(capsys):
    expected = torch.ones(3, dtype=torch.float64)
    check = harness.agrees_with(expected, torch.float32)

    def fail():
        raise RuntimeError("no such compiler")

    case = Case(
        "exclusion",
        "",
        lambda: [
            Contestant("right", lambda: lambda: torch.ones(3), check, ours=True),
            Contestant("wrong", lambda: lambda: torch.tensor([1.0, 1.0, 1.01]), check),
            Contestant("nan", lambda: lambda: torch.tensor([1.0, 1.0, math.nan]), check),
            Contestant("shape", lambda: lambda: torch.ones(1, 3), check),
            Contestant("dtype", lambda: lambda: torch.ones(3, dtype=torch.float64), check),
            Contestant("fails", fail, check),
        ],
    )
    measured = harness.run_interleaved(case, options(), block_seconds=0.0)
    assert [t.name for t in measured.timed()] == ["right"]
    excluded = {t.name: t.excluded for t in measured.timings if t.excluded}
    assert list(excluded) == ["wrong", "nan", "shape", "dtype", "fails"]
    assert excluded["fails"] == "RuntimeError: no such compiler"
    assert "0.01" in excluded["wrong"] and "(1, 3)" in excluded["shape"] and "float64" in excluded["dtype"]
    assert all(not t.seconds for t in measured.timings if t.excluded)
    assert capsys.readouterr().err.count("EXCLUDED from exclusion") == 5


def test_check_takes_several_tensors_and_an_adapter():
    expected = [torch.ones(2, 3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    check = harness.agrees_with(expected, torch.float32, lambda out: (out[0].mT, out[1]))
    check((torch.ones(3, 2), torch.zeros(())))
    with pytest.raises(ValueError, match="rms"):
        check((torch.ones(3, 2), torch.ones(())))
    with pytest.raises(ValueError, match="expected 2 outputs, got 1"):
        harness.agrees_with(expected, torch.float32)(torch.ones(2, 3))


def test_check_of_the_root_mean_square_forgives_a_single_error():
    expected = torch.ones(100, dtype=torch.float64)
    check = harness.agrees_with(expected, torch.float32, rms=0.02)
    one, all_ = torch.ones(100), torch.full((100,), 1.03)
    one[3] = 1.1
    check(one)
    for wrong in (all_, one.index_fill(0, torch.tensor(5), math.nan), torch.zeros(100)):
        with pytest.raises(ValueError, match="rms error is"):
            check(wrong)
    with pytest.raises(ValueError, match=r"largest error is 0.1 rms"):
        harness.agrees_with(expected, torch.float32)(one)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
def test_peak_memory_is_that_of_the_work_alone():
    held = torch.ones(300_000_000, dtype=torch.uint8)  # here, not in the process that is measured
    small, large = partial(build_megabytes, 1), partial(build_megabytes, 80)
    assert 79e6 < harness.peak_memory(small, large, options()) < 200e6
    assert len(held) == 300_000_000


def test_memory_of_a_contestant_is_kept_and_its_failure_excludes():
    def fail():
        raise MemoryError("too much")

    def contestant(name, memory):
        return Contestant(name, lambda: lambda: None, accept, ours=True, memory=memory)

    case = Case("memory", "", lambda: [contestant("a", lambda: 7), contestant("b", fail)], memory_limit=8)
    measured = harness.run_interleaved(case, options(), block_seconds=0.0)
    a, b = measured.timings
    assert a.memory == 7 and measured.memory_limit == 8 and b.excluded == "MemoryError: too much"


@pytest.mark.parametrize(("threads", "grad"), [(1, False), (2, True)])
def test_calls_run_with_the_threads_and_mode_of_the_case(threads, grad):
    seen = set()

    def run():
        seen.add((torch.get_num_threads(), torch.is_inference_mode_enabled()))

    case = Case("mode", "", lambda: [Contestant("ours", lambda: run, accept, ours=True)], grad=grad)
    harness.run_interleaved(case, options(threads=threads), block_seconds=0.0)
    assert seen == {(threads, not grad)}


@pytest.mark.skipif(
    "PYENS_CPU_CAPABILITY" in os.environ or pyens.build_info()["cpu_capability"] == "base",
    reason="the library's product uses wider instructions than are measured here",
)
def test_the_fma_peak_is_what_a_good_product_comes_near_to():
    """The library's product of two matrices, whose operations are known: at most the peak, and most of it."""
    a, b = torch.randn(2, 384, 384)
    torch.set_num_threads(1)
    product, peak = 0.0, 0.0
    for _ in range(20):  # in turns, and the best of each: a busy core slows both
        start = time.perf_counter()
        a @ b
        product = max(product, 2 * 384**3 / (time.perf_counter() - start) / 1e9)
        peak = max(peak, pyens._C.fma_peak(2.0))
    assert 0.8 < peak / product < 2


class CopyTimer:
    """In place of the Timer: runs the statement and says that it took a millisecond."""

    def __init__(self, statement, globals, num_threads):
        self.run = lambda: exec(statement, globals)
        self.copied = lambda: torch.equal(globals["copy"], globals["source"])

    def timeit(self, calls):
        self.run()
        assert self.copied()
        return SimpleNamespace(mean=1e-3)


def test_peaks_are_counted_in_the_right_units(monkeypatch):
    monkeypatch.setattr(pyens._C, "fma_peak", lambda milliseconds: 100.0)
    monkeypatch.setattr(measuring, "Timer", CopyTimer)
    copy_gbs = pytest.approx(2 * 32 * 2**20 / 1e-3 / 1e9)  # 32 MiB read and 32 MiB written
    assert harness.measure_peaks(options()) == Peaks(100.0, "float32 FMA", copy_gbs)
    assert harness.measure_peaks(options(dtype=torch.float64)) == Peaks(50.0, "float64 FMA", copy_gbs)
    assert harness.measure_peaks(options(dtype=torch.bfloat16)).kind == "float32 FMA"


def test_the_higher_peak_is_kept():
    low_copy, low_flops = Peaks(100.0, "float32 FMA", 5.0), Peaks(50.0, "float32 FMA", 10.0)
    assert low_copy.or_better(low_flops) == low_flops.or_better(low_copy) == PEAKS


def test_peak_without_the_native_function_is_an_error(monkeypatch):
    from pyens import _C

    monkeypatch.delattr(_C, "fma_peak")
    with pytest.raises(RuntimeError, match="rebuild pyens"):
        harness.measure_peaks(options())


# --- files


def test_report_survives_saving(tmp_path):
    path = tmp_path / "new" / "report.json"
    report().save(path)
    assert Report.load(path) == report()
    measured = report()
    measured.results[0].memory_limit = 9
    measured.results[0].timings[0].memory = 8
    measured.save(path)
    assert Report.load(path) == measured != report()
    entry = json.loads(path.read_text())["results"][0]["timings"][0]
    assert entry["median"] == 1e-3 and entry["rate"] == pytest.approx(20.0) and entry["unit"] == "GF/s"
    assert entry["speedup_over_best_peer"] == pytest.approx(2.0)


def test_markdown_gives_speedups_targets_and_provenance():
    header, rule, row, _, notes = harness.markdown(report()).splitlines()
    assert header == "| work | best peer | ours | target |" and rule == "|---|---|---|---|"
    assert row.startswith("| B 1 | b, 4 ms | **2.00×** 1 ms (20 GF/s, 20%) | ours at least 1.5×")
    assert "ours at least 9× a: MISSED, 2.00×" in row
    assert "0123456789 with changes" in notes and "2020-01-02" in notes and "3 interleaved rounds" in notes


def test_the_page_of_results_is_what_the_command_gives():
    assert results_page.PAGE.read_text(encoding="utf-8") == results_page.page()


def test_every_saved_report_is_on_the_page():
    saved = [path for path in harness.RESULTS.glob("*.json") if "benchmark" in json.loads(path.read_text())]
    assert {path.stem for path in saved} <= set(results_page.SECTIONS)


def test_the_page_counts_what_was_met_and_lists_what_was_missed(tmp_path, monkeypatch):
    report().save(tmp_path / "op.json")
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    monkeypatch.setattr(results_page, "SECTIONS", {"op": ("A title", "What it is.", "Why.")})
    page = results_page.page()
    assert "1 of 2 targets met. Missed:" in page
    assert "\n- A title, B 1: ours at least 9× a: MISSED, 2.00×\n" in page
    for part in ("\n## A title\n\nWhat it is.\n", harness.markdown(report()), "\nWhy.\n", "results/op.png"):
        assert part in page
    assert "| E 100, B 16, 32-50-20-10-1 | bfloat16 | pyens op, graph at least 4×" in page


def test_the_picture_shows_rates_speedups_peak_and_targets(tmp_path):
    bars, ratios = draw(report()).axes
    assert bars.get_title() == "op: float32, a processor"
    assert (bars.get_ylabel(), ratios.get_ylabel()) == ("GF/s", "speed-up over the best peer")
    labels = {text.get_text() for text in bars.get_legend().get_texts()}
    assert labels == {"ours", "a", "b", "peak (float32 FMA)"}
    heights = [bar.get_height() for bar in bars.patches if bar.get_width() > 0]
    assert heights == pytest.approx([20.0, 20 / 6, 5.0])  # 2e7 operations in 1, 6 and 4 ms
    (peak,) = [ends[:, 1].tolist() for line in bars.collections for ends in line.get_segments()]
    assert peak == [100.0, 100.0]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["case"]
    assert [label.get_text() for label in ratios.get_xticklabels()] == ["B 1"]
    (speedup,) = [
        line.get_ydata()[0] for line in ratios.lines if line.get_marker() == "o" and len(line.get_xdata())
    ]
    assert speedup == pytest.approx(2.0)
    # The target over the best peer; that over one of them is not drawn.
    (target,) = [ends[:, 1].tolist() for line in ratios.collections for ends in line.get_segments()]
    assert target == [1.5, 1.5]

    harness.plot(report(), tmp_path / "report.png")
    faster = report()
    faster.results[0].timings[0].seconds = [1e-4, 4e-4, 1e-4]
    harness.plot(faster, tmp_path / "faster.png")
    assert not same_picture(tmp_path / "report.png", tmp_path / "faster.png")


def test_a_picture_of_mixed_units_shows_shares_of_the_peak():
    mixed = report()
    mixed.results.append(result(name="copy", flops=0.0, bytes=2e6))
    bars, _ = draw(mixed).axes
    assert bars.get_ylabel() == "share of the peak"
    heights = [bar.get_height() for bar in bars.patches if bar.get_width() > 0]
    assert heights == pytest.approx([0.2, 0.2 / 6, 0.05, 0.2, 0.2 / 6, 0.05])


# --- the peers, and the benchmark as a whole


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per member"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_peers_compute_the_same(device, shared, dtype):
    problem = peers.Problem.random(3, 5, (4, 6, 2), seed=1, device=device, dtype=dtype, shared=shared)
    found = peers.mlp_peers(problem, problem.expected(), compile=False)
    assert {c.name for c in found} >= {"loop", "vmap", "baddbmm", "baddbmm transposed", "tabm"}
    for contestant in found:
        if contestant.name == "tabm":
            pytest.importorskip("tabm")
        run = contestant.setup()
        with torch.inference_mode():
            run()
            contestant.check(run())  # a second call too: no peer may change its input


def test_problem_expected_is_the_plain_mlp():
    problem = peers.Problem.random(2, 3, (4, 5, 1), seed=0)
    (w1, w2), (b1, b2) = problem.weights, problem.biases
    for m in range(2):
        hidden = (problem.input.double() @ w1[m].double().T + b1[m].double()).clamp_min(0)
        torch.testing.assert_close(problem.expected()[m], hidden @ w2[m].double().T + b2[m].double())


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per member"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradient_peers_compute_the_same(monkeypatch, device, shared, dtype):
    monkeypatch.setattr(training_peers, "compiled", lambda function: function)  # their arithmetic, at once
    problem = training_peers.TrainingProblem.random(
        3, 5, (4, 6, 6, 2), seed=1, device=device, dtype=dtype, shared=shared
    )
    expected = problem.expected()
    assert len(expected[1]) == (6 if shared else 7)
    found = training_peers.gradient_peers(problem, expected, compile=True)
    names = {c.name for c in found}
    assert names >= {"loop", "vmap(grad), compiled", "baddbmm, one graph", "baddbmm transposed, compiled"}
    assert ("baddbmm joined, compiled" in names) == shared
    for contestant in found:
        run = contestant.setup()
        run()
        contestant.check(run())  # gradients of one call, not the sum of two
    assert not any(tensor.requires_grad for tensor in problem.tensors)


def test_gradient_check_refuses_what_is_wrong():
    problem = training_peers.TrainingProblem.random(3, 50, (4, 6, 1), seed=1)
    losses, gradients = problem.expected()
    check = training_peers.gradients_agree((losses, gradients), torch.float32)
    losses, right = losses.float(), [g.float() for g in gradients]
    check((losses, lambda: right))
    with pytest.raises(ValueError, match="largest error"):
        check((1.001 * losses, lambda: right))
    for i, gradient in enumerate(right):
        for wrong in (gradient * 1.02, gradient.flip(0), gradient.mT.contiguous()):
            with pytest.raises(ValueError, match=r"rms|expected"):
                check((losses, lambda i=i, wrong=wrong: [*right[:i], wrong, *right[i + 1 :]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_step_peers_take_the_same_step(monkeypatch, device, dtype):
    monkeypatch.setattr(table_peers, "compiled", lambda function: function)
    table = table_peers.Table(3, 9, ((11, 2), (5, 3)), 4, (7, 6), 2)
    problem = table_peers.TableProblem.random(table, seed=1, device=device, dtype=dtype)
    assert table.features == (9, 7, 6, 2) and table.parameters == sum(t.numel() for t in problem.tensors)
    start = [tensor.clone() for tensor in problem.tensors]
    check = problem.check()
    setups = training.steps(options(compile=True))
    assert set(setups) >= {"pyens TabularEnsemble", "loop", "loop, an Adam each", "stack, one graph"}
    for name, setup in setups.items():
        run = setup(problem)
        check(run())
        assert all(torch.equal(t, s) for t, s in zip(problem.tensors, start, strict=True)), name
        with pytest.raises(ValueError, match="rms"):
            check(run())  # the second step is not the first


@pytest.mark.parametrize("wrong", ["gradients", "parameters"])
def test_step_check_refuses_what_is_wrong(wrong):
    problem = table_peers.TableProblem.random(training.TINY_TABLE, seed=1)
    losses, state = table_peers.adam_step(table_peers.stack(problem))()
    gradients, parameters = state()
    problem.check()((losses, lambda: (gradients, parameters)))
    if wrong == "gradients":
        gradients = [1.02 * gradients[0], *gradients[1:]]
    else:
        parameters = [parameters[0] + 1e-4, *parameters[1:]]
    with pytest.raises(ValueError, match="rms error is"):
        problem.check()((losses, lambda: (gradients, parameters)))


def test_training_cases_are_the_promised_ones():
    full = training.cases(options(quick=False))
    assert [case.name for case in full] == [*training.SHAPES, "movielens-step"]
    assert all(case.targets and case.grad for case in full)
    step = full[-1]
    # Per member 79,510 numbers in tables and 3,441 in the MLP; four of each, and 100 MB.
    assert step.memory_limit == 100 * (79_510 + 3_441) * 4 * 4 + 100_000_000
    loops, compiled = (target.against for target in step.targets)
    assert loops == ("loop", "loop, an Adam each") and len(compiled) == 4
    assert set(loops + compiled) < set(table_peers.table_peers(compile=True))
    for other in (dict(dtype=torch.float64), dict(threads=1)):
        others = training.cases(options(quick=False, **other))
        assert len(others) == len(full) and not any(case.targets or case.memory_limit for case in others)
    low = training.cases(options(quick=False, dtype=torch.bfloat16))
    assert [case.name for case in low] == list(training.SHAPES)


def test_training_flops_leave_out_the_gradient_that_nobody_asks_for():
    forward = 2 * 5 * 7 * (4 * 6 + 6 * 2)
    assert training_peers.training_flops(5, 7, (4, 6, 2), True) == 3 * forward
    assert training_peers.training_flops(5, 7, (4, 6, 2), False) == 3 * forward - 2 * 5 * 7 * 4 * 6


def test_quick_training_run(tmp_path, capsys):
    command = ["--quick", "--threads", "1", "--output", str(tmp_path)]
    assert harness.main("training", "text", training.cases, command) == 0
    shown = capsys.readouterr().out
    saved = Report.load(tmp_path / "training-cpu-float32-quick.json")
    *gradients, step = saved.results
    assert [result.name for result in saved.results] == ["tiny", "tiny-own", "movielens-step"]
    for result in gradients:
        assert {t.name for t in result.timed(ours=True)} == {"pyens loss", "pyens op, then mse"}
        assert {t.name for t in result.timed(ours=False)} >= {"reference", "loop", "vmap(grad)", "baddbmm"}
    assert {t.name for t in step.timed(ours=True)} == {"pyens TabularEnsemble"}
    assert {t.name for t in step.timed(ours=False)} >= {"loop", "loop, an Adam each", "stack"}
    if Path("/proc/self/status").exists():
        assert 0 <= step.timed(ours=True)[0].memory < 50e6
        assert " MB" in shown
    assert "EXCLUDED" not in shown


def test_fit_cases_are_the_promised_ones():
    full = fit.cases(options(quick=False))
    steps = [f"{kind}-{which}" for kind in fit.KINDS for which in ("mlp", "tables", "small", "table")]
    names = ["loop", "leaving", "departure", "clip", *steps, "adam-training"]
    assert [case.name for case in full] == names
    assert all(case.grad for case in full)
    assert [case.name for case in full if not case.targets] == ["departure"]
    members = 32 * 50 + 50 * 20 + 20 * 10 + 10 + 50 + 20 + 10 + 1
    adam = full[4]
    assert adam.bytes == 100 * members * 4 * 7  # parameter and moments read and written, gradient read
    for other in (dict(dtype=torch.float64), dict(threads=1), dict(quick=True)):
        assert not any(case.targets for case in fit.cases(options(**dict(quick=False) | other)))
    assert fit.cases(options(dtype=torch.bfloat16)) == []


def test_the_orders_of_fit_are_those_that_the_benchmark_draws():
    problem = fit.Problem.random(fit.TINY, options())
    seen = []

    def remember(output, target):
        if torch.is_grad_enabled():
            seen.append(target.detach().clone())
        return training_peers.mse(output, target)

    data = (problem.x, torch.arange(40.0).unsqueeze(1).expand(40, 2).contiguous())
    sizes = dict(epochs=2, batch_size=16, validation=0.0, progress=False)
    pyens.training.fit(problem.copy(), data, loss=remember, optimizer=fit.adam, seed=5, **sizes)
    first, *batches = seen  # of one row, before the first epoch
    assert first.shape[-2] == 1 and len(batches) == 6
    expected = [rows for order in fit.orders_of_fit(problem, 5) for rows in order.split(16, 1)]
    for batch, rows in zip(batches, expected, strict=True):
        assert torch.equal(batch[..., 0], rows.float())


def test_network_cases_are_the_promised_ones():
    full = networks.cases(options(quick=False))
    names = [case.name for case in full]
    assert names[: len(networks.NETWORKS)] == list(networks.NETWORKS)
    targets = {case.name: case.targets[0].ratio for case in full if case.targets}
    assert targets["droq"] == 2.0 and targets["edac"] == 1.25 and targets["torchani"] == 1.3
    assert networks.cases(options(dtype=torch.bfloat16)) == []
    assert not any(case.targets for case in networks.cases(options(quick=False, dtype=torch.float64)))


def test_quick_run_of_networks(tmp_path, capsys):
    command = ["--quick", "--threads", "1", "--output", str(tmp_path)]
    assert harness.main("networks", networks.__doc__, networks.cases, command) == 0
    assert "EXCLUDED" not in capsys.readouterr().out
    saved = Report.load(tmp_path / "networks-cpu-float32-quick.json")
    assert [r.name for r in saved.results][: len(networks.NETWORKS)] == list(networks.NETWORKS)
    assert all(r.timed() for r in saved.results)


def test_quick_run_of_fit(tmp_path, capsys):
    command = ["--quick", "--threads", "1", "--output", str(tmp_path)]
    assert harness.main("fit", "text", fit.cases, command) == 0
    assert "EXCLUDED" not in capsys.readouterr().out
    saved = Report.load(tmp_path / "fit-cpu-float32-quick.json")
    names = ["loop", "leaving", "departure", "clip", *(f"{kind}-mlp" for kind in fit.KINDS), "adam-training"]
    assert [result.name for result in saved.results] == names
    loop, leaving, departure, clip, *_ = saved.results
    assert {t.name for t in loop.timed()} == {fit.FIT, fit.FIT_IN_TORCH, fit.LOOP}
    assert {t.name for t in leaving.timed()} == {fit.FIT_LEAVING, fit.LOOP_LEAVING, fit.LOOPS_FIXED}
    assert {t.name for t in departure.timed(ours=True)} == {fit.STEP, fit.DEPARTURE}
    assert {t.name for t in clip.timed() if t.yardstick} == {fit.CLIP_ALL, fit.STEP}
    # A target may be about a yardstick, and about another of ours.
    for result, ours, against in ((clip, fit.CLIP, fit.STEP), (loop, fit.FIT_IN_TORCH, fit.FIT)):
        assert result.speedup(ours, (against,)) > 0


def test_a_step_of_another_optimizer_is_not_the_same():
    """What is compared is how far the parameters moved, which is little beside what they are."""
    contestants = fit.optimizers(torch.optim.Adam, {}, [(3, 5)], options())
    for contestant in contestants:
        contestant.check(contestant.setup()())
    slower = fit.optimizers(torch.optim.Adam, {"lr": 9e-4}, [(3, 5)], options())
    with pytest.raises(ValueError, match="rms error is"):
        contestants[0].check(slower[0].setup()())


def test_cases_are_the_promised_ones():
    full = ensemble_mlp.cases(options(quick=False))
    assert len(full) == 8 and all(case.targets for case in full)
    for other in (dict(dtype=torch.bfloat16), dict(threads=1)):
        assert not any(case.targets for case in ensemble_mlp.cases(options(quick=False, **other)))
    assert [c.name for c in harness.select(full, "wide,paper-64")] == [
        "paper-64",
        "wide-256",
        "wide-1200",
        "wide-512",
    ]
    assert harness.select(full, "") == full
    with pytest.raises(ValueError, match=r"no case 'paper-6'; there are paper-1, paper-64"):
        harness.select(full, "paper-6")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quick_run_leaves_json_picture_and_markdown(tmp_path, capsys, dtype):
    command = ["--quick", "--threads", "1", "--dtype", dtype, "--output", str(tmp_path)]
    assert harness.main("ensemble_mlp", "text", ensemble_mlp.cases, command) == 0
    shown = capsys.readouterr().out
    stem = tmp_path / f"ensemble_mlp-cpu-{dtype}-quick"
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem.name}.json", f"{stem.name}.png"}
    saved = Report.load(Path(f"{stem}.json"))
    harness.plot(saved, tmp_path / "again.png")
    assert same_picture(Path(f"{stem}.png"), tmp_path / "again.png")
    assert saved.machine["threads"] == 1 and saved.machine["pyens"]["version"]
    (tiny,) = saved.results
    assert {t.name for t in tiny.timed(ours=True)} == {"pyens op", "pyens module", "pyens packed()"}
    assert {t.name for t in tiny.timed(ours=False)} >= {"reference", "loop", "vmap", "baddbmm"}
    assert all(len(t.seconds) == 2 for t in tiny.timed())
    assert all(name in shown for name in ("pyens op", "pyens packed()", "reference", "vs best peer"))

    assert harness.main("ensemble_mlp", "text", ensemble_mlp.cases, [*command, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| work | best peer | pyens op |")


def test_masksembles_cases_have_targets():
    full = masksembles.cases(options(quick=False))
    names = ["forward", "training", "training-256", "training-64", "channels"]
    assert [case.name for case in full] == names
    assert all(case.targets for case in full)
    assert not any(case.targets for case in masksembles.cases(options(quick=False, threads=1)))
    assert len(list(itertools.product(*masksembles.DRAWN))) == 300


def test_the_published_layer_takes_given_masks():
    pytest.importorskip("masksembles")
    masks = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()
    for inner in ((), (2, 2)):
        x = torch.randn(6, 3, *inner)
        expected = pyens.reference.mask_channels(x, masks)
        assert torch.equal(masksembles.layer_of(masks, maps=bool(inner))(x), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quick_run_of_masksembles(tmp_path, capsys, monkeypatch, dtype):
    pytest.importorskip("masksembles")
    figures = saved_figures(monkeypatch)
    command = ["--quick", "--threads", "1", "--dtype", dtype, "--output", str(tmp_path)]
    assert masksembles.main(command) == 0
    shown = capsys.readouterr().out
    stem = f"masksembles-cpu-{dtype}-quick"
    names = {f"{stem}{end}" for end in (".json", ".png", "-scale.json", "-scale.png")}
    assert {path.name for path in tmp_path.iterdir()} == names
    saved = Report.load(tmp_path / f"{stem}.json")
    assert not [t for result in saved.results for t in result.timings if t.excluded]
    forward, training, channels = ({t.name for t in result.timed()} for result in saved.results)
    assert forward >= {"pyens op", "pyens MaskedMLP", "layer", "hand-gathered", "hand-gathered transposed"}
    assert training >= {"pyens MaskedMLP.loss", "layer", "hand-gathered", masksembles.SINGLE}
    assert channels >= {"pyens op", "layer", "clone", "copy_"}
    content = json.loads((tmp_path / f"{stem}-scale.json").read_text())
    assert content["draw"]["failed"] == [] and content["draw"]["settings"] == 12
    assert all(0 < s < math.inf for seconds in content["curve"].values() for s in seconds)
    (ax,) = figures[f"{stem}-scale.png"].axes
    scales, *times = content["curve"].values()
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("scale S", "ms", "log")
    assert [line.get_xdata().tolist() for line in ax.lines] == [scales] * 3
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1e3 * s for s in row] for row in times]
    assert "draw: 12 of 12 settings" in shown
    assert masksembles.main([*command, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| work | best peer |")


def test_an_excluded_contestant_of_ours_fails_the_run(tmp_path, capsys):
    def cases(_):
        def contestants():
            check = harness.agrees_with(torch.ones(1, dtype=torch.float64), torch.float32)
            return [Contestant("ours", lambda: lambda: torch.zeros(1), check, ours=True)]

        return [Case("bad", "", contestants)]

    assert harness.main("bad", "text", cases, ["--quick", "--output", str(tmp_path)]) == 1
    assert "EXCLUDED ours" in capsys.readouterr().out


@pytest.mark.cuda
def test_measuring_on_cuda(tmp_path):
    assert harness.measure_peaks(options(device=torch.device("cuda"))).kind == "float32 FMA"

    def cases(options):
        problem = peers.Problem.random(3, 5, (4, 6, 2), seed=1, device=options.device)
        return [Case("peers", "", lambda: peers.mlp_peers(problem, problem.expected(), compile=False))]

    assert harness.main("peers", "", cases, ["--device", "cuda", "--quick", "--output", str(tmp_path)]) == 0
    saved = Report.load(tmp_path / "peers-cuda-float32-quick.json")
    assert saved.machine["gpu"] and "loop" in {t.name for t in saved.results[0].timed()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "nope"], "no case 'nope'; there are paper-1"),
        (["--threads", "0"], "expected at least 1, got 0"),
        (["--dtype", "int8"], "invalid choice"),
        (["--markdown"], "there is no result"),
        (["--precision", "tf32"], "is for --device cuda and --dtype float32"),
        (["--precision", "tf32", "--device", "cuda", "--dtype", "bfloat16"], "is for --device cuda"),
    ],
)
def test_bad_flags_end_in_a_clear_error(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        harness.main("ensemble_mlp", "", ensemble_mlp.cases, [*arguments, "--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_a_clear_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        harness.main("ensemble_mlp", "", ensemble_mlp.cases, ["--device", "cuda", "--quick"])
    assert stopped.value.code == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
