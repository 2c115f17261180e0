"""Models of several components, each learning by itself, that are pushed apart while they train."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from pyens._kinds import check_number, check_tensor, name_of
from pyens._types import Decorrelation, Loss, LossReduction, Space
from pyens.nn._layer_options import Rates
from pyens.nn._losses import OPTIONS, check_options, check_values, mean_losses_of, mean_of_function
from pyens.nn.ensemble import Ensemble
from pyens.nn.tabular import TabularEnsemble
from pyens.reference.ensemble_mlp_loss import LOSSES, row_sums

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

    The source has models so trained differ far less from their next training. On MNIST and made-up clicks we
    saw little of it that was more than outputs of a smaller scale: look at `metrics.prediction_difference` of
    your own, and at the log loss, before you rely on it.

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
            classes) or in "logit", also of outputs that are no logits; what comes out is a logit either way,
            see `pyens.losses.combine`. None: in probability, but a loss that is a function, of which nobody
            knows what it takes outputs for, has to have it said.
        gate: an ensemble of M members with J outputs, of the same inputs: the combination's weights are
            their softmax. None: even ones.
        beside: what is added to the outputs of the components after they are decorrelated: one ensemble of M
            members for all components, or J of them. A linear part beside a deep one.
        shared_tables: of components that are `TabularEnsemble`: the columns whose embeddings all share, those
            of the first component; True for all columns.
        rows_of: from the inputs, as `forward` is given them (`[B, ...]` or, of models with data of their own,
            `[M, B, ...]`), to what each row weighs for each component, `[B, J]` or `[M, B, J]`: where
            components learn from data of their own. What a component does not learn from is 0 in its mean
            over all rows; only rows that all of them learn from are decorrelated. All components read all
            rows.

    Components with optimizers or learning rates of their own: give `fit` a function that makes several, of
    `model.components[j].parameters()`. One initialisation for all models: `reset_parameters([s] * M)`.

    Attributes:
        strength: `[M]`, a buffer; assign to its elements for a schedule. None without decorrelation. It is in
            the state dict, `fit` keeps that of a model's best epoch with its weights, and a run goes on from
            a checkpoint only if it begins with the same. The validation loss has the decorrelation in it:
            with a schedule, stop early by a metric.

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
    terms_by_rows = ("decorrelation",)

    def __init__(
        self,
        components: Sequence[Ensemble],
        *,
        strength: float | Sequence[float] | Tensor | None = 0.1,
        decorrelation: Decorrelation | Push = "correlation",
        on: Space = "logit",
        average: Space | None = None,
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
        if beside is not None and not isinstance(beside, (Ensemble, Sequence, nn.ModuleList)):
            kind = type(beside).__name__
            raise TypeError(f"{name}: beside: expected an ensemble, or a list of them, got a {kind}")
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
        for argument, space in (("on", on), ("average", average or "probability")):
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
        self.decorrelation, self.on, self.rows_of = decorrelation, on, rows_of
        self.average = average
        like = _like(self)
        self.register_buffer(
            "strength", None if strength is None else _strengths(strength, self.ensemble_size, like)
        )
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
        """The terms "label", "decorrelation" and "gate", each `[M]`; see the class.

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
        if not isinstance(loss, str) and not callable(loss):
            raise TypeError(f"loss: loss: expected a name or a function, got a {type(loss).__name__}")
        if isinstance(loss, str) and loss not in LOSSES:
            raise ValueError(f"loss: loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
        for name in options:
            if name not in OPTIONS:
                raise TypeError(f"loss: {name}: expected an option of a loss, got another")
        check_options("loss", loss, options)
        check_tensor("loss", "target", target)
        self._check_average(loss, target, options)
        self._check_strength()
        shares = self._shares(inputs, target, loss, options)
        if sample_weight is not None:
            check_tensor("loss", "sample_weight", sample_weight)
            self._check_weights(sample_weight, target, loss)
            for i, tensor in enumerate(inputs):
                if isinstance(tensor, Tensor):
                    check_tensor("loss", f"batch[{i}]", tensor)
            inputs = self.without_left_out(inputs, sample_weight)
        unseen = self.strength is None and not self.beside and self.gate is None and shares is None
        if unseen and isinstance(loss, str):  # nothing looks at outputs: losses with gradients in one pass
            losses = []
            for j, component in enumerate(self.components):
                seeds = {} if dropout_seeds is None else {"dropout_seeds": dropout_seeds}
                given = _seeded(component, j, seeds) | options
                own = component.loss(*inputs, target, loss=loss, sample_weight=sample_weight, **given)
                losses.append(own)
            return {"label": _sum(losses)}
        outputs, signals = self._outputs(inputs, dropout_seeds)
        if self.training and outputs.shape[2] == 1 and self.strength is not None:
            raise ValueError(
                "loss: batch: expected 2 or more rows in training, which components can be decorrelated "
                "over, got 1"
            )
        terms = {"label": self._label(outputs, target, loss, sample_weight, shares, options)}
        if self.strength is not None:
            present = None if sample_weight is None else sample_weight != 0
            if shares is not None:
                of_all = (shares != 0).all(-1)
                present = of_all if present is None else of_all & present
            pushed = self._push(signals, present)
            terms["decorrelation"] = torch.where(self.strength > 0, self.strength * pushed, 0)
        if self.gate is not None:
            combined = self._combined(outputs.detach(), inputs, dropout_seeds)
            terms["gate"] = _mean(combined, target, loss, sample_weight, options)
        return terms

    def draw(self, member: int, generator: torch.Generator | None) -> None:
        """As the parts do, each shared one as the last that has it; a running estimate begins anew."""
        super().draw(member, generator)
        forget = getattr(self.decorrelation, "forget", None)  # RunningDecorrelationLoss has it
        if forget is not None:
            forget(member)

    def without_left_out(self, inputs: Sequence[Any], sample_weight: Tensor) -> list[Any]:
        """As the first component does it."""
        return self.components[0].without_left_out(inputs, sample_weight)  # type: ignore[no-any-return]

    def check_inputs(self, *inputs: Tensor | None) -> None:
        for part in self.parts():
            part.check_inputs(*inputs)

    def extra_repr(self) -> str:
        what = self.decorrelation if isinstance(self.decorrelation, str) else name_of(self.decorrelation)
        shown: dict[str, Any] = {
            "models": self.ensemble_size,
            "strength": _shown(self.strength),
            "decorrelation": what,
            "on": self.on,
            "average": self._space,
        }
        if self.rows_of is not None:
            shown["rows_of"] = name_of(self.rows_of)
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    # --------------------------------------------------------------------------------------------------------

    @property
    def _space(self) -> Space:
        return self.average or "probability"

    def _check_average(self, loss: Any, target: Tensor, options: dict[str, Any]) -> None:
        if not isinstance(loss, str):
            if self.average is None:
                raise ValueError(
                    f"ComponentModels: average: expected 'logit' or 'probability' beside a loss that is a "
                    f"function, {name_of(loss)}, got None"
                )
            return
        if self.average == "logit":
            return
        if loss not in ("bce", "cross_entropy", "soft_cross_entropy"):
            raise ValueError(
                f"ComponentModels: average: expected 'logit' with loss {loss}, whose outputs are no logits, "
                "got 'probability'"
            )
        if loss == "bce" and target.shape[-1] > 1:
            raise ValueError(
                "ComponentModels: average: expected 'logit' with loss bce of several columns, "
                "got 'probability'"
            )
        if options.get("temperature", 1) != 1:
            raise ValueError(
                "loss: temperature: expected 1 with ComponentModels that average in probability, got "
                f"{options['temperature']}"
            )

    def _check_strength(self) -> None:
        if self.strength is None or torch.compiler.is_compiling():
            return
        if list(self.strength.shape) != [self.ensemble_size]:
            raise ValueError(
                f"ComponentModels: strength: expected [{self.ensemble_size}], got shape "
                f"{list(self.strength.shape)}"
            )
        if self.strength.device.type == "cpu" and not bool(_is_strength(self.strength).all()):
            raise ValueError(
                f"ComponentModels: strength: expected finite numbers from 0, got {self.strength.tolist()}"
            )

    def _check_weights(self, weight: Tensor, target: Tensor, loss: Any) -> None:
        rows = target.shape[0 if target.dim() == 1 else -1 if loss == "cross_entropy" else -2]
        if list(weight.shape) not in ([rows], [self.ensemble_size, rows]):
            raise ValueError(
                f"loss: sample_weight: expected [{rows}] or [{self.ensemble_size}, {rows}], got shape "
                f"{list(weight.shape)}"
            )

    def _label(
        self,
        outputs: Tensor,
        target: Tensor,
        loss: Any,
        weight: Tensor | None,
        shares: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """The sum over components of each one's mean loss, `[M]`."""
        if shares is not None:
            whole = torch.ones_like(shares[..., 0]) if weight is None else weight
            total = row_sums(whole.double())
            losses = []
            for j, output in enumerate(outputs.unbind(1)):
                own = shares[..., j] if weight is None else shares[..., j] * weight
                part = (row_sums(own.double()) / torch.where(total > 0, total, 1)).to(output.dtype)
                losses.append(_mean(output, target, loss, own, options) * part)
            return _sum(losses)
        if not isinstance(loss, str):
            return _sum([_mean(output, target, loss, weight, options) for output in outputs.unbind(1)])
        count = len(self.components)  # all components at once
        check_values(outputs[:, 0], target, loss, weight, options)  # type: ignore[arg-type]
        of_models = 2 if loss == "cross_entropy" else 3
        own_options = {
            name: value if name == "quantiles" else _for_each(value, 2, count)
            for name, value in options.items()
        }
        losses_of_all = mean_losses_of(
            outputs.flatten(0, 1),
            _for_each(target, of_models, count),
            loss,  # type: ignore[arg-type]
            _for_each(weight, 2, count),
            **own_options,
        )
        return _sum(list(losses_of_all.view(-1, count).unbind(1)))

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
        from pyens import losses  # which needs more than a network has to be loaded for

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
        return losses.combine(outputs, weights, space=self._space)

    def _shares(
        self, inputs: Sequence[Any], target: Tensor, loss: Any, options: dict[str, Any]
    ) -> Tensor | None:
        """What the rows weigh for each component, `[B, J]` or `[M, B, J]`; None: all alike."""
        if self.rows_of is None:
            return None
        if options.get("class_weight") is not None:
            raise ValueError("loss: class_weight: expected None beside rows_of, got a tensor")
        own = self.rows_of(*inputs)
        name, count = f"ComponentModels: rows_of ({name_of(self.rows_of)})", len(self.components)
        check_tensor("ComponentModels", "rows_of", own)
        rows = target.shape[0 if target.dim() == 1 else -1 if loss == "cross_entropy" else -2]
        if list(own.shape) not in ([rows, count], [self.ensemble_size, rows, count]):
            raise ValueError(
                f"{name}: expected [{rows}, {count}] or [{self.ensemble_size}, {rows}, {count}], got shape "
                f"{list(own.shape)}"
            )
        own = own.detach().to(_like(self).dtype)
        if not torch.compiler.is_compiling() and not bool((own.isfinite() & (own >= 0)).all()):
            raise ValueError(f"{name}: expected finite weights of at least 0, got one that is not")
        return own

    def _push(self, signals: Tensor, present: Tensor | None) -> Tensor:
        """L of the rows that are present, `[M]`."""
        if self.on == "probability":
            if signals.shape[-1] == 1:  # as a softmax, whose rows torch rounds alike wherever they lie
                signals = torch.cat([signals, torch.zeros_like(signals)], -1).softmax(-1)[..., :1]
            else:
                signals = signals.softmax(-1)
        assert self.strength is not None
        off = torch.eq(self.strength, 0)
        if bool(off.any()):  # or outputs beyond what L can square would reach the gradient
            signals = torch.where(off.view(-1, 1, 1, 1), 0, signals)
        if present is None:
            return self._pushed(signals)
        if present.dim() == 1:
            return self._pushed(signals if bool(present.all()) else signals[:, :, present])
        if isinstance(self.decorrelation, nn.Module):
            raise ValueError(
                "ComponentModels: decorrelation: expected a name or a function beside weights of each model, "
                f"which leave it other rows, got a {type(self.decorrelation).__name__}"
            )
        if bool(present.all()):
            return self._pushed(signals)
        return torch.cat([self._pushed(signals[m : m + 1, :, rows]) for m, rows in enumerate(present)])

    def _pushed(self, signals: Tensor) -> Tensor:
        from pyens import losses

        if isinstance(self.decorrelation, str):
            return losses.decorrelation_loss(signals, kind=self.decorrelation)
        pushed = self.decorrelation(signals)
        if not isinstance(pushed, Tensor) or pushed.shape != signals.shape[:1]:
            got = f"shape {list(pushed.shape)}" if isinstance(pushed, Tensor) else type(pushed).__name__
            raise ValueError(
                f"ComponentModels: decorrelation: expected [{len(signals)}] of outputs "
                f"{list(signals.shape)}, got {got} from {name_of(self.decorrelation)}"
            )
        return pushed


def _strengths(strength: Any, models: int, like: Tensor) -> Tensor:
    name = "ComponentModels"
    if isinstance(strength, (Tensor, Sequence)) and not isinstance(strength, str):
        if not isinstance(strength, Tensor):
            for m, value in enumerate(strength):
                check_number(name, f"strength[{m}]", value)
        given = torch.as_tensor(strength, dtype=torch.float64).detach()
        if given.shape not in ((), (models,)):
            raise ValueError(
                f"{name}: strength: expected one number, or one for each of {models} models, got shape "
                f"{list(given.shape)}"
            )
    else:
        check_number(name, "strength", strength)
        given = torch.tensor(float(strength), dtype=torch.float64)
    stored = given.to(like.dtype)
    if not bool(_is_strength(given).all()) or not bool(
        ((stored > 0) == (given > 0)).all() & stored.isfinite().all()
    ):
        raise ValueError(
            f"{name}: strength: expected finite numbers from 0 that {like.dtype} has, got {given.tolist()}"
        )
    return stored.to(like.device).expand(models).clone()


def _is_strength(strength: Tensor) -> Tensor:
    return (strength >= 0) & (strength < math.inf)


def _shown(strength: Tensor | None) -> Any:
    if strength is None or strength.is_meta:
        return None if strength is None else "on meta"
    values = strength.tolist()
    return values[0] if len(set(values)) == 1 else values


def _like(model: nn.Module) -> Tensor:
    """Something of the dtype and the device that the parameters have."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.new_empty(0, device="cpu" if parameter.is_meta else parameter.device)
    return torch.empty(0)


def _share(components: Any, columns: bool | Sequence[int]) -> None:
    """Puts embeddings of the first component into the others, once all fit."""
    if columns is False:
        return
    name = "ComponentModels: shared_tables"
    if columns is not True and (isinstance(columns, (str, bytes)) or not isinstance(columns, Sequence)):
        raise TypeError(f"{name}: expected a bool or a list of columns, got a {type(columns).__name__}")
    for j, component in enumerate(components):
        if not isinstance(component, TabularEnsemble):
            raise TypeError(
                f"{name}: expected components that are TabularEnsemble, got components[{j}], "
                f"a {type(component).__name__}"
            )
    tables = components[0].embeddings
    chosen = list(range(len(tables)) if columns is True else columns)
    for column in chosen:
        if not isinstance(column, int) or isinstance(column, bool) or not 0 <= column < len(tables):
            raise ValueError(f"{name}: expected columns from 0 to {len(tables) - 1}, got {column!r}")
        first = _described(tables[column])
        for j, component in enumerate(components):
            if len(component.embeddings) <= column:
                raise ValueError(
                    f"{name}: expected column {column} in all components, got components[{j}] with "
                    f"{len(component.embeddings)} columns"
                )
            own = _described(component.embeddings[column])
            if own != first:
                raise ValueError(
                    f"{name}: expected tables of one size and kind, {first} in column {column}, got {own} in "
                    f"components[{j}]"
                )
    for column in chosen:
        for component in components:
            component.embeddings[column] = tables[column]


def _described(table: Any) -> str:
    kind = "sparse " * table.sparse + str(table.weight.dtype)
    return f"{table.num_embeddings} x {table.embedding_dim} of {kind}"


def _seeded(part: Ensemble, place: int, given: dict[str, Tensor]) -> dict[str, Any]:
    """Seeds of dropout for one part, others than for the rest; none for a part that does not drop."""
    if not given or not part.dropout:
        return {}
    mixed = (given["dropout_seeds"] ^ ((place + 2) * 0xD1342543DE82EF95 % 2**62)) * 0x27BB2EE687B0B0FD
    return {"dropout_seeds": mixed & (2**62 - 1)}


def _for_each(value: Any, dims: int, components: int) -> Any:
    """What has so many dimensions is of the models, and becomes that of their components, `[M J, ...]`."""
    of_models = isinstance(value, Tensor) and value.dim() == dims
    return value.repeat_interleave(components, 0) if of_models else value


def _sum(losses: Sequence[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum(0)


def _mean(
    output: Tensor, target: Tensor, loss: Any, weight: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """The mean loss `[M]` of outputs `[M, B, K]`."""
    if isinstance(loss, str):
        check_values(output, target, loss, weight, options)  # type: ignore[arg-type]
        return mean_losses_of(output, target, loss, weight, **options)  # type: ignore[arg-type]
    return mean_of_function("loss: loss", loss, output, target, weight)
