"""What a fast-weight layer would cost on 8, 64 and 512 GPUs: a model of bytes and times; nothing has run on several.

    python -m benchmarks.scaling            # the tables
    python -m benchmarks.scaling --write    # into docs/distributed.md

What ranks send is from `benchmarks.payloads`. Bytes of a chunk are those of `benchmarks.launches`, at the width that a
rank has; the time of a launch is that of `benchmarks.estimates`, but for its instructions, which take a compiler.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from fwpkm_kernels._commands import check_outputs, command, reading, write_output

from .estimates import MEMORY, launch_micros
from .files import markdown_table
from .launches import count
from .payloads import INFINIBAND, NVLINK, Payload, Place, Sizes, columns, data, rows, seconds, sent
from .record import CHUNK, need_compiler, on_meta, training
from .traffic import distinct

HBM = 3.35e12  #: bytes a second of an H100's memory, as its data sheet has it
#: GPUs in a node, and bytes of one that tables may take.
NODE, ROOM = 8, 64e9


class Work(NamedTuple):
    """A chunk of 512 tokens of each item, forward and backward: bytes and seconds. And bytes of a sequence, once."""

    bytes: float
    seconds: float  #: as `benchmarks.estimates` has it, but without instructions
    once: float


def work(width: int, batch: int = 8) -> Work:
    """Counted on meta tensors of the paper's sizes, with so many columns: what three chunks have more than two."""
    sums: dict[tuple[int, str, str], list[float]] = {}
    bytes_of_two = 0.0
    for sign, chunks in ((-1, 2), (1, 3)):
        with on_meta():
            passes = [count(part) for part in training(batch, chunks * CHUNK, width=width)]
        for key, x in (((i, x.stage, x.name), x) for i, counts in enumerate(passes) for x in counts):
            moved = x.traffic.read + x.traffic.written
            total = sums.setdefault(key, [0.0, 0.0, 0.0])
            for i, number in enumerate((1.0, moved, launch_micros(0.0, x.traffic)[0] / 1e6)):
                total[i] += sign * number
            bytes_of_two += moved * (sign < 0)
    moved = sum(total[1] for total in sums.values())
    return Work(moved, sum(total[2] for total in sums.values() if total[0] > 0), bytes_of_two - 2 * moved)


def layouts(s: Sizes, gpus: int) -> list[tuple[str, int, list[tuple[Payload, Place]]]]:
    """Ways to train on so many GPUs, in nodes of 8: a name, ranks by columns, and collectives with their places."""
    module, nodes = s.layer(), gpus // NODE
    every, node, far = Place(NODE, nodes), Place(NODE), Place(1, nodes)

    def within(place: Place, calls: list[Payload]) -> list[tuple[Payload, Place]]:
        return [(call, place) for call in calls]

    of_columns, by_rows = within(node, columns(s)), rows(s, module, gpus)
    found = [("data", 1, within(every, data(s, module))), ("rows", 1, within(every, by_rows))]
    if nodes == 1:
        again = within(every, rows(s, module, gpus, again=True))
        return [*found, ("rows, gathered again", 1, again), ("columns", NODE, of_columns)]
    found.append(("columns 8 × data", NODE, of_columns + within(far, data(s, module, NODE))))
    found.append(("columns 8 × rows", NODE, of_columns + within(far, rows(s, module, nodes, NODE))))
    if nodes == NODE:
        over_nodes = within(far, columns(s)) + within(node, data(s, module, NODE))
        found.append(("columns over nodes × data within", NODE, over_nodes))
    return [*found, (f"columns {gpus}", gpus, within(every, columns(s)))]


def table_of_steps(s: Sizes, works: dict[int, Work]) -> str:
    """Bytes and times of a step on 8, 64 and 512 GPUs."""
    lines = []
    for gpus in (8, 64, 512):
        for name, parts, calls in layouts(s, gpus):
            near = sum(sent(*each) for each in calls if each[1].near > 1)
            far = sum(sent(call, place) / place.near for call, place in calls if place.nodes > 1)
            between, own = sum(seconds(*each) for each in calls), s.length // s.chunk * works[parts].seconds
            own += works[parts].once / MEMORY
            batches = gpus // parts
            cells = [f"{x / 1e6:.0f}" for x in (near, far)] + [f"{1e3 * x:.2f}" for x in (between, own)]
            lines.append([f"{gpus}: {name}", batches, *cells, f"{1e6 * (between + own) / batches:.0f}"])
    heads = ["GPUs", "batches", "MB, NVLink", "MB, InfiniBand", "ms between ranks", "ms of memory", "µs a batch"]
    return markdown_table(heads, lines)


