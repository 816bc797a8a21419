"""The definition of the layers: against the golden cases, and against numbers worked out another way."""

from collections.abc import Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import reference
from reference.layers import LayerOutput
from tests.helpers.golden import GOLDEN
from tests.helpers.layers import GOLDEN_LAYERS, check_golden_layer, draw

f64 = torch.float64
#: hidden_size, heads, num_keys, key_dim, value_dim
D_MODEL, HEADS, NUM_KEYS, KEY_DIM, VALUE_DIM = 6, 2, 4, 4, 5
SMALL = {"num_keys": NUM_KEYS, "heads": HEADS, "top_k": 2, "chunk_size": 3}


def make_parameters(query_conv: int | None = None, bias: bool = True) -> dict[str, Tensor]:
    """Random parameters of a small layer, norm weights around 1."""
    shapes = {"q_norm": (D_MODEL,), "v_norm": (D_MODEL,), "g_norm": (D_MODEL,), "o_norm": (VALUE_DIM,)}
    shapes |= {"q_proj": (HEADS * KEY_DIM, D_MODEL), "v_proj": (VALUE_DIM, D_MODEL), "g_proj": (1, D_MODEL)}
    shapes |= {"o_proj": (D_MODEL, VALUE_DIM), "table": (NUM_KEYS**2, VALUE_DIM)}
    if query_conv is not None:
        shapes["q_conv"] = (D_MODEL, 1, query_conv)
    parameters = {f"{name}.weight": draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    for name in ("q_norm", "v_norm", "g_norm", "o_norm"):
        parameters[f"{name}.weight"] = 1 + 0.2 * parameters[f"{name}.weight"]
    if bias:
        for i, name in enumerate(("q_proj", "v_proj", "g_proj", "o_proj")):
            parameters[f"{name}.bias"] = draw(shapes[name][0], seed=20 + i)
    parameters["keys"] = draw(HEADS, 2, NUM_KEYS, KEY_DIM // 2, seed=30)
    return parameters


def layer(x: Tensor, parameters: Mapping[str, Tensor], **options: Any) -> LayerOutput:
    return reference.fast_weight_layer(x, parameters, **(SMALL | options))


def test_no_golden_layer_is_left_out():
    assert sorted(path.stem for path in (GOLDEN / "layers").glob("*.npz")) == GOLDEN_LAYERS


@pytest.mark.parametrize("name", GOLDEN_LAYERS)
def test_golden_layers(name: str):
    def run(x: Tensor, mask: Tensor | None, parameters: dict[str, Tensor], config: dict[str, Any]) -> LayerOutput:
        options = {key: value for key, value in config.items() if key not in ("hidden_size", "key_dim", "value_dim")}
        options |= {"scope": "batch", "boundary": "drop"}
        return reference.fast_weight_layer(x, parameters, attention_mask=mask, **options)

    check_golden_layer(run, name)


def test_the_layer_by_hand():
    """Each formula written out for single numbers, with the memory in between."""
    parameters, x = make_parameters(), draw(1, 7, D_MODEL, seed=40)
    found = layer(x, parameters)
    h = {name: torch.empty(7, D_MODEL, dtype=f64) for name in "qvg"}
    for name, rows in h.items():
        for t in range(7):
            root = (sum(float(x[0, t, i]) ** 2 for i in range(D_MODEL)) / D_MODEL + 1e-5) ** 0.5
            rows[t] = x[0, t] / root * parameters[f"{name}_norm.weight"]
    p = {name: h[name] @ parameters[f"{name}_proj.weight"].T + parameters[f"{name}_proj.bias"] for name in "qvg"}
    v = torch.empty(7, VALUE_DIM, dtype=f64)
    for t in range(7):
        mean = sum(p["v"][t]) / VALUE_DIM
        variance = sum((entry - mean) ** 2 for entry in p["v"][t]) / (VALUE_DIM - 1)
        v[t] = (p["v"][t] - mean) / (variance**0.5 + 1e-6)
    g = 1 / (1 + torch.exp(-p["g"][:, 0]))
    memory = reference.fast_weight_memory(
        p["q"].view(1, 7, HEADS, KEY_DIM),
        v[None],
        parameters["keys"],
        parameters["table.weight"],
        gates=g[None],
        chunk_size=3,
        top_k=2,
    )
    y = g[:, None] * memory.output[0] + (1 - g[:, None]) * v
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * parameters["o_norm.weight"]
    assert_close(found.output[0], y @ parameters["o_proj.weight"].T + parameters["o_proj.bias"])
    assert_close(found.keys[0], memory.keys)
    assert_close(found.values[0], memory.values)
    assert_close(found.gate_mean, g.mean())
    assert torch.equal(found.slots, memory.slots)
    assert_close(found.weights, memory.weights)


def test_norms_by_hand():
    parameters, x = make_parameters(), draw(1, 7, D_MODEL, seed=40)
    q, v = (x @ parameters[f"{name}_proj.weight"].T + parameters[f"{name}_proj.bias"] for name in "qv")
    q = q.view(1, 7, HEADS, KEY_DIM)
    q_norms = {None: q, "l2": q / q.square().sum(-1, keepdim=True).sqrt()}
    q_norms["zscore"] = (q - q.mean(-1, keepdim=True)) / (q.std(-1, keepdim=True) + 1e-6)
    v_norms = {None: v, "l2": v / v.square().sum(-1, keepdim=True).sqrt()}
    for query_norm, queries in q_norms.items():
        for value_norm, targets in v_norms.items():
            options = {"query_norm": query_norm, "value_norm": value_norm, "gate": False, "write_gate": False}
            found = layer(x, parameters, **options, input_norm=False)
            start = (parameters["keys"], parameters["table.weight"])
            memory = reference.fast_weight_memory(queries, targets, *start, chunk_size=3, top_k=2)
            assert_close(found.values[0], memory.values)
            y = memory.output + targets
            y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * parameters["o_norm.weight"]
            assert_close(found.output, y @ parameters["o_proj.weight"].T + parameters["o_proj.bias"])
            assert found.gate_mean is None


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_convolution_by_a_double_loop(scope: str):
    """It sees the real tokens of the same document; in a batch the others are 0, in a sequence they are not there."""
    parameters, x = make_parameters(query_conv=3), draw(1, 9, D_MODEL, seed=40)
    number, real = [0, 0, 0, 0, 2, 2, 2, 2, 2], [True, True, False, True, True, True, True, False, True]
    before = [t for t in range(9) if real[t] or scope == "batch"]  # what can be one token before another
    weight = parameters["q_conv.weight"]
    z = torch.zeros_like(x)
    for at, t in enumerate(before):
        for i in range(3):
            s = before[at - 2 + i] if at - 2 + i >= 0 else -1
            if s >= 0 and number[s] == number[t] and real[s]:
                z[0, t] += weight[:, 0, i] * x[0, s]
    assert_close(reference.layers._convolve(torch.cat([torch.zeros(2, D_MODEL), x[0, 4:7]]), weight), z[0, 4:7])
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reference.layers,
            "fast_weight_memory",
            lambda *args, **options: calls.append(args[0]) or reference.fast_weight_memory(*args, **options),
        )
        mask, cuts = torch.tensor([real]), torch.tensor([0, 4, 4, 9])
        options = {"scope": scope, "query_conv": 3, "input_norm": False}
        layer(x, parameters, **options, attention_mask=mask, cu_seqlens=cuts)
    expected = z[:, before] @ parameters["q_proj.weight"].T + parameters["q_proj.bias"]
    assert_close(torch.cat(calls, 1).flatten(2), expected)


CUTS = [0, 4, 4, 5, 14]
REAL = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0]])


