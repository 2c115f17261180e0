"""Outputs of the ensembles of public packages, for small networks of fixed weights: what our peers restate.

    python -m tests.network_outputs --write    computes them anew with the packages that are installed

Needs `tabm`, `mbrl`, `torchani` and `torchrl`; those that are not there keep what the file says of them. A
test compares the peers of `benchmarks/network_peers.py`, and pyens, with the file.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.network_peers import members

FILE = Path(__file__).with_suffix(".json")
E, B, WIDTHS = 3, 4, (5, 6, 6, 2)
BETWEEN: dict[str, Callable[[int], Sequence[nn.Module]]] = {
    "tabm": lambda width: [nn.ReLU()],
    "mbrl": lambda width: [nn.SiLU()],
    "torchani": lambda width: [nn.CELU(0.1)],
    "torchrl": lambda width: [nn.LayerNorm(width), nn.Mish()],
}


def numbers(*shape: int, seed: int) -> Tensor:
    """The same on every machine: sines of whole numbers, in float64."""
    return (
        torch.tensor([math.sin(1.0 + 0.7 * i + seed) for i in range(math.prod(shape))]).double().view(shape)
    )


def networks(package: str) -> list[nn.Sequential]:
    made = members(E, WIDTHS, BETWEEN[package])
    for m, member in enumerate(made):
        member.double()
        with torch.no_grad():
            for i, parameter in enumerate(member.parameters()):
                parameter.copy_(numbers(*parameter.shape, seed=10 * m + i))
    return made


def inputs() -> Tensor:
    """Of each member, `[E, B, I]`."""
    return numbers(E, B, WIDTHS[0], seed=99)


def linears(member: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in member if isinstance(layer, nn.Linear)]


def of_tabm(made: list[nn.Sequential], x: Tensor) -> Tensor:
    import tabm

    h = x.transpose(0, 1)  # [B, k, I]
    for i, across in enumerate(zip(*map(linears, made), strict=True)):
        layer = tabm.LinearEnsemble(across[0].in_features, across[0].out_features, k=E).double()
        with torch.no_grad():
            layer.weight.copy_(torch.stack([one.weight.T for one in across]))
            layer.bias.copy_(torch.stack([one.bias for one in across]))
        h = layer(torch.relu(h) if i else h)
    return h.transpose(0, 1)


def of_mbrl(made: list[nn.Sequential], x: Tensor) -> Tensor:
    from mbrl.models.util import EnsembleLinearLayer

    h = x
    for i, across in enumerate(zip(*map(linears, made), strict=True)):
        layer = EnsembleLinearLayer(E, across[0].in_features, across[0].out_features).double()
        with torch.no_grad():
            layer.weight.copy_(torch.stack([one.weight.T for one in across]))
            layer.bias.copy_(torch.stack([one.bias for one in across]).unsqueeze(1))
        h = layer(nn.functional.silu(h) if i else h)
    return h


def of_torchani(made: list[nn.Sequential], x: Tensor) -> Tensor:
    from torchani.nn import AtomicNetwork

    outputs = []
    for member, rows in zip(made, x, strict=True):
        network = AtomicNetwork(WIDTHS, activation=nn.CELU(0.1), bias=True).double()
        layers = [*network.layers, network.final_layer]
        with torch.no_grad():
            for theirs, ours in zip(layers, linears(member), strict=True):
                theirs.load_state_dict(ours.state_dict())
        outputs.append(network(rows))
    return torch.stack(outputs)


def of_torchrl(made: list[nn.Sequential], x: Tensor) -> Tensor:
    from torchrl.modules import MLP

    def network() -> nn.Module:
        return MLP(
            WIDTHS[0],
            WIDTHS[-1],
            num_cells=WIDTHS[1:-1],
            activation_class=nn.Mish,
            norm_class=nn.LayerNorm,
            norm_kwargs=[{"normalized_shape": width} for width in WIDTHS[1:-1]],
        ).double()

    ensemble = []
    for member in made:
        theirs, ours = network(), iter(member.parameters())
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(next(ours))
        ensemble.append(theirs)
    parameters, buffers = torch.func.stack_module_state(ensemble)
    template = network()

    def call(parameters: dict, buffers: dict, rows: Tensor) -> Tensor:
        return torch.func.functional_call(template, (parameters, buffers), (rows,))

    return torch.func.vmap(call)(parameters, buffers, x)


PACKAGES = {"tabm": of_tabm, "mbrl": of_mbrl, "torchani": of_torchani, "torchrl": of_torchrl}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    for package, compute in PACKAGES.items():
        try:
            output = compute(networks(package), inputs())
        except ImportError as error:
            print(f"{package}: {error}")
            continue
        known[package] = {"version": version(package), "output": output.detach().tolist()}
        print(f"{package} {version(package)}")
    FILE.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
