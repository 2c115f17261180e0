"""pyens.compress: scores, masks, pruning with retraining, sizes."""

import io
import itertools
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import pyens
from pyens import compress
from pyens.nn import (
    EnsembleConv2d,
    EnsembleEmbedding,
    EnsembleLinear,
    EnsembleMaxPool2d,
    EnsembleMLP,
    EnsembleSequential,
    Flatten,
)
from pyens.training import fit

E = 3


def network() -> EnsembleSequential:
    return EnsembleSequential(
        EnsembleConv2d(E, 1, 6, 3), nn.ReLU(), EnsembleMaxPool2d(2), Flatten(), EnsembleLinear(E, 54, 4)
    )


def images(n: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 1, 8, 8), torch.randint(4, (n,))


def rows(n: int = 120) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 7), torch.randint(4, (n,))


RUN = {"loss": "cross_entropy", "epochs": 2, "batch_size": 32, "validation": 0.2, "progress": False}


def adam(parameters):
    return pyens.optim.fused(torch.optim.Adam, parameters, lr=1e-2)


# --- masks -----------------------------------------------------------------------------------------------


@given(amount=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.77, 0.99]), width=st.integers(1, 30))
@pytest.mark.hypothesis
def test_a_layers_masks_are_those_of_torch(amount, width):
    model = EnsembleMLP(E, 5, [width, 7], 2)
    masks = compress.make_masks(compress.magnitude_scores(model), amount)
    for m in range(E):
        linears = [layer for layer in model.member(m) if isinstance(layer, nn.Linear)]
        for layer, name in zip(linears, masks, strict=True):
            count = round(amount * layer.weight.numel())
            if count > 0:
                prune.l1_unstructured(layer, "weight", count)
                assert torch.equal(masks[name][m], layer.weight_mask.bool())
            else:
                assert masks[name][m].all()


def test_global_masks_are_those_of_torch():
    model = network()
    masks = compress.make_masks(compress.magnitude_scores(model), 0.6, scope="global")
    for m in range(E):
        layers = [layer for layer in model.member(m) if isinstance(layer, (nn.Conv2d, nn.Linear))]
        prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.6)
        for layer, mask in zip(layers, masks.values(), strict=True):
            assert torch.equal(mask[m], layer.weight_mask.bool())
    assert masks["0.weight"].float().mean() != pytest.approx(0.4, abs=0.01)  # layers share it unevenly


def test_masks_only_shrink():
    model = EnsembleLinear(E, 20, 10)
    scores = compress.random_scores(model, [1, 2, 3])
    first = compress.make_masks(scores, 0.3)
    second = compress.make_masks(compress.magnitude_scores(model), 0.5, within=first)
    assert (second["weight"] <= first["weight"]).all()
    assert torch.equal(second["weight"].flatten(1).sum(1), torch.full((E,), 100))
    # What is cut counts as cut, whatever its score.
    same = compress.make_masks(scores, 0.3, within=first)
    assert torch.equal(same["weight"], first["weight"])
    zeros = {"weight": torch.zeros(E, 10, 20)}
    assert torch.equal(compress.make_masks(zeros, 0.3, within=first)["weight"], first["weight"])


def test_scores():
    model = EnsembleMLP(E, 7, [9], 4)
    x, y = rows()
    weights = compress.prunable_weights(model)
    assert list(weights) == ["weights.0", "weights.1"] and weights["weights.0"] is model.weights[0]
    snip = compress.snip_scores(model, x, y, loss="cross_entropy")
    assert all(p.grad is None for p in model.parameters())
    for m in range(E):
        member = model.member(m)
        nn.functional.cross_entropy(member(x), y).backward()
        for layer, score in zip((member[0], member[2]), snip.values(), strict=True):
            torch.testing.assert_close(score[m], (layer.weight * layer.weight.grad).abs().detach())
    random = compress.random_scores(model, [5, 6, 7])
    again = compress.random_scores(model.select([1]), [6])
    assert all(torch.equal(random[name][1:2], again[name]) for name in random)
    assert not torch.equal(random["weights.0"][0], random["weights.0"][1])


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), "half"])
def test_refuses_sparsities_that_are_none(sparsity):
    model = EnsembleLinear(E, 4, 2)
    scores = compress.magnitude_scores(model)
    for call in (
        lambda: compress.make_masks(scores, sparsity),
        lambda: compress.polynomial_schedule(sparsity, 3),
        lambda: compress.iterative_pruning(model, rows(), sparsity=[sparsity], optimizer=adam, **RUN),
    ):
        with pytest.raises(
            (ValueError, TypeError), match=r"sparsity: expected from 0 to less than 1|could not"
        ):
            call()


