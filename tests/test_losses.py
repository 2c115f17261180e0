"""pyens.losses against the paper's formulas written out, and the properties and limits that they promise."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pyens import losses

SHAPES = [(3, 7), (2, 7, 4), (5, 6, 1), (2, 3, 7, 4), (1, 5), (1, 5, 2), (3, 1, 2), (2, 1, 5, 3)]
KINDS = ["correlation", "covariance", "residue"]
seeds = st.integers(0, 2**32 - 1)

# Every loss that is called with outputs alone.
LOSSES = {
    "difference": losses.difference_loss,
    "difference, absolute": lambda z: losses.difference_loss(z, distance="absolute"),
    "difference, inverse": lambda z: losses.difference_loss(z, inverse=True),
    "cross entropy": losses.cross_entropy_difference_loss,
    "cross entropy, inverse": lambda z: losses.cross_entropy_difference_loss(z, inverse=True),
    "decorrelation": losses.decorrelation_loss,
    "pearson": losses.pearson_decorrelation_loss,
    "gram-schmidt": losses.gram_schmidt_decorrelation_loss,
    "gram-schmidt, residue": lambda z: losses.gram_schmidt_decorrelation_loss(z, kind="residue"),
}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def per_label(outputs, loss):
    """`loss` of every [J, B] in outputs of any shape, in the shape that reduction="none" gives."""
    if outputs.ndim == 2:
        return loss(outputs)
    if outputs.ndim == 3:
        return torch.stack([loss(outputs[..., k]) for k in range(outputs.shape[-1])])
    return torch.stack([per_label(model, loss) for model in outputs])


def pairs(components):
    return [(i, j) for i in range(components) for j in range(i)]


def mean_over_pairs(z, distance):
    found = [distance(z[i], z[j]).mean() for i, j in pairs(len(z))]
    return torch.stack(found).mean() if found else z.new_zeros(())


def signal(z, kind):
    return {"correlation": z, "covariance": z - z.mean(1, keepdim=True), "residue": z - z.mean(0)}[kind]


def squared_products(z, u=None):
    u = z if u is None else u
    found = [(z[i] * u[j]).mean().square() for i, j in pairs(len(z))]
    return torch.stack(found).sum() if found else z.new_zeros(())


# ------------------------------------------------------------------------------------------------------------
# Difference losses


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("distance", ["squared", "absolute"])
@pytest.mark.parametrize("inverse", [False, True])
def test_difference_loss_is_equation_7(shape, distance, inverse):
    z = draw(*shape)
    apart = {"squared": lambda a, b: (a - b).square(), "absolute": lambda a, b: (a - b).abs()}[distance]

    def loss(one):
        difference = -mean_over_pairs(one, apart)
        if not inverse:
            return difference
        return 1 / (difference.abs() + 0.01) if len(one) > 1 else 0 * difference

    expected = per_label(z, loss)
    options = {"distance": distance, "inverse": inverse, "eps": 0.01}
    torch.testing.assert_close(losses.difference_loss(z, reduction="none", **options), expected)
    total = expected if z.ndim == 2 else expected.sum(-1)
    torch.testing.assert_close(losses.difference_loss(z, **options), total)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy_difference_is_its_definition(shape):
    z = draw(*shape)

    def loss(one):  # [J, B] or [J, B, K]
        p = torch.stack([one.sigmoid(), 1 - one.sigmoid()], -1) if one.ndim == 2 else one.softmax(-1)
        ordered = pairs(len(p)) + [(j, i) for i, j in pairs(len(p))]
        found = [-(p[i] * p[j].log()).sum(-1).mean() for i, j in ordered]
        return -torch.stack(found).mean() if found else one.new_zeros(())

    expected = torch.stack([loss(model) for model in z]) if z.ndim == 4 else loss(z)
    torch.testing.assert_close(losses.cross_entropy_difference_loss(z), expected)
    inverse = losses.cross_entropy_difference_loss(z, inverse=True, eps=0.5)
    components = z.shape[-3] if z.ndim > 2 else z.shape[0]
    torch.testing.assert_close(inverse, 1 / (expected.abs() + 0.5) if components > 1 else 0 * expected)


def test_cross_entropy_difference_of_large_logits_is_finite():
    z = torch.tensor([[[200.0, 0.0]], [[0.0, 200.0]]])
    assert losses.cross_entropy_difference_loss(z).item() == pytest.approx(-200, rel=1e-6)
    # Of two labels, sigmoids of 200 and of 0: H(p, q) = log 2 and H(q, p) = 200 / 2.
    binary = losses.cross_entropy_difference_loss(z[..., 0])
    assert binary.item() == pytest.approx(-(math.log(2) + 100) / 2, rel=1e-6)


def test_the_difference_does_not_cancel_at_an_offset():
    z = draw(4, 50, 3)
    expected = losses.difference_loss(z)
    moved = (z + 1000).float()
    exact = losses.difference_loss(moved.double())
    torch.testing.assert_close(losses.difference_loss(moved).double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(exact, expected, rtol=1e-3, atol=0)


def test_a_step_down_drives_components_apart():
    z = draw(3, 20, 2).requires_grad_()
    for loss in ("difference", "difference, absolute", "difference, inverse", "cross entropy"):
        before = LOSSES[loss](z)
        (gradient,) = torch.autograd.grad(before, z)
        assert LOSSES[loss](z - 1e-3 * gradient) < before
        spread = (z - 1e-3 * gradient).var(0).sum()
        assert spread > z.var(0).sum()


# ------------------------------------------------------------------------------------------------------------
# Decorrelation losses


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pearson_decorrelation_is_the_sum_of_squared_correlations(shape):
    z = draw(*shape)

    def loss(one):
        if one.shape[1] == 1 or len(one) == 1:
            return one.new_zeros(())
        return torch.corrcoef(one).tril(-1).square().sum()

    expected = per_label(z, loss)
    got = losses.pearson_decorrelation_loss(z, reduction="none")
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    total = expected if z.ndim == 2 else expected.sum(-1)
    torch.testing.assert_close(losses.pearson_decorrelation_loss(z), total, rtol=1e-9, atol=1e-12)


def test_pearson_decorrelation_ignores_scale_and_offset_and_survives_constants():
    z = draw(3, 20)
    moved = z * torch.tensor([[1e-2], [1.0], [1e3]]) + torch.tensor([[1e3], [0.0], [-5.0]])
    expected = losses.pearson_decorrelation_loss(z)
    torch.testing.assert_close(losses.pearson_decorrelation_loss(moved), expected, rtol=1e-6, atol=0)
    # An offset that leaves few digits, two examples one rounding apart, and squares that overflow.
    for far in ((z + 1e5).float(), torch.tensor([[1e3, 1e3 + 2**-14], [5.0, 4.0]]), (1e25 * z).float()):
        got = losses.pearson_decorrelation_loss(far, eps=1e-20)
        right = torch.corrcoef(far.double() / far.double().abs().max()).tril(-1).square().sum()
        torch.testing.assert_close(got.double(), right, rtol=1e-3, atol=0)
    leaf = (1e25 * z).float().requires_grad_()
    losses.pearson_decorrelation_loss(leaf).backward()
    assert (leaf.grad.double() * 1e25).abs().max() > 1e-3  # as that of z, by the chain rule
    small = z.clone().requires_grad_()
    losses.pearson_decorrelation_loss(small, eps=1e-30).backward()
    torch.testing.assert_close(leaf.grad.double() * 1e25, small.grad, rtol=1e-4, atol=1e-6)
    constant = torch.cat([z[:1], torch.full((1, 20), 2.0)]).requires_grad_()
    loss = losses.pearson_decorrelation_loss(constant)
    loss.backward()
    assert loss.item() == 0 and constant.grad.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_schmidt_makes_orthogonal_and_spans_the_same(shape):
    z = draw(*shape)
    u = losses.gram_schmidt(z)
    assert u.shape == z.shape
    by_label = [x.movedim(-1, 0).flatten(0, -3) if x.ndim > 2 else x[None] for x in (z, u)]
    by_label = (
        [x.reshape(-1, *x.shape[-2:]) for x in by_label]
        if z.ndim < 4
        else [x.movedim(-1, 1).flatten(0, 1) for x in (z, u)]
    )
    for one, orthogonal in zip(*by_label, strict=True):  # [J, B]
        torch.testing.assert_close(orthogonal[0], one[0])
        products = orthogonal @ orthogonal.T
        scale = products.diagonal().max()
        assert products.tril(-1).abs().max() <= 1e-12 * scale
        if len(one) <= one.shape[1]:
            # What was taken from z_j lies in the span of those before it.
            for j in range(1, len(one)):
                taken = (one[j] - orthogonal[j])[None]
                rank = torch.linalg.matrix_rank(torch.cat([one[:j], taken]), rtol=1e-9)
                assert rank == torch.linalg.matrix_rank(one[:j], rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_schmidt_leaves_nothing_of_a_dependent_component(dtype):
    z = draw(2, 30, dtype=dtype)
    z = torch.stack([z[0], 3 * z[0], z[1], z[0] - 2 * z[1], 0 * z[0]]).requires_grad_()
    u = losses.gram_schmidt(z)
    assert (u[[1, 3, 4]] == 0).all() and (u[[0, 2]] != 0).any(1).all()
    loss = losses.gram_schmidt_decorrelation_loss(z)
    loss.backward()
    assert z.grad.isfinite().all()
    # What z_1 and z_2 share is counted against z_1 alone.
    expected = squared_products(z.detach(), u.detach())
    torch.testing.assert_close(loss.detach(), expected)
    assert loss < squared_products(z.detach())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gram_schmidt_decorrelation_is_its_definition(shape, kind):
    z = draw(*shape)

    def loss(one):
        one = signal(one, kind)
        return squared_products(one, losses.gram_schmidt(one))

    got = losses.gram_schmidt_decorrelation_loss(z, kind=kind, reduction="none")
    torch.testing.assert_close(got, per_label(z, loss), rtol=1e-9, atol=1e-12)
    if shape == (2, 7, 4):  # two components: nothing is counted twice
        plain = per_label(z, lambda one: squared_products(signal(one, kind)))
        torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_orthogonal_components_have_no_loss(kind):
    z = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    if kind != "residue":  # less the mean of the three they are orthogonal no more
        assert losses.gram_schmidt_decorrelation_loss(z, kind=kind) == 0
    assert losses.pearson_decorrelation_loss(z).item() == pytest.approx(0, abs=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Running estimate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "sizes"), [((3, 7), (3,)), ((3, 7, 2), (3, 2)), ((4, 3, 7, 2), (3, 2, 4))])
def test_the_running_loss_follows_its_recursion(shape, sizes, kind):
    running = losses.RunningDecorrelationLoss(*sizes, kind=kind, momentum=0.25, dtype=torch.float64)

    def products(one):
        one = signal(one, kind)
        return one @ one.T / one.shape[1]

    estimate = None
    for step in range(3):
        z = draw(*shape, seed=step)
        batch = per_label(z, products)
        estimate = batch if estimate is None else 0.75 * estimate + 0.25 * batch
        loss = estimate.tril(-1).square().sum((-2, -1))
        torch.testing.assert_close(running(z), loss if len(sizes) == 1 else loss.sum(-1))
        torch.testing.assert_close(running.estimate, estimate)
    assert (running.batches == 3).all() and running.batches.dim() == (len(shape) == 4)


def test_the_gradient_goes_through_the_batch_alone():
    running = losses.RunningDecorrelationLoss(2, momentum=0.1, dtype=torch.float64)
    running(draw(2, 30).requires_grad_()).backward()
    old = running.estimate.clone()
    assert not old.requires_grad
    z = draw(2, 30, seed=1).requires_grad_()
    loss = running(z)
    (gradient,) = torch.autograd.grad(loss, z)
    c = 0.9 * old[1, 0] + 0.1 * (z[0] * z[1]).mean()
    expected = 2 * c * 0.1 * z.detach().flip(0) / 30
    torch.testing.assert_close(gradient, expected.detach())


def test_without_memory_it_is_the_decorrelation_loss_and_evaluation_learns_nothing():
    running = losses.RunningDecorrelationLoss(3, 2, momentum=1.0)
    z, other = draw(3, 8, 2, dtype=torch.float32), draw(3, 8, 2, seed=1, dtype=torch.float32)
    for outputs in (z, other):
        expected = per_label(outputs, squared_products).sum()
        torch.testing.assert_close(running(outputs), expected)
    running.eval()
    estimate = running.estimate.clone()
    running(z)
    assert torch.equal(running.estimate, estimate) and running.batches == 2


def test_the_running_estimate_is_in_the_state_dict():
    running = losses.RunningDecorrelationLoss(3, momentum=0.5)
    running(draw(3, 8, dtype=torch.float32))
    copy = losses.RunningDecorrelationLoss(3, momentum=0.5)
    copy.load_state_dict(running.state_dict())
    z = draw(3, 8, seed=1, dtype=torch.float32)
    assert torch.equal(copy(z), running(z))
    assert "kind='correlation', momentum=0.5" in repr(running)


def test_an_empty_batch_does_not_touch_the_estimate():
    running = losses.RunningDecorrelationLoss(3)
    assert running(torch.zeros(3, 0)) == 0 and running.batches == 0
    running(draw(3, 4, dtype=torch.float32))
    before = running.estimate.clone()
    running(torch.zeros(3, 0))
    assert torch.equal(running.estimate, before) and running.batches == 1


# ------------------------------------------------------------------------------------------------------------
# Combination of outputs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", ["evenly", "by component", "by example"])
def test_combine_is_the_weighted_mean(shape, weighted):
    z = draw(*shape)
    leading = shape[:-1] if z.ndim == 2 else shape[:-2]
    axis = len(leading) - 1  # of the components
    size = shape[:2] if z.ndim == 2 else shape[:-1]
    g, weights = torch.full(leading, 1 / leading[-1], dtype=torch.float64), None
    if weighted == "by component":
        g = weights = draw(*leading, seed=1).softmax(-1)
    if weighted == "by example":
        weights = draw(*size, seed=1).softmax(axis)
    full = weights if weighted == "by example" else g[..., None].expand(size)
    full = full if z.ndim == 2 else full[..., None]

    in_logit = losses.combine(z, weights, space="logit")
    torch.testing.assert_close(in_logit, (full * z).sum(axis))
    in_probability = losses.combine(z, weights)
    if z.ndim == 2 or z.shape[-1] == 1:
        torch.testing.assert_close(in_probability.sigmoid(), (full * z.sigmoid()).sum(axis))
    else:
        torch.testing.assert_close(in_probability.exp(), (full * z.softmax(-1)).sum(axis))
        torch.testing.assert_close(in_probability.softmax(-1), in_probability.exp())


def test_combine_does_not_underflow():
    z = torch.tensor([[[0.0, 200.0]], [[0.0, 300.0]]])
    combined = losses.combine(z)
    assert combined[0, 0].item() == pytest.approx(-200 - math.log(2), rel=1e-6)
    assert losses.combine(z[..., 1]).item() == pytest.approx(200 + math.log(2), rel=1e-6)
    assert F.cross_entropy(combined, torch.tensor([0])).item() == pytest.approx(200 + math.log(2), rel=1e-6)


def test_a_component_of_weight_zero_is_left_out():
    z = draw(3, 5, 4)
    weights = torch.tensor([0.25, 0.0, 0.75], dtype=torch.float64).requires_grad_()
    expected = losses.combine(z[[0, 2]], weights.detach()[[0, 2]])
    combined = losses.combine(z, weights)
    torch.testing.assert_close(combined, expected)
    combined.sum().backward()
    assert weights.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("weights", [[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5], [1, 1e-30, 0], [1, 1e-41, 0]])
def test_combine_of_large_logits_and_small_weights(dtype, scale, weights):
    """Against mpmath with 9000 digits: exp(-1e4) is a number there."""
    g = torch.tensor(weights, dtype=dtype)
    z = (scale * torch.tensor([[1.0, -0.02, 0.7], [-1.0, 0.5, -0.9], [0.3, 1.0, -0.2]])).to(dtype)
    binary, several = losses.combine(z, g), losses.combine(z.T.unsqueeze(1).contiguous(), g)
    with mpmath.workdps(9000):
        shares = [mpmath.mpf(w) for w in g.tolist()]

        def log_odds(column):
            p = sum(w / (1 + mpmath.exp(-mpmath.mpf(x))) for w, x in zip(shares, column, strict=True))
            total = sum(shares)
            return float(mpmath.log(p) - mpmath.log(total - p))

        expected = [log_odds(column) for column in z.T.tolist()]
        exps = [[mpmath.exp(mpmath.mpf(x)) for x in row] for row in z.T.tolist()]  # [J, K]
        p = [sum(w * row[k] / sum(row) for w, row in zip(shares, exps, strict=True)) for k in range(3)]
        log_p = [float(mpmath.log(share)) for share in p]
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(binary.double(), torch.tensor(expected, dtype=torch.float64), **tolerance)
    torch.testing.assert_close(several[0].double(), torch.tensor(log_p, dtype=torch.float64), **tolerance)


def test_combine_of_a_certain_component_alone():
    z = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    weights = torch.tensor([1.0, 0.0], requires_grad=True)
    combined = losses.combine(z, weights)
    assert combined.item() == 200
    combined.sum().backward()
    assert z.grad.tolist() == [[1.0], [0.0]] and weights.grad.isfinite().all()
    gate = torch.tensor([1e4, -1e4]).softmax(0)
    assert losses.combine(z, gate).item() == 200
    assert losses.combine(z, torch.tensor([torch.nan, 0.0])).isnan()


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 4)], ids=str)
def test_cross_entropy_difference_up_to_logits_of_1e4(shape):
    z = (1e4 * draw(*shape).clamp(-1, 1)).float()
    exact = losses.cross_entropy_difference_loss(z.double())
    got = losses.cross_entropy_difference_loss(z.requires_grad_())
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)
    got.backward()
    assert z.grad.isfinite().all()


def test_a_gate_starts_even_and_learns_which_component_to_trust():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 2, generator=generator)
    labels = torch.randint(3, (200,), generator=generator)
    right = 4.0 * F.one_hot(labels, 3)
    first = (features[:, 0] > 0)[:, None]
    outputs = torch.stack([right * first, right * ~first])  # each knows half of the plane
    gate = losses.Gate(2, 2)
    assert torch.equal(gate(features), torch.full((2, 200), 0.5))
    before = F.cross_entropy(losses.combine(outputs), labels)
    torch.testing.assert_close(F.cross_entropy(losses.combine(outputs, gate(features)), labels), before)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(losses.combine(outputs, gate(features)), labels).backward()
        optimizer.step()
    after = F.cross_entropy(losses.combine(outputs, gate(features)), labels)
    assert after < 0.5 * before
    weights = gate(features)
    torch.testing.assert_close(weights.sum(0), torch.ones(200))
    assert ((weights[0] > 0.5) == first[:, 0]).double().mean() > 0.95


# ------------------------------------------------------------------------------------------------------------
# What all promise


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2), (2, 3, 4, 2)], ids=str)
def test_losses_are_differentiable_twice(name, shape):
    z = draw(*shape).requires_grad_()
    assert torch.autograd.gradcheck(LOSSES[name], z)
    assert torch.autograd.gradgradcheck(LOSSES[name], z)


@pytest.mark.parametrize("space", ["probability", "logit"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2)], ids=str)
def test_combine_is_differentiable_twice(space, shape):
    inputs = [draw(*shape).requires_grad_(), draw(3, 4, seed=1).softmax(0).requires_grad_()]

    def combine(z, g):
        return losses.combine(z, g, space=space)

    assert torch.autograd.gradcheck(combine, inputs) and torch.autograd.gradgradcheck(combine, inputs)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(1, 6), (1, 6, 3), (2, 1, 6, 3), (3, 0), (3, 0, 2), (2, 3, 0, 2)], ids=str)
def test_no_pair_or_no_example_is_no_loss(name, shape):
    z = draw(*shape).requires_grad_()
    loss = LOSSES[name](z)
    assert loss.shape == shape[:-3] if len(shape) == 4 else loss.shape == ()
    assert (loss == 0).all()
    loss.sum().backward()
    assert (z.grad == 0).all()


@given(seeds, st.sampled_from([name for name in LOSSES if "gram" not in name]))
def test_the_order_of_the_components_does_not_matter(seed, name):
    z = draw(4, 6, 3, seed=seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(LOSSES[name](z[order]), LOSSES[name](z), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_models_that_train_together_do_not_meet(name):
    z = draw(3, 4, 6, 2)
    alone = torch.stack([LOSSES[name](model) for model in z])
    torch.testing.assert_close(LOSSES[name](z), alone)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_compute_in_float32(name, dtype):
    z = draw(3, 8, 2, dtype=dtype)
    got = LOSSES[name](z)
    assert got.dtype == torch.float32
    assert torch.equal(got, LOSSES[name](z.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LOSSES[name](z.float()), got)


@pytest.mark.parametrize("name", LOSSES)
def test_nan_is_not_hidden(name):
    z = draw(3, 8, 2)
    z[1, 2, 0] = math.nan
    assert LOSSES[name](z).isnan()


def test_results_stay_on_the_device_and_agree_with_the_cpu(device):
    z = draw(3, 8, 2)
    for loss in [*LOSSES.values(), losses.gram_schmidt, losses.combine]:
        there = loss(z.to(device))
        assert there.device.type == device.type
        torch.testing.assert_close(there.cpu(), loss(z), rtol=1e-9, atol=1e-12)
    running = losses.RunningDecorrelationLoss(3, 2, device=device, dtype=torch.float64)
    assert running(z.to(device)).device.type == device.type
    assert losses.Gate(4, 3, device=device)(torch.ones(5, 4, device=device)).shape == (3, 5)


Z = draw(3, 4, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: losses.difference_loss([1.0]),
            TypeError,
            "difference_loss: outputs: expected a tensor, got list",
        ),
        (
            lambda: losses.difference_loss(Z.long()),
            TypeError,
            "outputs: expected a floating dtype, got torch.int64",
        ),
        (lambda: losses.difference_loss(Z[0, 0]), ValueError, r"outputs: expected shape .*, got \[2\]"),
        (
            lambda: losses.gram_schmidt(Z[:0]),
            ValueError,
            r"gram_schmidt: outputs: expected J >= 1, got \[0, 4, 2\]",
        ),
        (
            lambda: losses.difference_loss(Z, distance="L2"),
            ValueError,
            "distance: expected squared or absolute",
        ),
        (lambda: losses.difference_loss(Z, reduction="mean"), ValueError, "reduction: expected sum or none"),
        (
            lambda: losses.difference_loss(Z, eps=0),
            ValueError,
            "difference_loss: eps: expected a number > 0, got 0",
        ),
        (lambda: losses.cross_entropy_difference_loss(Z, eps=-1), ValueError, "eps: expected a number > 0"),
        (
            lambda: losses.pearson_decorrelation_loss(Z, eps=math.nan),
            ValueError,
            "eps: expected a number > 0",
        ),
        (
            lambda: losses.gram_schmidt_decorrelation_loss(Z, kind="full"),
            ValueError,
            "kind: expected correlation or",
        ),
        (
            lambda: losses.combine(Z, space="odds"),
            ValueError,
            "combine: space: expected probability or logit",
        ),
        (
            lambda: losses.combine(Z, torch.ones(4)),
            ValueError,
            r"combine: weights: expected shape \[3\] or \[3, 4\], got \[4\]",
        ),
        (
            lambda: losses.RunningDecorrelationLoss(2, 2)(Z),
            ValueError,
            r"RunningDecorrelationLoss: outputs: expected 2 components and .* \[2\], got shape \[3, 4, 2\]",
        ),
        (
            lambda: losses.RunningDecorrelationLoss(3)(Z[0, 0]),
            ValueError,
            "RunningDecorrelationLoss: outputs: exp",
        ),
        (
            lambda: losses.RunningDecorrelationLoss(3, momentum=0),
            ValueError,
            r"momentum: expected .* \(0, 1\], got 0",
        ),
        (lambda: losses.RunningDecorrelationLoss(3, num_models=2), ValueError, "num_labels: expected an int"),
        (
            lambda: losses.RunningDecorrelationLoss(0),
            ValueError,
            "num_components: expected at least 1, got 0",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
