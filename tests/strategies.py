"""Hypothesis strategies for the inputs of every operation: what the fuzzer and the property tests draw.

A strategy draws a `Case`: plain data, whose repr is Python that makes it again. Its tensors are made from it by
`make_tensors`. Strategies shrink to small and plain cases: the simplest choice always comes first.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fwpkm_kernels import testing
from fwpkm_kernels.options import STEPS

#: What hypothesis draws, by the name of the function or method that is called.
OPERATIONS = (
    "product_key_lookup",
    "sparse_value_gather",
    "chunk_value_update",
    "chunk_value_update_",
    "product_key_update",
    "fast_weight_memory",
    "fast_weight_memory_step",
    "fast_weight_memory_varlen",
    "fast_weight_layer",
)
#: How the tokens of a layer's batch belong together: rows, padded rows, packed documents, and those with padding.
ARRANGEMENTS = ("rows", "left", "right", "inside", "packed", "packed and padded")
#: Kinds of numbers in a tensor, beside normal ones.
FILLS = ("zeros", "same", "tiny", "denormal", "huge", "extreme", "nan", "inf")
#: Those that keep the order and the ties of the scores of integer keys.
EXACT_FILLS = ("same", "zeros")
FLOATS = ("float32", "bfloat16", "float16")
LAYOUTS = tuple(layout for layout in testing.LAYOUTS if layout != "contiguous")
MASKS = ("bool", "int64", *FLOATS)
#: What a stream may do between its steps; "no gates": the next one is given neither gates nor mask.
RESETS = ("reset", "reset of touched rows")
ACTIONS = ("clone", "state_dict", "pickle", "select", *RESETS, "rollback", "no gates")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        op: one of OPERATIONS.
        sizes: by name, as the docstrings have them.
        dtypes: of the tensors, by name; an optional tensor that is missing here is None.
        layouts: one of LAYOUTS for each tensor that is not contiguous; "cotangent" is the incoming gradient.
        fills: one of FILLS for each tensor whose numbers are not normal.
        pattern: one of `testing.KEY_PATTERNS`, or of `testing.SLOT_PATTERNS`; of a layer, one of ARRANGEMENTS.
        options: the other arguments.
        actions: of a stream: numbers of tokens, and ACTIONS; of a memory: how many tokens its segments have; of packed
            documents: how many each segment has of each, segment by segment.
        seed: of all numbers.
    """

    op: str
    sizes: dict[str, int]
    dtypes: dict[str, str]
    layouts: dict[str, str] = dataclasses.field(default_factory=dict)
    fills: dict[str, str] = dataclasses.field(default_factory=dict)
    pattern: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    actions: tuple[int | str, ...] = ()
    seed: int = 0

    @property
    def is_double(self) -> bool:
        return "float64" in self.dtypes.values()

    @property
    def segments(self) -> list[list[int]]:
        """Of packed documents: how many tokens each segment has of each document."""
        count = self.sizes["S"]
        return [[int(x) for x in self.actions[i : i + count]] for i in range(0, len(self.actions), count)]