def test_refuses_masks_that_do_not_fit():
    model = EnsembleLinear(E, 4, 2)
    masks = compress.masks_of(model)
    with pytest.raises(ValueError, match="apply_masks: masks: expected one of weight, got those of nothing"):
        compress.apply_masks(model, {})
    with pytest.raises(ValueError, match=r"expected shape \[3, 2, 4\], got \[2, 2, 4\]"):
        compress.apply_masks(model, {"weight": masks["weight"][:2]})
    with pytest.raises(TypeError, match=r"expected bool, got torch.float32"):
        compress.apply_masks(model, {"weight": masks["weight"].float()})
    with pytest.raises(ValueError, match='scope: expected "layer" or "global"'):
        compress.make_masks(compress.magnitude_scores(model), 0.5, scope="all")
    with pytest.raises(ValueError, match="scores: expected numbers, got NaN in weight"):
        compress.make_masks({"weight": torch.full((E, 2, 4), float("nan"))}, 0.5)
    with pytest.raises(ValueError, match="seeds: expected 3, got 2"):
        compress.random_scores(model, [1, 2])
    with pytest.raises(
        ValueError, match="expected EnsembleLinear, EnsembleMLP or EnsembleConv2d, got EnsembleEmb"
    ):
        compress.magnitude_scores(EnsembleEmbedding(E, 4, 2))
    prune.l1_unstructured(model, "weight", 0.5)
    with pytest.raises(ValueError, match="expected weights that are parameters, got weight, which something"):
        compress.magnitude_scores(model)


def test_weights_that_pruning_computes_are_refused():
    model = EnsembleMLP(E, 4, [5], 2)
    prune.l1_unstructured(model.weights, "0", 0.5)
    with pytest.raises(ValueError, match=r"got weights\.0, which something computes"):
        compress.magnitude_scores(model)
    prune.remove(model.weights, "0")
    masks = compress.masks_of(model)
    assert sorted(masks) == ["weights.0", "weights.1"] and int(masks["weights.0"].sum()) == E * 20 // 2


# --- training --------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adam": adam,
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adagrad": lambda p: pyens.optim.fused(torch.optim.Adagrad, p, lr=1e-2),
    "in_pass": lambda p: pyens.optim.in_pass(torch.optim.Adam, p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_zero_stays_a_zero(name):
    model = EnsembleMLP(E, 7, [30], 4)
    masks = compress.make_masks(compress.magnitude_scores(model), 0.8)
    compress.apply_masks(model, masks)
    before = [w.detach().clone() for w in model.weights]
    seen = []

    class Look(pyens.training.Callback):
        def on_step_end(self, progress):
            for n, w in compress.prunable_weights(progress.model).items():
                seen.append(bool((w[~masks[n][progress.members]] == 0).all()))

    fit(model, rows(), optimizer=OPTIMIZERS[name], callbacks=[compress.KeepMasks(masks), Look()], **RUN)
    assert len(seen) > 10 and all(seen)
    for n, w, old in zip(masks, model.weights, before, strict=True):
        assert not torch.equal(w, old) and (w[~masks[n]] == 0).all() and (w[masks[n]] != 0).all()


@pytest.mark.parametrize(
    "options", [{"ema": 0.9}, {"swa_start": 0}, {"clip_norm": 0.1}, {"early_stopping": 1}], ids=str
)
def test_zeros_under_what_fit_does(options):
    model = EnsembleMLP(E, 7, [30], 4)
    run = RUN | {"epochs": 6} | options
    compress.iterative_pruning(model, rows(), sparsity=0.7, steps=2, optimizer=adam, **run)
    for weight in model.weights:
        assert torch.equal((weight == 0).flatten(1).sum(1), torch.full((E,), round(0.7 * weight[0].numel())))


def test_members_are_pruned_as_if_alone():
    model = EnsembleMLP(E, 7, [30], 4)
    data, seeds = rows(), [4, 5, 6]
    alone = [model.select([m]) for m in range(E)]
    for one, own in ((model, seeds), *((a, s) for a, s in zip(alone, ([4], [5], [6]), strict=True))):
        compress.iterative_pruning(one, data, sparsity=[0.3, 0.6], optimizer=adam, seeds=own, **RUN)
    for m, one in enumerate(alone):
        assert all(
            torch.equal(a[m : m + 1], b) for a, b in zip(model.parameters(), one.parameters(), strict=True)
        )


def test_schedules():
    steps = compress.polynomial_schedule(0.8, 4)
    assert steps[-1] == 0.8 and all(a < b for a, b in itertools.pairwise([0, *steps]))
    assert steps[0] == pytest.approx(0.8 - 0.8 * 0.75**3)
    assert compress.polynomial_schedule(0.8, 4, power=1) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert compress.polynomial_schedule(0.8, 1, start=0.5) == [0.8]
    for arguments, message in (
        ({"steps": 0}, "steps: expected at least 1"),
        ({"steps": 2.5}, "steps: expected at least 1"),
        ({"steps": 2, "start": 0.9}, "start: expected from 0 to 0.8"),
        ({"steps": 2, "power": 0}, "power: expected a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            compress.polynomial_schedule(0.8, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.5}, "steps: expected how many, got None"),
        ({"sparsity": 0.5, "steps": 0}, "steps: expected at least 1"),
        ({"sparsity": [0.5], "steps": 2}, "steps: expected 1, as there are sparsities, got 2"),
        ({"sparsity": [0.5, 0.2]}, "sparsity: expected ascending ones"),
        ({"sparsity": []}, "sparsity: expected at least one"),
        ({"sparsity": [0.5], "checkpoint": "x.pt"}, "checkpoint: expected none: checkpoints= takes a folder"),
        ({"sparsity": [0.5], "randomness": pyens.training.Randomness()}, "randomness: expected none"),
    ],
)
def test_refuses_runs_that_make_no_sense(arguments, message):
    model = EnsembleLinear(E, 7, 4)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=f"(iterative_pruning|polynomial_schedule): {message}"):
        compress.iterative_pruning(model, rows(), optimizer=adam, **arguments, **RUN)
    assert torch.equal(model.weight, before)


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_after", [1, 3, 4, 9])
def test_killed_and_taken_up_again(tmp_path, killed_after):
    torch.manual_seed(1)
    start, data = network(), images()
    run = {"sparsity": [0.3, 0.5, 0.8], "optimizer": adam, **RUN, "epochs": 3}

    def pruned(folder, callbacks=()):
        model = start.select(slice(None))
        seen = []
        histories = compress.iterative_pruning(
            model,
            data,
            checkpoints=folder,
            callbacks=callbacks,
            after_step=lambda s, m: seen.append(s),
            **run,
        )
        assert seen == run["sparsity"]
        return model, histories

    whole, histories = pruned(tmp_path / "whole")
    epochs = itertools.count(1)

    def kill(progress):
        if next(epochs) == killed_after:
            raise Killed

    with pytest.raises(Killed):
        pruned(tmp_path / "killed", [kill])
    again, their = pruned(tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert len(their) == 3
    for one, other in zip(histories, their, strict=True):
        assert (one.train_loss == other.train_loss).all()
    # Of a run that is done nothing is computed again.
    done, _ = pruned(tmp_path / "killed", [kill])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), done.parameters(), strict=True))


