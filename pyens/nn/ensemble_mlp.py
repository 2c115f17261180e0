"""Ensembles of linear layers and of MLPs."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from typing_extensions import Self, Unpack

from pyens import ops
from pyens._kinds import check_number
from pyens._types import Activation, Dropout, Loss, LossOptions, LossReduction, WeightLayout
from pyens.masks import check
from pyens.nn import _sequential
from pyens.nn._buffers import BufferList, Derived
from pyens.nn._layout import as_out_in, check_layout, layout_needed
from pyens.nn._members import Members, check_layers, draw_linear, listed
from pyens.nn.ensemble import Indices, chosen_members, one_rate, parameters_of, reader
from pyens.ops.ensemble_mlp import ensemble_mlp_packed, prepack


class _StackedMLP(Members):
    """What `EnsembleLinear`, `EnsembleMLP` and `PackedEnsembleMLP` share: a stack of linear layers each."""

    activation: Activation
    dropout_generator: torch.Generator | None = None
    mc_dropout: bool = False

    def forward(
        self,
        input: Tensor,
        *,
        dropout: Dropout | None = None,
        dropout_seeds: Tensor | None = None,
        shared: bool = False,
    ) -> Tensor:
        """`[B, in_features]` (shared by all members) or `[E, B, in_features]` -> `[E, B, out_features]`.

        Also `[in_features]` -> `[E, out_features]`, and `[1, B, in_features]`, which all members share.

        Args:
            shared: whether an input of any dimensions `[..., in_features]` is the same for all members:
                -> `[E, ..., out_features]`.
            dropout: of the hidden activations; None: that of the ensemble.
            dropout_seeds: int64 `[E]`, see `pyens.ops.ensemble_mlp`. Given, dropout is applied, also in
                evaluation. None: in training, and with `mc_dropout` in evaluation too, seeds are drawn from
                `dropout_generator`, once a call; in evaluation there is no dropout.
        """
        rate = self.dropout if dropout is None else dropout
        if not isinstance(rate, (int, float)) or rate != 0:
            rate, dropout_seeds = self._dropping(dropout, dropout_seeds)
        weights, biases = self.stacked()
        return ops.ensemble_mlp(
            input,
            weights,
            biases,
            activation=self.activation,
            dropout=rate,
            dropout_seeds=dropout_seeds,
            shared=shared,
        )

    def loss(  # type: ignore[override]
        self,
        input: Tensor,
        target: Tensor,
        *,
        loss: Loss,
        sample_weight: Tensor | None = None,
        dropout: Dropout | None = None,
        dropout_seeds: Tensor | None = None,
        shared: bool = False,
        reduction: LossReduction = "mean",
        **options: Unpack[LossOptions],
    ) -> Tensor:
        """Each member's mean loss `[E]`, its gradient computed in the same pass; train on its sum.

        The losses, their options and `reduction` are those of `pyens.ops.ensemble_mlp_loss`. Input and
        dropout as in `forward`; target and sample_weight have the input's dimensions in the place of B.
        """
        rate = self.dropout if dropout is None else dropout
        if not isinstance(rate, (int, float)) or rate != 0:
            rate, dropout_seeds = self._dropping(dropout, dropout_seeds)
        weights, biases = self.stacked()
        return ops.ensemble_mlp_loss(
            input,
            target,
            weights,
            biases,
            loss=loss,
            activation=self.activation,
            sample_weight=sample_weight,
            dropout=rate,
            dropout_seeds=dropout_seeds,
            shared=shared,
            reduction=reduction,
            **options,
        )

    def _dropping(self, dropout: Dropout | None, seeds: Tensor | None) -> tuple[Dropout, Tensor | None]:
        """The rate and the seeds of a call, drawn where it is to drop and was given none."""
        if seeds is None and (self.training or self.mc_dropout):
            seeds = self._draw_seeds()
        if dropout is None:
            dropout = 0.0 if seeds is None else self._rates()
        return dropout, seeds

    def _draw_seeds(self) -> Tensor:
        generator, shape, device = self.dropout_generator, (self.ensemble_size,), self.stacked()[0][0].device
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

    def draw(self, member: int, generator: torch.Generator | None) -> None:
        weights, biases = self._parameters_alone("reset_parameters")
        for layer, weight in enumerate(weights):
            draw_linear(weight[member], biases[layer][member] if biases else None, generator)

    def member(self, i: int) -> nn.Sequential:
        """Member i as an `nn.Sequential`, with copies of its parameters and without dropout."""
        self._check_member(i)
        layers: list[nn.Module] = []
        for linear in _sequential.unstack(*self.stacked(), i):
            layers += [linear, _sequential.activation_module(self.activation)]
        return nn.Sequential(*layers[:-1]).train(self.training)

    def load_stacked(self, params: Mapping[str, Tensor], *, layout: WeightLayout | None = None) -> None:
        """Copies in the parameters that `torch.func.stack_module_state(members)` gives.

        Names may be anything that ends in `weight` and `bias`; the layers are taken in the mapping's order.

        Args:
            params: weights and biases `[E, out]`.
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
                name: t.mT if name.endswith("weight") and t.dim() > 1 else t for name, t in params.items()
            }
        super().load_stacked(params)

    def packed(self) -> "PackedEnsembleMLP":
        """A frozen copy for inference that is faster for small batches. See `PackedEnsembleMLP`."""
        return PackedEnsembleMLP(self)


