"""What the cost model expects of the cases of benchmarks/gpu.py: no GPU, no measurement."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_cases import CASES, Case, Cell

from d2dcompile.cost import STRATEGIES, dense_time, moe_times
from d2dcompile.gpus import GPUS
from d2dcompile.load import Block, Load

NAMES = ("H100", "H200")


def tables() -> str:
    """A table a GPU: microseconds of the dense layer and of each strategy, router included."""
    return "\n\n".join("\n".join(_table(name)) for name in NAMES)


def block(case: Case) -> Block:
    return Block(
        case.width, case.width, case.hidden, case.experts, case.router, case.gated, case.dtype
    )


def load(case: Case, cell: Cell) -> Load:
    """Of many tokens, as many experts as independent choices would use."""
    return Load(case.tokens, cell.share, cell.union)


def _table(name: str) -> Iterator[str]:
    yield f"Modelled, not measured: {name}, us a layer."
    yield ""
    yield f"| case | dense | {' | '.join(STRATEGIES)} | vs dense |"
    yield "|---|---|" + "---|" * (len(STRATEGIES) + 1)
    for case in CASES:
        dense = dense_time(GPUS[name], block(case), case.tokens)
        for cell in case.cells:
            times = moe_times(GPUS[name], block(case), load(case, cell))
            cells = [f"{times[way] * 1e6:.1f}" if way in times else "-" for way in STRATEGIES]
            best = dense / min(times.values())
            yield f"| {case} {cell} | {dense * 1e6:.1f} | {' | '.join(cells)} | {best:.2f} |"
