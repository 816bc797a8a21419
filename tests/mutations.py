"""The mutation check: small faults are planted one at a time in a copy of the package, and the tests must catch each.

    python -m tests.mutations [--only NAME ...] [--list] [--write] [--jobs N]

For each fault the tests that should notice it run first; if none fails, the whole of `make test` does. A fault that
survives, or whose text is gone, makes the exit status 1. `--write` writes tests/MUTATIONS.md, with `--only` the rows of
these faults alone.

What counts is a test that fails. An error in collecting them, as by a copy that cannot be imported, does not; and the
tests that caught something run once more at the end, all of them, on a copy without a fault, and must pass.
"""

import argparse
import concurrent.futures
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "MUTATIONS.md"
#: Tests that fail for changes of the code that are right, too.
IGNORED = ("tests/test_mutations.py", "tests/test_compiled.py")
#: Seconds. A fault may make a loop endless: that is noticed too.
FEW_LIMIT, ALL_LIMIT = 900, 7200


class Fault(NamedTuple):
    """A slip that a good engineer could make, and that changes results."""

    name: str
    file: str  #: in fwpkm_kernels/
    before: str  #: occurs once in the file
    after: str
    breaks: str
    tests: str  #: files of tests/ that should notice it, without "test_" and ".py"
    select: str = ""  #: which of their tests, as pytest's -k takes it


class GpuFault(NamedTuple):
    """A slip that changes nothing where the programs of a kernel run one after the other."""

    file: str
    change: str
    shown_by: str


