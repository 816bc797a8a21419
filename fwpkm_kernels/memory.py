"""The whole memory over a sequence: operators, the autograd Function, checks, and the public function."""

import math
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import Function

from . import _checks as checks
from ._autograd import in_backward, is_exporting, refuse_transforms
from ._operators import operator
from .carry import check_carry, count_carried, leave, prepend
from .chunks import count_read_positions, count_writes
from .compact import count_compact_rows, sparse_rows
from .coupled import coupled_memory
from .kernels import compute_dtype
from .lookup import check_lookup
from .options import Call, Options, check_options, from_public_order, in_public_order, schema_of
from .plan import row_dtype
from .records import Addresses, Carry, Inputs, MemoryOutput, Plan, Rows, each
from .sequence import Kept, run_backward, run_forward


@operator(
    "fast_weight_memory",
    schema="(Tensor queries, Tensor targets, Tensor keys, Tensor values, Tensor? gates, Tensor? mask, bool keep, "
    f"int carried, bool as_rows, {schema_of(Options)}) -> Tensor[]",
)
def _forward_op(  # type: ignore[no-untyped-def]
    queries, targets, keys, values, gates, mask, keep, carried, as_rows, *options
) -> list[Tensor]:
    """Queries, gates and mask have `carried` positions before those of the targets.

    Behind the results come the slots of the rows, where these are left of the values, and what is kept for backward.
    """
    o, inputs = Options(*options), Inputs(queries, targets, keys, values, gates, mask)
    checks.check_num_accesses(queries, count_most_accesses(queries, o.chunk_size, o.lookahead, o.top_k))
    if o.key_gradient == "all":
        # An activation checkpoint runs this again in a backward pass, where no tensor may be written in place, not even
        # a private table. With gradients enabled `coupled_memory` makes a new table for each chunk.
        with torch.set_grad_enabled(in_backward()):
            return list(coupled_memory(inputs.detach(), o, carried))
    results, kept = run_forward(inputs, keep, o, carried, compacted=as_rows)
    slot = [] if kept.slot is None else [kept.slot]
    return [*results, *slot, *(kept._replace(slot=None).flat() if keep else ())]


@_forward_op.register_fake
def _(queries, targets, keys, values, gates, mask, keep, carried, as_rows, *options):  # type: ignore[no-untyped-def]
    o = Options(*options)
    (batch, length), heads = targets.shape[:2], queries.shape[2]
    picks, dtype = heads * o.top_k, compute_dtype(values.dtype)

    def empty(dtype, *size):  # type: ignore[no-untyped-def]
        return queries.new_empty(size, dtype=dtype)

    reads = batch * count_read_positions(length, o.chunk_size, o.lookahead, o.boundary, carried)
    num_rows = count_compact_rows(reads * picks, values.shape[0]) if as_rows else values.shape[0]
    results = [
        empty(targets.dtype, *targets.shape),
        empty(keys.dtype, *keys.shape),
        empty(values.dtype, num_rows, values.shape[1]),
        empty(torch.int64, batch, length, picks),
        empty(dtype, batch, length, picks),
    ]
    if as_rows:
        results.append(empty(torch.int64, num_rows))
    if keep and o.key_gradient != "all":
        of_keys = (count_writes(length, o.chunk_size, o.boundary) + 1 if o.keys_move else 1, *keys.shape)
        if o.keys_move and o.keeps_picks(batch, keys.shape[2]):
            of_keys = (reads, heads, 2, o.top_k, keys.shape[3])
        accesses = reads * picks
        # order, rows, start, end; a compact table has no more rows than there are accesses
        of_plan = (torch.int64, torch.int32 if as_rows else row_dtype(values.shape[0]), torch.int32, torch.int32)
        results += Kept(
            found=Addresses.empty(queries.new_empty(reads, heads), o.top_k, dtype),
            chunk_keys=empty(keys.dtype, *of_keys),
            write_weights=empty(dtype, reads, picks),
            counts=empty(torch.int32, reads, picks),
            plan=Plan(*(empty(kind, accesses) for kind in of_plan)),
            log=empty(values.dtype, accesses, values.shape[1]),
            ids=empty(torch.int64, reads, picks) if as_rows else None,
        ).flat()
    return results


