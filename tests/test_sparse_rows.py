"""Members that keep few of their weights: the format, the operations on it and the modules."""

import copy
import io
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pyens
from pyens import ops
from pyens.nn import (
    EnsembleBatchNorm2d,
    EnsembleConv2d,
    EnsembleLinear,
    EnsembleMaxPool2d,
    EnsembleMLP,
    EnsembleSequential,
    Flatten,
    SparseEnsembleConv2d,
    SparseEnsembleMLP,
)
from pyens.ops import SparseRows, ensemble_conv2d_sparse, ensemble_mlp_sparse, pack_sparse

E = 3
DTYPES = (torch.float32, torch.float64)


def pruned(*shape: int, kept: float, dtype: torch.dtype = torch.float32) -> Tensor:
    weights = torch.randn(*shape, dtype=dtype)
    return weights.where(torch.rand(shape) < kept, 0)


def network(widths: list[int], kept: float, dtype: torch.dtype = torch.float32):
    pairs = list(itertools.pairwise(widths))
    weights = [pruned(E, o, i, kept=kept, dtype=dtype) for i, o in pairs]
    return weights, [torch.randn(E, o, dtype=dtype) for _, o in pairs]


# --- the format ------------------------------------------------------------------------------------------


@given(
    members=st.integers(1, 3),
    rows=st.integers(1, 9),
    inputs=st.integers(1, 300),
    kept=st.sampled_from([0, 0.1, 0.6, 1]),
)
@pytest.mark.hypothesis
def test_packs_and_unpacks(members, rows, inputs, kept):
    weights = pruned(members, rows, inputs, kept=kept)
    packed = pack_sparse(weights)
    assert torch.equal(packed.dense(), weights) and packed.shape == weights.shape
    assert len(packed.values) == weights.count_nonzero() and (packed.values != 0).all()
    counts = packed.starts.diff()
    assert (counts >= 0).all() and (counts.diff() >= 0).all()  # in ascending order
    assert torch.equal(packed.order.sort(-1).values, torch.arange(rows).int().expand_as(packed.order))


def test_masks_say_what_is_kept():
    weights = pruned(2, 4, 6, kept=0.5)
    masks = torch.rand(2, 4, 6) < 0.5
    packed = pack_sparse(weights, masks)
    assert torch.equal(packed.dense(), weights.where(masks, 0)) and len(packed.values) == masks.sum()
    convolution = pruned(2, 4, 3, 2, 2, kept=0.5)
    assert torch.equal(pack_sparse(convolution).dense(), convolution)


@pytest.mark.parametrize(
    "given,error,message",
    [
        ((torch.zeros(2, 3),), ValueError, r"weights: expected \[E, out, in\] or"),
        ((torch.zeros(2, 0, 3),), ValueError, "weights: .*none of them 0"),
        (
            (torch.zeros(2, 3, 4).half(),),
            TypeError,
            "weights: expected float32, float64 or int8, got",
        ),
        (([1.0],), TypeError, "weights: expected a tensor"),
        ((torch.zeros(2, 3, 4), torch.ones(2, 3, 4)), TypeError, "masks: expected bool"),
        ((torch.zeros(2, 3, 4), torch.ones(2, 3) > 0), ValueError, r"masks: expected shape \[2, 3, 4\]"),
    ],
    ids=str,
)
def test_refuses_what_it_cannot_pack(given, error, message):
    with pytest.raises(error, match=f"pack_sparse: {message}"):
        pack_sparse(*given)


# --- ensemble_mlp ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("batch", [0, 1, 5, 16, 17, 64, 65, 300])
def test_bits_are_those_of_the_dense_network(batch, kept, dtype):
    for widths in ([1, 1], [7, 130, 1], [127, 20, 9], [129, 33, 257, 4]):
        weights, biases = network(widths, kept, dtype)
        rows = [pack_sparse(w) for w in weights]
        for x in (torch.randn(batch, widths[0], dtype=dtype), torch.randn(E, batch, widths[0], dtype=dtype)):
            for b in (biases, None):
                got = ensemble_mlp_sparse(x, rows, b)
                assert torch.equal(got, ops.ensemble_mlp(x, weights, b))
        exact = pyens.reference.ensemble_mlp(x.double(), [w.double() for w in weights], None)
        torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-3)


