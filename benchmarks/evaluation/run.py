"""``make evaluate``: models are trained and measured, several at a time, then shown in tables and plots.

Each run, of one model and seed, has a folder below ``OUT/runs`` with its checkpoint, its results and what its programs
printed. What is there already is kept: an evaluation that was interrupted goes on.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.evaluation import ablations, budget, mqar, needles, plots, train
from benchmarks.evaluation.ablations import ABLATIONS, Ablation
from benchmarks.evaluation.models import MODELS, SIZES, split_name
from benchmarks.evaluation.options import Options, options_of
from benchmarks.evaluation.records import (
    LEARNT,
    Line,
    Table,
    cost_table,
    latest,
    mqar_table,
    pairs_table,
    perplexity_table,
    recall_table,
)
from benchmarks.files import read_lines
from fwpkm_kernels._commands import CommandError, command, make_folder, need, one_line, try_all, write_output

STORY = ("full", "swa+fwpkm")  #: the models without --full; the slowest begins first, so that workers end together
HEADLINE = "swa+fwpkm"  #: the model of three seeds and of the ablations
MEASURES = ("needles", "perplexity", "mqar")
ORDER = ("needles", "train", "perplexity", "mqar")  #: in which jobs begin that can: needles last longest, and say most
RESULTS = ("needles", "ablations", "perplexity", "mqar")  #: files of lines
#: Full attention takes minutes to read 128K, and four times as long for two readings. So it reads long contexts once,
#: and in perplexity the documents in one order.
FULL_CELLS = "4096:20x5:1/2,8192:10x10:1/2,32768:5x20:1,131072:2x20:1"
FULL_ORDERS = 1

NOTES = f"""\
A needle counts if all six digits of its code are right by greedy decoding: chance is one in a million, and "controls
found" are needles asked for that are nowhere in the context. Contexts are held-out text, and names of needles are never
those of the training. A model "not learnt" finds less than {100 * LEARNT:.0f} % at its shortest length, after any
number of readings: it has not learnt the task in this budget, and what it finds at other lengths says nothing. Full
attention reads contexts of 4K and 8K once and twice, of 32K and 128K once only, and no context four times; bits per
byte it has of one order of the documents: its cost grows with the square of what was read.
Gains are bits per byte that writing the memory saves, with the standard error over documents.
"""


class Job(NamedTuple):
    """A program to run, and the file of its results."""

    run: str  #: the name of the run's folder
    name: str
    arguments: tuple[str, ...]
    output: Path

    @property
    def needs_training(self) -> bool:
        return self.name in ("needles", "perplexity")

    @property
    def title(self) -> str:
        return f"{self.run}: {self.name}"


class Plan(NamedTuple):
    """What all runs have in common."""

    out: Path
    device: str = "cpu"
    measures: tuple[str, ...] = MEASURES
    changes: tuple[str, ...] = ()  #: to the training's options, NAME=VALUE
    size: str = "miniature"
    cells: str | None = None
    readings: str | None = None
    orders: int | None = None

    def folder(self, run: str) -> Path:
        return self.out / "runs" / run

    def job(self, run: str, name: str, file: str, *arguments: str) -> Job:
        return Job(run, name, arguments, self.folder(run) / file)

    def training(self, model: str, seed: int, run: str, changes: Sequence[str]) -> Job:
        arguments = [str(self.folder(run)), "--model", model, "--seed", str(seed), "--size", self.size]
        arguments += ["--device", self.device, *(["--set", *self.changes, *changes] if self.changes or changes else [])]
        return self.job(run, "train", train.CHECKPOINT, *arguments)

    def needles(self, run: str, file: str, cells: str, readings: str, *arguments: str) -> Job:
        arguments = ("--cells", self.cells or cells, "--readings", self.readings or readings, *arguments)
        return self._measuring(run, "needles", file, *arguments)

    def _measuring(self, run: str, name: str, file: str, *arguments: str) -> Job:
        folder = self.folder(run)
        return self.job(run, name, file, str(folder), *arguments, "--device", self.device, "--out", str(folder / file))

    def model(self, model: str, seed: int) -> list[Job]:
        """Train a model and measure it."""
        run = f"{model}-{seed}"
        is_full = split_name(model)[0] == "full"
        orders = self.orders or (FULL_ORDERS if is_full else 2)
        jobs = [
            self.training(model, seed, run, ()),
            self.needles(run, "needles.jsonl", FULL_CELLS if is_full else needles.CELLS, "1,2,4"),
            self._measuring(run, "perplexity", "perplexity.jsonl", "--orders", str(orders)),
            self.job(run, "mqar", "mqar.jsonl", "--model", model, "--seed", str(seed), "--device", self.device),
        ]
        return [job for job in jobs if job.name in ("train", *self.measures)]

    def ablation(self, name: str, ablation: Ablation, seed: int = 0) -> list[Job]:
        """Train the headline model with what a row changes, if it does, and ask for needles."""
        changes = [f"{option}={value}" for option, value in ablation.changes.items()]
        run = f"{HEADLINE}-{seed}" + (f"-{re.sub('[^a-z0-9]+', '-', name.lower())}" if changes else "")
        jobs = [self.training(HEADLINE, seed, run, changes)]
        for num_keys in ablation.test_keys:
            arguments = [] if num_keys is None else ["--num-keys", str(num_keys)]
            jobs.append(
                self.needles(run, "ablations.jsonl", ablations.CELLS, ablations.READINGS, "--row", name, *arguments)
            )
        return jobs


def chains_of(
    plan: Plan, models: Sequence[str], seeds: dict[str, Sequence[int]], rows: Sequence[str]
) -> list[list[Job]]:
    """The jobs of each run in their order; a job that several rows have in common is there once."""
    lists = [plan.model(model, seed) for model in models for seed in seeds[model]]
    lists += [plan.ablation(row, ABLATIONS[row]) for row in rows]
    runs: dict[str, dict[Job, None]] = {}
    for jobs in lists:
        runs.setdefault(jobs[0].run, {}).update(dict.fromkeys(jobs))
    return [list(jobs) for jobs in runs.values()]


def has_recall(job: Job) -> bool:
    """Whether the results of an mqar job are of its model as it is trained now."""
    wanted = mqar.make_options(job.arguments[1], int(job.arguments[3]))
    try:
        known = [options_of(line["options"]) for line in read_lines(job.output)] if job.output.exists() else []
    except (KeyError, TypeError):  # options of another version
        return False
    return bool(known) and all(options == wanted for options in known)


def execute(job: Job, children: list[subprocess.Popen[bytes]]) -> str | None:
    """Run a job in a process of its own, which joins `children`; if it fails, return the last line that it printed."""
    folder = job.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    arguments, unfinished = job.arguments, job.output.with_suffix(".running")
    if job.name == "mqar":  # it trains its model anew, and cannot go on from a part of its lines
        if has_recall(job):
            return None
        unfinished.unlink(missing_ok=True)
        arguments = (*arguments, "--out", str(unfinished))
    log = folder / f"{job.name}.log"
    with open(log, "ab") as file:
        begin = file.tell()
        started = [sys.executable, "-m", f"benchmarks.evaluation.{job.name}", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        children.append(subprocess.Popen(started, stdout=file, stderr=subprocess.STDOUT, env=environment))
        status = children[-1].wait()
    if status == 0 and job.name == "mqar":
        unfinished.replace(job.output)
    lines = re.split(r"[\r\n]+", log.read_bytes()[begin:].decode("utf-8", "replace").strip())
    return None if status == 0 else f"status {status}, {lines[-1] or 'without a word'}, see {log}"


@contextlib.contextmanager
def ending_children() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A list of processes that are ended when this one gets SIGTERM; SIGINT reaches them from the terminal."""
    children: list[subprocess.Popen[bytes]] = []

    def end(number: int, frame: Any) -> None:
        for child in children:
            child.send_signal(number)  # does nothing to a child that has ended
        for process in multiprocessing.active_children():
            process.terminate()
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield children
    finally:
        signal.signal(signal.SIGTERM, before)


