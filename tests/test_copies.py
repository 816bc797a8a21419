"""Copies of the package beside each other, and modules that are loaded again, in processes of their own.

Operators belong to the process: where a name was registered twice, the first registration's memory was freed.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fwpkm_kernels"

#: What the programs below share: `run(package)` calls everything there is, forward and backward, and `same` compares.
USE = """
import importlib, pickle, pkgutil, random, sys, types
import torch

torch.manual_seed(0)
keys, queries = torch.randn(2, 2, 8, 4), torch.randn(2, 12, 2, 8)
values, targets = torch.randn(64, 6), torch.randn(2, 12, 6)
small = {"chunk_size": 4, "top_k": 3}


def operations(package, q, y, k, v):
    new_keys = package.product_key_update(k, q.flatten(0, 1), top_k=3)
    scores, slots = package.product_key_lookup(q.flatten(0, 1), new_keys, 3)
    weights, slots = scores.flatten(1).softmax(-1), slots.flatten(1)
    read = package.sparse_value_gather(v, slots, weights)
    written = package.chunk_value_update(v, slots, weights, y.flatten(0, 1), read, count_slots=slots.flatten())
    return read.square().sum() + written.square().sum() + package.fast_weight_memory(q, y, k, v, **small).output.sum()


def build(package):
    leaves = [x.clone().requires_grad_() for x in (queries, targets, keys, values)]
    return leaves, operations(package, *leaves)


def finish(graph):
    leaves, loss = graph
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def stream(package, state_class=None):
    state = (state_class or package.MemoryState)(keys, values)
    outputs = [package.fast_weight_memory_step(state, queries, targets, **small)]
    outputs.append(package.fast_weight_memory_step(state, queries, targets, **small))
    table = values.clone()
    package.chunk_value_update_(table, torch.ones(1, 1).long(), torch.ones(1, 1), targets[0, :1], targets[1, :1])
    return [*outputs, state.keys, state.values, table]


def compiled(package):
    return torch.compile(lambda *leaves: operations(package, *leaves), backend="aot_eager", fullgraph=True)


def run(package):
    return finish(build(package)) + stream(package)


def same(one, other):
    assert len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other))


def operators(namespace):
    return {name for name in torch._C._dispatch_get_all_op_names() if name.split("::")[0] == namespace}
