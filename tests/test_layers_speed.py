"""What a layer costs beside its projections and its operator, in what can be counted: operators, and tables.

Times of both are in the benchmarks.
"""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import registry
from benchmarks.measure import allocations_cpu, prepare
from fwpkm_kernels import MemoryPool, MemoryState, fast_weight_memory, fast_weight_memory_step
from fwpkm_kernels.layers import FastWeightProductKeyMemory, advance_memory

HIDDEN, SUB_KEYS, WIDTH, CHUNK, LENGTH = 12, 40, 16, 4, 11
SIZES = {"num_keys": SUB_KEYS, "top_k": 3, "key_dim": 6, "value_dim": WIDTH, "chunk_size": CHUNK}


def tables(call, dtype=torch.float32):
    """How many arrays of at least a table's bytes a call makes."""
    return sum(size >= SUB_KEYS**2 * WIDTH * dtype.itemsize for size in allocations_cpu(call))


def tokens(batch):
    return torch.randn(batch, LENGTH, HIDDEN, requires_grad=True)


def tables_of_operator(layer, batch, trains, final="table"):
    """Of the operator alone, forward and backward, on the layer's own memory."""
    queries = torch.randn(batch, LENGTH, 1, layer.key_dim, requires_grad=True)
    targets, gates = torch.randn(batch, LENGTH, WIDTH, requires_grad=True), torch.rand(batch, LENGTH)
    keys, values = (x.detach().float().requires_grad_(trains) for x in (layer.keys, layer.table.weight))

    def call():
        how = layer.options._asdict() | {"final": final}
        result = fast_weight_memory(queries, targets, keys, values, gates=gates, **how)
        result.output.sum().backward()
        return result

    return tables(call)


@pytest.mark.parametrize(
    "scope, initial_memory, batch",
    [
        ("sequence", "learned", 1),
        ("sequence", "learned", 3),
        ("sequence", "frozen", 1),
        ("batch", "learned", 2),
        ("batch", "frozen", 2),
        ("batch", "persistent", 2),
    ],
)
@pytest.mark.parametrize("return_memory", [False, True])
def test_a_training_call_copies_no_table_besides_the_operators(scope, initial_memory, batch, return_memory):
    layer = FastWeightProductKeyMemory(HIDDEN, scope=scope, initial_memory=initial_memory, **SIZES)
    x, trains = tokens(batch), initial_memory == "learned"

    def call():
        result = layer(x, return_memory=return_memory)
        output = result[0] if return_memory else result
        output.sum().backward()
        return result

    if scope == "sequence":
        assert tables(call) == trains  # the gradient alone: documents read and write rows that were gathered
        return
    final = "table" if return_memory else "rows"
    wanted = tables_of_operator(layer, batch, trains, final)
    # With a final table the private copy, and the gradient; else the gradient, if it is wanted.
    assert wanted == (2 if final == "table" else trains)
    assert tables(call) == wanted


@pytest.mark.parametrize("initial_memory", ["frozen", "persistent"])
def test_training_steps_without_a_table(initial_memory):
    """Forward, backward, the optimizer's step and the advance make no array of N rows."""
    layer = FastWeightProductKeyMemory(HIDDEN, scope="batch", initial_memory=initial_memory, **SIZES)
    optimizer, x = torch.optim.AdamW(layer.parameters()), tokens(2)
    before = layer.table.weight.clone()

    def step():
        layer(x).square().sum().backward()
        optimizer.step()
        advance_memory(layer)

    assert tables(step) == 0
    assert torch.equal(layer.table.weight, before) == (initial_memory == "frozen")


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_segments_copy_no_table_besides_the_operators(scope):
    """Gradients reach the first memory through two segments, each an operator's call; of documents as one gradient."""
    layer = FastWeightProductKeyMemory(HIDDEN, scope=scope, **SIZES)
    x = tokens(1 if scope == "batch" else 3)

    def call():
        _, memory = layer(x, return_memory=True)
        layer(x, memory=memory).sum().backward()

    if scope == "sequence":
        assert tables(call) == 3  # a gradient for each segment, and their sum
    else:
        assert tables(call) == sum(tables_of_operator(layer, 1, True, final) for final in ("table", "rows"))


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_a_stream_copies_the_table_only_for_a_batch(scope):
    layer = FastWeightProductKeyMemory(HIDDEN, scope=scope, **SIZES).requires_grad_(False)
    x = tokens(1).detach()

    def call():
        memory = layer.new_memory()
        for begin in range(0, LENGTH, 3):
            layer(x[:, begin : begin + 3], memory=memory)
        return memory

    def operator():
        state = MemoryState(layer.keys, layer.table.weight)
        queries, targets = torch.randn(1, LENGTH, 1, layer.key_dim), torch.randn(1, LENGTH, WIDTH)
        for begin in range(0, LENGTH, 3):
            part = slice(begin, begin + 3)
            fast_weight_memory_step(state, queries[:, part], targets[:, part], **layer.options._asdict())
        return state

    assert tables(call) == (0 if scope == "sequence" else tables(operator))


