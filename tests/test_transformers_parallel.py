"""FwPKMForCausalLM over two ranks, by transformers' own entry points: its plans of tensor parallelism and of FSDP."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra [transformers]")
pytest.importorskip("accelerate", reason="needs accelerate, with which transformers loads models")

import torch
import torch.distributed as dist
from packaging.version import Version
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from fwpkm_kernels.distributed import shard_table_
from fwpkm_kernels.integrations import language_model, parallel
from fwpkm_kernels.integrations.transformers import FwPKMConfig, FwPKMForCausalLM
from fwpkm_kernels.layers import ProductKeyMemory, ValueTable
from tests.helpers.ranks import rank_device, run_ranks
from tests.helpers.transformers import (
    CACHE,
    GREEDY,
    MEMORY,
    ONLY_GDN,
    OWN,
    PKM,
    VOCABULARY,
    put_gated_delta_nets_into_pytorch,
)

needs_plans = pytest.mark.skipif(Version("5.24") > language_model._INSTALLED, reason="there are no plans before")
# transformers puts ranks on accelerators where it finds any.
two_places = pytest.mark.skipif(
    torch.accelerator.device_count() == 1, reason="one accelerator is too few for two ranks"
)
ROOT = Path(__file__).parents[1]
SHARED = {**OWN, "share_pkm_table": True}
RATE = 0.01
#: Relative to the largest element. Gated DeltaNets compute in float32, also in a model of float64: a difference in the
#: last bit of float64 may become one in the last bit of float32.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of float64 with layers and memories of all kinds, on disk."""
    path = tmp_path_factory.mktemp("model")
    save(path, **SHARED)
    return path


@pytest.fixture(autouse=True)
def gated_delta_nets_in_pytorch(monkeypatch):
    put_gated_delta_nets_into_pytorch(monkeypatch)


def save(path, **fields) -> None:
    torch.manual_seed(0)
    FwPKMForCausalLM._from_config(FwPKMConfig(**fields), dtype=torch.float64).save_pretrained(path)


def load(path, **how) -> FwPKMForCausalLM:
    """The model on this rank."""
    from transformers.distributed import DistributedConfig

    put_gated_delta_nets_into_pytorch(pytest.MonkeyPatch())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(dist.get_rank()))  # by which transformers finds the rank's accelerator
        return FwPKMForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**how))


def rows(model) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (4, 19), generator=torch.Generator().manual_seed(0)).to(model.device)


def train(model, tokens) -> dict:
    """A training step: what it computes, and the parameters after it, as whole tensors."""
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    gradients = {name: whole(x.grad) for name, x in model.named_parameters()}
    torch.optim.SGD(model.parameters(), RATE).step()
    parameters = {name: whole(x) for name, x in model.named_parameters()}
    loss, logits = output.loss.detach(), output.logits.detach()
    return {"loss": loss, "logits": logits, "gradients": gradients, "parameters": parameters}


