"""What `pyens.training.fit` and `pyens.optim` cost beside the steps themselves.

    loop      `fit` against a bare loop of the same steps, and a loss written in torch against the one in the
              kernel; every member has an order of its own, drawn anew in every epoch
    leaving   one member stops after the other, until none is left, against bare loops whose number of members
              is fixed: one for each number, prepared beforehand. In `fit` by early stopping, and in a loop
              of one's own by `select_` and `keep_members`
    departure a step after which nobody leaves, and one before which all that leaving does is done
    clip      `clip_member_grad_norm_`, against a whole step, which is no peer but a yardstick; so is torch's
              `clip_grad_norm_`, which has one norm for all members
    optimizers  a step of `pyens.optim.fused` against that of torch's own fused optimizer, alone, again and
              again; and whole training steps with either, whose threads find the gradients in their caches

Times are those of one step. The targets are for float32 on two CPU threads; parameters in bfloat16 or float16
lose most of a step to rounding, so there are no cases for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.peers import mlp_flops
from benchmarks.table_peers import EPS, Table, TableProblem, adam_step
from benchmarks.training import TINY_TABLE, tabular_ensemble
from benchmarks.training_peers import GRADIENT_TOLERANCE, mse
from pyens.nn import EnsembleMLP
from pyens.ops import keyed_permutation
from pyens.optim import clip_member_grad_norm_, fused, keep_members
from pyens.training import History, derive_seed, fit, member_seeds
from pyens.training.randomness import generator

FIT, FIT_IN_TORCH, LOOP = "fit", "fit, loss in torch", "bare loop"
FIT_LEAVING, LOOP_LEAVING, LOOPS_FIXED = "fit, members stop", "loop, select_", "loops of fixed members"
STEP, DEPARTURE = "step", "departure and step"
CLIP, CLIP_ALL = "clip_member_grad_norm_", "clip_grad_norm_, one norm"
FUSED, TORCH = "pyens fused", "torch fused"

FEATURES = (32, 50, 20, 10, 1)
LEARNING_RATE = 1e-3
Kind = Callable[..., torch.optim.Optimizer]
KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float], int]] = {
    # The options, and how often a step reads or writes as many numbers as there are parameters.
    "adam": (torch.optim.Adam, {}, 7),
    "adamw": (torch.optim.AdamW, {}, 7),
    "adagrad": (torch.optim.Adagrad, {}, 5),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}, 5),
}


@dataclass(frozen=True)
class Sizes:
    """Of an ensemble and what it is trained on."""

    members: int
    rows: int
    batch_size: int
    epochs: int
    features: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-self.rows // self.batch_size)

    @property
    def title(self) -> str:
        return f"E {self.members}, {'-'.join(map(str, self.features))}, B {self.batch_size}"

    @property
    def layers(self) -> list[tuple[int, ...]]:
        """The shapes of the parameters."""
        e, sizes = self.members, self.features
        weights = [(e, o, i) for i, o in pairwise(sizes)]
        return [*weights, *((e, o) for o in sizes[1:])]


LONG = Sizes(100, 4096, 256, 16, FEATURES)  # 16 steps in an epoch
SHORT = Sizes(100, 2048, 256, 0, FEATURES)  # 8 steps, for each number of members
TINY = Sizes(3, 40, 16, 2, (5, 7, 2))
SMALL_TABLE = Table(10, 256, ((604, 8), (388, 8), (7, 3), (21, 5)), 19, (50, 20, 10), 1)


def cases(options: harness.Options) -> list[harness.Case]:
    """Built when their turn comes."""
    if options.dtype not in (torch.float32, torch.float64):
        return []
    two_threads = (options.device.type, options.dtype, options.threads) == ("cpu", torch.float32, 2)
    with_targets = two_threads and not options.quick
    long, short = (TINY, TINY) if options.quick else (LONG, SHORT)

    def case(
        name: str,
        title: str,
        contestants: Callable[[], Sequence[harness.Contestant]],
        *targets: harness.Target,
        **work: float,
    ) -> harness.Case:
        return harness.Case(
            name, title, contestants, targets=targets if with_targets else (), grad=True, **work
        )

    sets = parameter_sets(options.quick)
    made = [
        case(
            "loop",
            f"{long.epochs} epochs of {long.steps} steps, {long.title}",
            partial(looping, long, options),
            harness.Target(FIT, 0.97, (LOOP,)),
            harness.Target(FIT_IN_TORCH, 0.95, (FIT,)),
            flops=3 * mlp_flops(long.members, long.batch_size, long.features),
        ),
        case(
            "leaving",
            f"all of {short.members} members stop one after the other, each after {short.steps} steps more",
            partial(leaving, short, options),
            # 2 % on top.
            harness.Target(FIT_LEAVING, 1 / 1.02, (LOOPS_FIXED,)),
            harness.Target(LOOP_LEAVING, 1 / 1.02, (LOOPS_FIXED,)),
        ),
        case("departure", f"a departure, {long.title}", partial(departing, long, options)),
        case(
            "clip",
            f"clipping, {long.title}",
            partial(clipping, long, options),
            harness.Target(CLIP, 20.0, (STEP,)),  # 5 % of a step
        ),
    ]
    for name, (kind, settings, touched) in KINDS.items():
        for which, shapes in sets.items():
            numbers = sum(torch.Size(shape).numel() for shape in shapes)
            made.append(
                case(
                    f"{name}-{which}",
                    f"step of {kind.__name__}, {described(shapes)}",
                    partial(optimizers, kind, settings, shapes, options),
                    harness.Target(FUSED, 1.0, (TORCH,)),
                    bytes=touched * numbers * options.dtype.itemsize,
                )
            )
    table = TINY_TABLE if options.quick else SMALL_TABLE
    made.append(
        case(
            "adam-training",
            f"a whole step, E {table.ensemble_size}, B {table.batch_size}, {len(table.categorical)} tables, "
            f"{'-'.join(map(str, table.features))}",
            partial(training, table, options),
            harness.Target(FUSED, 1.0, (TORCH,)),
        )
    )
    return made


def parameter_sets(quick: bool) -> dict[str, list[tuple[int, ...]]]:
    """Shapes: of an MLP, of tables that are small together, of a small one, and of a large one."""
    if quick:
        return {"mlp": TINY.layers}
    tables = {"tables": [(10, 50, 8)] * 10, "small": [(10, 604, 8)], "table": [(100, 6040, 8)]}
    return {"mlp": LONG.layers, **tables}


def described(shapes: Sequence[tuple[int, ...]]) -> str:
    kinds = sorted(set(shapes))
    if len(kinds) == 1:
        return f"{len(shapes)} × {list(kinds[0])}"
    return f"{len(shapes)} parameters of {sum(torch.Size(s).numel() for s in shapes)} numbers"


# --- steps ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """An ensemble before its first step, and rows with a target that can be learnt."""

    sizes: Sizes
    model: EnsembleMLP
    x: Tensor  # [N, I]
    y: Tensor  # [N, O]

    @classmethod
    def random(cls, sizes: Sizes, options: harness.Options) -> Problem:
        features, drawn_from = sizes.features, torch.Generator().manual_seed(options.seed)
        x = torch.randn(sizes.rows, features[0], generator=drawn_from)
        teacher = torch.randn(features[0], features[-1], generator=drawn_from) / features[0] ** 0.5
        noise = torch.randn(sizes.rows, features[-1], generator=drawn_from)
        place = {"device": options.device, "dtype": options.dtype}
        model = EnsembleMLP(
            sizes.members, features[0], features[1:-1], features[-1], seeds=range(sizes.members), **place
        )
        return cls(sizes, model, x.to(**place), (x @ teacher + noise).to(**place))

    def copy(self, members: int | None = None) -> EnsembleMLP:
        """Of the model, or of its last members."""
        members = members or self.sizes.members
        return self.model.select(slice(self.sizes.members - members, None))

    def double(self) -> Problem:
        return Problem(self.sizes, self.copy().double(), self.x.double(), self.y.double())

    def generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(m) for m in range(self.sizes.members)]


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return fused(torch.optim.Adam, parameters, lr=LEARNING_RATE)


def kernel_loss(model: EnsembleMLP, x: Tensor, y: Tensor) -> Tensor:
    return model.loss(x, y, loss="mse")


def torch_loss(model: EnsembleMLP, x: Tensor, y: Tensor) -> Tensor:
    return mse(model(x), y)


def bare_epoch(
    problem: Problem,
    model: EnsembleMLP,
    optimizer: torch.optim.Optimizer,
    order: Tensor,
    losses: Callable[[EnsembleMLP, Tensor, Tensor], Tensor],
) -> None:
    """What a user writes: batches out of an order `[E, N]`, loss, gradient, step."""
    x, y = problem.x, problem.y
    for rows in order.to(x.device).split(problem.sizes.batch_size, 1):
        flat = rows.reshape(-1)
        batch = (t.index_select(0, flat).view(*rows.shape, -1) for t in (x, y))
        optimizer.zero_grad()
        losses(model, *batch).sum().backward()
        optimizer.step()


def orders(problem: Problem, generators: Sequence[torch.Generator]) -> Tensor:
    """An epoch's order of each member, `[E, N]`."""
    return torch.stack([torch.randperm(problem.sizes.rows, generator=g) for g in generators])


