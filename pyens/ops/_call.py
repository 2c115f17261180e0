"""One way into every operation: eager, compiled, and within `torch.func`.

Eager code calls the extension, compiled code the dispatcher. The extension leaves to the dispatcher, by
returning None, what a class of tensors or a mode overrides. `torch.func` knows nothing of autograd functions
written in C++: there the operation computes the outputs, so its checks run, and the reference gives the
derivatives. An operation that is given no reference raises there, by name. `torch.func` in compiled
code raises by name: what remains of it under `fullgraph=True`, without it dynamo runs that function eagerly.
Arguments of a wrong kind are looked for only when a call has failed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pyens import _kinds
from pyens._library import _C

Given = dict[str, Any]  # the arguments by their names in the schema, or the mapped dimension of each
Rule = Callable[[int, Given, Given], tuple[Given, int, tuple[int, ...]]]

_peek_transform = torch._C._functorch.peek_interpreter_stack


def in_transform() -> bool:
    return _peek_transform() is not None


# What torch.compiler.assume_constant_result does, whose import takes as long as that of torch: dynamo asks
# when it traces.
in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def operation(
    name: str,
    reference: Callable[..., Any] | None = None,
    vmap: Rule | None = None,
    *,
    constants: tuple[str, ...] = (),
    outputs: Callable[[Given], int] | None = None,
    constant_output: int | None = None,
    function: str | None = None,
) -> Callable[..., Any]:
    """`pyens::name` as a function of the schema's arguments, all by position.

    Args:
        name: in the schema.
        reference: takes the same arguments by name, and returns a tensor or a tuple of tensors. Without one
            `torch.func` meets the dispatcher's own errors.
        vmap: the rule, for an operation with a reference: from the size n of the mapped dimension, its place
            in each argument, and the arguments to `(given, dim, sizes)`: the arguments of one call, and the
            sizes, n first, into which dimension `dim` of its outputs is to be split.
        constants: arguments that get no gradient and must not require one.
        outputs: how many of the operation's outputs to return; None: all.
        constant_output: the output that has no derivative.
        function: what errors call it; None: `name`.
    """
    function = name if function is None else function
    eager, dispatched = getattr(_C, name), getattr(torch.ops.pyens, name).default
    kinds = [(argument.name, str(argument.type)) for argument in dispatched._schema.arguments]

    def call(*arguments: Any) -> Any:
        # In this order: while dynamo compiles, there is always a transform to peek at. Other tracers see the
        # dispatcher, which the extension calls too.
        if is_dynamo_compiling():
            if in_transform():
                raise NotImplementedError(
                    f"{function}: expected torch.func in eager code, got it in compiled code"
                )
            return dispatched(*listed(arguments))
        try:
            if _peek_transform() is not None and reference is not None:
                return transformed(checked(arguments))
            found = eager(*arguments)
            if found is not None:
                return found
            # A class or a mode that overrides torch's functions sees the dispatcher's operation.
            return dispatched(*listed(arguments))
        except Exception:  # of any kind: this only looks for a better reason
            _kinds.check(function, kinds, arguments)
            raise

    def listed(arguments: tuple[Any, ...]) -> list[Any]:
        # Any sequence of tensors as a list, which is what the dispatcher and pytrees know.
        return [
            list(value) if kind == "List[Tensor]" and not isinstance(value, Tensor) else value
            for (_, kind), value in zip(kinds, arguments, strict=True)
        ]

    def checked(arguments: tuple[Any, ...]) -> Given:
        values = listed(arguments)
        _kinds.check(function, kinds, values)
        given = {argument: value for (argument, _), value in zip(kinds, values, strict=True)}
        for constant in constants:
            if given[constant] is not None and given[constant].requires_grad:
                raise ValueError(
                    f"{function}: {constant}: expected requires_grad=False (it gets no gradient), got True"
                )
        return given

    def transformed(given: Given) -> Any:
        leaves, spec = tree_flatten(given)
        return Transformed.apply(spec, *leaves)  # type: ignore[no-untyped-call]

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(spec: Any, *leaves: Any) -> Any:
            given = tree_unflatten(leaves, spec)
            found = dispatched(*given.values())
            return found if outputs is None else found[: outputs(given)]

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.spec, *leaves = inputs
            tensors = [leaf if isinstance(leaf, Tensor) else None for leaf in leaves]
            ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.dtypes = tree_map(lambda one: one.dtype, output)  # under autocast not the reference's
            if constant_output is not None:
                ctx.mark_non_differentiable(output[constant_output])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            needed = [i for i, needs_grad in enumerate(ctx.needs_input_grad[1:]) if needs_grad]
            output, vjp = _reference_vjp(ctx, needed)
            found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
            for i, grad in zip(needed, vjp(_like(grads, output)), strict=True):
                found[1 + i] = grad
            return tuple(found)

        @staticmethod
        def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
            # The derivative of the vjp, which is linear, so that it does with reverse mode.
            moved = [i for i, t in enumerate(tangents) if t is not None and t.is_floating_point()]
            output, vjp = _reference_vjp(ctx, moved)
            transposed = torch.func.vjp(vjp, tree_map(torch.zeros_like, output))[1]
            (found,) = transposed(tuple(tangents[i] for i in moved))
            found = tree_map(lambda tangent, dtype: tangent.to(dtype), found, ctx.dtypes)
            if constant_output is None:
                return found
            return tuple(None if i == constant_output else one for i, one in enumerate(found))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], spec: Any, *leaves: Any) -> tuple[Any, int]:
            dims, given = tree_unflatten(in_dims[1:], spec), tree_unflatten(leaves, spec)
            assert vmap is not None  # it comes with a reference
            given, dim, sizes = vmap(info.batch_size, dims, given)
            return tree_map(lambda output: output.unflatten(dim, sizes), transformed(given)), dim

    def _reference_vjp(ctx: Any, chosen: list[int]) -> tuple[Any, Callable[..., Any]]:
        """The reference's outputs, and its vjp as a function of the chosen leaves."""
        leaves = [
            other if tensor is None else tensor
            for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)
        ]

        def forward(*values: Tensor) -> Any:
            replaced = dict(zip(chosen, values, strict=True))
            assert reference is not None
            return reference(
                **tree_unflatten([replaced.get(i, leaf) for i, leaf in enumerate(leaves)], ctx.spec)
            )

        output, vjp, *_ = torch.func.vjp(forward, *(leaves[i] for i in chosen))
        return output, vjp

    return call


