"""Does the whole path survive a CUDA graph, follow its input inside one, and give the same bits twice?

The router decides, nothing is forced: a graph of route and expert_mlp, or of the ops for several sites, is
replayed on rows that were not there when it was captured, and each answer is compared with fp64 under the
lists of those rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gpu_cases
import gpu_ours
import torch
from gpu_cases import LEAST, Case, Cell, Layer
from gpu_check import ERROR, relative_error
from gpu_device import Place, Replay
from torch import Tensor

from d2dcompile.kernels.expert_mlp import expert_mlp
from d2dcompile.kernels.expert_mlp.call import Call
from d2dcompile.kernels.expert_mlps import expert_mlps
from d2dcompile.kernels.gate import tau_bits
from d2dcompile.kernels.route import gpu as router
from d2dcompile.kernels.route import route
from d2dcompile.kernels.routes import routes

NAME = "checks"
CELL = Cell(0.3)
CASES = tuple(Case(*gpu_cases.VIT, "bf16", tokens, (CELL,)) for tokens in (1, 8, 512))
Path = Callable[[Tensor], Tensor]


def measure(place: Place, note: Callable[[str], object] = lambda name: None) -> dict[str, Any]:
    """{path: what held} of every strategy, and of the ops as a compiled model calls them."""
    start = time.time()
    torch.set_float32_matmul_precision("highest")
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for case in map(_toy, CASES[1:2]) if place.name == "cpu" else CASES:
        layer = gpu_cases.layers(case, 1, place.name)[0]
        for way, path in _paths(case, layer, place).items():
            name = f"T{case.tokens} {way}"
            note(name)
            try:
                found[name] = _held(case, layer, path, place)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
                place.sync()
    return {
        "device": place.describe(),
        "timed_as": place.timed_as,
        "checks": found,
        "failed": failed,
        "seconds": time.time() - start,
    }


def _toy(case: Case) -> Case:
    return replace(case, width=32, hidden=64, dtype="fp32", size=16, router=16)


def _paths(case: Case, layer: Layer, place: Place) -> Mapping[str, Path]:
    """Functions of x [T, D] that route it and run its experts."""
    tau = tau_bits(gpu_ours.TAU, place.name)
    text = gpu_cases.TEXTS[case.activation]

    def ops(x: Tensor) -> Tensor:
        lists = route(x, layer.w1, layer.w2, tau)
        found: Tensor = expert_mlp(x, *lists, *layer.weights().values(), None, [], text)
        return found

    def beside(x: Tensor) -> Tensor:
        """The second of two equal sites that share their first router layer."""
        lists = routes(x, [layer.w1], [layer.w2] * 2, [tau] * 2, [0, 0])
        found: list[Tensor] = expert_mlps(x, lists, [*layer.weights().values()] * 2, text)
        return found[1]

    def of(schedule: Any) -> Path:
        def run(x: Tensor) -> Tensor:
            lists, y = router.run(x, layer.w1, layer.w2, tau), torch.empty_like(x)
            Call(case.spec, x, lists, layer.weights(), [], y).run(schedule)
            return y

        return run

    plan = gpu_ours.schedules(case, case.cells[0])
    return {"ops": ops, "beside": beside} | {name: of(schedule) for name, schedule in plan.items()}


def _held(case: Case, layer: Layer, path: Path, place: Place) -> dict[str, Any]:
    """What held of one path. Raises if it cannot be captured."""
    x = gpu_cases.rows(case, place.name)
    replay, outputs = place.capture(lambda: [path(x)])
    replay()
    right, executed = [], []
    for scale in (1.0, -1.0):  # other rows, other experts
        x.mul_(scale)
        outputs[0].fill_(torch.nan)
        replay()
        place.sync()
        wrong, share = _error(case, layer, x, outputs[0])
        right.append(wrong <= 1)
        executed.append(share)
    return {
        "captured": True,
        "right": all(right),
        "executed": executed,
        "same_bits": _same(replay, outputs, place),
    }


def _error(case: Case, layer: Layer, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(error over what is allowed, executed share) of an output for rows x."""
    tokens, offsets, _ = router.run(x, layer.w1, layer.w2, tau_bits(gpu_ours.TAU, x.device))
    mask = torch.zeros(case.tokens, case.experts, dtype=torch.bool, device=x.device)
    expert = torch.arange(case.experts, device=x.device).repeat_interleave(offsets.diff())
    mask[tokens[: offsets[-1]].long(), expert] = True
    some = gpu_cases.checked(case, x.device)
    exact, eager = (
        gpu_cases.answer(case, layer, x[some], mask[some], dtype)
        for dtype in (torch.float64, x.dtype)
    )
    allowed = max(ERROR * relative_error(eager, exact), LEAST[case.dtype])
    wrong = relative_error(y[some], exact) / allowed
    return (wrong if wrong == wrong else float("inf")), float(mask.float().mean())


def _same(replay: Replay, outputs: list[Tensor], place: Place) -> bool:
    """Whether all replays give the same bits."""
    replay()
    place.sync()
    first = outputs[0].clone()
    for _ in range(place.replays - 1):
        replay()
        place.sync()
        if not torch.equal(outputs[0], first):
            return False
    return True
