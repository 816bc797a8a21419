"""The whole memory: its definition against the golden cases, and both backends against that definition."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import reference
from fwpkm_kernels import FastWeightMemory, MemoryOutput, fast_weight_memory, memory, testing
from fwpkm_kernels.memory import STEPS
from tests.conftest import PLACES, SLOW_IN_INTERPRETER, Place
from tests.helpers.golden import NAMES, assert_near, load, tolerance

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
DIFFERENTIABLE = ("queries", "targets", "keys", "values", "gates")
#: Golden cases that the interpreter runs in `make test`, in float64: those with the fewest reads.
QUICK = ("paper_j_short", "paper_n_topk2", "paper_i_single_chunk")
#: What it runs in float32 too, in `make test-all`; float32 is no other than elsewhere there.
FLOAT32_IN_INTERPRETER = ("paper_l_near_keys", "idw_silu", "clip")
#: Instead of the fixture `place`, where the interpreter takes many seconds.
PLACES_SLOW = pytest.mark.parametrize(
    "place", [PLACES[0], pytest.param(PLACES[1], marks=SLOW_IN_INTERPRETER)], ids=lambda place: place.backend
)
BOUNDARIES = pytest.mark.parametrize("boundary", ["carry", "drop"])
KEY_GRADIENTS = pytest.mark.parametrize("key_gradient", ["addressing", "all"])


def make_inputs(
    batch: int = 2,
    length: int = 8,
    heads: int = 1,
    num_keys: int = 4,
    key_width: int = 4,
    width: int = 3,
    *,
    gates: bool = True,
    mask: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    activations_dtype: torch.dtype | None = None,
    device: str = "cpu",
    layout: str = "contiguous",
) -> dict[str, Any]:
    """The tensor arguments by name; ``mask`` is None, one of MASK_KINDS, or "none left", which masks every token."""
    activations = activations_dtype or dtype
    lookup = {"seed": seed, "dtype": activations, "keys_dtype": torch.promote_types(dtype, torch.float32)}
    queries, keys = testing.make_lookup_inputs((batch, length), heads, num_keys, key_width, **lookup)
    kind = "bool" if mask == "none left" else mask
    kinds = {"gates": gates, "mask": kind, "dtype": dtype, "activations_dtype": activations}
    update = testing.make_update_inputs(batch * length, 1, num_keys**2, width, seed=seed + 1, **kinds)
    by_token = {"targets": update.targets, "gates": update.gates, "mask": update.mask}
    inputs = {"queries": queries, "targets": update.targets, "keys": keys, "values": update.values}
    inputs |= {name: x.view(batch, length, *x.shape[1:]) for name, x in by_token.items() if x is not None}
    if mask == "none left":
        inputs["mask"] = torch.zeros_like(inputs["mask"])
    return {name: testing.with_layout(x.to(device), layout) for name, x in inputs.items()}


def leaves_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The inputs that gradients are asked of, as leaves."""
    return {name: inputs[name].detach().requires_grad_() for name in DIFFERENTIABLE if name in inputs}


def cotangents(outputs: MemoryOutput, seed: int = 5) -> list[Tensor]:
    return [testing.random_cotangent(x, seed=seed + i) for i, x in enumerate(outputs[:3])]


