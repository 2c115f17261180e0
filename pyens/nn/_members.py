"""What the ensembles of this package share: members that are drawn, loaded and chosen one by one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

Indices = Sequence[int] | slice | Tensor


class Members(nn.Module):
    """An ensemble of one kind of layer or stack of layers.

    A subclass says where the parameters live (`_stack`) and how a member is drawn.
    """

    ensemble_size: int

    def _stack(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of all layers, each `[E, ...]`; no biases: an empty list."""
        raise NotImplementedError

    def _with(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Self:
        """A module like this one around other parameters."""
        raise NotImplementedError

    def _draw(self, member: int, generator: torch.Generator | None) -> None:
        """Draws one member anew: on the CPU in float32 and then cast, so that a seed means the same on every
        device and dtype."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self, seeds: Sequence[int] | Tensor | None = None) -> None:
        """Draws every member anew, exactly as the modules of `torch.nn` draw (fan-in of one member).

        `seeds[m] = s` gives member m bit for bit the parameters of the same module (`nn.Linear`,
        `nn.Embedding`, `nn.Sequential`) built under `torch.manual_seed(s)` with float32 on the CPU, whatever
        the other members are. Without seeds the members are drawn one after the other from torch's default
        generator.
        """
        drawn_from = generators(self.ensemble_size, seeds)
        if self._stack()[0][0].is_meta:
            return
        for member, generator in enumerate(drawn_from):
            self._draw(member, generator)

    @torch.no_grad()
    def load_stacked(self, params: Mapping[str, Tensor]) -> None:
        """Copies in the parameters that `torch.func.stack_module_state(members)` gives.

        Names may be anything that ends in `weight` and `bias`; the layers are taken in the mapping's order.

        Raises:
            ValueError: names or shapes that do not fit; nothing is copied then.
        """
        weights, biases = self._stack()
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
        for own, given_tensor in zip(weights + biases, given_weights + given_biases, strict=True):
            own.copy_(given_tensor)

    def select(self, indices: Indices) -> Self:
        """A new ensemble of copies of the chosen members, in the order of `indices` (ints, slice or mask).

        Raises:
            ValueError: no member chosen, or indices of another kind.
            IndexError: an index out of range, or a mask that is not `[E]`.
        """
        weights, biases = self._stack()
        index: Any = indices
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device="cpu")
            if index.is_floating_point() and len(index) > 0:  # torch takes [] for floats
                raise ValueError(f"select: indices: expected ints, a slice or a boolean mask, got {indices}")
            index = index if index.dtype == torch.bool else index.long()
        chosen = torch.arange(self.ensemble_size, device="cpu")[index]
        if chosen.dim() != 1 or len(chosen) == 0:
            raise ValueError(f"select: indices: expected at least one member, got {indices}")
        chosen = chosen.to(weights[0].device)
        return self._with([w.detach()[chosen] for w in weights], [b.detach()[chosen] for b in biases])

    def _check_member(self, i: int) -> None:
        if not -self.ensemble_size <= i < self.ensemble_size:
            raise IndexError(f"member: i: expected below {self.ensemble_size}, got {i}")

    def member(self, i: int) -> nn.Module:
        """Member i alone, with copies of its parameters."""
        raise NotImplementedError

    def to_modules(self) -> list[Any]:
        """All members as `member(i)` gives them."""
        return [self.member(i) for i in range(self.ensemble_size)]


def generators(ensemble_size: int, seeds: Sequence[int] | Tensor | None) -> list[torch.Generator | None]:
    """A generator for each member: its own under its seed, without seeds torch's default one (None)."""
    if seeds is None:
        return [None] * ensemble_size
    if len(seeds) != ensemble_size:
        raise ValueError(
            f"reset_parameters: seeds: expected one for each of the {ensemble_size} members, got {len(seeds)}"
        )
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def check_sizes(name: str, **sizes: int) -> None:
    for argument, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: {argument}: expected a positive integer, got {size!r}")


def check_not_empty(modules: Sequence[nn.Module]) -> None:
    if len(modules) == 0:
        raise ValueError("from_modules: modules: expected at least one, got none")
