"""The steps of `pyens.optim.fused` on the CPU, each of all parameters of a group, in place."""

from collections.abc import Callable

from pyens.ops._call import operation

# The formulas are those of pyens.reference.optimizers, whose functions take the same arguments.
adam_: Callable[..., bool] = operation("adam_")
adagrad_: Callable[..., bool] = operation("adagrad_")
sgd_: Callable[..., bool] = operation("sgd_")
