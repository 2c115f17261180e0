"""Models of several components: their loss, what learns from what, and that models are on their own."""

import functools

import pytest
import torch
import torch.nn.functional as F

import pyens
from pyens import _files, losses
from pyens.nn import ComponentModels, TabularEnsemble, initialize_
from pyens.training import Randomness, Trainer, fit

M, J, B, WIDE, K = 3, 2, 24, 5, 4


def towers(models=M, components=J, outputs=K, dtype=None, **options):
    return [
        pyens.EnsembleMLP(models, WIDE, [7 + j], outputs, dtype=dtype, **options) for j in range(components)
    ]


def rows(batch=B, outputs=K, dtype=None):
    return torch.randn(batch, WIDE, dtype=dtype), torch.randint(outputs, (batch,))


def plain_outputs(model, x):
    """[M, J, B, K] of plain modules, for autograd in float64."""
    return torch.stack(
        [
            torch.stack([_plain(component, m, x) for component in model.components])
            for m in range(model.ensemble_size)
        ]
    )


def _plain(component, m, x):
    weights, biases = component.stacked()
    hidden = torch.relu(F.linear(x, weights[0][m], biases[0][m]))
    return F.linear(hidden, weights[1][m], biases[1][m])


@pytest.mark.parametrize("on", ["logit", "probability"])
@pytest.mark.parametrize("kind", ["correlation", "covariance", "residue"])
def test_the_loss_is_that_of_its_formula(kind, on):
    strength = torch.tensor([0.0, 0.3, 2.0], dtype=torch.float64)
    model = ComponentModels(towers(dtype=torch.float64), strength=strength, decorrelation=kind, on=on)
    x, y = rows(dtype=torch.float64)
    terms = model.loss_terms(x, y, loss="cross_entropy")
    model.loss(x, y, loss="cross_entropy").sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    z = plain_outputs(model, x)
    label = torch.stack([sum(F.cross_entropy(z[m, j], y) for j in range(J)) for m in range(M)])
    signal = (z if on == "logit" else z.softmax(-1)).movedim(-1, 1)  # [M, K, J, B]
    if kind == "covariance":
        signal = signal - signal.mean(-1, keepdim=True)
    if kind == "residue":
        signal = signal - signal.mean(-2, keepdim=True)
    products = signal @ signal.mT / B
    pushed = products.tril(-1).square().sum((-1, -2, -3))
    torch.testing.assert_close(terms["label"], label)
    torch.testing.assert_close(terms["decorrelation"], strength * pushed)
    (label + strength * pushed).sum().backward()
    for own, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(own, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_model_gives_the_bits_that_it_gives_alone():
    x, y = rows(200)
    seeds, strength = [5, 6, 7], [0.0, 0.2, 1.0]
    arguments = {
        "loss": "cross_entropy",
        "epochs": 3,
        "batch_size": 32,
        "optimizer": lambda p: pyens.optim.fused(torch.optim.Adagrad, p, lr=0.02),
        "progress": False,
    }

    def build(chosen):
        model = ComponentModels(
            towers(len(chosen), dropout=0.1),
            strength=[strength[m] for m in chosen],
            gate=pyens.EnsembleLinear(len(chosen), WIDE, J),
        )
        model.reset_parameters([seeds[m] for m in chosen])
        return model

    together = build([0, 1, 2])
    fit(together, (x, y), seeds=seeds, **arguments)
    for m in range(3):
        alone = build([m])
        fit(alone, (x, y), seeds=[seeds[m]], **arguments)
        for own, of_all in zip(alone.parameters(), together.parameters(), strict=True):
            assert torch.equal(own[0], of_all[m])
        assert torch.equal(alone.eval()(x)[0], together.eval()(x)[m])


@pytest.mark.parametrize(
    ("loss", "outputs"), [("bce", 1), ("bce", 3), ("gaussian_nll", 2), ("poisson_nll", 1), ("mse", 3)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_bit_of_a_gradient_is_the_others_doing(loss, outputs, weighted):
    # 7 rows: the members' numbers end within a vector.
    z = 3 * torch.randn(5, 7, outputs, requires_grad=True)
    y = torch.rand(5, 7, outputs // 2 if loss == "gaussian_nll" else outputs)
    weight = torch.rand(5, 7) if weighted else None

    class Outputs(pyens.nn.Ensemble):
        ensemble_size = 5
        forward = staticmethod(lambda z: z)

    model = Outputs()
    (whole,) = torch.autograd.grad(model.loss(z, y, loss=loss, sample_weight=weight).sum(), z)
    model.ensemble_size = 1
    for m in range(5):
        own = z[m : m + 1].detach().requires_grad_()
        losses = model.loss(
            own, y[m : m + 1], loss=loss, sample_weight=None if weight is None else weight[m : m + 1]
        )
        (gradient,) = torch.autograd.grad(losses.sum(), own)
        assert torch.equal(gradient[0], whole[m])
    exact = z.detach().double().requires_grad_()
    expected = pyens.reference.ensemble_mlp_loss(
        exact,
        y.double(),
        [torch.eye(outputs).double().expand(5, -1, -1)],
        loss=loss,
        sample_weight=None if weight is None else weight.double(),
    )
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(whole.double(), gradient, rtol=1e-5, atol=1e-7)


def test_one_initialisation_for_all_models():
    model = ComponentModels(towers())
    model.reset_parameters([3] * M)
    for parameter in model.parameters():
        assert all(torch.equal(parameter[0], parameter[m]) for m in range(M))
    first, second = model.components[0].weights[0][0], model.components[1].weights[0][0]
    assert not torch.equal(first, second[:7])  # the components go on from one generator


def test_history_keeps_the_terms_apart(tmp_path):
    x, y = rows(100)
    model = ComponentModels(towers(), strength=0.5, gate=pyens.EnsembleLinear(M, WIDE, J))
    history = fit(
        model,
        (x, y),
        loss="cross_entropy",
        epochs=2,
        batch_size=20,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
        validation=0.2,
        metrics=["accuracy", "nll"],
        progress=False,
    )
    for part in ("train", "validation"):
        names = [f"{part}_{term}" for term in ("label", "decorrelation", "gate")]
        total = sum(history.terms[name] for name in names)
        assert total == pytest.approx(getattr(history, f"{part}_loss"), rel=1e-6)
    assert history.terms["train_decorrelation"].shape == (2, M)
    assert (history.terms["train_decorrelation"] > 0).all()
    history.to_csv(tmp_path / "history.csv")
    header = (tmp_path / "history.csv").read_text().splitlines()[0]
    assert "train_label" in header and "validation_gate" in header and "nll" in header
    assert history.member(1).terms["train_label"].shape == (2, 1)


def test_a_penalty_is_a_term_too():
    x, y = rows(60)
    seen = []
    history = fit(
        pyens.EnsembleMLP(M, WIDE, [8], K),
        (x, y),
        loss="cross_entropy",
        epochs=2,
        batch_size=20,
        micro_batch_size=7,
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-2),
        penalty=lambda output: output.square().mean((1, 2)),
        callbacks=[lambda progress: seen.append(progress.terms)],
        progress=False,
    )
    total = history.terms["train_loss"] + history.terms["train_penalty"]
    assert total == pytest.approx(history.train_loss, rel=1e-6)
    assert seen[1]["train_penalty"] == pytest.approx(history.terms["train_penalty"][1])


def test_resumed_as_if_it_had_never_stopped(tmp_path):
    x, y = rows(120)

    def run(epochs, file):
        model = ComponentModels(
            towers(), strength=0.4, decorrelation=losses.RunningDecorrelationLoss(J, K, M, momentum=0.3)
        )
        model.reset_parameters([1, 2, 3])
        history = fit(
            model,
            (x, y),
            loss="cross_entropy",
            epochs=epochs,
            batch_size=25,
            optimizer=lambda p: torch.optim.Adagrad(p, lr=0.05),
            validation=0.2,
            checkpoint=file,
            progress=False,
        )
        return model, history

    whole, history = run(4, tmp_path / "whole.pt")
    run(2, tmp_path / "parts.pt")
    resumed, again = run(4, tmp_path / "parts.pt")
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for name, values in history.terms.items():
        assert values == pytest.approx(again.terms[name], abs=0)


def test_models_stop_early_each_on_its_own():
    x, y = rows(120)
    model = ComponentModels(towers(), strength=[0.0, 0.1, 0.2], gate=pyens.EnsembleLinear(M, WIDE, J))
    model.reset_parameters([1, 2, 3])
    history = fit(
        model,
        (x, y),
        loss="cross_entropy",
        epochs=60,
        batch_size=16,
        optimizer=lambda p: torch.optim.Adam(p, lr=3e-2),
        validation=0.3,
        early_stopping=2,
        seeds=[1, 2, 3],
        progress=False,
    )
    assert set(history.status) == {"stopped"} and len(set(history.epochs)) > 1
    assert model.ensemble_size == M and model.strength.tolist() == pytest.approx([0.0, 0.1, 0.2])
    assert model(x).shape == (M, 120, K)


def test_nothing_learns_from_the_combined_output_but_the_gate():
    x, y = rows()
    parts = towers()
    without = ComponentModels(parts, strength=0.3)
    without.loss(x, y, loss="cross_entropy").sum().backward()
    alone = [p.grad.clone() for p in without.parameters()]
    without.zero_grad()
    gate = pyens.EnsembleLinear(M, WIDE, J)
    gated = ComponentModels(parts, strength=0.3, gate=gate)
    gated.loss(x, y, loss="cross_entropy").sum().backward()
    assert all(torch.equal(p.grad, own) for p, own in zip(without.parameters(), alone, strict=True))
    assert gate.weight.grad.abs().max() > 0
    weights = gate(x).softmax(-1).movedim(-1, 1)
    for space in ("probability", "logit"):
        gated.average = space
        torch.testing.assert_close(gated(x), losses.combine(gated.outputs(x), weights, space=space))
    gated.average = "probability"
    direct = torch.stack([F.cross_entropy(output, y) for output in gated(x)])
    torch.testing.assert_close(gated.loss_terms(x, y, loss="cross_entropy")["gate"], direct)


def test_a_gate_finds_the_better_component():
    x = torch.randn(400, WIDE)
    y = (x[:, 0] > 0).long()
    model = ComponentModels(towers(outputs=2), strength=None, gate=pyens.EnsembleLinear(M, WIDE, J))
    with torch.no_grad():  # one component that cannot know
        for parameter in model.components[1].parameters():
            parameter.zero_()
    optimizer = [model.components[0], model.gate]
    history = fit(
        model,
        (x, y),
        loss="cross_entropy",
        epochs=30,
        batch_size=50,
        optimizer=lambda _: torch.optim.Adam([p for m in optimizer for p in m.parameters()], lr=3e-2),
        metrics=["accuracy"],
        validation=0.25,
        progress=False,
    )
    assert history.metrics["accuracy"][-1].min() > 0.85
    assert model.gate(x).softmax(-1)[..., 0].mean() > 0.8


def test_binary_outputs_are_combined_as_one_logit():
    z = torch.randn(M, J, B, 1, dtype=torch.float64)
    weights = torch.rand(M, J, B, dtype=torch.float64).softmax(1)
    for given in (None, weights):
        even = torch.full((M, J, B), 1 / J, dtype=torch.float64) if given is None else given
        found = losses.combine(z, given).sigmoid().squeeze(-1)
        torch.testing.assert_close(found, (even * z.sigmoid().squeeze(-1)).sum(1))
    torch.testing.assert_close(losses.combine(z)[0].squeeze(-1), losses.combine(z[0].squeeze(-1)))


@pytest.mark.parametrize("on", ["logit", "probability"])
def test_of_one_output(on):
    model = ComponentModels(towers(outputs=1), strength=0.7, on=on)
    x, y = torch.randn(B, WIDE), torch.randint(2, (B, 1)).float()
    terms = model.loss_terms(x, y, loss="bce")
    z = plain_outputs(model, x)
    label = torch.stack([sum(F.binary_cross_entropy_with_logits(o, y) for o in of_one) for of_one in z])
    signal = z if on == "logit" else z.sigmoid()
    torch.testing.assert_close(terms["label"], label)
    torch.testing.assert_close(terms["decorrelation"], 0.7 * losses.decorrelation_loss(signal))


@pytest.mark.parametrize(
    "push",
    [
        functools.partial(losses.difference_loss, inverse=True),
        losses.pearson_decorrelation_loss,
        losses.cross_entropy_difference_loss,
        losses.gram_schmidt_decorrelation_loss,
    ],
)
def test_any_loss_of_the_components(push):
    model = ComponentModels(towers(components=3), strength=0.7, decorrelation=push)
    x, y = rows()
    terms = model.loss_terms(x, y, loss="cross_entropy")
    torch.testing.assert_close(terms["decorrelation"], 0.7 * push(model.outputs(x)))
    assert terms["decorrelation"].shape == (M,)


def test_a_loss_that_is_a_function():
    x, y = rows(100)
    model = ComponentModels(towers(), strength=0.2, average="probability")

    def of_rows(output, target):
        target = target.expand(output.shape[:2]).flatten()  # [B], or each model's own
        losses = F.cross_entropy(output.flatten(0, 1), target, reduction="none")
        return losses.view(output.shape[:2])

    weight = torch.rand(100)
    for given in (None, weight):
        named = model.loss(x, y, loss="cross_entropy", sample_weight=given)
        torch.testing.assert_close(model.loss(x, y, loss=of_rows, sample_weight=given), named)
    history = fit(
        model,
        (x, y),
        loss=of_rows,
        epochs=2,
        batch_size=20,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        progress=False,
    )
    assert history.train_loss[1].mean() < history.train_loss[0].mean()


def test_rows_that_weigh_nothing_are_left_out_of_all_terms():
    model = ComponentModels(towers(), strength=0.5, gate=pyens.EnsembleLinear(M, WIDE, J))
    x, y = rows()
    weight = (torch.arange(B) % 3 != 0).float()
    some = weight > 0
    few = model.loss_terms(x[some], y[some], loss="cross_entropy")
    x[~some] = torch.nan
    for given in (weight, weight.expand(M, B)):
        found = model.loss_terms(x, y, loss="cross_entropy", sample_weight=given)
        for name, term in few.items():
            torch.testing.assert_close(found[name], term)


def test_components_with_rows_of_their_own():
    def rows_of(x):
        return torch.stack([x[..., 0] > -1, x[..., 0] < 1], -1)

    model = ComponentModels(towers(), strength=0.5, rows_of=rows_of)
    x, y = rows()
    found = model.loss_terms(x, y, loss="cross_entropy")
    z = plain_outputs(model, x)
    own = rows_of(x)
    parts = [
        [F.cross_entropy(o[j][own[:, j]], y[own[:, j]], reduction="sum") / B for j in range(J)] for o in z
    ]
    torch.testing.assert_close(found["label"], torch.tensor(parts).sum(-1))
    both = own.all(-1)
    assert 0 < both.sum() < B
    torch.testing.assert_close(
        found["decorrelation"], 0.5 * losses.decorrelation_loss(z[:, :, both].contiguous())
    )
    # Models with data of their own.
    batches = torch.stack([x, x.flip(0), x.roll(3, 0)])
    targets = torch.stack([y, y.flip(0), y.roll(3, 0)])
    again = model.loss_terms(batches, targets, loss="cross_entropy")
    for name, term in found.items():
        torch.testing.assert_close(again[name], term)


def test_what_stands_beside_is_not_decorrelated():
    x, y = rows()
    deep, linear = towers(), [pyens.EnsembleLinear(M, WIDE, K) for _ in range(J)]
    for beside in (linear, linear[0]):
        model = ComponentModels(deep, strength=0.5, beside=beside)
        found = model.loss_terms(x, y, loss="cross_entropy")
        z = plain_outputs(model, x)
        parts = linear if beside is linear else [linear[0]] * J
        whole = z + torch.stack([part(x) for part in parts], 1)
        torch.testing.assert_close(model.outputs(x), whole)
        torch.testing.assert_close(found["decorrelation"], 0.5 * losses.decorrelation_loss(z.contiguous()))
        label = torch.stack([sum(F.cross_entropy(o[j], y) for j in range(J)) for o in whole])
        torch.testing.assert_close(found["label"], label)


def tabular(sizes=((9, 3), (4, 2)), hidden=(6,)):
    return TabularEnsemble(M, list(sizes), 2, list(hidden), 1)


@pytest.mark.parametrize("columns", [True, [1]])
def test_shared_tables(columns):
    model = ComponentModels([tabular(), tabular(hidden=(8, 4))], shared_tables=columns)
    shared = [0, 1] if columns is True else columns
    for column in range(2):
        tables = [component.embeddings[column].weight for component in model.components]
        assert (tables[0] is tables[1]) == (column in shared)
    own = sum(p.numel() for part in (tabular(), tabular(hidden=(8, 4))) for p in part.parameters())
    size = sum(M * a * b for column, (a, b) in enumerate([(9, 3), (4, 2)]) if column in shared)
    assert sum(p.numel() for p in model.parameters()) == own - size
    categorical = torch.stack([torch.randint(9, (B,)), torch.randint(4, (B,))], 1)
    numeric, y = torch.randn(B, 2), torch.randint(2, (B, 1)).float()
    history = fit(
        model,
        (categorical, numeric, y),
        loss="bce",
        epochs=3,
        batch_size=6,
        optimizer=lambda p: torch.optim.Adagrad(p, lr=0.1),
        validation=0.25,
        early_stopping=1,
        progress=False,
    )
    assert len(history.train_loss) >= 1
    chosen = model.select([2, 0])
    tables = [component.embeddings[1].weight for component in chosen.components]
    assert tables[0] is tables[1] and torch.equal(tables[0], model.components[0].embeddings[1].weight[[2, 0]])
    assert torch.equal(chosen(categorical, numeric), model(categorical, numeric)[[2, 0]])


def test_components_with_optimizers_of_their_own():
    x, y = rows(80)
    model = ComponentModels(towers(), strength=0.1)
    before = [p.detach().clone() for p in model.components[1].parameters()]

    def optimizers(_):
        first, second = (list(part.parameters()) for part in model.components)
        return [torch.optim.Adam(first, lr=1e-2), torch.optim.SGD(second, lr=0.0)]

    fit(model, (x, y), loss="cross_entropy", epochs=2, batch_size=20, optimizer=optimizers, progress=False)
    assert all(torch.equal(p, was) for p, was in zip(model.components[1].parameters(), before, strict=True))


def test_without_decorrelation_components_are_what_they_are_alone():
    x, y = rows(90)
    parts = towers()
    arguments = {
        "loss": "cross_entropy",
        "epochs": 2,
        "batch_size": 30,
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
        "seeds": [4, 5, 6],
        "validation": 0.0,
        "progress": False,
    }
    copies = [part.select(slice(None)) for part in parts]
    fit(ComponentModels(parts, strength=None), (x, y), **arguments)
    for part, alone in zip(parts, copies, strict=True):
        fit(alone, (x, y), **arguments)
        for own, other in zip(part.parameters(), alone.parameters(), strict=True):
            assert torch.equal(own, other)


def test_decorrelation_lowers_the_correlation():
    torch.manual_seed(0)
    x = torch.randn(600, WIDE)
    y = (x[:, :2].sum(-1) > 0).long()

    def correlation(strength):
        model = ComponentModels(towers(outputs=2), strength=strength)
        model.reset_parameters([1, 2, 3])
        fit(
            model,
            (x, y),
            loss="cross_entropy",
            epochs=20,
            batch_size=100,
            optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
            seeds=[1, 2, 3],
            progress=False,
        )
        return losses.decorrelation_loss(model.outputs(x)).mean().item(), (model(x).argmax(-1) == y)

    plain, _ = correlation(0.0)
    pushed, right = correlation(0.3)
    assert pushed < 0.2 * plain and right.float().mean() > 0.9


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: ComponentModels([]), "components: expected at least one, got none"),
        (lambda: ComponentModels(towers()[0]), "components: expected a list of ensembles, got a EnsembleMLP"),
        (lambda: ComponentModels([torch.nn.Linear(2, 2)]), r"components\[0\]: expected an Ensemble"),
        (
            lambda: ComponentModels([*towers(), *towers(2)]),
            r"components\[2\]: expected the 3 models of components\[0\], got 2",
        ),
        (lambda: ComponentModels(towers(), strength=-0.1), r"strength: expected finite numbers from 0"),
        (lambda: ComponentModels(towers(), strength=float("nan")), "strength: expected finite numbers"),
        (lambda: ComponentModels(towers(), strength=[1, 2]), r"strength: expected one number, or one for"),
        (lambda: ComponentModels(towers(), strength="1"), "strength: expected a number"),
        (lambda: ComponentModels(towers(), on="logits"), "on: expected one of probability, logit"),
        (lambda: ComponentModels(towers(), average="mean"), "average: expected one of"),
        (lambda: ComponentModels(towers(), decorrelation="correlate"), "decorrelation: expected one of"),
        (lambda: ComponentModels(towers(), rows_of=3), "rows_of: expected a function"),
        (
            lambda: ComponentModels(towers(), gate=pyens.EnsembleLinear(M, WIDE, 3)),
            "gate: expected an output for each of 2 components, got 3",
        ),
        (
            lambda: ComponentModels(towers(), gate=pyens.EnsembleLinear(2, WIDE, J)),
            r"gate: expected the 3 models of components\[0\], got 2",
        ),
        (
            lambda: ComponentModels(towers(), beside=[pyens.EnsembleLinear(M, WIDE, K)]),
            "beside: expected one ensemble, or one for each of 2 components, got 1",
        ),
        (lambda: ComponentModels(towers(), shared_tables=True), "expected components that are TabularEnsem"),
        (
            lambda: ComponentModels([tabular(), tabular(((9, 3), (5, 2)))], shared_tables=[1]),
            r"expected tables of one size and kind, 4 x 2 .* in column 1, got 5 x 2 .* in components\[1\]",
        ),
        (
            lambda: ComponentModels([tabular(), tabular()], shared_tables=[2]),
            "expected columns from 0 to 1, got 2",
        ),
    ],
)
def test_what_is_refused(build, error):
    with pytest.raises((TypeError, ValueError), match=error):
        build()


