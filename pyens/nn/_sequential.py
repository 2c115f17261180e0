"""What a sequence of `torch.nn` modules must look like to be a member of an `EnsembleMLP`, and back."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pyens.nn.residual import Residual
from pyens.reference.activations import MODULES, PARAMETERS, activation_module


@dataclass
class Layer:
    """A linear layer and what follows it up to the next one, batch norms folded into the weights."""

    weight: Tensor  # [out, in], or [E, out, in]
    bias: Tensor | None  # [out], or [E, out]
    activation: str | None = None  # such as "relu" or "celu(0.1)"; None where there is none
    norm: nn.Module | None = None  # nn.LayerNorm or nn.RMSNorm
    dropout: float = 0.0
    order: tuple[str, ...] = ()  # of "activation", "norm" and "dropout", those that there are
    residual: bool = False
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


def check_unchanged(function: str, ensemble: nn.Module, *kinds: type[nn.Module]) -> None:
    """Refuses what computes something else than its parameters and one of these classes say."""
    if not any(is_plain(ensemble, kind) for kind in kinds):
        raise ValueError(
            f"{function}: ensemble: expected one that computes what its class in pyens does, "
            f"got {type(ensemble).__name__} with a forward of its own"
        )
    hooks = [*ensemble._forward_hooks.values(), *ensemble._forward_pre_hooks.values()]
    others = [hook for hook in hooks if not isinstance(hook, (BasePruningMethod, SpectralNorm, WeightNorm))]
    if others:
        raise ValueError(
            f"{function}: ensemble: expected modules without hooks of forward, got some on "
            f"{type(ensemble).__name__}"
        )


def flatten(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a sequence, and of the sequences in it, in their order."""
    if is_plain(module, nn.Sequential):
        for child in cast(nn.Sequential, module):
            yield from flatten(child)
    else:
        yield module


# The names of the kernels by the activations of torch.nn, of which nn.GELU has two.
_ACTIVATIONS: dict[type[nn.Module], str] = {
    kind: name for name, kind in MODULES.items() if name not in ("identity", "gelu_tanh")
}


def activation_string(module: nn.Module) -> str | None:
    """The name of an activation module, with its argument where it has one: "relu", "celu(0.1)".

    None for modules that no name describes.
    """
    for kind, name in _ACTIVATIONS.items():
        if is_plain(module, kind):
            usual = _settings(kind())
            given = {setting: getattr(module, setting) for setting in usual}
            parameter = PARAMETERS.get(name)
            if parameter is not None and given[parameter] != usual[parameter]:
                name = f"{name}({float(given[parameter])!r})"
                given[parameter] = usual[parameter]
            if kind is nn.GELU and given["approximate"] == "tanh":
                return "gelu_tanh"
            return name if given == usual and _is_known(name) else None
    return None


def _settings(activation: nn.Module) -> dict[str, Any]:
    """What the function depends on: not `training`, nor `inplace`, which is about where the result goes."""
    usual = set(vars(nn.Module())) | {"training", "inplace"}
    return {name: value for name, value in vars(activation).items() if name not in usual}


def _is_known(name: str) -> bool:
    """Whether the kernels compute it: not with an argument that is infinite, say."""
    try:
        activation_module(name)
    except ValueError:
        return False
    return True


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


def fold_after(module: Any, norm: Any, argument: str) -> None:
    """Puts a batch norm into the parameters of the linear layer or convolution before it, of an ensemble."""
    scale, shift = _scale_and_shift(norm, argument)
    weight, bias = own_parameters(module, argument)
    layer = Layer(weight.flatten(2), bias)
    _fold(layer, argument, scale, shift, before=False)
    module.weight = nn.Parameter(layer.weight.view_as(weight))
    module.bias = nn.Parameter(cast(Tensor, layer.bias))


# --- reading ---------------------------------------------------------------------------------------------


