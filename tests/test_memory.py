"""The whole memory: its definition against the golden cases, and both backends against that definition."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import reference
from fwpkm_kernels import chunk_value_update, fast_weight_memory, product_key_lookup, sparse_value_gather, testing
from fwpkm_kernels.options import STEPS
from tests.conftest import PLACES, SLOW_IN_INTERPRETER, Place
from tests.helpers.golden import NAMES, assert_near, load, tolerance
from tests.helpers.memory import (
    BOUNDARIES,
    DIFFERENTIABLE,
    KEY_GRADIENTS,
    PLACES_SLOW,
    assert_close,
    assert_same_bits,
    check_memory,
    cotangents,
    leaves_of,
    make_inputs,
    named,
    run,
)
from tests.helpers.models import loss

OPTIONS = (
    "chunk_size",
    "top_k",
    "lookahead",
    "score",
    "weighting",
    "temperature",
    "lr",
    "weight_decay",
    "clip",
    "addressing_weight",
    "key_gradient",
)
#: Golden cases that the interpreter runs in `make test`, in float64: those with the fewest reads.
QUICK = ("paper_j_short", "paper_n_topk2")
#: What it runs in float32 too, in `make test-all`; float32 is no other than elsewhere there.
FLOAT32_IN_INTERPRETER = ("paper_l_near_keys", "idw_silu", "clip")


def check_golden(function: Callable[..., Any], name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Slots, outputs, weights, the final state and every gradient, to what tests/golden/README.md promises."""
    config, tensors = load(name, dtype)
    inputs = {key: tensors[key].to(device) for key in (*DIFFERENTIABLE, "mask") if key in tensors}
    leaves = leaves_of(inputs)
    options = {option: config[option] for option in OPTIONS}
    result = function(**{**inputs, **leaves}, boundary="drop", **options)
    assert torch.equal(result.slots.cpu(), tensors["slots"])
    answers = {"output": result.output, "weights": result.weights}
    answers |= {"final_keys": result.keys, "final_values": result.values}
    cotangent = tensors["cotangent"].to(device, dtype)
    gradients = torch.autograd.grad(
        result.output, list(leaves.values()), cotangent, allow_unused=True, materialize_grads=True
    )
    answers |= {f"d_{key}": gradient for key, gradient in zip(leaves, gradients, strict=True)}
    for key, answer in answers.items():
        assert_near(answer.cpu(), tensors[key].double(), tolerance(name, dtype), key)


@pytest.mark.parametrize("name", NAMES)
def test_golden_of_the_reference(name):
    check_golden(reference.fast_weight_memory, name, torch.float64)


def golden_cases() -> list[Any]:
    """Every backend and case in both dtypes, but a choice of cases where the interpreter runs in float32."""
    cases = []
    for place in PLACES:
        interpreted = place == Place("triton", "cpu")
        for name in NAMES:
            marks = [pytest.mark.slow] if interpreted and name not in QUICK else []
            cases.append(pytest.param(place, name, torch.float64, id=f"{place.backend}-{name}-float64", marks=marks))
            if not interpreted or name in FLOAT32_IN_INTERPRETER:
                marks = [pytest.mark.slow] if interpreted else []
                cases.append(
                    pytest.param(place, name, torch.float32, id=f"{place.backend}-{name}-float32", marks=marks)
                )
    return cases


@pytest.mark.parametrize(("place", "name", "dtype"), golden_cases())
def test_golden(place, name, dtype):
    check_golden(functools.partial(fast_weight_memory, backend=place.backend), name, dtype, place.device)


def test_key_step_of_a_single_chunk():
    config, tensors = load("paper_i_single_chunk", torch.float64)
    keys = reference.product_key_update(
        tensors["keys"],
        tensors["queries"].flatten(0, 1),
        top_k=config["top_k"],
        score=config["score"],
        lr=config["lr"],
        weight=config["addressing_weight"],
        weight_decay=config["weight_decay"],
        clip=config["clip"],
    )
    assert_near(keys, tensors["final_keys"], 1e-12, "final_keys")


