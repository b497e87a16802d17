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
from d2dcompile.calling import Dispatching
from d2dcompile.errors import CalibrationError, CalibrationWarning

from .case import Case
from .score import select

# Relative, in fp64: rounding in another order gives about 1e-15, and more where gradients are summed.
OUTPUTS, GRADIENTS = 1e-12, 1e-9


@dataclass
class Equality:
    """How a converted case compares with dense, in fp64 where the model runs in it, else in fp32.

    Attributes:
        sites: how many the conversion has; dense: {site: reason} of blocks that stayed dense.
        ran: how many of the sites ran as experts in eval mode, and in training mode.
        eval, train, grad: largest difference relative to the largest value of the output, of the
            output in training mode, and over all parameters of their gradients.
        rival: the same three differences of the dense model itself under the inner compiler, where one of
            ours is above its limit: models that compute norms in fp32 round differently there.
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
    rival: tuple[float, float, float] = (0.0, 0.0, 0.0)
    random: bool = False
    noise: float = 0.0
    dtype: str = "float64"
    error: str = ""

    def limit(self, what: str) -> float:
        """The difference of "eval", "train" or "grad" that rounding explains."""
        wide = GRADIENTS if what == "grad" else OUTPUTS
        rival = self.rival[("eval", "train", "grad").index(what)]
        rounding = {"float64": wide, "float32": 2e-4, "bfloat16": 4e-2}[self.dtype]
        return max(rounding, 2 * rival, 2 * self.noise if what == "grad" else 0.0)

    def problems(self) -> list[str]:
        """What is wrong, as texts."""
        found = [self.error.strip().splitlines()[-1]] if self.error else []
        found += [f"{site} stays dense: {why}" for site, why in self.dense.items()]
        for name in ("eval",) if self.random else ("eval", "train", "grad"):
            if not getattr(self, name) <= self.limit(name):
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
        with torch._inductor.config.patch(fallback_random=True):  # Inductor draws as eager does
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
    compiled = {"backend": "d2dmoe", "options": {"inner": inner, "strict": False}}
    # Dynamo draws NumPy's random numbers from torch, and PaliGemma gives something else under it: where our
    # result is not eager's, it has to be that of the dense model through Dynamo.
    with torch.no_grad(), _counting() as ran:
        for rival in (None, {"backend": "eager"}):
            result.eval, _ = _against(model, rival, compiled, inputs)
            if result.eval <= result.limit("eval"):
                break
    result.ran = (len(ran), result.sites)
    if training:
        model.train()
        with _counting() as ran:
            for rival in (None, {"backend": "eager"}):
                result.train, result.grad = _against(model, rival, compiled, inputs)
                if result.train <= result.limit("train"):
                    break
        result.ran = (result.ran[0], len(ran))
        _explain_training(result, model, inputs)
    if inner != "eager" and result.problems():
        result.rival = _rival(model, inner, inputs, training)


def _against(
    model: nn.Module, rival: dict[str, Any] | None, compiled: dict[str, Any], inputs: Any
) -> tuple[float, float]:
    """Differences of outputs and gradients of the model compiled in two ways; None is eager."""
    torch._dynamo.reset()
    first = model if rival is None else torch.compile(model, **rival)
    (base, base_grads), (ours, our_grads) = _twice(
        first, torch.compile(model, **compiled), inputs, lambda outputs: _gradients(model, outputs)
    )
    return _difference(ours, base), _difference(our_grads, base_grads)


def _explain_training(result: Equality, model: nn.Module, inputs: Any) -> None:
    """Whether the dense model repeats itself, and how well conditioned its gradients are."""
    if result.train > result.limit("train"):
        (base, _), (again, _) = _twice(model, model, inputs, lambda outputs: [])
        result.random = _difference(again, base) > result.limit("train")
    if result.grad > result.limit("grad") and not result.random:
        result.noise = _conditioning(model, inputs)


def _rival(model: nn.Module, inner: str, inputs: Any, training: bool) -> tuple[float, float, float]:
    """What the dense model differs from eager under the inner compiler: eval, training, gradients."""
    with torch.no_grad():
        evaluated, _ = _against(model.eval(), None, {"backend": inner}, inputs)
    if not training:
        return evaluated, 0.0, 0.0
    return evaluated, *_against(model.train(), None, {"backend": inner}, inputs)


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
    """The gradients of a fixed function of the outputs, for each parameter; none under no_grad."""
    if not torch.is_grad_enabled():
        return []
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
