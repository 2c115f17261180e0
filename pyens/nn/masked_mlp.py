"""One MLP under N masks: the members share its weights."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from pyens._kinds import REAL, check_real, check_tensor
from pyens._types import Activation, Loss, LossOptions, LossReduction, MaskMode
from pyens.masks import check, check_masks, masks_for_channels
from pyens.nn import _sequential, _stacking
from pyens.nn._assignment import MODES, assign_masks, check_mode
from pyens.nn._buffers import BufferList, Derived
from pyens.nn._members import check_layers, draw_linear
from pyens.nn.ensemble import Ensemble, Indices, chosen_members, generators, parameters_of
from pyens.nn.ensemble_mlp import EnsembleMLP
from pyens.nn.masksembles import Masksembles1D
from pyens.ops.masked_mlp import (
    masked_mlp,
    masked_mlp_loss,
    masked_mlp_total_loss,
    masked_weights,
    plan_masks,
)
from pyens.reference.activations import activation_module
from pyens.reference.ensemble_mlp_loss import weights_of


class MaskedMLP(Derived, Ensemble):
    r"""An MLP with Masksembles on its hidden layers: Linear, activation, mask, ..., Linear.

    What `nn.Sequential(nn.Linear, activation, Masksembles1D, ..., nn.Linear)` computes; of each hidden layer
    only the units that the mask leaves take part. The members share the parameters, so `pyens.training.fit`
    keeps and stops all of them together.

    Args:
        ensemble_size: N, the number of masks.
        in_features, hidden_features, out_features: widths of the one network; at least one hidden layer.
        scale: S >= 1 of the masks, see `pyens.masks.masks_for_channels`.
        activation: one name for all hidden layers, as in `EnsembleMLP`.
        bias: whether the layers have biases.
        device, dtype: of the parameters.
        seed: the parameters are bit for bit those of the same `nn.Sequential` built under
            `torch.manual_seed(seed)` in float32 on the CPU; without it they are the next ones drawn.
        generator: to draw the masks from.

    Parameters: `weights.{l}` `[out_l, in_l]` and `biases.{l}` `[out_l]`. Buffers, in the state dict too:
    `masks.{l}`, bool `[N, H_l]`. Which units they keep is looked up once, and again after loading, moving,
    copying and unpickling. Masks that are changed in place are noticed in the next eager call; compiled code
    keeps computing with the ones before, until such a call.

    Raises:
        ValueError: a size, N or S below 1, no hidden layer, an unknown activation.

    Example:
        >>> model = MaskedMLP(4, 32, [64, 64], 1, scale=2.0)
        >>> model(torch.randn(8, 32)).shape, model(torch.randn(8, 32), mode="random").shape
        (torch.Size([4, 8, 1]), torch.Size([8, 1]))
    """

    activation: Activation
    shares_parameters = True

    def __init__(
        self,
        ensemble_size: int,
        in_features: int,
        hidden_features: Sequence[int],
        out_features: int,
        *,
        scale: float,
        activation: Activation = "relu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if isinstance(hidden_features, int):
            raise TypeError(
                f"MaskedMLP: hidden_features: expected a sequence of widths, got {hidden_features}"
            )
        widths = {f"hidden_features[{i}]": width for i, width in enumerate(hidden_features)}
        check(
            "MaskedMLP",
            scale,
            ensemble_size=ensemble_size,
            in_features=in_features,
            out_features=out_features,
            **widths,
        )
        check_masks("MaskedMLP", ensemble_size, **widths)
        masks = [masks_for_channels(w, ensemble_size, scale, generator=generator) for w in hidden_features]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        layers = list(itertools.pairwise([in_features, *hidden_features, out_features]))
        weights = [torch.empty(fan_out, fan_in, **factory) for fan_in, fan_out in layers]
        biases = [torch.empty(fan_out, **factory) for _, fan_out in layers] if bias else []
        masks = [torch.empty(m.shape, dtype=torch.bool, device=device).copy_(m) for m in masks]
        self._set(weights, biases, masks, activation, scale)
        self.reset_parameters(seed)

    def _set(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        masks: Sequence[Tensor],
        activation: Activation,
        scale: float | None,
    ) -> None:
        """Everything that this module consists of."""
        super().__init__()
        if not masks:
            raise ValueError("MaskedMLP: hidden_features: expected at least one hidden layer, got none")
        if not isinstance(activation, str):
            raise ValueError(
                f"MaskedMLP: activation: expected one name for all hidden layers, got {activation!r}"
            )
        activation_module(activation, "MaskedMLP")  # raises if there is none of this name
        self.ensemble_size = masks[0].shape[0]
        self.in_features = weights[0].shape[1]
        self.hidden_features = tuple(mask.shape[1] for mask in masks)
        self.out_features = weights[-1].shape[0]
        self.activation = activation
        self.scale = scale
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(biases)
        self._names = tuple(str(layer) for layer in range(len(weights)))
        self._bias_names = self._names[: len(biases)]
        self.masks = BufferList(masks)
        self._derive_and_follow()

    def _derive(self) -> None:
        masks = list(self.masks.buffers())
        # Lists, because gathering buffers costs each call a microsecond.
        self._derived = (masks, plan_masks(masks), _versions(masks))

    @classmethod
    def from_parameters(
        cls,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        masks: Sequence[Tensor],
        *,
        activation: Activation = "relu",
    ) -> Self:
        """A model of these weights `[out, in]` and biases `[out]` (none: empty), used as they are, and masks.

        Masks are bool `[N, H_l]`, one for each hidden layer, and copied.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that do not fit each other.
        """
        check_layers("from_parameters", weights, biases, members=False)
        if len(masks) != len(weights) - 1:
            raise ValueError(
                f"from_parameters: masks: expected one for each of {len(weights) - 1} hidden layers, "
                f"got {len(masks)}"
            )
        for layer, mask in enumerate(masks):
            width, members = weights[layer].shape[0], masks[0].shape[0] if masks[0].dim() > 0 else "N"
            if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape != (members, width):
                raise ValueError(
                    f"from_parameters: masks[{layer}]: expected bool [{members if layer else 'N'}, {width}], "
                    f"got {mask.dtype} of shape {list(mask.shape)}"
                )
        new = cls.__new__(cls)
        new._set(weights, biases, masks, activation, None)
        return new

    @classmethod
    def from_module(cls, module: nn.Sequential) -> Self:
        """A copy of a network with `Masksembles1D` layers: Linear, activation, mask, ..., Linear.

        Sequences within sequences are read as one, so `insert_masksembles_` may have made it. A hidden layer
        without a mask keeps all its units; the modes of the mask layers do not matter.

        Raises:
            ValueError: anything else, by name.
        """
        layers = list(_sequential.flatten(module))
        masks: list[Tensor | None] = []
        for layer, following in itertools.pairwise([*layers, None]):
            if isinstance(layer, Masksembles1D):
                if not _sequential.is_plain(following, nn.Linear) or not masks:
                    raise ValueError(
                        "from_module: module: expected Masksembles1D between an activation and an nn.Linear, "
                        f"got {module}"
                    )
                masks[-1] = layer.masks
            elif _sequential.is_plain(layer, nn.Linear):
                masks.append(None)
        rest = nn.Sequential(*(layer for layer in layers if not isinstance(layer, Masksembles1D)))
        linears, activation = _sequential.parse_plain(rest, "from_module: module")
        sizes = {len(mask) for mask in masks if mask is not None}
        if len(sizes) != 1:
            raise ValueError(
                "from_module: module: expected Masksembles1D layers of one num_masks, "
                f"got {sorted(sizes) or 'none'}"
            )
        (num_masks,) = sizes
        hidden = [
            linear.weight.new_ones(num_masks, len(linear.weight), dtype=torch.bool) if mask is None else mask
            for linear, mask in zip(linears[:-1], masks[:-1], strict=True)
        ]
        stacked = _stacking.stack([linears])
        weights, biases = ([tensor[0] for tensor in tensors] for tensors in stacked)
        return cls.from_parameters(weights, biases, hidden, activation=activation).train(module.training)

    @torch.no_grad()
    def reset_parameters(self, seeds: int | Sequence[int] | Tensor | None = None) -> None:
        """Draws the weights anew, exactly as `nn.Linear` does; the masks stay.

        `seeds` is one number, or as for every ensemble one per member: then all the same, for the members
        share the weights.
        """
        each = [seeds] * self.ensemble_size if isinstance(seeds, int) else seeds
        generator, *_ = generators(self.ensemble_size, each)
        if each is not None and len({int(seed) for seed in each}) > 1:
            raise ValueError(
                "reset_parameters: seeds: expected the same for all members, which share their weights, "
                f"got {list(each)}"
            )
        if self.weights[0].is_meta:
            return
        for weight, bias in itertools.zip_longest(self.weights, self.biases):
            draw_linear(weight, bias, generator)

    def stacked(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The rows and columns that each mask keeps: the members as MLPs of their own."""
        given = self._arguments()
        if given["masks"][0].is_meta:
            raise ValueError("stacked: expected masks that say how wide the members are, got masks on meta")
        return masked_weights(given["weights"], given["biases"], self.ensemble_size, given["plan"])

    def select(self, indices: Indices) -> Self:
        """A copy of the model with the chosen masks, see `Ensemble.select`."""
        members, new = chosen_members(self.ensemble_size, indices), super().select(indices)
        for name, mask in self.masks.named_buffers():
            setattr(new.masks, name, mask[members.to(mask.device)])
        new._derive()
        return new

    def member(self, i: int) -> nn.Sequential:
        """Member i as an `nn.Sequential` of the units that its mask keeps, with copies of their weights."""
        self._check_member(i)
        return self.compact().member(i)

    def to_modules(self) -> list[nn.Sequential]:
        return self.compact().to_modules()

    def config(self) -> dict[str, Any]:
        """See `Ensemble.config`. The masks are in the state dict; those that are built are others."""
        return {
            "ensemble_size": self.ensemble_size,
            "in_features": self.in_features,
            "hidden_features": list(self.hidden_features),
            "out_features": self.out_features,
            "scale": 1.0 if self.scale is None else self.scale,
            "activation": self.activation,
            "bias": len(self.biases) > 0,
        }

    def forward(self, input: Tensor, *, mode: MaskMode = "tiled", seed: int | Tensor = 0) -> Tensor:
        """Each example under each mask, or under one.

        Args:
            input: `[B, in_features]`; with "tiled" also `[N, B, in_features]`, the examples of each mask.
            mode: "tiled": every mask on every example. "grouped", "round_robin" or "random": each example
                meets one mask, see `Masksembles1D`.
            seed: with "random", says which (int64, if a tensor). A training loop passes a new one each step.

        Returns:
            `[N, B, out_features]` with "tiled", else `[B, out_features]`.

        Raises:
            ValueError: an unknown mode, an input of another shape.
        """
        self._check(input, mode)
        if mode == "tiled":
            return masked_mlp(input, **self._arguments())
        n, b = self.ensemble_size, input.shape[0]
        if mode == "grouped" and b % n == 0:
            return masked_mlp(_groups(input, n), **self._arguments()).flatten(0, 1)
        place, rows = self._assign(b, mode, seed, input.device)
        per_mask = _spread(input, place, n, rows)
        return masked_mlp(per_mask, **self._arguments()).flatten(0, 1).index_select(0, place)

    def loss(  # type: ignore[override]
        self,
        input: Tensor,
        target: Tensor,
        *,
        loss: Loss,
        mode: MaskMode = "tiled",
        seed: int | Tensor = 0,
        sample_weight: Tensor | None = None,
        reduction: LossReduction = "mean",
        **options: Unpack[LossOptions],
    ) -> Tensor:
        """The mean loss of `forward` in this mode, its gradient computed in the same pass.

        Args:
            input, mode, seed: as for `forward`.
            target: `[B, K]`, or int64 `[B]` for cross_entropy; with "tiled" also `[N, B, K]` or `[N, B]`.
            loss, options: see `pyens.ops.ensemble_mlp_loss`.
            sample_weight: `[B]`, at least 0; with "tiled" also `[N, B]`. None is all ones.
            reduction: "mean", or "none" for the losses of the examples, times their weights.

        Returns:
            With "tiled" `[N]`, the mean over the examples for each mask; train on its sum or mean. Otherwise
            0-dim: sum_b w_b loss(b) / sum_b w_b over the examples of the batch, each under the one mask that
            it meets, however many examples each mask got; 0 where the weights sum to 0. With reduction "none"
            `[N, B]` and `[B]`.

        Raises:
            ValueError: an unknown mode or loss, another shape.
        """
        self._check(input, mode)
        check_tensor("MaskedMLP", "target", target)
        if target.dtype not in (*REAL, torch.int64):
            raise TypeError(f"MaskedMLP: target: expected numbers, or classes in int64, got {target.dtype}")
        if sample_weight is not None:
            check_real("MaskedMLP", "sample_weight", sample_weight)
        real = torch.float64 if input.dtype == torch.float64 else torch.float32
        of_mean = {"loss": loss, **options, **self._arguments()}
        arguments = of_mean | {"reduction": reduction}
        if mode == "tiled":
            return masked_mlp_loss(input, target, sample_weight=sample_weight, **arguments)
        n, b = self.ensemble_size, input.shape[0]
        for name, tensor in (("target", target), ("sample_weight", sample_weight)):
            if tensor is not None and (tensor.dim() == 0 or tensor.shape[0] != b):
                raise ValueError(
                    f"MaskedMLP: {name}: expected the {b} examples of the input first, "
                    f"got shape {list(tensor.shape)}"
                )
        if sample_weight is not None and sample_weight.dim() != 1:
            raise ValueError(
                f"MaskedMLP: sample_weight: expected [{b}], got shape {list(sample_weight.shape)}"
            )
        no_weights = sample_weight is None and options.get("class_weight") is None
        if mode == "grouped" and b % n == 0 and b > 0 and no_weights:
            # As below to the bit, with views in place of copies.
            if reduction != "mean":  # or one that is refused
                return masked_mlp_loss(_groups(input, n), _groups(target, n), **arguments).flatten()
            shares = input.new_full((n,), 1 / n, dtype=real)
            return masked_mlp_total_loss(_groups(input, n), _groups(target, n), mask_weight=shares, **of_mean)
        if sample_weight is None:
            sample_weight = input.new_ones(b)
        place, rows = self._assign(b, mode, seed, input.device)
        # Rows that are there to fill up have weight 0.
        weights = _spread(sample_weight.float() if _is_half(sample_weight) else sample_weight, place, n, rows)
        spread = _spread(input, place, n, rows), _spread(target, place, n, rows)
        if reduction != "mean":
            losses = masked_mlp_loss(*spread, sample_weight=weights, **arguments)
            return losses.flatten(0, 1).index_select(0, place)
        shares = weights.double()
        class_weight = options.get("class_weight")
        if class_weight is not None:
            labels = spread[1].clamp(0, self.out_features - 1)  # left out: any number
            try:
                shares = shares * weights_of(class_weight.double(), labels, shares)
            except Exception:
                masked_mlp_loss(*spread, sample_weight=weights, **of_mean)  # which says what does not fit
                raise
        if b > 0:  # the largest to 1, as in the loss of each mask
            largest = shares.max()
            shares = shares / torch.where(largest > 0, largest, 1)
        shares = shares.sum(1)
        total = shares.sum()
        shares = (shares / torch.where(total > 0, total, 1)).to(real)
        return masked_mlp_total_loss(*spread, mask_weight=shares, sample_weight=weights, **of_mean)

    def _check(self, input: Tensor, mode: MaskMode) -> None:
        check_mode("MaskedMLP", mode, ("tiled", *MODES))
        check_real("MaskedMLP", "input", input)
        n = self.ensemble_size
        shared = input.dim() == 2 and input.shape[1] == self.in_features
        per_mask = input.dim() == 3 and input.shape[::2] == (n, self.in_features)
        if not shared and not (per_mask and mode == "tiled"):
            also = f" or [{n}, B, {self.in_features}]" if mode == "tiled" else ""
            raise ValueError(
                f"MaskedMLP: input: expected [B, {self.in_features}]{also}, got shape {list(input.shape)}"
            )

    def _assign(
        self, batch_size: int, mode: MaskMode, seed: int | Tensor, device: torch.device
    ) -> tuple[Tensor, int]:
        """Where each row goes among N times `rows` rows, mask by mask, int64 `[B]`; and `rows`."""
        if not hasattr(seed, "__index__"):
            raise TypeError(f"MaskedMLP: seed: expected an integer, got {type(seed).__name__}")
        rows = -(-batch_size // self.ensemble_size)
        seed = torch.as_tensor(seed, device=device)
        mask, number = assign_masks(mode, batch_size, self.ensemble_size, seed)
        return mask * rows + number, rows

    def _arguments(self) -> dict[str, Any]:
        """What `masked_mlp` takes beside the input."""
        modules: dict[str, Any] = self._modules
        masks, plan, versions = self._derived
        if not torch.compiler.is_compiling():
            buffers = list(modules["masks"]._buffers.values())
            changed = any(now is not then for now, then in zip(buffers, masks, strict=True))
            if changed or _versions(masks) != versions:
                self._derive()
                masks, plan, _ = self._derived
        return {
            "weights": parameters_of(modules["weights"], self._names),
            "biases": parameters_of(modules["biases"], self._bias_names),
            "masks": masks,
            "activation": self.activation,
            "plan": plan,
        }

    @torch.no_grad()
    def compact(self) -> EnsembleMLP:
        """The members as a plain ensemble: copies of the weights that each mask leaves, the same outputs.

        Its hidden layers are as wide as the masks' ones; masks with fewer ones than others, which are not
        drawn but may be loaded, get units without weights.
        """
        ensemble = EnsembleMLP.from_parameters(*self.stacked(), activation=self.activation)
        return ensemble.train(self.training)


def _versions(masks: Sequence[Tensor]) -> list[int]:
    """They count changes in place; what inference mode made has none."""
    return [0 if mask.is_inference() else mask._version for mask in masks]


def _spread(values: Tensor, place: Tensor, num_masks: int, rows: int) -> Tensor:
    """`[B, ...]` -> `[num_masks, rows, ...]`, value b at place[b] and zeros in the rest."""
    zeros = values.new_zeros(num_masks * rows, *values.shape[1:])
    return torch.unflatten(zeros.index_copy(0, place, values), 0, (num_masks, rows))


def _groups(values: Tensor, num_masks: int) -> Tensor:
    """What `_spread` makes of rows that are in groups of one size."""
    return torch.unflatten(values, 0, (num_masks, -1))


def _is_half(values: Tensor) -> bool:
    return values.dtype in (torch.bfloat16, torch.float16)
