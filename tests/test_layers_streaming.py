"""A layer that streams: any cut is the whole, whatever the scope and the padding; rollback, order, copies."""

import copy
import itertools
import pickle

import pytest
import torch

from fwpkm_kernels import MemoryState
from fwpkm_kernels.layers import StreamedMemory
from tests.helpers.layer_streams import CHUNK, LENGTH, WIDTH, assert_close, make_input, make_layer

CUTS = ([LENGTH], [1] * LENGTH, [3, 5, 6], [CHUNK, 2 * CHUNK, 2], [0, 1, 12, 0, 1])
OPTIONS = [{}, {"query_conv": 3}, {"query_conv": 6, "lookahead": CHUNK}, {"lookahead": 0, "gate": False}]
OPTIONS += [{"weight_decay": 0.1, "query_conv": 3}]  # for which rows have a table each


def parts(lengths):
    return [slice(*pair) for pair in itertools.pairwise([0, *itertools.accumulate(lengths)])]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "defaults")
@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_any_cut_is_the_whole(scope, options, cut):
    layer, x = make_layer(scope, **options), make_input()
    memory = layer.new_memory(3)
    output = torch.cat([layer(x[:, part], memory=memory) for part in parts(cut)], dim=1)
    assert_close(output, layer(x))
    assert memory.positions == [LENGTH] * 3


@pytest.mark.parametrize("cut", CUTS[:3], ids=str)
@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_padding_on_the_left(scope, cut):
    """In generation: a padded prompt, then single tokens without a mask."""
    layer, x = make_layer(scope, query_conv=3), make_input()
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[0, :5] = mask[2, :1] = False
    x[~mask] = 1e3
    memory, outputs = layer.new_memory(3), []
    for part in parts(cut):
        of_part = mask[:, part]
        outputs.append(layer(x[:, part], attention_mask=None if of_part.all() else of_part, memory=memory))
    output = torch.cat(outputs, dim=1)
    assert_close(output, layer(x, attention_mask=mask))
    if scope == "sequence":
        assert memory.positions == [LENGTH - 5, LENGTH, LENGTH - 1]
        for row in range(3):
            assert_close(output[row : row + 1, mask[row]], layer(x[row : row + 1, mask[row]]))


@pytest.mark.parametrize("cut", CUTS[:3], ids=str)
@pytest.mark.parametrize("options", OPTIONS[1:3] + OPTIONS[4:], ids=lambda options: "-".join(options))
def test_padding_anywhere(options, cut):
    """Rows have read differently many tokens at each cut, and the convolution goes on with the last of each."""
    layer, x = make_layer("sequence", **options), make_input(4)
    mask = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.4
    memory = layer.new_memory(4)
    output = torch.cat([layer(x[:, part], attention_mask=mask[:, part], memory=memory) for part in parts(cut)], dim=1)
    assert_close(output, layer(x, attention_mask=mask))
    assert memory.positions == mask.sum(1).tolist()


def test_packed_documents_go_on_in_sessions_of_their_own():
    layer, x = make_layer("sequence", query_conv=3), make_input(1)
    memory = layer.new_memory(2)
    first = layer(x[:, :9], cu_seqlens=torch.tensor([0, 4, 9]), memory=memory)
    second = layer(x[:, 9:], cu_seqlens=torch.tensor([0, 5, 5]), memory=memory)
    assert memory.positions == [9, 5]
    whole = layer(torch.cat((x[:, :4], x[:, 9:]), dim=1))
    assert_close(torch.cat((first[:, :4], second), dim=1), whole)
    assert_close(first[:, 4:], layer(x[:, 4:9]))


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_rollback_inside_a_chunk(scope):
    """What is taken back was never read: bit for bit, the convolution's window too."""
    layer, x = make_layer(scope, query_conv=3), make_input()
    memory, never = layer.new_memory(3), layer.new_memory(3)
    for one in (memory, never):
        layer(x[:, :5], memory=one)
    layer(x[:, 5:8].flip(1)[:, :2], memory=memory)  # two tokens that a draft got wrong
    memory.rollback(2)
    assert memory.positions == never.positions
    for part in (slice(5, 6), slice(6, LENGTH)):
        assert torch.equal(layer(x[:, part], memory=memory), layer(x[:, part], memory=never))
    with pytest.raises(ValueError, match="`tokens` must be at most 2, .* got 3"):
        memory.rollback(3)
    assert memory.positions == [LENGTH] * 3


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("drafted, tokens", [(4, 3), (4, 4), (12, 3), (2, 2)])
def test_rollback_over_the_beginning_of_a_chunk(scope, drafted, tokens):
    """Recorded, tokens that completed a chunk, or several, are taken back: and read on as if they had not been."""
    layer, x = make_layer(scope, query_conv=3), make_input(3, 20)
    memory, never = layer.new_memory(3), layer.new_memory(3)
    memory.records_past = True
    layer(x[:, :6], memory=memory)
    layer(x[:, :6], memory=never)
    for _ in range(2):
        layer(x[:, 6 : 6 + min(drafted, CHUNK)].flip(0, 1), memory=memory)
        memory.rollback(min(drafted, CHUNK))
    layer(x[:, 6 : 6 + drafted], memory=memory)
    layer(x[:, 18:19], memory=memory)  # one more step, inside of the next chunk
    memory.rollback(1 + tokens)
    layer(x[:, 6 : 6 + drafted - tokens], memory=never)
    assert memory.positions == never.positions
    assert memory.columns == never.columns
    for part in (slice(0, 1), slice(1, 20)):
        assert_close(layer(x[:, part], memory=memory), layer(x[:, part], memory=never))
    with pytest.raises(ValueError, match="`tokens` must be at most [4-7],"):
        memory.rollback(2 * CHUNK)
    memory.records_past = False
    layer(x[:, :CHUNK], memory=memory)  # the chunk that is written now is the first without a record
    with pytest.raises(ValueError, match="`tokens` must be at most [0-3],"):
        memory.rollback(CHUNK)


