"""The benchmarks on CUDA: graphs, yardsticks, floors, precision, and the cases that are promised."""

import pytest
import torch
from test_benchmarks import PEAKS, accept, options, result

from benchmarks import ensemble_mlp, harness, peers, training, training_peers
from benchmarks.harness import Case, Contestant, Target, Timing
from benchmarks.remote import blocks


def test_a_yardstick_is_no_peer_but_may_be_a_target():
    timings = [
        Timing("ours", True, [2.0, 2.0]),
        Timing("a", False, [6.0, 4.0]),
        Timing("empty", False, [1.0, 1.2], yardstick=True),
    ]
    measured = result(timings=timings)
    assert measured.best_peer().name == "a" and measured.speedup("ours") == pytest.approx(2.5)
    assert measured.speedup("ours", ("empty",)) == pytest.approx(0.55)
    text = harness.table(measured, PEAKS)
    assert [line[:2] for line in text.splitlines()[2:5]] == ["* ", "  ", "- "]
    assert "ours at least 0.5× empty: met" in harness.verdict(
        measured, Target("ours", 0.5, ("empty",)), PEAKS
    )


def test_a_floor_is_the_slower_of_arithmetic_and_memory():
    # PEAKS: 100 GF/s and 10 GB/s; ours takes 1 ms.
    for flops, bytes_moved, share in ((5e7, 1e5, "50%"), (1e6, 8e6, "80%")):
        target = Target("ours", 0.6, flops=flops, bytes=bytes_moved)
        met = "met" if share == "80%" else "MISSED"
        assert harness.verdict(result(), target, PEAKS).endswith(f"of what the peaks allow: {met}, {share}")
    assert "not measured" in harness.verdict(result(), Target("broken", 0.5, flops=1.0), PEAKS)


def test_float32_with_tf32_allowed_is_as_rough_as_float16():
    check = harness.agrees_with(torch.ones(3, dtype=torch.float64), torch.float32)
    with pytest.raises(ValueError, match="largest error"):
        check(torch.full((3,), 1.003))
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        check(torch.full((3,), 1.003))
        with pytest.raises(ValueError, match="largest error"):
            check(torch.full((3,), 1.03))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_seconds_are_those_of_one_of_several_calls(monkeypatch):
    now = [0.0]

    def work():  # every run takes 2 ms
        now[0] += 0.002

    def contestant(name, calls):
        return Contestant(name, lambda: work, accept, ours=True, calls=calls)

    monkeypatch.setattr(blocks.time, "perf_counter", lambda: now[0])
    case = Case("calls", "", lambda: [contestant("one", 1), contestant("ten", 10)])
    one, ten = harness.run_interleaved(case, options()).timings
    assert one.seconds == pytest.approx([0.002] * 4) and ten.seconds == pytest.approx([0.0002] * 4)
    # Each is checked once; then blocks of at least 20 ms, for 3 measurements at least and in 4 rounds.
    assert now[0] > 2 * 4 * 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_graph_without_a_device_is_a_clear_error():
    with pytest.raises(RuntimeError, match="graphed: expected a CUDA device"):
        harness.graphed(lambda: None)


def test_graphs_stand_beside_what_they_capture(monkeypatch):
    plain = [Contestant("a", lambda: lambda: 7, accept, ours=True, memory=lambda: 1)]
    assert harness.with_graphs(plain, options()) == plain
    captured = []
    monkeypatch.setattr(
        harness.graphs, "graphed", lambda run, calls: captured.append((run(), calls)) or (lambda: 8)
    )
    on_cuda = options(device=torch.device("cuda"))
    a, graph = harness.with_graphs(plain, on_cuda, calls=5)
    assert a is plain[0] and (graph.name, graph.ours, graph.calls) == ("a, graph", True, 5)
    assert graph.memory is None and graph.setup()() == 8 and captured == [(7, 5)]
    empty = harness.empty_kernel(5)
    assert empty.yardstick and not empty.ours and empty.calls == 5


@pytest.mark.cuda
def test_a_graph_replays_what_it_captured(device):
    x = torch.zeros(3, device="cuda")
    replay = harness.graphed(lambda: x.add_(1), calls=4)
    before = x.clone()
    assert replay() is not None
    torch.cuda.synchronize()
    assert torch.equal(x, before + 4)
    empty = harness.empty_kernel(10)
    empty.check(empty.setup()())


def cuda_targets(module, **changes):
    cases = module.cases(options(quick=False, device=torch.device("cuda"), **changes))
    return {case.name: [(t.ours, t.ratio) for t in case.targets] for case in cases}


def test_cuda_cases_are_the_promised_ones():
    op, graph = "pyens op", "pyens op, graph"
    small = {"paper-1": [(graph, 4.0), (graph, 0.5)], "paper-16": [(graph, 4.0)], "paper-256": [(graph, 4.0)]}
    assert cuda_targets(ensemble_mlp) == small | {"paper-65536": [(op, 3.0)], "wide-1200": []}
    tf32 = cuda_targets(ensemble_mlp, precision="tf32")
    assert tf32 == {"paper-65536": [(op, 5.0)], "wide-1200": []}
    low = cuda_targets(ensemble_mlp, dtype=torch.bfloat16)
    assert low == small | {"paper-65536": [(op, 5.0), (op, 0.3)], "wide-1200": [(op, 1.0)]}
    assert cuda_targets(training) == {"paper-8192": [("pyens loss", 4.0)], "movielens-step": []}
    floor = ensemble_mlp.padded_floor("paper-65536")
    assert floor["flops"] == 2 * 100 * 65_536 * (32 * 64 + 64 * 32 + 32 * 16 + 16 * 16)
    assert floor["bytes"] == 2 * 65_536 * (32 + 100)


def test_cuda_targets_name_peers_that_there_are():
    problem = peers.Problem.random(2, 3, (4, 5, 1), seed=0)
    forward = {c.name for c in peers.mlp_peers(problem, problem.expected(), compile=True)}
    assert set(ensemble_mlp.COMPILED) < forward
    assert set(ensemble_mlp.GRAPHED) < {f"{name}, graph" for name in forward}
    learned = training_peers.TrainingProblem.random(2, 3, (4, 5, 1), seed=0)
    found = {c.name for c in training_peers.gradient_peers(learned, learned.expected(), compile=True)}
    assert set(training.COMPILED) < found | {f"{name}, graph" for name in found}
