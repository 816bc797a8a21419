"""The demo's command: ``python -m fwpkm_kernels.demo``."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._commands import CommandError, check_outputs, command, need, one_line, try_all, write_output
from .memory import MEMORIES, Options, set_up
from .report import as_json, plot, show
from .stream import (
    DEFAULT_TEXT,
    NEEDLE_LENGTH,
    PassResult,
    chunks_in_pass,
    default_text,
    make_stream,
    read_pass,
    read_text,
)


def check(options: Options) -> None:
    """Raise CommandError for options that no run can have."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name != "seed" and isinstance(value, (int, float)) and not value > 0:
            raise CommandError(f"{_flag(field.name)} must be positive, got {value}")
    if options.chunk_size < NEEDLE_LENGTH:
        raise CommandError(f"--chunk-size must hold a needle of {NEEDLE_LENGTH} bytes, got {options.chunk_size}")
    if len(set(options.depths)) < len(options.depths) or any(d < 1 or d % options.chunk_size for d in options.depths):
        raise CommandError(f"--depths must be different multiples of --chunk-size {options.chunk_size}")
    if len(set(options.memories)) < len(options.memories):
        raise CommandError(f"--memories must be different, got {' '.join(options.memories)}")
    if options.query_width % 2 or options.top_k > options.sub_keys:
        raise CommandError("--query-width must be even and --top-k at most --sub-keys")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Options]:
    """The command line: where to read and write, and the options of the run."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description="FwPKM as an episodic memory without training: it reads a text, predicts every byte from the eight "
        "before it, and recalls access codes hidden in the text. Memories with and without the key step, and with the "
        "normalized step, are compared.",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help=f"a text (default: {DEFAULT_TEXT})")
    parser.add_argument("--plot", type=Path, default=Path("demo.png"), metavar="PNG", help="(default: demo.png)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write options and results as JSON too")
    choices = {"memories": tuple(MEMORIES), "score": ("idw", "dot"), "backend": ("auto", "torch", "triton")}
    for field in dataclasses.fields(Options):
        default: Any = field.default
        many = isinstance(default, tuple)
        shown = " ".join(map(str, default)) if many else default
        parser.add_argument(
            _flag(field.name),
            type=type(default[0]) if many else type(default),
            nargs="+" if many else None,
            choices=choices.get(field.name),
            default=default,
            metavar="NAME" if field.name == "memories" else None,
            help=f"{field.metadata['help']} (default: {shown})",
        )
    arguments = parser.parse_args(argv)
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)}
    options = Options(**values | {name: tuple(values[name]) for name in ("memories", "depths")})
    check(options)
    return arguments, options


@command("demo")
def main(argv: Sequence[str] | None = None) -> int:
    """Let every memory read the text, and show, plot and save what came out.

    ``argv`` replaces the command line. Returns the exit status.
    """
    arguments, options = parse(argv)
    check_outputs(arguments.json, arguments.plot, read=arguments.file)
    text = read_text(arguments.file, chunks_in_pass(options) * options.chunk_size) if arguments.file else default_text()
    # A missing package is told here, before the work begins.
    tqdm, *_ = (need(name, "demo") for name in ("tqdm", "rich.table", "matplotlib.backends.backend_agg"))
    stream = make_stream(text, options)
    name_of_text = str(arguments.file or DEFAULT_TEXT)
    print(f"text: {one_line(name_of_text)}, {sum(stream.is_text):,} bytes a pass")
    if len(text) < sum(stream.is_text):
        print(f"note: the text has only {len(text):,} bytes, so each pass repeats it")
    shown = {k: ",".join(map(str, x)) if isinstance(x, tuple) else x for k, x in dataclasses.asdict(options).items()}
    print("options:", *(f"{name}={value}" for name, value in shown.items()))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"a needle: {stream.needles[0].text.decode().strip()}", flush=True)
    set_up(options, options.memories[0])  # an error of it comes before the progress bar is drawn
    results: dict[str, list[PassResult]] = {}
    total = len(options.memories) * options.passes * len(stream.data)
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, mininterval=0.5) as bar:
        for name in options.memories:
            results[name] = []
            memory = set_up(options, name)
            for number in range(1, options.passes + 1):
                bar.set_description(f"{name}, pass {number}")
                results[name].append(read_pass(memory, stream, bar.update))
                bar.set_postfix_str(f"{results[name][-1].accuracy:.1%} predicted")
            del memory  # two tables at a time may not fit in memory

    outputs = [lambda: write_output(arguments.plot, plot(results, stream, options))]
    if arguments.json:
        outputs.insert(0, lambda: write_output(arguments.json, as_json(results, stream, options, name_of_text)))
    try:
        try_all(outputs)
    finally:
        show(results, stream, options)
    print(f"plot: {one_line(arguments.plot)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
