"""Masksembles layers: a fixed set of masks on the channels, and each row of the batch meets one of them."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyens._kinds import check_tensor
from pyens._types import MaskMode
from pyens.masks import check, check_masks, masks_for_channels
from pyens.nn._assignment import MODES, assign_masks, check_mode
from pyens.ops.mask_channels import mask_channels


class _Masksembles(nn.Module):
    """What the layers share; a subclass says which inputs it takes."""

    masks: Tensor
    seed: Tensor
    _shape: str

    def __init__(
        self,
        channels: int,
        num_masks: int,
        scale: float,
        *,
        mode: MaskMode = "grouped",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check(name, scale, channels=channels, num_masks=num_masks)
        check_masks(name, num_masks, channels=channels)
        check_mode(name, mode, (*MODES, "tiled"))
        self.channels = channels
        self.num_masks = num_masks
        self.scale = scale
        self.mode = mode
        masks = masks_for_channels(channels, num_masks, scale, generator=generator)
        self.register_buffer("masks", torch.empty(masks.shape, dtype=torch.bool, device=device))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self.masks.copy_(masks)

    @classmethod
    def from_masksembles(cls, module: nn.Module) -> Self:
        """A layer with copies of the masks of a live layer of the `masksembles` package, on their device.

        `module` is anything with their `masks` `[n, channels]` of zeros and ones, `n` and `scale`. Their
        state dict has no masks: convert the layer itself, or the model is another one.

        Raises:
            TypeError: a module without these.
            ValueError: masks of another shape, with other values, or empty ones.
        """
        masks = getattr(module, "masks", None)
        if not isinstance(masks, Tensor) or not hasattr(module, "n") or not hasattr(module, "scale"):
            raise TypeError(
                "from_masksembles: module: expected a layer with masks, n and scale, "
                f"got {type(module).__name__}"
            )
        _check_masks("from_masksembles", masks)
        if len(masks) != module.n:
            raise ValueError(f"from_masksembles: module: expected n = {module.n} masks, got {len(masks)}")
        # What is drawn here is overwritten: not from torch's default generator.
        scale: Any = module.scale
        new = cls(masks.shape[1], len(masks), scale, generator=torch.Generator(), device=masks.device)
        new.masks.copy_(masks.detach() != 0)
        return new.train(module.training)

    def forward(self, input: Tensor, index: Tensor | None = None) -> Tensor:
        """`input` with channels kept or zeroed, row by row as `mode` says, or by mask index[b] for row b."""
        self._check(input)
        if index is not None:
            check_tensor(type(self).__name__, "index", index)
        if index is None and self.mode == "tiled":
            input = input.expand(self.num_masks, *input.shape).flatten(0, 1)
        elif index is None and self.mode != "grouped":
            index, _ = assign_masks(self.mode, input.shape[0], self.num_masks, self.seed)
        return self._mask(input, index)

    def _mask(self, input: Tensor, index: Tensor | None) -> Tensor:
        return mask_channels(input, self.masks, index)

    def _check(self, input: Tensor) -> None:
        """The rank, which the operation leaves open, and the channels."""
        check_tensor(type(self).__name__, "input", input)
        if input.dim() != 1 + self._shape.count(",") or input.shape[1] != self.channels:
            raise ValueError(
                f"{type(self).__name__}: input: expected {self._shape.replace('C', str(self.channels))}, "
                f"got shape {list(input.shape)}"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if isinstance(masks := state_dict.get(f"{prefix}masks"), Tensor):
            _check_masks(f"{type(self).__name__}: load_state_dict", masks)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.channels}, num_masks={self.num_masks}, scale={self.scale}, mode={self.mode}"


class Masksembles1D(_Masksembles):
    r"""Masksembles on features: `[B, C]`, or `[B, T, C]` with one mask for all T positions of a row.

    output[b, ..., c] = input[b, ..., c] if masks[index[b], c] else 0, without rescaling. The drop-in for
    `masksembles.torch.Masksembles1D`, for any batch size; it belongs after an activation, in training and in
    eval mode alike.

    Args:
        channels: C.
        num_masks: N.
        scale: S >= 1; the masks' overlap is about 1 / (2 S - 1). See `pyens.masks.masks_for_channels`.
        mode: which row meets which mask, also as an attribute:

            grouped      N groups of rows one after the other, as equal as can be (`torch.tensor_split`):
                         the official layer's. To predict, give the batch N times over
                         (`pyens.nn.forward_tiled`).
            round_robin  row b meets mask b mod N.
            random       each row gets a mask at random, without replacement from ceil(B / N) times all N: a
                         pure function of (`seed`, B, row), so that all layers of a network agree.
            tiled        every mask on every row: `[B, ...]` -> `[N B, ...]`, mask by mask. For the first
                         mask layer that the data meets; the others stay grouped.
        generator: to draw the masks from; they are drawn on the CPU.
        device: of the masks.

    Buffers: `masks`, bool `[N, C]`, in the state dict; `seed`, int64, not in it (`pyens.nn.set_mask_mode_`).
    `load_state_dict` takes masks of zeros and ones of any dtype. A layer of torch-uncertainty that holds a
    `mask` and a `linear` or a `conv` has the keys that `insert_masksembles_` and `MaskedConv2d` give.

    Raises:
        ValueError: channels, num_masks or scale below 1, an unknown mode, an input of another shape, an empty
            mask loaded.

    Source: "Masksembles", 3.1 to 3.3.
    """

    def _check(self, input: Tensor) -> None:
        check_tensor("Masksembles1D", "input", input)
        if input.dim() < 2 or input.shape[-1] != self.channels:
            raise ValueError(
                f"Masksembles1D: input: expected [B, {self.channels}] or [B, T, {self.channels}], "
                f"got shape {list(input.shape)}"
            )

    def _mask(self, input: Tensor, index: Tensor | None) -> Tensor:
        if input.dim() == 2:
            return super()._mask(input, index)
        if index is None:
            index, _ = assign_masks("grouped", input.shape[0], self.num_masks, self.seed)
        # Every position as a row of its own, so that the channels come second.
        rows = input.flatten(0, -2)
        index = index.repeat_interleave(rows.shape[0] // max(input.shape[0], 1), output_size=rows.shape[0])
        return super()._mask(rows, index).view(input.shape)


class Masksembles2D(_Masksembles):
    """Masksembles on the channels of images, `[B, C, H, W]`; otherwise as `Masksembles1D`."""

    _shape = "[B, C, H, W]"


class Masksembles3D(_Masksembles):
    """Masksembles on the channels of volumes, `[B, C, D, H, W]`; otherwise as `Masksembles1D`."""

    _shape = "[B, C, D, H, W]"


def _check_masks(function: str, masks: Tensor) -> None:
    if masks.dim() != 2:
        raise ValueError(f"{function}: masks: expected [N, C], got shape {list(masks.shape)}")
    if not ((masks == 0) | (masks == 1)).all():
        raise ValueError(f"{function}: masks: expected zeros and ones, got other values")
    if not (masks != 0).any(1).all():
        raise ValueError(f"{function}: masks: expected a one in each, got an empty mask")