def run_all(
    chains: Sequence[Sequence[Job]],
    workers: int,
    execute: Callable[[Job], str | None],
    tell: Callable[[str], object],
    deadline: float = math.inf,
) -> tuple[list[str], list[str]]:
    """Run the jobs of all chains, `workers` at a time; return the failures, and what had not begun at the deadline.

    A job that needs a training waits for it, and is left out if the training fails. Jobs of one run and name write to
    one file, so they run one after the other. Of the jobs that can begin, the first in `ORDER` does.

    Args:
        deadline: of `time.monotonic`.
    """
    waiting = sorted((job for jobs in chains for job in jobs), key=lambda job: ORDER.index(job.name))
    untrained = {job.run for job in waiting if job.name == "train"}
    running: dict[Future[str | None], tuple[Job, float]] = {}
    failures, left_out = [], []

    def can_begin(job: Job) -> bool:
        is_trained = not (job.needs_training and job.run in untrained)
        return is_trained and all((job.run, job.name) != (x.run, x.name) for x, _ in running.values())

    def end(job: Job, error: str | None, seconds: float = 0.0) -> None:
        if error:
            failures.append(f"{job.title}: {error}")
        tell(f"{job.title}: {error or f'{seconds:.0f} s'}")

    with ThreadPoolExecutor(workers) as pool:
        while waiting or running:
            if time.monotonic() >= deadline:
                left_out += [job.title for job in waiting]
                waiting.clear()
            for job in [*waiting]:
                if len(running) < workers and can_begin(job):
                    waiting.remove(job)
                    running[pool.submit(execute, job)] = job, time.monotonic()
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                job, began = running.pop(done)
                error = done.result()
                end(job, error, time.monotonic() - began)
                if job.name == "train":
                    untrained.remove(job.run)
                    for other in [x for x in waiting if error and x.run == job.run and x.needs_training]:
                        waiting.remove(other)
                        end(other, "not run, as the training failed")
    return failures, left_out


