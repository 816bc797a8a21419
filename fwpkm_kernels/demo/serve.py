"""A server of many sequences, each with a memory of its own: ``python -m fwpkm_kernels.demo.serve``.

Requests come and go: each has a prompt, and wants so many bytes after it. All that are there go on together, step by
step, in one call of a `MemoryPool`: those that still read their prompts by pieces, the others by the byte that they got
last. When the pool is full, the request that was let in or taken back last goes to the host until there is room. The
model is random and untrained, a memory between an embedding of bytes and its transpose; what it says is nonsense, but
each request gets the same bytes as if it were alone.
"""

import argparse
import dataclasses
import random
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import MemoryPool, PoolFullError, fast_weight_memory_step
from .._commands import CommandError, command


@dataclasses.dataclass
class Request:
    """What somebody wants, and what has come of it."""

    prompt: list[int]
    wanted: int  #: how many bytes after the prompt
    session: int = -1
    read: int = 0  #: how many tokens the session has read
    said: list[int] = dataclasses.field(default_factory=list)

    def coming(self, most: int) -> list[int]:
        """What the session reads next: at most so much of the prompt, or what was said last."""
        return (self.prompt + self.said)[self.read :][:most]


class Report(NamedTuple):
    """What serving has taken."""

    tokens: int  #: read, prompts included
    steps: int
    seconds: float
    most_sessions: int  #: at a time
    evictions: int
    session_bytes: list[int]  #: of each request, when it ended


class Model:
    """Random weights around a memory: tokens to queries, targets and gates, and reads to the next byte."""

    def __init__(self, num_keys: int, width: int, chunk_size: int, capacity: int | str, device: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(device)

        self.embedding, self.to_query, self.to_target = randn(256, width), randn(width, width), randn(width, width)
        self.to_gate, self.chunk_size = randn(width), chunk_size
        self.pool = MemoryPool(randn(1, 2, num_keys, width // 2), randn(num_keys**2, width), capacity=capacity)

    @torch.inference_mode()
    def step(self, sessions: list[int], tokens: list[list[int]]) -> list[int]:
        """Read the next tokens of each session; the byte that each says then."""
        length = max(map(len, tokens))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in tokens])
        x = self.embedding[ids.to(self.embedding.device)]
        queries, targets, gates = (x @ self.to_query).unsqueeze(2), x @ self.to_target, (x @ self.to_gate).sigmoid()
        lengths = torch.tensor([len(row) for row in tokens])
        read = fast_weight_memory_step(
            self.pool, queries, targets, gates=gates, sessions=sessions, lengths=lengths, chunk_size=self.chunk_size
        )
        return (x[:, -1] + read[:, -1]).mm(self.embedding.mT).argmax(-1).tolist()


def serve(model: Model, requests: list[Request], most: int, every: int) -> Report:
    """Serve all requests, of which one comes after every `every` steps, and at most `most` are there at a time."""
    pool, began = model.pool, time.perf_counter()
    waiting, active, evicted = list(requests), [], []  # type: tuple[list[Request], list[Request], list[Request]]
    tokens = steps = most_sessions = evictions = 0
    session_bytes: list[int] = []
    has_ended = False  # a request, since the last one was evicted: else there is no more room than before
    while waiting or active or evicted:
        while evicted and len(active) < most and (has_ended or not active):
            try:
                pool.restore(evicted[0].session)
            except PoolFullError as error:
                if not active:
                    raise CommandError(f"--capacity is too small for one request: {error}") from None
                break
            active.append(evicted.pop(0))
        if waiting and not evicted and len(active) < most and steps >= every * (len(requests) - len(waiting)):
            active.append(waiting.pop(0))
            active[-1].session = pool.open()
        steps += 1
        if not active:
            continue
        # No more than a chunk, so that a long prompt does not hold up the others.
        coming = [request.coming(model.chunk_size) for request in active]
        try:
            said = model.step([request.session for request in active], coming)
        except PoolFullError as error:
            if len(active) == 1:
                raise CommandError(f"--capacity is too small for one request: {error}") from None
            evicted.append(active.pop())
            pool.evict(evicted[-1].session)
            evictions, has_ended = evictions + 1, False
            continue
        most_sessions, tokens = max(most_sessions, len(active)), tokens + sum(map(len, coming))
        for request, read, byte in zip(active, coming, said, strict=True):
            request.read += len(read)
            if request.read >= len(request.prompt):
                request.said.append(byte)
            if len(request.said) == request.wanted:
                session_bytes.append(pool.num_bytes(request.session))
                pool.close(request.session)
                has_ended = True
        active = [request for request in active if len(request.said) < request.wanted]
    return Report(tokens, steps, time.perf_counter() - began, most_sessions, evictions, session_bytes)


def make_requests(count: int, prompt: int, wanted: int, seed: int) -> list[Request]:
    """Random requests whose prompts and answers have up to so many bytes."""
    drawn = random.Random(seed)
    return [
        Request([drawn.randrange(256) for _ in range(drawn.randint(1, prompt))], drawn.randint(1, wanted))
        for _ in range(count)
    ]


@command("serve")
def main(argv: Sequence[str] | None = None) -> int:
    """Serve random requests, and say how fast it went and what a session took; ``argv`` replaces the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.serve", description="Memories of many sequences.")
    numbers = {
        "requests": (24, "how many come"),
        "sessions": (8, "how many are served at a time"),
        "every": (2, "steps from one request to the next"),
        "prompt": (512, "bytes of the longest prompt"),
        "wanted": (128, "bytes of the longest answer"),
        "num-keys": (64, "sub-keys of a half; the table has as many rows squared"),
        "width": (64, "of queries and values"),
        "chunk-size": (64, "tokens that are written together"),
        "seed": (0, "of the model and the requests"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--capacity", default="8 MiB", help="bytes of rows for all sessions (default: 8 MiB)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: a GPU)")
    a = parser.parse_args(argv)
    for name in numbers:
        if name != "seed" and (value := getattr(a, name.replace("-", "_"))) < 1:
            raise CommandError(f"--{name} must be positive, got {value}")
    if a.num_keys < 8 or a.width % 2:
        raise CommandError(f"--num-keys must be at least 8, and --width even, got {a.num_keys} and {a.width}")
    try:
        model = Model(a.num_keys, a.width, a.chunk_size, a.capacity, a.device, a.seed)
    except (RuntimeError, ValueError) as error:
        raise CommandError(f"no such model: {str(error).splitlines()[0]}") from None
    report = serve(model, make_requests(a.requests, a.prompt, a.wanted, a.seed), a.sessions, a.every)
    table = a.num_keys**2 * a.width * 4
    print(f"{a.requests} requests, {report.tokens:,} tokens in {report.steps:,} steps on {a.device}")
    print(f"{report.tokens / report.seconds:,.0f} tokens a second, at most {report.most_sessions} sessions at a time")
    mean, most = sum(report.session_bytes) / a.requests, max(report.session_bytes)
    print(f"a session took {mean:,.0f} bytes, at most {most:,}; a table of its own would take {table:,}")
    print(f"{report.evictions} times a session was moved to the host")
    return 0


if __name__ == "__main__":
    sys.exit(main())
