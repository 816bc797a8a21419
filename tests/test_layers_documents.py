"""A memory for each document: packed, padded on any side and separate mean the same; nothing leaks across a border."""

import itertools

import pytest
import torch
from torch import Tensor

from fwpkm_kernels import _checks as checks
from fwpkm_kernels.documents import make_documents
from fwpkm_kernels.layers import FastWeightProductKeyMemory, LayerMemory
from fwpkm_kernels.layers.convolution import convolve
from fwpkm_kernels.layers.packed import memory_of_documents
from fwpkm_kernels.options import Options
from tests.helpers.varlen import tables_of

WIDTH, CHUNK = 7, 4
#: Lengths around a chunk's: empty, shorter, full, one more, several.
LENGTHS = (CHUNK - 1, 0, CHUNK, CHUNK + 1, 3 * CHUNK + 2)


def make_layer(scope: str = "sequence", dtype=torch.float64, **options) -> FastWeightProductKeyMemory:
    torch.manual_seed(0)
    options = {"num_keys": 6, "heads": 2, "top_k": 3, "key_dim": 6, "value_dim": 5, "chunk_size": CHUNK} | options
    return FastWeightProductKeyMemory(WIDTH, scope=scope, dtype=dtype, memory_dtype=dtype, **options)


def make_documents_of(lengths, seed=1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, n, WIDTH, generator=generator, dtype=torch.float64) for n in lengths]


