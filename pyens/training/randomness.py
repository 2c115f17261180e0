"""Where the members of an ensemble get their differences from, and how every draw follows from a seed."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyens.ops import keyed_permutation


@dataclass(frozen=True)
class Randomness:
    """Which sources of randomness make the members differ.

    Args:
        init: R, every member draws weights of its own; without it all start from the same ones.
        shuffle: S, every member draws a new order of the examples in every epoch; without it one fixed order
            serves all members in all epochs.
        jackknife: J, every member leaves out one group of the training examples (delete-1 jackknife).

    Source: "Beyond Point Estimate", the randomness settings R0 to R7.
    """

    init: bool = False
    shuffle: bool = False
    jackknife: bool = False

    @classmethod
    def from_code(cls, code: str) -> Randomness:
        """The document's names: R0 none, R1 R, R2 S, R3 R+S, R4 J, R5 R+J, R6 S+J, R7 R+S+J.

        Raises:
            ValueError: another code.
        """
        if code not in CODES:
            raise ValueError(f"Randomness.from_code: code: expected one of {', '.join(CODES)}, got {code!r}")
        bits = CODES.index(code)
        return cls(init=bool(bits & 1), shuffle=bool(bits & 2), jackknife=bool(bits & 4))

    @property
    def code(self) -> str:
        """The document's name of this setting, "R0" to "R7"."""
        return CODES[self.init + 2 * self.shuffle + 4 * self.jackknife]


# What orders are made by: another name wherever they change, since runs do not go on in another order.
ORDER = "keyed permutation 1"
CODES = tuple(f"R{i}" for i in range(8))


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Another seed, for one purpose: a number in [0, 2^63) that looks independent of all others.

    The same on every machine, and without a state that a resumed run would have to find again.
    """
    words = ":".join(str(word) for word in (int(seed), *purpose))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator on the CPU, seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def member_seeds(seed: int, ensemble_size: int) -> list[int]:
    """A seed for each member where the caller gives none: member m's is the same however many there are."""
    return [derive_seed(seed, "member", m) for m in range(ensemble_size)]


@dataclass(frozen=True)
class Order:
    """What every member meets and when: a pure function of the seeds, the epoch and the member.

    Rows are places in the training data, validation rows excluded. Nothing is stored of a member or an
    epoch.
    """

    rows: Tensor  # int32 [n]: the training rows, in the common order
    seeds: tuple[int, ...]  # of all members
    shuffle: bool
    groups: Tensor | None  # int32 [N], the jackknife group of each row of the data; None without jackknife
    left_out: tuple[int, ...]  # of all members

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self, members: Sequence[int], *when: int) -> Tensor | None:
        """int64 `[len(members)]`: of their orders in an epoch, or a part of one; None: the common order."""
        if not self.shuffle:
            return None
        return torch.tensor([derive_seed(self.seeds[m], "order", *when) for m in members])

    def batch(self, keys: Tensor | None, first: int, count: int) -> Tensor:
        """At most `count` rows from place `first` on: `[B]` if all members meet the same, else `[E, B]`."""
        if keys is None:
            return self.rows[first : first + count]
        return self.rows[keyed_permutation(keys, len(self), first, min(count, len(self) - first))]

    def epoch(self, epoch: int, members: Sequence[int]) -> Tensor:
        """All rows of an epoch: `[n]` or `[len(members), n]`."""
        return self.batch(self.keys(members, epoch), 0, len(self))

    def weights(self, rows: Tensor, members: Sequence[int]) -> Tensor | None:
        """float32 `[len(members), B]`, 0 where a member leaves the row out, else 1; None for all ones."""
        if self.groups is None:
            return None
        left_out = torch.tensor([self.left_out[m] for m in members], dtype=self.groups.dtype)
        groups = self.groups.index_select(0, rows.reshape(-1)).view(rows.shape)
        return (groups != left_out.unsqueeze(1)).float()


def split_rows(
    rows: int, share: float, seed: int, groups: Tensor | None = None, held_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Training rows in an order drawn from the seed, and validation rows: `share` of all, at least one.

    Args:
        groups: int64 `[N]`. Rows of one group are on one side: of the groups, in an order that is drawn, each
            is taken that brings the validation rows nearer to the share, and the smallest where none does.
        held_out: bool `[N]`, the validation rows where the caller has chosen them.
    """
    if held_out is not None:
        training, validation = (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
    elif groups is not None and share > 0:
        number, sizes = groups.unique(return_inverse=True, return_counts=True)[1:]
        drawn = torch.randperm(len(sizes), generator=generator(seed, "validation"))
        chosen = torch.zeros(len(sizes), dtype=torch.bool)
        missing = max(1, round(share * rows))
        for group, size in zip(drawn.tolist(), sizes[drawn].tolist(), strict=True):
            if abs(missing - size) < missing:
                chosen[group] = True
                missing -= size
            if missing <= 0:
                break
        if not chosen.any():
            chosen[drawn[sizes[drawn].argmin()]] = True
        return split_rows(rows, share, seed, held_out=chosen[number])
    else:
        drawn = torch.randperm(rows, generator=generator(seed, "validation"))
        count = max(1, round(share * rows)) if share > 0 else 0
        training, validation = drawn[count:], drawn[:count].sort().values
    order = torch.randperm(len(training), generator=generator(seed, "order"))
    return training[order].int(), validation


def partition(rows: Tensor, total: int, parts: int, seed: int, groups: Tensor | None = None) -> Tensor:
    """int32 `[total]`: the part of each of `rows`, drawn at random and of equal sizes but for 1; -1 for the
    others.

    With `groups`, int64 `[total]`, rows of one group are in one part: the largest group first, each to the
    part that has least; groups of one size in an order that is drawn.
    """
    part = torch.full((total,), -1, dtype=torch.int32)
    if groups is None:
        drawn = torch.randperm(len(rows), generator=generator(seed, "groups"))
        part[rows[drawn]] = torch.arange(len(rows), dtype=torch.int32) % parts
        return part
    number, sizes = groups[rows.long()].unique(return_inverse=True, return_counts=True)[1:]
    drawn = torch.randperm(len(sizes), generator=generator(seed, "groups"))
    largest_first = drawn[sizes[drawn].argsort(descending=True, stable=True)].tolist()
    filled = [(0, i) for i in range(parts)]
    of_group = torch.empty(len(sizes), dtype=torch.int32)
    for group in largest_first:
        size, least = heapq.heappop(filled)
        of_group[group] = least
        heapq.heappush(filled, (size + int(sizes[group]), least))
    part[rows.long()] = of_group[number]
    return part
