"""Compile Triton kernels for a GPU that need not be here, and read what the compiler made.

    compile_kernel(fn, {"x_ptr": "*bf16", "n": "i32"}, {"BLOCK": 128}, target="sm_90") -> Resources

Results are kept in Triton's own cache beside the kernel, so asking twice compiles once. Nothing needs a
driver; the tools are those of Triton's wheel. Triton is imported when something is compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import KernelError
from . import resources, workers
from .absent import gpu_target, pretend
from .resources import Resources

ALIGNED = 16  # bytes of an address, and divisor of an integer, that Triton compiles for


@dataclass(frozen=True)
class Job:
    """The arguments of one `compile_kernel`, for `compile_all`."""

    fn: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    target: str
    num_warps: int = 4
    num_stages: int = 3
    aligned: Collection[str] = ()

    def compile(self) -> Resources:
        """What `compile_kernel` returns for it."""
        return compile_kernel(**vars(self))


@dataclass(frozen=True)
class Launch:
    """The arguments of one `precompile`, for `compile_all`."""

    fn: Any
    args: tuple[Any, ...]
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def compile(self) -> Resources:
        """What `compile_kernel` returns for it."""
        return precompile(self.fn, *self.args, target=self.target, **self.options)


@dataclass(frozen=True)
class _Name:
    """A kernel by where it stands: jitted functions cannot be sent to another process."""

    module: str
    file: str
    name: str

    def find(self) -> Any:
        try:
            module = importlib.import_module(self.module)
        except ImportError:  # a generated file, or a script
            spec = importlib.util.spec_from_file_location(self.module, self.file)
            if spec is None or spec.loader is None:
                raise KernelError(f"{self.file} cannot be imported to compile it.") from None
            module = sys.modules[self.module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return getattr(module, self.name)


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    target: str,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: Collection[str] = (),
) -> Resources:
    """Compile a jitted kernel as a launch with such arguments would.

    With Triton 3.9 the launch finds the entry in the cache; for other versions see `precompile`.

    signature: {argument: type} of those passed at run time, "*bf16", "i32", "fp32".
    constants: {argument: value} of all others: constexprs by name, absent pointers as None, integers that
        are 1 (Triton makes constants of them). Constexprs with a default may be left out.
    target: "sm_80", "sm_90", "sm_100", "gfx942" and the like.
    aligned: integers divisible by 16; pointers are taken to be.

    Raises KernelError for arguments that do not fit the kernel, or if it does not compile.
    """
    kernel = _jitted(fn)

    from triton import compile as triton_compile
    from triton.compiler import ASTSource

    given = _arguments(kernel, signature, constants)
    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    where = gpu_target(target)
    attributes = _attributes(types, aligned, amd=where.backend == "hip")
    source = ASTSource(
        kernel, types, {(names.index(name),): value for name, value in given.items()}, attributes
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return resources.read(
        lambda: triton_compile(source, target=where, options=options), kernel.__name__, target
    )


def precompile(fn: Any, *args: Any, target: str, **options: Any) -> Resources:
    """Fill Triton's cache with what a launch of a kernel on a device of this target will look for.

    args, options: as at the launch, with a torch dtype for each tensor; options are keyword arguments,
    constexprs, num_warps and num_stages. The device's Python and Triton wheel have to equal those here, and
    the cache has to lie at the same path there, or `absent.relocate` be called on it.

    Raises KernelError if the kernel does not compile.
    """
    kernel = _jitted(fn)
    with pretend(target):
        return resources.read(
            lambda: kernel.warmup(*args, grid=(1,), **options), kernel.__name__, target
        )


def compile_all(
    jobs: Iterable[Job | Launch],
    count: int | None = None,
    *,
    seconds: float = 120.0,
    progress: bool = False,
) -> list[Resources | str]:
    """Compile several kernels side by side: Resources of each in order, or why there are none.

    count: processes, as many as cores by default. seconds: for a job; one that takes longer or crashes
    the compiler does not touch the others. Kernels have to stand in files, by their own names.
    """
    sent = [_sent(job) for job in jobs]
    return workers.run(
        _compile, sent, workers=count, seconds=seconds, label="compile", progress=progress
    )


def _jitted(fn: Any) -> Any:
    """The jitted function under autotuning and heuristics."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        raise KernelError(
            "Compiling kernels for a GPU needs Triton: pip install 'd2dcompile[triton]'."
        ) from error
    found = fn
    while not isinstance(found, JITFunction) and hasattr(found, "fn"):
        found = found.fn
    if not isinstance(found, JITFunction):
        raise KernelError(
            f"{fn!r} is not a jitted Triton kernel; expected one. Where {workers.INTERPRET} is set kernels "
            "are interpreted and cannot be compiled: unset it, or use compile_all."
        )
    return found


def _arguments(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any]
) -> dict[str, Any]:
    """The constants with defaults filled in. Raises KernelError for arguments missing or too many."""
    given = {p.name: p.default for p in kernel.params if p.is_constexpr and p.has_default}
    given |= constants
    runtime, names = {*signature}, {*kernel.arg_names}
    wrong = (names - runtime - {*given}) | (runtime | {*given}) - names | (runtime & {*given})
    if wrong:
        raise KernelError(
            f"Kernel {kernel.__name__!r} has the arguments {', '.join(kernel.arg_names)}; expected each "
            f"once, in the signature or among the constants. To be corrected: {', '.join(sorted(wrong))}."
        )
    return given


def _attributes(types: Mapping[str, str], aligned: Collection[str], amd: bool) -> dict[Any, Any]:
    """What is promised of each argument, by its place: pointers and some integers are divisible by 16."""
    divisible = [["tt.divisibility", ALIGNED]]
    pointer = [*divisible, ["tt.pointer_range", 32]] if amd else divisible  # tensors below 2 GiB
    return {
        (place,): pointer if kind[0] == "*" else divisible if name in aligned else []
        for place, (name, kind) in enumerate(types.items())
    }


def _sent(job: Job | Launch) -> Job | Launch:
    """A job that can be sent to another process: kernels, also among its values, replaced by names."""
    if isinstance(job, Job):
        constants = {name: _named(value) for name, value in job.constants.items()}
        return replace(job, fn=_named(job.fn), constants=constants)
    options = {name: _named(value) for name, value in job.options.items()}
    return replace(job, fn=_named(job.fn), args=tuple(map(_named, job.args)), options=options)


def _compile(job: Job | Launch) -> Resources:
    """In a worker: the job with its kernels found again, compiled."""
    if isinstance(job, Job):
        constants = {name: _found(value) for name, value in job.constants.items()}
        return replace(job, fn=_found(job.fn), constants=constants).compile()
    options = {name: _found(value) for name, value in job.options.items()}
    args = tuple(map(_found, job.args))
    return replace(job, fn=_found(job.fn), args=args, options=options).compile()


def _named(value: Any) -> Any:
    function = value
    while hasattr(function, "fn"):
        function = function.fn
    if function is value:
        return value
    file = str(Path(function.__code__.co_filename).absolute())
    return _Name(function.__module__, file, function.__name__)


def _found(value: Any) -> Any:
    return value.find() if isinstance(value, _Name) else value
