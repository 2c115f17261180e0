"""Ensembles of linear layers and of MLPs."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyens import ops
from pyens.nn import _sequential
from pyens.nn._members import Members, check_not_empty, check_sizes
from pyens.ops.ensemble_mlp import ensemble_mlp_packed, prepack


class _Stacked(Members):
    """What `EnsembleLinear` and `EnsembleMLP` share: a stack of linear layers per member.

    A subclass says where the parameters live (`_stack`, `_set_stack`) and what a member looks like.
    """

    activation: str

    def _set_stack(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
        raise NotImplementedError

    def forward(self, input: Tensor, *, dropout: float = 0.0, dropout_seeds: Tensor | None = None) -> Tensor:
        """`[B, in_features]` (shared by all members) or `[E, B, in_features]` -> `[E, B, out_features]`.

        Dropout on the hidden activations, in training and in eval mode alike: see `pyens.ops.ensemble_mlp`.
        """
        weights, biases = self._stack()
        return ops.ensemble_mlp(
            input,
            weights,
            biases,
            activation=self.activation,
            dropout=dropout,
            dropout_seeds=dropout_seeds,
        )

    def loss(
        self,
        input: Tensor,
        target: Tensor,
        *,
        loss: str,
        temperature: float = 1.0,
        sample_weight: Tensor | None = None,
        dropout: float = 0.0,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor:
        """Each member's mean loss `[E]`, its gradient computed in the same pass; train on its sum.

        mse, bce, gaussian_nll or cross_entropy: see `pyens.ops.ensemble_mlp_loss`.
        """
        weights, biases = self._stack()
        return ops.ensemble_mlp_loss(
            input,
            target,
            weights,
            biases,
            loss=loss,
            activation=self.activation,
            temperature=temperature,
            sample_weight=sample_weight,
            dropout=dropout,
            dropout_seeds=dropout_seeds,
        )

    def _draw(self, member: int, generator: torch.Generator | None) -> None:
        weights, biases = self._stack()
        for layer, weight in enumerate(weights):
            drawn = torch.empty(weight.shape[1:], dtype=torch.float32, device="cpu")
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            weight[member].copy_(drawn)
            if biases:
                bound = 1 / math.sqrt(weight.shape[2])
                drawn = torch.empty(weight.shape[1], dtype=torch.float32, device="cpu")
                nn.init.uniform_(drawn, -bound, bound, generator=generator)
                biases[layer][member].copy_(drawn)

    def _member_layers(self, i: int) -> list[nn.Linear]:
        self._check_member(i)
        return _sequential.unstack(*self._stack(), i)

    def packed(self) -> "PackedEnsembleMLP":
        """A frozen copy for inference that is faster for small batches. See `PackedEnsembleMLP`."""
        return PackedEnsembleMLP(self)


class EnsembleLinear(_Stacked):
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
        check_sizes(
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
    def from_modules(cls, modules: Sequence[nn.Linear]) -> Self:
        """An ensemble of copies of trained layers of one shape, dtype and device, bit for bit."""
        check_not_empty(modules)
        for i, module in enumerate(modules):
            if type(module) is not nn.Linear:
                raise ValueError(
                    f"from_modules: modules[{i}]: expected nn.Linear, got {type(module).__name__}"
                )
        weights, biases = _sequential.stack([[module] for module in modules])
        return cls._from_stack(weights, biases).train(modules[0].training)

    @classmethod
    def _from_stack(cls, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Self:
        (weight,) = weights
        ensemble_size, out_features, in_features = weight.shape
        new = cls(ensemble_size, in_features, out_features, bool(biases), device="meta", dtype=weight.dtype)
        new._set_stack(weights, biases)
        return new

    def _with(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Self:
        return self._from_stack(weights, biases).train(self.training)

    def _stack(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.weight], [] if self.bias is None else [self.bias]

    def _set_stack(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
        self.weight = nn.Parameter(weights[0])
        self.bias = nn.Parameter(biases[0]) if biases else None

    def member(self, i: int) -> nn.Linear:
        """Member i as an `nn.Linear`, with copies of its parameters."""
        return self._member_layers(i)[0].train(self.training)

    def extra_repr(self) -> str:
        return (
            f"ensemble_size={self.ensemble_size}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


class EnsembleMLP(_Stacked):
    r"""`ensemble_size` MLPs that run as one: Linear, activation, ..., Linear.

    Args:
        ensemble_size: E, the number of members.
        in_features, out_features: of every member.
        hidden_features: widths of the hidden layers; empty for a linear model.
        activation: relu, gelu, silu, elu, softplus, tanh or identity, as in `pyens.ops.ensemble_mlp`.
        bias: whether the layers have biases.
        device, dtype: of the parameters.
        seeds: one per member, see `reset_parameters`.

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
        activation: str = "relu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seeds: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__()
        if isinstance(hidden_features, int):
            raise TypeError(
                f"EnsembleMLP: hidden_features: expected a sequence of widths, got {hidden_features}"
            )
        check_sizes(
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
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise([in_features, *hidden_features, out_features]):
            self.weights.append(nn.Parameter(torch.empty(ensemble_size, fan_out, fan_in, **factory)))
            if bias:
                self.biases.append(nn.Parameter(torch.empty(ensemble_size, fan_out, **factory)))
        self.reset_parameters(seeds)

    @classmethod
    def from_modules(cls, modules: Sequence[nn.Sequential]) -> Self:
        """An ensemble of copies of trained members, bit for bit.

        Each is an `nn.Sequential` of `nn.Linear` and one kind of activation between them. Whatever the kernel
        does not compute (tanh-GELU, ELU with alpha other than 1, dropout, ...) is refused by name with a
        ValueError.
        """
        check_not_empty(modules)
        parsed = [
            _sequential.parse(module, f"from_modules: modules[{i}]") for i, module in enumerate(modules)
        ]
        for i, (_, activation) in enumerate(parsed):
            if activation != parsed[0][1]:
                raise ValueError(
                    f"from_modules: modules[{i}]: expected the activation of modules[0] ({parsed[0][1]}), "
                    f"got {activation}"
                )
        weights, biases = _sequential.stack([linears for linears, _ in parsed])
        return cls._from_stack(weights, biases, parsed[0][1]).train(modules[0].training)

    @classmethod
    def _from_stack(cls, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str) -> Self:
        first = weights[0]
        *hidden, out = (w.shape[1] for w in weights)
        new = cls(
            first.shape[0],
            first.shape[2],
            hidden,
            out,
            activation=activation,
            bias=bool(biases),
            device="meta",
            dtype=first.dtype,
        )
        new._set_stack(weights, biases)
        return new

    def _with(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Self:
        return self._from_stack(weights, biases, self.activation).train(self.training)

    def _stack(self) -> tuple[list[Tensor], list[Tensor]]:
        # Iterating a ParameterList costs 5 µs, more than a forward pass of a small ensemble.
        modules = self._modules
        return list(modules["weights"]._parameters.values()), list(modules["biases"]._parameters.values())

    def _set_stack(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(biases)

    def member(self, i: int) -> nn.Sequential:
        """Member i as an `nn.Sequential`, with copies of its parameters."""
        layers: list[nn.Module] = []
        for linear in self._member_layers(i):
            layers += [linear, _sequential.activation_module(self.activation)]
        return nn.Sequential(*layers[:-1]).train(self.training)

    def extra_repr(self) -> str:
        return (
            f"ensemble_size={self.ensemble_size}, in_features={self.in_features}, "
            f"hidden_features={list(self.hidden_features)}, out_features={self.out_features}, "
            f"activation={self.activation}, bias={len(self.biases) > 0}"
        )


class PackedEnsembleMLP(nn.Module):
    """An ensemble frozen for inference: same outputs, bit for bit, sooner for small batches.

    Keeps the weights twice: as they were, and in the order in which the kernel reads them for small batches.
    That order belongs to the machine, so the state dict holds only the first, under the names that
    `EnsembleMLP` uses; loading either's state dict, copying, moving and unpickling pack anew. There are no
    parameters: it does not train, and under autocast it computes in its own dtype. The buffers must not be
    changed in place or exchanged (`torch.func.functional_call`). On CUDA it reads the weights as they are.

    Made by `EnsembleMLP.packed()` and `EnsembleLinear.packed()` (an `EnsembleMLP` of one layer then).
    """

    def __init__(self, ensemble: _Stacked) -> None:
        super().__init__()
        weights, biases = ensemble._stack()
        *hidden, self.out_features = (weight.shape[1] for weight in weights)
        self.ensemble_size = ensemble.ensemble_size
        self.in_features = weights[0].shape[2]
        self.hidden_features = tuple(hidden)
        self.activation = ensemble.activation
        self.weights = _BufferList(weights)
        self.biases = _BufferList(biases)
        self._pack()
        self.register_load_state_dict_post_hook(_pack_after_loading)
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        """`[B, in_features]` (shared by all members) or `[E, B, in_features]` -> `[E, B, out_features]`."""
        packed, weights, biases = self._frozen
        if packed is None:
            return ops.ensemble_mlp(input, weights, biases, activation=self.activation)
        return ensemble_mlp_packed(input, packed, weights, biases, activation=self.activation)

    def _pack(self) -> None:
        weights, biases = list(self.weights.buffers()), list(self.biases.buffers())
        # The layout is the CPU kernel's; on CUDA the weights are read as they are. Kept as lists, because
        # gathering the buffers costs each call a microsecond.
        self._frozen = (None if weights[0].is_cuda else prepack(weights, biases), weights, biases)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._pack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_frozen"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    extra_repr = EnsembleMLP.extra_repr


# Not a lambda, which could not be pickled.
def _pack_after_loading(module: PackedEnsembleMLP, incompatible_keys: Any) -> None:
    module._pack()


class _BufferList(nn.Module):
    """What `nn.ParameterList` is to parameters."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_buffer(str(i), tensor.detach().clone(memory_format=torch.contiguous_format))

    def __len__(self) -> int:
        return len(self._buffers)
