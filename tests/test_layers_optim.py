"""Parameter groups of models with memories, and the statistics of a memory's accesses."""

import copy
import math
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwpkm_kernels import testing
from fwpkm_kernels.layers import MemoryStats, ProductKeyMemory, ValueTable, memory_stats, parameter_groups
from tests.helpers.product_key_layer import SMALL, WIDTH, make_layer, make_tokens

RATES = {"lr": 1e-3, "weight_decay": 0.1}


class HouseNorm(nn.Module):
    """A model's own norm, of two dimensions, which only its name tells."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, WIDTH))


class WideTable(ValueTable):
    """A user's own kind of table."""


class Model(nn.Module):
    """Tied embeddings, a table for two layers, another for a third, norms, and what is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        table = WideTable(25, 7)
        self.blocks = nn.ModuleList(ProductKeyMemory(WIDTH, **SMALL, table=table) for _ in range(2))
        self.blocks.append(ProductKeyMemory(WIDTH, **SMALL, query_norm="layer"))
        self.norm, self.own = nn.LayerNorm(WIDTH), HouseNorm()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.unread = ValueTable(4, 3, trainable=False)
        self.expert_bias = nn.Parameter(torch.zeros(2, WIDTH))
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.marked = nn.Parameter(torch.zeros(2, WIDTH))
        self.marked._no_weight_decay = True
        self.unmarked = nn.Parameter(torch.zeros(2, WIDTH))
        self.unmarked._no_weight_decay = False
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(self.norm(x))
        return self.head(x)


PROJECTIONS = {f"blocks.{i}.{name}_proj.weight" for i in range(3) for name in ("q", "gate", "value")}
NAMES = {
    "decay": {"embed.weight", "frozen.weight", "unmarked", *PROJECTIONS},
    "no_decay": {
        *(f"blocks.{i}.{name}" for i in range(3) for name in ("keys", "query_norm.weight")),
        *(f"blocks.{i}.{name}_proj.bias" for i in range(3) for name in ("q", "gate", "value")),
        *("blocks.2.query_norm.bias", "norm.weight", "norm.bias", "own.scale", "expert_bias", "gain", "marked"),
        "frozen.bias",
    },
    "tables": {"blocks.0.table.weight", "blocks.2.table.weight"},
}


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    names = {x: name for name, x in model.named_parameters()}
    return {group["name"]: sorted(names[x] for x in group["params"]) for group in groups}


def test_every_parameter_is_in_one_group():
    """Once each, however they are shared, and whether they require grad or not."""
    model = Model()
    groups = parameter_groups(model, **RATES, table_lr=5e-3)
    assert names_of(model, groups) == {name: sorted(names) for name, names in NAMES.items()}
    rates = [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
    assert rates == [("decay", 1e-3, 0.1), ("no_decay", 1e-3, 0.0), ("tables", 5e-3, 0.0)]


def test_tables_follow_the_rate_of_the_others():
    table = parameter_groups(Model(), **RATES, table_weight_decay=0.01)[2]
    assert (table["lr"], table["weight_decay"]) == (1e-3, 0.01)


def emptied() -> ProductKeyMemory:
    layer = ProductKeyMemory(WIDTH, **SMALL, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    return layer


@pytest.mark.parametrize("made", [lambda: copy.deepcopy(make_layer()), emptied], ids=["deepcopy", "to_empty"])
def test_parameters_that_were_made_anew(made):
    """They have lost the attributes of those they were made from."""
    anew, layer = made(), make_layer()
    assert not hasattr(anew.keys, "_no_weight_decay")
    assert names_of(anew, parameter_groups(anew, **RATES)) == names_of(layer, parameter_groups(layer, **RATES))


def test_a_parameter_tied_across_groups_goes_to_the_last():
    model = nn.ModuleDict({"table": ValueTable(11, WIDTH), "head": nn.Linear(WIDTH, 11), "norm": HouseNorm()})
    model["head"].weight = model["table"].weight
    model["other"] = nn.Linear(WIDTH, 2, bias=False)
    model["other"].weight = model["norm"].scale
    groups = names_of(model, parameter_groups(model, **RATES))
    assert groups == {"decay": [], "no_decay": ["head.bias", "norm.scale"], "tables": ["table.weight"]}


def test_a_parametrized_table_is_one():
    model = nn.utils.parametrizations.weight_norm(ValueTable(4, 3))
    assert {len(group["params"]) for group in parameter_groups(model, **RATES)[:2]} == {0}
    assert len(parameter_groups(model, **RATES)[2]["params"]) == 2


def test_an_optimizer_trains_by_them():
    """Decay alone moves what has no gradient, and only in its group."""
    torch.manual_seed(0)
    model = Model()
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, **RATES, table_lr=0.0))
    tokens = torch.arange(11)
    nn.functional.cross_entropy(model(tokens), tokens.roll(1)).backward()
    optimizer.step()
    moved = {name for name, x in model.named_parameters() if (x != before[name]).any()}
    assert moved >= PROJECTIONS | {"embed.weight", "blocks.0.keys", "norm.weight"}
    assert not moved & (NAMES["tables"] | {"frozen.weight", "frozen.bias"})


def test_sparse_tables_go_to_an_optimizer_of_their_own():
    layer = make_layer(sparse_grad=True)
    *others, tables = parameter_groups(layer, **RATES, table_lr=0.1)
    optimizers = torch.optim.AdamW(others), torch.optim.SparseAdam([tables])
    before = layer.table.weight.detach().clone()
    slots = layer.address(make_tokens(4))[0]
    layer(make_tokens(4)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    moved = (layer.table.weight != before).any(-1).nonzero().flatten()
    testing.assert_bitwise_equal(moved, slots.unique())


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("lr", -1.0, ValueError),
        ("weight_decay", "0.1", TypeError),
        ("table_lr", math.inf, ValueError),
        ("table_weight_decay", -0.1, ValueError),
        ("module", [nn.Parameter(torch.ones(1))], TypeError),
    ],
)
def test_a_bad_argument_of_groups_is_named(name, value, error):
    with pytest.raises(error, match=f"`{name}` "):
        parameter_groups(**{"module": nn.Linear(1, 1), **RATES, name: value})


def brute_force(slots: Tensor, weights: Tensor, num_slots: int, gates: Tensor | None) -> dict[str, float]:
    """The figures by Python's own loops."""
    picks = slots.shape[-1]
    tokens = [[s for s in row if s >= 0] for row in slots.reshape(-1, picks).tolist()]
    count = Counter(s for row in tokens for s in row)
    visitors = Counter(s for row in tokens for s in set(row))
    accesses, used = sum(count.values()), len(count)
    entropies = []
    for row, ws in zip(slots.reshape(-1, picks).tolist(), weights.double().reshape(-1, picks).tolist(), strict=True):
        kept = [abs(w) for s, w in zip(row, ws, strict=True) if s >= 0]
        if sum(kept) > 0:
            entropies.append(-sum(w / sum(kept) * math.log(w / sum(kept)) for w in kept if w > 0))
    live = [] if gates is None else [g for g, row in zip(gates.double().flatten().tolist(), tokens, strict=True) if row]
    gate = 1.0 if gates is None else sum(live) / len(live)
    return {
        "coverage": used / num_slots,
        "collisions": sum(n for s, n in count.items() if visitors[s] > 1) / accesses,
        "divergence": sum(n / accesses * math.log(n / accesses * num_slots) for n in count.values()),
        "entropy": sum(entropies) / len(entropies),
        "hits": sum(n - 1 for n in count.values()) / used,
        "gate": math.nan if gates is None else gate,
        "erosion": sum((1 - gate / picks) ** (n - 1) for n in count.values()) / used,
    }


