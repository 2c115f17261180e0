"""What ensembles with weights of another format have in common: how they are called, and made dense again."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from pyens._types import Activation
from pyens.nn._buffers import BufferList
from pyens.nn.ensemble import Ensemble
from pyens.nn.ensemble_conv2d import EnsembleConv2d, Size
from pyens.nn.ensemble_mlp import EnsembleMLP


class FrozenMLP(Ensemble):
    """A stack of linear layers; `_weights()` are those that `_operation` takes, each with a `dense()`."""

    _operation: ClassVar[Callable[..., Tensor]]
    activation: Activation | tuple[Activation, ...]
    output_activation: Activation
    biases: BufferList

    def _weights(self) -> list[Any]:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """`[B, in_features]` (shared by all members) or `[E, B, in_features]` -> `[E, B, out_features]`.

        One row `[in_features]` gives `[E, out_features]`.
        """
        if isinstance(input, Tensor) and input.dim() == 1:
            output: Tensor = self(input.unsqueeze(0))
            return output.squeeze(1)
        return type(self)._operation(
            input,
            self._weights(),
            list(self.biases.buffers()),
            activation=self.activation,
            output_activation=self.output_activation,
        )

    def stacked(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Weights `[E, out, in]` as floating point numbers, and biases."""
        return [weight.dense() for weight in self._weights()], list(self.biases.buffers())

    def dense(self) -> EnsembleMLP:
        """An `EnsembleMLP` with these weights."""
        weights, biases = self.stacked()
        model = EnsembleMLP.from_parameters(
            weights,
            [bias.clone() for bias in biases],
            activation=self.activation,
            output_activation=self.output_activation,
        )
        return model.train(self.training)

    def member(self, i: int) -> nn.Module:
        """Member i as an `nn.Sequential` with these weights."""
        return self.dense().member(i)


class FrozenConv2d(Ensemble):
    """A convolution; `_weight()` is what `_operation` takes, with a `dense()`."""

    _operation: ClassVar[Callable[..., Tensor]]
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def _weight(self) -> Any:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Images `[B, C, H, W]` (shared by all members) or `[E, B, C, H, W]` -> `[E, B, O, H', W']`."""
        return self.convolve(input)

    def convolve(
        self, input: Tensor, activation: Literal["identity", "relu"] = "identity", max_pool: Size = 1
    ) -> Tensor:
        """`forward`, then what `pyens.ops.ensemble_conv2d` does behind it."""
        return type(self)._operation(
            input,
            self._weight(),
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            activation=activation,
            max_pool=max_pool,
        )

    def dense(self) -> EnsembleConv2d:
        """An `EnsembleConv2d` with these weights."""
        weight = self._weight().dense()
        members, out, inputs, *kernel = weight.shape
        new = EnsembleConv2d(
            members,
            inputs,
            out,
            (kernel[0], kernel[1]),
            self.stride,
            self.padding,
            self.dilation,
            self.bias is not None,
            device="meta",
            dtype=weight.dtype,
        )
        new.weight = nn.Parameter(weight)
        new.bias = None if self.bias is None else nn.Parameter(self.bias.clone())
        return new.train(self.training)

    def member(self, i: int) -> nn.Conv2d:
        """Member i as an `nn.Conv2d` with these weights."""
        return self.dense().member(i)
