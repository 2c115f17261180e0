"""pyens.ops.ensemble_mlp_loss on CUDA: what differs from the CPU."""

import pytest
import torch
from loss_problems import assert_matches_the_reference, problem, with_gradients

from pyens.ops import ensemble_mlp_loss

E, B = 3, 6


@pytest.mark.cuda
def test_on_cuda_wrong_values_make_their_member_nan():
    cuda = torch.device("cuda")
    arguments = problem(E, B, [4, 5, 3], "cross_entropy", device=cuda, own_target=True, weighted="own")
    right = with_gradients(ensemble_mlp_loss, arguments)
    for name, value in (("target", -1), ("target", 3), ("sample_weight", -1)):
        wrong = arguments | {key: arguments[key].clone() for key in ("target", "sample_weight")}
        wrong["sample_weight"][1, 2] = 1
        wrong[name][1, 2] = value
        got = with_gradients(ensemble_mlp_loss, wrong)
        others = [m for m in range(E) if m != 1]
        # The input's gradient is the sum over the members.
        for ours, expected in zip((got[0], *got[2:]), (right[0], *right[2:]), strict=True):
            assert ours[1].isnan().all() and torch.equal(ours[others], expected[others])


@pytest.mark.cuda
def test_on_cuda_what_is_too_wide_for_one_launch_is_composed():
    assert_matches_the_reference(problem(2, 9, [4, 600, 900, 3], "mse", torch.float64, torch.device("cuda")))


@pytest.mark.cuda
def test_on_cuda_more_than_32_layers_are_composed():
    deep = problem(2, 9, [4, *[9] * 32, 2], "mse", torch.float64, torch.device("cuda"))
    assert_matches_the_reference(deep)


@pytest.mark.cuda
def test_on_cuda_the_same_bits_in_every_run_and_with_any_members_beside():
    cuda = torch.device("cuda")
    arguments = problem(5, 700, [32, 50, 20, 10, 1], "mse", torch.float32, cuda, per_member=True)
    whole = with_gradients(ensemble_mlp_loss, arguments)
    for a, b in zip(whole, with_gradients(ensemble_mlp_loss, arguments), strict=True):
        assert torch.equal(a, b)
    part = {
        name: [t[1:3] for t in value] if isinstance(value, list) else value
        for name, value in arguments.items()
    }
    part["input"] = arguments["input"][1:3]
    for a, b in zip(with_gradients(ensemble_mlp_loss, part), whole, strict=True):
        assert torch.equal(a, b[1:3])
