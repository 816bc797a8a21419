"""A layer that streams in a pool: what a row costs, room, ages, rollbacks, copies, errors, beside states for rows."""

import copy
import gc
import pickle

import pytest
import torch

from fwpkm_kernels import MemoryPool, MemoryState, PoolFullError, testing
from fwpkm_kernels.layers import FastWeightProductKeyMemory, StreamedMemory
from fwpkm_kernels.layers.memories import States
from tests.helpers.layer_streams import CHUNK, LENGTH, WIDTH, assert_close, make_input, make_layer


def with_states(layer, batch):
    """The same with a `MemoryState` for each row, as a layer has them with weight_decay."""
    states = States([MemoryState(layer.keys, layer.table.weight) for _ in range(batch)], layer.options)
    return StreamedMemory(states, batch, "sequence", layer.options, layer._conv_width)


def read(layer, x, memory, cuts):
    return torch.cat([layer(part, memory=memory) for part in x.split(cuts, dim=1)], dim=1)


def test_a_row_costs_what_it_has_written():
    layer, batch = make_layer("sequence", num_keys=40, query_conv=3), 3
    table, memory = layer.table.weight.nbytes, layer.new_memory(3)
    assert memory.num_bytes == batch * layer.num_keys**2 * 4  # an index of 4 bytes a slot
    layer(make_input(batch), memory=memory)
    rows = [memory.pool.num_rows(session) for session in memory.pool.sessions]
    assert all(0 < count <= LENGTH * 6 for count in rows)
    assert sum(rows) <= memory.pool.capacity <= 1.5 * sum(rows)
    window = batch * (2 + 2 * CHUNK) * WIDTH * 8
    assert memory.num_bytes - window == sum(map(memory.pool.num_bytes, memory.pool.sessions))
    assert memory.num_bytes < table < with_states(layer, batch).num_bytes / 3
    fork = memory.clone()
    assert fork.pool is memory.pool
    assert memory.pool.capacity - memory.pool.num_free_rows == sum(rows)


@pytest.mark.parametrize("cuts", [LENGTH, 1, 5])
@pytest.mark.parametrize("capacity", [400, "64 KiB"])
def test_a_pool_that_grows_reads_as_one_that_was_large(capacity, cuts):
    """In the midst of a prompt, and of tokens that come one by one: bit for bit."""
    layer, x = make_layer("sequence", query_conv=3), make_input(4)
    small, large = layer.new_memory(4), layer.new_memory(4, capacity=capacity)
    testing.assert_bitwise_equal(read(layer, x, small, cuts), read(layer, x, large, cuts))
    assert 0 < small.pool.capacity < large.pool.capacity
    assert small.pool.grows
    assert not large.pool.grows


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("missing", [1, 20])
@pytest.mark.parametrize("begun", [0, 6])
def test_a_call_for_which_there_is_no_room_reads_nothing(begun, missing, record):
    """Although some chunks of it would have found room; then it goes through as if nothing had been."""
    layer, x = make_layer("sequence", query_conv=3), make_input(3)
    grown, whole = layer.new_memory(3), layer(x)
    grown.records_past = record
    read(layer, x, grown, [begun, LENGTH - begun])
    needed = grown.pool.capacity - grown.pool.num_free_rows
    memory = layer.new_memory(3, capacity=needed - missing)
    memory.records_past = record
    layer(x[:, :begun], memory=memory)
    used = needed - missing - memory.pool.num_free_rows
    for _ in range(2):
        with pytest.raises(PoolFullError):
            layer(x[:, begun:], memory=memory)
        assert memory.positions == [begun] * 3
        assert memory.columns == begun
        assert len(memory.pool.sessions) == 3
        assert needed - missing - memory.pool.num_free_rows == used
    memory.pool.grow(100)
    assert_close(layer(x[:, begun:], memory=memory), whole[:, begun:])


