"""pyens.adapters: the layouts of TabM and Masksembles, spelled out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyens
from pyens.adapters import from_masksembles, from_tabm, to_masksembles, to_tabm

# Two members, three examples, one feature: 10 * member + example.
OURS = torch.tensor([[[0], [1], [2]], [[10], [11], [12]]])  # [E, B, D]
TABM = torch.tensor([[[0], [10]], [[1], [11]], [[2], [12]]])  # [B, k, D]
MASKSEMBLES = torch.tensor([[0], [1], [2], [10], [11], [12]])  # [(m b), D]


def test_tabm_has_the_members_in_the_middle():
    assert torch.equal(from_tabm(TABM), OURS)
    assert torch.equal(to_tabm(OURS), TABM)


def test_masksembles_has_the_batches_of_the_members_one_after_the_other():
    assert torch.equal(from_masksembles(MASKSEMBLES, 2), OURS)
    assert torch.equal(to_masksembles(OURS), MASKSEMBLES)
    # The same six rows as the batches of three members:
    assert from_masksembles(MASKSEMBLES, 3)[:, :, 0].tolist() == [[0, 1], [2, 10], [11, 12]]


@given(e=st.integers(1, 5), b=st.integers(0, 5), d=st.integers(0, 4))
def test_inverse_to_each_other(e, b, d):
    ours = torch.randn(e, b, d)
    assert to_tabm(ours).shape == (b, e, d) and torch.equal(from_tabm(to_tabm(ours)), ours)
    assert to_masksembles(ours).shape == (e * b, d)
    assert torch.equal(from_masksembles(to_masksembles(ours), e), ours)
    assert torch.equal(to_tabm(from_tabm(ours)), ours)
    assert torch.equal(to_masksembles(from_masksembles(ours.flatten(0, 1), e)), ours.flatten(0, 1))


def test_views():
    for adapted, x in (
        (from_tabm(TABM), TABM),
        (to_tabm(OURS), OURS),
        (from_masksembles(MASKSEMBLES, 2), MASKSEMBLES),
        (to_masksembles(OURS), OURS),
    ):
        assert adapted.data_ptr() == x.data_ptr()
    x = torch.randn(6, 2).requires_grad_()
    from_masksembles(x, 3)[1].sum().backward()
    assert x.grad.sum(1).tolist() == [0, 0, 2, 2, 0, 0]
    # No view has the rows of the members in this order: a copy.
    transposed = from_tabm(TABM)
    assert torch.equal(to_masksembles(transposed), MASKSEMBLES)


def test_into_a_model_and_out():
    model = pyens.EnsembleMLP(3, 4, [5], 2)
    x = torch.randn(3, 7, 4)  # [E, B, I]
    expected = model(x)
    assert torch.equal(to_tabm(model(from_tabm(x.transpose(0, 1).contiguous()))), expected.transpose(0, 1))
    assert torch.equal(to_masksembles(model(from_masksembles(x.flatten(0, 1), 3))), expected.flatten(0, 1))


@pytest.mark.parametrize("adapter", [from_tabm, to_tabm, to_masksembles])
@pytest.mark.parametrize("shape", [(), (6,), (6, 4), (2, 3, 4, 5)])
def test_wrong_rank(adapter, shape):
    expected = "[B, k, D]" if adapter is from_tabm else "[E, B, D]"
    with pytest.raises(ValueError) as error:
        adapter(torch.zeros(shape))
    assert str(error.value) == f"{adapter.__name__}: x: expected {expected}, got shape {list(shape)}"


@pytest.mark.parametrize(
    ("shape", "ensemble_size"), [((7, 2), 2), ((6, 2), 0), ((6, 2), -3), ((3, 2), 6), ((), 1)]
)
def test_masksembles_with_rows_that_do_not_divide(shape, ensemble_size):
    with pytest.raises(ValueError, match=r"from_masksembles: x: expected \[\(m b\), .*got shape") as error:
        from_masksembles(torch.zeros(shape), ensemble_size)
    assert f"ensemble_size = {ensemble_size}, got shape {list(shape)}" in str(error.value)
