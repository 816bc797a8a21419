"""Triton's interpreter without what it does in vain, which took most of the time of a kernel."""

from collections.abc import Sequence
from typing import Any


def hasten() -> None:
    """Let it do once what it repeats: replace Triton's functions, check shapes, look up types."""
    _replace_functions_once()
    _keep_shapes()
    _keep_types()


def _replace_functions_once() -> None:
    """Whenever a kernel calls another function it replaces in `triton.language` what it has replaced already: here at
    the first call of the function alone. And without debug it forms sums and products of integers twice, to assert
    nothing."""
    from triton.runtime import interpreter

    replace_and_call, called = interpreter.InterpretedFunction.__call__, set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self not in called:
            called.add(self)
            return replace_and_call(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _keep_shapes() -> None:
    """A tensor and its type each check and wrap their shape, which is one of a few: here the first of each shape does,
    and two of the same shape are broadcast as they are."""
    from triton.language import core, semantic

    check_type, wrap_tensor = core.block_type.__init__, core.tensor.__init__
    of_types: dict[tuple[int, ...], tuple[Any, Any, str]] = {}
    of_tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def init_type(self: Any, element_ty: Any, shape: Sequence[Any]) -> None:
        sizes = tuple([x.value if isinstance(x, core.constexpr) else x for x in shape])
        if sizes not in of_types:
            check_type(self, element_ty, shape)
            of_types[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = of_types[sizes]
        self.name = f"<{text}, {element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in of_tensors:
            wrap_tensor(self, handle, type)
            of_tensors[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensors[sizes]

    broadcast = semantic.TritonSemantic.broadcast_impl_value

    def broadcast_where_shapes_differ(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    core.block_type.__init__, core.tensor.__init__ = init_type, init_tensor
    semantic.TritonSemantic.broadcast_impl_value = broadcast_where_shapes_differ


def _keep_types() -> None:
    """NumPy's name of a type is in a table, which is made anew for each question."""
    from triton.language import core
    from triton.runtime import interpreter

    look_up, known = interpreter._get_np_dtype, {}

    def np_dtype(tt_dtype: Any) -> Any:
        if isinstance(tt_dtype, core.block_type):
            return np_dtype(tt_dtype.element_ty)
        if tt_dtype.name not in known:
            known[tt_dtype.name] = look_up(tt_dtype)
        return known[tt_dtype.name]

    interpreter._get_np_dtype = np_dtype
