"""Ensembles made small: members pruned one by one, retrained, and measured as files.

    masks = make_masks(magnitude_scores(model), 0.75)     # of every member its smallest weights
    apply_masks(model, masks)
    fit(model, data, ..., callbacks=[KeepMasks(masks)])   # a zero stays a zero
    small = model.quantize(calibration, sparse=True)
    compressed_size(small)

`iterative_pruning` does the first three again and again, up a schedule of sparsities.
"""

import io
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyens import _kinds
from pyens.nn import Ensemble, EnsembleConv2d, EnsembleLinear, EnsembleMLP
from pyens.training import Callback, History, Progress, fit

__all__ = [
    "KeepMasks",
    "apply_masks",
    "compressed_size",
    "iterative_pruning",
    "magnitude_scores",
    "make_masks",
    "masks_of",
    "polynomial_schedule",
    "prunable_weights",
    "random_scores",
    "snip_scores",
    "sparsity_of",
]

Masks = dict[str, Tensor]  # bool [E, ...] of each weight's shape, by its name: which are kept
Scores = Mapping[str, Tensor]  # [E, ...] likewise: the least are pruned first
Scope = Literal["layer", "global"]


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the linear layers and convolutions in a model, `[E, ...]`, by their names; no biases.

    Raises:
        ValueError: there are none; one that is no parameter, as after `torch.nn.utils.prune`.
    """
    found = {}
    for place, module in model.named_modules():
        if isinstance(module, (EnsembleLinear, EnsembleConv2d)):
            found[f"{place}.weight".lstrip(".")] = module.weight
        elif isinstance(module, EnsembleMLP):
            for i in range(len(module.weights)):
                found[f"{place}.weights.{i}".lstrip(".")] = module.weights[i]
    parameters = dict(model.named_parameters())
    changed = [name for name in found if name not in parameters]
    if changed:
        raise ValueError(
            f"compress: model: expected weights that are parameters, got {changed[0]}, which something "
            "computes: torch.nn.utils.prune.remove and parametrize.remove_parametrizations end that"
        )
    if not found:
        raise ValueError(
            "compress: model: expected EnsembleLinear, EnsembleMLP or EnsembleConv2d, "
            f"got {type(model).__name__}"
        )
    return found


# --- scores ------------------------------------------------------------------------------------------------


@torch.no_grad()
def magnitude_scores(model: nn.Module) -> dict[str, Tensor]:
    """|w| of each weight."""
    return {name: weight.abs() for name, weight in prunable_weights(model).items()}


def random_scores(model: Ensemble, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Uniform numbers, a member's from its own seed: of E seeds.

    Raises:
        ValueError: another number of seeds.
    """
    if len(seeds) != model.ensemble_size:
        raise ValueError(f"random_scores: seeds: expected {model.ensemble_size}, got {len(seeds)}")
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return {
        name: torch.stack([torch.rand(w.shape[1:], generator=g) for g in generators]).to(w.device)
        for name, w in prunable_weights(model).items()
    }


def snip_scores(model: Ensemble, *batch: Any, loss: Any, **loss_options: Any) -> dict[str, Tensor]:
    """|w dL/dw| of each weight, by how much a member's loss of this batch would change if it were cut.

    Args:
        batch, loss, loss_options: what `model.loss` takes: inputs and the target.

    Gradients that the model has are left alone.

    Source: Lee, Ajanthan and Torr, "SNIP: Single-shot network pruning based on connection sensitivity", 2019.
    """
    weights = prunable_weights(model)
    total = model.loss(*batch, loss=loss, **loss_options).sum()
    gradients = torch.autograd.grad(total, list(weights.values()))
    with torch.no_grad():
        return {name: (w * g).abs() for (name, w), g in zip(weights.items(), gradients, strict=True)}


# --- masks -------------------------------------------------------------------------------------------------


