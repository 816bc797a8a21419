"""The models of the evaluation: attention in blocks, attention that matches contexts, reading in pieces."""

import copy
import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", minversion="5.24")

from benchmarks.evaluation import models
from benchmarks.evaluation.models import (
    MODELS,
    SIZES,
    ContextAttention,
    blocked_attention,
    count_parameters,
    memories_of,
    new_cache,
    split_name,
)
from tests.helpers.evaluation_models import TINY, tiny_model


def dense_attention(query, key, value, window, scaling):
    """With a mask of every pair, written out."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    at = torch.arange(key.shape[2] - query.shape[2], key.shape[2]).unsqueeze(1)
    past = torch.arange(key.shape[2])
    visible = (past <= at) & (past > at - window) if window else past <= at
    scores = (query @ key.mT * scaling).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 8])
@pytest.mark.parametrize("past", [0, 1, 5, 7, 8, 9, 20])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 30])
def test_attention_in_blocks_is_attention_with_a_dense_mask(length, past, window):
    generator = torch.Generator().manual_seed(length * 100 + past)
    for rows, heads, groups in ((1, 2, 2), (3, 4, 2)):
        query = torch.randn(rows, heads, length, 5, generator=generator, dtype=torch.float64)
        key, value = torch.randn(2, rows, groups, past + length, 5, generator=generator, dtype=torch.float64)
        out, weights = blocked_attention(torch.nn.Module(), query, key, value, None, scaling=0.7, sliding_window=window)
        assert weights is None
        torch.testing.assert_close(out, dense_attention(query, key, value, window, 0.7), rtol=1e-12, atol=1e-12)


def test_gradients_through_blocks_are_those_of_a_dense_mask():
    inputs = [torch.randn(2, heads, 19, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    out, _ = blocked_attention(torch.nn.Module(), *inputs, None, scaling=0.5, sliding_window=8)
    direction = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, direction)
    theirs = torch.autograd.grad(dense_attention(*inputs, 8, 0.5), inputs, direction)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", [*MODELS, "full+fwpkm"])
@torch.no_grad()
def test_reading_in_pieces_is_reading_at_once(model):
    """Pieces of one byte, and shorter than a convolution, a window, a chunk, and longer; then a copy reads on alone."""
    model, data = tiny_model(model), torch.randint(256, (2, 90), generator=torch.Generator().manual_seed(0))
    whole = model(data).logits
    cache, logits, at = new_cache(model), [], 0
    for length in (3, 1, 2, 30, 1, 7, 17, 4):
        logits.append(model(data[:, at : at + length], cache=cache, use_cache=True).logits)
        at += length
    kept = copy.deepcopy(cache)
    other = model(data.flip(1)[:, :25], cache=copy.deepcopy(cache), use_cache=True).logits
    logits.append(model(data[:, at:], cache=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)
    # What `cache` and another copy have read since has not reached this one, whichever read first.
    assert model(data.flip(1)[:, :25], cache=copy.deepcopy(kept), use_cache=True).logits.equal(other)
    assert model(data[:, at:], cache=kept, use_cache=True).logits.equal(logits[-1])


@pytest.mark.parametrize("first", [1, 2, 6, 7, 8])
@torch.no_grad()
def test_a_first_piece_shorter_than_the_convolution(first):
    model, data = tiny_model("full"), torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(1))
    cache = new_cache(model)
    pieces = [model(x, cache=cache, use_cache=True).logits for x in data.split([first, 2, 18 - first], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(data).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_context_attention_begins_by_matching_contexts(monkeypatch):
    """In text that comes a second time each byte attends most to the byte that followed its context the first time."""
    seen = []

    def watched(module, query, key, value, mask, **options):
        scores = (query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT).tril()
        seen.append(scores.masked_fill(scores == 0, -torch.inf).argmax(-1))
        return blocked_attention(module, query, key, value, mask, **options)

    model = tiny_model("full", hidden_size=64, head_dim=32, parameters=200_000)
    monkeypatch.setattr(models, "blocked_attention", watched)
    text = torch.randint(256, (1, 60), generator=torch.Generator().manual_seed(2))
    model(torch.cat((text, text), 1))
    expected = torch.arange(ContextAttention.WIDTH, 60) + 1
    right = (seen[0][0, :, 60 + ContextAttention.WIDTH :] == expected).double().mean(-1)
    # Two heads read the keys of each group; the first of them matches.
    assert right[::2].min() > 0.9, right


@torch.no_grad()
def test_a_key_is_the_query_of_the_byte_before():
    """At the start, but for rotation and sharpness: the filters are shifted by one byte."""
    attention = tiny_model("full").model.layers[0].self_attn
    filters = attention.conv.weight.unflatten(0, (-1, 2))[:, :, 0]
    assert filters[:, 0, 1:].equal(filters[:, 1, :-1])
    assert not filters[:, 1, -1].any()
    assert attention.k_proj.weight.equal(attention.q_proj.weight.view(2, 2, 8, 32)[:, 0].reshape(16, 32))
    x = torch.randn(1, 32, 20)
    mixed = attention.conv(F.pad(x, (attention.WIDTH - 1, 0))).unflatten(1, (-1, 2))
    torch.testing.assert_close(mixed[:, :, 1, 1:], mixed[:, :, 0, :-1])


def test_plain_attention_has_no_head_start():
    assert not any(isinstance(x, ContextAttention) for x in tiny_model("full", context_attention=False).modules())
    assert not any(isinstance(x, ContextAttention) for x in tiny_model("swa").modules())


@pytest.mark.parametrize("model", MODELS)
def test_models_of_a_size_have_as_many_parameters(model):
    """To half of what one more column of the MLPs would add."""
    for size in (TINY, SIZES["miniature"]):
        with torch.device("meta"):
            others, in_memory = count_parameters(tiny_model(model, **dataclasses.asdict(size)))
        mlps = size.layers - len(size.pkm_layers) * ("+pkm" in model)
        assert abs(others - size.parameters) <= 3 * size.hidden_size * mlps / 2
        assert (in_memory > 0) == ("pkm" in model)


def test_parameters_of_tables_and_keys_are_counted_apart():
    model = tiny_model("swa+fwpkm+pkm")
    (memory,) = memories_of(model)
    others, in_memory = count_parameters(model)
    pkm = model.model.layers[1].mlp
    tables = [memory.keys, memory.table.weight, pkm.keys, pkm.table.weight]
    assert in_memory == sum(x.numel() for x in tables)
    trained = sum(x.numel() for x in model.parameters())
    assert others == trained - pkm.keys.numel() - pkm.table.weight.numel()  # a persistent memory is of buffers


def test_a_seed_makes_the_same_model():
    one, same, other = (tiny_model("swa+fwpkm", seed).state_dict() for seed in (0, 0, 1))
    assert all(one[name].equal(same[name]) for name in one)
    assert not one["lm_head.weight"].equal(other["lm_head.weight"])


@pytest.mark.parametrize(
    ("model", "parts"),
    [("full", ("full", False, False)), ("gdn+fwpkm", ("gdn", True, False)), ("swa+fwpkm+pkm", ("swa", True, True))],
)
def test_a_name_is_mixer_and_memories(model, parts):
    assert split_name(model) == parts


@pytest.mark.parametrize("model", ["", "fwpkm", "swa+", "swa+fwpkm+fwpkm", "swa + fwpkm", "lstm", "swa+full"])
def test_other_names_are_refused(model):
    with pytest.raises(ValueError, match=r"`model` must be one of swa\+fwpkm, full, .*, got "):
        split_name(model)


def test_kernels_of_gpus_are_not_given_what_is_on_a_cpu():
    """Whatever the machine has: the tensor decides."""

    def in_torch(query, *, scale):
        return "PyTorch", scale

    @functools.wraps(in_torch)
    def kernel(query, *, scale):
        return "kernel", scale

    function = models.in_torch_on_cpus(models.in_torch_on_cpus(kernel))  # as after a reload
    assert function(torch.zeros(1), scale=2) == ("PyTorch", 2)
    assert function(torch.zeros(1, device="meta"), scale=3) == ("kernel", 3)
