"""Batch norm with statistics per member, and folding it into the linear layers beside it."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from pyens._kinds import check_number, check_real
from pyens.masks import check
from pyens.nn import _sequential, _stacking
from pyens.nn._members import listed
from pyens.nn.ensemble import Ensemble
from pyens.nn.ensemble_mlp import EnsembleLinear, EnsembleMLP


class EnsembleBatchNorm(Ensemble):
    r"""`ensemble_size` copies of `nn.BatchNorm1d` that run as one, each with its own statistics.

        output[m, b] = (x[m, b] - mean[m]) / sqrt(var[m] + eps) * weight[m] + bias[m]

    with mean and biased variance over the batch in training, and the running ones in evaluation. In training
    running <- (1 - momentum) running + momentum batch, of the means and the unbiased variances.

    Args:
        ensemble_size: E, the number of members.
        num_features: F.
        eps, momentum, affine, track_running_stats, device, dtype: as for `nn.BatchNorm1d`.

    Parameters: `weight` and `bias` `[E, F]`, or None. Buffers: `running_mean`, `running_var` `[E, F]` and
    `num_batches_tracked` int64 `[E]`, or None; their names are those of `nn.BatchNorm1d`, so
    `load_state_dict` takes what `torch.func.stack_module_state` gives.

    `pyens.training.fit` keeps the statistics of each member's best epoch with its weights, and refuses
    bootstrap, jackknife and sample weights of 0, whose rows would enter the statistics. With
    `micro_batch_size` the statistics are those of each part.
    """

    member_buffers = ("running_mean", "running_var", "num_batches_tracked")
    _layer: type[nn.BatchNorm1d] | type[nn.BatchNorm2d] = nn.BatchNorm1d
    _pixels = 0  # dimensions behind the features
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        ensemble_size: int,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check(name, ensemble_size=ensemble_size, num_features=num_features)
        check_number(name, "eps", eps)
        if momentum is not None:
            check_number(name, "momentum", momentum)
        self.ensemble_size = ensemble_size
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        shape, factory = (ensemble_size, num_features), {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(shape, **factory)) if affine else None  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.zeros(shape, **factory)) if affine else None  # type: ignore[arg-type]
        buffers: list[Tensor | None] = [None, None, None]
        if track_running_stats:
            buffers = [
                torch.zeros(shape, **factory),  # type: ignore[arg-type]
                torch.ones(shape, **factory),  # type: ignore[arg-type]
                torch.zeros(ensemble_size, dtype=torch.int64, device=device),
            ]
        for name, buffer in zip(self.member_buffers, buffers, strict=True):
            self.register_buffer(name, buffer)

    @classmethod
    def from_modules(cls, modules: Iterable[nn.BatchNorm1d] | Iterable[nn.BatchNorm2d]) -> Self:
        """An ensemble of copies of trained layers alike in features, arguments, dtype and device.

        Raises:
            ValueError: another kind of module, hooks that run in forward, layers that differ.
        """
        listed_modules: list[Any] = listed(modules)
        modules = listed_modules
        for i, module in enumerate(modules):
            argument = f"from_modules: modules[{i}]"
            if not _sequential.is_plain(module, cls._layer):
                expected = f"nn.{cls._layer.__name__}"
                raise ValueError(f"{argument}: expected {expected}, got {type(module).__name__}")
            _sequential.check_hooks(module, argument)
            described, expected = _describe(module), _describe(modules[0])
            if described != expected:
                raise ValueError(f"{argument}: expected {expected} like modules[0], got {described}")
        first = modules[0]
        new = cls(
            len(modules),
            first.num_features,
            first.eps,
            first.momentum,
            first.affine,
            first.track_running_stats,
            device="meta",
        )
        for name in ("weight", "bias", *cls.member_buffers):
            if getattr(first, name) is not None:
                stacked = torch.stack([getattr(module, name).detach() for module in modules])
                setattr(new, name, nn.Parameter(stacked) if name in ("weight", "bias") else stacked)
        return new.train(first.training)

    @torch.no_grad()
    def draw(self, member: int, generator: torch.Generator | None) -> None:
        """As `nn.BatchNorm1d` begins: nothing is random."""
        for tensor, value in (
            (self.weight, 1),
            (self.bias, 0),
            (self.running_mean, 0),
            (self.running_var, 1),
            (self.num_batches_tracked, 0),
        ):
            if tensor is not None:
                tensor[member] = value

    def member(self, i: int) -> nn.BatchNorm1d | nn.BatchNorm2d:
        """Member i as a layer of torch.nn, with copies of its parameters and statistics."""
        self._check_member(i)
        options = self.eps, self.momentum, self.affine, self.track_running_stats
        module = self._layer(self.num_features, *options, device="meta")
        for name in ("weight", "bias"):
            if (tensor := getattr(self, name)) is not None:
                setattr(module, name, nn.Parameter(tensor[i].detach().clone()))
        for name in self.member_buffers:
            if (tensor := getattr(self, name)) is not None:
                setattr(module, name, tensor[i].clone())
        return module.train(self.training)

    def config(self) -> dict[str, Any]:
        return {
            "ensemble_size": self.ensemble_size,
            "num_features": self.num_features,
            "eps": self.eps,
            "momentum": self.momentum,
            "affine": self.affine,
            "track_running_stats": self.track_running_stats,
        }

    def forward(self, input: Tensor) -> Tensor:
        """`[B, F]` (shared by all members) or `[E, B, F]` -> `[E, B, F]`, of the input's dtype.

        Raises:
            ValueError: an input of another shape; fewer than 2 rows where statistics are computed.
            TypeError: a dtype other than that of the parameters, or a 16-bit one beside float32.
        """
        name, rest = type(self).__name__, self._pixels
        check_real(name, "input", input)
        shared = input.dim() == 2 + rest
        if not (shared or (input.dim() == 3 + rest and len(input) == self.ensemble_size)) or (
            input.shape[-1 - rest] != self.num_features
        ):
            images = ", H, W" if rest else ""
            raise ValueError(
                f"{name}: input: expected [B, {self.num_features}{images}] or "
                f"[{self.ensemble_size}, B, {self.num_features}{images}], got shape {list(input.shape)}"
            )
        mean, var = self.running_mean, self.running_var
        own = mean if self.weight is None else self.weight
        mixed = own is not None and input.dtype != own.dtype
        if own is not None and mixed and (own.dtype != torch.float32 or input.dtype == torch.float64):
            raise TypeError(
                f"{name}: input: expected the dtype of the parameters ({own.dtype}), got {input.dtype}"
            )
        if not self.training and mean is not None and var is not None:
            return self._scaled(input, mean, var)
        of_images = input.shape[input.dim() - rest :].numel()
        if input.shape[-2 - rest] * of_images == 1:
            of = "2 or more rows" if rest == 0 else "more than one pixel"
            raise ValueError(f"{name}: input: expected {of} to compute statistics from, got 1")
        return self._normalized_once(input) if shared else self._normalized(input)

    def _along(self, of_features: Tensor) -> Tensor:
        """`[E, F]` as it meets `[E, B, F, ...]`."""
        return of_features.reshape(*of_features.shape[:1], 1, -1, *[1] * self._pixels)

    def _scaled(self, input: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """In evaluation: x * scale + shift, in float32 at least."""
        exact = torch.promote_types(input.dtype, torch.float32)
        scale = (var.to(exact) + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        return torch.addcmul(self._along(shift), input.to(exact), self._along(scale)).to(input.dtype)

    def _normalized(self, input: Tensor) -> Tensor:
        """By the statistics of the batch: all features of all members are channels of one batch norm."""
        rows = input.transpose(0, 1).flatten(1, 2)  # [B, E F, ...]
        weight = None if self.weight is None else self.weight.flatten()
        bias = None if self.bias is None else self.bias.flatten()
        mean, var = self._room(rows, self.running_mean)
        output = F.batch_norm(rows, mean, var, weight, bias, training=True, momentum=1.0, eps=self.eps)
        self._track(mean, var)
        members = output.view(len(output), self.ensemble_size, self.num_features, *output.shape[2:])
        return members.transpose(0, 1)

    def _normalized_once(self, input: Tensor) -> Tensor:
        """Of an input that all members share there is one mean and one variance."""
        exact = input.to(torch.promote_types(input.dtype, torch.float32))
        mean, var = self._room(exact, exact)
        output = F.batch_norm(exact, mean, var, training=True, momentum=1.0, eps=self.eps)
        self._track(mean, var)
        if self.weight is None or self.bias is None:
            return output.to(input.dtype).expand(self.ensemble_size, *output.shape)
        return torch.addcmul(self._along(self.bias), output, self._along(self.weight)).to(input.dtype)

    def _room(self, rows: Tensor, like: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Where `F.batch_norm` writes means and unbiased variances of the channels."""
        if not self.training or self.running_mean is None or like is None:
            return None, None
        zeros = like.new_zeros(2, rows.shape[1])
        return zeros[0], zeros[1]

    @torch.no_grad()
    def _track(self, mean: Tensor | None, var: Tensor | None) -> None:
        """Adds the statistics of a batch to the running ones."""
        running_mean, running_var, count = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or var is None or running_mean is None or running_var is None or count is None:
            return
        count.add_(1)
        share: Any = self.momentum
        if share is None:  # the average of all batches, of which members may have seen different numbers
            share = (1 / count.to(running_mean.dtype)).unsqueeze(1)
        for running, of_batch in ((running_mean, mean), (running_var, var)):
            own = of_batch.view(-1, self.num_features).to(running.dtype)  # [E or 1, F]
            running.copy_(share * own + (1 - share) * running)


