"""Benchmark runs: timing, result files, tables, plots, comparisons, and the GPU run where there is no GPU."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import goals, inputs, registry, run, sanitize
from benchmarks.compare import compare
from benchmarks.measure import NO_GRAPH, Shared, measure, no_result, peak_cpu, time_cuda
from benchmarks.providers import GRAPHED, PACKAGE, Provider, is_package
from benchmarks.results import per_chunk
from fwpkm_kernels._commands import write_output
from tests.conftest import HAS_GPU
from tests.helpers.results import MACHINE, ROWS, gpu_rows, slower_by, some_result

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="module")
def tables_are_dropped():
    yield
    registry.table.cache_clear()


@pytest.mark.parametrize("name", ["lookup/backward/inference", "gather/forward/inference", "update_/forward/inference"])
def test_results_are_timed_and_round_trip_through_json(name, tmp_path):
    row = ROWS[name]
    shared = Shared(row, "cpu")
    inputs = shared.inputs
    before = {key: x.clone() for key, x in inputs.items() if isinstance(x, torch.Tensor)}
    results = [measure(row, provider, MACHINE, seconds=0.001, shared=shared) for provider in row.providers()]
    for result in results:
        assert result.status == "ok", result.message
        assert 0 < result.min_us <= result.p10_us <= result.median_us <= result.p90_us
        assert result.ratio == result.min_us / result.floor_us
        cost = row.cost(inputs)
        assert result.floor_us == pytest.approx(max(cost.bytes / 1e4, cost.flops / 1e5))
    assert all(torch.equal(inputs[key], x) for key, x in before.items())  # the next provider gets the same inputs

    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(map(run.to_json, results)) + '\n{"operation": "cut o', "utf-8")
    assert run.read_results(file) == results
    table = run.report(results)
    assert name in table
    assert "pytorch" in table


@pytest.fixture
def shrunk_run(monkeypatch) -> list[str]:
    """A run of two shrunk rows on a CPU that is not measured; the first words of its command line."""
    rows = [ROWS["gather/forward/inference"], ROWS["update_/forward/inference"]]
    monkeypatch.setattr(run, "rows", lambda device, name="": [row for row in rows if name in row.name])
    monkeypatch.setattr(run, "measure_machine", lambda device: MACHINE)
    return ["--device", "cpu", "--seconds-per-row", "0.001"]


def test_command_line(shrunk_run, tmp_path, capsys):
    """A table, a file, the goals last, and nothing measured twice with --resume."""
    file = tmp_path / "out.jsonl"
    arguments = [*shrunk_run, "--json", str(file)]
    assert run.main([*arguments, "--op", "gather"]) == 0
    first, tokens = run.read_results(file), ROWS["gather/forward/inference"].configuration.tokens
    assert {r.provider for r in first} >= {"fwpkm_kernels", "pytorch", "embedding_bag"}
    assert all(r.repeats >= 3 and r.peak_bytes > 0 and r.sizes["tokens"] == tokens for r in first)
    assert "missing" not in capsys.readouterr().out
    assert run.main([*arguments, "--resume"]) == 0
    second = run.read_results(file)
    assert second[: len(first)] == first
    assert {r.row for r in second[len(first) :]} == {"update_/forward/inference"}
    assert run.main([*arguments, "--resume"]) == 0
    assert run.read_results(file) == second
    out = capsys.readouterr().out
    assert "update_/forward/inference" in out
    assert out.rstrip().splitlines()[-1].startswith("missing: step/forward/inference (not measured), ")
    assert run.main([*arguments, "--op", "no such row"]) == 2
    assert "no such row" in capsys.readouterr().err
    assert run.main([*shrunk_run, "--list", "--op", "gather"]) == 0
    assert "gather/forward/inference fwpkm_kernels" in capsys.readouterr().out.splitlines()
    assert run.main([*shrunk_run, "--goals", "--list"]) == 0
    assert capsys.readouterr().out == "\n"


def test_goals_of_a_cpu_are_made_of_minima_of_rounds(shrunk_run, monkeypatch, tmp_path):
    """A machine that is loaded while a row is measured for the first time changes no ratio: all rows of goals have
    their turn again, and the best of each is kept. Others are measured once, and so is what is wrong."""
    rows, order = [row.name for row in run.rows("cpu")], []
    times = {(rows[0], PACKAGE): [90.0, 10.0, 11.0], (rows[1], PACKAGE): [20.0, 30.0, 19.0]}
    times |= {(rows[1], "pytorch"): [None]}

    def measured(row, provider, *_, is_right, **__):
        order.append(name := (row.name, provider.name))
        assert is_right == (order.count(name) > 1)
        us = times.get(name, [50.0])[order.count(name) - 1]
        fields = {"min_us": us, "ratio": 1.0} if us else {"status": "wrong"}
        return no_result(row, provider, MACHINE, **fields)

    monkeypatch.setattr(run, "measure", measured)
    monkeypatch.setattr(goals, "cases", lambda kind: [*times])
    file = tmp_path / "out.jsonl"
    assert run.main([*shrunk_run, "--no-table", "--json", str(file)]) == 1
    first = len(set(order))
    assert order[:first] == [(row.name, provider.name) for row, provider in run.select_cases("cpu")]
    assert order[first:] == [*times][:2] * 2
    found = {(r.row, r.provider): r.min_us for r in run.read_results(file)}
    assert [found[name] for name in times] == [10.0, 19.0, None]
    assert len(found) == first


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("file", ["results", "marker"])
def test_a_full_disk_costs_the_file_alone(file, shrunk_run, monkeypatch, tmp_path, capsys):
    """All is measured and shown, and the disk told once."""
    if file == "marker":
        monkeypatch.setattr(run, "write_output", lambda path, text: write_output("/dev/full", text))
    path = tmp_path / "out.jsonl" if file == "marker" else "/dev/full"
    assert run.main([*shrunk_run, "--json", str(path)]) == 2
    captured = capsys.readouterr()
    assert "measurements were not made" not in captured.out
    for shown in ("gather/forward/inference", "update_/forward/inference"):
        assert shown in captured.out
    assert captured.err == "run: error: cannot write /dev/full: No space left on device\n"


def test_standard_output_has_no_file_beside_it(shrunk_run, monkeypatch, tmp_path):
    monkeypatch.delattr(run, "running")
    monkeypatch.setattr(run, "run_rows", lambda *args, on_result, **options: on_result(some_result()))
    before = os.dup(1)
    try:
        with open(tmp_path / "out", "wb") as out:
            os.dup2(out.fileno(), 1)
        assert run.main([*shrunk_run, "--json", "/dev/stdout", "--no-table"]) == 0
    finally:
        os.dup2(before, 1)
        os.close(before)
    assert run.read_results(tmp_path / "out") == [some_result()]


def late(**inputs):
    raise RuntimeError("out of order")


def wrong(values, slots, weights):
    return values[slots].sum(1)


def changed(row: registry.Row, **fields: object) -> registry.Row:
    return dataclasses.replace(row, operation=dataclasses.replace(row.operation, **fields))


def with_faults(row: registry.Row) -> registry.Row:
    """A row with two providers that cannot be timed before this package."""
    return changed(row, providers=(Provider("late", late), Provider("wrong", wrong), row.operation.providers[0]))


def test_faults_of_a_row_are_their_own():
    """What a provider does is recorded, and so is a row without inputs, which are drawn once for all providers; what
    ends the run is not lost."""
    row, results, seeds = with_faults(ROWS["gather/forward/inference"]), [], []

    def no_room(*_):
        raise torch.OutOfMemoryError("34 GB")

    def draw(c, device, seed):
        seeds.append(seed)
        return inputs.of_gather(c, device, seed)

    cases = [(changed(row, make_inputs=no_room), row.providers()[2])]
    drawn = changed(row, make_inputs=draw)
    cases += [(drawn, provider) for provider in row.providers()]

    def measure_until(deadline, on_result):
        run.run_rows(cases, MACHINE, seconds=0.001, deadline=deadline, on_result=on_result)

    measure_until(time.monotonic() + 60, results.append)
    assert [r.status for r in results] == ["error", "error", "wrong", "ok"]
    assert [r.message for r in results[:2]] == ["OutOfMemoryError: 34 GB", "RuntimeError: out of order"]
    assert [r.median_us for r in results[:3]] == [None] * 3
    assert run.report(results[:1])
    assert seeds.count(0) == 1

    measure_until(time.monotonic(), results.append)
    assert len(results) == 4

    def stop(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_until(time.monotonic() + 60, stop)


def test_rows_under_pytest_benchmark(monkeypatch, tmp_path):
    """The same rows as tests, with its files; what is wrong fails, and is not timed."""
    pytest.importorskip("pytest_benchmark")
    # A session inside a test takes itself for a worker of pytest-xdist where the test does; then it times nothing.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(registry, "rows", lambda device: [with_faults(ROWS["gather/forward/inference"])])
    monkeypatch.setattr(sys.modules["benchmarks.measure"], "measure_machine", lambda device: MACHINE)
    monkeypatch.delitem(sys.modules, "benchmarks.test_rows", raising=False)
    file, reports = tmp_path / "benchmark.json", []

    class Seen:
        def pytest_runtest_logreport(self, report):
            if report.when == "call":
                reports.append((report.nodeid.rpartition("/")[2], report.outcome, report.longreprtext))

    quiet = [x for name in ("terminal", "cacheprovider", "faulthandler", "xdist") for x in ("-p", f"no:{name}")]
    arguments = ["-o", "addopts=", "-o", "filterwarnings=", "--capture=no", f"--benchmark-json={file}"]
    assert pytest.main([*arguments, *quiet, str(ROOT / "benchmarks" / "test_rows.py")], plugins=[Seen()]) == 1
    assert [(name, outcome) for name, outcome, _ in reports] == [
        ("late]", "failed"),
        ("wrong]", "failed"),
        ("fwpkm_kernels]", "passed"),
    ]
    assert "RuntimeError: out of order" in reports[0][2]
    (timed,) = json.loads(file.read_text())["benchmarks"]
    assert timed["stats"]["rounds"] >= 3
    assert timed["extra_info"]["ratio"] > 0


def test_peak_memory_of_a_cpu_call():
    x = torch.ones(1000)

    def call():
        a = x + 1
        b = a + 1  # two at once
        del a
        c = b + 1  # two at once
        return torch.cat([c, c])  # four at once: b, c and this one

    assert 4 * 4000 <= peak_cpu(call) < 4 * 4000 + 1000


@pytest.mark.parametrize(
    "new, worse, words",
    [
        (some_result(), False, "got no slower"),
        (slower_by(1.05), False, "got no slower"),
        (slower_by(1.3), True, "got slower: gather/forward/inference"),
        (slower_by(1.12), False, "slower, but within the noise"),
        (slower_by(0.5), False, "faster"),
        (slower_by(1.3, provider="pytorch"), False, "slower"),
        (some_result(status="wrong", message="over budget", median_us=None), True, "now wrong"),
        (
            some_result(status="error", provider="fwpkm_kernels-graph", median_us=None),
            True,
            "inference fwpkm_kernels-graph",
        ),
        (some_result(configuration="other"), False, "nothing to compare"),
        (some_result(device="another", versions={"torch": "3"}), False, "device: test before, another now"),
    ],
)
def test_comparison(new, worse, words):
    old = [some_result(provider=name) for name in ("fwpkm_kernels", "fwpkm_kernels-graph", "pytorch")]
    text, slower = compare(old, [new])
    assert slower is worse
    assert words in text


def test_comparison_on_the_command_line(shrunk_run, tmp_path, capsys):
    old, new, slow = (tmp_path / name for name in ("old", "new", "slow"))
    for file, result in ((old, some_result()), (new, some_result()), (slow, slower_by(2.0))):
        file.write_text(run.to_json(result) + "\n", "utf-8")
    assert run.main(["--compare", str(old), "--results", str(new)]) == 0
    assert run.main(["--compare", str(old), "--results", str(slow)]) == 1
    assert "got slower: gather/forward/inference" in capsys.readouterr().out
    # A run against itself, into the file that it is compared with.
    fast = some_result(kind="cpu", **dict.fromkeys(("min_us", "p10_us", "median_us", "p90_us"), 1e-6))
    old.write_text(run.to_json(fast) + "\n", "utf-8")
    assert run.main([*shrunk_run, "--op", "gather", "--json", str(old), "--compare", str(old)]) == 1
    assert "got slower: gather/forward/inference" in capsys.readouterr().out


def test_time_of_one_chunk_more():
    def sequence(tokens, batch, median, **fields):
        sizes = {"tokens": tokens, "batch": batch, "chunk": 512, "width": 64}
        return some_result(
            operation="sequence", configuration=f"{batch}x{tokens}", sizes=sizes, median_us=median, **fields
        )

    results = [sequence(512 * 8, 8, 1000.0), sequence(4096 * 8, 8, 2400.0), sequence(512, 1, 7.0)]
    results += [sequence(512, 1, 10.0, provider="dense"), sequence(1024, 1, 30.0, provider="dense")]
    assert {x.provider: (x.us, x.once_us, x.graph_us) for x in per_chunk(results)} == {
        "fwpkm_kernels": (200.0, 800.0, None),
        "dense": (20.0, -10.0, None),
    }
    assert "200 µs a chunk; 800 µs once a call" in run.report(results)
    graphs = [
        sequence(512 * 8, 8, 1000.0, graph_us=500.0, graph_ratio=1.0),
        sequence(4096 * 8, 8, 2400.0, graph_us=1200.0, graph_ratio=1.0),
    ]
    assert [x.graph_us for x in per_chunk(graphs)] == [100.0]
    assert "200 µs a chunk, 100 µs in a graph; 800 µs once a call" in run.report(graphs)
    assert per_chunk([some_result(sizes={"tokens": 512}), some_result(sizes={"tokens": 4096})]) == []


def test_goals_of_a_gpu():
    """Each beside the numbers, of which the better one counts; a step's graph is its replay alone."""
    results = gpu_rows(**{"8x4096": 2340.0, "8x512": 100.0, "training-n4096": 800.0})
    graphed = some_result(operation="step", provider=GRAPHED, median_us=60.0, graph_us=30.0, graph_ratio=1.0)
    lines = dict(line.split("  ", 1) for line in goals.goals_table([*results, graphed]).splitlines()[1:])
    lines = {name: line.split() for name, line in lines.items()}
    assert lines["training forward, one chunk of 8x512"] == ["≤", "160", "µs", "320", "160", "1.00", "reached"]
    assert lines["8x4096, forward + backward"] == ["≤", "3.6", "ms", "2.34", "1.17", "0.32", "reached"]
    assert lines["8x4096, forward + backward: memory"] == ["≤", "2.1", "GiB", "2", "-", "0.95", "reached"]
    assert lines["inference, one chunk of 512"] == ["≤", "25", "µs", "100", "30", "1.20", "missed"]
    assert lines["gather: share of a copy's bandwidth"] == ["≥", "90", "%", "50", "100", "0.90", "reached"]
    assert lines["write, 16.7 M slots over 262 144"] == ["≤", "1.3", "x", "8", "8", "6.15", "missed"]
    assert lines["lookup among 4096 sub-keys over 8 floors of 512"] == ["≤", "1.5", "x", "2", "1", "0.67", "reached"]
    assert "missing" not in goals.goals_table(results)


