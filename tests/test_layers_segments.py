"""Segments of a layer in training: of any lengths they are one sequence, in values and gradients."""

import pytest
import torch
from torch import Tensor

from fwpkm_kernels.layers import FastWeightProductKeyMemory, LayerMemory
from tests.helpers.varlen import tables_of

WIDTH = 7
f64 = torch.float64


def make_layer(**options) -> FastWeightProductKeyMemory:
    torch.manual_seed(0)
    sizes = {"num_keys": 6, "heads": 2, "top_k": 2, "key_dim": 6, "value_dim": 5, "chunk_size": 4, "lookahead": 2}
    return FastWeightProductKeyMemory(WIDTH, **sizes | {"dtype": f64, "memory_dtype": f64} | options)


def draw(*size: int) -> Tensor:
    return torch.randn(*size, WIDTH, generator=torch.Generator().manual_seed(1), dtype=f64)


def in_segments(layer, parts) -> tuple[list[Tensor], LayerMemory]:
    """Outputs and the last memory of calls, each of hidden states and what else it is given."""
    memory, outputs = None, []
    for x, how in parts:
        output, memory = layer(x, memory=memory, return_memory=True, **how)
        outputs.append(output)
    return outputs, memory


@pytest.mark.parametrize("cuts", [[3, 1, 6, 0, 3], [4, 9], [1] * 13], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"scope": "sequence", "query_conv": 3},
        {"scope": "batch", "query_conv": 3},
        {"scope": "sequence", "key_gradient": "all", "write_gate": False},
        {"scope": "batch", "key_gradient": "all"},
        {"scope": "sequence", "initial_memory": "frozen", "addressing_weight": 0.0},
    ],
    ids=str,
)
def test_rows_in_segments(options, cuts):
    layer = make_layer(**options)
    x = draw(3, 13).requires_grad_()

    def run(cuts) -> list[Tensor]:
        outputs, memory = in_segments(layer, [(part, {}) for part in x.split(cuts, dim=1)])
        output = torch.cat(outputs, dim=1)
        values = memory.values
        if layer.scope == "sequence":
            values = tables_of(values, layer.table.weight, len(x))
        loss = output.square().sum() + values.sum() + memory.keys.square().sum()
        return [output, memory.keys, values, *torch.autograd.grad(loss, [x, *layer.parameters()])]

    for ours, theirs in zip(run(cuts), run([13]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


#: How many tokens each document has in each of three segments.
LENGTHS = [(5, 0, 9), (4, 6, 1), (0, 3, 6)]


@pytest.mark.parametrize("arrangements", [("packed", "left", "packed"), ("inside", "packed", "left")], ids=str)
def test_documents_in_segments(arrangements):
    """Packed or padded, each document goes on where its own last segment ended."""
    layer = make_layer(query_conv=3)
    documents = [x.clone().requires_grad_() for x in draw(3, 20).unbind()]
    documents = [x[: sum(row[i] for row in LENGTHS)] for i, x in enumerate(documents)]
    parts = list(zip(*(x.split([row[i] for row in LENGTHS]) for i, x in enumerate(documents)), strict=True))
    outputs, memory, taken = [[] for _ in documents], None, torch.Generator().manual_seed(3)
    for segment, arrangement in zip(parts, arrangements, strict=True):
        lengths = [len(x) for x in segment]
        if arrangement == "packed":
            bounds = torch.tensor([0, *lengths]).cumsum(0)
            output, memory = layer(torch.cat(segment)[None], cu_seqlens=bounds, memory=memory, return_memory=True)
            found = output[0].split(lengths)
        else:
            size = max(lengths) + 2
            mask = torch.zeros(3, size, dtype=torch.bool)
            for row, count in enumerate(lengths):
                places = (
                    torch.randperm(size, generator=taken) if arrangement == "inside" else torch.arange(size).flip(0)
                )
                mask[row, places[:count]] = True
            padded = torch.full((3, size, WIDTH), torch.nan, dtype=f64).index_put((mask,), torch.cat(segment))
            output, memory = layer(padded, attention_mask=mask, memory=memory, return_memory=True)
            found = output[mask].split(lengths)
        for all_of, one in zip(outputs, found, strict=True):
            all_of.append(one)
    joined = [torch.cat(x) for x in outputs]
    expected = [layer(x[None])[0] for x in documents]
    assert memory.carry.position.tolist() == [len(x) for x in documents]
    wanted = [*documents, *layer.parameters()]
    gradients = (torch.autograd.grad(sum(x.square().sum() for x in y), wanted) for y in (joined, expected))
    for ours, theirs in zip([*joined, *next(gradients)], [*expected, *next(gradients)], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_compiled_segments_with_padding():
    """There the number of tokens is data, and padding follows the documents; with a carry and its gradients too."""
    layer, x = make_layer(), draw(2, 14).requires_grad_()
    mask = torch.ones(2, 14)
    mask[0, :4] = mask[1, 9:] = 0  # the first document begins with tokens that wait for a chunk

    def call(x: Tensor, mask: Tensor) -> list[Tensor]:
        first, memory = layer(x[:, :7], attention_mask=mask[:, :7], return_memory=True)
        second, end = layer(x[:, 7:], attention_mask=mask[:, 7:], memory=memory, return_memory=True)
        return [torch.cat((first, second), dim=1), memory.slots, end.slots, end.weights, end.carry.position, end.keys]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, compiled):
        output, *others = function(x, mask)
        results.append([output, *others, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_detach_ends_gradients_and_no_carry_begins_a_chunk():
    layer, x = make_layer(), draw(2, 9).requires_grad_()
    _, memory = layer(x[:, :6], return_memory=True)
    detached = layer(x[:, 6:], memory=memory.detach())
    assert (torch.autograd.grad(detached.square().sum(), x)[0][:, :6] == 0).all()
    begins = layer(x[:, 6:], memory=memory._replace(carry=None))
    torch.testing.assert_close(begins[:, :2], detached[:, :2])  # both read the same memory until a chunk is full
    assert not torch.allclose(begins[:, 2], detached[:, 2])
    assert make_layer(boundary="drop")(x, return_memory=True)[1].carry is None


def of_one_row(carry):
    return carry._replace(queries=carry.queries[:1])


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize(
    "change, error, message",
    [
        (of_one_row, ValueError, r"`memory.carry.queries` \[.*\] must be \[2, "),
        (lambda c: c._replace(gates=c.gates[:, 1:]), ValueError, r"`memory.carry.gates` \[.*\] must be \[2, "),
        (lambda c: c._replace(mask=torch.ones(2, 9)), ValueError, r"`memory.carry.mask` \[.*\] must be \[2, "),
        (lambda c: c._replace(targets=None), TypeError, "`memory.carry.targets` must be a torch.Tensor"),
        (lambda c: c._replace(queries=c.queries.float()), TypeError, "`memory.carry.queries` .* the queries that come"),
        (
            lambda c: c._replace(targets=c.targets.to("meta")),
            ValueError,
            "`memory.carry.targets` must be on the device",
        ),
        (lambda c: c._replace(position=-1 - c.position), ValueError, "`memory.carry.position` must be at least 0"),
        (lambda c: c._replace(position="3"), TypeError, "`memory.carry.position` must be a"),
        (tuple, TypeError, "`memory.carry` must be a (Documents)?Carry for this layer, got tuple"),
    ],
)
def test_a_carry_that_does_not_fit_is_named(scope, change, error, message):
    """As the layer's user knows it, whatever finds it."""
    layer, x = make_layer(scope=scope), draw(2, 9)
    _, memory = layer(x, return_memory=True)
    with pytest.raises(error, match=message):
        layer(x, memory=memory._replace(carry=change(memory.carry)))


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_a_carry_is_of_the_autocast_it_was_left_under(scope):
    layer, x = make_layer(scope=scope, dtype=torch.float32, memory_dtype=torch.float32), draw(2, 9).float()
    with torch.autocast("cpu", torch.bfloat16):
        _, memory = layer(x, return_memory=True)
        layer(x, memory=memory)
    with pytest.raises(TypeError, match="^`memory.carry.queries` .*, got torch.bfloat16: .* under the same autocast"):
        layer(x, memory=memory)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_a_layer_that_drops_takes_no_carry(scope):
    _, memory = make_layer(scope=scope)(draw(2, 9), return_memory=True)
    layer = make_layer(scope=scope, boundary="drop")
    with pytest.raises(ValueError, match='`memory.carry` must be None for a layer with `boundary`="drop"'):
        layer(draw(2, 9), memory=memory)
    layer(draw(2, 9), memory=memory._replace(carry=None))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden_states": 3}, TypeError, "`memory.hidden_states` must be a torch.Tensor, got int"),
        (
            {"hidden_states": torch.zeros(2, 2, WIDTH, dtype=torch.int64)},
            TypeError,
            "`memory.hidden_states` must be fl",
        ),
        (
            {"hidden_states": torch.zeros(2, 1, WIDTH, dtype=f64)},
            ValueError,
            r"`memory.hidden_states` must be \[2, 2, 7",
        ),
        (
            {"hidden_states": torch.zeros(2, 2, WIDTH)},
            TypeError,
            "`memory.hidden_states` and `hidden_states` must both",
        ),
        (
            {"hidden_states": torch.zeros(2, 2, WIDTH, dtype=f64, device="meta")},
            ValueError,
            "`memory.hidden_states` .* d",
        ),
        ({"keys": torch.zeros(2, 2, 2, 6, 3)}, TypeError, "`memory.keys` and `hidden_states` must both be float64"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change, error, message):
    layer, x = make_layer(query_conv=3), draw(2, 9)
    _, memory = layer(x, return_memory=True)
    with pytest.raises(error, match=message):
        layer(x, memory=memory._replace(**change))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"document": 2}, ValueError, r"`memory.values.document` must lie in \[0, 2\)"),
        ({"slot": 40}, ValueError, r"`memory.values.slot` must lie in \[-1, 36\)"),
        ({"value": None}, TypeError, "`memory.values.value` must be a torch.Tensor, got NoneType"),
        ({"value": torch.zeros(1, 5, dtype=f64)}, ValueError, "`memory.values.value` .* must have a row for each of"),
        ({"decay": torch.ones(3, dtype=f64)}, ValueError, r"`memory.values.decay` must be \[2\], got \[3\]"),
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_named(change, error, message):
    """Those of another number of documents, for example."""
    layer, x = make_layer(), draw(2, 9)
    _, memory = layer(x, return_memory=True)
    rows = memory.values
    change = {name: torch.full_like(rows.slot, by) if isinstance(by, int) else by for name, by in change.items()}
    with pytest.raises(error, match=message):
        layer(x, memory=memory._replace(values=rows._replace(**change)))


def test_a_carry_of_the_other_scope_is_refused():
    of_batch, of_documents = make_layer(scope="batch"), make_layer()
    x = draw(2, 9)
    carries = [layer(x, return_memory=True)[1].carry for layer in (of_batch, of_documents)]
    for layer, carry in ((of_batch, carries[1]), (of_documents, carries[0])):
        _, memory = layer(x, return_memory=True)
        with pytest.raises(
            TypeError, match="`memory.carry` must be a (Documents)?Carry for this layer, got (Documents)?Carry"
        ):
            layer(x, memory=memory._replace(carry=carry))
