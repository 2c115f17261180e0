"""The fused ensemble MLP that also tells what its hidden units did."""

from collections.abc import Sequence

from torch import Tensor

from pyens._types import Activation, ActivationStrength
from pyens.ops._call import operation
from pyens.ops.ensemble_mlp import joined

_activation_strength = operation("activation_strength")


def activation_strength(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    mean: Tensor,
    std: Tensor,
    *,
    activation: Activation | Sequence[Activation] = "relu",
    bitpack: bool = False,
) -> ActivationStrength:
    r"""The outputs of an ensemble of MLPs, and how strongly each hidden unit of each member was active.

    With the hidden activations h = [h_1, ..., h_{L-1}] of `pyens.ops.ensemble_mlp`, unit by unit:

        output  that of ensemble_mlp, bit for bit
        value   (h - mean) / std
        active  h > 0

    For relu, gelu, silu, elu, tanh and identity a unit is active where its pre-activation is positive; a
    softplus is always positive, so there only the value tells something.

    Args:
        input, weights, biases, activation: as in `pyens.ops.ensemble_mlp`. One model is E = 1.
        mean, std: `[ΣH]`, shared by all members, or `[E, ΣH]`: of each hidden unit over the training data, in
            the units of h, layer after layer; std is that of the population. ΣH is the number of hidden units
            of all layers together. In the dtype of the weights, or float32 with 16-bit weights. What
            `pyens.variation.ActivationStatistics` finds.
        bitpack: eight units to a byte.

    Returns:
        `ActivationStrength`, a named tuple: output `[E, B, O]`; value `[E, B, ΣH]` in the dtype of the input,
        in standard deviations; active bool `[E, B, ΣH]`, or with `bitpack` uint8 `[E, B, ⌈ΣH/8⌉]` with unit u
        in bit u % 8 of byte u // 8, the lowest bit first, as `numpy.unpackbits(bitorder="little")` reads it,
        and bits left over 0. Without a hidden layer ΣH is 0.

    A dead unit, one whose std is 0 or smaller than any normal number of float32 (float64 for float64), has
    the value 0 whatever it does, also for a NaN. Otherwise NaN and Inf are as in torch; NaN is not active.
    The statistics are used in float32 (float64 for float64). The same bits for any number of threads, any
    split of the batch, and any members beside.

    For inference: backward and the transforms of `torch.func` raise. Under autocast it casts as
    `ensemble_mlp` does, mean and std aside.

    Raises:
        ValueError: a shape that does not fit, no layer, an unknown activation; mean or std of another length
            than there are hidden units.
        TypeError: mixed or unsupported dtypes, mixed devices.
        NotImplementedError: CUDA tensors where pyens was built without CUDA.

    Source: "Beyond Point Estimate", where only ReLU is used and a unit is active where
    its output is greater than 0; reference in `pyens.reference.activation_strength`.
    """
    if not isinstance(activation, str):
        activation = joined("activation_strength", "activation", activation)
    return ActivationStrength(
        *_activation_strength(
            input, weights, () if biases is None else biases, mean, std, activation, bitpack
        )
    )
