"""Ensembles of embedding tables."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyens import ops
from pyens.masks import check
from pyens.nn._members import Members, listed
from pyens.nn.ensemble import parameters_of


class EnsembleEmbedding(Members):
    r"""`ensemble_size` copies of `nn.Embedding` that run as one: output[m] = weight[m][index].

    Args:
        ensemble_size: E, the number of members.
        num_embeddings, embedding_dim: as for `nn.Embedding`.
        sparse: whether the gradient holds only the rows that were looked up, see below.
        device, dtype: of the table.
        seeds: one per member, see `reset_parameters`.

    Parameter: `weight` `[E, num_embeddings, embedding_dim]`, drawn from N(0, 1).

    With `sparse=False` the gradient is dense and any optimizer takes it. With `sparse=True` it is a sparse
    tensor for `torch.optim.SparseAdam`, `Adagrad` and `SGD` (not with `fused=True`); the others refuse it.
    These leave a row that no example of the batch looked up as it is:

    - `SparseAdam`, against `Adam`: the moments of such a row do not decay, and the row does not move on by
      its momentum. When it is looked up again it continues with the moments it had, while the bias correction
      counts all steps of the table, not those of the row. There is no weight decay and no amsgrad.
    - `Adagrad` and `SGD`: the same as with dense gradients, whose rows of zeros change nothing either.
      Weight decay raises. The momentum of `SGD` comes to hold every row that was ever looked up and moves it
      in every step, as the dense one does, so it saves nothing.

    A dense gradient costs in every step its zeroing and the optimizer's pass over all E x N x D numbers; a
    sparse one the sorting of the E x B indices and many unfused passes over the rows that were looked up. So
    sparse is the cheaper where a batch looks up no more than a few per cent of the rows, and dense with a
    fused optimizer everywhere else. A member's gradient has the same bits in both forms, whichever members
    are beside it.
    """

    def __init__(
        self,
        ensemble_size: int,
        num_embeddings: int,
        embedding_dim: int,
        *,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seeds: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__()
        check(
            "EnsembleEmbedding",
            ensemble_size=ensemble_size,
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
        )
        self.ensemble_size = ensemble_size
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.sparse = sparse
        self.weight = nn.Parameter(
            torch.empty(ensemble_size, num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        self.reset_parameters(seeds)

    @classmethod
    def from_modules(cls, modules: Iterable[nn.Embedding]) -> Self:
        """An ensemble of copies of trained tables of one shape, dtype and device, bit for bit.

        Raises:
            ValueError: tables that do not fit each other; `padding_idx`, `max_norm` or `scale_grad_by_freq`,
                which the operation does not have.
        """
        modules = listed(modules)
        for i, module in enumerate(modules):
            _check_module(module, modules[0], f"from_modules: modules[{i}]")
        with torch.no_grad():
            weight = torch.stack([module.weight for module in modules])
        new = cls(*weight.shape, sparse=modules[0].sparse, device="meta", dtype=weight.dtype)
        new.weight = nn.Parameter(weight)
        return new.train(modules[0].training)

    def stacked(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The tables `[E, num_embeddings, embedding_dim]`, and no biases."""
        return parameters_of(self, ("weight",)), []

    def draw(self, member: int, generator: torch.Generator | None) -> None:
        ((weight,), _) = self._parameters_alone("reset_parameters")
        drawn = torch.empty(weight.shape[1:], dtype=torch.float32, device="cpu")
        nn.init.normal_(drawn, generator=generator)
        weight[member].copy_(drawn)

    def config(self) -> dict[str, Any]:
        return {
            "ensemble_size": self.ensemble_size,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "sparse": self.sparse,
        }

    def forward(self, index: Tensor) -> Tensor:
        """int64 `[B]` (shared by all members) or `[E, B]` -> `[E, B, embedding_dim]`."""
        return ops.ensemble_embedding(index, self.weight, sparse=self.sparse)

    def member(self, i: int) -> nn.Embedding:
        """Member i as an `nn.Embedding`, with a copy of its table."""
        self._check_member(i)
        ((weight,), _) = self.stacked()
        module = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            sparse=self.sparse,
            device="meta",
            dtype=weight.dtype,
        )
        module.weight = nn.Parameter(weight[i].detach().clone())
        return module.train(self.training)


def _check_module(module: nn.Module, first: nn.Embedding, argument: str) -> None:
    if type(module) is not nn.Embedding:
        raise ValueError(f"{argument}: expected nn.Embedding, got {type(module).__name__}")
    unknown: dict[str, Any] = {"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False}
    for name, default in unknown.items():
        if (value := getattr(module, name)) != default:
            raise ValueError(f"{argument}: expected {name}={default}, got {value}")
    if not isinstance(module.weight, nn.Parameter):
        raise ValueError(f"{argument}: expected a weight that is a parameter, got one computed from others")
    if _describe(module) != _describe(first):
        raise ValueError(f"{argument}: expected {_describe(first)} like modules[0], got {_describe(module)}")


def _describe(module: nn.Embedding) -> str:
    weight = module.weight
    return f"{list(weight.shape)}, {weight.dtype}, {weight.device}, sparse={module.sparse}"
