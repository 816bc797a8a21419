"""More ranks than one train as one process with the whole batch: DistributedDataParallel, FSDP, tables by columns."""

import copy
import pickle
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fwpkm_kernels import apply_rows_, sparse_value_gather
from fwpkm_kernels.distributed import clip_grad_norm_, replicate_tables_, shard_table_
from fwpkm_kernels.layers import FastWeightProductKeyMemory, ValueTable, advance_memory
from fwpkm_kernels.records import Tokens
from tests.helpers.parallel import (
    FORMS,
    MEMORY,
    WIDTH,
    batch_of,
    lay_out,
    loss_of,
    make_mesh,
    make_model,
    make_optimizer,
    mean_over,
    train,
    whole,
    whole_gradients,
    whole_parameters,
)
from tests.helpers.ranks import rank_device, run_ranks


def trained(form: str, dp: DeviceMesh | None, mp: DeviceMesh | None = None, **options: Any) -> dict[str, Any]:
    """Loss and gradients of a batch, and what three steps of AdamW make of them."""
    model = make_model(shares=form != "plain", **options)
    run = lay_out(model, form, dp, mp)
    loss = loss_of(run, batch_of(0, dp))
    loss.backward()
    result = {"loss": mean_over(loss, dp), "gradients": whole_gradients(model)}
    losses, norms = train(run, make_optimizer(model), range(3), dp)
    return result | {"losses": losses, "norms": norms, "parameters": whole_parameters(model)}


@cache
def expected(form: str, dtype: torch.dtype = torch.float64, scope: str = "sequence") -> dict[str, Any]:
    """Those of one process with the whole batch."""
    return trained("plain" if form == "plain" else "", None, dtype=dtype, scope=scope)


def assert_near(result: Any, wanted: Any, tolerance: float, path: str) -> None:
    """Numbers and tensors, in dicts and lists: within `tolerance` of the largest element."""
    if isinstance(wanted, dict):
        assert result.keys() == wanted.keys(), path
        for name in wanted:
            assert_near(result[name], wanted[name], tolerance, f"{path}, {name}")
        return
    result, wanted = torch.as_tensor(result), torch.as_tensor(wanted)
    error = float((result - wanted).abs().max() / wanted.abs().max())
    assert error <= tolerance, f"{path}: {error:.1e}"


def check(of_ranks: list[dict[str, Any]]) -> None:
    """In float64 to the rounding of other sums; norms have the same bits on all ranks."""
    for results in of_ranks:
        for form, result in results.items():
            assert_near(result, expected(form), 1e-10, form)
            assert result["norms"] == of_ranks[0][form]["norms"], form


def trained_on_two(forms: list[str], dtype: torch.dtype) -> dict[str, Any]:
    return {form: trained(form, make_mesh(2), dtype=dtype) for form in forms}


def test_two_ranks():
    check(run_ranks(trained_on_two, 2, FORMS, torch.float64))


def test_two_ranks_in_float32():
    """To float32's rounding: gradients are sums of terms of both signs, and AdamW divides small ones by smaller."""
    forms = ["ddp", "replicated"]
    for results in run_ranks(trained_on_two, 2, forms, torch.float32):
        for form in forms:
            wanted = expected(form, torch.float32)
            for name, tolerance in (("loss", 1e-6), ("losses", 1e-5), ("norms", 1e-4), ("gradients", 1e-4)):
                assert_near(results[form][name], wanted[name], tolerance, f"{form}, {name}")


def trained_on_four(forms: list[str]) -> dict[str, Any]:
    mesh = make_mesh(2, 2)
    results = {form: trained(form, mesh["data"], mesh["columns"]) for form in forms}
    model = make_model()
    lay_out(model, "own unit", mesh["data"], mesh["columns"])
    assert model.blocks[0].pkm.table.weight.placements == (Shard(0), Shard(1))
    return results | {"ddp of four": trained("ddp", make_mesh(4))}


