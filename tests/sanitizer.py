"""Watch what kernels load and store in Triton's interpreter, for faults that would show on a GPU only, and not always.

    with sanitized() as seen:
        ...  # whatever launches kernels
    assert not seen.faults

The interpreter runs programs one after the other, and the lanes of an instruction in order, in memory that nothing
protects: so results are mostly right in spite of these faults, which are looked for in every launch.

outside    An unmasked lane loads or stores where its argument has no element. What lies between the elements of a
           strided view is none, and what other arguments have there is no excuse. The lane is left out.
race       A program stores an element that another program of the launch loads or stores.
unordered  A program loads an element that it has stored since its last `tl.debug_barrier()`: perhaps another of its
           threads did.
twice      Two lanes of one store have the same element.

Marks are excepted by name: all programs and lanes may store one same value there. Of atomic operations only the first
is asked; the order that they make between programs is not known here. Where an offset is so large that it changes which
argument a pointer belongs to, 2⁴⁷ bytes or more, that is outside, but of another argument or of none.
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

#: Above the bits of an address a pointer has the number of its argument, which arithmetic keeps.
ADDRESS_BITS = 48

Program = tuple[int, ...]
#: What is called with an argument, the bytes of it that lanes access, [lanes, size], and what they store there.
Look = Callable[["Argument", np.ndarray, np.ndarray], None]

KINDS = {
    "outside": "accesses what is no element of",
    "race": "both access, and one stores, the same element of",
    "unordered": "loads without a barrier what it has stored in",
    "twice": "stores with two lanes at once the same element of",
}


class Fault(NamedTuple):
    """The first fault of one of KINDS that an argument of a kernel has."""

    kind: str
    kernel: str
    argument: str
    #: its index; of what is outside how many elements it is from the first
    element: tuple[int, ...]
    #: the place in the grid of the program that does it; of a race, those of both
    programs: tuple[Program, ...]

    def __str__(self) -> str:
        programs = " and ".join(map(str, self.programs))
        return f"{self.kernel}: {programs} {KINDS[self.kind]} `{self.argument}`: {list(self.element)}"


class Memory:
    """A storage: who of the programs of a launch, numbered from 1, stored and loaded each of its bytes; 0 is nobody."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.begin = storage.data_ptr()
        #: the last that stored, and after how many barriers; the first that loaded: as they run in turn, it stands for
        #: all but the present one
        self.writer, self.time, self.reader = np.zeros((3, storage.nbytes()), np.int32)