def test_batches_that_are_refused():
    model = ComponentModels(towers(), strength=0.1)
    x, y = rows()
    with pytest.raises(ValueError, match="expected 2 or more rows in training"):
        model.loss(x[:1], y[:1], loss="cross_entropy")
    assert model.eval().loss(x[:1], y[:1], loss="cross_entropy").shape == (M,)
    arguments = {"loss": "cross_entropy", "epochs": 1, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    with pytest.raises(ValueError, match="2 or more rows for ComponentModels, got one of 1 row"):
        fit(model, (x, y), batch_size=B - 1, validation=0.0, **arguments)
    with pytest.raises(ValueError, match="penalty: expected None for a ComponentModels"):
        fit(model, (x, y), batch_size=8, penalty=lambda z: z.sum(), **arguments)
    with pytest.raises(ValueError, match="average: expected 'logit' with loss mse"):
        model.loss(x, torch.randn(B, K), loss="mse")
    with pytest.raises(ValueError, match="average: expected 'logit' with loss bce of several columns"):
        model.loss(x, torch.rand(B, K), loss="bce")
    model.average = "logit"
    target = torch.randn(B, K)
    label = sum(part.loss(x, target, loss="mse") for part in model.components)
    torch.testing.assert_close(model.loss_terms(x, target, loss="mse")["label"], label)
    with pytest.raises(ValueError, match="reduction: expected mean"):
        model.loss(x, y, loss="cross_entropy", reduction="none")
    with pytest.raises(TypeError, match="unknown: expected an option of a loss"):
        model.loss(x, y, loss="cross_entropy", unknown=1)
    with pytest.raises(ValueError, match=r"outputs .* like those of components"):
        ComponentModels([*towers(1), *towers(1, outputs=K + 1)])(x)
    with pytest.raises(
        ValueError, match=r"rows_of .*: expected \[24, 2\] or \[3, 24, 2\], got shape \[24, 1\]"
    ):
        ComponentModels(towers(), rows_of=lambda x: x[:, :1]).loss(x, y, loss="cross_entropy")
    with pytest.raises(ValueError, match=r"decorrelation: expected \[3\] of outputs"):
        ComponentModels(towers(), decorrelation=lambda z: z.sum()).loss(x, y, loss="cross_entropy")


def test_initialised_by_rules_of_torch():
    model = ComponentModels([tabular(), tabular(hidden=(8, 4))], shared_tables=[1])
    seeds = [11, 12, 13]
    ones = functools.partial(torch.nn.init.constant_, val=1.0)
    initialize_(
        model,
        torch.nn.init.xavier_uniform_,
        bias=torch.nn.init.zeros_,
        table=ones,
        input_variance=4.0,
        seeds=seeds,
    )
    for component in model.components:
        assert all((embedding.weight == 2).all() for embedding in component.embeddings)
        weights, biases = component.stacked()
        assert all((bias == 0).all() for bias in biases)
        for weight in weights:  # uniform to ±√(6 / (in + out)), not scaled: there are tables
            bound = (6 / sum(weight.shape[1:])) ** 0.5
            assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(
                bound / 3**0.5, rel=0.5
            )
    before = [p.detach().clone() for p in model.parameters()]
    alone = initialize_(
        model.select([2]),
        torch.nn.init.xavier_uniform_,
        bias=torch.nn.init.zeros_,
        table=ones,
        input_variance=4.0,
        seeds=[13],
    )
    assert all(torch.equal(p[0], was[2]) for p, was in zip(alone.parameters(), before, strict=True))


def test_the_variance_of_the_inputs():
    plain, scaled = towers(norm="layer_norm"), towers(norm="layer_norm")
    initialize_(ComponentModels(plain), seeds=[1, 2, 3])
    initialize_(ComponentModels(scaled), input_variance=9.0, seeds=[1, 2, 3])
    for one, other in zip(plain, scaled, strict=True):
        (first, *rest), (wide, *same) = list(one.parameters()), list(other.parameters())
        torch.testing.assert_close(wide, 3 * first)
        assert all(torch.equal(a, b) for a, b in zip(rest, same, strict=True))
    model = ComponentModels(towers())
    model.reset_parameters([1, 2, 3])
    drawn = [p.detach().clone() for p in model.parameters()]
    initialize_(model, seeds=[1, 2, 3])
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), drawn, strict=True))
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="input_variance: expected a positive number"):
            initialize_(model, input_variance=wrong)
    with pytest.raises(TypeError, match="weight: expected a function, got a str"):
        initialize_(model, "xavier")
    with pytest.raises(ValueError, match="seeds: expected one for each of the 3 members, got 2"):
        initialize_(model, seeds=[1, 2])
    conv = initialize_(pyens.nn.EnsembleConv2d(M, 1, 2, 3), torch.nn.init.ones_, input_variance=4.0)
    assert (conv.weight == 2).all()


