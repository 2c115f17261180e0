"""Members whose weights are bytes as modules: calibration, state dicts, sequences of layers."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import HistogramObserver, MinMaxObserver

import pyens
from pyens import ops
from pyens.nn import (
    EnsembleBatchNorm2d,
    EnsembleConv2d,
    EnsembleEmbedding,
    EnsembleLinear,
    EnsembleMaxPool2d,
    EnsembleMLP,
    EnsembleSequential,
    Flatten,
    Int8EnsembleConv2d,
    Int8EnsembleMLP,
)
from pyens.ops import Int8Weight, ensemble_mlp_int8

E = 3


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def test_an_ensemble_frozen():
    model = EnsembleMLP(E, 20, [130, 9], 4, activation="gelu", output_activation="tanh", dropout=0.5)
    data = torch.randn(500, 20)
    quantized = model.quantize(data)
    model.eval()
    x = data[:33]
    want, got = model(x), quantized(x)
    assert rms(got - want) < 0.03 * rms(want) and not list(quantized.parameters()) and not quantized.training
    assert torch.equal(quantized.select([2, 0])(x), got[[2, 0]]) and torch.equal(quantized[1:](x), got[1:])
    assert rms(quantized.dense()(x) - want) < 0.01 * rms(want)
    torch.testing.assert_close(quantized.member(1)(x), quantized.dense()(x)[1])
    assert torch.equal(copy.deepcopy(quantized)(x), got)
    assert "[3, 130, 20], 7800 weights" in repr(quantized)
    with pytest.raises(ValueError, match="quantize: ensemble: expected no norm"):
        EnsembleMLP(E, 4, [5], 1, norm="layer_norm").quantize(data)
    with pytest.raises(TypeError, match="quantize: ensemble: expected weights of float32"):
        EnsembleMLP(E, 20, [5], 1, dtype=torch.float64).quantize(data)
    with pytest.raises(ValueError, match="select: indices: expected at least one member"):
        quantized.select([])


def test_ranges_are_those_of_the_observer():
    model = EnsembleMLP(E, 6, [8], 2)
    batches = [torch.randn(50, 6) + 1, torch.randn(70, 6) * 2, torch.zeros(0, 6)]
    quantized = model.quantize(iter(batches))
    hidden = [model.stacked()[0][0][m] for m in range(E)]
    bias = model.stacked()[1][0]
    for m in range(E):
        first, second = MinMaxObserver(dtype=torch.uint8), MinMaxObserver(dtype=torch.uint8)
        for batch in batches[:2]:
            first(batch)
            second((batch @ hidden[m].T + bias[m]).relu())
        for observer, layer in zip((first, second), quantized.layers, strict=True):
            scale, zero = observer.calculate_qparams()
            torch.testing.assert_close(layer.input_scale[m], scale[0])
            assert int(layer.input_zero_point[m]) == int(zero)
    # Data of each member, and another observer.
    own = torch.randn(E, 40, 6) * torch.tensor([1.0, 2, 3]).view(E, 1, 1)
    scales = model.quantize(own, observer=lambda: HistogramObserver(dtype=torch.uint8)).layers[0].input_scale
    assert scales[0] < scales[1] < scales[2]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.zeros(0, 6), ValueError, "data: expected at least one example, got none"),
        ([], ValueError, "data: expected at least one example"),
        (torch.full((3, 6), float("nan")), ValueError, "data: expected finite numbers, got NaN or Inf"),
        (
            [torch.zeros(2, 6), torch.full((3, 6), float("inf"))],
            ValueError,
            r"data\[1\]: expected finite numbers",
        ),
        (torch.zeros(3, 6).double(), TypeError, "data: expected float32"),
        (torch.zeros(3, 5), ValueError, "ensemble_mlp: input: expected"),
        (torch.zeros(2, 3, 6), ValueError, "data: expected 2 dimensions, or 3 with 3 members first"),
        ([[1.0]], TypeError, r"data\[0\]"),
        (torch.full((3, 6), 3e38), ValueError, "stay finite in all layers|products with the inputs"),
    ],
)
def test_refuses_data_that_says_nothing(data, error, message):
    model = EnsembleMLP(E, 6, [8], 2)
    with pytest.raises(error, match=message):
        model.quantize(data)
    with torch.no_grad():
        model.biases[0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        model.quantize(torch.zeros(3, 6))


def test_an_observer_of_another_range_is_refused():
    model = EnsembleLinear(E, 6, 2)
    signed = lambda: MinMaxObserver(dtype=torch.qint8)  # noqa: E731
    with pytest.raises(ValueError, match="observer: expected one of bytes from 0 to 255"):
        model.quantize(torch.randn(9, 6) - 5, observer=signed)


def test_constant_data():
    model = EnsembleLinear(E, 6, 2)
    quantized = model.quantize(torch.zeros(9, 6))
    assert torch.equal(quantized(torch.zeros(9, 6)), model.bias.detach().unsqueeze(1).expand(-1, 9, -1))


@pytest.mark.parametrize("sparse", [False, True])
def test_state_dicts(sparse):
    def make(kept: float) -> Int8EnsembleMLP:
        model = EnsembleMLP(E, 200, [300], 4)
        with torch.no_grad():
            for weight in model.weights:
                weight *= torch.rand_like(weight) < kept
        return model.quantize(torch.randn(90, 200), sparse=sparse)

    first, second = make(0.1), make(0.3)
    x = torch.randn(5, 200)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(second(x), first(x)) and torch.equal(second.select([1])(x), first(x)[1:2])
    bytes_stored = sum(t.nbytes for t in first.state_dict().values())
    weights = E * (200 * 300 + 300 * 4)
    assert bytes_stored < (0.35 if sparse else 1.1) * weights + 30 * E * 300
    with pytest.raises(RuntimeError, match=r"layers\.0"):
        EnsembleMLP(E, 200, [301], 4).quantize(torch.randn(9, 200), sparse=sparse).load_state_dict(
            first.state_dict()
        )


def network_of_images(norm: bool) -> EnsembleSequential:
    return EnsembleSequential(
        EnsembleConv2d(E, 1, 6, 3),
        *([EnsembleBatchNorm2d(E, 6)] if norm else []),
        nn.ReLU(),
        EnsembleMaxPool2d(2),
        EnsembleConv2d(E, 6, 5, 3, padding=1),
        nn.ReLU(),
        EnsembleMaxPool2d(2),
        Flatten(),
        EnsembleLinear(E, 45, 4),
    )


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_a_convolutional_network_frozen(norm, sparse):
    model = network_of_images(norm)
    data = torch.randn(60, 1, 14, 14)
    with torch.no_grad():
        model(data)
        model.eval()
        want = model(data)
    quantized = model.quantize([data[:20], data[20:]], sparse=sparse)
    got = quantized(data)
    assert rms(got - want) < 0.04 * rms(want)
    assert sum(isinstance(m, Int8EnsembleConv2d) for m in quantized.modules()) == 2
    assert isinstance(list(quantized.children())[-1], Int8EnsembleMLP)
    # What follows a convolution is part of its call, and the same one by one.
    h = data
    for layer in quantized.children():
        h = layer(h)
    assert torch.equal(h, got)
    assert torch.equal(quantized.select([2, 0])(data), got[[2, 0]])
    torch.testing.assert_close(quantized.member(1)(data), want[1], rtol=0.1, atol=0.1)
    other = network_of_images(norm).eval().quantize(data, sparse=sparse)
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(data), got)


def test_what_has_no_form_in_bytes_is_refused_by_name():
    model = EnsembleSequential(EnsembleEmbedding(E, 10, 4), EnsembleLinear(E, 4, 2))
    with pytest.raises(ValueError, match=r"layer 0: expected EnsembleConv2d, .* got EnsembleEmb"):
        model.quantize(torch.randn(5, 3))
    with pytest.raises(ValueError, match="expected no residual"):
        EnsembleMLP(E, 4, [4, 4], 1, residual=True).quantize(torch.randn(5, 4))


def test_under_autocast():
    model, x = EnsembleMLP(E, 20, [30], 4), torch.randn(40, 20)
    images = network_of_images(False).eval()
    pixels = torch.randn(30, 1, 14, 14)
    want, many = model.quantize(x), images.quantize(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        got, gots = model.quantize(x), images.quantize(pixels)
        low = nn.Linear(20, 20)(x)
        assert torch.equal(got(low), want(low.float())) and torch.equal(
            gots(pixels.bfloat16()), many(pixels.bfloat16().float())
        )
        sparse = model.sparse()
        assert torch.equal(sparse(low), sparse(low.float()))
        assert torch.equal(images.sparse()(pixels.bfloat16()), images.sparse()(pixels.bfloat16().float()))
    for a, b in ((got, want), (gots, many)):
        assert all(torch.equal(a.state_dict()[name], t) for name, t in b.state_dict().items())


@pytest.mark.parametrize("sparse", [False, True])
def test_numbers_stay_float32(sparse):
    model = EnsembleMLP(E, 20, [30], 4).quantize(torch.randn(40, 20), sparse=sparse)
    x = torch.randn(5, 20)
    want = model(x)
    for cast in (nn.Module.double, nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16)):
        assert torch.equal(cast(copy.deepcopy(model))(x), want)
    sequence = EnsembleSequential(EnsembleLinear(E, 20, 4)).quantize(x).double()
    assert sequence(x).dtype == torch.float32
    assert copy.deepcopy(model).to("meta")._buffers == {}


def test_bytes_that_are_left_out_may_change():
    model = EnsembleLinear(E, 20, 4).quantize(torch.randn(40, 20), sparse=True)
    x = torch.randn(5, 20)
    layer = model.layers[0]
    before, name = model(x), "layers.0.values.values"
    zeros = torch.zeros_like(layer.values.values)
    want = ensemble_mlp_int8(
        x,
        [layer.weight()._replace(values=torch.zeros(E, 4, 20, dtype=torch.int8))],
        list(model.biases.buffers()),
    )
    replaced = torch.func.functional_call(model, dict(model.named_buffers()) | {name: zeros}, (x,))
    assert torch.equal(replaced, want) and torch.equal(model(x), before)
    with torch.no_grad():
        layer.values.values.zero_()
    assert torch.equal(model(x), want)
    with torch.inference_mode():
        assert torch.equal(model(x), want)


def test_compiled_with_bytes_left_out():
    first, second = (EnsembleLinear(E, 20, 4).quantize(torch.randn(40, 20), sparse=True) for _ in range(2))
    x = torch.randn(5, 20)
    compiled = torch.compile(first, fullgraph=True)
    assert torch.equal(compiled(x), first(x))
    first.load_state_dict(second.state_dict())
    want = second(x)
    assert torch.equal(first(x), want) and torch.equal(compiled(x), want)


@pytest.mark.parametrize("sparse", [False, True])
def test_members_left_in_place(sparse):
    x, pixels = torch.randn(9, 20), torch.randn(9, 1, 14, 14)
    for model, given in (
        (EnsembleMLP(E, 20, [8], 4).quantize(x, sparse=sparse), x),
        (network_of_images(False).eval().quantize(pixels, sparse=sparse), pixels),
    ):
        want = model(given)[[2, 0]]
        assert torch.equal(model.select_([2, 0])(given), want) and model.ensemble_size == 2
        assert torch.equal(copy.deepcopy(model)(given), want)
        other = model.select([0, 1])
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(given), want)


@pytest.mark.parametrize("wrong", ["order", "columns", "starts"])
def test_rows_that_are_none_are_refused(wrong):
    model = EnsembleLinear(E, 20, 4).quantize(torch.randn(40, 20), sparse=True)
    state = copy.deepcopy(model.state_dict())
    changed = state[f"layers.0.values.{wrong}"]
    changed.fill_({"order": 0, "columns": 255, "starts": 7}[wrong])
    if wrong == "starts":
        changed[0, 0, 0] = 99999
    model.load_state_dict(state)
    with pytest.raises(ValueError, match=f"SparseRows: {wrong}: expected"):
        model(torch.randn(5, 20))


def test_sparse_layers_of_other_shapes_are_refused():
    pairs = [
        (
            EnsembleLinear(E, 100, 4).quantize(torch.randn(5, 100), sparse=True),
            EnsembleLinear(E, 20, 4).quantize(torch.randn(5, 20), sparse=True),
        ),
        (EnsembleLinear(E, 100, 4).sparse(), EnsembleLinear(E, 20, 4).sparse()),
        (EnsembleConv2d(E, 4, 5, 3).sparse(), EnsembleConv2d(E, 1, 5, 6).sparse()),
    ]
    for one, other in pairs:
        for a, b in ((one, other), (other, one)):
            with pytest.raises(RuntimeError, match=r"size mismatch for .*: weights of shape"):
                a.load_state_dict(b.state_dict())


def test_one_row_and_no_hidden_layer():
    model = EnsembleMLP(E, 20, [], 3, activation=[])
    x = torch.randn(9, 20)
    for frozen in (model.quantize(x), model.sparse()):
        assert torch.equal(frozen(x[0]), frozen(x)[:, 0])


def test_calibration_data_stays_as_it_is():
    model = EnsembleSequential(
        nn.ReLU(inplace=True), EnsembleLinear(E, 6, 4), nn.ReLU(inplace=True), EnsembleLinear(E, 4, 2)
    )
    data = torch.randn(9, 6)
    before = data.clone()
    model.quantize(data)
    assert torch.equal(data, before)
    linear = EnsembleLinear(E, 6, 4)
    with pytest.raises(TypeError, match="observer: expected a function that makes one"):
        linear.quantize(data, observer=MinMaxObserver())
    wide = torch.tensor([[3e38, -3e38] * 3])
    with pytest.raises(ValueError, match="data: expected a range that float32 holds"):
        linear.quantize(wide)


def test_no_member_learns():
    quantized = EnsembleMLP(E, 6, [8], 2).quantize(torch.randn(9, 6))
    x = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="ensemble_mlp_int8"):
        quantized(x).sum().backward()
    assert pyens.ops.pack_sparse(quantized.layers[0].values).values.dtype == torch.int8
    assert ops.Int8Weight is Int8Weight
