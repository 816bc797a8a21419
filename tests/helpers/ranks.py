"""Functions on several ranks: processes with a process group, which are started once and then asked again and again.

A process that imports torch takes seconds to start. So there is one pool of processes for each number of ranks, which
lives until pytest ends; each call has a process group of its own. A rank has a GPU of its own where there are enough of
them, else all are on the CPU and talk by gloo.
"""

import atexit
import contextlib
import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

Function = Callable[..., Any]

#: Seconds that the other ranks have to answer once one has failed: they may wait for it in a collective.
GRACE = 2.0
#: Seconds in which a process group must be gone once all ranks have returned.
CLOSING = 30.0


class RankError(Exception):
    """What ranks have raised, as text, and the exit codes of those that have died; by rank, what came first first."""

    def __init__(self, errors: dict[int, str], exit_codes: dict[int, int | None]) -> None:
        died = [f"rank {rank} died with exit code {code}" for rank, code in exit_codes.items()]
        raised = [f"rank {rank} raised:\n{text}" for rank, text in errors.items()]
        super().__init__("\n".join(died + raised))
        self.errors, self.exit_codes = errors, exit_codes


class Answer(NamedTuple):
    """What a rank says of a call: a pickled result, or an exception, as text and pickled."""

    result: bytes = b""
    text: str = ""
    error: bytes = b""


def run_ranks(
    function: Function,
    size: int,
    *args: Any,
    expects_errors: bool = False,
    timeout: float = 120.0,
    group_timeout: float = 60.0,
) -> list[Any]:
    """Call function(*args) on each of `size` ranks, within a process group; what each has returned.

    `function` is one of a module, which the ranks import by name. Tensors come back on the CPU. With `expects_errors`
    an exception is returned like a result; one that cannot be pickled as its type's name and its message. Otherwise it
    raises a RankError, as the end of a process always does. A rank that has not answered after `timeout` seconds raises
    a TimeoutError; a collective of the group raises after `group_timeout`. After an error that is raised here the next
    call has new processes.
    """
    work = pickle.dumps((function, args, group_timeout))
    pool = _pools.get(size)
    if pool is None or pool.owner != os.getpid():  # a fork of this process does not share its ranks
        pool = _pools[size] = _Pool(size)
    try:
        return pool.call(work, expects_errors, timeout)
    except BaseException:
        pool.kill()
        del _pools[size]
        raise


def rank_device() -> torch.device:
    """The device of this rank, within a call."""
    return torch.device("cuda", dist.get_rank()) if _has_gpus(dist.get_world_size()) else torch.device("cpu")


class _Pool:
    """Processes that wait for calls."""

    def __init__(self, size: int) -> None:
        self.owner = os.getpid()
        self.folder = tempfile.TemporaryDirectory(prefix="fwpkm-kernels-ranks-")
        self.calls = 0
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process shows
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, work: bytes, expects_errors: bool, timeout: float) -> list[Any]:
        # A file of its own: what another group has left in it would be taken for this one's.
        self.calls += 1
        self.send((str(Path(self.folder.name) / str(self.calls)), work))
        answers = self.receive(timeout, expects_errors)
        # No rank leaves the group before all have returned: a collective of another might still need it.
        self.send(None)
        self.receive(CLOSING, False)
        return [pickle.loads(answers[rank].error or answers[rank].result) for rank in range(len(self.pipes))]

    def send(self, message: Any) -> None:
        for pipe in self.pipes:
            # Of a process that has ended `receive` tells.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                pipe.send(message)

    def receive(self, timeout: float, expects_errors: bool) -> dict[int, Answer]:
        """An answer of each rank."""
        answers: dict[int, Answer] = {}
        exit_codes: dict[int, int | None] = {}
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        deadline, failed = time.monotonic() + timeout, False
        while waiting:
            ready: list[Any] = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                    error = bool(answers[rank].text) and not expects_errors
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join(GRACE)
                    exit_codes[rank] = self.processes[rank].exitcode
                    error = True
                if error and not failed:
                    deadline, failed = min(deadline, time.monotonic() + GRACE), True
        errors = {rank: answer.text for rank, answer in answers.items() if answer.text}
        if failed:
            raise RankError(errors, exit_codes)
        if waiting:
            late = ", ".join(str(rank) for rank in waiting.values())
            said = "".join(f"\nrank {rank} raised:\n{text}" for rank, text in errors.items())
            raise TimeoutError(f"no answer within {timeout:g} s of rank {late}{said}")
        return answers

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            pipe.close()
        self.folder.cleanup()