def check(stats: MemoryStats, expected: dict[str, float], dtype: torch.dtype, **tolerance: float) -> None:
    assert {x.shape for x in stats} == {torch.Size()}
    assert {x.dtype for x in stats} == {dtype}
    assert not any(x.requires_grad for x in stats)
    found = {name: x.item() for name, x in stats._asdict().items()}
    assert found == pytest.approx(expected, nan_ok=True, **tolerance)


@pytest.mark.parametrize("pattern", testing.SLOT_PATTERNS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_statistics_by_brute_force(pattern, gated, padded):
    generator = torch.Generator().manual_seed(0)
    slots = testing.make_slots((2, 9, 4), 100, pattern)
    weights = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    weights[1, 2] = 0  # a token without an entropy
    gates = torch.rand(2, 9, generator=generator, dtype=torch.float64) if gated else None
    if padded:
        slots[0, 3:], slots[1, :, 3] = -1, -1
    stats = memory_stats(slots, weights.requires_grad_(), 100, gates.requires_grad_() if gated else None)
    check(stats, brute_force(slots, weights, 100, gates), torch.float64, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_other_dtypes(dtype):
    slots = testing.make_slots((7, 4), 20).int()
    weights, gates = torch.rand(7, 4).to(dtype), torch.rand(7).to(dtype)
    check(memory_stats(slots, weights, 20, gates), brute_force(slots, weights, 20, gates), torch.float32, rel=1e-5)


def test_a_token_that_reads_a_slot_twice_is_no_collision():
    slots = torch.tensor([[3, 3], [5, 6], [6, 2]])
    assert memory_stats(slots, torch.ones(3, 2), 8).collisions.item() == pytest.approx(2 / 6)


def test_extremes():
    everything = memory_stats(torch.arange(16).view(4, 4), torch.ones(4, 4), 16)
    assert [round(x.item(), 5) for x in everything] == pytest.approx(
        [1, 0, 0, round(math.log(4), 5), 0, math.nan, 1], nan_ok=True
    )
    one = memory_stats(torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), 16, torch.ones(5))
    assert [x.item() for x in one] == pytest.approx([1 / 16, 1, math.log(16), 0, 4, 1, 0])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (2, 0, 4)])
