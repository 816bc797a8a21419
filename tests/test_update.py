"""chunk_value_update and chunk_value_update_: both backends, forward and backward, against the reference."""

import functools

import pytest
import torch
from torch.autograd import gradcheck

import reference
from fwpkm_kernels import ChunkValueUpdate, chunk_value_update, chunk_value_update_, sparse_value_gather, testing
from fwpkm_kernels.kernels import _common
from tests.conftest import HAS_GPU, Place

# M, J, N, D
SHAPES = [(7, 3, 50, 13), (1, 1, 1, 1), (5, 4, 9, 1), (40, 8, 3, 20), (2, 3, 12, 1030)]
DTYPES = {  # table, activations (targets, gates), weights and predictions
    "float32": (torch.float32, torch.float32, torch.float32),
    "float32-bfloat16-activations": (torch.float32, torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "bfloat16-table": (torch.bfloat16, torch.bfloat16, torch.float32),
    "float16-table": (torch.float16, torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64, torch.float64),
}
OPTIONS = {
    "plain": {},
    "lr": {"lr": 0.3},
    "scale": {"scale": 0.7},
    "decay": {"lr": 0.5, "weight_decay": 0.1},
    "clip": {"clip": 0.2},
    "clip-decay": {"lr": 1.7, "clip": 0.2, "weight_decay": 0.05},
    "clip-zero": {"clip": 0.0, "weight_decay": 0.05},
    "lr-zero": {"lr": 0},
}


def check(inputs: testing.UpdateInputs, place: Place, *, cotangent: str = "contiguous", **options):
    """The new table and all gradients inside the error budget; the write in place gives the same bits."""
    wrt = [n for n in ("values", "weights", "targets", "predictions", "gates") if getattr(inputs, n) is not None]
    if isinstance(options.get("scale"), torch.Tensor):
        wrt.append("scale")
    arguments = {**inputs._asdict(), **options}
    update = functools.partial(chunk_value_update, backend=place.backend)
    with testing.poisoned_memory(), testing.assert_unchanged(inputs):
        testing.assert_matches_reference(
            update,
            reference.chunk_value_update,
            arguments,
            wrt=wrt,
            cotangent=testing.random_cotangent(inputs.values, layout=cotangent),
            reduction_length=max(inputs.slots.numel(), inputs.values.shape[1]),
        )
        new_values = update(**arguments)
    table = inputs.values.clone()
    with testing.poisoned_memory():
        assert chunk_value_update_(**{**arguments, "values": table}, backend=place.backend) is None
    if not options.get("weight_decay"):
        testing.assert_untouched_rows_equal(inputs.values, table, inputs.slots)
        testing.assert_untouched_rows_equal(inputs.values, new_values, inputs.slots)
    if table.dtype == torch.bfloat16 and options.get("weight_decay") and not HAS_GPU:
        # Triton's interpreter truncates where PyTorch, which decays the unaddressed rows of a new table, rounds.
        addressed = inputs.slots.unique()
        testing.assert_bitwise_equal(table[addressed], new_values[addressed], "in place, addressed rows")
        torch.testing.assert_close(table, new_values, rtol=2**-7, atol=0)
    else:
        testing.assert_bitwise_equal(table, new_values, "in place")


@pytest.mark.parametrize("pattern", ["uniform", "zipf", "one_slot"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, pattern, place):
    check(testing.make_update_inputs(*shape, slot_pattern=pattern, gates=True, device=place.device), place)


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, place):
    inputs = testing.make_update_inputs(30, 4, 20, 6, slot_pattern="zipf", mask="bool", device=place.device)
    check(inputs, place, **OPTIONS[options])


@pytest.mark.parametrize("mask", testing.MASK_KINDS)
@pytest.mark.parametrize("gates", [True, False])
def test_masks_and_gates(gates, mask, place):
    check(testing.make_update_inputs(20, 4, 15, 6, gates=gates, mask=mask, device=place.device), place)


def test_scale_for_each_row(place):
    inputs = testing.make_update_inputs(20, 4, 15, 6, gates=True, mask="real", device=place.device)
    check(inputs, place, scale=torch.linspace(-1, 2, 20, device=place.device))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_counts_over_other_slots(clip, place):
    inputs = testing.make_update_inputs(20, 4, 15, 6, mask="bool", device=place.device)
    counted = testing.make_slots((3, 5, 7), 15, "zipf", seed=3).to(place.device)  # not every slot is among them
    check(inputs, place, count_slots=counted, clip=clip)


def test_the_range_of_slots_under_compile():
    """On a CPU that of the slots is checked, and of those that are counted."""
    inputs = testing.make_update_inputs(5, 2, 9, 3, slot_pattern="one_slot")._asdict()
    inputs["slots"] = inputs["slots"].int()
    run = torch.compile(functools.partial(chunk_value_update, lr=0.5), backend="aot_eager", fullgraph=True)
    near = inputs["slots"].flatten().long()
    expected = chunk_value_update(**inputs, lr=0.5, count_slots=near)
    testing.assert_bitwise_equal(run(**inputs, count_slots=near), expected)
    for outside in (near + 2**32, near - 2**32):
        with pytest.raises(ValueError, match=r"`count_slots` must lie in \[0, 9\), got values from"):
            run(**inputs, count_slots=outside)

    @torch.compile(backend="eager")
    def gather(values, slots, weights, **_):
        return sparse_value_gather(values, slots, weights)

    for function in (run, gather):
        wide = inputs["slots"] + torch.tensor([2**32, 0])
        with pytest.raises(ValueError, match=r"`slots` must lie in \[0, 9\), got values from"):
            function(**inputs | {"slots": wide})


@pytest.mark.parametrize("slot", [-1, 15, -(2**31), 2**31 - 1])
def test_counted_slots_out_of_range(slot, place):
    """An error for CPU tensors; on a GPU, where a check would synchronise, they count for no slot."""
    inputs = testing.make_update_inputs(20, 4, 15, 6, device=place.device)._asdict()
    counted = testing.make_slots((40,), 15, "zipf", seed=3).to(place.device)
    outside = torch.cat((counted, counted.new_tensor([slot])))
    for function in (chunk_value_update, chunk_value_update_):
        changed = inputs | {"values": inputs["values"].clone()}
        if place.device == "cpu":
            with (
                testing.assert_unchanged(changed),
                pytest.raises(ValueError, match=rf"`count_slots` must lie in \[0, 15\).*{slot}"),
            ):
                function(**changed, count_slots=outside, backend=place.backend)
            continue
        expected = inputs | {"values": inputs["values"].clone()}
        results = [
            function(**arguments, count_slots=count_slots, backend=place.backend)
            for arguments, count_slots in ((changed, outside), (expected, counted))
        ]
        testing.assert_bitwise_equal(*results if results[0] is not None else (changed["values"], expected["values"]))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("options", [{}, {"clip": 0.2, "weight_decay": 0.05}], ids=["plain", "clip-decay"])
def test_dtypes(options, dtypes, place):
    table, activations, weights = DTYPES[dtypes]
    inputs = testing.make_update_inputs(
        7,
        5,
        30,
        24,
        gates=True,
        dtype=table,
        activations_dtype=activations,
        weights_dtype=weights,
        device=place.device,
    )
    check(inputs, place, **options)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "expanded"])
