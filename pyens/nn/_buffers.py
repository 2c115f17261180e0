"""Buffers in a list, and modules that keep something made from their buffers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self


class BufferList(nn.Module):
    """What `nn.ParameterList` is to parameters."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_buffer(str(i), tensor.detach().clone(memory_format=torch.contiguous_format))

    def __len__(self) -> int:
        return len(self._buffers)


class Derived(nn.Module):
    """A module with a `_derived` that `_derive` makes from its buffers or attributes: once by itself,
    and again after loading, moving, copying and unpickling."""

    _derived: Any

    def _derive(self) -> None:
        raise NotImplementedError

    def _derive_and_follow(self) -> None:
        self._derive()
        self.register_load_state_dict_post_hook(_derive_after_loading)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._derive()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_derived"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._derive()


# Not a lambda, which could not be pickled.
def _derive_after_loading(module: Derived, incompatible_keys: Any) -> None:
    module._derive()