def make_tensors(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    """The tensor arguments by name, in their dtypes and layouts."""
    generator = torch.Generator().manual_seed(case.seed)
    numbers = MAKERS[KINDS[case.op]](case, generator)
    tensors = {}
    for name, dtype_name in case.dtypes.items():
        dtype = getattr(torch, dtype_name)
        x = numbers[name]
        if name == "mask" and not dtype.is_floating_point:
            x = (x > 0).double()
        if name in case.fills:
            x = filled(x, case.fills[name], dtype, generator)
        tensors[name] = testing.with_layout(x.to(device, dtype), case.layouts.get(name, "contiguous"))
    return tensors


def filled(x: Tensor, fill: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Other numbers in `x`, as far from 1 as `dtype` has room for.

    - "zeros"; "same": all rows are the first one.
    - "tiny", "huge": squares are still normal and finite. "denormal"; "extreme": sums of many overflow, and products.
    - "nan", "inf" (of both signs): at one element in eight, and at least at one.
    """
    if x.numel() == 0:
        return x
    if fill == "zeros":
        return torch.zeros_like(x)
    if fill == "same":
        rows = x.reshape(-1, x.shape[-1])
        return rows[:1].expand_as(rows).reshape(x.shape)
    if fill in ("nan", "inf"):
        hit = torch.rand(x.shape, generator=generator) < 1 / 8
        hit.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = True
        return torch.where(hit, math.nan if fill == "nan" else x.sign() * math.inf, x)
    info = torch.finfo(dtype)
    narrow = dtype == torch.float16
    factors = {
        "tiny": 2.0**-5 if narrow else 2.0**-60,
        "huge": 2.0**6 if narrow else 2.0**40,
        "denormal": info.tiny / 8,
        "extreme": info.max / (8 if narrow else 2**16),
    }
    return (x * factors[fill]).clamp(-info.max, info.max)


def _lookup(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    s = case.sizes
    return testing.make_lookup_inputs(
        s["rows"], s["H"], s["n"], s["Dk"], key_pattern=case.pattern, dtype=torch.float64, seed=generator
    )._asdict()


def _gather(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    s = case.sizes
    return testing.make_gather_inputs(
        s["rows"], s["J"], s["N"], s["D"], slot_pattern=case.pattern, dtype=torch.float64, seed=generator
    )._asdict()


def _update(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    s = case.sizes
    numbers = testing.make_update_inputs(
        s["rows"], s["J"], s["N"], s["D"], slot_pattern=case.pattern, gates=True, mask="real", dtype=torch.float64,
        seed=generator,
    )._asdict()  # fmt: skip
    scale = torch.randn(s["rows"], generator=generator, dtype=torch.float64)
    count_slots = testing.make_slots((3, 5, 7), s["N"], "zipf", seed=generator)
    return numbers | {"scale": scale, "count_slots": count_slots}


def _memory(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    s = case.sizes
    return testing.make_memory_inputs(
        s["B"], s["T"], s["H"], s["n"], s["Dk"], s["D"], key_pattern=case.pattern, gates=True, mask="real",
        dtype=torch.float64, seed=generator,
    )._asdict()  # fmt: skip


def _varlen(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Packed documents: a memory's tensors without a batch, keys for all or for each, bounds and given rows."""
    s = case.sizes
    lengths = torch.tensor(case.segments).sum(0)
    sizes = s | {"B": 1, "T": int(lengths.sum())}
    memories = [
        _memory(dataclasses.replace(case, sizes=sizes if i == 0 else sizes | {"T": 0}), generator)
        for i in range(s["S"] if s["own keys"] else 1)
    ]
    numbers = {name: x if name in ("keys", "values") else x[0] for name, x in memories[0].items()}
    if s["own keys"]:
        numbers["keys"] = torch.stack([x["keys"] for x in memories])
    row_slots = torch.randperm(s["S"] * s["n"] ** 2, generator=generator)[: s.get("R", 0)]
    unused = torch.rand(len(row_slots), generator=generator) < 1 / 8
    row_values = torch.randn(len(row_slots), s["D"], generator=generator, dtype=torch.float64)
    return numbers | {
        "cu_seqlens": torch.cat((torch.zeros(1), lengths.cumsum(0))),
        "row_slots": row_slots.masked_fill(unused, -1),
        "row_values": row_values,
    }


def _layer(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Hidden states, and where tokens are arranged so a mask and the borders of documents, some of them empty."""
    batch, length = case.sizes["B"], case.sizes["T"]
    hidden_states = torch.randn(batch, length, case.sizes["d"], generator=generator, dtype=torch.float64)
    counts = torch.randint(0, length + 1, (batch, 1), generator=generator)
    ranks = torch.rand(batch, length, generator=generator).argsort(1)
    place = {"left": torch.arange(length).flip(0).expand(batch, -1), "right": torch.arange(length).expand(batch, -1)}
    inner = torch.randint(0, length + 1, (case.sizes["S"] - 1,), generator=generator).sort().values
    bounds = torch.cat((torch.tensor([0]), inner, torch.tensor([length])))
    return {
        "hidden_states": hidden_states,
        "attention_mask": (place.get(case.pattern, ranks) < counts).double(),
        "cu_seqlens": bounds.double(),
    }


def size(*most: int, least: int = 1) -> st.SearchStrategy[int]:
    """From `least` to each of `most`, one as likely as the other."""
    bounds = [least - 1, *most]
    return st.one_of([st.integers(low + 1, high) for low, high in itertools.pairwise(bounds)])


def choose(*choices: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(choices)


def mostly(*choices: Any, seldom: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of `choices`, and in about one case of eight one of `seldom`, in which little happens."""
    times = max(1, round(7 * len(seldom) / len(choices)))
    return st.sampled_from([*(choices * times), *seldom])


@st.composite
def draw_dtypes(draw: st.DrawFn, always: Sequence[str], optional: Sequence[str] = ()) -> dict[str, str]:
    """Dtypes of the tensors there are: all float64, all float32, or any of the narrower ones beside each other."""
    kind = draw(choose("float32", "float64", "mixed"))
    dtypes = {}
    for name in (*always, *(name for name in optional if draw(st.booleans()))):
        if "slots" in name:
            dtypes[name] = draw(choose("int64", "int32"))
        elif name == "mask":
            dtypes[name] = draw(choose("bool", "int64", "float64") if kind == "float64" else choose(*MASKS))
        else:
            dtypes[name] = draw(choose(*FLOATS)) if kind == "mixed" else kind
    return dtypes


@st.composite
def draw_layouts(draw: st.DrawFn, names: Sequence[str], dense: Sequence[str] = ()) -> dict[str, str]:
    """Layouts of some tensors; those named in `dense` are not expanded."""
    if not draw(st.booleans()):
        return {}
    layouts = {name: draw(choose("contiguous", *(x for x in LAYOUTS if x != "expanded" or name not in dense)))
               for name in (*names, "cotangent")}  # fmt: skip
    return {name: layout for name, layout in layouts.items() if layout != "contiguous"}


@st.composite
def draw_fills(draw: st.DrawFn, dtypes: dict[str, str], small: bool) -> dict[str, str]:
    """One kind of unusual numbers, in some of the tensors, in one case of two."""
    names = [name for name in dtypes if "slots" not in name]
    fills = list(FILLS)
    if small and "bfloat16" in dtypes.values():
        fills.remove("denormal")  # Triton's interpreter reads such bfloat16 numbers as others
    fill = draw(st.one_of(st.none(), choose(*fills)))
    if fill is None:
        return {}
    chosen = draw(st.lists(choose(*names), min_size=1, max_size=len(names), unique=True))
    # a mask is not negative, and an integer one holds little
    return {name: fill for name in names if name in chosen and (name != "mask" or fill == "zeros")}


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**16)


@st.composite
def keyed_sizes(draw: st.DrawFn, rows: st.SearchStrategy[int], most_keys: Sequence[int]) -> tuple[dict[str, int], int]:
    """Sizes of queries and keys, and K: 1 and n among others."""
    n = draw(size(*most_keys, least=2)) if draw(mostly(True, seldom=[False])) else 1
    top_k = draw(mostly(*range(1, min(n, 9)), seldom=[min(n, 64)])) if n > 1 else 1
    sizes = {"rows": draw(rows), "H": draw(size(1, 3)), "n": n, "Dk": 2 * draw(size(3, 20))}
    return sizes, top_k


@st.composite
def lookups(draw: st.DrawFn, op: str, small: bool) -> Case:
    """Of a lookup, and of a key step, which looks up too."""
    step = op == "product_key_update"
    rows = size(3, 6, least=0) if small else size(4, 40, least=0)
    sizes, top_k = draw(keyed_sizes(rows, (4, 12) if small else (6, 40) if step else (6, 40, 150)))
    names = ("queries", "keys")
    options = {"top_k": top_k, "score": draw(choose("idw", "dot")), "eps": draw(choose(1e-3, 0.3, 1e-6))}
    if step:
        options |= {
            "lr": draw(mostly(1.0, 0.3, seldom=[0.0])),
            "weight": draw(mostly(1.0, -2.5, seldom=[0.0])),
            "weight_decay": draw(choose(0.0, 0.05)),
            "clip": draw(mostly(None, 0.02, 10.0, seldom=[0.0])),
        }
    options["precision"] = draw(choose("tf32x3", "ieee") if step else choose("tf32x3", "ieee", "tf32"))
    dtypes = draw(draw_dtypes(names))
    return Case(
        op, sizes, dtypes, draw(draw_layouts(names)), draw(draw_fills(dtypes, small)),
        draw(choose(*testing.KEY_PATTERNS)), options, seed=draw(seeds()),
    )  # fmt: skip


@st.composite
def slotted_sizes(draw: st.DrawFn, small: bool) -> tuple[dict[str, int], str]:
    """Sizes of a table and of the accesses to it, and a pattern of slots: up to many times PIECE on one slot."""
    sizes = {
        "rows": draw(size(4, 20) if small else size(6, 40, 130)) - draw(choose(0, 0, 0, 1)),
        "J": draw(size(3, 10) if small else size(4, 20, 40)),
        "N": draw(size(4, 20) if small else size(8, 70)),
        "D": draw(size(4, 20) if small else size(8, 40, 1100)),
    }
    distinct = sizes["rows"] * sizes["J"] <= sizes["N"]
    pattern = draw(choose(*(x for x in testing.SLOT_PATTERNS if distinct or x != "distinct")))
    return sizes, pattern


@st.composite
def gathers(draw: st.DrawFn, op: str, small: bool) -> Case:
    sizes, pattern = draw(slotted_sizes(small))
    names = ("values", "slots", "weights")
    dtypes = draw(draw_dtypes(names))
    return Case(
        op, sizes, dtypes, draw(draw_layouts(names)), draw(draw_fills(dtypes, small)), pattern,
        {"sparse_grad": draw(st.booleans())}, seed=draw(seeds()),
    )  # fmt: skip


@st.composite
def updates(draw: st.DrawFn, op: str, small: bool) -> Case:
    sizes, pattern = draw(slotted_sizes(small))
    dtypes = draw(
        draw_dtypes(("values", "slots", "weights", "targets", "predictions"), ("gates", "mask", "scale", "count_slots"))
    )
    names = tuple(dtypes)
    options = {
        "lr": draw(mostly(1.0, 0.3, -1.7, seldom=[0.0])),
        "weight_decay": draw(choose(0.0, 0.1)),
        "clip": draw(mostly(None, 0.2, 10.0, seldom=[0.0])),
    }
    if "scale" not in dtypes and draw(st.booleans()):
        options["scale"] = 0.7
    dense = ("values",) if op.endswith("_") else ()
    return Case(
        op, sizes, dtypes, draw(draw_layouts(names, dense)), draw(draw_fills(dtypes, small)), pattern, options,
        seed=draw(seeds()),
    )  # fmt: skip


@st.composite
def memory_options(draw: st.DrawFn, small: bool) -> tuple[int, dict[str, Any]]:
    """n, and every option of the whole memory, drawn jointly."""
    chunk_size = draw(st.integers(1, 3 if small else 5))
    num_keys = draw(mostly(*range(2, 4 if small else 7), seldom=[1]))
    return num_keys, {
        "chunk_size": chunk_size,
        "top_k": draw(mostly(*range(1, num_keys), seldom=[num_keys])) if num_keys > 1 else 1,
        "lookahead": draw(mostly(*range(1, chunk_size + 1), seldom=[0])),
        "score": draw(choose("idw", "dot")),
        "eps": draw(choose(1e-3, 0.3)),
        "weighting": draw(choose("softmax", "silu", "relu")),
        "temperature": draw(choose(1.0, 0.6, 3.0)),
        "lr": draw(mostly(1.0, 0.3, seldom=[0.0])),
        "weight_decay": draw(choose(0.0, 0.05)),
        "clip": draw(mostly(None, 0.02, 10.0, seldom=[0.0])),
        "addressing_weight": draw(choose(1.0, 0.2, 0.0)),
        "key_gradient": draw(choose("addressing", "all")),
        "step": draw(choose(*STEPS)),
        "precision": draw(choose("tf32x3", "ieee")),
    }


@st.composite
def memories(draw: st.DrawFn, op: str, small: bool) -> Case:
    num_keys, options = draw(memory_options(small))
    options["boundary"] = draw(choose("carry", "drop"))
    if options["weight_decay"] == 0.0 and options["key_gradient"] == "addressing" and draw(st.booleans()):
        options |= {"final": "rows", "sparse_grad": draw(st.booleans())}
    chunk_size = options["chunk_size"]
    several = st.integers(chunk_size + 1, min(3 * chunk_size + 2, 7 if small else 17))
    length = draw(several) if draw(mostly(True, seldom=[False])) else draw(st.integers(0, chunk_size))
    cuts: list[int] = []
    if options["boundary"] == "carry" and not options.get("sparse_grad") and draw(st.booleans()):
        cuts = draw(st.lists(choose(0, 1, chunk_size - 1, chunk_size, chunk_size + 1), min_size=1, max_size=4))
    case = draw(memory_case(op, small, num_keys, options, length, cuts))
    return dataclasses.replace(case, actions=()) if is_half(case) else case


def is_half(case: Case) -> bool:
    """Such a memory is not cut into segments: between them the gradient of a table is rounded to its dtype, which the
    budgets of a sequence leave out."""
    return bool({case.dtypes["keys"], case.dtypes["values"]} & {"float16", "bfloat16"})


@st.composite
def memory_case(
    draw: st.DrawFn, op: str, small: bool, num_keys: int, options: dict[str, Any], length: int, cuts=()
) -> Case:
    """The rest of a case of the whole memory, or of its streaming."""
    own_rows = ("row_values",) if op == "fast_weight_memory_varlen" else ()
    dtypes = draw(draw_dtypes(("queries", "targets", "keys", "values"), ("gates", "mask", *own_rows)))
    if "row_values" in dtypes:
        dtypes["row_values"] = dtypes["values"]
    sizes = {
        "B": draw(mostly(*range(1, 3 if small else 4), seldom=[0])) if draw(st.booleans()) else 1,
        "T": length,
        "H": draw(st.integers(1, 2)),
        "n": num_keys,
        "Dk": 2 * draw(st.integers(1, 3)),
        "D": draw(size(4) if small else size(4, 33)),
    }
    fills = draw(draw_fills(dtypes, small))
    if options["key_gradient"] == "all" and set(fills.values()) & {"huge", "extreme"}:
        fills = {next(iter(fills)): "huge"}  # in whose gradients are products of many factors
    pattern = draw(choose(*testing.KEY_PATTERNS))
    return Case(
        op, sizes, dtypes, draw(draw_layouts(tuple(dtypes))), fills, pattern, options, tuple(cuts), draw(seeds())
    )


@st.composite
def streams(draw: st.DrawFn, op: str, small: bool) -> Case:
    """Cuts into single tokens, to a chunk's end, over several chunks; between them the state is copied or reset."""
    num_keys, options = draw(memory_options(small))
    chunk_size = options["chunk_size"]
    cuts: list[int | str] = []
    position = 0
    steps = ("one token", "to the end of a chunk", "a chunk", "any")
    kinds = choose(*steps, *steps, *ACTIONS)
    for kind in [*draw(st.lists(kinds, min_size=1, max_size=2 if small else 7)), draw(choose(*steps))]:
        if kind in ACTIONS:
            cuts.append(kind)
            position = 0 if kind in RESETS else position
            continue
        most = 2 * chunk_size + 1
        lengths = {"one token": 1, "to the end of a chunk": chunk_size - position % chunk_size, "a chunk": chunk_size}
        cuts.append(lengths[kind] if kind in lengths else draw(st.integers(0, most)))
        position += cuts[-1]
    return draw(memory_case(op, small, num_keys, options, longest(cuts), cuts))


def longest(cuts: Sequence[int | str]) -> int:
    """Most tokens that a stream reads between two resets."""
    most = position = 0
    for cut in cuts:
        position = 0 if cut in RESETS else position + (cut if isinstance(cut, int) else 0)
        most = max(most, position)
    return most


@st.composite
def packed_documents(draw: st.DrawFn, op: str, small: bool) -> Case:
    """Documents around a chunk's length, whole or in segments, with keys and rows of their own or without."""
    num_keys, options = draw(memory_options(small))
    chunk_size = options["chunk_size"]
    options["boundary"] = draw(choose("carry", "drop"))
    options["sparse_grad"] = options["key_gradient"] == "addressing" and draw(st.booleans())
    count = draw(mostly(*range(1, 3 if small else 5), seldom=[4 if small else 12]))
    around = choose(*sorted({chunk_size + 1, 0, 1, chunk_size - 1, chunk_size}))
    length = around if count > 4 else st.one_of(around, st.integers(0, 5 if small else 3 * chunk_size + 2))
    segments = 1
    if options["boundary"] == "carry":
        segments = draw(choose(1, 2, 2, 3))
    actions = draw(st.lists(length, min_size=segments * count, max_size=segments * count))
    case = draw(memory_case(op, small, num_keys, options, 0, actions))
    sizes = {"S": count, **case.sizes, "own keys": draw(st.integers(0, 1))}
    dtypes = case.dtypes | {"cu_seqlens": draw(choose("int64", "int32"))}
    if "row_values" in dtypes:
        sizes["R"] = draw(st.integers(0, min(count * num_keys**2, 6 if small else 20)))
        dtypes["row_slots"] = "int64"
    del sizes["B"], sizes["T"]
    case = dataclasses.replace(case, sizes=sizes, dtypes=dtypes)
    if is_half(case):
        case = dataclasses.replace(case, actions=tuple(map(sum, zip(*case.segments, strict=True))))
    return case


@st.composite
def layers(draw: st.DrawFn, op: str, small: bool) -> Case:
    """A fast-weight layer: every option, documents and padding; and where it can stream, pieces to cut it into."""
    num_keys, options = draw(memory_options(small))
    chunk_size = options["chunk_size"]
    arrangement = draw(choose(*ARRANGEMENTS))
    sizes = {
        "B": 1 if arrangement.startswith("packed") else draw(mostly(1, 2, seldom=[0])),
        "T": draw(st.integers(0, 7 if small else 3 * chunk_size + 3)),
        "S": draw(st.integers(1, 2 if small else 5)),
        "H": draw(st.integers(1, 2)),
        "n": num_keys,
        "Dk": 2 * draw(st.integers(1, 3)),
        "D": draw(size(5, least=2)),
        "d": draw(size(5)),
    }
    options |= {
        "boundary": draw(choose("carry", "drop")),
        "scope": draw(choose("sequence", "batch")),
        "query_conv": draw(choose(None, 1, 2, 5)),
        "input_norm": draw(st.booleans()),
        "query_norm": draw(choose(None, "l2", "zscore" if sizes["Dk"] > 1 else None)),
        "value_norm": draw(choose("zscore", None, "l2")),
        "gate": draw(st.booleans()),
        "write_gate": draw(st.booleans()),
    }
    kinds = ["learned", "frozen"] + ["persistent"] * (options["scope"] == "batch")
    options["initial_memory"] = draw(choose(*kinds))
    dtypes = {"hidden_states": "float64"}
    if arrangement != "rows" and arrangement != "packed":
        dtypes["attention_mask"] = draw(choose("int64", "bool", "float64"))
    if arrangement.startswith("packed"):
        dtypes["cu_seqlens"] = draw(choose("int64", "int32"))
    cuts: list[int | str] = []
    if options["boundary"] == "carry" and "cu_seqlens" not in dtypes:
        left = sizes["T"]
        while left:
            cuts += ["rollback"] if draw(mostly(False, seldom=[True])) else []
            cuts.append(draw(st.integers(1, left)))
            left -= int(cuts[-1])
        cuts = cuts or [0]
    return Case(op, sizes, dtypes, {}, {}, arrangement, options, tuple(cuts), draw(seeds()))


MAKERS: dict[str, Callable[[Case, torch.Generator], dict[str, Tensor]]] = {
    "lookup": _lookup,
    "gather": _gather,
    "update": _update,
    "memory": _memory,
    "varlen": _varlen,
    "layer": _layer,
}
#: How an operation's tensors are made.
KINDS = {
    "product_key_lookup": "lookup",
    "sparse_value_gather": "gather",
    "chunk_value_update": "update",
    "chunk_value_update_": "update",
    "product_key_update": "lookup",
    "fast_weight_memory": "memory",
    "fast_weight_memory_step": "memory",
    "fast_weight_memory_varlen": "varlen",
    "fast_weight_layer": "layer",
}


def of_few_sizes(case: Case) -> Case:
    """The same with the nearest of a few sizes, for which kernels are compiled; those that only vary at run time stay.
    One, and all of a half, stay what they are."""
    sizes, options = dict(case.sizes), dict(case.options)
    is_all = options.get("top_k") == sizes.get("n")
    for name, few in (("n", 5), ("Dk", 6), ("D", 33), ("J", 20), ("H", 2)):
        if sizes.get(name, 1) > 1:
            sizes[name] = few
    if options.get("top_k", 1) > 1:
        options["top_k"] = sizes["n"] if is_all else 3
    if case.pattern == "distinct" and "N" in sizes:
        sizes["N"] = max(sizes["N"], sizes["rows"] * sizes["J"])
    return dataclasses.replace(case, sizes=sizes, options=options)


def cases(op: str, *, small: bool = False) -> st.SearchStrategy[Case]:
    """Cases of one of OPERATIONS; `small` ones are for Triton's interpreter."""
    strategies: dict[str, Callable[..., st.SearchStrategy[Case]]] = {
        "lookup": lookups,
        "gather": gathers,
        "update": updates,
        "memory": streams if op == "fast_weight_memory_step" else memories,
        "varlen": packed_documents,
        "layer": layers,
    }
    return strategies[KINDS[op]](op, small)
