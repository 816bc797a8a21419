"""ProductKeyMemory: its values and gradients against its definition, and the module as PyTorch uses modules."""

import copy
import functools
import io
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import reference
from fwpkm_kernels import testing
from fwpkm_kernels.layers import ProductKeyMemory, ValueTable, memory_stats
from tests.conftest import PLACES, SLOW_IN_INTERPRETER, Place
from tests.helpers.product_key_layer import SMALL, WIDTH, make_layer, make_tokens

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "layer norm": {"query_norm": "layer"},
    "no norm": {"query_norm": None},
    "norm_eps": {"norm_eps": 0.5},
    "idw": {"score": "idw", "eps": 0.1},
    "silu": {"weighting": "silu", "temperature": 0.5},
    "relu": {"weighting": "relu", "temperature": 3.0},
    "temperature": {"temperature": 0.3},
    "gated": {"output": "gated"},
    "linear": {"output": "linear"},
    "none": {"output": "none", "value_dim": WIDTH},
    "no bias": {"bias": False},
    "one head": {"heads": 1},
    "one pick": {"top_k": 1, "weighting": "silu"},  # softmax of one is 1 whatever the keys
    "all sub-keys": {"top_k": 5},
    "one column": {"value_dim": 1, "key_dim": 2},
}


#: With kernels only what changes something for them, where the interpreter runs them.
PLACED = [pytest.param(name, PLACES[0], id=f"{name}-torch") for name in OPTIONS]
for name in OPTIONS:
    marks = [] if name in ("defaults", "idw", "one column") else SLOW_IN_INTERPRETER
    PLACED.append(pytest.param(name, PLACES[1], id=f"{name}-triton", marks=marks))


@pytest.mark.parametrize("name, place", PLACED)
def test_equals_the_definition(name, place):
    """In float64: output, and gradients of the input and of every parameter."""
    options = {**SMALL, **OPTIONS[name]}
    layer = make_layer(**options, backend=place.backend, dtype=torch.float64, device=place.device)
    x = make_tokens(2, 4, dtype=torch.float64, device=place.device).requires_grad_()
    parameters = dict(layer.named_parameters())
    options = {key: value for key, value in options.items() if key not in ("key_dim", "value_dim", "bias")}
    expected = reference.product_key_layer(x, parameters, **options)
    actual = layer(x)
    cotangent = testing.random_cotangent(expected)
    wrt = {"hidden_states": x, **parameters}
    wanted = torch.autograd.grad(expected, [*wrt.values()], cotangent)
    found = torch.autograd.grad(actual, [*wrt.values()], cotangent)
    assert actual.shape == x.shape
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for key, a, b in zip(wrt, found, wanted, strict=True):
        assert b.count_nonzero() > 0 or key == "q_proj.bias", key
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


def test_names_shapes_and_initial_values():
    layer = ProductKeyMemory(16, num_keys=64, heads=2, key_dim=32, value_dim=24, top_k=4)
    shapes = {name: list(x.shape) for name, x in layer.state_dict().items()}
    assert shapes == {
        "keys": [2, 2, 64, 16],
        "q_proj.weight": [64, 16],
        "q_proj.bias": [64],
        "query_norm.weight": [32],
        "table.weight": [4096, 24],
        "gate_proj.weight": [24, 16],
        "gate_proj.bias": [24],
        "value_proj.weight": [16, 24],
        "value_proj.bias": [16],
    }
    assert 0.9 * 32**-0.5 < layer.keys.abs().max() <= 32**-0.5
    assert abs(layer.keys.mean()) < 0.01
    assert layer.table.weight.std().item() == pytest.approx(24**-0.5, rel=0.02)
    assert ProductKeyMemory(16, **SMALL, output="gated").gate_proj.weight.shape == (16, 16)


