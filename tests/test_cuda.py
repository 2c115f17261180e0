"""Every operation on CUDA: as on the CPU, the same bits in every run, on any stream, out of a CUDA graph."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from loss_problems import NO_OPTIONS

from pyens import ops
from tests.cuda_operations import DTYPES, operations

NAMES = list(operations(torch.float32, "cpu"))
# Of a result's largest number; sums run in other orders, and half precision rounds in other places.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def same_bits(a, b) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_every_operation_is_here():
    public = {name for name in ops.__all__ if name.islower()}  # the rest are types
    formats = ("sparse", "int8")
    on_the_cpu_alone = {f"{op}_{f}" for op in ("ensemble_mlp", "ensemble_conv2d", "pack") for f in formats}
    assert {name.partition(",")[0] for name in NAMES} == public - on_the_cpu_alone
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


def mlp(members: int, batch: int, *widths: int) -> tuple[torch.Tensor, list, list]:
    """Input, weights and biases of an ensemble on the GPU."""
    pairs = list(itertools.pairwise(widths))
    return (
        torch.randn(batch, widths[0], device="cuda"),
        [torch.randn(members, o, i, device="cuda") * i**-0.5 for i, o in pairs],
        [torch.randn(members, o, device="cuda") for _, o in pairs],
    )


@pytest.mark.cuda
def test_threads_that_launch_a_kernel_with_more_and_less_shared_memory():
    # How much a launch may have is a setting of the kernel, which all threads share. On an H100 these two
    # take 218 and 97 KB, with 4 examples a lane: one kernel.
    problems = [mlp(2, 256, 32, 50, 20, 1), mlp(2, 256, 8, 16, 8, 1)]
    expected = [ops.ensemble_mlp(*problem) for problem in problems]

    def run(thread: int) -> bool:
        i = thread % 2
        with torch.cuda.stream(torch.cuda.Stream()):
            return all(torch.equal(ops.ensemble_mlp(*problems[i]), expected[i]) for _ in range(300))

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tf32_by_the_newer_setting(dtype):
    x, weights, biases = mlp(3, 100, 32, 50, 20, 1)
    problem = x.to(dtype), [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
    matmul = torch.backends.cuda.matmul
    plain, before = ops.ensemble_mlp(*problem), matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        allowed = ops.ensemble_mlp(*problem)
        matmul.fp32_precision = "ieee"
        forbidden = ops.ensemble_mlp(*problem)
    finally:
        matmul.fp32_precision = before
    assert torch.equal(forbidden, plain)
    # TF32 is for float32 alone.
    assert torch.equal(allowed, plain) == (dtype != torch.float32)
    assert (allowed - plain).abs().max() <= 1e-2 * plain.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_compiled(name, device):
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # the CPU's tests compile on the CPU

    def compiled(call):
        return torch.compile(call, fullgraph=True, dynamic=False, backend=backend)

    got = operations(torch.float32, device, wrap=compiled)[name]()
    for ours, eager in zip(got, operations(torch.float32, device)[name](), strict=True):
        torch.testing.assert_close(ours, eager)


def opcheck_arguments(device):
    """Arguments by operation; those of a name with a comma are one more call of it."""

    def draw(*shape, grad=False):
        return torch.randn(shape, device=device, requires_grad=grad)

    x, seeds = draw(9, 5), torch.arange(3, device=device)
    leaf, weights, biases = draw(9, 5, grad=True), [draw(3, 7, 5), draw(3, 2, 7)], [draw(3, 7), draw(3, 2)]
    wide = [draw(3, 400, 5), draw(3, 300, 400), draw(3, 2, 300)]
    mean, std = torch.zeros(7, device=device), torch.ones(7, device=device)
    labels, index = torch.randint(2, (9,), device=device), torch.randint(6, (3, 9, 1), device=device)
    network = (labels, weights, biases, [], [])
    options = ("cross_entropy", 1.0, 0.1, None, *NO_OPTIONS, "relu", 0.25, seeds)
    masks = torch.tensor([[True, False, True, True, False]] * 3, device=device)
    rows = torch.tensor([[0, 2, 3]] * 3, device=device)
    outputs, saved = draw(3, 9, 4), torch.ops.pyens.decorrelation_loss_forward
    return {
        "ensemble_mlp": (leaf, weights, biases, [], [], "relu", 0.25, seeds),
        "ensemble_mlp, rates": (
            leaf,
            weights,
            biases,
            [],
            [],
            "relu",
            0.0,
            seeds,
            seeds / 5.0 * torch.ones(3, dtype=torch.float64, device=device),
        ),
        "ensemble_mlp, wide": (leaf, wide, [], [], [], "gelu"),
        "ensemble_mlp_backward": (
            draw(3, 9, 2),
            x,
            weights,
            biases,
            [],
            [],
            None,
            [True] * 5,
            "relu",
            0.25,
            seeds,
        ),
        "ensemble_mlp_loss": (leaf, *network, *options),
        "ensemble_mlp_example_losses": (leaf, *network, *options),
        "ensemble_mlp_loss_with_gradients": (x, *network, draw(3), [True] * 5, *options),
        "activation_strength": (x, weights, [], mean, std, "relu", True),
        "activation_strength, wide": (x, wide, [], draw(700), draw(700), "relu", False),
        "ensemble_conv2d": (
            draw(4, 2, 5, 6, grad=True),
            draw(3, 4, 2, 2, 3, grad=True),
            draw(3, 4, grad=True),
            [1, 2],
            [0, 1],
            [1, 1],
            "relu",
            [2, 1],
        ),
        "keyed_permutation": (torch.arange(3, device=x.device), 1000, 10, 20),
        "mask_channels": (leaf, masks, None),
        "masked_weights": (draw(7, 9, grad=True), rows, rows + 1, 3),
        "masked_weights_backward": (draw(3, 3, 3), rows, rows + 1, 7, 9),
        "ensemble_embedding": (index[..., 0], draw(3, 6, 2, grad=True), False),
        "ensemble_embedding_backward": (draw(3, 9, 2), index[..., 0], 6),
        "ensemble_embedding_concat": (index, [draw(3, 6, 2, grad=True)], x),
        "ensemble_embedding_concat_backward": (draw(3, 9, 7), index, [6], [2], [0, 1], True),
        "decorrelation_loss": (draw(3, 9, 4, grad=True), "residue", "sum"),
        "decorrelation_loss_forward": (outputs, "residue", "sum"),
        "decorrelation_loss_backward": (
            draw(),
            outputs,
            *saved(outputs, "residue", "sum")[1:],
            "residue",
            "sum",
        ),
        "predictive_uncertainty": (outputs, False, True),
        "predictive_moments": (outputs, torch.rand(3, 9, 4, device=device)),
    }


OPCHECKED = list(opcheck_arguments("cpu"))


def test_every_operation_with_a_kernel_is_opchecked():
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    ours = {name.removeprefix("pyens::") for name in registered if name.startswith("pyens::")}
    # Its gradient is a sparse tensor, which opcheck knows nothing of.
    assert {name.partition(",")[0] for name in OPCHECKED} == ours - {"ensemble_embedding_sparse_backward"}


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name, device):
    op = getattr(torch.ops.pyens, name.partition(",")[0])
    torch.library.opcheck(op, opcheck_arguments(device)[name])
