"""Arguments that are not of the kind that a function takes: refused by name and shortly."""

import functools
from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_tensor(function: str, argument: str, value: object) -> None:
    """Raises a TypeError unless it is a tensor whose numbers lie in memory as they are."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {argument}: expected a tensor, got {_described(value)}") from None
    if value.is_nested or value.layout is not torch.strided or value.is_quantized:
        raise TypeError(
            f"{function}: {argument}: expected a dense tensor, got {_tensor_described(value)}"
        ) from None


REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_real(function: str, argument: str, value: object) -> None:
    """Raises a TypeError unless it is such a tensor of a dtype that kernels compute in."""
    check_tensor(function, argument, value)
    if isinstance(value, Tensor) and value.dtype not in REAL:
        raise TypeError(
            f"{function}: {argument}: expected float32, float64, bfloat16 or float16, got {value.dtype}"
        )


def check_number(function: str, argument: str, value: object) -> None:
    """Raises a TypeError unless it converts to a float."""
    check(function, [(argument, "float")], [value])


def check_tensors(function: str, argument: str, value: object) -> None:
    """Raises a TypeError unless it is a list, or what can be one, of such tensors."""
    if isinstance(value, Tensor):
        got = _tensor_described(value)
        raise TypeError(f"{function}: {argument}: expected a list of tensors, got {got}") from None
    if not isinstance(value, Iterable):
        got = type(value).__name__
        raise TypeError(f"{function}: {argument}: expected a list of tensors, got {got}") from None
    for i, tensor in enumerate(value):
        if isinstance(tensor, Tensor) or not hasattr(tensor, "__torch_function__"):
            check_tensor(function, f"{argument}[{i}]", tensor)


def check(function: str, arguments: Sequence[tuple[str, str]], values: Sequence[Any]) -> None:
    """Raises a TypeError for the first value that is not of its type, as schemas name the types.

    What is no tensor and overrides torch's functions answers for itself.

    Args:
        function: whose arguments they are.
        arguments: their names and types.
        values: one for each.
    """
    for (argument, kind), value in zip(arguments, values, strict=True):
        if kind.startswith("Optional"):
            if value is None:
                continue
            kind = kind.removeprefix("Optional[").removesuffix("]")
        if kind == "List[Tensor]":
            check_tensors(function, argument, value)
        elif kind == "Tensor":
            if isinstance(value, Tensor) or not hasattr(value, "__torch_function__"):
                check_tensor(function, argument, value)
        elif not _converts(kind, value):
            got = "None" if value is None else type(value).__name__
            raise TypeError(f"{function}: {argument}: expected {_NAMES[kind]}, got {got}") from None


_CONVERSIONS: dict[str, Callable[[Any], object]] = {
    "float": float,
    "int": index,
    "bool": bool,
    "List[float]": lambda values: [float(value) for value in values],
    "List[int]": lambda values: [index(value) for value in values],
}
_NAMES = {
    "float": "a number",
    "int": "an integer",
    "bool": "a bool",
    "str": "a string",
    "List[float]": "numbers",
    "List[int]": "integers",
}


def _converts(kind: str, value: Any) -> bool:
    if kind == "str" or isinstance(value, (str, bytes)):
        return kind == "str" and isinstance(value, (str, bytes))
    try:
        _CONVERSIONS[kind](value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return True


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return "numpy.ndarray: torch.from_numpy makes a tensor of it"
    if value is None:
        return "None"
    name = type(value).__name__
    if isinstance(value, (list, tuple)):
        if any(isinstance(one, Tensor) for one in value):
            return (
                f"{name} of {len(value)}, with tensors in it: of a batch of a DataLoader, which is a list, "
                "entry 0 is probably meant"
            )
        return f"{name}: torch.tensor makes a tensor of numbers"
    return name


def _tensor_described(value: Tensor) -> str:
    if value.is_nested:
        return "a nested one: to_padded_tensor makes a dense one"
    if value.is_quantized:
        return "a quantized one: dequantize makes a dense one"
    if value.layout is not torch.strided:
        return f"{value.layout}: to_dense makes a dense one"
    return f"one tensor of shape {list(value.shape)}"


def name_of(function: Any) -> str | None:
    """What a function is called, a partial with its arguments, an object by its class; names stay names."""
    if function is None or isinstance(function, str):
        return function
    if isinstance(function, functools.partial):
        own = [f"{name}={value!r}" for name, value in function.keywords.items()]
        return f"{name_of(function.func)}({', '.join([*map(repr, function.args), *own])})"
    return str(getattr(function, "__qualname__", type(function).__name__))
