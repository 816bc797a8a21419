"""The state of a streamed memory: its private copies, what it is tied to, copies of it, saving and loading."""

import copy
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from ._autograd import is_exporting, refuse_recomputation
from .binding import Binding, check_binding, check_initial_memory, check_step_inputs, make_queue
from .options import Options
from .private import leaf, private_copy, rollback, shares_storage, writable
from .records import Carry, Inputs, MemoryOutput, Queue
from .saving import load, pickled, reduce_for_processes, saved, trust_newest, unpickle

#: Attributes that a copy of a state has for itself, and those that it shares; other attributes belong to subclasses.
_COPIED = ("_keys", "_values", "_touched", "_position", "_binding", "_queue")
_KEPT = ("_initial_keys", "_initial_values", "_device", "_made_in_export", "_binding", "_queue")


class MemoryState:
    """A memory that reads and writes step by step: see `fast_weight_memory_step`.

    It keeps `keys` [H, 2, n, Dk/2] and `values` [N, D] as the initial memory and never writes them: many states may
    share them. It writes private copies, `state.keys` and `state.values`. The first step binds batch size, dtypes and
    all options but lr, weight_decay, clip and addressing_weight.

    The tie to the initial memory is to the very tensors that were given (of one that autograd has computed, to the same
    storage; of `keys` and `values` of the state itself, to a copy), so give the Parameters themselves. `reset` copies
    what they hold then, whoever wrote it. A state in a module stays tied to the module's Parameters through
    copy.deepcopy, pickle and torch.save of the whole module, in other processes, and through `.to()`, `.double()` and
    what else sets `Parameter.data`: the state itself takes over another dtype or device at its next reset. Untied is a
    state whose module gets other tensors: by load_state_dict(assign=True), by `.to()` for a buffer, by a
    parametrization, fully_shard and the like. `rebind` ties it again.

    Copies are independent: `clone` and copy.copy share the initial memory; copy.deepcopy and pickle copy it too, once
    for all states that are copied together. A state that is sent to another process is a copy there, whatever the
    start method; its initial memory is sent as all tensors are, in shared memory, so the sender must live until it has
    arrived. torch.load(weights_only=True) accepts a state; files of torch.save's old format cannot hold one.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._device: torch.device | None = None  # of the private copies; None means that of the initial memory
        self._tie(keys, values)
        self._set_up(keys, values)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        ForkingPickler.register(cls, reduce_for_processes)

    def _set_up(self, keys: Tensor, values: Tensor) -> None:
        """Make private copies of these, with nothing read and nothing bound."""
        device = self._device or values.device
        with torch.no_grad():
            self._take_over(private_copy(keys, device), private_copy(values, device))

    def _take_over(self, keys: Tensor, values: Tensor) -> None:
        """Make these the private tensors, with nothing read and nothing bound."""
        self._keys, self._values = keys, values
        # The position is on the CPU, so that reading it never waits for a GPU, and a tensor, so that torch.compile does
        # not compile again for each value.
        cpu = torch.device("cpu")
        self._position = private_copy(torch.zeros((), dtype=torch.int64, device=cpu), cpu)
        touched = torch.zeros(values.shape[0], dtype=torch.uint8, device=values.device)
        self._touched = private_copy(touched, values.device)
        self._binding: Binding | None = None
        self._queue: Queue | None = None
        self._made_in_export = is_exporting()  # a state made in an export is part of the program

    @classmethod
    def from_output(cls, output: MemoryOutput, carry: Carry, *, keys: Tensor, values: Tensor, **options: Any) -> Any:
        """A state that goes on in streaming where a call of `fast_weight_memory` has ended, without a copy of a table.

        The final keys and values become the state's own, which steps write in place: nobody may use them any more. A
        backward pass that still needs them raises. The tokens of the carry are looked up and read again.

        Args:
            output, carry: what `fast_weight_memory` gave with return_carry=True.
            keys, values: the initial memory, to which `reset` returns; the state is tied to it as any other.
            options: all that a first step would bind, as in that call.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        from .reading import queue_of

        binding, queue = queue_of(output, carry, Options(**options))
        self = cls.__new__(cls)
        self._device = None
        own = [x.detach() for x in (output.keys, output.values)]
        self._take_over(*(own if torch.compiler.is_compiling() else map(writable, own)))
        self.rebind(keys, values)
        self._position.fill_(carry.position)
        self._binding, self._queue = binding, queue
        return self

    def read(
        self,
        queries: Tensor,
        *,
        top_k: int | None = None,
        score: str | None = None,
        eps: float | None = None,
        weighting: str | None = None,
        temperature: float | None = None,
        precision: str | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Read without writing: what the present keys and values give, as a step without a write would read them.

        Neither queue nor position changes, and as a step it has no gradients. Of an option None is what is bound, or
        the default of `fast_weight_memory_step` where nothing is.

        Args:
            queries: [B, t, H, Dk], any B and t.

        Returns:
            output [B, t, D], in the dtype of the bound targets, or of `values` where nothing is bound.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        from .reading import read_state

        how = {"top_k": top_k, "score": score, "eps": eps, "weighting": weighting, "temperature": temperature}
        return read_state(self, queries, **how, precision=precision, backend=backend)

    @property
    def keys(self) -> Tensor:
        """The present sub-keys, [H, 2, n, Dk/2]. What is assigned, or written in place, lasts until the next reset."""
        return self._keys

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self._assign("keys", keys)

    @property
    def values(self) -> Tensor:
        """The present table, [N, D]. What is assigned, or written in place, lasts until the next reset."""
        return self._values

    @values.setter
    def values(self, values: Tensor) -> None:
        self._assign("values", values)

    def _assign(self, name: str, x: Tensor) -> None:
        """Copy what is assigned, since steps write in place and would otherwise write the caller's tensor."""
        self._prepare(f"assigning to {name}")
        checks.check_tensor(name, x)
        own = getattr(self, f"_{name}")
        if x.shape != own.shape or x.dtype != own.dtype:
            wanted, came = (f"{checks.shape(t)} of {t.dtype}" for t in (own, x))
            raise ValueError(f"`{name}` must be {wanted} as in the state, got {came}")
        with torch.no_grad():
            own.copy_(x)
        self._all_touched()

    @property
    def position(self) -> int:
        """Tokens read so far, by each item of the batch."""
        return int(self._position)

    def rebind(self, keys: Tensor, values: Tensor) -> None:
        """Tie the state to another initial memory, to which `reset` returns from now on.

        The present memory, the position and what is bound stay as they are.

        Args:
            keys: [H, 2, n, Dk/2], of any strides, float32, float64, float16 or bfloat16.
            values: [N, D], N = n², likewise and on the same device.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        self._prepare("rebind")
        check_initial_memory(keys, values)
        for name, x, own in (("keys", keys, self._keys), ("values", values, self._values)):
            if x.shape != own.shape:
                raise ValueError(f"`{name}` must be {checks.shape(own)} as in the state, got {checks.shape(x)}")
        self._tie(keys, values)
        self._all_touched()

    def _tie(self, keys: Tensor, values: Tensor) -> None:
        """Keep the initial memory."""
        check_initial_memory(keys, values)
        # A leaf is kept itself, since only the leaf shows a later change of its `.data`; another tensor is kept without
        # its graph. A tensor that shares memory with the state's own is copied, since steps write that memory.
        own = [self.__dict__[name] for name in ("_keys", "_values") if name in self.__dict__]
        self._initial_keys, self._initial_values = (
            private_copy(x, x.device) if any(shares_storage(x, y) for y in own) else leaf(x) for x in (keys, values)
        )

    def _all_touched(self) -> None:
        """Note that any row may differ from the initial memory."""
        with torch.inference_mode(False):
            self._touched.fill_(1)

    def _prepare(self, what: str) -> None:
        """Refuse an action that a checkpoint would repeat or export would run; make the private tensors writable."""
        if torch.compiler.is_compiling():
            if is_exporting() and not torch.compiler.is_dynamo_compiling() and not self._made_in_export:
                raise RuntimeError(f"MemoryState: {what} would be done by torch.export itself; use strict=True")
            return
        refuse_recomputation(f"MemoryState: {what}")
        self._make_writable()

    def _make_writable(self) -> None:
        """Replace private tensors that a step could not write.

        Compiled code may have made one in inference mode, or a caller may have set the `.data` of one.
        """
        for name in ("_keys", "_values", "_touched", "_position"):
            setattr(self, name, writable(getattr(self, name)))
        if self._queue is not None:
            self._queue = Queue(*map(writable, self._queue))

    @torch.inference_mode(False)
    @torch.no_grad()
    def reset(self, *, touched_rows_only: bool = False) -> None:
        """Return to the initial memory as it is now, and to position 0; what is bound stays bound.

        All rows are copied, so nothing is believed of who wrote the initial memory or `state.keys` and `state.values`.
        Where the initial memory has another shape, dtype or device than the state by now, the state is set up anew,
        and nothing is bound.

        Args:
            touched_rows_only: copy back only the rows of `values` that steps have written since the last reset, which
                is faster where these are few. It believes that nothing but steps has written `state.values`, and that
                nobody has written the initial values since: what else was changed stays as it is. Sub-keys are copied
                whole. All rows are copied after a write with weight_decay > 0, a load, an assignment or `rebind`.

        Raises:
            TypeError, ValueError: if the initial memory is none any more, or `touched_rows_only` is no bool.
            RuntimeError: in a backward pass, where an activation checkpoint would reset again; and where torch.export
                with strict=False would reset the state itself.
        """
        checks.check_flag("touched_rows_only", touched_rows_only)
        self._prepare("reset")
        check_initial_memory(self._initial_keys, self._initial_values)
        device = self._device or self._initial_values.device
        initial = ((self._keys, self._initial_keys), (self._values, self._initial_values))
        if any(own.shape != x.shape or own.dtype != x.dtype or own.device != device for own, x in initial):
            self._set_up(self._initial_keys, self._initial_values)
            return
        for name, x in (("_keys", self._initial_keys), ("_values", self._initial_values)):
            if shares_storage(getattr(self, name), x):
                setattr(self, name, private_copy(x, device))
        self._keys.copy_(self._initial_keys)
        if not touched_rows_only or self._initial_values.device != device:
            self._values.copy_(self._initial_values)
        elif self._values.is_cuda:
            from .kernels.update import restore_rows

            restore_rows(self._values, self._initial_values, self._touched)
        else:
            rows = torch.nonzero(self._touched).flatten()
            self._values[rows] = self._initial_values[rows]
        for x in (self._touched, self._position, *(self._queue or ())):
            x.zero_()

    def rollback(self, tokens: int) -> None:
        """Take back the last tokens that each item of the batch has read, as if they had never come.

        For tokens that turn out to be none of the sequence, as those that assisted decoding drafts and does not accept.
        Only tokens of the present chunk can be taken back: it is written when it is full, until when keys and values
        stay as they are, and only the position moves. The state is then bitwise one that has not read them, but bound.

        Args:
            tokens: from 0 to position % chunk_size; 0 for a state that is not bound.

        Raises:
            TypeError, ValueError: for what is no int, or would go beyond the beginning of the present chunk. The state
                is unchanged then.
            RuntimeError: in a backward pass, and where torch.export with strict=False would do it itself, as `reset`.
        """
        tokens = checks.check_int("tokens", tokens, minimum=0)
        self._prepare("rollback")
        rollback(self._position, tokens, 1 if self._binding is None else self._binding.options.chunk_size)

    def clone(self) -> "MemoryState":
        """An independent copy that shares the initial memory."""
        return self._copy(self._values.device)

    __copy__ = clone

    def to(self, device: torch.device | str | int) -> "MemoryState":
        """An independent copy on `device`, where it stays: its resets copy the initial memory, which is shared, there.

        Raises:
            TypeError, ValueError: for what is no device.
        """
        other = self._copy(checks.as_device("device", device))
        other._device = other._values.device  # unlike `device`, this one always has its index
        return other

    def _copy(self, device: torch.device) -> "MemoryState":
        other = type(self).__new__(type(self))
        # Dynamo before PyTorch 2.13 cannot list a __dict__.
        for name in _KEPT if torch.compiler.is_compiling() else self.__dict__:
            setattr(other, name, getattr(self, name))
        with torch.no_grad():
            for name in ("_keys", "_values", "_touched"):
                setattr(other, name, private_copy(getattr(self, name), device))
            other._position = private_copy(self._position, self._position.device)
            if self._queue is not None:
                other._queue = Queue(*(private_copy(x, device) for x in self._queue))
        return other

    def select(self, indices: Tensor | Sequence[int]) -> "MemoryState":
        """An independent copy in which only some items of the batch go on: a sub-batch, or the beams that are kept.

        They share keys and values, as all items do; what is selected is whose tokens wait for the chunk to be full. The
        copy is as if the others had ended here, and as if items that are selected twice had read the same tokens.

        Args:
            indices: [new B], integers in [0, B), in any order and with repetitions. The range is checked on CPUs only.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came; ValueError too for a state
                that is not bound, which has no items yet.
        """
        other = self.clone()
        other._select(indices)
        return other

    def select_(self, indices: Tensor | Sequence[int]) -> None:
        """`select` in this state itself: no table is copied, so that beams may be reordered at every token."""
        self._prepare("select_")
        self._select(indices)

    def _select(self, indices: Tensor | Sequence[int]) -> None:
        if self._binding is None or self._queue is None:
            raise ValueError("`indices` must select among the items of a batch, and this state has not read one yet")
        batch = self._binding.batch
        with torch.no_grad():
            rows = checks.check_indices(indices, batch).to(self._values.device)
            selected = Queue(*(private_copy(x.index_select(1, rows), x.device) for x in self._queue))
            if len(rows) == batch:  # the same tensors, so that captured graphs stay valid
                for x, new in zip(self._queue, selected, strict=True):
                    x.copy_(new)
            else:
                self._queue, self._binding = selected, self._binding._replace(batch=len(rows))

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> "MemoryState":
        other = memo[id(self)] = self.clone()
        # If a module has the private tensors as its buffers, its copy and the copied state share theirs too, whether
        # deepcopy comes to the buffers or to the state first.
        for name, x in self.named_tensors().items():
            memo.setdefault(id(x), other.named_tensors()[name])
        other._replace({name: memo[id(x)] for name, x in self.named_tensors().items()})
        self._initial_keys, self._initial_values = leaf(self._initial_keys), leaf(self._initial_values)
        for name in set(self.__dict__) - set(_COPIED):
            setattr(other, name, copy.deepcopy(getattr(self, name), memo))
        return other

    def _replace(self, tensors: dict[str, Tensor]) -> None:
        """Make tensors named as in `named_tensors` those of the state."""
        self._keys, self._values, self._position, self._touched, *queue = tensors.values()
        self._queue = Queue(*queue) if queue else None

    def __getstate__(self) -> dict[str, Any]:
        others = {name: x for name, x in self.__dict__.items() if name not in {*_COPIED, "_made_in_export"}}
        tied = {name: leaf(others[name]) for name in ("_initial_keys", "_initial_values")}
        return others | tied | pickled(self)

    @torch.inference_mode(False)  # so that the state can be stepped outside of inference mode too
    def __setstate__(self, fields: dict[str, Any]) -> None:
        unpickle(self, fields)

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors that a step writes, themselves: for a program that is to keep them as its buffers.

        A module exports with its state to AOTInductor once the state is bound, by a step of no tokens, and these are
        registered as buffers: torch.export.export(module, …, strict=True) finds them so, and may make tokens dynamic.
        copy.deepcopy of the module keeps that; pickle, and a reset to another dtype or device, do not.
        """
        tensors = {"keys": self._keys, "values": self._values, "position": self._position, "touched": self._touched}
        return tensors | {f"queue_{name}": x for name, x in (self._queue._asdict() if self._queue else {}).items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Memory, position, queue and bound options as flat, contiguous, unshared tensors, as safetensors wants them.

        The initial memory is not included. A state that is not bound has keys, values and position only. So
        torch.distributed.checkpoint, which loads only into tensors that exist, needs a state that is bound: a step of
        no tokens, with batch, dtypes and options of the saved state, binds a new one.
        """
        return saved(self)

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over what `state_dict` saved; `reset` still returns to the initial memory of this state.

        Raises:
            TypeError: for what is no mapping.
            ValueError: for names, shapes or dtypes that do not fit, or bound options other than those of this state.
                Nothing has been changed by then.
            RuntimeError: in a backward pass, as `reset`.
        """
        self._prepare("load_state_dict")
        load(self, state_dict)

    def __repr__(self) -> str:
        heads, _, num_keys, half = self.keys.shape
        return (
            f"MemoryState(position={self.position}, heads={heads}, n={num_keys}, Dk={2 * half}, "
            f"values={checks.shape(self.values)} of {self.values.dtype} on {self.values.device})"
        )

    def _bind(self, queries: Tensor, targets: Tensor, o: Options, queue: Queue | None = None) -> Queue:
        """Bind at the first step, with `queue` where that is made already; later refuse what differs."""
        if not torch.compiler.is_compiling():
            self._make_writable()
        binding = Binding.of(queries, targets, o)
        if self._binding is None or self._queue is None:
            self._queue = make_queue(self._keys, self._values, binding, self._values.device) if queue is None else queue
            self._binding = binding
        else:
            check_binding(self._binding, binding)
        return self._queue


def _is_state(x: object) -> bool:
    """Whether `x` is a MemoryState, also one that was made before this module was reloaded."""
    name = (MemoryState.__module__, MemoryState.__qualname__)
    return isinstance(x, MemoryState) or any((c.__module__, c.__qualname__) == name for c in type(x).__mro__)


def check_step(
    state: MemoryState, queries: Tensor, targets: Tensor, gates: Tensor | None, mask: Tensor | None, o: Options
) -> Options:
    """Validate the arguments of a step; returns the options with their numbers as floats."""
    if not _is_state(state):
        kind = type(state)
        raise TypeError(f"`state` must be a MemoryState of {__package__}, got {kind.__module__}.{kind.__qualname__}")
    return check_step_inputs(Inputs(queries, targets, state.keys, state.values, gates, mask), o)


ForkingPickler.register(MemoryState, reduce_for_processes)
trust_newest(MemoryState)
