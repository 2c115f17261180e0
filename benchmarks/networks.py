"""Whole update steps of networks that public projects train in ensembles: loss, gradients and a step of Adam.

    sac_n, edac   offline RL: ten critics of three layers; EDAC adds a penalty on how alike their gradients by
                  the actions are, which takes second derivatives
    droq          critics with dropout before a LayerNorm
    td_mpc2       LayerNorm and Mish, a distribution over 101 bins as the target, three steps of a horizon
    mbrl          dynamics models with a bounded log variance, a batch of its own for each member
    torchani      energies of atoms, CELU(0.1), eight members in a loop
    tabm_128/512  tabular models, packed: 32 members, dropout

Each is compared with the project's own way to put the members together (`network_peers.py`), from the same
weights and with the same loss written in torch; and ours with the loss in the kernel where it has one. All
take Adam's fused step, ours from `pyens.optim`. Without a step:

    keeping_*     a loss in torch, whose backward pass begins with the sums that the forward pass kept, or
                  computes them again, or chooses by itself, against the loss in the kernel
    norm_*        a network with LayerNorm against the same one without
    linear_*      `EnsembleLinear` alone with an input of each member, forward and backward, against baddbmm
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.network_peers import Loop, Peer, Products, RowsFirst, Vmapped, members
from benchmarks.peers import mlp_flops
from pyens.nn import EnsembleLinear, EnsembleMLP
from pyens.ops import ensemble_mlp
from pyens.optim import fused

ORIGINAL, COMPILED = "original", "original, compiled"
OUTSIDE, INSIDE = "pyens, loss in torch", "pyens, loss in the kernel"
LOSS = Callable[[nn.Module, Tensor, Tensor], Tensor]  # of a model, an input and a target; [E]


def mse(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    found: Tensor = (model(x) - y).square().mean((1, 2))
    return found


def diverse_mse(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """And the mean cosine of any two members' gradients by the last six inputs, the actions."""
    count = y.shape[0]
    actions = x[:, -6:].expand(count, -1, -1).detach().requires_grad_()
    each = torch.cat([x[:, :-6].expand(count, -1, -1), actions], -1)
    q = model(each)
    (gradients,) = torch.autograd.grad(q.sum(), actions, create_graph=True)
    unit = gradients / (gradients.norm(dim=2, keepdim=True) + 1e-10)
    alike = torch.einsum("mba,nba->bmn", unit, unit) * (1 - torch.eye(count, device=x.device))
    found: Tensor = (q - y).square().mean((1, 2)) + alike.sum((1, 2)).mean() / (count - 1) / count
    return found


def soft_cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return -(y * F.log_softmax(model(x), -1)).sum(-1).mean(-1)


def bounded_nll(model: nn.Module, x: Tensor, y: Tensor, low: float = -10.0, high: float = 0.5) -> Tensor:
    mean, log_variance = model(x).chunk(2, -1)
    log_variance = high - F.softplus(high - log_variance)
    log_variance = low + F.softplus(log_variance - low)
    return ((mean - y).square() * torch.exp(-log_variance) + log_variance).mean((1, 2)) / 2


@dataclass(frozen=True)
class Network:
    """One of them: its members, how its project puts them together, and what it learns."""

    title: str
    count: int
    widths: tuple[int, ...]
    rows: int
    between: Callable[[int], Sequence[nn.Module]]
    peer: type[Peer]
    loss: LOSS
    target: float  # how many times as fast ours should be
    in_kernel: dict[str, Any] | None = None  # options of `EnsembleMLP.loss`
    own_rows: bool = False  # of each member
    model: dict[str, Any] = field(default_factory=dict)

    def problem(self, options: harness.Options) -> tuple[list[nn.Sequential], Tensor, Tensor]:
        drawn = torch.Generator().manual_seed(options.seed)
        lead = (self.count,) if self.own_rows else ()
        x = torch.randn(*lead, self.rows, self.widths[0], generator=drawn)
        outputs = self.widths[-1] // (2 if self.loss is bounded_nll else 1)
        y = torch.randn(*lead, self.rows, outputs, generator=drawn)
        if self.loss is soft_cross_entropy:
            y = F.softmax(y, -1)
        if self.loss is diverse_mse:
            y = y.expand(self.count, -1, -1)
        made = members(self.count, self.widths, self.between, options.seed)
        return [m.to(options.dtype) for m in made], x.to(options.dtype), y.to(options.dtype)