def test_a_call_of_one_chunk_for_which_there_is_no_room_keeps_the_past():
    layer, x = make_layer("sequence", query_conv=3), make_input(2)
    memory = layer.new_memory(2, capacity=60)
    memory.records_past = True
    begun, is_full = 0, False
    while not is_full:
        try:
            layer(x[:, begun % LENGTH : begun % LENGTH + 1], memory=memory)
            begun += 1
        except PoolFullError:
            is_full = True
    assert begun >= 2 * CHUNK - 1
    memory.rollback(min(memory.pool.reach(session) for session in memory.pool.sessions))
    assert memory.positions == [begun // CHUNK * CHUNK - CHUNK] * 2


def test_a_call_of_several_chunks_for_which_there_is_no_room_keeps_pasts():
    """Those of all rows: of one that fills three chunks, one that fills one and one that fills none."""
    layer, x = make_layer("sequence", query_conv=3), make_input(3, 30)
    memory = layer.new_memory(3, capacity=84)
    memory.records_past = True
    layer(x[:, :5], memory=memory)
    sessions, lengths = memory.pool.sessions, torch.tensor([[12], [4], [2]])
    mask = torch.arange(12) >= 12 - lengths
    with pytest.raises(PoolFullError):
        layer(x[:, 5:17], attention_mask=mask, memory=memory)
    assert memory.pool.sessions == sessions
    assert memory.positions == [5, 5, 5]
    memory.rollback(5)
    memory.pool.grow(100)
    assert_close(layer(x, memory=memory), layer(x))


@pytest.mark.parametrize("record", [False, True])
def test_a_pool_with_a_row_for_every_slot_is_never_full(record):
    """Whatever calls read: with pasts, with one more for each slot that a chunk can change."""
    layer, x = make_layer("sequence", num_keys=4), make_input(3, 40)
    memory = layer.new_memory(3, capacity=3 * 16 * (2 if record else 1))
    memory.records_past = record
    assert_close(read(layer, x, memory, 20), layer(x))
    memory.reset()
    assert_close(read(layer, x, memory, [3, 14, 1, 22]), layer(x))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"query_conv": 3}, {"query_conv": 6, "lookahead": CHUNK}], ids=str)
def test_any_calls_are_those_of_a_state_for_each_row(options, seed):
    """Padding anywhere, rollbacks over the beginning of chunks, beams, copies."""
    layer, random = make_layer("sequence", **options), torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=random))

    pooled, states = layer.new_memory(3), with_states(layer, 3)
    pooled.records_past = states.records_past = True
    reached, rows_of_ages = 0, set()
    for _ in range(60):
        batch = pooled.batch
        match draw(0, 6):
            case 0 | 1 | 2:
                x = torch.randn(batch, draw(0, 10), WIDTH, generator=random, dtype=torch.float64)
                mask = None if draw(0, 2) else torch.rand(x.shape[:2], generator=random) > 0.3
                pair = [layer(x, attention_mask=mask, memory=memory) for memory in (pooled, states)]
                assert_close(*pair)
            case 3:
                most = min(map(pooled.pool.reach, pooled._memories.sessions))
                assert most >= min(states._memories.reach)  # never less than a state that is copied
                most = min(most, *states._memories.reach)
                tokens = most if draw(0, 2) else draw(0, most + 1)
                reached = max(reached, tokens)
                for memory in (pooled, states):
                    memory.rollback(tokens)
            case 4:
                rows = [draw(0, batch) for _ in range(draw(1, 5))]
                for memory in (pooled, states):
                    memory.reorder(rows)
            case 5:
                pooled, states = pooled.clone(), states.clone()
        assert pooled.positions == states.positions
        assert pooled.columns == states.columns
        rows_of_ages.add(len({position % CHUNK for position in pooled.positions}))
        assert len(pooled._memories.sessions) == pooled.batch
    assert reached >= CHUNK
    assert max(rows_of_ages) > 1


def test_rows_that_have_weight_decay_have_tables():
    layer, x = make_layer("sequence", weight_decay=0.1), make_input()
    memory = layer.new_memory(3)
    assert memory.pool is None
    assert_close(read(layer, x, memory, [3, 11]), layer(x))
    for name, x in (("capacity", 10), ("pool", MemoryPool(layer.keys, layer.table.weight, capacity=1))):
        for other in (layer, make_layer("batch")):
            with pytest.raises(ValueError, match=f'`{name}` must be None with `scope`="batch" and with `weight_decay`'):
                other.new_memory(**{name: x})
    plain = make_layer("sequence")
    memory = plain.new_memory(3)
    plain.options = layer.options
    with pytest.raises(ValueError, match="`weight_decay` must be 0 in a pool"):
        plain(make_input(), memory=memory)