def test_columns_and_rows_on_four_ranks():
    """Rows of columns, columns that several ranks have, and four ranks with a sequence each."""
    check(run_ranks(trained_on_four, 4, ["own unit", "ddp"]))


@pytest.mark.slow
def test_every_form_with_columns_on_four_ranks():
    check(run_ranks(trained_on_four, 4, FORMS))


def trained_by_batch() -> dict[str, Tensor]:
    model = make_model(scope="batch")
    run = DistributedDataParallel(model)
    loss_of(run, batch_of(0, make_mesh(2))).backward()
    return whole_gradients(model)


def test_a_memory_of_the_batch_is_of_the_batch_of_its_rank():
    model = make_model(scope="batch")
    tokens, targets = batch_of(0)
    halves = list(zip(tokens.chunk(2), targets.chunk(2), strict=True))
    for half in halves:
        (loss_of(model, half) / 2).backward()
    wanted = whole_gradients(model)
    of_all = expected("", scope="batch")["gradients"]
    for gradients in run_ranks(trained_by_batch, 2):
        assert_near(gradients, wanted, 1e-10, "batch")
        with pytest.raises(AssertionError):
            assert_near(gradients, of_all, 1e-3, "batch")


def replicated() -> dict[str, Any]:
    """Gradients of two backward passes of replicated tables, by parts of a batch, and of one in float16."""
    group = dist.group.WORLD
    model = replicate_tables_(make_model(), group)
    tokens, targets = batch_of(0, make_mesh(2))
    for part in zip(tokens, targets, strict=True):
        (loss_of(model, tuple(x.unsqueeze(0) for x in part)) / 2).backward()
    accumulated = {name: x.grad for name, x in model.named_parameters() if "table" in name}
    torch.manual_seed(dist.get_rank())
    low = ValueTable(3, 4, dtype=torch.float16, device=rank_device())
    before, contents = low.weight.detach().clone(), low.contents
    replicate_tables_(low)
    factor = [40000.0, 30016.0][dist.get_rank()]
    low(lambda weight: (weight * factor).sum()).backward()
    frozen = ValueTable(3, 4, trainable=False, device=rank_device())
    torch.nn.init.constant_(frozen.weight, dist.get_rank())
    replicate_tables_(frozen)
    return {
        "accumulated": accumulated,
        "before": before,
        "weight": low.weight,
        "grad": low.weight.grad,
        "has other contents": low.contents is not contents,
        "frozen": frozen.weight,
    }


def test_replicated_tables():
    """Gradients accumulate, are summed in float32, and ranks begin with the tables of the first."""
    one, two = run_ranks(replicated, 2)
    assert not torch.equal(one["before"], two["before"])
    for result in (one, two):
        gradients = {name: x for name, x in expected("")["gradients"].items() if "table" in name}
        assert_near(result["accumulated"], gradients, 1e-10, "accumulated")
        assert torch.equal(result["weight"], one["before"])
        assert torch.equal(result["grad"], torch.full((3, 4), 35008.0).half())  # the sum is no number of float16
        assert result["has other contents"]
        assert not result["frozen"].any()


def replicated_badly() -> None:
    table = ValueTable(4, 4, device=rank_device())
    fully_shard(table, mesh=make_mesh(2))
    replicate_tables_(table)


def test_replicated_tables_are_refused():
    for error in run_ranks(replicated_badly, 2, expects_errors=True):
        assert "ignored_params" in str(error)
    with pytest.raises(TypeError, match="`module` must be a torch.nn.Module"):
        replicate_tables_(3)


def grad_of(table: ValueTable, factor: float) -> torch.Tensor | None:
    """The gradient that a backward leaves, of a rank with this factor, in float64."""
    table.weight.grad = None
    table(lambda weight: (weight * factor).sum()).backward()
    grad = table.weight.grad
    return None if grad is None else (grad.to_local() if isinstance(grad, DTensor) else grad).double()