def test_strides_of_inputs_and_of_incoming_gradients(layout, place):
    inputs = testing.make_update_inputs(9, 5, 30, 7, gates=True, mask="real", device=place.device, layout=layout)
    check(inputs, place, cotangent=layout)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}], ids=["plain", "decay"])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided"])
def test_in_place_keeps_strides(layout, options, place):
    inputs = testing.make_update_inputs(9, 5, 30, 7, device=place.device, layout={"values": layout})
    expected = chunk_value_update(*inputs[:5], **options, backend=place.backend)
    storage = inputs.values.untyped_storage().data_ptr()
    chunk_value_update_(*inputs[:5], **options, backend=place.backend)
    testing.assert_bitwise_equal(inputs.values, expected)
    assert inputs.values.untyped_storage().data_ptr() == storage


@pytest.mark.parametrize("length, clip", [(63, None), (64, None), (65, 0.3), (96, None), (200, 0.3)])
def test_hot_slots(length, clip, place):
    """A hot slot between cold ones, and a second hot one right behind it."""
    slots = torch.cat((torch.arange(5), torch.full((length,), 40), torch.full((70,), 41), torch.tensor([50])))
    inputs = testing.make_update_inputs(len(slots), 1, 60, 6, device=place.device)
    order = torch.randperm(len(slots), generator=torch.Generator().manual_seed(length))
    check(inputs._replace(slots=slots[order].unsqueeze(1).to(place.device)), place, clip=clip)