def test_requests_of_different_ages_share_a_pool_of_ones_own():
    """They come one by one, read on together, and go one by one."""
    layer, x = make_layer("sequence", query_conv=3), make_input(3, 20)
    whole, pool = layer(x), MemoryPool(layer.keys, layer.table.weight, capacity=400)
    first, second, third = (layer.new_memory(pool=pool) for _ in range(3))
    assert_close(layer(x[:1, :9], memory=first), whole[:1, :9])
    assert_close(layer(x[1:2, :3], memory=second), whole[1:2, :3])
    both = StreamedMemory.joined([second, third, first])
    assert both.positions == [3, 0, 9]
    assert [x.batch for x in (first, second, third)] == [0, 0, 0]
    starts = {1: 3, 2: 0, 0: 9}
    for step in range(6):
        at = torch.stack([x[row, start + step] for row, start in starts.items()]).unsqueeze(1)
        wanted = torch.stack([whole[row, start + step] for row, start in starts.items()]).unsqueeze(1)
        assert_close(layer(at, memory=both), wanted)
    both.rollback(1)
    both.reorder([2, 1])  # the other one has ended
    assert both.positions == [14, 5]
    assert len(pool.sessions) == 2
    assert_close(
        layer(torch.stack((x[0, 14:17], x[2, 5:8])), memory=both), torch.stack((whole[0, 14:17], whole[2, 5:8]))
    )
    both.close()
    assert both.batch == 0
    assert pool.sessions == []
    assert pool.num_free_rows == 400
    with pytest.raises(ValueError, match="`memory` is for 0 sequences, got 3"):
        layer(x, memory=both)


def test_what_is_no_pool_of_the_layer():
    layer, other = make_layer("sequence"), make_layer("sequence")
    with pytest.raises(TypeError, match="`pool` must be a MemoryPool, got MemoryState"):
        layer.new_memory(pool=MemoryState(layer.keys, layer.table.weight))
    for keys, values in ((other.keys, layer.table.weight), (layer.keys, other.table.weight)):
        with pytest.raises(
            ValueError, match="`pool` must be MemoryPool.layer.keys, layer.table.weight.* of this layer"
        ):
            layer.new_memory(pool=MemoryPool(keys, values, capacity=10))
    pool = MemoryPool(layer.keys, layer.table.weight, capacity=10)
    with pytest.raises(ValueError, match="`capacity` must be None with `pool`, which has one, got 5"):
        layer.new_memory(pool=pool, capacity=5)
    with pytest.raises(ValueError, match="`capacity` must be a number of rows"):
        layer.new_memory(capacity="5 rows")
    assert pool.sessions == []
    twice, pairs = [layer.new_memory()] * 2, [layer.new_memory(), layer.new_memory()]
    for memories, error in (([], ValueError), ([1], TypeError), (twice, ValueError), (pairs, ValueError)):
        with pytest.raises(error, match="`memories` must"):
            StreamedMemory.joined(memories)
    with pytest.raises(ValueError, match="`memories` must be of one layer"):
        StreamedMemory.joined([layer.new_memory(), make_layer("sequence", query_conv=3).new_memory()])


def test_copies_that_are_gone_hold_nothing():
    """A prompt is read once and continued many times."""
    layer, x = make_layer("sequence"), make_input()
    memory = layer.new_memory(3)
    layer(x[:, :6], memory=memory)
    pool, used = memory.pool, memory.pool.capacity - memory.pool.num_free_rows
    whole = layer(x)
    for _ in range(3):
        other = copy.deepcopy(memory)
        assert_close(layer(x[:, 6:], memory=other), whole[:, 6:])
        assert other.pool is pool
        assert len(pool.sessions) <= 6
    del other
    gc.collect()
    memory.reorder([0, 1])
    assert len(pool.sessions) == 2
    assert pool.capacity - pool.num_free_rows <= used