def test_the_references():
    weights, biases = network([130, 9, 2], 0.3, torch.float64)
    x, rows = torch.randn(7, 130, dtype=torch.float64), [pack_sparse(w) for w in weights]
    for activation in ("relu", "gelu"):
        want = pyens.reference.ensemble_mlp_sparse(x, rows, biases, activation=activation)
        torch.testing.assert_close(ensemble_mlp_sparse(x, rows, biases, activation=activation), want)
    x, weight = torch.randn(5, 3, 7, 6, dtype=torch.float64), pruned(E, 4, 3, 2, 3, kept=0.4).double()
    options = {"stride": (2, 1), "padding": 1, "activation": "relu", "max_pool": 2}
    want = pyens.reference.ensemble_conv2d_sparse(x, pack_sparse(weight), **options)
    torch.testing.assert_close(ensemble_conv2d_sparse(x, pack_sparse(weight), **options), want)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "elu(0.5)"])
def test_activations(activation):
    weights, biases = network([20, 30, 10, 3], 0.2)
    x = torch.randn(40, 20)
    options = {"activation": activation, "output_activation": "sigmoid"}
    rows = [pack_sparse(w) for w in weights]
    assert torch.equal(
        ensemble_mlp_sparse(x, rows, biases, **options), ops.ensemble_mlp(x, weights, biases, **options)
    )
    each = {"activation": [activation, "silu"]}
    assert torch.equal(
        ensemble_mlp_sparse(x, rows, biases, **each), ops.ensemble_mlp(x, weights, biases, **each)
    )


def test_bits_depend_on_nothing_beside():
    weights, biases = network([300, 150, 5], 0.1)
    rows = [pack_sparse(w) for w in weights]
    x = torch.randn(200, 300)
    want = ensemble_mlp_sparse(x, rows, biases)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 16):
            torch.set_num_threads(threads)
            assert torch.equal(ensemble_mlp_sparse(x, rows, biases), want)
    finally:
        torch.set_num_threads(before)
    for size in (1, 7, 33):
        parts = [ensemble_mlp_sparse(part, rows, biases) for part in x.split(size)]
        assert torch.equal(torch.cat(parts, 1), want)
    alone = [pack_sparse(w[1:2]) for w in weights]
    assert torch.equal(ensemble_mlp_sparse(x, alone, [b[1:2] for b in biases]), want[1:2])


def test_nothing_is_read_of_what_is_left_out():
    weights, biases = network([6, 5, 2], 1.0)
    weights[0][:, :, 3] = 0
    rows = [pack_sparse(w) for w in weights]
    x = torch.randn(4, 6)
    want = ensemble_mlp_sparse(x, rows, biases)
    x[:, 3] = torch.nan
    assert torch.equal(ensemble_mlp_sparse(x, rows, biases), want)
    x[2, 0] = torch.inf
    got = ensemble_mlp_sparse(x, rows, biases)
    assert torch.equal(got[:, [0, 1, 3]], want[:, [0, 1, 3]]) and not got[:, 2].isfinite().all()


def test_strided_inputs():
    weights, biases = network([6, 5, 2], 0.5)
    rows = [pack_sparse(w) for w in weights]
    x = torch.randn(9, 6)
    want = ensemble_mlp_sparse(x, rows, biases)
    assert torch.equal(ensemble_mlp_sparse(torch.stack([x, x], -1)[..., 0], rows, biases), want)
    assert torch.equal(ensemble_mlp_sparse(x.expand(E, 9, 6), rows, biases), want)
    strided = [SparseRows(*(torch.stack([t, t], -1)[..., 0] for t in r[:4]), r.row_shape) for r in rows]
    assert torch.equal(ensemble_mlp_sparse(x, strided, biases), want)


