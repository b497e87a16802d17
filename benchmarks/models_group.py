"""Time one model: dense in three forms, converted, and its blocks alone as stacks, all in turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import models_cases as cases
import torch
from cpu_ceilings import ceilings
from cpu_rivals import AUTOTUNED
from groups import Record, time_limit
from models_cases import SHARE, SIZE, Case, Weights
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

import d2dcompile as d2d
from d2dcompile import timing
from d2dcompile.attachment import lookup, states
from d2dcompile.testing import forced_share

COMPILE_LIMIT = 900  # seconds until a variant's first calls must be over
ERROR = 2  # times the error of eager in the same dtype that ours may have
RIVAL_ERROR = 16  # rivals may, as in benchmarks/cpu.py
WIDER = {"fp32": torch.float64, "bf16": torch.float32}  # the dtype of the truth
ROUTER = 128  # hidden units of a router
CONFIG = d2d.Config(
    expert_size=SIZE,
    router_width=ROUTER,
    router_epochs=1,
    clustering="random",  # so are the weights
)
DENSE = ("eager", "compile", "frozen")
OURS = ("d2dmoe", "d2dmoe frozen")
Call = Callable[[], Tensor]
Run = Callable[[Any], Tensor]


class Variants:
    """What is timed, with errors and numbers of graphs; what is wrong or fails, with the reason."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
        self.errors: dict[str, float] = {}
        self.graphs: dict[str, int] = {}
        self.failed: dict[str, str] = {}

    def add(self, name: str, build: Callable[[], Call], truth: Tensor, bound: float) -> None:
        """Build a variant and keep it if two calls of it are within `bound` of the truth."""
        counters.clear()
        try:
            with time_limit(COMPILE_LIMIT):
                call = build()
                self.errors[name] = max(error(call(), truth) for _ in range(2))
            problem = None
            if not self.errors[name] <= bound:  # NaN is refused too
                problem = f"error {self.errors[name]:.1e}, allowed are {bound:.1e}"
        except Exception as failure:  # whatever a rival does, the others are still timed
            problem = f"{type(failure).__name__}: {str(failure)[:300]}"
        self.graphs[name] = counters["stats"]["unique_graphs"]
        if problem:
            self.failed[name] = problem
        else:
            self.calls[name] = call


def measure(case: Case, repeats: int, threads: int) -> Record:
    """All figures of one model."""
    start = time.time()
    with torch.no_grad():
        dense = cases.build(case)
        ours = copy.deepcopy(dense)
        conversion = d2d.convert(ours, cases.calibration(case, ours), CONFIG, progress=False)
        with forced_share(ours, SHARE, case.rows):
            share = sum(state.expected_share() for state in states(ours)) / len(states(ours))
            found = variants(case, dense, ours)
            limits = ceilings(case.dtype, threads) if case.decodes else {}
            reads = {name: limit for name, limit in limits.items() if name.startswith("read")}
            calls = found.calls | {name: call for name, (call, _) in reads.items()}
            estimates = {name: timing.estimate(call) for name, call in calls.items()}
            with torch.compiler.set_stance("fail_on_recompile"):
                timings = timing.alternate(calls, estimates, repeats)
    record = {
        "layers": case.layers,
        "converted": len(conversion.experts),
        "rows": case.rows,
        "executed": share,
        "figures": {name: figure(timings[name]) for name in found.calls},
        "errors": found.errors,
        "graphs": found.graphs,
        "failed": found.failed,
    }
    if case.decodes:
        weights = Weights.of(dense, ROUTER)
        record["weights"] = asdict(weights)
        record["ceiling"] = weights.ceiling(share)
        record["bandwidth_gb_s"] = max(
            size / timings[name].seconds / 1e9 for name, (_, size) in reads.items()
        )
        size = dense.dtype.itemsize
        touched = dict.fromkeys(DENSE, weights.dense * size)
        touched |= dict.fromkeys(OURS, weights.sparse(share) * size)
        for name in touched.keys() & found.calls.keys():
            record["figures"][name]["gb_s"] = touched[name] / timings[name].seconds / 1e9
    return {**record, **compared(record), "seconds": time.time() - start}


def variants(case: Case, dense: Any, ours: Any) -> Variants:
    """The variants that are right: whole models, and their blocks as stacks."""
    found = Variants()
    whole, x = whole_run(case), cases.hidden(case, dense)
    plain, converted = cases.blocks(case, dense), cases.blocks(case, ours)

    exact, eager = truth(dense, whole, WIDER[case.dtype])
    for name, settings in (("eager", None), ("compile", {}), ("frozen", AUTOTUNED)):
        build = lambda settings=settings: built(case, copy.deepcopy(dense), settings)  # noqa: E731
        found.add(name, build, exact, RIVAL_ERROR * eager)
    exact, eager = truth(ours, whole, WIDER[case.dtype])
    for name, settings in (("d2dmoe", {}), ("d2dmoe frozen", AUTOTUNED)):
        build = lambda settings=settings: built(case, ours, settings, "d2dmoe")  # noqa: E731
        found.add(name, build, exact, ERROR * eager)

    def stack(model: Any) -> Tensor:
        return model(x.to(next(model.parameters()).dtype))

    exact, eager = truth(plain, stack, WIDER[case.dtype])
    run = compiled(plain)
    found.add("blocks compile", lambda: lambda: run(x), exact, RIVAL_ERROR * eager)
    exact, eager = truth(converted, stack, WIDER[case.dtype])
    fast = compiled(converted, "d2dmoe")
    found.add("blocks d2dmoe", lambda: lambda: fast(x), exact, ERROR * eager)
    return found


