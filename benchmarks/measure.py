"""One measurement: the provider's numbers are checked against the reference, then timed. Wrong numbers get no time."""

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from benchmarks.costs import Cost
from benchmarks.inputs import Inputs
from benchmarks.providers import Provider
from benchmarks.registry import Row
from benchmarks.verify import Shared, verify
from fwpkm_kernels import env_report

#: Larger than the L2 cache of any GPU: read before each timed call.
_FLUSH_BYTES = 256 * 2**20
#: How the message begins where calls could not be captured; torch then refuses every later capture of the process.
NO_GRAPH = "no CUDA graph"

Call = Callable[[], Any]
#: Microseconds of single calls, going round `calls` for about so many seconds.
Clock = Callable[[Sequence[Call], float], list[float]]


@dataclasses.dataclass
class Result:
    """One line of the results: a row, a provider, its time and the floor. Times are in microseconds."""

    operation: str
    direction: str
    configuration: str
    provider: str
    dtype: str
    #: the configuration: tokens, sub_keys, picks and so on
    sizes: dict[str, Any]
    kind: str
    device: str
    bandwidth_gb_s: float
    matmul_tflop_s: float
    commit: str | None
    versions: dict[str, str | None]
    shapes: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    bytes: int = 0
    flops: int = 0
    floor_us: float = 0.0
    #: "ok"; "wrong" if the check against the reference failed; "error" if it raised
    status: str = "ok"
    message: str = ""
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    min_us: float | None = None
    repeats: int = 0
    #: per call when calls on changing inputs are replayed from one CUDA graph: device time without launches; of a
    #: provider that replays a graph of its own, the replay alone, without copies in and out
    graph_us: float | None = None
    #: time / floor, and graph_us / floor
    ratio: float | None = None
    graph_ratio: float | None = None
    #: memory of tensors that a call needs on top of its inputs, results included
    peak_bytes: int | None = None

    @property
    def row(self) -> str:
        return f"{self.operation}/{self.direction}/{self.configuration}"

    @property
    def time_us(self) -> float | None:
        """What is compared: the median on GPUs; the minimum on CPUs, whose other work only ever adds to a time."""
        return self.median_us if self.kind == "cuda" else self.min_us


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where it runs, and the two ceilings that were measured there: the fields of a `Result` by the same names."""

    kind: str  #: "cpu" or "cuda"
    device: str  #: its name
    bandwidth_gb_s: float  #: of a large copy, read and written
    matmul_tflop_s: float  #: of a large matrix product: tf32 on GPUs, float32 on CPUs
    commit: str | None
    versions: dict[str, str | None]

    def floor_us(self, cost: Cost) -> float:
        flops = cost.flops * (cost.passes if self.kind == "cuda" else 1)
        return max(cost.bytes / self.bandwidth_gb_s / 1e3, flops / self.matmul_tflop_s / 1e6)


def measure_machine(kind: str) -> Machine:
    """Measure the ceilings of `kind`, "cpu" or "cuda"."""
    report, on_gpu = env_report.collect(), kind == "cuda"
    size, n = (2**30, 8192) if on_gpu else (2**28, 2048)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=kind)
    target = torch.empty_like(source)
    a, b = torch.randn(2, n, n, device=kind)
    repeats, clock = 10, time_cuda if on_gpu else time_cpu
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if on_gpu else "highest")
        copy_us = min(clock([lambda: target.copy_(source)], 2.0, least=repeats))
        matmul_us = min(clock([lambda: a @ b], 2.0, least=repeats))
    finally:
        torch.set_float32_matmul_precision(precision)
    about = report | report["torch"] | {"torch": report["torch"]["version"]}
    return Machine(
        kind,
        torch.cuda.get_device_name() if on_gpu else report["cpu"]["model"],
        2 * size / copy_us / 1e3,
        2 * n**3 / matmul_us / 1e6,
        report["commit"],
        {name: about[name] for name in ("python", "torch", "triton", "cuda", "hip", "driver", "fwpkm_kernels")},
    )


def prepare(row: Row, provider: Provider, inputs: Inputs) -> Call:
    """The call that is timed. Backward keeps its graph, so that it can run again; what it needs of forward is ready."""
    if row.direction == "forward":
        return lambda: provider.run(**inputs)
    leaves = {name: inputs[name].detach().requires_grad_() for name in row.wrt}
    cotangent = row.cotangent(inputs)

    def forward() -> tuple[Tensor, ...]:
        result = provider.run(**{**inputs, **leaves})
        return result if isinstance(result, tuple) else (result,)

    if row.direction == "both":

        def both() -> Any:
            results = forward()  # kept till backward has run, as in training: the final memory is among them
            return torch.autograd.grad([results[0]], list(leaves.values()), [cotangent])

        return both
    out = forward()[0]
    cotangent = cotangent.to(out.dtype)
    edge = get_gradient_edge(out)  # keeps the graph without the output, which may be a whole table
    return lambda: torch.autograd.grad([edge], list(leaves.values()), [cotangent], retain_graph=True)


def number_of_repeats(seconds: float, once_us: float, least: int) -> int:
    return int(max(least, min(1000, seconds * 1e6 / max(once_us, 1.0))))


def _time_once(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def warm_up(calls: Sequence[Call], seconds: float) -> float:
    """Run the calls once, less if that takes long; microseconds that the quickest took."""
    samples: list[float] = []
    for call in calls:  # the first touch of a page of a new table costs more than the row on it
        samples.append(_time_once(call))
        if sum(samples) > 2e6 * seconds:
            break
    return min(samples)


def time_cpu(calls: Sequence[Call], seconds: float, *, least: int = 3) -> list[float]:
    """Wall-clock microseconds of one call after another, going round `calls`, for about `seconds` seconds."""
    count = number_of_repeats(seconds, warm_up(calls, seconds), least)
    return [_time_once(call) for call in itertools.islice(itertools.cycle(calls), count)]


def time_cuda(calls: Sequence[Call], seconds: float, *, least: int = 10) -> list[float]:
    """Microseconds between device events around single calls, each with a cold L2 cache, going round `calls`."""
    # Not overwritten: lines that are dirty would be written back while the call is timed.
    flush = torch.zeros(_FLUSH_BYTES // 4, device="cuda")

    def run(count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for i, (start, end) in enumerate(pairs):
            flush.sum()
            start.record()
            calls[i % len(calls)]()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in pairs]

    for call in calls:  # compiles, and fills the allocator's cache
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run(3)
    return run(number_of_repeats(seconds, (time.perf_counter() - begin) / 3 * 1e6, least))


def time_graph(calls: Sequence[Call], seconds: float, stream: "torch.cuda.Stream") -> float:
    """Microseconds per call when all of `calls` are replayed from one CUDA graph: the median over replays."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    samples = time_cuda([graph.replay], seconds, least=5)
    return quantile(samples, 0.5) / len(calls)


