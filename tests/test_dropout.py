"""Dropout inside ensemble_mlp and ensemble_mlp_loss: which units it keeps, and what it does to the rest."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pyens import reference
from pyens.ops import ensemble_mlp, ensemble_mlp_loss
from pyens.reference.ensemble_mlp import kept_by_dropout

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 2**32, 1234567890123456789])
E = len(SEEDS)
CPU = torch.device("cpu")


def passing_on(
    e: int, layers: int, units: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Weights of a network that passes its inputs on: the output is what all its dropouts make of them."""
    return [torch.eye(units, dtype=dtype, device=device).repeat(e, 1, 1) for _ in range(layers)]


def problem(
    e: int,
    b: int,
    widths: list[int],
    dtype: torch.dtype,
    device: torch.device = CPU,
    per_member: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x = torch.randn(*([e] if per_member else []), b, widths[0])
    layers = list(itertools.pairwise(widths))
    weights = [torch.randn(e, o, i) * 1.4 / i**0.5 for i, o in layers]
    biases = [torch.randn(e, o) * 0.3 for _, o in layers]
    return (
        x.to(device, dtype),
        [w.to(device, dtype) for w in weights],
        [v.to(device, dtype) for v in biases],
    )


def masks(seeds: Tensor, layer: int, b: int, units: int, dropout: float) -> Tensor:
    """What the kernel keeps, bool [E, b, units]: layers before this one have no unit to drop but give 1."""
    e = len(seeds)
    weights = [torch.zeros(e, units, units) for _ in range(layer + 1)] + passing_on(e, 1, units)
    biases = [torch.ones(e, units) for _ in range(layer + 1)] + [torch.zeros(e, units)]
    output = ensemble_mlp(
        torch.zeros(b, units), weights, biases, activation="identity", dropout=dropout, dropout_seeds=seeds
    )
    assert torch.equal(output, torch.where(output == 0, 0, output.max()))
    return output != 0


# --- the same units everywhere -----------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(("b", "units"), [(1, 40), (7, 9), (8, 1), (65, 33), (600, 5)])
@pytest.mark.parametrize("layer", [0, 1, 4])
def test_the_kernel_keeps_what_the_reference_keeps(layer, b, units, dropout):
    kept = kept_by_dropout(SEEDS, layer, b, units, dropout)
    assert kept.shape == (E, b, units)
    assert torch.equal(masks(SEEDS, layer, b, units, dropout), kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "identity"])  # dropped with the ReLU, and with a slope
