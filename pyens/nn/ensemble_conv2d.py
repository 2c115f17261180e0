"""Convolutions per member."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyens.masks import check
from pyens.nn import _sequential
from pyens.nn._members import Members, draw_linear, listed
from pyens.nn.ensemble import parameters_of
from pyens.ops.ensemble_conv2d import ensemble_conv2d

if TYPE_CHECKING:
    from pyens.nn.int8 import Int8EnsembleConv2d
    from pyens.nn.sparse import SparseEnsembleConv2d

Size = int | tuple[int, int]


class EnsembleConv2d(Members):
    r"""`ensemble_size` copies of `nn.Conv2d` that run as one.

    Args:
        ensemble_size: E, the number of members.
        in_channels, out_channels, kernel_size, stride, dilation, bias, device, dtype: as for `nn.Conv2d`.
        padding: likewise, zeros on both sides of an axis; "valid" is 0, and "same" keeps the size of an image
            where that needs as many zeros on the one side as on the other (odd kernels, stride 1).
        seeds: one per member, see `reset_parameters`.

    Parameters: `weight` `[E, out_channels, in_channels, height, width]` and `bias` `[E, out_channels]`, or
    None. In an `EnsembleSequential` an `nn.ReLU` and an `EnsembleMaxPool2d` behind it are part of the same
    call.
    """

    def __init__(
        self,
        ensemble_size: int,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | Literal["same", "valid"] = 0,
        dilation: Size = 1,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seeds: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__()
        check(
            "EnsembleConv2d", ensemble_size=ensemble_size, in_channels=in_channels, out_channels=out_channels
        )
        self.ensemble_size = ensemble_size
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair_of("kernel_size", kernel_size, 1)
        self.stride = pair_of("stride", stride, 1)
        self.dilation = pair_of("dilation", dilation, 1)
        self.padding = self._padding(padding)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (ensemble_size, out_channels, in_channels, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self.bias = nn.Parameter(torch.empty(ensemble_size, out_channels, **factory)) if bias else None
        self.reset_parameters(seeds)

    def _padding(self, padding: Size | str) -> tuple[int, int]:
        if not isinstance(padding, str):
            return pair_of("padding", padding, 0)
        if padding == "valid":
            return 0, 0
        if padding != "same":
            raise ValueError(
                f'EnsembleConv2d: padding: expected integers, "same" or "valid", got "{padding}"'
            )
        zeros = [d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        if self.stride != (1, 1) or any(both % 2 for both in zeros):
            raise ValueError(
                'EnsembleConv2d: padding: expected "same" with stride 1 and as many zeros on both sides, '
                f"got kernel_size {self.kernel_size}, stride {self.stride}, dilation {self.dilation}"
            )
        return zeros[0] // 2, zeros[1] // 2

    @classmethod
    def from_modules(cls, modules: Iterable[nn.Conv2d]) -> Self:
        """An ensemble of copies of trained layers alike in shape, arguments, dtype and device, bit for bit.

        Raises:
            ValueError: another kind of module, groups, padding other than zeros, hooks that run in forward,
                weights that are computed from others, layers that differ.
        """
        modules = listed(modules)
        layers = []
        for i, module in enumerate(modules):
            argument = f"from_modules: modules[{i}]"
            if not _sequential.is_plain(module, nn.Conv2d):
                raise ValueError(f"{argument}: expected nn.Conv2d, got {type(module).__name__}")
            layers.append(_sequential.own_parameters(module, argument))
            if module.groups != 1 or module.padding_mode != "zeros":
                raise ValueError(f"{argument}: expected groups 1 and zeros as padding, got {module}")
            described, expected = _describe(module), _describe(modules[0])
            if described != expected:
                raise ValueError(f"{argument}: expected {expected} like modules[0], got {described}")
        first: Any = modules[0]
        new = cls(
            len(modules),
            first.in_channels,
            first.out_channels,
            first.kernel_size,
            first.stride,
            first.padding,
            first.dilation,
            first.bias is not None,
            device="meta",
            dtype=first.weight.dtype,
        )
        new.weight = nn.Parameter(torch.stack([weight.detach() for weight, _ in layers]))
        if first.bias is not None:
            biases = [bias.detach() for _, bias in layers if bias is not None]
            new.bias = nn.Parameter(torch.stack(biases))
        return new.train(first.training)

    def forward(self, input: Tensor) -> Tensor:
        """Images `[B, C, H, W]` (shared by all members) or `[E, B, C, H, W]` -> `[E, B, O, H', W']`."""
        return self.convolve(input)

    def convolve(
        self, input: Tensor, activation: Literal["identity", "relu"] = "identity", max_pool: Size = 1
    ) -> Tensor:
        """`forward`, then what `pyens.ops.ensemble_conv2d` does behind it."""
        weight, bias = parameters_of(self, ("weight", "bias"))
        return ensemble_conv2d(
            input,
            weight,
            bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            activation=activation,
            max_pool=max_pool,
        )

    def sparse(self, masks: Tensor | None = None) -> "SparseEnsembleConv2d":
        """The ensemble frozen with the weights that are not zero, or that `masks`, bool like them, keeps."""
        from pyens.nn.sparse import SparseEnsembleConv2d

        return SparseEnsembleConv2d(self, masks)

    def quantize(
        self,
        data: Tensor | Iterable[Tensor],
        *,
        observer: Callable[[], Any] | None = None,
        sparse: bool = False,
    ) -> "Int8EnsembleConv2d":
        """The ensemble frozen with its weights in bytes, as by `EnsembleMLP.quantize`; `data` are images."""
        from pyens.nn.int8 import Int8EnsembleConv2d

        return Int8EnsembleConv2d(self, data, observer=observer, sparse=sparse)

    def stacked(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Weight `[E, O, C, height, width]` and bias `[E, O]`, each in a list; no bias: an empty one."""
        weight, bias = parameters_of(self, ("weight", "bias"))
        return [weight], [] if bias is None else [bias]

    def draw(self, member: int, generator: torch.Generator | None) -> None:
        ((weight,), biases) = self._parameters_alone("reset_parameters")
        draw_linear(weight[member].flatten(1), biases[0][member] if biases else None, generator)

    def member(self, i: int) -> nn.Conv2d:
        """Member i as an `nn.Conv2d`, with copies of its parameters."""
        self._check_member(i)
        ((weight,), biases) = self.stacked()
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=bool(biases),
            device="meta",
            dtype=weight.dtype,
        )
        conv.weight = nn.Parameter(weight[i].detach().clone())
        if biases:
            conv.bias = nn.Parameter(biases[0][i].detach().clone())
        return conv.train(self.training)

    def config(self) -> dict[str, Any]:
        return {
            "ensemble_size": self.ensemble_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "bias": self.bias is not None,
        }


def pair_of(argument: str, value: Any, least: int, module: str = "EnsembleConv2d") -> tuple[int, int]:
    """(vertical, horizontal) of an integer or of two, none below `least`."""
    pair = (value, value) if isinstance(value, int) else value
    try:
        height, width = pair
        valid = all(isinstance(one, int) and not isinstance(one, bool) for one in (height, width))
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise TypeError(f"{module}: {argument}: expected an integer or two of them, got {value!r}")
    if min(height, width) < least:
        raise ValueError(f"{module}: {argument}: expected at least {least}, got {value}")
    return height, width


def _describe(module: nn.Conv2d) -> str:
    return f"{module}, {module.weight.dtype}, {module.weight.device}"
