"""Multi-query associative recall: ``python -m benchmarks.evaluation.mqar --model swa+fwpkm --out mqar.jsonl``.

As in Zoology, arXiv 2312.04927: the first half of a row gives pairs of a key and its value, at drawn places between
fillers; the second half has keys again, after each of which its value is to be predicted. With `overwrite` half of the
keys are given twice, and the last value is right; how often the older one comes is measured beside it. Controls are
keys that were never given: "right" for one of them is the value of some other key of the row, so that they show how
often a model is right that only knows which values a row has. Chance is one of all values.

Models are trained on short rows of all kinds and tested on longer ones too. Each row has memories of its own. Chunks of
a memory are short here, since all tokens of a chunk are written at once: if a key comes twice in one chunk, neither of
its values is the last.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evaluation.models import (
    MODELS,
    ContextAttention,
    Size,
    memories_of,
    new_cache,
    size_options,
    split_name,
)
from benchmarks.evaluation.options import Options, Phase
from benchmarks.evaluation.records import append_lines, stamp
from benchmarks.evaluation.train import Trainer, check_counts, check_device
from benchmarks.evaluation.under_test import clock, read, state_bytes
from fwpkm_kernels._commands import check_outputs, command, need

# Of the 256 tokens, keys are the first, values follow, and the others are fillers.
KEYS, VALUES = 160, 64
CONTROLS = 16  #: in each row
NONE = -100  #: where nothing is asked for; a cross-entropy ignores it

TRAINING_PAIRS = (4, 8, 16, 32)
LENGTHS = (256, 1024, 4096)
PAIRS = (8, 32, 128)

SIZE = Size(
    hidden_size=64, layers=2, heads=2, kv_heads=2, head_dim=32, parameters=120_000, window=32,
    gdn={"heads": 2, "head_dim": 32},
    memory_layers=(1,), pkm_layers=(1,),
    memory={
        "scope": "sequence", "initial_memory": "frozen", "num_keys": 64, "key_dim": 64, "value_dim": 64, "top_k": 8,
        "chunk_size": 16,
    },
    pkm={"num_keys": 64, "heads": 1, "key_dim": 64, "value_dim": 64, "top_k": 8},
)  # fmt: skip


class Rows(NamedTuple):
    """Rows of tokens, and what is asked for after each of them; int64 [rows, length]."""

    tokens: Tensor
    answers: Tensor  #: the value that is to be predicted, or NONE
    older: Tensor  #: the value that the key had before that, or NONE
    controls: Tensor  #: the value of another key, after one that was never given, or NONE


class Recall(NamedTuple):
    """What was recalled in rows of one kind."""

    right: int
    asked: int
    overwritten_right: int  #: of `right`, those of keys that were given twice
    overwritten: int  #: of `asked`, those of keys that were given twice
    stale: int  #: of `overwritten`, those for which the older value came
    controls_right: int
    controls: int
    chance: float  #: that a guess among all values is right
    seconds: float  #: of reading all rows
    state_bytes: int  #: what the model keeps of one row


def fits(length: int, pairs: int, overwrite: bool) -> bool:
    """Whether such rows exist: pairs fit into one half, queries into the other, and all keys differ."""
    given = pairs + pairs // 2 * overwrite
    return 1 <= pairs <= min(KEYS, length // 2) - CONTROLS and 2 * given <= length // 2


def make_rows(rows: int, length: int, pairs: int, overwrite: bool, rng: random.Random) -> Rows:
    """Rows with `pairs` different keys in each.

    Raises:
        ValueError: they do not fit.
    """
    if not fits(length, pairs, overwrite):
        raise ValueError(f"`pairs` must fit into a row, got {pairs} of {length} tokens with overwrite={overwrite}")
    return Rows(*(torch.cat(x) for x in zip(*(_row(length, pairs, overwrite, rng) for _ in range(rows)), strict=True)))


def _row(length: int, pairs: int, overwrite: bool, rng: random.Random) -> Tensor:
    """The tensors of `Rows` for one row, [4, 1, length]."""
    half = length // 2
    tokens = [rng.randrange(KEYS + VALUES, 256) for _ in range(length)]
    keys = rng.sample(range(KEYS), pairs + CONTROLS)
    given = keys[:pairs] + rng.sample(keys[:pairs], pairs // 2 * overwrite)
    rng.shuffle(given)
    values: dict[int, int] = {}
    older: dict[int, int] = {}
    for i, place in enumerate(sorted(rng.sample(range(half - len(given)), len(given)))):
        key = given[i]
        if key in values:
            older[key] = values[key]
        values[key] = rng.choice([x for x in range(KEYS, KEYS + VALUES) if x != older.get(key)])
        tokens[place + i : place + i + 2] = key, values[key]
    row = torch.full((4, 1, length), NONE)
    for key, place in zip(keys, rng.sample(range(half, length), len(keys)), strict=True):
        tokens[place] = key
        row[1, 0, place] = values.get(key, NONE)
        row[2, 0, place] = older.get(key, NONE)
        row[3, 0, place] = NONE if key in values else rng.choice(list(values.values()))
    row[0, 0] = torch.tensor(tokens)
    return row


class MqarTrainer(Trainer):
    """Trains on rows of `TRAINING_PAIRS`, with and without `overwrite`; the loss is that of the answers alone."""

    def __init__(self, options: Options, device: str = "cpu") -> None:
        super().__init__(options, None, device, size=SIZE)
        for module in self.model.modules():
            if isinstance(module, ContextAttention):  # its head start is for contexts of several tokens
                module.conv.weight.data[..., :-2] = 0.0

    def batch(self, part: int) -> tuple[Tensor, Tensor]:
        o, phase = self.options, self.options.phase(self.step)
        rng = random.Random(f"train {o.seed} {self.step} {self.rank} {part}")
        kinds = [(rng.choice(TRAINING_PAIRS), rng.random() < 0.5) for _ in range(phase.batch)]
        rows = [make_rows(1, phase.length, *kind, rng) for kind in kinds]
        return (
            torch.cat([x.tokens for x in rows]).to(self.device),
            torch.cat([x.answers for x in rows]).to(self.device),
        )

    def loss(self, tokens: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch, a scalar with its graph, and the figures that `Trainer.loss` has, [4].

        Args:
            tokens: int64 [batch, length].
            answers: the values that are to be predicted, or NONE, int64 [batch, length].
        """
        output = self.called(tokens, output_gate_means=True)
        loss = F.cross_entropy(output.logits.mT, answers)
        gate = torch.stack(output.gate_means).mean() if output.gate_means else loss.new_zeros(())
        right = (output.logits.argmax(-1) == answers).sum() / (answers != NONE).sum()
        figures = torch.stack((loss / math.log(2), loss, right, gate)).detach()
        return loss + self.options.gate_price * gate, figures