def test_single_tokens_are_taken_back_over_the_beginning_of_a_chunk():
    """An assistant's drafts come one by one: what was read of the chunk before the recorded token goes too."""
    layer, x = make_layer("sequence", query_conv=6), make_input(2)
    memory, never = layer.new_memory(2), layer.new_memory(2)
    memory.records_past = True
    for part in parts([5, *[1] * 5]):
        layer(x[:, part], memory=memory)
    memory.rollback(5)
    layer(x[:, :5], memory=never)
    assert_close(layer(x[:, 5:], memory=memory), layer(x[:, 5:], memory=never))


@pytest.mark.parametrize("first", [0, 5])
def test_a_call_that_fails_changes_nothing(first):
    """A dtype that the projections refuse, in a call that would have completed a chunk: the window stays too."""
    layer, x = make_layer("sequence", query_conv=3), make_input()
    memory = layer.new_memory(3)
    begin = layer(x[:, :first], memory=memory)
    with pytest.raises(RuntimeError):
        layer(x[:, first:].float(), memory=memory)
    rest = layer(x[:, first:], memory=memory)
    assert_close(torch.cat((begin, rest), dim=1), layer(x))


def test_what_inference_mode_has_made_goes_on_outside_of_it():
    layer, x = make_layer("sequence", query_conv=3), make_input()
    batch = make_layer("batch", query_conv=3)
    memory, one = layer.new_memory(3), batch.new_memory(3)
    memory.records_past = True
    with torch.inference_mode():
        layer(x[:, :3], memory=memory)
        layer(x[:, 3:6], memory=memory)
        memory.reorder([0, 0, 2])
        layer(x[:, 6:8], memory=memory)
        batch(x[:, :6], memory=one)
        one.reorder([1, 2])
    memory.rollback(1)
    layer(x[:, 7:], memory=memory)
    batch(x[1:, 6:], memory=one)
    assert memory.positions == [LENGTH] * 3


def test_rows_of_a_memory_that_has_read_nothing():
    layer, x = make_layer("batch"), make_input(2)
    for read in (lambda m: m, lambda m: layer(x[:, :0], memory=m), lambda m: (layer(x, memory=m), m.reset())):
        memory = layer.new_memory(2)
        read(memory)
        memory.reorder([1])
        assert_close(layer(x[1:], memory=memory), layer(x[1:]))