#: Shapes and cuts at the edges: (batch, length, heads, num_keys, key_width, width), options.
EDGES = {
    "fewer tokens than a chunk": ((2, 3, 1, 4, 4, 3), {"chunk_size": 4, "top_k": 2}),
    "full chunks": ((2, 6, 1, 4, 4, 3), {"chunk_size": 3, "top_k": 2}),
    "one token more than full chunks": ((2, 7, 1, 4, 4, 3), {"chunk_size": 3, "top_k": 2}),
    "lookahead of a chunk": ((2, 7, 1, 4, 4, 3), {"chunk_size": 3, "top_k": 2, "lookahead": 3}),
    "decay, and a chunk that waits": (
        (2, 7, 1, 4, 4, 3),
        {"chunk_size": 3, "top_k": 2, "lr": 0.5, "weight_decay": 0.1},
    ),
    "no lookahead": ((2, 7, 1, 4, 4, 3), {"chunk_size": 3, "top_k": 2, "lookahead": 0}),
    "chunks of one token": ((1, 4, 1, 4, 4, 3), {"chunk_size": 1, "top_k": 2}),
    "all sub-keys": ((1, 5, 2, 3, 4, 3), {"chunk_size": 2, "top_k": 3}),
    "one slot": ((2, 5, 1, 1, 2, 1), {"chunk_size": 2, "top_k": 1}),
    "odd sizes": ((1, 5, 2, 7, 10, 13), {"chunk_size": 2, "top_k": 3}),
    "gradient": ((2, 7, 1, 4, 4, 3), {"chunk_size": 3, "top_k": 2, "step": "gradient", "clip": 0.2}),
}


@KEY_GRADIENTS
@BOUNDARIES
@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge, boundary, key_gradient):
    shape, options = EDGES[edge]
    check_memory(make_inputs(*shape), PLACES[0], **options, boundary=boundary, key_gradient=key_gradient)


@pytest.mark.parametrize("edge", [pytest.param(edge, marks=SLOW_IN_INTERPRETER) for edge in EDGES])
@BOUNDARIES
def test_edges_in_triton(edge, boundary, triton_place):
    shape, options = EDGES[edge]
    check_memory(make_inputs(*shape), triton_place, **options, boundary=boundary)


#: keys and values, activations, options
BUDGETS = {
    "float32": (torch.float32, torch.float32, {}),
    "float32-clip-decay": (torch.float32, torch.float32, {"clip": 0.1, "weight_decay": 0.05, "lr": 0.5}),
    "float32-normalized-silu-drop": (
        torch.float32,
        torch.float32,
        {"weighting": "silu", "score": "dot", "step": "normalized", "boundary": "drop"},
    ),
    "float32-gradient": (torch.float32, torch.float32, {"step": "gradient", "boundary": "drop"}),
    "float32-all": (torch.float32, torch.float32, {"key_gradient": "all"}),
    "bfloat16-activations": (torch.float32, torch.bfloat16, {}),
    "bfloat16-activations-all": (torch.float32, torch.bfloat16, {"key_gradient": "all", "boundary": "drop"}),
    "float16-activations": (torch.float32, torch.float16, {"boundary": "drop", "weight_decay": 0.05}),
    "bfloat16-table": (torch.bfloat16, torch.bfloat16, {}),
    "float16-table": (torch.float16, torch.float32, {"weight_decay": 0.05}),
}


@PLACES_SLOW
@pytest.mark.parametrize("budget", BUDGETS)
def test_precision(place, budget):
    """Inside the error budget of the same formula in plain PyTorch; what is half precision is cast on load."""
    table, activations, options = BUDGETS[budget]
    kinds = {"mask": "real", "dtype": table, "activations_dtype": activations, "device": place.device}
    inputs = make_inputs(2, 7, 1, 6, 8, 5, **kinds)
    options = {"chunk_size": 3, "top_k": 3, **options}
    like = torch.empty(2, 7, 5, dtype=activations, device=place.device)
    with testing.poisoned_memory(), testing.assert_unchanged(inputs):
        testing.assert_matches_reference(
            functools.partial(fast_weight_memory, backend=place.backend),
            reference.fast_weight_memory,
            inputs | options,
            wrt=DIFFERENTIABLE,
            cotangent=testing.random_cotangent(like),
            reduction_length=64,
        )