def broken(rows: SparseRows, **change) -> SparseRows:
    return rows._replace(**{name: f(getattr(rows, name).clone()) for name, f in change.items()})


def ones(*shape: int) -> SparseRows:
    return pack_sparse(torch.ones(shape))


def put(at: tuple, value: int):
    def change(t: Tensor) -> Tensor:
        t[at] = value
        return t

    return change


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"values": lambda t: t.half()}, TypeError, r"values\[0\]: expected float32 or float64"),
        ({"values": lambda t: t[:-1]}, ValueError, r"columns\[0\]: expected shape"),
        ({"columns": lambda t: t.long()}, TypeError, r"columns\[0\]: expected uint8"),
        ({"columns": put((0,), 200)}, ValueError, r"columns\[0\]: expected below 128 in block 0, got 200"),
        ({"columns": put((-1,), 3)}, ValueError, r"columns\[0\]: expected below 2 in block 1, got 3"),
        ({"starts": put((0, 0, 0), -1)}, ValueError, r"starts\[0\]: expected ascending within"),
        ({"starts": put((2, 1, -1), 10**6)}, ValueError, r"starts\[0\]: expected ascending within"),
        ({"starts": put((1, 0, 1), 10**6)}, ValueError, r"starts\[0\]: expected ascending within"),
        ({"starts": lambda t: t[:, :, 1:]}, ValueError, r"starts\[0\]: expected \[3, 2, 6\]"),
        ({"starts": lambda t: t.long()}, TypeError, r"starts\[0\]: expected int32"),
        ({"order": put((0, 1, 2), 5)}, ValueError, r"order\[0\]: expected each row from 0 to 4 once"),
        ({"order": lambda t: t * 0}, ValueError, r"order\[0\]: expected each row from 0 to 4 once, got 0"),
        ({"order": lambda t: t[:, :1]}, ValueError, r"order\[0\]: expected \[E, 2, rows\] of 130 inputs"),
    ],
    ids=str,
)
def test_refuses_rows_that_are_none(change, error, message):
    weights, biases = network([130, 5], 0.9)
    weights[0][:, :, 128:] = 1
    rows = [broken(pack_sparse(weights[0]), **change)]
    with pytest.raises(error, match=f"ensemble_mlp_sparse: {message}"):
        ensemble_mlp_sparse(torch.zeros(2, 130), rows, biases)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"input": torch.zeros(2, 7)}, ValueError, r"input: expected \[B, 6\] or \[3, B, 6\]"),
        ({"input": torch.zeros(2, 2, 6)}, ValueError, "input: expected"),
        ({"input": torch.zeros(2, 6).double()}, TypeError, "input: expected the dtype"),
        ({"biases": [torch.zeros(E, 5)]}, ValueError, "biases: expected 2, or none, got 1"),
        ({"biases": [torch.zeros(E, 5), torch.zeros(E, 3)]}, ValueError, r"biases\[1\]: expected \[3, 2\]"),
        ({"weights": []}, ValueError, "at least one"),
        ({"weights": torch.zeros(3, 2, 2)}, TypeError, "weights: expected SparseRows"),
        ({"weights": [torch.zeros(3, 2, 2)]}, TypeError, "weights: expected SparseRows"),
        (
            {"weights": [ones(3, 4, 6), ones(3, 2, 5)], "biases": None},
            ValueError,
            r"in_features\[1\]",
        ),
        (
            {"weights": [pack_sparse(torch.ones(3, 5, 6)), pack_sparse(torch.ones(2, 2, 5))]},
            ValueError,
            "3 members",
        ),
        ({"activation": "step"}, ValueError, "activation"),
        ({"input": torch.zeros(2, 6, requires_grad=True)}, NotImplementedError, "derivative"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refuses_networks_that_do_not_fit(change, error, message):
    weights, biases = network([6, 5, 2], 0.5)
    given = {
        "input": torch.zeros(2, 6),
        "weights": [pack_sparse(w) for w in weights],
        "biases": biases,
    } | change
    with pytest.raises((error, RuntimeError) if error is NotImplementedError else error, match=message):
        ensemble_mlp_sparse(**given).sum().backward()


# --- ensemble_conv2d -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("batch", [0, 1, 3, 16, 40])
def test_bits_are_those_of_the_dense_convolution(batch, kept, dtype):
    for channels, outputs, kernel, options in (
        (1, 1, (1, 1), {}),
        (3, 7, (3, 2), {"padding": 1, "stride": 2, "activation": "relu"}),
        (20, 9, (3, 3), {"max_pool": 2, "activation": "relu"}),
        (30, 5, (3, 3), {"max_pool": (3, 2), "dilation": (1, 2)}),
    ):
        weight = pruned(E, outputs, channels, *kernel, kept=kept, dtype=dtype)
        bias = torch.randn(E, outputs, dtype=dtype)
        rows = pack_sparse(weight)
        for lead in ((batch,), (E, batch)):
            x = torch.randn(*lead, channels, 9, 10, dtype=dtype)
            for b in (bias, None):
                got = ensemble_conv2d_sparse(x, rows, b, **options)
                assert torch.equal(got, ops.ensemble_conv2d(x, weight, b, **options))


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"input": torch.zeros(2, 4, 5, 5)}, ValueError, r"input: expected \[B, 3, H, W\]"),
        ({"bias": torch.zeros(E, 5)}, ValueError, "bias: expected"),
        ({"weight": torch.zeros(E, 4, 3, 2, 2)}, TypeError, "weight.*: expected SparseRows"),
        (
            {"weight": pack_sparse(torch.ones(E, 4, 12))},
            ValueError,
            r"kernel: expected \[channels, height, width\]",
        ),
        ({"max_pool": 9}, ValueError, "max_pool"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refuses_convolutions_that_do_not_fit(change, error, message):
    given = {
        "input": torch.zeros(2, 3, 5, 5),
        "weight": pack_sparse(pruned(E, 4, 3, 2, 2, kept=0.5)),
        "bias": torch.zeros(E, 4),
    } | change
    with pytest.raises(error, match=message):
        ensemble_conv2d_sparse(**given)


# --- the dispatcher --------------------------------------------------------------------------------------


def test_opcheck():
    weights, biases = network([130, 5, 2], 0.5)
    rows = [pack_sparse(w) for w in weights]
    columns = [[getattr(r, name) for r in rows] for name in ("values", "columns", "starts", "order")]
    torch.library.opcheck(
        torch.ops.pyens.ensemble_mlp_sparse,
        (torch.randn(7, 130), *columns, [130, 5], biases, "relu", "identity"),
    )
    weight = pack_sparse(pruned(E, 4, 3, 2, 2, kept=0.5))
    torch.library.opcheck(
        torch.ops.pyens.ensemble_conv2d_sparse,
        (
            torch.randn(7, 3, 6, 5),
            *weight[:4],
            [3, 2, 2],
            biases[1].repeat(1, 2),
            [1, 1],
            [0, 1],
            [1, 1],
            "relu",
            [2, 1],
        ),
    )


def test_compiled():
    model = EnsembleMLP(E, 20, [30], 4).sparse()
    x = torch.randn(9, 20)
    compiled = torch.compile(lambda x: model(x).sum(0), fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x).sum(0))