def own_parameters(module: Any, argument: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer, refused where something else than they says what it computes."""
    if is_parametrized(module):
        raise ValueError(
            f"{argument}: expected weights that are parameters, got {module}, which computes them from "
            "others; torch.nn.utils.parametrize.remove_parametrizations makes them permanent"
        )
    parameters = module._parameters
    if "weight" not in parameters or (getattr(module, "bias", None) is not None and "bias" not in parameters):
        # A hook computes it before each forward pass: what is there now may be out of date.
        raise ValueError(
            f"{argument}: expected weights that are parameters, got one that torch.nn.utils.prune or "
            "weight_norm computes from others; make it permanent first"
        )
    check_hooks(module, argument)
    return parameters["weight"], parameters.get("bias")


def linear_layer(module: Any, argument: str) -> Layer:
    """A linear layer alone."""
    return Layer(*own_parameters(module, argument))


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
        modules: linear layers, activations, norms, dropout, identities, sequences of such, and `Residual`.
        argument: what errors call the member.
        shown: the member as errors show it.
        linear, batch_norm: the classes of those layers, `nn.Linear` and `nn.BatchNorm1d` or their ensembles.
            Only the former come with layer norms and residuals.
        evaluation: whether to leave dropout out.
        plain: whether to take linear layers, and activations between them, alone.

    Raises:
        ValueError: anything else, by name; an order that no kernel has; a batch norm that cannot be folded
            into a linear layer.
    """
    reader = _Reader(argument, shown, linear, batch_norm, evaluation, plain)
    for module in modules:
        reader.read(module)
    return reader.layers_read()


class _Reader:
    """What `parse` has read so far."""

    def __init__(
        self,
        argument: str,
        shown: object,
        linear: type[nn.Module],
        batch_norm: type[nn.Module],
        evaluation: bool,
        plain: bool,
    ) -> None:
        self.argument, self.shown, self.linear, self.batch_norm = argument, shown, linear, batch_norm
        self.evaluation, self.plain = evaluation, plain
        self.lin, self.bn = _module_name(linear), _module_name(batch_norm)
        self.layers: list[Layer] = []
        # Scale and shift that wait for the next linear layer.
        self.pending: tuple[Tensor, Tensor] | None = None
        self.closed = False  # whether the last layer ended with its residual

    def refuse(self, expected: str, got: object = None) -> ValueError:
        got = self.shown if got is None else got
        return ValueError(f"{self.argument}: expected {expected}, got {got}")

    @property
    def last(self) -> Layer | None:
        """The layer that what comes next belongs to."""
        return self.layers[-1] if self.layers and not self.closed else None

    def read(self, module: Any) -> None:
        if not isinstance(module, nn.Module):
            raise self.refuse("layers that are modules", type(module).__name__)
        if not _has_weights_of_hooks(module):  # which are refused with more to say
            check_hooks(module, self.argument)
        many = not self.plain
        if is_plain(module, nn.Sequential):
            for child in cast(nn.Sequential, module):
                self.read(child)
        elif is_plain(module, nn.Identity):
            pass
        elif is_plain(module, self.linear):
            self.read_linear(module)
        elif is_plain(module, self.batch_norm) and many:
            self.read_batch_norm(module)
        elif (name := activation_string(module)) is not None:
            self.read_activation(module, name)
        elif is_plain(module, nn.Dropout) and many:
            self.read_dropout(cast(nn.Dropout, module))
        elif self.linear is nn.Linear and many and _is_norm(module):
            self.read_norm(module)
        elif self.linear is nn.Linear and many and is_plain(module, Residual):
            self.read_residual(cast(Residual, module))
        else:
            kinds = ", ".join(kind.__name__ for kind in _ACTIVATIONS)
            others = f", {self.bn}, nn.Dropout" if many else ""
            if many and self.linear is nn.Linear:
                others += ", nn.LayerNorm, nn.RMSNorm, Residual"
            raise self.refuse(f"{self.lin}{others} and one of {kinds} with default arguments", module)

    def read_linear(self, module: nn.Module) -> None:
        self.layers.append(linear_layer(module, self.argument))
        self.closed = False
        if self.pending is not None:
            _fold(self.layers[-1], self.argument, *self.pending, before=True)
            self.pending = None

    def read_batch_norm(self, module: nn.Module) -> None:
        scale, shift = _scale_and_shift(module, self.argument)
        last, pending = self.last, self.pending
        if last is not None and last.activation is None:
            if last.order:
                raise self.refuse(f"{self.bn} right after {self.lin} or after the activation", module)
            _fold(last, self.argument, scale, shift, before=False)
        elif pending is None:
            self.pending = scale, shift
        elif pending[0].shape == scale.shape:
            self.pending = pending[0] * scale, pending[1] * scale + shift
        else:
            raise self.refuse(f"{self.bn} of {pending[0].shape[-1]} features after another", module)

    def read_activation(self, module: nn.Module, name: str) -> None:
        if self.pending is not None:
            raise self.refuse(f"{self.lin} after {self.bn}, which is folded into it", module)
        last = self.last
        if last is None or last.activation is not None:
            raise self.refuse(f"one activation after each {self.lin}")
        last.activation, last.order = name, (*last.order, "activation")

    def read_dropout(self, module: nn.Dropout) -> None:
        if self.evaluation or module.p == 0:
            return
        if module.p >= 1:
            raise self.refuse("nn.Dropout with p below 1", module)
        last = self.last
        if last is None or last.dropout or self.pending is not None:
            raise self.refuse(
                f"nn.Dropout once in a layer, after its activation or before its norm, {self.lin} before it",
                module,
            )
        last.dropout, last.order = module.p, (*last.order, "dropout")

    def read_norm(self, module: Any) -> None:
        last, kind = self.last, "nn.LayerNorm" if is_plain(module, nn.LayerNorm) else "nn.RMSNorm"
        if last is None or last.norm is not None or self.pending is not None:
            raise self.refuse(f"one norm in each layer, after its {self.lin}", module)
        width = last.weight.shape[0]
        if tuple(module.normalized_shape) != (width,):
            raise self.refuse(f"{kind} over the {width} features of the {self.lin} before it", module)
        if width == 1:
            raise self.refuse(f"{kind} over more than one feature", module)
        for name, tensor in zip(("weight", "bias"), own_parameters(module, self.argument), strict=True):
            like = last.weight
            if tensor is not None and (tensor.dtype, tensor.device) != (like.dtype, like.device):
                raise self.refuse(
                    f"a {name} of {kind} of {like.dtype} on {like.device} as that of its {self.lin}",
                    f"{tensor.dtype} on {tensor.device}",
                )
        last.norm, last.order = module, (*last.order, "norm")

    def read_residual(self, module: Residual) -> None:
        before = len(self.layers)
        if self.pending is not None:
            raise self.refuse(f"{self.lin} after {self.bn}, which is folded into it", module)
        self.closed = True  # what comes before its linear layer is not of the layer before, which it reads
        for child in module:
            self.read(child)
        if len(self.layers) != before + 1 or self.pending is not None:
            raise self.refuse(f"Residual of one {self.lin} and what follows it in its layer", module)
        out, reads = self.layers[-1].weight.shape
        if out != reads:
            raise self.refuse(f"Residual of a layer as wide as what it reads, {reads}", module)
        self.layers[-1].residual, self.closed = True, True

    def layers_read(self) -> list[Layer]:
        if self.pending is not None:
            raise self.refuse(f"{self.lin} after {self.bn}, which is folded into it")
        last = self.last
        if last is None or last.dropout or last.norm is not None or (self.plain and last.order):
            also = "" if self.plain else ", or that and an activation,"
            raise self.refuse(f"an {self.lin}{also} as the last layer")
        for layer in self.layers[:-1]:
            if layer.activation is None:  # it is the identity, and may be in any place
                layer.activation = "identity"
            elif layer.order not in _ORDERS:
                raise self.refuse(
                    f"nn.Dropout once in a layer, after its activation or right before its norm, {self.lin} "
                    f"before it",
                    f"{', '.join(layer.order)} in {self.shown}",
                )
        return self.layers


# Of those with an activation.
_ORDERS = {
    ("activation",),
    ("activation", "dropout"),
    ("norm", "activation"),
    ("dropout", "norm", "activation"),
    ("norm", "activation", "dropout"),
    ("activation", "norm"),
    ("activation", "dropout", "norm"),
    ("activation", "norm", "dropout"),
}


def _is_norm(module: nn.Module) -> bool:
    return is_plain(module, nn.LayerNorm) or is_plain(module, nn.RMSNorm)


def _has_weights_of_hooks(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm)) and "weight" not in module._parameters


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


def parse_plain(module: nn.Module, argument: str) -> tuple[list[Layer], str]:
    """The layers of a sequence of linear layers and one activation between them, and nothing else."""
    layers = parse([module], argument, module, plain=True)
    found = sorted({str(layer.activation) for layer in layers[:-1]})
    if len(found) > 1:
        raise ValueError(f"{argument}: expected one activation throughout, got {found}")
    return layers, found[0] if found else "relu"