def choose(device: str, minutes: float, models: Sequence[str]) -> Options:
    """The size and plan that each of the models can be trained with in so many minutes, on one thread as jobs are."""
    torch.set_num_threads(1)
    with train.on_device(device) as device:
        chosen = [budget.choose_size(device, minutes, model) for model in models]
    return min(chosen, key=lambda options: ([*SIZES].index(options.size), options.bytes))


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process of its own, whose end frees its memory on a GPU."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise CommandError("the process that tried the sizes was killed, as for want of memory") from error


def read_checkpoints(out: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Options and log of each run's training, by the name of its folder; and what cannot be read, and why."""
    states, problems = {}, []
    for path in sorted(out.glob(f"runs/*/{train.CHECKPOINT}")):
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            states[path.parent.name] = {"options": state["options"], "log": state["log"]}
        except Exception as error:  # whatever torch.load makes of a damaged file
            problems.append(f"cannot read {path}: {type(error).__name__} {str(error).partition('.')[0]}")
    return states, problems


def options_there(out: Path) -> Options | None:
    """Options of a model that was trained before, if there is one: the others must have its size and plan."""
    for run, state in read_checkpoints(out)[0].items():
        options = options_of(state["options"])
        if run == f"{options.model}-{options.seed}":  # an ablation's folder has a longer name
            return options
    return None


def collect(out: Path) -> dict[str, list[Line]]:
    """The lines of all runs, by file, one for each cell."""
    return {
        name: latest(x for path in sorted(out.glob(f"runs/*/{name}.jsonl")) for x in read_lines(path))
        for name in RESULTS
    }


def tables_of(lines: dict[str, list[Line]]) -> list[Table]:
    makers = (
        ("needles", functools.partial(recall_table, title="Models")),
        ("needles", cost_table),
        ("ablations", functools.partial(recall_table, title=f"Ablations of {HEADLINE}")),
        ("perplexity", perplexity_table),
        ("perplexity", pairs_table),
        ("mqar", mqar_table),
    )
    return [table for name, make in makers if lines[name] and (table := make(lines[name])).lines]


def origins(lines: Sequence[Line]) -> str:
    """The machines, versions and commits with which lines were measured."""
    commits: dict[str, dict[str, None]] = {}
    for line in lines:
        if "commit" in line:
            versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items() if version)
            machine = f"{line['device']}, {line['threads']} thread each; {versions}"
            commits.setdefault(machine, {})[str(line["commit"])] = None
    return "".join(f"{machine}; commit {', '.join(mine)}.\n" for machine, mine in commits.items())


def report(out: Path, notes: Sequence[str] = ()) -> str:
    """Write lines, tables and plots of all runs below a folder; return the tables with notes below as text."""
    lines = collect(out)
    for name, mine in lines.items():
        if mine:
            write_output(out / f"{name}.jsonl", "".join(f"{json.dumps(line)}\n" for line in mine))
    states, problems = read_checkpoints(out)
    texts = [table.markdown() for table in tables_of(lines)] or ["no results\n"]
    texts += [f"{note}\n" for note in (*notes, *problems)]
    origin = origins([line for mine in lines.values() for line in mine])
    write_output(out / "results.md", "\n".join(["# Results of an evaluation\n", NOTES, origin, *texts]))
    logs = {run: state["log"] for run, state in states.items()}
    draw = {
        "recall.png": functools.partial(plots.plot_recall, lines["needles"]),
        "loss.png": functools.partial(plots.plot_losses, logs),
        "perplexity.png": functools.partial(plots.plot_perplexity, lines["perplexity"]),
        "num_keys.png": functools.partial(plots.plot_num_keys, lines["ablations"]),
    }
    try_all(functools.partial(function, out / name) for name, function in draw.items())
    return "\n".join(texts)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(","))