def test_memories_that_are_gone_hold_nothing_in_ones_own_pool():
    """Also those that nobody has closed, after an exception for example."""
    layer, x = make_layer("sequence"), make_input()
    pool = MemoryPool(layer.keys, layer.table.weight, capacity=108)
    for _ in range(3):
        memory = layer.new_memory(3, pool=pool)
        assert_close(layer(x, memory=memory), layer(x))
        del memory
        gc.collect()
    memory = layer.new_memory(1, pool=pool)
    assert len(pool.sessions) == 1
    pool.close(pool.sessions[0])
    del memory
    gc.collect()
    memory = layer.new_memory(2, pool=pool)
    assert len(pool.sessions) == 2
    assert pool.num_free_rows == 108
    layer(x[:2], memory=memory)
    assert pool.num_free_rows < 108
    del memory
    gc.collect()
    assert pool.sessions == []


def test_a_memory_that_is_refused_leaves_no_session(monkeypatch):
    layer = make_layer("sequence")
    pool = MemoryPool(layer.keys, layer.table.weight, capacity=108)
    opened = [pool.open(), pool.open()]

    def open_session() -> int:
        if not opened:
            raise torch.OutOfMemoryError("no room")
        return opened.pop()

    with monkeypatch.context() as patch:
        patch.setattr(pool, "open", open_session)
        with pytest.raises(torch.OutOfMemoryError):
            layer.new_memory(3, pool=pool)
    gc.collect()
    pool.open()
    assert len(pool.sessions) == 1
    assert pool.num_free_rows == 108


def test_there_is_room_to_restore_where_memories_are_gone():
    layer, x = make_layer("sequence"), make_input(1)
    pool = MemoryPool(layer.keys, layer.table.weight, capacity=30)
    memory = layer.new_memory(1, pool=pool)
    layer(x[:, :13], memory=memory)
    (session,) = pool.sessions
    pool.evict(session)
    other = layer.new_memory(1, pool=pool)
    layer(x[:, 3:16], memory=other)
    assert pool.num_free_rows < len(pool.state_dict(session)["slots"])
    del other
    gc.collect()
    pool.restore(session)
    assert_close(layer(x[:, 13:], memory=memory), layer(x)[:, 13:])


def test_an_evicted_row_cannot_be_forked_and_all_stays():
    layer, x = make_layer("sequence", query_conv=3), make_input(2)
    pool = MemoryPool(layer.keys, layer.table.weight, capacity=None)
    memory, whole = layer.new_memory(2, pool=pool), layer(x)
    layer(x[:, :6], memory=memory)
    sessions = pool.sessions
    for evicted, refused in ((0, lambda: memory.reorder([0, 0])), (1, memory.clone)):
        pool.evict(sessions[evicted])
        with pytest.raises(ValueError, match="`session` must not be evicted"):
            refused()
        gc.collect()
        assert pool.sessions == sessions
        pool.restore(sessions[evicted])
    assert_close(layer(x[:, 6:], memory=memory), whole[:, 6:])


def test_copies_elsewhere_have_room_for_rows_that_were_shared():
    layer, x = make_layer("sequence", query_conv=3), make_input(1)
    memory, whole = layer.new_memory(1, capacity=60), layer(x)
    layer(x[:, :9], memory=memory)
    memory.reorder([0, 0, 0])
    other = pickle.loads(pickle.dumps(memory))
    assert other.pool.capacity == 3 * memory.pool.num_rows(0) > 60
    other.pool.grow(50)
    assert_close(layer(x[:, 9:].expand(3, -1, -1), memory=other), whole[:, 9:].expand(3, -1, -1))
    with torch.no_grad():
        layer.table.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="these have been written or replaced since"):
        pickle.dumps(memory)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_a_deep_copy_made_in_inference_mode_goes_on(scope):
    layer, x = make_layer(scope, query_conv=3), make_input()
    memory = layer.new_memory(3)
    with torch.inference_mode():
        layer(x[:, :6], memory=memory)
        other = copy.deepcopy(memory)
    assert_close(layer(x[:, 6:], memory=other), layer(x)[:, 6:])


