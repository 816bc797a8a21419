"""The benchmarks: formulas, the check before every timing."""

import dataclasses

import pytest
import torch

from benchmarks import registry, run
from benchmarks.measure import Expected, Machine, measure, verify
from fwpkm_kernels import chunk_value_update, product_key_lookup, sparse_value_gather

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
            assert any(name.startswith(f"{operation.name}/{direction}/") for name in names)
    assert len(registry.rows(device, "lookup/forward")) == sum("lookup/forward" in name for name in names)


@pytest.mark.parametrize("name", ROWS)
def test_every_provider_agrees_with_the_reference(name):
    row = ROWS[name]
    inputs = row.inputs("cpu")
    cost = row.cost(inputs)
    assert cost.bytes > 0
    assert cost.flops > 0
    expected = Expected(row, inputs)
    providers = row.providers()
    assert providers[0].name == registry.PACKAGE
    assert len(providers) > 1
    for provider in providers:
        verify(row, provider, inputs, expected)


def test_bytes_and_flops_by_hand():
    """One token, one pick of four slots, rows of three float32: each case is small enough to count."""
    c = registry.Configuration("by hand", 1, (), (), sub_keys=2, picks=1, key_width=4, width=3)
    operations = {operation.name: operation for operation in registry.OPERATIONS}

    def cost(name, direction):
        operation = operations[name]
        cost = operation.cost(c, direction, operation.make_inputs(c, "cpu", 0))
        return cost.bytes, cost.flops

    row, access = 3 * 4, 8 + 4  # a table row; a slot with its weight
    keys, query, found = 2 * 2 * 2 * 4, 4 * 4, 4 + 8  # found: a score and a slot
    assert cost("lookup", "forward") == (query + keys + found, 2 * 2 * 2 * 2)  # 2 halves × 2 sub-keys × 2 columns × 2
    assert cost("lookup", "backward") == (found + 2 * (query + keys), 7 * 4)
    assert cost("gather", "forward") == (row + access + row, 2 * 3)
    assert cost("gather", "backward") == (row + access + row + 4 * row + 4, 4 * 3)
    assert cost("gather-sparse-grad", "backward") == (row + access + row + row + 4, 4 * 3)
    assert cost("update", "forward") == (8 * row + access + 2 * row, 2 * 3)
    assert cost("update", "backward") == (row + access + 2 * row + 4 + 2 * row, 4 * 3)
    assert cost("update_", "forward") == (2 * row + access + 2 * row, 2 * 3)


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
    ],
)
def test_wrong_numbers_are_refused_and_not_timed(name, planted):
    result = measure(ROWS[name], registry.Provider("planted", planted), MACHINE, seconds=0.001)
    assert result.status == "wrong"
    assert result.message
    assert result.median_us is None
    assert result.repeats == 0
    assert "wrong" in run.report([result])


def test_a_provider_that_raises_is_recorded():
    def broken(**inputs):
        raise RuntimeError("out of order")

    result = measure(ROWS["gather/forward/inference"], registry.Provider("broken", broken), MACHINE, seconds=0.001)
    assert result.status == "error"
    assert result.message == "RuntimeError: out of order"
    assert result.median_us is None
