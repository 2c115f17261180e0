"""A residual layer as a plain module."""

from torch import Tensor, nn


class Residual(nn.Sequential):
    """h + f(h), where f is the sequence: a hidden layer with a residual, as `EnsembleMLP.member` gives it.

    `EnsembleMLP.from_modules` takes it back: `Residual(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU())`.
    """

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return output + input
