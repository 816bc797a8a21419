"""Launches that pass by Triton's Python, which takes longer than many a kernel runs.

At each launch Triton works out what to compile a kernel for: the types of its arguments, which are divisible by 16,
which are 1, the constants and options. Here that is a key of a dictionary, and what stands there goes to Triton's own
launcher, with the same arguments that Triton would give it.

Triton compiles, and launches what it has just compiled. It launches everything where somebody watches, by hooks or a
debugging mode, and where this module does not apply: on other vendors' GPUs, and in releases that it has not met.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver

try:
    from triton.backends.nvidia.driver import CudaLauncher
except ImportError:  # a build for other GPUs
    CudaLauncher = None

#: Releases of Triton with which this was tried, first and last.
RELEASES = ((3, 5), (3, 9))
#: Whether launches may pass by Triton at all.
SUPPORTED = (
    CudaLauncher is not None
    and torch.version.hip is None
    and not knobs.runtime.interpret
    and RELEASES[0] <= tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) <= RELEASES[1]
)
_RUN = triton.JITFunction.run


class _Compiled(NamedTuple):
    kernel: Any  #: without it Triton would unload what it compiled
    run: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple[Any, ...]


class _Kernel:
    """What has been compiled of a kernel, which it keeps as its own attribute.

    Pointers are named `x_ptr`; other arguments are integers, but where the type of a float is written; constants come
    last, and are given by name.
    """

    def __init__(self, kernel: Any) -> None:
        kinds = ["_ptr" if x.name.endswith("_ptr") else "constexpr" * x.is_constexpr for x in kernel.params]
        in_order = sorted(kinds, key=["_ptr", "", "constexpr"].index)
        assert kinds == in_order, f"the arguments of {kernel} are in another order"
        self.source: str | None = None  #: the hash of what `compiled` was compiled from
        self.compiled: dict[tuple[Any, ...], _Compiled] = {}
        self.constants = [x.name for x in kernel.params if x.is_constexpr]
        self.specialize = _specialize([x for x in kernel.params if not x.is_constexpr])


def _specialize(params: list[Any]) -> Callable[..., tuple[tuple[Any, ...] | None, tuple[Any, ...]]]:
    """A function of the arguments of a kernel: what of them Triton compiles for, and what its launcher takes for them.

    The former is None where it takes more than this to tell: a number is negative, or does not fit 32 bits. As Triton
    does, the function is written for each kernel: a loop over the arguments would take twice as long.
    """
    pointers = [x.name for x in params if x.name.endswith("_ptr")]
    integers = [x for x in params[len(pointers) :] if not x.annotation_type.startswith("fp")]
    key = [f"{x}.dtype" for x in pointers]
    key += [f"-1 if {x.name} == 1 else {x.name} & 15 == 0" for x in integers if not x.do_not_specialize]
    names = ", ".join(x.name for x in params)
    source = f"""
def specialize({names}):
    key = {", ".join(key)},
    {"; ".join(f"{x} = {x}.data_ptr()" for x in pointers)}
    is_aligned = ({" | ".join(pointers)}) & 15 == 0 or ({", ".join(f"{x} & 15 == 0" for x in pointers)})
    is_usual = 0 <= {" | ".join(["0", *(x.name for x in integers)])} < {2**31}
    return (is_aligned, key) if is_usual else None, ({names})
"""
    defined: dict[str, Any] = {}
    exec(source, defined)
    function: Callable[..., tuple[tuple[Any, ...] | None, tuple[Any, ...]]] = defined["specialize"]
    return function


def _is_watched(kernel: Any) -> bool:
    """Whether Triton does something at a launch that is not done here."""
    runtime, compilation = knobs.runtime, knobs.compilation
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook  # lists of hooks, or a hook in place of one
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or getattr(runtime, "add_stages_inspection_hook", None)
        or getattr(compilation, "instrumentation_mode", None)
        or kernel.pre_run_hooks
        or triton.JITFunction.run is not _RUN
    )


def launch_by_triton(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Launch by Triton's Python, which compiles what it has not compiled yet, and returns it."""
    if options.get("PDL", False):
        options = {**options, "launch_pdl": True}
    # Said because Triton's default is about to change, and with it the bits of every result.
    return kernel[grid](*args, enable_fp_fusion=True, **options)


def launch_compiled(
    kernel: Any, grid: tuple[int, ...], device: int, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """`kernel[grid](*args, **options)` on the current device, number `device`; -1 is a CPU."""
    if not SUPPORTED or device < 0 or _is_watched(kernel):
        launch_by_triton(kernel, grid, args, options)
        return
    known: _Kernel | None = getattr(kernel, "fwpkm_direct", None)
    if known is None:
        known = kernel.fwpkm_direct = _Kernel(kernel)
    if known.source != kernel.hash:
        known.compiled.clear()
        known.source = kernel.hash
    kinds, arguments = known.specialize(*args)
    key = (device, kinds, *options, *options.values())
    found = known.compiled.get(key) if kinds is not None else None
    if found is None:
        compiled = launch_by_triton(kernel, grid, args, options)
        # Of another type where Triton compiles in the background, or gave up; of globals it asks whether they changed.
        is_known = type(getattr(compiled, "run", None)) is CudaLauncher and not kernel.used_global_vals
        if is_known and kinds is not None and known.source is not None:
            constants = tuple(options[name] for name in known.constants)
            known.compiled[key] = _Compiled(
                compiled, compiled.run, compiled.function, compiled.packed_metadata, constants
            )
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device)
    hooks = (None, None, None)  # and what they would be told
    found.run(x, y, z, stream, found.function, found.metadata, *hooks, *arguments, *found.constants)