@pytest.mark.parametrize("written", ["keys", "table.weight"])
def test_a_memory_that_is_written_in_the_meantime_is_noticed(written):
    layer, x = make_layer("sequence"), make_input()
    memory = layer.new_memory(3)
    layer(x[:, :6], memory=memory)
    other = memory.clone()
    with torch.no_grad():
        layer.get_parameter(written).mul_(0.5)
    for one in (memory, other):
        with pytest.raises(RuntimeError, match=r"`memory` goes on from the layer's keys and table .* by reset\(\)"):
            layer(x[:, 6:], memory=one)
        one.reset()
        assert_close(layer(x, memory=one), layer(x))


@pytest.mark.parametrize("assigned", ["keys", "table.weight"])
@pytest.mark.parametrize("initial_memory", ["learned", "frozen"])
def test_a_reset_takes_the_pool_to_the_tensors_that_replaced_others(initial_memory, assigned):
    """Unlike one in place, a load with assign=True leaves the tensors that the pool reads as they were."""
    layer, x = make_layer("sequence", initial_memory=initial_memory), make_input()
    new = {name: p.clone() for name, p in layer.state_dict().items()}
    layer.load_state_dict(new, assign=True)  # tensors as often written as those that follow: never
    pool, whole = MemoryPool(layer.keys, layer.table.weight, capacity=400), layer(x)
    memory = layer.new_memory(3, pool=pool)
    layer(x[:, :6], memory=memory)
    other, began = memory.clone(), layer.new_memory(1, pool=pool)
    loaded = {name: 0.5 * p if name == assigned else p for name, p in layer.state_dict(keep_vars=True).items()}
    layer.load_state_dict(loaded, assign=True)
    layer.requires_grad_(False)
    assert (layer(x[:, 6:], memory=memory) - whole[:, 6:]).isfinite().all()
    closed = layer.new_memory(0)
    memory.reset()
    assert_close(layer(x, memory=memory), layer(x))
    four, joined = x[[0, 0, 1, 2]], StreamedMemory.joined([began, other])
    with pytest.raises(RuntimeError, match=r"`memory` goes on from .* written or replaced since: .* by reset\(\)"):
        layer(four, memory=joined)
    with pytest.raises(RuntimeError, match="written or replaced since"):
        pickle.dumps(joined)
    closed.reset()
    joined.reset()
    assert joined.pool is pool
    assert_close(layer(four, memory=joined), layer(four))
    assert_close(layer(x[:, :3], memory=memory), layer(torch.cat((x, x[:, :3]), dim=1))[:, LENGTH:])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_tensors_that_are_others_for_each_call(decay):
    """As hooks that offload a layer give it equal ones, or a parametrization computes them: a memory keeps its own."""
    layer, x = make_layer("sequence", weight_decay=decay).requires_grad_(False), make_input()
    whole, memory = layer(x), layer.new_memory(3)
    for _ in range(2):
        for begin in range(0, LENGTH, 5):
            layer.keys = torch.nn.Parameter(layer.keys.clone(), requires_grad=False)
            layer.table.weight = torch.nn.Parameter(layer.table.weight.clone(), requires_grad=False)
            assert_close(layer(x[:, begin : begin + 5], memory=memory), whole[:, begin : begin + 5])
        memory.reset()
    kept = layer.table.weight
    layer.table.weight = torch.nn.Parameter(kept.to("meta"), requires_grad=False)
    memory.reset()
    layer.table.weight = kept
    torch.nn.utils.parametrize.register_parametrization(layer.table, "weight", torch.nn.Tanh())
    memory.reset()
    assert_close(layer(x, memory=memory), whole)


def test_a_pool_over_transposed_keys_is_of_other_tensors():
    """Although they begin where the layer's do, and as many sub-keys as columns have the same shape."""
    layer = FastWeightProductKeyMemory(WIDTH, num_keys=4, top_k=2, key_dim=8, value_dim=3)
    with pytest.raises(ValueError, match="`pool` must be MemoryPool.* over other tensors"):
        layer.new_memory(1, pool=MemoryPool(layer.keys.mT, layer.table.weight, capacity=9))


