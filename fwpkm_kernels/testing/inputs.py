"""Seeded inputs for tests, fuzzing and benchmarks, in every layout and dtype.

Numbers are drawn on the CPU and in float64, and cast afterwards, so that a seed means the same inputs on every device,
and but for rounding in every dtype.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "expanded")
SLOT_PATTERNS = ("uniform", "zipf", "one_slot", "distinct")
KEY_PATTERNS = ("random", "equal", "near")
MASK_KINDS = ("bool", "int", "real")

Seed = int | torch.Generator


class LookupInputs(NamedTuple):
    queries: Tensor  # [..., H, Dk]
    keys: Tensor  # [H, 2, n, Dk/2]


class GatherInputs(NamedTuple):
    values: Tensor  # [N, D]
    slots: Tensor  # [..., J]
    weights: Tensor  # [..., J]


class MemoryInputs(NamedTuple):
    queries: Tensor  # [B, T, H, Dk]
    targets: Tensor  # [B, T, D]
    keys: Tensor  # [H, 2, n, Dk/2]
    values: Tensor  # [n², D]
    gates: Tensor | None  # [B, T]
    mask: Tensor | None  # [B, T]


class UpdateInputs(NamedTuple):
    values: Tensor  # [N, D]
    slots: Tensor  # [M, J]
    weights: Tensor  # [M, J]
    targets: Tensor  # [M, D]
    predictions: Tensor  # [M, D]
    gates: Tensor | None  # [M]
    mask: Tensor | None  # [M]


def make_lookup_inputs(
    rows: int | Sequence[int] = 8,
    heads: int = 1,
    sub_keys: int = 16,
    key_width: int = 16,
    *,
    seed: Seed = 0,
    key_pattern: str = "random",
    dtype: torch.dtype = torch.float32,
    keys_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    layout: str | Mapping[str, str] = "contiguous",
) -> LookupInputs:
    """Queries [*rows, heads, key_width] in ``dtype`` and keys [heads, 2, sub_keys, key_width/2] in ``keys_dtype``.

    ``keys_dtype`` defaults to float32, or float64 beside float64 queries. ``layout`` is one of LAYOUTS for all tensors,
    or a mapping from a tensor's name to its layout. ``key_pattern``:

    - "random": standard normal queries and keys.
    - "equal": small integers. A half of a key is a common vector plus 0 or 1 in up to four coordinates, so sub-keys
      repeat and many more are equally far. Dot products and squared distances are exact in every precision and every
      order of summation, and sums of half scores are equal or well apart: slots can be compared bit by bit.
    - "near": keys in tight clusters far from the origin, each query next to one of them. Squared distances are far
      smaller than the norms, so ‖q‖² − 2 q·k + ‖k‖² cancels.
    """
    generator = _generator(seed)
    leading = _leading(rows)
    half = key_width // 2
    queries_shape = (*leading, heads, 2, half)
    if key_pattern == "random":
        queries = _normal(queries_shape, generator)
        keys = _normal((heads, 2, sub_keys, half), generator)
    elif key_pattern == "equal":
        common = _integers(-3, 4, (half,), generator).double()
        varied = torch.randperm(half, generator=generator)[:4]
        queries = common.repeat(*queries_shape[:-1], 1)
        queries[..., varied] += _integers(0, 2, (*queries_shape[:-1], len(varied)), generator)
        keys = common.repeat(heads, 2, sub_keys, 1)
        keys[..., varied] += _integers(0, 2, (heads, 2, sub_keys, len(varied)), generator)
    elif key_pattern == "near":
        clusters = 4 + _normal((heads, 2, max(1, sub_keys // 8), half), generator)
        member = torch.arange(sub_keys) % clusters.shape[2]
        keys = clusters[:, :, member] + 0.01 * _normal((heads, 2, sub_keys, half), generator)
        chosen = _integers(0, sub_keys, queries_shape[:-1], generator)
        head, side = torch.arange(heads).unsqueeze(-1), torch.arange(2)
        queries = keys[head, side, chosen] + 0.01 * _normal(queries_shape, generator)
    else:
        raise ValueError(f"`key_pattern` must be one of {KEY_PATTERNS}, got {key_pattern!r}")
    if keys_dtype is None:
        keys_dtype = torch.promote_types(dtype, torch.float32)
    return LookupInputs(
        queries=_finish(queries.flatten(-2), dtype, device, layout, "queries"),
        keys=_finish(keys, keys_dtype, device, layout, "keys"),
    )


def make_slots(shape: Sequence[int], slot_count: int, pattern: str = "uniform", *, seed: Seed = 0) -> Tensor:
    """Int64 slots in [0, slot_count) on the CPU, by pattern.

    - "uniform": independent, so a slot may occur twice in a row.
    - "zipf": a slot's frequency is about inversely proportional to its rank; the hot slots lie anywhere.
    - "one_slot": every access goes to the same slot.
    - "distinct": no slot twice; needs as many slots as accesses.
    """
    generator = _generator(seed)
    shape = tuple(shape)
    accesses = math.prod(shape)
    if pattern == "uniform":
        return _integers(0, slot_count, shape, generator)
    if pattern == "zipf":
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        rank = (slot_count**uniform).long().clamp(max=slot_count) - 1  # log-uniform ranks have a density of 1/rank
        return torch.randperm(slot_count, generator=generator)[rank]
    if pattern == "one_slot":
        return _integers(0, slot_count, (), generator).repeat(shape)
    if pattern == "distinct":
        if accesses > slot_count:
            raise ValueError(f"`pattern` 'distinct' needs {accesses} slots for `shape` {shape}, got {slot_count}")
        return torch.randperm(slot_count, generator=generator)[:accesses].reshape(shape)
    raise ValueError(f"`pattern` must be one of {SLOT_PATTERNS}, got {pattern!r}")


def make_gather_inputs(
    rows: int | Sequence[int] = 8,
    picks: int = 4,
    slot_count: int = 64,
    width: int = 16,
    *,
    seed: Seed = 0,
    slot_pattern: str = "uniform",
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    layout: str | Mapping[str, str] = "contiguous",
) -> GatherInputs:
    """A table [slot_count, width] in ``dtype``, slots [*rows, picks] and weights of both signs [*rows, picks].

    ``weights_dtype`` defaults to float32, or float64 beside a float64 table. ``layout`` as in
    :func:`make_lookup_inputs`.
    """
    generator = _generator(seed)
    shape = (*_leading(rows), picks)
    values = _normal((slot_count, width), generator)
    slots = make_slots(shape, slot_count, slot_pattern, seed=generator)
    weights = _normal(shape, generator) / math.sqrt(max(1, picks))
    if weights_dtype is None:
        weights_dtype = torch.promote_types(dtype, torch.float32)
    return GatherInputs(
        values=_finish(values, dtype, device, layout, "values"),
        slots=_finish(slots, torch.int64, device, layout, "slots"),
        weights=_finish(weights, weights_dtype, device, layout, "weights"),
    )


def make_update_inputs(
    rows: int = 8,
    picks: int = 4,
    slot_count: int = 64,
    width: int = 16,
    *,
    seed: Seed = 0,
    slot_pattern: str = "uniform",
    gates: bool = False,
    mask: str | None = None,
    dtype: torch.dtype = torch.float32,
    activations_dtype: torch.dtype | None = None,
    weights_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    layout: str | Mapping[str, str] = "contiguous",
) -> UpdateInputs:
    """A table in ``dtype``, slots, weights of both signs, targets, predictions and, on request, gates in (0, 1) and a
    mask.

    ``activations_dtype`` is the dtype of targets and gates and defaults to ``dtype``. Weights and predictions are
    float32 (float64 beside float64) unless ``weights_dtype`` says otherwise for both. ``mask`` is None or one of
    MASK_KINDS; about a third of the rows are masked, and the others are 1, or anything in (0, 2) for "real". ``layout``
    as in :func:`make_lookup_inputs`.
    """
    generator = _generator(seed)
    values, slots, weights = make_gather_inputs(
        rows, picks, slot_count, width, seed=generator, slot_pattern=slot_pattern, dtype=torch.float64
    )
    targets = _normal((rows, width), generator)
    predictions = _normal((rows, width), generator)
    gate_values = torch.sigmoid(_normal((rows,), generator))
    unmasked = torch.rand((rows,), generator=generator) > 1 / 3
    if mask not in (None, *MASK_KINDS):
        raise ValueError(f"`mask` must be None or one of {MASK_KINDS}, got {mask!r}")
    mask_dtype = {"bool": torch.bool, "int": torch.int64}.get(mask or "", torch.float32)
    mask_values = unmasked * (2 * torch.rand((rows,), generator=generator) if mask == "real" else 1)
    if activations_dtype is None:
        activations_dtype = dtype
    if weights_dtype is None:
        weights_dtype = torch.promote_types(dtype, torch.float32)
    return UpdateInputs(
        values=_finish(values, dtype, device, layout, "values"),
        slots=_finish(slots, torch.int64, device, layout, "slots"),
        weights=_finish(weights, weights_dtype, device, layout, "weights"),
        targets=_finish(targets, activations_dtype, device, layout, "targets"),
        predictions=_finish(predictions, weights_dtype, device, layout, "predictions"),
        gates=_finish(gate_values, activations_dtype, device, layout, "gates") if gates else None,
        mask=_finish(mask_values, mask_dtype, device, layout, "mask") if mask else None,
    )


def make_memory_inputs(
    batch: int = 2,
    length: int = 8,
    heads: int = 1,
    sub_keys: int = 16,
    key_width: int = 16,
    width: int = 16,
    *,
    seed: Seed = 0,
    key_pattern: str = "random",
    gates: bool = False,
    mask: str | None = None,
    dtype: torch.dtype = torch.float32,
    activations_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    layout: str | Mapping[str, str] = "contiguous",
) -> MemoryInputs:
    """The tensors of :func:`fast_weight_memory`, and of a stream: queries [batch, length, heads, key_width], targets
    [batch, length, width], keys [heads, 2, sub_keys, key_width/2], a table [sub_keys², width] in ``dtype`` and, on
    request, gates in (0, 1) and a mask, both [batch, length].

    ``activations_dtype`` is the dtype of queries, targets and gates and defaults to ``dtype``. Keys are float32, or
    float64 beside a float64 table. ``key_pattern`` and ``layout`` as in :func:`make_lookup_inputs`, ``mask`` as in
    :func:`make_update_inputs`.
    """
    generator = _generator(seed)
    shape, exact = (batch, length), torch.float64
    queries, keys = make_lookup_inputs(
        shape, heads, sub_keys, key_width, seed=generator, key_pattern=key_pattern, dtype=exact
    )
    update = make_update_inputs(
        batch * length, 1, sub_keys**2, width, seed=generator, gates=gates, mask=mask, dtype=exact
    )
    activations_dtype = activations_dtype or dtype
    keys_dtype = torch.promote_types(dtype, torch.float32)

    def by_token(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        return _finish(x.view(*shape, *x.shape[1:]), dtype, device, layout, name)

    return MemoryInputs(
        queries=_finish(queries, activations_dtype, device, layout, "queries"),
        targets=by_token(update.targets, activations_dtype, "targets"),
        keys=_finish(keys, keys_dtype, device, layout, "keys"),
        values=_finish(update.values, dtype, device, layout, "values"),
        gates=None if update.gates is None else by_token(update.gates, activations_dtype, "gates"),
        mask=None if update.mask is None else by_token(update.mask, update.mask.dtype, "mask"),
    )


def random_cotangent(like: Tensor, *, seed: Seed = 1, layout: str = "contiguous") -> Tensor:
    """A normal incoming gradient for ``like``, of its shape, dtype and device.

    "expanded" is one number with all strides 0, as ``like.sum().backward()`` sends; the other layouts are those of
    :func:`with_layout`.
    """
    generator = _generator(seed)
    if layout == "expanded":
        return _normal((), generator).to(like.device, like.dtype).expand(like.shape)
    return _finish(_normal(like.shape, generator), like.dtype, like.device, layout, "cotangent")


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """A copy with the same numbers and other strides; only "expanded" changes the numbers.

    - "contiguous".
    - "transposed": the last two dimensions are swapped in memory.
    - "sliced": a slice of a wider tensor: rows are contiguous, but start at odd offsets.
    - "strided": every second element of a wider tensor.
    - "expanded": the first entry of the first dimension, repeated with stride 0.

    What lies between the elements of "sliced" and "strided" is NaN, −1 or True, so a read that ignores the strides
    shows. A tensor with too few dimensions for its layout comes back contiguous.
    """
    size = tensor.shape[-1] if tensor.dim() else 0
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.mT.clone(memory_format=torch.contiguous_format).mT
    if layout == "sliced" and tensor.dim():
        wide = _poison(tensor, (*tensor.shape[:-1], size + 2))
        return wide[..., 1 : 1 + size].copy_(tensor)
    if layout == "strided" and tensor.dim():
        wide = _poison(tensor, (*tensor.shape[:-1], 2 * size + 1))
        return wide[..., 1::2].copy_(tensor)
    if layout == "expanded" and tensor.dim():
        return tensor[:1].clone(memory_format=torch.contiguous_format).expand(tensor.shape)
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {LAYOUTS}, got {layout!r}")
    return tensor.clone(memory_format=torch.contiguous_format)


def as_float64(value: Any) -> Any:
    """The float tensors of a tensor, (named) tuple, list or mapping, detached and in float64; the rest as it is."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: as_float64(entry) for name, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(as_float64(entry) for entry in value))
    if isinstance(value, tuple | list):
        return type(value)(as_float64(entry) for entry in value)
    return value


def _generator(seed: Seed) -> torch.Generator:
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def _leading(rows: int | Sequence[int]) -> tuple[int, ...]:
    return (rows,) if isinstance(rows, int) else tuple(rows)


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def _integers(low: int, high: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, tuple(shape), generator=generator)


def _finish(
    tensor: Tensor, dtype: torch.dtype, device: torch.device | str, layout: str | Mapping[str, str], name: str
) -> Tensor:
    if not isinstance(layout, str):
        layout = layout.get(name, "contiguous")
    return with_layout(tensor.to(device, dtype), layout)


def _poison(like: Tensor, shape: Sequence[int]) -> Tensor:
    fill = math.nan if like.is_floating_point() else True if like.dtype == torch.bool else -1
    return torch.full(tuple(shape), fill, dtype=like.dtype, device=like.device)
