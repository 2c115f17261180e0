"""What the ensembles of one kind of `torch.nn` module share."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from pyens._kinds import check_real
from pyens.nn.ensemble import Ensemble

SomeModule = TypeVar("SomeModule", bound=nn.Module)


class Members(Ensemble):
    """An ensemble of one kind of layer or stack of layers: `stacked` are all of its parameters."""

    def _parameters_alone(self, function: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """`stacked()` to be written to."""
        weights, biases = self.stacked()
        if not all(isinstance(tensor, nn.Parameter) for tensor in (*weights, *biases)):
            raise ValueError(
                f"{function}: expected parameters, got a weight that is computed from others or frozen"
            )
        return weights, biases

    @torch.no_grad()
    def load_stacked(self, params: Mapping[str, Tensor]) -> None:
        """Copies in the parameters that `torch.func.stack_module_state(members)` gives.

        Names may be anything that ends in `weight` and `bias`; the layers are taken in the mapping's order.

        Raises:
            ValueError, TypeError: names, shapes or kinds that do not fit; nothing is copied then.
        """
        weights, biases = self._parameters_alone("load_stacked")
        for name, tensor in params.items():
            check_real("load_stacked", f"params[{name!r}]", tensor)
        for kind, own in (("weight", weights), ("bias", biases)):
            given = {name: t for name, t in params.items() if name.rpartition(".")[2] == kind}
            shapes, expected = [list(t.shape) for t in given.values()], [list(t.shape) for t in own]
            if shapes != expected:
                raise ValueError(
                    f"load_stacked: params: expected {kind} tensors of shapes {expected}, got {shapes}"
                )
        if unknown := [name for name in params if name.rpartition(".")[2] not in ("weight", "bias")]:
            raise ValueError(f"load_stacked: params: expected only weights and biases, got {unknown}")
        given_weights = [t for name, t in params.items() if name.endswith("weight")]
        given_biases = [t for name, t in params.items() if name.endswith("bias")]
        for tensor, given_tensor in zip((*weights, *biases), given_weights + given_biases, strict=True):
            tensor.copy_(given_tensor)


def draw_linear(weight: Tensor, bias: Tensor | None, generator: torch.Generator | None) -> None:
    """Draws the parameters of one linear layer, in place, as `nn.Linear` does in float32 on the CPU."""
    bound = 1 / math.sqrt(weight.shape[1])
    drawn = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    weight.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
    if bias is not None:
        drawn = torch.empty(bias.shape, dtype=torch.float32, device="cpu")
        bias.copy_(nn.init.uniform_(drawn, -bound, bound, generator=generator))


def listed(modules: Iterable[SomeModule]) -> list[SomeModule]:
    """The modules that `from_modules` is given, at least one."""
    modules = list(modules)
    if not modules:
        raise ValueError("from_modules: modules: expected at least one, got none")
    return modules


def check_layers(
    function: str, weights: Sequence[Tensor], biases: Sequence[Tensor], *, members: bool
) -> None:
    """Refuses what are not weights `[out, in]` and biases `[out]` of layers on top of each other, with
    `members` `[E, out, in]` and `[E, out]`, or `[E, 0]` for a layer without."""
    if len(weights) == 0:
        raise ValueError(f"{function}: weights: expected at least one, got none")
    if len(biases) not in (0, len(weights)):
        raise ValueError(f"{function}: biases: expected none or {len(weights)}, got {len(biases)}")
    first, axes = weights[0], int(members)
    width = 0
    for layer, weight in enumerate(weights):
        lead = [str(size) for size in first.shape[:axes]] if layer else ["E"] * axes
        fan_in = str(width) if layer else "in"
        if weight.dim() != axes + 2 or (
            layer > 0 and (weight.shape[:axes] != first.shape[:axes] or weight.shape[-1] != width)
        ):
            raise ValueError(
                f"{function}: weights[{layer}]: expected [{', '.join([*lead, 'out', fan_in])}], "
                f"got shape {list(weight.shape)}"
            )
        width = weight.shape[-2]
        none = members and len(biases) > 0 and biases[layer].shape == (len(weight), 0)
        if len(biases) > 0 and not none and biases[layer].shape != weight.shape[:-1]:
            raise ValueError(
                f"{function}: biases[{layer}]: expected shape {list(weight.shape[:-1])}, "
                f"got shape {list(biases[layer].shape)}"
            )
    for name, tensors in (("weights", weights), ("biases", biases)):
        for layer, tensor in enumerate(tensors):
            if (tensor.dtype, tensor.device) != (first.dtype, first.device):
                raise TypeError(
                    f"{function}: {name}[{layer}]: expected {first.dtype} on {first.device} like weights[0], "
                    f"got {tensor.dtype} on {tensor.device}"
                )


def check_norms(
    function: str, name: str, given: Sequence[Tensor], shapes: Sequence[tuple[int, int]], like: Tensor
) -> None:
    """Refuses what are not tensors of these shapes, one for each norm, of dtype and device of `like`."""
    if len(given) != len(shapes):
        raise ValueError(
            f"{function}: {name}: expected one for each of the {len(shapes)} norms, got {len(given)}"
        )
    for i, (tensor, shape) in enumerate(zip(given, shapes, strict=True)):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{function}: {name}[{i}]: expected shape {list(shape)}, got shape {list(tensor.shape)}"
            )
        if (tensor.dtype, tensor.device) != (like.dtype, like.device):
            raise TypeError(
                f"{function}: {name}[{i}]: expected {like.dtype} on {like.device} like weights[0], "
                f"got {tensor.dtype} on {tensor.device}"
            )