@pytest.mark.parametrize("strides", [(2**30, 1), (1, 2**30)], ids=["rows", "columns"])
def test_offsets_beyond_32_bits(strides, place):
    """A table of 3×3 whose last row, or column, lies 2³¹ elements from the first; slots of 32 bits."""
    values = torch.empty(2**31 + 8, dtype=torch.float16, device=place.device).as_strided((3, 3), strides)
    values.copy_(torch.arange(9.0).view(3, 3))
    inputs = testing.make_update_inputs(40, 2, 3, 3, dtype=torch.float16, device=place.device)
    slots, weights, targets, predictions = inputs[1].int(), *inputs[2:5]
    assert slots.max() == 2
    small = values.clone(memory_format=torch.contiguous_format)
    out = sparse_value_gather(values, slots, weights, backend=place.backend)
    testing.assert_bitwise_equal(out, sparse_value_gather(small, slots, weights, backend=place.backend))
    expected = chunk_value_update(small, slots, weights, targets, predictions, backend=place.backend)
    chunk_value_update_(values, slots, weights, targets, predictions, backend=place.backend)
    testing.assert_bitwise_equal(values.contiguous(), expected)


def test_gradient_at_the_bound_of_the_clip(place):
    """Where |G| is the clip itself the clamp is not active; in the last column it is."""
    values = torch.zeros(2, 3, device=place.device)
    slots, weights = torch.ones(1, 1, dtype=torch.int64, device=place.device), torch.ones(1, 1, device=place.device)
    targets, predictions = (
        torch.tensor([[-0.5, 0.5, -0.75]], device=place.device),
        torch.zeros(1, 3, device=place.device),
    )
    leaves = [x.requires_grad_() for x in (weights, targets, predictions)]
    new_values = chunk_value_update(values, slots, *leaves, clip=0.5, backend=place.backend)
    assert new_values[1].tolist() == [-0.5, 0.5, -0.5]
    cotangent = torch.tensor([1.0, 2.0, 4.0], device=place.device)
    grads = torch.autograd.grad(new_values, leaves, cotangent.expand(2, 3))
    assert [grad.tolist() for grad in grads] == [[[0.5]], [[1.0, 2.0, 0.0]], [[-1.0, -2.0, 0.0]]]


def test_a_half_precision_table_is_rounded_once(place):
    # float16, since Triton's interpreter truncates to bfloat16.
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(40, 9, generator=generator).half()
    errors = 0.3 * torch.randn(30, 9, generator=generator)
    slots = torch.randperm(40, generator=generator)[:30]
    expected = table.clone()
    expected[slots] = (0.9 * table[slots].double() - 0.5 * errors.double()).half()
    table, slots, errors = (x.to(place.device) for x in (table, slots.unsqueeze(1), errors))
    arguments = (slots, torch.ones(30, 1, device=place.device), torch.zeros_like(errors), errors)
    options = {"lr": 0.5, "weight_decay": 0.2, "backend": place.backend}
    new_values = chunk_value_update(table, *arguments, **options)
    testing.assert_bitwise_equal(new_values[slots[:, 0]].cpu(), expected[slots[:, 0].cpu()], "addressed rows")
    chunk_value_update_(table, *arguments, **options)
    testing.assert_bitwise_equal(table[slots[:, 0]].cpu(), expected[slots[:, 0].cpu()], "in place, addressed rows")


def test_too_many_programs_are_refused_before_anything_is_written(monkeypatch, triton_place):
    """The second launch of a write, that of hot segments, is the larger one for wide rows."""
    inputs = testing.make_update_inputs(64, 1, 12, 8200, device=triton_place.device)
    monkeypatch.setattr(_common, "MOST_PROGRAMS", 64)
    with testing.assert_unchanged(inputs), pytest.raises(ValueError, match="too many for one launch of hot_segment"):
        chunk_value_update_(**inputs._asdict(), backend="triton")


def test_every_row_masked(place):
    inputs = testing.make_update_inputs(6, 3, 20, 5, mask="bool", device=place.device)
    inputs = inputs._replace(mask=torch.zeros_like(inputs.mask))
    check(inputs, place)
    testing.assert_bitwise_equal(chunk_value_update(**inputs._asdict(), backend=place.backend), inputs.values)