FAULTS = [
    Fault(
        "tie-to-the-highest",
        "kernels/_common.py",
        "tl.min(tl.where(bits == best[:, None], offs, 0x7FFFFFFF), axis=1)",
        "tl.max(tl.where(bits == best[:, None], offs, -1), axis=1)",
        "of equal scores the highest index wins",
        "lookup",
        "ties or equal",
    ),
    Fault(
        "one-sub-key-too-many",
        "kernels/lookup.py",
        "mask_n = offs_n < NUM_KEYS",
        "mask_n = offs_n <= NUM_KEYS",
        "the first sub-key of the next half is a candidate too",
        "lookup",
        "matches_reference",
    ),
    Fault(
        "norm-dropped",
        "kernels/lookup.py",
        "2.0 * dots - k_norm[None, :]",
        "2.0 * dots",
        "idw ranks sub-keys without |k|²",
        "lookup",
        "matches_reference",
    ),
    Fault(
        "second-half-of-the-first",
        "kernels/lookup.py",
        "k_ptrs + stride_ka + row2 * stride_kn",
        "k_ptrs + row2 * stride_kn",
        "the winners of the second half are scored against sub-keys of the first",
        "lookup",
        "matches_reference",
    ),
    Fault(
        "slot-transposed",
        "kernels/lookup.py",
        "tl.gather(keys1, first, 0).to(tl.int64) * NUM_KEYS + tl.gather(keys2, second, 0)",
        "tl.gather(keys1, first, 0).to(tl.int64) + tl.gather(keys2, second, 0) * NUM_KEYS",
        "slot = j₁ + j₂·n",
        "lookup",
        "matches_reference",
    ),
    Fault(
        "pairs-without-the-border",
        "lookup.py",
        "(i + 1) * (j + 1) <= top_k]",
        "(i + 1) * (j + 1) < max(top_k, 2)]",
        "pairs with (i+1)(j+1) = K cannot win",
        "lookup",
        "matches_reference",
    ),
    Fault(
        "ties-left-to-topk",
        "lookup.py",
        "(scores >= values[..., -1:])",
        "(scores > values[..., -1:])",
        "rows with equals that were left out are not sorted again",
        "lookup",
        "ties or equal",
    ),
    Fault(
        "every-slab-first",
        "kernels/lookup.py",
        "            sub_keys[begin : begin + rows],",
        "            sub_keys,",
        "all slabs of rows write the first rows' sub-keys, the others stay unwritten",
        "lookup addressing",
        "slabs",
    ),
    Fault(
        "distance-without-eps",
        "kernels/lookup.py",
        "2.0 * factor / (tl.full([], eps, dtype) + tl.sum(k * k, axis=1))",
        "2.0 * factor / tl.sum(k * k, axis=1)",
        "∂s/∂k has no ε",
        "lookup",
        "near_keys or matches_reference",
    ),
    Fault(
        "score-slope-without-2",
        "lookup.py",
        "factors = 2.0 * factors / distances",
        "factors = factors / distances",
        "∂s/∂k without its factor 2",
        "lookup",
        "matches_reference",
    ),
    Fault(
        "sub-keys-of-a-slot-swapped",
        "lookup.py",
        "(slots // num_keys, slots % num_keys), dim=2)",
        "(slots % num_keys, slots // num_keys), dim=2)",
        "i % n for the first half, i // n for the second",
        "lookup",
        "matches_reference",
    ),
    Fault(
        "one-pick-too-many",
        "kernels/gather.py",
        "mask_j = offs_j < J",
        "mask_j = offs_j <= J",
        "the first pick of the next token is read too",
        "gather",
        "matches_reference",
    ),
    Fault(
        "slots-taken-for-contiguous",
        "kernels/gather.py",
        "slots_ptr + i_m * stride_sm",
        "slots_ptr + i_m * J",
        "the stride of a token's slots is assumed",
        "gather",
        "strides",
    ),
    Fault(
        "float64-summed-in-float32",
        "kernels/gather.py",
        "tl.float64 if values_ptr.dtype.element_ty == tl.float64 else tl.float32",
        "tl.float32",
        "float64 tables are summed in float32",
        "gather",
        "dtypes",
    ),
    Fault(
        "dots-without-lr",
        "kernels/gather.py",
        "dot = scale * tl.sum(",
        "dot = tl.sum(",
        "the gradient of the write weights without lr",
        "update",
        "options",
    ),
    Fault(
        "sums-in-half-precision",
        "kernels/segments.py",
        "dtype=compute_dtype(coefficients.dtype)",
        "dtype=vectors.dtype",
        "accesses of half-precision vectors are summed in half precision",
        "gather addressing",
        "dtypes",
    ),
    Fault(
        "two-pieces-taken-for-one",
        "kernels/segments.py",
        "end - i_a >= 2 * PIECE, i_a + PIECE, end)",
        "end - i_a > 2 * PIECE, i_a + PIECE, end)",
        "the last piece of a hot segment is counted twice where it is full",
        "update gather",
        "hot",
    ),
    Fault(
        "clamp-above-only",
        "kernels/segments.py",
        "tl.where(total > clip, clip, tl.where(total < -clip, -clip, total))",
        "tl.where(total > clip, clip, total)",
        "G is not bounded from below",
        "update",
        "options or hot",
    ),
    Fault(
        "clamp-active-at-its-bound",
        "kernels/segments.py",
        "(total <= clip) & (total >= -clip)",
        "(total < clip) & (total > -clip)",
        "no gradient where |G| = clip",
        "update",
        "bound_of_the_clip",
    ),
    Fault(
        "log-of-hot-rows-missing",
        "kernels/segments.py",
        "        if LOG:\n            log = log_ptr + start.to(tl.int64) * D + offs_d\n"
        "            tl.store(log, old.to(log_ptr.dtype.element_ty), mask=mask_d)\n",
        "",
        "rows of many accesses are not in the undo log",
        "memory_kernels memory",
        "log",
    ),
    Fault(
        "log-of-new-rows",
        "kernels/segments.py",
        "                    tl.store(log, old.to(",
        "                    tl.store(log, total.to(",
        "the undo log keeps rows as they are after the write",
        "memory_kernels memory",
        "log",
    ),
    Fault(
        "written-rows-decay-twice",
        "kernels/update.py",
        "decay_rows(values, written.index_fill_(0, rows.long(), 1), decay=decay)",
        "decay_rows(values, written, decay=decay)",
        "rows that were written, decay included, decay again",
        "update",
        "in_place",
    ),
    Fault(
        "order-taken-for-its-inverse",
        "kernels/update.py",
        "torch.empty_like(start).scatter_(0, order, start)",
        "start[order]",
        "an access finds another row of Ĝ'",
        "update",
        "options",
    ),
    Fault(
        "decay-missing-in-backward-of-a-write",
        "update.py",
        "grad_out * (1.0 - lr * weight_decay)",
        "grad_out",
        "dvalues without 1 - lr·wd",
        "update",
        "options",
    ),
    Fault(
        "gate-in-its-own-gradient",
        "update.py",
        'times_other(per_row, "gates")',
        'times_other(per_row, "")',
        "dg has the factor g",
        "update",
        "masks_and_gates",
    ),
    Fault(
        "clamp-below-missing",
        "update.py",
        "totals.clamp_(-clip, clip)",
        "totals.clamp_(max=clip)",
        "G is not bounded from below",
        "update",
        "options or hot",
    ),
    Fault(
        "clamp-active-at-its-bound-torch",
        "update.py",
        "totals.abs() <= clip",
        "totals.abs() < clip",
        "no gradient where |G| = clip",
        "update",
        "bound_of_the_clip",
    ),
    Fault(
        "rounded-twice",
        "update.py",
        "rows.to(steps.dtype).mul_(decay)",
        "rows.mul_(decay).to(steps.dtype)",
        "a half-precision row is rounded after the decay and after the step",
        "update",
        "rounded_once",
    ),
    Fault(
        "counted-in-another-order",
        "plan.py",
        "counted[plan.order]",
        "counted",
        "n_s of masked writes is that of other accesses",
        "plan",
    ),
    Fault(
        "count-slots-found-never",
        "plan.py",
        "last = torch.searchsorted(counted, plan.rows, right=True, out_int32=is_narrow)",
        "last = torch.searchsorted(counted, plan.rows, out_int32=is_narrow)",
        "n_s over `count_slots` is always 1",
        "plan",
    ),
    Fault(
        "coefficients-in-another-order",
        "plan.py",
        "coefficients.reshape(-1)[plan.order]",
        "coefficients.reshape(-1)",
        "sums over segments with coefficients of other accesses",
        "plan",
    ),
    Fault(
        "rows-of-33-bits",
        "plan.py",
        "num_slots <= NARROW_ROWS",
        "num_slots <= 2 * NARROW_ROWS",
        "chunk·N + slot overflows int32",
        "chunks plan scale",
    ),
    Fault(
        "first-row-without-probability",
        "kernels/plan.py",
        "(token >= first_row)[:, None]",
        "(token > first_row)[:, None]",
        "the first row of a key step counts as a re-read",
        "plan addressing",
        "counting or joint",
    ),
    Fault(
        "own-programs-picks-before",
        "kernels/plan.py",
        "(offs_p < i_program)[:, None]",
        "(offs_p <= i_program)[:, None]",
        "a pick's place is one tile of picks too far",
        "plan",
        "picks or programs",
    ),
    Fault(
        "own-bit-counted",
        "kernels/plan.py",
        "((1 << i_token) - 1)",
        "((2 << i_token) - 1)",
        "a pick's place counts the pick itself",
        "plan",
        "picks or programs",
    ),
    Fault(
        "heads-not-in-the-mean",
        "kernels/addressing.py",
        "num_rows=queries.shape[0] * heads,",
        "num_rows=queries.shape[0],",
        "P̄ is the mean over tokens, not over rows of all heads",
        "addressing",
        "matches_reference or pooled",
    ),
    Fault(
        "second-derivative-without-the-distance",
        "kernels/addressing.py",
        "        if IDW:\n            grad_p += u * dot\n",
        "",
        "∂²s/∂k² without the term of the distance in the denominator",
        "addressing",
        "matches_reference or joint",
    ),
    Fault(
        "halves-of-a-slot-swapped",
        "kernels/addressing.py",
        "tl.where(i_half == 0, slot // NUM_KEYS, slot % NUM_KEYS)",
        "tl.where(i_half == 1, slot // NUM_KEYS, slot % NUM_KEYS)",
        "i % n for the first half, i // n for the second",
        "addressing",
        "joint",
    ),
    Fault(
        "decay-missing-where-no-key-step-is",
        "kernels/addressing.py",
        "grad_keys = grad_new_keys * decay",
        "grad_keys = grad_new_keys.clone()",
        "dkeys without 1 - lr·wd under λ = 0",
        "addressing memory",
        "options or joint",
    ),
    Fault(
        "unpicked-keys-stay-in-place",
        "kernels/addressing.py",
        "unpicked = None if in_place and decay == 1.0 else out",
        "unpicked = None if in_place else out",
        "in place, sub-keys that nobody picks do not decay",
        "addressing",
        "test_out",
    ),
    Fault(
        "heads-apart",
        "addressing.py",
        "_sum_picks(coefficients, plan, num_keys).sum(0)[sub_keys % (2 * num_keys)]",
        "_sum_picks(coefficients, plan, num_keys).flatten()[sub_keys]",
        "P̄ of each head by itself",
        "addressing",
        "matches_reference or pooled",
    ),
    Fault(
        "lookahead-off-by-one",
        "kernels/chunks.py",
        "- chunk * C - L\n",
        "- chunk * C - L + 1\n",
        "a chunk writes one position too many, of an unknown target",
        "chunks",
        "kernels_say",
    ),
    Fault(
        "segment-without-equals",
        "kernels/chunks.py",
        "in_stop & (after <= key)",
        "in_stop & (after < key)",
        "a segment ends where it starts",
        "chunks",
        "kernels_say",
    ),
    Fault(
        "masked-accesses-counted",
        "kernels/chunks.py",
        "is_written & (token_mask > 0)",
        "is_written & (token_mask >= 0)",
        "n_s counts masked accesses",
        "chunks",
        "kernels_say",
    ),
    Fault(
        "n_s-missing",
        "kernels/chunks.py",
        "weights / counts.to(weights.dtype) * scale",
        "weights * scale",
        "write weights without 1/n_s",
        "chunks",
        "kernels_say",
    ),
    Fault(
        "paper-step-without-ratio",
        "kernels/chunks.py",
        "scale = J * ratio",
        "scale = J * ones",
        "α without S/E",
        "chunks",
        "kernels_say",
    ),
    Fault(
        "running-sum-one-too-far",
        "kernels/chunks.py",
        "running_ptr + first * B - 1",
        "running_ptr + first * B",
        "S leaves out the chunk's first token where that is unmasked",
        "chunks",
        "kernels_say",
    ),
    Fault(
        "normalized-slope-halved",
        "kernels/chunks.py",
        "per_weight -= 2.0 * per_read[:, None]",
        "per_weight -= per_read[:, None]",
        "dα/dw = -α·w/S",
        "chunks",
        "kernels_say",
    ),
    Fault(
        "gate-gradient-without-alpha",
        "kernels/chunks.py",
        "grad_gate = per_read * scale * token_mask",
        "grad_gate = per_read * token_mask",
        "dg without α",
        "chunks",
        "kernels_say",
    ),
    Fault(
        "temperature-missing-in-backward",
        "kernels/chunks.py",
        "grad / tl.full([], temperature, dtype)",
        "grad",
        "ds without 1/τ",
        "chunks",
        "kernels_say",
    ),
    Fault(
        "outputs-time-first",
        "kernels/chunks.py",
        "(item.to(tl.int64) * T + position)[:, None] * J",
        "(position.to(tl.int64) * B + item)[:, None] * J",
        "slots and weights as [T, B, J] instead of [B, T, J]",
        "chunks",
        "kernels_say",
    ),
    Fault(
        "last-reread-forgotten",
        "kernels/chunks.py",
        "(before <= REREADS)",
        "(before < REREADS)",
        "the gradient of the first token that is read again lacks that read",
        "chunks",
        "kernels_say",
    ),
    Fault(
        "log-rows-of-the-first-chunk",
        "kernels/chunks.py",
        "access = (first.to(tl.int64) * B * J)[:, None] + tl.load(",
        "access = tl.load(",
        "all chunks write the first one's rows of the log, the others' stay unwritten",
        "chunks",
        "kernels_say",
    ),
    Fault(
        "ratio-of-all-unmasked",
        "chunks.py",
        "torch.cumsum(reads.written & (mask > 0), 0)",
        "torch.cumsum(mask > 0, 0)",
        "S counts unmasked tokens that are not written",
        "chunks golden_chunk memory",
        "kernels_say or golden or all_options",
    ),
    Fault(
        "gate-gradient-without-mask",
        "chunks.py",
        "per_read * scale * mask",
        "per_read * scale",
        "dg of masked tokens is not 0",
        "chunks",
        "kernels_say",
    ),
    Fault(
        "rereads-replace-reads",
        "chunks.py",
        "by_token[chunk.first * batch : chunk.stop * batch] += ",
        "by_token[chunk.first * batch : chunk.stop * batch] = ",
        "the gradient of a token that is read again lacks its first read",
        "chunks",
        "kernels_say",
    ),
    Fault(
        "decay-moves-no-keys",
        "chunks.py",
        "self.addressing_weight != 0.0 or self.weight_decay != 0.0",
        "self.addressing_weight != 0.0",
        "under λ = 0 keys do not decay",
        "memory properties",
        "edges or golden or (in_torch and fast_weight_memory)",
    ),
    Fault(
        "unfilled-chunk-decays",
        "scans.py",
        "weight_decay=o.weight_decay if chunk.is_written else 0.0",
        "weight_decay=o.weight_decay",
        "a last chunk that waits decays the table, if gradients are wanted",
        "memory properties",
        "edges or (in_torch and fast_weight_memory)",
    ),
    Fault(
        "decay-missing-in-backward-of-a-sequence",
        "scans.py",
        "decay = 1.0 - o.lr * o.weight_decay if chunk.is_written else 1.0",
        "decay = 1.0",
        "dvalues without 1 - lr·wd",
        "memory properties",
        "edges or golden or (in_torch and fast_weight_memory)",
    ),
    Fault(
        "rereads-in-the-key-step-of-backward",
        "scans.py",
        "first_row=(chunk.start - chunk.first) * batch,",
        "first_row=0,",
        "backward counts re-reads in P̄",
        "memory properties",
        "edges or golden or (in_torch and fast_weight_memory)",
    ),
    Fault(
        "backward-in-forward-order",
        "scans.py",
        "for chunk in reversed(chunks):",
        "for chunk in chunks:",
        "the value scan's backward goes from the first chunk to the last",
        "golden_chunk memory properties",
        "edges or value_scan or (in_torch and fast_weight_memory)",
    ),
    Fault(
        "target-of-the-token-itself",
        "scans.py",
        "targets[chunk.first + o.lookahead : chunk.last + o.lookahead]",
        "targets[chunk.first : chunk.last]",
        "eₜ = pₜ - yₜ instead of yₜ₊L",
        "golden_chunk memory properties",
        "edges or value_scan or (in_torch and fast_weight_memory)",
    ),
    Fault(
        "keys-after-the-step",
        "scans.py",
        "keys = chunk_keys[index]\n",
        "keys = chunk_keys[min(index + 1, len(chunk_keys) - 1)]\n",
        "backward reads the keys that a chunk left instead of those that it found",
        "memory properties",
        "edges or golden or (in_torch and fast_weight_memory)",
    ),
    Fault(
        "unpaired-targets-unwritten",
        "scans.py",
        "[*paired, (len(by_time), len(by_time))]",
        "paired",
        "the gradient of targets that nothing is paired with is left as the memory was",
        "memory properties",
        "(in_torch and fast_weight_memory) or all_masked or edges",
    ),
    Fault(
        "weights-gradient-without-the-write",
        "kernels/memory.py",
        "tl.sum(old * grad_prediction[None, :], axis=1)",
        "tl.sum(old * grad_output[None, :], axis=1)",
        "dw = <dout, v> instead of <dout - r, v>",
        "memory_kernels",
        "matches_plain",
    ),
    Fault(
        "last-tile-for-both",
        "kernels/memory.py",
        "if BLOCK_J < J:",
        "if 2 * BLOCK_J < J:",
        "of rows that fill two tiles the second is taken for both",
        "memory_kernels",
        "tile or matches_plain",
    ),
    Fault(
        "restored-by-the-other-stride",
        "kernels/memory.py",
        "initial_ptr + offs_n[:, None] * stride_in",
        "initial_ptr + offs_n[:, None] * stride_vn",
        "rows of the initial table are found by the stride of the other one",
        "memory_kernels",
        "restore",
    ),
    Fault(
        "input-table-written",
        "memory.py",
        "new_values = values.clone(memory_format=torch.contiguous_format)",
        "new_values = values.contiguous()",
        "the memory writes into the table that it was given",
        "memory properties",
        "edges or golden or (in_torch and fast_weight_memory) or rows_that",
    ),
    Fault(
        "incoming-gradient-overwritten",
        "memory.py",
        "table_grad.zero_() if grad_values is None else table_grad.copy_(grad_values)",
        "table_grad = table_grad.zero_() if grad_values is None else grad_values.contiguous()",
        "backward writes into the gradient of the final table",
        "memory",
        "backward or gradient",
    ),
    Fault(
        "weights-seem-differentiable",
        "memory.py",
        "ctx.mark_non_differentiable(slots, weights)",
        "ctx.mark_non_differentiable(slots)",
        "a loss of the weights that are given back has a gradient of 0 and no error",
        "memory",
        "differentiable",
    ),
    Fault(
        "mean-over-tokens-alone",
        "coupled.py",
        "/ errors.numel()",
        "/ len(errors)",
        "ℓ without 1/D",
        "memory properties",
        "edges or (in_torch and fast_weight_memory)",
    ),
    Fault(
        "position-not-reset",
        "state.py",
        "for x in (self._touched, self._position, *(self._queue or ())):",
        "for x in (self._touched, *(self._queue or ())):",
        "after a reset the next token is not the first",
        "state",
        "reset",
    ),
    Fault(
        "flags-shared-with-a-clone",
        "state.py",
        "self._position.clone(), self._touched.clone()",
        "self._position.clone(), self._touched",
        "a clone and its original reset rows of each other, and miss their own",
        "state",
        "cop or clone",
    ),
    Fault(
        "queue-slot-not-cleared",
        "state.py",
        "x[first + self.position % o.chunk_size :] = 0",
        "x[first + self.position % o.chunk_size + 1 :] = 0",
        "a token that was written long ago is saved",
        "state",
        "equal_states",
    ),
    Fault(
        "loaded-rows-not-touched",
        "state.py",
        "            self._touched.fill_(1)\n        self._binding",
        "        self._binding",
        "a reset after loading leaves rows as they were loaded",
        "state",
        "load or safetensors or reset",
    ),
    Fault(
        "queue-without-the-carried",
        "kernels/streaming.py",
        "        row + lookahead.to(tl.int64) * B,\n",
        "        row,\n",
        "queries overwrite those that are carried",
        "streaming",
        "precision",
    ),
    Fault(
        "masked-pairs-counted",
        "kernels/streaming.py",
        "tl.sum(same >> 20, axis=1)",
        "tl.sum(same & 1023, axis=1)",
        "n_s counts masked pairs",
        "streaming_kernels",
    ),
    Fault(
        "gate-left-out",
        "kernels/streaming.py",
        "weight / count * scale * gate * factor",
        "weight / count * scale * factor",
        "a streamed write without its gate",
        "streaming_kernels",
    ),
    Fault(
        "order-of-equals-turned",
        "kernels/streaming.py",
        "(offs_b[None, :] < access[:, None])",
        "(offs_b[None, :] > access[:, None])",
        "accesses of a slot are added in another order than by a stable sort",
        "streaming_kernels",
    ),
    Fault(
        "touched-rows-not-flagged",
        "kernels/streaming.py",
        "    tl.store(touched_ptr + slot.to(tl.int64), tl.full([BLOCK_A], 1, tl.uint8), mask=mask_a)\n",
        "",
        "a reset leaves rows as they were written",
        "streaming_kernels state",
    ),
    Fault(
        "position-not-advanced",
        "streaming.py",
        "            position.fill_(now)\n",
        "",
        "every step takes its tokens for the first",
        "streaming properties",
        "(in_torch and fast_weight_memory_step) or empty_steps",
    ),
    Fault(
        "carried-off-by-one",
        "streaming.py",
        "buffer[: o.lookahead] = buffer[o.chunk_size :]",
        "buffer[: o.lookahead] = buffer[o.chunk_size - 1 : -1]",
        "the tokens before the last L are carried",
        "streaming properties",
        "(in_torch and fast_weight_memory_step) or strides",
    ),
    Fault(
        "second-chunk-taken-for-the-first",
        "streaming.py",
        "now < o.chunk_size",
        "now <= o.chunk_size",
        "the tokens carried into the second chunk are not written if it comes whole",
        "streaming properties",
        "(in_torch and fast_weight_memory_step) or strides",
    ),
    Fault(
        "key-step-over-the-carried",
        "streaming.py",
        "step_keys(keys, window[carried * batch :], half_scores",
        "step_keys(keys, window[: len(half_scores)], half_scores",
        "the queries of the key step are those of L tokens before",
        "streaming properties",
        "(in_torch and fast_weight_memory_step) or strides",
    ),
    Fault(
        "decayed-rows-not-flagged",
        "streaming.py",
        "        touched.fill_(1)\n    else:\n",
        "        pass\n    else:\n",
        "after a decay a reset leaves rows as they were decayed",
        "state",
        "reset",
    ),
    Fault(
        "replays-at-one-place",
        "graphs.py",
        "                self._place.fill_(place)\n",
        "",
        "every replay puts its tokens at the beginning of the queue",
        "graphs",
    ),
]

