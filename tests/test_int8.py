"""Members whose weights are bytes: the format, and the operations on it."""

import itertools
import os
import subprocess
import sys

import hypothesis
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers torch's own quantization
from hypothesis import strategies as st
from torch import Tensor

from pyens import reference
from pyens.nn import (
    EnsembleMLP,
)
from pyens.ops import Int8Weight, ensemble_conv2d_int8, ensemble_mlp_int8, pack_int8

E = 3


def in_bytes(*shape: int, scale: float = 1.0, largest: float = 0) -> Int8Weight:
    weights = torch.randn(*shape) * scale
    if largest:
        weights = weights.clamp(-largest, largest)
    scales = torch.rand(shape[0]) * 0.05 + 0.01
    return pack_int8(weights, scales, torch.randint(256, (shape[0],)).to(torch.uint8))


def network(widths: list[int]) -> tuple[list[Int8Weight], list[Tensor]]:
    pairs = list(itertools.pairwise(widths))
    return [in_bytes(E, o, i) for i, o in pairs], [torch.randn(E, o) for _, o in pairs]


def torch_bytes(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor
    return quantize(x, scale.item(), int(zero_point), 0, 255, torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, NaN at the same places."""
    return (
        a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


# --- the format ------------------------------------------------------------------------------------------


@hypothesis.given(
    members=st.integers(1, 3),
    rows=st.integers(1, 9),
    inputs=st.integers(1, 200),
    scale=st.sampled_from([1e-44, 1e-38, 1e-6, 1, 1e6, 1e28]),
)
@pytest.mark.hypothesis
def test_weights_are_those_of_torch(members, rows, inputs, scale):
    weights = torch.randn(members, rows, inputs) * scale
    packed = pack_int8(weights, torch.full((members,), 0.1), torch.full((members,), 7, dtype=torch.uint8))
    assert packed.values.dtype == torch.int8 and int(packed.values.min()) >= -127
    assert torch.equal(packed.offset, -7 * packed.values.sum(-1, dtype=torch.int32))
    steps = packed.scale.unsqueeze(-1)
    assert ((packed.dense() - weights).abs() <= 0.5001 * steps).all()
    flat, scales = weights.flatten(0, 1), packed.scale.flatten()
    if scale >= 1e-6:  # torch divides by multiplying
        theirs = torch.ops.quantized_decomposed.quantize_per_channel(
            flat, scales, torch.zeros(len(flat), dtype=torch.int), 0, -127, 127, torch.int8
        )
        assert ((packed.values.flatten(0, 1).int() - theirs.int()).abs() <= 1).all()
        assert (packed.values.flatten(0, 1) == theirs).float().mean() > 0.99 or weights.numel() < 200


def test_a_row_of_zeros_is_its_bias():
    weights = torch.randn(E, 4, 6)
    weights[1, 2], weights[2] = 0, 0
    packed = pack_int8(weights, torch.ones(E), torch.full((E,), 9, dtype=torch.uint8))
    bias = torch.randn(E, 4)
    output = ensemble_mlp_int8(torch.randn(5, 6), [packed], [bias])
    assert torch.equal(output[1, :, 2], bias[1, 2].expand(5)) and torch.equal(output[2], bias[2].expand(5, 4))


WEIGHTS = torch.ones(E, 2, 4)
ZERO_POINTS = torch.zeros(E, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("weights", "scale", "zero_point", "error", "message"),
    [
        (
            WEIGHTS.double(),
            torch.ones(E),
            ZERO_POINTS,
            TypeError,
            "weights: expected float32, got torch.float64",
        ),
        (
            WEIGHTS,
            torch.ones(E),
            ZERO_POINTS.int(),
            TypeError,
            "input_zero_point: expected uint8, got torch.int32",
        ),
        (WEIGHTS[0], torch.ones(E), ZERO_POINTS, ValueError, r"weights: expected \[E, out, in\] or"),
        (WEIGHTS[:, :0], torch.ones(E), ZERO_POINTS, ValueError, "none of them 0"),
        (WEIGHTS, torch.ones(2), ZERO_POINTS, ValueError, r"input_scale: expected shape \[3\], got \[2\]"),
        (
            WEIGHTS,
            torch.tensor([1.0, 0, 1]),
            ZERO_POINTS,
            ValueError,
            "input_scale: expected finite numbers of",
        ),
        (
            WEIGHTS,
            torch.tensor([1.0, -1, 1]),
            ZERO_POINTS,
            ValueError,
            "input_scale: expected finite numbers of",
        ),
        (
            WEIGHTS,
            torch.full((E,), 1e-42),
            ZERO_POINTS,
            ValueError,
            "input_scale: expected finite numbers of",
        ),
        (WEIGHTS, torch.full((E,), float("nan")), ZERO_POINTS, ValueError, "input_scale: expected finite"),
        (WEIGHTS * float("nan"), torch.ones(E), ZERO_POINTS, ValueError, "weights: expected finite numbers"),
        (
            WEIGHTS * 1e30,
            torch.full((E,), 1e8),
            ZERO_POINTS,
            ValueError,
            "products with the inputs that float32",
        ),
    ],
)
def test_refuses_what_it_cannot_pack(weights, scale, zero_point, error, message):
    with pytest.raises(error, match=f"pack_int8: .*{message}"):
        pack_int8(weights, scale, zero_point)


def test_sums_that_could_leave_int32_are_refused_when_packing():
    most = (2**31 - 1) // (255 * 127)
    zero = torch.zeros(1, dtype=torch.uint8)
    x = torch.full((1, most), 255.0)
    packed = pack_int8(torch.ones(1, 1, most), torch.ones(1), zero)
    assert ensemble_mlp_int8(x, [packed]).item() == pytest.approx(255 * most)
    message = f"row 1 of member 0: {most + 1} inputs may add up to {255 * 127 * (most + 1)}"
    weights = torch.ones(1, 2, most + 1)
    weights[0, 0, 3:] = 0
    with pytest.raises(ValueError, match=message):
        pack_int8(weights, torch.ones(1), zero)
    with pytest.raises(ValueError, match="sums stay below 2"):  # the offset counts too
        pack_int8(torch.ones(1, 1, most), torch.ones(1), zero + 255)


# --- the MLP ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "identity", "leaky_relu", "leaky_relu(0.3)"])
@pytest.mark.parametrize("batch", [0, 1, 3, 8, 16, 17, 64, 65, 300])
def test_bits_are_those_of_the_reference(batch, activation):
    for widths, own in itertools.product(
        [[1, 1], [13, 7, 2], [128, 50, 21, 3], [785, 193, 4]], [False, True]
    ):
        weights, biases = network(widths)
        x = torch.randn(*([E] * own), batch, widths[0]) * 2
        for given in (biases, None, [biases[0][:, :0], *biases[1:]]):
            got = ensemble_mlp_int8(x, weights, given, activation=activation)
            assert same(got, reference.ensemble_mlp_int8(x, weights, given, activation=activation))


@pytest.mark.parametrize("activation", ["gelu", "tanh", "silu", "elu(0.5)", "sin"])
def test_activations(activation):
    # Between layers a rounding may make another byte: one layer, and an activation behind it.
    weights, biases = network([30, 9])
    x = torch.randn(70, 30)
    got = ensemble_mlp_int8(x, weights, biases, output_activation=activation)
    torch.testing.assert_close(
        got, reference.ensemble_mlp_int8(x, weights, biases, output_activation=activation)
    )
    weights, biases = network([30, 40, 9])
    got = ensemble_mlp_int8(x, weights, biases, activation=activation)
    expected = reference.ensemble_mlp_int8(x, weights, biases, activation=activation)
    step = (weights[1].scale * weights[1].input_scale.unsqueeze(-1) * 127).unsqueeze(1)
    off = (got - expected).abs()
    assert (off <= 3 * step).all() and (off <= 1e-5 * expected.abs().max()).float().mean() > 0.9


def test_the_ends_of_the_range():
    weights, biases = network([20, 30, 4])
    inf, nan, largest = float("inf"), float("nan"), torch.finfo(torch.float32).max
    x = torch.randn(40, 20)
    clean = ensemble_mlp_int8(x, weights, biases)
    for i, value in enumerate([inf, -inf, largest, -largest, 1e-45, nan]):
        x[i, i] = value
    got = ensemble_mlp_int8(x, weights, biases)
    assert same(got, reference.ensemble_mlp_int8(x, weights, biases))
    assert got[:, 5].isnan().all() and got[:, :5].isfinite().all() and torch.equal(got[:, 6:], clean[:, 6:])
    # The largest and the smallest byte.
    assert torch.equal(got[:, 0], ensemble_mlp_int8(x[:1].clamp(max=1e6), weights, biases)[:, 0])
    assert torch.equal(got[:, 3], ensemble_mlp_int8(x[3:4].clamp(min=-1e6), weights, biases)[:, 0])
    # A NaN on the way is a member's own.
    biases[0][1, 2] = nan
    got = ensemble_mlp_int8(x, weights, biases)
    assert (
        got[1].isnan().all()
        and torch.equal(got[0, 6:], clean[0, 6:])
        and torch.equal(got[2, 6:], clean[2, 6:])
    )
    assert same(got, reference.ensemble_mlp_int8(x, weights, biases))


def test_bits_depend_on_nothing_beside():
    weights, biases = network([30, 50, 9])
    x = torch.randn(E, 300, 30)
    want = ensemble_mlp_int8(x, weights, biases, activation="gelu")
    for first, last in itertools.pairwise([0, 1, 6, 70, 71, 300]):
        got = ensemble_mlp_int8(x[:, first:last], weights, biases, activation="gelu")
        assert torch.equal(got, want[:, first:last])
    for m in range(E):
        one = [Int8Weight(*(t[m : m + 1] for t in w)) for w in weights]
        got = ensemble_mlp_int8(x[m], one, [b[m : m + 1] for b in biases], activation="gelu")
        assert torch.equal(got[0], want[m])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(ensemble_mlp_int8(x, weights, biases, activation="gelu"), want)
    finally:
        torch.set_num_threads(threads)


def test_members_may_take_a_shared_input_each_their_own_way():
    weights, biases = network([12, 5])
    same_way = weights[0]._replace(
        input_scale=weights[0].input_scale[[0, 0, 2]],
        input_zero_point=weights[0].input_zero_point[[0, 0, 2]],
        offset=weights[0].offset,  # of other zero points: whole numbers like others
    )
    x = torch.randn(200, 12)
    for each in (weights[0], same_way):
        own = ensemble_mlp_int8(x.expand(E, -1, -1).contiguous(), [each], biases)
        assert torch.equal(ensemble_mlp_int8(x, [each], biases), own)


def test_strided_and_shifted():
    weights, biases = network([12, 8, 4])
    x = torch.randn(70, 24)[:, ::2]
    want = ensemble_mlp_int8(x.contiguous(), weights, biases)
    assert torch.equal(ensemble_mlp_int8(x, weights, biases), want)
    assert torch.equal(ensemble_mlp_int8(torch.randn(3, 70, 24)[:, :, ::2] * 0 + x, weights, biases), want)
    # Rows that do not begin on four bytes, and weights that are not contiguous.
    memory = torch.empty(E * 8 * 12 + 1, dtype=torch.int8)
    shifted = memory[1:].view(E, 8, 12).copy_(weights[0].values)
    assert torch.equal(ensemble_mlp_int8(x, [weights[0]._replace(values=shifted), weights[1]], biases), want)
    turned = weights[0].values.mT.contiguous().mT
    assert torch.equal(ensemble_mlp_int8(x, [weights[0]._replace(values=turned), weights[1]], biases), want)


GOOD = Int8Weight(
    torch.ones(E, 5, 4, dtype=torch.int8),
    torch.ones(E, 5),
    torch.zeros(E, 5, dtype=torch.int32),
    torch.ones(E),
    torch.zeros(E, dtype=torch.uint8),
)
LAST = GOOD._replace(
    values=torch.ones(E, 2, 5, dtype=torch.int8),
    scale=torch.ones(E, 2),
    offset=torch.zeros(E, 2, dtype=torch.int32),
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": []}, ValueError, "values: expected one of each for every layer, at least one"),
        ({"weights": torch.ones(E, 5, 4)}, TypeError, "weights: expected Int8Weight"),
        ({"weights": [torch.ones(E, 5, 4)]}, TypeError, "weights: expected Int8Weight"),
        ({"weights": [GOOD._replace(values=torch.ones(E, 5, 4))]}, TypeError, r"values\[0\]: expected int8"),
        (
            {"weights": [GOOD._replace(values=GOOD.values[0])]},
            ValueError,
            r"values\[0\]: expected \[E, out, in\]",
        ),
        ({"weights": [GOOD._replace(values=GOOD.values[:, :0])]}, ValueError, "none of them 0"),
        ({"weights": [GOOD._replace(scale=GOOD.scale[:, :4])]}, ValueError, r"scale\[0\]: expected \[3, 5\]"),
        ({"weights": [GOOD._replace(scale=GOOD.scale.double())]}, TypeError, r"scale\[0\]: expected Float"),
        ({"weights": [GOOD._replace(offset=GOOD.offset.long())]}, TypeError, r"offset\[0\]: expected Int"),
        (
            {"weights": [GOOD._replace(input_scale=torch.ones(2))]},
            ValueError,
            r"input_scale\[0\]: expected \[3\]",
        ),
        ({"weights": [GOOD, GOOD]}, ValueError, r"values\[1\]: expected as many inputs as the layer before"),
        ({"biases": [torch.zeros(E, 5)]}, ValueError, "biases: expected 2, or none, got 1"),
        (
            {"biases": [torch.zeros(E, 4), torch.zeros(E, 2)]},
            ValueError,
            r"biases\[0\]: expected \[3, 5\] or",
        ),
        ({"biases": [torch.zeros(E, 5).double()] * 2}, TypeError, r"biases\[0\]: expected float32"),
        (
            {"input": torch.zeros(7, 3)},
            ValueError,
            r"input: expected \[B, 4\] or \[3, B, 4\], got shape \[7, 3\]",
        ),
        ({"input": torch.zeros(2, 7, 4)}, ValueError, r"input: expected \[B, 4\] or \[3, B, 4\]"),
        ({"input": torch.zeros(7, 4).double()}, TypeError, "input: expected float32"),
        ({"activation": "nonsense"}, ValueError, "activation: expected one of relu"),
        ({"activation": []}, ValueError, "activation: expected one of relu"),
    ],
)
def test_refuses_networks_that_do_not_fit(change, error, message):
    given = {"input": torch.zeros(7, 4), "weights": [GOOD, LAST]} | change
    with pytest.raises(error, match=message):
        ensemble_mlp_int8(**given)


# --- the convolution -------------------------------------------------------------------------------------

CONVOLUTIONS = [
    ((1, 28, 3, 3), (28, 28), {"max_pool": 2}),
    ((28, 32, 5, 5), (13, 13), {"max_pool": 2, "activation": "relu"}),
    ((3, 7, 3, 2), (9, 11), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "activation": "relu"}),
    ((2, 5, 5, 5), (12, 12), {"padding": 2, "max_pool": 3}),
    ((5, 9, 1, 7), (6, 20), {"stride": 3, "padding": (0, 3), "max_pool": (1, 2)}),
    ((1, 4, 4, 4), (8, 9), {"dilation": 2}),
    ((2, 3, 1, 6), (3, 30), {"stride": (1, 3), "dilation": (1, 3), "padding": (0, 7)}),
    ((1, 1, 1, 1), (1, 1), {}),
]


@pytest.mark.parametrize(("weight", "image", "options"), CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3, 16, 37])
def test_bits_are_those_of_the_references_convolution(batch, weight, image, options):
    channels, out, *kernel = weight
    packed, bias = in_bytes(E, out, channels, *kernel), torch.randn(E, out)
    for own, given in itertools.product([False, True], [bias, None]):
        x = torch.randn(*([E] * own), batch, channels, *image)
        if batch > 2:
            x[..., 1, 0, 0, 0], x[..., 2, -1, -1, -1] = float("nan"), float("-inf")
        got = ensemble_conv2d_int8(x, packed, given, **options)
        assert same(got, reference.ensemble_conv2d_int8(x, packed, given, **options))


def test_convolutions_depend_on_nothing_beside():
    packed, bias = in_bytes(E, 7, 6, 3, 3), torch.randn(E, 7)
    x = torch.randn(40, 6, 9, 9)
    want = ensemble_conv2d_int8(x, packed, bias, padding=1)
    for first, last in itertools.pairwise([0, 1, 4, 20, 40]):
        assert torch.equal(ensemble_conv2d_int8(x[first:last], packed, bias, padding=1), want[:, first:last])
    for m in range(E):
        one = Int8Weight(*(t[m : m + 1] for t in packed))
        assert torch.equal(ensemble_conv2d_int8(x, one, bias[m : m + 1], padding=1)[0], want[m])
    apart = torch.randn(40, 6, 9, 18)[..., ::2]
    assert torch.equal(ensemble_conv2d_int8(apart, packed), ensemble_conv2d_int8(apart.contiguous(), packed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 3, 1, 9)}, "an image that a kernel of 2"),
        ({"input": torch.zeros(2, 4, 5, 5)}, r"input: expected \[B, 3, H, W\]"),
        ({"bias": torch.zeros(E, 3)}, r"bias: expected \[3, 4\]"),
        ({"stride": 0}, "stride: expected from 1"),
        ({"activation": "gelu"}, "activation: expected relu or identity"),
        ({"max_pool": 9}, "max_pool: expected a window that"),
    ],
)
def test_refuses_convolutions_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        ensemble_conv2d_int8(**{"input": torch.zeros(2, 3, 5, 5), "weight": in_bytes(E, 4, 3, 2, 2)} | change)


# --- torch's own -----------------------------------------------------------------------------------------


def test_inputs_become_the_bytes_of_torch():
    x = torch.cat([torch.randn(9000), torch.arange(-300, 300) / 2, torch.tensor([1e30, -1e30, 0.0, -0.0])])
    one = torch.ones(1, 1, 1)
    for scale, zero in [(0.5, 0), (0.013, 128), (1.0, 255), (7.3e-6, 31)]:
        scales, zeros = torch.tensor([scale]), torch.tensor([zero], dtype=torch.uint8)
        packed = pack_int8(one, scales, zeros)
        bytes_less_zero = ensemble_mlp_int8(x.unsqueeze(1), [packed]).flatten() / (
            packed.scale * 127 * scales
        )
        theirs = torch_bytes(x, scales, zeros).int() - zero
        assert torch.equal(bytes_less_zero.round().int().flatten(), theirs)


def small_bytes(*shape: int) -> Int8Weight:
    """Without VNNI oneDNN's products saturate beyond 6 bits: weights below that give torch no excuse."""
    packed = in_bytes(*shape)
    values = (packed.values.int() // 3).to(torch.int8)
    sums = values.flatten(2).sum(-1, dtype=torch.int32)
    return packed._replace(values=values, offset=-packed.input_zero_point.int().unsqueeze(-1) * sums)


def test_linear_layers_are_those_of_torch():
    weights, biases = [small_bytes(E, 50, 30), small_bytes(E, 7, 50)], [torch.randn(E, 50), torch.randn(E, 7)]
    x = torch.randn(40, 30)
    got = ensemble_mlp_int8(x, weights, biases)
    for m in range(E):
        hidden = torch_bytes(x, weights[0].input_scale[m], weights[0].input_zero_point[m])
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            packed = torch.ops.onednn.qlinear_prepack(weight.values[m], list(hidden.shape))
            hidden = torch.ops.onednn.qlinear_pointwise(
                hidden,
                weight.input_scale[m].item(),
                int(weight.input_zero_point[m]),
                packed,
                weight.scale[m],
                torch.zeros(weight.values.shape[1], dtype=torch.int),
                bias[m],
                1.0,
                0,
                torch.float32,
                "none" if layer else "relu",
                [],
                "",
            )
            if not layer:
                hidden = torch_bytes(hidden, weights[1].input_scale[m], weights[1].input_zero_point[m])
        # The same integers: what differs is how the last number is rounded, at most.
        torch.testing.assert_close(got[m], hidden, rtol=1e-6, atol=1e-6)


def test_convolutions_are_those_of_torch():
    weight, bias = small_bytes(E, 8, 3, 3, 3), torch.randn(E, 8)
    x = torch.randn(20, 3, 10, 9)
    got = ensemble_conv2d_int8(x, weight, bias, padding=1, activation="relu")
    where = [[1, 1], [1, 1], [1, 1], 1]
    for m in range(E):
        scale, zero = weight.input_scale[m], weight.input_zero_point[m]
        packed = torch.ops.onednn.qconv_prepack(
            weight.values[m], weight.scale[m], scale.item(), int(zero), *where, list(x.shape)
        )
        theirs = torch.ops.onednn.qconv2d_pointwise(
            torch_bytes(x, scale, zero),
            scale.item(),
            int(zero),
            packed,
            weight.scale[m],
            torch.zeros(8, dtype=torch.int),
            bias[m],
            *where,
            1.0,
            0,
            torch.float32,
            "relu",
            [],
            None,
        )
        torch.testing.assert_close(got[m], theirs.contiguous(), rtol=1e-6, atol=1e-6)


# --- the dispatcher, instruction sets --------------------------------------------------------------------


def test_opcheck():
    weights, biases = network([13, 5, 2])
    columns = [[w[i] for w in weights] for i in range(5)]
    torch.library.opcheck(
        torch.ops.pyens.ensemble_mlp_int8, (torch.randn(7, 13), *columns, biases, "relu", "identity")
    )
    torch.library.opcheck(
        torch.ops.pyens.ensemble_conv2d_int8,
        (
            torch.randn(7, 3, 6, 5),
            *in_bytes(E, 4, 3, 2, 2),
            torch.randn(E, 4),
            [1, 1],
            [0, 1],
            [1, 1],
            "relu",
            [2, 1],
        ),
    )


def test_compiled_and_exported():
    model = EnsembleMLP(E, 20, [30], 4).quantize(torch.randn(50, 20))
    x = torch.randn(9, 20)
    compiled = torch.compile(lambda x: model(x).sum(0), fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x).sum(0))
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))