def _like(grads: Sequence[Tensor], output: Any) -> Any:
    """The gradients from above with the structure and dtypes of the reference's output.

    Autocast gives the operation's another dtype.
    """
    if isinstance(output, Tensor):
        return grads[0].to(output.dtype)
    return tuple(grad.to(one.dtype) for grad, one in zip(grads, output, strict=True))


# Rules for vmap.


def mapped(dims: Given) -> set[str]:
    """The arguments that are mapped, or tensors of which are."""
    return {name for name, dim in dims.items() if any(one is not None for one in tree_leaves(dim))}


def first(n: int, tensor: Tensor, dim: int | None) -> Tensor:
    """`tensor` with the mapped dimension, of size n, as its first."""
    return tensor.expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def shifted(index: Tensor, size: int) -> Tensor:
    """index `[n, ...]` into one of n tables of `size` rows each, as one into all of them together.

    Out of range, -1 included, stays out of range.
    """
    n = len(index)
    offset = size * torch.arange(n, device=index.device).view(-1, *[1] * (index.dim() - 1))
    there = (index >= 0) & (index < size)
    return torch.where(there, index + offset, torch.where(index < 0, index, n * size))


def join_rows(
    n: int, dims: Given, given: Given, axes: Mapping[str, int]
) -> tuple[Given, int, tuple[int, ...]]:
    """The mapped dimension joins the rows of the batch, the (negative) axis that `axes` names.

    For outputs `[E, B, ...]` of operations that treat rows one by one.
    """
    joined, rows = dict(given), 0
    for name, axis in axes.items():
        if given[name] is not None:
            stacked = first(n, given[name], dims[name]).movedim(0, axis - 1)
            joined[name], rows = stacked.flatten(axis - 1, axis), stacked.shape[axis]
    return joined, 1, (n, rows)


def join_members(
    n: int, dims: Given, given: Given, ranks: Mapping[str, int]
) -> tuple[Given, int, tuple[int, ...]]:
    """The mapped dimension joins the members, for outputs `[E, ...]`.

    `ranks` has the dimensions of each tensor that may have a member axis, that axis counted. The first one,
    or the first of its tensors, always has it.
    """
    leader = next(iter(ranks))
    members = first(n, tree_leaves(given[leader])[0], tree_leaves(dims[leader])[0]).shape[1]

    def join(tensor: Tensor | None, dim: int | None, rank: int) -> Tensor | None:
        if tensor is None or (dim is None and tensor.dim() < rank):
            return tensor  # shared by all
        tensor = first(n, tensor, dim)
        if tensor.dim() == rank:  # shared by the members of each
            tensor = tensor.unsqueeze(1).expand(-1, members, *tensor.shape[1:])
        return tensor.flatten(0, 1)

    joined = {
        name: tree_map(lambda tensor, dim, rank=rank: join(tensor, dim, rank), given[name], dims[name])
        for name, rank in ranks.items()
    }
    return given | joined, 0, (n, members)
