"""Models of several components, each learning by itself, that are pushed apart while they train."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from pyens._kinds import check_number, check_tensor
from pyens._types import Decorrelation, Loss, LossReduction, Space
from pyens.losses import combine, decorrelation_loss
from pyens.nn._layer_options import Rates
from pyens.nn._losses import OPTIONS, check_options, check_values, mean_losses_of
from pyens.nn.ensemble import Ensemble
from pyens.nn.tabular import TabularEnsemble
from pyens.reference.ensemble_mlp_loss import LOSSES, row_sums, weighted_mean

# Outputs of the components [M, J, B, K] -> a loss of each model, [M].
Push = Callable[[Tensor], Tensor]


class ComponentModels(Ensemble):
    r"""M models of J components: each component learns from its own loss, and the components from each other.

    A component is an ensemble of M members, its member m the component of model m. With z_j the outputs of
    component j, `[M, B, K]`, the loss of each model is the sum of

        label            Σ_j of the mean loss of z_j, as if the component were alone
        decorrelation    strength · L(z) with the L of `decorrelation`, of z `[M, J, B, K]`
        gate             the mean loss of the combined output, if there is a gate, which alone learns from it

    and what comes out is the outputs combined: no gradient goes through it to the components. So `fit`,
    `select`, metrics and early stopping speak of models. A model's bits do not depend on the other models.

    Args:
        components: J ensembles of M members, which take the same inputs and give outputs of one shape. They
            may be of different kinds and sizes, and share modules: what is one object is one set of
            parameters.
        strength: λ >= 0, one for all models or M of them (a sweep over λ trains as one ensemble). None
            leaves the decorrelation out, and the components learn by the losses of their own classes.
        decorrelation: "correlation", "covariance" or "residue", see `pyens.losses.decorrelation_loss`; or a
            function `[M, J, B, K] -> [M]`, such as `pyens.losses.difference_loss`. A module with buffers
            `[M, ...]` names them in `member_buffers`.
        on: what is decorrelated, "logit": the outputs as they are, or "probability" of them: the softmax, of
            one output the sigmoid.
        average: how the outputs are combined, in "probability" (they are logits then, of one or of several
            classes) or in "logit"; the outcome is a logit either way, see `pyens.losses.combine`.
        gate: an ensemble of M members with J outputs, of the same inputs: the combination's weights are
            their softmax. None: even ones.
        beside: what is added to the outputs of the components after they are decorrelated: one ensemble of M
            members for all components, or J of them. A linear part beside a deep one.
        shared_tables: of components that are `TabularEnsemble`: the columns whose embeddings all share, those
            of the first component; True for all columns.
        rows_of: from the inputs to what each row weighs for each component, `[B, J]` or `[M, B, J]`, where
            components learn from data of their own. Only rows that all of them learn from are decorrelated.

    Components with optimizers or learning rates of their own: give `fit` a function that makes several, of
    `model.components[j].parameters()`. One initialisation for all models: `reset_parameters([s] * M)`.

    Attributes:
        strength: `[M]`, a buffer; assign to its elements for a schedule. None without decorrelation.

    Raises:
        ValueError: no components, or of different numbers of models; a strength that is negative or NaN; a
            gate with another number of outputs; tables of different sizes to be shared. In training, a batch
            of one row.

    Example:
        >>> towers = [pyens.EnsembleMLP(20, 784, [1200, 1200], 10) for _ in range(2)]
        >>> model = ComponentModels(towers, strength=0.1)
        >>> model(torch.randn(32, 784)).shape, model.outputs(torch.randn(32, 784)).shape
        (torch.Size([20, 32, 10]), torch.Size([20, 2, 32, 10]))

    Source: "Anti-Distillation", sections 2 and 4.
    """

    components: Any  # torch does not say what a ModuleList holds
    strength: Tensor | None
    member_buffers = ("strength",)

    def __init__(
        self,
        components: Sequence[Ensemble],
        *,
        strength: float | Sequence[float] | Tensor | None = 0.1,
        decorrelation: Decorrelation | Push = "correlation",
        on: Space = "logit",
        average: Space = "probability",
        gate: Ensemble | None = None,
        beside: Ensemble | Sequence[Ensemble] | None = None,
        shared_tables: bool | Sequence[int] = False,
        rows_of: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        name = "ComponentModels"
        if isinstance(components, Ensemble) or not isinstance(components, (Sequence, nn.ModuleList)):
            kind = type(components).__name__
            raise TypeError(f"{name}: components: expected a list of ensembles, got a {kind}")
        if len(components) == 0:
            raise ValueError(f"{name}: components: expected at least one, got none")
        parts = {f"components[{j}]": part for j, part in enumerate(components)}
        self.one_beside = isinstance(beside, Ensemble)
        besides = [beside] if isinstance(beside, Ensemble) else list(beside or [])
        if besides and not self.one_beside and len(besides) != len(components):
            raise ValueError(
                f"{name}: beside: expected one ensemble, or one for each of {len(components)} components, "
                f"got {len(besides)}"
            )
        parts |= {"beside" if self.one_beside else f"beside[{j}]": part for j, part in enumerate(besides)}
        parts |= {} if gate is None else {"gate": gate}
        for argument, part in parts.items():
            if not isinstance(part, Ensemble):
                raise TypeError(f"{name}: {argument}: expected an Ensemble, got a {type(part).__name__}")
            if part.ensemble_size != components[0].ensemble_size:
                raise ValueError(
                    f"{name}: {argument}: expected the {components[0].ensemble_size} models of "
                    f"components[0], got {part.ensemble_size}"
                )
        for argument, space in (("on", on), ("average", average)):
            if space not in get_args(Space):
                raise ValueError(
                    f"{name}: {argument}: expected one of {', '.join(get_args(Space))}, got {space!r}"
                )
        kinds = get_args(Decorrelation)
        if not callable(decorrelation) and decorrelation not in kinds:
            raise ValueError(
                f"{name}: decorrelation: expected one of {', '.join(kinds)} or a function, "
                f"got {decorrelation!r}"
            )
        if rows_of is not None and not callable(rows_of):
            raise TypeError(f"{name}: rows_of: expected a function, got a {type(rows_of).__name__}")
        out = None if gate is None else getattr(gate, "out_features", None)
        if isinstance(out, int) and out != len(components):
            raise ValueError(
                f"{name}: gate: expected an output for each of {len(components)} components, got {out}"
            )
        self.ensemble_size = components[0].ensemble_size
        self.components = nn.ModuleList(components)
        self.gate = gate
        self.beside = nn.ModuleList(besides)
        self.decorrelation, self.on, self.average, self.rows_of = decorrelation, on, average, rows_of
        like = _like(self)
        own = None if strength is None else _strengths(strength, self.ensemble_size)
        self.register_buffer("strength", own if own is None else own.to(like))
        _share(self.components, shared_tables)

    @property
    def dropout(self) -> Rates:  # type: ignore[override]
        """Of the first part that has some: `forward` and `loss` take `dropout_seeds` then."""
        return next((part.dropout for part in self.parts() if part.dropout), 0.0)

    def outputs(self, *inputs: Any, dropout_seeds: Tensor | None = None) -> Tensor:
        """What the components give, `[M, J, B, K]`, with what stands beside them."""
        return self._outputs(inputs, dropout_seeds)[0]

    def forward(self, *inputs: Any, dropout_seeds: Tensor | None = None) -> Tensor:
        """The combined logits `[M, B, K]`, from what the components take."""
        return self._combined(self.outputs(*inputs, dropout_seeds=dropout_seeds), inputs, dropout_seeds)

    def loss(
        self,
        *batch: Any,
        loss: Loss | Callable[[Tensor, Tensor], Tensor],
        sample_weight: Tensor | None = None,
        reduction: LossReduction = "mean",
        **options: Any,
    ) -> Tensor:
        """The loss of each model `[M]`: the sum of `loss_terms`. Train on its sum."""
        if reduction != "mean":
            raise ValueError(f"loss: reduction: expected mean for a ComponentModels, got {reduction!r}")
        terms = self.loss_terms(*batch, loss=loss, sample_weight=sample_weight, **options)
        return torch.stack(list(terms.values())).sum(0)

    def loss_terms(
        self,
        *batch: Any,
        loss: Loss | Callable[[Tensor, Tensor], Tensor],
        sample_weight: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """ "label", "decorrelation" and "gate", each `[M]`; see the class.

        Args:
            batch: what the components take, then the target: `[B, ...]`, or `[M, B, ...]` for models with
                data of their own.
            loss: see `pyens.ops.ensemble_mlp_loss`; or a function of one component's outputs `[M, B, K]` and
                the target, to `[M, B]` or `[M]`.
            sample_weight: `[B]` or `[M, B]`. A row that weighs nothing is left out of all terms; the
                decorrelation counts each of the others once.
            dropout_seeds: int64 `[M]`, from which each component gets seeds of its own.
            options: of the loss: temperature, label_smoothing, class_weight, ...
        """
        if len(batch) < 2:
            raise ValueError(
                f"loss: batch: expected what forward takes, then the target, got {len(batch)} arguments"
            )
        *inputs, target = batch
        named = isinstance(loss, str)
        if named and loss not in LOSSES:
            raise ValueError(f"loss: loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
        for name in options:
            if name not in OPTIONS:
                raise TypeError(f"loss: {name}: expected an option of a loss, got another")
        check_options("loss", loss, options)
        check_tensor("loss", "target", target)
        if sample_weight is not None:
            check_tensor("loss", "sample_weight", sample_weight)
            inputs = self.without_left_out(inputs, sample_weight)
        shares = self._shares(inputs, sample_weight)
        if named:
            self._check_average(loss)
        plain = named and self.strength is None and not self.beside and self.gate is None
        if plain:  # nothing looks at the outputs: each component's own loss, with its gradient in one pass
            losses = []
            for j, component in enumerate(self.components):
                seeds = {} if dropout_seeds is None else {"dropout_seeds": dropout_seeds}
                given = _seeded(component, j, seeds) | options
                share = shares if shares is None or self.rows_of is None else shares[..., j]
                losses.append(component.loss(*inputs, target, loss=loss, sample_weight=share, **given))
            return {"label": _sum(losses)}
        outputs, signals = self._outputs(inputs, dropout_seeds)
        if named and loss == "bce" and outputs.shape[-1] > 1 and self.average == "probability":
            raise ValueError(
                "ComponentModels: average: expected 'logit' with loss bce of several columns, "
                "got 'probability'"
            )
        if self.training and outputs.shape[2] == 1 and self.strength is not None:
            raise ValueError(
                "loss: batch: expected 2 or more rows in training, which components can be decorrelated "
                "over, got 1"
            )

        def mean(output: Tensor, weight: Tensor | None) -> Tensor:
            if not isinstance(loss, str):
                return _reduced(loss(output, target), output, weight)
            check_values(output, target, loss, weight, options)
            return mean_losses_of(output, target, loss, weight, **options)

        if self.rows_of is not None and shares is not None:
            losses = [mean(output, shares[..., j]) for j, output in enumerate(outputs.unbind(1))]
        elif isinstance(loss, str):  # of all components at once
            check_values(outputs[:, 0], target, loss, shares, options)
            count = len(self.components)
            dims = 1 if loss == "cross_entropy" else 2
            own = {
                name: _for_each(value, 2, count) if name != "quantiles" else value
                for name, value in options.items()
            }
            mean_of_each = mean_losses_of(
                outputs.flatten(0, 1),
                _for_each(target, dims + 1, count),
                loss,
                _for_each(shares, 2, count),
                **own,
            )
            losses = list(mean_of_each.view(-1, count).unbind(1))
        else:
            losses = [mean(output, shares) for output in outputs.unbind(1)]
        terms = {"label": _sum(losses)}
        if self.strength is not None:
            present = None if shares is None else shares != 0
            if present is not None and self.rows_of is not None:
                present = present.all(-1)
            pushed = self._push(signals, present)
            terms["decorrelation"] = torch.where(self.strength > 0, self.strength * pushed, 0)
        if self.gate is not None:
            combined = self._combined(outputs.detach(), inputs, dropout_seeds)
            terms["gate"] = mean(combined, sample_weight)
        return terms

    def without_left_out(self, inputs: Sequence[Any], sample_weight: Tensor) -> list[Any]:
        """As the first component does it."""
        return self.components[0].without_left_out(inputs, sample_weight)  # type: ignore[no-any-return]

    def check_inputs(self, *inputs: Tensor | None) -> None:
        for part in self.parts():
            part.check_inputs(*inputs)

    def extra_repr(self) -> str:
        what = self.decorrelation if isinstance(self.decorrelation, str) else _name_of(self.decorrelation)
        shown: dict[str, Any] = {
            "models": self.ensemble_size,
            "strength": None if self.strength is None else sorted(set(self.strength.tolist())),
            "decorrelation": what,
            "on": self.on,
            "average": self.average,
        }
        if self.rows_of is not None:
            shown["rows_of"] = _name_of(self.rows_of)
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    # --------------------------------------------------------------------------------------------------------

    def _check_average(self, loss: Any) -> None:
        if self.average == "probability" and loss not in ("bce", "cross_entropy", "soft_cross_entropy"):
            raise ValueError(
                f"ComponentModels: average: expected 'logit' with loss {loss}, whose outputs are no logits, "
                "got 'probability'"
            )

    def parts(self) -> list[Ensemble]:
        """Components, what stands beside them, and the gate."""
        return [*self.components, *self.beside, *([] if self.gate is None else [self.gate])]

    def _outputs(self, inputs: Sequence[Any], dropout_seeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs, and of them what is decorrelated, both `[M, J, B, K]`."""
        given = {} if dropout_seeds is None else {"dropout_seeds": dropout_seeds}
        signals: list[Tensor] = []
        for j, component in enumerate(self.components):
            signal = component(*inputs, **_seeded(component, j, given))
            if signal.dim() != 3 or len(signal) != self.ensemble_size:
                raise ValueError(
                    f"ComponentModels: components[{j}]: expected outputs [{self.ensemble_size}, B, K], got "
                    f"shape {list(signal.shape)}"
                )
            if signals and signal.shape != signals[0].shape:
                raise ValueError(
                    f"ComponentModels: components[{j}]: expected outputs {list(signals[0].shape)} like those "
                    f"of components[0], got shape {list(signal.shape)}"
                )
            signals.append(signal)
        added: list[Tensor] = []
        besides: Any = self.beside
        for j, part in enumerate(besides):
            added.append(part(*inputs, **_seeded(part, len(signals) + j, given)))
            if added[-1].shape != signals[0].shape:
                raise ValueError(
                    f"ComponentModels: beside: expected outputs {list(signals[0].shape)} like those of the "
                    f"components, got shape {list(added[-1].shape)}"
                )
        together = torch.stack(signals, 1)
        if not added:
            return together, together
        whole = [signal + added[0 if self.one_beside else j] for j, signal in enumerate(signals)]
        return torch.stack(whole, 1), together

    def _combined(self, outputs: Tensor, inputs: Sequence[Any], dropout_seeds: Tensor | None) -> Tensor:
        weights = None
        if self.gate is not None:
            given = {} if dropout_seeds is None else {"dropout_seeds": dropout_seeds}
            gate = self.gate(*inputs, **_seeded(self.gate, -1, given))
            expected = [self.ensemble_size, outputs.shape[2], len(self.components)]
            if list(gate.shape) != expected:
                raise ValueError(
                    f"ComponentModels: gate: expected outputs {expected}, got shape {list(gate.shape)}"
                )
            weights = gate.softmax(-1).transpose(1, 2)  # [M, J, B]
        return combine(outputs, weights, space=self.average)

    def _shares(self, inputs: Sequence[Any], sample_weight: Tensor | None) -> Tensor | None:
        """What the rows weigh: `[B]` or `[M, B]`, with `rows_of` `[B, J]` or `[M, B, J]`; None: all alike."""
        if self.rows_of is None:
            return sample_weight
        own = self.rows_of(*inputs)
        check_tensor("ComponentModels", "rows_of", own)
        if own.dim() not in (2, 3) or own.shape[-1] != len(self.components):
            raise ValueError(
                f"ComponentModels: rows_of: expected [B, {len(self.components)}] or [M, B, "
                f"{len(self.components)}], got shape {list(own.shape)}"
            )
        own = own if own.is_floating_point() else own.to(_like(self).dtype)
        return own if sample_weight is None else own * sample_weight.unsqueeze(-1)

    def _push(self, signals: Tensor, present: Tensor | None) -> Tensor:
        """L of the rows that are present, `[M]`."""
        if self.on == "probability":
            signals = signals.sigmoid() if signals.shape[-1] == 1 else signals.softmax(-1)
        if present is None or bool(present.all()):
            return self._pushed(signals)
        if present.dim() == 1:
            return self._pushed(signals[:, :, present])
        if not isinstance(self.decorrelation, str):
            # A function of all models at once needs as many rows of each: those left out become zeros.
            raise ValueError(
                "ComponentModels: decorrelation: expected a name where models leave out rows of their own, "
                f"got {_name_of(self.decorrelation)}"
            )
        return torch.cat([self._pushed(signals[m : m + 1, :, rows]) for m, rows in enumerate(present)])

    def _pushed(self, signals: Tensor) -> Tensor:
        if isinstance(self.decorrelation, str):
            return decorrelation_loss(signals, kind=self.decorrelation)
        pushed = self.decorrelation(signals)
        if not isinstance(pushed, Tensor) or pushed.shape != signals.shape[:1]:
            got = f"shape {list(pushed.shape)}" if isinstance(pushed, Tensor) else type(pushed).__name__
            raise ValueError(
                f"ComponentModels: decorrelation: expected [{len(signals)}] of outputs "
                f"{list(signals.shape)}, got {got} from {_name_of(self.decorrelation)}"
            )
        return pushed