class Argument:
    """A tensor that a kernel is given."""

    def __init__(self, name: str, tensor: torch.Tensor, memory: Memory) -> None:
        self.name, self.memory = name, memory
        self.begin, self.size = tensor.data_ptr(), tensor.element_size()
        steps = (np.arange(n) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.offsets = np.asarray(functools.reduce(np.add.outer, steps, 0))  # of each element, in elements
        is_element = np.zeros(self.offsets.max(initial=-1) + 1, bool)
        is_element[self.offsets] = True
        self.is_inside = is_element.repeat(self.size)  # of each byte: whether an element has it
        self.mark: Any = None  # what was stored first, if it may be a mark

    def element(self, byte: int) -> tuple[int, ...]:
        """The index of the one that has this byte."""
        return tuple(np.argwhere(self.offsets == byte // self.size)[0].tolist())


class Sanitizer:
    """What was seen so far.

    Attributes:
        faults: the first of each kind in each argument of a kernel.
        launched: kernels, as "module.name".
        called: functions decorated with `triton.jit` that others called.
    """

    def __init__(self, marks: Collection[str]) -> None:
        self.faults: list[Fault] = []
        self.launched: set[str] = set()
        self.called: set[str] = set()
        self._marks = marks

    def begin_launch(self, kernel: Callable[..., Any], pointers: list[str]) -> None:
        """Of a kernel; `pointers` names the tensors that `add_argument` will be given, in order."""
        self.launched.add(full_name(kernel))
        self._kernel, self._names = kernel.__name__, iter(["no argument", *pointers])
        self._arguments: list[Argument] = []
        self._memories: dict[int, Memory] = {}
        self._programs: list[Program] = []
        self._time = 0
        self.add_argument(torch.empty(0))

    def add_argument(self, tensor: torch.Tensor) -> int:
        """Its number."""
        storage = tensor.untyped_storage()
        memory = self._memories.setdefault(storage.data_ptr(), Memory(storage))
        self._arguments.append(Argument(next(self._names), tensor, memory))
        return len(self._arguments) - 1

    def begin_program(self, program: Program) -> None:
        self._programs.append(program)

    def barrier(self) -> None:
        self._time += 1

    def access(self, pointers: Any, mask: Any, look: Look | None = None, values: Any = 0) -> tuple[Any, Any]:
        """The addresses in `pointers`, and `mask` without the lanes outside; `look` is called with the others."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        numbers, addresses = pointers.data >> ADDRESS_BITS, pointers.data & (2**ADDRESS_BITS - 1)
        mask = np.broadcast_to(mask, numbers.shape).copy()
        values = np.broadcast_to(values, numbers.shape)
        for number in np.unique(numbers[mask]):
            argument = self._arguments[number if number < len(self._arguments) else 0]
            lanes = mask & (numbers == number)
            at = addresses[lanes].astype(np.int64)[:, None] - argument.begin + np.arange(size)  # [lanes, size]
            inside = (at >= 0) & (at < len(argument.is_inside))
            inside[inside] = argument.is_inside[at[inside]]
            inside = inside.all(axis=1)
            if not inside.all():
                self._report("outside", argument, (int(at[~inside][0, 0]) // argument.size,))
                mask[lanes] = inside
            if look is not None:
                look(argument, at[inside], values[lanes][inside])
        return interpreter.TensorHandle(addresses, pointers.dtype), interpreter.TensorHandle(mask, tl.int1)

    def look_at_load(self, argument: Argument, at: np.ndarray, values: np.ndarray) -> None:
        me, memory, where = len(self._programs), argument.memory, at + (argument.begin - argument.memory.begin)
        writer, reader = memory.writer[where], memory.reader[where]
        self._check("unordered", argument, at, (writer == me) & (memory.time[where] == self._time))
        self._check_others(argument, at, writer)
        memory.reader[where] = np.where(reader == 0, me, reader)

    def look_at_store(self, argument: Argument, at: np.ndarray, values: np.ndarray) -> None:
        memory, where = argument.memory, at + (argument.begin - argument.memory.begin)
        if not self._are_marks(argument, values):
            is_again = np.ones((len(at), 1), bool)
            is_again[np.unique(at[:, 0], return_index=True)[1]] = False
            self._check("twice", argument, at, is_again)
            self._check_others(argument, at, memory.writer[where])
        self._check_others(argument, at, memory.reader[where])
        memory.writer[where], memory.time[where] = len(self._programs), self._time

    def _are_marks(self, argument: Argument, values: np.ndarray) -> bool:
        """Whether what the launch has stored so far is one value, where that is allowed."""
        if f"{self._kernel}.{argument.name}" not in self._marks or not values.size:
            return False
        argument.mark = values[0] if argument.mark is None else argument.mark
        return bool((values == argument.mark).all())

    def _check(self, kind: str, argument: Argument, at: np.ndarray, is_wrong: np.ndarray) -> None:
        if is_wrong.any():
            self._report(kind, argument, argument.element(int(at[is_wrong.any(axis=1)][0, 0])))

    def _check_others(self, argument: Argument, at: np.ndarray, other: np.ndarray) -> None:
        """Whether it is another program, nobody being none, that was at these bytes before."""
        is_wrong = (other != 0) & (other != len(self._programs))
        if is_wrong.any():
            byte, program = at[is_wrong][0], other[is_wrong][0]
            self._report("race", argument, argument.element(int(byte)), self._programs[program - 1])

    def _report(self, kind: str, argument: Argument, element: tuple[int, ...], *others: Program) -> None:
        fault = Fault(kind, self._kernel, argument.name, element, (*others, self._programs[-1]))
        if not any(fault[:3] == known[:3] for known in self.faults):
            self.faults.append(fault)


def full_name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__name__}"


def pointer_names(name: str, argument: Any) -> list[str]:
    """A name for each tensor in an argument, in the interpreter's order."""
    if isinstance(argument, tuple):
        return [x for i, part in enumerate(argument) for x in pointer_names(f"{name}[{i}]", part)]
    is_pointer = hasattr(argument, "data_ptr") or isinstance(argument, interpreter.TensorDescriptor)
    return [name] if is_pointer else []


@contextlib.contextmanager
def sanitized(marks: Collection[str] = ()) -> Iterator[Sanitizer]:
    """Watch all launches of the block.

    Args:
        marks: arguments, as "kernel.argument", whose elements all programs may set to one same value.
    """
    seen = Sanitizer(marks)
    builder, executor, function = (
        interpreter.interpreter_builder, interpreter.GridExecutor, interpreter.InterpretedFunction
    )  # fmt: skip
    load, store = builder.create_masked_load, builder.create_masked_store
    update, swap = builder.create_atomic_rmw, builder.create_atomic_cas
    barrier, set_place = builder.create_barrier, builder.set_grid_idx
    launch, call, convert = executor.__call__, function.__call__, interpreter._implicit_cvt
    nowhere = torch.zeros(1, dtype=torch.int64)

    def watched_load(pointers, mask, *rest, **options):
        return load(*seen.access(pointers, mask.data, seen.look_at_load), *rest, **options)

    def watched_store(pointers, value, mask, *rest, **options):
        pointers, mask = seen.access(pointers, mask.data, seen.look_at_store, value.data)
        return store(pointers, value, mask, *rest, **options)

    def watched_update(operation, pointers, value, mask, *rest):
        pointers, mask = seen.access(pointers, mask.data)
        return update(operation, pointers, value, mask, *rest)

    def watched_swap(pointers, *rest):
        pointers, mask = seen.access(pointers, True)
        # It has no mask that would leave a lane out.
        pointers.data = np.where(mask.data, pointers.data, np.uint64(nowhere.data_ptr()))
        return swap(pointers, *rest)

    def watched_barrier():
        seen.barrier()
        return barrier()

    def watched_set_place(*place):
        seen.begin_program(place)
        return set_place(*place)

    def watched_launch(self, *args, **kwargs):
        arguments = {name: x for name, x in kwargs.items() if name in self.arg_names}  # not num_warps and the like
        arguments = inspect.getcallargs(self.fn, *args, **arguments)
        seen.begin_launch(self.fn, [x for name, argument in arguments.items() for x in pointer_names(name, argument)])
        return launch(self, *args, **kwargs)

    def watched_call(self, *args, **kwargs):
        seen.called.add(full_name(self.fn))
        return call(self, *args, **kwargs)

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
            (executor, "__call__", watched_launch),
            (function, "__call__", watched_call),
            (interpreter, "_implicit_cvt", watched_convert),
        ):
            stack.enter_context(mock.patch.object(owner, name, watched))
        yield seen
