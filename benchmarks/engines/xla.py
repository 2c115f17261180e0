"""JAX: what XLA makes of an ensemble.

Tried and left out, because they gained nothing: weights laid out as [E, in, out], products written as sums,
XNNPACK and oneDNN in place of XLA's own products, weights as arguments of a forward pass in place of
constants. `ynn` has YNNPACK for products: three times as fast where a stack has a large batch. XLA's own
products, of which a stack is made, run on one thread each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")
YNN = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"

Arrays = Sequence[Any]


def forward(threads: int, form: str, input: np.ndarray, weights: Arrays, biases: Arrays) -> Callable:
    """Output [E, B, O], or [E, O, B] of the transposed stack."""
    import jax

    call = jax.jit(lambda x: _forms()[form](_on_device(weights), _on_device(biases), x))
    x = jax.device_put(input)
    return lambda: [call(x).block_until_ready()]


def gradients(
    threads: int, form: str, input: np.ndarray, target: np.ndarray, weights: Arrays, biases: Arrays
) -> Callable:
    """Losses [E] and the gradients of their sum, which take the memory of those of the call before."""
    import jax

    x, parameters = jax.device_put(input), (_on_device(weights), _on_device(biases))
    differentiate = jax.value_and_grad(_total(form, target), has_aux=True)

    def step(_: Any, parameters: Any, x: Any) -> Any:
        (_, losses), found = differentiate(parameters, x)
        return losses, found

    call = jax.jit(step, donate_argnums=0, keep_unused=True)
    held = [jax.tree.map(jax.numpy.zeros_like, parameters)]

    def run() -> list[Any]:
        losses, held[0] = jax.block_until_ready(call(held[0], parameters, x))
        return [losses, *held[0][0], *held[0][1]]

    return run


def adam_step(
    threads: int, form: str, input: np.ndarray, target: np.ndarray, weights: Arrays, biases: Arrays
) -> Callable:
    """A step with Adam, as torch computes it; returns losses and the parameters after it, in place."""
    import jax
    from jax import numpy as jnp

    x, parameters = jax.device_put(input), (_on_device(weights), _on_device(biases))
    differentiate = jax.value_and_grad(_total(form, target), has_aux=True)

    def step(state: Any, x: Any) -> Any:
        parameters, first, second, count = state
        (_, losses), found = differentiate(parameters, x)
        count = count + 1
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, found)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, found)
        rate, spread = 1e-3 / (1 - 0.9**count), jnp.sqrt(1 - 0.999**count)
        parameters = jax.tree.map(
            lambda p, m, v: p - rate * m / (jnp.sqrt(v) / spread + 1e-8), parameters, first, second
        )
        return losses, (parameters, first, second, count)

    call = jax.jit(step, donate_argnums=0)
    zeros = [jax.tree.map(jnp.zeros_like, parameters) for _ in range(2)]
    held = [(parameters, *zeros, jnp.zeros(()))]

    def run() -> list[Any]:
        losses, held[0] = jax.block_until_ready(call(held[0], x))
        return [losses, *held[0][0][0], *held[0][0][1]]

    return run


def _on_device(arrays: Arrays) -> tuple[Any, ...]:
    import jax

    return tuple(jax.device_put(array) for array in arrays)


def _total(form: str, target: np.ndarray) -> Callable:
    """The sum of the members' mean squared errors, and the errors, of (weights, biases) and input."""
    transposed = form == "transposed"
    wanted = target.T if transposed else target

    def total(parameters: Any, x: Any) -> Any:
        output = _forms()[form](*parameters, x)
        losses = ((output - wanted) ** 2).mean((1, 2))
        return losses.sum(), losses

    return total


def _forms() -> dict[str, Callable]:
    """Ways to write the forward pass: of weights, biases and input."""
    import jax
    from jax import numpy as jnp

    def member(weights: Arrays, biases: Arrays, hidden: Any) -> Any:
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            hidden = jax.nn.relu(hidden) if layer else hidden
            hidden = hidden @ weight.T + bias
        return hidden

    def vmap(weights: Arrays, biases: Arrays, x: Any) -> Any:
        return jax.vmap(member, (0, 0, None))(weights, biases, x)

    def map_(weights: Arrays, biases: Arrays, x: Any) -> Any:
        return jax.lax.map(lambda parameters: member(*parameters, x), (weights, biases))

    def einsum(weights: Arrays, biases: Arrays, x: Any) -> Any:
        hidden = jnp.einsum("bi,eoi->ebo", x, weights[0]) + biases[0][:, None]
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            hidden = jnp.einsum("ebi,eoi->ebo", jax.nn.relu(hidden), weight) + bias[:, None]
        return hidden

    def transposed(weights: Arrays, biases: Arrays, x: Any) -> Any:
        hidden = jnp.einsum("bi,eoi->eob", x, weights[0]) + biases[0][:, :, None]
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            hidden = jnp.einsum("eib,eoi->eob", jax.nn.relu(hidden), weight) + bias[:, :, None]
        return hidden

    return {"vmap": vmap, "lax.map": map_, "einsum": einsum, "transposed": transposed}
