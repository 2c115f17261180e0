"""Losses that push the components of an ensemble apart, and ways to combine their outputs into one.

The J components of a model are trained side by side, each on its own label loss; a loss of this module,
times a strength λ, is added. All of it is from "Anti-Distillation" (docs/references.md).

Outputs z are ``[J, B]`` (one output, such as a binary logit), ``[J, B, K]``, or ``[M, J, B, K]`` for M
independent models that are trained together. A loss is computed for each of the K labels; with
``reduction="sum"`` these are summed to a 0-dim tensor, or ``[M]``, with ``reduction="none"`` they are ``[K]``
or ``[M, K]``; of ``[J, B]`` the loss is 0-dim either way.

One component (J = 1) has no pair, and an empty batch (B = 0) no example: the loss is 0, with zero gradients.
float16 and bfloat16 are computed in float32, also under autocast, and give float32. Nothing here looks at the
values: NaN stays NaN. Differentiable as often as one likes.
"""

from pyens.losses.combination import Gate, combine
from pyens.losses.decorrelation import (
    RunningDecorrelationLoss,
    decorrelation_loss,
    gram_schmidt,
    gram_schmidt_decorrelation_loss,
    pearson_decorrelation_loss,
)
from pyens.losses.difference import cross_entropy_difference_loss, difference_loss

__all__ = [
    "Gate",
    "RunningDecorrelationLoss",
    "combine",
    "cross_entropy_difference_loss",
    "decorrelation_loss",
    "difference_loss",
    "gram_schmidt",
    "gram_schmidt_decorrelation_loss",
    "pearson_decorrelation_loss",
]
