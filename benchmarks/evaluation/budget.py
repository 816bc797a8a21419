"""The largest size that can be trained in a given time."""

import dataclasses
from collections.abc import Callable

import torch

from benchmarks.evaluation.models import SIZES
from benchmarks.evaluation.options import Options, default_options
from benchmarks.evaluation.text import Corpus, python_text
from benchmarks.evaluation.train import Trainer


def plan_seconds(options: Options, corpus: Corpus, device: str) -> float:
    """How long the whole plan takes, judged by a few steps of each phase; the first of them is not counted."""
    trainer, seconds = Trainer(options, corpus, device), 0.0
    for phase in options.plan:
        timed = [trainer.train_step()["seconds"] for _ in range(min(4, phase.steps))]
        timed = timed[1:] or timed
        seconds += phase.steps * sum(timed) / len(timed)
        trainer.step += max(0, phase.steps - 4)
    return seconds


def choose_size(
    device: str,
    minutes: float,
    model: str = "swa+fwpkm",
    *,
    corpus: Corpus | None = None,
    measure: Callable[[Options, Corpus, str], float] = plan_seconds,
) -> Options:
    """The largest size whose plan takes no longer than so many minutes; else the smallest, with a plan cut to fit.

    Sizes are tried from the smallest, until one takes too long or has no room on a GPU: steps of one far too large
    would alone take longer than there is.

    Args:
        measure: how long a plan takes, in seconds.
    """
    corpus, chosen, cut = corpus or python_text(), None, 1.0
    for size in SIZES:
        options = default_options(model, size)
        try:
            seconds = measure(options, corpus, device)
        except torch.OutOfMemoryError:
            if chosen is None:
                raise
            break
        finally:  # the next size, or the processes that train, need the room of this one
            torch.cuda.empty_cache()
        if seconds > 60 * minutes:
            cut = 60 * minutes / seconds
            break
        chosen = options
    if chosen is None:
        plan = tuple(phase._replace(steps=max(1, int(cut * phase.steps))) for phase in options.plan)
        chosen = dataclasses.replace(options, plan=plan)
    return chosen
