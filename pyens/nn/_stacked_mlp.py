"""What the ensembles of linear layers and of MLPs share: how they are called, drawn and taken apart."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from typing_extensions import Unpack

from pyens._types import (
    Activation,
    Dropout,
    DropoutPosition,
    Loss,
    LossOptions,
    LossReduction,
    NormPosition,
    WeightLayout,
)
from pyens.nn import _stacking
from pyens.nn._layer_options import is_of_layers, norms_of
from pyens.nn._layout import check_layout, layout_needed
from pyens.nn._members import Members, draw_linear
from pyens.nn.residual import Residual
from pyens.ops.ensemble_mlp import Layers, Norms, call_ensemble_mlp, layer_options
from pyens.ops.ensemble_mlp_loss import ensemble_mlp_loss
from pyens.reference.activations import activation_module
from pyens.reference.ensemble_mlp import residual_layers

if TYPE_CHECKING:
    from pyens.nn.ensemble_mlp import PackedEnsembleMLP
    from pyens.nn.int8 import Int8EnsembleMLP
    from pyens.nn.sparse import SparseEnsembleMLP

_NO_NORMS: Norms = ((), ())
# What `layer_options` makes its own of, beside the activation: assigned, it is made anew.
_OF_LAYERS = frozenset(
    ("output_activation", "norm", "norm_eps", "norm_position", "residual", "dropout_position")
)


class StackedMLP(Members):
    """`EnsembleLinear`, `EnsembleMLP` and `PackedEnsembleMLP`: a stack of linear layers for each member."""

    activation: Activation | tuple[Activation, ...]
    norm_affine: bool = True
    norm_eps: float | None = None
    norm_position: NormPosition = "before_activation"
    dropout_position: DropoutPosition = "after_activation"
    dropout_generator: torch.Generator | None = None
    mc_dropout: bool = False
    # The activation and the dtype, and what the operation is given of layers of such.
    _known_layers: tuple[Any, torch.dtype, Layers] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _OF_LAYERS:
            self._known_layers = None

    def forward(
        self,
        input: Tensor | tuple[Tensor, ...],
        *,
        dropout: Dropout | None = None,
        dropout_seeds: Tensor | None = None,
        members: Sequence[int] | Tensor | None = None,
        shared: bool = False,
    ) -> Tensor:
        """`[B, in_features]` (shared by all members) or `[E, B, in_features]` -> `[E, B, out_features]`.

        Also `[in_features]` -> `[E, out_features]`, and `[1, B, in_features]`, which all members share; and a
        tuple of inputs, which are put together along the features.

        Args:
            shared: whether an input of any dimensions `[..., in_features]` is the same for all members:
                -> `[E, ..., out_features]`.
            members: int64 `[n]` or n ints: only these members are computed, in this order, their parameters
                read where they lie. E is n then, of the input, the seeds and the output. Each has its own
                rate of dropout; see `pyens.ops.ensemble_mlp` for the gradients.
            dropout: of the hidden activations; None: that of the ensemble.
            dropout_seeds: int64 `[E]`, see `pyens.ops.ensemble_mlp`. Given, dropout is applied, also in
                evaluation. None: in training, and with `mc_dropout` in evaluation too, seeds are drawn from
                `dropout_generator`, once a call; in evaluation there is no dropout.
        """
        if members is not None:
            members = self._members(members)
        rate = self.dropout if dropout is None else dropout
        if not isinstance(rate, (int, float)) or rate != 0:
            rate, dropout_seeds = self._dropping(dropout, dropout_seeds, members)
        weights, biases = self.stacked()
        known = self._known_layers
        if self.norm is not None:
            norms, layers = self._norms(), self._layers(weights)
        elif known is not None and known[0] is self.activation:  # as in `_layers`, without its call
            norms, layers = _NO_NORMS, known[2]
        else:
            norms, layers = _NO_NORMS, self._layers(weights)
        return call_ensemble_mlp(
            input, weights, biases, norms, layers, rate, dropout_seeds, members, None, shared
        )

    def loss(  # type: ignore[override]
        self,
        input: Tensor | tuple[Tensor, ...],
        target: Tensor,
        *,
        loss: Loss,
        sample_weight: Tensor | None = None,
        dropout: Dropout | None = None,
        dropout_seeds: Tensor | None = None,
        members: Sequence[int] | Tensor | None = None,
        shared: bool = False,
        reduction: LossReduction = "mean",
        **options: Unpack[LossOptions],
    ) -> Tensor:
        """Each member's mean loss `[E]`, its gradient computed in the same pass; train on its sum.

        The losses, their options and `reduction` are those of `pyens.ops.ensemble_mlp_loss`. Input, members
        and dropout as in `forward`; target and sample_weight have the input's dimensions in the place of B.
        """
        return ensemble_mlp_loss(
            input,
            target,
            loss=loss,
            sample_weight=sample_weight,
            shared=shared,
            reduction=reduction,
            **self.of_loss(dropout, dropout_seeds, members),
            **options,
        )

    def network(self) -> tuple[Sequence[Tensor], ...]:
        """Weights, biases, and those of the norms, as the operation takes them."""
        return (*self.stacked(), *(_NO_NORMS if self.norm is None else self._norms()))

    def of_loss(
        self,
        dropout: Dropout | None = None,
        dropout_seeds: Tensor | None = None,
        members: Sequence[int] | Tensor | None = None,
    ) -> dict[str, Any]:
        """What a call of the loss is given of the network: its parameters, its layers, its dropout."""
        if members is not None:
            members = self._members(members)
        rate = self.dropout if dropout is None else dropout
        if not isinstance(rate, (int, float)) or rate != 0:
            rate, dropout_seeds = self._dropping(dropout, dropout_seeds, members)
        weights, biases, norm_weights, norm_biases = self.network()
        return {
            "weights": weights,
            "biases": biases,
            "activation": self.activation,
            "output_activation": self.output_activation,
            "norm": self.norm,
            "norm_weights": norm_weights,
            "norm_biases": norm_biases,
            "norm_eps": self.norm_eps,
            "norm_position": self.norm_position,
            "residual": self.residual,
            "dropout": rate,
            "dropout_seeds": dropout_seeds,
            "dropout_position": self.dropout_position,
            "members": members,
        }

    def _layers(self, weights: Sequence[Tensor]) -> Layers:
        """The options of the layers as the operation takes them, made anew where they may be others."""
        known = self._known_layers
        if (
            known is not None
            and known[0] is self.activation
            and (self.norm is None or known[1] == weights[0].dtype)  # which norm_eps may depend on
        ):
            return known[2]
        layers = layer_options(
            type(self).__name__,
            weights,
            self.activation,
            self.output_activation,
            self.norm,
            self.norm_eps,
            self.norm_position,
            self.residual,
            self.dropout_position,
        )
        if not is_dynamo_compiling():
            self._known_layers = self.activation, weights[0].dtype, layers
        return layers

    def _norms(self) -> Norms:
        """Weights and biases of the norms, as the operation takes them."""
        return _NO_NORMS

    def _members(self, members: Sequence[int] | Tensor) -> Tensor:
        """The chosen members as the operation takes them."""
        if isinstance(members, Tensor):
            return members
        try:
            chosen = [None if isinstance(member, bool) else index(member) for member in members]
        except TypeError:
            chosen = [None]
        if None in chosen:
            raise TypeError(
                f"{type(self).__name__}: members: expected int64 [n] or a sequence of ints, got {members!r}"
            )
        return torch.tensor(chosen, dtype=torch.int64, device=self.stacked()[0][0].device)

    def _dropping(
        self, dropout: Dropout | None, seeds: Tensor | None, members: Tensor | None
    ) -> tuple[Dropout, Tensor | None]:
        """The rate and the seeds of a call, drawn where it is to drop and was given none."""
        if seeds is None and (self.training or self.mc_dropout):
            seeds = self._draw_seeds(self.ensemble_size if members is None else len(members))
        if dropout is None:
            dropout = 0.0 if seeds is None else self._rates()
            if members is not None and isinstance(dropout, Tensor) and not is_of_layers(self.dropout):
                dropout = dropout[members]
        return dropout, seeds

    def _draw_seeds(self, members: int) -> Tensor:
        generator, shape, device = self.dropout_generator, (members,), self.stacked()[0][0].device
        if generator is None and is_dynamo_compiling():
            return torch.randint(2**62, shape, device=device)
        if generator is not None and (
            not isinstance(generator, torch.Generator) or generator.device.type != "cpu"
        ):
            kind = type(generator).__name__
            got = f"one on {generator.device}" if isinstance(generator, torch.Generator) else kind
            raise TypeError(
                f"{type(self).__name__}: dropout_generator: expected a torch.Generator on the CPU, got {got}"
            )
        # On the CPU, so that a generator means the same on every device.
        return torch.randint(2**62, shape, generator=generator, device="cpu").to(device)

    def _rates(self) -> Dropout:
        return self.dropout

    def _norm_parameters(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Weight and bias of each norm, those that it has."""
        return []

    def _parameters_alone(self, function: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Weights and biases to be written to, in the order of a member's modules: norms after layers."""
        weights, biases = self.stacked()
        norms = iter(self._norm_parameters())
        kinds = [*norms_of(self.norm, len(weights) - 1), None]
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for layer, kind in enumerate(kinds):
            bias = biases[layer] if biases and biases[layer].shape[1] > 0 else None
            for of_module in [(weights[layer], bias), *([] if kind is None else [next(norms)])]:
                for own, tensor in zip(found, of_module, strict=True):
                    if tensor is not None:
                        own.append(tensor)
        if not all(isinstance(tensor, nn.Parameter) for own in found for tensor in own):
            raise ValueError(
                f"{function}: expected parameters, got a weight that is computed from others or frozen"
            )
        return found

    def draw(self, member: int, generator: torch.Generator | None) -> None:
        self._parameters_alone("reset_parameters")
        weights, biases = self.stacked()
        for layer, weight in enumerate(weights):
            bias = biases[layer][member] if biases and biases[layer].shape[1] > 0 else None
            draw_linear(weight[member], bias, generator)
        for norm_weight, norm_bias in self._norm_parameters():
            for tensor, initial in ((norm_weight, 1), (norm_bias, 0)):
                if tensor is not None:
                    tensor[member] = initial

    def member(self, i: int) -> nn.Sequential:
        """Member i as an `nn.Sequential`, with copies of its parameters and without dropout.

        Norms are `nn.LayerNorm` and `nn.RMSNorm`, a hidden layer with a residual is a `pyens.nn.Residual`.
        """
        self._check_member(i)
        weights, biases = self.stacked()
        hidden = len(weights) - 1
        activations = [self.activation] * hidden if isinstance(self.activation, str) else self.activation
        kinds, residuals = norms_of(self.norm, hidden), residual_layers(self.residual, weights)
        norms, eps = iter(self._norm_parameters()), self.norm_eps
        if eps is None and "layer_norm" in kinds:
            eps = 1e-5
        *linears, last = _stacking.unstack(weights, biases, i)
        layers: list[nn.Module] = []
        for layer, linear in enumerate(linears):
            block = [linear, activation_module(activations[layer])]
            if (kind := kinds[layer]) is not None:
                own = [None if tensor is None else tensor[i] for tensor in next(norms)]
                norm = _stacking.norm_module(kind, linear.out_features, eps, *own).to(linear.weight.device)
                block.insert(1 if self.norm_position == "before_activation" else 2, norm)
            layers += [Residual(*block)] if residuals[layer] else block
        layers.append(last)
        if self.output_activation != "identity":
            layers.append(activation_module(self.output_activation))
        return nn.Sequential(*layers).train(self.training)

    def load_stacked(self, params: Mapping[str, Tensor], *, layout: WeightLayout | None = None) -> None:
        """Copies in the parameters that `torch.func.stack_module_state(members)` gives.

        Names may be anything that ends in `weight` and `bias`; layers and norms are taken in the mapping's
        order, each norm after its layer.

        Args:
            params: weights and biases `[E, out]`, also those of norms.
            layout: of the weights: "out_in" for `[E, out, in]`, as torch has them, "in_out" for
                `[E, in, out]`. None: `[E, out, in]`, which the shapes show, unless all layers are square.

        Raises:
            ValueError: names or shapes that do not fit, or square layers without a layout; nothing is copied
                then.
        """
        check_layout("load_stacked", layout)
        shapes = {tuple(weight.shape[1:]) for weight in self.stacked()[0]}
        if layout is None and all(out == inputs > 1 for out, inputs in shapes):
            raise layout_needed("load_stacked", "all layers are square, and no shape tells them apart")
        if layout == "in_out":
            params = {
                name: t.mT if name.endswith("weight") and t.dim() > 2 else t for name, t in params.items()
            }
        super().load_stacked(params)

    def sparse(self, masks: Sequence[Tensor] | None = None) -> "SparseEnsembleMLP":
        """The ensemble frozen with the weights that are not zero; see `SparseEnsembleMLP`.

        Args:
            masks: bool, one for each layer and of its weights' shape, which to keep; None: those that are not
                zero, as after `torch.nn.utils.prune`.

        Raises:
            ValueError: norms or residuals; masks of another shape.
            TypeError: 16-bit weights; masks that are not bool.
        """
        from pyens.nn.sparse import SparseEnsembleMLP

        return SparseEnsembleMLP(self, masks)

    def quantize(
        self,
        data: Tensor | Iterable[Tensor],
        *,
        observer: Callable[[], Any] | None = None,
        sparse: bool = False,
    ) -> "Int8EnsembleMLP":
        """The ensemble frozen with its weights in bytes; see `Int8EnsembleMLP`.

        Args:
            data: what the ranges of the layers' inputs are found from: inputs, or several batches of them.
                A range reaches from 0 on, in 255 steps: inputs far from it (years, 1e6 ± 1) must be centred
                first.
            observer: makes what finds the range of one layer of one member, as the observers of
                `torch.ao.quantization` and `torchao` do; None: the smallest and largest number, a
                `MinMaxObserver`.
            sparse: whether the state dict leaves the weights out that are zero.

        Raises:
            ValueError: norms or residuals; data that is empty, or not finite.
            TypeError: weights of another dtype than float32.
        """
        from pyens.nn.int8 import Int8EnsembleMLP

        return Int8EnsembleMLP(self, data, observer=observer, sparse=sparse)

    def packed(self) -> "PackedEnsembleMLP":
        """A frozen copy for inference that is faster for small batches. See `PackedEnsembleMLP`."""
        from pyens.nn.ensemble_mlp import PackedEnsembleMLP

        return PackedEnsembleMLP(self)

    def extra_repr(self) -> str:
        # Without what is as it is by default.
        return ", ".join(
            f"{name}={value}"
            for name, value in self.config().items()
            if value != getattr(type(self), name, ...)
        )
