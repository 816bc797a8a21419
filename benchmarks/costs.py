"""The least that has to be moved and computed, whoever does it: a formula for each operation.

Bytes: every input read once and every output written once; of a table, the distinct rows that are addressed. Flops: as
the mathematics has it. s is the size of an element of the table, U the number of distinct rows that are addressed, J
the picks of a token, A = tokens·J the accesses, and P = tokens·H·K·Dk the elements of what a token picks of the keys.
"""

import dataclasses

import torch
from torch import Tensor

from benchmarks.eager import torch_lookup
from benchmarks.inputs import PARAMETERS, Configuration, Inputs, Memory
from benchmarks.providers import project


@dataclasses.dataclass(frozen=True)
class Cost:
    bytes: int
    flops: int
    #: tensor-core products for each product of the mathematics on a GPU: three in tf32x3, which is as exact as float32
    passes: int = 1

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _row_bytes(c: Configuration) -> int:
    return c.width * c.dtype.itemsize


def _touched(c: Configuration, inputs: Inputs) -> int:
    """U·D·s."""
    return int(torch.unique(inputs["slots"]).numel()) * _row_bytes(c)


def _picked(c: Configuration) -> int:
    """P."""
    return c.accesses * c.key_width


def _lookup_flops(c: Configuration) -> int:
    """A product of every query with every sub-key: 2·tokens·H·n·Dk."""
    return 2 * c.tokens * c.heads * c.sub_keys * c.key_width


# Of each element that is picked. Lookup backward: a multiplication and an addition for each of the two gradients, and,
# for idw, a subtraction and a squared norm. Key step: c·k is subtracted and c·q added up, of which dot has the latter.
# Its backward: <V, ds/dk>, and two gradients of each of the two arguments of s; for idw the difference comes on top.
_LOOKUP_BACKWARD = {"idw": 7, "dot": 4}
_KEY_STEP = {"idw": 3, "dot": 2}
_KEY_STEP_BACKWARD = {"idw": 9, "dot": 8}


def lookup(c: Configuration, direction: str, inputs: Inputs) -> Cost:
    """Forward: queries, keys, and a score (float32) and a slot (int64) of each winner; a product with every sub-key.
    Backward: queries and keys in, their gradients out, incoming gradient and slots; 7·P flops (dot: 4·P)."""
    size, found = _size(inputs["queries"], inputs["keys"]), 12 * c.accesses
    if direction == "forward":
        return Cost(size + found, _lookup_flops(c), passes=3)
    return Cost(2 * size + found, _LOOKUP_BACKWARD[c.score] * _picked(c))


def key_step(c: Configuration, direction: str, inputs: Inputs) -> Cost:
    """Forward: queries and keys in, keys out; a product with every sub-key, and 3·P (dot: 2·P) for the gradient.
    Backward: queries, keys and incoming gradient in, two gradients out, and a score (float32) and an index (int32) for
    each of the 2·K picks of a row and head, as forward found them; 9·P (dot: 8·P)."""
    queries, keys = _size(inputs["queries"]), _size(inputs["keys"])
    if direction == "forward":
        return Cost(queries + 2 * keys, _lookup_flops(c) + _KEY_STEP[c.score] * _picked(c), passes=3)
    return Cost(2 * queries + 3 * keys + 16 * c.accesses, _KEY_STEP_BACKWARD[c.score] * _picked(c))


def gather(c: Configuration, direction: str, inputs: Inputs, *, sparse: bool = False) -> Cost:
    """Forward: U rows, slots and weights in, tokens·D out; 2·A·D flops. Backward: the same in, with the incoming
    gradient, and out the gradients of the weights and of the table: N·D·s, or, if it is sparse, U·D·s; 4·A·D."""
    read = _touched(c, inputs) + _size(inputs["slots"], inputs["weights"])
    out = c.tokens * _row_bytes(c)
    if direction == "forward":
        return Cost(read + out, 2 * c.accesses * c.width)
    grad_table = _touched(c, inputs) if sparse else c.table_bytes
    return Cost(read + out + grad_table + _size(inputs["weights"]), 4 * c.accesses * c.width)


