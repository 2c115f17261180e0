"""The decorrelation loss."""

from collections.abc import Callable

from torch import Tensor

from pyens import reference
from pyens._types import Decorrelation, Reduction
from pyens.ops._call import Given, first, operation


def decorrelation_loss(
    outputs: Tensor, *, kind: Decorrelation = "correlation", reduction: Reduction = "sum"
) -> Tensor:
    r"""How much the components of an ensemble move together over a batch: add λ times this to their losses.

    For each model and label, with z the outputs [J, B] of its J components:

        C_ij = 1/B Σ_b z_ib z_jb,   loss = Σ_{i<j} C_ij² = ½ (‖C‖_F² - ‖diag C‖_F²)

    computed as the first sum: the difference of norms cancels when the loss has done its work.

    Args:
        outputs: `[J, B]`, `[J, B, K]` with K labels or outputs, or `[M, J, B, K]`: M independent models of J
            components each, trained side by side. Logits, probabilities, any outputs.
        kind: what z is. "correlation": the outputs themselves; "covariance": less each component's mean over
            the batch; "residue": less each example's mean over the components.
        reduction: "sum" over the labels; "none" keeps the label axis.

    Returns:
        A scalar, or `[M]` for outputs with an M axis; `[K]` or `[M, K]` with reduction "none" (`[J, B]` has
        no label axis and gives a scalar). In the dtype and, to the fourth power, in the units of the outputs.
        >= 0, and 0 for orthogonal components and for J = 1; NaN for B = 0 and J > 1, as a mean over nothing.

    Sums are accumulated in float32 (float64 for float64), the same bits for any number of threads, and right
    for data far from 0: covariances are of shifted data, residues relative to the first component.
    The forward pass reads the outputs once; the backward reads them once and writes the gradient once.

    Differentiable, twice and more. Under autocast it runs in float32. Within `torch.func`, grad, vjp, jvp
    and vmap work (also nested).

    Raises:
        ValueError: a shape that does not fit, no component or no label, an unknown kind or reduction.
        TypeError: an unsupported dtype.
        NotImplementedError: CUDA tensors where pyens was built without CUDA.

    Source: "Anti-Distillation", section 4, equations (2) to (5);
    reference in `pyens.reference.decorrelation_loss`.
    """
    return _decorrelation_loss(outputs, kind, reduction)


def _vmap(n: int, dims: Given, given: Given) -> tuple[Given, int, tuple[int, ...]]:
    # The mapped dimension becomes, or joins, that of the models.
    models = first(n, given["outputs"], dims["outputs"])
    if models.dim() == 3:
        return given | {"outputs": models.unsqueeze(-1), "reduction": "sum"}, 0, (n,)
    if models.dim() == 4:
        return given | {"outputs": models}, 0, (n,)
    return given | {"outputs": models.flatten(0, 1)}, 0, tuple(models.shape[:2])


_decorrelation_loss: Callable[..., Tensor] = operation(
    "decorrelation_loss", reference.decorrelation_loss, _vmap
)