@pytest.mark.parametrize("output", ["linear", "none"])
def test_what_an_option_leaves_out(output):
    layer = make_layer(output=output, query_norm=None, value_dim=WIDTH)
    expected = {"keys", "table.weight", "q_proj.weight", "q_proj.bias"}
    assert set(layer.state_dict()) == expected | (
        {"value_proj.weight", "value_proj.bias"} if output == "linear" else set()
    )


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 3, 4), (0,), (2, 0)])
def test_any_leading_dimensions(leading):
    layer, x = make_layer(), make_tokens(*leading)
    out = layer(x)
    assert out.shape == x.shape
    testing.assert_bitwise_equal(out.reshape(-1, WIDTH), layer(x.reshape(-1, WIDTH)))


def test_a_mask_and_what_models_pass_change_nothing():
    layer, x = make_layer(), make_tokens(2, 3)
    out = layer(x, torch.zeros(2, 3), position_ids=torch.arange(3), past_key_values=None, use_cache=True)
    testing.assert_bitwise_equal(out, layer(x))


def test_dropout_is_of_the_read():
    """Zeroed whole, only the projection's bias is left; in evaluation nothing is."""
    layer, x = make_layer(dropout=1.0, output="linear"), make_tokens(3)
    testing.assert_bitwise_equal(layer(x), layer.value_proj.bias.expand(3, -1))
    testing.assert_bitwise_equal(layer.eval()(x), make_layer(output="linear")(x))
    half = make_layer(dropout=0.5, output="none", value_dim=WIDTH)
    out, read = half(x), half.eval()(x)
    kept = out != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(out, torch.where(kept, 2 * read, 0))


def test_a_sparse_gradient_equals_the_dense_one(place: Place):
    layers = [
        make_layer(sparse_grad=flag, backend=place.backend, dtype=torch.float64, device=place.device)
        for flag in (False, True)
    ]
    for layer in layers:
        layer(make_tokens(2, 4, dtype=torch.float64, device=place.device)).square().sum().backward()
    dense, sparse = (layer.table.weight.grad for layer in layers)
    assert sparse.layout == torch.sparse_coo
    torch.testing.assert_close(sparse.to_dense(), dense)
    torch.testing.assert_close(layers[1].keys.grad, layers[0].keys.grad)


def test_a_table_shared_by_layers():
    """It is saved under both names, keeps its rows when a layer takes it, and gets the gradients of both."""
    table = ValueTable(25, 7)
    before = table.weight.detach().clone()
    first, second = make_layer(0, table=table), make_layer(1, table=table)
    testing.assert_bitwise_equal(table.weight, before)
    model = nn.Sequential(first, second)
    assert len([x for x in model.parameters() if x is table.weight]) == 1
    assert {"0.table.weight", "1.table.weight"} <= set(model.state_dict())
    x = make_tokens(4)
    grads = [torch.autograd.grad(layer(x).sum(), table.weight)[0] for layer in (first, second)]
    (first(x).sum() + second(x).sum()).backward()
    torch.testing.assert_close(table.weight.grad, grads[0] + grads[1])
    second.reset_parameters()
    assert (table.weight != before).all()


def test_a_frozen_table_is_read():
    layer = make_layer(table=ValueTable(25, 7, trainable=False))
    assert "table.weight" not in dict(layer.named_parameters())
    layer(make_tokens(4)).sum().backward()
    assert all(x.grad is not None for x in layer.parameters())


def test_half_precision_leaves_memory_in_float32():
    layer = make_layer(dtype=torch.bfloat16)
    assert layer.keys.dtype == layer.table.weight.dtype == torch.float32
    others = {x.dtype for name, x in layer.named_parameters() if name not in ("keys", "table.weight")}
    assert others == {torch.bfloat16}
    x = make_tokens(2, 3, dtype=torch.bfloat16)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad.dtype == p.dtype for p in layer.parameters())
    exact = copy.deepcopy(layer).double()
    testing.assert_bitwise_equal(exact.address(x.double())[0], layer.address(x)[0])  # no pick is near to a tie here
    torch.testing.assert_close(out.double(), exact(x.double()), rtol=0.03, atol=0.03)
    layer.to(torch.bfloat16)
    assert layer.keys.dtype == layer.table.weight.dtype == torch.bfloat16
    assert layer(x).dtype == torch.bfloat16


