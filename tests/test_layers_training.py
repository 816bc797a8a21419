"""Initial memories in training: nothing leaks from one call into the next, and `persistent` advances once a step."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fwpkm_kernels import apply_rows_
from fwpkm_kernels.layers import FastWeightProductKeyMemory, advance_memory
from tests.helpers.ranks import rank_device, run_ranks

WIDTH = 7
KINDS = [("learned", "sequence"), ("frozen", "sequence"), ("learned", "batch"), ("frozen", "batch")]
EVERY_KIND = [*KINDS, ("persistent", "batch")]


def make_layer(initial_memory="learned", scope="sequence", seed=0, **options) -> FastWeightProductKeyMemory:
    torch.manual_seed(seed)
    options = {"num_keys": 6, "top_k": 3, "key_dim": 6, "value_dim": 5, "chunk_size": 4, "query_conv": 2} | options
    options |= {"dtype": torch.float64, "memory_dtype": torch.float64}
    return FastWeightProductKeyMemory(WIDTH, initial_memory=initial_memory, scope=scope, **options)


def make_input(batch: int = 2, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 10, WIDTH, generator=generator, dtype=torch.float64)


def memory_of(layer):
    return [layer.keys.detach().clone(), layer.table.weight.detach().clone()]


def gradients(layer, x, run=None):
    """Of the parameters, after one backward of its own."""
    layer.zero_grad()
    (run or layer)(x).square().sum().backward()
    return [p.grad.clone() for p in layer.parameters()]


def assert_equal(ours, theirs):
    for x, y in zip(tree_leaves(list(ours)), tree_leaves(list(theirs)), strict=True):
        assert x is y if x is None or y is None else torch.equal(x, y)


@pytest.mark.parametrize("kind", EVERY_KIND, ids="-".join)
def test_calls_leave_nothing_behind(kind):
    """Training, evaluation, streaming and errors between two calls: the second is the first, bit for bit."""
    layer, x = make_layer(*kind), make_input()
    initial, names = memory_of(layer), set(layer.state_dict())
    first, expected = layer(x), gradients(layer, x)
    layer.eval()
    layer(make_input(seed=2))
    with torch.no_grad():
        layer(x, memory=layer.new_memory(2))
        layer(make_input(seed=3))
    layer.train()
    with pytest.raises(ValueError, match="hidden_states"):
        layer(x[..., :3])
    assert torch.equal(layer(x), first)
    assert_equal(gradients(layer, x), expected)
    assert_equal(memory_of(layer), initial)
    assert set(layer.state_dict()) == names
    is_learned = kind[0] == "learned"
    assert isinstance(layer.keys, torch.nn.Parameter) == is_learned
    assert isinstance(layer.table.weight, torch.nn.Parameter) == is_learned


@pytest.mark.parametrize("kind", EVERY_KIND, ids="-".join)
def test_gradient_accumulation_adds_up(kind):
    layer, parts = make_layer(*kind), [make_input(seed=s) for s in (1, 2)]
    apart = [gradients(layer, x) for x in parts]
    layer.zero_grad()
    for x in parts:
        layer(x).square().sum().backward()
    added = [p.grad.clone() for p in layer.parameters()]
    for total, one, two in zip(added, *apart, strict=True):
        torch.testing.assert_close(total, one + two, rtol=1e-12, atol=1e-14)
    if kind[1] == "sequence":  # then it is the whole batch at once too
        for total, whole in zip(added, gradients(layer, torch.cat(parts)), strict=True):
            torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", EVERY_KIND, ids="-".join)
def test_activation_checkpoints(kind, reentrant):
    """The same bits, and the memory of `persistent` is pending once, as the forward has left it."""
    layer, x = make_layer(*kind), make_input().requires_grad_()
    expected = gradients(layer, x)
    pending = layer._pending
    layer._pending = None
    assert_equal(gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=reentrant)), expected)
    if kind[0] == "persistent":
        assert_equal(layer._pending[:2], pending[:2])
    else:
        assert layer._pending is None


def test_persistent_advances_exactly_once_a_step():
    layer, x = make_layer("persistent", "batch"), make_input()
    initial = memory_of(layer)
    advance_memory(layer)  # nothing is pending
    assert_equal(memory_of(layer), initial)
    _, final = layer(x, return_memory=True)
    final[0].square().sum().backward()
    assert_equal(memory_of(layer), initial)
    model = torch.nn.Sequential(torch.nn.Identity(), layer)
    advance_memory(model)
    assert_equal(memory_of(layer), [x.detach() for x in final[:2]])
    advance_memory(model)
    assert_equal(memory_of(layer), [x.detach() for x in final[:2]])

    with torch.no_grad():  # what is written between two steps, by a load say, is not written over
        layer.keys.mul_(0.5)
    advance_memory(layer)
    torch.testing.assert_close(layer.keys, final[0].detach() * 0.5)
    layer.eval()
    layer(x)
    advance_memory(layer)
    torch.testing.assert_close(layer.keys, final[0].detach() * 0.5)

    layer.train()  # the second step begins where the first has ended, and is saved with it
    other = make_layer("persistent", "batch", seed=5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), make_layer("persistent", "batch")(x))


def test_the_last_of_several_calls_counts():
    layer = make_layer("persistent", "batch")
    for seed in (1, 2):
        _, final = layer(make_input(seed=seed), return_memory=True)
    advance_memory(layer)
    assert_equal(memory_of(layer), [x.detach() for x in final[:2]])


def test_reset_parameters_forgets_what_is_pending():
    layer = make_layer("persistent", "batch")
    layer(make_input())
    layer.reset_parameters()
    before = memory_of(layer)
    advance_memory(layer)
    assert_equal(memory_of(layer), before)


def test_a_load_forgets_what_is_pending():
    layer = make_layer("persistent", "batch")
    before = copy.deepcopy(layer.state_dict())
    layer(make_input())
    layer.load_state_dict(before)
    advance_memory(layer)
    assert_equal(memory_of(layer), [before["keys"], before["table.weight"]])


REPLACED = {
    "load": lambda table: table.load_state_dict({"weight": torch.zeros_like(table.weight)}),
    "assign": lambda table: table.load_state_dict({"weight": torch.zeros_like(table.weight)}, assign=True),
    "draw": lambda table: table.reset_parameters(),
}


@pytest.mark.parametrize("name", REPLACED)
def test_another_table_forgets_what_is_pending(name):
    """Also where the layer itself is not asked, so that no rows of the table before come into the new one."""
    layer = make_layer("persistent", "batch")
    layer(make_input())
    REPLACED[name](layer.table)
    before = memory_of(layer)
    advance_memory(layer)
    assert_equal(memory_of(layer), before)
    _, final = layer(make_input(), return_memory=True)  # the next call begins with the new one
    advance_memory(layer)
    assert_equal(memory_of(layer), [x.detach() for x in final[:2]])


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "to"])
def test_what_is_pending_travels_with_the_layer(kind):
    layer = make_layer("persistent", "batch")
    _, final = layer(make_input(), return_memory=True)
    final = [x.detach() for x in final[:2]]
    if kind == "to":
        other = layer.to(torch.float64)
    else:
        other = copy.deepcopy(layer) if kind == "deepcopy" else pickle.loads(pickle.dumps(layer))
    advance_memory(other)
    assert_equal(memory_of(other), final)


@pytest.mark.parametrize("boundary", ["carry", "drop"])
def test_rows_of_earlier_segments_are_kept(boundary):
    """The second segment reads few of the rows that the first one has moved."""
    layer = make_layer("persistent", "batch", num_keys=8, top_k=2, query_conv=1, boundary=boundary)
    one, two = make_input(), make_input(batch=2, seed=2)[:, :3]
    _, memory = layer(one, return_memory=True)
    _, expected = layer(two, memory=memory, return_memory=True)
    layer(two, memory=memory)
    advance_memory(layer)
    assert_equal(memory_of(layer), [x.detach() for x in expected[:2]])


def test_advance_in_a_backward_pass():
    """From a gradient hook, say: keys and values advance together."""
    layer, x = make_layer("persistent", "batch"), make_input().requires_grad_()
    _, final = layer(x, return_memory=True)
    expected = [x.detach() for x in final[:2]]
    x.register_hook(lambda _: advance_memory(layer))
    layer(x).sum().backward()
    assert_equal(memory_of(layer), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_call_is_not_the_last_one(reentrant):
    """Two calls, then one backward, which computes the first one again after the second: that one counts."""
    layer, parts = make_layer("persistent", "batch"), [make_input(seed=s).requires_grad_() for s in (1, 2)]
    outputs = [checkpoint(layer, x, use_reentrant=reentrant) for x in parts]
    pending = layer._pending
    sum(x.square().sum() for x in outputs).backward()
    assert_equal(layer._pending[:2], pending[:2])


def test_advance_refuses_what_two_layers_would_write():
    one = make_layer("persistent", "batch")
    two = make_layer("persistent", "batch", table=one.table)
    model = torch.nn.Sequential(one, two)
    model(make_input())
    with pytest.raises(ValueError, match="`model` has layers that share a table"):
        advance_memory(model)
    with pytest.raises(ValueError, match="`reduce` must be one of 'mean', 'none'"):
        advance_memory(one, reduce="sum")


def train_every_kind() -> dict[str, dict[str, Tensor]]:
    """What two steps of each kind leave, each with this rank's half of the batch."""
    left = {}
    rank, device = dist.get_rank(), rank_device()
    for kind in EVERY_KIND:
        layer = make_layer(*kind).to(device)
        model = DistributedDataParallel(layer)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for step in range(2):
            x = make_input(batch=4, seed=step)[2 * rank : 2 * rank + 2].to(device)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            advance_memory(model)
        left["-".join(kind)] = dict(layer.state_dict())
    layer = make_layer("persistent", "batch").to(device)
    layer(make_input(batch=4)[2 * rank : 2 * rank + 2].to(device))
    advance_memory(layer, reduce="none")
    left["none"] = dict(layer.state_dict())
    layer = make_layer("persistent", "batch").to(device)
    layer(make_input().to(device), return_memory=rank == 0)  # one rank has a whole table, the other one rows of it
    advance_memory(layer)
    left["table and rows"] = dict(layer.state_dict())
    return left