def _small_update_inputs(inputs: Inputs) -> int:
    return _size(inputs["slots"], inputs["weights"], inputs["targets"], inputs["predictions"])


def update(c: Configuration, direction: str, inputs: Inputs) -> Cost:
    """Forward: the old table in and the new one out, 2·N·D·s, slots, weights, targets, predictions; 2·A·D flops.
    Backward: those small inputs, their gradients, and U rows of the incoming gradient, which passes on to the table as
    it is; 4·A·D."""
    if direction == "forward":
        return Cost(2 * c.table_bytes + _small_update_inputs(inputs), 2 * c.accesses * c.width)
    gradients = _size(inputs["weights"], inputs["targets"], inputs["predictions"])
    return Cost(_touched(c, inputs) + _small_update_inputs(inputs) + gradients, 4 * c.accesses * c.width)


def update_inplace(c: Configuration, direction: str, inputs: Inputs) -> Cost:
    """U rows read and written, 2·U·D·s; slots, weights, targets, predictions; 2·A·D flops."""
    return Cost(2 * _touched(c, inputs) + _small_update_inputs(inputs), 2 * c.accesses * c.width)


def reset(c: Configuration, direction: str, inputs: Inputs) -> Cost:
    """The U rows that were written, read and written back, 2·U·D·s, and a flag of one byte for each of all rows."""
    return Cost(2 * _touched(c, inputs) + c.slots, 0)


def _chunk_rows(c: Configuration, inputs: Inputs, keys: Tensor) -> int:
    """Bytes of the distinct rows that each chunk addresses, summed over the chunks: as the initial keys find them,
    since those of later chunks differ little, and without the `lookahead` tokens that are read again."""
    distinct = 0
    with torch.no_grad():
        for part in inputs["queries"].split(c.chunk, dim=1):
            slots = torch_lookup(part.flatten(0, 1), keys, c.picks, c.score)[1]
            distinct += int(torch.unique(slots).numel())
    return distinct * _row_bytes(c)


def _errors(c: Configuration) -> int:
    """tokens·D float32: errors of a chunk, kept since no write may begin before every read of the chunk has ended."""
    return 4 * c.tokens * c.width


def _sequence_rows(c: Configuration, inputs: Inputs) -> int:
    """Bytes of the distinct rows that the sequence addresses in all, as `_chunk_rows` finds them."""
    with torch.no_grad():
        rows = inputs["queries"].flatten(0, 1).split(c.chunk)
        slots = torch.cat([torch_lookup(part, inputs["keys"], c.picks, c.score)[1].flatten() for part in rows])
    return int(torch.unique(slots).numel()) * _row_bytes(c)


def sequence_rows(c: Configuration, direction: str, inputs: Inputs) -> Cost:
    """`sequence`, but that no table is copied and none filled with a gradient: forward gathers the rows that it
    addresses, 2·U·D·s for U in all, and backward leaves as many rows of a gradient, U·D·s."""
    if direction == "both":
        return sequence_rows(c, "forward", inputs) + sequence_rows(c, "backward", inputs)
    whole, times = sequence(c, direction, inputs), 2 if direction == "forward" else 1
    moved = whole.bytes + times * (_sequence_rows(c, inputs) - c.table_bytes)
    return dataclasses.replace(whole, bytes=moved)


def documents(c: Configuration, direction: str, inputs: Inputs) -> Cost:
    """`sequence_rows` of each document, with a gradient of the rows of each: which slots they share is not counted."""
    own, total = dataclasses.replace(c, tokens=c.length, batch=1), Cost(0, 0)
    for item in range(c.batch):
        given = {**inputs, **{name: inputs[name][item : item + 1] for name in ("queries", "targets")}}
        total += sequence_rows(own, direction, given)
    return total