def test_a_pool_over_detached_tensors_follows_the_layer():
    layer, x = make_layer("sequence").requires_grad_(False), make_input()
    pool = MemoryPool(layer.keys.detach(), layer.table.weight.detach(), capacity=400)
    memory, other = layer.new_memory(3, pool=pool), layer.new_memory(3, pool=pool)
    memory.reset()
    layer(x, memory=other)  # the pool reads what it has read before
    layer.load_state_dict({name: 0.5 * p for name, p in layer.state_dict().items()}, assign=True)
    memory.reset()
    assert_close(layer(x, memory=memory), layer(x))


def test_another_layer_goes_on_with_a_memory_of_an_equal_one():
    """What it reads is the table of the layer that has made it, also once that layer is gone."""
    layer, x = make_layer("sequence"), make_input()
    memory, twin, whole = layer.new_memory(3), copy.deepcopy(layer), layer(x)
    assert_close(twin(x[:, :6], memory=memory), whole[:, :6])
    del layer
    gc.collect()
    assert_close(twin(x[:, 6:], memory=memory), whole[:, 6:])
    memory.reset()
    assert_close(twin(x, memory=memory), whole)


@pytest.mark.parametrize("initial_memory", ["learned", "frozen"])
def test_a_pool_does_not_follow_a_layer_to_another_dtype(initial_memory):
    layer = FastWeightProductKeyMemory(
        WIDTH, num_keys=6, top_k=3, key_dim=6, value_dim=5, initial_memory=initial_memory
    ).requires_grad_(False)
    memory, x = layer.new_memory(3), make_input()
    before = layer(x[:, :6].float(), memory=memory)
    layer.double()
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match="`keys` of the pool must stay .* of torch.float32 on cpu, got .*float64"
        ):
            memory.reset()
    assert memory.positions == [6] * 3
    with pytest.raises((TypeError, ValueError), match="must both be float64 or neither|must keep the dtype"):
        layer(x, memory=memory)
    if initial_memory == "learned":
        layer.float()
        memory.reset()
        assert torch.equal(layer(x[:, :6].float(), memory=memory), before)


def test_a_layer_that_casts_reads_a_copy():
    """So its Parameters may be written."""
    layer, x = make_layer("sequence").to(torch.bfloat16), make_input().bfloat16()
    layer.memory_dtype = torch.float32
    memory = layer.new_memory(3)
    assert (memory.dtype, layer.table.weight.dtype) == (torch.float32, torch.bfloat16)
    before = layer(x)
    with torch.no_grad():
        layer.table.weight.mul_(2.0)
    torch.testing.assert_close(layer(x, memory=memory), before)
    with pytest.raises(ValueError, match="whose Parameters must be of its memory's dtype torch.float32"):
        layer.new_memory(pool=MemoryPool(layer.keys, layer.table.weight, capacity=10))


@pytest.mark.parametrize("record", [False, True])
def test_a_pool_keeps_pasts_for_those_who_ask(record):
    layer, x = make_layer("sequence"), make_input()
    pool = MemoryPool(layer.keys, layer.table.weight, capacity=150, keep_past=not record)
    memory = layer.new_memory(3, pool=pool)
    memory.records_past = record
    layer(x, memory=memory)
    assert pool.keep_past is not record
    assert pool.reach(pool.sessions[0]) == LENGTH % CHUNK + CHUNK
    pool.evict(pool.sessions[0])
    with pytest.raises(ValueError, match="must not be evicted"):
        layer(x, memory=memory)
    assert pool.keep_past is not record


@pytest.mark.parametrize("options", [{}, {"query_conv": 3}], ids=str)
def test_compiled_code_is_not_compiled_again_for_each_token(options):
    """A step of a pool breaks the graph; positions and windows are none of the compiler's business."""
    layer, x = make_layer("sequence", **options), make_input(2, 24)
    whole, memory = layer(x), layer.new_memory(2)
    compiled = torch.compile(layer, backend="eager")
    outputs = [compiled(x[:, :7], memory=memory), *(compiled(x[:, at : at + 1], memory=memory) for at in range(7, 12))]
    with torch._dynamo.config.patch(error_on_recompile=True):
        outputs += [compiled(x[:, at : at + 1], memory=memory) for at in range(12, 24)]
    assert_close(torch.cat(outputs, dim=1), whole)
