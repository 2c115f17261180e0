"""What `torch.optim` needs to train members as if each were alone."""

from pyens.optim.clip import clip_member_grad_norm_
from pyens.optim.fused import fused
from pyens.optim.in_pass import InPass, in_pass
from pyens.optim.members import (
    MemberLearningRates,
    MemberWeightDecay,
    keep_members,
    load_member_options,
    load_member_state,
    member_options,
    member_state,
)

__all__ = [
    "InPass",
    "MemberLearningRates",
    "MemberWeightDecay",
    "clip_member_grad_norm_",
    "fused",
    "in_pass",
    "keep_members",
    "load_member_options",
    "load_member_state",
    "member_options",
    "member_state",
]
