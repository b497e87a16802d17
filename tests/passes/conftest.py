"""Fixtures for pass tests: one capture in three ways, and a conversion made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from d2dcompile import layout, recognising, rewriting
from d2dcompile.capture import Captured, from_dynamo, from_graph_module, parameter_names
from d2dcompile.ir import Conversion, Experts, Plan
from d2dcompile.passes import Match


@dataclass
class Traced:
    """A model's graph captured in one way, and the arguments of the graph."""

    how: str
    captured: Captured
    gm: GraphModule
    args: Sequence[Any]

    def matches(self) -> list[Match]:
        """Blocks; projections are in `projections`."""
        return [m for m in rewriting.match(self.captured)[0] if m.site.convertible]

    def projections(self) -> list[Match]:
        return [m for m in rewriting.match(self.captured)[0] if not m.site.convertible]

    def reasons(self) -> set[str]:
        return {miss.reason for miss in rewriting.match(self.captured)[1]}

    def rewritten(self, conversion: Conversion) -> Callable[[], Any]:
        """The rewritten graph, ready to run: operands as arguments for Dynamo, else as buffers."""
        if self.how != "dynamo":
            gm = rewriting.rewrite(self.gm, conversion)
            return lambda: gm(*self.args)
        matches = self.matches()
        done = rewriting.rewrite_captured(self.captured, matches)
        states = [recognising.state_of(found, conversion) for found in matches]
        operands = [tensor for state in states for tensor in state.operands()]
        return lambda: done.gm.forward(*self.args, *operands)[0]


def _trace(
    model: nn.Module,
    x: Tensor,
    how: str = "dynamo",
    dynamic: bool | None = None,
    grad: bool = False,
) -> Traced:
    names = parameter_names(model)
    if how == "dynamo":
        return _by_dynamo(model, x, dynamic, grad)
    if how == "export":
        with torch.no_grad():
            gm = torch.export.export(model, (x,)).module()
    else:
        gm = torch.fx.symbolic_trace(model)
    return Traced(how, from_graph_module(gm, names), gm, [x])


def _by_dynamo(model: nn.Module, x: Tensor, dynamic: bool | None, grad: bool) -> Traced:
    """What a backend gets, and what its callable is then called with."""
    found: list[Traced] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = from_dynamo(gm, inputs, parameter_names(model))
        found.append(Traced("dynamo", captured, gm, ()))

        def run(*args: Any) -> Any:
            found[-1].args = [a.clone() if a is x else a for a in args]
            return gm.forward(*args)

        return run

    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(x)
    assert len(found) == 1
    return found[0]


def _conversion(traced: Traced, experts: int = 4) -> Conversion:
    """Random permutation and router for every site; tau 0. Nothing is attached yet."""
    made: dict[str, Experts] = {}
    for found in traced.matches():
        site, weights = found.site, found.tensors()
        order = torch.randperm(site.d_hidden)
        hashes = layout.hashes_of(site, weights, order)
        router1, router2 = torch.randn(8, site.d_model), torch.randn(experts, 8)
        plan = Plan(experts, site.d_hidden // experts, 8)
        made.setdefault(site.name, Experts(site, plan, order, router1, router2, 0.0, hashes))
    return Conversion(made)


@pytest.fixture
def trace() -> Callable[..., Traced]:
    return _trace


@pytest.fixture
def convert_by_hand() -> Callable[..., Conversion]:
    return _conversion