@pytest.mark.parametrize("gated", [False, True])
def test_statistics_of_nothing(shape, gated):
    slots = torch.zeros(shape, dtype=torch.int64)
    stats = memory_stats(slots, torch.zeros(shape), 9, torch.ones(shape[:-1]) if gated else None)
    assert stats.coverage == 0
    assert all(x.isnan() for x in stats[1:])


def test_what_is_not_a_number_shows():
    slots, weights = torch.tensor([[0, 1], [2, -1]]), torch.tensor([[1.0, math.nan], [1.0, math.nan]])
    assert memory_stats(slots, weights, 4).entropy.isnan()
    assert memory_stats(slots[1:], weights[1:], 4).entropy == 0  # places that do not count hold anything
    stats = memory_stats(slots[:, 1:], torch.ones(2, 1), 4, torch.tensor([0.25, math.nan]))
    assert stats.gate == 0.25


def test_statistics_wait_for_nothing():
    """Nothing on the meta device can be waited for, and a graph that breaks nowhere reads no value."""
    slots, weights, gates = testing.make_slots((7, 4), 20), torch.rand(7, 4), torch.rand(7)
    stats = memory_stats(slots.to("meta"), weights.to("meta"), 20, gates.to("meta"))
    assert all(x.is_meta for x in stats)
    torch._dynamo.reset()
    compiled = torch.compile(memory_stats, backend="eager", fullgraph=True)
    expected = memory_stats(slots, weights, 20, gates)
    for actual, wanted in zip(compiled(slots, weights, 20, gates), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.gpu
def test_statistics_on_a_gpu(errors_on_synchronisation):
    slots, weights, gates = testing.make_slots((64, 8), 300, "zipf"), torch.rand(64, 8), torch.rand(64)
    slots[40:] = -1
    tensors = [x.cuda() for x in (slots, weights, gates)]
    torch.cuda.set_sync_debug_mode("error")
    stats = memory_stats(tensors[0], tensors[1], 300, tensors[2])
    torch.cuda.set_sync_debug_mode("default")
    check(stats, brute_force(slots, weights, 300, gates), torch.float32, rel=1e-5)


def test_what_a_process_has_set_changes_no_statistic():
    slots, weights, gates = testing.make_slots((7, 4), 20), torch.rand(7, 4), torch.rand(7)
    expected = memory_stats(slots, weights, 20, gates)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("error")
            stats = memory_stats(slots, weights, 20, gates)
            ungated = memory_stats(slots, weights, 20)
    finally:
        torch.set_default_dtype(before)
    for actual, wanted in zip(stats, expected, strict=True):
        testing.assert_bitwise_equal(actual, wanted)
    assert ungated.gate.device == slots.device


GOOD: dict[str, Any] = {
    "slots": torch.tensor([[0, 1], [2, -1]]),
    "weights": torch.ones(2, 2),
    "num_slots": 4,
    "gates": torch.ones(2),
}


@pytest.mark.parametrize(
    "name, value, error, says",
    [
        ("slots", torch.tensor([[0, 1], [2, -2]]), ValueError, r"\[-1, 4\), got values from -2 to 2"),
        ("slots", torch.tensor([[0, 1], [2, 4]]), ValueError, r"\[-1, 4\), got values from 0 to 4"),
        ("slots", torch.ones(2, 2), TypeError, "got torch.float32"),
        ("slots", torch.tensor(1), ValueError, "got a scalar"),
        ("slots", [[0, 1], [2, 3]], TypeError, "got list"),
        ("weights", torch.ones(2, 1), ValueError, r"`slots`, got \[2, 1\] against \[2, 2\]"),
        ("weights", torch.ones(2, 2, dtype=torch.int64), TypeError, "got torch.int64"),
        ("weights", None, TypeError, "got NoneType"),
        ("num_slots", 0, ValueError, "at least 1.* got 0"),
        ("gates", torch.ones(2, 2), ValueError, r"\[2\], got \[2, 2\]"),
        ("gates", torch.ones(2, dtype=torch.bool), TypeError, "got torch.bool"),
        ("gates", torch.ones(2, dtype=torch.float64), TypeError, "`weights` must both be float64 or neither"),
    ],
)
def test_a_bad_argument_of_statistics_is_named(name, value, error, says):
    with pytest.raises(error, match=f"`{name}` .*{says}"):
        memory_stats(**{**GOOD, name: value})
