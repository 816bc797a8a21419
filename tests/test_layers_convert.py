"""Published checkpoints to the layer's state_dict and back."""

import pytest
import torch
from torch import Tensor

from fwpkm_kernels.layers.convert import NAMES, from_published, to_published
from fwpkm_kernels.testing import assert_bitwise_equal

HIDDEN, HEADS, NUM_KEYS, KEY_DIM, VALUE_DIM = 6, 3, 4, 10, 5
SHAPES = {
    "fw_q_norm.weight": (HIDDEN,),
    "fw_q_proj.weight": (HEADS * KEY_DIM, HIDDEN),
    "fw_q_proj.bias": (HEADS * KEY_DIM,),
    "fw_v_norm.weight": (HIDDEN,),
    "fw_v_proj.weight": (VALUE_DIM, HIDDEN),
    "fw_v_proj.bias": (VALUE_DIM,),
    "fw_out_gate_norm.weight": (HIDDEN,),
    "fw_out_gate.weight": (8, HIDDEN),
    "fw_out_gate.bias": (8,),
    "fw_out_norm.weight": (VALUE_DIM,),
    "fw_out_proj.weight": (HIDDEN, VALUE_DIM),
    "fw_out_proj.bias": (HIDDEN,),
    "fwpkm.keys": (2 * HEADS * NUM_KEYS, KEY_DIM // 2),
    "fwpkm.values": (NUM_KEYS**2, VALUE_DIM),
}
GATE = ("fw_out_gate_norm.weight", "fw_out_gate.weight", "fw_out_gate.bias")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def published(
    dtype: torch.dtype = torch.float32, prefix: str = "", leave_out: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {prefix + name: x.to(dtype) for name, x in drawn.items() if name not in leave_out}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_tensor_from_published(dtype: torch.dtype):
    given = published(dtype)
    ours = from_published(given)
    assert {name: tuple(x.shape) for name, x in ours.items()} == {
        "q_norm.weight": (HIDDEN,),
        "q_proj.weight": (HEADS * KEY_DIM, HIDDEN),
        "q_proj.bias": (HEADS * KEY_DIM,),
        "v_norm.weight": (HIDDEN,),
        "v_proj.weight": (VALUE_DIM, HIDDEN),
        "v_proj.bias": (VALUE_DIM,),
        "g_norm.weight": (HIDDEN,),
        "g_proj.weight": (1, HIDDEN),
        "g_proj.bias": (1,),
        "o_norm.weight": (VALUE_DIM,),
        "o_proj.weight": (HIDDEN, VALUE_DIM),
        "o_proj.bias": (HIDDEN,),
        "keys": (HEADS, 2, NUM_KEYS, KEY_DIM // 2),
        "table.weight": (NUM_KEYS**2, VALUE_DIM),
    }
    for name, x in ours.items():
        assert x.dtype == (wide(dtype) if name.endswith("_norm.weight") else dtype), name
    for name in ("q_norm", "v_norm", "o_norm"):
        assert_bitwise_equal(
            ours[f"{name}.weight"], given[f"fw_{name.replace('o_', 'out_')}.weight"].to(wide(dtype)) + 1
        )
    assert_bitwise_equal(ours["g_norm.weight"], given["fw_out_gate_norm.weight"].to(wide(dtype)) + 1)
    for kind in ("weight", "bias"):
        mean = given[f"fw_out_gate.{kind}"].double().mean(0)
        torch.testing.assert_close(ours[f"g_proj.{kind}"][0].double(), mean, rtol=0, atol=float(torch.finfo(dtype).eps))
        for name in ("q_proj", "v_proj"):
            assert_bitwise_equal(ours[f"{name}.{kind}"], given[f"fw_{name}.{kind}"])
        assert_bitwise_equal(ours[f"o_proj.{kind}"], given[f"fw_out_proj.{kind}"])
    for head in range(HEADS):
        for half in range(2):
            for j in range(NUM_KEYS):
                row = (head * 2 + half) * NUM_KEYS + j
                assert_bitwise_equal(ours["keys"][head, half, j], given["fwpkm.keys"][row])
    assert_bitwise_equal(ours["table.weight"], given["fwpkm.values"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_back_to_published(dtype: torch.dtype):
    """What is published comes back, but that the gate's rows are equal, and norms are rounded once as 1 + weight."""
    given = published(dtype)
    back = to_published(from_published(given))
    assert back.keys() == given.keys()
    for name, x in back.items():
        expected = given[name]
        assert x.shape == expected.shape, name
        if name.startswith("fw_out_gate."):
            expected = expected.double().mean(0).expand_as(x)
            assert (x == x[0]).all()
        elif "norm" not in name:
            assert_bitwise_equal(x, expected, name)
        eps = torch.finfo(wide(dtype) if "norm" in name else dtype).eps
        torch.testing.assert_close(x.double(), expected.double(), rtol=0, atol=float(eps))


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(dtype: torch.dtype):
    """Exactly, the gate's row among it, which in eighths of a sum would be rounded."""
    ours = {name: x.to(dtype) for name, x in from_published(published()).items()}
    again = from_published(to_published(ours))
    assert list(again) == list(ours)
    for name, x in again.items():
        norm = name.endswith("_norm.weight")
        assert_bitwise_equal(x, ours[name].to(wide(dtype)) if norm else ours[name], name)


def test_a_prefix():
    prefix = "model.layers.2."
    given = published(prefix=prefix) | {"model.layers.20.fwpkm.keys": torch.ones(3), "lm_head.weight": torch.ones(2)}
    ours = from_published(given, prefix)
    for name, x in from_published(published()).items():
        assert_bitwise_equal(ours.pop(name), x, name)
    assert not ours
    assert to_published(from_published(published()), prefix).keys() == published(prefix=prefix).keys()


@pytest.mark.parametrize(
    "leave_out", [GATE, GATE[2:], ("fw_q_proj.bias",), (*GATE, "fw_v_proj.bias", "fw_out_proj.bias")]
)
def test_without_a_gate_or_a_bias(leave_out: tuple[str, ...]):
    given = published(leave_out=leave_out)
    ours = from_published(given)
    assert {NAMES[name] for name in ours} == given.keys()
    assert to_published(ours).keys() == given.keys()


def test_gradients_reach_what_is_published():
    given = {name: x.double().requires_grad_() for name, x in published().items()}
    ours = from_published(given)
    generator = torch.Generator().manual_seed(1)
    cotangents = {name: torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in ours.items()}
    torch.autograd.backward(list(ours.values()), [cotangents[name] for name in ours])
    for name, x in cotangents.items():
        expected = x.expand(8, *x.shape[1:]) / 8 if name.startswith("g_proj") else x
        found = given[NAMES[name]].grad
        torch.testing.assert_close(found, expected.reshape(found.shape))


@pytest.mark.parametrize("missing", [name for name in SHAPES if not name.endswith(".bias")])
def test_a_missing_name(missing: str):
    with pytest.raises(ValueError, match=f"`state_dict` .*'a.'.* lacks {missing}$"):
        from_published(published(prefix="a.", leave_out=(missing,)), "a.")
    ours = from_published(published())
    (name,) = (name for name, other in NAMES.items() if other == missing)
    del ours[name]
    with pytest.raises(ValueError, match=f"`state_dict` .* lacks {name}$"):
        to_published(ours)


def test_a_gate_must_be_whole():
    with pytest.raises(ValueError, match=r"`state_dict` .* lacks fw_out_gate.weight, fw_out_gate_norm.weight$"):
        from_published(published(leave_out=GATE[:2]))


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"`state_dict` .* also has fw_x, fw_y$"):
        from_published(published() | {"fw_y": torch.ones(1), "fw_x": torch.ones(1)})
    with pytest.raises(ValueError, match=r"`state_dict` .* also has q_conv.weight$"):
        to_published(from_published(published()) | {"q_conv.weight": torch.ones(HIDDEN, 1, 2)})
    with pytest.raises(ValueError, match="`state_dict` .* lacks"):
        from_published({})
    with pytest.raises(TypeError, match="`state_dict` must be a mapping .*, got list"):
        from_published([])


def test_a_layer_among_the_others_of_its_block():
    block = {"a.self_attn.q_proj.weight": torch.ones(1), "a.mlp.weight": torch.ones(1), "fw_x": torch.ones(1)}
    alone = from_published(published(prefix="a."), "a.")
    for name, x in from_published(published(prefix="a.") | block, "a.").items():
        torch.testing.assert_close(x, alone[name])


@pytest.mark.parametrize(
    "changed",
    [
        {"fw_q_proj.weight": (HEADS * KEY_DIM + 1, HIDDEN)},
        {"fw_q_proj.weight": (2 * KEY_DIM, HIDDEN)},
        {"fwpkm.keys": (2 * HEADS * NUM_KEYS + 1, KEY_DIM // 2)},
        {"fwpkm.keys": (2 * HEADS * NUM_KEYS, KEY_DIM)},
        {"fwpkm.keys": (HEADS, 2, NUM_KEYS, KEY_DIM // 2)},
        {"fwpkm.values": (NUM_KEYS**2 + 1, VALUE_DIM)},
    ],
)
def test_shapes_that_do_not_fit(changed: dict[str, tuple[int, ...]]):
    given = published() | {name: torch.ones(shape) for name, shape in changed.items()}
    shapes = [list(given[name].shape) for name in ("fw_q_proj.weight", "fwpkm.keys", "fwpkm.values")]
    with pytest.raises(ValueError, match="`state_dict` must have fw_q_proj.weight .*, got ") as caught:
        from_published(given)
    assert str(caught.value).endswith(f"got {shapes[0]}, {shapes[1]} and {shapes[2]}")
