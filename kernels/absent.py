"""Stand in for a device that is not here: what compiling a launch asks of its driver, and its cache."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import KernelError


@contextmanager
def pretend(target: str) -> Iterator[None]:
    """Let Triton believe that a device of this target is the current one: kernels compile, none can run."""
    from triton.runtime.driver import driver

    before = driver._active
    driver.set_active(_Absent(target))
    try:
        yield
    finally:
        driver._active = before


@dataclass(frozen=True)
class _Absent:
    """The part of Triton's driver that compiling asks; the device's name keeps its kernels from real ones."""

    target: str

    def get_current_target(self) -> Any:
        return gpu_target(self.target)

    def get_current_device(self) -> str:
        return f"absent {self.target}"

    def get_current_stream(self, device: Any) -> int:
        return 0


def gpu_target(target: str) -> Any:
    """Triton's description of a target. Raises KernelError for a name that is none."""
    from triton.backends.compiler import GPUTarget

    if nvidia := re.fullmatch(r"sm_(\d+)a?", target):
        return GPUTarget("cuda", int(nvidia[1]), 32)
    if re.fullmatch(r"gfx\w+", target):
        return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    raise KernelError(f"{target!r} is no target; expected one such as 'sm_90' or 'gfx942'.")


def relocate(cache: Path) -> int:
    """Make a moved or copied Triton cache whole: entries name their files by absolute paths.

    cache: the folder where it lies now. Returns how many entries there are; needs no Triton.
    """
    groups = list(cache.glob("*/__grp__*"))
    for group in groups:
        names = json.loads(group.read_text())["child_paths"]
        paths = {name: str(group.absolute().with_name(name)) for name in names}
        group.write_text(json.dumps({"child_paths": paths}))
    return len(groups)
