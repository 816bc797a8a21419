"""What kernels load and store in Triton's interpreter, watched: faults that would show on a GPU only, and not always.

    with sanitized() as seen:
        ...  # whatever launches kernels
    assert not seen.faults

The interpreter runs the programs of a launch one after the other, and the lanes of an instruction in order, in memory
that is rarely protected. So it gives right results in spite of these faults, which are looked for in every launch:

outside    An unmasked lane loads or stores where its argument has no element. What lies between the elements of a
           strided view is none, and neither is what other arguments have there. The lane is left out.
race       A program stores an element that another program of the launch loads or stores.
unordered  A program loads an element that it has stored since its last `tl.debug_barrier()`: perhaps another of its
           threads did.
twice      Two lanes of one store have the same element.

Marks are excepted by name: all programs and lanes may store one same value. Atomic operations are asked for the first
only, and what order they make between programs is not known here. An offset of 2⁴⁷ bytes or more is outside, but the
name of the argument is lost.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

#: Above the bits of an address stands the number of the argument: arithmetic with pointers keeps it.
ADDRESS_BITS = 48

Program = tuple[int, int, int]

KINDS = {
    "outside": "accesses what is not an element of",
    "race": "store and load or store the same element of",
    "unordered": "loads without a barrier what it has stored in",
    "twice": "stores with two lanes at once the same element of",
}


class Fault(NamedTuple):
    """The first fault of a kind that an argument of a kernel has."""

    kind: str
    kernel: str
    argument: str
    #: its index; one that is outside: (how many elements from the first,)
    element: tuple[int, ...]
    #: the place in the grid of the one that does it, of a race those of both
    programs: tuple[Program, ...]

    def __str__(self) -> str:
        who = " and ".join(map(str, self.programs))
        return f"{self.kernel}: {who} {KINDS[self.kind]} `{self.argument}`: {list(self.element)}"


class Memory:
    """Who of the programs of a launch, numbered from 1, stored and loaded each byte of a storage; 0 is nobody."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.begin = storage.data_ptr()
        #: the last that stored, and when; the first that loaded: if others did, one of them, as they run in turn
        self.writer, self.time, self.reader = np.zeros((3, storage.nbytes()), np.int32)


