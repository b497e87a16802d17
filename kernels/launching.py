"""Launch Triton kernels, or note what would be launched: the one place where options are set.

What is compiled ahead of time, in tests and by tuning runs, is thereby what a call launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .aot import Launch

OPTIONS = {"enable_fp_fusion": True}  # its default changes with Triton 3.10


@dataclass(frozen=True)
class Launched:
    """A launch that was noted: the kernel, its grid, and its arguments by position and by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        found: str = self.kernel.__name__
        return found

    def job(self, target: str) -> Launch:
        """What compiles it for a target, see `aot.compile_all`: tensors are only known by dtype."""
        args = tuple(a.dtype if isinstance(a, Tensor) else a for a in self.args)
        return Launch(self.kernel, args, target, self.options)


_NOTED: ContextVar[list[Launched] | None] = ContextVar("noted", default=None)


@contextmanager
def noting() -> Iterator[list[Launched]]:
    """Note launches instead of making them; tensors may be on the meta device."""
    noted: list[Launched] = []
    token = _NOTED.set(noted)
    try:
        yield noted
    finally:
        _NOTED.reset(token)


def launch(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    warps: int,
    stages: int = 1,
    **constants: Any,
) -> None:
    """Launch a kernel over a grid with `warps` warps a program and loads `stages` deep."""
    options = {"num_warps": warps, "num_stages": stages, **OPTIONS, **constants}
    noted = _NOTED.get()
    if noted is None:
        kernel[tuple(grid)](*args, **options)
    else:
        noted.append(Launched(kernel, tuple(grid), args, options))