def relu(width: int) -> Sequence[nn.Module]:
    return [nn.ReLU()]


NETWORKS = {
    "sac_n": Network("SAC-N", 10, (23, 256, 256, 256, 1), 256, relu, Products, mse, 1.25, {"loss": "mse"}),
    "edac": Network("EDAC", 10, (23, 256, 256, 256, 1), 256, relu, Products, diverse_mse, 1.25),
    "droq": Network(
        "DroQ",
        10,
        (23, 256, 256, 1),
        256,
        lambda width: [nn.Dropout(0.01), nn.LayerNorm(width), nn.ReLU()],
        Loop,
        mse,
        2.0,
        {"loss": "mse"},
    ),
    "td_mpc2": Network(
        "TD-MPC2",
        5,
        (518, 512, 512, 101),
        768,
        lambda width: [nn.LayerNorm(width), nn.Mish()],
        Vmapped,
        soft_cross_entropy,
        1.4,
        {"loss": "soft_cross_entropy"},
    ),
    "mbrl": Network(
        "mbrl-lib",
        7,
        (23, 200, 200, 200, 200, 36),
        256,
        lambda width: [nn.SiLU()],
        Products,
        bounded_nll,
        1.4,
        {"loss": "gaussian_nll", "log_variance_min": -10.0, "log_variance_max": 0.5},
        own_rows=True,
    ),
    "torchani": Network(
        "torchani",
        8,
        (384, 160, 128, 96, 1),
        1024,
        lambda width: [nn.CELU(0.1)],
        Loop,
        mse,
        1.3,
        {"loss": "mse"},
    ),
    "tabm_128": Network(
        "TabM, packed",
        32,
        (16, 128, 128, 128, 1),
        256,
        lambda width: [nn.ReLU(), nn.Dropout(0.1)],
        RowsFirst,
        mse,
        2.0,
        {"loss": "mse"},
    ),
    "tabm_512": Network(
        "TabM, packed",
        32,
        (16, 512, 512, 512, 1),
        256,
        lambda width: [nn.ReLU(), nn.Dropout(0.1)],
        RowsFirst,
        mse,
        1.1,
        {"loss": "mse"},
    ),
}


def cases(options: harness.Options) -> list[harness.Case]:
    if options.dtype not in (torch.float32, torch.float64) or options.device.type != "cpu":
        return []
    with_targets = options.dtype == torch.float32 and not options.quick
    made = []
    for name, network in NETWORKS.items():
        if options.quick:
            network = small(network)
        targets = [harness.Target(OUTSIDE, network.target)]
        if network.in_kernel is not None:
            targets = [harness.Target(INSIDE, network.target), harness.Target(OUTSIDE, 0.95, (INSIDE,))]
        made.append(
            harness.Case(
                name,
                f"{network.title}: E {network.count}, {'-'.join(map(str, network.widths))}, B {network.rows}",
                partial(contestants, network, options),
                targets=tuple(targets) if with_targets else (),
                flops=3 * mlp_flops(network.count, network.rows, network.widths),
                grad=True,
            )
        )
    return made + parts(options)


# --- parts of it ----------------------------------------------------------------------------------------

WITHOUT, WITH_NORM = "without a norm", "LayerNorm"
KEPT, COMPUTED, AUTO, FUSED = "outside, kept", "outside, computed again", "outside, auto", "in the kernel"
LINEAR, BADDBMM = "EnsembleLinear", "baddbmm"
EQUAL_WIDTHS = (16, 32, 64, 128, 256)
LINEARS = ((10, 256, 256, 256), (10, 256, 64, 64), (5, 768, 512, 512), (100, 256, 32, 50), (8, 1024, 17, 256))