def whole_run(case: Case) -> Run:
    """One call of a model with inputs of its own."""
    return lambda model: cases.step(model, cases.inputs(case, model))()


def built(case: Case, model: Any, settings: Mapping[str, Any] | None, backend: str = "") -> Call:
    """A call of a model: eager where settings are None, else compiled by a first call under them.

    `options=` come too late for freezing, which Dynamo asks about while it traces.
    """
    given = cases.inputs(case, model)
    if settings is None:
        return cases.step(model, given)
    call = cases.step(compiled(model, backend or "inductor"), given)
    with inductor.patch(dict(settings)):
        call()
    return call


def compiled(model: nn.Module, backend: str = "inductor", **options: Any) -> Any:
    """The model in one graph, which no other instance of its class shares."""
    return torch.compile(
        model,
        backend=backend,
        options=options or None,
        dynamic=False,
        fullgraph=True,
        isolate_recompiles=True,
    )


def truth(model: Any, run: Run, wider: torch.dtype) -> tuple[Tensor, float]:
    """A model's output in a wider dtype, forced masks applied, and the error of eager in its own."""
    with masked(model, model):
        eager = run(model)
    wide = copy.deepcopy(model).to(wider)
    with masked(wide, model):
        exact = run(wide)
    return exact, error(eager, exact)


@contextmanager
def masked(model: nn.Module, converted: nn.Module) -> Iterator[None]:
    """Zero the hidden neurons that the forced masks of a converted model leave out, in eager calls.

    model: the converted one, or a copy of it.
    """
    hooks = []
    for module, source in zip(model.modules(), converted.modules(), strict=True):
        state = lookup(getattr(source, "weight", None))
        if state is not None:
            kept = state.forced.repeat_interleave(state.experts.plan.expert_size, 1)
            hooks.append(module.register_forward_pre_hook(_zeroing(kept)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _zeroing(kept: Tensor) -> Callable[[Any, tuple[Tensor]], Tensor]:
    """A hook before a block's last matrix: row i of the hidden values keeps what kept[i] [H] says."""
    return lambda _, args: (args[0].reshape(kept.shape) * kept).reshape(args[0].shape)


def error(y: Tensor, exact: Tensor) -> float:
    """Norm of what is wrong relative to the truth."""
    return float((y.double() - exact.double()).norm() / exact.double().norm())


def figure(taken: timing.Timing) -> Record:
    """A timing in milliseconds."""
    return {
        "ms": taken.seconds * 1e3,
        "iqr_ms": taken.iqr * 1e3,
        "samples": taken.samples,
        "noisy": taken.noisy,
    }


def compared(record: Mapping[str, Any]) -> Record:
    """Speed-ups of a group, and their share of what its blocks or its bytes allow.

    speedup: of the backend over torch.compile, both as they are by default; speedup_best: of the best
    form of ours over the best dense one. attained: the time that the gain of the blocks predicts from
    torch.compile's, over the time taken; of_ceiling, of_ceiling_best: speed-ups over the ceiling.
    """
    ms = {name: row["ms"] for name, row in record["figures"].items()}
    dense, ours = ({k: ms[k] for k in names if k in ms} for names in (DENSE, OURS))
    if not dense or not ours:
        return {}
    best, fastest = min(dense, key=dense.__getitem__), min(ours, key=ours.__getitem__)
    found: Record = {"best_dense": best, "best_ours": fastest}
    found["speedup_best"] = ms[best] / ms[fastest]
    if "eager" in ms:
        found["speedup_eager"] = ms["eager"] / ms[fastest]
    if {"compile", "d2dmoe"} <= ms.keys():
        found["speedup"] = ms["compile"] / ms["d2dmoe"]
    if {"compile", "d2dmoe", "blocks compile", "blocks d2dmoe"} <= ms.keys():
        layers = record["layers"]
        block = {name: ms[f"blocks {name}"] / layers for name in ("compile", "d2dmoe")}
        expected = cases.predicted(ms["compile"], layers, block["compile"], block["d2dmoe"])
        found |= {"block_ms": block, "predicted_ms": expected, "attained": expected / ms["d2dmoe"]}
    if "ceiling" in record:
        for kind in ("", "_best"):
            if f"speedup{kind}" in found:
                found[f"of_ceiling{kind}"] = found[f"speedup{kind}"] / record["ceiling"]
    return found