def test_a_layer_in_bfloat16_casts_the_table_once_each_way():
    """Its memory runs in float32: a cast of the table, and one of its gradient."""
    layer = FastWeightProductKeyMemory(HIDDEN, **SIZES).to(torch.bfloat16)
    x = tokens(1).detach().bfloat16().requires_grad_()

    def call():
        layer(x).float().sum().backward()

    assert tables(call) == 2
    layer.zero_grad()
    assert tables(call, torch.bfloat16) == 3


@pytest.mark.parametrize("kind", ["rows", "left", "inner", "packed"])
def test_gradients_of_tokens_are_as_large_as_the_tokens_once(kind):
    """Not once for each document: what backward makes grows with the tokens, not with tokens times documents."""
    layer = FastWeightProductKeyMemory(HIDDEN, **SIZES)

    def made(documents):
        """How many arrays of at least the values of all tokens a call makes."""
        x = torch.randn(documents, LENGTH, HIDDEN, requires_grad=True)
        given = {}
        if kind in ("left", "inner"):
            given["attention_mask"] = torch.ones(documents, LENGTH, dtype=torch.bool)
            given["attention_mask"][:, 0 if kind == "left" else 5] = False
        if kind == "packed":
            x = x.detach().flatten(0, 1).unsqueeze(0).requires_grad_()
            given["cu_seqlens"] = torch.arange(documents + 1) * LENGTH
        least = documents * LENGTH * min(HIDDEN, WIDTH) * 4

        def train() -> None:
            layer(x, **given).sum().backward()

        return sum(least <= size < SUB_KEYS**2 * WIDTH * 4 for size in allocations_cpu(train))

    assert made(12) < made(6) + 6


class Calls(TorchDispatchMode):
    """Counts the operators that compute something: not those that give a view."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += all(x.alias_info is None for x in function._schema.returns)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name, more",
    [
        ("layer-batch/forward/1x1024", 2),  # promote_types
        ("layer-batch/both/1x1024", 2),
        ("layer/both/1x1024", 8),  # and zeros of no size, the gradient of what lies beside the one document
    ],
)
def test_a_layer_calls_the_operators_of_its_mathematics(name, more):
    counts = count_calls(name)
    assert 0 < counts[registry.PACKAGE] <= counts[registry.COMPOSED] + more


def test_a_layer_that_streams_calls_those_of_its_mathematics_and_of_its_pool():
    """Beside them the output's dtype. In the composed step a state's operator counts for one."""
    counts, layer = count_calls("layer-decode/forward/token"), FastWeightProductKeyMemory(HIDDEN, **SIZES)
    pool, tokens = MemoryPool(layer.keys, layer.table.weight, capacity=None), torch.randn(1, 1, 1, 6)
    how = {"gates": torch.rand(1, 1), "sessions": [pool.open()], **layer.options._asdict()}
    for _ in range(CHUNK + 1):  # now its keys have moved
        with Calls() as calls:
            fast_weight_memory_step(pool, tokens, torch.randn(1, 1, WIDTH), **how)
    assert 0 < counts[registry.PACKAGE] <= counts[registry.COMPOSED] - 1 + calls.count + 1


def count_calls(name):
    """Operators that each provider of a benchmark's row calls."""
    row = next(iter(registry.rows("cpu", name)))
    row = dataclasses.replace(row, configuration=row.configuration.shrunk())
    inputs = row.inputs("cpu")
    counts = {}
    for provider in row.providers():
        own = provider.own(inputs) if row.operation.in_place else {}
        call = prepare(row, provider, {**inputs, **own})
        call()
        with Calls() as calls:
            call()
        counts[provider.name] = calls.count
    return counts
