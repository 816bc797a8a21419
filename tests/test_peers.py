"""Providers that are other people's packages: found where a folder has one, and their errors told."""

import importlib.util
import os
import sys

import pytest
import torch

from benchmarks import peers

OPERATIONS = ("lookup", "gather", "gather-sparse-grad", "update", "update_", "key-step", "sequence", "step", "decode")
MODULES = ("product_key_memory", "fast_weight_product_key_memory", "src")

#: A stand-in for the package: it answers with the shapes that it was made for.
FAKE = """
import torch
from torch import nn

class PKM(nn.Module):
    def __init__(self, dim, heads, num_keys, topk, dim_head):
        super().__init__()
        self.keys = nn.Parameter(torch.zeros(heads, num_keys, 2, dim_head))
        self.sizes = heads, topk

    def forward(self, x):
        heads, topk = self.sizes
        scores = self.keys[0, 0, 0, 0] + torch.zeros(x.shape[1], heads * topk)
        return self.values(scores.long(), per_sample_weights=scores).unsqueeze(0)
"""


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    """Each test begins without folders and leaves no module of its own behind."""
    monkeypatch.delenv(peers.FOLDERS, raising=False)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in MODULES:
            del sys.modules[name]
    peers._pkm_addressing.cache_clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that FWPKM_PEERS names, behind one that does not exist."""
    if any(importlib.util.find_spec(name) is not None for name in MODULES):
        pytest.skip("a peer is installed")
    monkeypatch.setenv(peers.FOLDERS, f"{tmp_path / 'missing'}{os.pathsep}{tmp_path}")
    return tmp_path


def lookup_inputs():
    return {"queries": torch.zeros(5, 2, 6), "keys": torch.ones(2, 2, 4, 3), "top_k": 3, "score": "dot"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_peers_without_their_packages(operation, folder):
    assert peers.providers(operation) == []


def test_a_package_in_a_folder_is_a_provider(folder):
    (folder / "product_key_memory.py").write_text(FAKE)
    path = list(sys.path)
    (provider,) = peers.providers("lookup")
    assert provider.name == "product-key-memory"
    scores, slots = provider.run(**lookup_inputs())
    assert sys.path == path
    assert scores.shape == slots.shape == (5, 2, 3)
    assert (scores == 1).all()  # from the keys that it was given
    assert peers.providers("sequence") == []


def test_what_a_peer_cannot_do_is_an_error(folder):
    (folder / "product_key_memory.py").write_text(FAKE)
    (provider,) = peers.providers("lookup")
    with pytest.raises(NotImplementedError, match="`score` can only be 'dot' there, got 'idw'"):
        provider.run(**{**lookup_inputs(), "score": "idw"})


def test_a_broken_package_tells_why(folder):
    (folder / "product_key_memory.py").write_text("import a_package_that_nobody_has")
    (provider,) = peers.providers("lookup")
    for _ in range(2):  # each time, not only at the first
        with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
            provider.run(**lookup_inputs())


def test_a_checkout_is_known_by_its_files(folder):
    package = folder / "src" / "models" / "fwpkm"
    package.mkdir(parents=True)
    assert peers.providers("sequence") == []
    (package / "fwpkm.py").write_text("raise RuntimeError('as broken as can be')")
    (provider,) = peers.providers("sequence")
    assert provider.name == "authors"
    sequence = {"queries": torch.zeros(1, 4, 1, 6), "targets": torch.zeros(1, 4, 2), "keys": torch.zeros(1, 2, 4, 3)}
    with pytest.raises(RuntimeError, match="as broken as can be"):
        provider.run(**sequence, values=torch.zeros(16, 2), boundary="drop")
    with pytest.raises(NotImplementedError, match="`boundary` can only be 'drop' there, got 'carry'"):
        provider.run(**sequence, values=torch.zeros(16, 2))