@KEY_GRADIENTS
@BOUNDARIES
@pytest.mark.parametrize("name", ["queries", "targets", "gates"])
def test_causality(name, boundary, key_gradient):
    """A token reaches the outputs of later chunks only, beside its query's own; so do the gradients."""
    inputs = make_inputs(2, 9, num_keys=3)  # all 9 slots are read in every chunk
    options = {"chunk_size": 3, "top_k": 3, "lookahead": 2, "boundary": boundary, "key_gradient": key_gradient}
    leaves = leaves_of(inputs)
    outputs = fast_weight_memory(**leaves, **options)
    for token in range(9):
        place = token % 3
        chunk_end = token - place + 3
        # The pair (t, t + 2) is written with the chunk that has both, or not at all.
        first, is_used = chunk_end, True
        if name == "targets":
            is_used = place == 2 if boundary == "drop" else token >= 2
        elif name == "gates" and place > 0:
            first, is_used = chunk_end + 3, boundary == "carry"
        changed = {**inputs, name: inputs[name].clone()}
        changed[name][0, token] += 0.5
        difference = (fast_weight_memory(**changed, **options).output != outputs.output).any(2)  # [B, T]
        if name == "queries":
            assert difference[0, token]
            difference[0, token] = False
        assert not difference[:, :first].any(), f"token {token}"
        assert difference[:, first:].any() == (is_used and first < 9), f"token {token}"

        (gradient,) = torch.autograd.grad(
            outputs.output[:, token].sum(), [leaves[name]], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        if name == "queries":
            gradient[:, token] = 0.0
        assert gradient[:, chunk_end - 3 :].count_nonzero() == 0, f"token {token}"


@PLACES_SLOW
@BOUNDARIES
@pytest.mark.parametrize("step", STEPS)
def test_identical_sequences_in_a_batch_are_one_sequence(step, boundary, place):
    """Accesses and their counts grow alike, and the key step takes a mean."""
    inputs = make_inputs(1, 7, device=place.device)
    by_token = ("queries", "targets", "gates")
    batch = {name: x.expand(3, *x.shape[1:]) if name in by_token else x for name, x in inputs.items()}
    options = {"chunk_size": 3, "top_k": 2, "step": step, "boundary": boundary, "backend": place.backend}
    single, packed = fast_weight_memory(**inputs, **options), fast_weight_memory(**batch, **options)
    copies = {name: getattr(single, name).expand(3, -1, -1) for name in ("output", "slots", "weights")}
    assert_close(packed._asdict(), single._asdict() | copies, 1e-12)


@KEY_GRADIENTS
@BOUNDARIES
def test_chunks_that_are_all_masked_still_decay_and_step(boundary, key_gradient, place):
    inputs = make_inputs(1, 6, mask="none left", device=place.device)
    inputs["targets"] = torch.full_like(inputs["targets"], 1e3)
    options = {"chunk_size": 3, "top_k": 2, "boundary": boundary, "backend": place.backend}
    options |= {"lr": 0.5, "weight_decay": 0.1, "key_gradient": key_gradient}
    outputs = fast_weight_memory(**inputs, **options)
    torch.testing.assert_close(outputs.values, inputs["values"] * 0.95**2)
    keys = inputs["keys"]
    for start in (0, 3):
        queries = inputs["queries"][0, start : start + 3]
        keys = reference.product_key_update(keys, queries, top_k=2, lr=0.5, weight_decay=0.1)
    torch.testing.assert_close(outputs.keys, keys)


@KEY_GRADIENTS
def test_keys_decay_where_no_loss_moves_them(key_gradient, place):
    """λ = 0; along the memorisation loss, whose gradient vanishes where all is masked, too."""
    inputs = make_inputs(1, 7, mask="none left", device=place.device)
    options = {"chunk_size": 3, "top_k": 2, "addressing_weight": 0.0, "key_gradient": key_gradient}
    outputs = fast_weight_memory(**inputs, **options, lr=0.5, weight_decay=0.1, backend=place.backend)
    torch.testing.assert_close(outputs.keys, inputs["keys"] * 0.95**2)


@BOUNDARIES
@pytest.mark.parametrize("clip", [None, 0.1])
def test_rows_that_no_token_reads_keep_their_bits(clip, boundary, place):
    inputs = make_inputs(1, 7, num_keys=16, dtype=torch.float32, device=place.device)
    # Keys that stay where they are: the rows read again are those read before.
    options = {"chunk_size": 3, "top_k": 2, "addressing_weight": 0.0, "clip": clip, "boundary": boundary}
    outputs = fast_weight_memory(**inputs, **options, backend=place.backend)
    testing.assert_untouched_rows_equal(inputs["values"], outputs.values, outputs.slots)
    testing.assert_bitwise_equal(outputs.keys, inputs["keys"])


@KEY_GRADIENTS
@pytest.mark.parametrize(("batch", "length", "width"), [(0, 7, 3), (2, 0, 3), (0, 0, 3), (0, 7, 0)], ids=str)
@BOUNDARIES
def test_empty(boundary, batch, length, width, key_gradient, place):
    inputs = make_inputs(batch, length, width=width, gates=True, mask="bool", device=place.device)
    options = {"chunk_size": 3, "top_k": 2, "lr": 0.5, "weight_decay": 0.1, "key_gradient": key_gradient}
    outputs, gradients = run(fast_weight_memory, inputs, **options, boundary=boundary, backend=place.backend)
    shapes = [(batch, length, width), (1, 2, 4, 2), (16, width), (batch, length, 2), (batch, length, 2)]
    assert [tuple(x.shape) for x in outputs] == shapes
    assert outputs.slots.dtype == torch.int64
    # A chunk of no items is a chunk: it decays.
    decay = 0.95 ** len(range(0, length - (length % 3 if boundary == "carry" else 0), 3))
    for name, cotangent in zip(("keys", "values"), cotangents(outputs)[1:], strict=True):
        final = getattr(outputs, name)
        assert width == 0 or final.data_ptr() != inputs[name].data_ptr()
        torch.testing.assert_close(final, decay * inputs[name])
        torch.testing.assert_close(gradients[name], decay * cotangent)
    for name in ("queries", "targets", "gates"):
        assert gradients[name].shape == inputs[name].shape


@BOUNDARIES
def test_values_of_no_width(boundary):
    """They leave the key step, of which none is left to the memorisation loss."""
    inputs = make_inputs(2, 7, width=0)
    options = {"chunk_size": 3, "top_k": 2, "weight_decay": 0.1, "boundary": boundary}
    actual = named(*run(fast_weight_memory, inputs, **options))
    assert_close(actual, named(*run(reference.fast_weight_memory, inputs, **options)))
    assert_close(named(*run(fast_weight_memory, inputs, **options, key_gradient="all")), actual)


@PLACES_SLOW
@KEY_GRADIENTS
@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided"])
def test_strides_of_inputs_and_of_incoming_gradients(layout, key_gradient, place):
    """Bits, shapes and contiguous results do not depend on strides."""
    options = {"chunk_size": 2, "top_k": 2, "key_gradient": key_gradient, "backend": place.backend}
    results = []
    for kind in ("contiguous", layout):
        inputs = make_inputs(2, 5, mask="real", dtype=torch.float32, device=place.device, layout=kind)
        leaves = leaves_of(inputs)
        outputs = fast_weight_memory(**leaves, mask=inputs["mask"], **options)
        incoming = [testing.with_layout(x, kind) for x in cotangents(outputs)]
        gradients = torch.autograd.grad(outputs[:3], list(leaves.values()), incoming)
        results.append(named(outputs, dict(zip(leaves, gradients, strict=True))))
        assert all(x.is_contiguous() for x in outputs)
    assert_same_bits(*results)


@PLACES_SLOW
@KEY_GRADIENTS
def test_expanded_inputs_and_incoming_gradients(key_gradient, place):
    options = {"chunk_size": 2, "top_k": 2, "key_gradient": key_gradient, "backend": place.backend}
    inputs = make_inputs(2, 5, mask="real", dtype=torch.float32, device=place.device)
    results = []
    for copy in (lambda x: x, torch.Tensor.contiguous):
        expanded = {name: copy(x[:1].expand(x.shape)) for name, x in inputs.items() if name != "keys"}
        leaves = leaves_of(expanded | {"keys": inputs["keys"]})
        outputs = fast_weight_memory(**leaves, mask=expanded["mask"], **options)
        incoming = [copy(testing.random_cotangent(x, layout="expanded")) for x in outputs[:3]]
        gradients = torch.autograd.grad(outputs[:3], list(leaves.values()), incoming)
        results.append(named(outputs, dict(zip(leaves, gradients, strict=True))))
    assert_same_bits(*results)


@BOUNDARIES
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["gates", "mask"])
def test_what_is_not_written_reaches_no_gradient(name, step, boundary):
    """NaN gates or masks of the last tokens, which no chunk writes."""
    inputs = make_inputs(2, 7, mask="real")
    options = {"chunk_size": 7, "top_k": 2, "lookahead": 2, "step": step, "boundary": boundary}
    expected = named(*run(fast_weight_memory, inputs, **options))
    inputs[name] = inputs[name].clone()
    inputs[name][:, -2:] = torch.nan
    assert_same_bits(named(*run(fast_weight_memory, inputs, **options)), expected)


