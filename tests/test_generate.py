"""generate() with a compiled forward: dynamic and static caches, no more compilations than dense has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import d2dcompile as d2d
from d2dcompile import testing
from d2dcompile.backend import backend
from d2dcompile.capture import from_dynamo
from d2dcompile.rewriting import match

FAMILIES = ("gpt2", "opt", "llama", "gemma", "phi3")
QUICK = d2d.Config(router_epochs=1, expert_size=16)


class Recorder:
    """A Dynamo backend that counts the graphs it is given, and what the matcher finds in each."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner
        self.found: list[tuple[int, int]] = []

    def __call__(self, gm: GraphModule, inputs: list[Any], **kw: Any) -> Any:
        matches, _ = match(from_dynamo(gm, inputs, {}))
        blocks = sum(found.site.convertible for found in matches)
        self.found.append((blocks, len(matches) - blocks))
        return self.inner(gm, inputs)


def generated(case: testing.Tiny, cache: str, inner: Callable[..., Any]) -> tuple[Any, Recorder]:
    """The tokens of a greedy generation of 6 tokens, and what was compiled for it."""
    torch._dynamo.reset()
    recorder = Recorder(inner)
    model = case.model
    plain = model.forward
    model.forward = torch.compile(plain, backend=recorder)
    try:
        with torch.no_grad():
            tokens = model.generate(
                case.inputs["input_ids"][:, :5],
                max_new_tokens=6,
                do_sample=False,
                cache_implementation=None if cache == "dynamic" else "static",
                pad_token_id=0,
                eos_token_id=None,
            )
    finally:
        model.forward = plain
    return tokens, recorder


ONE_CACHE = {"opt": "dynamic", "gemma": "static", "phi3": "static"}  # the others have both


@pytest.mark.parametrize(
    ("family", "cache"),
    [(f, c) for f in FAMILIES for c in ("dynamic", "static") if ONE_CACHE.get(f, c) == c],
)
def test_generate_equals_dense_with_as_many_compilations(family: str, cache: str) -> None:
    case = testing.tiny(family)
    expected, dense = generated(case, cache, lambda gm, inputs: gm.forward)
    d2d.convert(case.model, [case.inputs], QUICK, progress=False)

    def experts(gm: GraphModule, inputs: list[Any]) -> Any:
        return backend(gm, inputs, options={"inner": "eager", "tau": 0.0})

    tokens, converted = generated(case, cache, experts)
    assert torch.equal(tokens, expected)
    assert len(converted.found) == len(dense.found)
    projections = 2 if family in ("gpt2", "phi3") else 4  # two have one matrix for q, k and v
    whole = (case.blocks, case.blocks * projections)
    graphs = [found for found in converted.found if found != (0, 0)]  # without masks and the like
    assert set(graphs) == {whole}
    assert len(graphs) >= 2, "prefill and decode were not both compiled"