def orders_of_fit(problem: Problem, seed: int) -> Iterator[Tensor]:
    """Those that `fit` draws: of the rows in a common order, for each epoch."""
    rows, sizes = problem.sizes.rows, problem.sizes
    # As its function for the split without validation rows draws them.
    drawn = torch.randperm(rows, generator=generator(seed, "validation"))
    common = drawn[torch.randperm(rows, generator=generator(seed, "order"))]
    for epoch in range(sizes.epochs):
        seeds = member_seeds(seed, sizes.members)
        keys = torch.tensor([derive_seed(own, "order", epoch) for own in seeds])
        yield common[keyed_permutation(keys, rows)]


def moved(
    problem: Problem, orders: Iterable[Tensor], dtype: torch.dtype
) -> Callable[[Sequence[Tensor]], None]:
    """A check of the parameters after these epochs: how far they moved, in float64."""
    exact = problem.double()
    optimizer = adam(exact.model.parameters())
    for order in orders:
        bare_epoch(exact, exact.model, optimizer, order, torch_loss)
    before = [p.detach().clone() for p in problem.model.parameters()]
    return harness.agrees_with(
        [after.detach() - b.double() for after, b in zip(exact.model.parameters(), before, strict=True)],
        dtype,
        lambda found: [p.detach() - b for p, b in zip(found, before, strict=True)],
        rms=MOVED_TOLERANCE[dtype],
    )