def test_two_ranks():
    """DistributedDataParallel: ranks stay equal; a memory for each sequence trains as one process with the batch does;
    `persistent` moves by the mean of what the ranks' memories did."""
    one, two = run_ranks(train_every_kind, 2)
    for kind in EVERY_KIND:
        name = "-".join(kind)
        assert_equal(one[name].values(), two[name].values())
        layer = make_layer(*kind)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for step in range(2):
            halves = make_input(batch=4, seed=step).split(2)
            optimizer.zero_grad()
            if kind[1] == "sequence":
                layer(torch.cat(halves)).square().mean().backward()
            else:  # a memory for each rank's half
                moved = []
                for half in halves:
                    (layer(half).square().mean() / 2).backward()
                    if kind[0] == "persistent":
                        keys, rows, _ = layer._pending
                        moved.append((keys, layer.table.weight.clone()))
                        apply_rows_(moved[-1][1], rows)
            optimizer.step()
            if kind[0] == "persistent":
                with torch.no_grad():
                    for memory, *ends in zip((layer.keys, layer.table.weight), *moved, strict=True):
                        memory.copy_(sum(ends) / 2)
        for key, x in layer.state_dict().items():
            torch.testing.assert_close(one[name][key], x, rtol=1e-10, atol=1e-12)
    assert not torch.equal(one["none"]["table.weight"], two["none"]["table.weight"])
    layer = make_layer("persistent", "batch")
    layer(make_input())
    advance_memory(layer)
    for left in (one, two):
        for key, x in layer.state_dict().items():
            torch.testing.assert_close(left["table and rows"][key], x, rtol=1e-10, atol=1e-12)