#: Triton's interpreter runs the programs of a launch one after the other, and knows neither streams nor devices.
ON_GPUS_ONLY = [
    GpuFault(
        "kernels/segments.py",
        "the partial sums of a hot segment are added in the launch that makes them",
        "two runs whose bits differ (`test_two_runs_are_bitwise_equal` in `make gpu`)",
    ),
    GpuFault(
        "plan.py",
        "`sum_at` by `index_add`, which is atomic on GPUs",
        "two runs whose bits differ; torch.use_deterministic_algorithms(True) refuses it",
    ),
    GpuFault(
        "streaming.py",
        "`lanes.wait(lanes.plans)` left out: a write starts before its plan is there",
        "replays that are not the eager steps (tests/test_graphs.py in `make gpu`)",
    ),
    GpuFault(
        "kernels/_common.py",
        "a launch without `torch.cuda.device(on.device)`",
        "an error on a machine of two GPUs, with tensors on the second",
    ),
    GpuFault(
        "kernels/*.py",
        "two warps of a program that share memory without a barrier: Triton's, not ours, to set",
        "compute-sanitizer --tool racecheck (`python -m benchmarks.sanitize`)",
    ),
]


class Result(NamedTuple):
    """What became of a fault."""

    caught_by: str  #: the test that failed first; "" if none did
    seconds: float
    trouble: str = ""  #: why there is no answer