# Roundings add up over the steps, and Adam makes steps of full size of gradients that are nearly 0.
MOVED_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-2}


# --- fit against a bare loop ----------------------------------------------------------------------------


def looping(sizes: Sizes, options: harness.Options) -> list[harness.Contestant]:
    """Later calls go on with the weights of the ones before, and with a new optimizer."""
    problem = Problem.random(sizes, options)

    def by_fit(loss: Any) -> harness.Run:
        model = problem.copy()

        def run() -> list[Tensor]:
            fit(
                model,
                (problem.x, problem.y),
                loss=loss,
                epochs=sizes.epochs,
                batch_size=sizes.batch_size,
                optimizer=adam,
                seed=options.seed,
                validation=0.0,
                progress=False,
            )
            return list(model.parameters())

        return run

    def by_loop() -> harness.Run:
        model, generators = problem.copy(), problem.generators()

        def run() -> list[Tensor]:
            optimizer = adam(model.parameters())
            for _ in range(sizes.epochs):
                bare_epoch(problem, model, optimizer, orders(problem, generators), kernel_loss)
            return list(model.parameters())

        return run

    fresh = problem.generators()
    of_fit = moved(problem, orders_of_fit(problem, options.seed), options.dtype)
    of_loop = moved(problem, (orders(problem, fresh) for _ in range(sizes.epochs)), options.dtype)
    calls = sizes.epochs * sizes.steps
    return [
        harness.Contestant(FIT, lambda: by_fit("mse"), of_fit, ours=True, calls=calls),
        harness.Contestant(FIT_IN_TORCH, lambda: by_fit(mse), of_fit, ours=True, calls=calls),
        harness.Contestant(LOOP, by_loop, of_loop, calls=calls),
    ]


# --- members that leave ---------------------------------------------------------------------------------


class FirstStops:
    """The training loss of `mse`; of validation what makes the first of the members that are left stop.

    After epoch e the others are better than ever, at -e, and the first is not. In the first epoch nothing is
    worse than before, so that nobody leaves.
    """

    def __init__(self) -> None:
        self.epoch = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return mse(output, target)
        losses = output.new_full((len(output),), -float(self.epoch))
        losses[0] = 1.0
        self.epoch += 1
        return losses