@torch.no_grad()
def make_masks(
    scores: Scores, sparsity: float, *, scope: Scope = "layer", within: Masks | None = None
) -> Masks:
    """Of every member the share `sparsity` of the weights with the least scores, to be cut.

    Args:
        scores: as the functions above give them.
        sparsity: from 0 up to, not including, 1: the share of zeros, of those in `within` too.
        scope: "layer": that share of every layer, as `torch.nn.utils.prune.l1_unstructured` takes it of one;
            "global": of all layers of a member together, as `global_unstructured` does.
        within: masks that are made no larger.

    Raises:
        ValueError: a sparsity outside [0, 1); scores that are NaN; another scope; masks that lack a weight.
    """
    _check_sparsity("make_masks", sparsity)
    if scope not in ("layer", "global"):
        raise ValueError(f'make_masks: scope: expected "layer" or "global", got {scope!r}')
    if within is not None:
        _check_masks("make_masks", within, {name: score.shape for name, score in scores.items()})
    for name, score in scores.items():
        if score.isnan().any():
            raise ValueError(f"make_masks: scores: expected numbers, got NaN in {name}")
    whole = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    old = whole if within is None else within
    if scope == "layer":
        return {name: _pruned(score, old[name], sparsity) for name, score in scores.items()}
    flat = [torch.cat([t[name].flatten(1) for name in scores], 1) for t in (scores, old)]
    kept = _pruned(flat[0], flat[1], sparsity)
    parts = kept.split([score[0].numel() for score in scores.values()], 1)
    return {
        name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def _pruned(scores: Tensor, old: Tensor, sparsity: float) -> Tensor:
    """torch's own rule, member by member: the n least, n rounded to even; what is cut already is least."""
    count = round(sparsity * scores[0].numel())
    least = scores.masked_fill(~old, -1).flatten(1).topk(count, largest=False).indices
    return old.flatten(1).scatter(1, least, False).view_as(scores)


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Zeros where a weight is not kept, in place.

    Raises:
        ValueError: masks that lack a weight of the model, or have another shape.
    """
    weights = prunable_weights(model)
    _check_masks("apply_masks", masks, {name: weight.shape for name, weight in weights.items()})
    for name, weight in weights.items():
        weight.masked_fill_(~masks[name].to(weight.device), 0)


@torch.no_grad()
def masks_of(model: nn.Module) -> Masks:
    """Which weights of a model are not zero."""
    return {name: weight != 0 for name, weight in prunable_weights(model).items()}


@torch.no_grad()
def sparsity_of(model: nn.Module) -> float:
    """The share of its weights that are zero."""
    weights = prunable_weights(model).values()
    return 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


class KeepMasks(Callback):
    """Zeros again after every step of the optimizer, whichever it is and whatever it remembers.

    The masks are part of a checkpoint: a run that is taken up again with others is refused.
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        self._members: list[int] | None = None
        self._cut: Masks = {}

    def on_fit_begin(self, progress: Progress) -> None:
        self.on_step_end(progress)

    @torch.no_grad()
    def on_step_end(self, progress: Progress) -> None:
        weights = prunable_weights(progress.model)
        # Nobody trains on behind the last epoch: then all are back.
        members = progress.members or list(range(len(next(iter(self.masks.values())))))
        if members != self._members:
            self._members = members
            every = {name: (len(mask), *mask.shape[1:]) for name, mask in self.masks.items()}
            _check_masks("KeepMasks", self.masks, {name: every.get(name, ()) for name in weights})
            self._cut = {name: ~self.masks[name][self._members].to(w.device) for name, w in weights.items()}
        for name, weight in weights.items():
            weight.masked_fill_(self._cut[name], 0)

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = state.get("masks")
        if not isinstance(saved, Mapping) or saved.keys() != self.masks.keys():
            raise ValueError(
                "KeepMasks: checkpoint: expected the masks of this run, got none of them, or others"
            )
        for name, mask in self.masks.items():
            if not torch.equal(saved[name].cpu(), mask.cpu()):
                raise ValueError(
                    f"KeepMasks: checkpoint: expected the mask that this run has of {name}, got another"
                )


# --- pruning and retraining --------------------------------------------------------------------------------


def polynomial_schedule(
    sparsity: float, steps: int, *, start: float = 0.0, power: float = 3.0
) -> list[float]:
    r"""The sparsities of `steps` steps: :math:`s_t = s + (s_0 - s) (1 - t / n)^p`, steep at first.

    Raises:
        ValueError: a sparsity outside [0, 1), a start beyond it, no steps, a power that is not positive.

    Source: Zhu and Gupta, "To prune, or not to prune", 2017, with p = 3.
    """
    _check_sparsity("polynomial_schedule", sparsity)
    if not 0 <= start <= sparsity:
        raise ValueError(f"polynomial_schedule: start: expected from 0 to {sparsity}, got {start}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"polynomial_schedule: steps: expected at least 1, got {steps}")
    if not power > 0:
        raise ValueError(f"polynomial_schedule: power: expected a positive number, got {power}")
    return [sparsity + (start - sparsity) * (1 - t / steps) ** power for t in range(1, steps)] + [sparsity]


def iterative_pruning(
    model: Ensemble,
    data: Sequence[Any],
    *,
    sparsity: float | Sequence[float],
    steps: int | None = None,
    scope: Scope = "layer",
    after_step: Callable[[float, Ensemble], Any] | None = None,
    checkpoints: str | Path | None = None,
    callbacks: Sequence[Any] = (),
    **fit_arguments: Any,
) -> list[History]:
    """Prunes the smallest weights of every member and trains what is left, step by step.

    Args:
        model: a trained ensemble, changed in place.
        data, fit_arguments: as for `pyens.training.fit`, which retrains after every step: `epochs` are those
            of a step.
        sparsity: the share of zeros in the end, reached in `steps` steps of `polynomial_schedule`; or the
            sparsities of all steps, in ascending order.
        scope: see `make_masks`.
        after_step: is called with the sparsity and the model after each step.
        checkpoints: a folder for a checkpoint of every step. A run that was killed goes on where it was, to
            the bit, if it begins with the same model; of steps that are done `after_step` is called too.
        callbacks: as for `fit`.

    Returns:
        The history of every step.

    Raises:
        ValueError: sparsities outside [0, 1) or not ascending, no steps; and as `fit`.
    """
    if isinstance(sparsity, Sequence):
        planned = [float(s) for s in sparsity]
        if steps is not None and steps != len(planned):
            raise ValueError(
                f"iterative_pruning: steps: expected {len(planned)}, as there are sparsities, got {steps}"
            )
        if not planned:
            raise ValueError("iterative_pruning: sparsity: expected at least one, got none")
        for before, after in itertools.pairwise([0.0, *planned]):
            _check_sparsity("iterative_pruning", after)
            if after < before:
                raise ValueError(f"iterative_pruning: sparsity: expected ascending ones, got {planned}")
    elif steps is None:
        raise ValueError("iterative_pruning: steps: expected how many, got None")
    else:
        planned = polynomial_schedule(sparsity, steps)
    for given in ("checkpoint", "randomness"):
        if fit_arguments.get(given) is not None:
            raise ValueError(
                f"iterative_pruning: {given}: expected none: "
                + (
                    "checkpoints= takes a folder"
                    if given == "checkpoint"
                    else "it would draw the weights anew"
                )
            )
    folder = None if checkpoints is None else Path(checkpoints)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    masks: Masks | None = None
    histories = []
    for step, share in enumerate(planned):
        masks = make_masks(magnitude_scores(model), share, scope=scope, within=masks)
        apply_masks(model, masks)
        file = None if folder is None else folder / f"step-{step}.pt"
        histories.append(
            fit(model, data, checkpoint=file, callbacks=[KeepMasks(masks), *callbacks], **fit_arguments)
        )
        if after_step is not None:
            after_step(share, model)
    return histories


# --- sizes -------------------------------------------------------------------------------------------------


def compressed_size(model: nn.Module | Mapping[str, Any], *, level: int = 9) -> int:
    """Bytes of the file that `torch.save` makes of its state dict, deflated: what zipping it would leave.

    Of a pruned model zeros shrink by themselves, mostly to less than `model.sparse()` and
    `model.quantize(data, sparse=True)` need, which store the others alone and where they are.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    memory = io.BytesIO()
    torch.save(dict(state), memory)
    return len(zlib.compress(memory.getvalue(), level))


# --- checks ------------------------------------------------------------------------------------------------


def _check_sparsity(function: str, sparsity: float) -> None:
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"{function}: sparsity: expected from 0 to less than 1, got {sparsity}")


def _check_masks(function: str, masks: Masks, shapes: Mapping[str, Sequence[int]]) -> None:
    for name, shape in shapes.items():
        if name not in masks:
            raise ValueError(
                f"{function}: masks: expected one of {name}, got those of {', '.join(masks) or 'nothing'}"
            )
        _kinds.check_tensor(function, f"masks[{name!r}]", masks[name])
        if masks[name].dtype != torch.bool:
            raise TypeError(f"{function}: masks[{name!r}]: expected bool, got {masks[name].dtype}")
        if tuple(masks[name].shape) != tuple(shape):
            raise ValueError(
                f"{function}: masks[{name!r}]: expected shape {list(shape)}, got {list(masks[name].shape)}"
            )