@pytest.mark.parametrize("b", [1, 9, 300, 5000])
def test_forward_and_backward_keep_the_same_units(device, dtype, activation, b):
    dropout, units, seeds = 0.25, 6, SEEDS.to(device)
    kept = kept_by_dropout(seeds, 0, b, units, dropout) & kept_by_dropout(seeds, 1, b, units, dropout)
    weights = passing_on(E, 3, units, device, dtype)
    x = torch.ones(E, b, units, device=device, dtype=dtype, requires_grad=True)
    options: Any = {"activation": activation, "dropout": dropout, "dropout_seeds": seeds}

    output = ensemble_mlp(x, weights, **options)
    assert torch.equal(output != 0, kept)
    scale = torch.full((), 1 / (1 - dropout) ** 2, dtype=torch.float64)
    torch.testing.assert_close(output.double(), kept * scale.to(device), rtol=0.01, atol=0)
    (fused,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
    assert torch.equal(fused != 0, kept)
    (composed,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    assert torch.equal(composed != 0, kept)
    torch.testing.assert_close(composed, fused)

    target = torch.full((b, units), -1.0, device=device, dtype=dtype)
    loss = ensemble_mlp_loss(x, target, weights, loss="mse", **options).sum()
    (fused,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(fused != 0, kept)
    (composed,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(composed != 0, kept)


@pytest.mark.parametrize("b", [3, 300])
def test_a_shared_input_gets_the_gradient_of_the_units_kept(device, b):
    seeds = SEEDS.to(device)
    options: Any = {"activation": "relu", "dropout": 0.5, "dropout_seeds": seeds}
    x = torch.ones(b, 6, device=device, requires_grad=True)
    (got,) = torch.autograd.grad(ensemble_mlp(x, passing_on(E, 2, 6, device), **options).sum(), x)
    assert torch.equal(got, 2.0 * kept_by_dropout(seeds, 0, b, 6, 0.5).sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("b", [2, 70, 520])
def test_outputs_match_the_reference(device, dtype, dropout, b):
    x, weights, biases = problem(E, b, [13, 30, 20, 4], dtype, device)
    options: Any = {"activation": "gelu", "dropout": dropout, "dropout_seeds": SEEDS.to(device)}
    got = ensemble_mlp(x, weights, biases, **options)
    exact = reference.ensemble_mlp(
        x.double(), [w.double() for w in weights], [v.double() for v in biases], **options
    )
    plain = reference.ensemble_mlp(x, weights, biases, **options)

    def rms(difference: Tensor) -> float:
        return difference.double().square().mean().sqrt().item()

    rounding = torch.finfo(dtype).eps * rms(exact)
    allowed = 16 * rounding if dtype == torch.float64 else 2 * (rms(plain - exact) + rounding)
    assert rms(got - exact) <= allowed


@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("activation", ["relu", "tanh", "identity"])
def test_first_and_second_derivatives(device, activation, per_member):
    x, weights, biases = problem(2, 3, [3, 6, 5, 2], torch.float64, device, per_member)
    seeds = torch.tensor([3, 4], device=device)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return ensemble_mlp(
            x, parameters[:3], parameters[3:], activation=activation, dropout=0.4, dropout_seeds=seeds
        )

    tensors = [t.requires_grad_() for t in (x, *weights, *biases)]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


# --- which units -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.001, 0.1, 0.5, 0.8, 0.999])
def test_rate(dropout):
    seeds = torch.arange(50)
    dropped = ~masks(seeds, 0, 400, 50, dropout)
    # Binomial: overall, of each member, of each row, of each unit; 5 standard deviations, 6 of the extremes.
    for over, deviations in (((0, 1, 2), 5), ((1, 2), 6), ((0, 2), 6), ((0, 1), 6)):
        n = 1
        for dim in over:
            n *= dropped.shape[dim]
        rate = dropped.double().mean(over)
        assert ((rate - dropout).abs() <= deviations * (dropout * (1 - dropout) / n) ** 0.5 + 1 / n).all()


def assert_uncorrelated(kept: Tensor) -> None:
    """Rows of [variables, draws], of any two of which the correlation is that of independent draws."""
    n = kept.shape[1]
    correlation = torch.corrcoef(kept.double())
    off = correlation[~torch.eye(len(kept), dtype=torch.bool)] * n**0.5  # about standard normal
    assert off.abs().max() < 6
    pairs = len(off) / 2
    assert abs(off.square().mean().item() - 1) < 5 * (2 / pairs) ** 0.5


@pytest.mark.parametrize("dropout", [0.2, 0.5])
@pytest.mark.parametrize("first_seed", [0, -50, 2**40])
def test_rows_units_layers_and_members_are_independent(first_seed, dropout):
    seeds = torch.arange(first_seed, first_seed + 100)
    kept = kept_by_dropout(seeds, 0, 100, 100, dropout)  # [members with consecutive seeds, rows, units]
    for variable in range(3):
        assert_uncorrelated(kept.movedim(variable, 0).flatten(1))
    layers = torch.stack([kept_by_dropout(seeds[:20], layer, 50, 40, dropout) for layer in range(60)])
    assert_uncorrelated(layers.flatten(1))


def test_seeds_that_share_bits_are_independent():
    seeds = torch.cat([2 ** torch.arange(63), -(2 ** torch.arange(63)), torch.tensor([0, 3, 5, 6, 7])])
    assert_uncorrelated(kept_by_dropout(seeds.unique(), 0, 200, 100, 0.5).flatten(1))


def test_pairs_of_neighbours_are_independent():
    # Rows and units together: the 16 patterns of a 2 x 2 block are equally frequent.
    kept = kept_by_dropout(torch.arange(40), 0, 100, 100, 0.5).long()
    blocks = kept[:, ::2, ::2] + 2 * kept[:, 1::2, ::2] + 4 * kept[:, ::2, 1::2] + 8 * kept[:, 1::2, 1::2]
    counts = blocks.flatten().bincount(minlength=16).double()
    expected = blocks.numel() / 16
    assert ((counts - expected).square() / expected).sum() < 45  # chi2 with 15 degrees of freedom: p = 1e-4


def test_other_seeds_give_other_masks_and_the_same_ones_the_same():
    x, weights, biases = problem(4, 20, [5, 30, 2], torch.float32)

    def outputs(*seeds: int) -> Tensor:
        return ensemble_mlp(x, weights, biases, dropout=0.5, dropout_seeds=torch.tensor(seeds))

    one, again, other = outputs(1, 2, 3, 4), outputs(1, 2, 3, 4), outputs(1, 2, 9, 4)
    assert torch.equal(one, again)
    assert torch.equal(one[[0, 1, 3]], other[[0, 1, 3]]) and not torch.equal(one[2], other[2])


# --- the same bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [1, 5, 40])
def test_dropout_0_is_none(device, dtype, b):
    x, weights, biases = problem(3, b, [5, 9, 6, 2], dtype, device)
    y = torch.zeros(b, 2, device=device, dtype=dtype)
    seeds = torch.tensor([1, 2, 3], device=device)
    tensors = [t.requires_grad_() for t in (x, *weights, *biases)]

    def results(**options: Any) -> list[Tensor]:
        output = ensemble_mlp(x, weights, biases, **options)
        loss = ensemble_mlp_loss(x, y, weights, biases, loss="mse", **options)
        by_output = torch.autograd.grad(output.sum(), tensors)
        return [output, loss, *by_output, *torch.autograd.grad(loss.sum(), tensors)]

    expected = results()
    for options in ({"dropout": 0.0}, {"dropout": 0.0, "dropout_seeds": seeds}, {"dropout_seeds": seeds}):
        assert all(torch.equal(a, b) for a, b in zip(results(**options), expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [1, 9, 700])
def test_same_bits_for_any_threads_and_members_beside(dtype, b):
    x, weights, biases = problem(20, b, [5, 19, 16, 2], dtype)
    y = torch.randn(b, 2).to(dtype)

    def results(members: list[int]) -> list[Tensor]:
        parameters = [t[members].requires_grad_() for t in (*weights, *biases)]
        options: Any = {"dropout": 0.3, "dropout_seeds": torch.arange(20)[members], "activation": "silu"}
        output = ensemble_mlp(x, parameters[:3], parameters[3:], **options)
        loss = ensemble_mlp_loss(x, y, parameters[:3], parameters[3:], loss="mse", **options)
        by_output = torch.autograd.grad(output.float().square().sum(), parameters)
        return [output.detach(), loss.detach(), *by_output, *torch.autograd.grad(loss.sum(), parameters)]

    everyone = list(range(20))
    expected = results(everyone)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(results(everyone), expected, strict=True))
    finally:
        torch.set_num_threads(before)
    for members in ([7], [3, 19]):
        assert all(torch.equal(a, b[members]) for a, b in zip(results(members), expected, strict=True))


def test_rows_are_numbered_from_the_start_of_the_batch(device):
    x, weights, biases = problem(3, 400, [5, 9, 2], torch.float32, device)
    options: Any = {"dropout": 0.5, "dropout_seeds": torch.arange(3, device=device)}
    whole = ensemble_mlp(x, weights, biases, **options)
    for b in (1, 7, 64, 300):
        assert torch.equal(ensemble_mlp(x[:b], weights, biases, **options), whole[:, :b])


# --- Monte Carlo dropout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1, 33])
def test_a_hundred_passes_of_one_member(device, b):
    x, weights, biases = problem(1, b, [5, 30, 20, 2], torch.float32, device)
    seeds = torch.arange(100, device=device)
    expanded = [w.expand(100, -1, -1) for w in weights], [v.expand(100, -1) for v in biases]
    assert all(w.stride(0) == 0 for w in expanded[0])
    passes = ensemble_mlp(x, *expanded, dropout=0.2, dropout_seeds=seeds)
    assert passes.shape == (100, b, 2) and len(passes.unique(dim=0)) == 100
    for i in (0, 1, 57, 99):
        one = ensemble_mlp(x, weights, biases, dropout=0.2, dropout_seeds=seeds[i : i + 1])
        assert torch.equal(one[0], passes[i])


def test_the_mean_of_a_linear_network_is_unbiased(device):
    x, weights, biases = problem(1, 4, [5, 30, 2], torch.float32, device)
    n = 20_000
    expanded = [w.expand(n, -1, -1) for w in weights], [v.expand(n, -1) for v in biases]
    options: Any = {"activation": "identity", "dropout": 0.3}
    passes = ensemble_mlp(x, *expanded, dropout_seeds=torch.arange(n, device=device), **options)
    standard_error = passes.std(0) / n**0.5
    assert ((passes.mean(0) - ensemble_mlp(x, weights, biases, activation="identity")[0]).abs()
            < 5 * standard_error).all()  # fmt: skip


# --- torch.func --------------------------------------------------------------------------------------------


def test_vmap_over_seeds_inputs_and_models(device):
    x, weights, biases = problem(3, 6, [4, 9, 2], torch.float32, device)
    xs, seeds = torch.randn(5, 6, 4, device=device), torch.arange(15, device=device).view(5, 3)
    models = [torch.stack([w * (1 + i) for i in range(5)]) for w in weights]

    def call(x: Tensor, s: Tensor, w: list[Tensor]) -> Tensor:
        return ensemble_mlp(x, w, biases, dropout=0.5, dropout_seeds=s)

    for mapped in itertools.product((False, True), repeat=3):
        if not any(mapped):
            continue
        given = [many if is_mapped else one for many, one, is_mapped in zip(
            (xs, seeds, models), (x, seeds[0], weights), mapped, strict=True
        )]  # fmt: skip
        got = torch.func.vmap(call, in_dims=tuple(0 if is_mapped else None for is_mapped in mapped))(*given)
        for i in range(5):
            own_weights = [w[i] for w in models] if mapped[2] else weights
            one = call(xs[i] if mapped[0] else x, seeds[i] if mapped[1] else seeds[0], own_weights)
            assert torch.equal(got[i], one)


def test_func_grad(device):
    x, weights, biases = problem(3, 6, [4, 9, 2], torch.float64, device)
    options: Any = {"activation": "tanh", "dropout": 0.5, "dropout_seeds": torch.arange(3, device=device)}
    tensors = [w.requires_grad_() for w in weights]
    y = torch.zeros(6, 2, dtype=torch.float64, device=device)
    for call in (
        lambda w: ensemble_mlp(x, w, biases, **options).square().sum(),
        lambda w: ensemble_mlp_loss(x, y, w, biases, loss="mse", **options).sum(),
    ):
        got = torch.func.grad(call)([w.detach() for w in weights])
        torch.testing.assert_close(list(got), list(torch.autograd.grad(call(weights), tensors)))


# --- the dispatcher, bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    x, weights, biases = problem(3, 5, [4, 6, 2], torch.float32, device)
    weights = [w.requires_grad_(requires_grad) for w in weights]
    seeds = torch.arange(3, device=device)
    torch.library.opcheck(torch.ops.pyens.ensemble_mlp, (x, weights, biases, [], [], "relu", 0.5, seeds))


def test_compiled_with_new_seeds_each_step(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, weights: list[Tensor], seeds: Tensor) -> Tensor:
        return ensemble_mlp(x, weights, dropout=0.5, dropout_seeds=seeds).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    _, weights, _ = problem(3, 1, [4, 6, 2], torch.float32, device)
    weights = [w.requires_grad_() for w in weights]
    for i, b in enumerate((5, 7, 12, 33)):
        x, seeds = torch.randn(b, 4, device=device), torch.arange(3, device=device) + 10 * i
        got, expected = compiled(x, weights, seeds), step(x, weights, seeds)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, weights), torch.autograd.grad(expected, weights))
    assert counter.frame_count <= 2


BAD: dict[str, tuple[float, Tensor | None, type[Exception], str]] = {
    "1": (1.0, SEEDS[:3], ValueError, r"dropout: expected 0 <= dropout < 1, got 1"),
    "negative": (-0.1, SEEDS[:3], ValueError, r"dropout: expected 0 <= dropout < 1, got -0.1"),
    "nan": (float("nan"), SEEDS[:3], ValueError, r"dropout: expected 0 <= dropout < 1, got nan"),
    "no seeds": (0.5, None, ValueError, r"dropout_seeds: expected int64 \[3\] with dropout 0.5, got None"),
    "dtype": (0.5, SEEDS[:3].int(), TypeError, r"dropout_seeds: expected int64, got Int"),
    "device": (0.5, SEEDS[:3].to("meta"), TypeError, r"dropout_seeds: expected the device .*got meta"),
    "members": (0.5, SEEDS[:2], ValueError, r"dropout_seeds: expected \[3\], got shape \[2\]"),
    "one for all": (0.5, SEEDS[:1], ValueError, r"dropout_seeds: expected \[3\], got shape \[1\]"),
    "rank": (0.5, SEEDS[:3].unsqueeze(0), ValueError, r"dropout_seeds: expected \[3\], got shape \[1, 3\]"),
    "unused seeds": (0.0, SEEDS[:2], ValueError, r"dropout_seeds: expected \[3\], got shape \[2\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    dropout, seeds, error, message = BAD[case]
    x, weights, biases = problem(3, 5, [4, 6, 2], torch.float32)
    for tracked in (False, True):
        weights = [w.requires_grad_(tracked) for w in weights]
        with pytest.raises(error, match=r"^ensemble_mlp: " + message):
            ensemble_mlp(x, weights, biases, dropout=dropout, dropout_seeds=seeds)
        with pytest.raises(error, match=r"^ensemble_mlp_loss: " + message):
            ensemble_mlp_loss(
                x, torch.zeros(5, 2), weights, biases, loss="mse", dropout=dropout, dropout_seeds=seeds
            )