CODE = """
import hashlib, torch
from pyens import ops
torch.manual_seed(0)
x = torch.randn(70, 37)
zeros = torch.tensor([3, 200], dtype=torch.uint8)
scales = torch.tensor([0.02, 0.03])
layers = [ops.pack_int8(torch.randn(2, o, i), scales, zeros) for i, o in ((37, 25), (25, 9))]
images = ops.pack_int8(torch.randn(2, 5, 3, 3, 4), scales, zeros)
outputs = [
    ops.ensemble_mlp_int8(x, layers, [torch.randn(2, 25), torch.randn(2, 9)], activation="leaky_relu"),
    ops.ensemble_conv2d_int8(torch.randn(20, 3, 8, 9), images, torch.randn(2, 5), activation="relu"),
    ops.ensemble_conv2d_int8(torch.randn(1, 3, 8, 9), images, torch.randn(2, 5), max_pool=2),
]
print(hashlib.sha256(b"".join(o.numpy().tobytes() for o in outputs)).hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    found = {}
    for capability in ("base", "avx2", "avx_vnni", "avx512", "avx512_vnni"):
        environment = {
            **os.environ,
            "PYENS_CPU_CAPABILITY": capability,
            "ATEN_CPU_CAPABILITY": "default",  # torch's random numbers are those of its instruction set
        }
        run = subprocess.run(
            [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
        )
        found[capability] = run.stdout.strip()
    assert len(set(found.values())) == 1, found
