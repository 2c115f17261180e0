"""`pyens.optim.clip_member_grad_norm_` on the CPU, of a list of gradients, in place."""

from collections.abc import Callable

from torch import Tensor

from pyens.ops._call import operation

# Takes the arguments of pyens.reference.clip_member_grad_norm.
clip_member_grad_norm_: Callable[..., Tensor] = operation("clip_member_grad_norm_")
