"""The kernel of pyens.optim.clip_member_grad_norm_ against the formula and itself.

tests/test_optim.py has what it shares with the way that other devices take.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pyens.ops.clip_member_grad_norm import clip_member_grad_norm_
from pyens.reference import clip_member_grad_norm as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NORMS = (1.0, 2.0, math.inf)
WIDTHS = (0, 1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 1000, 8191, 8192, 8193, 20_000)


@pytest.fixture(params=[1, 2, 4], ids="threads={}".format)
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def some_gradients(members: int, dtype: torch.dtype, widths: tuple[int, ...] = WIDTHS) -> list[Tensor]:
    draw = torch.Generator().manual_seed(members)
    scale = 4.0 ** -torch.arange(members)[:, None]
    return [(torch.randn(members, w, generator=draw) * scale).to(dtype) for w in widths]


def clip(gradients: list[Tensor], max_norm: float, norm: float, error: bool = False) -> list[Tensor]:
    """The norms and what becomes of copies of the gradients."""
    copies = [g.clone() for g in gradients]
    return [clip_member_grad_norm_(copies, max_norm, norm, error), *copies]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_formula(dtype, norm):
    gradients = some_gradients(5, dtype)
    exact = [g.to(torch.float64, copy=True) for g in gradients]
    max_norm = reference.clip_member_grad_norm_(exact, math.inf, norm, False)[2].item()
    right = reference.clip_member_grad_norm_(exact, max_norm, norm, False)
    norms, *found = clip(gradients, max_norm, norm)
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    # In double a sum's roundings; else one of the norm, of the factor and of the product.
    eps = {t: 1000 * 2.0**-53 if t == torch.float64 else 0.75 * torch.finfo(t).eps for t in DTYPES}
    torch.testing.assert_close(norms.double(), right, rtol=eps[norms.dtype], atol=0.0)
    for mine, theirs, before in zip(found, exact, gradients, strict=True):
        assert torch.equal(mine[3:], before[3:])
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(mine.double(), theirs, rtol=2 * eps[dtype], atol=tiny)


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_depends_on_who_is_beside_it_or_on_the_threads(dtype, norm, error, threads):
    gradients = some_gradients(20, dtype, (33, 0, 20_000, 1))
    whole = clip(gradients, 0.01, norm, error)
    for members in ([0], [19], [7, 3], list(range(1, 18))):
        part = clip([g[members] for g in gradients], 0.01, norm)
        assert all(torch.equal(a, b[members]) for a, b in zip(part, whole, strict=True))


def test_types_may_differ():
    low, high = some_gradients(3, torch.bfloat16, (40,)), some_gradients(3, torch.float64, (9,))
    norms, *_ = clip(low + high, 1.0, 2.0)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, torch.cat([low[0].double(), high[0]], 1).norm(dim=1))


def test_squares_of_float64_leave_its_range_and_norms_do_not():
    sizes = [1e300, 1e-300, 5e-324, 1e200, 1e150, 1e-150, 1e-140, 1.0, 1.7e308]
    gradients = [torch.ones(9, w, dtype=torch.float64) for w in (3, 9000, 1)]
    for g in gradients:
        g *= torch.tensor(sizes, dtype=torch.float64)[:, None]
    found = clip(gradients, 1.0, 2.0)
    expected = torch.tensor(sizes, dtype=torch.float64) * math.sqrt(9004)
    torch.testing.assert_close(found[0], expected, rtol=1e-13, atol=5e-324)
    assert found[0][8] == math.inf
    clipped = [x / n if n > 1 else x for x, n in zip(sizes[:8], expected.tolist(), strict=False)]
    torch.testing.assert_close(found[2][:8, 0], torch.tensor(clipped, dtype=torch.float64), rtol=1e-6, atol=0)
    # Parts of a member in different ranges.
    for wide, own in ((0.0, 3e-200), (3e-200, 4e-170), (1e-10, 1e-200), (1e190, 1e-5), (1e100, 1e200)):
        pair = [torch.tensor([[wide]], dtype=torch.float64), torch.tensor([[own]], dtype=torch.float64)]
        assert clip(pair, 1.0, 2.0)[0].item() == pytest.approx(math.hypot(wide, own), rel=1e-15)
    lost = [torch.tensor([[x]], dtype=torch.float64) for x in (math.nan, 1e300, math.inf)]
    assert clip(lost, 1.0, 2.0)[0].isnan() and clip(lost[1:], 1.0, 2.0)[0] == math.inf


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 5, 31, 40, 8191, 8192, 9000])
def test_nan_and_inf_are_found_wherever_they_are(dtype, norm, place):
    gradients = [torch.ones(4, 9001, dtype=dtype), torch.ones(4, 3, dtype=dtype)]
    gradients[0][1, place], gradients[0][2, place] = math.nan, -math.inf
    norms, first, second = clip(gradients, 0.5, norm)
    assert norms.isnan().tolist() == [False, True, False, False]
    assert norms.isinf().tolist() == [False, False, True, False]
    assert first[1].isnan().all() and second[1].isnan().all()
    assert first[2].isnan().sum() == 1 and first[2, place].isnan() and first[2].nan_to_num().sum() == 0
    assert torch.equal(second[2], torch.zeros(3, dtype=dtype)) and torch.equal(first[0], first[3])


def test_where_it_raises_it_changes_nothing(threads):
    gradients = some_gradients(4, torch.float32)
    gradients[3][1], gradients[4][3] = math.nan, math.inf
    before, versions = [g.clone() for g in gradients], [g._version for g in gradients]
    match = r"^clip_member_grad_norm_: expected finite norms, got \[nan, inf\] for members \[1, 3\]$"
    with pytest.raises(RuntimeError, match=match):
        clip_member_grad_norm_(gradients, 1e-3, 2.0, True)
    assert all(torch.equal(g.nan_to_num(), b.nan_to_num()) for g, b in zip(gradients, before, strict=True))
    assert versions == [g._version for g in gradients]
    clip_member_grad_norm_(gradients, 1e-3, 2.0, False)
    assert [v + 1 for v in versions] == [g._version for g in gradients]


def test_what_is_not_contiguous_is_clipped_where_it_is(threads):
    straight = [g.view(6, 4, 5) for g in some_gradients(6, torch.float32, (20, 20))]
    strided = [straight[0].transpose(1, 2).contiguous().transpose(1, 2), torch.zeros(6, 4, 10)[:, :, ::2]]
    strided[1].copy_(straight[1])
    norms = clip_member_grad_norm_(strided, 0.1, 1.0, False)
    torch.testing.assert_close([norms, *strided], clip(straight, 0.1, 1.0), rtol=1e-6, atol=0)
    before, expanded = strided[0].clone(), torch.ones(1).expand(6, 2)
    with pytest.raises(RuntimeError, match="single memory location"):
        clip_member_grad_norm_([strided[0], expanded], 0.01, 1.0, False)
    assert (expanded == 1).all() and torch.equal(strided[0], before)


def test_gradients_on_the_same_memory_are_clipped_one_after_the_other(threads):
    memory = torch.ones(40, 9000)
    norms = clip_member_grad_norm_([memory[:32], memory[8:]], 0.5, math.inf, False)
    assert (norms == 1).all()
    assert (memory[8:32] == 0.5 / (1 + 1e-6) * memory[0]).all() and (memory[:8] == memory[32:]).all()


def test_sizes_of_nothing():
    assert clip([torch.ones(0, 3)], 1.0, 2.0)[0].shape == (0,)
    assert torch.equal(clip([torch.ones(2, 0)], 1.0, 2.0)[0], torch.zeros(2))
    assert torch.equal(clip([torch.ones(2)], 1.0, 2.0)[0], torch.ones(2))


def test_refusals():
    good = torch.ones(3, 2)
    for error, match, gradients, norm in (
        (ValueError, r"norm_type: expected 1, 2 or inf, got 3", [good], 3.0),
        (ValueError, r"gradients\[1\]: expected \[E, .* got shape \[4\]", [good, torch.ones(4)], 2.0),
        (ValueError, r"gradients\[0\]: expected \[E, .* got shape \[\]", [torch.tensor(1.0)], 2.0),
        (TypeError, r"gradients\[1\]: expected float32, .* got Int", [good, good.int()], 2.0),
    ):
        with pytest.raises(error, match=f"^clip_member_grad_norm_: {match}"):
            torch.ops.pyens.clip_member_grad_norm_(gradients, 1.0, norm, False)
    assert (good == 1).all()


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm):
    arguments = (some_gradients(3, torch.float32, (17, 1)), 0.5, norm, False)
    torch.library.opcheck(torch.ops.pyens.clip_member_grad_norm_.default, arguments)
