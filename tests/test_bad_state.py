"""What a state, a capture and a replay refuse to take: an error that names it, and nothing changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fwpkm_kernels import MemoryGraph, testing
from tests.helpers.graphs import graph_maker, replayed
from tests.helpers.memory import assert_same_bits, make_inputs
from tests.helpers.streaming import BOUND, DEVICE, OPTIONS, contents, half_read, make_state, stream, tokens_of

Arguments = dict[str, Any]


def rebind(**changes: Any) -> Callable[[Arguments], Arguments]:
    """What a state would save that was bound to other options."""
    return lambda saved: half_read(**changes)[1].state_dict()


def rewrite(text: bytes) -> Callable[[Arguments], Arguments]:
    return lambda saved: {"binding": torch.tensor(list(text), dtype=torch.uint8)}


def replace(before: bytes, after: bytes) -> Callable[[Arguments], Arguments]:
    """Other text in the binding."""

    def change(saved: Arguments) -> Arguments:
        text = bytes(saved["binding"].tolist())
        assert before in text
        return rewrite(text.replace(before, after))(saved)

    return change


#: Changes to a state dict that are refused: message, changed entries; None removes one.
BAD_STATE: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "other shape of values": (r"'values'.*\[16, 3\].*\[16, 4\]", lambda s: {"values": torch.zeros(16, 4)}),
    "other dtype of keys": ("'keys'.*float32.*float64", lambda s: {"keys": s["keys"].double()}),
    "other dtype of position": ("'position'.*int64.*int32", lambda s: {"position": s["position"].int()}),
    "no tensor": ("'position'.*int", lambda s: {"position": 6}),
    "sparse values": ("dense.*sparse.*'values'", lambda s: {"values": s["values"].to_sparse()}),
    "values without data": ("data.*meta.*'values'", lambda s: {"values": s["values"].to("meta")}),
    "position without data": ("data.*meta.*'position'", lambda s: {"position": s["position"].to("meta")}),
    "a number for a name": ("exactly.*'3'", lambda s: {3: torch.zeros(1)}),
    "slots of N in the queue": (r"'queue.slots'.*\[0, 16\).*16", lambda s: {"queue.slots": s["queue.slots"] + 16}),
    "no keys": ("'keys'", lambda s: {"keys": None}),
    "no position": ("'position'", lambda s: {"position": None}),
    "no binding": ("binding|queue", lambda s: {"binding": None}),
    "no queue": ("'position'", lambda s: {name: None for name in s if name not in ("keys", "values", "position")}),
    "negative position": ("'position'", lambda s: {"position": torch.tensor(-1)}),
    "no gates in the queue": ("queue.gates", lambda s: {"queue.gates": None}),
    "unknown name": ("'more'", lambda s: {"more": torch.zeros(1)}),
    "a sub-key twice in the queue": (
        "different sub-keys.*'queue.sub_keys'",
        lambda s: {"queue.sub_keys": torch.zeros_like(s["queue.sub_keys"])},
    ),
    "other shape in the queue": (r"'queue.slots'", lambda s: {"queue.slots": s["queue.slots"][:1]}),
    "other dtype in the queue": (
        "'queue.queries'.*bfloat16.*float32",
        lambda s: {"queue.queries": s["queue.queries"].float()},
    ),
    "other chunk_size": ("`chunk_size`.*4.*5|'queue", rebind(chunk_size=5)),
    "binding no tensor": ("'binding'", lambda s: {"binding": "{}"}),
    "binding no text": ("'binding'", rewrite(b"\xff\xfe")),
    "binding no JSON": ("'binding'", rewrite(b"{")),
    "binding no mapping": ("'binding'", rewrite(b"[]")),
    "binding empty": ("'binding'", rewrite(b"")),
    "binding of floats": ("'binding'", lambda s: {"binding": s["binding"].float()}),
    "binding without options": ("'binding'", replace(b'"options"', b'"other"')),
    "binding with one dtype": ("'binding'", replace(b'"bfloat16", ', b"")),
    "binding with an unknown option": ("'binding'", replace(b'"top_k"', b'"top"')),
    "binding with an unknown dtype": ("'binding'", replace(b"bfloat16", b"bfloat17")),
    "binding with what is no dtype": ("'binding'", replace(b"bfloat16", b"nn")),
    "binding with an integer dtype": ("'binding'|'queue", replace(b"bfloat16", b"int64")),
    "binding with a batch of text": ("'binding'", replace(b'"batch": 2', b'"batch": "2"')),
    "binding with a negative batch": ("'binding'", replace(b'"batch": 2', b'"batch": -2')),
    "binding with a float chunk_size": ("'binding'", replace(b'"chunk_size": 4', b'"chunk_size": 4.5')),
    "binding with a negative top_k": ("'binding'", replace(b'"top_k": 2', b'"top_k": -2')),
    "binding with an unknown score": ("'binding'", replace(b'"idw"', b'"idv"')),
    "binding with boundary drop": ("'binding'", replace(b'"carry"', b'"drop"')),
}


@pytest.mark.parametrize("bound", [False, True], ids=["fresh", "bound"])
@pytest.mark.parametrize("case", BAD_STATE)
def test_a_state_dict_that_does_not_fit_changes_nothing(case, bound):
    message, change = BAD_STATE[case]
    inputs, source = half_read()
    saved = source.state_dict()
    saved = {name: x for name, x in (saved | change(saved)).items() if x is not None}
    state = make_state(inputs)
    if bound:
        stream(state, inputs, [3], **OPTIONS)
    elif case == "other chunk_size":
        state.load_state_dict(saved)  # a fresh state takes any
        return
    before = contents(state)
    with pytest.raises(ValueError, match=message) as caught:
        state.load_state_dict(saved)
    assert "`" in str(caught.value)
    assert_same_bits(contents(state), before)


@pytest.mark.parametrize("x", [None, [1], "keys", torch.ones(3)], ids=lambda x: type(x).__name__)
def test_what_is_no_state_dict_is_refused(x):
    with pytest.raises(TypeError, match=f"`state_dict`.*mapping.*{type(x).__name__}"):
        half_read()[1].load_state_dict(x)


@pytest.mark.parametrize("name", [name for name in BOUND if isinstance(BOUND[name], dict) and name != "boundary"])
def test_a_bound_state_takes_no_other_options(name):
    _, state = half_read()
    before = contents(state)
    with pytest.raises(ValueError, match=f"`{name}`"):
        state.load_state_dict(half_read(**BOUND[name])[1].state_dict())
    assert_same_bits(contents(state), before)


@pytest.fixture
def make_graph(monkeypatch) -> Callable[..., MemoryGraph]:
    return graph_maker(monkeypatch)


#: Captures that are refused: error, message, tokens, options.
BAD_CAPTURE: dict[str, tuple[type[Exception], str, int, dict[str, Any]]] = {
    "tokens that do not divide": (ValueError, r"`queries`.*`chunk_size`.*\[2, 3, 1, 4\].*4", 3, {}),
    "more tokens than a chunk": (ValueError, "`queries`.*`chunk_size`", 6, {}),
    "no tokens": (ValueError, "`queries`.*`chunk_size`", 0, {}),
    "backend torch": (ValueError, "`backend`.*'torch'", 2, {"backend": "torch"}),
    "boundary drop": (ValueError, "`boundary`", 2, {"boundary": "drop"}),
    "unknown option": (TypeError, "chunksize", 2, {"chunksize": 4}),
    "bad option": (ValueError, "`lr`.*inf", 2, {"lr": float("inf")}),
}


@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
@pytest.mark.parametrize("case", BAD_CAPTURE)
def test_a_capture_that_is_refused_changes_nothing(case, bound, make_graph):
    error, message, count, options = BAD_CAPTURE[case]
    inputs = make_inputs(2, 8, device=DEVICE)
    state = make_state(inputs)
    if bound:
        stream(state, inputs, [4], **OPTIONS)
    before = contents(state)
    with pytest.raises(error, match=message):
        make_graph(state, inputs, count, **OPTIONS | options)
    assert_same_bits(contents(state), before)


def test_a_state_on_a_cpu_is_not_captured():
    inputs = make_inputs(2, 8)
    state = make_state(inputs)
    with pytest.raises(ValueError, match="`state`.*GPU.*cpu"):
        MemoryGraph(state, **tokens_of(inputs, 0, 4), **OPTIONS)
    assert "binding" not in state.state_dict()


#: Calls that are refused: message, what of gates and mask was captured, tokens read before, changes to the 4 tokens.
BAD_REPLAY: dict[str, tuple[str, tuple[str, ...], int, Callable[[Arguments], Arguments]]] = {
    "tokens no multiple": ("`queries`.*2.*3", ("gates", "mask"), 4, lambda x: {n: t[:, :3] for n, t in x.items()}),
    "position no multiple": ("`state`.*2.*5", ("gates", "mask"), 5, lambda x: x),
    "gates not captured": ("`gates`", ("mask",), 4, lambda x: x),
    "mask not captured": ("`mask`", ("gates",), 4, lambda x: x),
    "no gates": ("`gates`", ("gates", "mask"), 4, lambda x: x | {"gates": None}),
    "no mask": ("`mask`", ("gates", "mask"), 4, lambda x: x | {"mask": None}),
    "another batch": ("`queries`.*2.*1", ("gates", "mask"), 4, lambda x: {n: t[:1] for n, t in x.items()}),
    "other queries": ("`queries`.*bfloat16", ("gates", "mask"), 4, lambda x: x | {"queries": x["queries"].bfloat16()}),
    "other targets": ("`targets`.*float16", ("gates", "mask"), 4, lambda x: x | {"targets": x["targets"].half()}),
    "other gates": ("`gates`.*bfloat16", ("gates", "mask"), 4, lambda x: x | {"gates": x["gates"].bfloat16()}),
    "other mask": ("`mask`.*float32", ("gates", "mask"), 4, lambda x: x | {"mask": 0.5 * x["mask"].float()}),
    "other width": ("`targets`.*`values`", ("gates", "mask"), 4, lambda x: x | {"targets": x["targets"][..., :2]}),
}


@pytest.mark.parametrize("case", BAD_REPLAY)
def test_a_replay_that_is_refused_changes_nothing(case, make_graph):
    message, names, read, change = BAD_REPLAY[case]
    inputs = make_inputs(2, 12, mask="bool", dtype=torch.float32, device=DEVICE)
    state = make_state(inputs)
    captured = {name: x for name, x in inputs.items() if name in ("queries", "targets", *names)}
    graph = make_graph(state, captured, 2, **OPTIONS)
    stream(state, inputs, [read], **OPTIONS)
    before = contents(state)
    with pytest.raises(ValueError, match=message):
        graph(**change(tokens_of(inputs, read, read + 4)))
    assert_same_bits(contents(state), before)


def test_a_replay_on_a_state_that_was_bound_again_is_refused(make_graph):
    inputs = make_inputs(2, 8, device=DEVICE)
    state = make_state(inputs)
    fresh = state.state_dict()
    graph = make_graph(state, inputs, 4, **OPTIONS)
    state.load_state_dict(fresh)  # which was not bound
    with pytest.raises(ValueError, match="`state`"):
        replayed(graph, state, inputs, 4)
    testing.assert_bitwise_equal(state.values, inputs["values"])


@pytest.mark.parametrize("name", ["keys", "values"])
def test_a_replay_on_other_tensors_is_refused(name, make_graph):
    inputs = make_inputs(2, 8, device=DEVICE)
    state = make_state(inputs)
    graph = make_graph(state, inputs, 4, **OPTIONS)
    setattr(state, f"_{name}", getattr(state, name).clone())
    before = contents(state)
    with pytest.raises(ValueError, match="`state`"):
        replayed(graph, state, inputs, 8)
    assert_same_bits(contents(state), before)
