"""A convolution under masks, and the smaller convolutions that it stands for."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyens._types import MaskMode, PaddingMode
from pyens.masks import check, check_masks
from pyens.nn.masksembles import Masksembles2D

_Size = int | tuple[int, int]


class MaskedConv2d(nn.Sequential):
    r"""`Masksembles2D` on the input channels, then `nn.Conv2d`: a convolution whose input row meets one mask.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype:
            as for `nn.Conv2d`.
        num_masks, scale, mode, generator: as for `Masksembles2D`.

    Children: `mask` and `conv`. The state dict of torch-uncertainty's `MaskedConv2d` has the same names.

    Raises:
        ValueError: num_masks or scale below 1, an unknown mode.
    """

    mask: Masksembles2D
    conv: nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        num_masks: int,
        scale: float,
        *,
        stride: _Size = 1,
        padding: _Size | str = 0,
        dilation: _Size = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        mode: MaskMode = "grouped",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check("MaskedConv2d", scale, in_channels=in_channels, out_channels=out_channels, num_masks=num_masks)
        check_masks("MaskedConv2d", num_masks, in_channels=in_channels)
        self.mask = Masksembles2D(
            in_channels, num_masks, scale, mode=mode, generator=generator, device=device
        )
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        num_masks: int,
        scale: float,
        *,
        mode: MaskMode = "grouped",
        generator: torch.Generator | None = None,
    ) -> Self:
        """Masks before an existing convolution, which is used as it is, not copied.

        Raises:
            ValueError: a convolution with groups; num_masks or scale below 1; an unknown mode.
        """
        if conv.groups != 1:
            raise ValueError(f"from_conv: conv: expected groups = 1, got {conv.groups}")
        new = cls.__new__(cls)
        nn.Sequential.__init__(new)
        new.mask = Masksembles2D(
            conv.in_channels, num_masks, scale, mode=mode, generator=generator, device=conv.weight.device
        )
        new.conv = conv
        return new.train(conv.training)

    @torch.no_grad()
    def compact(self, *, out_masks: Tensor | None = None, select: bool = True) -> nn.ModuleList:
        """For each mask the convolution that is left: N modules with copies of the weights that it uses.

        Module k computes what this one computes for the rows that meet mask k, to rounding, from
        `[B, in_channels, H, W]`: it takes the channels of masks[k] and convolves those. A chain of layers
        compacts to N smaller networks: give each the masks of the next layer, and let only the first select.

        Args:
            out_masks: bool `[N, out_channels]`: the output channels to compute; None: all. The module then
                gives only these.
            select: whether the input has all channels; if not, it has only those of masks[k].

        Raises:
            TypeError, ValueError: out_masks of another dtype or shape.
        """
        expected = (self.mask.num_masks, self.conv.out_channels)
        if out_masks is not None and out_masks.dtype != torch.bool:
            dtype = str(out_masks.dtype).removeprefix("torch.")
            raise TypeError(f"compact: out_masks: expected bool, got {dtype}")
        if out_masks is not None and out_masks.shape != expected:
            raise ValueError(
                f"compact: out_masks: expected shape {list(expected)}, got {list(out_masks.shape)}"
            )
        old: Any = self.conv  # what torch says of its sizes does not fit its own constructor
        members = nn.ModuleList()
        for k, mask in enumerate(self.mask.masks):
            rows = slice(None) if out_masks is None else out_masks[k]
            weight = self.conv.weight[rows][:, mask].contiguous()
            conv = nn.Conv2d(
                weight.shape[1],
                weight.shape[0],
                old.kernel_size,
                old.stride,
                old.padding,
                old.dilation,
                bias=old.bias is not None,
                padding_mode=old.padding_mode,
                device="meta",
                dtype=weight.dtype,
            )
            conv.weight = nn.Parameter(weight)
            if self.conv.bias is not None:
                conv.bias = nn.Parameter(self.conv.bias[rows].clone())
            members.append(nn.Sequential(_SelectChannels(mask), conv) if select else conv)
        return members.train(self.training)


class _SelectChannels(nn.Module):
    """The channels of a mask, in their order."""

    indices: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", mask.nonzero().squeeze(1))

    def forward(self, input: Tensor) -> Tensor:
        return input.index_select(1, self.indices)