def parts(options: harness.Options) -> list[harness.Case]:
    widths = (8,) if options.quick else EQUAL_WIDTHS
    linears = ((2, 9, 5, 7),) if options.quick else LINEARS
    asked = options.dtype == torch.float32 and not options.quick
    made = []
    for width in widths:
        shape = (width, width, width, 1)
        work = {"flops": 3 * mlp_flops(20, 256, shape), "grad": True}
        for activation in ("relu", "silu"):
            targets = [harness.Target(AUTO, 0.95, (FUSED,))] if asked and width >= 64 else []
            build = partial(keeping, shape, activation, options)
            title = f"E 20, {width}-{width}-{width}-1, B 256, {activation}"
            made.append(
                harness.Case(f"keeping_{activation}_{width}", title, build, targets=tuple(targets), **work)
            )
        targets = [harness.Target(WITH_NORM, 1 / 1.12, (WITHOUT,))] if asked and width >= 64 else []
        build = partial(normed, shape, options)
        title = f"E 20, {width}-{width}-{width}-1, B 256, relu"
        made.append(harness.Case(f"norm_{width}", title, build, targets=tuple(targets), **work))
    for count, rows, inputs, outputs in linears:
        made.append(
            harness.Case(
                f"linear_{inputs}_{outputs}",
                f"E {count}, {inputs} -> {outputs}, B {rows} of each member",
                partial(linear, count, rows, inputs, outputs, options),
                targets=(harness.Target(LINEAR, 1.0),) if asked else (),
                flops=3 * mlp_flops(count, rows, (inputs, outputs)),
                grad=True,
            )
        )
    return made


def close_to(expected: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], None]:
    """A check of gradients by their root mean square errors."""

    def check(found: Sequence[Tensor]) -> None:
        for one, other in zip(found, expected, strict=True):
            error = (one.double() - other).square().mean().sqrt() / other.square().mean().sqrt().clamp_min(
                1e-9
            )
            if not error < 1e-2:
                raise ValueError(f"expected the gradients of the reference, got an error of {error:.2g}")

    return check


def problem(
    shape: tuple[int, ...], options: harness.Options, **model: Any
) -> tuple[EnsembleMLP, Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(options.seed)
    made = EnsembleMLP(20, shape[0], shape[1:-1], shape[-1], seeds=range(20), dtype=options.dtype, **model)
    x = torch.randn(256, shape[0], generator=drawn).to(options.dtype)
    return made, x, torch.randn(256, shape[-1], generator=drawn).to(options.dtype)


def by_parameters(model: EnsembleMLP, losses: Callable[[], Tensor]) -> harness.Run:
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(losses().sum(), parameters)


def outside(model: EnsembleMLP, x: Tensor, y: Tensor, keeps: Any) -> Tensor:
    weights, biases = model.stacked()
    output = ensemble_mlp(x, weights, biases, activation=model.activation, save_hidden=keeps)
    return (output - y).square().mean((1, 2))


def keeping(shape: tuple[int, ...], activation: str, options: harness.Options) -> list[harness.Contestant]:
    model, x, y = problem(shape, options, activation=activation)
    exact = problem(shape, options, activation=activation)[0].double()
    check = close_to(by_parameters(exact, lambda: mse(exact, x.double(), y.double()))())

    def run(keeps: Any) -> harness.Run:
        return by_parameters(model, lambda: outside(model, x, y, keeps))

    inside = by_parameters(model, lambda: model.loss(x, y, loss="mse"))
    return [
        harness.Contestant(KEPT, partial(run, True), check, ours=True),
        harness.Contestant(COMPUTED, partial(run, False), check, ours=True),
        harness.Contestant(AUTO, partial(run, "auto"), check, ours=True),
        harness.Contestant(FUSED, lambda: inside, check, ours=True),
    ]


def normed(shape: tuple[int, ...], options: harness.Options) -> list[harness.Contestant]:
    made = []
    for name, norm in ((WITHOUT, None), (WITH_NORM, "layer_norm")):
        model, x, y = problem(shape, options, norm=norm)
        exact = problem(shape, options, norm=norm)[0].double()
        check = close_to(by_parameters(exact, partial(mse, exact, x.double(), y.double()))())
        run = by_parameters(model, partial(model.loss, x, y, loss="mse"))
        made.append(harness.Contestant(name, lambda run=run: run, check, ours=True))
    return made


def linear(
    count: int, rows: int, inputs: int, outputs: int, options: harness.Options
) -> list[harness.Contestant]:
    drawn = torch.Generator().manual_seed(options.seed)
    x, above = (
        torch.randn(count, rows, inputs, generator=drawn),
        torch.randn(count, rows, outputs, generator=drawn),
    )
    x, above = x.to(options.dtype).requires_grad_(), above.to(options.dtype)
    layer = EnsembleLinear(count, inputs, outputs, seeds=range(count), dtype=options.dtype)
    weight = layer.weight.detach().transpose(1, 2).contiguous().requires_grad_()
    assert layer.bias is not None
    bias = layer.bias.detach().unsqueeze(1).requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact = torch.autograd.grad(torch.baddbmm(wide[2], wide[0], wide[1]), wide, above.double())

    def ours() -> Sequence[Tensor]:
        return torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], above)

    def theirs() -> Sequence[Tensor]:
        return torch.autograd.grad(torch.baddbmm(bias, x, weight), [x, weight, bias], above)

    return [
        harness.Contestant(
            LINEAR, lambda: ours, close_to([exact[0], exact[1].mT, exact[2].squeeze(1)]), ours=True
        ),
        harness.Contestant(BADDBMM, lambda: theirs, close_to(exact)),
    ]