@pytest.mark.parametrize(
    "options, name",
    [
        ({"num_keys": 5}, "keys"),
        ({"value_dim": 4}, "values"),
        ({"scope": "batch"}, "scope"),
        ({"query_conv": None}, "query_conv"),
        ({"chunk_size": 5}, "chunk_size"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_memory_of_another_layer(options, name):
    layer = make_layer("sequence", query_conv=3)
    other = make_layer(**({"scope": "sequence", "query_conv": 3} | options))
    with pytest.raises(ValueError, match=f"`memory` must have been made by this layer, whose {name} is"):
        layer(make_input(), memory=other.new_memory(3))


def test_options_of_the_layer_as_they_are_now():
    """A memory that is not to learn any more; what a state has bound stays."""
    layer, x = make_layer("sequence", addressing_weight=0.0), make_input()
    memory = layer.new_memory(3)
    layer.options = layer.options._replace(lr=0.0)
    layer(x, memory=memory)
    saved = memory.pool.state_dict(memory.pool.sessions[0])
    assert torch.equal(saved["rows"], layer.table.weight[saved["slots"]])
    assert len(saved["rows"]) > 0
    layer.options = layer.options._replace(top_k=2)
    with pytest.raises(ValueError, match="`top_k` must stay as in the state's first step, 3, got 2"):
        layer(x, memory=memory)


META = torch.zeros(3, dtype=torch.int64, device="meta")


@pytest.mark.parametrize("indices", [[1.7], torch.tensor([0.5]), torch.tensor([[0]]), 3, [True], [-1], META])
def test_bad_rows(indices):
    with pytest.raises((TypeError, ValueError), match="`indices`"):
        make_layer("sequence").new_memory(3).reorder(indices)


def test_sequences_in_another_order():
    """Beams: rows are repeated, left out and moved, each with its own memory and window."""
    layer, x = make_layer("sequence", query_conv=3), make_input(3)
    memory = layer.new_memory(3)
    layer(x[:, :6], memory=memory)
    memory.reorder(torch.tensor([2, 2, 0, 2]))
    assert memory.batch == 4
    rows = [2, 2, 0, 2]
    rest = x[torch.tensor([0, 1, 2, 0])][:, 6:]
    output = layer(rest, memory=memory)
    for row, source in enumerate(rows):
        whole = layer(torch.cat((x[source : source + 1, :6], rest[row : row + 1]), dim=1))
        assert_close(output[row : row + 1], whole[:, 6:])
    with pytest.raises(ValueError, match=r"`indices` must lie in \[0, 4\), got 4"):
        memory.reorder([4])


def test_one_memory_for_the_batch_keeps_its_order():
    layer, x = make_layer("batch", query_conv=3), make_input(3)
    memory = layer.new_memory(3)
    layer(x[:, :6], memory=memory)
    memory.reorder([0, 1, 2])
    for rows in ([1, 0, 2], [0, 0, 1]):
        with pytest.raises(ValueError, match='`scope`="batch"'):
            memory.reorder(rows)
    memory.reorder([0, 2])
    assert memory.batch == 2
    assert layer(x[[0, 2], 6:], memory=memory).shape == (2, LENGTH - 6, WIDTH)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_reset_and_copies(scope):
    layer, x = make_layer(scope, query_conv=3), make_input()
    memory = layer.new_memory(3)
    before = layer(x[:, :6], memory=memory)
    assert repr(memory).startswith("StreamedMemory(batch=3, scope=")
    copies = [
        memory.clone(),
        copy.copy(memory),
        copy.deepcopy(memory),
        pickle.loads(pickle.dumps(memory)),
        memory.to("cpu"),
    ]
    after = layer(x[:, 6:], memory=memory)
    for other in copies:
        assert (other.positions, other.columns) == ([6] * 3, 6)
        assert torch.equal(layer(x[:, 6:], memory=other), after)
    memory.reset()
    assert memory.positions == [0, 0, 0]
    assert torch.equal(layer(x[:, :6], memory=memory), before)


def test_reset_returns_to_the_parameters_as_they_are():
    layer, x = make_layer("sequence"), make_input()
    memory = layer.new_memory(3)
    layer(x, memory=memory)
    with torch.no_grad():
        layer.table.weight.mul_(0.5)
    memory.reset()
    assert_close(layer(x, memory=memory), layer(x))


@pytest.mark.parametrize(
    "scope, decay, initial_memory",
    [
        ("sequence", 0.0, "learned"),
        ("sequence", 0.1, "learned"),
        ("sequence", 0.1, "frozen"),
        ("batch", 0.0, "learned"),
        ("batch", 0.0, "persistent"),
    ],
)
def test_reset_returns_to_the_tensors_that_the_layer_has(scope, decay, initial_memory):
    """A load with assign=True has put them in the place of those with which the memory began."""
    layer, x = make_layer(scope, weight_decay=decay, initial_memory=initial_memory), make_input()
    memory = layer.new_memory(3)
    layer(x, memory=memory)
    copies = [memory, memory.clone(), copy.copy(memory)]
    layer.load_state_dict({name: p * 0.5 for name, p in layer.state_dict().items()}, assign=True)
    layer.requires_grad_(False)
    expected = layer(x)
    for one in copies:
        if memory.pool is None:  # a table of its own is only left at a reset, as after a write in place
            layer(x, memory=one)
        one.reset()
        assert_close(layer(x, memory=one), expected)


@pytest.mark.parametrize("scope, decay", [("sequence", 0.0), ("sequence", 0.1), ("batch", 0.0)])
def test_reset_keeps_the_dtype_of_the_memory(scope, decay):
    """Where the layer has other Parameters, in half precision."""
    layer, x = make_layer(scope, weight_decay=decay).requires_grad_(False).float(), make_input().bfloat16()
    layer.memory_dtype = torch.float32
    memory = layer.new_memory(3)
    layer.load_state_dict({name: p.bfloat16() for name, p in layer.state_dict().items()}, assign=True)
    memory.reset()
    assert memory.dtype == torch.float32
    assert torch.equal(layer(x, memory=memory), layer(x, memory=layer.new_memory(3)))


@pytest.mark.parametrize("scope, decay", [("sequence", 0.0), ("sequence", 0.1), ("batch", 0.0)])
def test_what_is_no_device(scope, decay):
    memory = make_layer(scope, weight_decay=decay).new_memory(3)
    with pytest.raises(ValueError, match="`device` must be a device, got 'foo': Expected one of cpu, "):
        memory.to("foo")
    with pytest.raises(TypeError, match="`device` must be a device, got None"):
        memory.to(None)
    if memory.pool is not None:
        with pytest.raises(ValueError, match="`device` must be one on which tensors have data, got meta"):
            memory.to("meta")


def test_records_past_is_a_flag():
    memory = make_layer("sequence").new_memory(3)
    with pytest.raises(TypeError, match="`records_past` must be"):
        memory.records_past = "no"
    assert memory.records_past is False


def test_dtype_and_device_of_no_sequences():
    closed = make_layer("batch").new_memory(3)
    closed.close()
    left, none = (make_layer("sequence", weight_decay=0.1).new_memory(count) for count in (3, 0))
    left.reorder([])
    for memory in (closed, left, none):
        for name in ("dtype", "device"):
            with pytest.raises(
                ValueError, match="`memory` must be for one sequence at least to have a dtype and a dev"
            ):
                getattr(memory, name)
        assert memory.clone().batch == 0
    pooled = make_layer("sequence").new_memory(0)
    assert (pooled.dtype, pooled.device) == (torch.float64, torch.device("cpu"))


def test_a_state_of_ones_own():
    """scope="batch" without a convolution steps a MemoryState too."""
    layer, x = make_layer("batch"), make_input()
    state = MemoryState(layer.keys, layer.table.weight)
    output = torch.cat([layer(x[:, part], memory=state) for part in parts([6, LENGTH - 6])], dim=1)
    assert_close(output, layer(x))
    assert state.position == LENGTH


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_gradients_are_refused_in_place(scope):
    layer, x = make_layer(scope), make_input()
    memory = layer.new_memory(3)
    with pytest.raises(ValueError, match="`memory` is written in place.*LayerMemory"):
        layer(x.requires_grad_(), memory=memory)
    layer.requires_grad_(True)
    with pytest.raises(ValueError, match="`memory` is written in place.*LayerMemory"):
        layer(x.detach(), memory=memory)
    assert memory.positions == [0, 0, 0]
    with torch.inference_mode():
        layer(x[:, :3], memory=memory)
    with torch.no_grad():  # what inference mode has made can be written outside of it
        assert_close(layer(x[:, 3:], memory=memory), layer(x)[:, 3:])


def test_a_memory_of_another_kind_or_size():
    layer, x = make_layer("sequence"), make_input()
    with pytest.raises(ValueError, match="`memory` is for 2 sequences, got 3"):
        layer(x, memory=layer.new_memory(2))
    with pytest.raises(TypeError, match="`memory` must be a LayerMemory, .* got MemoryState"):
        layer(x, memory=MemoryState(layer.keys, layer.table.weight))
    with pytest.raises(ValueError, match="`return_memory` must be False"):
        layer(x, memory=layer.new_memory(3), return_memory=True)
    with pytest.raises(ValueError, match='`boundary` must be "carry"'):
        make_layer("batch", boundary="drop").new_memory()
    batch = make_layer("batch")
    with pytest.raises(ValueError, match="`cu_seqlens` must be None"):
        batch(x[:1], cu_seqlens=torch.tensor([0, LENGTH]), memory=batch.new_memory(1))
    assert isinstance(layer.new_memory(0), StreamedMemory)
    output, mean = layer(x, memory=layer.new_memory(3), return_gate_mean=True)
    assert output.shape == x.shape
    assert mean.shape == ()