def sequence(c: Configuration, direction: str, inputs: Inputs) -> Cost:
    """Forward, as in training: queries, targets, outputs, slots and weights once; the table copied, 2·N·D·s; for each
    chunk, U rows read, written and logged, 3·U·D·s, its errors, and the keys read and written (once in all if they
    stand still). A product with every sub-key, 2·A·D flops for reads, as many for writes, and the key step.
    Backward: queries, targets, incoming gradient, slots and weights in, gradients of queries and targets out; for each
    chunk U rows of the log, and as many of the gradient (float32) read and written; the dense gradient of the table
    written, N·D·s; keys of each chunk, and their gradient. 8·A·D for dp, dw, dc and dvalues, and lookup and key step.
    Both: the sum.
    """
    if direction == "both":
        return sequence(c, "forward", inputs) + sequence(c, "backward", inputs)
    queries, targets, keys = (_size(inputs[name]) for name in ("queries", "targets", "keys"))
    moves = c.key_weight != 0
    chunks = c.length // c.chunk if moves else 1
    rows, found = _chunk_rows(c, inputs, inputs["keys"]), 12 * c.accesses
    if direction == "forward":
        steps = _KEY_STEP[c.score] * _picked(c) if moves else 0
        return Cost(
            queries + 2 * targets + found + 2 * c.table_bytes + 3 * rows + _errors(c) + 2 * chunks * keys,
            _lookup_flops(c) + 4 * c.accesses * c.width + steps,
            passes=3,
        )
    steps = _KEY_STEP_BACKWARD[c.score] * _picked(c) if moves else 0
    grad_rows = 2 * 4 * (rows // c.dtype.itemsize)
    return Cost(
        2 * queries + 3 * targets + found + rows + grad_rows + c.table_bytes + (chunks + 1) * keys,
        8 * c.accesses * c.width + _LOOKUP_BACKWARD[c.score] * _picked(c) + steps,
    )


def layer(c: Configuration, direction: str, inputs: Inputs) -> Cost:
    """What its memory costs, of each document where each has its own, as long as such a memory is a whole table:
    `sequence`, or `stream` for less than a chunk. Hidden states in and output out, and the parameters of the four
    projections; two flops for each of these and token. Backward: the same in, and both gradients out; four flops."""
    if direction == "both":
        return layer(c, "forward", inputs) + layer(c, "backward", inputs)
    with torch.no_grad():
        projected = project(inputs["hidden_states"], inputs)
    own = dataclasses.replace(c, tokens=c.length, batch=1) if inputs["scope"] == "sequence" else c
    weights, times = [inputs[name] for name in PARAMETERS if name != "keys"], 1 if direction == "forward" else 2
    moved = (times + 1) * _size(inputs["hidden_states"]) + times * _size(*weights)
    total = Cost(moved, 2 * times * c.tokens * sum(x.numel() for x in weights))
    memory = Memory(inputs["keys"], inputs["values"])
    for first in range(0, c.batch, own.batch):
        rows = slice(first, first + own.batch)
        given = {"queries": projected.queries[rows], "targets": projected.targets[rows]}
        if c.length < c.chunk:
            total += stream(own, direction, {**given, "memory": memory})
        else:
            total += sequence(own, direction, {**given, **memory._asdict()})
    return total


def stream(c: Configuration, direction: str, inputs: Inputs) -> Cost:
    """Whole chunks: queries, targets and outputs once; for each chunk, U rows read and written, 2·U·D·s, its errors,
    and the keys read and written (read, once in all, if they stand still). Less than a chunk is only read: U rows, the
    keys, and queries, targets and predictions (float32) once more, since they wait for the write.
    A product with every sub-key, 2·A·D flops for reads, and for whole chunks as many for writes, and the key step."""
    memory: Memory = inputs["memory"]
    queries, targets, keys = _size(inputs["queries"]), _size(inputs["targets"]), _size(memory.keys)
    rows = _chunk_rows(c, inputs, memory.keys)
    moved = queries + 2 * targets
    flops = _lookup_flops(c) + 2 * c.accesses * c.width
    if c.length < c.chunk:
        return Cost(moved + queries + targets + _errors(c) + rows + keys, flops, passes=3)
    if c.key_weight != 0:
        keys *= 2 * (c.length // c.chunk)
        flops += _KEY_STEP[c.score] * _picked(c)
    flops += 2 * c.accesses * c.width
    return Cost(moved + 2 * rows + _errors(c) + keys, flops, passes=3)
