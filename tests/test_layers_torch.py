"""The fast-weight layer inside PyTorch: compiled, autocast, cast, on meta, functional, copied, saved; bad input."""

import copy
import io
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fwpkm_kernels import testing
from fwpkm_kernels.layers import FastWeightProductKeyMemory, LayerMemory, ValueTable

WIDTH = 8
SIZES = {"num_keys": 6, "heads": 2, "top_k": 3, "key_dim": 6, "value_dim": 5, "chunk_size": 4}


def make_layer(**options) -> FastWeightProductKeyMemory:
    torch.manual_seed(0)
    return FastWeightProductKeyMemory(WIDTH, **(SIZES | options))


def make_input(batch: int = 2, length: int = 10, dtype=torch.float32):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(layer, call, x):
    """Output and gradients of the input and all parameters."""
    x = x.clone().requires_grad_()
    output = call(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("kind", ["sequence", "batch", "persistent", "masked", "packed"])
def test_compiled_training(kind):
    """fullgraph, with the numbers of eager code; other borders of documents compile nothing anew."""
    scope = "batch" if kind in ("batch", "persistent") else "sequence"
    layer = make_layer(query_conv=3, scope=scope, initial_memory="persistent" if kind == "persistent" else "learned")
    x, inputs = make_input(), [{}]
    if kind == "masked":
        inputs = [{"attention_mask": torch.ones(2, 10).tril(d)} for d in (6, 3)]
    if kind == "packed":
        x = make_input(1, 20)
        inputs = [{"cu_seqlens_cpu": torch.tensor(bounds)} for bounds in ([0, 7, 7, 20], [0, 1, 12, 20])]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for given in inputs:
        expected = run(layer, lambda x, given=given: layer(x, **given), x)
        pending, layer._pending = layer._pending, None
        for ours, theirs in zip(run(layer, lambda x, given=given: compiled(x, **given), x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        if kind == "persistent":
            for ours, theirs in zip(layer._pending[1][:3], pending[1][:3], strict=True):  # decay is None
                testing.assert_bitwise_equal(ours, theirs)
    assert counter.frame_count == 1


def test_compiled_for_any_batch():
    """The batch is a size like any other: not compiled anew for each, as a loop would be."""
    layer = make_layer(query_conv=3)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for batch in (2, 3, 5, 4):
        x = make_input(batch, 6)
        expected = run(layer, layer, x)
        for ours, theirs in zip(run(layer, compiled, x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2  # one of them where PyTorch first takes a size for a constant


def test_compiled_segments_of_documents():
    """Final memories of packed documents are results of a compiled call too, with gradients."""
    layer, x = make_layer(), make_input(1, 20)

    def call(x, cu_seqlens):
        first, memory = layer(x, cu_seqlens_cpu=cu_seqlens, return_memory=True)
        return first + layer(x, cu_seqlens_cpu=cu_seqlens, memory=memory)

    cu_seqlens = torch.tensor([0, 7, 7, 20])
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = run(layer, lambda x: call(x, cu_seqlens), x)
    for ours, theirs in zip(run(layer, lambda x: compiled(x, cu_seqlens), x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_half_precision(scope):
    """Autocast, a bfloat16 module, and one cast to it: the memory runs in float32, the output has the input's dtype."""
    layer, x = make_layer(scope=scope, query_conv=3), make_input()
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, memory = layer(x, return_memory=True)
        output.sum().backward()
    assert output.dtype == torch.float32
    values = memory.values.value if scope == "sequence" else memory.values
    assert values.dtype == memory.keys.dtype == torch.float32
    assert memory.gate_mean.dtype == torch.float32
    assert (output - exact).abs().max() < 0.1 * exact.abs().max()

    born = make_layer(scope=scope, query_conv=3, dtype=torch.bfloat16)
    assert born.q_proj.weight.dtype == born.o_norm.weight.dtype == torch.bfloat16
    assert born.keys.dtype == born.table.weight.dtype == torch.float32
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert cast.keys.dtype == torch.bfloat16
    for half in (born, cast):
        output, memory = half(x.bfloat16(), return_memory=True)
        assert output.dtype == torch.bfloat16
        assert (memory.values.value if scope == "sequence" else memory.values).dtype == torch.float32
        output.float().square().sum().backward()
        for name, p in half.named_parameters():
            assert p.grad.dtype == p.dtype, name
            assert p.grad.abs().max() > 0, name
        with torch.no_grad():
            streamed = half(x.bfloat16(), memory=half.new_memory(2))
        torch.testing.assert_close(streamed, output, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("initial_memory", ["frozen", "persistent"])
def test_casts_do_not_round_a_memory_of_buffers(initial_memory):
    layer = make_layer(initial_memory=initial_memory, scope="batch")
    before = layer.table.weight.clone()
    layer(make_input())
    layer.to(torch.bfloat16)
    assert layer.q_proj.weight.dtype == torch.bfloat16
    assert torch.equal(layer.table.weight, before)
    assert layer.keys.dtype == torch.float32
    assert layer(make_input(dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.double()
    assert layer.table.weight.dtype == layer.keys.dtype == torch.float64
    layer(make_input(dtype=torch.float64))
    layer.float()
    assert torch.equal(layer.table.weight, before)
    layer(make_input())


@pytest.mark.parametrize("initial_memory", ["learned", "frozen", "persistent"])
def test_from_meta(initial_memory):
    """to_empty leaves memory as it comes, and reset_parameters gives all of it a value."""
    options = {"initial_memory": initial_memory, "scope": "batch", "query_conv": 3, "output_init": "zeros"}
    layer = make_layer(device="meta", **options)
    assert all(x.is_meta for x in layer.state_dict().values())
    assert layer(make_input().to("meta")).shape == (2, 10, WIDTH)
    layer.to_empty(device="cpu")
    for x in layer.state_dict().values():
        x.fill_(torch.nan)
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    other = make_layer(**options)
    torch.manual_seed(3)
    other.reset_parameters()
    for name, x in layer.state_dict().items():
        testing.assert_bitwise_equal(x, other.state_dict()[name], name)
    assert (layer(make_input()) == 0).all()  # output_init="zeros"
    assert layer.keys.abs().max() <= 6**-0.5
    assert 0.5 * 5**-0.5 < layer.table.weight.std() < 2 * 5**-0.5
    assert 0.5 * 3**-0.5 < layer.q_conv.weight.std() < 2 * 3**-0.5
    assert (layer.g_proj.bias == 0).all()


@pytest.mark.parametrize("initial_memory", ["learned", "persistent"])
def test_functional_call(initial_memory):
    layer, x = make_layer(initial_memory=initial_memory, scope="batch"), make_input()
    other = {name: torch.randn_like(p).requires_grad_() for name, p in layer.state_dict().items()}
    output = torch.func.functional_call(layer, other, (x,))
    output.square().sum().backward()
    assert all(p.grad is not None for p in other.values())
    assert all(p.grad is None for p in layer.parameters())
    layer.load_state_dict(other)
    assert torch.equal(layer(x), output)


@pytest.mark.parametrize("initial_memory", ["learned", "frozen", "persistent"])
def test_copies_and_files(initial_memory, tmp_path):
    layer, x = make_layer(initial_memory=initial_memory, scope="batch", query_conv=3), make_input()
    layer(x)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert torch.equal(other(x), expected)
        assert not set(map(id, other.state_dict(keep_vars=True).values())) & set(map(id, layer.parameters()))
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "layer.safetensors"
    safetensors.save_model(layer, str(path))
    fresh = make_layer(initial_memory=initial_memory, scope="batch", query_conv=3)
    fresh.reset_parameters()
    assert not torch.equal(fresh(x), expected)
    safetensors.load_model(fresh, str(path))
    assert torch.equal(fresh(x), expected)
    assert set(layer.state_dict()) == {
        *(f"{name}.weight" for name in ("q_norm", "v_norm", "g_norm", "o_norm", "q_conv")),
        *(f"{name}.{kind}" for name in ("q_proj", "v_proj", "g_proj", "o_proj") for kind in ("weight", "bias")),
        "keys",
        "table.weight",
    }


def test_checkpoint_of_another_configuration():
    """PyTorch's own error names what does not fit."""
    with pytest.raises(RuntimeError, match=r"size mismatch for keys.*[\s\S]*table.weight"):
        make_layer().load_state_dict(make_layer(num_keys=8).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*q_conv.weight"):
        make_layer(query_conv=3).load_state_dict(make_layer().state_dict())


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"hidden_size": 0}, ValueError, "`hidden_size` must be at least 1, got 0|`hidden_size`"),
        ({"num_keys": 2.0}, TypeError, "`num_keys` must be an int, got float"),
        ({"key_dim": 7}, ValueError, "`key_dim` must be even.* got 7"),
        ({"top_k": 9}, ValueError, "`top_k`.*9"),
        ({"chunk_size": 0}, ValueError, "`chunk_size`"),
        ({"lookahead": 5}, ValueError, "`lookahead` must be from 0 to `chunk_size`, got 5 against 4"),
        ({"score": "cosine"}, ValueError, "`score`.*'cosine'"),
        ({"step": "large"}, ValueError, "`step`.*'large'"),
        ({"lr": float("nan")}, ValueError, "`lr` must be finite"),
        ({"backend": "cuda"}, ValueError, "`backend`"),
        ({"scope": "token"}, ValueError, "`scope` must be one of 'sequence', 'batch'; got 'token'"),
        ({"initial_memory": "persistent"}, ValueError, '`initial_memory`="persistent" needs `scope`="batch"'),
        ({"initial_memory": "random"}, ValueError, "`initial_memory` must be one of"),
        ({"query_norm": "rms"}, ValueError, "`query_norm` must be one of 'l2', 'zscore'; got 'rms'"),
        (
            {"value_norm": "zscore", "value_dim": 1},
            ValueError,
            '`value_norm`="zscore" needs a `value_dim` of at least 2',
        ),
        ({"query_conv": 0}, ValueError, "`query_conv` must be at least 1"),
        ({"gate": 1}, TypeError, "`gate` must be a bool, got int"),
        ({"output_init": "ones"}, ValueError, "`output_init` must be one of"),
        ({"memory_dtype": torch.int64}, TypeError, "`memory_dtype` must be torch.float32, .* got torch.int64"),
        ({"memory_dtype": torch.float64}, ValueError, "`memory_dtype` can be torch.float64 only where `dtype` is"),
        ({"norm_eps": 0.0}, ValueError, "`norm_eps` must be at least"),
        ({"table": ValueTable(36, 5, dtype=torch.float64)}, ValueError, "`table` and the layer must both be float64"),
        ({"table": torch.zeros(36, 5)}, TypeError, "`table` must be a ValueTable, got Tensor"),
        (
            {"table": ValueTable(36, 4)},
            ValueError,
            r"`table` must have .* 36 slots of width value_dim = 5, got \[36, 4\]",
        ),
        ({"table": ValueTable(36, 5, trainable=False)}, ValueError, "`table` must be trainable"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_options(options, error, match):
    hidden_size = {"hidden_size": WIDTH} | options
    with pytest.raises(error, match=match):
        FastWeightProductKeyMemory(**(SIZES | hidden_size))


X = make_input()
BOUNDS = torch.tensor([0, 4, 10])


@pytest.mark.parametrize(
    "given, error, match",
    [
        ({"hidden_states": X[0]}, ValueError, r"`hidden_states` must have 3 dimensions \[B, T, d\]"),
        ({"hidden_states": X[..., :5]}, ValueError, "`hidden_states` must have width d = 8"),
        ({"hidden_states": [1]}, TypeError, "`hidden_states`"),
        ({"attention_mask": torch.ones(2, 9)}, ValueError, r"`attention_mask` must be \[B, T\] like"),
        ({"attention_mask": torch.ones(2, 1, 10, 10)}, ValueError, "`attention_mask` must have 2 dimensions"),
        ({"attention_mask": torch.ones(2, 10).cfloat()}, TypeError, "`attention_mask`"),
        ({"attention_mask": torch.ones(2, 10, device="meta")}, ValueError, "`attention_mask` must be on the device of"),
        ({"cu_seqlens": BOUNDS}, ValueError, "`cu_seqlens` packs documents into one row, B = 1, got B = 2"),
        ({"cu_seqlens": torch.tensor([1, 10])}, ValueError, "`cu_seqlens` must go from 0 to T = 10, got 1 to 10"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "`cu_seqlens` must go from 0 to T = 10, got 0 to 9"),
        ({"cu_seqlens": torch.tensor([0, 6, 5, 10])}, ValueError, "`cu_seqlens` must not decrease, got 6, 5 at 1, 2"),
        ({"cu_seqlens": BOUNDS.float()}, TypeError, "`cu_seqlens` must be int64 or int32, got torch.float32"),
        ({"cu_seqlens": BOUNDS[None]}, ValueError, r"`cu_seqlens` must have 1 dimensions \[S \+ 1\]"),
        ({"cu_seqlens": BOUNDS[:1]}, ValueError, "`cu_seqlens`.* at least one document"),
        ({"cu_seqlens": BOUNDS, "cu_seqlens_cpu": BOUNDS[:2]}, ValueError, "`cu_seqlens_cpu` must be `cu_seqlens`"),
        ({"cu_seqlens_cpu": BOUNDS.to("meta")}, ValueError, "`cu_seqlens_cpu` must be on the CPU, got meta"),
        ({"hidden_states": X[:1], "cu_seqlens": BOUNDS.to("meta")}, ValueError, "`cu_seqlens` must have data"),
        (
            {"hidden_states": X.to("meta"), "attention_mask": torch.ones(2, 10, device="meta")},
            ValueError,
            "`attention_mask` must have data",
        ),
        (
            {"cu_seqlens": BOUNDS, "cu_seqlens_cpu": torch.tensor([0, 5, 10])},
            ValueError,
            r"`cu_seqlens_cpu` must be `cu_seqlens` on the CPU, got \[0, 5, 10\], \[0, 4, 10\]",
        ),
        ({"cu_seqlens": BOUNDS, "cu_seq_lens_q": BOUNDS + 0}, ValueError, "`cu_seq_lens_q` is another name of"),
        ({"cache": object()}, TypeError, "`cache` must be a Cache of transformers or fla, got object"),
        ({"cache": object(), "past_key_values": object()}, ValueError, "`past_key_values` is another name of `cache`"),
        ({"cache": object(), "memory": object()}, ValueError, "`memory` and `cache` must not be given together"),
        ({"hidden_states": X.long()}, TypeError, "`hidden_states` must be float32"),
        ({"memory": LayerMemory(None, None)}, TypeError, "`memory.keys` must be a"),
        ({"cu_seq_lens_q": torch.tensor([0, 9])}, ValueError, "`cu_seqlens` must go from 0 to T = 10"),
        ({"memory": object()}, TypeError, "`memory` must be a LayerMemory"),
        (
            {"memory": LayerMemory(torch.zeros(1), torch.zeros(36, 5))},
            ValueError,
            r"`memory.keys` must be \[2, 2, 2, 6, 3\]",
        ),
        ({"return_memory": True, "return_gate_mean": True}, ValueError, "`return_gate_mean` must be False"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_calls(given, error, match):
    layer = make_layer()
    packs = any(name.startswith("cu_") for name in given) and "B = 1" not in match
    inputs = {"hidden_states": X[:1] if packs else X} | given
    with pytest.raises(error, match=match):
        layer(**inputs)


def test_a_segment_of_a_layer_with_another_convolution():
    _, memory = make_layer(query_conv=3)(X, return_memory=True)
    with pytest.raises(ValueError, match=r"`memory.hidden_states` must be \[2, 3, 8\] for .*, got \[2, 2, 8\]"):
        make_layer(query_conv=4)(X, memory=memory)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_float64_layer_has_a_float64_memory(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        layer = FastWeightProductKeyMemory(WIDTH, dtype=dtype, **SIZES)
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    layer(X.double())


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_the_default_device_is_nobodys(scope):
    """What a process has set changes no result: here a device on which nothing could be computed."""
    layer = make_layer(scope=scope, query_conv=3)
    mask = torch.ones(2, 10)
    mask[0, [1, 4, 5]] = 0
    packed, bounds = X.view(1, 20, WIDTH), torch.tensor([0, 3, 20])
    expected = [layer(X, attention_mask=mask), layer(packed, cu_seqlens=bounds)]
    torch.set_default_device("meta")
    try:
        found = [layer(X, attention_mask=mask), layer(packed, cu_seqlens=bounds)]
        with torch.no_grad():
            found.append(layer(X, attention_mask=mask, memory=layer.new_memory(2)))
    finally:
        torch.set_default_device(None)
    for ours, theirs in zip(found, [*expected, expected[0]], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_masks_of_other_numbers():
    """What is not above 0 is padding, NaN too."""
    layer = make_layer(query_conv=3)
    mask = torch.tensor([[1.0, -2.0, 0.5, torch.nan, 1.0] * 2] * 2)
    expected = layer(X, attention_mask=(mask > 0))
    assert torch.equal(layer(X, attention_mask=mask), expected)


def test_casts_keep_what_memory_dtype_can_hold():
    """float16 has as many bits as bfloat16, and a smaller range."""
    layer = make_layer(initial_memory="frozen", memory_dtype=torch.bfloat16)
    assert layer.half().table.weight.dtype == torch.bfloat16


def test_sub_keys_and_tables_say_that_they_do_not_decay():
    layer = make_layer(device="meta").to_empty(device="cpu")
    assert layer.keys._no_weight_decay
    assert layer.table.weight._no_weight_decay


def test_a_copy_of_a_stream_of_a_cast_module():
    layer = make_layer().to(torch.bfloat16)
    memory = copy.deepcopy(layer.new_memory(2))
    with torch.no_grad():
        layer(make_input(dtype=torch.bfloat16), memory=memory)


def test_printed_as_what_it_is():
    text = repr(make_layer(step="normalized", scope="batch"))
    assert "num_keys=6" in text
    assert "step='normalized'" in text
    assert "ValueTable" in text