def whole(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def assert_near(result, expected) -> None:
    if isinstance(expected, torch.Tensor):
        assert (result - expected).abs().max() <= TOLERANCE * expected.abs().max()
        return
    assert result.keys() == expected.keys()
    for name, x in expected.items():
        assert_near(result[name], x)


def assert_saved(path, parameters) -> None:
    """One process loads what two ranks have saved."""
    model = FwPKMForCausalLM.from_pretrained(path)
    assert model.model.layers[1].mlp.table is model.model.layers[3].mlp.table
    assert_near({name: x.detach() for name, x in model.named_parameters()}, parameters)
    assert not [name for name in json.loads((path / "config.json").read_text()) if "plan" in name or "dist" in name]


def tensor_parallel(path, uneven) -> dict:
    model = load(path, tp_plan="auto", tp_size=2)
    for block in model.model.layers:
        is_memory = isinstance(block.mlp, ProductKeyMemory)
        assert isinstance(block.mlp.gate_proj.weight, DTensor) != is_memory
        for memory in [block.memory] * (block.memory is not None) + [block.mlp] * is_memory:
            spread = {name: x.placements for name, x in memory.named_parameters() if isinstance(x, DTensor)}
            assert spread == {"table.weight": (Shard(1),)}
            assert memory.table.mesh.size() == 2
    result = {"tokens": model.generate(rows(model), **GREEDY), **train(model, rows(model))}
    model.save_pretrained(path / "tp")
    with pytest.raises(ValueError, match="`value_dim` must be a multiple of the 2 ranks .* got 15 in model.layers.0"):
        load(uneven, tp_plan="auto", tp_size=2)
    return result


@needs_plans
@two_places
def test_tensor_parallelism(folder, tmp_path):
    save(tmp_path, **{**OWN, "memory": MEMORY | {"value_dim": 15}, "pkm_layers": []})
    results = run_ranks(tensor_parallel, 2, folder, tmp_path)
    model = FwPKMForCausalLM.from_pretrained(folder)
    tokens, expected = model.generate(rows(model), **GREEDY), train(model, rows(model))
    for result in results:
        assert torch.equal(result.pop("tokens"), tokens)
        assert_near(result, expected)
    assert_saved(folder / "tp", expected["parameters"])


def fsdp(path) -> dict:
    model = load(path, fsdp_size=2)
    tables = {name: x for name, x in model.named_modules() if isinstance(x, ValueTable)}.values()
    assert len(tables) == 3  # of two memories, and one that ProductKeyMemories share
    assert all(isinstance(x, FSDPModule) and x.weight.placements == (Shard(0),) for x in tables)
    tokens = rows(model).chunk(2)[dist.get_rank()]
    with torch.no_grad():
        result = {"evaluated": model(tokens).logits, "tokens": model.generate(tokens, **GREEDY, use_cache=False)}
        # A memory that streams would need the table of its first call in all others.
        with pytest.raises(ValueError, match=re.escape("of a module of fully_shard call unshard()")):
            model.generate(tokens, **GREEDY)
        for table in tables:
            table.unshard()
        result["streamed"] = model.generate(tokens, **GREEDY)
        cache = model(tokens, use_cache=True)[CACHE]
        for table in tables:
            table.reshard()
        with pytest.raises(RuntimeError, match=re.escape("of a module of fully_shard call unshard()")):
            model(tokens, **{CACHE: cache})
    result |= train(model, tokens)
    model.save_pretrained(path / "fsdp")
    return result


@needs_plans
@two_places
def test_fsdp(folder):
    """Each rank has half of the rows."""
    results = run_ranks(fsdp, 2, folder)
    model = FwPKMForCausalLM.from_pretrained(folder)
    tokens, expected = model.generate(rows(model), **GREEDY), train(model, rows(model))
    logits = expected.pop("logits")
    assert_near(sum(result.pop("loss") for result in results) / 2, expected.pop("loss"))
    for result, its_tokens, its_logits in zip(results, tokens.chunk(2), logits.chunk(2), strict=True):
        assert torch.equal(result.pop("tokens"), its_tokens)
        assert torch.equal(result.pop("streamed"), its_tokens)
        assert_near(result.pop("evaluated"), its_logits)
        assert_near(result.pop("logits"), its_logits)
        assert_near(result, expected)
    assert_saved(folder / "fsdp", expected["parameters"])


def both(path) -> dict:
    model = load(path, tp_size=2, fsdp_size=2)
    assert all(x.weight.placements == (Shard(0), Shard(1)) for x in model.modules() if isinstance(x, ValueTable))
    return train(model, rows(model).chunk(2)[dist.get_rank() // 2])


@needs_plans
@two_places
@pytest.mark.slow
def test_both_plans_at_once(folder):
    """Two halves of the rows, each on two ranks with half of the columns."""
    results = run_ranks(both, 4, folder)
    model = FwPKMForCausalLM.from_pretrained(folder)
    expected = train(model, rows(model))
    logits = expected.pop("logits")
    assert_near(sum(result.pop("loss") for result in results) / 4, expected.pop("loss"))
    for rank, result in enumerate(results):
        assert_near(result.pop("logits"), logits.chunk(2)[rank // 2])
        assert_near(result, expected)


MLP, GATE = "model.layers.*.mlp", "model.layers.*.mlp.gate_proj"
MEMORY_TABLE, PKM_TABLE = "model.layers.*.memory.table", "model.layers.*.mlp.table"


@needs_plans
@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        ({}, {MLP, MEMORY_TABLE, PKM_TABLE}, {GATE}),
        ({"pkm_layers": [0, 1, 2, 3]}, {PKM_TABLE}, {MLP, GATE}),
        ({"pkm_layers": [], "memory_layers": []}, {GATE}, {MLP, MEMORY_TABLE, PKM_TABLE}),
        (ONLY_GDN, {GATE, MEMORY_TABLE}, {"model.layers.*.self_attn.q_proj"}),
        ({"layer_types": ["full_attention"] * 4}, {MLP}, {"model.layers.*.self_attn.out_proj"}),
        ({"memory": MEMORY | {"initial_memory": "frozen"}}, {PKM_TABLE}, {MEMORY_TABLE}),
        ({"memory": MEMORY | {"key_gradient": "all"}}, {PKM_TABLE}, {MEMORY_TABLE}),
        ({"pkm": PKM | {"sparse_grad": True}}, {MLP, MEMORY_TABLE}, {PKM_TABLE}),
    ],
)
def test_plans_have_rules_for_what_is_in_the_model(changes, present, absent):
    model = FwPKMForCausalLM(FwPKMConfig(**OWN | changes))
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    assert present <= model.tp_plan.keys() <= names
    assert not absent & model.tp_plan.keys()
    assert model.fsdp_plan.keys() <= names
    assert "plan" not in model.config.to_json_string(use_diff=False)


def test_there_are_no_plans_before_transformers_shards_tables_first(monkeypatch):
    monkeypatch.setattr(parallel, "_HAS_PLANS", False)
    config = FwPKMConfig(**OWN)
    assert config.base_model_tp_plan is None
    assert config.base_model_fsdp_plan is None


def spread_and_save(path) -> torch.Tensor:
    """Logits of a model whose tables `shard_table_` has spread, saved as docs/distributed.md says."""
    put_gated_delta_nets_into_pytorch(pytest.MonkeyPatch())
    torch.manual_seed(0)
    model = FwPKMForCausalLM(FwPKMConfig(**SHARED)).to(rank_device())
    shard_table_(model, init_device_mesh(rank_device().type, (2,)))
    (block,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text("utf-8"), re.DOTALL)
    exec(block, {"model": model, "folder": path, "dist": dist})
    return model(rows(model)).logits


def test_a_model_with_tables_by_columns_is_saved_whole(tmp_path):
    one, two = run_ranks(spread_and_save, 2, tmp_path)
    assert torch.equal(one, two)
    model = FwPKMForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(rows(model)).logits, one)
    assert model.model.layers[1].mlp.table is model.model.layers[3].mlp.table
