"""Source to callable: C++ compiled once per content and processor, through Inductor's own toolchain.

Everything private of Inductor that the CPU kernels need is in this file: its compiler driver (flags,
locks, a cache per user), its way to call C from Python without building against torch, and its
lowering of an op to a call that writes into a buffer which Inductor plans.
"""

from __future__ import annotations

import ctypes
import inspect
import logging
import platform
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import DenseFallbackWarning

log = logging.getLogger(__name__)

CALL = """
#include <cstdint>
#include <stdexcept>
extern "C" void kernel(const int64_t* record, const void* x, HIDDEN void* y, int64_t elements) {
    typedef int64_t (*run)(const void*, const void*, const void*, void*, int64_t);
    if (!record[0] || reinterpret_cast<run>(record[0])(record, x, hidden, y, elements)) {
        throw std::runtime_error("d2d: the kernel needs attention");
    }
}
"""


@lru_cache(maxsize=1)
def processor() -> str:
    """The instruction sets of this machine, as one line of text: part of every source's hash.

    Caches may be shared between machines (home directories are), and code for one processor crashes
    on another.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    wanted = ("avx", "fma", "amx", "bf16", "asimd", "sve", "i8mm")
    found = sorted(flag for flag in flags.split() if flag.startswith(wanted) or "bf16" in flag)
    return " ".join([platform.machine(), *found])


@lru_cache(maxsize=1)
def compiler() -> str | None:
    """Why C++ cannot be compiled here, or None if it can."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        log.debug("C++ compiler: %s", get_cpp_compiler())
    except Exception as error:  # InvalidCxxCompiler and what the driver raises around it
        return f"no C++ compiler was found ({type(error).__name__})"
    return None


@lru_cache(maxsize=64)
def load(source: str) -> ctypes.CDLL | None:
    """The shared library of a C++ source, built at most once a user; None, with one warning, if it fails."""
    problem = compiler()
    if problem is None:
        try:
            return _cached(source)
        except Exception as error:  # CppCompileError, or a compiler that crashed
            problem = f"the C++ compiler failed ({type(error).__name__})"
            log.warning("compiling a kernel failed", exc_info=error)
    _warn(problem)
    return None


def _cached(source: str) -> ctypes.CDLL:
    from torch._inductor.codecache import CppCodeCache

    known = inspect.signature(CppCodeCache.load_async).parameters
    extra: dict[str, Any] = {"needs_vec_isa": True} if "needs_vec_isa" in known else {}
    library: ctypes.CDLL = CppCodeCache.load(f"// {processor()}\n{source}", "cpu", **extra)
    return library


@lru_cache(maxsize=1)
def _warn(problem: str) -> None:
    warnings.warn(
        f"Converted blocks run in plain PyTorch on this CPU, slower than they could: {problem}. Install "
        "g++ 10 or newer, or clang++ (CXX names another one), and start again to have them compiled.",
        DenseFallbackWarning,
        stacklevel=2,
    )


def load_all(sources: Iterable[str], progress: bool = False) -> None:
    """Build several sources at once, a compiler process each; failures are left to `load` to report."""
    distinct = list(dict.fromkeys(sources))
    if not distinct or compiler() is not None:
        return
    with ThreadPoolExecutor(
        max_workers=max(1, min(len(distinct), torch.get_num_threads()))
    ) as pool:
        done = pool.map(load, distinct)
        bar = tqdm(done, "kernels", len(distinct), disable=not progress, delay=0.5)
        for _ in bar:
            pass


@lru_cache(maxsize=2)
def call(given: bool = False) -> Callable[..., None] | None:
    """A function (record, x, y, elements) that runs a record's kernel; None where it cannot be built.

    record: int64 tensor whose first entry is the address of the kernel. given: whether it takes (record, x,
    hidden, y, elements), a shared router layer's output among them. Raises RuntimeError if the kernel asks
    for attention. A call costs about half a microsecond, a tenth of a custom op in Python.
    """
    if compiler() is not None:
        return None
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    hidden = ["const void*"] if given else []
    types = ["const int64_t*", "const void*", *hidden, "void*", "int64_t"]
    parameter = "const void* hidden," if given else ""
    text = CALL.replace("HIDDEN", parameter)
    if not given:
        text = text.replace("x, hidden, y", "x, nullptr, y")
    try:
        found: Callable[..., None] = CppPythonBindingsCodeCache.load_pybinding(types, text)
    except Exception as error:
        _warn(f"the C++ compiler failed ({type(error).__name__})")
        return None
    return found


def lower_to_out(
    overload: Any,
    name: str,
    run: Callable[..., Any],
    run_given: Callable[..., Any] | None = None,
) -> None:
    """Let Inductor compile an op (x, record, width) to the direct call `run(x, record, width, out=buffer)`.

    overload: the op, whose output has x's leading sizes, `width` columns and x's dtype, contiguous. Where it
    has a further argument hidden, the call is `run_given(x, record, hidden, width, out=buffer)`. With
    Inductor's C++ wrapper the op is called as any other.
    """
    from torch._inductor import ir
    from torch._inductor.lowering import fallback_handler, register_lowering
    from torch._inductor.select_algorithm import extern_kernels
    from torch._inductor.virtualized import V

    setattr(extern_kernels, name, run)
    setattr(extern_kernels, f"{name}_given", run_given)
    plain = fallback_handler(  # type: ignore[no-untyped-call]
        overload, add_to_fallback_set=False
    )

    @register_lowering(overload, type_promotion_kind=None)
    def _(x: Any, record: Any, width: int, *hidden: Any) -> Any:
        if V.graph.cpp_wrapper:
            return plain(x, record, width, *hidden)
        given = [h for h in hidden if h is not None]
        inputs = [
            ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(t))
            for t in (x, record, *given)
        ]
        size = [*x.get_size()[:-1], width]
        layout = ir.FixedLayout(
            x.get_device(), x.get_dtype(), size, ir.FlexibleLayout.contiguous_strides(size)
        )
        return ir.TensorBox.create(
            ir.ExternKernelOut(
                layout=layout,
                inputs=inputs,
                constant_args=[width],
                python_kernel_name=f"extern_kernels.{name}" + ("_given" if given else ""),
                op_overload=overload,
            )
        )
