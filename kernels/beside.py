"""Several launches as one: programs of the same kernel for several sites, side by side in one grid.

Each launch keeps its own kernel, generated for its own sizes, its own arguments and options: a generated
kernel asks which of them a program belongs to and calls that one. The bits are those of launches alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import KernelError
from . import render
from .launching import OPTIONS, Launched, launch

COMMON = ("num_warps", "num_stages", *OPTIONS)  # options of a launch as a whole


def compatible(launches: Sequence[Launched]) -> bool:
    """Whether one launch can stand for these: their programs have as many warps, their grids as many axes."""
    return len({(item.name, item.options["num_warps"], len(item.grid)) for item in launches}) == 1


def launch_beside(launches: Sequence[Launched], persistent: bool = False) -> None:
    """Make noted launches of one kernel, generated for several sites, as one launch.

    persistent: whether the kernel's programs share all its work, however many they are. Programs of
    others that a launch alone would not have do nothing. Loads are as deep as the shallowest asks for.
    Raises KernelError for launches that are not `compatible`.
    """
    if not compatible(launches):
        raise KernelError(
            f"Launches of {', '.join(item.name for item in launches)} cannot be one: expected one kernel, "
            "one number of warps and one number of axes."
        )
    if len(launches) == 1:
        (item,) = launches
        own = {name: value for name, value in item.options.items() if name not in COMMON}
        warps, stages = item.options["num_warps"], item.options["num_stages"]
        launch(item.kernel, item.grid, *item.args, warps=warps, stages=stages, **own)
        return
    grid = tuple(map(max, zip(*(item.grid for item in launches), strict=True)))
    bounds = () if persistent else tuple(a for a, n in enumerate(grid) if _differ(launches, a))
    files = tuple(_file(item.kernel) for item in launches)
    constants = {
        f"{name}_{i}": value
        for i, item in enumerate(launches)
        for name, value in item.options.items()
        if name not in COMMON
    }
    for axis in bounds:
        constants |= {f"PROGRAMS_{axis}_{i}": item.grid[axis] for i, item in enumerate(launches)}
    kernels = _module(
        launches[0].name,
        files,
        _parameters(launches[0].kernel),
        len(launches[0].args),
        bounds,
        len(grid),
    )
    launch(
        getattr(kernels, launches[0].name), (*grid, len(launches)),
        *(arg for item in launches for arg in item.args),
        warps=launches[0].options["num_warps"],
        stages=min(item.options["num_stages"] for item in launches), **constants,
    )  # fmt: skip


def _differ(launches: Sequence[Launched], axis: int) -> bool:
    return len({item.grid[axis] for item in launches}) > 1


def _plain(kernel: Any) -> Any:
    """The Python function of a jitted or interpreted kernel."""
    return kernel.fn


@lru_cache(maxsize=1024)
def _file(kernel: Any) -> str:
    """The generated file of a kernel, in the folder where files are generated now."""
    return render.path_of(Path(inspect.getfile(_plain(kernel))).read_text(encoding="utf-8")).name


@lru_cache(maxsize=1024)
def _parameters(kernel: Any) -> tuple[tuple[str, bool], ...]:
    """Names of a kernel's parameters, and whether each is a constexpr."""
    found = inspect.signature(_plain(kernel)).parameters.values()
    return tuple((p.name, "constexpr" in str(p.annotation)) for p in found)


@lru_cache(maxsize=1024)
def _module(
    name: str,
    files: tuple[str, ...],
    parameters: tuple[tuple[str, bool], ...],
    given: int,
    bounds: tuple[int, ...],
    axes: int,
) -> ModuleType:
    return render.module(source(name, files, parameters, given, bounds, axes))


def source(
    name: str,
    files: Sequence[str],
    parameters: Sequence[tuple[str, bool]],
    given: int,
    bounds: Sequence[int],
    axes: int,
) -> str:
    """The source of a kernel that runs one of several others, those of this name in generated `files`.

    parameters: names, and whether each is a constexpr; `given` of them are passed by position. bounds: the
    axes, of `axes` before that of the sites, on which they have different numbers of programs.
    """
    lines = [
        f'"""{name} of {len(files)} sites side by side: which one is said by axis {axes} of the grid."""'
    ]
    lines += ["", "import triton", "import triton.language as tl", ""]
    lines += ["from d2dcompile.kernels.render import sibling", ""]
    lines += [f'{name}_of_{i} = sibling(__file__, "{file}").{name}' for i, file in enumerate(files)]
    lines += ["", "", "@triton.jit", f"def {name}("]
    for chosen in (parameters[:given], parameters[given:]):
        for i in range(len(files)):
            lines += [f"    {p}_{i}{': tl.constexpr' * fixed}," for p, fixed in chosen]
    for axis in bounds:
        lines += [f"    PROGRAMS_{axis}_{i}: tl.constexpr," for i in range(len(files))]
    lines += ["):", f"    site = tl.program_id({axes})"]
    for i in range(len(files)):
        inside = "".join(f" & (tl.program_id({a}) < PROGRAMS_{a}_{i})" for a in bounds)
        lines += [f"    if (site == {i}){inside}:", f"        {name}_of_{i}("]
        lines += [f"            {p}_{i}," for p, _ in parameters]
        lines += ["        )"]
    return "\n".join(lines) + "\n"
