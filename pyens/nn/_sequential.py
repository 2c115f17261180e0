"""What a sequence of `torch.nn` modules must look like to be a member of an `EnsembleMLP`, and back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from pyens._types import Activation
from pyens.reference.activations import MODULES

Position = Literal["before", "after"]


def activation_module(name: Activation, function: str = "EnsembleMLP") -> nn.Module:
    """`name` as a module, with default arguments; `function` is who asks, for the error."""
    if not isinstance(name, str) or name not in MODULES:
        raise ValueError(f'{function}: activation: expected one of {", ".join(MODULES)}, got "{name}"')
    return MODULES[name]()


@dataclass
class Layer:
    """A linear layer and what follows it up to the next one, batch norms folded into the weights."""

    weight: Tensor  # [out, in], or [E, out, in]
    bias: Tensor | None  # [out], or [E, out]
    activation: str | None = None  # such as "relu" or "celu(0.1)"; None where there is none
    norm: nn.Module | None = None  # nn.LayerNorm or nn.RMSNorm
    norm_position: Position = "before"  # of the activation
    dropout: float = 0.0
    dropout_position: Position = "after"  # of the activation
    folded: bool = False  # whether a batch norm is in weight and bias


# --- what a module is ------------------------------------------------------------------------------------


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether it computes what `kind` does: one, or of a subclass that only adds to it."""
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and type(module).__call__ is kind.__call__
        and "forward" not in vars(module)
    )


def check_hooks(module: nn.Module, argument: str) -> None:
    """Refuses hooks that run in forward: what they change is not in the weights."""
    for hooks, name in (
        (module._forward_hooks, "forward hooks"),
        (module._forward_pre_hooks, "forward pre-hooks"),
    ):
        if hooks:
            raise ValueError(f"{argument}: expected modules without {name}, got them on {module}")