#: By the number of ranks.
_pools: dict[int, _Pool] = {}


@atexit.register
def _end_pools() -> None:
    for pool in _pools.values():
        if pool.owner == os.getpid():
            pool.kill()


def _has_gpus(size: int) -> bool:
    return torch.cuda.device_count() >= size


def _serve(pipe: Connection, rank: int, size: int) -> None:
    """Answer calls until the other end of the pipe is gone."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name need not lead to it
    gc.freeze()  # what is there already is not searched after each call
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            path, work = pipe.recv()
            answer = _answer(path, work, rank, size)
            gc.collect()  # the objects of the call that are in cycles
            pipe.send(answer)
            pipe.recv()
            pipe.send(_leave())


def _answer(path: str, work: bytes, rank: int, size: int) -> Answer:
    """Make a process group and call the function in it; nothing that uses the group outlives this."""
    try:
        function, args, group_timeout = pickle.loads(work)
        return Answer(result=_call(function, args, group_timeout, path, rank, size))
    except BaseException as error:  # SystemExit too: it would end the process
        text = traceback.format_exc()
        _forget_frames(error)
        return Answer(text=text, error=_pickle_error(error))


def _call(function: Function, args: Iterable[Any], group_timeout: float, path: str, rank: int, size: int) -> bytes:
    options: dict[str, Any] = {"backend": "gloo"}
    if _has_gpus(size):
        torch.cuda.set_device(rank)
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device("cuda", rank)}
    dist.init_process_group(
        init_method=f"file://{path}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=group_timeout),
        **options,
    )
    torch.manual_seed(0)
    return pickle.dumps(tree_map(_plain, function(*args)))


def _plain(x: Any) -> Any:
    """A tensor alone, on the CPU; with the storage of a view only what the view shows."""
    if not isinstance(x, Tensor):
        return x
    if type(x) not in (Tensor, torch.nn.Parameter):
        raise TypeError(f"a function of ranks returned a {type(x).__name__}: return its to_local() or full_tensor()")
    return x.detach().cpu().clone()


def _pickle_error(error: BaseException) -> bytes:
    try:
        text = pickle.dumps(error)
        pickle.loads(text)  # the constructor of some types does not take what they say that it was given
        return text
    except Exception:
        return pickle.dumps((type(error).__name__, str(error)))


def _forget_frames(error: BaseException | None) -> None:
    """The variables of the function would live as long as its exception, and the exceptions that led to it."""
    if error is not None:
        traceback.clear_frames(error.__traceback__)
        before = error.__cause__, error.__context__
        error.__traceback__ = error.__cause__ = error.__context__ = None
        for one in before:
            _forget_frames(one)


def _leave() -> Answer:
    """End the process group of a call, and forget what torch keeps of it."""
    try:
        _clear_caches()
        # A DistributedDataParallel or a mesh that lived longer would end the group's threads while it holds Python's
        # lock, for which they might wait.
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
        return Answer()
    except BaseException:
        return Answer(text=traceback.format_exc())


def _clear_caches() -> None:
    """Meshes of one shape are equal: torch could find in its caches the mesh, and the groups, of an earlier call."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor, _collective_utils, _random

        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
        if hasattr(torch._C, "_clear_DTensor_sharding_propagator_cache"):  # torch 2.10
            torch._C._clear_DTensor_sharding_propagator_cache()
        _collective_utils.MeshTopoInfo.build_from_mesh.cache_clear()
        _random._rng_tracker = None