def test_resized_memories():
    """Train small, test large: the projections are the same, the memory is new, and neither layer is the other."""
    layer, x = make_layer("persistent", "batch"), make_input()
    layer(x)
    large = layer.resized(12)
    assert large.keys.shape == (1, 2, 12, 3)
    assert large.table.weight.shape == (144, 5)
    assert large._pending is None
    assert large.initial_memory == "persistent"
    for (name, ours), (_, theirs) in zip(large.named_parameters(), layer.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.data_ptr() != theirs.data_ptr()
    before = memory_of(layer)
    large(x).sum().backward()
    advance_memory(large)
    assert_equal(memory_of(layer), before)
    assert all(p.grad is None for p in layer.parameters())
    assert 0.3 * 6**-0.5 < large.keys.abs().mean() < 6**-0.5
    with torch.inference_mode():
        trained = layer.resized(8)
    trained(x).sum().backward()
    with pytest.raises(TypeError, match="`model` must be a torch.nn.Module, got int"):
        advance_memory(3)
    with pytest.raises(ValueError, match='`initial_memory`="learned"'):
        make_layer().resized(12)
    with pytest.raises(ValueError, match="`num_keys` must be at least 3"):
        layer.resized(2)


def test_a_shared_table_collects_gradients_of_both():
    one = make_layer()
    two = make_layer(seed=1, table=one.table)
    x = make_input()
    two(one(x)).square().sum().backward()
    together = one.table.weight.grad.clone()
    apart = copy.deepcopy(two)
    apart.table = copy.deepcopy(one.table)
    one.zero_grad()
    apart.zero_grad()
    apart(one(x)).square().sum().backward()
    torch.testing.assert_close(together, one.table.weight.grad + apart.table.weight.grad, rtol=1e-12, atol=1e-14)