def gradients_of(outputs: MemoryOutput, leaves: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Gradients of one loss on output, final keys and final values together."""
    found = torch.autograd.grad(
        outputs[:3], list(leaves.values()), cotangents(outputs), allow_unused=True, materialize_grads=True, **options
    )
    return dict(zip(leaves, found, strict=True))


def run(function: Callable[..., Any], inputs: dict[str, Any], **options: Any) -> tuple[MemoryOutput, dict[str, Tensor]]:
    """Outputs and gradients."""
    leaves = leaves_of(inputs)
    outputs = function(**{**inputs, **leaves}, **options)
    return outputs, gradients_of(outputs, leaves)


def named(outputs: MemoryOutput, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return outputs._asdict() | {f"gradient of {name}": x for name, x in gradients.items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        testing.assert_bitwise_equal(x, expected[name], name)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-9) -> None:
    """Relative in norm, beside a gradient that vanishes analytically up to rounding; slots are equal."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        wanted = expected[name].detach()
        assert (x.shape, x.dtype) == (wanted.shape, wanted.dtype), name
        if x.is_floating_point():
            error, norm = float((x.detach() - wanted).norm()), float(wanted.norm())
            assert error <= bound * max(norm, 1e-3), f"{name}: error {error:.3g} over {bound:.3g} of {norm:.3g}"
        else:
            testing.assert_bitwise_equal(x, wanted, name)


def check(inputs: dict[str, Any], place: Place, **options: Any) -> None:
    """Outputs, slots, weights and all gradients are those of the reference, in float64."""
    inputs = {name: x.to(place.device) for name, x in inputs.items()}
    with testing.poisoned_memory(), testing.assert_unchanged(inputs):
        actual = named(*run(fast_weight_memory, inputs, **options, backend=place.backend))
    assert_close(actual, named(*run(reference.fast_weight_memory, inputs, **options)))


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
    check(make_inputs(*shape), PLACES[0], **options, boundary=boundary, key_gradient=key_gradient)


@pytest.mark.parametrize("edge", [pytest.param(edge, marks=SLOW_IN_INTERPRETER) for edge in EDGES])
@BOUNDARIES
def test_edges_in_triton(edge, boundary, triton_place):
    shape, options = EDGES[edge]
    check(make_inputs(*shape), triton_place, **options, boundary=boundary)


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


@BOUNDARIES
@pytest.mark.parametrize("step", STEPS)
@KEY_GRADIENTS
def test_gradcheck(key_gradient, step, boundary):
    leaves = leaves_of(make_inputs(2, 7, num_keys=3, width=2))
    mask = make_inputs(2, 7, mask="real")["mask"]
    options = {"chunk_size": 3, "top_k": 2, "lookahead": 2, "step": step, "boundary": boundary}

    def outputs(queries, targets, keys, values, gates):
        tensors = (queries, targets, keys, values)
        return fast_weight_memory(*tensors, gates=gates, mask=mask, key_gradient=key_gradient, **options)[:3]

    assert gradcheck(outputs, list(leaves.values()))


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


def small_call(key_gradient: str = "addressing", **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Leaves and options of a call of three chunks with a mask."""
    options = {"chunk_size": 3, "top_k": 2, "key_gradient": key_gradient, **options}
    inputs = make_inputs(2, 8, mask="real", dtype=torch.float32)
    return leaves_of(inputs), {**options, "mask": inputs["mask"]}


@KEY_GRADIENTS
def test_backward_twice_with_retain_graph(key_gradient, place):
    """Nothing that backward reads, and no incoming gradient, is spoilt by an earlier backward."""
    inputs = make_inputs(1, 3, mask="real", dtype=torch.float32, device=place.device)
    leaves = leaves_of(inputs)
    options = {"chunk_size": 2, "top_k": 2, "clip": 0.3, "key_gradient": key_gradient, "backend": place.backend}
    outputs = fast_weight_memory(**{**inputs, **leaves}, **options)
    incoming = cotangents(outputs)
    with testing.assert_unchanged(incoming):
        first = torch.autograd.grad(outputs[:3], list(leaves.values()), incoming, retain_graph=True)
        second = torch.autograd.grad(outputs[:3], list(leaves.values()), incoming)
    assert_same_bits(dict(zip(leaves, first, strict=True)), dict(zip(leaves, second, strict=True)))


@pytest.mark.parametrize("use_reentrant", [False, True])
@KEY_GRADIENTS
def test_checkpointing(key_gradient, use_reentrant):
    leaves, options = small_call(key_gradient)

    def outputs(queries, targets, keys, values, gates):
        return tuple(fast_weight_memory(queries, targets, keys, values, gates=gates, **options))

    # A reentrant checkpoint gives leaves their gradients in backward() only.
    def gradients(result):
        torch.autograd.backward(result[:3], cotangents(MemoryOutput(*result)))
        found = {name: x.grad for name, x in leaves.items()}
        for x in leaves.values():
            x.grad = None
        return found

    expected = gradients(outputs(**leaves))
    assert_same_bits(gradients(checkpoint(outputs, *leaves.values(), use_reentrant=use_reentrant)), expected)


def two_calls(function: Callable[..., Any], inputs: dict[str, Any], *, detach: bool = False, **options: Any) -> Any:
    """The gradients of a loss on both outputs and the final state, the second half of the tokens in a second call."""
    leaves = leaves_of(inputs)
    by_token = ("queries", "targets", "gates", "mask")
    tensors = inputs | leaves
    first = function(**{k: x[:, :4] if k in by_token else x for k, x in tensors.items()}, **options)
    state = {"keys": first.keys, "values": first.values}
    if detach:
        state = {name: x.detach() for name, x in state.items()}
    second = function(**{k: x[:, 4:] if k in by_token else x for k, x in tensors.items()} | state, **options)
    output = torch.cat((first.output, second.output), dim=1)
    joined = MemoryOutput(output, second.keys, second.values, second.slots, second.weights)
    return named(joined, gradients_of(joined, leaves))


@BOUNDARIES
@KEY_GRADIENTS
@pytest.mark.parametrize("detach", [False, True], ids=["through", "detached"])
def test_two_calls_in_a_row(detach, key_gradient, boundary):
    inputs = make_inputs(2, 9, mask="bool")
    options = {"chunk_size": 2, "top_k": 2, "boundary": boundary, "key_gradient": key_gradient, "detach": detach}
    actual = two_calls(fast_weight_memory, inputs, **options)
    assert_close(actual, two_calls(reference.fast_weight_memory, inputs, **options))
    if detach:
        # No later than the first call's own outputs, the first tokens' targets have no effect.
        assert actual["gradient of targets"][:, 4:].any()
        assert not actual["gradient of targets"][:, 3].any()
        assert not actual["gradient of values"].isnan().any()


@KEY_GRADIENTS
@pytest.mark.parametrize("result", ["output", "keys", "values"])
def test_gradient_of_one_result_alone(result, key_gradient):
    inputs = make_inputs(2, 8, mask="real")

    def gradients(function):
        leaves = leaves_of(inputs)
        outputs = function(**inputs | leaves, chunk_size=3, top_k=2, key_gradient=key_gradient)
        x = getattr(outputs, result)
        cotangent = testing.random_cotangent(x)
        found = torch.autograd.grad(x, list(leaves.values()), cotangent, allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    assert_close(gradients(fast_weight_memory), gradients(reference.fast_weight_memory))


@KEY_GRADIENTS
@pytest.mark.parametrize(
    "wanted", [("values",), ("gates",), ("keys",), ("queries", "targets"), ("targets", "gates")], ids=str
)
def test_gradients_of_some_inputs(wanted, key_gradient):
    leaves, options = small_call(key_gradient)
    expected = gradients_of(fast_weight_memory(**leaves, **options), leaves)
    some = {name: x.detach().requires_grad_(name in wanted) for name, x in leaves.items()}
    outputs = fast_weight_memory(**some, **options)
    actual = gradients_of(outputs, {name: some[name] for name in wanted})
    assert_same_bits(actual, {name: expected[name] for name in wanted})


@pytest.mark.parametrize("key_gradient", ["addressing", "all"])
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "mask"])
def test_inputs_changed_after_forward(name, key_gradient):
    """The gradients stay what they were, or autograd notices."""
    leaves, options = small_call(key_gradient, addressing_weight=0.5)
    expected = gradients_of(fast_weight_memory(**leaves, **options), leaves)
    outputs = fast_weight_memory(**leaves, **options)
    with torch.no_grad():
        (leaves | options)[name].mul_(2.0)
    if name == "values" and key_gradient == "addressing":
        assert_same_bits(gradients_of(outputs, leaves), expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients_of(outputs, leaves)


@KEY_GRADIENTS
@pytest.mark.parametrize("addressing_weight", [1.0, 0.0])
def test_results_changed_after_forward(addressing_weight, key_gradient):
    leaves, options = small_call(key_gradient, addressing_weight=addressing_weight)
    expected = gradients_of(fast_weight_memory(**leaves, **options), leaves)
    outputs = fast_weight_memory(**leaves, **options)
    with torch.no_grad():
        for x in outputs:
            x.zero_()
    assert_same_bits(gradients_of(outputs, leaves), expected)


@pytest.mark.parametrize("options", [{}, {"clip": 0.1, "weight_decay": 0.1}, {"addressing_weight": 0.0}], ids=str)
def test_what_is_kept_for_backward(options):
    """The undo log and small tensors for each read, keys for each chunk, and no table."""
    length, chunk_size, top_k, width, num_keys = 2048, 512, 8, 64, 256
    inputs = make_inputs(1, length, 1, num_keys, 16, width, dtype=torch.float32)
    leaves = leaves_of(inputs)
    held = {x.untyped_storage().data_ptr() for x in leaves.values()}
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        assert num_keys**2 not in x.shape
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = fast_weight_memory(**leaves, chunk_size=chunk_size, top_k=top_k, **options)
    assert leaves["values"].untyped_storage().data_ptr() not in saved
    assert max(saved.values()) < leaves["values"].nbytes // 2
    kept = sum(size for storage, size in saved.items() if storage not in held)
    assert 0 < kept <= 2 * length * (top_k + 1) * width * 4 + length // chunk_size * leaves["keys"].nbytes
    context = outputs.output.grad_fn
    assert not any(isinstance(x, Tensor) for x in vars(context).values())


def test_of_many_keys_only_the_picked_are_kept():
    """Where a chunk picks fewer sub-keys than there are, no set of keys is kept either."""
    inputs = make_inputs(1, 64, num_keys=64, key_width=16, mask="real")
    leaves, options = leaves_of(inputs), {"chunk_size": 4, "top_k": 2}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fast_weight_memory(**{**inputs, **leaves}, **options)
    mine = [size for address, size in saved.items() if address != leaves["keys"].data_ptr()]
    assert max(mine) < 4 * leaves["keys"].nbytes  # of 16 chunks
    check(inputs, PLACES[0], **options)


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


@KEY_GRADIENTS
def test_slots_and_weights_that_come_back_are_not_differentiable(key_gradient):
    leaves, options = small_call(key_gradient)
    outputs = fast_weight_memory(**leaves, **options)
    assert [x.requires_grad for x in outputs] == [True, True, True, False, False]


def test_a_mask_that_requires_gradients_gets_none():
    inputs = make_inputs(2, 6, mask="real")
    inputs["mask"] = inputs["mask"].requires_grad_()
    assert not fast_weight_memory(**inputs, chunk_size=3, top_k=2).output.requires_grad


def test_addresses_are_not_differentiated_for_nothing(monkeypatch):
    def fail(*args: Any) -> Any:
        raise AssertionError("the gradients of queries and keys are not asked for")

    monkeypatch.setattr(memory, "address_scan_grad", fail)
    inputs = make_inputs(2, 6)
    inputs["values"] = inputs["values"].requires_grad_()
    inputs["gates"] = inputs["gates"].requires_grad_()
    output = fast_weight_memory(**inputs, chunk_size=3, top_k=2).output
    assert all(grad.any() for grad in torch.autograd.grad(output.sum(), (inputs["values"], inputs["gates"])))


def assert_compiled_equals_eager(compiled: Callable[..., Any], length: int, **options: Any) -> None:
    """Outputs, and gradients of all inputs, with the number of tokens marked dynamic."""
    inputs = make_inputs(2, length, heads=2, mask="bool", dtype=torch.float32)
    leaves = leaves_of(inputs)
    expected = named(*run(fast_weight_memory, inputs, **options))
    for name in ("queries", "targets", "gates"):
        torch._dynamo.mark_dynamic(leaves[name], 1)
    torch._dynamo.mark_dynamic(inputs["mask"], 1)
    outputs = compiled(**leaves, mask=inputs["mask"])
    assert_close(named(outputs, gradients_of(outputs, leaves)), expected, 1e-5)


@BOUNDARIES
def test_compiled_equals_eager(boundary):
    options = {"chunk_size": 3, "top_k": 2, "lookahead": 2, "boundary": boundary}

    def step(**inputs):
        return fast_weight_memory(**inputs, **options)

    torch._dynamo.reset()
    assert_compiled_equals_eager(torch.compile(step, fullgraph=True), 8, **options)


@pytest.mark.parametrize("addressing_weight", [1.0, 0.0])
@BOUNDARIES
def test_one_compilation_serves_every_number_of_tokens(boundary, addressing_weight):
    options = {"chunk_size": 3, "top_k": 2, "boundary": boundary, "addressing_weight": addressing_weight}

    def step(**inputs):
        return fast_weight_memory(**inputs, **options)

    torch._dynamo.reset()  # the same code with other options counts as a recompilation
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in (8, 20, 5, 12):
        assert_compiled_equals_eager(compiled, length, **options)
    assert counter.frame_count == 1


@KEY_GRADIENTS
def test_compiled_without_gradients(key_gradient):
    inputs = make_inputs(dtype=torch.float32)

    def read(**inputs):
        return fast_weight_memory(**inputs, chunk_size=3, top_k=2, key_gradient=key_gradient)

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(**inputs)._asdict(), read(**inputs)._asdict())


@PLACES_SLOW
@KEY_GRADIENTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, key_gradient, place):
    inputs = make_inputs(1, 3, dtype=torch.float32, device=place.device)
    options = {"chunk_size": 2, "top_k": 2, "key_gradient": key_gradient, "backend": place.backend}
    expected = named(*run(fast_weight_memory, inputs, **options))
    with torch.autocast(place.device, dtype=dtype):
        assert_same_bits(named(*run(fast_weight_memory, inputs, **options)), expected)


def test_apply_takes_the_arguments_of_the_function_in_its_order():
    leaves, _ = small_call()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 3:] = False
    tensors = [leaves[name] for name in DIFFERENTIABLE[:4]]
    positional = (3, 2, 2, "dot", 0.01, "silu", 0.7, leaves["gates"], mask, 0.5, 0.01, 0.2, 0.6, "all", "normalized")
    outputs = MemoryOutput(*FastWeightMemory.apply(*tensors, *positional, "drop", "ieee", "torch"))
    expected = fast_weight_memory(
        **leaves,
        chunk_size=3,
        top_k=2,
        lookahead=2,
        score="dot",
        eps=0.01,
        weighting="silu",
        temperature=0.7,
        mask=mask,
        lr=0.5,
        weight_decay=0.01,
        clip=0.2,
        addressing_weight=0.6,
        key_gradient="all",
        step="normalized",
        boundary="drop",
        precision="ieee",
        backend="torch",
    )
    actual = named(outputs, gradients_of(outputs, leaves))
    assert_same_bits(actual, named(expected, gradients_of(expected, leaves)))


def test_apply_has_the_defaults_of_the_function():
    leaves = leaves_of(make_inputs(1, 600, num_keys=9, gates=False, dtype=torch.float32))
    outputs = MemoryOutput(*FastWeightMemory.apply(*leaves.values()))
    actual = named(outputs, gradients_of(outputs, leaves))
    expected = fast_weight_memory(**leaves)
    assert_same_bits(actual, named(expected, gradients_of(expected, leaves)))
    assert_close(expected._asdict(), reference.fast_weight_memory(**leaves)._asdict(), 1e-4)


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