def _strengths(strength: Any, models: int) -> Tensor:
    name = "ComponentModels"
    if isinstance(strength, (Tensor, Sequence)) and not isinstance(strength, str):
        given = torch.as_tensor(strength, dtype=torch.float64)
        if given.shape not in ((), (models,)):
            raise ValueError(
                f"{name}: strength: expected one number, or one for each of {models} models, got shape "
                f"{list(given.shape)}"
            )
    else:
        check_number(name, "strength", strength)
        given = torch.tensor(float(strength), dtype=torch.float64)
    if not bool(((given >= 0) & (given < math.inf)).all()):
        raise ValueError(f"{name}: strength: expected finite numbers from 0, got {given.tolist()}")
    return given.expand(models).clone()


def _like(model: nn.Module) -> Tensor:
    """Something of the dtype and the device that the parameters have."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.new_empty(0, device="cpu" if parameter.is_meta else parameter.device)
    return torch.empty(0)


def _share(components: Any, columns: bool | Sequence[int]) -> None:
    """Puts embeddings of the first component into the others."""
    if columns is False:
        return
    name = "ComponentModels: shared_tables"
    for j, component in enumerate(components):
        if not isinstance(component, TabularEnsemble):
            raise TypeError(
                f"{name}: expected components that are TabularEnsemble, got components[{j}], "
                f"a {type(component).__name__}"
            )
    tables = components[0].embeddings
    for column in range(len(tables)) if columns is True else columns:
        if not isinstance(column, int) or not 0 <= column < len(tables):
            raise ValueError(f"{name}: expected columns from 0 to {len(tables) - 1}, got {column!r}")
        first = tables[column]
        for j, component in enumerate(components):
            if len(component.embeddings) <= column:
                raise ValueError(
                    f"{name}: expected column {column} in all components, got components[{j}] with "
                    f"{len(component.embeddings)} columns"
                )
            own = component.embeddings[column]
            if (own.num_embeddings, own.embedding_dim) != (first.num_embeddings, first.embedding_dim):
                raise ValueError(
                    f"{name}: expected tables of one size, {first.num_embeddings} x {first.embedding_dim} "
                    f"in column {column}, got {own.num_embeddings} x {own.embedding_dim} in components[{j}]"
                )
            component.embeddings[column] = first


def _seeded(part: Ensemble, place: int, given: dict[str, Tensor]) -> dict[str, Any]:
    """Seeds of dropout for one part, others than for the rest; none for a part that does not drop."""
    if not given or not part.dropout:
        return {}
    return {"dropout_seeds": given["dropout_seeds"] ^ ((place + 2) * 0xD1342543DE82EF95 % 2**62)}


def _for_each(value: Any, dims: int, components: int) -> Any:
    """What has so many dimensions is of the models, and becomes that of their components, `[M J, ...]`."""
    of_models = isinstance(value, Tensor) and value.dim() == dims
    return value.repeat_interleave(components, 0) if of_models else value


def _sum(losses: Sequence[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum(0)


def _reduced(losses: Any, output: Tensor, weight: Tensor | None) -> Tensor:
    """The mean `[M]` of what a function gives of outputs `[M, B, K]`."""
    models, rows = output.shape[:2]
    if isinstance(losses, Tensor) and losses.shape == (models, rows):
        return row_sums(losses) / rows if weight is None else weighted_mean(losses, weight)
    if isinstance(losses, Tensor) and losses.shape == (models,) and weight is None:
        return losses
    got = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
    expected = f"[{models}, {rows}]" + f" or [{models}]" * (weight is None)
    raise ValueError(f"loss: loss: expected {expected} of the function, got {got}")


def _name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))