def separate(layer, documents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Each document by itself: outputs, and gradients of inputs and parameters of the sum of their squares."""
    inputs = [x.clone().requires_grad_() for x in documents]
    outputs = [layer(x) for x in inputs]
    total = sum(x.square().sum() for x in outputs)
    return outputs, list(torch.autograd.grad(total, [*inputs, *layer.parameters()]))


def pad(documents: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of one length in which NaN stands at padding, and the mask."""
    length = max(x.shape[1] for x in documents) + 3
    mask = torch.zeros(len(documents), length, dtype=torch.bool)
    generator = torch.Generator().manual_seed(2)
    for row, x in enumerate(documents):
        count = x.shape[1]
        where = {"left": slice(length - count, length), "right": slice(0, count)}.get(side)
        mask[row, torch.randperm(length, generator=generator)[:count] if where is None else where] = True
    padded = torch.full((len(documents), length, WIDTH), torch.nan, dtype=torch.float64)
    padded[mask] = torch.cat(documents, dim=1)[0]
    return padded, mask


def assert_same(actual, expected) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


OPTIONS = [
    {},
    {"query_conv": 3, "write_gate": False},
    {"boundary": "drop", "lookahead": 2, "query_conv": 1, "weight_decay": 0.1, "clip": 0.05},
    {"lookahead": 0, "query_conv": 6, "step": "normalized", "gate": False},
    {"lookahead": CHUNK, "input_norm": False, "weighting": "silu", "query_norm": "l2"},
    {"key_gradient": "all", "score": "dot"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "defaults")
def test_packed_padded_and_separate_are_the_same(options):
    layer, documents = make_layer(**options), make_documents_of(LENGTHS)
    outputs, gradients = separate(layer, documents)
    count = len(documents)

    packed = torch.cat(documents, dim=1).requires_grad_()
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    output = layer(packed, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens)
    assert_same(output.split(LENGTHS, dim=1), outputs)
    found = torch.autograd.grad(output.square().sum(), [packed, *layer.parameters()])
    assert_same([*found[0].split(LENGTHS, dim=1), *found[1:]], gradients)

    for side in ("left", "right", "inside"):
        padded, mask = pad(documents, side)
        padded.requires_grad_()
        output = layer(padded, attention_mask=mask.long())
        assert_same(output[mask].split(LENGTHS), [x[0] for x in outputs])
        assert (output[~mask] == 0).all()
        found = torch.autograd.grad(output.square().sum(), [padded, *layer.parameters()])
        assert_same([*found[0][mask].split(LENGTHS), *found[1:]], [x[0] for x in gradients[:count]] + gradients[count:])
        assert (found[0][~mask] == 0).all()


def test_padding_within_packed_documents():
    """Mask and cu_seqlens together: each takes away what it says."""
    layer, documents = make_layer(query_conv=3), make_documents_of((5, 9))
    outputs, _ = separate(layer, documents)
    padded, mask = pad(documents, "inside")
    length = padded.shape[1]
    cu_seqlens = torch.tensor([0, length, 2 * length])
    packed, mask = padded.view(1, -1, WIDTH), mask.view(1, -1)
    output = layer(packed, attention_mask=mask, cu_seqlens=cu_seqlens)
    assert_same([output[mask]], [torch.cat(outputs, dim=1)[0]])


def test_a_document_does_not_depend_on_the_others(place):
    """Bit for bit, gradients too: whatever stands in another document, and in whatever order they come."""
    lengths, others = (CHUNK + 1, CHUNK, 0, CHUNK - 2), (CHUNK + 1, CHUNK - 1)
    generator = torch.Generator().manual_seed(4)

    def draw(*size):
        return torch.randn(size, generator=generator).to(place.device)

    keys, values = draw(1, 2, 4, 3).requires_grad_(), draw(16, 5).requires_grad_()
    tokens = [(draw(1, n, 1, 6), draw(1, n, 5), draw(1, n).sigmoid()) for n in lengths]
    strangers = [(draw(1, n, 1, 6), draw(1, n, 5), draw(1, n).sigmoid()) for n in others]

    def run(documents):
        """The outputs of each, and the gradients of its inputs."""
        sizes = [x[1].shape[1] for x in documents]
        packed = [torch.cat(column, dim=1).requires_grad_() for column in zip(*documents, strict=True)]
        cu_seqlens = torch.tensor([0, *itertools.accumulate(sizes)])
        layout = make_documents(packed[1], None, cu_seqlens, None)
        options = Options(chunk_size=CHUNK, top_k=2, backend=place.backend)
        q, y, g = packed
        output = memory_of_documents(q, y, keys, values, layout, gates=g, options=options)[0].output
        found = [output, *torch.autograd.grad(output.square().sum(), packed)]
        return list(zip(*(x.split(sizes, dim=1) for x in found), strict=True))

    together = run(tokens)
    mixed = run([tokens[3], strangers[0], tokens[1], tokens[0], strangers[1], tokens[2]])
    for ours, theirs in zip(together, [mixed[3], mixed[2], mixed[5], mixed[0]], strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(x, y)


def test_memories_of_documents_chain_over_segments():
    """A segment of whole chunks that goes on from a LayerMemory with lookahead 0 is the whole; gradients reach back."""
    layer, documents = make_layer(query_conv=3, lookahead=0), make_documents_of((8, 8))
    whole = torch.cat(documents).requires_grad_()
    expected, memory = layer(whole, return_memory=True)
    gradients = torch.autograd.grad(expected.square().sum(), [whole, *layer.parameters()])
    assert memory.keys.shape == (2, 2, 2, 6, 3)
    assert memory.values.value.shape == (2 * 36, 5)  # so small tables have fewer rows than tokens can address

    first, state = layer(whole[:, :4], return_memory=True)
    second, end = layer(whole[:, 4:], memory=state, return_memory=True)
    tables = [tables_of(x.values, layer.table.weight, 2) for x in (end, memory)]
    assert_same([first, second, *tables[:1]], [*expected.split(4, dim=1), *tables[1:]])
    assert_same([end.keys, end.hidden_states], [memory.keys, memory.hidden_states])
    loss = first.square().sum() + second.square().sum()
    assert_same(torch.autograd.grad(loss, [whole, *layer.parameters()], retain_graph=True), gradients)

    detached = layer(whole[:, 4:], memory=state.detach())
    cut = torch.autograd.grad(detached.square().sum(), [whole, layer.table.weight])
    assert (cut[0][:, :4] == 0).all()
    written = state.values.slot.unique()
    others = torch.ones(36, dtype=torch.bool).index_fill(0, written[written >= 0], False)
    assert cut[1][others].abs().max() > 0  # rows that the first segment has not read are still those of the layer


def test_a_batch_memory_is_not_written_across_borders():
    """scope="batch": one memory is written across documents in order, and no pair has its target in another one."""
    layer, documents = make_layer("batch", lookahead=2, addressing_weight=0.0), make_documents_of((5, 6, 5))
    cu_seqlens = torch.tensor([0, 5, 11, 16])
    packed = torch.cat(documents, dim=1)
    output, memory = layer(packed, cu_seqlens=cu_seqlens, return_memory=True)
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[0, [3, 4, 9, 10, 14, 15]] = False
    expected, by_mask = layer(packed, attention_mask=mask, return_memory=True)
    assert_same([output, *memory[:2]], [expected, *by_mask[:2]])
    assert not torch.equal(output, layer(packed))  # pairs across a border would have shown


def test_mean_gate_and_slots_leave_padding_out():
    layer, documents = make_layer(query_conv=2), make_documents_of((5, 9))
    padded, mask = pad(documents, "left")
    _, memory = layer(padded, attention_mask=mask, return_memory=True)
    gates = [torch.sigmoid(layer.g_proj(layer.g_norm(x))) for x in documents]
    torch.testing.assert_close(memory.gate_mean, torch.cat(gates, dim=1).mean())
    assert (memory.slots[~mask] == -1).all()
    assert (memory.slots[mask] >= 0).all()
    assert (memory.weights[~mask] == 0).all()
    output, mean = layer(padded, attention_mask=mask, return_gate_mean=True)
    assert torch.equal(mean, memory.gate_mean)
    gradient = torch.autograd.grad(mean, layer.g_proj.weight)[0]
    assert gradient.abs().max() > 0
    assert output.shape == padded.shape


@pytest.mark.parametrize("size", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_nothing_to_read(scope, size):
    layer = make_layer(scope, query_conv=3)
    x = torch.zeros(*size, WIDTH, dtype=torch.float64, requires_grad=True)
    output, memory = layer(x, return_memory=True)
    assert output.shape == x.shape
    output.sum().backward()
    if scope == "sequence":
        assert memory.values.value.shape == (0, 5)
    else:
        assert memory.values.shape == layer.table.weight.shape
    with torch.no_grad():
        assert layer(x, memory=layer.new_memory(size[0])).shape == x.shape


def test_convolution_by_hand():
    """Against the double loop, with a tail before each document and padding inside."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 9, 2, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 1, 4, generator=generator, dtype=torch.float64)
    tails = torch.randn(3, 3, 2, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1, 1, 1, 0, 0, 1]])
    documents = make_documents(x, mask, torch.tensor([0, 3, 3, 9]), None)
    z, last = convolve(x, weight, documents, tails)
    for number, positions in enumerate(([0, 2], [], [3, 4, 5, 8])):
        row = torch.cat((tails[number], x[0, positions]))
        for place, position in enumerate(positions):
            window = row[place : place + 4]
            torch.testing.assert_close(z[0, position], (window * weight[:, 0].T).sum(0))
        torch.testing.assert_close(last[number], row[len(row) - 3 :])


def test_layer_memory_holds_what_the_next_segment_needs():
    layer = make_layer(query_conv=3)
    _, memory = layer(torch.cat(make_documents_of((5, 5))), return_memory=True)
    assert isinstance(memory, LayerMemory)
    assert memory.hidden_states.shape == (2, 2, WIDTH)
    keys, values, *tensors, carry = memory.detach()
    assert all(x is None or not x.requires_grad for x in (keys, *values, *tensors, *carry))
    assert memory.carry.queries.requires_grad


def test_more_documents_than_one_launch_takes(monkeypatch):
    """Have the results that they have together."""
    layer = make_layer()
    x = torch.cat(make_documents_of((3, 5, 1, 6)), dim=1)
    where = {"cu_seqlens": torch.tensor([0, 3, 8, 9, 15])}
    expected = layer(x, **where)
    monkeypatch.setattr(checks, "MOST_HEADS", 3)
    torch.testing.assert_close(layer(x, **where), expected)
