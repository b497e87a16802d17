"""What is measured: the converted layer under given masks, one candidate a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from gpu_cases import Case, Cell, Layer
from torch import Tensor

from d2dcompile.gpu_blocks import FEW, GpuSchedule
from d2dcompile.gpu_defaults import of_strategy
from d2dcompile.gpus import H200
from d2dcompile.kernels import device
from d2dcompile.kernels.dispatch import dispatch
from d2dcompile.kernels.expert_mlp.call import Call
from d2dcompile.kernels.gate import tau_bits
from d2dcompile.kernels.route import gpu as router
from d2dcompile.load import Load

THREADS = 8  # that compile kernels at once
COMPILE_LIMIT = 90  # seconds for all of them
TAU = 0.5
Lists = tuple[Tensor, Tensor, Tensor]
Turn = Callable[[int], Tensor]


def schedules(case: Case, cell: Cell) -> dict[str, GpuSchedule]:
    """Every strategy but "dense" with the tiles of the closed form, and the obvious steps away from it."""
    load = Load(case.tokens, cell.share, case.used(cell))
    many = replace(of_strategy("pairs", case.spec, load, H200), swap=False)
    found = {
        "pairs": many,
        "pairs swap": replace(many, swap=True),
        "pairs tma": replace(many, tma=True),
        "pairs swap tma": replace(many, swap=True, tma=True),
        "pairs 1 a SM": replace(many, per_multiprocessor=1),
        "atomic": replace(many, strategy="atomic"),
        "atomic swap": replace(many, strategy="atomic", swap=True),
    }
    if many.up.block_m > 64:
        up, down = (replace(tile, block_m=64, warps=4) for tile in (many.up, many.down))
        found["pairs 64 rows"] = replace(many, up=up, down=down)
    if case.tokens <= FEW:
        few = of_strategy("decode", case.spec, load, H200)
        found["decode"] = few
        found["decode 16 splits"] = replace(few, splits=16)
        found["decode 4 a SM"] = replace(few, per_multiprocessor=4)
    return found


class Ours:
    """Calls of one cell: turn i runs layer i % copies on the pairs of its own mask, into its own output."""

    def __init__(
        self,
        case: Case,
        layers: Sequence[Layer],
        x: Tensor,
        masks: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        self.case, self.layers, self.x, self.outputs = case, layers, x, outputs
        self.lists: list[Lists] = [dispatch.meaning(mask.to(x.device)) for mask in masks]
        self.tau = tau_bits(TAU, x.device)

    def route(self, turn: int) -> Lists:
        """The lists of the layer's own router: it runs in every turn, and the given ones take its place."""
        layer = self.layers[turn % len(self.layers)]
        return router.run(self.x, layer.w1, layer.w2, self.tau)

    def call(self, turn: int) -> Call:
        layer = self.layers[turn % len(self.layers)]
        return Call(
            self.case.spec, self.x, self.lists[turn], layer.weights(), [], self.outputs[turn]
        )

    def whole(self, schedule: GpuSchedule) -> Turn:
        """Router and experts of a turn."""
        calls = [self.call(turn) for turn in range(len(self.lists))]

        def run(turn: int) -> Tensor:
            self.route(turn)
            calls[turn].run(schedule)
            return calls[turn].y

        return run

    def everything(self) -> Turn:
        """All experts through the device's own products, without the router."""
        schedule = next(iter(schedules(self.case, self.case.cells[0]).values()))
        return self.part(replace(schedule, strategy="dense"), None)

    def part(self, schedule: GpuSchedule, kernels: Sequence[str] | None) -> Turn:
        """A turn without the router, and with no other kernels than those named."""
        calls = [self.call(turn) for turn in range(len(self.lists))]
        for call in calls if kernels is not None else []:
            call.kernels = _Only(call.kernels, kernels)

        def run(turn: int) -> Tensor:
            calls[turn].run(schedule)
            return calls[turn].y

        return run

    def phases(self, plan: Mapping[str, GpuSchedule]) -> dict[str, Turn]:
        """What a turn consists of: each adds one kernel to the one before, so that differences are phases."""
        found = {"route": lambda turn: self.route(turn)[1]}
        if "decode" in plan:
            first = ("decode_up", "decode_up_one")
            found["decode: up"] = self.part(plan["decode"], first)
            found["decode: up, down"] = self.part(plan["decode"], (*first, "decode_down"))
        for name in [name for name in ("pairs", "pairs swap") if name in plan]:
            found[f"{name}: up"] = self.part(plan[name], ("up",))
            found[f"{name}: up, down"] = self.part(plan[name], ("up", "down"))
            found[f"{name}: up, down, combine"] = self.part(plan[name], None)
        return found

    def compile(self, plan: Mapping[str, GpuSchedule]) -> dict[str, str]:
        """Compile the kernels of all schedules side by side; {name: reason} of those that do not compile."""
        if device.interpreted():
            return {}
        pool = ThreadPoolExecutor(THREADS)
        jobs: dict[str, Future[None]] = {}
        for name, schedule in plan.items():
            call = self.call(0)
            call.kernels = _Compiled(call.kernels)
            jobs[name] = pool.submit(call.run, schedule)
        done, late = wait(jobs.values(), timeout=COMPILE_LIMIT)
        pool.shutdown(wait=False, cancel_futures=True)
        failed = {
            name: f"compiling took longer than {COMPILE_LIMIT} s"
            for name, job in jobs.items()
            if job in late
        }
        for name, job in jobs.items():
            if job in done and (error := job.exception()) is not None:
                failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
        return failed


class _Only:
    """A generated module of which some kernels are launched and the others are not."""

    def __init__(self, module: Any, names: Sequence[str]) -> None:
        self._module, self._names = module, names

    def __getattr__(self, name: str) -> Any:
        return (
            getattr(self._module, name) if name in self._names else _Launch(lambda *_, **__: None)
        )


class _Compiled:
    """A generated module whose kernels are compiled and not launched."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return _Launch(getattr(self._module, name).warmup)


class _Launch:
    """kernel[grid](...) as a call of `run` with the grid."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **options: self._run(*args, grid=grid, **options)
