"""Members to measure the uncertainty of, and how near to the oracle a result must be."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
INF, NAN = float("inf"), float("nan")


def draw(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    """Logits of members that agree somewhat."""
    own, common = torch.randn(shape, dtype=torch.float64), torch.randn(shape[1:], dtype=torch.float64)
    return ((own + common) * scale / 2**0.5).to(dtype)


def as_probabilities(logits: Tensor) -> Tensor:
    p = logits.double().sigmoid() if logits.dim() == 2 else logits.double().softmax(-1)
    return p.to(logits.dtype)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_close(got: Tensor, plain: Tensor, oracle: Tensor, scale: Tensor | None = None) -> None:
    """At most twice the rms error of plain PyTorch in the same dtype, plus two roundings of `scale`."""
    assert got.shape == oracle.shape and got.dtype == plain.dtype
    rounding = EPS[got.dtype] * rms(oracle if scale is None else scale)
    # The float64 oracle is plain PyTorch itself: there, some roundings along the way are all that may differ.
    allowed = 16 * rounding if got.dtype == torch.float64 else 2 * (rms(plain.double() - oracle) + rounding)
    assert rms(got.double() - oracle) <= allowed


def with_threads(function) -> list[Tensor]:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(torch.cat([x.flatten() for x in function() if x is not None]))
    finally:
        torch.set_num_threads(before)
    return results