def replicated_and_changed() -> dict[str, Any]:
    """Gradients of tables that were replaced, frozen or copied behind `replicate_tables_`."""
    rank, device = dist.get_rank(), rank_device()
    mean: dict[str, Any] = {}
    made = [ValueTable(3, 4, device=device) for _ in range(4)]
    cast, loaded, thawed, copied = made
    thawed.weight.requires_grad_(False)
    for table in made:
        replicate_tables_(table)
    mean["cast"] = grad_of(cast.double(), 1.0 + rank)
    other = ValueTable(3, 4, device=device)
    loaded.load_state_dict(other.state_dict(), assign=True)
    mean["loaded"] = grad_of(loaded, 1.0 + rank)
    compiled = replicate_tables_(ValueTable(3, 4, device=device))
    compiled.load_state_dict(other.state_dict(), assign=True)
    loss = torch.compile(lambda: compiled(lambda weight: (weight * (1.0 + rank)).sum()), backend="aot_eager")
    loss().backward()
    mean["compiled"] = compiled.weight.grad
    thawed.weight.requires_grad_(True)
    mean["thawed"] = grad_of(thawed, 1.0 + rank)
    mesh = make_mesh(2, 1)
    columns = shard_table_(ValueTable(3, 4, device=device), mesh["columns"])
    replicate_tables_(columns, mesh["data"].get_group())
    mean["columns"] = grad_of(columns.to(torch.bfloat16), 1.0 + rank)
    once = replicate_tables_(ValueTable(3, 4, device=device))
    hook = torch.ones(1, device=device, requires_grad=True)
    hook.register_hook(lambda grad: {}["a backward that fails behind the table's part"])
    with pytest.raises(KeyError):
        once(lambda weight: (hook * 2).sum() * weight.sum()).backward()
    mean["after a failure"] = grad_of(once, 1.0 + rank)
    refused = {}
    for name, copy_of in {"deepcopy": copy.deepcopy(copied), "pickle": pickle.loads(pickle.dumps(copied))}.items():
        try:
            grad_of(copy_of, 1.0)
        except RuntimeError as error:
            refused[name] = str(error)
        with torch.no_grad():
            assert copy_of(torch.sum) == copied(torch.sum)
        mean[name] = grad_of(replicate_tables_(copy_of), 1.0 + rank)
    return {"mean": mean, "refused": refused}


def test_replicated_tables_that_are_replaced_afterwards():
    """What has taken the place of a Parameter is averaged, and a copy is not trained by one rank alone in silence."""
    for result in run_ranks(replicated_and_changed, 2):
        for name, grad in result["mean"].items():
            assert torch.equal(grad, torch.full_like(grad, 1.5)), name
        assert {*result["refused"]} == {"deepcopy", "pickle"}
        assert all("is a copy of one" in text for text in result["refused"].values())