@command("run")
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; returns the exit status, 1 if a job failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation.run", description="Train and measure.")
    parser.add_argument(
        "--out", type=Path, default=Path("evaluation-results"), help="folder, evaluation-results if not given"
    )
    parser.add_argument("--full", action="store_true", help=f"all models, {HEADLINE} with three seeds, and ablations")
    parser.add_argument(
        "--ablations", nargs="*", metavar="ROW", help="these rows of ablations.py, or all, and no models"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, help=f"{' and '.join(STORY)} if not given")
    parser.add_argument("--seeds", type=_numbers, help="like 1,2,3; 1 if not given")
    parser.add_argument("--measures", nargs="*", choices=MEASURES, default=MEASURES, help="all if not given")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="options of all trainings")
    parser.add_argument("--size", "--config", choices=SIZES, default="miniature", help="miniature if not given")
    parser.add_argument("--cells", help="of needles, as benchmarks.evaluation.needles takes them")
    parser.add_argument("--readings", help="of needles")
    parser.add_argument("--orders", type=int, help="of the documents in perplexity")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--minutes", type=float, help="choose the largest size that all can be trained with in half of them"
    )
    parser.add_argument("--workers", type=int, help="at a time, one thread each; 2, and 1 on a GPU, if not given")
    parser.add_argument("--fresh", action="store_true", help="delete what these runs have, and begin anew")
    parser.add_argument("--report", action="store_true", help="only tables and plots, of what is there")
    given = parser.parse_args(argv)
    rows = list(ABLATIONS) if given.full or given.ablations == [] else given.ablations or []
    if unknown := [row for row in rows if row not in ABLATIONS]:
        raise CommandError(f"--ablations must be of {', '.join(ABLATIONS)}, got {', '.join(unknown)}")
    if given.cells is not None:
        needles.parse_cells(given.cells, (1,))
    models = given.models or (MODELS if given.full else STORY if given.ablations is None else ())
    seeds = {model: given.seeds or ((1, 2, 3) if given.full and model == HEADLINE else (1,)) for model in models}
    make_folder(given.out, *plots.FILES, "results.md", *(f"{name}.jsonl" for name in RESULTS))
    tqdm = need("tqdm", "evaluation").tqdm
    need("matplotlib.figure", "evaluation")
    size, changes, deadline = given.size, tuple(given.set), math.inf
    with ending_children() as children:
        if given.minutes is not None and not given.report:
            deadline = time.monotonic() + 60 * given.minutes
            options = None if given.fresh else options_there(given.out)
            if options is None:
                share = given.minutes / 2 / max(1, sum(map(len, seeds.values())) + len(rows))
                options = in_child(choose, given.device, share, [*dict.fromkeys((*models, *([HEADLINE] * bool(rows))))])
            phases = ",".join("x".join(map(str, phase)) for phase in options.plan)
            size, changes = options.size, (f"plan={phases}", *changes)
        plan = Plan(
            given.out, given.device, tuple(given.measures), changes, size, given.cells, given.readings, given.orders
        )
        chains = [] if given.report else chains_of(plan, models, seeds, rows)
        if given.fresh:
            for jobs in chains:
                shutil.rmtree(plan.folder(jobs[0].run), ignore_errors=True)
        workers = given.workers or (2 if given.device == "cpu" else 1)
        failures: list[str] = []
        left_out: list[str] = []
        try:
            with tqdm(total=sum(map(len, chains)), unit="job", disable=not chains) as bar:

                def tell(text: str) -> None:
                    bar.write(one_line(text))
                    bar.update()

                run = functools.partial(execute, children=children)
                failures, left_out = run_all(chains, workers, run, tell, deadline)
        finally:  # an interrupted evaluation reports what it has
            for failure in failures:
                print(f"failed: {one_line(failure)}", file=sys.stderr)
            notes = [f"Left out, as {given.minutes:g} minutes were over: {', '.join(left_out)}."] if left_out else []
            print(report(given.out, notes))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
