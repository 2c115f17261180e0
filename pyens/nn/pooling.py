"""Layers of images that have no parameters, for members side by side."""

from collections.abc import Callable

from torch import Tensor, nn

from pyens._kinds import check_tensor


class EnsembleMaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d`, with its arguments, of images `[B, C, H, W]` or `[E, B, C, H, W]`.

    Windows side by side without padding are part of the call of an `EnsembleConv2d` before them in an
    `EnsembleSequential`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _pooled("EnsembleMaxPool2d", super().forward, input)


class EnsembleAvgPool2d(nn.AvgPool2d):
    """`nn.AvgPool2d`, with its arguments, of images `[B, C, H, W]` or `[E, B, C, H, W]`."""

    def forward(self, input: Tensor) -> Tensor:
        return _pooled("EnsembleAvgPool2d", super().forward, input)


class Flatten(nn.Flatten):
    """Images `[B, C, H, W]` or `[E, B, C, H, W]` to rows `[B, C H W]` or `[E, B, C H W]`."""

    def __init__(self) -> None:
        super().__init__(start_dim=-3)

    def forward(self, input: Tensor) -> Tensor:
        _check("Flatten", input)
        return super().forward(input)


def _check(layer: str, input: Tensor) -> None:
    check_tensor(layer, "input", input)
    if input.dim() not in (4, 5):
        raise ValueError(
            f"{layer}: input: expected [B, C, H, W] or [E, B, C, H, W], got shape {list(input.shape)}"
        )


def _pooled(layer: str, pool: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    _check(layer, input)
    if input.dim() == 4:
        return pool(input)
    pooled = pool(input.flatten(0, 1))
    return pooled.reshape(*input.shape[:2], *pooled.shape[1:])