@BOUNDARIES
@KEY_GRADIENTS
@pytest.mark.parametrize("num_keys", [16, 3], ids=["different slots", "shared slots"])
def test_the_gradient_step_descends_the_memory_loss_as_printed(num_keys, key_gradient, boundary, place):
    """Σ ½·g·|p - y|² over the pairs of a chunk, by autograd; a row is divided by its accesses, which may be one."""
    inputs = make_inputs(1, 6, num_keys=num_keys, device=place.device)
    options = {"chunk_size": 6, "top_k": 2, "lookahead": 2, "lr": 0.3, "key_gradient": key_gradient}
    options |= {"boundary": boundary, "backend": place.backend}
    found, paper = (fast_weight_memory(**inputs, step=step, **options) for step in ("gradient", "paper"))
    slots, weights = found.slots[0], found.weights[0]
    assert (len(slots.unique()) == slots.numel()) == (num_keys == 16)

    values = inputs["values"].clone().requires_grad_()
    predictions = (weights.unsqueeze(-1) * values[slots]).sum(1)
    errors = (inputs["targets"][0, 2:] - predictions[:-2]).square().sum(-1)
    (gradient,) = torch.autograd.grad((0.5 * inputs["gates"][0, :-2] * errors).sum(), values)
    counted, ratio = (slots, 6 / 4) if boundary == "drop" else (slots[:-2], 1.0)
    accesses = torch.bincount(counted.flatten(), minlength=len(values)).clamp(min=1).unsqueeze(1)
    moved = -0.3 * ratio * gradient / accesses
    torch.testing.assert_close(found.values - inputs["values"], moved)
    torch.testing.assert_close(paper.values - inputs["values"], 2 * moved)