def test_a_checkpoint_of_other_masks_is_refused(tmp_path):
    data, file = rows(), tmp_path / "run.pt"
    model = EnsembleMLP(E, 7, [9], 4)
    masks = compress.make_masks(compress.magnitude_scores(model), 0.5)
    compress.apply_masks(model, masks)
    start = model.select(slice(None))
    fit(model, data, optimizer=adam, checkpoint=file, callbacks=[compress.KeepMasks(masks)], **RUN)
    other = {name: mask.clone() for name, mask in masks.items()}
    other["weights.0"][0, 0, 0] ^= True
    with pytest.raises(ValueError, match=r"expected the mask that this run has of weights\.0, got another"):
        fit(start, data, optimizer=adam, checkpoint=file, callbacks=[compress.KeepMasks(other)], **RUN)
    keeps = compress.KeepMasks(masks)
    with pytest.raises(ValueError, match="expected the masks of this run, got none of them"):
        keeps.load_state_dict({})
    with pytest.raises(ValueError, match=r"KeepMasks: masks: expected one of weights\.1"):
        one = compress.KeepMasks({"weights.0": masks["weights.0"]})
        fit(start, data, optimizer=adam, callbacks=[one], **RUN)


# --- sizes -----------------------------------------------------------------------------------------------


def test_sizes_are_those_of_files(tmp_path):
    model = EnsembleMLP(E, 200, [300], 10)
    compress.apply_masks(model, compress.make_masks(compress.magnitude_scores(model), 0.9))
    assert compress.sparsity_of(model) == pytest.approx(0.9, abs=1e-4)
    file = tmp_path / "model.pt"
    torch.save(model.state_dict(), file)
    assert compress.compressed_size(model) == pytest.approx(
        len(zlib.compress(file.read_bytes(), 9)), rel=0.01
    )
    x = torch.randn(50, 200)
    dense = 4 * E * (200 * 300 + 300 * 10)
    small = model.quantize(x, sparse=True)
    sizes = [
        compress.compressed_size(m) for m in (EnsembleMLP(E, 200, [300], 10), model, model.sparse(), small)
    ]
    assert dense * 0.9 < sizes[0] < dense * 1.05 and sizes[1] < 0.16 * dense and sizes[2] < 0.16 * dense
    assert sizes[3] < 0.07 * dense
    state = torch.load(io.BytesIO(_bytes(small)), weights_only=True)
    assert compress.compressed_size(state) == pytest.approx(sizes[3], rel=0.02)


def _bytes(model: nn.Module) -> bytes:
    memory = io.BytesIO()
    torch.save(model.state_dict(), memory)
    return memory.getvalue()


def test_the_pruned_network_computes_the_same_in_every_form():
    model = network()
    data = images()
    compress.iterative_pruning(model, data, sparsity=0.75, steps=2, optimizer=adam, **RUN)
    with torch.no_grad():
        model.eval()
        want = model(data[0])
        assert torch.equal(model.sparse()(data[0]), want)
        small = model.quantize(data[0], sparse=True)
    difference = (small(data[0]) - want).square().mean().sqrt()
    assert difference < 0.05 * want.square().mean().sqrt()
    masks, again = compress.masks_of(model), compress.make_masks(compress.magnitude_scores(model), 0.75)
    assert all(torch.equal(masks[name], again[name]) for name in masks)
