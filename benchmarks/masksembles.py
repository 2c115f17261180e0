"""Masksembles: masked MLPs, masked maps and the drawing of masks, against what people run today.

Four masks on every example of an MLP 256-512-512-10: forward pass; training steps, a mask for each example,
beside those of one MLP without masks that has the same multiplications to make; a mask for each image of a
batch of feature maps; then, in a whole or a quick run, all masks of 300 settings, and the cost against the
scale S as a curve. The targets are for float32 on two CPU threads.

The peer "layer" is that of the package masksembles, 1.1 or later, whose masks take the input's dtype. Before,
they were float64, and so was all that they touched.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

import pyens
from benchmarks import harness
from benchmarks.harness import Case, Contestant, Options, Target, agrees_with
from benchmarks.peers import mlp_flops
from pyens import plots
from pyens.masks import masks_for_channels
from pyens.nn import EnsembleMLP, MaskedMLP
from pyens.ops import mask_channels, masked_mlp
from pyens.ops.masked_mlp import plan_masks

OP, MODULE, COMPACT = "pyens op", "pyens MaskedMLP", "pyens compact()"
LAYER, GATHERED = "layer", "hand-gathered"
SINGLE, SINGLE_TORCH = "single model, pyens", "single model, nn.Sequential"

# C, N and S of the masks that are drawn: 10 * 6 * 5 = 300.
DRAWN = (
    (10, 16, 32, 64, 100, 128, 256, 512, 1024, 2048),
    (2, 4, 8, 16, 32, 64),
    (1.1, 1.5, 2.0, 3.0, 6.0),
)
SCALES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
DRAW_LIMIT = 0.050  # seconds


def layer_of(masks: Tensor, maps: bool = False) -> nn.Module:
    """A layer of the package with these masks."""
    from masksembles.torch import Masksembles1D, Masksembles2D

    # Made for sizes that its generator can do, then given these masks, in the dtype that it gives its own.
    layer = (Masksembles2D if maps else Masksembles1D)(64, 4, 2.0).to(masks.device)
    layer.n, layer.channels = masks.shape
    layer.masks = masks.to(layer.masks.dtype)
    return layer


@dataclass(frozen=True)
class Problem:
    """An MLP, its masks, and examples with classes."""

    input: Tensor  # [B, I]
    target: Tensor  # [B]
    weights: list[Tensor]  # [O, I]
    biases: list[Tensor]
    masks: list[Tensor]  # bool [N, H]

    @classmethod
    def random(
        cls, num_masks: int, batch_size: int, features: Sequence[int], scale: float, options: Options
    ) -> Problem:
        generator = torch.Generator().manual_seed(options.seed)
        layers = list(itertools.pairwise(features))

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(options.device, options.dtype)

        return cls(
            draw(batch_size, features[0]),
            torch.randint(features[-1], (batch_size,), generator=generator).to(options.device),
            [draw(o, i, scale=(2 / i) ** 0.5) for i, o in layers],
            [draw(o, scale=0.1) for _, o in layers],
            [
                masks_for_channels(width, num_masks, scale, generator=generator).to(options.device)
                for width in features[1:-1]
            ],
        )

    @property
    def num_masks(self) -> int:
        return len(self.masks[0])

    def flops(self, batch_size: int) -> float:
        """Useful operations of a forward pass, for `batch_size` examples under each mask."""
        ones = [int(mask[0].sum()) for mask in self.masks]
        features = [self.weights[0].shape[1], *ones, self.weights[-1].shape[0]]
        return mlp_flops(self.num_masks, batch_size, features)

    def model(self) -> MaskedMLP:
        parameters = [nn.Parameter(t.clone()) for t in (*self.weights, *self.biases)]
        layers = len(self.weights)
        return MaskedMLP.from_parameters(parameters[:layers], parameters[layers:], self.masks)

    def sequential(self) -> nn.Sequential:
        """The network with mask layers, as a user of the package writes it."""
        layers: list[nn.Module] = []
        for weight, bias, mask in zip(self.weights, self.biases, [*self.masks, None], strict=True):
            out_features, in_features = weight.shape
            linear = nn.Linear(in_features, out_features, device=weight.device, dtype=weight.dtype)
            with torch.no_grad():
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
            layers += [linear] if mask is None else [linear, nn.ReLU(), layer_of(mask)]
        return nn.Sequential(*layers)

    def double(self) -> Problem:
        return Problem(
            self.input.double(),
            self.target,
            [w.double() for w in self.weights],
            [b.double() for b in self.biases],
            self.masks,
        )

    def gathered(self) -> tuple[list[Tensor], list[Tensor]]:
        """The rows and columns that the masks keep: weights [N, out, in], biases [N, out]."""
        kept = [plan.clamp_min(0) for plan in plan_masks(self.masks)]  # all masks have the same size
        rows = [
            *kept,
            torch.arange(self.weights[-1].shape[0], device=self.input.device).expand(self.num_masks, -1),
        ]
        columns = [
            torch.arange(self.weights[0].shape[1], device=self.input.device).expand(self.num_masks, -1),
            *kept,
        ]
        weights = [
            w[r.unsqueeze(2), c.unsqueeze(1)] for w, r, c in zip(self.weights, rows, columns, strict=True)
        ]
        return weights, [b[r] for b, r in zip(self.biases, rows, strict=True)]


def cases(options: Options) -> list[Case]:
    num_masks, b, features, scale = (4, 1024, (256, 512, 512, 10), 2.0)
    maps = (64, 64, 32, 32)
    if options.quick:
        num_masks, b, features, maps = 2, 8, (5, 12, 8, 3), (4, 6, 3, 3)
    with_targets = (options.device.type, options.dtype, options.threads, options.quick) == (
        "cpu",
        torch.float32,
        2,
        False,
    )

    def targets(*them: tuple) -> tuple[Target, ...]:
        return tuple(Target(*target) for target in them) if with_targets else ()

    def problem() -> Problem:
        return Problem.random(num_masks, b, features, scale, options)

    network = f"{'-'.join(map(str, features))}, N {num_masks}, S {scale:g}"
    title = f"{network}, B {b}"
    useful = problem().flops(b)
    batches = {"training": b} if options.quick else {"training": b, "training-256": 256, "training-64": 64}

    def training_case(name: str, batch_size: int) -> Case:
        against_layer = [("pyens MaskedMLP.loss", 2.0, (LAYER,))]
        # The paper's MLPs take 1.6 times as long to train as a single model.
        against_single = [("pyens MaskedMLP.loss", 1 / 1.6, (SINGLE,))]
        return Case(
            name,
            f"a mask for each example, forward and backward, {network}, B {batch_size}",
            lambda: training_contestants(
                Problem.random(num_masks, batch_size, features, scale, options), options
            ),
            flops=3 * useful / num_masks * batch_size / b,
            targets=targets(*(against_layer if name == "training" else ()), *against_single),
            grad=True,
        )

    map_bytes = 2.0 * options.dtype.itemsize * torch.Size(maps).numel()
    return [
        Case(
            "forward",
            f"every mask on every example, {title}",
            lambda: forward_contestants(problem(), options),
            flops=useful,
            targets=targets(
                *((ours, 10.0, (LAYER,)) for ours in (OP, MODULE)),
                *((ours, 1.15, (GATHERED, f"{GATHERED} transposed")) for ours in (OP, MODULE)),
            ),
        ),
        *(training_case(name, size) for name, size in batches.items()),
        Case(
            "channels",
            f"{'×'.join(map(str, maps))}, N {num_masks}",
            lambda: channels_contestants(maps, num_masks, scale, options),
            bytes=map_bytes,
            targets=targets((OP, 1 / 1.15, ("clone",)), (OP, 1 / 1.15, ("copy_",))),
        ),
    ]


def forward_contestants(problem: Problem, options: Options) -> list[Contestant]:
    x, weights, biases, masks = problem.input, problem.weights, problem.biases, problem.masks
    num_masks = problem.num_masks
    exact = problem.double()
    expected = pyens.reference.masked_mlp(exact.input, exact.weights, exact.biases, masks)
    check = agrees_with(expected, options.dtype)

    def op() -> harness.Run:
        plan = plan_masks(masks)
        return lambda: masked_mlp(x, weights, biases, masks, plan=plan)

    def call(model: nn.Module) -> harness.Run:
        return lambda: model(x)

    def layer(compile: bool) -> harness.Run:
        network = problem.sequential().requires_grad_(False)

        def forward(x: Tensor) -> Tensor:
            return network(x.repeat(num_masks, 1)).unflatten(0, (num_masks, -1))

        return _bound(forward, x, compile=compile)

    def gathered(compile: bool) -> harness.Run:
        stacked, vectors = problem.gathered()
        stacked = [w.transpose(1, 2).contiguous() for w in stacked]
        vectors = [v.unsqueeze(1) for v in vectors]

        def forward(x: Tensor) -> Tensor:
            hidden = x.expand(num_masks, *x.shape)
            for layer, (weight, bias) in enumerate(zip(stacked, vectors, strict=True)):
                hidden = torch.baddbmm(bias, hidden.relu_() if layer else hidden, weight)
            return hidden

        return _bound(forward, x, compile=compile)

    def gathered_transposed(compile: bool) -> harness.Run:
        stacked, vectors = problem.gathered()
        vectors = [v.unsqueeze(2) for v in vectors]

        def forward(x: Tensor) -> Tensor:
            hidden = x.T.expand(num_masks, *x.T.shape)
            for layer, (weight, bias) in enumerate(zip(stacked, vectors, strict=True)):
                hidden = torch.baddbmm(bias, weight, hidden.relu_() if layer else hidden)
            return hidden.transpose(1, 2)

        return _bound(forward, x, compile=compile)

    return [
        Contestant(OP, op, check, ours=True),
        Contestant(MODULE, lambda: call(problem.model().requires_grad_(False)), check, ours=True),
        Contestant(COMPACT, lambda: call(problem.model().compact()), check, ours=True),
        Contestant("reference", lambda: lambda: pyens.reference.masked_mlp(x, weights, biases, masks), check),
        *_peers(LAYER, layer, check, options),
        *_peers(GATHERED, gathered, check, options),
        *_peers(f"{GATHERED} transposed", gathered_transposed, check, options),
    ]


def training_contestants(problem: Problem, options: Options) -> list[Contestant]:
    """The loss of a batch in which each example meets one mask, and its gradients. N divides B here."""
    x, y, num_masks = problem.input, problem.target, problem.num_masks
    exact = problem.double()
    leaves = [t.requires_grad_() for t in (*exact.weights, *exact.biases)]
    outputs = pyens.reference.masked_mlp(
        exact.input.unflatten(0, (num_masks, -1)), exact.weights, exact.biases, problem.masks
    )
    loss = F.cross_entropy(outputs.flatten(0, 1), y)
    check = agrees_with(
        [loss.detach(), *torch.autograd.grad(loss, leaves)],
        options.dtype,
        # pyens gives losses in float32.
        lambda output: [output[0].to(options.dtype), *output[1:]],
    )

    def step(loss: Callable[[], Tensor], parameters: Sequence[Tensor], compile: bool = False) -> harness.Run:
        loss = _compiled(loss) if compile else loss

        def run() -> list[Tensor]:
            value = loss()
            return [value, *torch.autograd.grad(value, parameters)]

        return run

    def fused() -> harness.Run:
        model = problem.model()
        return step(lambda: model.loss(x, y, loss="cross_entropy", mode="grouped"), list(model.parameters()))

    def forward() -> harness.Run:
        model = problem.model()
        return step(lambda: F.cross_entropy(model(x, mode="grouped"), y), list(model.parameters()))

    def layer(compile: bool) -> harness.Run:
        network = problem.sequential()
        linears = [layer for layer in network if isinstance(layer, nn.Linear)]
        parameters = [linear.weight for linear in linears] + [linear.bias for linear in linears]
        return step(lambda: F.cross_entropy(network(x), y), parameters, compile)

    def gathered(compile: bool) -> harness.Run:
        layers = len(problem.weights)
        own = [t.clone().requires_grad_() for t in (*problem.weights, *problem.biases)]
        mine = Problem(x, y, own[:layers], own[layers:], problem.masks)
        kept = [plan.clamp_min(0) for plan in plan_masks(problem.masks)]

        def loss() -> Tensor:
            hidden = x.unflatten(0, (num_masks, -1))
            for layer, (weight, bias) in enumerate(zip(mine.weights, mine.biases, strict=True)):
                stacked = weight.expand(num_masks, *weight.shape)
                vectors = bias.expand(num_masks, -1)
                if layer > 0:
                    columns = kept[layer - 1].unsqueeze(1)
                    stacked = stacked.gather(2, columns.expand(-1, weight.shape[0], -1))
                    hidden = hidden.relu()
                if layer < len(kept):
                    rows = kept[layer].unsqueeze(2)
                    stacked = stacked.gather(1, rows.expand(-1, -1, stacked.shape[2]))
                    vectors = vectors.gather(1, kept[layer])
                hidden = torch.baddbmm(vectors.unsqueeze(1), hidden, stacked.transpose(1, 2))
            return F.cross_entropy(hidden.flatten(0, 1), y)

        return step(loss, own, compile)

    single, agrees = single_model(problem, options)
    parameters = [t for layer in single for t in layer.parameters()]

    def one_of_pyens() -> harness.Run:
        model = EnsembleMLP.from_modules([single])
        return step(lambda: model.loss(x, y, loss="cross_entropy").sum(), list(model.parameters()))

    def one_of_torch() -> harness.Run:
        return step(lambda: F.cross_entropy(single(x), y), parameters)

    return [
        Contestant("pyens MaskedMLP.loss", fused, check, ours=True),
        Contestant("pyens MaskedMLP", forward, check, ours=True),
        *_peers(LAYER, layer, check, options),
        *_peers(GATHERED, gathered, check, options),
        Contestant(SINGLE, one_of_pyens, agrees, yardstick=True),
        Contestant(SINGLE_TORCH, one_of_torch, agrees, yardstick=True),
    ]


def single_model(problem: Problem, options: Options) -> tuple[nn.Sequential, Callable[[Any], None]]:
    """An MLP as wide as what a mask leaves, and a check of the loss of one."""
    ones = [int(mask[0].sum()) for mask in problem.masks]
    features = [problem.weights[0].shape[1], *ones, problem.weights[-1].shape[0]]
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(features):
        layers += [nn.Linear(i, o, device=options.device, dtype=options.dtype), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    exact = F.cross_entropy(copy.deepcopy(model).double()(problem.input.double()), problem.target)
    return model, agrees_with(
        exact.detach(), options.dtype, lambda output: output[0].detach().to(options.dtype)
    )


def channels_contestants(
    shape: tuple[int, ...], num_masks: int, scale: float, options: Options
) -> list[Contestant]:
    generator = torch.Generator().manual_seed(options.seed)
    x = torch.randn(shape, generator=generator).to(options.device, options.dtype)
    masks = masks_for_channels(shape[1], num_masks, scale, generator=generator).to(options.device)
    check = agrees_with(pyens.reference.mask_channels(x, masks).double(), options.dtype)
    copied = agrees_with(x.double(), options.dtype)
    into = torch.empty_like(x)

    def layer(compile: bool) -> harness.Run:
        return _bound(layer_of(masks, maps=True), x, compile=compile)

    return [
        Contestant(OP, lambda: lambda: mask_channels(x, masks), check, ours=True),
        Contestant("reference", lambda: lambda: pyens.reference.mask_channels(x, masks), check),
        *_peers(LAYER, layer, check, options),
        # What the operation is held against: they do not mask.
        Contestant("clone", lambda: x.clone, copied),
        Contestant("copy_", lambda: lambda: into.copy_(x), copied),
    ]


def _peers(
    name: str, setup: Callable[[bool], harness.Run], check: Callable[[Any], None], options: Options
) -> list[Contestant]:
    eager = Contestant(name, lambda: setup(False), check)
    compiled = Contestant(f"{name}, compiled", lambda: setup(True), check)
    return [eager, compiled] if options.compile else [eager]


def _bound(function: Callable[[Tensor], Tensor], x: Tensor, *, compile: bool) -> harness.Run:
    function = _compiled(function) if compile else function
    return lambda: function(x)


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


# --- drawing masks, and the curve ------------------------------------------------------------------------


def draw_masks(options: Options) -> dict[str, Any]:
    """Masks of every setting: how many came out as they should, and how long they took."""
    settings = list(itertools.product(*DRAWN))
    settings = settings[::25] if options.quick else settings
    seconds, failed = [], []
    for channels, num_masks, scale in tqdm(settings, desc="drawing masks", leave=False, disable=None):
        generator = torch.Generator().manual_seed(options.seed)
        start = time.perf_counter()
        masks = masks_for_channels(channels, num_masks, scale, generator=generator)
        seconds.append(time.perf_counter() - start)
        ones = masks.sum(1)
        if masks.shape != (num_masks, channels) or not masks.any(0).all() or ones.min() != ones.max():
            failed.append((channels, num_masks, scale))
    worst = max(range(len(seconds)), key=seconds.__getitem__)
    return {
        "settings": len(settings),
        "failed": failed,
        "within_limit": sum(s < DRAW_LIMIT for s in seconds),
        "limit_seconds": DRAW_LIMIT,
        "median_seconds": statistics.median(seconds),
        "worst_seconds": seconds[worst],
        "worst_setting": settings[worst],
    }


def scale_curve(options: Options) -> dict[str, list[float]]:
    """Seconds against S: forward and training step of a MaskedMLP, the layer's forward, an ensemble's."""
    num_masks, b, features = (2, 8, (5, 12, 8, 3)) if options.quick else (4, 1024, (256, 512, 512, 10))
    scales = SCALES[::4] if options.quick else SCALES
    rows: dict[str, list[float]] = {"scale": [], "forward": [], "training step": [], "layer": []}
    runs: list[tuple[str, int, Timer]] = []
    for i, scale in enumerate(scales):
        problem = Problem.random(num_masks, b, features, scale, options)
        model, network = problem.model(), problem.sequential().requires_grad_(False)
        x, y = problem.input, problem.target

        def forward(model: MaskedMLP = model, x: Tensor = x) -> None:
            with torch.inference_mode():
                model(x)

        def step(model: MaskedMLP = model, x: Tensor = x, y: Tensor = y) -> None:
            model.zero_grad()
            model.loss(x, y, loss="cross_entropy", mode="tiled").sum().backward()

        def layer(network: nn.Module = network, x: Tensor = x) -> None:
            with torch.inference_mode():
                network(x.repeat(num_masks, 1))

        rows["scale"].append(scale)
        for name, run in (("forward", forward), ("training step", step), ("layer", layer)):
            rows[name].append(float("inf"))
            run()
            runs.append((name, i, Timer("run()", globals={"run": run}, num_threads=options.threads)))
    # The best of rounds through all of them: a slow spell of the machine is left out.
    for _ in tqdm(range(options.rounds), desc="cost against S", leave=False, disable=None):
        for name, i, timer in runs:
            rows[name][i] = min(rows[name][i], timer.timeit(1 if name == "layer" else 3).mean)
    return rows


def plot_curve(rows: dict[str, list[float]], options: Options, path: Path) -> None:
    figure = plots.new_figure(6, 4.2)
    ax = figure.subplots()
    for (name, seconds), marker in zip(
        ((k, v) for k, v in rows.items() if k != "scale"), ("o", "s", "^"), strict=True
    ):
        label = "forward of the package" if name == "layer" else f"{name}, every mask on every example"
        ax.plot(rows["scale"], [1e3 * s for s in seconds], marker=marker, label=label)
    ax.set(xlabel="scale S", ylabel="ms", yscale="log")
    ax.set_title(f"Cost against S, {options.threads} threads")
    ax.grid(alpha=0.3, which="both")
    ax.legend(frameon=False)
    plots.save_figure(figure, path, dpi=120)


def extras(options: Options, output: Path, stem: str) -> int:
    """Draws masks and measures the curve; 1 if a setting failed or was too slow."""
    torch.set_num_threads(options.threads)
    drawn = draw_masks(options)
    done = drawn["settings"] - len(drawn["failed"])
    met = done == drawn["within_limit"] == drawn["settings"]
    print(
        f"draw: {done} of {drawn['settings']} settings, {drawn['within_limit']} within "
        f"{1e3 * DRAW_LIMIT:g} ms: {'met' if met else 'MISSED'}; "
        f"median {1e3 * drawn['median_seconds']:.3g} ms, "
        f"worst {1e3 * drawn['worst_seconds']:.3g} ms at C, N, S = {drawn['worst_setting']}"
    )
    curve = scale_curve(options)
    for scale, *seconds in zip(*curve.values(), strict=True):
        names = list(curve)[1:]
        cells = ", ".join(f"{k} {1e3 * s:.3g} ms" for k, s in zip(names, seconds, strict=True))
        print(f"S {scale:g}: {cells}")
    content = {"machine": harness.machine_info(options), "draw": drawn, "curve": curve}
    path = output / f"{stem}-scale.json"
    harness.write(path, json.dumps(content, indent=1) + "\n")
    plot_curve(curve, options, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}")
    return int(bool(drawn["failed"]))


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    status = harness.main("masksembles", __doc__, cases, argv)
    # The flags are right if that came back.
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    for flag in ("--quick", "--markdown", "--no-compile"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--cases", default="")
    parser.add_argument("--precision")
    flags = parser.parse_args(argv)
    if flags.markdown or flags.cases or flags.device != "cpu":  # masks are drawn on the CPU
        return status
    options = Options(
        device=torch.device(flags.device),
        dtype=getattr(torch, flags.dtype),
        threads=flags.threads,
        rounds=flags.rounds or (2 if flags.quick else 20),
        seed=flags.seed,
        quick=flags.quick,
        compile=False,
    )
    stem = f"masksembles-{flags.device}-{flags.dtype}{'-quick' if flags.quick else ''}"
    return status | extras(options, flags.output, stem)


if __name__ == "__main__":
    raise SystemExit(main())
