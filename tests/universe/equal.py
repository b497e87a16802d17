"""Convert a case and compare it at tau = 0 with the dense model: outputs, and gradients in training.

python -m universe.equal [--inner eager] [pattern ...]       (with tests/ on PYTHONPATH)
"""

from __future__ import annotations

import argparse
import copy
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import d2dcompile as d2d
from d2dcompile.backend import Dispatching
from d2dcompile.errors import CalibrationError, CalibrationWarning

from .case import Case
from .score import select

EPSILON = 1e-9  # relative, in fp64: rounding in another order gives about 1e-15


@dataclass
class Equality:
    """How a converted case compares with dense, in fp64 where the model runs in it, else in fp32.

    Attributes:
        sites: how many the conversion has; dense: {site: reason} of blocks that stayed dense.
        ran: how many of the sites ran as experts in eval mode, and in training mode.
        eval, train, grad: largest difference relative to the largest value of the output, of the
            output in training mode, and over all parameters of their gradients.
        rival: the difference in eval mode that the dense model itself has under the inner compiler, where
            ours is above the limit: models that compute norms in fp32 round differently there.
        random: whether the dense model differs from itself in training, with the same seeds.
        noise: how much the dense gradients differ when every weight changes by about its last place, where
            ours are above the limit: RWKV in fp32 has gradients that ill conditioned.
        dtype: "float64", "float32" or "bfloat16": the coarsest that the case computes in.
        error: what went wrong instead, or "".
    """

    case: str
    sites: int = 0
    dense: dict[str, str] = field(default_factory=dict)
    ran: tuple[int, int] = (0, 0)
    eval: float = 0.0
    train: float = 0.0
    grad: float = 0.0
    rival: float = 0.0
    random: bool = False
    noise: float = 0.0
    dtype: str = "float64"
    error: str = ""

    @property
    def limit(self) -> float:
        """The difference that rounding explains."""
        return {"float64": EPSILON, "float32": 2e-4, "bfloat16": 4e-2}[self.dtype]

    def problems(self) -> list[str]:
        """What is wrong, as texts."""
        found = [self.error.strip().splitlines()[-1]] if self.error else []
        found += [f"{site} stays dense: {why}" for site, why in self.dense.items()]
        limits = {"eval": max(self.limit, 2 * self.rival)}
        if not self.random:
            limits.update(train=self.limit, grad=max(self.limit, 2 * self.noise))
        for name, limit in limits.items():
            if not getattr(self, name) <= limit:
                found.append(f"{name} differs by {getattr(self, name):.1e} in {self.dtype}")
        if self.ran[0] < self.sites:
            found.append(f"{self.ran[0]} of {self.sites} sites ran in eval mode")
        if self.ran[1] < self.sites:
            found.append(f"{self.ran[1]} of {self.sites} sites ran in training mode")
        return found


def equality(case: Case, inner: str = "eager", training: bool = True) -> Equality:
    """Convert, run and compare one case; a case without blocks has no sites."""
    result = Equality(case.name)
    try:
        model, inputs = case.make()
        if not case.truth(model).blocks:
            return result
        _compare(result, *_widened(result, model, inputs), inner, training)
    except Exception:
        result.error = traceback.format_exc(limit=-4)
    return result


def _widened(result: Equality, model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """The case in fp64, or as it is if it does not run in that."""
    wide, wide_inputs = copy.deepcopy(model).double(), _double(inputs)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = _run(copy.deepcopy(wide), wide_inputs)
        if all(t.dtype == torch.float64 and t.isfinite().all() for t in outputs):
            return wide, wide_inputs
    except (RuntimeError, TypeError, ValueError):
        pass
    half = any(p.dtype == torch.bfloat16 for p in model.parameters())
    result.dtype = "bfloat16" if half else "float32"
    return model, inputs


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _double(v) for k, v in value.items()}
    return type(value)(map(_double, value)) if isinstance(value, (tuple, list)) else value


