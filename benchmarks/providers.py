"""What a provider is, and those that call this package, or its parts, in other ways than by one public function.

Each takes the arguments of the reference of the same operation, by name. Those of a stream take, for the initial keys
and values, a memory of their own that is kept between calls: see `Provider.own`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fwpkm_kernels as fwpkm
import reference
from benchmarks.inputs import PARAMETERS, Configuration, Inputs, Memory
from fwpkm_kernels.layers import FastWeightProductKeyMemory

#: The provider that the others are compared with.
PACKAGE = "fwpkm_kernels"
#: This package's steps as CUDA graphs.
GRAPHED = f"{PACKAGE}-graph"
#: A layer's projections and this package's operator, called one after the other: what the layer may cost.
COMPOSED = "projections + operator"


def is_package(provider: str) -> bool:
    """Whether a provider of this name is this package, in whatever way it is called: its numbers have to be right."""
    return provider.startswith(PACKAGE)


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute an operation; `run` takes the reference's arguments by name."""

    name: str
    run: Callable[..., Any]
    applies: Callable[[Configuration], bool] = lambda configuration: True
    #: whether a CUDA graph can hold it: no synchronisation with the host
    capturable: bool = True
    devices: tuple[str, ...] = ("cuda", "cpu")
    #: of an operation in place: arguments that replace those of the same name, and that `run` may write
    own: Callable[[Inputs], Inputs] = lambda inputs: {"values": inputs["values"].clone()}
    #: of one that replays CUDA graphs of its own: from the same arguments, a call that does nothing else
    replay: Callable[..., Callable[[], None]] | None = None


class GraphedMemory:
    """This package's state with its steps in CUDA graphs."""

    def __init__(self, memory: Memory, queries: Tensor, targets: Tensor, **options: Any):
        self.state = fwpkm.MemoryState(*memory)
        t = min(queries.shape[1], 8 * options["chunk_size"])  # a longer step replays the graph of eight chunks
        self.graph = fwpkm.MemoryGraph(self.state, queries[:, :t], targets[:, :t], **options)

    @property
    def keys(self) -> Tensor:
        return self.state.keys

    @property
    def values(self) -> Tensor:
        return self.state.values


def graph_replay(memory: GraphedMemory, queries: Tensor, **options: Any) -> Callable[[], None]:
    """The replays of such a step, without what `MemoryGraph` copies in and out; of less than a chunk, the reading."""
    graph = memory.graph
    captured, count = graph._read or graph._close, queries.shape[1] // graph._count

    def replay() -> None:
        for _ in range(count):
            captured.replay()

    return replay