def make_options(model: str, seed: int, steps: int | None = None) -> Options:
    """How a model is trained: without a memory steps are cheaper, and more of them are made.

    Every row begins with keys that are not spread yet, so the key step works in tests too.
    """
    steps = steps or (120 if split_name(model)[1] else 500)
    return Options(model, "mqar", seed, plan=(Phase(256, 8, steps),), gate_price=0.0, test_memory={})


def train_mqar(
    options: Options, device: str = "cpu", progress: Callable[[int], object] = lambda count: None
) -> MqarTrainer:
    """A trainer that has trained its model, whose memories have the options of tests."""
    trainer = MqarTrainer(options, device)
    while not trainer.is_done:
        trainer.train_step()
        progress(1)
    for memory in memories_of(trainer.model.eval()):
        memory.options = memory.options._replace(**options.test_memory)
    return trainer


def count(predictions: Tensor, rows: Rows) -> list[int]:
    """The counts of `Recall`, of the tokens predicted after each one, [rows, length]."""
    right, is_overwritten = predictions == rows.answers, rows.older != NONE
    counted = (
        right, rows.answers != NONE, right & is_overwritten, is_overwritten, predictions == rows.older,
        predictions == rows.controls, rows.controls != NONE,
    )  # fmt: skip
    return [int(x.sum()) for x in counted]


@torch.no_grad()
def measure(model: Any, length: int, pairs: int, overwrite: bool, sequences: int, seed: int) -> Recall:
    """What a model recalls in rows that it was not trained on, each read in one call without a cache."""
    rng, counts, seconds = random.Random(f"test {seed} {length} {pairs} {overwrite}"), [0] * 7, 0.0
    for _ in range(sequences):
        rows = Rows(*(x.to(model.device) for x in make_rows(1, length, pairs, overwrite, rng)))
        started = clock(model)
        predictions = model(rows.tokens).logits.argmax(-1)
        seconds += clock(model) - started
        counts = [x + y for x, y in zip(counts, count(predictions, rows), strict=True)]
    cache = new_cache(model)
    for piece in rows.tokens[0].split(length - 1):  # a window's cache keeps all of a piece until the next one comes
        read(model, piece, cache)
    return Recall(*counts, 1 / VALUES, round(seconds, 3), state_bytes(cache))


@command("mqar")
def main(argv: Sequence[str] | None = None) -> int:
    """Train a model and append a line for each cell; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation.mqar", description="Measure recall.")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--seed", type=int, default=0, help="of training and tests, which share no rows")
    parser.add_argument("--steps", type=int, help="of training; 120 with a fast-weight memory, else 500")
    parser.add_argument("--keys", type=int, default=128, help="asked for in each cell, in two rows at least")
    parser.add_argument("--out", required=True, help="file of JSON lines to append to")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(argv)
    check_counts(steps=given.steps, keys=given.keys)
    check_device(given.device)
    check_outputs(given.out)
    tqdm = need("tqdm", "evaluation").tqdm
    options = make_options(given.model, given.seed, given.steps)
    started = time.process_time()
    with tqdm(total=options.steps, desc=given.model, unit="step") as bar:
        trainer = train_mqar(options, given.device, bar.update)
    last = trainer.log[-10:]
    line = {
        "model": given.model,
        "seed": given.seed,
        "training_steps": options.steps,
        "training_tokens": int(sum(step["tokens"] for step in trainer.log)),
        "training_seconds": round(sum(step["seconds"] for step in trainer.log), 1),
        "training_cpu_seconds": round(time.process_time() - started, 1),
        "training_right": round(sum(step["digits_right"] for step in last) / len(last), 4),
        "size_options": size_options(SIZE),
        **stamp(options, given.device),
    }
    cells = [(x, y, z) for x in LENGTHS for y in PAIRS for z in (False, True) if fits(x, y, z)]
    for length, pairs, overwrite in tqdm(cells, desc=given.model, unit="cell"):
        recall = measure(trainer.model, length, pairs, overwrite, max(2, given.keys // pairs), given.seed)
        about = {"length": length, "pairs": pairs, "overwrite": overwrite}
        append_lines(given.out, [{**about, **recall._asdict(), **line}])
    return 0


if __name__ == "__main__":
    sys.exit(main())