def test_goals_without_their_rows():
    results = gpu_rows()
    lost = [dataclasses.replace(results[0], status="wrong", median_us=None), *results[2:]]
    text, rows = goals.goals_table(lost), [row for row, _ in goals.cases("cuda")]
    assert text.splitlines()[1].split()[-1] == "missing"
    assert text.endswith(f"\nmissing: {rows[0]} (wrong), {rows[1]} (not measured)")
    assert goals.goals_table([]).splitlines()[1].split()[-1] == "missing"


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_goals_are_made_of_rows_that_are_measured(kind):
    cases = {(row.name, provider.name) for row, provider in run.select_cases(kind, goals_only=True)}
    assert cases == {*goals.cases(kind)}


def test_goals_of_a_cpu():
    """The minima of its rows and of those of other providers; there is no graph to miss."""
    times = {"step/forward/inference": 10e3, "step/forward/inference-still-keys": 8e3, "sequence/both/1x4608": 970e3}
    times |= {"step/forward/inference-n128": 4e3, "sequence/both/1x512": 10e3, "layer/both/1x1024": 1e3}
    results = [
        some_result(
            kind="cpu", provider=provider, min_us=640e3 if provider == "dense" else times.get(row, 100.0),
            **dict(zip(("operation", "direction", "configuration"), row.split("/"), strict=True)),
        )
        for row, provider in goals.cases("cpu")
    ]  # fmt: skip
    lines = [line.rsplit(maxsplit=6) for line in goals.goals_table(results).splitlines()[1:]]
    assert [line[-4:] for line in lines] == [
        ["10", "-", "0.40", "reached"],
        ["8", "-", "0.53", "reached"],
        ["80", "-", "0.25", "reached"],
        ["2.5", "-", "1.25", "missed"],
        ["120", "-", "1.50", "missed"],
        *[["1", "-", "0.83", "reached"], ["1", "-", "0.91", "reached"]] * 2,
        *[["1", "-", "4.00", "missed"]] * 2,
        ["1", "-", "0.87", "reached"],
        *[["1", "-", "0.91", "reached"]] * 2,
    ]