@pytest.mark.parametrize("weighted", [None, "rows", "models", "classes"])
def test_parts_of_a_batch_add_up(weighted):
    # All but the decorrelation, which is of a part.
    torch.manual_seed(0)
    x, y = torch.randn(16, WIDE, dtype=torch.float64), torch.randint(K, (16,)).sort().values
    weight = {"rows": torch.linspace(0, 3, 16), "models": torch.rand(M, 16)}.get(weighted)
    options = {"class_weight": torch.tensor([0.1, 1, 5, 9.0])} if weighted == "classes" else {}

    def gradients(size, **more):
        gate = pyens.EnsembleMLP(M, WIDE, [4], J, dtype=torch.float64)
        model = ComponentModels(towers(dtype=torch.float64), strength=None, gate=gate, **more)
        model.reset_parameters([1, 2, 3])
        trainer = Trainer(
            model,
            loss="cross_entropy",
            optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
            micro_batch_size=size,
            **({} if more else options),
        )
        trainer.step(x, y, sample_weight=None if weight is None else weight.double())
        return [p.grad for p in model.parameters()], trainer.terms

    rows_of = functools.partial(_halves)
    for more in ({}, {"rows_of": rows_of}):
        (whole, terms), (parts, of_parts) = gradients(None, **more), gradients(6, **more)
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(one, other)
        for name in terms:
            torch.testing.assert_close(terms[name], of_parts[name])