def test_normalized_steps_of_vanishing_weights_stay_finite():
    """silu of scores near -56 squares to less than float32 can invert."""
    inputs = make_inputs(1, 4, dtype=torch.float32)
    inputs["queries"] = torch.full_like(inputs["queries"], -14.0)
    inputs["keys"] = torch.ones_like(inputs["keys"])
    for temperature in (0.8, 0.9, 1.0, 1.1, 1.2, 1.3):
        options = {"chunk_size": 2, "top_k": 2, "score": "dot", "weighting": "silu", "step": "normalized"}
        outputs = fast_weight_memory(**inputs, temperature=temperature, **options)
        assert all(x.isfinite().all() for x in outputs)


@pytest.mark.gpu
@KEY_GRADIENTS
@BOUNDARIES
def test_the_torch_backend_runs_on_a_gpu(boundary, key_gradient):
    """It gives what it gives on the CPU, up to rounding."""
    options = {"chunk_size": 3, "top_k": 2, "boundary": boundary, "key_gradient": key_gradient, "backend": "torch"}
    with testing.poisoned_memory():
        on_gpu = named(*run(fast_weight_memory, make_inputs(mask="real", device="cuda"), **options))
    on_cpu = named(*run(fast_weight_memory, make_inputs(mask="real"), **options))
    assert_close({name: x.cpu() for name, x in on_gpu.items()}, on_cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_precisions_at_real_sizes_on_a_gpu(precision, table):
    """Against float64: the share of tokens with other slots, and the rows of outputs and gradients of the median token.

    A token whose slots rounding decides differs as a whole, and a few of those decide a norm: so medians.
    """
    inputs = make_inputs(2, 1100, 1, 512, 512, 512, dtype=torch.float32, device="cuda")
    inputs["values"] = inputs["values"].to(table)
    exact = {name: x.double() for name, x in inputs.items()}
    outputs, gradients = run(fast_weight_memory, inputs, precision=precision)
    wanted, wanted_gradients = run(fast_weight_memory, exact, backend="torch")
    others = (outputs.slots.sort(-1).values != wanted.slots.sort(-1).values).any(-1).float().mean()
    assert others <= (0.05 if precision == "tf32" else 0.005)
    pairs = {name: (getattr(outputs, name), getattr(wanted, name)) for name in ("output", "weights")}
    pairs |= {name: (gradients[name], wanted_gradients[name]) for name in ("queries", "targets")}
    for name, (x, y) in pairs.items():
        error = (x.double() - y).flatten(2).norm(dim=-1) / y.flatten(2).norm(dim=-1).clamp(min=1e-12)
        bound = 3e-2 if table == torch.bfloat16 or precision == "tf32" else 1e-3
        assert float(error.median()) <= bound, (name, float(error.median()))


@pytest.mark.gpu
def test_operations_of_the_torch_backend_on_a_gpu():
    """They give what they give on the CPU, up to rounding; tests/test_memory.py has the whole memory."""

    def run(device):
        queries, keys = (x.requires_grad_() for x in testing.make_lookup_inputs(20, 2, 9, 14, device=device))
        inputs = testing.make_update_inputs(20, 8, 81, 13, gates=True, device=device)
        leaves = [queries, keys, inputs.values.requires_grad_(), inputs.targets.requires_grad_()]
        scores, slots = product_key_lookup(queries, keys, 4, backend="torch")
        slots, weights = slots.flatten(1), scores.flatten(1).softmax(-1)
        out = sparse_value_gather(inputs.values, slots, weights, backend="torch")
        new_values = chunk_value_update(
            inputs.values, slots, weights, inputs.targets, out, gates=inputs.gates, clip=0.1, backend="torch"
        )
        gradients = torch.autograd.grad(loss((out, new_values)), leaves)
        return [x.detach().cpu() for x in (scores, slots, out, new_values, *gradients)]

    with testing.poisoned_memory():
        for on_gpu, on_cpu in zip(run("cuda"), run("cpu"), strict=True):
            torch.testing.assert_close(on_gpu, on_cpu)


@KEY_GRADIENTS
def test_without_gradients_nothing_is_kept_and_the_bits_are_the_same(key_gradient, place):
    inputs = make_inputs(2, 3, mask="real", dtype=torch.float32, device=place.device)
    options = {"chunk_size": 2, "top_k": 2, "key_gradient": key_gradient, "weight_decay": 0.1, "backend": place.backend}
    leaves = leaves_of(inputs)
    expected = fast_weight_memory(**{**inputs, **leaves}, **options)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        without_leaves = fast_weight_memory(**inputs, **options)
        with torch.no_grad():
            outputs = fast_weight_memory(**{**inputs, **leaves}, **options)
    assert not saved
    assert not any(x.requires_grad for x in (*outputs, *without_leaves))
    assert_same_bits(outputs._asdict(), expected._asdict())
    assert_same_bits(without_leaves._asdict(), expected._asdict())
