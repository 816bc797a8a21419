"""The benchmarks: formulas, the check before every timing."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch

import reference
from benchmarks import registry, run
from benchmarks.measure import Expected, Machine, measure, prepare, verify
from benchmarks.providers import package_layer, package_layer_step
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

MACHINE = Machine("cpu", "test", bandwidth=1e10, matmul=1e11, commit=None, versions={"torch": torch.__version__})


def shrunk(row: registry.Row) -> registry.Row:
    return dataclasses.replace(row, configuration=row.configuration.shrunk())


# The same row can be there for CPUs and for GPUs.
ROWS = {row.name: shrunk(row) for row in registry.rows()}


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
            if (device, direction) == ("cpu", "both"):
                continue  # of which the figures of a CPU tell
            assert any(name.startswith(f"{operation.name}/{direction}/") for name in names)
    assert len(registry.rows(device, "lookup/forward")) == sum("lookup/forward" in name for name in names)


@pytest.mark.parametrize("name", ROWS)
def test_every_provider_agrees_with_the_reference(name):
    row = ROWS[name]
    inputs = row.inputs("cpu")
    cost = row.cost(inputs)
    assert cost.bytes > 0
    assert cost.flops > 0 or row.operation.name == "reset"  # which copies
    expected = Expected(row, inputs)
    providers = row.providers()
    assert providers[0].name == registry.PACKAGE
    assert len(providers) > 1
    for provider in providers:
        verify(row, provider, inputs, expected)


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


def wrong_lookup(**inputs):
    scores, slots = product_key_lookup(**inputs)
    return scores + 1e-3, slots


def wrong_lookup_gradient(**inputs):
    scores, slots = product_key_lookup(**inputs)
    return scores.detach() + 1.001 * (scores - scores.detach()), slots


def wrong_gather(**inputs):
    out = sparse_value_gather(**inputs)
    out[3] *= 1.001
    return out


def wrong_gather_gradient(values, slots, weights):
    return sparse_value_gather(values, slots, weights) + 1e-3 * (values - values.detach()).sum()


def wrong_untouched_row(**inputs):
    out = chunk_value_update(**inputs)
    untouched = torch.ones(len(out), dtype=torch.bool)
    untouched[inputs["slots"]] = False
    out[untouched.nonzero()[0]] += 1e-6
    return out


def wrong_reset(values, slots, **own):
    values.copy_(own["state"]._initial_values)
    values[slots[0, 0]] += 1e-3


def wrong_write_(values, **inputs):
    values.copy_(chunk_value_update(values, **inputs, lr=1.001))


@pytest.mark.parametrize(
    "name, planted",
    [
        ("lookup/forward/inference", wrong_lookup),
        ("lookup/backward/inference", wrong_lookup_gradient),
        ("gather/forward/inference", wrong_gather),
        ("gather/backward/inference", wrong_gather_gradient),
        ("update/forward/inference", wrong_untouched_row),
        ("update_/forward/inference", wrong_write_),
        ("reset/forward/inference", wrong_reset),
    ],
)
def test_wrong_numbers_are_refused_and_not_timed(name, planted):
    own = ROWS[name].operation.providers[0].own
    result = measure(ROWS[name], registry.Provider("planted", planted, own=own), MACHINE, seconds=0.001)
    assert result.status == "wrong"
    assert result.message
    assert result.median_us is None
    assert result.repeats == 0
    assert "wrong" in run.report([result])


def wrong_key_step(weight, **inputs):
    return product_key_update(**inputs, weight=1.01 * weight)


def wrong_key_step_gradient(keys, queries, **options):
    return product_key_update(keys, queries, **options) + 1e-3 * (queries - queries.detach()).sum()


def wrong_key_step_of_late_rows(keys, queries, **options):
    """Right in the first rows, which are those that the reference gets."""
    kept = len(queries) * 3 // 4
    return product_key_update(keys, queries[:kept], **options)


def wrong_sequence_output(**inputs):
    out = fast_weight_memory(**inputs)
    return out._replace(output=torch.cat([out.output[:, :-3], 1.01 * out.output[:, -3:]], dim=1))


def wrong_sequence_values(**inputs):
    out = fast_weight_memory(**inputs)
    untouched = (out.values == inputs["values"]).all(1).nonzero()[0]
    return out._replace(values=out.values.detach().index_fill(0, untouched, 0.0))


def wrong_sequence_keys(addressing_weight, **inputs):
    return fast_weight_memory(**inputs, addressing_weight=1.02 * addressing_weight)


def wrong_sequence_gradient(targets, **inputs):
    return fast_weight_memory(targets=targets.detach() + 1.001 * (targets - targets.detach()), **inputs)


def wrong_gradient_of_values(values, **inputs):
    out = fast_weight_memory(values=values, **inputs)
    leak = 1e-3 * (values - values.detach()).sum()
    return out._replace(output=out.output + leak)


def wrong_step_output(memory, **inputs):
    out = fast_weight_memory_step(memory, **inputs)
    return 1.001 * out


def wrong_step_without_keys(memory, addressing_weight, **inputs):
    return fast_weight_memory_step(memory, addressing_weight=0.0, **inputs)


def wrong_step_that_forgets(memory, **inputs):
    before = memory.values.clone()
    out = fast_weight_memory_step(memory, **inputs)
    row = (memory.values != before).any(1).nonzero()[:1, 0]
    memory.values[row] = before[row]
    return out


@pytest.mark.parametrize(
    "name, planted",
    [
        ("key-step/forward/inference", wrong_key_step),
        ("key-step/backward/inference", wrong_key_step_gradient),
        ("key-step/forward/training", wrong_key_step_of_late_rows),
        ("sequence/forward/8x512", wrong_sequence_output),
        ("sequence/forward/8x512", wrong_sequence_values),
        ("sequence/forward/8x512", wrong_sequence_keys),
        ("sequence/backward/8x4096", wrong_sequence_gradient),
        ("sequence/both/8x4096", wrong_sequence_gradient),
        ("sequence/backward/8x4096-bf16", wrong_gradient_of_values),
        ("step/forward/inference", wrong_step_output),
        ("step/forward/inference", wrong_step_without_keys),
        ("step/forward/inference", wrong_step_that_forgets),
        ("prefill/forward/4k", wrong_step_without_keys),
        ("decode/forward/token", wrong_step_output),
        ("decode/forward/token", wrong_step_that_forgets),
    ],
)
def test_wrong_memories_are_refused(name, planted):
    row = ROWS[name]
    own = row.providers()[0].own
    inputs = row.inputs("cpu")
    with pytest.raises(AssertionError, match=f"{name}: planted"):
        verify(row, registry.Provider("planted", planted, own=own), inputs, Expected(row, inputs))


def wrong_layer_output(**inputs):
    return 1.001 * package_layer(**inputs)


def wrong_layer_gradient_of_keys(keys, **inputs):
    return package_layer(keys=keys, **inputs) + 1e-3 * (keys - keys.detach()).sum()


def layer_of_one_memory(scope, **inputs):
    return package_layer(**inputs, scope="batch")


def layer_without_gates(**inputs):
    return package_layer(**{**inputs, "g_proj.bias": inputs["g_proj.bias"] + 0.1})


def wrong_late_tokens(hidden_states, **inputs):
    """Right on the few tokens that the reference gets."""
    output = package_layer(hidden_states=hidden_states, **inputs)
    return output if output.shape[1] < 600 else torch.cat([output[:, :300], 1.01 * output[:, 300:]], dim=1)


def layer_step_that_forgets(layer, memory, **inputs):
    if memory.positions[0] == 8:
        memory.reset()
    return package_layer_step(layer=layer, memory=memory, **inputs)


@pytest.mark.parametrize(
    "name, planted, message",
    [
        ("layer/forward/1x1024", wrong_layer_output, "output"),
        ("layer/both/1x1024", wrong_layer_gradient_of_keys, "gradient of keys"),
        ("layer/forward/8x4096", layer_of_one_memory, "output"),
        ("layer-batch/forward/8x4096", layer_without_gates, "output"),
        ("layer-batch/forward/8x4096", wrong_late_tokens, "of the timed inputs"),
        ("layer-decode/forward/token", layer_step_that_forgets, "output"),
    ],
)
def test_wrong_layers_are_refused(name, planted, message):
    row = ROWS[name]
    if planted is wrong_late_tokens:
        row = dataclasses.replace(row, configuration=dataclasses.replace(row.configuration, tokens=1200, chunk=200))
    inputs = row.inputs("cpu")
    own = row.providers()[0].own
    with pytest.raises(AssertionError, match=f"{name}: planted.*{message}"):
        verify(row, registry.Provider("planted", planted, own=own), inputs, Expected(row, inputs))


def test_a_layer_gets_the_gradients_of_the_tensors_that_it_is_given():
    row = ROWS["layer/both/8x4096"]
    inputs = row.inputs("cpu")
    package, composed = (prepare(row, provider, inputs)() for provider in row.providers()[:2])
    for name, x, y in zip(row.wrt, package, composed, strict=True):
        testing.assert_bitwise_equal(x, y) if name == "values" else torch.testing.assert_close(x, y)
        assert (x != 0).any(), name


def test_what_is_wrong_past_the_first_tokens_is_refused():
    """The reference gets few tokens; all of the first two chunks are compared with the sparse form."""
    row = ROWS["sequence/forward/8x4096"]
    c = dataclasses.replace(row.configuration, tokens=1200, chunk=200)
    row = dataclasses.replace(row, configuration=c)
    inputs = row.inputs("cpu")
    length = inputs["queries"].shape[1]

    def wrong(**inputs):
        out = fast_weight_memory(**inputs)
        if out.output.shape[1] == length:  # not the few tokens
            out = out._replace(output=torch.cat([out.output[:, :300], 1.01 * out.output[:, 300:]], dim=1))
        return out

    with pytest.raises(AssertionError, match="of the timed inputs"):
        verify(row, registry.Provider("planted", wrong), inputs, Expected(row, inputs))


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
    inputs = row.inputs("cpu")
    expected = Expected(row, inputs)
    tokens = [expected.short(attempt)[0]["queries"] for attempt in range(2)]
    assert not torch.equal(*tokens)
    seen = []

    def unlucky(memory, **inputs):
        seen.append(inputs["queries"])
        out = fast_weight_memory_step(memory, **inputs)
        return out + 1.0 if len(seen) <= 2 else out  # both chunks of the first sample

    package = row.providers()[0]
    verify(row, dataclasses.replace(package, run=unlucky), inputs, expected)
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
    monkeypatch.setattr(registry.providers.fwpkm, "MemoryGraph", make_graph)
    inputs = row.inputs("cpu")
    refused = pytest.raises(AssertionError, match=f"{name}: {provider.name}")
    with refused if capture is NoReplay else contextlib.nullcontext():
        verify(row, provider, inputs, Expected(row, inputs))

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
                inputs = small.inputs("cpu")
                fresh = registry.providers.compile_lazily(getattr(provider.run, "__wrapped__", provider.run))
                if row.operation.name != "step":
                    provider = dataclasses.replace(provider, run=fresh)
                verify(small, provider, inputs, Expected(small, inputs))
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


def test_a_provider_that_raises_is_recorded():
    def broken(**inputs):
        raise RuntimeError("out of order")

    result = measure(ROWS["gather/forward/inference"], registry.Provider("broken", broken), MACHINE, seconds=0.001)
    assert result.status == "error"
    assert result.message == "RuntimeError: out of order"
    assert result.median_us is None
