"""Peers of benchmarks/networks.py compute what the packages that they restate compute, and so does pyens."""

import json

import pytest
import torch
from network_outputs import BETWEEN, FILE, inputs, networks

from benchmarks.network_peers import Loop, Products, RowsFirst, Vmapped
from pyens import EnsembleMLP

PEERS = {"tabm": RowsFirst, "mbrl": Products, "torchani": Loop, "torchrl": Vmapped}


@pytest.fixture(scope="module")
def outputs():
    return {
        package: torch.tensor(found["output"], dtype=torch.float64)
        for package, found in json.loads(FILE.read_text()).items()
    }


@pytest.mark.parametrize("package", BETWEEN)
def test_peers_give_the_outputs_of_the_package(outputs, package):
    peer = PEERS[package].from_members(networks(package))
    torch.testing.assert_close(peer(inputs()), outputs[package])


@pytest.mark.parametrize("package", BETWEEN)
def test_pyens_gives_the_outputs_of_the_package(outputs, package):
    torch.testing.assert_close(EnsembleMLP.from_modules(networks(package))(inputs()), outputs[package])


@pytest.mark.parametrize("peer", [Loop, Products, RowsFirst, Vmapped])
def test_peers_agree_and_share_an_input(peer):
    made, x = networks("tabm"), inputs()
    torch.testing.assert_close(peer.from_members(made)(x), Loop.from_members(made)(x))
    torch.testing.assert_close(peer.from_members(made)(x[0]), Loop.from_members(made)(x[0]))
