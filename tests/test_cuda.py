"""Every operation on CUDA: as on the CPU, the same bits in every run, on any stream, out of a CUDA graph."""

import pytest
import torch

from pyens import ops
from tests.cuda_operations import DTYPES, operations

NAMES = list(operations(torch.float32, "cpu"))
# Of a result's largest number; sums run in other orders, and half precision rounds in other places.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def same_bits(a, b) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_every_operation_is_here():
    assert {name.partition(",")[0] for name in NAMES} == set(ops.__all__)
    for name, run in operations(torch.float32, "cpu").items():
        assert all(t.count_nonzero() > 0 and not t.isnan().any() for t in run()), name


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_as_on_the_cpu(name, dtype):
    got, expected = operations(dtype, "cuda")[name](), operations(dtype, "cpu")[name]()
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.is_cuda and (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if ours.is_floating_point():
            size = theirs.double().abs().max()
            error = (ours.cpu().double() - theirs.double()).abs().max()
            assert error <= TOLERANCE[dtype] * size
        elif dtype in (torch.float32, torch.float64):
            assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_in_every_run(name, dtype, device):
    run = operations(dtype, device)[name]
    first = run()
    assert all(same_bits(run(), first) for _ in range(3))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_on_another_stream(name, dtype):
    run = operations(dtype, "cuda")[name]
    expected, stream = run(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what goes to the default stream would be done before
        got = run()
    stream.synchronize()
    assert same_bits(got, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_out_of_a_cuda_graph(name, dtype):
    run = operations(dtype, "cuda")[name]
    expected, stream = run(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for tensor in got:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(got, expected)


def test_opcheck(device):
    outputs, x = torch.randn(3, 9, 4, device=device), torch.randn(9, 5, device=device)
    weights = [torch.randn(3, o, i, device=device) for o, i in ((7, 5), (2, 7))]
    statistics = [torch.zeros(7, device=device), torch.ones(7, device=device)]
    masks = torch.tensor([[True, False, True, True, False]] * 3, device=device)
    index = torch.randint(6, (3, 9, 1), device=device)
    table = torch.randn(3, 6, 2, device=device)
    for name, arguments in {
        "activation_strength": (x, weights, [], *statistics, "relu", True),
        "decorrelation_loss": (outputs.clone().requires_grad_(), "residue", "sum"),
        "mask_channels": (x.clone().requires_grad_(), masks, None),
        "ensemble_embedding_concat": (index, [table.requires_grad_()], x),
    }.items():
        torch.library.opcheck(getattr(torch.ops.pyens, name), arguments)