def table_of_chunks(s: Sizes, works: dict[int, Work]) -> str:
    """What columns save and cost of a chunk, forward and backward."""
    lines, chunks = [], s.length // s.chunk
    for ranks, its in works.items():
        moved = sum(sent(call, Place(ranks)) for call in columns(s)) / chunks
        within = Place(min(ranks, NODE), -(-ranks // NODE))
        near, far = (sum(seconds(call, x) for call in columns(s)) / chunks for x in (within, Place(1, ranks)))
        needs = "–" if ranks == 1 else f"{moved / (works[1].seconds - its.seconds) / 1e9:.0f}"
        row = s.value_dim * s.itemsize // ranks
        times = (its.bytes / HBM, its.seconds, near, its.seconds + near, its.seconds + far)
        cells = [f"{its.bytes / 1e6:.0f}", f"{moved / 1e6:.1f}", *(f"{1e6 * x:.0f}" for x in times)]
        lines.append([ranks, row, *cells, needs])
    heads = ["ranks", "bytes of a row", "MB, memory", "MB sent", "µs, bytes alone", "µs estimated", "µs of collectives"]
    return markdown_table([*heads, "both", "both, one GPU a node", "GB/s to pay"], lines)


def table_of_tables(s: Sizes) -> str:
    """Larger tables: their memory, ms between ranks for a batch, and with how many ranks data sends no more of it.

    In training a table has a gradient and two moments of Adam. Of a batch columns send 2·B·T·D, data 2·N·D/ranks.
    """
    lines = []
    for num_keys in (512, 1024, 2048, 4096):
        larger = s._replace(num_keys=num_keys)
        cells = [f"{larger.table / 1e9:.1f}", f"{4 * larger.table / 1e9:.1f}", math.ceil(4 * larger.table / ROOM)]
        for gpus, names in (8, ("data", "columns")), (64, ("data", "columns 8 × data", "columns 64")):
            found = {name: (parts, calls) for name, parts, calls in layouts(larger, gpus)}
            for parts, calls in (found[name] for name in names):
                cells.append(f"{1e3 * sum(seconds(*each) for each in calls) * parts / gpus:.2f}")
        lines.append([num_keys**2, *cells, num_keys**2 // s.tokens])
    heads = ["slots", "GB of table", "GB in training", "GPUs at least", "8: data", "8: columns", "64: data"]
    heads += ["64: columns 8 × data", "64: columns 64", "equal at"]
    return markdown_table(heads, lines)


def table_of_pipeline(s: Sizes, chunk_of_eight: Work, chunk_of_one: Work) -> str:
    """Rows that a rank hands to the next one, where each has an eighth of the tokens."""
    lines, row, slots = [], s.value_dim * s.itemsize, s.num_keys**2
    for name, tokens, its in (("8 × 4096", s.tokens, chunk_of_eight), ("1 × 131 072", 131072, chunk_of_one)):
        own = tokens // NODE * s.heads * s.top_k
        chunks = tokens // NODE // s.chunk // (s.batch if its is chunk_of_eight else 1)
        for boundary in (1, 4, 7):
            met = distinct(own * boundary, slots)
            read = distinct(own, slots) * met / slots  # accesses are uniform
            gather = tokens * row * (NODE - 1) / NODE
            times = (met * row / NVLINK, met * row / INFINIBAND, chunks * its.seconds)
            cells = [f"{x / 1e6:.0f}" for x in (met * row, read * row, gather)] + [f"{1e6 * x:.0f}" for x in times]
            lines.append([f"{name}: {boundary}", *cells])
    heads = ["tokens: boundary", "MB, touched", "MB, if the next reads them", "MB, columns", "µs, NVLink"]
    return markdown_table([*heads, "µs, InfiniBand", "µs of its chunks"], lines)


def tables() -> list[str]:
    """All of them, as they stand in the page."""
    s = Sizes()
    works = {ranks: work(s.value_dim // ranks) for ranks in (1, 2, 4, 8, 16, 64, 512)}
    last = table_of_pipeline(s, works[1], work(s.value_dim, batch=1))
    return [table_of_steps(s, works), table_of_chunks(s, works), table_of_tables(s), last]


TABLE = Path(__file__).parent.parent / "docs" / "distributed.md"
_TABLE = re.compile(r"(?<=<!-- benchmarks.scaling -->\n\n)\|.*?(?=\n\n)", re.DOTALL)


def filled_in(page: str, tables: list[str]) -> str:
    """The page with these tables, each below a mark."""
    left = iter(tables)
    return _TABLE.sub(lambda found: next(left), page)


@command("scaling")
def main() -> int:
    """Print the tables, or write them. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write them into docs/{TABLE.name}, and print nothing")
    arguments = parser.parse_args()
    need_compiler()
    check_outputs(TABLE if arguments.write else None)
    found = tables()
    if arguments.write:
        with reading(TABLE):
            page = TABLE.read_text("utf-8")
        write_output(TABLE, filled_in(page, found))
    else:
        print("\n\n".join(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