def _halves(x):
    return torch.stack([x[..., 0] > 0, x[..., 0] < 0.5], -1)


def test_rows_of_a_component_do_not_depend_on_how_validation_is_cut():
    x, y = rows(48)
    found = []
    for size in (5, 48):
        model = ComponentModels(towers(), strength=None, rows_of=_halves)
        model.reset_parameters([1, 2, 3])
        history = fit(
            model,
            (x, y),
            loss="cross_entropy",
            epochs=1,
            batch_size=size,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
            validation=(x, y),
            progress=False,
        )
        found.append(history.validation_loss[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    # Weights of each model: what is asked is given the inputs as they are.
    model.loss(x, y, loss="cross_entropy", sample_weight=torch.rand(M, 48))


@pytest.mark.parametrize("kind", ["correlation", "covariance", "residue"])
def test_no_strength_is_no_gradient_however_large_the_outputs(kind):
    parts = towers()
    with torch.no_grad():
        for part in parts:
            part.weights[1].mul_(1e25)
    x, y = rows()
    model = ComponentModels(parts, strength=[0.0, 0.0, 1e-3], decorrelation=kind)
    model.loss(x, y, loss="cross_entropy").sum().backward()
    assert all(p.grad[:2].isfinite().all() for p in model.parameters())


def test_bits_of_a_probability_that_is_pushed_are_no_others_doing():
    def gradients(seeds):
        model = ComponentModels(towers(len(seeds), outputs=1), strength=1.0, on="probability")
        model.reset_parameters(seeds)
        model.loss(x, y, loss="bce").sum().backward()
        return [p.grad[0] for p in model.parameters()]

    for seed in range(40):
        x, y = 3 * torch.randn(7, WIDE), torch.rand(7, 1)
        for one, other in zip(gradients([seed]), gradients([seed, 1, 2]), strict=True):
            assert torch.equal(one, other)


def test_a_strength_that_becomes_no_strength_is_refused():
    model = ComponentModels(towers(), strength=0.1)
    x, y = rows()
    for wrong in (-1.0, float("nan"), float("inf")):
        model.strength[1] = wrong
        with pytest.raises(ValueError, match="strength: expected finite numbers from 0"):
            model.loss(x, y, loss="cross_entropy")
    model.strength = torch.tensor([0.1])
    with pytest.raises(ValueError, match=r"strength: expected \[3\], got shape \[1\]"):
        model.loss(x, y, loss="cross_entropy")
    for too_much, dtype in ((1e39, torch.float32), (1e-9, torch.float16)):
        with pytest.raises(ValueError, match=f"numbers from 0 that {dtype} has"):
            ComponentModels(towers(dtype=dtype), strength=too_much)


def test_a_run_of_other_strengths_is_another_run(tmp_path):
    x, y = rows(60)
    arguments = {
        "loss": "cross_entropy",
        "batch_size": 20,
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
        "checkpoint": tmp_path / "run.pt",
        "randomness": Randomness(init=True),
        "progress": False,
    }
    fit(ComponentModels(towers(), strength=[0.0, 0.5, 0.5]), (x, y), epochs=1, **arguments)
    with pytest.raises(ValueError, match=r"another run: expected .*strength=\[0.5, 0.0, 0.0\]"):
        fit(ComponentModels(towers(), strength=[0.5, 0.0, 0.0]), (x, y), epochs=2, **arguments)
    push = functools.partial(losses.difference_loss, inverse=True)
    arguments["checkpoint"] = tmp_path / "push.pt"
    fit(ComponentModels(towers(), decorrelation=push), (x, y), epochs=1, **arguments)
    push = functools.partial(losses.difference_loss, inverse=True, eps=0.5)
    with pytest.raises(ValueError, match="another run"):
        fit(ComponentModels(towers(), decorrelation=push), (x, y), epochs=2, **arguments)


def test_a_running_estimate_begins_anew_with_the_weights():
    x, y = rows(40)
    model = ComponentModels(
        towers(), strength=1.0, decorrelation=losses.RunningDecorrelationLoss(J, K, M, momentum=0.3)
    )
    found = []
    for _ in range(2):
        fit(
            model,
            (x, y),
            loss="cross_entropy",
            epochs=2,
            batch_size=8,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            randomness=Randomness(init=True),
            validation=0.0,
            progress=False,
        )
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    estimate = model.decorrelation.estimate.clone()
    wild = torch.randn(M, J, B, K)
    wild[1, 0, 0, 0] = torch.inf
    model.decorrelation.train()(wild)
    assert torch.equal(model.decorrelation.estimate[1], estimate[1])
    assert not torch.equal(model.decorrelation.estimate[0], estimate[0])
    with pytest.raises(ValueError, match="expected a name or a function beside weights of each model"):
        model.loss(x, y, loss="cross_entropy", sample_weight=torch.ones(M, 40))


def test_a_refused_model_leaves_its_components_alone():
    one, other = tabular(), tabular(((9, 3), (5, 2)))
    before = list(other.embeddings)
    with pytest.raises(ValueError, match="tables of one size"):
        ComponentModels([one, other], shared_tables=True)
    assert all(a is b for a, b in zip(before, other.embeddings, strict=True))
    for wrong, error in (
        ([True, False], "expected columns from 0 to 1, got True"),
        (None, "expected a bool or a list of columns, got a NoneType"),
        (1, "expected a bool or a list of columns, got a int"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            ComponentModels([tabular(), tabular()], shared_tables=wrong)
    sparse = TabularEnsemble(M, [(9, 3), (4, 2)], 2, [6], 1, sparse=True)
    with pytest.raises(ValueError, match=r"one size and kind, 9 x 3 of torch.float32 .* got 9 x 3 of sparse"):
        ComponentModels([tabular(), sparse], shared_tables=[0])


def test_what_a_loss_may_be():
    model = ComponentModels(towers(outputs=1), strength=0.1)
    x, y = torch.randn(B, WIDE), torch.randn(B, 1)
    with pytest.raises(ValueError, match="average: expected 'logit' or 'probability' beside a loss that is"):
        model.loss(x, y, loss=lambda output, target: (output - target).square().mean(-1))
    for wrong in (None, ["bce"]):
        with pytest.raises(TypeError, match="loss: expected a name or a function, got a"):
            model.loss(x, y, loss=wrong)
    with pytest.raises(ValueError, match="average: expected 'logit' with loss bce of several columns"):
        ComponentModels(towers(), strength=None).loss(x, torch.rand(B, K), loss="bce")
    with pytest.raises(ValueError, match="temperature: expected 1 with ComponentModels that average in prob"):
        ComponentModels(towers()).loss(x, torch.randint(K, (B,)), loss="cross_entropy", temperature=2.0)
    with pytest.raises(ValueError, match=r"sample_weight: expected \[24\] or \[3, 24\], got shape \[2, 24\]"):
        model.loss(x, y.clamp(0, 1), loss="bce", sample_weight=torch.ones(2, B))
    with pytest.raises(TypeError, match="beside: expected an ensemble, or a list of them, got a int"):
        ComponentModels(towers(), beside=3)
    for wrong in (-torch.ones(B, J), torch.full((B, J), torch.nan)):
        with pytest.raises(ValueError, match=r"rows_of .*: expected finite weights of at least 0"):
            ComponentModels(towers(), rows_of=lambda x, w=wrong: w).loss(
                x, torch.randint(K, (B,)), loss="cross_entropy"
            )


def test_terms_of_a_users_class_are_looked_at():
    class Own(pyens.EnsembleMLP):
        term = torch.zeros(())

        def loss_terms(self, *batch, **options):
            return {"loss": self.loss(*batch, **options), "more": type(self).term}

    x, y = rows(40)
    for wrong, got in ((torch.zeros(()), r"shape \[\]"), (torch.zeros(1), r"shape \[1\]"), (0.5, "a float")):
        Own.term = wrong
        with pytest.raises(
            ValueError, match=rf"expected terms \[3\] from Own.loss_terms, got {got} as 'more'"
        ):
            fit(
                Own(M, WIDE, [6], K),
                (x, y),
                loss="cross_entropy",
                epochs=1,
                batch_size=8,
                optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
                progress=False,
            )


def test_a_penalty_does_not_hide_a_target_of_another_shape():
    with pytest.raises(ValueError, match="target: expected shape"):
        fit(
            pyens.EnsembleMLP(M, WIDE, [4], 3),
            (torch.randn(24, WIDE), torch.randn(24, 1)),
            loss="mse",
            epochs=1,
            batch_size=8,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            penalty=lambda output: output.square().mean((1, 2)),
            progress=False,
        )


def test_functions_without_a_generator_draw_from_the_seeds_too():
    model = ComponentModels(towers())
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        initialize_(model, lambda t: torch.nn.init.normal_(t, std=0.1), seeds=[1, 2, 3])
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    class Wrapped(pyens.nn.Ensemble):
        def __init__(self):
            super().__init__()
            self.ensemble_size = M
            self.norm_head = pyens.EnsembleLinear(M, WIDE, WIDE)
            self.models = ComponentModels(towers())

    wrapped = initialize_(Wrapped(), torch.nn.init.ones_, input_variance=4.0)
    assert (wrapped.norm_head.weight == 2).all()
    for part in wrapped.models.components:
        assert (part.weights[0] == 2).all() and (part.weights[1] == 1).all()


def test_left_out_components_may_be_anything():
    z = torch.randn(J, B, K)
    z[1] = torch.nan
    weights = torch.tensor([1.0, 0.0])
    for space in ("probability", "logit"):
        found = losses.combine(z, weights, space=space)
        torch.testing.assert_close(found.softmax(-1), z[0].softmax(-1))


def test_a_checkpoint_from_before_there_were_terms(tmp_path):
    x, y = rows(60)
    file = tmp_path / "run.pt"

    def run(epochs):
        model = pyens.EnsembleMLP(M, WIDE, [8], K, seeds=[1, 2, 3])
        history = fit(
            model,
            (x, y),
            loss="cross_entropy",
            epochs=epochs,
            batch_size=20,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            penalty=_squares,
            checkpoint=file,
            progress=False,
        )
        return history

    run(1)
    saved = _files.load(file)
    del saved["state"]["terms"]
    _files.save(saved, file)
    history = run(2)
    terms = history.terms["train_penalty"]
    assert terms.shape == (2, M) and (terms[0] != terms[0]).all() and (terms[1] > 0).all()


def _squares(output):
    return output.square().mean((1, 2))