def allocations_cpu(call: Call) -> list[int]:
    """Bytes that torch's CPU allocator gives in a call, and, negative, those that it takes back, in their order.

    Tensors only, as on a GPU: scratch memory inside a library's routine is not seen.
    """
    with _silent_errors(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = call()  # until the profile is over, so that giving it back is no part of the call
    del kept
    assert profile.kineto_results is not None
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes = [event for event in changes if event.device_type() == torch.autograd.DeviceType.CPU]
    return [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]


def peak_cpu(call: Call) -> int:
    """Bytes that one call needs at its peak, besides those that were there before."""
    return max(itertools.accumulate(allocations_cpu(call), initial=0))


@contextlib.contextmanager
def _silent_errors() -> Iterator[None]:
    """The profiler writes to the process's standard error that it starts and stops, through any progress bar."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def quantile(samples: Sequence[float], q: float) -> float:
    return sorted(samples)[round(q * (len(samples) - 1))]


def measure(
    row: Row,
    provider: Provider,
    machine: Machine,
    *,
    seconds: float = 0.5,
    shared: Shared | None = None,
    clock: Clock = time_cpu,
    graphs: bool = True,
    is_right: bool = False,
) -> Result:
    """Check, then time. Never raises for what a row or provider does: the result says "wrong" or "error" and why.

    `shared` may be the same for all providers of a row. `clock` is the one of CPUs, and only with `graphs` are calls
    captured on GPUs too. `is_right` on a CPU: the numbers have been checked before.
    """
    shared = Shared(row, machine.kind) if shared is None else shared
    result = no_result(row, provider, machine)
    try:
        inputs, cost = shared.inputs, shared.cost
        result.shapes = {name: list(x.shape) for name, x in inputs.items() if isinstance(x, Tensor)}
        result.bytes, result.flops, result.floor_us = cost.bytes, cost.flops, machine.floor_us(cost)
        if machine.kind == "cuda":
            _measure_cuda(result, row, provider, shared, seconds, graphs)
        else:
            if not is_right:
                verify(provider, shared)
            # Each set that is prepared for backward costs a forward, of seconds where it is dense.
            count = 8 if row.direction == "forward" else 2
            calls = [prepare(row, provider, x) for x in _input_sets(row, provider, inputs, machine.kind, count)]
            calls[0]()
            result.peak_bytes = peak_cpu(calls[0])
            _summarise(result, clock(calls, seconds))
    except AssertionError as error:
        result.status, result.message = "wrong", str(error)
    except Exception as error:  # whatever it is, the other rows can still be measured
        result.status, result.message = "error", f"{type(error).__name__}: {error}"
    return result


def no_result(row: Row, provider: Provider, machine: Machine, **fields: Any) -> Result:
    """All that is known before inputs are drawn."""
    sizes = dataclasses.asdict(row.configuration)
    name, *_ = [sizes.pop(other) for other in ("name", "operations", "devices", "directions")]
    sizes["dtype"] = str(sizes["dtype"]).removeprefix("torch.")
    names = (row.operation.name, row.direction, name, provider.name)
    return Result(*names, sizes["dtype"], sizes, **dataclasses.asdict(machine), **fields)


def _input_sets(row: Row, provider: Provider, inputs: Inputs, kind: str, count: int) -> list[Inputs]:
    """Inputs with other tokens and slots, on the same table: a memory-bound call must not find its rows in a cache."""
    # One memory for all, and that of the other rows stays as it is; the largest comes first, while there is room.
    same = {name: inputs[name] for name in ("values",) if name in inputs}
    same |= provider.own(inputs) if row.operation.in_place else {}
    return [{**inputs, **same}, *({**row.inputs(kind, seed), **same} for seed in range(1, count))]


def _summarise(result: Result, samples: Sequence[float]) -> None:
    result.repeats = len(samples)
    result.min_us = min(samples)
    result.p10_us, result.median_us, result.p90_us = (quantile(samples, q) for q in (0.1, 0.5, 0.9))
    result.ratio = (result.time_us or 0.0) / result.floor_us


def _measure_cuda(result: Result, row: Row, provider: Provider, shared: Shared, seconds: float, graphs: bool) -> None:
    # Backward runs on the stream of its forward, and a graph is captured on a stream of its own: so all on that one.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        verify(provider, shared)
        torch.cuda.empty_cache()  # of two tables of 34 GB none may be lost to what is left over
        sets = _input_sets(row, provider, shared.inputs, "cuda", 8)
        calls, inputs = [prepare(row, provider, x) for x in sets], sets[0]
        calls[0]()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        calls[0]()
        torch.cuda.synchronize()
        result.peak_bytes = torch.cuda.max_memory_allocated() - before
        _summarise(result, time_cuda(calls, seconds))
        try:
            if provider.capturable and graphs:
                result.graph_us = time_graph(calls, seconds / 2, stream)
            elif provider.replay is not None:
                result.graph_us = quantile(time_cuda([provider.replay(**inputs)], seconds / 2), 0.5)
        except RuntimeError as error:  # the times before it are kept, whatever state it has left
            result.message = f"{NO_GRAPH}: {error}"
            return
        if result.graph_us is not None:
            result.graph_ratio = result.graph_us / result.floor_us
    torch.cuda.synchronize()


def release(machine: Machine) -> None:
    """Return cached device memory, so that one row's leftovers are not another's out-of-memory error."""
    if machine.kind == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