#: What `run_pytest` gives in place of an exit status.
TIMED_OUT = -1000

#: Beside the tests of a copy: that a property fails is enough, the smallest example that it fails for is not needed.
CONFTEST = """
from hypothesis import Phase, settings

def pytest_configure(config):
    settings.register_profile("mutations", settings(), phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutations")
"""


def plant(fault: Fault, root: Path = ROOT) -> str:
    """The text of the file with the fault in it.

    Raises:
        ValueError: where the text that is to be replaced does not occur exactly once.
    """
    text = (root / "fwpkm_kernels" / fault.file).read_text("utf-8")
    count = text.count(fault.before)
    if count != 1:
        raise ValueError(
            f"its text occurs {count} times in fwpkm_kernels/{fault.file} and must occur once; "
            f"plant the same fault in the code as it is now: {fault.before!r}"
        )
    return text.replace(fault.before, fault.after)


def copy_checkout(to: Path) -> None:
    """The files that git knows, as they are now."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    (to / "conftest.py").write_text(CONFTEST)


def run_pytest(root: Path, arguments: list[str], limit: float) -> tuple[int, str]:
    """The exit status and the output of a run, in the checkout at `root`, that stops at the first failure."""
    # No bytecode, whose age goes by whole seconds; a fixed seed, so that a fault is caught by the same test each time.
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    command += arguments
    try:
        done = subprocess.run(
            command, cwd=root, env=os.environ | environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return TIMED_OUT, ""
    return done.returncode, done.stdout + done.stderr


def first_failure(status: int, output: str) -> str:
    """Which test failed first, "" if all passed.

    Raises:
        RuntimeError: if the tests did not run.
    """
    if status == TIMED_OUT:
        return "(the tests did not end)"
    if status < 0:
        return f"(Python died of signal {-status})"
    if status == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+\.py::\w+(?:\[.*?\])?)(?: - .*)?$", output, re.M)
    if status != 1 or failed is None:
        raise RuntimeError(f"pytest ended with status {status}: {output[-1500:]}")
    return failed[1]


def check(fault: Fault, root: Path) -> Result:
    """Plant a fault in the copy at `root`, run the tests there, and take it out again."""
    begin = time.monotonic()
    path = root / "fwpkm_kernels" / fault.file
    original = path.read_text("utf-8")
    files = [f"tests/test_{name}.py" for name in fault.tests.split()]
    # Kernels do not run in cases of the other backend, and PyTorch's cases are the faster ones for all else.
    select = f"not {'[torch' if fault.file.startswith('kernels/') else '[triton'}"
    select += f" and ({fault.select})" if fault.select else ""
    few = ["-m", "not slow", *files, "-k", select]
    everything = ["-m", "not slow", *(f"--ignore={name}" for name in IGNORED), "tests"]
    caught_by = trouble = ""
    try:
        path.write_text(plant(fault, root), "utf-8")
        caught_by = first_failure(*run_pytest(root, few, FEW_LIMIT))
        if not caught_by:
            caught_by = first_failure(*run_pytest(root, everything, ALL_LIMIT))
    except (ValueError, RuntimeError) as error:
        trouble = str(error)
    finally:
        path.write_text(original, "utf-8")
    return Result(caught_by, time.monotonic() - begin, trouble)


def check_all(faults: list[Fault], jobs: int) -> dict[str, Result]:
    """What became of each fault; several at a time, every job in a copy of its own.

    Raises:
        RuntimeError: if a test that caught something fails without a fault too.
    """
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="fwpkm-mutations-") as folder:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(jobs):
            copy_checkout(Path(folder) / str(number))
            copies.put(Path(folder) / str(number))

        def work(fault: Fault) -> tuple[Fault, Result]:
            root = copies.get()
            try:
                return fault, check(fault, root)
            finally:
                copies.put(root)

        with (
            concurrent.futures.ThreadPoolExecutor(jobs) as pool,
            tqdm(total=len(faults), unit="fault", dynamic_ncols=True) as bar,
        ):
            for done in concurrent.futures.as_completed([pool.submit(work, fault) for fault in faults]):
                fault, result = done.result()
                results[fault.name] = result
                bar.update()
                bar.set_postfix_str(f"{sum(bool(x.caught_by) for x in results.values())} caught")
                said = f"caught by {result.caught_by}" if result.caught_by else result.trouble or "SURVIVED"
                bar.write(f"{fault.name}: {said}")
        control = sorted({x.caught_by for x in results.values() if "::" in x.caught_by})
        if control:
            failed = first_failure(*run_pytest(copies.get(), control, ALL_LIMIT))
            if failed:
                raise RuntimeError(f"{failed} fails without a fault too")
    return results


def _code(text: str) -> str:
    """Code in a cell of a table, on one line."""
    text = text.strip("\n").replace("\n", " ⏎ ").replace("|", "\\|")
    return f"`{text.strip()}`" if text.strip() else "nothing"


def described(fault: Fault) -> str:
    """The cells of a fault's row that are known before it is planted."""
    breaks = fault.breaks.replace("|", "\\|")
    return f"{fault.name} | {fault.file} | {_code(fault.before)} → {_code(fault.after)} | {breaks}"