def _split(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """A layer's parameters, by their names in its state_dict, and the memory's options."""
    parameters = {name: inputs[name] for name in PARAMETERS} | {"table.weight": inputs["values"]}
    kept = ("hidden_states", "values", "scope", *PARAMETERS)
    return parameters, {name: x for name, x in inputs.items() if name not in kept}


def reference_layer(*, hidden_states: Tensor, scope: str, **inputs: Any) -> Tensor:
    """The definition, on the CPU."""
    tensors = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    parameters, options = _split(tensors)
    heads, _, num_keys, _ = parameters["keys"].shape
    options |= {"heads": heads, "num_keys": num_keys, "scope": scope}
    return reference.fast_weight_layer(hidden_states.cpu(), parameters, **options).output


_bare_layer = functools.partial(FastWeightProductKeyMemory, device="meta")
_kept_layer = functools.lru_cache(maxsize=1)(_bare_layer)


def _layer(inputs: Inputs, make: Callable[..., FastWeightProductKeyMemory]) -> FastWeightProductKeyMemory:
    """The package's layer around these very tensors, so that gradients reach them."""
    parameters, options = _split(inputs)
    heads, _, num_keys, half = parameters["keys"].shape
    options |= {"heads": heads, "num_keys": num_keys, "key_dim": 2 * half, "scope": inputs["scope"]}
    layer = make(inputs["hidden_states"].shape[2], value_dim=inputs["values"].shape[1], **options)
    for name, x in parameters.items():
        module, _, leaf = name.rpartition(".")
        layer.get_submodule(module)._parameters[leaf] = x
    return layer


def package_layer(**inputs: Any) -> Tensor:
    return _layer(inputs, _kept_layer)(inputs["hidden_states"])


def own_layer_memory(inputs: Inputs) -> Inputs:
    layer = _layer(inputs, _bare_layer)
    return {"layer": layer, "memory": layer.new_memory(len(inputs["hidden_states"]))}


@torch.no_grad()
def package_layer_step(*, hidden_states: Tensor, layer: Any, memory: Any, **inputs: Any) -> Tensor:
    return layer(hidden_states, memory=memory)


class Projected(NamedTuple):
    """What a layer gives to its memory."""

    queries: Tensor  #: [B, T, H, Dk]
    targets: Tensor  #: [B, T, D]
    gates: Tensor  #: [B, T]


def project(hidden_states: Tensor, inputs: Inputs) -> Projected:
    """The three projections of a layer, with their norms."""

    def linear(name: str) -> Tensor:
        weight = inputs[f"{name}_norm.weight"]
        normed = F.rms_norm(hidden_states, weight.shape, weight, 1e-5)
        return F.linear(normed, inputs[f"{name}_proj.weight"], inputs[f"{name}_proj.bias"])

    heads, _, _, half = inputs["keys"].shape
    targets = linear("v")
    std, mean = torch.std_mean(targets, dim=-1, keepdim=True)
    queries = linear("q").unflatten(-1, (heads, 2 * half))
    return Projected(queries, (targets - mean) / (std + 1e-6), torch.sigmoid(linear("g")).squeeze(-1))


def mix(read: Tensor, projected: Projected, inputs: Inputs) -> Tensor:
    """What is read against what was to be written, through the last norm and projection."""
    gates, weight = projected.gates.unsqueeze(-1), inputs["o_norm.weight"]
    mixed = F.rms_norm(torch.lerp(projected.targets, read, gates), weight.shape, weight, 1e-5)
    return F.linear(mixed, inputs["o_proj.weight"], inputs["o_proj.bias"])


def composed_layer(memory: Callable[..., Any], *, hidden_states: Tensor, scope: str, **inputs: Any) -> Tensor:
    """A layer around `memory`, a function of a sequence, that does nothing but the mathematics."""
    _, options = _split(inputs)
    projected, of_all = project(hidden_states, inputs), (inputs["keys"], inputs["values"])

    def read(queries: Tensor, targets: Tensor, gates: Tensor) -> Tensor:
        return memory(queries, targets, *of_all, gates=gates, **options)[0]

    if scope == "batch":
        return mix(read(*projected), projected, inputs)
    documents = zip(*(x.split(1) for x in projected), strict=True)
    return mix(torch.cat([read(*document) for document in documents]), projected, inputs)


@torch.no_grad()
def composed_layer_step(*, hidden_states: Tensor, memory: Any, scope: str, **inputs: Any) -> Tensor:
    """The same, one step of a state; for one sequence."""
    projected = project(hidden_states, inputs)
    queries, targets, gates = projected
    read = fwpkm.fast_weight_memory_step(memory, queries, targets, gates=gates, **_split(inputs)[1])
    return mix(read, projected, inputs)


def without_values(run: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The output and the keys that a sequence leaves behind: what stands for the table differs."""

    def output_and_keys(**inputs: Any) -> tuple[Tensor, Tensor]:
        output, keys, *_ = run(**inputs)
        return output, keys

    return output_and_keys


def by_document(run: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A memory for each item of the batch: outputs [B, T, D] and keys [B, H, 2, n, Dk/2]."""

    def output_and_keys(*, queries: Tensor, targets: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        items = zip(queries.split(1), targets.split(1), strict=True)
        outputs, keys = zip(*(run(queries=q, targets=y, **inputs)[:2] for q, y in items), strict=True)
        return torch.cat(outputs), torch.stack(keys)

    return output_and_keys


def package_documents(*, queries: Tensor, targets: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    """`by_document` in one call, of items that are packed one behind the other, with a sparse gradient of the table."""
    batch, length = queries.shape[:2]
    bounds = torch.arange(0, (batch + 1) * length, length, device="cpu")
    tokens = {"queries": queries.flatten(0, 1), "targets": targets.flatten(0, 1), "cu_seqlens": bounds}
    result = fwpkm.fast_weight_memory_varlen(**tokens, **inputs, sparse_grad=True)
    return result.output.view(targets.shape), result.keys


def own_written(inputs: Inputs) -> Inputs:
    """A state whose rows in `slots` have been written; its keys have no width, so that the table is what is moved."""
    values = inputs["values"]
    state = fwpkm.MemoryState(values.new_zeros(1, 2, math.isqrt(len(values)), 0), values)
    state.values[inputs["slots"].flatten()] += 1.0
    return {"values": state.values, "state": state}


def package_reset(values: Tensor, slots: Tensor, state: fwpkm.MemoryState, *, touched_rows_only: bool = False) -> None:
    state._touched.index_fill_(0, slots.flatten(), 1)  # as the steps that wrote these rows have noted
    state.reset(touched_rows_only=touched_rows_only)