# --- modules ---------------------------------------------------------------------------------------------


def test_an_ensemble_frozen():
    model = EnsembleMLP(E, 20, [130, 9], 4, activation="gelu", output_activation="tanh", dropout=0.5)
    for weight in model.weights:
        weight.data *= torch.rand_like(weight) < 0.1
    sparse = model.sparse()
    x = torch.randn(33, 20)
    want = model.eval()(x)
    assert torch.equal(sparse(x), want) and not list(sparse.parameters()) and not sparse.training
    assert torch.equal(sparse.dense()(x), want) and torch.equal(sparse.select([2, 0])(x), want[[2, 0]])
    torch.testing.assert_close(sparse.member(1)(x), want[1])
    assert "of 7800 weights" in repr(sparse)
    with pytest.raises(ValueError, match="expected no norm"):
        EnsembleMLP(E, 4, [5], 1, norm="layer_norm").sparse()
    with pytest.raises(ValueError, match="masks: expected one for each of the 3 layers, got 1"):
        model.sparse([torch.ones(E, 130, 20) > 0])


def test_state_dicts_of_other_numbers_of_weights():
    make = lambda kept: SparseEnsembleMLP(EnsembleMLP.from_parameters(*network([20, 30, 2], kept)))  # noqa: E731
    first, second = make(0.5), make(0.2)
    x = torch.randn(5, 20)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(second(x), first(x))
    assert torch.equal(copy.deepcopy(first)(x), first(x))
    other = SparseEnsembleMLP(EnsembleMLP.from_parameters(*network([20, 31, 2], 0.5)))
    with pytest.raises(RuntimeError, match=r"size mismatch for layers\.0: weights of shape \[3, 30, 20\]"):
        other.load_state_dict(first.state_dict())