# --- whole steps -----------------------------------------------------------------------------------------


def small(network: Network) -> Network:
    """A smoke test of it."""
    values = vars(network) | {"rows": 9, "count": 2}
    values["widths"] = tuple(min(width, 24) for width in network.widths)
    return Network(**values)


def contestants(network: Network, options: harness.Options) -> list[harness.Contestant]:
    made, x, y = network.problem(options)
    exact = Loop.from_members(made).double().eval()
    with torch.no_grad():
        expected = exact(x.double())
    drops = any(isinstance(layer, nn.Dropout) for layer in made[0])
    first_losses = network.loss(exact, x.double(), y.double()).detach()

    def stepping(model: nn.Module, of: LOSS, compiled: bool = False) -> harness.Run:
        """What is timed, after a look at the network's outputs."""
        with torch.no_grad():
            found = model.eval()(x)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
        model.train()
        parameters = list(model.parameters())
        if isinstance(model, EnsembleMLP):
            optimizer = fused(torch.optim.Adam, parameters, lr=1e-4)
        else:
            optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
        losses = torch.compile(of) if compiled else of

        def run() -> Tensor:
            optimizer.zero_grad()
            found = losses(model, x, y)
            found.sum().backward()
            optimizer.step()
            return found.detach()

        return run

    def check(losses: Tensor) -> None:
        if drops:  # of a pass of its own
            torch.testing.assert_close(losses.double(), first_losses, rtol=0.3, atol=0.3)
        else:
            torch.testing.assert_close(losses.double(), first_losses, rtol=1e-3, atol=1e-4)

    def original(compiled: bool) -> harness.Run:
        return stepping(network.peer.from_members(made), network.loss, compiled)

    def ours(of: LOSS) -> harness.Run:
        return stepping(EnsembleMLP.from_modules(made, **network.model), of)

    def in_kernel(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(model, EnsembleMLP) and network.in_kernel is not None
        return model.loss(x, y, **network.in_kernel)

    found = [
        harness.Contestant(ORIGINAL, partial(original, False), check),
        harness.Contestant(OUTSIDE, partial(ours, network.loss), check, ours=True),
    ]
    if options.compile:
        found.insert(1, harness.Contestant(COMPILED, partial(original, True), check))
    if network.in_kernel is not None:
        found.append(harness.Contestant(INSIDE, partial(ours, in_kernel), check, ours=True))
    return found


if __name__ == "__main__":
    raise SystemExit(harness.main("networks", __doc__, cases))