class Argument:
    """A tensor that a kernel was given."""

    def __init__(self, name: str, tensor: torch.Tensor, memory: Memory) -> None:
        self.name, self.memory = name, memory
        self.begin, self.size = tensor.data_ptr(), tensor.element_size()
        steps = (np.arange(n) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.offsets = np.asarray(functools.reduce(np.add.outer, steps, 0))  # of each element, in elements
        is_element = np.zeros(self.offsets.max(initial=-1) + 1, bool)
        is_element[self.offsets] = True
        self.has = is_element.repeat(self.size)  # whether a byte belongs to an element
        self.mark: Any = None  # what was first stored

    def index(self, byte: int) -> tuple[int, ...]:
        """Of the element that has this byte."""
        return tuple(np.argwhere(self.offsets == byte // self.size)[0].tolist())


class Sanitizer:
    """What was seen of the launches so far.

    Attributes:
        faults: the first of each kind for each argument of a kernel.
        launched: functions of `triton.jit` that were launched, as "module.name".
        called: those that were called by others.
    """

    def __init__(self, marks: Collection[str]) -> None:
        self.faults: list[Fault] = []
        self.launched: set[str] = set()
        self.called: set[str] = set()
        self._marks = marks
        self._kernel = ""
        self._names: Iterator[str] = iter(())
        self._memories: dict[int, Memory] = {}
        self._arguments: list[Argument] = []
        self._programs: list[Program] = []
        self._time = 0

    def begin_launch(self, kernel: Callable[..., Any], names: list[str]) -> None:
        """`names` are those of the pointers that `add_argument` will be given."""
        self.launched.add(full_name(kernel))
        self._kernel, self._names = kernel.__name__, iter(names)
        self._memories, self._arguments, self._programs = {}, [], []
        self._argument("no argument", torch.empty(0))

    def _argument(self, name: str, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        memory = self._memories.setdefault(storage.data_ptr(), Memory(storage))
        self._arguments.append(Argument(name, tensor, memory))
        return len(self._arguments) - 1

    def add_argument(self, tensor: torch.Tensor) -> int:
        """Its number."""
        return self._argument(next(self._names), tensor)

    def begin_program(self, *program: int) -> None:
        self._programs.append(program)
        self.barrier()

    def barrier(self) -> None:
        self._time += 1

    def lanes(self, pointers: Any, mask: Any, see: Callable[..., None], values: Any = 0) -> tuple[Any, Any]:
        """The addresses that pointers stand for, and the mask without the lanes outside; `see` is given the others."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        numbers, addresses = pointers.data >> ADDRESS_BITS, pointers.data & (2**ADDRESS_BITS - 1)
        mask = np.broadcast_to(mask, numbers.shape).copy()
        values = np.broadcast_to(values, numbers.shape)
        for number in np.unique(numbers[mask]):
            argument = self._arguments[number if number < len(self._arguments) else 0]
            here = mask & (numbers == number)
            at = addresses[here].astype(np.int64)[:, None] - argument.begin + np.arange(size)  # [lanes, size]
            inside = (at >= 0) & (at < len(argument.has))
            inside[inside] = argument.has[at[inside]]
            is_inside = inside.all(axis=1)
            if not is_inside.all():
                first = int(at[~is_inside][0, 0])
                self._report("outside", argument, (first // argument.size,), len(self._programs))
                mask[here] = is_inside
            see(argument, at[is_inside], values[here][is_inside])
        return interpreter.TensorHandle(addresses, pointers.dtype), interpreter.TensorHandle(mask, tl.int1)

    def see_nothing(self, argument: Argument, at: np.ndarray, values: np.ndarray) -> None:
        """Of an atomic operation."""

    def see_load(self, argument: Argument, at: np.ndarray, values: np.ndarray) -> None:
        """`at` [lanes, bytes] are bytes of the argument."""
        me, memory, where = len(self._programs), argument.memory, at + (argument.begin - argument.memory.begin)
        writer, reader = memory.writer[where], memory.reader[where]
        self._check("unordered", argument, at, (writer == me) & (memory.time[where] == self._time))
        self._check("race", argument, at, (writer != 0) & (writer != me), writer)
        memory.reader[where] = np.where(reader == 0, me, reader)

    def see_store(self, argument: Argument, at: np.ndarray, values: np.ndarray) -> None:
        """`values` are those of the lanes."""
        me, memory, where = len(self._programs), argument.memory, at + (argument.begin - argument.memory.begin)
        others = [memory.reader[where]]
        if not self._are_marks(argument, values):
            others.append(memory.writer[where])
            is_again = np.ones((len(at), 1), bool)
            is_again[np.unique(at[:, 0], return_index=True)[1]] = False
            self._check("twice", argument, at, is_again)
        for other in others:
            self._check("race", argument, at, (other != 0) & (other != me), other)
        memory.writer[where] = me
        memory.time[where] = self._time

    def _are_marks(self, argument: Argument, values: np.ndarray) -> bool:
        """Whether all that was stored is one value, where that is allowed."""
        if f"{self._kernel}.{argument.name}" not in self._marks or not values.size:
            return False
        argument.mark = values[0] if argument.mark is None else argument.mark
        return bool((values == argument.mark).all())

    def _check(
        self, kind: str, argument: Argument, at: np.ndarray, wrong: np.ndarray, others: np.ndarray | None = None
    ) -> None:
        if wrong.any():
            i, j = np.argwhere(wrong)[0]
            programs = (len(self._programs),) if others is None else (others[i, j], len(self._programs))
            self._report(kind, argument, argument.index(int(at[i, j])), *programs)

    def _report(self, kind: str, argument: Argument, element: tuple[int, ...], *programs: int) -> None:
        fault = Fault(kind, self._kernel, argument.name, element, tuple(self._programs[i - 1] for i in programs))
        if not any(fault[:3] == other[:3] for other in self.faults):
            self.faults.append(fault)


def full_name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__name__}"


def pointer_names(name: str, argument: Any) -> list[str]:
    """One for each tensor that the interpreter will make a pointer of, in its order."""
    if isinstance(argument, tuple):
        return [x for i, part in enumerate(argument) for x in pointer_names(f"{name}[{i}]", part)]
    is_pointer = hasattr(argument, "data_ptr") or hasattr(argument, "base")  # a tensor, a descriptor of one
    return [name] if is_pointer else []


@contextlib.contextmanager
def sanitized(marks: Collection[str] = ()) -> Iterator[Sanitizer]:
    """Watch all launches of the block.

    Args:
        marks: arguments, as "kernel.argument", whose elements all programs may set to one same value.
    """
    seen = Sanitizer(marks)
    builder, Executor, Function = (
        interpreter.interpreter_builder, interpreter.GridExecutor, interpreter.InterpretedFunction
    )  # fmt: skip
    load, store = builder.create_masked_load, builder.create_masked_store
    update, swap = builder.create_atomic_rmw, builder.create_atomic_cas
    barrier, set_place = builder.create_barrier, builder.set_grid_idx
    nowhere = torch.zeros(1, dtype=torch.int64)
    launch, call, convert = Executor.__call__, Function.__call__, interpreter._implicit_cvt

    def watched_load(pointers, mask, *rest, **options):
        return load(*seen.lanes(pointers, mask.data, seen.see_load), *rest, **options)

    def watched_store(pointers, value, mask, *rest, **options):
        pointers, mask = seen.lanes(pointers, mask.data, seen.see_store, value.data)
        return store(pointers, value, mask, *rest, **options)

    def watched_update(operation, pointers, value, mask, *rest):
        pointers, mask = seen.lanes(pointers, mask.data, seen.see_nothing)
        return update(operation, pointers, value, mask, *rest)

    def watched_swap(pointers, *rest):
        pointers, mask = seen.lanes(pointers, True, seen.see_nothing)
        # It has no mask that would leave a lane out.
        pointers.data = np.where(mask.data, pointers.data, np.uint64(nowhere.data_ptr()))
        return swap(pointers, *rest)

    def watched_barrier():
        seen.barrier()
        return barrier()

    def watched_set_place(*place):
        seen.begin_program(*place)
        return set_place(*place)

    def watched_launch(executor, *args, **kwargs):
        known = {name: x for name, x in kwargs.items() if name in executor.arg_names}
        bound = inspect.getcallargs(executor.fn, *args, **known)
        names = [x for name, argument in bound.items() for x in pointer_names(name, argument)]
        seen.begin_launch(executor.fn, names)
        return launch(executor, *args, **kwargs)

    def watched_call(function, *args, **kwargs):
        seen.called.add(full_name(function.fn))
        return call(function, *args, **kwargs)

    def watched_convert(argument):
        converted = convert(argument)
        if hasattr(argument, "data_ptr"):
            number = seen.add_argument(interpreter._unwrap_tensor(argument))
            converted.handle.data = converted.handle.data | np.uint64(number << ADDRESS_BITS)
        return converted

    with contextlib.ExitStack() as stack:
        for owner, name, watched in (
            (builder, "create_masked_load", watched_load),
            (builder, "create_masked_store", watched_store),
            (builder, "create_atomic_rmw", watched_update),
            (builder, "create_atomic_cas", watched_swap),
            (builder, "create_barrier", watched_barrier),
            (builder, "set_grid_idx", watched_set_place),
            (Executor, "__call__", watched_launch),
            (Function, "__call__", watched_call),
            (interpreter, "_implicit_cvt", watched_convert),
        ):
            stack.enter_context(mock.patch.object(owner, name, watched))
        yield seen