def test_a_masked_row_has_no_gradients_even_if_products_overflow(place):
    """As in plain PyTorch, where the mask comes before the weights."""
    inputs = testing.make_update_inputs(1, 1, 1, 1, gates=True, mask="bool", device=place.device)
    large = {name: getattr(inputs, name) * 1e30 for name in ("weights", "targets")}
    arguments = inputs._asdict() | large | {"mask": torch.zeros_like(inputs.mask)}
    run = functools.partial(chunk_value_update, backend=place.backend)
    _, gradients = testing.forward_and_gradients(run, arguments, wrt=("weights", "targets", "predictions", "gates"))
    for name, gradient in gradients.items():
        assert (gradient == 0).all(), name


def test_a_slot_alone_is_rewritten_by_uniform_weights(place):
    """One token, J slots of its own, w = 1/J and α = J: the read after the write is the target (paper's step)."""
    values, slots, weights, targets, _, _, _ = testing.make_update_inputs(
        1, 4, 20, 5, slot_pattern="distinct", device=place.device
    )
    weights = torch.full_like(weights, 0.25)
    predictions = reference.sparse_value_gather(values, slots, weights)
    chunk_value_update_(values, slots, weights, targets, predictions, backend=place.backend)
    torch.testing.assert_close(reference.sparse_value_gather(values, slots, weights), targets)


@pytest.mark.parametrize("pattern", ["zipf", "one_slot"])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_two_runs_are_bitwise_equal(clip, pattern, place):
    inputs = testing.make_update_inputs(40, 4, 30, 8, gates=True, slot_pattern=pattern, device=place.device)._asdict()
    run = functools.partial(chunk_value_update, clip=clip, backend=place.backend)
    wrt = ("values", "weights", "targets", "predictions", "gates")
    testing.assert_deterministic(lambda: testing.forward_and_gradients(run, inputs, wrt=wrt))


@pytest.mark.parametrize(
    "shape", [(0, 3, 10, 6), (4, 0, 10, 6), (4, 3, 10, 0)], ids=["no tokens", "no picks", "no width"]
)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "clip": 1.0}], ids=["plain", "clip-decay"])
def test_empty(options, shape, place):
    inputs = testing.make_update_inputs(*shape, gates=True, device=place.device)
    new_values = chunk_value_update(**inputs._asdict(), **options, backend=place.backend)
    assert new_values is not inputs.values
    assert new_values.numel() == 0 or new_values.data_ptr() != inputs.values.data_ptr()
    check(inputs, place, **options)


@pytest.mark.parametrize("options", [{}, {"clip": 0.3, "weight_decay": 0.1, "lr": 0.4}], ids=["plain", "clip-decay"])
def test_gradcheck(options):
    inputs = testing.make_update_inputs(6, 3, 5, 4, gates=True, mask="real", dtype=torch.float64)
    values, slots, weights, targets, predictions, gates, mask = inputs
    scale = torch.linspace(0.5, 2, 6, dtype=torch.float64)

    def run(values, weights, targets, predictions, gates, scale):
        rest = (options.get("lr", 1.0), scale, options.get("weight_decay", 0.0), options.get("clip"))
        return ChunkValueUpdate.apply(values, slots, weights, targets, predictions, gates, mask, None, *rest)

    leaves = [x.requires_grad_() for x in (values, weights, targets, predictions, gates, scale)]
    assert gradcheck(run, leaves)


def test_the_backward_keeps_no_table():
    """What is saved for backward is small whatever N is: no table is among it."""
    inputs = testing.make_update_inputs(4, 2, 1000, 8, gates=True)
    saved = []
    leaves = inputs._replace(values=inputs.values.requires_grad_(), weights=inputs.weights.requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        chunk_value_update(**leaves._asdict(), clip=1.0)
    assert saved
    assert all(1000 not in shape for shape in saved)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["uniform", "zipf", "one_slot"])
def test_real_sizes_on_a_gpu(pattern, dtype, triton_place):
    inputs = testing.make_update_inputs(
        4096, 8, 2**16, 512, gates=True, mask="bool", slot_pattern=pattern, dtype=dtype, device="cuda"
    )
    check(inputs, triton_place)