"""


def run(program: str, *folders: Path) -> None:
    """Run a program after `USE`, with `folders` before this checkout on the path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*folders, PACKAGE.parent)))}
    environment["TRITON_INTERPRET"] = "1"
    result = subprocess.run(
        [sys.executable, "-c", USE + textwrap.dedent(program)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"status {result.returncode}\n{result.stderr[-4000:]}"


def copy(to: Path) -> None:
    shutil.copytree(PACKAGE, to, ignore=shutil.ignore_patterns("__pycache__"))


def test_copies_under_other_names(tmp_path):
    copy(tmp_path / "vendored_fwpkm")
    copy(tmp_path / "some" / "_vendor" / "fwpkm_kernels")
    copy(tmp_path / "my-nodes")
    run(
        """
        import some._vendor.fwpkm_kernels as nested
        import vendored_fwpkm
        import fwpkm_kernels

        packages = [nested, vendored_fwpkm, fwpkm_kernels, importlib.import_module("my-nodes")]
        names = {name.split("::")[1] for name in operators("fwpkm_kernels")}
        assert len(names) >= 13
        for namespace in ("vendored_fwpkm", "some__vendor_fwpkm_kernels", "my_nodes"):
            assert operators(namespace) == {f"{namespace}::{name}" for name in names}
        expected = run(fwpkm_kernels)
        functions = [compiled(package) for package in packages[:3]]
        for _ in range(3):
            graphs = [build(package) for package in packages]
            for package, graph in zip(packages, reversed(graphs)):
                same(finish(graph) + stream(package), expected)
            for function in functions:
                leaves = [x.clone().requires_grad_() for x in (queries, targets, keys, values)]
                torch.testing.assert_close(finish((leaves, function(*leaves))), expected[:5])
        for package in packages:
            state = package.MemoryState(keys, values)
            package.fast_weight_memory_step(state, queries, targets, **small)
            again = pickle.loads(pickle.dumps(state))
            assert type(again) is package.MemoryState
            same([again.keys, again.values], [state.keys, state.values])
        """,
        tmp_path,
    )


def test_modules_are_loaded_again():
    run(
        """
        import fwpkm_kernels

        modules = [
            importlib.import_module(found.name)
            for found in pkgutil.walk_packages(fwpkm_kernels.__path__, "fwpkm_kernels.")
        ]
        assert len(modules) > 20
        before = types.SimpleNamespace(**vars(fwpkm_kernels))
        graph, function, known = build(before), compiled(before), operators("fwpkm_kernels")
        packets = {name: getattr(torch.ops.fwpkm_kernels, name.split("::")[1]).default for name in known}
        function(queries, targets, keys, values)
        expected = run(before)

        def check():
            state_class = sys.modules["fwpkm_kernels.state"].MemoryState
            same(finish(build(before)) + stream(before, state_class), expected)
            same(finish(build(fwpkm_kernels)) + stream(fwpkm_kernels, state_class), expected)
            assert operators("fwpkm_kernels") == known
            for name, packet in packets.items():
                assert getattr(torch.ops.fwpkm_kernels, name.split("::")[1]).default is packet

        random.seed(0)
        for module in [*modules, *random.sample(modules, len(modules)), fwpkm_kernels]:
            importlib.reload(module)
            check()
        same(finish(graph), expected[:5])
        torch.testing.assert_close(function(queries, targets, keys, values), expected[0])

        # The newest code runs, also for those who hold old functions.
        lookup = sys.modules["fwpkm_kernels.lookup"]
        lookup._lookup_op.register_kernel(None)(lambda *args: 1 / 0)
        try:
            before.product_key_lookup(queries, keys, 3)
        except ZeroDivisionError:
            importlib.reload(lookup)
        else:
            raise AssertionError("an old function runs old code")
        check()

        graph, function = build(fwpkm_kernels), compiled(fwpkm_kernels)
        function(queries, targets, keys, values)
        old = fwpkm_kernels
        for name in [name for name in sys.modules if name.split(".")[0] == "fwpkm_kernels"]:
            del sys.modules[name]
        import fwpkm_kernels
        assert fwpkm_kernels is not old and fwpkm_kernels.MemoryState is not old.MemoryState
        for _ in range(2):
            same(run(fwpkm_kernels), expected)
            same(finish(build(old)), expected[:5])
        same(finish(graph), expected[:5])
        torch.testing.assert_close(function(queries, targets, keys, values), expected[0])

        from fwpkm_kernels._operators import operator
        def changed(queries: torch.Tensor) -> torch.Tensor:
            return queries.clone()

        known = lookup._lookup_op
        for function, changes in (
            (changed, {}),
            (known._init_fn, {"schema": known._schema, "tags": (torch.Tag.cudagraph_unsafe,)}),
        ):
            try:
                operator("product_key_lookup", **changes)(function)
            except ImportError as error:
                assert "fwpkm_kernels::product_key_lookup" in str(error) and "restart" in str(error), error
            else:
                raise AssertionError("a new schema, or new tags, were taken")
        operator("product_key_lookup", schema=known._schema)(known._init_fn)
        same(run(fwpkm_kernels), expected)
        """
    )


def test_another_owner_of_the_names(tmp_path):
    """Under the same name from another folder, under a name that gives the same namespace, and of a library."""
    copy(tmp_path / "same" / "fwpkm_kernels")
    copy(tmp_path / "fwpkm" / "kernels")
    copy(tmp_path / "vendored")
    run(
        f"""
        import fwpkm_kernels
        expected, first, known = run(fwpkm_kernels), fwpkm_kernels, operators("fwpkm_kernels")

        def refused(name, *words):
            try:
                importlib.import_module(name)
            except ImportError as error:
                assert all(word in str(error) for word in words), error
            else:
                raise AssertionError(name)

        folders = {str(tmp_path / "same" / "fwpkm_kernels")!r}, {str(PACKAGE)!r}
        sys.path.insert(0, {str(tmp_path / "same")!r})
        mine = {{name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("fwpkm_kernels")}}
        refused("fwpkm_kernels", *folders)
        refused("fwpkm_kernels", *folders)
        refused("fwpkm.kernels", {str(tmp_path / "fwpkm" / "kernels")!r}, folders[1])
        same(finish(build(first)), expected[:5])
        sys.modules.update(mine)
        same(run(first), expected)
        assert operators("fwpkm_kernels") == known

        library = torch.library.Library("vendored", "DEF")
        library.define("product_key_lookup(Tensor x) -> Tensor")
        refused("vendored", "torch.library.Library", "vendored::product_key_lookup")
        assert operators("vendored") == {{"vendored::product_key_lookup"}}
        """,
        tmp_path,
    )