def _compare(result: Equality, model: nn.Module, inputs: Any, inner: str, training: bool) -> None:
    torch._dynamo.reset()
    batch = inputs if isinstance(inputs, dict) else tuple(inputs)
    config = d2d.Config(
        clustering="random", router_epochs=1, calibration_tokens=64, router_width=4, tau=0.0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        try:
            conversion = d2d.convert(model, [batch], config, progress=False)
        except CalibrationError as error:
            if "without a convertible site" not in str(error):
                raise
            return  # no block is found: a miss, which the score counts
    result.sites, result.dense = len(conversion.experts), dict(conversion.dense)
    options = {"inner": inner, "strict": False}
    torch._dynamo.reset()
    fast = torch.compile(model, backend="d2dmoe", options=options)
    with torch.no_grad(), _counting() as ran:
        # PaliGemma gives something else under Dynamo than without: then that is the dense model.
        for dense in (model, torch.compile(model, backend="eager")):
            (expected, _), (found, _) = _twice(dense, fast, inputs, lambda outputs: [])
            result.eval = _difference(found, expected)
            if result.eval <= result.limit:
                break
    result.ran = (len(ran), result.sites)
    if inner != "eager" and result.eval > result.limit:
        torch._dynamo.reset()
        with torch.no_grad():
            dense = torch.compile(model, backend=inner)
            (expected, _), (found, _) = _twice(model, dense, inputs, lambda outputs: [])
        result.rival = _difference(found, expected)
    if not training:
        return
    model.train()
    torch._dynamo.reset()
    fast = torch.compile(model, backend="d2dmoe", options=options)
    with _counting() as ran:
        # Dynamo draws NumPy's random numbers, of spectrogram masks, from torch: where the two runs drew
        # differently the dense model is run through Dynamo as well.
        for dense in (model, torch.compile(model, backend="eager")):
            base, ours = _twice(dense, fast, inputs, lambda outputs: _gradients(model, outputs))
            result.train, result.grad = (_difference(f, e) for f, e in zip(ours, base, strict=True))
            if result.train <= result.limit:
                break
        else:
            base, again = _twice(model, model, inputs, lambda outputs: [])
            result.random = _difference(again[0], base[0]) > result.limit
        if result.grad > result.limit and not result.random:
            result.noise = _conditioning(model, inputs)
    result.ran = (result.ran[0], len(ran))


Outcome = tuple[list[Tensor], list[Tensor]]  # outputs and gradients


def _twice(
    model: nn.Module, fast: Any, inputs: Any, gradients: Callable[[list[Tensor]], list[Tensor]]
) -> tuple[Outcome, Outcome]:
    """What the model gives eager and compiled, from the same state and random numbers."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    results = []
    for run in (model, fast):
        with torch.no_grad():
            for name, buffer in model.named_buffers():  # batch norm counts batches
                if not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])
        torch.manual_seed(1)
        random.seed(1)  # layerdrop and masks of spectrograms are drawn with these two
        np.random.seed(1)
        outputs = _run(run, copy.deepcopy(inputs))
        results.append((outputs, gradients(outputs)))
    return results[0], results[1]


def _conditioning(model: nn.Module, inputs: Any) -> float:
    """The difference of the model's gradients to those of a copy with weights rounded differently."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1 + torch.finfo(p.dtype).eps * torch.randn_like(p))
    grads = []
    for each in (model, other):
        (_, found), _ = _twice(each, each, inputs, lambda outputs, m=each: _gradients(m, outputs))
        grads.append(found)
    return _difference(grads[1], grads[0])


def _run(model: Any, inputs: Any) -> list[Tensor]:
    outputs = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [t for t in _tensors(outputs) if t.is_floating_point()]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)


def _gradients(model: nn.Module, outputs: list[Tensor]) -> list[Tensor]:
    """The gradients of a fixed function of the outputs, for each parameter that has one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = sum(((t - 0.1) ** 2).mean() for t in outputs if t.requires_grad)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference relative to the largest value of all tensors; infinite if not finite."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    scale = max(
        (float(t.detach().abs().nan_to_num().max()) for t in expected if t.numel()), default=0
    )
    worst = 0.0
    for f, e in zip(found, expected, strict=True):
        same = torch.isfinite(f) == torch.isfinite(e)
        if not same.all():
            return float("inf")
        delta = (f.detach() - e.detach())[torch.isfinite(e)].abs()
        worst = max(worst, float(delta.max()) if delta.numel() else 0.0)
    return worst / scale if scale else worst


@contextmanager
def _counting() -> Iterator[set[str]]:
    """The sites of the graphs whose experts run inside of the block."""
    ran: set[str] = set()
    call = Dispatching.__call__

    def counted(self: Dispatching, *args: Any) -> Any:
        with mock.patch.object(self, "_compiled", wraps=self._compiled) as compiled:
            result = call(self, *args)
        if compiled.called:
            ran.update(self.names(args))
        return result

    with mock.patch.object(Dispatching, "__call__", counted):
        yield ran


def main() -> None:
    """Compare the cases named on the command line and print what is wrong."""
    from . import all_cases

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inner", default="eager")
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("patterns", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    good = total = 0
    for case in select(all_cases(), given.patterns):
        result = equality(case, given.inner, not given.eval_only)
        total += result.sites > 0 or bool(result.error)
        good += result.sites > 0 and not result.problems()
        for text in result.problems():
            print(f"{case.name}: {text}", flush=True)
    print(f"{good} of {total} models with blocks equal dense")


if __name__ == "__main__":
    main()