def leaves_of(parameters: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    return {name: value.clone().requires_grad_() for name, value in ({"x": x} | parameters).items()}


@pytest.mark.parametrize("boundary", ["carry", "drop"])
@pytest.mark.parametrize("kind", ["packed", "rows", "packed and padded"])
def test_documents_are_separate_calls(kind: str, boundary: str):
    """Values and gradients; what is removed may be NaN."""
    parameters = make_parameters(query_conv=2)
    options = {"query_conv": 2, "boundary": boundary, "weight_decay": 0.1, "lr": 0.5}
    x = draw(1, 14, D_MODEL, seed=40) if kind != "rows" else draw(2, 7, D_MODEL, seed=40)
    where: dict[str, Tensor] = {}
    real = torch.ones(14, dtype=torch.bool)
    if kind != "packed":
        real = REAL[0] > 0
        where["attention_mask"] = REAL.view(x.shape[:2])
    cuts = [0, 7, 14] if kind == "rows" else CUTS
    if kind != "rows":
        where["cu_seqlens"] = torch.tensor(cuts, dtype=torch.int32)
    x = torch.where(real.view(*x.shape[:2], 1), x, torch.nan)
    leaves = leaves_of(parameters, x)
    found = layer(leaves["x"], leaves, **options, **where)

    others = leaves_of(parameters, x)
    index = [torch.arange(a, b)[real[a:b]] for a, b in pairwise(cuts)]
    parts = [layer(others["x"].flatten(0, 1)[kept].unsqueeze(0), others, **options) for kept in index]
    flat = {name: getattr(found, name).flatten(0, 1) for name in ("output", "slots", "weights")}
    for s, (kept, part) in enumerate(zip(index, parts, strict=True)):
        assert torch.equal(flat["slots"][kept], part.slots[0])
        for name in ("output", "weights"):
            assert_close(flat[name][kept], getattr(part, name)[0])
        assert_close(found.keys[s], part.keys[0])
        assert_close(found.values[s], part.values[0])
    assert not flat["output"][~real].any()
    assert not flat["weights"][~real].any()
    assert (flat["slots"][~real] == -1).all()
    total = sum(part.gate_mean * len(kept) for kept, part in zip(index, parts, strict=True))
    assert_close(found.gate_mean, total / int(real.sum()))

    cotangent = draw(*x.shape, seed=50)
    loss = (found.output * cotangent).sum() + found.keys.square().sum() + found.values.square().sum()
    loss = loss + found.gate_mean
    separate = total / int(real.sum())
    for kept, part in zip(index, parts, strict=True):
        separate = separate + (part.output[0] * cotangent.flatten(0, 1)[kept]).sum()
        separate = separate + part.keys.square().sum() + part.values.square().sum()
    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert gradient.count_nonzero() > 0, name
        assert_close(gradient, torch.autograd.grad(separate, others[name], retain_graph=True)[0])


def test_an_empty_document_keeps_the_memory():
    parameters = make_parameters()
    found = layer(draw(1, 14, D_MODEL), parameters, cu_seqlens=torch.tensor(CUTS), weight_decay=0.1)
    assert torch.equal(found.keys[1], parameters["keys"])
    assert torch.equal(found.values[1], parameters["table.weight"])
    assert not torch.equal(found.values[3], parameters["table.weight"])


def test_batch_masks_pairs_of_two_documents():
    parameters, x = make_parameters(), draw(1, 7, D_MODEL, seed=40)
    options = {"scope": "batch", "lookahead": 2}
    cuts = {"cu_seqlens": torch.tensor([0, 3, 3, 7])}
    mask = torch.tensor([[0.5, 1.0, 0.0, 2.0, 1.0, 0.0, 1.0]], dtype=f64)
    within = torch.tensor([[1, 0, 0, 1, 1, 1, 1]])
    for given, whole in (({}, within), ({"attention_mask": mask}, within * mask)):
        found = layer(x, parameters, **options, **cuts, **given)
        expected = layer(x, parameters, **options, attention_mask=whole)
        for name in ("output", "keys", "values", "slots", "weights"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        assert not torch.equal(found.values, layer(x, parameters, **options, **given).values)
        real = mask > 0 if given else torch.ones(1, 7, dtype=torch.bool)
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * parameters["g_norm.weight"]
        g = torch.sigmoid(h @ parameters["g_proj.weight"].T + parameters["g_proj.bias"])
        assert_close(found.gate_mean, g[real].mean())


def test_the_batch_shares_one_memory():
    """By the memory itself: one call of it for all rows, masked tokens read too."""
    parameters, x = make_parameters(), draw(2, 7, D_MODEL, seed=40)
    mask = REAL.view(2, 7)
    start = (parameters["keys"], parameters["table.weight"])
    options = {"input_norm": False, "value_norm": None, "gate": False, "write_gate": False}
    found = layer(x, parameters, scope="batch", attention_mask=mask, **options)
    q, v = (x @ parameters[f"{name}_proj.weight"].T + parameters[f"{name}_proj.bias"] for name in "qv")
    memory = reference.fast_weight_memory(q.view(2, 7, HEADS, KEY_DIM), v, *start, mask=mask, chunk_size=3, top_k=2)
    assert torch.equal(found.values, memory.values)
    assert torch.equal(found.keys, memory.keys)
    assert torch.equal(found.slots, memory.slots)
    assert found.output.count_nonzero() == found.output.numel()


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_a_call_starts_from_the_memory_it_is_given(scope: str):
    parameters, x = make_parameters(), draw(2, 7, D_MODEL, seed=40)
    leading = () if scope == "batch" else (2,)
    memory = SimpleNamespace(
        hidden_states=None,
        keys=draw(*leading, HEADS, 2, NUM_KEYS, KEY_DIM // 2, seed=60),
        values=draw(*leading, NUM_KEYS**2, VALUE_DIM, seed=61),
    )
    found = layer(x, parameters, scope=scope, memory=memory)
    if scope == "batch":
        expected = [layer(x, parameters | {"keys": memory.keys, "table.weight": memory.values}, scope=scope)]
    else:
        expected = [
            layer(x[b : b + 1], parameters | {"keys": memory.keys[b], "table.weight": memory.values[b]})
            for b in range(2)
        ]
    assert_close(found.output, torch.cat([each.output for each in expected]))
    assert_close(found.values.view(-1, VALUE_DIM), torch.cat([each.values.view(-1, VALUE_DIM) for each in expected]))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_the_convolution_goes_on_from_a_segment(scope: str):
    """With whole chunks and lookahead 0, segments are the sequence cut apart."""
    parameters, x = make_parameters(query_conv=3), draw(2, 9, D_MODEL, seed=40)
    options = {"scope": scope, "query_conv": 3, "lookahead": 0}
    whole = layer(x, parameters, **options)
    first = layer(x[:, :3], parameters, **options)
    second = layer(x[:, 3:], parameters, **options, memory=first)
    assert_close(torch.cat([first.output, second.output], 1), whole.output)
    h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * parameters["q_norm.weight"]
    assert_close(first.hidden_states, h[:, 1:3])
    assert_close(second.hidden_states, h[:, 7:])
    short = layer(x[:, :1], parameters, **options)
    assert_close(short.hidden_states, torch.stack([torch.zeros_like(h[:, 0]), h[:, 0]], 1))
    assert layer(x, make_parameters(), scope=scope).hidden_states is None


def test_gates_apart():
    """Without a write gate, 1 stands in its place; without a gate, the sum is plain; a bias may be missing."""
    parameters, x = make_parameters(bias=False), draw(1, 7, D_MODEL, seed=40)
    found = {(a, b): layer(x, parameters, gate=a, write_gate=b) for a in (True, False) for b in (True, False)}
    for a in (True, False):
        assert torch.equal(found[a, True].values, found[not a, True].values)
        assert torch.equal(found[a, False].values, found[not a, False].values)
    assert not torch.equal(found[True, True].values, found[True, False].values)
    ones = parameters | {"g_proj.bias": torch.full((1,), 40.0, dtype=f64)}  # a gate of 1 but for rounding
    assert_close(layer(x, ones, gate=False).output, found[False, False].output)
    zeros = parameters | {"g_proj.bias": torch.full((1,), -40.0, dtype=f64)}
    assert_close(layer(x, zeros, write_gate=True).values[0], parameters["table.weight"])
    means = {key: result.gate_mean for key, result in found.items()}
    assert means.pop((False, False)) is None
    assert len({float(mean) for mean in means.values()}) == 1


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_nothing_real(scope: str):
    found = layer(draw(2, 4, D_MODEL), make_parameters(), scope=scope, attention_mask=torch.zeros(2, 4))
    assert found.gate_mean == 0
    for size in ((2, 0, D_MODEL), (0, 4, D_MODEL)):
        found = layer(draw(*size), make_parameters(query_conv=3), scope=scope, query_conv=3)
        assert (found.output.shape, found.gate_mean) == (size, 0)


def product_key_parameters() -> dict[str, Tensor]:
    shapes = {"q_proj": (HEADS * KEY_DIM, D_MODEL), "value_proj": (D_MODEL, VALUE_DIM)}
    parameters = {f"{name}.weight": draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    parameters |= {f"{name}.bias": draw(shape[0], seed=10 + i) for i, (name, shape) in enumerate(shapes.items())}
    parameters |= {"query_norm.weight": draw(KEY_DIM, seed=20), "query_norm.bias": draw(KEY_DIM, seed=21)}
    parameters["keys"] = draw(HEADS, 2, NUM_KEYS, KEY_DIM // 2, seed=22)
    parameters["table.weight"] = draw(NUM_KEYS**2, VALUE_DIM, seed=23)
    return parameters


@pytest.mark.parametrize("output", ["swilu", "gated", "linear", "none"])
@pytest.mark.parametrize("query_norm", ["rms", "layer", None])
@pytest.mark.parametrize("score", ["dot", "idw"])
@pytest.mark.parametrize("weighting", ["softmax", "silu", "relu"])
def test_product_key_layer_by_brute_force(output: str, query_norm: str | None, score: str, weighting: str):
    """All n² scores of a token and head, and the best n of them, which with K = n are those of the two-stage rule."""
    parameters, x = product_key_parameters(), draw(2, 3, D_MODEL, seed=40)
    width = VALUE_DIM if output == "swilu" else D_MODEL
    parameters["gate_proj.weight"], parameters["gate_proj.bias"] = draw(width, D_MODEL, seed=41), draw(width, seed=42)
    options = {"num_keys": NUM_KEYS, "heads": HEADS, "top_k": NUM_KEYS, "temperature": 0.7}
    options |= {"query_norm": query_norm, "score": score, "eps": 0.1, "weighting": weighting, "output": output}
    found = reference.product_key_layer(x, parameters, **options)
    for b in range(2):
        for t in range(3):
            q = parameters["q_proj.weight"] @ x[b, t] + parameters["q_proj.bias"]
            read = torch.zeros(VALUE_DIM, dtype=f64)
            for head in range(HEADS):
                query = q[head * KEY_DIM : (head + 1) * KEY_DIM]
                if query_norm == "layer":
                    query = (query - query.mean()) / (query.var(correction=0) + 1e-5).sqrt()
                if query_norm == "rms":
                    query = query / (query.square().mean() + 1e-5).sqrt()
                if query_norm is not None:
                    query = query * parameters["query_norm.weight"]
                if query_norm == "layer":
                    query = query + parameters["query_norm.bias"]
                pairs = torch.zeros(NUM_KEYS, NUM_KEYS, dtype=f64)
                for i in range(NUM_KEYS):
                    for j in range(NUM_KEYS):
                        first, second = parameters["keys"][head, 0, i], parameters["keys"][head, 1, j]
                        if score == "dot":
                            pairs[i, j] = query @ torch.cat([first, second])
                        else:
                            a, b_ = (query[:2] - first).square().sum(), (query[2:] - second).square().sum()
                            pairs[i, j] = -torch.log(a + 0.1) - torch.log(b_ + 0.1)
                best, slot = pairs.flatten().topk(NUM_KEYS)
                w = {"softmax": torch.softmax(best / 0.7, 0), "relu": (best / 0.7).clamp(min=0)}
                w["silu"] = best / 0.7 / (1 + torch.exp(-best / 0.7))
                read = read + w[weighting] @ parameters["table.weight"][slot]
            gate = parameters["gate_proj.weight"] @ x[b, t] + parameters["gate_proj.bias"]
            sigmoid = 1 / (1 + torch.exp(-gate))
            if output == "swilu":
                read = read * gate * sigmoid
            expected = read
            if output != "none":
                expected = parameters["value_proj.weight"] @ read + parameters["value_proj.bias"]
            if output == "gated":
                expected = expected * sigmoid
            assert_close(found[b, t], expected)