class EnsembleBatchNorm2d(EnsembleBatchNorm):
    """`ensemble_size` copies of `nn.BatchNorm2d`: `EnsembleBatchNorm` of the channels of images.

    Images `[B, F, H, W]` (shared by all members) or `[E, B, F, H, W]` -> `[E, B, F, H, W]`; the statistics
    are those of all pixels of a batch. All else is as there. `EnsembleSequential.packed` folds it into the
    convolution before it.
    """

    _layer = nn.BatchNorm2d
    _pixels = 2


def _describe(module: Any) -> str:
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    where = f", {tensors[0].dtype}, {tensors[0].device}" if tensors else ""
    return f"{type(module).__name__}({module.extra_repr()}){where}"


def fold_batchnorm(model: nn.Sequential | Sequence[nn.Module]) -> EnsembleMLP:
    """An `EnsembleMLP` that computes what a sequence with batch norms computes in evaluation.

    With scale s = weight / sqrt(running_var + eps) and shift t = bias - running_mean s, a norm after a linear
    layer makes W <- s W, b <- s b + t of it, and one after an activation, or in front, makes W <- W s,
    b <- b + W t of the next linear layer; in float64, then rounded to the dtype of the weights.

    Args:
        model: `EnsembleLinear`, `EnsembleBatchNorm` after it or after the activation, activations of
            `torch.nn` as `EnsembleMLP` has them, ..., `EnsembleLinear`: in an `nn.Sequential` (also nested)
            or a list. `nn.Dropout`, which does nothing in evaluation, and `nn.Identity` are left out. All is
            copied.

    Returns:
        An `EnsembleMLP` in evaluation.

    Raises:
        ValueError: a norm that is in training, or has no running statistics, or no linear layer beside it to
            be folded into; another kind of module, or hooks that run in forward; by name.
    """
    argument = "fold_batchnorm: model"
    modules = [model] if isinstance(model, nn.Module) else list(model)
    if isinstance(model, nn.Module) and not _sequential.is_plain(model, nn.Sequential):
        raise ValueError(f"{argument}: expected nn.Sequential or a list, got {type(model).__name__}")
    layers = _sequential.parse(modules, argument, model, EnsembleLinear, EnsembleBatchNorm, evaluation=True)
    none = layers[0].weight.new_empty(len(layers[0].weight), 0)
    biases = [none if layer.bias is None else layer.bias.detach().clone() for layer in layers]
    folded = EnsembleMLP.from_parameters(
        [layer.weight.detach().clone() for layer in layers],
        _stacking.none_if_empty(biases),
        **_stacking.options_of(layers, argument),
    )
    return folded.eval()