def replicated_and_used_by_some() -> list[Any]:
    """Gradients of six tables: one that both ranks use, one of each rank alone, one of neither, and two with sparse
    gradients, one of both and one of the second rank; of two backwards.

    They go through DistributedDataParallel too, which leaves them and a buffer of the user's alone.
    """
    rank = dist.get_rank()
    tables = nn.ModuleList(ValueTable(2, 3, device=rank_device()) for _ in range(6))
    tables.register_buffer("own", torch.full((2,), float(rank), device=rank_device()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(tables, ["own"])
    replicate_tables_(tables)
    tables.register_parameter("other", nn.Parameter(torch.ones(1, device=rank_device())))
    slots, weights = torch.tensor([[1, 1]], device=rank_device()), torch.full((1, 2), 1.0 + rank, device=rank_device())

    def use(used: list[int], sparse: list[int]) -> Tensor:
        dense = sum(tables[i](lambda weight: (weight * (1.0 + rank)).sum()) for i in used)
        rows = sum(tables[i](sparse_value_gather, slots, weights, sparse_grad=True).sum() for i in sparse)
        return (dense + rows) * tables.other

    tables.forward = use
    model = DistributedDataParallel(tables)
    for _ in range(2):
        model([0, 1 + rank], [4, 5] if rank else [4]).backward()
    assert all(tables[i].weight.grad.is_sparse for i in (4, 5))
    grads = [None if x.weight.grad is None else x.weight.grad.to_dense() for x in tables]
    return [*grads, tables.own]


def test_replicated_tables_that_some_ranks_have_not_used():
    for rank, (both, first, second, neither, *sparse, own) in enumerate(run_ranks(replicated_and_used_by_some, 2)):
        for grad, wanted in ((both, 3.0), (first, 1.0), (second, 2.0)):
            assert torch.equal(grad, torch.full((2, 3), wanted))
        assert neither is None
        for grad, wanted in zip(sparse, (6.0, 4.0), strict=True):  # two accesses of row 1 in each of two backwards
            assert torch.equal(grad, torch.tensor([[0.0] * 3, [wanted] * 3]))
        assert torch.equal(own, torch.full((2,), float(rank)))


def replicated_unlike() -> None:
    table = ValueTable(4, 4, device=rank_device())
    table.weight.requires_grad_(dist.get_rank() == 0)
    replicate_tables_(table)


def replicated_twice() -> None:
    replicate_tables_(replicate_tables_(ValueTable(4, 4, device=rank_device())))


def replicated_on_meta() -> None:
    replicate_tables_(ValueTable(4, 4, device="meta"))


def replicated_over_columns() -> None:
    replicate_tables_(shard_table_(ValueTable(4, 4, device=rank_device()), make_mesh(2)))


def test_replicated_tables_that_differ_or_hold_nothing_are_refused():
    for error in run_ranks(replicated_over_columns, 2, expects_errors=True):
        assert "got columns = '0 to 2' on rank 0 and '2 to 4' on rank 1" in str(error)
    for error in run_ranks(replicated_unlike, 2, expects_errors=True):
        assert "`module` must be the same on every rank" in str(error)
    for error in run_ranks(replicated_twice, 2, expects_errors=True):
        assert "not replicated yet, got one that is" in str(error)
    for error in run_ranks(replicated_on_meta, 2, expects_errors=True):
        assert "must have tables that hold data" in str(error)


def make_persistent(**options: Any) -> FastWeightProductKeyMemory:
    torch.manual_seed(0)
    options |= {"scope": "batch", "initial_memory": "persistent", "dtype": torch.float64}
    layer = FastWeightProductKeyMemory(WIDTH, chunk_size=4, **MEMORY, **options)
    return layer.to(rank_device() if dist.is_initialized() else "cpu")


def hidden_states(step: int) -> Tensor:
    x = torch.randn(4, 13, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x.to(rank_device() if dist.is_initialized() else "cpu")


def advanced(form: str, dp: DeviceMesh | None, mp: DeviceMesh | None = None, **options: Any) -> dict[str, Tensor]:
    """The memory, whole, after two calls, each with this rank's part of a batch."""
    layer = make_persistent(**options)
    if mp is not None:
        shard_table_(layer, mp)
    run: nn.Module = layer
    if form == "ddp":
        group = dp.get_group()
        run = DistributedDataParallel(layer if mp is None else replicate_tables_(layer, group), process_group=group)
    elif form == "fsdp":
        run = fully_shard(layer, mesh=dp)
        assert not isinstance(layer.keys, DTensor)
    for step in range(2):
        x = hidden_states(step)
        run(x if dp is None else x.chunk(dp.size())[dp.get_local_rank()]).sum().backward()
        advance_memory(layer, group=None if dp is None else dp.get_group())
    assert isinstance(layer.table.weight, DTensor) == (mp is not None)
    return {"keys": layer.keys, "table": whole(layer.table.weight)}


def advanced_by_means(**options: Any) -> dict[str, Tensor]:
    """The same of two ranks with half of the batch each, computed by one process."""
    layer = make_persistent(**options)
    for step in range(2):
        ends = []
        for half in hidden_states(step).chunk(2):
            layer(half)
            keys, rows, _ = layer._pending
            ends.append((keys, layer.table.weight.clone()))
            if isinstance(rows, Tensor):
                ends[-1][1].copy_(rows)
            else:
                apply_rows_(ends[-1][1], rows)
        for memory, *of_ranks in zip((layer.keys, layer.table.weight), *ends, strict=True):
            memory.copy_(sum(of_ranks) / 2)
    return {"keys": layer.keys, "table": layer.table.weight}


def advanced_on_two() -> dict[str, Any]:
    """By rows that calls have read, and by whole tables, which weight decay moves; or each rank with all tokens."""
    results = {
        f"{form} {decay}": advanced(form, make_mesh(2), weight_decay=decay)
        for form in ("ddp", "fsdp")
        for decay in (0.0, 0.1)
    }
    mesh = dist.device_mesh.init_device_mesh(rank_device().type, (2,), mesh_dim_names=("columns",))
    return results | {"columns alone": advanced("", None, mesh)}


def check_same(results: list[Any]) -> None:
    """Bit for bit on all ranks."""
    for result in results:
        for name in results[0]:
            for key, x in results[0][name].items():
                assert torch.equal(result[name][key], x), f"{name}, {key}"


def test_persistent_memories_on_two_ranks():
    results = run_ranks(advanced_on_two, 2)
    check_same(results)
    for decay in (0.0, 0.1):
        wanted = advanced_by_means(weight_decay=decay)
        for form in ("ddp", "fsdp"):
            assert_near(results[0][f"{form} {decay}"], wanted, 1e-12, f"{form} {decay}")
    assert_near(results[0]["columns alone"], advanced("", None), 1e-12, "columns alone")


def advanced_on_four() -> dict[str, Any]:
    mesh = make_mesh(2, 2)
    return {form: advanced(form, mesh["data"], mesh["columns"]) for form in ("ddp", "fsdp")}


def advanced_in_other_groups() -> list[str]:
    """What is said to groups whose ranks have different columns: all, those of a row, a diagonal; and of others."""
    mesh = make_mesh(2, 2)
    rank = dist.get_rank()
    diagonals = [dist.new_group(ranks) for ranks in ([0, 3], [1, 2])]
    others = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    layer = shard_table_(make_persistent(), mesh["columns"])
    layer(hidden_states(0))
    before, said = [layer.keys.clone(), layer.table.columns.clone()], []
    for group in (None, mesh["columns"].get_group(), diagonals[rank in (1, 2)], others[rank < 2]):
        with pytest.raises(ValueError, match="`group`") as raised:
            advance_memory(layer, group)
        said.append(str(raised.value))
        assert torch.equal(layer.keys, before[0])
        assert torch.equal(layer.table.columns, before[1])
    return said


def test_persistent_memories_by_columns_on_four_ranks():
    results = run_ranks(advanced_on_four, 4)
    check_same(results)
    for form, result in results[0].items():
        assert_near(result, advanced_by_means(), 1e-12, form)
    for said in run_ranks(advanced_in_other_groups, 4):
        assert all("the ranks that have the same columns" in text for text in said[:3])
        assert "must contain this rank" in said[3]


def clipped() -> dict[str, Any]:
    """Norms of gradients that are plain, by rows, by columns and replicated, and the gradients that are left."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (
        make_mesh(2),
        dist.device_mesh.init_device_mesh(rank_device().type, (2,), mesh_dim_names=("columns",)),
    )
    places = [None, None, (rows, Shard(0)), (columns, Shard(1)), (columns, Replicate())]
    results: dict[str, Any] = {}
    for kind in (2.0, 1.0, float("inf")):
        gradients = [torch.randn(4, 6, generator=generator).to(rank_device()) for _ in places]
        gradients[3][3, 5] = 9.0  # the largest of all is on the second rank alone
        one = [nn.Parameter(torch.zeros_like(x)) for x in gradients]
        several = []
        for parameter, x, place in zip(one, gradients, places, strict=True):
            parameter.grad = x.clone()
            x, zeros = (x.clone(), torch.zeros_like(x))
            if place is not None:
                x, zeros = (distribute_tensor(y, place[0], [place[1]]) for y in (x, zeros))
            several.append(nn.Parameter(zeros))
            several[-1].grad = x
        without = [nn.Parameter(torch.zeros(2, device=rank_device()))]
        expected = nn.utils.clip_grad_norm_(one, 1.5, kind)
        norm = clip_grad_norm_(iter(several + without), 1.5, kind)
        assert type(norm) is Tensor
        results[f"{kind}"] = [norm, *(whole(x.grad) for x in several)]
        results[f"{kind} of one"] = [expected, *(x.grad for x in one)]
        for x in one:
            x.grad.mul_(4)
        again = [x.grad.clone() for x in one]
        assert torch.equal(clip_grad_norm_(one, 1.5, kind), nn.utils.get_total_norm(again, kind))
    assert float(clip_grad_norm_(without, 1.0)) == 0.0
    one = nn.Parameter(torch.zeros(2))
    one.grad = torch.tensor([3.0, 4.0])
    assert float(clip_grad_norm_(one, 10.0)) == 5.0
    assert one.grad.tolist() == [3.0, 4.0]
    return results


def test_clip_grad_norm():
    """That of PyTorch for the whole gradients, to rounding, and the same bits on every rank."""
    results = run_ranks(clipped, 2)
    for result in results:
        for kind in ("2.0", "1.0", "inf"):
            for x, y, same in zip(result[kind], result[f"{kind} of one"], results[0][kind], strict=True):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
                assert torch.equal(x, same)


def streamed(scope: str) -> dict[str, Any]:
    """Pieces of sequences through a layer whose table fully_shard has spread by rows."""
    torch.manual_seed(0)
    layer = FastWeightProductKeyMemory(WIDTH, chunk_size=4, **MEMORY, scope=scope, dtype=torch.float64)
    layer.to(rank_device())
    x, said = hidden_states(0), []
    with torch.no_grad():
        memory = layer.new_memory(4)
        wanted = [layer(part, memory=memory) for part in x.split(5, dim=1)]

        def refuses(function: Any) -> None:
            with pytest.raises(RuntimeError, match="unshard") as raised:
                function()
            said.append(str(raised.value))

        fully_shard(layer.table, mesh=make_mesh(2))
        refuses(lambda: layer.new_memory(4))
        layer.table.unshard()
        memory = layer.new_memory(4)
        outputs = [layer(x[:, :5], memory=memory)]
        layer.table.reshard()
        refuses(memory.reset)
        refuses(lambda: layer(x[:, 5:10], memory=memory))
        if scope == "sequence":  # its memories read the layer's table where it lies
            refuses(lambda: pickle.dumps(memory))
            refuses(lambda: memory._memories.step(Tokens(x, x, None, None), None, layer.options, False))
        layer.table.unshard()
        outputs += [layer(part, memory=memory) for part in x[:, 5:].split(5, dim=1)]
        layer.table.unshard()
        fully_shard(layer, mesh=make_mesh(2))
        refuses(lambda: layer.new_memory(4))
    return {"wanted": wanted, "outputs": outputs, "said": said}


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_streams_over_rows(scope):
    for result in run_ranks(streamed, 2, scope):
        for x, y in zip(result["outputs"], result["wanted"], strict=True):
            assert torch.equal(x, y)
        *of_table, of_keys = result["said"]
        assert all(text.startswith("`table.weight` must be here") for text in of_table[:3])
        assert all("fully_shard has freed the table" in text for text in of_table[3:])
        assert len(of_table) == (5 if scope == "sequence" else 3)
        assert of_keys.startswith("`keys` must be here")