def test_parameters_follow_the_default_dtype():
    before = torch.get_default_dtype()
    for default, memory in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        torch.set_default_dtype(default)
        try:
            layer = make_layer()
        finally:
            torch.set_default_dtype(before)
        assert (layer.q_proj.weight.dtype, layer.keys.dtype, layer.table.weight.dtype) == (default, memory, memory)
        assert layer(make_tokens(3, dtype=default)).dtype == default


@pytest.mark.parametrize("output", ["swilu", "gated", "linear", "none"])
@pytest.mark.parametrize("query_norm", ["rms", "layer"])
def test_autocast(output, query_norm):
    """The projections run in bfloat16, and nothing warns; the output has the input's dtype."""
    layer, x = make_layer(output=output, query_norm=query_norm, value_dim=WIDTH), make_tokens(9)
    exact, slots = layer(x), layer.address(x)[0]
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("error")
            out = layer(x.to(dtype))
            out.float().sum().backward()
            alike = (layer.address(x.to(dtype))[0] == slots).all(-1)  # rounded queries may pick others
        assert out.dtype == dtype
        assert (out.float() != exact).any()
        assert alike.sum() >= 6
        torch.testing.assert_close(out.float()[alike], exact[alike], rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("query_norm, function", [("rms", F.rms_norm), ("layer", F.layer_norm)])
def test_a_norm_rounds_once(query_norm, function):
    norm = make_layer(query_norm=query_norm, dtype=torch.bfloat16).query_norm
    x = make_tokens(50)[:, :6].to(torch.bfloat16)
    parameters = [p.float() for p in norm.parameters()]
    testing.assert_bitwise_equal(norm(x), function(x.float(), (6,), *parameters, eps=1e-5).to(torch.bfloat16))


def test_what_the_meta_device_and_to_empty_leave_is_drawn():
    with torch.device("meta"):
        layer = ProductKeyMemory(WIDTH, **SMALL, query_norm="layer")
    assert all(x.is_meta for x in layer.parameters())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for x in layer.parameters():
            x.fill_(float("nan"))
    torch.manual_seed(3)
    layer.reset_parameters()
    assert all(x.isfinite().all() for x in layer.parameters())
    assert (layer.query_norm.weight == 1).all()
    assert (layer.query_norm.bias == 0).all()
    assert 0.9 * 6**-0.5 < layer.keys.abs().max() <= 6**-0.5
    assert layer(make_tokens(3)).isfinite().all()


@pytest.mark.parametrize("output", ["swilu", "gated"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_compiled_training_equals_eager(output, autocast):
    torch._dynamo.reset()
    layer, x = make_layer(output=output), make_tokens(2, 4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for function in (layer, compiled):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = function(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in layer.parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    layer, x = make_layer(dropout=0.5), make_tokens(2, 4).requires_grad_()
    results = []
    for function in (layer, functools.partial(checkpoint, layer, use_reentrant=use_reentrant)):
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(5)
        function(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.parameters())])
    for actual, expected in zip(*results, strict=True):
        testing.assert_bitwise_equal(actual, expected)


def saved_and_loaded(layer: ProductKeyMemory) -> ProductKeyMemory:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_safetensors(layer: ProductKeyMemory) -> ProductKeyMemory:
    safetensors = pytest.importorskip("safetensors.torch")

    other = make_layer(seed=7)
    other.load_state_dict(safetensors.load(safetensors.save(layer.state_dict())))
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded, through_safetensors])
def test_copies(copied):
    layer, x = make_layer(), make_tokens(3)
    other = copied(layer)
    testing.assert_bitwise_equal(other(x), layer(x))
    with torch.no_grad():
        other.table.weight.zero_()
    assert (other(x) != layer(x)).any()


def test_functional_call():
    layer, x = make_layer(), make_tokens(3)
    zeros = {"table.weight": torch.zeros_like(layer.table.weight)}
    testing.assert_bitwise_equal(torch.func.functional_call(layer, zeros, (x,)), layer.value_proj.bias.expand(3, -1))


def test_address_gives_what_statistics_take():
    layer, x = make_layer(weighting="relu"), make_tokens(2, 4)
    slots, weights = layer.address(x)
    assert slots.shape == weights.shape == (2, 4, 6)
    read = reference.sparse_value_gather(layer.table.weight, slots, weights)
    expected = layer.value_proj(read * F.silu(layer.gate_proj(x)))
    torch.testing.assert_close(layer(x), expected)
    assert memory_stats(slots, weights, 25).coverage == slots.unique().numel() / 25


BAD: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "hidden_size": (ValueError, {"hidden_size": 0}, "at least 1.* got 0"),
    "num_keys": (TypeError, {"num_keys": 2.0}, "int, got float"),
    "heads": (ValueError, {"heads": 0}, "at least 1.* got 0"),
    "key_dim odd": (ValueError, {"key_dim": 7}, "even.* got 7"),
    "key_dim none": (ValueError, {"key_dim": 0}, "at least 2.* got 0"),
    "value_dim": (ValueError, {"value_dim": -1}, "at least 1.* got -1"),
    "value_dim of the read": (ValueError, {"output": "none"}, "`hidden_size`.* got 7 against 8"),
    "top_k": (ValueError, {"top_k": 6}, "from 1 to the 5 .* got 6"),
    "query_norm": (ValueError, {"query_norm": "batch"}, "'rms', 'layer'; got 'batch'"),
    "score": (ValueError, {"score": "cosine"}, "got 'cosine'"),
    "eps": (ValueError, {"eps": 0.0}, "at least .* got 0.0"),
    "weighting": (ValueError, {"weighting": "tanh"}, "got 'tanh'"),
    "temperature": (ValueError, {"temperature": 0.0}, "at least .* got 0.0"),
    "output": (ValueError, {"output": "glu"}, "got 'glu'"),
    "dropout": (ValueError, {"dropout": 1.5}, "at most 1, got 1.5"),
    "sparse_grad": (TypeError, {"sparse_grad": 1}, "bool, got int"),
    "bias": (TypeError, {"bias": None}, "bool, got NoneType"),
    "norm_eps": (ValueError, {"norm_eps": -1.0}, "at least 0.0, got -1.0"),
    "precision": (ValueError, {"precision": "fp8"}, "got 'fp8'"),
    "backend": (ValueError, {"backend": "cuda"}, "got 'cuda'"),
    "table of another size": (ValueError, {"table": ValueTable(24, 7)}, r"value_dim = 7, got \[24, 7\]"),
    "table of another width": (ValueError, {"table": ValueTable(25, 8)}, r"value_dim = 7, got \[25, 8\]"),
    "table of another kind": (TypeError, {"table": torch.zeros(25, 7)}, "ValueTable, got Tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_is_named(case):
    error, options, says = BAD[case]
    with pytest.raises(error, match=f"(?s)`{case.split()[0]}` .*{says}"):
        ProductKeyMemory(**{"hidden_size": WIDTH, **SMALL, **options})


@pytest.mark.parametrize(
    "hidden_states, error, says",
    [
        (torch.zeros(3, 9), ValueError, r"shape \[..., 8\], got \[3, 9\]"),
        (torch.zeros(()), ValueError, r"shape \[..., 8\], got \[\]"),
        (torch.zeros(3, 8, dtype=torch.int64), TypeError, "got torch.int64"),
        ([[0.0] * 8], TypeError, "got list"),
    ],
    ids=["width", "rank", "dtype", "kind"],
)
def test_bad_hidden_states_are_named(hidden_states, error, says):
    with pytest.raises(error, match=f"`hidden_states` .*{says}"):
        make_layer()(hidden_states)