def test_a_replay_alone_is_the_time_in_a_graph():
    row = some_result(operation="step", graph_us=None)
    graphed = dataclasses.replace(row, provider=GRAPHED, graph_us=42.0, graph_ratio=0.84)
    assert "42 µs" in run.report([row, graphed])


def test_the_cache_is_read_and_not_overwritten_before_a_call_is_timed(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            self.record = lambda: done.append("event")
            self.elapsed_time = lambda end: 0.001

    class Flush:
        def sum(self):
            done.append("read")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: Flush())
    assert time_cuda([lambda: done.append("call")], 0.0, least=2) == [1.0, 1.0]
    assert done == ["call", *(["read", "event", "call", "event"] * 5)]


def test_a_graph_that_could_not_be_captured_is_told():
    message = "no CUDA graph: operation not permitted"
    assert message in run.report([some_result(message=message)])
    assert message not in run.report([some_result(), some_result(provider="pytorch", message=message)])


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plots import plot

    def names(results):
        return [path.name for path in plot(results, tmp_path)]

    assert names([]) == []
    assert names([some_result(status="wrong")]) == []
    sizes = {"tokens": 512, "sub_keys": 512, "dtype": "float32"}
    assert names([some_result(flops=0, sizes=sizes)]) == ["time.png"]
    results = [some_result(sizes=sizes), some_result(provider="pytorch", sizes=sizes)]
    results.append(some_result(configuration="n4096", sizes={**sizes, "sub_keys": 4096}))
    results.append(some_result(configuration="long", sizes={**sizes, "tokens": 4096}, peak_bytes=None))
    assert names(results) == ["time.png", "roofline.png", "scaling.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"time.png", "roofline.png", "scaling.png"}


def test_every_operation_is_launched_for_the_sanitizer(capsys):
    """On a GPU this also compiles the kernels, which compute-sanitizer then need not wait for."""
    if HAS_GPU:
        assert sanitize.main() == 0
    else:
        sanitize.run("cpu")
        assert sanitize.main() == 2
        assert "no GPU" in capsys.readouterr().err


def test_gpu_run_without_a_gpu_says_so(tmp_path):
    for module in ("benchmarks.gpu", "benchmarks.run"):
        out = ["--out", str(tmp_path / "out")] if module == "benchmarks.gpu" else ["--device", "cuda"]
        done = subprocess.run(
            [sys.executable, "-m", module, *out],
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        assert "no GPU" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_ended_a_process_is_an_error_of_the_next(shrunk_run, tmp_path):
    """One that goes down for real, by a clock that the process sets itself."""
    file = tmp_path / "out.jsonl"
    arguments = [*shrunk_run, "--op", "gather", "--json", str(file), "--resume"]
    run.running(file).write_text("gather/forward/inference pytorch", "utf-8")
    assert run.main(arguments) == 1
    found = {r.provider: r for r in run.read_results(file)}
    assert found["pytorch"].status == "error"
    assert "ended the process" in found["pytorch"].message
    assert found["fwpkm_kernels"].status == "ok"
    assert not run.running(file).exists()
    assert "error" in run.report(list(found.values()))

    program = """
import sys, time
from benchmarks import registry, run
from tests.helpers.results import MACHINE
row = registry.rows("cpu", "gather/forward/inference")[0]
def hang(*args, on_begin, **options):
    on_begin(row, row.providers()[0])
    time.sleep(60)
run.measure_machine, run.run_rows = lambda device: MACHINE, hang
run.main(["--device", "cpu", "--op", row.name, "--json", sys.argv[1], "--case-seconds", "0.2"])
"""
    done = subprocess.run([sys.executable, "-c", program, str(file)], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert run.running(file).read_text("utf-8") == "gather/forward/inference fwpkm_kernels"


@pytest.mark.parametrize("fault", [None, "synchronize", "empty_cache", "capture"])
def test_what_a_process_cannot_go_on_after_ends_it(fault, monkeypatch, tmp_path):
    """Errors do not, unless they took the GPU with them, or came while a graph was captured; a failed capture does. The
    result is kept, the marker stays, and another process goes on behind it."""

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cuda = dataclasses.replace(MACHINE, kind="cuda")
    fields = {"status": "error"}
    if fault == "capture":
        fields = {"message": f"{NO_GRAPH}: not permitted", "median_us": 1.0, "ratio": 1.0}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lost if name == fault else lambda: None)
    monkeypatch.setattr(run, "measure_machine", lambda device: cuda)
    monkeypatch.setattr(run, "release", lambda machine: None)
    monkeypatch.setattr(run, "measure", lambda row, provider, *_, **__: no_result(row, provider, cuda, **fields))
    file, op = tmp_path / "out.jsonl", "gather/forward/inference"
    providers = [provider.name for _, provider in run.select_cases("cuda", op)]
    assert len(providers) > 1
    for count, name in enumerate(providers if fault else providers[-1:], start=1 if fault else len(providers)):
        arguments = ["--device", "cuda", "--op", op, "--json", str(file), "--no-table", "--resume"]
        assert run.main(arguments) == 1
        assert [r.provider for r in run.read_results(file)] == providers[:count]
        assert run.running(file).exists() == bool(fault)
        assert not fault or run.running(file).read_text("utf-8") == f"{op} {name}"


@pytest.mark.parametrize("way", ["captured", "not captured", "replayed"])
def test_a_row_on_a_gpu_that_is_made_up(way, monkeypatch):
    """Its times are kept where the capture fails; of a provider with graphs of its own a replay alone is timed."""
    ended = []

    def capture(calls, seconds, stream):
        if way == "not captured":
            raise RuntimeError("operation not permitted when stream is capturing")
        return 7.0

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"Stream": lambda: stream, "current_stream": lambda: None, "stream": lambda s: contextlib.nullcontext()}
    fakes |= {"synchronize": lambda: None, "empty_cache": lambda: None, "reset_peak_memory_stats": lambda: None}
    fakes |= {"memory_allocated": lambda: 100, "max_memory_allocated": lambda: 350}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    module = sys.modules["benchmarks.measure"]
    monkeypatch.setattr(module, "_input_sets", lambda row, provider, inputs, *_: [inputs])
    monkeypatch.setattr(module, "time_graph", capture)
    monkeypatch.setattr(module, "time_cuda", lambda calls, *_: [5.0 if call() is not None else 3.0 for call in calls])
    row = ROWS["gather/forward/inference"]
    provider = row.providers()[0]
    if way == "replayed":
        provider = dataclasses.replace(provider, capturable=False, replay=lambda **inputs: lambda: ended.append(inputs))
    result = measure(row, provider, dataclasses.replace(MACHINE, kind="cuda"), shared=Shared(row, "cpu"))
    assert (result.status, result.median_us, result.peak_bytes) == ("ok", 5.0, 250)
    assert result.graph_us == {"captured": 7.0, "not captured": None, "replayed": 3.0}[way]
    assert result.message.startswith(NO_GRAPH) == (way == "not captured")
    assert [list(inputs) for inputs in ended] == ([["values", "slots", "weights"]] if way == "replayed" else [])


def test_on_a_gpu_this_package_comes_first_and_what_has_a_goal():
    providers = [provider.name for _, provider in run.select_cases("cuda")]
    turns = [0 if is_package(name) else 2 if name == "torch.compile" else 1 for name in providers]
    assert turns == sorted(turns)
    assert set(turns) == {0, 1, 2}
    own, other = (run.select_cases("cuda", whose=whose) for whose in ("own", "other"))
    assert [*own, *other] == run.select_cases("cuda")
    names = [row.name for row, p in own if p.name == PACKAGE]
    with_goal = [row for row, _ in goals.cases("cuda")]
    assert names[: len(with_goal)] == with_goal
    assert sorted(names) == sorted(row.name for row in registry.rows("cuda"))


def test_a_large_table_is_forgotten_where_another_is_needed(monkeypatch):
    forgotten = []
    monkeypatch.setattr(inputs.table, "cache_clear", lambda: forgotten.append(True))
    c = registry.CONFIGURATIONS[0]
    large = dataclasses.replace(c, sub_keys=4096)
    for before, after, expected in ((c, large, 0), (large, large, 0), (large, c, 1)):
        inputs.make_room(before, after)
        assert len(forgotten) == expected