class EnsembleLinear(_StackedMLP):
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
        weights, biases = _sequential.stack(layers)
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
        return _sequential.unstack(*self.stacked(), i)[0].train(self.training)

    def config(self) -> dict[str, Any]:
        return {
            "ensemble_size": self.ensemble_size,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }


class EnsembleMLP(Derived, _StackedMLP):
    r"""`ensemble_size` MLPs that run as one: Linear, activation, ..., Linear.

    Args:
        ensemble_size: E, the number of members.
        in_features, out_features: of every member.
        hidden_features: widths of the hidden layers; empty for a linear model.
        activation: relu, gelu, silu, elu, softplus, tanh or identity, as in `pyens.ops.ensemble_mlp`.
        bias: whether the layers have biases.
        dropout: p in [0, 1), the probability of dropping a hidden activation in training; or one for each
            member, which it keeps wherever it is chosen to.
        device, dtype: of the parameters.
        seeds: one per member, see `reset_parameters`.

    Attributes:
        dropout_generator: a `torch.Generator` on the CPU that the seeds of dropout are drawn from; None:
            torch's default one. Activation checkpointing needs None, whose state it knows to restore;
            compiled code with a generator breaks its graph there, and without one draws other seeds.
        mc_dropout: whether dropout is active in evaluation too (False).

    Parameters: `weights.{l}` `[E, out_l, in_l]` and `biases.{l}` `[E, out_l]`.

    Example:
        >>> model = EnsembleMLP(100, 32, [50, 20, 10], 1)
        >>> model(torch.randn(8, 32)).shape
        torch.Size([100, 8, 1])
    """

    def __init__(
        self,
        ensemble_size: int,
        in_features: int,
        hidden_features: Sequence[int],
        out_features: int,
        *,
        activation: Activation = "relu",
        bias: bool = True,
        dropout: float | Sequence[float] = 0.0,
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
        _sequential.activation_module(activation)  # raises if there is none of this name
        self.ensemble_size = ensemble_size
        self.in_features = in_features
        self.hidden_features = tuple(hidden_features)
        self.out_features = out_features
        self.activation = activation
        self.dropout = _checked_dropout(dropout, ensemble_size)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        layers = list(itertools.pairwise([in_features, *hidden_features, out_features]))
        self.weights = nn.ParameterList(torch.empty(ensemble_size, o, i, **factory) for i, o in layers)
        self.biases = nn.ParameterList(torch.empty(ensemble_size, o, **factory) for _, o in layers if bias)
        self._names = tuple(str(layer) for layer in range(len(layers)))
        self._bias_names = self._names if bias else ()
        self._read_weights, self._read_biases = reader(self._names), reader(self._bias_names)
        self._derive()
        self.reset_parameters(seeds)

    @classmethod
    def from_modules(
        cls,
        modules: Iterable[nn.Module],
        *,
        layers: Callable[[Any], Iterable[nn.Module]] | None = None,
    ) -> Self:
        """An ensemble of copies of trained members, bit for bit but for batch norms.

        Each is an `nn.Sequential`, also nested, of `nn.Linear` and one kind of activation between them.
        Subclasses that do not override `forward` are what they are derived from; `nn.Identity` is left out.

        `nn.Dropout` between an activation and the next `nn.Linear`, of one rate in all of a member, becomes
        the member's rate of `dropout`. `nn.BatchNorm1d` in evaluation is folded into the `nn.Linear` before
        it, or after it where it follows an activation or comes first (in float64, then rounded).

        Args:
            modules: the members. The ensemble is in training if the first one is.
            layers: gives a member's layers in their order, where members are not `nn.Sequential`:
                `lambda m: [m.fc1, nn.ReLU(), m.fc2]`. What else `forward` does is not looked at.

        Raises:
            ValueError: whatever the kernel does not compute (tanh-GELU, ELU with alpha other than 1, norms
                that cannot be folded, dropout in other places, ...), hooks that run in forward, weights that
                are computed from others; members that differ; by name.
        """
        modules = listed(modules)
        members = [
            _sequential.member_layers(m, f"from_modules: modules[{i}]", layers) for i, m in enumerate(modules)
        ]
        activations, rates = [], []
        for i, member in enumerate(members):
            activations.append(_sequential.one_activation(member, f"from_modules: modules[{i}]"))
            rates.append(_sequential.one_dropout(member, f"from_modules: modules[{i}]"))
            if activations[i] != activations[0]:
                raise ValueError(
                    f"from_modules: modules[{i}]: expected the activation of modules[0] ({activations[0]}), "
                    f"got {activations[i]}"
                )
        weights, biases = _sequential.stack(members)
        new = cls.from_parameters(weights, biases, activation=activations[0], dropout=rates)
        return new.train(modules[0].training)

    @classmethod
    def from_stacked(
        cls,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None = None,
        layout: WeightLayout | None = None,
        *,
        activation: Activation = "relu",
    ) -> Self:
        """An ensemble of copies of weights and biases that are stacked over the members, layer by layer.

        Args:
            weights: `[E, out, in]`, or `[E, in, out]` as products `x @ w` have them.
            biases: `[E, out]` or `[E, 1, out]`; None or empty: none.
            layout: "out_in" for `[E, out, in]`, "in_out" for `[E, in, out]`. None: the one that the shapes
                fit; where they fit both, as those of square layers do, it has to be given.
            activation: of the hidden layers.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that do not fit each other or the layout; shapes
                that fit both without a layout.

        Example:
            >>> weights = [torch.randn(100, 32, 50), torch.randn(100, 50, 1)]
            >>> EnsembleMLP.from_stacked(weights, layout="in_out", activation="tanh").hidden_features
            (50,)
        """
        return cls.from_parameters(*as_out_in(weights, biases, layout), activation=activation)

    @classmethod
    def from_parameters(
        cls,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *,
        activation: Activation = "relu",
        dropout: float | Sequence[float] = 0.0,
    ) -> Self:
        """An ensemble of weights `[E, out, in]` and biases `[E, out]` (none: empty), used as they are.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that do not fit each other.
        """
        check_layers("from_parameters", weights, biases, members=True)
        first = weights[0]
        *hidden, out = (w.shape[1] for w in weights)
        new = cls(
            first.shape[0],
            first.shape[2],
            hidden,
            out,
            activation=activation,
            bias=bool(biases),
            dropout=dropout,
            device="meta",
            dtype=first.dtype,
        )
        new.weights, new.biases = nn.ParameterList(weights), nn.ParameterList(biases)
        new._derive()
        return new

    def stacked(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        modules: dict[str, Any] = self._modules  # submodules as attributes cost half a microsecond each
        weights, biases = modules["weights"], modules["biases"]
        if not is_dynamo_compiling():  # dynamo does not know what reads them
            try:
                return self._read_weights(weights._parameters), self._read_biases(biases._parameters)
            except KeyError:
                pass
        return parameters_of(weights, self._names), parameters_of(biases, self._bias_names)

    def config(self) -> dict[str, Any]:
        return {
            "ensemble_size": self.ensemble_size,
            "in_features": self.in_features,
            "hidden_features": list(self.hidden_features),
            "out_features": self.out_features,
            "activation": self.activation,
            "bias": len(self.biases) > 0,
            "dropout": list(self.dropout) if isinstance(self.dropout, tuple) else self.dropout,
        }

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


def _checked_dropout(dropout: float | Sequence[float], ensemble_size: int) -> float | tuple[float, ...]:
    rates = dropout.tolist() if isinstance(dropout, Tensor) else dropout
    several = isinstance(rates, Sequence) and not isinstance(rates, (str, bytes))
    each: Sequence[float] = rates if several else [rates]  # type: ignore[assignment, list-item]
    for member, rate in enumerate(each):
        name = f"dropout[{member}]" if several else "dropout"
        check_number("EnsembleMLP", name, rate)
        if not 0 <= rate < 1:
            raise ValueError(f"EnsembleMLP: {name}: expected 0 <= dropout < 1, got {rate}")
    if several and len(each) != ensemble_size:
        raise ValueError(
            f"EnsembleMLP: dropout: expected one rate, or one for each of the {ensemble_size} members, "
            f"got {len(each)}"
        )
    return one_rate(each)


class PackedEnsembleMLP(Derived, _StackedMLP):
    """An ensemble frozen for inference: same outputs, bit for bit, sooner for small batches.

    Keeps the weights twice: as they were, and in the order in which the kernel reads them for small batches.
    That order belongs to the machine, so the state dict holds only the first, under the names that
    `EnsembleMLP` uses; loading either's state dict, copying, moving and unpickling pack anew. There are no
    parameters: it does not train, and under autocast it computes in its own dtype. The buffers must not be
    changed in place or exchanged (`torch.func.functional_call`). On CUDA it reads the weights as they are.

    As an ensemble it gives losses without gradients for its weights, `select` gives an `EnsembleMLP`, and
    `config` is that of one.

    Made by `EnsembleMLP.packed()` and `EnsembleLinear.packed()` (an `EnsembleMLP` of one layer then).
    """

    def __init__(self, ensemble: _StackedMLP) -> None:
        super().__init__()
        weights, biases = ensemble.stacked()
        *hidden, self.out_features = (weight.shape[1] for weight in weights)
        self.ensemble_size = ensemble.ensemble_size
        self.in_features = weights[0].shape[2]
        self.hidden_features = tuple(hidden)
        self.activation = ensemble.activation
        self.weights = BufferList(weights)
        self.biases = BufferList(biases)
        self._derive_and_follow()
        self.eval()

    def forward(  # type: ignore[override]  # without dropout
        self, input: Tensor, *, shared: bool = False
    ) -> Tensor:
        """As `EnsembleMLP.forward`, without dropout."""
        packed, weights, biases = self._derived
        if packed is None:
            return ops.ensemble_mlp(input, weights, biases, activation=self.activation, shared=shared)
        return ensemble_mlp_packed(input, packed, weights, biases, activation=self.activation, shared=shared)

    def stacked(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        _, weights, biases = self._derived
        return weights, biases

    def select(self, indices: Indices) -> EnsembleMLP:  # type: ignore[override]
        weights, biases = self.stacked()
        members = chosen_members(self.ensemble_size, indices).to(weights[0].device)
        chosen = EnsembleMLP.from_parameters(
            [w[members] for w in weights], [b[members] for b in biases], activation=self.activation
        )
        return chosen.train(self.training)

    config = EnsembleMLP.config

    def _derive(self) -> None:
        weights, biases = list(self.weights.buffers()), list(self.biases.buffers())
        # The layout is the CPU kernel's; on CUDA the weights are read as they are. Kept as lists, because
        # gathering the buffers costs each call a microsecond.
        self._derived = (None if weights[0].is_cuda else prepack(weights, biases), weights, biases)
