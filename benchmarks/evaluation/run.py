"""``make evaluate``: models are trained and measured, several at a time, then shown in tables and plots.

Each run, of one model and seed, has a folder below ``OUT/runs`` with its checkpoint, its results and what its programs
printed. What is there already is kept: an evaluation that was interrupted goes on.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.evaluation import ablations, needles, plots, train
from benchmarks.evaluation.ablations import ABLATIONS, Ablation
from benchmarks.evaluation.models import MODELS, split_name
from benchmarks.evaluation.records import (
    LEARNT,
    Line,
    Table,
    cost_table,
    mqar_table,
    perplexity_table,
    read_lines,
    recall_table,
)
from fwpkm_kernels._commands import CommandError, command, make_folder, need, one_line, try_all, write_output

STORY = ("full", "swa+fwpkm")  #: the models without --full; the slowest first, so that workers end together
HEADLINE = "swa+fwpkm"  #: the model of three seeds and of the ablations
MEASURES = ("needles", "perplexity", "mqar")
RESULTS = ("needles", "ablations", "perplexity", "mqar")  #: files of lines
#: Full attention reads 128K in minutes, and what it has read twice costs four times as much: of long contexts it gets
#: one reading, and in perplexity one order of the documents.
FULL_CELLS = "4096:20x5:1/2,8192:10x10:1/2,32768:5x20:1,131072:2x20:1"
FULL_ORDERS = 1

NOTES = f"""\
A needle counts if all six digits of its code are right by greedy decoding: chance is one in a million, and "controls
found" are needles asked for that are nowhere in the context. Contexts are held-out text, and names of needles are never
those of the training. A model "not learnt" finds less than {100 * LEARNT:.0f} % at its shortest length, after any
number of readings: it has not learnt the task in this budget, and what it finds at other lengths says nothing. Full
attention reads contexts of 32K and 128K once only, since its cost grows with the square of what was read.
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
    """What is common to all runs."""

    out: Path
    device: str = "cpu"
    measures: tuple[str, ...] = MEASURES
    changes: tuple[str, ...] = ()  #: of the training's options, NAME=VALUE
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
    """The jobs of each run in their order; a run's jobs that several rows have in common stand there once."""
    lists = [plan.model(model, seed) for model in models for seed in seeds[model]]
    lists += [plan.ablation(row, ABLATIONS[row]) for row in rows]
    runs: dict[str, dict[Job, None]] = {}
    for jobs in lists:
        runs.setdefault(jobs[0].run, {}).update(dict.fromkeys(jobs))
    return [list(jobs) for jobs in runs.values()]