def flatten(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a sequence, and of the sequences in it, in their order."""
    if is_plain(module, nn.Sequential):
        for child in cast(nn.Sequential, module):
            yield from flatten(child)
    else:
        yield module


# The activations of torch.nn by the names of the kernels, and the argument that such a name may hold where it
# is not the default one: nn.ELU(2.0) is "elu(2.0)". Other arguments must be the default ones.
_ACTIVATIONS: dict[type[nn.Module], tuple[str, str | None]] = {
    nn.ReLU: ("relu", None),
    nn.GELU: ("gelu", None),
    nn.SiLU: ("silu", None),
    nn.ELU: ("elu", "alpha"),
    nn.CELU: ("celu", "alpha"),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.Softplus: ("softplus", None),
    nn.Tanh: ("tanh", None),
    nn.Mish: ("mish", None),
    nn.Sigmoid: ("sigmoid", None),
    nn.Hardswish: ("hardswish", None),
}


def activation_string(module: nn.Module) -> str | None:
    """The name of an activation module, with its argument where it has one: "relu", "celu(0.1)".

    None for modules that no name describes.
    """
    for kind, (name, argument) in _ACTIVATIONS.items():
        if is_plain(module, kind):
            usual = _settings(kind())
            given = {name: getattr(module, name) for name in usual}
            if argument is not None and given[argument] != usual[argument]:
                name = f"{name}({float(given[argument])!r})"
                given[argument] = usual[argument]
            if kind is nn.GELU and given["approximate"] == "tanh":
                return "gelu_tanh"
            return name if given == usual else None
    return None


def _settings(activation: nn.Module) -> dict[str, Any]:
    """What the function depends on: not `training`, nor `inplace`, which is about where the result goes."""
    usual = set(vars(nn.Module())) | {"training", "inplace"}
    return {name: value for name, value in vars(activation).items() if name not in usual}


def _is_known(activation: str) -> bool:
    """Whether the kernels compute it."""
    return activation in MODULES


# --- batch norms -----------------------------------------------------------------------------------------


def _scale_and_shift(norm: Any, argument: str) -> tuple[Tensor, Tensor]:
    """What a batch norm does in evaluation, float64: x * scale + shift.

    `norm` is an `nn.BatchNorm1d`, or an `EnsembleBatchNorm`, whose tensors have a member axis first.
    """
    kind = type(norm).__name__
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            f"{argument}: expected {kind} with running statistics, which can be folded into weights, "
            f"got {norm}"
        )
    if norm.training:
        raise ValueError(
            f"{argument}: expected {kind} in evaluation (eval()), which can be folded into weights, "
            f"got {norm} in training"
        )
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def _fold(layer: Layer, argument: str, scale: Tensor, shift: Tensor, *, before: bool) -> None:
    """Puts x * scale + shift, before or after the linear layer, into its weight and bias."""
    weight = layer.weight.detach()
    features = weight.shape[:-2] + weight.shape[-1:] if before else weight.shape[:-1]
    if scale.shape != features:
        raise ValueError(
            f"{argument}: expected a batch norm of shape {list(features)} beside a weight of shape "
            f"{list(weight.shape)}, got {list(scale.shape)}"
        )
    wide = weight.double()
    bias = wide.new_zeros(wide.shape[:-1]) if layer.bias is None else layer.bias.detach().double()
    if before:
        bias = bias + (wide @ shift.unsqueeze(-1)).squeeze(-1)
        wide = wide * scale.unsqueeze(-2)
    else:
        bias = bias * scale + shift
        wide = wide * scale.unsqueeze(-1)
    layer.weight, layer.bias, layer.folded = wide.to(weight.dtype), bias.to(weight.dtype), True


# --- reading ---------------------------------------------------------------------------------------------


def linear_layer(module: Any, argument: str) -> Layer:
    """A linear layer alone, refused where something else than its parameters says what it computes."""
    if is_parametrized(module):
        raise ValueError(
            f"{argument}: expected weights that are parameters, got {module}, which computes them from "
            "others; torch.nn.utils.parametrize.remove_parametrizations makes them permanent"
        )
    parameters = module._parameters
    if "weight" not in parameters or (module.bias is not None and "bias" not in parameters):
        # A hook computes it before each forward pass: what is there now may be out of date.
        raise ValueError(
            f"{argument}: expected weights that are parameters, got one that torch.nn.utils.prune or "
            "weight_norm computes from others; make it permanent first"
        )
    check_hooks(module, argument)
    return Layer(parameters["weight"], parameters.get("bias"))


def parse(
    modules: Iterable[nn.Module],
    argument: str,
    shown: object,
    linear: type[nn.Module] = nn.Linear,
    batch_norm: type[nn.Module] = nn.BatchNorm1d,
    evaluation: bool = False,
    plain: bool = False,
) -> list[Layer]:
    """The layers of a member from its modules in their order, without those that change nothing.

    Args:
        modules: linear layers, activations, norms, dropout, identities and sequences of such.
        argument: what errors call the member.
        shown: the member as errors show it.
        linear, batch_norm: the classes of those layers, `nn.Linear` and `nn.BatchNorm1d` or their ensembles.
        evaluation: whether to leave dropout out.
        plain: whether to take linear layers and activations alone.

    Raises:
        ValueError: anything else, by name; an order that is not linear, then norm, activation and dropout; a
            batch norm that cannot be folded into a linear layer.
    """
    layers: list[Layer] = []
    pending: tuple[Tensor, Tensor] | None = None  # scale and shift that wait for the next linear layer
    flat: list[nn.Module] = []
    for module in modules:
        flat += _checked(module, argument)

    def refuse(expected: str, got: object = shown) -> ValueError:
        return ValueError(f"{argument}: expected {expected}, got {got}")

    lin, bn = _module_name(linear), _module_name(batch_norm)
    for module in flat:
        last = layers[-1] if layers else None
        if is_plain(module, nn.Identity):
            continue
        if is_plain(module, nn.Dropout) and not plain and (evaluation or cast(nn.Dropout, module).p == 0):
            continue
        if is_plain(module, linear):
            layers.append(linear_layer(module, argument))
            if pending is not None:
                _fold(layers[-1], argument, *pending, before=True)
                pending = None
        elif is_plain(module, batch_norm) and not plain:
            scale, shift = _scale_and_shift(module, argument)
            if last is not None and last.activation is None:
                if last.norm is not None or last.dropout:
                    raise refuse(f"{bn} right after {lin} or after the activation", module)
                _fold(last, argument, scale, shift, before=False)
            elif pending is None:
                pending = scale, shift
            elif pending[0].shape == scale.shape:
                pending = pending[0] * scale, pending[1] * scale + shift
            else:
                raise refuse(f"{bn} of {pending[0].shape[-1]} features after another", module)
        elif (name := activation_string(module)) is not None and _is_known(name):
            if pending is not None:
                raise refuse(f"{lin} after {bn}, which is folded into it", module)
            if last is None or last.activation is not None:
                raise refuse(f"one activation after each {lin}")
            last.activation = name
        elif is_plain(module, nn.LayerNorm) or is_plain(module, nn.RMSNorm):
            if last is None or last.norm is not None or pending is not None or last.dropout:
                raise refuse(f"one norm after each {lin}, before dropout", module)
            last.norm = module
            last.norm_position = "before" if last.activation is None else "after"
        elif is_plain(module, nn.Dropout) and not plain:
            p = cast(nn.Dropout, module).p
            if p >= 1:
                raise refuse("nn.Dropout with p below 1", module)
            if last is None or last.dropout or pending is not None:
                raise refuse(f"nn.Dropout once, between an activation and the next {lin}", module)
            last.dropout = p
            last.dropout_position = "before" if last.activation is None else "after"
        else:
            kinds = ", ".join(kind.__name__ for kind in MODULES.values())
            others = "" if plain else f", {bn}, nn.Dropout"
            raise refuse(f"{lin}{others} and one of {kinds} with default arguments", module)
    if pending is not None:
        raise refuse(f"{lin} after {bn}, which is folded into it")
    if not layers:
        raise refuse(f"an {lin} as the last layer")
    for layer in layers[:-1]:
        if layer.activation is None:  # then it is the identity, before and after which are the same place
            layer.activation, layer.norm_position, layer.dropout_position = "identity", "before", "after"
    _refuse_what_no_kernel_has(layers, argument, shown, lin)
    return layers


def _refuse_what_no_kernel_has(layers: list[Layer], argument: str, shown: object, lin: str) -> None:
    last = layers[-1]
    if last.activation is not None or last.dropout or last.norm is not None:
        raise ValueError(f"{argument}: expected an {lin} as the last layer, got {shown}")
    for layer in layers:
        if layer.norm is not None:
            raise ValueError(f"{argument}: expected no norm but batch norm, got {layer.norm}")
        if layer.dropout and layer.dropout_position == "before":
            raise ValueError(
                f"{argument}: expected nn.Dropout once, between an activation and the next {lin}, "
                f"got it before the activation in {shown}"
            )


def _checked(module: Any, argument: str) -> list[nn.Module]:
    """The modules in it, in their order, after a look at their hooks and those of sequences around them."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"{argument}: expected layers that are modules, got {type(module).__name__}")
    if not is_plain(module, nn.Sequential):
        if not _has_weights_of_hooks(module):  # which are refused with more to say
            check_hooks(module, argument)
        return [module]
    check_hooks(module, argument)
    return [layer for child in cast(nn.Sequential, module) for layer in _checked(child, argument)]


def _has_weights_of_hooks(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and "weight" not in module._parameters


def _module_name(kind: type[nn.Module]) -> str:
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.") else kind.__name__


def member_layers(
    module: Any, argument: str, layers: Callable[[Any], Iterable[nn.Module]] | None
) -> list[Layer]:
    """The layers of a member, which is a sequence, or of which `layers` gives the modules."""
    if layers is not None:
        if isinstance(module, nn.Module):
            check_hooks(module, argument)
        given = layers(module)
        if isinstance(given, nn.Module) and not is_plain(given, nn.Sequential):
            raise ValueError(f"{argument}: expected a list from layers, got {type(given).__name__}")
        modules = [given] if isinstance(given, nn.Module) else list(given)
        return parse(modules, argument, [*modules])
    if not is_plain(module, nn.Sequential):
        kind = type(module).__name__
        own = " with a forward of its own" * isinstance(module, nn.Sequential)
        raise ValueError(
            f"{argument}: expected nn.Sequential, got {kind}{own}; layers= says what its layers are"
        )
    return parse([module], argument, module)


def parse_plain(module: nn.Module, argument: str) -> tuple[list[Layer], Activation]:
    """The layers of a sequence of linear layers and one activation between them, and nothing else."""
    layers = parse([module], argument, module, plain=True)
    return layers, one_activation(layers, argument)


def one_activation(layers: Sequence[Layer], argument: str) -> Activation:
    """That of all hidden layers ("relu" if there is none)."""
    found = sorted({str(layer.activation) for layer in layers[:-1]})
    if len(found) > 1:
        raise ValueError(f"{argument}: expected one activation throughout, got {found}")
    return cast(Activation, found[0] if found else "relu")


def one_dropout(layers: Sequence[Layer], argument: str) -> float:
    """The rate of all hidden layers (0 if there is none)."""
    found = [layer.dropout for layer in layers[:-1]]
    if len(set(found)) > 1:
        raise ValueError(
            f"{argument}: expected nn.Dropout of one rate after each hidden layer, got the rates {found}"
        )
    return found[0] if found else 0.0


# --- stacking --------------------------------------------------------------------------------------------


def stack(members: Sequence[Sequence[Layer]]) -> tuple[list[Tensor], list[Tensor]]:
    """Layer by layer the members' weights `[E, out, in]` and biases `[E, out]` (none: empty), bit for bit.

    Where a batch norm was folded, layers without a bias get zeros.
    """
    with torch.no_grad():
        if any(layer.folded for layers in members for layer in layers):
            members = [[_with_bias(layer) for layer in layers] for layers in members]
        first = members[0]
        for i, layers in enumerate(members):
            for got, expected in zip(layers, first, strict=False):
                same = (
                    got.weight.shape == expected.weight.shape
                    and (got.bias is None) == (first[0].bias is None)
                    and (got.weight.dtype, got.weight.device)
                    == (first[0].weight.dtype, first[0].weight.device)
                )
                if not same:
                    raise ValueError(
                        f"from_modules: modules[{i}]: expected {_describe(expected, first[0])} like "
                        f"modules[0], got {_describe(got, got)}"
                    )
            if len(layers) != len(first):
                raise ValueError(
                    f"from_modules: modules[{i}]: expected {len(first)} linear layers, got {len(layers)}"
                )
        across = list(zip(*members, strict=True))
        weights = [torch.stack([layer.weight for layer in one]) for one in across]
        biases = [
            torch.stack([layer.bias for layer in one if layer.bias is not None])
            for one in across
            if one[0].bias is not None
        ]
    return weights, biases


def _with_bias(layer: Layer) -> Layer:
    if layer.bias is None:
        layer.bias = layer.weight.new_zeros(layer.weight.shape[:-1])
    return layer


def stacked_biases(layers: Sequence[Layer], argument: str) -> list[Tensor]:
    """The biases of layers of ensembles (none: empty); zeros where others have one by a batch norm."""
    if any(layer.folded for layer in layers):
        layers = [_with_bias(layer) for layer in layers]
    biases = [layer.bias.detach().clone() for layer in layers if layer.bias is not None]
    if len(biases) not in (0, len(layers)):
        raise ValueError(
            f"{argument}: expected biases in all layers or in none, got {len(biases)} of {len(layers)}"
        )
    return biases


def _describe(layer: Layer, kind: Layer) -> str:
    bias = "no bias" if kind.bias is None else "a bias"
    return f"{list(layer.weight.shape)}, {kind.weight.dtype}, {kind.weight.device}, {bias}"


def unstack(weights: Sequence[Tensor], biases: Sequence[Tensor], member: int) -> list[nn.Linear]:
    """Linear layers with copies of one member's parameters."""
    linears = []
    for layer, weight in enumerate(weights):
        out_features, in_features = weight.shape[1:]
        linear = nn.Linear(in_features, out_features, bias=bool(biases), device="meta", dtype=weight.dtype)
        linear.weight = nn.Parameter(weight[member].detach().clone())
        if biases:
            linear.bias = nn.Parameter(biases[layer][member].detach().clone())
        linears.append(linear)
    return linears
