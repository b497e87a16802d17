"""What a compiled Triton kernel takes: read once, kept in Triton's cache beside the kernel."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import KernelError
from ..gpus import TARGETS, Gpu
from . import sass

NAME = "d2dcompile-resources-1.json"  # the number is raised with every change of what is read


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        target: architecture, as in `compile_kernel`. hash: the name of its entry in Triton's cache.
        registers: per thread; on AMD vector and accumulator registers together.
        accumulators: those of them that AMD can only use for sums.
        spill, stack: bytes per thread. shared: bytes per CTA.
        num_warps: per CTA, as compiled.
        serialized: whether ptxas ran wgmma one after another.
        instructions: counts by family, see `sass`; "total" of all.
    """

    target: str
    hash: str
    registers: int
    accumulators: int
    spill: int
    stack: int
    shared: int
    num_warps: int
    serialized: bool
    instructions: Mapping[str, int]

    def count(self, *families: str) -> int:
        """How many instructions of these families there are, "LDG" for "LDG.32" and all other widths."""
        return sum(
            number
            for name, number in self.instructions.items()
            if name in families or name.split(".")[0] in families
        )

    def resident(self, gpu: Gpu | None = None) -> int:
        """CTAs that run on an SM at once; 0 if none fits. gpu: a known one of the target by default.

        Raises KernelError for a target of which none is known.
        """
        known = gpu or TARGETS.get(self.target)
        if known is None:
            raise KernelError(f"No GPU of {self.target} is known; give one of d2dcompile.gpus.")
        return known.resident(self.registers, self.shared, self.num_warps)


def read(build: Callable[[], Any], name: str, target: str) -> Resources:
    """Resources of the kernel that `build` compiles, or finds compiled.

    build: makes a triton CompiledKernel. name: of the kernel, for the message of an error.

    Raises KernelError if it does not compile.
    """
    from triton.runtime.cache import get_cache_manager

    try:
        log, kernel = _with_log(build)
    except Exception as error:  # the compiler's errors have no common class
        raise KernelError(
            f"Kernel {name!r} does not compile for {target}: {type(error).__name__}: {error}"
        ) from error
    store = get_cache_manager(kernel.hash)
    held = store.get_file(NAME)
    if held is not None:
        return Resources(**json.loads(Path(held).read_text()))
    figures, counts = _nvidia(kernel, log) if "cubin" in kernel.asm else _amd(kernel)
    metadata = kernel.metadata
    found = Resources(
        target=target,
        hash=kernel.hash,
        shared=metadata.shared,
        num_warps=metadata.num_warps,
        instructions=counts,
        registers=figures["registers"],
        accumulators=figures.get("accumulators", 0),
        spill=figures["spill"],
        stack=figures["stack"],
        serialized=bool(figures["serialized"]),
    )
    store.put(json.dumps(asdict(found)), NAME, binary=False)
    return found


def _with_log(build: Callable[[], Any]) -> tuple[str, Any]:
    """What ptxas said while something was built, and what was; nothing if it was found built."""
    from triton import knobs

    said = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = True
        built = build()
    return said.getvalue(), built


def _nvidia(kernel: Any, log: str) -> tuple[dict[str, int], dict[str, int]]:
    from triton import knobs

    if "registers" not in log:  # compiled by someone else: only the last step again
        log, _ = _with_log(lambda: _assemble(kernel))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        # Without an analysis of branches, which counts do not need.
        command = [knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sass.ptxas_figures(log), sass.sass_counts(text)


def _assemble(kernel: Any) -> None:
    from triton.compiler.compiler import make_backend

    metadata = kernel.metadata
    backend = make_backend(metadata.target)
    kept = ("num_warps", "enable_fp_fusion", "ptx_options")
    options = backend.parse_options({name: getattr(metadata, name, None) for name in kept})
    backend.make_cubin(kernel.asm["ptx"], {}, options, metadata.target.arch)


def _amd(kernel: Any) -> tuple[dict[str, int], dict[str, int]]:
    text = kernel.asm["amdgcn"]
    return sass.gcn_figures(text), sass.gcn_counts(text)
