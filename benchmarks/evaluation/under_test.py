"""A trained model under test: loaded, given texts to read, and what every line of its results says of it."""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.evaluation.models import memories_of
from benchmarks.evaluation.options import Options
from benchmarks.evaluation.records import Line, stamp
from benchmarks.evaluation.text import Corpus
from benchmarks.evaluation.train import check_device, corpus_of, load_model
from fwpkm_kernels._commands import CommandError
from fwpkm_kernels.layers import FastWeightProductKeyMemory, advance_memory

PIECE = 512  #: bytes of a call while a context is read
WARM_UP = 2**17  #: bytes of the training text that a fresh memory reads before a test


def clock(model: Any) -> float:
    """Seconds, once the model's device has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


@torch.no_grad()
def read(model: Any, data: torch.Tensor, cache: Any, progress: Callable[[int], object] = lambda count: None) -> None:
    """Read bytes [T] into a cache."""
    for piece in data.split(PIECE):
        model(piece.unsqueeze(0), cache=cache, use_cache=True, logits_to_keep=1)
        progress(len(piece))


def state_bytes(cache: Any) -> int:
    """Bytes of the tensors in a cache, and of what memories hold.

    A view counts for its own size, since attention's window is a view of all that a piece has brought. Several views of
    one storage count for no more than the storage.
    """
    views: dict[tuple[int, int], dict[tuple[Any, ...], int]] = {}

    def visit(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            storage = x.untyped_storage()
            views.setdefault((storage.data_ptr(), storage.nbytes()), {})[x.data_ptr(), x.shape] = x.nbytes
        elif isinstance(x, dict):
            for y in x.values():
                visit(y)
        elif isinstance(x, (list, tuple)):
            for y in x:
                visit(y)

    of_memories = 0
    for layer in cache.layers:
        visit(vars(layer))
        if (memory := getattr(layer, "memory", None)) is not None:
            of_memories += memory.num_bytes
    return of_memories + sum(min(size, sum(shown.values())) for (_, size), shown in views.items())


@torch.no_grad()
def resize_memories(model: Any, num_keys: int, corpus: Corpus, seed: int) -> None:
    """Put fresh memories with another number of sub-keys in the place of those of a model.

    They first read some of the training text as in training, but without gradients, since sub-keys that no key step has
    spread yet are found unevenly.
    """
    torch.manual_seed(seed)
    for name, module in list(model.named_modules()):
        if isinstance(module, FastWeightProductKeyMemory):
            model.set_submodule(name, module.resized(num_keys))
    rng = random.Random(seed)
    model.train()
    for _ in range(WARM_UP // 4096):
        start = rng.randrange(len(corpus.training) - 4096)
        data = torch.tensor(list(corpus.training[start : start + 4096]), device=model.device)
        model(data.unsqueeze(0), logits_to_keep=1)
        advance_memory(model)
    model.eval()


def about(options: Options, state: dict[str, Any], corpus: Corpus, device: str, row: str | None) -> Line:
    """The fields about a trained model that every line of its results has."""
    log, origin = state["log"], state.get("origin", {})
    last = log[-10:]
    return {
        "row": row or options.model,
        "model": options.model,
        "seed": options.seed,
        "training_bytes": int(sum(step["tokens"] for step in log)),
        "training_cpu_seconds": round(state["cpu_seconds"], 1),
        **{f"training_{name}": origin.get(name) for name in ("id", "commit", "versions", "device")},
        **{
            f"training_{name}": round(sum(step[name] for step in last) / len(last), 4)
            for name in ("digits_right", "gate")
        },
        "text": corpus.fingerprint,
        "held_out": sorted(corpus.held_out),
        "size_options": state.get("size_options"),
        **stamp(options, device),
    }


def load_trained(
    folder: Path, device: str, files: Sequence[Path] | None = None, num_keys: int | None = None
) -> tuple[Any, Options, dict[str, Any], Corpus]:
    """A model as it is tested, its options and checkpoint, and the text, which must be that of its training.

    With `num_keys` its memories are fresh ones with so many sub-keys.
    """
    check_device(device)
    model, options, state = load_model(folder, device)
    corpus = corpus_of(files)
    if state["corpus"] != corpus.fingerprint:
        raise CommandError(
            f"{folder} was trained on another text: --text names a user's own, and each version of Python has its own"
        )
    if state["step"] < options.steps:
        raise CommandError(f"{folder} has {state['step']} of {options.steps} steps: finish its training first")
    if num_keys is not None:
        resize_memories(model, num_keys, corpus, options.seed)
    for memory in memories_of(model):
        memory.options = memory.options._replace(**options.test_memory)
    return model, options, state, corpus