@operator(
    "fast_weight_memory_backward",
    schema="(Tensor? grad_output, Tensor? grad_keys, Tensor? grad_values, Tensor queries, Tensor targets, "
    "Tensor? gates, Tensor? mask, int num_keys, bool with_addresses, bool spread, int carried, str group, "
    f"Tensor[] kept, {schema_of(Options)}) -> Tensor[]",
)
def _backward_op(  # type: ignore[no-untyped-def]
    grad_output, grad_keys, grad_values, queries, targets, gates, mask, num_keys, with_addresses, spread, carried,
    group, kept, *options,
) -> list[Tensor]:  # fmt: skip
    grads = (grad_output, grad_keys, grad_values)
    kept, o = Kept.of(kept), Options(*options)
    how = (num_keys, with_addresses, kept, o, carried)
    return run_backward(queries, targets, gates, mask, grads, *how, spread=spread, group=group)


@_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_keys, grad_values, queries, targets, gates, mask, num_keys, with_addresses, spread, carried,
    group, kept, *options,
):  # fmt: skip
    kept = Kept.of(kept)
    heads, width = queries.shape[2:]
    num_rows = num_keys**2 if kept.slot is None or spread else kept.slot.shape[0]
    shapes = [
        (queries.shape if with_addresses else (0,), queries.dtype),
        (targets.shape, targets.dtype),
        ((heads, 2, num_keys, width // 2) if with_addresses else (0,), kept.chunk_keys.dtype),
        ((num_rows, targets.shape[2]), kept.log.dtype),
    ]
    if gates is not None:
        shapes.append((gates.shape, gates.dtype))
    return [queries.new_empty(size, dtype=kind) for size, kind in shapes]


class _FastWeightMemoryBackward(Function):
    """First derivatives; differentiating them again raises."""

    @staticmethod
    def forward(
        ctx: Any, o: Options, num_keys: int, with_addresses: bool, with_values: bool, call: Call, *tensors: Any
    ) -> Any:
        # The keys are an argument even where only copies of them are read, so that a second derivative through them
        # raises. The values are none: where only they need gradients, their gradient does not depend on them.
        grads, (queries, targets, keys, gates, mask, *saved) = tensors[:3], tensors[3:]
        if o.key_gradient == "all":
            (values,) = saved
            results = _coupled_backward(Inputs(queries, targets, keys, values, gates, mask), grads, o, call.carried)
        else:
            inputs = (queries, targets, gates, mask)
            how = (num_keys, with_addresses, with_values and not call.sparse_grad, call.carried, call.group)
            results = _backward_op(*grads, *inputs, *how, saved, *o)
            if with_values and call.sparse_grad:
                results[3] = sparse_rows(results[3], saved[-1], num_keys**2)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("fast_weight_memory cannot be differentiated twice")


@checks.without_autocast
def _coupled_backward(inputs: Inputs, grads: tuple[Tensor | None, ...], o: Options, carried: int) -> tuple[Tensor, ...]:
    """Run the composed path again, this time with autograd, and differentiate it."""
    *differentiable, mask = inputs
    leaves: Any = each(lambda x: x.detach().requires_grad_(), *differentiable)
    with torch.enable_grad():
        outputs = coupled_memory(Inputs._make((*leaves, mask)), o, carried)[:3]
    used = [(x, grad.contiguous()) for x, grad in zip(outputs, grads, strict=True) if grad is not None]
    tensors, incoming = zip(*used, strict=True)
    present = [x for x in leaves if x is not None]
    return torch.autograd.grad(tensors, present, incoming, allow_unused=True, materialize_grads=True)


class FastWeightMemory(Function):
    """`fast_weight_memory` as an autograd Function: apply(queries, targets, keys, values, chunk_size, top_k, lookahead,
    score, eps, weighting, temperature, gates, mask, lr, weight_decay, clip, addressing_weight, key_gradient, step,
    boundary, precision, backend, carried, final, sparse_grad, group) gives output, keys, values, slots and weights;
    with final="rows" the values are those of the rows, and their slots come last. Queries, gates and mask have
    `carried` tokens, 0 or `lookahead`, before those of the targets: they are written only."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        """Validate and run; backward keeps the small inputs and an undo log of the rows that were read, no table."""
        # Dynamo leaves ctx out where forward has as many parameters as apply has arguments. With *args it has two, and
        # apply has more; with some named, ctx would be lost at one number of options.
        inputs, o, call = from_public_order(*args)
        refuse_transforms("fast_weight_memory", inputs)
        o = check_memory(inputs, o, call.carried)
        call.check(o)
        # PyTorch would otherwise fill a table with zeros for a final table whose gradient nobody uses.
        ctx.set_materialize_grads(False)
        results = _forward_op(*inputs, True, call.carried, call.is_rows, *o)
        output, new_keys, new_values, slots, weights, *kept = results
        if o.key_gradient == "all":
            kept = [inputs.values]
        slot, kept = (kept[:1], kept[1:]) if call.is_rows else ([], kept)
        ctx.save_for_backward(inputs.queries, inputs.targets, inputs.keys, inputs.gates, inputs.mask, *kept, *slot)
        ctx.mark_non_differentiable(slots, weights, *slot)
        ctx.options, ctx.num_keys, ctx.call = o, inputs.keys.shape[2], call
        return (output, new_keys, new_values, slots, weights, *slot)

    @staticmethod
    def backward(ctx: Any, grad_output: Any, grad_keys: Any, grad_values: Any, *_: Any) -> Any:
        """The closed form: chunks in reverse, one gradient of the table that they read, rows from the undo log."""
        none, of_call = [None] * len(Options._fields), [None] * len(Call._fields)
        grads = (grad_output, grad_keys, grad_values)
        if all(grad is None for grad in grads):
            return (None, None, None, None, *in_public_order(none, None, None), *of_call)
        queries, targets, keys, gates, mask, *saved = ctx.saved_tensors
        refuse_transforms("fast_weight_memory", (*grads, queries, targets, keys, gates, mask, *saved))
        needed = ctx.needs_input_grad[:4]
        how = (ctx.options, ctx.num_keys, needed[0] or needed[2], needed[3], ctx.call)
        results = _FastWeightMemoryBackward.apply(*how, *grads, queries, targets, keys, gates, mask, *saved)
        grad_gates = results[4] if gates is not None else None
        main = (result if is_needed else None for result, is_needed in zip(results[:4], needed, strict=True))
        return (*main, *in_public_order(none, grad_gates, None), *of_call)


# Dynamo cannot trace the backward, and Dynamo of torch 2.11 fails in the code that it runs instead, so it must skip the
# whole function. This decorator, unlike torch.compiler.disable, does not import Dynamo when the package is imported.
@_disable_dynamo
def _train_coupled(*args: Any) -> Any:
    """`FastWeightMemory` under key_gradient="all", as it is, in a compiled function too."""
    return FastWeightMemory.apply(*args)


def count_most_accesses(queries: Tensor, chunk_size: int, lookahead: int, top_k: int) -> int:
    """How many accesses a sequence can make, with those of tokens that are read again."""
    *batch, length, heads, _ = queries.shape
    return math.prod(batch) * (length + length // chunk_size * lookahead) * heads * top_k


def check_memory(inputs: Inputs, o: Options, carried: int = 0, tokens: str = "B, T") -> Options:
    """Validate the arguments of the whole memory; returns the options with their numbers as ints and floats.

    `carried` says how many tokens queries, gates and mask have before those of the targets. `tokens` names the
    dimensions of the tokens: "B, T", or "T".
    """
    if checks.check_int("carried", carried, minimum=0) not in (0, o.lookahead if o.boundary == "carry" else 0):
        raise ValueError(f'`carried` must be 0, or `lookahead` with `boundary`="carry", got {carried}')
    queries, targets, keys, values, gates, mask = inputs
    rank = len(tokens.split())
    checks.check_tensor("queries", queries, rank + 2, f"[{tokens}, H, Dk]")
    checks.check_tensor("targets", targets, rank + 1, f"[{tokens}, D]")
    checks.check_tensor("values", values, 2, "[N, D]")
    lookup = check_lookup(queries, keys, o.lookup)
    rule = f"`queries` [{tokens}, H, Dk] and `targets` [{tokens}, D] must agree in {' and '.join(tokens.split(', '))}"
    *batch, length = targets.shape[:rank]
    checks.check_shapes(list(queries.shape[:rank]) == [*batch, carried + length], rule, queries, targets)
    rule = "`targets` must have the width of `values`"
    checks.check_shapes(targets.shape[-1] == values.shape[1], rule, targets, values)
    checks.check_table(values, keys)
    floats = {"queries": queries, "targets": targets, "keys": keys, "values": values}
    for name, x in (("gates", gates), ("mask", mask)):
        if x is not None:
            checks.check_tensor(name, x, rank, f"[{tokens}]")
            rule = f"`{name}` must be [{tokens}] like `queries` [{tokens}, H, Dk]"
            checks.check_shapes(x.shape == queries.shape[:rank], rule, x, queries)
    if gates is not None:
        floats["gates"] = gates
    for name, x in floats.items():
        checks.check_float(name, x)
    checks.check_together(**floats)
    if mask is not None:
        checks.check_mask("mask", mask)
        checks.check_device("mask", mask, "values", values)
    o = check_options(o._replace(top_k=lookup.top_k, eps=lookup.eps), compute_dtype(values.dtype))
    checks.check_num_accesses(queries, count_most_accesses(queries, o.chunk_size, o.lookahead, o.top_k))
    return o


def fast_weight_memory(
    queries: Tensor,
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    chunk_size: int = 512,
    top_k: int = 8,
    lookahead: int = 1,
    score: str = "idw",
    eps: float = 1e-3,
    weighting: str = "softmax",
    temperature: float = 1.0,
    gates: Tensor | None = None,
    mask: Tensor | None = None,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    clip: float | None = None,
    addressing_weight: float = 1.0,
    key_gradient: str = "addressing",
    step: str = "paper",
    boundary: str = "carry",
    precision: str = "tf32x3",
    backend: str = "auto",
    carry: Carry | None = None,
    return_carry: bool = False,
    final: str = "table",
    sparse_grad: bool = False,
) -> Any:
    """Read a sequence, and rewrite keys and values after each chunk from the state that the chunk read.

    A token t reads p_t = Σ_j w_tj · values[slot_tj]. The pair (t, t + lookahead) is written with the error
    e_t = p_t - targets_{t + lookahead}; one write of all pairs of a chunk, over the whole batch, is::

        G[s] = (1 / n_s) · Σ_{(t, j): slot = s} α_t · gates_t · mask_t · w_tj · e_t
        values[s] = values[s] - lr · ( clamp(G[s], ±clip) + weight_decay · values[s] )
        keys      = keys      - lr · ( clamp(∇L,   ±clip) + weight_decay · keys )          see `product_key_update`

    n_s counts the accesses of slot s. `step` says what α is, up to a ratio (below): 1 with "gradient", the plain
    gradient of the paper's memory loss as printed (Eq. 13-15: a sum over the chunk of ½ · gates · |target - p|², rows
    averaged over their accesses); J with "paper", which is what the released code does, J times that; and 1 / Σ_j w_tj²
    with "normalized", which rewrites a token alone on its slots exactly (0 where the sum underflows). Source: FwPKM,
    arXiv 2601.00671.

    Boundaries. ``"carry"``: chunk c writes the pairs whose targets lie in it; the first `lookahead` of them belong to
    the chunk before and are looked up and read again, for writing only. A chunk that is not full is read and not
    written: so the last `lookahead` tokens and an unfilled last chunk of a call are not written. A sequence may be cut
    anywhere, in training by `carry` and `return_carry`, in streaming by `fast_weight_memory_step`.
    ``"drop"``, the authors' training code: a chunk writes the pairs that lie within it; n_s counts all its accesses,
    also of unwritten and masked tokens, and α has the ratio S / E, E being the positions written and S those read (with
    a mask, the unmasked among the E); the last chunk is written even if it is not full.
    Every chunk that is written decays and takes the key step, even if nothing in it is written or unmasked.

    NaN and infinities. A query that is not finite, or whose square overflows, picks sub-keys as `product_key_lookup`
    says. Its weights, and so its output, are NaN (but 0 under "relu" if its scores are -inf); the other tokens of its
    chunk read what they would without it. The write turns its slots to NaN, and the key step its sub-keys and those
    picked beside them (see `product_key_update`): so does what reads them later become. NaN in a target or gate goes to
    the slots of its token's pair. A mask or gate of 0 multiplies, which does not hide NaN.

    Gradients go through all chunks and writes to `queries`, `targets`, `keys`, `values` and `gates`; slots, counts and
    the mask are constants. What is kept for them is O(B · T · (J + 1) · (D + Dk)): the rows that each chunk reads, as
    they were, and the sub-keys that it picks (or its keys whole where that is less), and no table of values; backward
    fills one dense gradient of the table, unless `sparse_grad`. Without gradients nothing is kept, and one private copy
    of the table is written in place. Inputs are never changed.

    Rows. ``final="rows"`` leaves the rows of `values` that the call has read, as they are after the last write, in
    place of a new table: all others are what they were. Reads and writes run in a table of these rows alone, with the
    same bits, so that nothing has N rows but `values`, and their gradient if they need one that is not sparse. There
    are R = min(N, accesses) places, whatever the data: re-reads count, unused places stand last. `apply_rows_` writes
    the rows to a table. Their values are differentiable, as a final table is.

    Segments. Final keys and values are differentiable too: pass them to the next call to train across segments, and
    detach() them to truncate. What a segment has read and not written yet is its carry. The next call that takes it
    with the final keys and values goes on as if both were one sequence, in values and gradients: it looks the tokens
    of the carry up and reads them again, which finds what it found, since nothing has been written since. Segments may
    have any lengths, 0 too, and must have the same options. A carry is made of slices of what was given, and no copy;
    its gradients flow into the segments that its tokens came from, unless `Carry.detach` ends them.

    torch.compile. Numbers such as `lr` are constants of what is compiled: every new value compiles again, and after
    torch._dynamo.config.recompile_limit of them (8) fullgraph=True raises, while without it the call runs eagerly. A
    schedule that compiles once is a tensor: gates times f write to the values what lr times f would, without clip and
    weight_decay. They belong to tokens, not to chunks, and the key step keeps its `lr`. For other schedules call
    eagerly, let `lr` take few values, or raise that limit.

    Args:
        queries: [B, T, H, Dk]. Half precision is cast to float32 on load, here and below.
        targets: [B, T, D].
        keys: [H, 2, n, Dk/2].
        values: [N, D], N = n²; one table for all heads and the whole batch. A half-precision table is rounded once per
            row and write, so steps below its rounding are lost: where lr is far below 1 a table of float32 learns on.
        chunk_size: C, positions that are read before they are written.
        top_k: K, picks per head, from 1 to n; J = H·K.
        lookahead: L, from 0 to C.
        score, eps, precision: of the lookup; see `product_key_lookup`.
        weighting: "softmax", "silu" or "relu" of scores / temperature, over the J picks of a token together.
        temperature: > 0.
        gates: [B, T], write gates; None is all ones.
        mask: [B, T], bool, integer or real, >= 0. It multiplies, and mask > 0 means unmasked. None is all ones. Not
            checked for its sign: a negative or NaN mask multiplies too, and counts as masked.
        lr: step size of values and keys; a finite number in the dtype of the sums, as all numbers here.
        weight_decay: >= 0; of all rows of both, at every write. 0 leaves rows that no token reads bitwise unchanged.
        clip: clamp gradients of values and keys to [-clip, clip]; >= 0, None does not clamp.
        addressing_weight: λ, weight of the key step's loss; 0 removes the loss, not the decay.
        key_gradient: "addressing", or "all": the memorisation loss moves the keys too. The gradient of that is of
            second order; "all" is a plain composed path, slower, and with gradients torch.compile runs it as it is:
            fullgraph=True raises.
        step: "paper", "gradient" or "normalized".
        boundary: "carry" or "drop".
        backend: "auto" (Triton for GPU tensors, PyTorch for CPU tensors), "torch" or "triton".
        carry: what the segment before has left; None begins a sequence. It needs boundary="carry".
        return_carry: whether to return what this segment leaves, likewise.
        final: "table", or "rows", which needs weight_decay=0 and key_gradient="addressing".
        sparse_grad: give the gradient of `values` as a sparse COO tensor [N, D] of the rows that the call has read;
            needs final="rows". It is coalesced on CPUs. On a GPU, where the number of rows would have to be waited
            for, it has R entries, and those of unused places are 0 at the first slot. torch.optim.SGD and SparseAdam
            take it. PyTorch takes it through no cast and no view: with values=parameter.bfloat16() backward raises. Not
            with torch.compile, which has no sparse gradients.

    Returns:
        output [B, T, D] in the targets' dtype; keys and values after the last write; slots (int64) and weights
        (float32; float64 for float64) of the output reads, [B, T, J] with j = head·K + pick, not differentiable.
        T = 0 gives empty results and copies of keys and values. Under final="rows" values are `Rows`: document [R], all
        0, slot [R], ascending, -1 in unused places, and value [R, D]. With `return_carry` a pair of all that and a
        `Carry`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    o = Options(
        chunk_size, top_k, lookahead, score, eps, weighting, temperature, lr, weight_decay, clip,
        addressing_weight, key_gradient, step, boundary, precision, backend,
    )  # fmt: skip
    inputs = Inputs(queries, targets, keys, values, gates, mask)
    result, left = run_memory(inputs, carry, return_carry, final, sparse_grad, o)
    return (result, left) if return_carry else result


def run_memory(
    inputs: Inputs,
    carry: Carry | None,
    return_carry: bool,
    final: str,
    sparse_grad: bool,
    o: Options,
    *,
    group: str = "",
    carry_name: str = "carry",
) -> tuple[MemoryOutput, Carry | None]:
    """`fast_weight_memory`, and the carry with `return_carry`. Errors name the carry by `carry_name`.

    With the name of a process `group`, targets, values and the carry's targets are this rank's columns of them.
    """
    refuse_transforms("fast_weight_memory", (*inputs, *(carry if isinstance(carry, Carry) else ())))
    checks.check_flag("return_carry", return_carry)
    position, carried, waiting, targets = 0, 0, 0, inputs.targets
    if carry is not None or return_carry:
        o = check_memory(inputs, o)
        check_carry(carry, inputs, o, carry_name)
    if carry is not None:
        position, carried = carry.position, count_carried(carry.position, o)
        waiting = carry.queries.shape[1] - carried
        inputs = prepend(carry, inputs)
        targets = inputs.targets[:, carried:]
    call = Call(carried, final, sparse_grad, group)
    result = _run(inputs._replace(targets=targets), o, call)
    if carry is not None:  # the waiting tokens' results were those of earlier segments
        output, slots, weights = (x[:, waiting:] for x in (result.output, result.slots, result.weights))
        result = result._replace(output=output, slots=slots, weights=weights)
    return result, leave(inputs, position + result.output.shape[1], o) if return_carry else None


def _run(inputs: Inputs, o: Options, call: Call) -> MemoryOutput:
    """The memory with or without gradients."""
    # A program of torch.export has no gradients, so it keeps nothing for them.
    differentiable = torch.is_grad_enabled() and not is_exporting()
    if differentiable and any(isinstance(x, Tensor) and x.requires_grad for x in inputs[:-1]):  # the mask is a constant
        is_coupled = isinstance(o.key_gradient, str) and o.key_gradient == "all"
        train = _train_coupled if is_coupled else FastWeightMemory.apply
        return _as_output(*train(*inputs[:4], *in_public_order(o, inputs.gates, inputs.mask), *call))
    o = check_memory(inputs, o, call.carried)
    call.check(o)
    # The inputs are detached, even the mask, which may require gradients. A block of no_grad would not do, since a
    # program of torch.export that raises in one leaves gradients disabled.
    return _as_output(*_forward_op(*inputs.detach(), False, call.carried, call.is_rows, *o))


def _as_output(output: Tensor, keys: Tensor, values: Tensor, slots: Tensor, weights: Tensor, *slot: Tensor) -> Any:
    """The record of what the operator gives; with the slots of the rows that are left of the values, if they are."""
    left = Rows(torch.zeros_like(slot[0]), slot[0], values) if slot else values
    return MemoryOutput(output, keys, left, slots, weights)
