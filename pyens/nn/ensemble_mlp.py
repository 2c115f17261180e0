"""Ensembles of linear layers and of MLPs."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from typing_extensions import Self, Unpack

from pyens._types import (
    Activation,
    Dropout,
    DropoutPosition,
    LayerOptions,
    Norm,
    NormPosition,
    Residual,
    WeightLayout,
)
from pyens.masks import check
from pyens.nn import _layer_options, _sequential, _stacking
from pyens.nn._buffers import BufferList, Derived, _derive_after_loading
from pyens.nn._layer_options import as_json, checked_bias, checked_position, norms_of
from pyens.nn._layout import as_out_in
from pyens.nn._members import check_layers, check_norms, listed
from pyens.nn._stacked_mlp import StackedMLP
from pyens.nn.ensemble import Indices, chosen_members, parameters_of, reader
from pyens.ops.ensemble_mlp import Norms, ensemble_mlp, ensemble_mlp_packed, prepack


class EnsembleLinear(StackedMLP):
    r"""`ensemble_size` copies of `nn.Linear` that run as one: output[m] = x W[m]^T + b[m].

    Args:
        ensemble_size: E, the number of members.
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        seeds: one per member, see `reset_parameters`.

    Parameters: `weight` `[E, out_features, in_features]` and `bias` `[E, out_features]` (or None).
    """

    activation = "identity"

    def __init__(
        self,
        ensemble_size: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seeds: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__()
        check(
            "EnsembleLinear", ensemble_size=ensemble_size, in_features=in_features, out_features=out_features
        )
        self.ensemble_size = ensemble_size
        self.in_features = in_features
        self.out_features = out_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(ensemble_size, out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(ensemble_size, out_features, **factory)) if bias else None
        self.reset_parameters(seeds)

    @classmethod
    def from_modules(cls, modules: Iterable[nn.Linear]) -> Self:
        """An ensemble of copies of trained layers of one shape, dtype and device, bit for bit."""
        modules = listed(modules)
        layers = []
        for i, module in enumerate(modules):
            argument = f"from_modules: modules[{i}]"
            if not _sequential.is_plain(module, nn.Linear):
                raise ValueError(f"{argument}: expected nn.Linear, got {type(module).__name__}")
            layers.append([_sequential.linear_layer(module, argument)])
        weights, biases = _stacking.stack(layers)
        (weight,) = weights
        ensemble_size, out_features, in_features = weight.shape
        new = cls(ensemble_size, in_features, out_features, bool(biases), device="meta", dtype=weight.dtype)
        new.weight = nn.Parameter(weight)
        new.bias = nn.Parameter(biases[0]) if biases else None
        return new.train(modules[0].training)

    def stacked(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        weight, bias = parameters_of(self, ("weight", "bias"))
        return [weight], [] if bias is None else [bias]

    def member(self, i: int) -> nn.Linear:  # type: ignore[override]
        """Member i as an `nn.Linear`, with copies of its parameters."""
        self._check_member(i)
        return _stacking.unstack(*self.stacked(), i)[0].train(self.training)

    def config(self) -> dict[str, Any]:
        return {
            "ensemble_size": self.ensemble_size,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }


class EnsembleMLP(Derived, StackedMLP):
    r"""`ensemble_size` MLPs that run as one: Linear, activation, ..., Linear, with norms and residuals.

    Args:
        ensemble_size: E, the number of members.
        in_features, out_features: of every member.
        hidden_features: widths of the hidden layers; empty for a linear model.
        activation: of the hidden layers, one for all or one for each, as in `pyens.ops.ensemble_mlp`: relu,
            gelu, silu, elu, softplus, tanh, identity, mish, celu, leaky_relu, sigmoid, gelu_tanh, hardswish
            or sin, or with a parameter "elu(0.5)".
        output_activation: likewise, of the last layer.
        norm: layer_norm, rms_norm or None, of all hidden layers or of each.
        norm_affine: whether norms have parameters.
        norm_eps: of all norms. None: 1e-5 where there is a layer_norm, else that of `nn.RMSNorm`.
        norm_position: before_activation or after_activation.
        residual: whether a hidden layer adds what it reads: of all that are as wide (True), or of each.
        bias: whether the layers have biases, all or each: L with the last one.
        dropout: p in [0, 1), the probability of dropping a hidden activation in training. Or one for each
            member, which it keeps wherever it is chosen to, or one for each of H hidden layers: `[[a, b]]`,
            or `[E, H]`.
        dropout_position: after_activation, or before_norm: in the layers that have a norm.
        device, dtype: of the parameters.
        seeds: one per member, see `reset_parameters`.

    In a hidden layer comes, of what there is: dropout ("before_norm"), norm ("before_activation"),
    activation, norm ("after_activation"), dropout ("after_activation"), + what the layer reads (residual).

    Attributes:
        dropout_generator: a `torch.Generator` on the CPU that the seeds of dropout are drawn from; None:
            torch's default one. Activation checkpointing needs None, whose state it knows to restore;
            compiled code with a generator breaks its graph there, and without one draws other seeds.
        mc_dropout: whether dropout is active in evaluation too (False).

    Parameters: `weights.{l}` `[E, out_l, in_l]` and `biases.{l}` `[E, out_l]` of the layers that have one;
    `norm_weights.{i}` and `norm_biases.{i}` `[E, out]` of the norms, counted without the layers that have
    none (rms_norm has no bias), which begin as 1 and 0.

    Example:
        >>> model = EnsembleMLP(100, 32, [50, 20, 10], 1)
        >>> model(torch.randn(8, 32)).shape
        torch.Size([100, 8, 1])
        >>> model = EnsembleMLP(10, 32, [64, 64], 1, norm="layer_norm", residual=True, activation="mish")
        >>> model(torch.randn(8, 32), members=[7, 2]).shape
        torch.Size([2, 8, 1])
    """

    _gaps: bool = False  # whether there are layers without a bias beside others

    def __init__(
        self,
        ensemble_size: int,
        in_features: int,
        hidden_features: Sequence[int],
        out_features: int,
        *,
        activation: Activation | Sequence[Activation] = "relu",
        output_activation: Activation = "identity",
        norm: Norm | Sequence[Norm | None] | None = None,
        norm_affine: bool = True,
        norm_eps: float | None = None,
        norm_position: NormPosition = "before_activation",
        residual: Residual = False,
        bias: bool | Sequence[bool] = True,
        dropout: float | Sequence[float] | Sequence[Sequence[float]] = 0.0,
        dropout_position: DropoutPosition = "after_activation",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seeds: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__()
        if isinstance(hidden_features, int):
            raise TypeError(
                f"EnsembleMLP: hidden_features: expected a sequence of widths, got {hidden_features}"
            )
        check(
            "EnsembleMLP",
            ensemble_size=ensemble_size,
            in_features=in_features,
            out_features=out_features,
            **{f"hidden_features[{i}]": width for i, width in enumerate(hidden_features)},
        )
        hidden = len(hidden_features)
        self.ensemble_size = ensemble_size
        self.in_features = in_features
        self.hidden_features = tuple(hidden_features)
        self.out_features = out_features
        self.activation = _layer_options.checked_activation(activation, hidden)
        self.output_activation = _layer_options.checked_output_activation(output_activation)
        self.norm = _layer_options.checked_norm(norm, hidden_features)
        self.norm_affine = bool(norm_affine)
        self.norm_eps = _layer_options.checked_eps(norm_eps)
        self.norm_position = checked_position("norm_position", norm_position)
        self.residual = _layer_options.checked_residual(residual, in_features, hidden_features)
        self.dropout = _layer_options.checked_dropout(dropout, ensemble_size, hidden)
        self.dropout_position = checked_position("dropout_position", dropout_position)
        if self.dropout_position == "before_norm" and self.norm is None:
            raise ValueError(
                "EnsembleMLP: dropout_position: expected after_activation where no layer has a norm, "
                "got before_norm"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        layers = list(itertools.pairwise([in_features, *hidden_features, out_features]))
        has_bias = checked_bias(bias, len(layers))
        self._set(
            [torch.empty(ensemble_size, o, i, **factory) for i, o in layers],
            [
                torch.empty(ensemble_size, o, **factory) if has else None
                for (_, o), has in zip(layers, has_bias, strict=True)
            ],
            [torch.empty(ensemble_size, width, **factory) for width, _ in self._affine_norms()],
            [
                torch.empty(ensemble_size, width, **factory) if kind == "layer_norm" else None
                for width, kind in self._affine_norms()
            ],
        )
        # A state dict that is assigned brings its own device.
        self.register_load_state_dict_post_hook(_derive_after_loading)  # type: ignore[no-untyped-call]
        self.reset_parameters(seeds)

    def _affine_norms(self) -> list[tuple[int, Norm]]:
        """Width and kind of the norms that have parameters."""
        kinds = norms_of(self.norm, len(self.hidden_features)) if self.norm_affine else []
        return [(w, k) for w, k in zip(self.hidden_features, kinds, strict=False) if k is not None]

    def _set(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        norm_weights: Sequence[Tensor],
        norm_biases: Sequence[Tensor | None],
    ) -> None:
        """The parameters; None stands for a layer or a norm without a bias."""
        self.weights = nn.ParameterList(weights)
        self.biases = _parameters(biases)
        self._names = tuple(str(layer) for layer in range(len(weights)))
        self._bias_names = _names(biases)
        self._gaps = len(self._bias_names) not in (0, len(weights))
        self._read_weights, self._read_biases = reader(self._names), reader(self._bias_names)
        if self.norm is not None and self.norm_affine:
            self.norm_weights = nn.ParameterList(norm_weights)
            self.norm_biases = _parameters(norm_biases)
            self._norm_names = tuple(map(str, range(len(norm_weights)))), _names(norm_biases)
        self._derive()

    @classmethod
    def from_modules(
        cls,
        modules: Iterable[nn.Module],
        *,
        layers: Callable[[Any], Iterable[nn.Module]] | None = None,
    ) -> Self:
        """An ensemble of copies of trained members, bit for bit but for batch norms.

        Each is an `nn.Sequential`, also nested, of layers: `nn.Linear`, and after it what `EnsembleMLP` has:

        - an activation that `pyens.ops.ensemble_mlp` names, of each layer its own, also after the last one,
          among them nn.ELU(0.5), nn.CELU(0.1), nn.LeakyReLU(0.2) and nn.GELU("tanh");
        - `nn.LayerNorm` or `nn.RMSNorm` over the features of the layer, before the activation or after it,
          with one eps throughout. Where some have parameters, the others get ones and zeros, which train; so
          does the bias of an nn.LayerNorm(bias=False);
        - `nn.Dropout` after the activation, or right before the norm, at any rate: they become the rates
          `[E, H]` of `dropout`, or fewer where they are the same;
        - `nn.BatchNorm1d` in evaluation, which is folded into the `nn.Linear` before it, or after it where it
          follows an activation or comes first (in float64, then rounded);
        - all of it in a `pyens.nn.Residual`, of a hidden layer.

        Subclasses that do not override `forward` are what they are derived from; `nn.Identity` is left out.

        Args:
            modules: the members. The ensemble is in training if the first one is.
            layers: gives a member's layers in their order, where members are not `nn.Sequential`:
                `lambda m: [m.fc1, nn.ReLU(), m.fc2]`. What else `forward` does is not looked at.

        Raises:
            ValueError: whatever the kernel does not compute (nn.Softplus with another beta, norms over other
                features or in mixed places, dropout in mixed or other places, ...), hooks that run in
                forward, weights that are computed from others; members that differ in more than rates; by
                name.
        """
        modules = listed(modules)
        arguments = [f"from_modules: modules[{i}]" for i in range(len(modules))]
        members = [
            _sequential.member_layers(m, argument, layers)
            for m, argument in zip(modules, arguments, strict=True)
        ]
        options = list(map(_stacking.options_of, members, arguments))
        weights, biases = _stacking.stack(members)  # refuses other depths and widths before other options
        _stacking.compare(options)
        rates = [[layer.dropout for layer in member[:-1]] for member in members]
        new = cls.from_parameters(
            weights, biases, dropout=rates, **options[0], **_stacking.stack_norms(members)
        )
        return new.train(modules[0].training)

    @classmethod
    def from_stacked(
        cls,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None = None,
        layout: WeightLayout | None = None,
        *,
        norm_weights: Sequence[Tensor] | None = None,
        norm_biases: Sequence[Tensor] | None = None,
        **options: Unpack[LayerOptions],
    ) -> Self:
        """An ensemble of copies of weights and biases that are stacked over the members, layer by layer.

        Args:
            weights: `[E, out, in]`, or `[E, in, out]` as products `x @ w` have them.
            biases: `[E, out]` or `[E, 1, out]`, `[E, 0]` for a layer without one; None or empty: none.
            layout: "out_in" for `[E, out, in]`, "in_out" for `[E, in, out]`. None: the one that the shapes
                fit; where they fit both, as those of square layers do, it has to be given.
            norm_weights, norm_biases: as in `from_parameters`, copied.
            options: activation, norm, residual, dropout and what else `EnsembleMLP` takes of this kind.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that do not fit each other or the layout; shapes
                that fit both without a layout.

        Example:
            >>> weights = [torch.randn(100, 32, 50), torch.randn(100, 50, 1)]
            >>> EnsembleMLP.from_stacked(weights, layout="in_out", activation="tanh").hidden_features
            (50,)
        """
        copies = as_out_in(weights, biases, layout)
        norms = [
            None if given is None else [t.detach().clone() for t in given]
            for given in (norm_weights, norm_biases)
        ]
        return cls.from_parameters(*copies, norm_weights=norms[0], norm_biases=norms[1], **options)

    @classmethod
    def from_parameters(
        cls,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *,
        norm_weights: Sequence[Tensor] | None = None,
        norm_biases: Sequence[Tensor] | None = None,
        **options: Unpack[LayerOptions],
    ) -> Self:
        """An ensemble of weights `[E, out, in]` and biases `[E, out]` (none: empty), used as they are.

        Args:
            weights, biases: of the layers; `[E, 0]` for a layer without a bias.
            norm_weights, norm_biases: `[E, out]` for each hidden layer that has a norm, in their order;
                biases `[E, 0]` for an rms_norm. None: ones and zeros, where `norm_affine` asks for them.
            options: activation, norm, residual, dropout and what else `EnsembleMLP` takes of this kind.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that do not fit each other.
        """
        check_layers("from_parameters", weights, biases, members=True)
        first = weights[0]
        *hidden, out = (w.shape[1] for w in weights)
        has_bias = [bias.shape[1] > 0 for bias in biases] or False
        new = cls(
            first.shape[0],
            first.shape[2],
            hidden,
            out,
            bias=has_bias,
            device="meta",
            dtype=first.dtype,
            **options,
        )
        norms = new._affine_norms()
        given = {"norm_weights": norm_weights, "norm_biases": norm_biases}
        shapes = {
            "norm_weights": [(len(first), width) for width, _ in norms],
            "norm_biases": [(len(first), width if kind == "layer_norm" else 0) for width, kind in norms],
        }
        made = {}
        for name, initial in (("norm_weights", 1.0), ("norm_biases", 0.0)):
            if (own := given[name]) is not None:
                check_norms("from_parameters", name, own, shapes[name], first)
                made[name] = list(own)
            else:
                made[name] = [first.detach().new_full(shape, initial) for shape in shapes[name]]
        new._set(weights, _or_none(biases), made["norm_weights"], _or_none(made["norm_biases"]))
        return new

    def stacked(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Weights `[E, out, in]` and biases `[E, out]`, `[E, 0]` of a layer without one (all: empty)."""
        modules: dict[str, Any] = self._modules  # submodules as attributes cost half a microsecond each
        weights, biases = modules["weights"], modules["biases"]
        found: Any = None
        if not is_dynamo_compiling():  # dynamo does not know what reads them
            # Not called as methods, which are looked for in all classes first.
            read_weights, read_biases = self._read_weights, self._read_biases
            try:
                found = read_weights(weights._parameters), read_biases(biases._parameters)
            except KeyError:
                found = None
        if found is None:
            found = parameters_of(weights, self._names), parameters_of(biases, self._bias_names)
        return self._with_gaps(*found) if self._gaps else found

    def _with_gaps(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        none, each = weights[0].new_empty(self.ensemble_size, 0), iter(biases)
        return weights, [next(each) if name in self._bias_names else none for name in self._names]

    def _norm_parameters(self) -> list[tuple[Tensor | None, Tensor | None]]:
        if self.norm is None:
            return []
        if not self.norm_affine:
            return [(None, None)] * sum(k is not None for k in norms_of(self.norm, len(self.hidden_features)))
        names, bias_names = self._norm_names
        weights = parameters_of(self.norm_weights, names)
        biases = iter(parameters_of(self.norm_biases, bias_names))
        return [(w, next(biases) if n in bias_names else None) for n, w in zip(names, weights, strict=True)]

    def _norms(self) -> Norms:
        if not self.norm_affine:
            return (), ()
        names, bias_names = self._norm_names
        modules: dict[str, Any] = self._modules
        weights = parameters_of(modules["norm_weights"], names)
        biases = parameters_of(modules["norm_biases"], bias_names)
        if len(biases) in (0, len(weights)):
            return weights, biases
        each = iter(biases)
        return weights, [
            next(each) if name in bias_names else torch.zeros_like(weight)
            for name, weight in zip(names, weights, strict=True)
        ]

    def config(self) -> dict[str, Any]:
        has = [bias.shape[1] > 0 for bias in self.stacked()[1]]
        options = {
            "ensemble_size": self.ensemble_size,
            "in_features": self.in_features,
            "hidden_features": self.hidden_features,
            "out_features": self.out_features,
            "activation": self.activation,
            "output_activation": self.output_activation,
            "norm": self.norm,
            "norm_affine": self.norm_affine,
            "norm_eps": self.norm_eps,
            "norm_position": self.norm_position,
            "residual": self.residual,
            "bias": any(has) if len(set(has)) < 2 else tuple(has),
            "dropout": self.dropout,
            "dropout_position": self.dropout_position,
        }
        return {name: as_json(value) for name, value in options.items()}

    def _derive(self) -> None:
        # The rates of the members and, in float64 beside the parameters, what the operation reads.
        self._derived = None
        if isinstance(self.dropout, tuple):
            device = next(self.parameters()).device
            self._derived = self.dropout, torch.tensor(self.dropout, dtype=torch.float64, device=device)

    def _rates(self) -> Dropout:
        dropout = self.dropout
        if not isinstance(dropout, tuple):
            return dropout
        if not is_dynamo_compiling() and (self._derived is None or self._derived[0] is not dropout):
            self._derive()  # it was assigned since
        rates: Tensor = self._derived[1]
        return rates


def _parameters(biases: Sequence[Tensor | None]) -> nn.ParameterList:
    """A list with None where there is none, and empty where there is none at all."""
    return nn.ParameterList(biases if any(bias is not None for bias in biases) else [])


def _names(biases: Sequence[Tensor | None]) -> tuple[str, ...]:
    return tuple(str(i) for i, bias in enumerate(biases) if bias is not None)


def _or_none(biases: Sequence[Tensor]) -> list[Tensor | None]:
    return [bias if bias.shape[1] > 0 else None for bias in biases]


class PackedEnsembleMLP(Derived, StackedMLP):
    """An ensemble frozen for inference: same outputs, bit for bit, sooner for small batches.

    Keeps the weights twice: as they were, and in the order in which the kernel reads them for small batches.
    That order belongs to the machine, so the state dict holds only the first, under the names that
    `EnsembleMLP` uses; loading either's state dict, copying, moving and unpickling pack anew. There are no
    parameters: it does not train, and under autocast it computes in its own dtype. The buffers must not be
    changed in place or exchanged (`torch.func.functional_call`). On CUDA it reads the weights as they are.

    As an ensemble it gives losses without gradients for its weights, `select` gives an `EnsembleMLP`, and
    `config` is that of one.

    Norms, residuals and biases of some layers alone are refused: the packed kernel does not have them.

    Made by `EnsembleMLP.packed()` and `EnsembleLinear.packed()` (an `EnsembleMLP` of one layer then).
    """

    def __init__(self, ensemble: StackedMLP) -> None:
        super().__init__()
        _sequential.check_unchanged("packed", ensemble, StackedMLP, PackedEnsembleMLP)
        weights, biases = ensemble.stacked()
        for name, has in (
            ("norm", ensemble.norm is not None),
            ("residual", ensemble.residual is not False),
            ("bias", len({bias.shape[1] > 0 for bias in biases}) > 1),
        ):
            if has:
                expected = "of all layers or of none" if name == "bias" else "none in the layers"
                got = ensemble.config()[name]
                raise ValueError(f"PackedEnsembleMLP: ensemble: expected {name} {expected}, got {got}")
        *hidden, self.out_features = (weight.shape[1] for weight in weights)
        self.ensemble_size = ensemble.ensemble_size
        self.in_features = weights[0].shape[2]
        self.hidden_features = tuple(hidden)
        self.activation = ensemble.activation
        self.output_activation = ensemble.output_activation
        self.weights = BufferList(weights)
        self.biases = BufferList(biases)
        self._derive_and_follow()
        self.eval()

    def forward(  # type: ignore[override]  # without dropout
        self, input: Tensor | tuple[Tensor, ...], *, shared: bool = False
    ) -> Tensor:
        """As `EnsembleMLP.forward`, without dropout."""
        packed, weights, biases = self._derived
        options: dict[str, Any] = {
            "activation": self.activation,
            "output_activation": self.output_activation,
            "shared": shared,
        }
        if packed is None:
            return ensemble_mlp(input, weights, biases, **options)
        return ensemble_mlp_packed(input, packed, weights, biases, **options)

    def stacked(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        _, weights, biases = self._derived
        return weights, biases

    def select(self, indices: Indices) -> EnsembleMLP:  # type: ignore[override]
        weights, biases = self.stacked()
        members = chosen_members(self.ensemble_size, indices).to(weights[0].device)
        chosen = EnsembleMLP.from_parameters(
            [w[members] for w in weights],
            [b[members] for b in biases],
            activation=self.activation,
            output_activation=self.output_activation,
        )
        return chosen.train(self.training)

    config = EnsembleMLP.config

    def _derive(self) -> None:
        weights, biases = list(self.weights.buffers()), list(self.biases.buffers())
        # The layout is the CPU kernel's; on CUDA the weights are read as they are. Kept as lists, because
        # gathering the buffers costs each call a microsecond.
        self._derived = (None if weights[0].is_cuda else prepack(weights, biases), weights, biases)