def test_torchs_pruning():
    model = EnsembleLinear(E, 20, 7)
    nn.utils.prune.l1_unstructured(model, "weight", 0.75)
    sparse = model.sparse()
    x = torch.randn(5, 20)
    assert torch.equal(sparse(x), model(x)) and len(sparse.layers[0].values) == E * 7 * 5


def test_a_pruned_convolutional_network():
    model = EnsembleSequential(
        EnsembleConv2d(E, 1, 6, 3), nn.ReLU(), EnsembleMaxPool2d(2), Flatten(), EnsembleLinear(E, 54, 4)
    )
    x = torch.randn(20, 1, 8, 8)
    layers = list(model.children())
    for layer in (layers[0], layers[4]):
        nn.utils.prune.l1_unstructured(layer, "weight", 0.9)
    want = model(x)
    with torch.no_grad():
        assert torch.equal(model.packed()(x), want) and torch.equal(model.sparse()(x), want)
    kept = sum(len(b) for name, b in model.sparse().named_buffers() if name.endswith("values"))
    assert kept == sum(int(layer.weight_mask.sum()) for layer in (layers[0], layers[4]))
    assert torch.equal(model(x), want)  # nothing of it has changed


@pytest.mark.parametrize("norm", [False, True])
def test_a_convolutional_network_frozen(norm):
    model = EnsembleSequential(
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
    with torch.no_grad():
        model(torch.randn(30, 1, 14, 14))
        for parameter in model.parameters():
            if parameter.dim() > 2:
                parameter *= torch.rand_like(parameter) < 0.3
    x = torch.randn(20, 1, 14, 14)
    packed, sparse = model.packed(), model.sparse()
    assert torch.equal(sparse(x), packed(x))
    kinds = [type(layer) for layer in sparse.children() if isinstance(layer, pyens.Ensemble)]
    assert kinds == [SparseEnsembleConv2d, SparseEnsembleConv2d, SparseEnsembleMLP]
    assert torch.equal(sparse.select([1])(x), packed(x)[1:2])
    torch.testing.assert_close(sparse.member(2)(x), packed(x)[2], rtol=1e-4, atol=1e-5)
    assert sum(b.nbytes for b in sparse.buffers()) < 0.8 * sum(p.nbytes for p in packed.parameters())
    with pytest.raises(ValueError, match=r"layer 1: expected EnsembleConv2d.*EnsembleEmbedding"):
        EnsembleSequential(EnsembleConv2d(E, 1, 2, 1), pyens.EnsembleEmbedding(E, 3, 2)).sparse()