def execute(job: Job) -> str | None:
    """Run a job in a process of its own; the last line that it printed if it failed."""
    folder = job.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    arguments, unfinished = job.arguments, job.output.with_suffix(".running")
    if job.name == "mqar":  # trains as well, and so has no use for a part of its lines
        if job.output.exists():
            return None
        unfinished.unlink(missing_ok=True)
        arguments = (*arguments, "--out", str(unfinished))
    log = folder / f"{job.name}.log"
    with open(log, "ab") as file:
        started = [sys.executable, "-m", f"benchmarks.evaluation.{job.name}", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        status = subprocess.run(started, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if status == 0 and job.name == "mqar":
        unfinished.replace(job.output)
    lines = re.split(r"[\r\n]+", log.read_text("utf-8", "replace").strip())
    return None if status == 0 else f"status {status}, {lines[-1] or 'without a word'}, see {log}"


def run_all(
    chains: Sequence[Sequence[Job]],
    workers: int,
    execute: Callable[[Job], str | None],
    tell: Callable[[str], object],
) -> list[str]:
    """Run chains at the same time, the jobs of each one after the other; what failed, and why.

    A job that fails stops no other but those that need its training.
    """
    failures: list[str] = []
    is_over = threading.Event()

    def run_chain(jobs: Sequence[Job]) -> None:
        is_trained = True
        for job in jobs:
            if is_over.is_set():
                return
            started = time.monotonic()
            error = execute(job) if is_trained or not job.needs_training else "not run, as the training failed"
            is_trained = is_trained and not (error and job.name == "train")
            if error:
                failures.append(f"{job.title}: {error}")
            tell(f"{job.title}: {error or f'{time.monotonic() - started:.0f} s'}")

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            for done in concurrent.futures.as_completed([pool.submit(run_chain, jobs) for jobs in chains]):
                done.result()
        finally:
            is_over.set()  # where the user interrupts, jobs that run are told by the terminal, and no other begins
    return failures


def collect(out: Path) -> dict[str, list[Line]]:
    """The lines of all runs, by file."""
    return {
        name: [x for path in sorted(out.glob(f"runs/*/{name}.jsonl")) for x in read_lines(path)] for name in RESULTS
    }


def tables_of(lines: dict[str, list[Line]]) -> list[Table]:
    makers = (
        ("needles", functools.partial(recall_table, title="Models")),
        ("needles", cost_table),
        ("ablations", functools.partial(recall_table, title=f"Ablations of {HEADLINE}")),
        ("perplexity", perplexity_table),
        ("mqar", mqar_table),
    )
    return [make(lines[name]) for name, make in makers if lines[name]]


def report(out: Path) -> str:
    """Write lines, tables and plots of all runs that lie below a folder; the tables as text."""
    lines = collect(out)
    for name, mine in lines.items():
        if mine:
            write_output(out / f"{name}.jsonl", "".join(f"{json.dumps(line)}\n" for line in mine))
    tables = tables_of(lines)
    about = [line for mine in lines.values() for line in mine if "commit" in line]
    origin = ""
    if about:
        last = about[-1]
        versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items() if version)
        origin = f"{last['device']}, {last['threads']} thread each; {versions}; commit {last['commit']}.\n"
    texts = [table.markdown() for table in tables]
    write_output(out / "results.md", "\n".join(["# Results of an evaluation\n", NOTES, origin, *texts]))
    logs = {path.parent.name: train.load_checkpoint(path.parent)["log"] for path in sorted(out.glob("runs/*/*.pt"))}
    draw = {
        "recall.png": functools.partial(plots.plot_recall, lines["needles"]),
        "loss.png": functools.partial(plots.plot_losses, logs),
        "perplexity.png": functools.partial(plots.plot_perplexity, lines["perplexity"]),
        "num_keys.png": functools.partial(plots.plot_num_keys, lines["ablations"]),
    }
    try_all(functools.partial(function, out / name) for name, function in draw.items())
    return "\n".join(texts) or "no results\n"


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
    parser.add_argument("--size", default="miniature", help="of the models; miniature if not given")
    parser.add_argument("--cells", help="of needles, as benchmarks.evaluation.needles takes them")
    parser.add_argument("--readings", help="of needles")
    parser.add_argument("--orders", type=int, help="of the documents in perplexity")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, help="choose the largest size that is trained in half of them")
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
    for module in ("matplotlib.figure", "rich"):
        need(module, "evaluation")
    failures: list[str] = []
    if not given.report:
        size, changes = given.size, tuple(given.set)
        measures = tuple(given.measures)
        if given.minutes is not None:
            runs = sum(map(len, seeds.values())) + len(rows)
            with train.on_device(given.device) as device:
                share = given.minutes / 2 / max(1, runs)
                options = train.choose_size(device, share, models[0] if models else HEADLINE)
            phases = ",".join("x".join(map(str, phase)) for phase in options.plan)
            size, changes = options.size, (f"plan={phases}", *changes)
        plan = Plan(given.out, given.device, measures, changes, size, given.cells, given.readings, given.orders)
        chains = chains_of(plan, models, seeds, rows)
        if given.fresh:
            for jobs in chains:
                shutil.rmtree(plan.folder(jobs[0].run), ignore_errors=True)
        workers = given.workers or (2 if given.device == "cpu" else 1)
        with tqdm(total=sum(map(len, chains)), unit="job") as bar:

            def tell(text: str) -> None:
                bar.write(one_line(text))
                bar.update()

            failures = run_all(chains, workers, execute, tell)
    print(report(given.out))
    for failure in failures:
        print(f"failed: {one_line(failure)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