def leaving(sizes: Sizes, options: harness.Options) -> list[harness.Contestant]:
    """Epochs of E, E, E - 1, ..., 1 members; the loss is written in torch everywhere."""
    problem = Problem.random(sizes, options)
    counts = [sizes.members, *range(sizes.members, 0, -1)]

    def by_fit() -> harness.Run:
        def run() -> History:
            return fit(
                problem.copy(),
                (problem.x, problem.y),
                loss=FirstStops(),
                epochs=len(counts),
                batch_size=sizes.batch_size,
                optimizer=adam,
                seed=options.seed,
                validation=(problem.x[:1], problem.y[:1]),
                early_stopping=1,
                progress=False,
            )

        return run

    def by_select() -> harness.Run:
        generators = problem.generators()

        def run() -> list[int]:
            model = problem.copy()
            optimizer, trained = adam(model.parameters()), []
            for epoch in range(len(counts)):
                if epoch > 1:
                    keep_members(optimizer, range(1, len(model)), len(model))
                    model.select_(slice(1, None))
                order = orders(problem, generators[-len(model) :])
                bare_epoch(problem, model, optimizer, order, torch_loss)
                trained.append(len(model))
            return trained

        return run

    def by_fixed() -> harness.Run:
        generators = problem.generators()
        models = [problem.copy(count) for count in counts]
        optimizers = [adam(model.parameters()) for model in models]

        def run() -> list[int]:
            for model, optimizer in zip(models, optimizers, strict=True):
                order = orders(problem, generators[-len(model) :])
                bare_epoch(problem, model, optimizer, order, torch_loss)
            return [len(model) for model in models]

        return run

    def check_fit(history: History) -> None:
        # Member m leaves after epoch m + 1, the last one in the last.
        planned = [m + 2 for m in range(sizes.members)]
        if history.epochs.tolist() != planned or history.diverged.any():
            raise ValueError(f"expected members to train for {planned} epochs, got {history.epochs.tolist()}")

    def check_counts(trained: list[int]) -> None:
        if trained != counts:
            raise ValueError(f"expected epochs of {counts} members, got {trained}")

    calls = len(counts) * sizes.steps
    return [
        harness.Contestant(FIT_LEAVING, by_fit, check_fit, ours=True, calls=calls),
        harness.Contestant(LOOP_LEAVING, by_select, check_counts, ours=True, calls=calls),
        harness.Contestant(LOOPS_FIXED, by_fixed, check_counts, calls=calls),
    ]


def departing(sizes: Sizes, options: harness.Options) -> list[harness.Contestant]:
    """Everybody is kept, so that it can be done again: all copies are made all the same."""
    problem = Problem.random(sizes, options)
    everybody = list(range(sizes.members))

    def prepared(leave: bool) -> harness.Run:
        model = problem.copy()
        step = one_step(problem, model, optimizer := adam(model.parameters()))

        def run() -> list[Tensor]:
            if leave:
                keep_members(optimizer, everybody, sizes.members)
                model.select_(everybody)
            return step()

        return run

    check = moved_by_a_step(problem, options.dtype)
    return [
        harness.Contestant(STEP, lambda: prepared(leave=False), check, ours=True),
        harness.Contestant(DEPARTURE, lambda: prepared(leave=True), check, ours=True),
    ]


def first_batch(problem: Problem) -> Tensor:
    """Rows `[E, B]`, of each member its own."""
    return orders(problem, problem.generators())[:, : problem.sizes.batch_size]


def one_step(problem: Problem, model: EnsembleMLP, optimizer: torch.optim.Optimizer) -> harness.Run:
    """Of Adam, on the same batch every time."""
    rows = first_batch(problem).to(problem.x.device)
    x, y = problem.x[rows], problem.y[rows]

    def run() -> list[Tensor]:
        optimizer.zero_grad()
        kernel_loss(model, x, y).sum().backward()
        optimizer.step()
        return list(model.parameters())

    return run


def moved_by_a_step(problem: Problem, dtype: torch.dtype) -> Callable[[Sequence[Tensor]], None]:
    return moved(problem, [first_batch(problem)], dtype)


# --- clipping -------------------------------------------------------------------------------------------


