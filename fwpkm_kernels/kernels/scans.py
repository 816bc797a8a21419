"""The chunk steps of the value scan: the read with its errors, and its backward together with the write's.

The rows of a chunk are time-major: of its positions·B rows, row i is position i // B of batch item i % B. The first
WRITTEN rows are written, and the rows from FIRST_OUTPUT on go to the output: re-reads do not, and the last positions
may not be written. Tensors of the user are [positions, B, D], any strides: transposed slices of [B, T, D].
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import compute_dtype
from ._common import launch, load_rows, next_power_of_2, row_warps, wait_for_inputs


# Numbers of rows are not specialised: the first, the last and the other chunks of a sequence are one compilation.
@triton.jit(do_not_specialize=["B", "WRITTEN", "FIRST_OUTPUT"])
def read_kernel(
    values_ptr, slots_ptr, weights_ptr, targets_ptr, output_ptr, errors_ptr,
    stride_vn, stride_vd, stride_yp, stride_yb, stride_yd, stride_op, stride_ob, stride_od,
    B, WRITTEN, FIRST_OUTPUT,
    J: tl.constexpr, D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):
    """p = Σ_j weights[i, j]·values[slots[i, j]];  errors[i] = p - y of a written row, else 0;  output = p.

    A program owns one row i. Grid: (rows,).
    """
    wait_for_inputs(PDL)
    i_m = tl.program_id(0)
    dtype: tl.constexpr = errors_ptr.dtype.element_ty
    is_written = i_m < WRITTEN
    picks = i_m.to(tl.int64) * J
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < D
    # Triton 3.9's interpreter would make integers of `mask_d & is_written`.
    written_d = offs_d < tl.where(is_written, D, 0)
    output_d = offs_d < tl.where(i_m >= FIRST_OUTPUT, D, 0)
    # The target is loaded before the rows, so that the program waits for both at once.
    y_row = (i_m // B).to(tl.int64) * stride_yp + (i_m % B).to(tl.int64) * stride_yb
    target = tl.load(targets_ptr + y_row + offs_d * stride_yd, mask=written_d, other=0.0).to(dtype)
    total = tl.zeros([BLOCK_D], dtype)
    for start in range(0, J, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        mask_j = offs_j < J
        rows = load_rows(values_ptr, slots_ptr + picks, offs_j, mask_j, offs_d, mask_d, stride_vn, stride_vd, dtype)
        weight = tl.load(weights_ptr + picks + offs_j, mask=mask_j, other=0.0).to(dtype)  # [BLOCK_J]
        total += tl.sum(weight[:, None] * rows, axis=0)
    error = tl.where(is_written, total - target, 0.0)
    tl.store(errors_ptr + i_m.to(tl.int64) * D + offs_d, error, mask=mask_d)
    i_o = i_m - FIRST_OUTPUT
    o_row = (i_o // B).to(tl.int64) * stride_op + (i_o % B).to(tl.int64) * stride_ob
    output = output_ptr + o_row + offs_d * stride_od
    tl.store(output, total.to(output_ptr.dtype.element_ty), mask=output_d)


def read(values: Tensor, slots: Tensor, weights: Tensor, targets: Tensor, output: Tensor) -> Tensor:
    """Launch the read of a chunk's rows: errors [M, D] in the compute dtype; the last rows' reads go to `output`.

    `slots` and `weights` are [M, J], contiguous. `targets` [P_w, B, D] are those of the first P_w·B rows, and `output`
    [P_o, B, D] takes the last P_o·B rows. The errors of rows that are not written are 0.
    """
    (num_rows, picks), width = slots.shape, values.shape[1]
    errors = torch.empty(num_rows, width, dtype=compute_dtype(values.dtype), device=values.device)
    if errors.numel() == 0:
        return errors
    batch = targets.shape[1]
    block_d = next_power_of_2(width)
    launch(
        read_kernel, (num_rows,),
        values, slots, weights, targets, output, errors,
        *values.stride(), *targets.stride(), *output.stride(),
        batch, targets.shape[0] * batch, num_rows - output.shape[0] * batch,
        J=picks, D=width,
        BLOCK_J=max(1, min(next_power_of_2(max(picks, 1)), 8, 8192 // block_d)), BLOCK_D=block_d,
        num_warps=row_warps(block_d, values.dtype), on=values,
    )
    return errors


class ReadGradConfig(NamedTuple):
    """Tile of `read_grad_kernel`: BLOCK_J whole rows of each of two tables at a time."""

    block_j: int
    num_warps: int


def read_grad_config(picks: int, width: int, dtype: torch.dtype) -> ReadGradConfig:
    """Launch table, keyed by the picks of a token, the width of a row and the narrower dtype of the two tables."""
    block_d = next_power_of_2(width)
    num_warps = row_warps(block_d, dtype)
    threads = num_warps * (64 if torch.version.hip is not None else 32)
    # Both tiles stay in registers, in the compute dtype, and take at most 64 registers of a thread each.
    fits = 64 * threads * 4 // (compute_dtype(dtype).itemsize * block_d)
    block_j = next_power_of_2(max(picks, 1))
    # Rows that do not fit are read twice anyway; smaller tiles then let more programs run at a time.
    return ReadGradConfig(block_j if block_j <= fits else max(1, min(2, fits // 2)), num_warps)


@triton.jit(do_not_specialize=["B", "WRITTEN", "FIRST_OUTPUT"])
def read_grad_kernel(
    log_ptr, log_rows_ptr, steps_ptr, step_rows_ptr, weights_ptr, write_weights_ptr, targets_ptr, grad_output_ptr,
    grad_targets_ptr, grad_predictions_ptr, grad_weights_ptr, grad_write_weights_ptr,
    stride_ln, stride_ld, stride_sn, stride_sd, stride_yp, stride_yb, stride_yd, stride_gp, stride_gb, stride_gd,
    stride_rp, stride_rb, stride_rd,
    factor: tl.float64, B, WRITTEN, FIRST_OUTPUT,
    J: tl.constexpr, D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """With v_j = log[log_rows[i, j]], h_j = factor·steps[step_rows[i, j]], weights w and write weights c of row i:

        e = Σ_j w_j·v_j - y      r = Σ_j c_j·h_j      dp = grad_output - r
        grad_weights[i, j] = <dp, v_j>      grad_write_weights[i, j] = -<h_j, e>      grad_targets = r

    e = r = 0 in rows that are not written, and grad_output = 0 in those that are not output. A program owns one row i.
    It reads v and h once if they fit one tile, else twice. Grid: (rows,).
    """
    i_m = tl.program_id(0)
    dtype: tl.constexpr = grad_predictions_ptr.dtype.element_ty
    is_written = i_m < WRITTEN
    scale = tl.full([], factor, dtype)
    picks = i_m.to(tl.int64) * J
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < D
    written_d = offs_d < tl.where(is_written, D, 0)
    output_d = offs_d < tl.where(i_m >= FIRST_OUTPUT, D, 0)
    y_row = (i_m // B).to(tl.int64) * stride_yp + (i_m % B).to(tl.int64) * stride_yb
    target = tl.load(targets_ptr + y_row + offs_d * stride_yd, mask=written_d, other=0.0).to(dtype)
    i_o = i_m - FIRST_OUTPUT
    g_row = (i_o // B).to(tl.int64) * stride_gp + (i_o % B).to(tl.int64) * stride_gb
    grad_output = tl.load(grad_output_ptr + g_row + offs_d * stride_gd, mask=output_d, other=0.0).to(dtype)

    prediction = tl.zeros([BLOCK_D], dtype)
    r = tl.zeros([BLOCK_D], dtype)
    old = tl.zeros([BLOCK_J, BLOCK_D], dtype)  # if one tile has all picks, the second loop uses it and `step` too
    step = tl.zeros([BLOCK_J, BLOCK_D], dtype)
    for start in range(0, J, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        mask_j = offs_j < J
        # Rows that are not written load nothing of the write: their r is 0 whatever the tables hold.
        mask_c = offs_j < tl.where(is_written, J, 0)
        old = load_rows(log_ptr, log_rows_ptr + picks, offs_j, mask_j, offs_d, mask_d, stride_ln, stride_ld, dtype)
        step = load_rows(steps_ptr, step_rows_ptr + picks, offs_j, mask_c, offs_d, mask_d, stride_sn, stride_sd, dtype)
        weight = tl.load(weights_ptr + picks + offs_j, mask=mask_j, other=0.0).to(dtype)  # [BLOCK_J]
        write_weight = tl.load(write_weights_ptr + picks + offs_j, mask=mask_c, other=0.0).to(dtype)  # [BLOCK_J]
        prediction += tl.sum(weight[:, None] * old, axis=0)
        r += tl.sum(write_weight[:, None] * step, axis=0)
    r = scale * r
    error = tl.where(is_written, prediction - target, 0.0)
    grad_prediction = grad_output - r
    tl.store(grad_predictions_ptr + i_m.to(tl.int64) * D + offs_d, grad_prediction, mask=mask_d)
    r_row = (i_m // B).to(tl.int64) * stride_rp + (i_m % B).to(tl.int64) * stride_rb
    grad_target = grad_targets_ptr + r_row + offs_d * stride_rd
    tl.store(grad_target, r.to(grad_targets_ptr.dtype.element_ty), mask=written_d)
    for start in range(0, J, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        mask_j = offs_j < J
        mask_c = offs_j < tl.where(is_written, J, 0)
        if BLOCK_J < J:
            old = load_rows(log_ptr, log_rows_ptr + picks, offs_j, mask_j, offs_d, mask_d, stride_ln, stride_ld, dtype)
            step = load_rows(
                steps_ptr, step_rows_ptr + picks, offs_j, mask_c, offs_d, mask_d, stride_sn, stride_sd, dtype
            )
        grad_weight = tl.sum(old * grad_prediction[None, :], axis=1)  # [BLOCK_J]
        grad_write_weight = -scale * tl.sum(step * error[None, :], axis=1)  # [BLOCK_J]
        tl.store(grad_weights_ptr + picks + offs_j, grad_weight, mask=mask_j)
        tl.store(grad_write_weights_ptr + picks + offs_j, grad_write_weight, mask=mask_j)


def read_grad(
    log: Tensor, log_rows: Tensor, steps: Tensor, step_rows: Tensor, weights: Tensor, write_weights: Tensor,
    targets: Tensor, grad_output: Tensor, grad_targets: Tensor, grad_weights: Tensor, grad_write_weights: Tensor,
    *, factor: float = 1.0, config: ReadGradConfig | None = None,
) -> Tensor:
    """Launch the backward of `read` and of the write: the gradient of p [M, D]; those of y, w and c are filled.

    `log`, `log_rows` hold the rows as they were read, and `steps`, `step_rows` the gradient of the rows after the
    write, 0 where its clamp was active; with `factor` it is Ĝ'. Both rows, `weights` and `write_weights` are [M, J],
    contiguous. `targets` [P_w, B, D] are those of the first P_w·B rows, and `grad_targets` is like them; `grad_output`
    [P_o, B, D] is that of the last P_o·B rows. The result, `grad_weights` and `grad_write_weights` [M, J] are
    contiguous, in the compute dtype.
    """
    (num_rows, picks), width = log_rows.shape, log.shape[1]
    grad_predictions = torch.empty(num_rows, width, dtype=compute_dtype(log.dtype), device=log.device)
    if grad_predictions.numel() == 0:  # without columns the scalar products are empty sums
        grad_weights.zero_()
        grad_write_weights.zero_()
        return grad_predictions
    batch = targets.shape[1]
    config = config or read_grad_config(picks, width, min(log.dtype, steps.dtype, key=lambda dtype: dtype.itemsize))
    launch(
        read_grad_kernel, (num_rows,),
        log, log_rows, steps, step_rows, weights, write_weights, targets, grad_output, grad_targets, grad_predictions,
        grad_weights, grad_write_weights,
        *log.stride(), *steps.stride(), *targets.stride(), *grad_output.stride(), *grad_targets.stride(),
        factor, batch, targets.shape[0] * batch, num_rows - grad_output.shape[0] * batch,
        J=picks, D=width, BLOCK_J=config.block_j, BLOCK_D=next_power_of_2(width), num_warps=config.num_warps, on=log,
    )
    return grad_predictions