def rows_of_table() -> dict[str, str]:
    """The rows of the committed table, by the name of the fault."""
    lines = TABLE.read_text("utf-8").splitlines() if TABLE.exists() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.endswith(" s |")}


def table(rows: dict[str, str]) -> str:
    """The text of tests/MUTATIONS.md."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "triton"))
    text = f"""# Faults that were planted, and the tests that caught them

Written by `python -m tests.mutations --write` (`make mutations ARGS=--write`). One fault at a time is planted in a copy
of the package, and the tests must fail. First those run that should notice it, and only where none does all of
`make test`. Tests of the code's text and of the compiler ({", ".join(IGNORED)})
do not count, and every test named here passes without a fault.

{len(FAULTS)} faults; Python {platform.python_version()}, {versions}.
Kernels run in Triton's interpreter on a CPU. Seconds are those of one process until the first failure.

| fault | file | planted | what it breaks | caught by | seconds |
| --- | --- | --- | --- | --- | --- |
"""
    text += "".join(f"{rows[fault.name]}\n" for fault in FAULTS if fault.name in rows)
    text += """
## What only a GPU can show

Not planted: the interpreter runs the programs of a launch one after the other, and knows neither streams nor devices.

| file | fault | what shows it |
| --- | --- | --- |
"""
    return text + "".join(f"| {fault.file} | {fault.change} | {fault.shown_by} |\n" for fault in ON_GPUS_ONLY)


def main(arguments: list[str] | None = None) -> int:
    """Run the check; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[fault.name for fault in FAULTS])
    parser.add_argument("--list", action="store_true", help="print the faults and plant none")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="how many at a time (default: 2)")
    options = parser.parse_args(arguments)
    faults = [fault for fault in FAULTS if not options.only or fault.name in options.only]
    if options.list:
        for fault in faults:
            print(f"{fault.name}  ({fault.file}): {fault.breaks}")
        return 0
    try:
        results = check_all(faults, options.jobs)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    rows = rows_of_table() if options.only else {}
    for fault in faults:
        result = results[fault.name]
        caught_by = f"`{result.caught_by}`".replace("|", "\\|") if result.caught_by else "**nothing**"
        rows[fault.name] = f"| {described(fault)} | {caught_by} | {result.seconds:.0f} s |"
    if options.write:
        TABLE.write_text(table(rows), "utf-8")
    lost = [fault for fault in faults if not results[fault.name].caught_by]
    for fault in lost:
        print(f"{fault.name}: {results[fault.name].trouble or 'no test noticed it'}", file=sys.stderr)
    print(f"{len(faults) - len(lost)} of {len(faults)} faults were caught")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