def clipping(sizes: Sizes, options: harness.Options) -> list[harness.Contestant]:
    """Of the gradients of one step, to a norm that most of them are above; afterwards all are at it."""
    problem = Problem.random(sizes, options)
    rows = first_batch(problem).to(options.device)
    x, y = problem.x[rows], problem.y[rows]
    limit = 0.1

    def gradients(model: EnsembleMLP) -> list[Tensor]:
        torch_loss(model, x.to(model.weights[0]), y.to(model.weights[0])).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    def prepared(clip: Callable[..., Tensor]) -> harness.Run:
        model = problem.copy()
        own = gradients(model)
        parameters = list(model.parameters())
        return lambda: [clip(parameters, limit), *own]

    exact = gradients(problem.copy().double())
    norms = torch.stack([g.flatten(1).square().sum(1) for g in exact]).sum(0).sqrt()

    def clipped(norm: Tensor) -> list[Tensor]:
        factors = (limit / (norm + 1e-6)).clamp(max=1.0)
        return [norm, *(g * factors.view(-1, *[1] * (g.dim() - 1)) for g in exact)]

    model = problem.copy()
    return [
        harness.Contestant(
            CLIP,
            lambda: prepared(clip_member_grad_norm_),
            harness.agrees_with(clipped(norms), options.dtype, rms=GRADIENT_TOLERANCE[options.dtype]),
            ours=True,
        ),
        harness.Contestant(
            CLIP_ALL,
            lambda: prepared(nn.utils.clip_grad_norm_),
            harness.agrees_with(
                [n := norms.square().sum().sqrt(), *clipped(n)[1:]],
                options.dtype,
                rms=GRADIENT_TOLERANCE[options.dtype],
            ),
            yardstick=True,
        ),
        harness.Contestant(
            STEP,
            lambda: one_step(problem, model, adam(model.parameters())),
            moved_by_a_step(problem, options.dtype),
            yardstick=True,
        ),
    ]


# --- optimizers -----------------------------------------------------------------------------------------


def optimizers(
    kind: Kind, settings: dict[str, float], shapes: Sequence[tuple[int, ...]], options: harness.Options
) -> list[harness.Contestant]:
    """Steps with the same gradients again and again."""
    drawn_from = torch.Generator().manual_seed(options.seed)
    place = {"device": options.device, "dtype": options.dtype}
    values, gradients = (
        [torch.randn(shape, generator=drawn_from).to(**place) for shape in shapes] for _ in range(2)
    )
    settings = {"lr": LEARNING_RATE, **settings}

    def step(
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype
    ) -> Callable[[], list[Tensor]]:
        parameters = [nn.Parameter(value.to(dtype, copy=True)) for value in values]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.to(dtype, copy=True)
        optimizer = make(parameters)

        def run() -> list[Tensor]:
            optimizer.step()
            return [p.detach() for p in parameters]

        return run

    exact = step(lambda parameters: kind(parameters, foreach=False, **settings), torch.float64)()
    check = harness.agrees_with(
        [after - value.double() for after, value in zip(exact, values, strict=True)],
        options.dtype,
        lambda found: [after - value for after, value in zip(found, values, strict=True)],
        rms=GRADIENT_TOLERANCE[options.dtype],
    )
    ours = partial(step, partial(fused, kind, **settings), options.dtype)
    torchs = partial(step, partial(kind, fused=True, **settings), options.dtype)
    return [
        harness.Contestant(FUSED, ours, check, ours=True),
        harness.Contestant(TORCH, torchs, check),
    ]


def training(table: Table, options: harness.Options) -> list[harness.Contestant]:
    """Steps of Adam on `TabularEnsemble`, on the same batch every time."""
    problem = TableProblem.random(table, seed=options.seed, device=options.device, dtype=options.dtype)
    check, settings = problem.check(), {"lr": LEARNING_RATE, "eps": EPS}

    def step(make: Callable[[Sequence[Tensor]], torch.optim.Optimizer]) -> harness.Run:
        return adam_step(tabular_ensemble(problem), make=make)

    ours = partial(step, partial(fused, torch.optim.Adam, **settings))
    torchs = partial(step, partial(torch.optim.Adam, fused=True, **settings))
    return [
        harness.Contestant(FUSED, ours, check, ours=True),
        harness.Contestant(TORCH, torchs, check),
    ]


if __name__ == "__main__":
    raise SystemExit(harness.main("fit", __doc__, cases))
