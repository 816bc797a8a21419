"""The benchmarks: formulas, the check before every timing."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch

import reference
from benchmarks import registry, run
from benchmarks.measure import Shared, measure, prepare, verify
from benchmarks.providers import PACKAGE, Provider, package_layer, package_layer_step
from fwpkm_kernels import (
    MemoryGraph,
    chunk_value_update,
    fast_weight_memory,
    fast_weight_memory_step,
    graphs,
    product_key_lookup,
    product_key_update,
    sparse_value_gather,
    testing,
)
from tests.helpers.graphs import OnGpu, Rerun
from tests.helpers.results import MACHINE, ROWS, shrunk


@pytest.fixture(autouse=True, scope="module")
def tables_are_dropped():
    yield
    registry.table.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_of_rows_are_unique_and_every_operation_is_there(device):
    names = [row.name for row in registry.rows(device)]
    assert len(names) == len(set(names))
    for operation in registry.OPERATIONS:
        for direction in operation.directions:
            assert any(name.startswith(f"{operation.name}/{direction}/") for name in names)
    assert len(registry.rows(device, "lookup/forward")) == sum("lookup/forward" in name for name in names)


@pytest.mark.parametrize("name", ROWS)
def test_every_provider_agrees_with_the_reference(name):
    row = ROWS[name]
    shared = Shared(row, "cpu")
    assert shared.cost.bytes > 0
    assert shared.cost.flops > 0 or row.operation.name == "reset"  # which copies
    providers = row.providers()
    assert providers[0].name == PACKAGE
    assert len(providers) > 1
    for provider in providers:
        verify(provider, shared)


def test_bytes_and_flops_by_hand():
    """One token, one pick of four slots, rows of three float32: each case is small enough to count."""
    c = registry.Configuration("by hand", 1, (), (), chunk=1, sub_keys=2, picks=1, key_width=4, width=3)
    operations = {operation.name: operation for operation in registry.OPERATIONS}

    def cost(name, direction, **changes):
        operation, changed = operations[name], dataclasses.replace(c, **changes)
        cost = operation.cost(changed, direction, operation.make_inputs(changed, "cpu", 0))
        return cost.bytes, cost.flops

    row, access = 3 * 4, 8 + 4  # a table row; a slot with its weight
    keys, query, found = 2 * 2 * 2 * 4, 4 * 4, 4 + 8  # found: a score and a slot
    product = 2 * 2 * 2 * 2  # 2 halves × 2 sub-keys × 2 columns × 2
    assert cost("lookup", "forward") == (query + keys + found, product)
    assert cost("key-step", "forward") == (query + 2 * keys, product + 3 * 4)
    assert cost("key-step", "forward", score="dot") == (query + 2 * keys, product + 2 * 4)
    # half scores (float32) and sub-keys (int32) of the two picks
    assert cost("key-step", "backward") == (2 * query + 3 * keys + 2 * (4 + 4), 9 * 4)
    assert cost("lookup", "backward") == (found + 2 * (query + keys), 7 * 4)
    assert cost("gather", "forward") == (row + access + row, 2 * 3)
    assert cost("gather", "backward") == (row + access + row + 4 * row + 4, 4 * 3)
    assert cost("gather-sparse-grad", "backward") == (row + access + row + row + 4, 4 * 3)
    assert cost("update", "forward") == (8 * row + access + 2 * row, 2 * 3)
    assert cost("update", "backward") == (row + access + 2 * row + 4 + 2 * row, 4 * 3)
    assert cost("update_", "forward") == (2 * row + access + 2 * row, 2 * 3)
    assert cost("reset", "forward") == (2 * row + 4, 0)  # and a flag for each row

    # A sequence of one chunk of one token: the table copied; a row read, written and logged; query, target, output and
    # error; keys in and out. Backward: a row of the log, one of the gradient in and out, the table's gradient.
    read_and_write = 2 * 3 + 2 * 3
    assert cost("sequence", "forward") == (
        2 * 4 * row + 3 * row + query + 3 * row + found + 2 * keys,
        product + read_and_write + 3 * 4,
    )
    assert cost("sequence", "backward") == (
        row + 2 * row + 4 * row + 2 * query + 3 * row + found + 2 * keys,
        8 * 3 + 7 * 4 + 9 * 4,
    )
    # Of two chunks: twice all but the table, and the gradient of the keys. If keys stand still they are read once.
    assert cost("sequence", "forward", tokens=2) == (
        2 * 4 * row + 2 * (3 * row + query + 3 * row + found + 2 * keys),
        2 * (product + read_and_write + 3 * 4),
    )
    assert cost("sequence", "backward", tokens=2) == (
        4 * row + 2 * (row + 2 * row + 2 * query + 3 * row + found + keys) + keys,
        2 * (8 * 3 + 7 * 4 + 9 * 4),
    )
    assert cost("sequence", "forward", tokens=2, key_weight=0.0) == (
        2 * 4 * row + 2 * (3 * row + query + 3 * row + found) + 2 * keys,
        2 * (product + read_and_write),
    )
    # In bfloat16 rows, targets, outputs and queries are half as large; errors and the rows of the gradient are not.
    half, bf16 = 3 * 2, {"dtype": torch.bfloat16}
    assert cost("sequence", "forward", **bf16)[0] == (
        2 * 4 * half + 3 * half + query // 2 + 2 * half + row + found + 2 * keys
    )
    assert cost("sequence", "backward", **bf16)[0] == half + 2 * row + 4 * half + query + 3 * half + found + 2 * keys

    # Steps: no table but the row, read and written, and no log.
    for name in ("step", "prefill"):
        assert cost(name, "forward") == (2 * row + query + 3 * row + 2 * keys, product + read_and_write + 3 * 4)
    assert cost("step", "forward", key_weight=0.0) == (2 * row + query + 3 * row + keys, product + read_and_write)
    # A token of a longer chunk is read, and waits: query, target and prediction are written once more.
    waits = query + 2 * row
    assert cost("decode", "forward", chunk=2) == (row + keys + query + 2 * row + waits, product + 2 * 3)


def test_bytes_and_flops_of_a_layer_by_hand():
    """What the memory takes, and the four projections of width 3 to 4, 3, 1 and back to 3 with their norms."""
    c = registry.Configuration("by hand", 1, (), (), chunk=1, sub_keys=2, picks=1, key_width=4, width=3)
    layer, batch, decode, alone, stream = (
        next(x for x in registry.OPERATIONS if x.name == name)
        for name in ("layer", "layer-batch", "layer-decode", "sequence", "decode")
    )
    elements = (4 + 3 + 1 + 3) * (3 + 1) + 4 * 3
    hidden, weights = 3 * 4, 4 * elements

    def cost(operation, direction, **changes):
        changed = dataclasses.replace(c, **changes)
        return operation.cost(changed, direction, operation.make_inputs(changed, "cpu", 0))

    def sums(*costs):
        return sum(x.bytes for x in costs), sum(x.flops for x in costs)

    forward, backward = cost(alone, "forward"), cost(alone, "backward")
    for one in (layer, batch):
        own = cost(one, "forward")
        assert sums(own) == (forward.bytes + 2 * hidden + weights, forward.flops + 2 * elements)
        assert sums(cost(one, "both")) == (
            own.bytes + backward.bytes + 3 * hidden + 2 * weights,
            own.flops + backward.flops + 4 * elements,
        )
    two = {"tokens": 2, "batch": 2}  # a memory each is two tables, keys and all
    assert cost(layer, "forward", **two).bytes == 2 * (forward.bytes + 2 * hidden) + weights
    assert cost(batch, "forward", **two).bytes < cost(layer, "forward", **two).bytes - 2 * c.table_bytes + 1
    read = cost(stream, "forward", chunk=2)
    assert sums(cost(decode, "forward", chunk=2)) == (read.bytes + 2 * hidden + weights, read.flops + 2 * elements)


def test_rows_that_several_tokens_of_a_chunk_address_count_once():
    """Eight tokens with two picks each, all of four slots that there are: more than four rows a chunk cannot move."""
    c = registry.Configuration("all", 16, (), (), chunk=8, sub_keys=2, picks=2, key_width=4, width=3)
    operation = next(operation for operation in registry.OPERATIONS if operation.name == "prefill")
    inputs = operation.make_inputs(c, "cpu", 0)
    rows = 0
    for part in inputs["queries"][0].split(8):
        rows += len(reference.product_key_lookup(part, inputs["memory"].keys, 2)[1].unique())
    assert 4 <= rows <= 8
    tokens, keys = 16 * (4 * 4 + 3 * 3 * 4), 2 * 2 * 2 * 4
    assert operation.cost(c, "forward", inputs).bytes == 2 * rows * 3 * 4 + tokens + 2 * 2 * keys


def scaled(x, factor):
    """As it is, with gradients that are so many times too large."""
    return x.detach() + factor * (x - x.detach())


def leak(x):
    """0, with a gradient for every element of `x`."""
    return 1e-3 * (x - x.detach()).sum()


def wrong_gather(**inputs):
    out = sparse_value_gather(**inputs)
    out[3] *= 1.001
    return out


def wrong_untouched_row(**inputs):
    out = chunk_value_update(**inputs)
    untouched = torch.ones(len(out), dtype=torch.bool)
    untouched[inputs["slots"]] = False
    out[untouched.nonzero()[0]] += 1e-6
    return out


def wrong_reset(values, slots, state):
    values.copy_(state._initial_values)
    values[slots[0, 0]] += 1e-3


def wrong_sequence_output(**inputs):
    out = fast_weight_memory(**inputs)
    return out._replace(output=torch.cat([out.output[:, :-3], 1.01 * out.output[:, -3:]], dim=1))


def wrong_sequence_values(**inputs):
    out = fast_weight_memory(**inputs)
    untouched = (out.values == inputs["values"]).all(1).nonzero()[0]
    return out._replace(values=out.values.detach().index_fill(0, untouched, 0.0))


def wrong_gradient_of_values(values, **inputs):
    out = fast_weight_memory(values=values, **inputs)
    return out._replace(output=out.output + leak(values))


def wrong_step_that_forgets(memory, **inputs):
    before = memory.values.clone()
    out = fast_weight_memory_step(memory, **inputs)
    row = (memory.values != before).any(1).nonzero()[:1, 0]
    memory.values[row] = before[row]
    return out


def layer_step_that_forgets(layer, memory, **inputs):
    if memory.positions[0] == 8:
        memory.reset()
    return package_layer_step(layer=layer, memory=memory, **inputs)


#: Rows, faults of their provider, and what is said of them; a key step of the first rows is right where it is compared
#: with the reference.
FAULTS = [
    ("lookup/forward/inference", lambda **x: [y + 1e-3 * (not i) for i, y in enumerate(product_key_lookup(**x))], ""),
    (
        "lookup/backward/inference",
        lambda **x: (scaled((found := product_key_lookup(**x))[0], 1.001), found[1]),
        "gradient of",
    ),
    ("gather/forward/inference", wrong_gather, "output"),
    ("gather/backward/inference", lambda values, **x: sparse_value_gather(values, **x) + leak(values), "not addressed"),
    ("update/forward/inference", wrong_untouched_row, "not addressed"),
    ("update/backward/inference", lambda values, **x: chunk_value_update(scaled(values, 1.001), **x), "not addressed"),
    (
        "update_/forward/inference",
        lambda values, **x: values.copy_(chunk_value_update(values, **x, lr=1.001)),
        "output",
    ),
    ("reset/forward/inference", wrong_reset, "output"),
    ("key-step/forward/inference", lambda weight, **x: product_key_update(**x, weight=1.01 * weight), "keys"),
    (
        "key-step/backward/inference",
        lambda keys, queries, **x: product_key_update(keys, queries, **x) + leak(queries),
        "gradient of queries",
    ),
    (
        "key-step/forward/training",
        lambda keys, queries, **x: product_key_update(keys, queries[: len(queries) * 3 // 4], **x),
        "keys",
    ),
    ("sequence/forward/8x512", wrong_sequence_output, "output"),
    ("sequence/forward/8x512", wrong_sequence_values, "not addressed"),
    (
        "sequence/forward/8x512",
        lambda addressing_weight, **x: fast_weight_memory(**x, addressing_weight=1.02 * addressing_weight),
        "keys",
    ),
    *(
        (name, lambda targets, **x: fast_weight_memory(targets=scaled(targets, 1.001), **x), "gradient of targets")
        for name in ("sequence/backward/8x4096", "sequence/both/8x4096")
    ),
    ("sequence/backward/8x4096-bf16", wrong_gradient_of_values, "not addressed"),
    *(
        (name, lambda memory, **x: 1.001 * fast_weight_memory_step(memory, **x), "output")
        for name in ("step/forward/inference", "decode/forward/token")
    ),
    *(
        (name, lambda memory, addressing_weight, **x: fast_weight_memory_step(memory, **x, addressing_weight=0.0), "")
        for name in ("step/forward/inference", "prefill/forward/4k")
    ),
    ("step/forward/inference", wrong_step_that_forgets, ""),
    ("decode/forward/token", wrong_step_that_forgets, ""),
    ("layer/forward/1x1024", lambda **x: 1.001 * package_layer(**x), "output"),
    ("layer/both/1x1024", lambda keys, **x: package_layer(keys=keys, **x) + leak(keys), "gradient of keys"),
    ("layer/forward/8x4096", lambda scope, **x: package_layer(**x, scope="batch"), "output"),
    (
        "layer-batch/forward/8x4096",
        lambda **x: package_layer(**{**x, "g_proj.bias": x["g_proj.bias"] + 0.1}),
        "output",
    ),
    ("layer-decode/forward/token", layer_step_that_forgets, "output"),
]


@pytest.mark.parametrize("name, planted, message", FAULTS)
def test_wrong_numbers_are_refused_and_not_timed(name, planted, message):
    provider = dataclasses.replace(ROWS[name].operation.providers[0], name="planted", run=planted)
    result = measure(ROWS[name], provider, MACHINE, seconds=0.001)
    assert result.status == "wrong", result.message
    assert message in result.message
    assert result.median_us is None
    assert result.repeats == 0
    assert "wrong" in run.report([result])


def test_a_layer_gets_the_gradients_of_the_tensors_that_it_is_given():
    row = ROWS["layer/both/8x4096"]
    inputs = row.inputs("cpu")
    package, composed = (prepare(row, provider, inputs)() for provider in row.providers()[:2])
    for name, x, y in zip(row.wrt, package, composed, strict=True):
        testing.assert_bitwise_equal(x, y) if name == "values" else torch.testing.assert_close(x, y)
        assert (x != 0).any(), name


def late_in_sequences(**inputs):
    out = fast_weight_memory(**inputs)
    return out._replace(output=late(out.output))


def late(output):
    """Right on the few tokens that the reference gets."""
    return output if output.shape[1] < 600 else torch.cat([output[:, :300], 1.01 * output[:, 300:]], dim=1)


@pytest.mark.parametrize(
    "name, planted",
    [
        ("sequence/forward/8x4096", late_in_sequences),
        ("layer-batch/forward/8x4096", lambda **inputs: late(package_layer(**inputs))),
    ],
)
def test_what_is_wrong_past_the_first_tokens_is_refused(name, planted):
    """The reference gets few tokens; all of the first two chunks are compared with the sparse form."""
    row = dataclasses.replace(
        ROWS[name], configuration=dataclasses.replace(ROWS[name].configuration, tokens=1200, chunk=200)
    )
    with pytest.raises(AssertionError, match=f"{name}: planted.*of the timed inputs"):
        verify(Provider("planted", planted), Shared(row, "cpu"))


@pytest.mark.parametrize(
    "name", ["sequence/backward/8x4096", "sequence/backward/1x1024-drop", "key-step/backward/training"]
)
def test_what_stands_for_the_reference_is_the_reference(name):
    """In float64, on all tokens: outputs and gradients."""
    operation, inputs = ROWS[name].operation, testing.as_float64(ROWS[name].inputs("cpu"))
    found, gradients = testing.forward_and_gradients(operation.sparse, inputs, wrt=ROWS[name].wrt)
    exact, exact_gradients = testing.forward_and_gradients(operation.reference, inputs, wrt=ROWS[name].wrt)
    for x, y in zip(found, exact, strict=False):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, exact_gradients[key], rtol=1e-8, atol=1e-8)


def test_rounding_may_decide_a_lookup_once():
    """A stream whose first sample fails is compared once more, with other tokens."""
    row = ROWS["step/forward/inference"]
    shared = Shared(row, "cpu")
    tokens = [shared.few(attempt).inputs["queries"] for attempt in range(2)]
    assert not torch.equal(*tokens)
    seen = []

    def unlucky(memory, **inputs):
        seen.append(inputs["queries"])
        out = fast_weight_memory_step(memory, **inputs)
        return out + 1.0 if len(seen) <= 2 else out  # both chunks of the first sample

    package = row.providers()[0]
    verify(dataclasses.replace(package, run=unlucky), shared)
    assert torch.equal(torch.cat(seen[2:4], dim=1), tokens[1])


class NoReplay(Rerun):
    """A graph of nothing."""

    def __init__(self, function, warm_up):
        super().__init__(function, warm_up)
        self.replay = lambda: None


@pytest.mark.parametrize(
    "name, capture",
    [
        ("step/forward/inference", Rerun),
        ("prefill/forward/4k", Rerun),
        ("decode/forward/token", Rerun),
        ("prefill/forward/4k", NoReplay),
        ("decode/forward/token", NoReplay),
    ],
)
def test_replayed_graphs_are_compared_with_the_reference(name, capture, monkeypatch):
    """On a CPU, all of the provider but the capture."""

    def make_graph(state, *tokens, **options):
        table = state.values
        state._values = table.as_subclass(OnGpu)
        try:
            return MemoryGraph(state, *tokens, **options)
        finally:
            state._values = table

    row = ROWS[name]
    provider = next(p for p in row.operation.providers if p.name == "fwpkm_kernels-graph")
    assert provider not in row.providers()
    assert provider in dataclasses.replace(row, device="cuda").providers()
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr("benchmarks.providers.fwpkm.MemoryGraph", make_graph)
    inputs = row.inputs("cpu")
    refused = pytest.raises(AssertionError, match=f"{name}: {provider.name}")
    with refused if capture is NoReplay else contextlib.nullcontext():
        verify(provider, Shared(row, "cpu"))

    own = provider.own(inputs)
    graph = own["memory"].graph
    replays: list[str] = []
    for lane in ("_read", "_close"):
        monkeypatch.setattr(
            graph, lane, getattr(graph, lane) and SimpleNamespace(replay=lambda x=lane: replays.append(x))
        )
    provider.replay(**{**inputs, **own})()
    assert replays == (["_read"] if name.startswith("decode") else ["_close"])


def test_compiled_providers_agree_with_the_reference(monkeypatch):
    """Traced, not compiled: that takes a C++ compiler, and minutes."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend="eager", **options))
    names = []
    for row in registry.rows("cuda"):
        for provider in row.providers():
            if provider.name == "torch.compile":
                small = shrunk(row)
                fresh = registry.eager.compile_lazily(getattr(provider.run, "__wrapped__", provider.run))
                if row.operation.name != "step":
                    provider = dataclasses.replace(provider, run=fresh)
                verify(provider, Shared(small, "cpu"))
                names.append(f"{row.operation.name}/{row.direction}")
    torch.compiler.reset()
    assert set(names) >= {"lookup/forward", "gather/forward", "update_/forward", "key-step/forward", "step/forward"}


def test_forward_and_backward_in_one_call():
    """What is timed gives the gradients of the reference, each time it is called."""
    row = ROWS["sequence/both/8x4096"]
    inputs = row.inputs("cpu")
    call = prepare(row, row.providers()[0], inputs)
    options = {"wrt": row.wrt, "cotangent": row.cotangent(inputs)}
    _, wanted = testing.forward_and_gradients(fast_weight_memory, inputs, **options)
    for _ in range(2):
        for gradient, name in zip(call(), row.wrt, strict=True):
            testing.assert_bitwise_equal(gradient, wanted[name])
    cost = {way: ROWS[f"sequence/{way}/8x4096"].cost(inputs) for way in ("forward", "backward", "both")}
    assert cost["both"].bytes == cost["forward"].bytes + cost["backward"].bytes
    assert cost["both"].flops == cost["forward"].flops + cost["backward"].flops
