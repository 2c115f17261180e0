"""Weights of one layout or the other: `[E, out, in]`, as torch has them, or `[E, in, out]`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyens._kinds import check_real, check_tensors
from pyens._types import WeightLayout
from pyens.nn._members import check_layers


def check_layout(function: str, layout: WeightLayout | None) -> None:
    if layout not in (None, "out_in", "in_out"):
        raise ValueError(f"{function}: layout: expected out_in, in_out or None, got {layout!r}")


def layout_needed(function: str, where: str) -> ValueError:
    return ValueError(
        f"{function}: layout: expected out_in ([E, out, in], as torch has it) or in_out ([E, in, out]) "
        f"where {where}; got None"
    )


@torch.no_grad()
def as_out_in(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    layout: WeightLayout | None,
    function: str = "from_stacked",
) -> tuple[list[Tensor], list[Tensor]]:
    """Copies of weights as `[E, out, in]` and of biases as `[E, out]`, of the layout given or that fits."""
    check_layout(function, layout)
    given = {"weights": list(_listed(function, "weights", weights))}
    given["biases"] = [] if biases is None else list(_listed(function, "biases", biases))
    for name, tensors in given.items():
        for i, tensor in enumerate(tensors):
            check_real(function, f"{name}[{i}]", tensor)
    flat = [b.squeeze(1) if b.dim() == 3 and b.shape[1] == 1 else b for b in given["biases"]]
    fitting = [name for name in ("out_in", "in_out") if _fits(given["weights"], flat, name)]
    if layout is None:
        if len(fitting) == 2:
            raise layout_needed(function, "the shapes fit both")
        layout = "in_out" if fitting == ["in_out"] else "out_in"
    elif fitting and layout not in fitting:
        raise ValueError(
            f"{function}: layout: expected {fitting[0]}, which the shapes of the weights "
            f"{[list(w.shape) for w in given['weights']]} fit, got {layout}"
        )
    turned = [w.mT if layout == "in_out" and w.dim() > 1 else w for w in given["weights"]]
    check_layers(function, turned, flat, members=True)
    copies = [[t.detach().clone(memory_format=torch.contiguous_format) for t in ts] for ts in (turned, flat)]
    return copies[0], copies[1]


def _listed(function: str, argument: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    check_tensors(function, argument, tensors)
    return tensors


def _fits(weights: Sequence[Tensor], biases: Sequence[Tensor], layout: str) -> bool:
    """Whether shapes of this layout are layers on top of each other."""
    turned = [w.mT if layout == "in_out" and w.dim() > 1 else w for w in weights]
    try:
        check_layers("", turned, biases, members=True)
    except ValueError:
        return False
    except TypeError:  # of dtypes or devices that differ, whatever the layout
        pass
    return True
